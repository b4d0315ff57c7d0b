"""The masks of attention layers that follow from where the tokens of a segment stand."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, and_masks, causal_mask_function
from transformers.utils.generic import is_flash_attention_requested

from .attention import attends_in_blocks
from .cache import SlidingWindowLayer
from .layout import SequenceLayout, on_device, sequence_layout


def attention_masks(
    config: PreTrainedConfig,
    inputs: torch.Tensor,
    dtype: torch.dtype,
    layout: SequenceLayout,
    real: torch.Tensor | None,
    earlier_documents: bool,
    cache: Cache | None,
) -> dict[str, Any]:
    """
    For each type of attention layer in `config.layer_types` the mask that its implementation takes.

    Args:
        config (`PreTrainedConfig`): with `layer_types`, `sliding_window`, `is_causal`.
        inputs (`torch.Tensor` of shape `[B, T, ...]`): for the shape and the device.
        dtype (`torch.dtype`): that of the hidden states.
        layout, real, earlier_documents: what `sequence_layout` returned.
        cache (`transformers.Cache`, *optional*): the cache.

    Returns:
        `dict`: a mask by layer type; `None` stands for one that masks nothing but the future. For sliding attention in
            blocks it is `position_ids` `[B, T]`, by which these tell documents apart, or `None`.

    Raises:
        `ValueError`: the attention implementation cannot express the mask.
    """
    # An early exit has the layers before it in its cache.
    layer_types = config.layer_types if cache is None else config.layer_types[: len(cache.layers)]
    kinds = sorted({"full_attention", "sliding_attention"} & set(layer_types))
    if not kinds:
        return {}
    if is_flash_attention_requested(config):
        if config.attention_sinks and "sliding_attention" in kinds:
            raise ValueError(
                "Flash attention shows no sinks (`attention_sinks`): load the model with `attn_implementation='sdpa'`."
            )
        if earlier_documents and cache is not None:
            # It takes the padding mask and reads documents off `position_ids`, only in a segment without past.
            raise ValueError(
                "Flash attention cannot tell the documents in a cache apart. Load the model with "
                "`attn_implementation='sdpa'`, or begin each document with an empty cache."
            )
        sliding = None if cache is None else cache.layers[config.layer_types.index(kinds[-1])]
        is_ours = isinstance(sliding, SlidingWindowLayer)
        columns = sliding.real_columns(layout.attention_mask, inputs) if is_ours else real
        return {kind: real if kind == "full_attention" else columns for kind in kinds}
    positions = layout.position_ids.expand(inputs.shape[0], -1) if earlier_documents else None
    return {kind: _attention_mask(config, kind, inputs, dtype, layout, real, positions, cache) for kind in kinds}


def _attention_mask(
    config: PreTrainedConfig,
    kind: str,
    inputs: torch.Tensor,
    dtype: torch.dtype,
    layout: SequenceLayout,
    real: torch.Tensor | None,
    positions: torch.Tensor | None,
    cache: Cache | None,
) -> Any:
    batch_size, length = inputs.shape[:2]
    window, sinks = None, 0
    if kind == "sliding_attention":
        window, sinks = config.sliding_window, config.attention_sinks
    layer = None if cache is None else cache.layers[config.layer_types.index(kind)]
    # Flex attention asks the mask function again when the cache has counted on.
    past_length = 0 if layer is None else on_device(cache.get_seq_length(), inputs.device)
    kv_length, kv_offset = (length, 0) if layer is None else layer.get_mask_sizes(length)
    kv_offset = on_device(kv_offset, inputs.device)
    if isinstance(layer, SlidingWindowLayer):
        real = layer.real_columns(layout.attention_mask, inputs)
    # The sinks of several documents are not in the same columns. The length is asked last: an exported graph has any.
    has_blocks = real is None and window is not None and not (sinks and positions is not None)
    if has_blocks and attends_in_blocks(config, length):
        return positions

    function: Callable = causal_mask_function
    if not config.is_causal:
        if layout.attention_mask is None and layout.document_ids is None and window is None:
            return None
        function = _visible_from_both_sides(layout, window, inputs)
    elif real is not None or positions is not None:
        if real is None:
            real = torch.ones(batch_size, kv_length, dtype=torch.bool, device=inputs.device)
        real = F.pad(real, (0, kv_length - real.shape[1]))
        function = and_masks(causal_mask_function, _visible(real, kv_offset, past_length, positions, window, sinks))
    elif window is not None and kv_length > window:

        def in_window(batch, head, q, kv):
            return (kv > q - window) | (kv < kv_offset + sinks)

        function = and_masks(causal_mask_function, in_window)
    # Where only the future is masked some implementations need no mask; but for one token they would then see all columns,
    # and those of a static layer are there before their tokens are.
    is_plain = function is causal_mask_function and not (length == 1 and isinstance(layer, StaticLayer))
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
        batch_size=batch_size,
        q_length=length,
        kv_length=kv_length,
        q_offset=past_length,
        kv_offset=kv_offset,
        mask_function=function,
        attention_mask=None,
        allow_is_causal_skip=is_plain,
        allow_is_bidirectional_skip=False,
        dtype=dtype,
        config=config,
        device=inputs.device,
        use_vmap=False,
    )


def _visible(
    real: torch.Tensor,
    kv_offset: int | torch.Tensor,
    past_length: int | torch.Tensor,
    positions: torch.Tensor | None,
    window: int | None,
    sinks: int = 0,
) -> Callable:
    """
    The mask function, to be combined with the causal one, over columns of which `real` `[B, P + T]` says which count.

    Padding takes no room in a window, and a position counts real tokens: both are measured in real columns. The tokens
    between the sinks of a document and its window may have no columns; then no other document has one.
    """
    count = real.long().cumsum(dim=1)

    def mask_function(batch, head, q, kv):
        visible = real[batch, kv - kv_offset]
        if window is not None or positions is not None:
            distance = count[batch, q - kv_offset] - count[batch, kv - kv_offset]
            if window is not None:
                is_near = distance < window
                if sinks:
                    before = 0
                    if positions is not None:
                        before = count[batch, q - kv_offset] - 1 - positions[batch, q - past_length]
                        before = before.clamp(min=0)
                    is_near = is_near | (count[batch, kv - kv_offset] <= before + sinks)
                visible = visible & is_near
            if positions is not None:
                visible = visible & (distance <= positions[batch, q - past_length])
        return visible

    return mask_function


def _visible_from_both_sides(layout: SequenceLayout, window: int | None, inputs: torch.Tensor) -> Callable:
    """The mask function of a bidirectional layer over the tokens of a segment."""
    mask, document_ids = layout.attention_mask, layout.document_ids
    if mask is None:
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    count = mask.long().cumsum(dim=1)

    def mask_function(batch, head, q, kv):
        visible = mask[batch, kv]
        if window is not None:
            visible = visible & ((count[batch, q] - count[batch, kv]).abs() <= window)
        if document_ids is not None:
            visible = visible & (document_ids[batch, q] == document_ids[batch, kv])
        return visible

    return mask_function


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
    layout, real, earlier_documents = sequence_layout(inputs, attention_mask, position_ids, cache, config)
    masks = attention_masks(config, inputs, dtype, layout, real, earlier_documents, cache)
    return layout._replace(masks=masks)
