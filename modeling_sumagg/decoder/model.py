"""The frame of every decoder: one forward pass, and what `generate` needs to know of it."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from ..compatibility import (
    CACHE_NAME,
    BaseModelOutputWithPast,
    accepts_cache,
    find_cache,
    named_cache,
    warn_of_untested_transformers,
    with_cache_renamed,
)
from .attention import Attention
from .cache import adopt_cache, start_over
from .checks import look_up
from .decay import SumDecay
from .layout import SequenceLayout, last_real_hidden_states, sequence_layout
from .masks import attention_masks
from .positions import learned_positions, rotary_positions, sinusoidal_positions
from .recurrence import RecurrentLayer, register_recurrent_layer_type


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
        # Neither rounded to float16 nor quantized: a decay near 1 is told from 1 by its last digits.
        self._keep_in_fp32_modules = [name for name, module in self.named_modules() if isinstance(module, SumDecay)]
        super().post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SumDecay):
            module.reset_parameters()


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
        self.post_init()

    def make_norm(self, config: PreTrainedConfig) -> nn.Module:
        """The norm after the blocks."""
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

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
                which may stand anywhere.
            position_ids (`torch.LongTensor` of shape `[1, T]` or `[B, T]`, *optional*): the position of each token in
                its document. Position 0 begins a document: restarting positions pack several into one row. By default
                the real tokens are counted.
            cache ([`~transformers.Cache`], *optional*): the decode state of the tokens before these. `past_key_values`
                is another name of this argument, and of the same output.
            inputs_embeds (`torch.FloatTensor` of shape `[B, T, d]`, *optional*): embeddings, before positions.
            use_cache (`bool`, *optional*): whether to return the decode state.

        Raises:
            `ValueError`: not exactly one of `input_ids` and `inputs_embeds`; an id outside the vocabulary; a position
                beyond what is learned; a mask or positions of the wrong shape; a cache of another model, under an
                unknown name, or any in a bidirectional model.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        dimensions = "[B, T]" if inputs_embeds is None else "[B, T, d]"
        if inputs.dim() != dimensions.count(",") + 1:
            name = "input_ids" if inputs_embeds is None else "inputs_embeds"
            raise ValueError(f"`{name}` must have the shape {dimensions}, got {list(inputs.shape)}.")

        if not config.is_causal:
            if cache is not None:
                raise ValueError("A bidirectional model has no decode state: pass no `cache`.")
            use_cache = False
        if cache is None and use_cache and config.num_hidden_layers > 0:
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

        hidden_states = self.dropout(self.add_positions(inputs_embeds, layout.position_ids))
        shared = self.shared_arguments(layout)
        for layer in self.layers[: config.num_hidden_layers]:
            hidden_states = layer(hidden_states, layout, cache=cache, **shared, **kwargs)
        hidden_states = last_real_hidden_states(self.norm(hidden_states), layout.attention_mask)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **named_cache(cache))


def decoder_layout(
    config: PreTrainedConfig,
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    dtype: torch.dtype,
) -> SequenceLayout:
    """
    The whole layout of a segment, the masks of the attention layers with it.

    Args:
        config (`PreTrainedConfig`): the config of the decoder.
        inputs (`torch.Tensor` of shape `[B, T]`, or `[B, T, ...]`): the ids of the segment, or its embeddings.
        attention_mask, position_ids, cache: as for `sequence_layout`.
        dtype (`torch.dtype`): that of the hidden states.
    """
    vocab_size = config.vocab_size if inputs.dim() == 2 else None
    layout, real, earlier_documents = sequence_layout(inputs, attention_mask, position_ids, cache, vocab_size)
    masks = attention_masks(config, inputs, dtype, layout, real, earlier_documents, cache)
    return layout._replace(masks=masks)


_NEWER_TRANSFORMERS = (
    "What would be generated from it would be other text. This version of transformers hands the cache on in a way that "
    "this version of the model does not know: install the newest modeling-sumagg, or pass `use_cache=False`."
)


@contextlib.contextmanager
def _no_warning_of_right_padding() -> Iterator[None]:
    """transformers does not warn, in this thread, of what is exact here."""
    thread, logger = threading.get_ident(), logging.getLogger(GenerationMixin.__module__)

    def is_told(record: logging.LogRecord) -> bool:
        return record.thread != thread or "right-padding was detected" not in record.getMessage()

    logger.addFilter(is_told)
    try:
        yield
    finally:
        logger.removeFilter(is_told)


class RecurrentGenerationMixin(GenerationMixin):
    """[`~transformers.GenerationMixin`] with positions and masks that are exact under any padding."""

    def generate(self, *args, **kwargs):
        """As in transformers, with the decode state as `cache` or as `past_key_values`, whatever its version calls it."""
        num_hidden_layers = self.config.num_hidden_layers
        # Without a mask padding may be taken for text.
        masked = kwargs.get("attention_mask") is not None
        try:
            with _no_warning_of_right_padding() if masked else contextlib.nullcontext():
                return super().generate(*args, **with_cache_renamed(kwargs, CACHE_NAME))
        finally:
            # An early exit lowers it, and does not restore it where something fails.
            self.config.num_hidden_layers = num_hidden_layers

    def _get_candidate_generator(self, generation_config, *args, **kwargs):
        early_exit = generation_config.assistant_early_exit
        if early_exit is not None and not 1 <= early_exit <= self.config.num_hidden_layers:
            raise ValueError(
                f"`assistant_early_exit` must be in [1, {self.config.num_hidden_layers}], the layers after which the "
                f"model may exit, got {early_exit}."
            )
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        # `forward` counts them itself, of which it can know that they begin no document.
        return None

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict[str, Any], generation_mode, batch_size: int, max_cache_length: int
    ) -> None:
        is_quantized = generation_config.cache_implementation == "quantized"
        if is_quantized and set(self.config.layer_types) != {"full_attention"}:
            raise ValueError(
                "`cache_implementation='quantized'` is for models of full attention alone: a recurrent state is small, "
                "and is kept in float32. Leave it out, or choose 'static'."
            )
        # The candidates of prompt lookup may go beyond the last token that is to be generated.
        max_cache_length += generation_config.prompt_lookup_num_tokens or 0
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = find_cache(model_kwargs)
        if cache is None:
            return
        if generation_config.is_assistant:
            start_over(cache)
        # Before `generate` asks its layers to record.
        adopt_cache(cache, self.config)
        for layer in cache.layers:
            if isinstance(layer, RecurrentLayer):
                layer.starts_over = bool(generation_config.is_assistant)

    def _prefill(self, input_ids: torch.Tensor, generation_config, model_kwargs: dict[str, Any], *args, **kwargs):
        attention_mask, chunk_size = model_kwargs.get("attention_mask"), generation_config.prefill_chunk_size
        if attention_mask is not None and chunk_size is not None:
            last_chunk = (input_ids.shape[1] - 1) % chunk_size + 1
            if not attention_mask[:, -last_chunk:].any(dim=1).all():
                raise ValueError(
                    f"The last of the prefill chunks of {chunk_size} tokens holds {last_chunk} tokens, which are all "
                    "padding in some row, so that no token there predicts the next one. Pad on the left, or choose "
                    "another `prefill_chunk_size`."
                )
        if attention_mask is None:
            # `generate` drops a mask of ones, and may note down its length.
            length = getattr(generation_config, "_mask_length", input_ids.shape[1])
        else:
            length = attention_mask.shape[1]
        cache = find_cache(model_kwargs)
        if cache is not None and 0 < length <= cache.get_seq_length():
            raise ValueError(
                f"`cache` has seen {int(cache.get_seq_length())} tokens, and there are {length} in the input. Pass all "
                "the tokens, those in the cache too, or the new tokens with an `attention_mask` for all."
            )
        outputs = super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        if cache is not None and length > 0 and cache.get_seq_length() != length:
            raise RuntimeError(
                f"After the prompt of {length} tokens the cache has seen {int(cache.get_seq_length())}. "
                + _NEWER_TRANSFORMERS
            )
        return outputs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict[str, Any], *args, **kwargs):
        passed, filled = find_cache(model_kwargs), find_cache(outputs)
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if passed not in (None, filled) or find_cache(model_kwargs) is not filled:
            raise RuntimeError(
                "The model has filled another cache than `generate` goes on with. " + _NEWER_TRANSFORMERS
            )
        return model_kwargs

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """The layout of a segment, made outside of a compiled decode step."""
        cache = find_cache(kwargs)
        adopt_cache(cache, config)
        return decoder_layout(
            config, inputs_embeds, attention_mask, position_ids, cache, inputs_embeds.dtype
        ).to_masks()
