"""The weighted mean with decays as Triton kernels: `causal_mean` and its gradients.

    m_t = s_t / n_t,    s_t = a_t s_{t-1} + v_t x_t,    n_t = a_t n_{t-1} + v_t

Both sums in one walk over the tiles, as `running_sum_kernels` describes it, so that nothing of the size of `x` is written
but the means, rounded once.

Backward takes the sums relative to constants c of the size of n, as `means_of_segment` does: b = v / c, r_t = a_t c_{t-1} / c_t,
and n / c, near 1. With `g` the gradient of the means divided by n / c, those of all that a sum is in are

    M_t = g_t + r_{t+1} M_{t+1},    P_t = g_t · m_t + r_{t+1} P_{t+1}

and from them come the gradients of the terms, b_t M_t, of their weights, (x_t · M_t - P_t) / c_t, and of the logarithms of the
decays, r_t (s_{t-1} · M_t - n_{t-1} P_t) / c_{t-1}, where s is m n again. `P` is linear in what each stripe of channels adds to
it, so that each program walks with a part of it, and the parts are added up last.
"""

import torch

from ..dispatch import register_kernel
from ..documents import Documents
from ..running_sum.running_sum_kernels import (
    block_sizes,
    cut,
    decays_within,
    end_of_tile,
    find_channels,
    load_starts,
)
from ..triton_helpers import constant, contiguous, convert, given, on_its_device, sum_decayed, tl, triton
from .weighted_mean import causal_mean
from .weighted_mean_torch import FLOOR, means_of_segment


