"""The running sum with decays as a Triton kernel, in both directions: `scan` and its adjoint.

One program walks over the tiles of `BLOCK_T` tokens of some channels of one head, with the sum so far in registers. Within
a tile the decays from each token to each other are a triangular matrix, by which the tile is multiplied. Where there are
too few heads for the device, the sequence is cut into segments that run at the same time, after a pass that reads the
sequence once more for the sum and the decay of each segment, and a short one that leads each of them to the next.
"""

import torch

from .running_sum_kernels import FLOAT64_BLOCK_T, channels_last, convert, num_processors, on_its_device


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"The kernels need Triton, which cannot be imported ({error}). Install `triton`.") from error


BLOCK_T = 32  # tokens of a tile: the work of a token grows with it, and the sequential steps become fewer
BLOCK_P = 64  # channels of a program, at most
MIN_BLOCK_P = 16  # as a factor of a matrix product
SEGMENT_TILES = 8  # the shortest segment, in tiles
MAX_SEGMENTS = 32


@triton.jit
def decays_within(log_decay, row, REVERSE: tl.constexpr):
    """
    Of a tile: the decays `[C, C]` from each token (a column) to those after it (in reverse before it), 0 elsewhere, and the
    logarithm of the decay `[C]` from where the tile begins to each of its tokens.
    """
    # As sums over the tokens in between: the difference of two sums from the beginning would cancel.
    if REVERSE:
        later = row[None, :] > row[:, None]
        steps = tl.where(later, log_decay[None, :], 0.0)
        between = tl.cumsum(steps, 1)
        reach = tl.sum(steps, 1)
    else:
        later = row[:, None] > row[None, :]
        between = tl.cumsum(tl.where(later, log_decay[:, None], 0.0), 0)
        reach = tl.cumsum(log_decay, 0)
    return tl.where(later | (row[:, None] == row[None, :]), tl.exp(between), 0.0), reach


@triton.jit
def multiply_exactly(decays, x):
    """`decays` `[C, C]` times `x` `[C, n]` in their dtype; float64, whose products Triton compiles unreliably, plainly."""
    if decays.dtype == tl.float64:
        return tl.sum(decays[:, :, None] * x[None, :, :], 1)
    return tl.dot(decays, x, input_precision="ieee")


@triton.jit
def end_of_tile(local, log_decay, row, REVERSE: tl.constexpr, BLOCK_T: tl.constexpr):
    """What a tile alone hands on: of the sums `local` `[C, ...]` the last row, in reverse the first, decayed by its token."""
    wanted = 0 if REVERSE else BLOCK_T - 1
    at_end = row == wanted
    if len(local.shape) == 2:
        at_end = at_end[:, None]
    end = tl.sum(tl.where(at_end, local, 0.0), 0)
    if REVERSE:
        end *= tl.exp(tl.sum(tl.where(row == 0, log_decay, 0.0), 0))
    return end


