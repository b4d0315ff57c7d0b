"""Where the tokens of one forward pass stand: positions, padding, documents, and the attention masks that follow.

Everything is derived from `attention_mask` and `position_ids`:

- A masked token is transparent: no recurrence and no attention sees it.
- `position_ids` count the real tokens of a document from 0. A real token at position 0 begins a document, and nothing
  of the documents before it is seen any more, whether they are in the same segment or in the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils import is_tracing
from transformers.utils.generic import is_flash_attention_requested

from .attention import attends_in_blocks
from .cache import SlidingWindowLayer, adopt_cache


@dataclass
class SequenceLayout:
    """
    The layout of one segment of `T` tokens.

    Attributes:
        position_ids (`torch.Tensor` of shape `[1, T]` or `[B, T]`): the position of each token in its document.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool, or `None`): the real tokens; `None`: all.
        document_ids (`torch.Tensor` of shape `[B, T]` or `None`): the documents of the segment; `None`: one a row.
        restart (`torch.Tensor` of shape `[B]`, bool, or `None`): the rows whose first real token begins a document
            and so drops the state before the segment; `None`: no row.
    """

    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    document_ids: torch.Tensor | None
    restart: torch.Tensor | None


def sequence_layout(
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None,
    position_ids: torch.Tensor | None,
    past_key_values: Cache | None,
) -> SequenceLayout:
    """
    Lay out a segment.

    Args:
        inputs (`torch.Tensor` of shape `[B, T, ...]`): any tensor of the segment, for the shape and the device.
        attention_mask (`torch.Tensor` of shape `[B, past + T]`, or `dict`, *optional*):
            1 or True where a token is real, for the tokens in the cache and the segment. Or what
            [`create_attention_masks`] made of it.
        position_ids (`torch.Tensor` of shape `[1, T]` or `[B, T]`, *optional*):
            The position of each token in its document. By default the real tokens of a row are counted on from the
            ones in the cache.
        past_key_values (`transformers.Cache`, *optional*): the cache.

    Raises:
        `ValueError`: a shape does not fit, or a position is negative.
    """
    batch_size, length = inputs.shape[:2]
    past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
    full_mask = None if isinstance(attention_mask, dict) else _check_mask(attention_mask, inputs, past_length)
    mask = attention_mask["padding"] if isinstance(attention_mask, dict) else _segment_mask(full_mask, length)

    if position_ids is None:
        if full_mask is not None:
            position_ids = (full_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, full_mask.shape[1] - length :]
        else:
            position_ids = torch.arange(length, device=inputs.device)[None] + past_length
        return SequenceLayout(position_ids, mask, None, None)

    if position_ids.dim() != 2 or position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch_size):
        raise ValueError(
            f"`position_ids` must have the shape [1, T] or [B, T] = [{batch_size}, {length}], got "
            f"{list(position_ids.shape)}."
        )
    if not is_tracing(position_ids) and (position_ids < 0).any():
        raise ValueError(
            f"`position_ids` count the tokens of a document from 0, got {position_ids.min().item()}. Padding is told by "
            "`attention_mask`, and may have any position from 0."
        )
    starts = (position_ids == 0).expand(batch_size, -1)
    if mask is not None:
        starts = starts & mask
    if length == 1:
        document_ids, restart = None, starts[:, 0]
    else:
        order = torch.arange(1, length + 1, device=inputs.device) if mask is None else mask.long().cumsum(dim=1)
        inner = starts & (order > 1)
        document_ids, restart = inner.long().cumsum(dim=1), (starts & (order == 1)).any(dim=1)
        if not is_tracing(inputs) and not inner.any():
            document_ids = None
    if past_key_values is None or (not is_tracing(inputs) and not restart.any()):
        restart = None
    return SequenceLayout(position_ids, mask, document_ids, restart)


def create_attention_masks(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor | None = None,
) -> dict[str, torch.Tensor | None]:
    """
    The masks of one segment: `"padding"` `[B, T]` for the recurrent layers, and for each type of attention layer in
    `config.layer_types` the one its attention implementation takes. `None` stands for a mask that masks nothing.

    Args:
        config (`PreTrainedConfig`): with `layer_types`, `sliding_window`, `is_causal`.
        inputs_embeds (`torch.Tensor` of shape `[B, T, ...]`): for the shape, the dtype and the device.
        attention_mask (`torch.Tensor` of shape `[B, past + T]`, *optional*): 1 or True where a token is real.
        past_key_values (`transformers.Cache`, *optional*): the cache.
        position_ids (`torch.Tensor` of shape `[1, T]` or `[B, T]`, *optional*): as for [`sequence_layout`].

    Raises:
        `ValueError`: a shape does not fit, or the attention implementation cannot express the mask.
    """
    batch_size, length = inputs_embeds.shape[:2]
    if past_key_values is not None:
        adopt_cache(past_key_values, config)
    past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
    full_mask = _check_mask(attention_mask, inputs_embeds, past_length)
    padding = _segment_mask(full_mask, length)
    masks: dict[str, torch.Tensor | None] = {"padding": padding}
    attention_types = sorted({"full_attention", "sliding_attention"} & set(config.layer_types))
    if not attention_types:
        return masks

    several_documents = position_ids is not None and _has_several_documents(
        full_mask, padding, position_ids, past_length, length
    )
    if is_flash_attention_requested(config) and several_documents and past_key_values is not None:
        # It takes the padding mask and reads documents off `position_ids`, only in a segment without past.
        raise ValueError(
            "Flash attention cannot tell the documents in a cache apart. Load the model with "
            "`attn_implementation='sdpa'`, or begin each document with an empty cache."
        )
    for layer_type in attention_types:
        layer_idx = config.layer_types.index(layer_type)
        is_sliding = layer_type == "sliding_attention"
        create = create_sliding_window_causal_mask if is_sliding else create_causal_mask
        layer_mask, mask_function = full_mask, None
        if not is_flash_attention_requested(config) and not config.is_causal:
            if several_documents or (is_sliding and padding is not None):
                layout = sequence_layout(inputs_embeds, masks, position_ids if several_documents else None, None)
                mask_function = _is_visible_from_both_sides(
                    inputs_embeds.new_ones((batch_size, length), dtype=torch.bool) if padding is None else padding,
                    layout.document_ids,
                    config.sliding_window if is_sliding else None,
                )
                create, layer_mask = create_causal_mask, None
        elif not is_flash_attention_requested(config):
            layer = None if past_key_values is None else past_key_values.layers[layer_idx]
            kv_length, kv_offset = (length, 0) if layer is None else layer.get_mask_sizes(length)
            real = layer.real_columns(padding, inputs_embeds) if isinstance(layer, SlidingWindowLayer) else full_mask
            if several_documents or (is_sliding and real is not None):
                # Padding takes no room in a window, and a position counts real tokens: mask by their number.
                if real is None:
                    real = torch.ones(batch_size, kv_length, dtype=torch.bool, device=inputs_embeds.device)
                real = F.pad(real, (0, kv_length - real.shape[1]))
                mask_function = _is_visible(
                    real,
                    kv_offset,
                    past_length,
                    position_ids.expand(batch_size, -1) if several_documents else None,
                    config.sliding_window if is_sliding else None,
                )
                create, layer_mask = create_causal_mask, None
            elif is_sliding and attends_in_blocks(config, length):
                masks[layer_type] = None
                continue
        masks[layer_type] = create(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=layer_mask,
            past_key_values=past_key_values,
            and_mask_function=mask_function,
            layer_idx=layer_idx,
        )
    return masks


def _has_several_documents(
    full_mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    position_ids: torch.Tensor,
    past_length: int | torch.Tensor,
    length: int,
) -> bool:
    """Whether some real token has more real tokens before it than its position says (a traced graph assumes it)."""
    if is_tracing(position_ids):
        return True
    if full_mask is None:
        before = torch.arange(length, device=position_ids.device)[None] + past_length
    else:
        before = full_mask.long().cumsum(dim=1)[:, full_mask.shape[1] - length :] - 1
    earlier_documents = before > position_ids
    return bool((earlier_documents if padding is None else earlier_documents & padding).any())


def _is_visible(
    real: torch.Tensor,
    kv_offset: int | torch.Tensor,
    past_length: int | torch.Tensor,
    position_ids: torch.Tensor | None,
    window: int | None,
) -> Callable:
    """A mask function (to be combined with the causal one) over columns of which `real` `[B, P + T]` says which count."""
    counts = real.long().cumsum(dim=1)

    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        distance = counts[batch_idx, q_idx - kv_offset] - counts[batch_idx, kv_idx - kv_offset]
        visible = real[batch_idx, kv_idx - kv_offset]
        if window is not None:
            visible = visible & (distance < window)
        if position_ids is not None:
            visible = visible & (distance <= position_ids[batch_idx, q_idx - past_length])
        return visible

    return mask_function


def _is_visible_from_both_sides(real: torch.Tensor, document_ids: torch.Tensor | None, window: int | None) -> Callable:
    """The mask function of a bidirectional layer over the columns of which `real` `[B, T]` says which count."""
    counts = real.long().cumsum(dim=1)

    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        visible = real[batch_idx, kv_idx]
        if window is not None:
            visible = visible & ((counts[batch_idx, q_idx] - counts[batch_idx, kv_idx]).abs() <= window)
        if document_ids is not None:
            visible = visible & (document_ids[batch_idx, q_idx] == document_ids[batch_idx, kv_idx])
        return visible

    return mask_function


def _check_mask(
    attention_mask: torch.Tensor | None, inputs: torch.Tensor, past_length: int | torch.Tensor
) -> torch.Tensor | None:
    """The mask as bool, if its shape is `[B, past + T]`."""
    if attention_mask is None:
        return None
    batch_size, length = inputs.shape[:2]
    # The length of a static cache is a tensor; reading it would break a traced graph.
    expected = None if isinstance(past_length, torch.Tensor) and is_tracing(inputs) else int(past_length) + length
    if (
        attention_mask.dim() != 2
        or attention_mask.shape[0] != batch_size
        or (expected is not None and attention_mask.shape[1] != expected)
    ):
        raise ValueError(
            f"`attention_mask` must have the shape [B, past + T] = [{batch_size}, {expected}], 1 for the real tokens "
            f"in the cache and in the segment, got {list(attention_mask.shape)}."
        )
    return attention_mask.to(device=inputs.device, dtype=torch.bool)


def _segment_mask(full_mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """The part of the mask that belongs to the segment; `None` if it masks nothing (as far as a trace can know)."""
    if full_mask is None:
        return None
    mask = full_mask[:, full_mask.shape[1] - length :]
    return mask if is_tracing(mask) or not mask.all() else None


def last_real_hidden_states(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Give each masked position of `hidden_states` `[B, T, d]` the hidden state of the last real token before it.

    So the last column always holds the last real token of the row, and the token predicted there is its successor,
    whichever side the padding is on. Padding with no real token before it keeps its own hidden state.
    """
    if attention_mask is None:
        return hidden_states
    index = torch.arange(attention_mask.shape[1], device=attention_mask.device).expand_as(attention_mask)
    last_real = torch.where(attention_mask, index, -1).cummax(dim=1)[0]
    last_real = torch.where(last_real < 0, index, last_real)
    return hidden_states.gather(1, last_real[..., None].expand_as(hidden_states))