@triton.jit
def mean_kernel(
    x_ptr,  # [B, T, K, P]
    log_decay_ptr,  # [B or 1, T, K], its dtype is that of the sums within a tile
    weight_ptr,  # [B or 1, T, K]
    starts_ptr,  # [B, T]
    sum_ptr,  # [B, segments, K, P], the sums before each segment, of the dtype of those from tile to tile
    total_ptr,  # [B, segments, K, stripes], the weights before it
    y_ptr,  # [B, T, K, P]
    rest_ptr,  # [B, T, K, P]
    totals_ptr,  # [B, T, K]
    final_sum_ptr,  # like `sum`
    final_total_ptr,  # like `total`
    reach_ptr,  # [B, segments, K]: the logarithm of the decay over each segment
    T,
    K,
    P,
    segment_tiles,
    num_segments,
    RELU: tl.constexpr,
    REST: tl.constexpr,  # write what rounding took from the means
    SHARED_DECAY: tl.constexpr,
    SHARED_WEIGHT: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    STORE: tl.constexpr,  # write the means; or begin at 0, and write the sums and the decay of each segment
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    batch, head, stripe, channel, in_head = find_channels(K, P, BLOCK_P)
    stripes = tl.cdiv(P, BLOCK_P)
    segment = tl.program_id(1)
    dtype = log_decay_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_T)
    x_ptr += batch * T * K * P + channel[None, :]
    y_ptr += batch * T * K * P + channel[None, :]
    rest_ptr += batch * T * K * P + channel[None, :]
    totals_ptr += batch * T * K + head
    log_decay_ptr += head + (0 if SHARED_DECAY else batch * T * K)
    weight_ptr += head + (0 if SHARED_WEIGHT else batch * T * K)
    starts_ptr += batch * T

    # 1. The sums before the segment.
    first_tile = segment * segment_tiles
    num_tiles = tl.minimum(segment_tiles, tl.cdiv(T, BLOCK_T) - first_tile)
    state = (batch * num_segments + segment) * K
    carry = tl.zeros([BLOCK_P], sum_ptr.dtype.element_ty)
    carry_total = tl.sum(carry, 0)
    over = carry_total
    num_cuts = tl.sum(row * 0, 0)
    if STORE:
        carry = tl.load(sum_ptr + state * P + channel, mask=in_head, other=0.0)
        carry_total = tl.load(total_ptr + (state + head) * stripes + stripe)
    for i in range(0, num_tiles):
        # 2. The terms of a tile. What is masked has no weight, and may be anything.
        token = (first_tile + i).to(tl.int64) * BLOCK_T + row
        in_sequence = token < T
        in_tile = in_sequence[:, None] & in_head[None, :]
        x = convert(tl.load(x_ptr + token[:, None] * K * P, mask=in_tile, other=0.0), dtype)
        log_decay = tl.load(log_decay_ptr + token * K, mask=in_sequence, other=0.0).to(dtype)
        weight = tl.load(weight_ptr + token * K, mask=in_sequence, other=0.0).to(dtype)
        if RELU:
            x = tl.where(x <= 0.0, 0.0, x)
        x = tl.where(weight[:, None] == 0.0, 0.0, weight[:, None] * x)

        # 3. Their means.
        is_start = load_starts(starts_ptr, token, in_sequence, HAS_STARTS)
        decays, seen, into, is_entered, is_left = decays_within(log_decay, is_start, row, False)
        local = sum_decayed(decays, seen, x)
        local_total = tl.sum(tl.where(seen, decays * weight[None, :], 0.0), 1)
        if STORE:
            total = local_total + tl.where(is_entered, into * carry_total.to(dtype), 0.0)
            y = local + tl.where(is_entered[:, None], into[:, None] * carry.to(dtype)[None, :], 0.0)
            y = y / tl.where(total == 0.0, 1.0, total)[:, None]
            rounded = convert(y, y_ptr.dtype.element_ty)
            tl.store(y_ptr + token[:, None] * K * P, rounded, mask=in_tile)
            if REST:
                rest = convert(y - convert(rounded, dtype), rest_ptr.dtype.element_ty)
                tl.store(rest_ptr + token[:, None] * K * P, rest, mask=in_tile)
            tl.store(totals_ptr + token * K, total, mask=in_sequence & (stripe == 0))

        # 4. The sums after it, in the precision of the state: a decay of almost 1 over many tiles is exact to its logarithm.
        over_tile = tl.sum(log_decay.to(carry.dtype), 0)
        end = end_of_tile(local, log_decay, is_start, row, False, BLOCK_T).to(carry.dtype)
        end_total = end_of_tile(local_total, log_decay, is_start, row, False, BLOCK_T).to(carry.dtype)
        carry = tl.where(is_left, tl.exp(over_tile) * carry, 0.0) + end
        carry_total = tl.where(is_left, tl.exp(over_tile) * carry_total, 0.0) + end_total
        over += over_tile
        num_cuts += tl.where(is_left, 0, 1)
    tl.store(final_sum_ptr + state * P + channel, carry, mask=in_head)
    tl.store(final_total_ptr + (state + head) * stripes + stripe, carry_total)
    if not STORE:
        tl.store(reach_ptr + state + head, tl.where(num_cuts > 0, float("-inf"), over))


@triton.jit
def load_mean(y_ptr, rest_ptr, offset, mask, dtype: tl.constexpr, REST: tl.constexpr):
    """The means as they were before they were rounded, from which weights and terms are subtracted."""
    y = convert(tl.load(y_ptr + offset, mask=mask, other=0.0), dtype)
    if REST:
        y += convert(tl.load(rest_ptr + offset, mask=mask, other=0.0), dtype)
    return y


