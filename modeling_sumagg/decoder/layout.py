"""Where the tokens of one segment stand: positions, padding, documents. Made once a forward pass.

Everything is derived from `attention_mask` and `position_ids`:

- A masked token is transparent: no recurrence and no attention sees it.
- `position_ids` count the real tokens of a document from 0. A real token at position 0 begins a document, and nothing
  of the documents before it is seen any more, whether they are in the same segment or in the cache.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import Cache

from .checks import is_concrete


class SequenceLayout(NamedTuple):
    """
    The layout of one segment of `T` tokens. A tuple, so that it moves to the device of a layer with its arguments.

    Attributes:
        position_ids (`torch.Tensor` of shape `[1, T]` or `[B, T]`): the position of each token in its document.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool, or `None`): the real tokens; `None`: all.
        document_ids (`torch.Tensor` of shape `[B, T]` or `None`): the documents of the segment; `None`: one a row.
        restart (`torch.Tensor` of shape `[B]`, bool, or `None`): the rows whose first real token begins a document
            and so drops the state before the segment; `None`: no row.
        masks (`dict`): what each type of attention layer takes as its mask.
    """

    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    document_ids: torch.Tensor | None
    restart: torch.Tensor | None
    masks: dict[str, Any]

    def to_masks(self) -> dict[str, Any]:
        """The same as what `generate` hands to a forward pass for its `attention_mask`."""
        values = {**self._asdict(), **self.masks, "masks": None}
        # A slice has the strides of the whole, for each length of which a compiler would make another graph.
        return {name: v.contiguous() if isinstance(v, torch.Tensor) else v for name, v in values.items()}

    @classmethod
    def from_masks(cls, masks: dict[str, Any]) -> "SequenceLayout":
        """The inverse of [`~SequenceLayout.to_masks`]."""
        own = {name: masks[name] for name in cls._fields if name != "masks"}
        return cls(**own, masks={name: mask for name, mask in masks.items() if name not in cls._fields})


def sequence_layout(
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    vocab_size: int | None = None,
) -> tuple[SequenceLayout, torch.Tensor | None, bool]:
    """
    Lay out a segment.

    What Python has to decide about a long segment is computed on the device and read from it at once. A single token,
    a traced graph, and a segment with neither a mask nor positions are laid out without reading anything.

    Args:
        inputs (`torch.Tensor` of shape `[B, T, ...]`): the ids of the segment, or another tensor of its shape.
        attention_mask (`torch.Tensor` of shape `[B, past + T]`, *optional*): 1 or True where a token is real, for the
            tokens in the cache and the segment.
        position_ids (`torch.Tensor` of shape `[1, T]` or `[B, T]`, *optional*): the position of each token in its
            document. By default the real tokens of a row are counted on from the ones in the cache.
        cache (`transformers.Cache`, *optional*): the cache.
        vocab_size (`int`, *optional*): `inputs` are ids below it, which is checked if anything is read.

    Returns:
        `tuple[SequenceLayout, torch.Tensor | None, bool]`: the layout, without the masks of attention layers; what
        these are made of: the real columns `[B, past + T]` (`None`: all), and whether a token may stand after one of an
        earlier document.

    Raises:
        `ValueError`: a shape does not fit, a position is negative, or an id is outside the vocabulary.
    """
    batch_size, length = inputs.shape[:2]
    past_length = 0 if cache is None else on_device(cache.get_seq_length(), inputs.device)
    real = None
    if attention_mask is not None:
        real = _checked_mask(attention_mask, inputs, past_length)
    mask = None if real is None else real[:, real.shape[1] - length :]
    if position_ids is not None and (
        position_ids.dim() != 2 or position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch_size)
    ):
        raise ValueError(
            f"`position_ids` must have the shape [1, T] or [B, T] = [{batch_size}, {length}], got "
            f"{list(position_ids.shape)}."
        )

    has_positions = position_ids is not None
    document_ids = restart = None
    if real is not None:
        count = (real.long().cumsum(dim=1) - 1)[:, real.shape[1] - length :]
    else:
        count = torch.arange(length, device=inputs.device)[None] + past_length
    if position_ids is None:
        position_ids = count.clamp(min=0) if real is not None else count
    elif length == 1:
        restart = (position_ids == 0).expand(batch_size, -1)[:, 0]
        restart = restart if mask is None else restart & mask[:, 0]
    else:
        begins = (position_ids == 0).expand(batch_size, -1)
        begins = begins if mask is None else begins & mask
        first = (
            torch.arange(length, device=inputs.device) == 0
            if mask is None
            else mask & (mask.long().cumsum(dim=1) == 1)
        )
        inner = begins & ~first
        document_ids, restart = inner.long().cumsum(dim=1), (begins & first).any(dim=1)
    if cache is None:
        restart = None
    if length <= 1 or (real is None and not has_positions) or not is_concrete(inputs):
        return SequenceLayout(position_ids, mask, document_ids, restart, {}), real, has_positions

    facts: dict[str, torch.Tensor] = {}
    if real is not None:
        facts |= {"all_real": real.all(), "segment_real": mask.all()}
    if has_positions:
        later = count > position_ids
        facts |= {
            "inner": inner.any(),
            "earlier": (later if mask is None else later & mask).any(),
            "lowest_position": position_ids.min(),
        }
        if restart is not None:
            facts["restart"] = restart.any()
    if vocab_size is not None:
        facts |= {"lowest_id": inputs.min(), "highest_id": inputs.max()}
    # The one read.
    read = dict(zip(facts, torch.stack([fact.long() for fact in facts.values()]).tolist(), strict=True))

    if read.get("lowest_position", 0) < 0:
        raise ValueError(
            f"`position_ids` count the tokens of a document from 0, got {read['lowest_position']}. Padding is told by "
            "`attention_mask`, and may have any position from 0."
        )
    if vocab_size is not None and (read["lowest_id"] < 0 or read["highest_id"] >= vocab_size):
        raise ValueError(
            f"`input_ids` must be in [0, {vocab_size}), the ids of the vocabulary, got values from {read['lowest_id']} "
            f"to {read['highest_id']}."
        )
    layout = SequenceLayout(
        position_ids,
        None if read.get("segment_real", True) else mask,
        document_ids if read.get("inner", False) else None,
        restart if read.get("restart", False) else None,
        {},
    )
    return layout, None if read.get("all_real", True) else real, bool(read.get("earlier", False))


def on_device(length: int | torch.Tensor, device: torch.device) -> int | torch.Tensor:
    """A length that a cache gives; in a static cache a tensor beside the states of a layer, which counts on in place."""
    return length.to(device, copy=True) if isinstance(length, torch.Tensor) else length


def _checked_mask(attention_mask: torch.Tensor, inputs: torch.Tensor, past_length: int | torch.Tensor) -> torch.Tensor:
    """The mask as bool, if its shape is `[B, past + T]`."""
    batch_size, length = inputs.shape[:2]
    # The length of a static cache is a tensor, which is not read for a check.
    expected = None if isinstance(past_length, torch.Tensor) else past_length + length
    fits = attention_mask.dim() == 2 and attention_mask.shape[0] == batch_size and attention_mask.shape[1] >= length
    if not fits or (expected is not None and attention_mask.shape[1] != expected):
        raise ValueError(
            f"`attention_mask` must have the shape [B, past + T] = [{batch_size}, "
            f"{f'past + {length}' if expected is None else expected}], 1 for the real tokens in the cache and in the "
            f"segment, got {list(attention_mask.shape)}."
        )
    return attention_mask.to(device=inputs.device, dtype=torch.bool)


def last_real_hidden_states(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Give each masked position of `hidden_states` `[B, T, d]` the hidden state of the last real token before it.

    So the last column always holds the last real token of the row, and the token predicted there is its successor,
    whichever side the padding is on. Padding with no real token before it keeps its own hidden state.
    """
    if attention_mask is None or attention_mask.shape[1] == 1:
        return hidden_states
    mask = attention_mask.to(hidden_states.device)
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    count = mask.long().cumsum(dim=1)
    # Where the n-th real token stands, for n from 1; what padding writes at 0 is not read. ONNX has no running maximum.
    places = F.pad(torch.zeros_like(index), (1, 0)).scatter(1, count * mask, index)
    last_real = torch.where(count == 0, index, places.gather(1, count))
    return hidden_states.gather(1, last_real[..., None].expand_as(hidden_states))
