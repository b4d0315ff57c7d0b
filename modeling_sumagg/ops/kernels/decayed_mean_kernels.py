"""The weighted mean with decays as Triton kernels: `causal_mean` and its gradients.

    m_t = s_t / n_t,    s_t = a_t s_{t-1} + v_t x_t,    n_t = a_t n_{t-1} + v_t

Both sums in one walk over the tiles, as `decayed_sum_kernels` describes it, so that nothing of the size of `x` is written
but the means, rounded once. With `g` the gradient of the means, those of all that a sum is in are

    G_t = g_t / n_t + a_{t+1} G_{t+1},    H_t = -(g_t · m_t) / n_t + a_{t+1} H_{t+1}

and from them come the gradients of the terms, `v_t G_t`, of their weights, `x_t · G_t + H_t`, and of the logarithms of the
decays, `a_t (s_{t-1} · G_t + n_{t-1} H_t)`, where `s` is `m n` again. `H` is linear in what each stripe of channels adds to
it, so that each program walks with a part of it, and the parts are added up last.
"""

import torch

from .decayed_sum_kernels import (
    block_sizes,
    cut,
    decays_within,
    end_of_tile,
    multiply_exactly,
    per_token_strides,
)
from .running_sum_kernels import channels_last, convert, on_its_device


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(f"The kernels need Triton, which cannot be imported ({error}). Install `triton`.") from error


