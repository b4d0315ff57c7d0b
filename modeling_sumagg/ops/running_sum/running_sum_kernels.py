"""The running sum over time as Triton kernels, each in both directions: `causal_sum` without decays, and `scan` with them.

One program walks over the tiles of `BLOCK_T` tokens of some channels, with the sum so far in registers: memory is read once
and written once. Where there are too few programs for the device, the sequence is cut into segments that run at the same
time, after a pass that reads the sequence once more for the sum of each segment.
"""

import torch

from ..dispatch import register_kernel
from ..precision import sum_dtype
from ..triton_helpers import (
    FLOAT64_BLOCK_T,
    MIN_BLOCK,
    contiguous,
    convert,
    given,
    num_processors,
    on_its_device,
    sum_decayed,
    sum_rows,
    tl,
    triton,
)
from .running_sum import causal_sum
from .running_sum_torch import scan, scan_vjp, shifted


BLOCK_T = 64  # tokens of a tile without decays
BLOCK_BYTES = 128  # of a row of it: a line of the cache
SEGMENT_TILES = 4  # the shortest segment, in tiles
NUM_STAGES = 5  # tiles in flight: one program must keep tens of kilobytes under way to fill its share of the bandwidth

DECAY_BLOCK_T = (
    32  # tokens of a tile with decays: the work of a token grows with it, and the sequential steps become fewer
)
DECAY_BLOCK_P = 64  # channels of a program, at most
DECAY_SEGMENT_TILES = 8
MAX_SEGMENTS = 32


