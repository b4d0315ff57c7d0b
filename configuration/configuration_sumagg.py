"""Configuration of the summation aggregation models."""

from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .configuration_text import TextConfig


@strict
class SumAggConfig(TextConfig):
    r"""
    Configuration of a [`SumAggModel`] and of the models with a head on it.

    The architecture is that of P. Ekin, "Summation-Based Transformers: A Path Toward Linear Complexity Sequence
    Modeling" (TechRxiv 2025, doi 10.36227/techrxiv.175790522.25734653). The defaults are what learns well: pre-norm blocks,
    gated means of what the tokens themselves let decay, one attention layer with rotary positions at the end, and no
    limit of length. The published form is in the presets `sumagg-published-lm` and `sumagg-published-classifier`. A
    config file that has no `sum_decay`, as in version 0.1, no `mlp_gate` or no `sum_skip` means what it meant.

    Args:
        layer_types (`list[str]`, *optional*): the mixer of each block, `"summation"`, `"full_attention"` or
            `"sliding_attention"`. By default every block sums but the last, which attends (the published hybrid).
        is_causal (`bool`, defaults to `True`): whether a token sees only itself and the tokens before it. In a
            bidirectional model `sliding_window` is how far a token sees on either side, and terms decay to both.
        position_embedding_type (`str`, defaults to `"none"`): the `P` of `E[x] * (P + b)`: `"learned"` (a table, as
            published), `"sinusoidal"` (computed, for unlimited length) or `"none"`.
        position_bias (`float`, defaults to 2.0): the `b` of `E[x] * (P + b)` (published: 2.0 in the language models,
            1.0 in the classifier).
        norm_position (`str`, defaults to `"pre"`): LayerNorm before each sublayer (`"pre"`), or after each residual sum
            (`"post"`, as published).
        rope_parameters (`dict`, *optional*, defaults to rotary positions with `rope_theta=10000.0`): those of the
            attention layers ([`TextConfig`]); published: `None`.
        sum_decay (`str`, *optional*): the decays of the sums ([`TextConfig`]); `"input"` by default, and `"none"` with
            `sum_normalization="sqrt"`; published: `"none"`.
        num_sum_heads (`int`, *optional*, defaults to `num_attention_heads`): heads of the sums, each with a decay of its
            own; must divide `hidden_size`.
        sum_normalization (`str`, *optional*): divide the sum over `n` tokens by `n` (`"mean"`, the default with decays), by
            its square root (`"sqrt"`, the default without, and for them alone), or not (`"none"`, as published). With
            decays `a` the mean is weighted by them and by `1 - a` ([`~modeling_sumagg.ops.causal_mean`]).
        sum_map (`str`, defaults to `"linear"`): what makes a term of a token's vector `u`: `W u` (`"linear"`), or
            `relu(W2 relu(W1 u))` (`"relu"`, as published).
        sum_skip (`bool`, *optional*): whether the token's own term is added to the (normalised) sum (published: no). By
            default only after a convolution: without one, models learned worse with it.
        sum_gate (`bool`, defaults to `True`): whether the sums are multiplied by `silu(W_g h)` (published: no).
        conv_kernel_size (`int`, *optional*, defaults to 4 in causal models): a causal depthwise convolution over as many
            tokens in each summation mixer, SiLU after it; none with `None` (published).
        conv_before (`str`, defaults to `"terms"`): what the convolution stands before: the map of the terms alone, so that
            gate and decays are those of the token itself (`"terms"`), or the mixer with all three (`"mixer"`).
        sum_state_size (`int`, *optional*): N, the length of the keys and queries of the sums. The state of a head of p
            channels is then a matrix of `N * p` float32 numbers ([`~modeling_sumagg.ops.causal_keyed_sum`]), from which
            a token recalls by key. The convolution is then over values, keys and queries. `None`: no keys, a vector of
            state. Keys need `is_causal=True`, decays, `sum_map="linear"`, `sum_normalization="mean"` and
            `conv_before="terms"`; with these values the default is p, else `None`.
        num_sum_key_heads (`int`, *optional*, defaults to `num_sum_heads`): how many keys and queries a token has. Must
            divide `num_sum_heads`: consecutive heads share them.
        sum_output_norm (`bool`, defaults to `True`): whether sums with keys have an RMS norm over the channels of each
            head.
        pooling (`str`, defaults to `"sum"`): how a sequence classifier pools: the sum over `relu(W h_t)` (`"sum"`, as
            published), its mean (`"mean"`), or the hidden state of the last token (`"last"`).
        mlp_gate (`bool`, defaults to `True`): whether the feed-forward layers are gated (published: no).
        kwargs: those of [`TextConfig`]: `vocab_size`, `hidden_size`, `num_hidden_layers` (0 leaves the embedding alone,
            as in the published classifier), `num_attention_heads`, `intermediate_size`, `hidden_act` (published:
            `"relu"`), `sliding_window`, `max_position_embeddings`, the dropouts, `layer_norm_eps`, `initializer_range`,
            `tie_word_embeddings` (published: no), `lm_head_bias` (published: yes), `fuse_linear_cross_entropy`,
            `use_cache` and the special tokens.

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
    values_of_0_2 = {"sum_state_size": None}
    values_of_0_1 = {
        **TextConfig.values_of_0_1,
        **values_of_0_2,
        "position_embedding_type": "learned",
        "sum_map": "relu",
        "sum_skip": False,
        "sum_gate": False,
        "conv_kernel_size": None,
        "conv_before": "mixer",
    }
    default_sliding_window = 64
    # Sums run channel by channel, so that each process sums, and keeps the decode state of, its own channels.
    base_model_tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.mixer.in_proj": "colwise_gather_output",
        "layers.*.mixer.hidden_proj": "colwise",
        "layers.*.mixer.qkv_proj": "colwise",
        "layers.*.mixer.conv.weight": "colwise",
        "layers.*.mixer.conv.bias": "colwise",
        "layers.*.mixer.gate_proj": "colwise",
        "layers.*.mixer.decay.logit": "colwise",
        "layers.*.mixer.decay.proj": "colwise",
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.out_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    is_causal: bool = True
    position_embedding_type: Literal["learned", "sinusoidal", "none"] = "none"
    position_bias: float | int = 2.0
    rope_parameters: dict[str, Any] | None = field(default_factory=lambda: {"rope_type": "default"})
    norm_position: Literal["pre", "post"] = "pre"
    sum_decay: Literal["none", "learned", "input"] | None = None  # type: ignore[assignment]
    num_sum_heads: int | None = None
    sum_normalization: Literal["none", "mean", "sqrt"] | None = None
    sum_map: Literal["relu", "linear"] = "linear"
    sum_skip: bool | None = None
    sum_gate: bool = True
    conv_kernel_size: int | Literal["auto"] | None = "auto"
    conv_before: Literal["mixer", "terms"] = "terms"
    mlp_gate: bool = True
    sum_state_size: int | Literal["auto"] | None = "auto"
    num_sum_key_heads: int | None = None
    sum_output_norm: bool = True
    pooling: Literal["sum", "mean", "last"] = "sum"

    def __post_init__(self, **kwargs):
        if self.num_sum_heads is None:
            self.num_sum_heads = self.num_attention_heads
        if self.num_sum_key_heads is None:
            self.num_sum_key_heads = self.num_sum_heads
        if self.sum_decay is None:
            self.sum_decay = "none" if self.sum_normalization == "sqrt" else "input"
        if self.sum_normalization is None:
            self.sum_normalization = "sqrt" if self.sum_decay == "none" else "mean"
        if self.conv_kernel_size == "auto":
            self.conv_kernel_size = 4 if self.is_causal else None
        if self.sum_state_size == "auto":
            options = self.is_causal, self.sum_map, self.sum_normalization, self.conv_before
            is_keyed = options == (True, "linear", "mean", "terms") and self.sum_decay != "none"
            is_keyed = is_keyed and self.num_sum_heads > 0 and self.hidden_size % self.num_sum_heads == 0
            self.sum_state_size = self.hidden_size // self.num_sum_heads if is_keyed else None
        if self.sum_skip is None:
            self.sum_skip = self.conv_kernel_size is not None
        # A plan names the modules that a model has: transformers warns of others. Without keys each process convolves
        # all channels.
        absent = [".hidden_proj"] if self.sum_state_size is not None else [".qkv_proj", ".conv.weight", ".conv.bias"]
        absent += [] if self.sum_map == "relu" else [".in_proj"]
        plan = {name: kind for name, kind in self.base_model_tp_plan.items() if not name.endswith(tuple(absent))}
        self.base_model_tp_plan = plan  # type: ignore[misc]
        super().__post_init__(**kwargs)

    def default_layer_types(self) -> list[str]:
        """Every block sums but the last, which attends: beside sums with keys to a window, else to all tokens."""
        last = "full_attention" if self.sum_state_size is None else "sliding_attention"
        return (["summation"] * (self.num_hidden_layers - 1) + [last])[: self.num_hidden_layers]

    def validate_sums(self):
        """Part of `@strict`-powered validation: the options of the summation mixers fit together."""
        if not self.num_sum_heads or self.num_sum_heads < 1 or self.hidden_size % self.num_sum_heads:
            raise ValueError(
                f"`num_sum_heads` must divide `hidden_size`, got {self.num_sum_heads} heads for a width of "
                f"{self.hidden_size}."
            )
        if self.sum_normalization == "sqrt" and self.sum_decay != "none":
            raise ValueError(
                f"`sum_normalization='sqrt'` is for sums without decays, and `sum_decay` is {self.sum_decay!r}: choose "
                "'mean' or 'none'."
            )
        if self.sum_state_size is not None:
            self._validate_keys()
        if isinstance(self.conv_kernel_size, int) and self.conv_kernel_size < 2:
            raise ValueError(f"`conv_kernel_size` must be at least 2, or None, got {self.conv_kernel_size}.")
        if self.conv_kernel_size is not None and not self.is_causal:
            raise ValueError(
                f"`conv_kernel_size` = {self.conv_kernel_size} is for causal models (`is_causal=True`): leave it out."
            )

    def _validate_keys(self) -> None:
        if self.sum_state_size < 1:
            raise ValueError(f"`sum_state_size` must be at least 1, or None, got {self.sum_state_size}.")
        if self.num_sum_key_heads < 1 or self.num_sum_heads % self.num_sum_key_heads:
            raise ValueError(
                f"`num_sum_key_heads` must divide `num_sum_heads` = {self.num_sum_heads}, got {self.num_sum_key_heads}."
            )
        needed = {"is_causal": True, "sum_map": "linear", "sum_normalization": "mean", "conv_before": "terms"}
        wrong = {name: getattr(self, name) for name, value in needed.items() if getattr(self, name) != value}
        if self.sum_decay == "none":
            wrong["sum_decay"] = "none"
        if wrong:
            raise ValueError(
                f"`sum_state_size` = {self.sum_state_size} needs {needed} and a `sum_decay` of 'input' or 'learned', got "
                f"{wrong}. Set `sum_state_size=None` for sums without keys."
            )


__all__ = ["SumAggConfig"]