@triton.jit
def mean_gradients_kernel(
    grad_y_ptr,  # [B, T, K, P]
    x_ptr,  # [B, T, K, P]
    y_ptr,  # [B, T, K, P]
    rest_ptr,  # [B, T, K, P]
    totals_ptr,  # [B, T, K]
    log_decay_ptr,  # [B or 1, T, K]
    weight_ptr,  # [B or 1, T, K]
    starts_ptr,  # [B, T]
    initial_sum_ptr,  # [B, K, P]
    initial_total_ptr,  # [B, K]
    sum_ptr,  # [B, segments, K, P], M behind each segment, decayed by the first token of the next
    total_ptr,  # [B, segments, K, stripes], P there
    grad_x_ptr,  # [B, T, K, P]
    grad_log_decay_ptr,  # [stripes, B, T, K]
    grad_weight_ptr,  # [stripes, B, T, K]
    final_sum_ptr,  # like `sum`
    final_total_ptr,  # like `total`
    reach_ptr,  # [B, segments, K]
    B,
    T,
    K,
    P,
    segment_tiles,
    num_segments,
    FLOOR: tl.constexpr,
    RELU: tl.constexpr,
    REST: tl.constexpr,
    SHARED_DECAY: tl.constexpr,
    SHARED_WEIGHT: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    batch, head, stripe, channel, in_head = find_channels(K, P, BLOCK_P)
    stripes = tl.cdiv(P, BLOCK_P)
    segment = tl.program_id(1)
    dtype = log_decay_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_T)
    grad_y_ptr += batch * T * K * P + channel[None, :]
    x_ptr += batch * T * K * P + channel[None, :]
    y_ptr += batch * T * K * P + channel[None, :]
    rest_ptr += batch * T * K * P + channel[None, :]
    grad_x_ptr += batch * T * K * P + channel[None, :]
    totals_ptr += batch * T * K + head
    log_decay_ptr += head + (0 if SHARED_DECAY else batch * T * K)
    weight_ptr += head + (0 if SHARED_WEIGHT else batch * T * K)
    starts_ptr += batch * T
    own_part = (stripe * B + batch) * T * K + head

    # 1. The sums behind the segment.
    first_tile = segment * segment_tiles
    num_tiles = tl.minimum(segment_tiles, tl.cdiv(T, BLOCK_T) - first_tile)
    state = (batch * num_segments + segment) * K
    carry = tl.zeros([BLOCK_P], sum_ptr.dtype.element_ty)
    carry_total = tl.sum(carry, 0)
    over = carry_total
    num_cuts = tl.sum(row * 0, 0)
    if STORE:
        carry = tl.load(sum_ptr + state * P + channel, mask=in_head, other=0.0)
        carry_total = tl.load(total_ptr + (state + head) * stripes + stripe)
    for i in range(0, num_tiles):
        # 2. The weights of a tile and before each of its tokens, the constants c, and the decays r.
        token = (first_tile + num_tiles - 1 - i).to(tl.int64) * BLOCK_T + row
        in_sequence = token < T
        in_tile = in_sequence[:, None] & in_head[None, :]
        is_first = token == 0
        has_before = in_sequence & (token > 0)
        total = tl.load(totals_ptr + token * K, mask=in_sequence, other=1.0)
        total_before = tl.load(totals_ptr + (token - 1) * K, mask=has_before, other=0.0)
        initial_total = tl.load(initial_total_ptr + batch * K + head + token * 0, mask=is_first, other=0.0)
        total_before = tl.where(is_first, initial_total.to(dtype), total_before)
        size = total + constant(FLOOR, dtype)
        size_before = total_before + constant(FLOOR, dtype)
        log_decay = tl.load(log_decay_ptr + token * K, mask=in_sequence, other=0.0).to(dtype)
        relative = tl.log(size_before.to(carry.dtype) / size.to(carry.dtype))
        log_decay += tl.where(in_sequence, relative, 0.0).to(dtype)
        is_start = load_starts(starts_ptr, token, in_sequence, HAS_STARTS)
        decays, seen, into, is_entered, is_left = decays_within(log_decay, is_start, row, True)

        # 3. What each sum is in.
        grad_y = convert(tl.load(grad_y_ptr + token[:, None] * K * P, mask=in_tile, other=0.0), dtype)
        grad_y /= tl.where(total == 0.0, 1.0, total / size)[:, None]
        y = load_mean(y_ptr, rest_ptr, token[:, None] * K * P, in_tile, dtype, REST)
        products = tl.sum(grad_y * y, 1)
        local = sum_decayed(decays, seen, grad_y)
        local_total = tl.sum(tl.where(seen, decays * products[None, :], 0.0), 1)
        if STORE:
            grad_sum = local + tl.where(is_entered[:, None], into[:, None] * carry.to(dtype)[None, :], 0.0)
            grad_total = local_total + tl.where(is_entered, into * carry_total.to(dtype), 0.0)

            # 4. The gradients of terms and weights.
            x = convert(tl.load(x_ptr + token[:, None] * K * P, mask=in_tile, other=0.0), dtype)
            weight = tl.load(weight_ptr + token * K, mask=in_sequence, other=0.0).to(dtype)
            grad_x = tl.where(weight[:, None] == 0.0, 0.0, (weight / size)[:, None] * grad_sum)
            if RELU:
                grad_x = tl.where(x <= 0.0, 0.0, grad_x)
                x = tl.where(x <= 0.0, 0.0, x)
            tl.store(grad_x_ptr + token[:, None] * K * P, convert(grad_x, grad_x_ptr.dtype.element_ty), mask=in_tile)
            grad_weight = (tl.sum(x * grad_sum, 1) - grad_total) / size
            tl.store(grad_weight_ptr + own_part + token * K, grad_weight, mask=in_sequence)

            # 5. Of the decays, by the sums before each token.
            is_before = has_before[:, None] & in_head[None, :]
            share_before = total_before / size_before
            before = load_mean(y_ptr, rest_ptr, (token - 1)[:, None] * K * P, is_before, dtype, REST)
            before *= share_before[:, None]
            initial = tl.load(
                initial_sum_ptr + batch * K * P + channel[None, :] + token[:, None] * 0,
                mask=is_first[:, None] & in_head[None, :],
                other=0.0,
            )
            before = tl.where(is_first[:, None], initial.to(dtype) / size_before[:, None], before)
            grad_decay = tl.exp(log_decay) * (tl.sum(before * grad_sum, 1) - share_before * grad_total)
            grad_decay = tl.where(is_start, 0.0, grad_decay)
            tl.store(grad_log_decay_ptr + own_part + token * K, grad_decay, mask=in_sequence)

        # 6. The sums before the tile.
        over_tile = tl.sum(log_decay.to(carry.dtype), 0)
        end = end_of_tile(local, log_decay, is_start, row, True, BLOCK_T).to(carry.dtype)
        end_total = end_of_tile(local_total, log_decay, is_start, row, True, BLOCK_T).to(carry.dtype)
        carry = tl.where(is_left, tl.exp(over_tile) * carry, 0.0) + end
        carry_total = tl.where(is_left, tl.exp(over_tile) * carry_total, 0.0) + end_total
        over += over_tile
        num_cuts += tl.where(is_left, 0, 1)
    tl.store(final_sum_ptr + state * P + channel, carry, mask=in_head)
    tl.store(final_total_ptr + (state + head) * stripes + stripe, carry_total)
    if not STORE:
        tl.store(reach_ptr + state + head, tl.where(num_cuts > 0, float("-inf"), over))