@triton.jit
def find_channels(K, P, BLOCK_P: tl.constexpr):
    """The row, the head and the stripe of a program, and its channels among those of the row, with those in the head."""
    stripes = tl.cdiv(P, BLOCK_P)
    stripe = tl.program_id(0) % stripes
    head = (tl.program_id(0) // stripes) % K
    batch = (tl.program_id(0) // (stripes * K)).to(tl.int64)
    channel = stripe * BLOCK_P + tl.arange(0, BLOCK_P)
    return batch, head, stripe, head * P + channel, channel < P


@triton.jit
def running_sum_kernel(
    x_ptr,  # [B, T, D]
    gate_ptr,  # [B, T, D]
    scale_ptr,  # [B or 1, T]
    mask_ptr,  # [B, T]
    ids_ptr,  # [B, T]
    initial_ptr,  # [B, D], of any precision
    initial_id_ptr,  # [B]
    totals_ptr,  # [B, segments, D], its dtype is that of the sums
    y_ptr,  # [B, T, D]
    final_ptr,  # [B, D], like `initial`
    T,
    D,
    segment_tiles,
    num_segments,
    RELU: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    SHARED_SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_IDS: tl.constexpr,
    REVERSE: tl.constexpr,
    TOTALS: tl.constexpr,  # write the sum of each segment, not the running sums
    SEGMENTS: tl.constexpr,  # a power of 2, at least the number of segments
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    batch, _, _, channel, in_channels = find_channels(1, D, BLOCK_D)
    segment = tl.program_id(1)
    dtype = totals_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_T)
    x_ptr += batch * T * D + channel[None, :]
    gate_ptr += batch * T * D + channel[None, :]
    y_ptr += batch * T * D + channel[None, :]
    scale_ptr += 0 if SHARED_SCALE else batch * T
    mask_ptr += batch * T
    ids_ptr += batch * T
    totals_ptr += batch * num_segments * D

    # 1. The sum before the segment, but for `initial`: the same in every row of a tile; and the document that it is over.
    first_tile = segment * segment_tiles
    num_tiles = tl.minimum(segment_tiles, tl.cdiv(T, BLOCK_T) - first_tile)
    carry = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    carry_id = 0
    initial_id = 0
    if not TOTALS:
        initial = tl.load(initial_ptr + batch * D + channel, mask=in_channels, other=0.0)
        rounded_initial = initial.to(dtype)[None, :]
        if HAS_IDS:
            initial_id = tl.load(initial_id_ptr + batch).to(tl.int32)
            carry_id = initial_id
        if SEGMENTS > 1:
            other = tl.arange(0, SEGMENTS)
            end = other * segment_tiles * BLOCK_T
            if REVERSE:
                is_before = (other > segment) & (other < num_segments)
                nearest = segment + 1
            else:
                is_before = other < segment
                nearest = segment - 1
                end += segment_tiles * BLOCK_T - 1
            if HAS_IDS:
                # Of the segments before this one, those count that end in the document in which the nearest ends.
                nearest_id = carry_id
                if (nearest >= 0) & (nearest < num_segments):
                    nearest_id = tl.load(ids_ptr + tl.sum(tl.where(other == nearest, end, 0), 0)).to(tl.int32)
                end_ids = tl.load(ids_ptr + end, mask=is_before, other=-1).to(tl.int32)
                is_before = is_before & (end_ids == nearest_id)
                carry_id = nearest_id
            totals = tl.load(
                totals_ptr + other[:, None] * D + channel[None, :],
                mask=is_before[:, None] & in_channels[None, :],
                other=0.0,
            )
            carry += tl.sum(totals, 0)[None, :]

    everything = row[:, None] == row[:, None] + 0 * row[None, :]
    ordered = row[:, None] <= row[None, :] if REVERSE else row[:, None] >= row[None, :]
    for i in tl.range(0, num_tiles, num_stages=NUM_STAGES):
        # 2. The terms of a tile. What forward does to its terms, the adjoint does to its results, and the other way round.
        if REVERSE:
            start = (first_tile + num_tiles - 1 - i) * BLOCK_T
        else:
            start = (first_tile + i) * BLOCK_T
        token = start.to(tl.int64) + row
        in_sequence = token < T
        in_tile = in_sequence[:, None] & in_channels[None, :]
        real = in_tile
        if HAS_MASK:
            real = in_tile & (tl.load(mask_ptr + token, mask=in_sequence, other=0) != 0)[:, None]
        x = tl.load(x_ptr + token[:, None] * D, mask=in_tile if REVERSE else real, other=0.0)
        if RELU:
            x = tl.where(x <= 0.0, 0.0, x)
        if HAS_GATE:
            gate = tl.load(gate_ptr + token[:, None] * D, mask=real, other=0.0)
        if HAS_SCALE:
            scale = tl.load(scale_ptr + token, mask=in_sequence, other=0.0).to(dtype)[:, None]
        if REVERSE:
            if HAS_SCALE:
                x = convert(x, dtype) * scale
        else:
            if HAS_GATE:
                x = tl.where(gate <= 0.0, 0.0, x)
        end_id = 0
        if HAS_IDS:
            ids = tl.load(ids_ptr + tl.minimum(token, T - 1)).to(tl.int32)
            end_id = tl.min(ids, 0) if REVERSE else tl.max(ids, 0)

        # 3. The sums of its tokens.
        if not TOTALS:
            if HAS_IDS:
                y = tl.where((ids == carry_id)[:, None], carry, 0.0)
                y += tl.where((ids == initial_id)[:, None], rounded_initial, 0.0)
            else:
                y = carry + rounded_initial
            if BLOCK_T == 1:
                y += convert(x, dtype)
            elif HAS_IDS:
                y = sum_rows(ordered & (ids[:, None] == ids[None, :]), x, y)
            else:
                y = sum_rows(ordered, x, y)
            if REVERSE:
                if HAS_GATE:
                    y = tl.where(gate <= 0.0, 0.0, y)
                if HAS_MASK:
                    y = tl.where(real, y, 0.0)
            else:
                if HAS_SCALE:
                    y *= scale
            tl.store(y_ptr + token[:, None] * D, convert(y, y_ptr.dtype.element_ty), mask=in_tile)

        # 4. The sum after it.
        if HAS_IDS:
            carry = tl.where(carry_id == end_id, carry, 0.0)
            carry_id = end_id
        if TOTALS or BLOCK_T == 1:
            carry += convert(tl.where((ids == end_id)[:, None], x, 0.0) if HAS_IDS else x, dtype)
        elif HAS_IDS:
            carry = sum_rows(everything & (ids == end_id)[None, :], x, carry)
        else:
            carry = sum_rows(everything, x, carry)

    # 5. The sum of the segment, or after the sequence.
    if TOTALS:
        total = tl.sum(carry, 0)
        tl.store(totals_ptr + segment.to(tl.int64) * D + channel, total, mask=in_channels)
    elif segment == (0 if REVERSE else num_segments - 1):
        # In the precision of the state: in that of the sums a long stream would stop growing.
        final = carry.to(initial.dtype)
        if HAS_IDS:
            final += tl.where(carry_id == initial_id, initial, 0.0)[None, :]
        else:
            final += initial[None, :]
        is_first = (row == 0)[:, None] & in_channels[None, :]
        tl.store(final_ptr + batch * D + channel[None, :] + 0 * row[:, None], final, mask=is_first)


@on_its_device
def launch_running_sum(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    initial: torch.Tensor,
    mask: torch.Tensor | None,
    ids: torch.Tensor | None,
    *,
    relu: bool = False,
    reverse: bool = False,
    initial_id: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The linear map of [`causal_sum`] without decays, or with `reverse` its adjoint.

        forward: y_t = scale_t Σ_{u ≤ t} mask_u [gate_u > 0] x_u    reverse: y_t = mask_t [gate_t > 0] Σ_{u ≥ t} scale_u x_u

    with each sum over one document only, and `initial` one more term of the document in which the sums begin.

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, any floating dtype, no dimension 0): the terms.
        gate (`torch.Tensor` of shape `[B, T, D]`, *optional*): see above; NaN counts as positive.
        scale (`torch.Tensor` of shape `[B, T]` or `[1, T]`, *optional*): see above.
        initial (`torch.Tensor` of shape `[B, D]`, float32 or float64): see above. The sums are float32, or float64 for
            float64 `x` and for one token.
        mask (`torch.Tensor` of shape `[B, T]`, bool, *optional*): True where a token is real.
        ids (`torch.Tensor` of shape `[B, T]`, integer, *optional*): of the documents, never decreasing.
        relu (`bool`): take `max(x, 0)` for `x`.
        reverse (`bool`): the adjoint.
        initial_id (`torch.Tensor` of shape `[B]`, integer, *optional*): the document of `initial`, by default that of the
            first token, in reverse of the last.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: y in the dtype of `x`, and the last sum `[B, D]` in the dtype of `initial`.
    """
    batch_size, length, hidden_size = x.shape
    x, gate, scale, initial, mask, ids = contiguous(x, gate, scale, initial, mask, ids)
    y, final = torch.empty_like(x), torch.empty_like(initial)
    if ids is not None:
        initial_id = ids[:, -1 if reverse else 0] if initial_id is None else initial_id
        (initial_id,) = contiguous(initial_id)
    dtype = initial.dtype if length == 1 else sum_dtype(x)
    block_t = 1 if length == 1 else FLOAT64_BLOCK_T if dtype == torch.float64 else BLOCK_T
    num_tiles = triton.cdiv(length, block_t)
    block_d, num_segments = _partition(x, num_tiles)
    segment_tiles = triton.cdiv(num_tiles, num_segments)
    num_segments = triton.cdiv(num_tiles, segment_tiles)
    totals = final
    if num_segments > 1 or dtype != initial.dtype:
        totals = initial.new_empty(batch_size, num_segments, hidden_size, dtype=dtype)
    for is_totals_pass in (True, False) if num_segments > 1 else (False,):
        running_sum_kernel[batch_size * triton.cdiv(hidden_size, block_d), num_segments](
            x,
            *given(gate, scale, mask, ids, instead=x),
            initial,
            *given(initial_id, instead=x),
            totals,
            y,
            final,
            length,
            hidden_size,
            segment_tiles,
            num_segments,
            RELU=relu,
            HAS_GATE=gate is not None,
            HAS_SCALE=scale is not None,
            SHARED_SCALE=scale is not None and scale.shape[0] == 1,
            HAS_MASK=mask is not None,
            HAS_IDS=ids is not None,
            REVERSE=reverse,
            TOTALS=is_totals_pass,
            SEGMENTS=triton.next_power_of_2(num_segments),
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            NUM_STAGES=NUM_STAGES,
        )
    return y, final


def _partition(x: torch.Tensor, num_tiles: int) -> tuple[int, int]:
    """The channels of a stripe, and the number of segments, so that at least half of the processors have a program."""
    batch_size, _, hidden_size = x.shape
    widest = max(min(BLOCK_BYTES // x.element_size(), triton.next_power_of_2(hidden_size)), MIN_BLOCK)
    enough = num_processors(x.device) // 2
    for block_d in (widest, max(widest // 2, MIN_BLOCK)):
        if batch_size * triton.cdiv(hidden_size, block_d) >= enough:
            return block_d, 1
    programs = batch_size * triton.cdiv(hidden_size, widest)
    return widest, max(1, min(triton.cdiv(4 * enough, programs), num_tiles // SEGMENT_TILES))


@torch.library.custom_op("modeling_sumagg::running_sum", mutates_args=())
def running_sum(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    initial: torch.Tensor,
    mask: torch.Tensor | None,
    ids: torch.Tensor | None,
    relu: bool,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`launch_running_sum`] for autograd and compilers."""
    return launch_running_sum(x, gate, scale, initial, mask, ids, relu=relu, reverse=reverse)


@running_sum.register_fake
def _running_sum_fake(x, gate, scale, initial, mask, ids, relu, reverse):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(initial, memory_format=torch.contiguous_format)


def _running_sum_setup_context(ctx, inputs, output):
    x, gate, scale, _, mask, ids, relu, ctx.reverse = inputs
    ctx.save_for_backward(x if relu else gate, scale, mask, ids)


def _running_sum_vjp(ctx, grad_y, grad_final):
    # Linear but for the sign of the terms, so that the adjoint has derivatives of every order in turn.
    gate, scale, mask, ids = ctx.saved_tensors
    grad_x, grad_initial = running_sum(grad_y, gate, scale, grad_final, mask, ids, False, not ctx.reverse)
    return grad_x, None, None, grad_initial, None, None, None, None


running_sum.register_autograd(_running_sum_vjp, setup_context=_running_sum_setup_context)


@register_kernel(causal_sum)
def causal_sum_by_kernel(x, state, mask, documents, relu, scale):
    """[`causal_sum`] without decays, with one state for each row."""
    mask = None if mask is None else mask.bool()
    return running_sum(x, None, scale, state, mask, None if documents is None else documents.ids, relu, False)


@triton.jit
def decays_within(log_decay, is_start, row, REVERSE: tl.constexpr):
    """
    The decays in a tile of C tokens, of which documents begin at those that are `is_start` `[C]`.

    Returns:
        the decays `[C, C]` from each token (a column) to those after it (in reverse before it), 0 elsewhere; which tokens
        these are `[C, C]`; the decay `[C]` from where the tile is entered to each of its tokens; which tokens `[C]` that
        reaches; and whether it reaches the end of the tile.
    """
    count = tl.cumsum(is_start.to(tl.int32), 0)
    num_starts = tl.sum(is_start.to(tl.int32), 0)
    ordered = row[:, None] <= row[None, :] if REVERSE else row[:, None] >= row[None, :]
    seen = ordered & (count[:, None] == count[None, :])
    # As sums over the tokens in between: the difference of two sums from the beginning would cancel.
    if REVERSE:
        is_entered = count == num_starts
        steps = tl.where(row[None, :] > row[:, None], log_decay[None, :], 0.0)
        between = tl.cumsum(steps, 1)
        reach = tl.sum(steps, 1)
    else:
        is_entered = count == 0
        between = tl.cumsum(tl.where(row[:, None] > row[None, :], log_decay[:, None], 0.0), 0)
        reach = tl.cumsum(log_decay, 0)
    return tl.where(seen, tl.exp(between), 0.0), seen, tl.exp(reach), is_entered, num_starts == 0


@triton.jit
def load_starts(starts_ptr, token, in_sequence, HAS_STARTS: tl.constexpr):
    """At which tokens of a tile documents begin."""
    is_start = token < 0
    if HAS_STARTS:
        is_start = tl.load(starts_ptr + token, mask=in_sequence, other=0) != 0
    return is_start


@triton.jit
def take_row(x, row, index):
    """The row `index` of `x` `[C, ...]`."""
    is_wanted = row == index
    if len(x.shape) == 2:
        is_wanted = is_wanted[:, None]
    return tl.sum(tl.where(is_wanted, x, 0.0), 0)


@triton.jit
def end_of_tile(local, log_decay, is_start, row, REVERSE: tl.constexpr, BLOCK_T: tl.constexpr):
    """The sum after a tile, of the sums `local` `[C, ...]` of the tile alone; in reverse decayed by its first token."""
    end = take_row(local, row, 0 if REVERSE else BLOCK_T - 1)
    if REVERSE:
        is_cut = take_row(is_start.to(tl.int32), row, 0) > 0
        end = tl.where(is_cut, 0.0, end * tl.exp(take_row(log_decay, row, 0)))
    return end


@triton.jit
def decayed_sum_kernel(
    x_ptr,  # [B, T, K, P]
    log_decay_ptr,  # [B or 1, T, K], its dtype is that of the sums within a tile
    starts_ptr,  # [B, T]
    initial_ptr,  # [B, segments, K, P], its dtype is that of the sums from tile to tile
    y_ptr,  # [B, T, K, P]
    final_ptr,  # [B, segments, K, P], like `initial`
    reach_ptr,  # [B, segments, K], like `initial`: the logarithm of the decay over each segment
    T,
    K,
    P,
    segment_tiles,
    num_segments,
    RELU: tl.constexpr,
    SHARED_DECAY: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    REVERSE: tl.constexpr,
    STORE: tl.constexpr,  # write the running sums; or begin at 0, and write the last one and the decay of each segment
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    batch, head, _, channel, in_head = find_channels(K, P, BLOCK_P)
    segment = tl.program_id(1)
    dtype = log_decay_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_T)
    x_ptr += batch * T * K * P + channel[None, :]
    y_ptr += batch * T * K * P + channel[None, :]
    log_decay_ptr += head + (0 if SHARED_DECAY else batch * T * K)
    starts_ptr += batch * T

    # 1. The sum before the segment.
    first_tile = segment * segment_tiles
    num_tiles = tl.minimum(segment_tiles, tl.cdiv(T, BLOCK_T) - first_tile)
    state = (batch * num_segments + segment) * K * P + channel
    carry = tl.zeros([BLOCK_P], initial_ptr.dtype.element_ty)
    if STORE:
        carry = tl.load(initial_ptr + state, mask=in_head, other=0.0)
    over = tl.sum(tl.zeros([BLOCK_T], carry.dtype), 0)
    num_cuts = tl.sum(row * 0, 0)
    for i in range(0, num_tiles):
        # 2. The sums of a tile.
        tile = first_tile + (num_tiles - 1 - i if REVERSE else i)
        token = tile.to(tl.int64) * BLOCK_T + row
        in_sequence = token < T
        in_tile = in_sequence[:, None] & in_head[None, :]
        x = convert(tl.load(x_ptr + token[:, None] * K * P, mask=in_tile, other=0.0), dtype)
        if RELU:
            x = tl.where(x <= 0.0, 0.0, x)
        log_decay = tl.load(log_decay_ptr + token * K, mask=in_sequence, other=0.0).to(dtype)
        is_start = load_starts(starts_ptr, token, in_sequence, HAS_STARTS)
        decays, seen, into, is_entered, is_left = decays_within(log_decay, is_start, row, REVERSE)
        local = sum_decayed(decays, seen, x)
        if STORE:
            y = local + tl.where(is_entered[:, None], into[:, None] * carry.to(dtype)[None, :], 0.0)
            tl.store(y_ptr + token[:, None] * K * P, convert(y, y_ptr.dtype.element_ty), mask=in_tile)

        # 3. The sum after it, in the precision of the state: a decay of almost 1 over many tiles is exact to its logarithm.
        over_tile = tl.sum(log_decay.to(carry.dtype), 0)
        end = end_of_tile(local, log_decay, is_start, row, REVERSE, BLOCK_T)
        carry = tl.where(is_left, tl.exp(over_tile) * carry, 0.0) + end.to(carry.dtype)
        over += over_tile
        num_cuts += tl.where(is_left, 0, 1)
    tl.store(final_ptr + state, carry, mask=in_head)
    if not STORE:
        reach = tl.where(num_cuts > 0, float("-inf"), over)
        tl.store(reach_ptr + (batch * num_segments + segment) * K + head, reach)


@triton.jit
def join_segments_kernel(
    initial_ptr,  # [B, K, P]
    sums_ptr,  # [B, segments, K, P], of each segment alone
    reach_ptr,  # [B, segments, K]
    states_ptr,  # [B, segments, K, P], the sum before each segment
    K,
    P,
    num_segments,
    REVERSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    batch, head, _, channel, in_head = find_channels(K, P, BLOCK_P)
    state = tl.load(initial_ptr + batch * K * P + channel, mask=in_head, other=0.0)
    for i in range(0, num_segments):
        segment = batch * num_segments + (num_segments - 1 - i if REVERSE else i)
        tl.store(states_ptr + segment * K * P + channel, state, mask=in_head)
        reach = tl.load(reach_ptr + segment * K + head)
        own = tl.load(sums_ptr + segment * K * P + channel, mask=in_head, other=0.0)
        state = tl.where(reach == float("-inf"), 0.0, tl.exp(reach) * state) + own


@on_its_device
def launch_decayed_sum(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    initial: torch.Tensor,
    starts: torch.Tensor | None,
    *,
    relu: bool = False,
    reverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The sums with decays of [`scan`], or with `reverse` their adjoint.

        forward: s_t = a_t s_{t-1} + x_t    reverse: g_t = x_t + a_{t+1} g_{t+1}

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, float32 or float64, no dimension 0): the terms.
        log_decay (`torch.Tensor` of shape `[B or 1, T, K]`): the logarithms of the decays.
        initial (`torch.Tensor` of shape `[B, D]`, floating): `s_0`; in reverse what is added to `g_T`.
        starts (`torch.Tensor` of shape `[B, T]`, bool, *optional*): the tokens whose decay is 0: documents begin there.
        relu (`bool`): take `max(x, 0)` for `x`.
        reverse (`bool`): the adjoint.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sums in the dtype of `x`; and in that of `initial` `s_T`, in reverse
        `a_1 g_1`, the gradient of `s_0`.
    """
    batch_size, length, hidden_size = x.shape
    heads = log_decay.shape[2]
    head_dim = hidden_size // heads
    x, log_decay, initial, starts = contiguous(x, log_decay, initial, starts)
    block_t, block_p = block_sizes(x.dtype, head_dim)
    programs = batch_size * heads * triton.cdiv(head_dim, block_p)
    num_segments, segment_tiles = cut(x.device, programs, triton.cdiv(length, block_t))
    y = torch.empty_like(x)
    finals = initial.new_empty(batch_size, num_segments, hidden_size)
    reach = initial.new_empty(batch_size, num_segments, heads)

    def launch(states, store):
        decayed_sum_kernel[programs, num_segments](
            x,
            log_decay,
            *given(starts, instead=x),
            states,
            y,
            finals,
            reach,
            length,
            heads,
            head_dim,
            segment_tiles,
            num_segments,
            RELU=relu,
            SHARED_DECAY=log_decay.shape[0] == 1,
            HAS_STARTS=starts is not None,
            REVERSE=reverse,
            STORE=store,
            BLOCK_T=block_t,
            BLOCK_P=block_p,
        )

    states = initial
    if num_segments > 1:
        launch(initial, False)
        states = torch.empty_like(finals)
        join_segments_kernel[(programs,)](
            initial, finals, reach, states, heads, head_dim, num_segments, REVERSE=reverse, BLOCK_P=block_p
        )
    launch(states, True)
    return y, finals[:, 0 if reverse else -1].contiguous()


def block_sizes(dtype: torch.dtype, head_dim: int) -> tuple[int, int]:
    """The tokens of a tile, and the channels of a program."""
    block_t = FLOAT64_BLOCK_T if dtype == torch.float64 else DECAY_BLOCK_T
    return block_t, max(min(DECAY_BLOCK_P, triton.next_power_of_2(head_dim)), MIN_BLOCK)


def cut(device: torch.device, programs: int, num_tiles: int) -> tuple[int, int]:
    """The number of segments of a sequence, so that every processor has two programs, and the tiles of a segment."""
    wanted = triton.cdiv(2 * num_processors(device), programs)
    num_segments = max(1, min(wanted, MAX_SEGMENTS, num_tiles // DECAY_SEGMENT_TILES))
    segment_tiles = triton.cdiv(num_tiles, num_segments)
    return triton.cdiv(num_tiles, segment_tiles), segment_tiles


@torch.library.custom_op("modeling_sumagg::decayed_sum", mutates_args=())
def decayed_sum(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    initial: torch.Tensor,
    starts: torch.Tensor | None,
    relu: bool,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`launch_decayed_sum`] for autograd and compilers."""
    return launch_decayed_sum(x, log_decay, initial, starts, relu=relu, reverse=reverse)


@decayed_sum.register_fake
def _decayed_sum_fake(x, log_decay, initial, starts, relu, reverse):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(initial, memory_format=torch.contiguous_format)


def _decayed_sum_setup_context(ctx, inputs, output):
    x, log_decay, initial, starts, ctx.relu, _ = inputs
    ctx.save_for_backward(x if ctx.relu else None, log_decay, initial, starts, output[0])


def _decayed_sum_vjp(ctx, grad, grad_final):
    x, log_decay, initial, starts, y = ctx.saved_tensors
    if torch.is_grad_enabled():  # A gradient that has gradients in turn is a sum over the reversed tokens.
        reverse_starts = None if starts is None else shifted(starts).flip(1)
        grad, _ = decayed_sum(grad.flip(1), shifted(log_decay).flip(1), grad_final, reverse_starts, False, False)
        grad = grad.flip(1)
    else:
        grad, _ = decayed_sum(grad, log_decay, grad_final, starts, False, True)
    grad, grad_decay, grad_initial = scan_vjp(grad, y, log_decay, initial, starts, needs_decay=ctx.needs_input_grad[1])
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, x, 0)
    return grad, grad_decay, grad_initial, None, None, None


decayed_sum.register_autograd(_decayed_sum_vjp, setup_context=_decayed_sum_setup_context)


@register_kernel(scan)
def scan_by_kernel(x, log_decay, initial, documents, relu):
    """[`scan`] with one state for each row."""
    if log_decay is None:
        log_decay = x.new_zeros(1, x.shape[1], 1)
    return decayed_sum(x, log_decay, initial, None if documents is None else documents.starts, relu, False)