@triton.jit
def decayed_sum_kernel(
    x_ptr,  # [B, T, K, P]
    log_decay_ptr,  # [B or 1, T, K], its dtype is that of the sums within a tile
    initial_ptr,  # [B, segments, K, P], its dtype is that of the sums from tile to tile
    y_ptr,  # [B, T, K, P]
    final_ptr,  # [B, segments, K, P], like `initial`
    reach_ptr,  # [B, segments, K], like `initial`: the logarithm of the decay over each segment
    T,
    K,
    P,
    segment_tiles,
    num_segments,
    x_stride_b,
    x_stride_t,
    decay_stride_b,
    decay_stride_t,
    RELU: tl.constexpr,
    REVERSE: tl.constexpr,
    STORE: tl.constexpr,  # write the running sums; or begin at 0, and write the last one and the decay of each segment
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    stripes = tl.cdiv(P, BLOCK_P)
    batch = (tl.program_id(0) // (stripes * K)).to(tl.int64)
    head = (tl.program_id(0) // stripes) % K
    channel = (tl.program_id(0) % stripes) * BLOCK_P + tl.arange(0, BLOCK_P)
    segment = tl.program_id(1)
    in_head = channel < P
    channel += head * P
    dtype = log_decay_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_T)
    x_ptr += batch * x_stride_b + channel[None, :]
    y_ptr += batch * T * K * P + channel[None, :]
    log_decay_ptr += batch * decay_stride_b + head

    first_tile = segment * segment_tiles
    num_tiles = tl.minimum(segment_tiles, tl.cdiv(T, BLOCK_T) - first_tile)
    state = (batch * num_segments + segment) * K * P + channel
    carry = tl.zeros([BLOCK_P], initial_ptr.dtype.element_ty)
    if STORE:
        carry = tl.load(initial_ptr + state, mask=in_head, other=0.0)
    over = tl.sum(tl.zeros([BLOCK_T], carry.dtype), 0)
    for i in range(0, num_tiles):
        tile = first_tile + (num_tiles - 1 - i if REVERSE else i)
        token = tile.to(tl.int64) * BLOCK_T + row
        in_sequence = token < T
        in_tile = in_sequence[:, None] & in_head[None, :]
        x = convert(tl.load(x_ptr + token[:, None] * x_stride_t, mask=in_tile, other=0.0), dtype)
        if RELU:
            x = tl.where(x <= 0.0, 0.0, x)
        log_decay = tl.load(log_decay_ptr + token * decay_stride_t, mask=in_sequence, other=0.0).to(dtype)
        decays, reach = decays_within(log_decay, row, REVERSE)
        local = multiply_exactly(decays, x)
        if STORE:
            y = local + tl.exp(reach)[:, None] * carry.to(dtype)[None, :]
            tl.store(y_ptr + token[:, None] * K * P, convert(y, y_ptr.dtype.element_ty), mask=in_tile)

        # From tile to tile in the precision of the state: a decay of almost 1 over many tiles is exact to its logarithm.
        over_tile = tl.sum(log_decay.to(carry.dtype), 0)
        end = end_of_tile(local, log_decay, row, REVERSE, BLOCK_T)
        carry = tl.exp(over_tile) * carry + end.to(carry.dtype)
        over += over_tile
    tl.store(final_ptr + state, carry, mask=in_head)
    if not STORE:
        tl.store(reach_ptr + (batch * num_segments + segment) * K + head, over)


@triton.jit
def join_segments_kernel(
    initial_ptr,  # [B, K, P]
    sums_ptr,  # [B, segments, K, P], of each segment alone
    reach_ptr,  # [B, segments, K]
    states_ptr,  # [B, segments, K, P], what each segment goes on from
    K,
    P,
    num_segments,
    REVERSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    stripes = tl.cdiv(P, BLOCK_P)
    batch = (tl.program_id(0) // (stripes * K)).to(tl.int64)
    head = (tl.program_id(0) // stripes) % K
    channel = (tl.program_id(0) % stripes) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_head = channel < P
    channel += head * P
    state = tl.load(initial_ptr + batch * K * P + channel, mask=in_head, other=0.0)
    for i in range(0, num_segments):
        segment = batch * num_segments + (num_segments - 1 - i if REVERSE else i)
        tl.store(states_ptr + segment * K * P + channel, state, mask=in_head)
        own = tl.load(sums_ptr + segment * K * P + channel, mask=in_head, other=0.0)
        state = tl.exp(tl.load(reach_ptr + segment * K + head)) * state + own


@on_its_device
def decayed_sum(
    x: torch.Tensor, log_decay: torch.Tensor, initial: torch.Tensor, *, relu: bool = False, reverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The sums with decays of [`scan`], or with `reverse` their adjoint.

        forward: s_t = a_t s_{t-1} + x_t    reverse: g_t = x_t + a_{t+1} g_{t+1}

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, float32 or float64, no dimension 0): the terms.
        log_decay (`torch.Tensor` of shape `[B or 1, T, K]`): the logarithms of the decays, `-inf` for none left.
        initial (`torch.Tensor` of shape `[B, D]`, floating): `s_0`; in reverse what is added to `g_T`.
        relu (`bool`): take `max(x, 0)` for `x`.
        reverse (`bool`): the adjoint.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sums in the dtype of `x`; and in that of `initial` `s_T`, in reverse
        `a_1 g_1`, the gradient of `s_0`.
    """
    batch_size, length, hidden_size = x.shape
    heads = log_decay.shape[2]
    head_dim = hidden_size // heads
    x, log_decay = channels_last(x), channels_last(log_decay)
    block_t, block_p = block_sizes(x, head_dim)
    programs = batch_size * heads * triton.cdiv(head_dim, block_p)
    num_segments, segment_tiles = cut(x.device, programs, triton.cdiv(length, block_t))

    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    initial = initial.contiguous()
    finals = initial.new_empty(batch_size, num_segments, hidden_size)
    reach = initial.new_empty(batch_size, num_segments, heads)

    def launch(states, store):
        decayed_sum_kernel[programs, num_segments](
            x,
            log_decay,
            states,
            y,
            finals,
            reach,
            length,
            heads,
            head_dim,
            segment_tiles,
            num_segments,
            *x.stride()[:2],
            *per_token_strides(log_decay),
            RELU=relu,
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


def block_sizes(x: torch.Tensor, head_dim: int) -> tuple[int, int]:
    """The tokens of a tile, and the channels of a program."""
    block_t = FLOAT64_BLOCK_T if x.dtype == torch.float64 else BLOCK_T
    return block_t, max(min(BLOCK_P, triton.next_power_of_2(head_dim)), MIN_BLOCK_P)


def cut(device: torch.device, programs: int, num_tiles: int) -> tuple[int, int]:
    """The number of segments of a sequence, so that every processor has two programs, and the tiles of a segment."""
    wanted = triton.cdiv(2 * num_processors(device), programs)
    num_segments = max(1, min(wanted, MAX_SEGMENTS, num_tiles // SEGMENT_TILES))
    segment_tiles = triton.cdiv(num_tiles, num_segments)
    return triton.cdiv(num_tiles, segment_tiles), segment_tiles


def per_token_strides(values: torch.Tensor) -> tuple[int, int]:
    """Of the rows and tokens of `[B or 1, T, K]`, one row standing for all."""
    return 0 if values.shape[0] == 1 else values.stride(0), values.stride(1)