@triton.jit
def join_mean_segments_kernel(
    initial_sum_ptr,  # [B, K, P]
    initial_total_ptr,  # [B, K]
    sums_ptr,  # [B, segments, K, P], of each segment alone
    totals_ptr,  # [B, segments, K, stripes]
    reach_ptr,  # [B, segments, K]
    sum_states_ptr,  # [B, segments, K, P], the sums before each segment
    total_states_ptr,  # [B, segments, K, stripes]
    K,
    P,
    num_segments,
    REVERSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    batch, head, stripe, channel, in_head = find_channels(K, P, BLOCK_P)
    stripes = tl.cdiv(P, BLOCK_P)
    sums = tl.load(initial_sum_ptr + batch * K * P + channel, mask=in_head, other=0.0)
    # In reverse each stripe has a part.
    total = tl.load(initial_total_ptr + batch * K + head, mask=(stripe == 0) | (not REVERSE), other=0.0)
    for i in range(0, num_segments):
        segment = (batch * num_segments + (num_segments - 1 - i if REVERSE else i)) * K
        own_total = (segment + head) * stripes + stripe
        tl.store(sum_states_ptr + segment * P + channel, sums, mask=in_head)
        tl.store(total_states_ptr + own_total, total)
        reach = tl.load(reach_ptr + segment + head)
        is_cut = reach == float("-inf")
        own = tl.load(sums_ptr + segment * P + channel, mask=in_head, other=0.0)
        sums = tl.where(is_cut, 0.0, tl.exp(reach) * sums) + own
        total = tl.where(is_cut, 0.0, tl.exp(reach) * total) + tl.load(totals_ptr + own_total)


class _Walk:
    """How a sequence is cut, and the states of its segments: a pass for each of them alone, their joining, and the pass."""

    def __init__(self, x, log_decay, sums, total, reverse):
        self.sums, self.total, self.reverse = sums.contiguous(), total.contiguous(), reverse
        self.heads = log_decay.shape[2]
        self.head_dim = x.shape[2] // self.heads
        self.block_t, self.block_p = block_sizes(log_decay.dtype, self.head_dim)
        self.stripes = triton.cdiv(self.head_dim, self.block_p)
        self.programs = x.shape[0] * self.heads * self.stripes
        num_tiles = triton.cdiv(x.shape[1], self.block_t)
        self.num_segments, self.segment_tiles = cut(x.device, self.programs, num_tiles)
        of_segments = x.shape[0], self.num_segments
        self.final_sums = sums.new_empty(*of_segments, x.shape[2])
        self.final_totals = sums.new_empty(*of_segments, self.heads, self.stripes)
        self.reach = sums.new_empty(*of_segments, self.heads)

    def run(self, launch):
        """`launch(sums, totals, store)` for the passes that there are; the sums and totals after the last segment."""
        states = self.sums, self.total
        if self.num_segments > 1:
            launch(*states, False)
            states = torch.empty_like(self.final_sums), torch.empty_like(self.final_totals)
            join_mean_segments_kernel[(self.programs,)](
                self.sums,
                self.total,
                self.final_sums,
                self.final_totals,
                self.reach,
                *states,
                self.heads,
                self.head_dim,
                self.num_segments,
                REVERSE=self.reverse,
                BLOCK_P=self.block_p,
            )
        elif self.stripes > 1:
            total = self.total.unsqueeze(-1)
            parts = total.new_zeros(*total.shape[:-1], self.stripes - 1) if self.reverse else total
            states = self.sums, torch.cat([total, parts.expand(*total.shape[:-1], self.stripes - 1)], -1)
        launch(*states, True)
        end = 0 if self.reverse else -1
        totals = self.final_totals[:, end]
        return self.final_sums[:, end].contiguous(), totals.sum(-1) if self.reverse else totals[..., 0].contiguous()


@on_its_device
def launch_mean(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    total: torch.Tensor,
    starts: torch.Tensor | None,
    *,
    relu: bool = False,
    keep_rest: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The means of [`causal_mean`].

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, any floating dtype, no dimension 0): the terms; ignored where the weight is 0.
        log_decay, weight (`torch.Tensor` of shape `[B or 1, T, K]`, float32 or float64): `log a`; v.
        sums, total (`torch.Tensor` of shape `[B, D]` and `[B, K]`, of one dtype): s and n before the first token.
        starts (`torch.Tensor` of shape `[B, T]`, bool, *optional*): the tokens whose decay is 0: documents begin there.
        relu (`bool`): take `max(x, 0)` for `x`.
        keep_rest (`bool`): keep for [`launch_mean_gradients`] what rounding takes from means of 16 bits.

    Returns:
        `tuple` of five tensors: the means in the dtype of `x`; what rounding took from them, likewise, empty unless
        `keep_rest`; `n` `[B, T, K]` in the dtype of `log_decay`; and the last `s` and `n` in that
        of `sums`.
    """
    x, log_decay, weight, starts = contiguous(x, log_decay, weight, starts)
    walk = _Walk(x, log_decay, sums, total, reverse=False)
    y = torch.empty_like(x)
    rest = torch.empty_like(y) if keep_rest else y.new_empty(0)
    totals = log_decay.new_empty(*x.shape[:2], walk.heads)

    def launch(sums, total, store):
        mean_kernel[walk.programs, walk.num_segments](
            x,
            log_decay,
            weight,
            *given(starts, instead=x),
            sums,
            total,
            y,
            rest,
            totals,
            walk.final_sums,
            walk.final_totals,
            walk.reach,
            x.shape[1],
            walk.heads,
            walk.head_dim,
            walk.segment_tiles,
            walk.num_segments,
            RELU=relu,
            REST=keep_rest,
            SHARED_DECAY=log_decay.shape[0] == 1,
            SHARED_WEIGHT=weight.shape[0] == 1,
            HAS_STARTS=starts is not None,
            STORE=store,
            BLOCK_T=walk.block_t,
            BLOCK_P=walk.block_p,
        )

    return y, rest, totals, *walk.run(launch)


@on_its_device
def launch_mean_gradients(
    grad_y: torch.Tensor,
    grad_sums: torch.Tensor,
    grad_total: torch.Tensor,
    x: torch.Tensor,
    log_decay: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    total: torch.Tensor,
    starts: torch.Tensor | None,
    y: torch.Tensor,
    rest: torch.Tensor,
    totals: torch.Tensor,
    *,
    relu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The gradients of `x`, `log_decay`, `weight`, `sums` and `total` of [`launch_mean`], of their shapes and dtypes.

    Args:
        grad_y (`torch.Tensor` of shape `[B, T, D]`), grad_sums (`[B, D]`), grad_total (`[B, K]`): those of the means and of
            the last sums.
        x, log_decay, weight, sums, total, starts, relu: the arguments of [`launch_mean`].
        y, rest, totals: the means, what rounding took from them, and `n`, as it returned them.
    """
    grad_y, x, log_decay, weight, sums, total, starts = contiguous(grad_y, x, log_decay, weight, sums, total, starts)
    heads = log_decay.shape[2]
    last_size = totals[:, -1].to(total.dtype) + FLOOR
    grad_sums = grad_sums.unflatten(1, (heads, -1)) * last_size.unsqueeze(-1)
    walk = _Walk(x, log_decay, grad_sums.flatten(1), -grad_total * last_size, reverse=True)
    grad_x = torch.empty_like(x)
    grad_log_decay = log_decay.new_empty(walk.stripes, *totals.shape)
    grad_weight = torch.empty_like(grad_log_decay)

    def launch(states, state_totals, store):
        mean_gradients_kernel[walk.programs, walk.num_segments](
            grad_y,
            x,
            y,
            rest,
            totals,
            log_decay,
            weight,
            *given(starts, instead=x),
            sums,
            total,
            states,
            state_totals,
            grad_x,
            grad_log_decay,
            grad_weight,
            walk.final_sums,
            walk.final_totals,
            walk.reach,
            *x.shape[:2],
            walk.heads,
            walk.head_dim,
            walk.segment_tiles,
            walk.num_segments,
            FLOOR=FLOOR,
            RELU=relu,
            REST=rest.numel() > 0,
            SHARED_DECAY=log_decay.shape[0] == 1,
            SHARED_WEIGHT=weight.shape[0] == 1,
            HAS_STARTS=starts is not None,
            STORE=store,
            BLOCK_T=walk.block_t,
            BLOCK_P=walk.block_p,
        )

    grad_sums, minus_grad_total = walk.run(launch)
    size = total + FLOOR
    grad_sums = (grad_sums.unflatten(1, (heads, -1)) / size.unsqueeze(-1)).flatten(1)
    grad_log_decay, grad_weight = (
        (parts.sum(0) if walk.stripes > 1 else parts[0]).sum_to_size(values.shape)
        for parts, values in ((grad_log_decay, log_decay), (grad_weight, weight))
    )
    return grad_x, grad_log_decay, grad_weight, grad_sums, -minus_grad_total / size


@torch.library.custom_op("modeling_sumagg::weighted_mean", mutates_args=())
def weighted_mean(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    total: torch.Tensor,
    starts: torch.Tensor | None,
    relu: bool,
    keep_rest: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[`launch_mean`] for autograd and compilers."""
    return launch_mean(x, log_decay, weight, sums, total, starts, relu=relu, keep_rest=keep_rest)


@weighted_mean.register_fake
def _weighted_mean_fake(x, log_decay, weight, sums, total, starts, relu, keep_rest):
    y, sums, total = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, sums, total))
    rest = torch.empty_like(y) if keep_rest else y.new_empty(0)
    return y, rest, log_decay.new_empty(*x.shape[:2], log_decay.shape[2]), sums, total


@torch.library.custom_op("modeling_sumagg::weighted_mean_backward", mutates_args=())
def weighted_mean_backward(
    grad_y: torch.Tensor,
    grad_sums: torch.Tensor,
    grad_total: torch.Tensor,
    x: torch.Tensor,
    log_decay: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    total: torch.Tensor,
    starts: torch.Tensor | None,
    y: torch.Tensor,
    rest: torch.Tensor,
    totals: torch.Tensor,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[`launch_mean_gradients`] for compilers."""
    arguments = grad_y, grad_sums, grad_total, x, log_decay, weight, sums, total, starts, y, rest, totals
    return launch_mean_gradients(*arguments, relu=relu)


@weighted_mean_backward.register_fake
def _weighted_mean_backward_fake(
    grad_y, grad_sums, grad_total, x, log_decay, weight, sums, total, starts, y, rest, totals, relu
):
    leaves = x, log_decay, weight, sums, total
    return tuple(torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in leaves)


def _weighted_mean_setup_context(ctx, inputs, output):
    *leaves, ctx.relu, _ = inputs
    ctx.save_for_backward(*leaves, *output[:3])


def _weighted_mean_vjp(ctx, grad_y, _grad_rest, _grad_totals, grad_sums, grad_total):
    *leaves, starts, y, rest, totals = ctx.saved_tensors
    if torch.is_grad_enabled():  # A gradient that has gradients in turn is that of the two sums.
        leaves = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
        x, log_decay, weight, sums, total = leaves
        # What has no weight is masked, and may be anything.
        x = x.unflatten(2, (weight.shape[2], -1)).masked_fill((weight == 0).unsqueeze(-1), 0).flatten(2)
        documents = None if starts is None else Documents(starts.long().cumsum(1), starts)
        means, *states, _ = means_of_segment(x.to(weight.dtype), log_decay, weight, sums, total, documents, ctx.relu)
        outputs = means.to(grad_y.dtype), *states
        grads = torch.autograd.grad(outputs, leaves, (grad_y, grad_sums, grad_total), create_graph=True)
    else:
        grads = weighted_mean_backward(grad_y, grad_sums, grad_total, *leaves, starts, y, rest, totals, ctx.relu)
    return *grads, None, None, None


weighted_mean.register_autograd(_weighted_mean_vjp, setup_context=_weighted_mean_setup_context)


@register_kernel(causal_mean)
def causal_mean_by_kernel(x, log_decay, weight, sums, total, documents, relu):
    """[`causal_mean`] with one state for each row."""
    starts = None if documents is None else documents.starts
    keep_rest = torch.is_grad_enabled() and x.element_size() == 2
    means, _, _, *state = weighted_mean(x, log_decay, weight, sums, total, starts, relu, keep_rest)
    return means, *state
