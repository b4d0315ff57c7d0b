"""The running sum over time as a Triton kernel, in both directions: `causal_sum` and its adjoint.

One program walks over the tiles of `BLOCK_T` tokens of one stripe of channels, with the sum so far in registers: memory
is read once and written once. Where there are too few stripes for the device, the sequence is cut into segments that
run at the same time, after a pass that reads the sequence once more for the sum of each segment.
"""

import functools

import torch


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"The kernels need Triton, which cannot be imported ({error}). Install `triton`.") from error


BLOCK_T = 64  # tokens of a tile; at least 16, as a factor of a matrix product
FLOAT64_BLOCK_T = 16
BLOCK_BYTES = 128  # of a row of a tile: a line of the cache
MIN_BLOCK_D = 16  # channels, as a factor of a matrix product
SEGMENT_TILES = 4  # the shortest segment, in tiles
NUM_STAGES = 5  # tiles in flight: one program must keep tens of kilobytes under way to fill its share of the bandwidth


@triton.jit
def _nothing():
    pass


INTERPRETED = tl.constexpr(not isinstance(_nothing, triton.JITFunction))


@triton.jit
def convert(x, dtype: tl.constexpr):
    # The interpreter converts bfloat16 from and to float32 alone.
    if x.dtype == tl.bfloat16 or dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def multiply(terms, x):
    # The interpreter would multiply bfloat16 by their bit patterns.
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return tl.dot(terms.to(x.dtype), x)


@triton.jit
def sum_rows(terms, x, carry):
    """
    `terms` `[C, C]`, bool, says which rows of `x` `[C, n]` each row of the result adds, in the dtype of `carry` `[C, n]`,
    which is added last.

    A matrix product, exact but for the rounding of the sums: of 16-bit numbers with zeros and ones, and of float32 as
    three bfloat16, which hold its 24 bits. A scan would pass every partial sum from thread to thread. Float64, for which
    Triton's products do not compile reliably, is added up plainly; its tiles are short.
    """
    if x.dtype == tl.float64:
        sums = tl.sum(tl.where(terms[:, :, None], x[None, :, :], 0.0), 1)
    elif x.dtype == tl.float32:
        high = x.to(tl.bfloat16)
        x -= high.to(tl.float32)
        middle = x.to(tl.bfloat16)
        x -= middle.to(tl.float32)
        sums = multiply(terms, x.to(tl.bfloat16)) + multiply(terms, middle) + multiply(terms, high)
    else:
        sums = multiply(terms, x)
    # As a plain sum the compiler would make the carry a term of the product, whose long sums stop growing.
    return tl.fma(sums, 1.0, carry)


