"""Frames stacked into tokens: the part of a causal convolution with a stride that is no linear map."""

import torch
import torch.nn.functional as F

from .documents import check_tokens


def stack_frames(
    x: torch.Tensor,
    *,
    size: int,
    stride: int,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: None = None,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """
    The windows of a causal convolution with a stride, over the real frames of each row: with `s = stride`,

        y_j = (x_{(j + 1) s - size}, …, x_{(j + 1) s - 1}),    j = 0, 1, 2, …

    where frames are counted from the first one before the state, before which there are zeros. A window is given by the
    segment that holds its last frame; frames that do not complete a group of `s` wait in the state.

    Args:
        x (`torch.Tensor` of shape `[B, T, F]`, any floating dtype): the frames of a segment.
        size (`int`): frames of a window, at least `stride`.
        stride (`int`): frames from one window to the next.
        initial_state (`tuple`, *optional*): the last `size - 1` real frames before the segment, `[B, size - 1, F]`, and
            how many there have been in each row, `[B]`, int64. Zero if not given.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool or 0/1, *optional*): True where a frame is real.
        document_ids: not used; a row is one recording.

    Returns:
        `tuple`: a pair, and the state after the segment, of the form of the initial one. The pair is the windows
        `[B, N, size, F]`, those of each row first, and their numbers j `[B, N]`, int64, -1 where a row has no more. `N` is
        `T / s` rounded down, and with an initial state up: there is room for the most windows that there may be.

    Raises:
        `TypeError`: `x` is not floating.
        `ValueError`: a shape does not fit `x`, or `size` is below `stride`.
    """
    if x.dim() != 3:
        raise ValueError(f"`x` must have the shape [B, T, F], got {list(x.shape)}.")
    if not x.is_floating_point():
        raise TypeError(f"`x` must be of a floating dtype, got {x.dtype}.")
    if not 1 <= stride <= size:
        raise ValueError(f"`stride` must be at least 1 and `size` at least `stride`, got {stride} and {size}.")
    batch_size, length, bins = x.shape
    check_tokens("x", batch_size, length, attention_mask, document_ids)
    past = size - 1
    num_windows = length // stride if initial_state is None else (length + stride - 1) // stride
    if initial_state is None:
        initial_state = x.new_zeros(batch_size, past, bins), x.new_zeros(batch_size, dtype=torch.long)
    context, count = initial_state
    if context.shape != (batch_size, past, bins) or count.shape != (batch_size,):
        raise ValueError(
            f"`initial_state` must have the shapes [{batch_size}, {past}, {bins}] and [{batch_size}], got "
            f"{list(context.shape)} and {list(count.shape)}."
        )

    if attention_mask is not None:
        x = x.masked_fill(~attention_mask.bool()[..., None], 0)
    frames = torch.cat([context.to(x.dtype), x], dim=1)
    columns = torch.arange(past + length, device=x.device).expand(batch_size, -1)
    new = count.new_full((batch_size,), length)
    if attention_mask is not None:
        # The columns of the real frames behind one another; slot 0 takes what is masked.
        real = F.pad(attention_mask.bool(), (past, 0), value=True)
        slots = real.long().cumsum(dim=1) * real
        columns = slots.new_zeros(batch_size, past + length + 1).scatter(1, slots, columns)[:, 1:]
        new = real[:, past:].sum(dim=1)
    rows = torch.arange(batch_size, device=x.device)[:, None]
    # The n-th frame of a segment ends a window if it completes a group, and is at `past + n` of all.
    index = torch.arange(num_windows, device=x.device)
    last = index * stride + (stride - 1 - count % stride)[:, None]
    numbers = torch.where(last < new[:, None], count[:, None] // stride + index, -1)
    places = (last[..., None] + torch.arange(size, device=x.device)).clamp(max=past + length - 1)
    windows = frames[rows, columns.gather(1, places.flatten(1))].unflatten(1, (num_windows, size))
    kept = new[:, None] + torch.arange(past, device=x.device)
    return (windows, numbers), (frames[rows, columns.gather(1, kept)], count + new)
