"""Token statistics as Triton kernels, causal and bidirectional, forward and backward.

The sequence is cut into tiles of tokens that are worked on at the same time. The sums at the borders of the tiles come from
three steps: the sums of each tile alone, a running sum over the tiles, which are few, and the tile itself on top of that. The
causal operator takes these steps for Σ w², for Σ Π w² with Σ Π, and in backward for the adjoints of the two; the bidirectional
operator has totals in place of running sums. The sums at the borders are all that is kept for backward besides the inputs.

Letters as in `token_statistics`: `w` `[B, T, K, p]`, `share` Π. F is the number of sums, K (2p + 1), packed as Σ w² `[K, p]`,
Σ Π w² `[K, p]`, Σ Π `[K]`. Of n tiles there are n + 1 borders: tile i lies between border i and border i + 1. All kernels have
the same constants, and one program for each tile of each row, or for each of its heads.
"""

import torch

from ..dispatch import register_kernel
from ..running_sum.running_sum_kernels import launch_running_sum
from ..triton_helpers import MIN_BLOCK, constant, contiguous, convert, given, on_its_device, sum_rows, tl, triton
from .token_statistics import causal_token_statistics, token_statistics
from .token_statistics_reference import MIN_MEMBERSHIP, MIN_SECOND_MOMENT, TokenStatisticsState, causal_step
from .token_statistics_torch import register_bidirectional_autograd, register_causal_autograd


TILE_SIZE = 64  # tokens of a tile, if a head's part of it fits into the registers


@triton.jit
def lay_out_tile(T, mask_ptr, ids_ptr, HAS_MASK: tl.constexpr, HAS_IDS: tl.constexpr, BLOCK_T: tl.constexpr):
    """
    The row and the tile of a program, and of the tokens `[C]` of the tile which are in the sequence, and which are real; the
    tokens `[C, C]` that a sum up to each token adds, and those that a sum from each token on adds; the tokens of the document
    before the tile, and of that after it; the tokens of the tile's last document, and of its first.
    """
    tiles = tl.cdiv(T, BLOCK_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = (tl.program_id(0) % tiles).to(tl.int64)
    row = tl.arange(0, BLOCK_T)
    token = tile * BLOCK_T + row
    in_sequence = token < T
    real = in_sequence
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + batch * T + token, mask=in_sequence, other=0) != 0)
    prefix = row[:, None] >= row[None, :]
    suffix = row[:, None] <= row[None, :]
    continues = row >= 0
    is_continued = continues
    in_last = continues
    in_first = continues
    if HAS_IDS:
        ids_ptr += batch * T
        ids = tl.load(ids_ptr + tl.minimum(token, T - 1))
        same = ids[:, None] == ids[None, :]
        prefix = prefix & same
        suffix = suffix & same
        continues = ids == tl.load(ids_ptr + tl.maximum(tile * BLOCK_T - 1, 0))
        is_continued = ids == tl.load(ids_ptr + tl.minimum((tile + 1) * BLOCK_T, T - 1))
        in_last = ids == tl.max(ids, 0)
        in_first = ids == tl.min(ids, 0)
    return batch, tile, token, in_sequence, real, prefix, suffix, continues, is_continued, in_last, in_first


@triton.jit
def at_border(ptr, batch, border, T, K, P, BLOCK_T: tl.constexpr):
    """The packed sums of `[B, tiles + 1, F]` at a border."""
    return ptr + (batch * (tl.cdiv(T, BLOCK_T) + 1) + border) * K * (2 * P + 1)


@triton.jit
def beyond_tile(ptr, batch, border, T, K, P, CAUSAL: tl.constexpr, BLOCK_T: tl.constexpr):
    """The same of what is beyond a tile: at a border if `CAUSAL`, else of the whole sequence, `[B, F]`."""
    return at_border(ptr, batch, border, T, K, P, BLOCK_T) if CAUSAL else ptr + batch * K * (2 * P + 1)


@triton.jit
def load_head(ptr, batch, token, head, channel, T, K, P, rows, dtype):
    """The rows `token` `[C]` of one head of `[B, T, K, p]`, as `[C, n]`, zero but in `rows`."""
    offsets = ((batch * T + token[:, None]) * K + head) * P + channel[None, :]
    return convert(tl.load(ptr + offsets, mask=rows[:, None] & (channel < P)[None, :], other=0.0), dtype)


@triton.jit
def load_kept(ptr, batch, token, head, channel, T, K, P, rows, dtype, SHARED: tl.constexpr, SCALE: tl.constexpr):
    """What dropout keeps of one head, as its factors; of `[B, 1, K, p]` where all tokens share it."""
    if SHARED:
        kept = load_head(ptr, batch, token * 0, head, channel, 1, K, P, rows, dtype)
    else:
        kept = load_head(ptr, batch, token, head, channel, T, K, P, rows, dtype)
    return kept * constant(SCALE, dtype)


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
def take_column(x, column, index):
    """The column `index` of `x` `[C, K]`."""
    return tl.sum(tl.where((column == index)[None, :], x, 0.0), 1)


