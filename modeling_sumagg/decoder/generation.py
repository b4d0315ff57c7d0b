"""What `generate` must be told of a model whose layers have a state."""

import copy
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, StoppingCriteriaList

from ..common.compatibility import CACHE_NAME, find_cache, with_cache_renamed
from .cache import EarlyExitCache, adopt_cache, start_over
from .masks import decoder_layout
from .recurrence import RecurrentLayer


_NEWER_TRANSFORMERS = (
    "What would be generated from it would be other text. This version of transformers hands the cache on in a way that "
    "this version of the model does not know: install the newest modeling-sumagg, or pass `use_cache=False`."
)


# A CPU reads a prompt of at least so many tokens in pieces: tensors of the whole prompt would be fetched from memory anew.
LONG_PROMPT = 2**14
PREFILL_PIECE = 2**11


class EndedRows(StoppingCriteriaList):
    """Stopping criteria that remember which rows they have ended, as `rows` `[B]`, bool; before the first call `None`."""

    rows: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        ended = super().__call__(input_ids, scores, **kwargs)
        self.rows = ended if self.rows is None else self.rows | ended
        return ended


class RecurrentGenerationMixin(GenerationMixin):
    """[`~transformers.GenerationMixin`] with positions and masks that are exact under any padding."""

    def generate(self, *args, **kwargs):
        """As in transformers, with the decode state as `cache` or as `past_key_values`, whatever its version calls it."""
        return super().generate(*args, **with_cache_renamed(kwargs, CACHE_NAME))

    def _get_candidate_generator(self, generation_config, *args, **kwargs):
        early_exit = generation_config.assistant_early_exit
        if early_exit is None:
            return super()._get_candidate_generator(generation_config, *args, **kwargs)
        if not 1 <= early_exit <= self.config.num_hidden_layers:
            raise ValueError(
                f"`assistant_early_exit` must be in [1, {self.config.num_hidden_layers}], the layers after which the "
                f"model may exit, got {early_exit}."
            )
        # transformers would lower `num_hidden_layers` in the config, in which other threads read it. Here the model is its
        # own assistant, with a cache that ends early.
        generation_config = copy.copy(generation_config)
        generation_config.assistant_early_exit = None
        generator = super()._get_candidate_generator(generation_config, *args, **{**kwargs, "assistant_model": self})
        cache = EarlyExitCache(self.config, early_exit)
        cache.activate_past_recording()
        generator.assistant_kwargs[CACHE_NAME] = cache
        return generator

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        # `forward` counts them itself, of which it can know that they begin no document.
        return None

    def _prepare_special_tokens(
        self, generation_config, kwargs_has_attention_mask: bool | None = None, **kwargs
    ) -> None:
        super()._prepare_special_tokens(generation_config, kwargs_has_attention_mask, **kwargs)
        generation_config._pad_token_held = generation_config._pad_token_tensor
        if kwargs_has_attention_mask:
            # Without this token `generate` does not warn of padding on the right, which is exact here.
            generation_config._pad_token_tensor = None

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs: dict[str, Any], generation_mode, batch_size: int, max_cache_length: int
    ) -> None:
        generation_config._pad_token_tensor = generation_config._pad_token_held
        is_quantized = generation_config.cache_implementation == "quantized"
        if is_quantized and set(self.config.layer_types) != {"full_attention"}:
            raise ValueError(
                "`cache_implementation='quantized'` is for models of full attention alone: a recurrent state is small, "
                "and is kept in float32. Leave it out, or choose 'static'."
            )
        if not self.config.layer_types:
            # What has no layers has no state either: each step reads all tokens.
            generation_config.use_cache = False
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

    def _sample(
        self, input_ids: torch.Tensor, logits_processor, stopping_criteria, generation_config, *args, **kwargs
    ):
        cache = find_cache(kwargs)
        is_kept = generation_config.return_dict_in_generate or getattr(cache, "_is_user_defined", False)
        writes_padding = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        if cache is not None and is_kept and writes_padding and input_ids.shape[0] > 1:
            # Behind a row that has ended, and the state of that row must not see it.
            cache.ended_rows = stopping_criteria = EndedRows(stopping_criteria)
        try:
            return super()._sample(input_ids, logits_processor, stopping_criteria, generation_config, *args, **kwargs)
        finally:
            if cache is not None:
                cache.ended_rows = None

    def _beam_search(self, *args, **kwargs):
        outputs = super()._beam_search(*args, **kwargs)
        for layer in getattr(find_cache(kwargs), "layers", ()):
            if isinstance(layer, RecurrentLayer):
                layer.rows_are_beams = True
        return outputs

    def _assisted_decoding(self, *args, **kwargs):
        cache = find_cache(kwargs)
        if cache is not None and (past_length := int(cache.get_seq_length())) > 0:
            # transformers would pass the tokens in the cache again.
            raise ValueError(
                f"Assisted decoding and prompt lookup start from an empty cache, and this one has seen {past_length} "
                "tokens: leave `cache` out, or decode without candidates."
            )
        try:
            return super()._assisted_decoding(*args, **kwargs)
        finally:
            for layer in getattr(cache, "layers", ()):
                layer.record_past = False

    def _prefill(self, input_ids: torch.Tensor, generation_config, model_kwargs: dict[str, Any], *args, **kwargs):
        attention_mask, chunk_size = model_kwargs.get("attention_mask"), generation_config.prefill_chunk_size
        given = input_ids.shape[1]
        # `generate` drops a mask of ones, and may note down its length.
        length = (
            getattr(generation_config, "_mask_length", given) if attention_mask is None else attention_mask.shape[1]
        )
        cache = find_cache(model_kwargs)
        past_length = 0 if cache is None else int(cache.get_seq_length())
        if cache is not None and 0 < length <= past_length:
            raise ValueError(
                f"`cache` has seen {past_length} tokens, and there are {length} in the input. Pass all the tokens, those "
                "in the cache too, or the new tokens with an `attention_mask` for all."
            )
        if "inputs_embeds" not in model_kwargs and length not in (given, past_length + given):
            raise ValueError(
                f"`attention_mask` has {length} columns, and there are {given} tokens in the input and {past_length} in "
                "the cache: pass one for each token of the input, or for those in the cache too."
            )
        if attention_mask is not None and (chunk_size is not None or past_length > 0):
            new = length - past_length
            last = new if chunk_size is None else (new - 1) % chunk_size + 1
            if not attention_mask[:, -last:].any(dim=1).all():
                raise ValueError(
                    f"The last {last} tokens of some row are all padding, so that none of them predicts the next one: "
                    + (
                        "pass a token for each row."
                        if last == new
                        else "choose another `prefill_chunk_size`, or pad on the left."
                    )
                )
        if chunk_size is None and self._reads_in_pieces(cache, length - past_length, attention_mask, model_kwargs):
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = PREFILL_PIECE
        outputs = super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        if cache is not None and length > 0 and cache.get_seq_length() != length:
            raise RuntimeError(
                f"After the prompt of {length} tokens the cache has seen {int(cache.get_seq_length())}. "
                + _NEWER_TRANSFORMERS
            )
        return outputs

    def _reads_in_pieces(
        self, cache: Cache | None, length: int, attention_mask: torch.Tensor | None, model_kwargs: dict[str, Any]
    ) -> bool:
        """Whether a prompt of `length` new tokens is read in pieces though the caller has not asked for it."""
        is_long = self.device.type == "cpu" and length >= LONG_PROMPT and isinstance(cache, DynamicCache)
        # Full attention to a prompt is faster at once.
        if not is_long or "inputs_embeds" in model_kwargs or "full_attention" in self.config.layer_types:
            return False
        last = (length - 1) % PREFILL_PIECE + 1
        return attention_mask is None or bool(attention_mask[:, -last:].any(dim=1).all())

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict[str, Any], *args, **kwargs):
        passed, filled = find_cache(model_kwargs), find_cache(outputs)
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if passed not in (None, filled) or find_cache(model_kwargs) is not filled:
            raise RuntimeError(
                "The model has filled another cache than `generate` goes on with. " + _NEWER_TRANSFORMERS
            )
        ended = getattr(filled, "ended_rows", None)
        if ended is not None and ended.rows is not None:
            mask = model_kwargs.get("attention_mask")
            if mask is None and ended.rows.any():
                shape = len(ended.rows), int(filled.get_seq_length()) + 1
                mask = torch.ones(shape, dtype=torch.long, device=ended.rows.device)
            if mask is not None:
                mask[:, -1] = ~ended.rows
                model_kwargs["attention_mask"] = mask
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
