"""The fields and checks that the configs of all models over tokens share."""

import math
from dataclasses import field, fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, configuration_utils

from .configuration_fields import NamedFields


ATTENTION_TYPES = ("full_attention", "sliding_attention")
LEAST_VALUES = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_attention_heads", "head_dim", "intermediate_size"), 1),
    **dict.fromkeys(("sliding_window", "max_position_embeddings"), 1),
    **dict.fromkeys(("num_hidden_layers", "initializer_range", "attention_sinks"), 0),
}
# By the type of rotary positions: the parameters that it needs, and those that it may have, beside `rope_theta`.
ROPE_TYPES: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}


@strict
class TextConfig(NamedFields, PreTrainedConfig):
    r"""
    The fields and checks that the configs of all decoders share. A family sets `recurrent_layer_types`. It overrides
    `default_layer_types` if its default model does not consist of the first of these types alone.

    Args:
        vocab_size (`int`, defaults to 50257): number of token ids.
        hidden_size (`int`, defaults to 768): width `d`.
        num_hidden_layers (`int`, defaults to 12): number of blocks.
        num_attention_heads (`int`, defaults to 12): heads of the attention layers; must divide `hidden_size`, unless
            there is a `head_dim`.
        num_key_value_heads (`int`, *optional*): heads of keys and values in the attention layers; must divide
            `num_attention_heads`, which is the default.
        head_dim (`int`, *optional*, defaults to `hidden_size / num_attention_heads`): width of an attention head.
        attention_norm (`bool`, defaults to `False`): whether queries and keys have an RMS norm over each head.
        attention_sinks (`int`, defaults to 0): the first tokens of a document that sliding attention layers always see.
        intermediate_size (`int`, *optional*, defaults to `4 * hidden_size`): width of the feed-forward layers. With
            `mlp_gate` the default is about two thirds of that, for equal parameters. It is then a multiple of the largest
            power of two up to 128 that divides `hidden_size`, so that groups of quantized weights divide both.
        hidden_act (`str`, defaults to `"gelu"`): activation of the feed-forward layers.
        mlp_gate (`bool`, defaults to `False`): whether the feed-forward layers are gated linear units (arXiv 2002.05202),
            `W_b (act(W_g h) * (W_a h))` instead of `W_b act(W_a h)`.
        layer_types (`list[str]`, *optional*): the mixer of each block: a recurrent type of the family,
            `"full_attention"` or `"sliding_attention"`.
        sliding_window (`int`, *optional*, defaults to 512 where a layer needs one): tokens that a sliding attention
            layer attends to, the current one included.
        position_embedding_type (`str`, defaults to `"none"`): `"learned"` (a table, which limits the length),
            `"sinusoidal"` (computed) or `"none"`.
        max_position_embeddings (`int`, *optional*, defaults to 1024 if the model has parameters for each position): the
            longest document in tokens. A model without a limit has no such attribute. Clients detect it by that.
        rope_parameters (`dict`, *optional*): rotary positions (arXiv 2104.09864) in the attention layers, as transformers
            writes them: `{"rope_type": "default", "rope_theta": 10000.0}`, or `"linear"`, `"llama3"` or `"yarn"` with
            their parameters. The argument `rope_theta=10000.0` means the former. `None` means no rotary positions.
        sum_decay (`str`, defaults to `"none"`): the factor of the sums of recurrent layers before a token is added: none
            (`"none"`, as published), one learned decay for each head (`"learned"`), or one decay for each head and token,
            a learned function of the token (`"input"`).
        sum_decay_min, sum_decay_max (`float`, default to 1.0 and 256.0): the initial time constants of the first and of
            the last head, in tokens: a term has decayed to 1/e after as many tokens. Those of the other heads lie
            between, in equal ratios.
        embedding_dropout (`float`, defaults to 0.0): dropout on the embeddings.
        hidden_dropout (`float`, defaults to 0.0): dropout on the output of every mixer and feed-forward layer.
        attention_dropout (`float`, defaults to 0.0): dropout on the attention probabilities.
        classifier_dropout (`float`, defaults to 0.0): dropout before the classification heads.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the norms.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        tie_word_embeddings (`bool`, defaults to `True`): whether the output projection is the embedding table.
        lm_head_bias (`bool`, defaults to `False`): whether the output projection has a bias.
        fuse_linear_cross_entropy (`bool`, defaults to `False`): whether a language model in training computes its loss
            without ever holding the logits of all tokens. It then returns no logits. Needs PyTorch's
            `linear_cross_entropy`.
        use_cache (`bool`, defaults to `True`): whether the model returns its decode state.
        bos_token_id, eos_token_id, pad_token_id (`int`, *optional*): the special tokens.

    Raises:
        `ValueError` or the strict dataclass's validation error: a value is of the wrong type or not allowed.
    """

    # The names of the decode state in outputs, of newer and older transformers.
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    recurrent_layer_types: ClassVar[tuple[str, ...]] = ()
    # The values of fields that files of an earlier version do not have.
    values_of_0_1: ClassVar[dict[str, Any]] = {"mlp_gate": False, "sum_decay": "none", "rope_parameters": None}
    values_of_0_2: ClassVar[dict[str, Any]] = {}
    default_sliding_window: ClassVar[int] = 512
    is_causal = True

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    # A default of the class would give every config these attributes.
    num_key_value_heads: int | None = field(default_factory=lambda: None)
    head_dim: int | None = field(default_factory=lambda: None)
    attention_norm: bool = False
    attention_sinks: int = 0
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    mlp_gate: bool = False
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    position_embedding_type: Literal["learned", "sinusoidal", "none"] = "none"
    # A default of the class would give an unlimited config this attribute.
    max_position_embeddings: int | None = field(default_factory=lambda: None)
    rope_parameters: dict[str, Any] | None = None
    sum_decay: Literal["none", "learned", "input"] = "none"
    sum_decay_min: float | int = 1.0
    sum_decay_max: float | int = 256.0
    embedding_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    lm_head_bias: bool = False
    fuse_linear_cross_entropy: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __init_subclass__(cls, *args, **kwargs):
        super().__init_subclass__(*args, **kwargs)
        # `Trainer` loads the config of a checkpoint as a plain `PreTrainedConfig`, which must know the layer types.
        known = configuration_utils.ALLOWED_ATTN_LAYER_TYPES
        new = tuple(kind for kind in cls.recurrent_layer_types if kind not in known)
        configuration_utils.ALLOWED_ATTN_LAYER_TYPES = (*known, *new)

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            width = 4 * self.hidden_size
            if self.mlp_gate:
                group = math.gcd(self.hidden_size, 128)
                width = group * round(2 * width / 3 / group)
            self.intermediate_size = width
        if self.layer_types is None:
            self.layer_types = self.default_layer_types()
        if self.sliding_window is None and "sliding_attention" in self.layer_types:
            self.sliding_window = self.default_sliding_window
        for name in ("num_key_value_heads", "head_dim"):
            if getattr(self, name) is None:
                delattr(self, name)
        if not self.has_position_limit():
            del self.max_position_embeddings
        elif self.max_position_embeddings is None:
            self.max_position_embeddings = 1024
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        As in transformers. Values that `from_pretrained(..., name=value)` changes are validated again, and the fields that
        depend on them are derived again.

        Raises:
            `ValueError`: a changed value is not allowed, or contradicts other fields.
        """
        earlier_values = cls.values_of_0_1 if "sum_decay" not in config_dict else cls.values_of_0_2
        config_dict = {**earlier_values, **config_dict}
        changed = {f.name: kwargs.pop(f.name) for f in fields(cls) if f.name in kwargs and f.name != "dtype"}
        try:
            return super().from_dict({**config_dict, **changed}, **kwargs)
        except StrictDataclassError as error:
            if not changed:
                raise
            raise ValueError(f"Changed in the config of the checkpoint: {changed}. {error}") from error

    def convert_rope_params_to_dict(self, **kwargs) -> dict[str, Any]:
        """As in transformers, except that `None` stays `None`: no rotary positions."""
        self._check_rope_type(kwargs.get("rope_scaling") or self.rope_parameters or {})
        if self.rope_parameters is None and not {"rope_theta", "rope_scaling"} & kwargs.keys():
            return kwargs
        return super().convert_rope_params_to_dict(**kwargs)

    def validate_rope(self):
        """Part of `@strict`-powered validation: rotary positions that do not depend on the length of the input."""
        if self.rope_parameters is None:
            return
        self._check_rope_type(self.rope_parameters)
        heads = self.num_attention_heads
        is_divided = heads > 0 and self.hidden_size > 0 and self.hidden_size % heads == 0
        if (is_divided or hasattr(self, "head_dim")) and getattr(self, "head_dim", self.hidden_size // heads) % 2:
            raise ValueError(
                f"Rotary positions (`rope_parameters`) need an even width of attention heads, got "
                f"{getattr(self, 'head_dim', f'{self.hidden_size} / {heads}')}."
            )
        if "original_max_position_embeddings" not in self.rope_parameters:
            super().validate_rope()

    @property
    def original_max_position_embeddings(self) -> int | None:
        """For transformers, which would look for a limit of the model, and the model may have none."""
        return (self.rope_parameters or {}).get("original_max_position_embeddings")

    @staticmethod
    def _check_rope_type(rope_parameters: dict[str, Any]) -> None:
        rope_type = rope_parameters.get("rope_type", "default")
        needed, optional = ROPE_TYPES.get(rope_type, (set(), set()))
        names = rope_parameters.keys() - {"rope_type", "rope_theta"}
        if rope_type not in ROPE_TYPES or not needed <= names <= needed | optional:
            parameters = {name: sorted(needed) for name, (needed, _) in ROPE_TYPES.items()}
            raise ValueError(
                "`rope_parameters` may have a `rope_type` of these, with these parameters and `rope_theta`, the same for "
                f"all attention layers: {parameters}; got {rope_parameters}. Other types change with the length of the "
                "input, so a cached decode state could not be continued."
            )

    def validate_direction(self):
        """Part of `@strict`-powered validation: only a family that has `is_causal` among its fields may be bidirectional."""
        if not self.is_causal and "is_causal" not in self.__dataclass_fields__:
            raise ValueError(
                f"`is_causal` is {self.is_causal}, and models of type {self.model_type!r} are always causal."
            )

    def default_layer_types(self) -> list[str]:
        """The `layer_types` of a config that names none."""
        return [self.recurrent_layer_types[0]] * self.num_hidden_layers

    def has_position_limit(self) -> bool:
        """Whether the model has parameters for each position, so that the context cannot exceed them."""
        return self.position_embedding_type == "learned"

    def validate_layer_type(self):
        """Part of `@strict`-powered validation: one known layer type for each layer."""
        allowed = [*self.recurrent_layer_types, *ATTENTION_TYPES]
        if self.layer_types is None:
            raise ValueError(
                "`layer_types` is None. A config derives it when it is created: change `num_hidden_layers` or `layer_types` "
                "in the arguments of the config class, or set both."
            )
        unknown = sorted(set(self.layer_types) - set(allowed))
        if unknown:
            raise ValueError(f"`layer_types` may hold {allowed}, got {unknown}.")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` must have `num_hidden_layers` = {self.num_hidden_layers} entries, got "
                f"{len(self.layer_types)}: {list(self.layer_types)}."
            )

    def validate_sizes(self):
        """Part of `@strict`-powered validation: sizes are positive and consistent, probabilities are in [0, 1)."""
        for name, least in LEAST_VALUES.items():
            value = getattr(self, name, None)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        if self.hidden_size % self.num_attention_heads and not hasattr(self, "head_dim"):
            raise ValueError(
                f"`num_attention_heads` must divide `hidden_size`, got {self.num_attention_heads} heads for a width of "
                f"{self.hidden_size}."
            )
        key_heads = getattr(self, "num_key_value_heads", self.num_attention_heads)
        if key_heads < 1 or self.num_attention_heads % key_heads:
            raise ValueError(
                f"`num_key_value_heads` must divide `num_attention_heads` = {self.num_attention_heads}, got {key_heads}."
            )
        if self.attention_sinks and not self.is_causal:
            raise ValueError(f"`attention_sinks` must be 0 in a bidirectional model, got {self.attention_sinks}.")
        if not 0.01 <= self.sum_decay_min <= self.sum_decay_max:
            # After a hundredth of a token a decay is zero in float32.
            raise ValueError(
                "`sum_decay_min` must be at least 0.01 and not above `sum_decay_max`, got "
                f"{self.sum_decay_min} and {self.sum_decay_max} tokens."
            )
        if not self.layer_norm_eps > 0:
            raise ValueError(f"`layer_norm_eps` must be above 0, got {self.layer_norm_eps}.")
        if self.sliding_window is None and "sliding_attention" in (self.layer_types or ()):
            raise ValueError(
                "`sliding_window` is None, but `layer_types` holds 'sliding_attention': set a number of tokens."
            )
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"Sinusoidal positions need an even `hidden_size`, got {self.hidden_size}.")
        for name in ("embedding_dropout", "hidden_dropout", "attention_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
