"""Where the tokens of one segment stand: positions, padding, documents. Made once a forward pass.

Everything is derived from `attention_mask` and `position_ids`:

- A masked token is transparent: no recurrence and no attention sees it.
- `position_ids` count the real tokens of a document from 0. A real token at position 0 begins a document, and nothing
  of the documents before it is seen any more, whether they are in the same segment or in the cache.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import Cache, PreTrainedConfig

from ..common.checks import is_concrete
from ..ops.documents import Documents


class SequenceLayout(NamedTuple):
    """
    The layout of one segment of `T` tokens. A tuple, so that it moves to the device of a layer with its arguments.

    Attributes:
        position_ids (`torch.Tensor` of shape `[1, T]` or `[B, T]`): the position of each token in its document.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool, or `None`): the real tokens; `None`: all.
        documents (`Documents` or `None`): the documents of the segment, as all operators take them; `None`: one a row.
        restart (`torch.Tensor` of shape `[B]`, bool, or `None`): the rows whose first real token begins a document
            and so drops the state before the segment; `None`: no row.
        masks (`dict`): what each type of attention layer takes as its mask.
    """

    position_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    documents: Documents | None
    restart: torch.Tensor | None
    masks: dict[str, Any]

    @property
    def document_ids(self) -> torch.Tensor | None:
        """The document `[B, T]`, int64, of each token; `None`: one a row."""
        return None if self.documents is None else self.documents.ids

    def to_masks(self) -> dict[str, Any]:
        """The same as what `generate` hands to a forward pass for its `attention_mask`."""
        own = {**self._asdict(), "documents": None, "masks": None}
        # transformers 5.23 takes tensors only.
        ids, starts = self.documents or (None, None)
        values = {**own, **self.masks, "document_ids": ids, "document_starts": starts}
        # A slice has the strides of the whole, for each length of which a compiler would make another graph.
        return {name: v.contiguous() if isinstance(v, torch.Tensor) else v for name, v in values.items()}

    @classmethod
    def from_masks(cls, masks: dict[str, Any]) -> "SequenceLayout":
        """The inverse of [`~SequenceLayout.to_masks`]."""
        ids, starts = masks["document_ids"], masks["document_starts"]
        own = {name: masks[name] for name in ("position_ids", "attention_mask", "restart")}
        others = {name: masks[name] for name in masks.keys() - {*cls._fields, "document_ids", "document_starts"}}
        return cls(**own, documents=None if ids is None else Documents(ids, starts), masks=others)


def sequence_layout(
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    config: PreTrainedConfig | None = None,
) -> tuple[SequenceLayout, torch.Tensor | None, bool]:
    """
    Lay out a segment, and note in the cache which of its tokens are real.

    What Python has to decide about a segment is computed on the device and read from it at once. A decode step, a
    traced graph, and a segment with neither a mask nor positions are laid out without reading anything.

    Args:
        inputs (`torch.Tensor` of shape `[B, T, ...]`): the ids of the segment, or another tensor of its shape.
        attention_mask (`torch.Tensor` of shape `[B, past + T]`, *optional*): 1 or True where a token is real, for the
            tokens in the cache and the segment. With a static cache there may be more columns, up to its length. By
            default the tokens of the segment are real, and those in the cache are what they were.
        position_ids (`torch.Tensor` of shape `[1, T]` or `[B, T]`, *optional*): the position of each token in its
            document. By default the real tokens of a row are counted on from the ones in the cache.
        cache (`transformers.Cache`, *optional*): the cache.
        config (`PreTrainedConfig`, *optional*): with `layer_types` and `vocab_size`: positions must not begin in the
            middle of a document if a layer has a state, and ids `[B, T]` must be in the vocabulary. Both are checked if
            anything is read.

    Returns:
        `tuple[SequenceLayout, torch.Tensor | None, bool]`: the layout, without the masks of attention layers; what
        these are made of: the real columns `[B, past + T]` (`None`: all), and whether a token may stand after one of an
        earlier document.

    Raises:
        `ValueError`: a shape does not fit, a position is negative, an id is outside the vocabulary, the mask contradicts
            the one that the tokens in the cache came with, or the state before the first token is missing.
    """
    batch_size, length = inputs.shape[:2]
    device = inputs.device
    past_length = 0 if cache is None else on_device(cache.get_seq_length(), device)
    in_place = is_static(cache)
    recurrent = (
        None if cache is None else next((layer for layer in cache.layers if hasattr(layer, "real_tokens")), None)
    )
    before = None if recurrent is None else recurrent.real_tokens
    if before is not None and not in_place:
        before = before[:, :past_length]
    real = None
    if attention_mask is not None:
        real = _checked_mask(attention_mask, inputs, past_length, in_place)
    elif before is not None:
        is_new = torch.arange(before.shape[1] + length, device=device) >= past_length
        real = F.pad(before.to(device), (0, length)) | is_new
    mask = None if real is None else of_segment(real, length, past_length, in_place)
    if position_ids is not None and (
        position_ids.dim() != 2 or position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch_size)
    ):
        raise ValueError(
            f"`position_ids` must have the shape [1, T] or [B, T] = [{batch_size}, {length}], got "
            f"{list(position_ids.shape)}."
        )

    has_positions = position_ids is not None
    is_step = length == 1 and cache is not None
    documents = restart = None
    if real is not None:
        count = of_segment(real.long().cumsum(dim=1) - 1, length, past_length, in_place)
    else:
        count = torch.arange(length, device=device)[None] + past_length
    if position_ids is None:
        position_ids = count.clamp(min=0) if real is not None else count
    elif is_step:
        restart = (position_ids == 0).expand(batch_size, -1)[:, 0]
        restart = restart if mask is None else restart & mask[:, 0]
    else:
        begins = (position_ids == 0).expand(batch_size, -1)
        begins = begins if mask is None else begins & mask
        first = torch.arange(length, device=device) == 0 if mask is None else mask & (mask.long().cumsum(dim=1) == 1)
        inner = begins & ~first
        documents, restart = Documents(inner.long().cumsum(dim=1), inner), (begins & first).any(dim=1)
    if cache is None:
        restart = None
    if length == 0 or is_step or (real is None and not has_positions) or not is_concrete(inputs):
        if recurrent is not None:
            recurrent.real_tokens = real
        return SequenceLayout(position_ids, mask, documents, restart, {}), real, has_positions

    vocab_size = config.vocab_size if config is not None and inputs.dim() == 2 else None
    facts: dict[str, torch.Tensor] = {}
    if isinstance(past_length, torch.Tensor):
        facts["past_length"] = past_length
    if real is not None:
        facts |= {"all_real": real.all(), "segment_real": mask.all()}
        if attention_mask is not None and recurrent is not None:
            facts["contradicts"] = _contradicts(real, before, past_length)
    if has_positions:
        later = count > position_ids
        facts |= {
            "inner": inner.any(),
            "earlier": (later if mask is None else later & mask).any(),
            "lowest_position": position_ids.min(),
            "first_position": (position_ids * first).max(),
        }
        if restart is not None:
            facts["restart"] = restart.any()
    if vocab_size is not None:
        facts |= {"lowest_id": inputs.min(), "highest_id": inputs.max()}
    # The one read.
    read = dict(zip(facts, torch.stack([fact.long() for fact in facts.values()]).tolist(), strict=True))

    if read.get("contradicts", False):
        raise ValueError(
            "`attention_mask` says otherwise than before which tokens in `cache` are real, and the state has been "
            "computed with them: pass for these the mask that they came with, or start from an empty cache."
        )
    if read.get("lowest_position", 0) < 0:
        raise ValueError(
            f"`position_ids` count the tokens of a document from 0, got {read['lowest_position']}. Padding is told by "
            "`attention_mask`, and may have any position from 0."
        )
    has_states = config is not None and set(config.layer_types) - {"full_attention"}
    if has_states and read.get("first_position", 0) > 0 and read.get("past_length", past_length) == 0:
        raise ValueError(
            f"`position_ids` begin at {read['first_position']}, in the middle of a document, and the state of the tokens "
            "before is missing: pass these tokens too, or the `cache` that they filled. If sequence or context "
            "parallelism has cut the document, turn it off: it is for models of full attention alone."
        )
    if vocab_size is not None and (read["lowest_id"] < 0 or read["highest_id"] >= vocab_size):
        raise ValueError(
            f"`input_ids` must be in [0, {vocab_size}), the ids of the vocabulary, got values from {read['lowest_id']} "
            f"to {read['highest_id']}."
        )
    if read.get("all_real", True):
        real = None
    if recurrent is not None:
        recurrent.real_tokens = real
    layout = SequenceLayout(
        position_ids,
        None if read.get("segment_real", True) else mask,
        documents if read.get("inner", False) else None,
        restart if read.get("restart", False) else None,
        {},
    )
    return layout, real, bool(read.get("earlier", False))


def is_static(cache: Cache | None) -> bool:
    """Whether the layers of a cache stay in place, and count their tokens on the device."""
    return cache is not None and hasattr(next(iter(cache.layers), None), "max_cache_len")


def on_device(length: int | torch.Tensor, device: torch.device) -> int | torch.Tensor:
    """A length that a cache gives; in a static cache a tensor beside the states of a layer, which counts on in place."""
    return length.to(device, copy=True) if isinstance(length, torch.Tensor) else length


def of_segment(columns: torch.Tensor, length: int, past_length: int | torch.Tensor, in_place: bool) -> torch.Tensor:
    """
    The columns `[B, T]` of a segment, of those `[B, past + T]` of all tokens. Behind them a cache that stays `in_place`
    may have more, for tokens to come.
    """
    if not in_place:
        return columns[:, columns.shape[1] - length :]
    try:
        return columns[:, torch.arange(length, device=columns.device) + past_length]
    except IndexError:
        raise ValueError(
            f"`attention_mask` has {columns.shape[1]} columns, and there are {int(past_length)} tokens in the cache and "
            f"{length} in the segment: pass one for each of them."
        ) from None


def _contradicts(real: torch.Tensor, before: torch.Tensor | None, past_length: int | torch.Tensor) -> torch.Tensor:
    """
    Whether `real` `[B, past + T]` says otherwise of a token in the cache than `before` `[B, past]` did, 0-d. `None`: they
    were all real. Both may have more columns.
    """
    size = real.shape[1] if before is None else min(real.shape[1], before.shape[1])
    differs = ~real if before is None else real[:, :size] ^ before[:, :size].to(real.device)
    return (differs & (torch.arange(size, device=real.device) < past_length)).any()


def _checked_mask(
    attention_mask: torch.Tensor, inputs: torch.Tensor, past_length: int | torch.Tensor, in_place: bool
) -> torch.Tensor:
    """The mask as bool, if its shape is `[B, past + T]`. It is a copy, which a cache may keep."""
    batch_size, length = inputs.shape[:2]
    # The length of a static cache is a tensor, which is not read for a check.
    is_known = not isinstance(past_length, torch.Tensor)
    needed = past_length + length if is_known else length
    fits = attention_mask.dim() == 2 and attention_mask.shape[0] == batch_size and attention_mask.shape[1] >= needed
    if not fits or (attention_mask.shape[1] > needed and not in_place):
        raise ValueError(
            f"`attention_mask` must have the shape [B, past + T] = [{batch_size}, "
            f"{needed if is_known else f'past + {length}'}]{' or more columns' if in_place else ''}, 1 for the real "
            f"tokens in the cache and in the segment, got {list(attention_mask.shape)}."
        )
    return attention_mask.to(device=inputs.device, dtype=torch.bool, copy=True)


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