@triton.jit
def running_sum_kernel(
    x_ptr,  # [B, T, D]
    gate_ptr,  # [B, T, D]
    scale_ptr,  # [B, T]
    mask_ptr,  # [B, T]
    runs_ptr,  # [B, T]
    initial_ptr,  # [B, D], of any precision
    initial_run_ptr,  # [B]
    totals_ptr,  # [B, segments, D], its dtype is that of the sums
    y_ptr,  # [B, T, D]
    final_ptr,  # [B, D], like `initial`
    T,
    D,
    segment_tiles,
    num_segments,
    x_stride_b,
    x_stride_t,
    gate_stride_b,
    gate_stride_t,
    scale_stride_b,
    y_stride_b,
    y_stride_t,
    RELU: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RUNS: tl.constexpr,
    REVERSE: tl.constexpr,
    TOTALS: tl.constexpr,  # write the sum of each segment, not the running sums
    SEGMENTS: tl.constexpr,  # a power of 2, at least the number of segments
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    stripes = tl.cdiv(D, BLOCK_D)
    batch = (tl.program_id(0) // stripes).to(tl.int64)
    channel = (tl.program_id(0) % stripes) * BLOCK_D + tl.arange(0, BLOCK_D)
    segment = tl.program_id(1)
    in_channels = channel < D
    dtype = totals_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_T)

    x_ptr += batch * x_stride_b + channel[None, :]
    gate_ptr += batch * gate_stride_b + channel[None, :]
    scale_ptr += batch * scale_stride_b
    mask_ptr += batch * T
    runs_ptr += batch * T
    y_ptr += batch * y_stride_b + channel[None, :]
    totals_ptr += batch * num_segments * D

    first_tile = segment * segment_tiles
    num_tiles = tl.minimum(segment_tiles, tl.cdiv(T, BLOCK_T) - first_tile)
    # The sum so far but for `initial`, the same in every row of a tile, and the run that it is over.
    carry = tl.zeros([BLOCK_T, BLOCK_D], dtype)
    carry_run = 0
    initial_run = 0
    if not TOTALS:
        initial = tl.load(initial_ptr + batch * D + channel, mask=in_channels, other=0.0)
        rounded_initial = initial.to(dtype)[None, :]
        if HAS_RUNS:
            initial_run = tl.load(initial_run_ptr + batch).to(tl.int32)
            carry_run = initial_run
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
            if HAS_RUNS:
                # Of the segments before this one, those count that end in the run in which the nearest ends.
                run = carry_run
                if (nearest >= 0) & (nearest < num_segments):
                    run = tl.load(runs_ptr + tl.sum(tl.where(other == nearest, end, 0), 0)).to(tl.int32)
                is_before = is_before & (tl.load(runs_ptr + end, mask=is_before, other=-1).to(tl.int32) == run)
                carry_run = run
            totals = tl.load(
                totals_ptr + other[:, None] * D + channel[None, :],
                mask=is_before[:, None] & in_channels[None, :],
                other=0.0,
            )
            carry += tl.sum(totals, 0)[None, :]

    everything = row[:, None] == row[:, None] + 0 * row[None, :]
    ordered = row[:, None] <= row[None, :] if REVERSE else row[:, None] >= row[None, :]
    for i in tl.range(0, num_tiles, num_stages=NUM_STAGES):
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

        x = tl.load(x_ptr + token[:, None] * x_stride_t, mask=in_tile if REVERSE else real, other=0.0)
        if RELU:
            x = tl.where(x <= 0.0, 0.0, x)
        if HAS_GATE:
            gate = tl.load(gate_ptr + token[:, None] * gate_stride_t, mask=real, other=0.0)
        if HAS_SCALE:
            scale = tl.load(scale_ptr + token, mask=in_sequence, other=0.0).to(dtype)[:, None]
        # What forward does to its terms, the adjoint does to its results, and the other way round.
        if REVERSE:
            if HAS_SCALE:
                x = convert(x, dtype) * scale
        else:
            if HAS_GATE:
                x = tl.where(gate <= 0.0, 0.0, x)

        end_run = 0
        if HAS_RUNS:
            runs = tl.load(runs_ptr + tl.minimum(token, T - 1)).to(tl.int32)
            end_run = tl.min(runs, 0) if REVERSE else tl.max(runs, 0)

        if not TOTALS:
            if HAS_RUNS:
                y = tl.where((runs == carry_run)[:, None], carry, 0.0)
                y += tl.where((runs == initial_run)[:, None], rounded_initial, 0.0)
            else:
                y = carry + rounded_initial
            if BLOCK_T == 1:
                y += convert(x, dtype)
            elif HAS_RUNS:
                y = sum_rows(ordered & (runs[:, None] == runs[None, :]), x, y)
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
            tl.store(y_ptr + token[:, None] * y_stride_t, convert(y, y_ptr.dtype.element_ty), mask=in_tile)

        if HAS_RUNS:
            carry = tl.where(carry_run == end_run, carry, 0.0)
            carry_run = end_run
        if TOTALS or BLOCK_T == 1:
            carry += convert(tl.where((runs == end_run)[:, None], x, 0.0) if HAS_RUNS else x, dtype)
        elif HAS_RUNS:
            carry = sum_rows(everything & (runs == end_run)[None, :], x, carry)
        else:
            carry = sum_rows(everything, x, carry)

    if TOTALS:
        total = tl.sum(carry, 0)
        tl.store(totals_ptr + segment.to(tl.int64) * D + channel, total, mask=in_channels)
    elif segment == (0 if REVERSE else num_segments - 1):
        # In the precision of the state: in that of the sums a long stream would stop growing.
        final = carry.to(initial.dtype)
        if HAS_RUNS:
            final += tl.where(carry_run == initial_run, initial, 0.0)[None, :]
        else:
            final += initial[None, :]
        is_first = (row == 0)[:, None] & in_channels[None, :]
        tl.store(final_ptr + batch * D + channel[None, :] + 0 * row[:, None], final, mask=is_first)


def on_its_device(function):
    """Triton launches on the current device, which need not be that of the first argument."""

    @functools.wraps(function)
    def wrapped(x, *args, **kwargs):
        with torch.cuda.device_of(x):
            return function(x, *args, **kwargs)

    return wrapped


@on_its_device
def running_sum(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    initial: torch.Tensor,
    mask: torch.Tensor | None,
    runs: torch.Tensor | None,
    *,
    relu: bool = False,
    reverse: bool = False,
    initial_run: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The linear map of [`causal_sum`], or with `reverse` its adjoint.

        forward: y_t = scale_t Σ_{u ≤ t} mask_u [gate_u > 0] x_u    reverse: y_t = mask_t [gate_t > 0] Σ_{u ≥ t} scale_u x_u

    with each sum over one run only, and `initial` one more term of the run in which the sums begin.

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, any floating dtype, no dimension 0): the terms.
        gate (`torch.Tensor` of shape `[B, T, D]`, *optional*): see above; NaN counts as positive.
        scale (`torch.Tensor` of shape `[B, T]` or `[1, T]`, *optional*): see above.
        initial (`torch.Tensor` of shape `[B, D]`, float32 or float64): see above. The sums are float32, or float64 for
            float64 `x` and for one token.
        mask (`torch.Tensor` of shape `[B, T]`, bool, *optional*): True where a token is real.
        runs (`torch.Tensor` of shape `[B, T]`, integer, *optional*): never decreasing.
        relu (`bool`): take `max(x, 0)` for `x`.
        reverse (`bool`): the adjoint.
        initial_run (`torch.Tensor` of shape `[B]`, integer, *optional*): the run of `initial`, by default that of the
            first token, in reverse of the last.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: y in the dtype of `x`, and the last sum `[B, D]` in the dtype of `initial`.
    """
    batch_size, length, hidden_size = x.shape
    x = channels_last(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    initial = initial.contiguous()
    final = torch.empty_like(initial)
    if runs is not None:
        runs = runs.contiguous()
        initial_run = runs[:, -1 if reverse else 0] if initial_run is None else initial_run
        initial_run = initial_run.contiguous()
    gate = None if gate is None else channels_last(gate)
    scale = None if scale is None else scale.contiguous()
    mask = None if mask is None else mask.contiguous()

    dtype = initial.dtype if length == 1 else torch.promote_types(x.dtype, torch.float32)
    block_t = 1 if length == 1 else FLOAT64_BLOCK_T if dtype == torch.float64 else BLOCK_T
    num_tiles = triton.cdiv(length, block_t)
    block_d, num_segments = _partition(x, num_tiles)
    segment_tiles = triton.cdiv(num_tiles, num_segments)
    num_segments = triton.cdiv(num_tiles, segment_tiles)
    totals = final
    if num_segments > 1 or dtype != initial.dtype:
        totals = initial.new_empty(batch_size, num_segments, hidden_size, dtype=dtype)
    # An argument that its constant switches off is never read.
    arguments = [tensor if tensor is not None else x for tensor in (gate, scale, mask, runs)]
    for is_totals_pass in (True, False) if num_segments > 1 else (False,):
        running_sum_kernel[batch_size * triton.cdiv(hidden_size, block_d), num_segments](
            x,
            *arguments,
            initial,
            x if initial_run is None else initial_run,
            totals,
            y,
            final,
            length,
            hidden_size,
            segment_tiles,
            num_segments,
            *x.stride()[:2],
            *arguments[0].stride()[:2],
            0 if scale is None or scale.shape[0] == 1 else length,
            *y.stride()[:2],
            RELU=relu,
            HAS_GATE=gate is not None,
            HAS_SCALE=scale is not None,
            HAS_MASK=mask is not None,
            HAS_RUNS=runs is not None,
            REVERSE=reverse,
            TOTALS=is_totals_pass,
            SEGMENTS=triton.next_power_of_2(num_segments),
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            NUM_STAGES=NUM_STAGES,
        )
    return y, final


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _partition(x: torch.Tensor, num_tiles: int) -> tuple[int, int]:
    """The channels of a stripe, and the number of segments, so that at least half of the processors have a program."""
    batch_size, _, hidden_size = x.shape
    widest = max(min(BLOCK_BYTES // x.element_size(), triton.next_power_of_2(hidden_size)), MIN_BLOCK_D)
    enough = num_processors(x.device) // 2
    for block_d in (widest, max(widest // 2, MIN_BLOCK_D)):
        if batch_size * triton.cdiv(hidden_size, block_d) >= enough:
            return block_d, 1
    programs = batch_size * triton.cdiv(hidden_size, widest)
    return widest, max(1, min(triton.cdiv(4 * enough, programs), num_tiles // SEGMENT_TILES))


def num_processors(device: torch.device) -> int:
    """The multiprocessors of a GPU; 1 in the interpreter, which runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
