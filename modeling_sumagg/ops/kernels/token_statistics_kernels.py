"""Token statistics as Triton kernels, causal and bidirectional, forward and backward.

The sequence is cut into tiles of tokens that are worked on at the same time. What a tile must know of the ones
before it, the running sums at its border, comes from three steps: the sums of each tile alone, a running sum over the
tiles, which are few, and the tile itself on top of that. The causal operator takes these steps for Σ w², for Σ Π w² with
Σ Π, and in backward for the adjoints of the two; the bidirectional operator has totals in place of running sums.
The sums at the borders of the tiles are what is kept for backward besides the inputs.

Letters as in `token_statistics`: `w` `[B, T, K, p]`, `share` Π. `F` is the number of sums, packed as Σ w² `[K, p]`,
Σ Π w² `[K, p]`, Σ Π `[K]`.
"""

import torch

from .running_sum_kernels import channels_last, convert, on_its_device, running_sum, sum_rows


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"The kernels need Triton, which cannot be imported ({error}). Install `triton`.") from error


MIN_BLOCK_P = 16  # channels, as a factor of a matrix product


@triton.jit
def lay_out_tile(tile, T, mask_ptr, runs_ptr, HAS_MASK: tl.constexpr, HAS_RUNS: tl.constexpr, BLOCK_T: tl.constexpr):
    """
    The tokens of a tile `[C]`, which of them are in the sequence, and which are real; the tokens `[C, C]` that a sum up
    to each token adds, and those that a sum from each token on adds; the tokens that the sums before the tile go on to,
    and those that the sums after it hold; the tokens of the tile's last run, and of its first.
    """
    row = tl.arange(0, BLOCK_T)
    token = tile.to(tl.int64) * BLOCK_T + row
    in_sequence = token < T
    real = in_sequence
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + token, mask=in_sequence, other=0) != 0)
    prefix = row[:, None] >= row[None, :]
    suffix = row[:, None] <= row[None, :]
    goes_on = row >= 0
    is_held = goes_on
    in_last = goes_on
    in_first = goes_on
    if HAS_RUNS:
        runs = tl.load(runs_ptr + tl.minimum(token, T - 1))
        same = runs[:, None] == runs[None, :]
        prefix = prefix & same
        suffix = suffix & same
        start = tile.to(tl.int64) * BLOCK_T
        goes_on = runs == tl.load(runs_ptr + tl.maximum(start - 1, 0))
        is_held = runs == tl.load(runs_ptr + tl.minimum(start + BLOCK_T, T - 1))
        in_last = runs == tl.max(runs, 0)
        in_first = runs == tl.min(runs, 0)
    return token, in_sequence, real, prefix, suffix, goes_on, is_held, in_last, in_first


