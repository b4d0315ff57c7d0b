"""Configuration of the summation aggregation models."""

from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .configuration_text import TextConfig


@strict
class SumAggConfig(TextConfig):
    r"""
    Configuration of a [`SumAggModel`] and of the models with a head on top of it.

    The architecture is that of P. Ekin, "Summation-Based Transformers: A Path Toward Linear Complexity Sequence
    Modeling" (TechRxiv 2025, doi 10.36227/techrxiv.175790522.25734653). The defaults are the form that learns well:
    pre-norm blocks, gated sums with keys and with decays computed from the tokens, a last layer that attends to a window
    with rotary positions, a state of constant size, and no limit of length. The presets `sumagg-published-lm` and
    `sumagg-published-classifier` are the published form. The config file of an older version keeps its meaning.

    Args:
        layer_types (`list[str]`, *optional*): the mixer of each block, `"summation"`, `"full_attention"` or
            `"sliding_attention"`. By default the last block attends and all others sum: to a window of
            `sliding_window` tokens (256) if the sums have keys, else to all tokens (as in the published hybrid).
        is_causal (`bool`, defaults to `True`): whether a token sees only itself and earlier tokens. In a bidirectional
            model `sliding_window` is the reach on either side, and terms decay to both sides.
        position_embedding_type (`str`, defaults to `"none"`): the `P` of `E[x] * (P + b)`: `"learned"` (a table, as
            published), `"sinusoidal"` (computed, for unlimited length) or `"none"`.
        position_bias (`float`, defaults to 2.0): the `b` of `E[x] * (P + b)` (published: 2.0 in the language models,
            1.0 in the classifier).
        norm_position (`str`, defaults to `"pre"`): LayerNorm before each sublayer (`"pre"`), or after each residual
            addition (`"post"`, as published).
        rope_parameters (`dict`, *optional*, defaults to rotary positions with `rope_theta=10000.0`): those of the
            attention layers ([`TextConfig`]); published: `None`.
        sum_decay (`str`, *optional*): the decays of the sums ([`TextConfig`]); `"input"` by default, and `"none"` with
            `sum_normalization="sqrt"`; published: `"none"`.
        num_sum_heads (`int`, *optional*, defaults to `num_attention_heads`): heads of the sums, each with its own decay;
            must divide `hidden_size`.
        sum_normalization (`str`, *optional*): the divisor of a sum over `n` tokens: `n` (`"mean"`, the default with
            decays), its square root (`"sqrt"`, the default without decays, and allowed only there), or none (`"none"`, as
            published). With decays `a`, `"mean"` divides by the sum of the weights `1 - a` after their own decay
            ([`~modeling_sumagg.ops.causal_mean`]).
        sum_map (`str`, defaults to `"linear"`): the term of a token's vector `u`: `W u` (`"linear"`), or
            `relu(W2 relu(W1 u))` (`"relu"`, as published).
        sum_skip (`bool`, *optional*): whether the token's own term is added to the (normalised) sum (published: no), with
            keys times a learned number for each head. The default is true only after a convolution: without a
            convolution, models with a skip learned worse.
        sum_gate (`bool`, defaults to `True`): whether the sums are multiplied by `silu(W_g h)` (published: no).
        conv_kernel_size (`int`, *optional*, defaults to 4 in causal models): the taps of a causal depthwise convolution
            with SiLU in each summation mixer; `None`: no convolution (published).
        conv_before (`str`, defaults to `"terms"`): the place of the convolution: before the terms only, so that gate and
            decays are computed from the token alone (`"terms"`), or before terms, gate and decays (`"mixer"`).
        sum_state_size (`int`, *optional*): N, the length of the keys and queries of the sums. The state of a head of p
            channels is then a matrix of `N * p` float32 numbers, from which a token recalls values by key
            ([`~modeling_sumagg.ops.causal_keyed_sum`]). The convolution then runs over values, keys and queries. `None`:
            no keys, and a vector as state. Keys need decays, `sum_map="linear"`, `sum_normalization="mean"` and
            `conv_before="terms"`. With these values the default is p, else `None`.
        num_sum_key_heads (`int`, *optional*, defaults to `num_sum_heads`): the number of keys and of queries of a token.
            Must divide `num_sum_heads`: consecutive heads share a key and a query.
        pooling (`str`, defaults to `"sum"`): how a sequence classifier pools: the sum over `relu(W h_t)` (`"sum"`, as
            published), its mean (`"mean"`), or the hidden state of the last token (`"last"`).
        mlp_gate (`bool`, defaults to `True`): whether the feed-forward layers are gated (published: no).
        norm_type (`str`, defaults to `"layer"`): the norms, `"layer"`, or `"rms"` as in Llama.
        attention_bias (`bool` or `"qkv"`, defaults to `True`): whether the maps of attention layers have a bias; with
            `"qkv"` all but the output has one, as in Qwen2.
        mlp_bias (`bool`, defaults to `True`): whether the maps of feed-forward layers have a bias.
        attention_sum (`bool`, defaults to `False`): whether sliding attention layers add, through a gate, a sum with keys
            over the whole document, with decays of `sum_decay`.
        kwargs: the arguments of [`TextConfig`]: `vocab_size`, `hidden_size`, `num_hidden_layers` (0: the embedding
            alone, as in the published classifier), `num_attention_heads`, `intermediate_size`, `hidden_act` (published:
            `"relu"`), `num_key_value_heads`, `head_dim`, `attention_norm`, `attention_sinks`, `sliding_window`, `max_position_embeddings`, the dropouts, `layer_norm_eps`, `initializer_range`,
            `tie_word_embeddings` (published: no), `lm_head_bias` (published: yes), `fuse_linear_cross_entropy`,
            `use_cache` and the special tokens.

    Raises:
        `ValueError` or the strict dataclass's validation error: a value is of the wrong type or not allowed.

    Example:

    ```python
    >>> from modeling_sumagg import SumAggConfig, SumAggForCausalLM

    >>> config = SumAggConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
    >>> config.layer_types
    ['summation', 'summation', 'sliding_attention']
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
    default_sliding_window = 256
    # Sums run channel by channel: each process sums its own channels and keeps their decode state.
    base_model_tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.mixer.in_proj": "colwise_gather_output",
        "layers.*.mixer.hidden_proj": "colwise",
        "layers.*.mixer.qkv_proj": "colwise",
        "layers.*.mixer.conv.weight": "colwise",
        "layers.*.mixer.conv.bias": "colwise",
        "layers.*.mixer.skip": "colwise",
        "layers.*.mixer.norm_weight": "colwise",
        "layers.*.mixer.gate_proj": "colwise",
        "layers.*.mixer.decay.logit": "colwise",
        "layers.*.mixer.decay.proj": "colwise",
        "layers.*.mixer.q_proj": "colwise",
        "layers.*.mixer.k_proj": "colwise",
        "layers.*.mixer.v_proj": "colwise",
        "layers.*.mixer.sum_gate": "colwise",
        "layers.*.mixer.q_norm": "replicated_with_grad_allreduce",
        "layers.*.mixer.k_norm": "replicated_with_grad_allreduce",
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
    norm_type: Literal["layer", "rms"] = "layer"
    attention_bias: bool | Literal["qkv"] = True
    mlp_bias: bool = True
    attention_sum: bool = False
    sum_state_size: int | Literal["auto"] | None = "auto"
    num_sum_key_heads: int | None = None
    pooling: Literal["sum", "mean", "last"] = "sum"

    def __post_init__(self, **kwargs):
        if self.num_sum_heads is None:
            self.num_sum_heads = self.num_attention_heads
        if self.sum_decay is None:
            self.sum_decay = "none" if self.sum_normalization == "sqrt" else "input"
        if self.sum_normalization is None:
            self.sum_normalization = "sqrt" if self.sum_decay == "none" else "mean"
        if self.conv_kernel_size == "auto":
            self.conv_kernel_size = 4 if self.is_causal else None
        if self.sum_state_size == "auto":
            options = self.sum_map, self.sum_normalization, self.conv_before
            is_keyed = options == ("linear", "mean", "terms") and self.sum_decay != "none"
            is_keyed = is_keyed and self.num_sum_heads > 0 and self.hidden_size % self.num_sum_heads == 0
            self.sum_state_size = self.hidden_size // self.num_sum_heads if is_keyed else None
        if self.sum_skip is None:
            self.sum_skip = self.conv_kernel_size is not None
        # A plan names the modules that a model has: transformers warns of others. Without keys each process convolves
        # all channels.
        is_keyed = self.sum_state_size is not None
        parts = {
            (".in_proj",): self.sum_map == "relu",
            (".hidden_proj",): not is_keyed,
            (".qkv_proj", ".norm_weight"): is_keyed,
            (".conv.weight", ".conv.bias"): is_keyed and self.conv_kernel_size is not None,
            (".skip",): is_keyed and self.sum_skip,
            (".q_norm", ".k_norm"): self.attention_norm,
            (".sum_gate",): self.attention_sum,
        }
        absent = [name for names, is_present in parts.items() if not is_present for name in names]
        plan = {name: kind for name, kind in self.base_model_tp_plan.items() if not name.endswith(tuple(absent))}
        self.base_model_tp_plan = plan  # type: ignore[misc]
        super().__post_init__(**kwargs)

    def default_layer_types(self) -> list[str]:
        """The last block attends, and all others sum. It attends to a window beside sums with keys, else to all tokens."""
        last = "full_attention" if self.sum_state_size is None else "sliding_attention"
        return (["summation"] * (self.num_hidden_layers - 1) + [last])[: self.num_hidden_layers]

    def validate_sums(self):
        """Part of `@strict`-powered validation: the options of the summation mixers are consistent."""
        if not self.num_sum_heads or self.num_sum_heads < 1 or self.hidden_size % self.num_sum_heads:
            raise ValueError(
                f"`num_sum_heads` must divide `hidden_size`, got {self.num_sum_heads} heads for a width of "
                f"{self.hidden_size}."
            )
        if self.sum_normalization == "sqrt" and self.sum_decay != "none":
            raise ValueError(
                f"`sum_normalization='sqrt'` needs sums without decays, but `sum_decay` is {self.sum_decay!r}: choose "
                "'mean' or 'none'."
            )
        if self.attention_sum and (self.sum_decay == "none" or not self.is_causal):
            raise ValueError(
                "`attention_sum` is for causal models with a `sum_decay` of 'input' or 'learned', got "
                f"{self.sum_decay!r} and `is_causal` = {self.is_causal}."
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
        if self.sum_state_size < 1:  # type: ignore[operator]
            raise ValueError(f"`sum_state_size` must be at least 1, or None, got {self.sum_state_size}.")
        key_heads = self.num_sum_key_heads
        if key_heads is not None and (key_heads < 1 or self.num_sum_heads % key_heads):  # type: ignore[operator]
            raise ValueError(
                f"`num_sum_key_heads` must divide `num_sum_heads` = {self.num_sum_heads}, got {self.num_sum_key_heads}."
            )
        needed = {"sum_map": "linear", "sum_normalization": "mean", "conv_before": "terms"}
        wrong = {name: getattr(self, name) for name, value in needed.items() if getattr(self, name) != value}
        if self.sum_decay == "none":
            wrong["sum_decay"] = "none"
        if wrong:
            raise ValueError(
                f"`sum_state_size` = {self.sum_state_size} needs {needed} and a `sum_decay` of 'input' or 'learned', got "
                f"{wrong}. Set `sum_state_size=None` for sums without keys."
            )


__all__ = ["SumAggConfig"]
