"""Configuration of the summation aggregation models."""

from typing import Literal

from huggingface_hub.dataclasses import strict

from .configuration_text import TextConfig


@strict
class SumAggConfig(TextConfig):
    r"""
    Configuration of a [`SumAggModel`] and of the models with a head on it.

    The architecture is that of P. Ekin, "Summation-Based Transformers: A Path Toward Linear Complexity Sequence
    Modeling" (TechRxiv 2025, doi 10.36227/techrxiv.175790522.25734653). The defaults are what is trained well today (a
    normalised sum and pre-norm blocks); the published form is in the presets `sumagg-published-lm` and
    `sumagg-published-classifier`.

    Args:
        layer_types (`list[str]`, *optional*): the mixer of each block, `"summation"`, `"full_attention"` or
            `"sliding_attention"`. By default every block sums but the last, which attends (the published hybrid).
        is_causal (`bool`, defaults to `True`): whether a token sees only itself and the tokens before it. In a
            bidirectional model `sliding_window` is how far a token sees on either side.
        position_embedding_type (`str`, defaults to `"learned"`): the `P` of `E[x] * (P + b)`: `"learned"` (a table, as
            published), `"sinusoidal"` (computed, for unlimited length) or `"none"`.
        position_bias (`float`, defaults to 2.0): the `b` of `E[x] * (P + b)` (published: 2.0 in the language models,
            1.0 in the classifier).
        norm_position (`str`, defaults to `"pre"`): LayerNorm before each sublayer (`"pre"`), or after each residual sum
            (`"post"`, as published).
        sum_normalization (`str`, defaults to `"sqrt"`): divide the sum over `n` tokens by `n` (`"mean"`), by its square
            root (`"sqrt"`), or not (`"none"`, as published).
        pooling (`str`, defaults to `"sum"`): how a sequence classifier pools: the sum over `relu(W h_t)` (`"sum"`, as
            published), its mean (`"mean"`), or the hidden state of the last token (`"last"`).
        kwargs: those of [`TextConfig`]: `vocab_size`, `hidden_size`, `num_hidden_layers` (0 leaves the embedding alone,
            as in the published classifier), `num_attention_heads`, `intermediate_size`, `hidden_act` (published:
            `"relu"`; the maps inside the summation mixer are always followed by ReLU), `sliding_window`,
            `max_position_embeddings`, the dropouts, `layer_norm_eps`, `initializer_range`, `tie_word_embeddings`
            (published: no), `lm_head_bias` (published: yes), `fuse_linear_cross_entropy`, `use_cache` and the special
            tokens.

    Raises:
        `ValueError` or the strict dataclass's validation error: a value is of the wrong type or not allowed.

    Example:

    ```python
    >>> from modeling_sumagg import SumAggConfig, SumAggForCausalLM

    >>> config = SumAggConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    >>> config.layer_types
    ['summation', 'summation', 'full_attention']
    >>> model = SumAggForCausalLM(config)
    ```
    """

    model_type = "sumagg"
    recurrent_layer_types = ("summation",)
    # Sums run channel by channel, so that each process sums, and keeps the decode state of, its own channels.
    base_model_tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.mixer.in_proj": "colwise_gather_output",
        "layers.*.mixer.hidden_proj": "colwise",
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.out_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    is_causal: bool = True
    position_bias: float | int = 2.0
    norm_position: Literal["pre", "post"] = "pre"
    sum_normalization: Literal["none", "mean", "sqrt"] = "sqrt"
    pooling: Literal["sum", "mean", "last"] = "sum"

    def default_layer_types(self) -> list[str]:
        """Every block sums but the last, which attends."""
        return (["summation"] * (self.num_hidden_layers - 1) + ["full_attention"])[: self.num_hidden_layers]


__all__ = ["SumAggConfig"]