@triton.jit
def load_rows(ptr, token, stride, channel, P, rows, dtype):
    """The rows `token` `[C]` of one head as `[C, n]`, zero but in `rows`."""
    mask = rows[:, None] & (channel < P)[None, :]
    return tl.load(ptr + token[:, None] * stride + channel[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def sum_tile(x, outer_ptr, channel, P, terms, continued, CAUSAL: tl.constexpr):
    """
    The running sums of `x` `[C, n]` with `outer` `[n]`, the sum beyond the tile; if not `CAUSAL` that is the total, for
    all.
    """
    outer = tl.load(outer_ptr + channel, mask=channel < P, other=0.0)
    sums = tl.where(continued[:, None], outer[None, :], 0.0)
    if CAUSAL:
        sums = sum_rows(terms, x, sums)
    return sums


@triton.jit
def sum_column(x, outer_ptr, terms, continued, CAUSAL: tl.constexpr):
    """`sum_tile` of a vector `[C]`."""
    sums = tl.where(continued, tl.load(outer_ptr), 0.0)
    if CAUSAL:
        sums += tl.sum(tl.where(terms, x[None, :], 0.0), 1)
    return sums


@triton.jit
def constant(value: tl.constexpr, dtype: tl.constexpr):
    # In an expression a number would be rounded to float32 first.
    return tl.full([], value, dtype)


@triton.jit
def take_column(x, column, index):
    """The column `index` of `x` `[C, K]`."""
    return tl.sum(tl.where((column == index)[None, :], x, 0.0), 1)


@triton.jit
def second_moment_totals_kernel(
    w_ptr,
    mask_ptr,
    runs_ptr,
    sums_ptr,  # [B, tiles, F], written
    T,
    P,
    w_stride_b,
    w_stride_t,
    w_stride_k,
    sums_stride_b,
    sums_stride_c,
    HAS_MASK: tl.constexpr,
    HAS_RUNS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Σ w² over the last run of each tile."""
    tiles = tl.cdiv(T, BLOCK_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK_P)
    token, _, real, _, _, _, _, in_last, _ = lay_out_tile(
        tile, T, mask_ptr + batch * T, runs_ptr + batch * T, HAS_MASK, HAS_RUNS, BLOCK_T
    )
    w_ptr += batch * w_stride_b + head * w_stride_k
    w = load_rows(w_ptr, token, w_stride_t, channel, P, real & in_last, sums_ptr.dtype.element_ty)
    sums_ptr += batch * sums_stride_b + tile.to(tl.int64) * sums_stride_c + head * P
    tl.store(sums_ptr + channel, tl.sum(w * w, 0), mask=channel < P)


@triton.jit
def membership_kernel(
    w_ptr,
    temperature_ptr,
    bias_ptr,
    mask_ptr,
    runs_ptr,
    before_ptr,  # [B, tiles, F], the sums before each tile; of them only Σ w² is read
    sums_ptr,  # [B, tiles, F], written but for Σ w²
    share_ptr,  # [B, T, K], written
    score_ptr,  # [B, T, K], written
    T,
    K,
    P,
    w_stride_b,
    w_stride_t,
    w_stride_k,
    bias_stride_b,
    bias_stride_t,
    bias_stride_k,
    before_stride_b,
    before_stride_c,
    sums_stride_b,
    sums_stride_c,
    MIN_SECOND_MOMENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RUNS: tl.constexpr,
    TOTALS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The logits before the temperature, Π, and with `TOTALS` Σ Π w² and Σ Π over the last run of each tile."""
    tiles = tl.cdiv(T, BLOCK_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    heads = tl.arange(0, BLOCK_K)
    channel = tl.arange(0, BLOCK_P)
    dtype = before_ptr.dtype.element_ty
    token, in_sequence, real, prefix, _, goes_on, _, in_last, _ = lay_out_tile(
        tile, T, mask_ptr + batch * T, runs_ptr + batch * T, HAS_MASK, HAS_RUNS, BLOCK_T
    )
    w_ptr += batch * w_stride_b
    before_ptr += batch * before_stride_b + tile.to(tl.int64) * before_stride_c
    sums_ptr += batch * sums_stride_b + tile.to(tl.int64) * sums_stride_c
    is_head = heads[None, :] < K
    in_table = in_sequence[:, None] & is_head

    score = tl.zeros([BLOCK_T, BLOCK_K], dtype)
    for head in range(0, K):
        w = load_rows(w_ptr + head * w_stride_k, token, w_stride_t, channel, P, real, dtype)
        w2 = w * w
        second = sum_tile(w2, before_ptr + head * P, channel, P, prefix, goes_on, CAUSAL)
        ratio = w2 / tl.maximum(second, constant(MIN_SECOND_MOMENT, dtype))
        score = tl.where((heads == head)[None, :], tl.sum(ratio, 1)[:, None], score)
    if HAS_BIAS:
        offsets = batch * bias_stride_b + token[:, None] * bias_stride_t + heads[None, :] * bias_stride_k
        score += P * tl.load(bias_ptr + offsets, mask=real[:, None] & is_head, other=0.0)

    temperature = tl.load(temperature_ptr + heads, mask=heads < K, other=0.0)
    logits = tl.where(is_head, score * temperature[None, :], float("-inf"))
    share = tl.exp(logits - tl.max(logits, 1)[:, None])
    share = tl.where(real[:, None], share / tl.sum(share, 1)[:, None], 0.0)
    offsets = (batch * T + token[:, None]) * K + heads[None, :]
    tl.store(share_ptr + offsets, share, mask=in_table)
    tl.store(score_ptr + offsets, score, mask=in_table)

    if TOTALS:
        held = tl.where(in_last[:, None], share, 0.0)
        tl.store(sums_ptr + 2 * K * P + heads, tl.sum(held, 0), mask=heads < K)
        for head in range(0, K):
            w = load_rows(w_ptr + head * w_stride_k, token, w_stride_t, channel, P, real, dtype)
            total = tl.sum(w * w * take_column(held, heads, head)[:, None], 0)
            tl.store(sums_ptr + (K + head) * P + channel, total, mask=channel < P)


@triton.jit
def sum_memberships(
    w2, share, before_ptr, head, channel, K, P, prefix, goes_on, MIN_MEMBERSHIP: tl.constexpr, CAUSAL: tl.constexpr
):
    """Σ Π w² `[C, n]`, and Σ Π plus its floor `[C]`."""
    weighted = sum_tile(w2 * share[:, None], before_ptr + (K + head) * P, channel, P, prefix, goes_on, CAUSAL)
    total = sum_column(share, before_ptr + 2 * K * P + head, prefix, goes_on, CAUSAL)
    return weighted, total + constant(MIN_MEMBERSHIP, total.dtype)


@triton.jit
def output_kernel(
    w_ptr,
    mask_ptr,
    runs_ptr,
    keep_ptr,  # [B, T or 1, K, p]
    before_ptr,  # [B, tiles, F]
    share_ptr,  # [B, T, K]
    out_ptr,  # [B, T, K, p], written
    T,
    K,
    P,
    w_stride_b,
    w_stride_t,
    w_stride_k,
    keep_stride_b,
    keep_stride_t,
    before_stride_b,
    before_stride_c,
    MIN_MEMBERSHIP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RUNS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """-w Π / (1 + m), as -w Π total / (weighted + total)."""
    tiles = tl.cdiv(T, BLOCK_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK_P)
    dtype = before_ptr.dtype.element_ty
    token, in_sequence, real, prefix, _, goes_on, _, _, _ = lay_out_tile(
        tile, T, mask_ptr + batch * T, runs_ptr + batch * T, HAS_MASK, HAS_RUNS, BLOCK_T
    )
    before_ptr += batch * before_stride_b + tile.to(tl.int64) * before_stride_c
    w_ptr += batch * w_stride_b + head * w_stride_k
    w = load_rows(w_ptr, token, w_stride_t, channel, P, real, dtype)
    share = tl.load(share_ptr + (batch * T + token) * K + head, mask=real, other=0.0)
    weighted, total = sum_memberships(
        w * w, share, before_ptr, head, channel, K, P, prefix, goes_on, MIN_MEMBERSHIP, CAUSAL
    )
    out = -w * (share * total)[:, None] / (weighted + total[:, None])
    if HAS_KEEP:
        keep_ptr += batch * keep_stride_b + head * P
        out *= load_rows(keep_ptr, token, keep_stride_t, channel, P, real, dtype) * constant(KEEP_SCALE, dtype)
    offsets = ((batch * T + token[:, None]) * K + head) * P + channel[None, :]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=in_sequence[:, None] & (channel < P)[None, :])


@triton.jit
def differentiate_output(
    w,
    share,
    weighted,
    total,
    grad_ptr,
    keep_ptr,
    token,
    channel,
    P,
    grad_stride_t,
    keep_stride_t,
    real,
    KEEP_SCALE: tl.constexpr,
    HAS_KEEP: tl.constexpr,
):
    """
    With gain = Π total and divisor = weighted + total, of out = -w gain / divisor: its gradient over the divisor, the
    gradient of the gain, and those of Σ Π w² and of Σ Π but through the gain's Π.
    """
    divisor = weighted + total[:, None]
    grad = load_rows(grad_ptr, token, grad_stride_t, channel, P, real, w.dtype) / divisor
    if HAS_KEEP:
        grad *= load_rows(keep_ptr, token, keep_stride_t, channel, P, real, w.dtype) * constant(KEEP_SCALE, w.dtype)
    grad_divisor = grad * w
    grad_gain = -tl.sum(grad_divisor, 1)
    grad_divisor /= divisor
    grad_weighted = grad_divisor * (share * total)[:, None]
    grad_total = -share * tl.sum(weighted * grad_divisor, 1)
    return grad, grad_gain, grad_weighted, grad_total


@triton.jit
def weighted_grad_totals_kernel(
    w_ptr,
    mask_ptr,
    runs_ptr,
    keep_ptr,
    before_ptr,  # [B, tiles, F]
    share_ptr,  # [B, T, K]
    grad_ptr,  # [B, T, K, p]
    totals_ptr,  # [B, tiles, K (p + 1)], written
    T,
    K,
    P,
    w_stride_b,
    w_stride_t,
    w_stride_k,
    grad_stride_b,
    grad_stride_t,
    grad_stride_k,
    keep_stride_b,
    keep_stride_t,
    before_stride_b,
    before_stride_c,
    totals_stride_b,
    totals_stride_c,
    MIN_MEMBERSHIP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RUNS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gradients of Σ Π w² and Σ Π at each token, summed over the first run of each tile."""
    tiles = tl.cdiv(T, BLOCK_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK_P)
    dtype = before_ptr.dtype.element_ty
    token, _, real, prefix, _, goes_on, _, _, in_first = lay_out_tile(
        tile, T, mask_ptr + batch * T, runs_ptr + batch * T, HAS_MASK, HAS_RUNS, BLOCK_T
    )
    before_ptr += batch * before_stride_b + tile.to(tl.int64) * before_stride_c
    totals_ptr += batch * totals_stride_b + tile.to(tl.int64) * totals_stride_c
    w = load_rows(w_ptr + batch * w_stride_b + head * w_stride_k, token, w_stride_t, channel, P, real, dtype)
    share = tl.load(share_ptr + (batch * T + token) * K + head, mask=real, other=0.0)
    weighted, total = sum_memberships(
        w * w, share, before_ptr, head, channel, K, P, prefix, goes_on, MIN_MEMBERSHIP, CAUSAL
    )
    grad_ptr += batch * grad_stride_b + head * grad_stride_k
    keep_ptr += batch * keep_stride_b + head * P
    _, _, grad_weighted, grad_total = differentiate_output(
        w, share, weighted, total, grad_ptr, keep_ptr, token, channel, P, grad_stride_t, keep_stride_t, real, KEEP_SCALE,
        HAS_KEEP,
    )  # fmt: skip
    grad_weighted = tl.sum(tl.where(in_first[:, None], grad_weighted, 0.0), 0)
    tl.store(totals_ptr + head * P + channel, grad_weighted, mask=channel < P)
    tl.store(totals_ptr + K * P + head, tl.sum(tl.where(in_first, grad_total, 0.0), 0))


@triton.jit
def logit_grad_kernel(
    w_ptr,
    temperature_ptr,
    mask_ptr,
    runs_ptr,
    keep_ptr,
    before_ptr,  # [B, tiles, F]
    share_ptr,  # [B, T, K]
    grad_ptr,  # [B, T, K, p]
    after_ptr,  # [B, tiles, K (p + 1)], the gradients of Σ Π w² and Σ Π summed from the end to after each tile
    logit_grad_ptr,  # [B, T, K], written
    totals_ptr,  # [B, tiles, K p], written
    T,
    K,
    P,
    w_stride_b,
    w_stride_t,
    w_stride_k,
    grad_stride_b,
    grad_stride_t,
    grad_stride_k,
    keep_stride_b,
    keep_stride_t,
    before_stride_b,
    before_stride_c,
    after_stride_b,
    after_stride_c,
    totals_stride_b,
    totals_stride_c,
    MIN_SECOND_MOMENT: tl.constexpr,
    MIN_MEMBERSHIP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RUNS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gradients of the logits, and those of Σ w² at each token, summed over the first run of each tile."""
    tiles = tl.cdiv(T, BLOCK_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    heads = tl.arange(0, BLOCK_K)
    channel = tl.arange(0, BLOCK_P)
    dtype = before_ptr.dtype.element_ty
    token, in_sequence, real, prefix, suffix, goes_on, is_held, _, in_first = lay_out_tile(
        tile, T, mask_ptr + batch * T, runs_ptr + batch * T, HAS_MASK, HAS_RUNS, BLOCK_T
    )
    w_ptr += batch * w_stride_b
    grad_ptr += batch * grad_stride_b
    keep_ptr += batch * keep_stride_b
    before_ptr += batch * before_stride_b + tile.to(tl.int64) * before_stride_c
    after_ptr += batch * after_stride_b + tile.to(tl.int64) * after_stride_c
    totals_ptr += batch * totals_stride_b + tile.to(tl.int64) * totals_stride_c
    offsets = (batch * T + token[:, None]) * K + heads[None, :]
    shares = tl.load(share_ptr + offsets, mask=real[:, None] & (heads < K)[None, :], other=0.0)

    grad_shares = tl.zeros([BLOCK_T, BLOCK_K], dtype)
    for head in range(0, K):
        w = load_rows(w_ptr + head * w_stride_k, token, w_stride_t, channel, P, real, dtype)
        w2 = w * w
        share = take_column(shares, heads, head)
        weighted, total = sum_memberships(
            w2, share, before_ptr, head, channel, K, P, prefix, goes_on, MIN_MEMBERSHIP, CAUSAL
        )
        grad_parts = differentiate_output(
            w, share, weighted, total, grad_ptr + head * grad_stride_k, keep_ptr + head * P, token, channel, P,
            grad_stride_t, keep_stride_t, real, KEEP_SCALE, HAS_KEEP,
        )  # fmt: skip
        grad_weighted = sum_tile(grad_parts[2], after_ptr + head * P, channel, P, suffix, is_held, CAUSAL)
        grad_share = tl.sum(w2 * grad_weighted, 1) + total * grad_parts[1]
        grad_share += sum_column(grad_parts[3], after_ptr + K * P + head, suffix, is_held, CAUSAL)
        grad_shares = tl.where((heads == head)[None, :], grad_share[:, None], grad_shares)

    logit_grads = shares * (grad_shares - tl.sum(shares * grad_shares, 1)[:, None])
    tl.store(logit_grad_ptr + offsets, logit_grads, mask=in_sequence[:, None] & (heads < K)[None, :])

    for head in range(0, K):
        w = load_rows(w_ptr + head * w_stride_k, token, w_stride_t, channel, P, real, dtype)
        grad_score = take_column(logit_grads, heads, head) * tl.load(temperature_ptr + head)
        w2 = w * w
        second = sum_tile(w2, before_ptr + head * P, channel, P, prefix, goes_on, CAUSAL)
        grad_second = differentiate_ratio(w2, second, grad_score, MIN_SECOND_MOMENT)[1]
        total = tl.sum(tl.where(in_first[:, None], grad_second, 0.0), 0)
        tl.store(totals_ptr + head * P + channel, total, mask=channel < P)


@triton.jit
def differentiate_ratio(w2, second, grad_score, MIN_SECOND_MOMENT: tl.constexpr):
    """The gradients of Σ_c w² / max(Σ w², floor) by w², with the sum held fixed, and by the sum."""
    floor = constant(MIN_SECOND_MOMENT, second.dtype)
    floored = tl.maximum(second, floor)
    grad_w2 = grad_score[:, None] / floored
    return grad_w2, tl.where(second > floor, -(w2 / floored) * grad_w2, 0.0)


@triton.jit
def input_grad_kernel(
    w_ptr,
    temperature_ptr,
    mask_ptr,
    runs_ptr,
    keep_ptr,
    before_ptr,  # [B, tiles, F]
    share_ptr,  # [B, T, K]
    grad_ptr,  # [B, T, K, p]
    after_ptr,  # [B, tiles, K (p + 1)]
    logit_grad_ptr,  # [B, T, K]
    after_second_ptr,  # [B, tiles, K p], the gradients of Σ w² summed from the end to after each tile
    grad_w_ptr,  # [B, T, K, p], written
    T,
    K,
    P,
    w_stride_b,
    w_stride_t,
    w_stride_k,
    grad_stride_b,
    grad_stride_t,
    grad_stride_k,
    keep_stride_b,
    keep_stride_t,
    before_stride_b,
    before_stride_c,
    after_stride_b,
    after_stride_c,
    after_second_stride_b,
    after_second_stride_c,
    MIN_SECOND_MOMENT: tl.constexpr,
    MIN_MEMBERSHIP: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_RUNS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gradient of w."""
    tiles = tl.cdiv(T, BLOCK_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK_P)
    dtype = before_ptr.dtype.element_ty
    token, in_sequence, real, prefix, suffix, goes_on, is_held, _, _ = lay_out_tile(
        tile, T, mask_ptr + batch * T, runs_ptr + batch * T, HAS_MASK, HAS_RUNS, BLOCK_T
    )
    before_ptr += batch * before_stride_b + tile.to(tl.int64) * before_stride_c
    after_ptr += batch * after_stride_b + tile.to(tl.int64) * after_stride_c
    after_second_ptr += batch * after_second_stride_b + tile.to(tl.int64) * after_second_stride_c
    w = load_rows(w_ptr + batch * w_stride_b + head * w_stride_k, token, w_stride_t, channel, P, real, dtype)
    w2 = w * w

    second = sum_tile(w2, before_ptr + head * P, channel, P, prefix, goes_on, CAUSAL)
    logit_grad = tl.load(logit_grad_ptr + (batch * T + token) * K + head, mask=real, other=0.0)
    grad_score = logit_grad * tl.load(temperature_ptr + head)
    grad_w2, grad_second = differentiate_ratio(w2, second, grad_score, MIN_SECOND_MOMENT)
    grad_w2 += sum_tile(grad_second, after_second_ptr + head * P, channel, P, suffix, is_held, CAUSAL)

    share = tl.load(share_ptr + (batch * T + token) * K + head, mask=real, other=0.0)
    weighted, total = sum_memberships(
        w2, share, before_ptr, head, channel, K, P, prefix, goes_on, MIN_MEMBERSHIP, CAUSAL
    )
    grad_ptr += batch * grad_stride_b + head * grad_stride_k
    keep_ptr += batch * keep_stride_b + head * P
    grad, _, grad_weighted, _ = differentiate_output(
        w, share, weighted, total, grad_ptr, keep_ptr, token, channel, P, grad_stride_t, keep_stride_t, real, KEEP_SCALE,
        HAS_KEEP,
    )  # fmt: skip
    grad_weighted = sum_tile(grad_weighted, after_ptr + head * P, channel, P, suffix, is_held, CAUSAL)
    grad_w2 += grad_weighted * share[:, None]

    grad_w = 2 * w * grad_w2 - grad * (share * total)[:, None]
    offsets = ((batch * T + token[:, None]) * K + head) * P + channel[None, :]
    in_tile = in_sequence[:, None] & (channel < P)[None, :]
    tl.store(grad_w_ptr + offsets, grad_w.to(grad_w_ptr.dtype.element_ty), mask=in_tile)


@triton.jit
def step_kernel(
    w_ptr,  # [B, K, p]
    temperature_ptr,
    bias_ptr,  # [B, K]
    mask_ptr,  # [B]
    second_ptr,  # [B, K, p]
    weighted_ptr,  # [B, K, p]
    total_ptr,  # [B, K]
    out_ptr,  # [B, K, p], written
    new_second_ptr,
    new_weighted_ptr,
    new_total_ptr,
    K,
    P,
    w_stride_b,
    w_stride_k,
    bias_stride_b,
    bias_stride_k,
    MIN_SECOND_MOMENT: tl.constexpr,
    MIN_MEMBERSHIP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The causal operator for one token: the output and the sums after it."""
    batch = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK_K)
    channel = tl.arange(0, BLOCK_P)
    dtype = new_total_ptr.dtype.element_ty
    is_head = head < K
    in_tile = is_head[:, None] & (channel < P)[None, :]
    is_real = True
    if HAS_MASK:
        is_real = tl.load(mask_ptr + batch) != 0
    offsets = (batch * K + head[:, None]) * P + channel[None, :]

    rows = w_ptr + batch * w_stride_b + head[:, None] * w_stride_k
    w = convert(tl.load(rows + channel[None, :], mask=in_tile & is_real, other=0.0), dtype)
    w2 = w * w
    second = w2
    if HAS_STATE:
        second += tl.load(second_ptr + offsets, mask=in_tile, other=0.0)
    score = tl.sum(w2 / tl.maximum(second, constant(MIN_SECOND_MOMENT, dtype)), 1)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + batch * bias_stride_b + head * bias_stride_k, mask=is_head & is_real, other=0.0)
        score += P * convert(bias, dtype)
    temperature = tl.load(temperature_ptr + head, mask=is_head, other=0.0)
    logits = tl.where(is_head, score * temperature, float("-inf"))
    share = tl.exp(logits - tl.max(logits, 0))
    share = tl.where(is_real, share / tl.sum(share, 0), 0.0)
    weighted = share[:, None] * w2
    total = share
    if HAS_STATE:
        weighted += tl.load(weighted_ptr + offsets, mask=in_tile, other=0.0)
        total += tl.load(total_ptr + batch * K + head, mask=is_head, other=0.0)
    floored = total + constant(MIN_MEMBERSHIP, dtype)
    out = -w * (share * floored)[:, None] / (weighted + floored[:, None])
    tl.store(out_ptr + offsets, convert(out, out_ptr.dtype.element_ty), mask=in_tile)
    tl.store(new_second_ptr + offsets, second, mask=in_tile)
    tl.store(new_weighted_ptr + offsets, weighted, mask=in_tile)
    tl.store(new_total_ptr + batch * K + head, total, mask=is_head)


class _Launcher:
    """The arguments of the kernels by their names, each of which takes the ones it has."""

    def __init__(self, w, temperature, mask, runs, keep, dropout_p, floors, block_t, is_causal):
        self.shape = batch_size, length, num_heads, head_dim = w.shape
        self.block_t = block_t
        self.num_tiles = triton.cdiv(length, block_t)
        self.arguments = {
            "T": length,
            "K": num_heads,
            "P": head_dim,
            "KEEP_SCALE": 1 / (1 - dropout_p),
            "MIN_SECOND_MOMENT": floors[0],
            "MIN_MEMBERSHIP": floors[1],
            "CAUSAL": is_causal,
            "HAS_MASK": mask is not None,
            "HAS_RUNS": runs is not None,
            "HAS_KEEP": keep is not None,
            "BLOCK_T": block_t,
            "BLOCK_K": triton.next_power_of_2(num_heads),
            "BLOCK_P": max(triton.next_power_of_2(head_dim), MIN_BLOCK_P),
        }
        # An argument that its constant switches off is never read.
        self.set(
            w=channels_last(w),
            temperature=temperature.contiguous(),
            mask=w if mask is None else mask.contiguous(),
            runs=w if runs is None else runs.contiguous(),
            keep=w if keep is None else keep.contiguous().expand(w.shape),
        )

    def set(self, **tensors):
        for name, tensor in tensors.items():
            self.arguments[f"{name}_ptr"] = tensor
            strides = (*tensor.stride(), 0, 0)[:3]
            for axis, stride in zip("btk", strides, strict=True):
                self.arguments[f"{name}_stride_{axis}"] = stride
            self.arguments[f"{name}_stride_c"] = strides[1]

    def run(self, kernel, *, per_head=True, **constants):
        batch_size, _, num_heads, _ = self.shape
        grid = (batch_size * self.num_tiles, num_heads if per_head else 1)
        arguments = {**self.arguments, **constants}
        # What these hold at a time does not fit into the registers of fewer threads.
        num_warps = 8 if kernel in (logit_grad_kernel, input_grad_kernel) else 4
        kernel[grid](**{name: arguments[name] for name in kernel.arg_names}, num_warps=num_warps)

    def find_memberships(self, before, sums, position_bias=None):
        """Π and the logits before the temperature `[B, T, K]`, and in `sums`, if given, the sums of the tiles."""
        share = before.new_empty(self.shape[:3])
        score = torch.empty_like(share)
        bias = share if position_bias is None else position_bias
        self.set(before=before, sums=before if sums is None else sums, bias=bias, share=share, score=score)
        self.run(membership_kernel, per_head=False, HAS_BIAS=position_bias is not None, TOTALS=sums is not None)
        return share, score

    def sum_over_tiles(self, totals, initial, runs, reverse=False):
        """
        Make of the sums of each tile `[B, tiles, n]` in place the running sums with `initial` `[B, n]`, added up in the
        dtype of `initial`, and return the last of them in it.

        What a tile hands on is of its last run, in reverse of its first. `runs` `[B, T]` are those of the tokens.
        """
        initial_run, size = None, self.block_t
        if runs is not None:
            initial_run = runs[:, -1 if reverse else 0]
            runs = runs[:, ::size] if reverse else torch.cat([runs[:, size - 1 : -1 : size], runs[:, -1:]], dim=1)
        wide = totals.to(initial.dtype)
        wide, final = running_sum(wide, None, None, initial, None, runs, initial_run=initial_run, reverse=reverse)
        totals.copy_(wide)
        return final


@on_its_device
def causal_forward(w, temperature, position_bias, initial, mask, runs, keep, dropout_p, floors, block_t):
    """
    The causal operator.

    Args:
        w (`torch.Tensor` of shape `[B, T, K, p]`, any floating dtype, no dimension 0)
        temperature (`torch.Tensor` of shape `[K]`, float32 or float64): its dtype is that of the statistics.
        position_bias (`torch.Tensor` of shape `[B, T, K]` or `None`)
        initial (`torch.Tensor` of shape `[B, F]`, float32 or float64): the packed sums before the first token.
        mask (`torch.Tensor` of shape `[B, T]`, bool, or `None`)
        runs (`torch.Tensor` of shape `[B, T]`, integer, never decreasing from 0, or `None`)
        keep (`torch.Tensor` of shape `[B, T, K, p]`, bool, or `None`): what dropout keeps.
        dropout_p (`float`)
        floors (`tuple[float, float]`): of Σ w² and of Σ Π.
        block_t (`int`): tokens of a tile, a power of 2, at least 16.

    Returns:
        `tuple`: the output `[B, T, K, p]`, the packed sums before every tile and after the last `[B, tiles + 1, F]`, and
        those after the last in the dtype of `initial` `[B, F]`.
    """
    launcher = _Launcher(w, temperature, mask, runs, keep, dropout_p, floors, block_t, is_causal=True)
    _, _, num_heads, head_dim = w.shape
    width = num_heads * head_dim
    sums = temperature.new_empty(w.shape[0], launcher.num_tiles + 1, initial.shape[1])
    sums[:, 0] = initial
    totals = sums[:, 1:]
    launcher.set(sums=totals)
    launcher.run(second_moment_totals_kernel)
    final_second = launcher.sum_over_tiles(totals[..., :width], initial[:, :width], runs)
    launcher.find_memberships(sums, totals, position_bias)
    final_weighted = launcher.sum_over_tiles(totals[..., width:], initial[:, width:], runs)
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    launcher.set(out=out)
    launcher.run(output_kernel)
    return out, sums, torch.cat([final_second, final_weighted], 1)


@on_its_device
def causal_backward(
    w, temperature, position_bias, sums, mask, runs, keep, dropout_p, floors, block_t, grad_out, grad_final
):
    """
    The gradients of `w`, `temperature`, `position_bias` (even of none) and `initial` of [`causal_forward`], which gave
    `sums`, from those of the output and of the packed sums after the sequence `[B, F]`.
    """
    launcher = _Launcher(w, temperature, mask, runs, keep, dropout_p, floors, block_t, is_causal=True)
    batch_size, _, num_heads, head_dim = w.shape
    width = num_heads * head_dim
    _, score = launcher.find_memberships(sums, None, position_bias)

    after = sums.new_empty(batch_size, launcher.num_tiles + 1, grad_final.shape[1])
    after[:, -1] = grad_final
    after_second, after_weighted = after[..., :width], after[..., width:]
    launcher.set(grad=channels_last(grad_out), totals=after_weighted[:, :-1])
    launcher.run(weighted_grad_totals_kernel)
    grad_weighted = launcher.sum_over_tiles(after_weighted[:, :-1], grad_final[:, width:], runs, reverse=True)
    logit_grad, grad_w = torch.empty_like(score), torch.empty_like(w, memory_format=torch.contiguous_format)
    launcher.set(after=after_weighted[:, 1:], logit_grad=logit_grad, totals=after_second[:, :-1])
    launcher.run(logit_grad_kernel, per_head=False)
    grad_second = launcher.sum_over_tiles(after_second[:, :-1], grad_final[:, :width], runs, reverse=True)
    launcher.set(after_second=after_second[:, 1:], grad_w=grad_w)
    launcher.run(input_grad_kernel)
    # The bias is added to each of the p terms of a score.
    grad_bias = logit_grad * (temperature * head_dim)
    return grad_w, (logit_grad * score).sum((0, 1)), grad_bias, torch.cat([grad_second, grad_weighted], 1)


def _bidirectional_totals(launcher, temperature, num_sums):
    """The packed sums over the sequence, given to every tile, `[B, tiles, F]`; and Π and the scores."""
    batch_size, _, num_heads, head_dim = launcher.shape
    width = num_heads * head_dim
    totals = temperature.new_empty(batch_size, launcher.num_tiles, num_sums)
    sums = temperature.new_empty(batch_size, 1, num_sums)
    before = sums.expand_as(totals)
    launcher.set(sums=totals)
    launcher.run(second_moment_totals_kernel)
    sums[..., :width] = totals[..., :width].sum(1, keepdim=True)
    share, score = launcher.find_memberships(before, totals)
    sums[..., width:] = totals[..., width:].sum(1, keepdim=True)
    return share, score


@on_its_device
def bidirectional_forward(w, temperature, mask, keep, dropout_p, floors, block_t):
    """The bidirectional operator; the arguments are those of [`causal_forward`], with `keep` `[B, 1, K, p]`."""
    launcher = _Launcher(w, temperature, mask, None, keep, dropout_p, floors, block_t, is_causal=False)
    _bidirectional_totals(launcher, temperature, w.shape[2] * (2 * w.shape[3] + 1))
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    launcher.set(out=out)
    launcher.run(output_kernel)
    return out


@on_its_device
def bidirectional_backward(w, temperature, mask, keep, dropout_p, floors, block_t, grad_out):
    """The gradients of `w` and `temperature` of [`bidirectional_forward`]."""
    launcher = _Launcher(w, temperature, mask, None, keep, dropout_p, floors, block_t, is_causal=False)
    batch_size, _, num_heads, head_dim = w.shape
    width = num_heads * head_dim
    _, score = _bidirectional_totals(launcher, temperature, 2 * width + num_heads)

    totals = score.new_empty(batch_size, launcher.num_tiles, width + num_heads)
    launcher.set(grad=channels_last(grad_out), totals=totals)
    launcher.run(weighted_grad_totals_kernel)
    after = totals.sum(1, keepdim=True).expand_as(totals)
    logit_grad, grad_w = torch.empty_like(score), torch.empty_like(w, memory_format=torch.contiguous_format)
    totals = score.new_empty(batch_size, launcher.num_tiles, width)
    launcher.set(after=after, logit_grad=logit_grad, totals=totals)
    launcher.run(logit_grad_kernel, per_head=False)
    launcher.set(after_second=totals.sum(1, keepdim=True).expand_as(totals), grad_w=grad_w)
    launcher.run(input_grad_kernel)
    return grad_w, (logit_grad * score).sum((0, 1))


@on_its_device
def causal_step(w, temperature, position_bias, state, mask, floors):
    """
    The causal operator for one token, without gradients.

    Args:
        w (`torch.Tensor` of shape `[B, K, p]`, any floating dtype, no dimension 0)
        temperature (`torch.Tensor` of shape `[K]`, float32 or float64): its dtype is that of the statistics.
        position_bias (`torch.Tensor` of shape `[K]` or `[B, K]`, or `None`)
        state (`tuple` of tensors of shape `[B, K, p]`, `[B, K, p]`, `[B, K]`, or `None`): the sums before the token.
        mask (`torch.Tensor` of shape `[B]`, bool, or `None`)
        floors (`tuple[float, float]`): of Σ w² and of Σ Π.

    Returns:
        `tuple`: the output `[B, K, p]`, and the three sums after the token.
    """
    batch_size, num_heads, head_dim = w.shape
    w = channels_last(w)
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    moments = [torch.empty_like(out, dtype=temperature.dtype) for _ in range(2)]
    new_state = (*moments, temperature.new_empty(batch_size, num_heads))
    old_state = new_state if state is None else [sums.to(temperature.dtype).contiguous() for sums in state]
    bias = w[..., 0] if position_bias is None else position_bias.expand(batch_size, num_heads)
    step_kernel[batch_size,](
        w,
        temperature.contiguous(),
        bias,
        w if mask is None else mask.contiguous(),
        *old_state,
        out,
        *new_state,
        num_heads,
        head_dim,
        *w.stride()[:2],
        *bias.stride(),
        *floors,
        HAS_BIAS=position_bias is not None,
        HAS_MASK=mask is not None,
        HAS_STATE=state is not None,
        BLOCK_K=triton.next_power_of_2(num_heads),
        BLOCK_P=triton.next_power_of_2(head_dim),
    )
    return out, new_state
