"""The frame of every decoder: one forward pass."""

from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..common.checks import look_up, refuse_sequence_parallelism
from ..common.compatibility import (
    BaseModelOutputWithPast,
    accepts_cache,
    named_cache,
    warn_of_untested_transformers,
)
from ..common.positions import learned_positions, rotary_positions, sinusoidal_positions
from .attention import Attention
from .cache import adopt_cache
from .layers import make_norm
from .layout import SequenceLayout, last_real_hidden_states
from .masks import decoder_layout
from .recurrence import register_recurrent_layer_type


class DecoderPreTrainedModel(PreTrainedModel):
    """
    Base of the models over a sequence of tokens. A family derives one of its own, annotates its config class as `config`,
    and names its block as `layer_class`, made as `layer_class(config, layer_idx)` and called as
    `layer(hidden_states, layout, cache=cache, **shared, **kwargs)`, which is usually a [`DecoderLayer`].
    """

    layer_class: type[nn.Module]

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # transformers looks for the call of the attention interface in the file of a model; ours is in `attention.py`.
    _can_set_attn_implementation_cached_value = True

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for layer_type in getattr(cls.config_class, "recurrent_layer_types", ()):
            register_recurrent_layer_type(layer_type)
        if "layer_class" in cls.__dict__:
            own = cls.__dict__.get("_can_record_outputs", {})
            attentions = OutputRecorder(Attention, index=1)
            cls._can_record_outputs = {"hidden_states": cls.layer_class, "attentions": attentions, **own}
            cls._no_split_modules = [cls.layer_class.__name__]

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        # `from_pretrained(..., num_hidden_layers=...)` sets attributes of a config that was valid before.
        config.validate()
        warn_of_untested_transformers()

    def post_init(self) -> None:
        self._keep_in_fp32_modules = [
            name for name, module in self.named_modules() if getattr(module, "keep_in_float32", False)
        ]
        super().post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


class DecoderModel(DecoderPreTrainedModel):
    """
    A bare decoder: embeddings, blocks, a norm. A family's model inherits from its [`DecoderPreTrainedModel`] and this.

    A masked token is transparent: nothing sees it, and its own output repeats that of the last real token before it.
    """

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.make_positions(config)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.norm = self.make_norm(config)
        self.gradient_checkpointing = False
        self.is_causal = config.is_causal
        self.post_init()

    def make_norm(self, config: PreTrainedConfig) -> nn.Module:
        """The norm after the blocks."""
        return make_norm(config)

    def make_positions(self, config: PreTrainedConfig) -> None:
        """Make the modules that [`~DecoderModel.add_positions`] calls."""
        self.position_embeddings = None
        if config.position_embedding_type == "learned":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def add_positions(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The embeddings `[B, T, d]` with those of their `position_ids` `[1 or B, T]`, of `position_embedding_type`."""
        if self.position_embeddings is not None:
            # A row of positions for each row of tokens, as adapters of single rows take them.
            position_ids = position_ids.expand(inputs_embeds.shape[0], -1)
            size = self.config.max_position_embeddings
            return inputs_embeds + learned_positions(self.position_embeddings, position_ids, size)
        if self.config.position_embedding_type == "sinusoidal":
            positions = sinusoidal_positions(position_ids, inputs_embeds.shape[-1])
            return (inputs_embeds + positions).to(inputs_embeds.dtype)
        return inputs_embeds

    def shared_arguments(self, layout: SequenceLayout) -> dict[str, Any]:
        """What all layers are given, computed once for a segment: rotary positions, if attention layers turn by them."""
        config = self.config
        if config.rope_parameters is None or set(config.layer_types) <= set(config.recurrent_layer_types):
            return {}
        return {"position_embeddings": rotary_positions(config, layout.position_ids)}

    @accepts_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, Any] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `[B, T]`, *optional*): token ids. Exactly one of `input_ids` and
                `inputs_embeds` is needed.
            attention_mask (`torch.Tensor` of shape `[B, past + T]`, *optional*): 1 for real tokens, 0 for padding,
                which may stand anywhere. With a static cache there may be more columns, for tokens to come. Without a
                mask the new tokens are real, and those in the cache what they were.
            position_ids (`torch.LongTensor` of shape `[1, T]` or `[B, T]`, *optional*): the position of each token in
                its document. Position 0 begins a document: restarting positions pack several into one row. By default
                the real tokens are counted.
            cache ([`~transformers.Cache`], *optional*): the decode state of the tokens before these. `past_key_values`
                is another name of this argument, and of the same output.
            inputs_embeds (`torch.FloatTensor` of shape `[B, T, d]`, *optional*): embeddings, before positions.
            use_cache (`bool`, *optional*): whether to return the decode state.

        Raises:
            `ValueError`: not exactly one of `input_ids` and `inputs_embeds`; an id outside the vocabulary; a position
                beyond what is learned; a mask or positions of the wrong shape; a mask that contradicts the one which
                the tokens in the cache came with; a document without its first tokens; a cache of another model, under
                an unknown name, or any in a model that is bidirectional or has no layers; another `is_causal` than
                the model was made with; sequence parallelism.
        """
        config = self.config
        self._refuse_another_direction(kwargs.pop("is_causal", None))
        if set(config.layer_types) - {"full_attention"}:
            refuse_sequence_parallelism()
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        dimensions = "[B, T]" if inputs_embeds is None else "[B, T, d]"
        if inputs.dim() != dimensions.count(",") + 1:
            name = "input_ids" if inputs_embeds is None else "inputs_embeds"
            raise ValueError(f"`{name}` must have the shape {dimensions}, got {list(inputs.shape)}.")

        if not config.is_causal or not self.layers:
            if cache is not None:
                kind = "model without layers" if config.is_causal else "bidirectional model"
                raise ValueError(f"A {kind} has no decode state: pass no `cache`.")
            use_cache = False
        if cache is None and use_cache:
            cache = DynamicCache(config=config)
        if cache is not None:
            adopt_cache(cache, config)

        if isinstance(attention_mask, dict):
            layout = SequenceLayout.from_masks(attention_mask)
        else:
            layout = decoder_layout(config, inputs, attention_mask, position_ids, cache, self.dtype)
        if inputs_embeds is None:
            inputs_embeds = look_up(
                self.embed_tokens, input_ids, "input_ids", config.vocab_size, "the ids of the vocabulary"
            )
        elif layout.attention_mask is not None:
            # Attention multiplies what it masks by zero, which leaves NaN of NaN.
            inputs_embeds = inputs_embeds.masked_fill(~layout.attention_mask[..., None], 0)

        hidden_states = self.dropout(self.add_positions(inputs_embeds, layout.position_ids))
        shared = self.shared_arguments(layout)
        # An early exit has the layers before it in its cache.
        for layer in self.layers if cache is None else self.layers[: len(cache.layers)]:
            hidden_states = layer(hidden_states, layout, cache=cache, **shared, **kwargs)
        hidden_states = last_real_hidden_states(self.norm(hidden_states), layout.attention_mask)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **named_cache(cache))

    def _refuse_another_direction(self, is_causal: bool | None) -> None:
        """Refuse an `is_causal`, of a call or of a config changed since, that only attention layers would follow."""
        config = self.config
        is_causal = config.is_causal if is_causal is None else is_causal
        if is_causal == config.is_causal == self.is_causal:
            return
        is_field = "is_causal" in config.__dataclass_fields__
        raise ValueError(
            f"`is_causal` is {not self.is_causal}, and the layers of this model were made with {self.is_causal}. "
            + ("Set it in the config before, or in `from_pretrained`." if is_field else "There is no other one.")
        )