@triton.jit
def decayed_mean_kernel(
    x_ptr,  # [B, T, K, P]
    log_decay_ptr,  # [B or 1, T, K], its dtype is that of the sums within a tile
    weight_ptr,  # [B or 1, T, K]
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
    x_stride_b,
    x_stride_t,
    decay_stride_b,
    decay_stride_t,
    weight_stride_b,
    weight_stride_t,
    RELU: tl.constexpr,
    REST: tl.constexpr,  # write what rounding took from the means
    STORE: tl.constexpr,  # write the means; or begin at 0, and write the sums and the decay of each segment
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    stripes = tl.cdiv(P, BLOCK_P)
    stripe = tl.program_id(0) % stripes
    head = (tl.program_id(0) // stripes) % K
    batch = (tl.program_id(0) // (stripes * K)).to(tl.int64)
    segment = tl.program_id(1)
    channel = stripe * BLOCK_P + tl.arange(0, BLOCK_P)
    in_head = channel < P
    channel += head * P
    dtype = log_decay_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_T)
    x_ptr += batch * x_stride_b + channel[None, :]
    y_ptr += batch * T * K * P + channel[None, :]
    rest_ptr += batch * T * K * P + channel[None, :]
    totals_ptr += batch * T * K + head
    log_decay_ptr += batch * decay_stride_b + head
    weight_ptr += batch * weight_stride_b + head

    first_tile = segment * segment_tiles
    num_tiles = tl.minimum(segment_tiles, tl.cdiv(T, BLOCK_T) - first_tile)
    state = (batch * num_segments + segment) * K
    carry = tl.zeros([BLOCK_P], sum_ptr.dtype.element_ty)
    carry_total = tl.sum(carry, 0)
    over = carry_total
    if STORE:
        carry = tl.load(sum_ptr + state * P + channel, mask=in_head, other=0.0)
        carry_total = tl.load(total_ptr + (state + head) * stripes + stripe)
    for i in range(0, num_tiles):
        token = (first_tile + i).to(tl.int64) * BLOCK_T + row
        in_sequence = token < T
        in_tile = in_sequence[:, None] & in_head[None, :]
        x = convert(tl.load(x_ptr + token[:, None] * x_stride_t, mask=in_tile, other=0.0), dtype)
        log_decay = tl.load(log_decay_ptr + token * decay_stride_t, mask=in_sequence, other=0.0).to(dtype)
        weight = tl.load(weight_ptr + token * weight_stride_t, mask=in_sequence, other=0.0).to(dtype)
        if RELU:
            x = tl.where(x <= 0.0, 0.0, x)
        # What is masked has no weight, and may be anything.
        x = tl.where(weight[:, None] == 0.0, 0.0, weight[:, None] * x)
        decays, reach = decays_within(log_decay, row, False)
        local = multiply_exactly(decays, x)
        local_total = tl.sum(decays * weight[None, :], 1)
        if STORE:
            left = tl.exp(reach)
            total = local_total + left * carry_total.to(dtype)
            y = local + left[:, None] * carry.to(dtype)[None, :]
            y = y / tl.where(total == 0.0, 1.0, total)[:, None]
            rounded = convert(y, y_ptr.dtype.element_ty)
            tl.store(y_ptr + token[:, None] * K * P, rounded, mask=in_tile)
            if REST:
                rest = convert(y - convert(rounded, dtype), rest_ptr.dtype.element_ty)
                tl.store(rest_ptr + token[:, None] * K * P, rest, mask=in_tile)
            tl.store(totals_ptr + token * K, total, mask=in_sequence & (stripe == 0))

        # From tile to tile in the precision of the state: a decay of almost 1 over many tiles is exact to its logarithm.
        over_tile = tl.sum(log_decay.to(carry.dtype), 0)
        left_over = tl.exp(over_tile)
        carry = left_over * carry + end_of_tile(local, log_decay, row, False, BLOCK_T).to(carry.dtype)
        end_total = end_of_tile(local_total, log_decay, row, False, BLOCK_T)
        carry_total = left_over * carry_total + end_total.to(carry.dtype)
        over += over_tile
    tl.store(final_sum_ptr + state * P + channel, carry, mask=in_head)
    tl.store(final_total_ptr + (state + head) * stripes + stripe, carry_total)
    if not STORE:
        tl.store(reach_ptr + state + head, over)


@triton.jit
def _load_mean(y_ptr, rest_ptr, offset, mask, dtype: tl.constexpr, REST: tl.constexpr):
    """The means as they were before they were rounded, from which weights and terms are subtracted."""
    y = convert(tl.load(y_ptr + offset, mask=mask, other=0.0), dtype)
    if REST:
        y += convert(tl.load(rest_ptr + offset, mask=mask, other=0.0), dtype)
    return y


@triton.jit
def decayed_mean_gradients_kernel(
    grad_y_ptr,  # [B, T, K, P]
    x_ptr,  # [B, T, K, P]
    y_ptr,  # [B, T, K, P]
    rest_ptr,  # [B, T, K, P]
    totals_ptr,  # [B, T, K]
    log_decay_ptr,  # [B or 1, T, K]
    weight_ptr,  # [B or 1, T, K]
    initial_sum_ptr,  # [B, K, P]
    initial_total_ptr,  # [B, K]
    sum_ptr,  # [B, segments, K, P], G behind each segment, decayed by the first token of the next
    total_ptr,  # [B, segments, K, stripes], H there
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
    grad_stride_b,
    grad_stride_t,
    x_stride_b,
    x_stride_t,
    decay_stride_b,
    decay_stride_t,
    weight_stride_b,
    weight_stride_t,
    RELU: tl.constexpr,
    REST: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    stripes = tl.cdiv(P, BLOCK_P)
    stripe = tl.program_id(0) % stripes
    head = (tl.program_id(0) // stripes) % K
    batch = (tl.program_id(0) // (stripes * K)).to(tl.int64)
    segment = tl.program_id(1)
    channel = stripe * BLOCK_P + tl.arange(0, BLOCK_P)
    in_head = channel < P
    channel += head * P
    dtype = log_decay_ptr.dtype.element_ty
    row = tl.arange(0, BLOCK_T)
    grad_y_ptr += batch * grad_stride_b + channel[None, :]
    x_ptr += batch * x_stride_b + channel[None, :]
    y_ptr += batch * T * K * P + channel[None, :]
    rest_ptr += batch * T * K * P + channel[None, :]
    grad_x_ptr += batch * T * K * P + channel[None, :]
    totals_ptr += batch * T * K + head
    log_decay_ptr += batch * decay_stride_b + head
    weight_ptr += batch * weight_stride_b + head
    own_part = (stripe * B + batch) * T * K + head

    first_tile = segment * segment_tiles
    num_tiles = tl.minimum(segment_tiles, tl.cdiv(T, BLOCK_T) - first_tile)
    state = (batch * num_segments + segment) * K
    carry = tl.zeros([BLOCK_P], sum_ptr.dtype.element_ty)
    carry_total = tl.sum(carry, 0)
    over = carry_total
    if STORE:
        carry = tl.load(sum_ptr + state * P + channel, mask=in_head, other=0.0)
        carry_total = tl.load(total_ptr + (state + head) * stripes + stripe)
    for i in range(0, num_tiles):
        token = (first_tile + num_tiles - 1 - i).to(tl.int64) * BLOCK_T + row
        in_sequence = token < T
        in_tile = in_sequence[:, None] & in_head[None, :]
        log_decay = tl.load(log_decay_ptr + token * decay_stride_t, mask=in_sequence, other=0.0).to(dtype)
        grad_y = convert(tl.load(grad_y_ptr + token[:, None] * grad_stride_t, mask=in_tile, other=0.0), dtype)
        y = _load_mean(y_ptr, rest_ptr, token[:, None] * K * P, in_tile, dtype, REST)
        total = tl.load(totals_ptr + token * K, mask=in_sequence, other=1.0)
        total = tl.where(total == 0.0, 1.0, total)
        terms = grad_y / total[:, None]
        weight_terms = -tl.sum(grad_y * y, 1) / total
        decays, reach = decays_within(log_decay, row, True)
        local = multiply_exactly(decays, terms)
        local_total = tl.sum(decays * weight_terms[None, :], 1)
        if STORE:
            left = tl.exp(reach)
            grad_sum = local + left[:, None] * carry.to(dtype)[None, :]
            grad_total = local_total + left * carry_total.to(dtype)
            x = convert(tl.load(x_ptr + token[:, None] * x_stride_t, mask=in_tile, other=0.0), dtype)
            weight = tl.load(weight_ptr + token * weight_stride_t, mask=in_sequence, other=0.0).to(dtype)
            grad_x = tl.where(weight[:, None] == 0.0, 0.0, weight[:, None] * grad_sum)
            if RELU:
                grad_x = tl.where(x <= 0.0, 0.0, grad_x)
                x = tl.where(x <= 0.0, 0.0, x)
            tl.store(grad_x_ptr + token[:, None] * K * P, convert(grad_x, grad_x_ptr.dtype.element_ty), mask=in_tile)
            grad_weight = tl.sum(x * grad_sum, 1) + grad_total
            tl.store(grad_weight_ptr + own_part + token * K, grad_weight, mask=in_sequence)

            is_first = token == 0
            has_before = in_sequence & (token > 0)
            is_before = has_before[:, None] & in_head[None, :]
            before = _load_mean(y_ptr, rest_ptr, (token - 1)[:, None] * K * P, is_before, dtype, REST)
            total_before = tl.load(totals_ptr + (token - 1) * K, mask=has_before, other=0.0)
            before = before * total_before[:, None]
            initial = tl.load(
                initial_sum_ptr + batch * K * P + channel[None, :] + token[:, None] * 0,
                mask=is_first[:, None] & in_head[None, :],
                other=0.0,
            )
            initial_total = tl.load(initial_total_ptr + batch * K + head + token * 0, mask=is_first, other=0.0)
            before = tl.where(is_first[:, None], initial.to(dtype), before)
            total_before = tl.where(is_first, initial_total.to(dtype), total_before)
            grad_decay = tl.sum(before * grad_sum, 1) + total_before * grad_total
            # An infinity of another document is not of this one.
            decay = tl.exp(log_decay)
            grad_decay = tl.where(decay == 0.0, 0.0, decay * grad_decay)
            tl.store(grad_log_decay_ptr + own_part + token * K, grad_decay, mask=in_sequence)

        over_tile = tl.sum(log_decay.to(carry.dtype), 0)
        left_over = tl.exp(over_tile)
        carry = left_over * carry + end_of_tile(local, log_decay, row, True, BLOCK_T).to(carry.dtype)
        end_total = end_of_tile(local_total, log_decay, row, True, BLOCK_T)
        carry_total = left_over * carry_total + end_total.to(carry.dtype)
        over += over_tile
    tl.store(final_sum_ptr + state * P + channel, carry, mask=in_head)
    tl.store(final_total_ptr + (state + head) * stripes + stripe, carry_total)
    if not STORE:
        tl.store(reach_ptr + state + head, over)


@triton.jit
def join_mean_segments_kernel(
    initial_sum_ptr,  # [B, K, P]
    initial_total_ptr,  # [B, K]
    sums_ptr,  # [B, segments, K, P], of each segment alone
    totals_ptr,  # [B, segments, K, stripes]
    reach_ptr,  # [B, segments, K]
    sum_states_ptr,  # [B, segments, K, P], what each segment goes on from
    total_states_ptr,  # [B, segments, K, stripes]
    K,
    P,
    num_segments,
    REVERSE: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    stripes = tl.cdiv(P, BLOCK_P)
    stripe = tl.program_id(0) % stripes
    head = (tl.program_id(0) // stripes) % K
    batch = (tl.program_id(0) // (stripes * K)).to(tl.int64)
    channel = stripe * BLOCK_P + tl.arange(0, BLOCK_P)
    in_head = channel < P
    channel += head * P
    sums = tl.load(initial_sum_ptr + batch * K * P + channel, mask=in_head, other=0.0)
    # In reverse each stripe has a part.
    total = tl.load(initial_total_ptr + batch * K + head, mask=(stripe == 0) | (not REVERSE), other=0.0)
    for i in range(0, num_segments):
        segment = (batch * num_segments + (num_segments - 1 - i if REVERSE else i)) * K
        own_total = (segment + head) * stripes + stripe
        tl.store(sum_states_ptr + segment * P + channel, sums, mask=in_head)
        tl.store(total_states_ptr + own_total, total)
        left = tl.exp(tl.load(reach_ptr + segment + head))
        sums = left * sums + tl.load(sums_ptr + segment * P + channel, mask=in_head, other=0.0)
        total = left * total + tl.load(totals_ptr + own_total)


class _Walk:
    """How a sequence is cut, and the states of its segments: a pass for each of them alone, their joining, and the pass."""

    def __init__(self, x, log_decay, sums, total, reverse):
        self.sums, self.total, self.reverse = sums.contiguous(), total.contiguous(), reverse
        self.heads = log_decay.shape[2]
        self.head_dim = x.shape[2] // self.heads
        self.block_t, self.block_p = block_sizes(x, self.head_dim)
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
def decayed_mean(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    total: torch.Tensor,
    *,
    relu: bool = False,
    keep_rest: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The means of [`causal_mean`].

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, any floating dtype, no dimension 0): the terms; ignored where the weight is 0.
        log_decay, weight (`torch.Tensor` of shape `[B or 1, T, K]`, float32 or float64): `log a`, `-inf` for none left; v.
        sums, total (`torch.Tensor` of shape `[B, D]` and `[B, K]`, of one dtype): s and n before the first token.
        relu (`bool`): take `max(x, 0)` for `x`.
        keep_rest (`bool`): keep for [`decayed_mean_gradients`] what rounding takes from means of 16 bits.

    Returns:
        `tuple` of five tensors: the means in the dtype of `x`; what rounding took from them, likewise, empty unless
        `keep_rest`; `n` `[B, T, K]` in the dtype of `log_decay`; and the last `s` and `n` in that
        of `sums`.
    """
    x, log_decay, weight = channels_last(x), channels_last(log_decay), channels_last(weight)
    walk = _Walk(x, log_decay, sums, total, reverse=False)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rest = torch.empty_like(y) if keep_rest else y.new_empty(0)
    totals = log_decay.new_empty(*x.shape[:2], walk.heads)

    def launch(sums, total, store):
        decayed_mean_kernel[walk.programs, walk.num_segments](
            x,
            log_decay,
            weight,
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
            *x.stride()[:2],
            *per_token_strides(log_decay),
            *per_token_strides(weight),
            RELU=relu,
            REST=rest.numel() > 0,
            STORE=store,
            BLOCK_T=walk.block_t,
            BLOCK_P=walk.block_p,
        )

    return y, rest, totals, *walk.run(launch)


@on_its_device
def decayed_mean_gradients(
    grad_y: torch.Tensor,
    grad_sums: torch.Tensor,
    grad_total: torch.Tensor,
    x: torch.Tensor,
    log_decay: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    total: torch.Tensor,
    y: torch.Tensor,
    rest: torch.Tensor,
    totals: torch.Tensor,
    *,
    relu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The gradients of `x`, `log_decay`, `weight`, `sums` and `total` of [`decayed_mean`], of their shapes and dtypes.

    Args:
        grad_y (`torch.Tensor` of shape `[B, T, D]`), grad_sums (`[B, D]`), grad_total (`[B, K]`): those of the means and of
            the last sums.
        x, log_decay, weight, sums, total, relu: the arguments of [`decayed_mean`].
        y, rest, totals: the means, what rounding took from them, and `n`, as it returned them.
    """
    grad_y, x = channels_last(grad_y), channels_last(x)
    log_decay, weight = channels_last(log_decay), channels_last(weight)
    walk = _Walk(x, log_decay, grad_sums, grad_total, reverse=True)
    sums, total = sums.contiguous(), total.contiguous()
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_log_decay = log_decay.new_empty(walk.stripes, *totals.shape)
    grad_weight = torch.empty_like(grad_log_decay)

    def launch(states, state_totals, store):
        decayed_mean_gradients_kernel[walk.programs, walk.num_segments](
            grad_y,
            x,
            y,
            rest,
            totals,
            log_decay,
            weight,
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
            *grad_y.stride()[:2],
            *x.stride()[:2],
            *per_token_strides(log_decay),
            *per_token_strides(weight),
            RELU=relu,
            REST=rest.numel() > 0,
            STORE=store,
            BLOCK_T=walk.block_t,
            BLOCK_P=walk.block_p,
        )

    grad_initial_sums, grad_initial_total = walk.run(launch)
    grad_log_decay, grad_weight = (
        (parts.sum(0) if walk.stripes > 1 else parts[0]).sum_to_size(values.shape)
        for parts, values in ((grad_log_decay, log_decay), (grad_weight, weight))
    )
    return grad_x, grad_log_decay, grad_weight, grad_initial_sums, grad_initial_total