def sinusoidal_positions(position_ids: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """
    The sinusoidal position code of "Attention Is All You Need" (arXiv 1706.03762): sines in the first half of the
    channels, cosines in the second, of `position / 10000^(2i / d)`.

    Args:
        position_ids (`torch.Tensor` of shape `[..., T]`, integer): positions of any size.
        hidden_size (`int`): `d`, even.

    Returns:
        `torch.Tensor` of shape `[..., T, d]`, float32.
    """
    # In float32 a position of a million would be off by 0.03 radians; Apple's GPUs have no float64.
    dtype = torch.float32 if position_ids.device.type == "mps" else torch.float64
    channels = torch.arange(0, hidden_size, 2, device=position_ids.device, dtype=dtype)
    angles = position_ids[..., None].to(dtype) * 10000.0 ** (-channels / hidden_size)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def check_ids(name: str, ids: torch.Tensor, size: int, what: str) -> None:
    """Raise a `ValueError` where an embedding look-up would fail (a traced graph cannot)."""
    if is_tracing(ids) or ids.numel() == 0 or ids.device.type == "meta":
        return
    low, high = (bound.item() for bound in torch.aminmax(ids))
    if low < 0 or high >= size:
        raise ValueError(f"`{name}` must be in [0, {size}), the {what}, got values from {low} to {high}.")
