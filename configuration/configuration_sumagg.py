"""Configuration of the summation aggregation models."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .validation import check_layer_types, check_text_sizes, register_layer_types


LAYER_TYPES = ("summation", "full_attention", "sliding_attention")
register_layer_types("summation")


@strict
class SumAggConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SumAggModel`] and of the models with a head on it.

    The architecture is that of P. Ekin, "Summation-Based Transformers: A Path Toward Linear Complexity Sequence
    Modeling" (TechRxiv 2025, doi 10.36227/techrxiv.175790522.25734653). The defaults are what is trained well today (a
    normalised sum and pre-norm blocks); the published form is in the presets `sumagg-published-lm` and
    `sumagg-published-classifier`.

    Args:
        vocab_size (`int`, defaults to 50257): number of token ids.
        hidden_size (`int`, defaults to 768): width `d`.
        num_hidden_layers (`int`, defaults to 12): number of blocks. 0 leaves the embedding alone, as in the published
            classifier.
        num_attention_heads (`int`, defaults to 12): heads of the attention layers; must divide `hidden_size`.
        intermediate_size (`int`, *optional*, defaults to `4 * hidden_size`): width of the feed-forward layers.
        hidden_act (`str`, defaults to `"gelu"`): activation of the feed-forward layers (published: `"relu"`). The maps
            inside the summation mixer are always followed by ReLU.
        layer_types (`list[str]`, *optional*): the mixer of each block, `"summation"`, `"full_attention"` or
            `"sliding_attention"`. By default every block sums but the last, which attends (the published hybrid).
        sliding_window (`int`, *optional*, defaults to 512 where a layer needs one): tokens that a sliding attention
            layer sees, the current one included; in a bidirectional model, how far it sees on either side.
        is_causal (`bool`, defaults to `True`): whether a token sees only itself and the tokens before it.
        position_embedding_type (`str`, defaults to `"learned"`): `"learned"` (a table, as published), `"sinusoidal"`
            (computed, for unlimited length) or `"none"`.
        position_bias (`float`, defaults to 2.0): the `b` of `E[x] * (P + b)` (published: 2.0 in the language models,
            1.0 in the classifier).
        max_position_embeddings (`int`, defaults to 1024): rows of the learned table.
        norm_position (`str`, defaults to `"pre"`): LayerNorm before each sublayer (`"pre"`), or after each residual sum
            (`"post"`, as published).
        sum_normalization (`str`, defaults to `"sqrt"`): divide the sum over `n` tokens by `n` (`"mean"`), by its square
            root (`"sqrt"`), or not (`"none"`, as published).
        pooling (`str`, defaults to `"sum"`): how a sequence classifier pools: the sum over `relu(W h_t)` (`"sum"`, as
            published), its mean (`"mean"`), or the hidden state of the last token (`"last"`).
        embedding_dropout (`float`, defaults to 0.0): dropout on the modulated embeddings.
        hidden_dropout (`float`, defaults to 0.0): dropout on the output of every mixer and feed-forward layer.
        attention_dropout (`float`, defaults to 0.0): dropout on the attention probabilities.
        classifier_dropout (`float`, defaults to 0.0): dropout before the classification heads.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the LayerNorms.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        lm_head_bias (`bool`, defaults to `False`): whether the output projection has a bias (published: yes).
        tie_word_embeddings (`bool`, defaults to `True`): whether the output projection is the embedding table
            (published: no).
        fuse_linear_cross_entropy (`bool`, defaults to `False`): whether a language model in training computes its loss
            without ever holding the logits of all tokens, and returns none. Needs PyTorch's `linear_cross_entropy`.
        use_cache (`bool`, defaults to `True`): whether the model returns its decode state.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*): the special tokens.

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
    keys_to_ignore_at_inference = ["past_key_values"]
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

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    is_causal: bool = True
    position_embedding_type: Literal["learned", "sinusoidal", "none"] = "learned"
    position_bias: float | int = 2.0
    max_position_embeddings: int = 1024
    norm_position: Literal["pre", "post"] = "pre"
    sum_normalization: Literal["none", "mean", "sqrt"] = "sqrt"
    pooling: Literal["sum", "mean", "last"] = "sum"
    embedding_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    lm_head_bias: bool = False
    tie_word_embeddings: bool = True
    fuse_linear_cross_entropy: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.layer_types is None:
            self.layer_types = ["summation"] * (self.num_hidden_layers - 1) + ["full_attention"]
            self.layer_types = self.layer_types[: self.num_hidden_layers]
        if self.sliding_window is None and "sliding_attention" in self.layer_types:
            self.sliding_window = 512
        super().__post_init__(**kwargs)

    def validate_layer_type(self):
        """Part of `@strict`-powered validation: the layer types are known (transformers' own list lacks ours)."""
        check_layer_types(self.layer_types, LAYER_TYPES, self.num_hidden_layers)

    def validate_sizes(self):
        """Part of `@strict`-powered validation: the sizes fit together."""
        check_text_sizes(self)
