"""What `generate` needs to know about models whose padding is transparent."""

from typing import Any

import torch
from transformers import Cache, GenerationMixin, PreTrainedConfig

from .sequence import create_attention_masks


class RecurrentGenerationMixin(GenerationMixin):
    """[`~transformers.GenerationMixin`] with positions and masks that are exact under any padding."""

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        attention_mask = model_kwargs.get("attention_mask")
        if attention_mask is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        # Padding repeats the position before it: `generate` counts on from the last column, also after right padding.
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

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
        cache = model_kwargs.get("past_key_values")
        if attention_mask is None:
            # `generate` drops a mask of ones, and may note down its length.
            mask_length = getattr(generation_config, "_mask_length", input_ids.shape[1])
        else:
            mask_length = attention_mask.shape[1]
        if cache is not None and 0 < mask_length <= cache.get_seq_length():
            raise ValueError(
                f"`past_key_values` has seen {int(cache.get_seq_length())} tokens, and there are {mask_length} in the "
                "input. Pass all the tokens, those in the cache too, or the new tokens with an `attention_mask` for all."
            )
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> dict[str, torch.Tensor | None]:
        """The masks of one forward pass, made outside of it for a compiled decode step."""
        return create_attention_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids)