@triton.jit
def sum_memberships(
    w2, share, before_ptr, head, channel, K, P, prefix, continues, MIN_MEMBERSHIP: tl.constexpr, CAUSAL: tl.constexpr
):
    """Σ Π w² `[C, n]`, and Σ Π plus its floor `[C]`."""
    weighted = sum_tile(w2 * share[:, None], before_ptr + (K + head) * P, channel, P, prefix, continues, CAUSAL)
    total = sum_column(share, before_ptr + 2 * K * P + head, prefix, continues, CAUSAL)
    return weighted, total + constant(MIN_MEMBERSHIP, total.dtype)


@triton.jit
def second_moment_totals_kernel(
    w_ptr,
    mask_ptr,
    ids_ptr,
    sums_ptr,  # [B, tiles + 1, F], written behind each tile
    T,
    K,
    P,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    MIN_SECOND_MOMENT: tl.constexpr,
    MIN_MEMBERSHIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Σ w² over the last document of each tile."""
    batch, tile, token, _, real, _, _, _, _, in_last, _ = lay_out_tile(
        T, mask_ptr, ids_ptr, HAS_MASK, HAS_IDS, BLOCK_T
    )
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK_P)
    w = load_head(w_ptr, batch, token, head, channel, T, K, P, real & in_last, sums_ptr.dtype.element_ty)
    sums_ptr = at_border(sums_ptr, batch, tile + 1, T, K, P, BLOCK_T)
    tl.store(sums_ptr + head * P + channel, tl.sum(w * w, 0), mask=channel < P)


@triton.jit
def membership_kernel(
    w_ptr,
    temperature_ptr,
    bias_ptr,  # [B, T, K]
    mask_ptr,
    ids_ptr,
    before_ptr,  # [B, tiles + 1, F], or [B, F] of the whole sequence; of them only Σ w² is read
    sums_ptr,  # [B, tiles + 1, F], written behind each tile but for Σ w²
    share_ptr,  # [B, T, K], written
    score_ptr,  # [B, T, K], written
    T,
    K,
    P,
    HAS_BIAS: tl.constexpr,
    TOTALS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    MIN_SECOND_MOMENT: tl.constexpr,
    MIN_MEMBERSHIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The logits before the temperature, Π, and with `TOTALS` Σ Π w² and Σ Π over the last document of each tile."""
    batch, tile, token, in_sequence, real, prefix, _, continues, _, in_last, _ = lay_out_tile(
        T, mask_ptr, ids_ptr, HAS_MASK, HAS_IDS, BLOCK_T
    )
    heads = tl.arange(0, BLOCK_K)
    channel = tl.arange(0, BLOCK_P)
    dtype = before_ptr.dtype.element_ty
    before_ptr = beyond_tile(before_ptr, batch, tile, T, K, P, CAUSAL, BLOCK_T)
    is_head = heads[None, :] < K
    offsets = (batch * T + token[:, None]) * K + heads[None, :]

    # 1. The scores, head by head.
    score = tl.zeros([BLOCK_T, BLOCK_K], dtype)
    for head in range(0, K):
        w = load_head(w_ptr, batch, token, head, channel, T, K, P, real, dtype)
        w2 = w * w
        second = sum_tile(w2, before_ptr + head * P, channel, P, prefix, continues, CAUSAL)
        ratio = w2 / tl.maximum(second, constant(MIN_SECOND_MOMENT, dtype))
        score = tl.where((heads == head)[None, :], tl.sum(ratio, 1)[:, None], score)
    if HAS_BIAS:
        score += P * tl.load(bias_ptr + offsets, mask=real[:, None] & is_head, other=0.0)

    # 2. The softmax over heads.
    temperature = tl.load(temperature_ptr + heads, mask=heads < K, other=0.0)
    logits = tl.where(is_head, score * temperature[None, :], float("-inf"))
    share = tl.exp(logits - tl.max(logits, 1)[:, None])
    share = tl.where(real[:, None], share / tl.sum(share, 1)[:, None], 0.0)
    in_table = in_sequence[:, None] & is_head
    tl.store(share_ptr + offsets, share, mask=in_table)
    tl.store(score_ptr + offsets, score, mask=in_table)

    # 3. The sums of the tile.
    if TOTALS:
        sums_ptr = at_border(sums_ptr, batch, tile + 1, T, K, P, BLOCK_T)
        held = tl.where(in_last[:, None], share, 0.0)
        tl.store(sums_ptr + 2 * K * P + heads, tl.sum(held, 0), mask=heads < K)
        for head in range(0, K):
            w = load_head(w_ptr, batch, token, head, channel, T, K, P, real & in_last, dtype)
            total = tl.sum(w * w * take_column(held, heads, head)[:, None], 0)
            tl.store(sums_ptr + (K + head) * P + channel, total, mask=channel < P)


@triton.jit
def output_kernel(
    w_ptr,
    mask_ptr,
    ids_ptr,
    keep_ptr,  # [B, T or 1, K, p]
    before_ptr,  # [B, tiles + 1, F] or [B, F]
    share_ptr,  # [B, T, K]
    out_ptr,  # [B, T, K, p], written
    T,
    K,
    P,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    MIN_SECOND_MOMENT: tl.constexpr,
    MIN_MEMBERSHIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """-w Π / (1 + m), as -w Π total / (weighted + total)."""
    batch, tile, token, in_sequence, real, prefix, _, continues, _, _, _ = lay_out_tile(
        T, mask_ptr, ids_ptr, HAS_MASK, HAS_IDS, BLOCK_T
    )
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK_P)
    dtype = before_ptr.dtype.element_ty
    before_ptr = beyond_tile(before_ptr, batch, tile, T, K, P, CAUSAL, BLOCK_T)
    w = load_head(w_ptr, batch, token, head, channel, T, K, P, real, dtype)
    share = tl.load(share_ptr + (batch * T + token) * K + head, mask=real, other=0.0)
    weighted, total = sum_memberships(
        w * w, share, before_ptr, head, channel, K, P, prefix, continues, MIN_MEMBERSHIP, CAUSAL
    )
    out = -w * (share * total)[:, None] / (weighted + total[:, None])
    if HAS_KEEP:
        out *= load_kept(keep_ptr, batch, token, head, channel, T, K, P, real, dtype, not CAUSAL, KEEP_SCALE)
    offsets = ((batch * T + token[:, None]) * K + head) * P + channel[None, :]
    out = convert(out, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, mask=in_sequence[:, None] & (channel < P)[None, :])


@triton.jit
def differentiate_output(
    w,
    share,
    weighted,
    total,
    grad_ptr,
    keep_ptr,
    batch,
    token,
    head,
    channel,
    T,
    K,
    P,
    real,
    CAUSAL: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
):
    """
    With gain = Π total and divisor = weighted + total, of out = -w gain / divisor: its gradient over the divisor, the
    gradient of the gain, and those of Σ Π w² and of Σ Π but through the gain's Π.
    """
    divisor = weighted + total[:, None]
    grad = load_head(grad_ptr, batch, token, head, channel, T, K, P, real, w.dtype) / divisor
    if HAS_KEEP:
        grad *= load_kept(keep_ptr, batch, token, head, channel, T, K, P, real, w.dtype, not CAUSAL, KEEP_SCALE)
    grad_divisor = grad * w
    grad_gain = -tl.sum(grad_divisor, 1)
    grad_divisor /= divisor
    grad_weighted = grad_divisor * (share * total)[:, None]
    grad_total = -share * tl.sum(weighted * grad_divisor, 1)
    return grad, grad_gain, grad_weighted, grad_total


@triton.jit
def differentiate_ratio(w2, second, grad_score, MIN_SECOND_MOMENT: tl.constexpr):
    """The gradients of Σ_c w² / max(Σ w², floor) by w², with the sum held fixed, and by the sum."""
    floor = constant(MIN_SECOND_MOMENT, second.dtype)
    floored = tl.maximum(second, floor)
    grad_w2 = grad_score[:, None] / floored
    return grad_w2, tl.where(second > floor, -(w2 / floored) * grad_w2, 0.0)


@triton.jit
def weighted_grad_totals_kernel(
    w_ptr,
    mask_ptr,
    ids_ptr,
    keep_ptr,
    before_ptr,  # [B, tiles + 1, F] or [B, F]
    share_ptr,  # [B, T, K]
    grad_ptr,  # [B, T, K, p]
    grad_sums_ptr,  # [B, tiles + 1, F], of Σ Π w² and Σ Π, written before each tile
    T,
    K,
    P,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    MIN_SECOND_MOMENT: tl.constexpr,
    MIN_MEMBERSHIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gradients of Σ Π w² and Σ Π at each token, summed over the first document of each tile."""
    batch, tile, token, _, real, prefix, _, continues, _, _, in_first = lay_out_tile(
        T, mask_ptr, ids_ptr, HAS_MASK, HAS_IDS, BLOCK_T
    )
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK_P)
    dtype = before_ptr.dtype.element_ty
    before_ptr = beyond_tile(before_ptr, batch, tile, T, K, P, CAUSAL, BLOCK_T)
    w = load_head(w_ptr, batch, token, head, channel, T, K, P, real, dtype)
    share = tl.load(share_ptr + (batch * T + token) * K + head, mask=real, other=0.0)
    weighted, total = sum_memberships(
        w * w, share, before_ptr, head, channel, K, P, prefix, continues, MIN_MEMBERSHIP, CAUSAL
    )
    _, _, grad_weighted, grad_total = differentiate_output(
        w, share, weighted, total, grad_ptr, keep_ptr, batch, token, head, channel, T, K, P, real, CAUSAL, HAS_KEEP,
        KEEP_SCALE,
    )  # fmt: skip
    grad_weighted = tl.sum(tl.where(in_first[:, None], grad_weighted, 0.0), 0)
    grad_sums_ptr = at_border(grad_sums_ptr, batch, tile, T, K, P, BLOCK_T)
    tl.store(grad_sums_ptr + (K + head) * P + channel, grad_weighted, mask=channel < P)
    tl.store(grad_sums_ptr + 2 * K * P + head, tl.sum(tl.where(in_first, grad_total, 0.0), 0))


@triton.jit
def logit_grad_kernel(
    w_ptr,
    temperature_ptr,
    mask_ptr,
    ids_ptr,
    keep_ptr,
    before_ptr,  # [B, tiles + 1, F] or [B, F]
    share_ptr,  # [B, T, K]
    grad_ptr,  # [B, T, K, p]
    after_ptr,  # [B, tiles + 1, F] or [B, F], the gradients of Σ Π w² and Σ Π, summed from the end
    logit_grad_ptr,  # [B, T, K], written
    grad_sums_ptr,  # [B, tiles + 1, F], of Σ w², written before each tile
    T,
    K,
    P,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    MIN_SECOND_MOMENT: tl.constexpr,
    MIN_MEMBERSHIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gradients of the logits, and those of Σ w² at each token, summed over the first document of each tile."""
    batch, tile, token, in_sequence, real, prefix, suffix, continues, is_continued, _, in_first = lay_out_tile(
        T, mask_ptr, ids_ptr, HAS_MASK, HAS_IDS, BLOCK_T
    )
    heads = tl.arange(0, BLOCK_K)
    channel = tl.arange(0, BLOCK_P)
    dtype = before_ptr.dtype.element_ty
    before_ptr = beyond_tile(before_ptr, batch, tile, T, K, P, CAUSAL, BLOCK_T)
    after_ptr = beyond_tile(after_ptr, batch, tile + 1, T, K, P, CAUSAL, BLOCK_T)
    offsets = (batch * T + token[:, None]) * K + heads[None, :]
    shares = tl.load(share_ptr + offsets, mask=real[:, None] & (heads < K)[None, :], other=0.0)

    # 1. The gradients of Π, head by head.
    grad_shares = tl.zeros([BLOCK_T, BLOCK_K], dtype)
    for head in range(0, K):
        w = load_head(w_ptr, batch, token, head, channel, T, K, P, real, dtype)
        w2 = w * w
        share = take_column(shares, heads, head)
        weighted, total = sum_memberships(
            w2, share, before_ptr, head, channel, K, P, prefix, continues, MIN_MEMBERSHIP, CAUSAL
        )
        grad_parts = differentiate_output(
            w, share, weighted, total, grad_ptr, keep_ptr, batch, token, head, channel, T, K, P, real, CAUSAL, HAS_KEEP,
            KEEP_SCALE,
        )  # fmt: skip
        grad_weighted = sum_tile(grad_parts[2], after_ptr + (K + head) * P, channel, P, suffix, is_continued, CAUSAL)
        grad_share = tl.sum(w2 * grad_weighted, 1) + total * grad_parts[1]
        grad_share += sum_column(grad_parts[3], after_ptr + 2 * K * P + head, suffix, is_continued, CAUSAL)
        grad_shares = tl.where((heads == head)[None, :], grad_share[:, None], grad_shares)

    # 2. Those of the logits.
    logit_grads = shares * (grad_shares - tl.sum(shares * grad_shares, 1)[:, None])
    tl.store(logit_grad_ptr + offsets, logit_grads, mask=in_sequence[:, None] & (heads < K)[None, :])

    # 3. The sums of the tile.
    grad_sums_ptr = at_border(grad_sums_ptr, batch, tile, T, K, P, BLOCK_T)
    for head in range(0, K):
        w = load_head(w_ptr, batch, token, head, channel, T, K, P, real, dtype)
        grad_score = take_column(logit_grads, heads, head) * tl.load(temperature_ptr + head)
        w2 = w * w
        second = sum_tile(w2, before_ptr + head * P, channel, P, prefix, continues, CAUSAL)
        grad_second = differentiate_ratio(w2, second, grad_score, MIN_SECOND_MOMENT)[1]
        total = tl.sum(tl.where(in_first[:, None], grad_second, 0.0), 0)
        tl.store(grad_sums_ptr + head * P + channel, total, mask=channel < P)


@triton.jit
def input_grad_kernel(
    w_ptr,
    temperature_ptr,
    mask_ptr,
    ids_ptr,
    keep_ptr,
    before_ptr,  # [B, tiles + 1, F] or [B, F]
    share_ptr,  # [B, T, K]
    grad_ptr,  # [B, T, K, p]
    after_ptr,  # [B, tiles + 1, F] or [B, F], the gradients of all sums, summed from the end
    logit_grad_ptr,  # [B, T, K]
    grad_w_ptr,  # [B, T, K, p], written
    T,
    K,
    P,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    MIN_SECOND_MOMENT: tl.constexpr,
    MIN_MEMBERSHIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The gradient of w."""
    batch, tile, token, in_sequence, real, prefix, suffix, continues, is_continued, _, _ = lay_out_tile(
        T, mask_ptr, ids_ptr, HAS_MASK, HAS_IDS, BLOCK_T
    )
    head = tl.program_id(1)
    channel = tl.arange(0, BLOCK_P)
    dtype = before_ptr.dtype.element_ty
    before_ptr = beyond_tile(before_ptr, batch, tile, T, K, P, CAUSAL, BLOCK_T)
    after_ptr = beyond_tile(after_ptr, batch, tile + 1, T, K, P, CAUSAL, BLOCK_T)
    w = load_head(w_ptr, batch, token, head, channel, T, K, P, real, dtype)
    w2 = w * w

    # 1. Through the scores.
    second = sum_tile(w2, before_ptr + head * P, channel, P, prefix, continues, CAUSAL)
    logit_grad = tl.load(logit_grad_ptr + (batch * T + token) * K + head, mask=real, other=0.0)
    grad_score = logit_grad * tl.load(temperature_ptr + head)
    grad_w2, grad_second = differentiate_ratio(w2, second, grad_score, MIN_SECOND_MOMENT)
    grad_w2 += sum_tile(grad_second, after_ptr + head * P, channel, P, suffix, is_continued, CAUSAL)

    # 2. Through the weighted moments.
    share = tl.load(share_ptr + (batch * T + token) * K + head, mask=real, other=0.0)
    weighted, total = sum_memberships(
        w2, share, before_ptr, head, channel, K, P, prefix, continues, MIN_MEMBERSHIP, CAUSAL
    )
    grad, _, grad_weighted, _ = differentiate_output(
        w, share, weighted, total, grad_ptr, keep_ptr, batch, token, head, channel, T, K, P, real, CAUSAL, HAS_KEEP,
        KEEP_SCALE,
    )  # fmt: skip
    grad_weighted = sum_tile(grad_weighted, after_ptr + (K + head) * P, channel, P, suffix, is_continued, CAUSAL)
    grad_w2 += grad_weighted * share[:, None]

    # 3. And as the factor of the output.
    grad_w = 2 * w * grad_w2 - grad * (share * total)[:, None]
    offsets = ((batch * T + token[:, None]) * K + head) * P + channel[None, :]
    grad_w = convert(grad_w, grad_w_ptr.dtype.element_ty)
    tl.store(grad_w_ptr + offsets, grad_w, mask=in_sequence[:, None] & (channel < P)[None, :])


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

    w = convert(tl.load(w_ptr + offsets, mask=in_tile & is_real, other=0.0), dtype)
    w2 = w * w
    second = w2
    if HAS_STATE:
        second += tl.load(second_ptr + offsets, mask=in_tile, other=0.0)
    score = tl.sum(w2 / tl.maximum(second, constant(MIN_SECOND_MOMENT, dtype)), 1)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + batch * K + head, mask=is_head & is_real, other=0.0)
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


def tile_size(head_dim: int, dtype: torch.dtype) -> int:
    """The tokens of a tile: a power of 2, and at least 16, as a factor of a matrix product."""
    largest = 16 if dtype == torch.float64 else TILE_SIZE
    return largest if head_dim <= 64 else max(16, largest // 2 if head_dim <= 128 else 16)


class _Tiles:
    """The tiles of a sequence, what all kernels are given of it, and the steps that forward and backward share."""

    def __init__(self, w, temperature, mask, ids, keep, dropout_p, *, is_causal):
        self.batch_size, self.length, self.num_heads, self.head_dim = w.shape
        self.w, self.temperature, mask, self.ids, keep = contiguous(w, temperature, mask, ids, keep)
        self.mask_and_ids = given(mask, ids, instead=self.w)
        (self.keep,) = given(keep, instead=self.w)
        self.size = tile_size(self.head_dim, temperature.dtype)
        self.count = triton.cdiv(self.length, self.size)
        self.width = self.num_heads * self.head_dim
        self.num_sums = 2 * self.width + self.num_heads
        self.sizes = self.length, self.num_heads, self.head_dim
        self.constants = {
            "CAUSAL": is_causal,
            "HAS_MASK": mask is not None,
            "HAS_IDS": ids is not None,
            "HAS_KEEP": keep is not None,
            "KEEP_SCALE": 1 / (1 - dropout_p),
            "MIN_SECOND_MOMENT": MIN_SECOND_MOMENT if is_causal else MIN_SECOND_MOMENT**2,
            "MIN_MEMBERSHIP": MIN_MEMBERSHIP,
            "BLOCK_T": self.size,
            "BLOCK_K": triton.next_power_of_2(self.num_heads),
            "BLOCK_P": max(triton.next_power_of_2(self.head_dim), MIN_BLOCK),
        }

    def of_tiles(self, kernel):
        return kernel[self.batch_size * self.count, 1]

    def of_heads(self, kernel):
        return kernel[self.batch_size * self.count, self.num_heads]

    def new_borders(self):
        return self.temperature.new_empty(self.batch_size, self.count + 1, self.num_sums)

    def find_memberships(self, before, sums, position_bias=None):
        """Π and the logits before the temperature `[B, T, K]`, and in `sums`, if given, the sums of the tiles."""
        share = before.new_empty(self.batch_size, self.length, self.num_heads)
        score = torch.empty_like(share)
        self.of_tiles(membership_kernel)(
            self.w,
            self.temperature,
            *given(*contiguous(position_bias), instead=share),
            *self.mask_and_ids,
            before,
            *given(sums, instead=before),
            share,
            score,
            *self.sizes,
            HAS_BIAS=position_bias is not None,
            TOTALS=sums is not None,
            **self.constants,
        )
        return share, score

    def sum_over_tiles(self, totals, initial, reverse=False):
        """
        Make of the sums of each tile `[B, tiles, n]` in place the running sums with `initial` `[B, n]`, added up in the
        dtype of `initial`, and return the last of them in it.

        A tile hands on the sum of its last document, in reverse of its first.
        """
        ids, initial_id, size = self.ids, None, self.size
        if ids is not None:
            initial_id = ids[:, -1 if reverse else 0]
            ids = ids[:, ::size] if reverse else torch.cat([ids[:, size - 1 : -1 : size], ids[:, -1:]], dim=1)
        wide, final = launch_running_sum(
            totals.to(initial.dtype), None, None, initial, None, ids, initial_id=initial_id, reverse=reverse
        )
        totals.copy_(wide)
        return final

    def find_output(self, before, share):
        out = torch.empty_like(self.w)
        self.of_heads(output_kernel)(
            self.w, *self.mask_and_ids, self.keep, before, share, out, *self.sizes, **self.constants
        )
        return out

    def find_weighted_grads(self, before, share, grad, grad_sums):
        """In `grad_sums` the gradients of Σ Π w² and Σ Π, summed over each tile."""
        self.of_heads(weighted_grad_totals_kernel)(
            self.w,
            *self.mask_and_ids,
            self.keep,
            before,
            share,
            grad,
            grad_sums,
            *self.sizes,
            **self.constants,
        )

    def find_logit_grads(self, before, share, grad, after, grad_sums):
        """The gradients of the logits `[B, T, K]`, and in `grad_sums` those of Σ w², summed over each tile."""
        logit_grad = torch.empty_like(share)
        # What it holds at a time does not fit into the registers of fewer threads.
        self.of_tiles(logit_grad_kernel)(
            self.w,
            self.temperature,
            *self.mask_and_ids,
            self.keep,
            before,
            share,
            grad,
            after,
            logit_grad,
            grad_sums,
            *self.sizes,
            **self.constants,
            num_warps=8,
        )
        return logit_grad

    def find_input_grads(self, before, share, grad, after, logit_grad):
        """The gradients of w."""
        grad_w = torch.empty_like(self.w)
        self.of_heads(input_grad_kernel)(
            self.w,
            self.temperature,
            *self.mask_and_ids,
            self.keep,
            before,
            share,
            grad,
            after,
            logit_grad,
            grad_w,
            *self.sizes,
            **self.constants,
            num_warps=8,
        )
        return grad_w


@on_its_device
def launch_causal_forward(w, temperature, position_bias, initial, mask, ids, keep, dropout_p):
    """
    The causal operator.

    Args:
        w (`torch.Tensor` of shape `[B, T, K, p]`, any floating dtype, no dimension 0)
        temperature (`torch.Tensor` of shape `[K]`, float32 or float64): its dtype is that of the statistics.
        position_bias (`torch.Tensor` of shape `[B, T, K]` or `None`)
        initial (`torch.Tensor` of shape `[B, F]`, float32 or float64): the packed sums before the first token.
        mask (`torch.Tensor` of shape `[B, T]`, bool, or `None`)
        ids (`torch.Tensor` of shape `[B, T]`, integer, never decreasing from 0, or `None`): the documents.
        keep (`torch.Tensor` of shape `[B, T, K, p]`, bool, or `None`): what dropout keeps.
        dropout_p (`float`)

    Returns:
        `tuple`: the output `[B, T, K, p]`, the packed sums before every tile and after the last `[B, tiles + 1, F]`, and
        those after the last in the dtype of `initial` `[B, F]`.
    """
    tiles = _Tiles(w, temperature, mask, ids, keep, dropout_p, is_causal=True)
    width = tiles.width
    sums = tiles.new_borders()
    sums[:, 0] = initial
    totals = sums[:, 1:]
    tiles.of_heads(second_moment_totals_kernel)(tiles.w, *tiles.mask_and_ids, sums, *tiles.sizes, **tiles.constants)
    final_second = tiles.sum_over_tiles(totals[..., :width], initial[:, :width])
    share, _ = tiles.find_memberships(sums, sums, position_bias)
    final_weighted = tiles.sum_over_tiles(totals[..., width:], initial[:, width:])
    return tiles.find_output(sums, share), sums, torch.cat([final_second, final_weighted], 1)


@on_its_device
def launch_causal_backward(w, temperature, position_bias, sums, mask, ids, keep, dropout_p, grad_out, grad_final):
    """
    The gradients of `w`, `temperature`, `position_bias` (even of none) and `initial` of [`launch_causal_forward`], which gave
    `sums`, from those of the output and of the packed sums after the sequence `[B, F]`.
    """
    tiles = _Tiles(w, temperature, mask, ids, keep, dropout_p, is_causal=True)
    width = tiles.width
    grad, sums = contiguous(grad_out, sums)
    share, score = tiles.find_memberships(sums, None, position_bias)
    after = tiles.new_borders()
    after[:, -1] = grad_final
    totals = after[:, :-1]
    tiles.find_weighted_grads(sums, share, grad, after)
    grad_weighted = tiles.sum_over_tiles(totals[..., width:], grad_final[:, width:], reverse=True)
    logit_grad = tiles.find_logit_grads(sums, share, grad, after, after)
    grad_second = tiles.sum_over_tiles(totals[..., :width], grad_final[:, :width], reverse=True)
    grad_w = tiles.find_input_grads(sums, share, grad, after, logit_grad)
    # The bias is added to each of the p terms of a score.
    grad_bias = logit_grad * (temperature * tiles.head_dim)
    return grad_w, (logit_grad * score).sum((0, 1)), grad_bias, torch.cat([grad_second, grad_weighted], 1)


def _whole_sums(tiles):
    """The packed sums of the whole sequence `[B, F]`, and Π and the scores."""
    totals, sums = tiles.new_borders(), tiles.temperature.new_empty(tiles.batch_size, tiles.num_sums)
    tiles.of_heads(second_moment_totals_kernel)(tiles.w, *tiles.mask_and_ids, totals, *tiles.sizes, **tiles.constants)
    sums[:, : tiles.width] = totals[:, 1:, : tiles.width].sum(1)
    share, score = tiles.find_memberships(sums, totals)
    sums[:, tiles.width :] = totals[:, 1:, tiles.width :].sum(1)
    return sums, share, score


@on_its_device
def launch_bidirectional_forward(w, temperature, mask, keep, dropout_p):
    """The bidirectional operator; the arguments are those of [`launch_causal_forward`], with `keep` `[B, 1, K, p]`."""
    tiles = _Tiles(w, temperature, mask, None, keep, dropout_p, is_causal=False)
    sums, share, _ = _whole_sums(tiles)
    return tiles.find_output(sums, share)


@on_its_device
def launch_bidirectional_backward(w, temperature, mask, keep, dropout_p, grad_out):
    """The gradients of `w` and `temperature` of [`launch_bidirectional_forward`]."""
    tiles = _Tiles(w, temperature, mask, None, keep, dropout_p, is_causal=False)
    (grad,) = contiguous(grad_out)
    sums, share, score = _whole_sums(tiles)
    totals, after = tiles.new_borders(), torch.empty_like(sums)
    tiles.find_weighted_grads(sums, share, grad, totals)
    after[:, tiles.width :] = totals[:, :-1, tiles.width :].sum(1)
    logit_grad = tiles.find_logit_grads(sums, share, grad, after, totals)
    after[:, : tiles.width] = totals[:, :-1, : tiles.width].sum(1)
    return tiles.find_input_grads(sums, share, grad, after, logit_grad), (logit_grad * score).sum((0, 1))


@register_kernel(causal_token_statistics)
@torch.library.custom_op("modeling_sumagg::causal_token_statistics", mutates_args=())
def causal_statistics(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    initial: torch.Tensor,
    mask: torch.Tensor | None,
    ids: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[`launch_causal_forward`] for autograd and compilers."""
    return launch_causal_forward(w, temperature, position_bias, initial, mask, ids, keep, dropout_p)


@causal_statistics.register_fake
def _causal_statistics_fake(w, temperature, position_bias, initial, mask, ids, keep, dropout_p):
    size = tile_size(w.shape[3], temperature.dtype)
    borders = (w.shape[1] + size - 1) // size + 1
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    sums = temperature.new_empty(w.shape[0], borders, initial.shape[1])
    return out, sums, torch.empty_like(initial, memory_format=torch.contiguous_format)


@torch.library.custom_op("modeling_sumagg::causal_token_statistics_backward", mutates_args=())
def causal_statistics_backward(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    sums: torch.Tensor,
    mask: torch.Tensor | None,
    ids: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
    grad_out: torch.Tensor,
    grad_final: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[`launch_causal_backward`] for compilers."""
    arguments = w, temperature, position_bias, sums, mask, ids, keep, dropout_p, grad_out, grad_final
    return launch_causal_backward(*arguments)


@causal_statistics_backward.register_fake
def _causal_statistics_backward_fake(
    w, temperature, position_bias, sums, mask, ids, keep, dropout_p, grad_out, grad_final
):
    grad_w, grad_initial = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (w, grad_final))
    return grad_w, torch.empty_like(temperature), sums.new_empty(w.shape[:3]), grad_initial


register_causal_autograd(causal_statistics, causal_statistics_backward)


@register_kernel(token_statistics)
@torch.library.custom_op("modeling_sumagg::token_statistics", mutates_args=())
def statistics(
    w: torch.Tensor,
    temperature: torch.Tensor,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """[`launch_bidirectional_forward`] for autograd and compilers."""
    return launch_bidirectional_forward(w, temperature, mask, keep, dropout_p)


@statistics.register_fake
def _statistics_fake(w, temperature, mask, keep, dropout_p):
    return torch.empty_like(w, memory_format=torch.contiguous_format)


@torch.library.custom_op("modeling_sumagg::token_statistics_backward", mutates_args=())
def statistics_backward(
    w: torch.Tensor,
    temperature: torch.Tensor,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
    grad_out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`launch_bidirectional_backward`] for compilers."""
    return launch_bidirectional_backward(w, temperature, mask, keep, dropout_p, grad_out)


@statistics_backward.register_fake
def _statistics_backward_fake(w, temperature, mask, keep, dropout_p, grad_out):
    return torch.empty_like(w, memory_format=torch.contiguous_format), torch.empty_like(temperature)


register_bidirectional_autograd(statistics, statistics_backward)


@register_kernel(causal_step)
@on_its_device
def causal_step_by_kernel(w, temperature, position_bias, state, mask, keep, dropout_p):
    """[`causal_step`] without gradients, and so without dropout."""
    w = w.squeeze(2)
    batch_size, num_heads, head_dim = w.shape
    wide = torch.float64
    (w,) = contiguous(w)
    out, new_total = torch.empty_like(w), w.new_empty(batch_size, num_heads, dtype=wide)
    new_state = TokenStatisticsState(*(torch.empty_like(out, dtype=wide) for _ in range(2)), new_total)  # type: ignore[call-arg]
    old_state = new_state if state is None else contiguous(*(sums.to(wide) for sums in state))
    bias = None
    if position_bias is not None:
        (bias,) = contiguous(position_bias.squeeze(-1).expand(batch_size, num_heads))
    mask = None if mask is None else mask.squeeze(-1).contiguous()
    step_kernel[batch_size,](
        w,
        temperature.flatten().to(wide),
        *given(bias, mask, instead=w),
        *old_state,
        out,
        *new_state,
        num_heads,
        head_dim,
        MIN_SECOND_MOMENT,
        MIN_MEMBERSHIP,
        HAS_BIAS=bias is not None,
        HAS_MASK=mask is not None,
        HAS_STATE=state is not None,
        BLOCK_K=triton.next_power_of_2(num_heads),
        BLOCK_P=triton.next_power_of_2(head_dim),
    )
    return out.unsqueeze(2), new_state
