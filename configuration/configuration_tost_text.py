"""Configuration of the Token Statistics Transformer (ToST) for text, "Token Statistics Transformer: Linear-Time Attention
via Variational Rate Reduction", Wu et al., ICLR 2025, arXiv 2412.17810."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_text import TextConfig


@strict
class ToSTTextConfig(TextConfig):
    r"""
    Configuration of a ToST language model: [`ToSTTextModel`] and the models with a head on top of it. The defaults are the
    published base model. The published sizes are in `configuration/presets`.

    Args:
        layer_types (`list[str]`, *optional*): the mixer of each block, `"token_statistics"` (by default everywhere),
            `"full_attention"` or `"sliding_attention"`.
        position_embedding_type (`str`, defaults to `"learned"`): positions added to the embeddings: `"learned"` (a
            table, as published), `"sinusoidal"` (computed, for unlimited length) or `"none"`.
        use_bias (`bool`, defaults to `False`): whether the linear maps and the layer norms have a bias.
        use_membership_bias (`bool`, defaults to `True`): whether the membership has a learned bias β for each head and
            position, as published. Like a position table, β limits the context to `max_position_embeddings`. Unlimited
            length needs `False` and positions that are not learned.
        layerscale_value (`float`, defaults to 1e-5): initial layer scale γ.
        sum_decay (`str`, defaults to `"none"`, as published): the decays of all three sums ([`TextConfig`]).
        rope_parameters (`dict`, *optional*): rotary positions of the attention layers ([`TextConfig`]).
        kwargs: the arguments of [`TextConfig`]: `vocab_size` (here 50304 by default), `hidden_size`, `num_hidden_layers`,
            `num_attention_heads` (also the number K of subspaces among which each token distributes its membership Π),
            `intermediate_size`, `hidden_act`, `sliding_window`, `max_position_embeddings` (of the table and of β), the
            dropouts (`attention_dropout` also drops entries of 1/(1 + m) in token statistics), `layer_norm_eps`,
            `initializer_range`, `tie_word_embeddings`, `lm_head_bias`, `fuse_linear_cross_entropy`, `use_cache`, the
            special tokens.

    Raises:
        `ValueError` or the strict dataclass's validation error: a value is of the wrong type or not allowed.

    Example:

    ```python
    >>> from modeling_sumagg import ToSTForCausalLM, ToSTTextConfig

    >>> config = ToSTTextConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    >>> model = ToSTForCausalLM(config)
    ```"""

    model_type = "tost_text"
    recurrent_layer_types = ("token_statistics",)
    # The membership is a softmax over the heads, so every process needs all heads. Only the projections are sharded.
    base_model_tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.attention.w_proj": "colwise_gather_output",
        "layers.*.attention.q_proj": "colwise_gather_output",
        "layers.*.attention.k_proj": "colwise_gather_output",
        "layers.*.attention.v_proj": "colwise_gather_output",
        "layers.*.attention.o_proj": "rowwise_split_input",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.fc1": "colwise",
        "layers.*.mlp.fc2": "rowwise",
    }

    vocab_size: int = 50304
    position_embedding_type: Literal["learned", "sinusoidal", "none"] = "learned"
    use_bias: bool = False
    use_membership_bias: bool = True
    layerscale_value: float | int = 1e-5

    def has_position_limit(self) -> bool:
        """Both the table of positions and β have parameters for each position."""
        return self.use_membership_bias or super().has_position_limit()


__all__ = ["ToSTTextConfig"]
