"""Token statistics, the linear-time operator of the Token Statistics Transformer (arXiv 2412.17810).

Letters as in the paper: w is the projected token, K the heads, p the channels of a head, Π (`membership`) the soft
assignment of every token to the heads, m (`moment`) the second moment of w in a head, weighted by Π.

Both operators come twice: the paper's formula in plain tensor operations (`*_reference`), and the same with an
analytic backward that recomputes what it needs, so that training keeps w and little else.
"""

import functools
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F


MIN_SECOND_MOMENT = 1e-12  # floor of D in the causal operator, of the norm (not its square) in the bidirectional one
MIN_MEMBERSHIP = 1e-8

CHUNK = 32  # tokens summed by one triangular matrix product
BLOCK = 512  # tokens worked on at a time, a multiple of CHUNK; backward needs the sums at the start of each block
CPU_ELEMENTS = 2**19  # on a CPU sequences are worked on together up to this size: temporaries stay in the cache

# One set of registered operators for each copy of this file: a checkpoint on the Hub may bring its own.
_NAMESPACE = re.sub(r"\W", "_", __name__)


class TokenStatisticsState(NamedTuple):
    """The running sums of `causal_token_statistics` after a prefix of the sequence, float32 (float64 for float64 w).

    Attributes:
        second_moment: Σ w², [B, K, p].
        weighted_second_moment: Σ Π w², [B, K, p].
        membership: Σ Π, [B, K].
    """

    second_moment: torch.Tensor
    weighted_second_moment: torch.Tensor
    membership: torch.Tensor


def token_statistics(
    w: torch.Tensor,
    temperature: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """Bidirectional token statistics self-attention (arXiv 2412.17810), every sum over the N tokens:

        ŵ      = w / max(‖w‖₂ over the tokens, 1e-12)
        Π      = softmax over heads of temp_k · Σ_c ŵ²[k, n, c]
        m[k,c] = Σ_n Π[k,n] w²[k,n,c] / (Σ_n Π[k,n] + 1e-8)
        out    = -w · Π / (1 + m)

    Args:
        w: [B, K, N, p], any float dtype; fastest as the transposed view of a contiguous [B, N, K, p].
        temperature: [K] or [K, 1], float.
        attention_mask: [B, N] bool or 0/1, True at real tokens. The others leave every sum, whatever they hold.
        dropout_p: probability of dropping an entry of 1 / (1 + m); for training only.

    Returns:
        [B, K, N, p] in w's dtype, the transposed view of a contiguous [B, N, K, p], zero at masked tokens.

    Raises:
        ValueError: a shape, a dtype or `dropout_p` does not fit.
    """
    mask = _validate(w, temperature, attention_mask, dropout_p)
    keep = _dropout(w, dropout_p, tokens=1)
    if _use_formula(w):
        return _bidirectional_formula(w, temperature, mask, keep, dropout_p)
    temperature = temperature.reshape(-1).to(_statistics_dtype(w))
    return _bidirectional_forward(w.transpose(1, 2), temperature, mask, keep, dropout_p).transpose(1, 2)


def causal_token_statistics(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    *,
    initial_state: TokenStatisticsState | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, TokenStatisticsState]:
    """Causal token statistics self-attention (arXiv 2412.17810), every sum over the tokens u ≤ t of t's document:

        D_t   = max(Σ_u w_u², 1e-12)
        Π_t   = softmax over heads of temp_k · Σ_c (w_t² / D_t + β[k, t])
        m_t   = Σ_u Π_u w_u² / (Σ_u Π_u + 1e-8)
        out_t = -w_t · Π_t / (1 + m_t)

    Args:
        w: [B, K, T, p], any float dtype; fastest as the transposed view of a contiguous [B, T, K, p].
        temperature: [K] or [K, 1], float.
        position_bias: β at the position of each token, [K, T] or [B, K, T], float; None for no bias.
        initial_state: the sums to go on from; they belong to the document of the first real token.
        attention_mask: [B, T] bool or 0/1, True at real tokens. The others leave every sum, whatever they hold.
        document_ids: [B, T] integers; every sum restarts where the id changes from one real token to the next.
        dropout_p: probability of dropping an entry of 1 / (1 + m); for training only.

    Returns:
        The output [B, K, T, p] in w's dtype, the transposed view of a contiguous [B, T, K, p], zero at masked tokens;
        and the sums after the last real token.

    Raises:
        ValueError: a shape, a dtype or `dropout_p` does not fit.
    """
    mask = _validate_causal(w, temperature, position_bias, initial_state, attention_mask, document_ids, dropout_p)
    batch, heads, length, channels = w.shape
    segments = _segments(document_ids, mask)
    keep = _dropout(w, dropout_p, tokens=length)
    if _use_formula(w):
        return _causal_formula(w, temperature, position_bias, initial_state, mask, segments, keep, dropout_p)
    dtype = _statistics_dtype(w)
    if position_bias is not None:
        position_bias = position_bias.to(dtype).mT.expand(batch, length, heads)
    if initial_state is None:
        initial = w.new_zeros(batch, heads * (2 * channels + 1), dtype=dtype)
    else:
        initial = torch.cat([sums.flatten(1) for sums in initial_state], 1)
    out, final, _ = _causal_forward(
        w.transpose(1, 2), temperature.reshape(-1).to(dtype), position_bias, initial, mask, segments, keep, dropout_p
    )
    return out.transpose(1, 2), _unpack_state(final, heads, channels)


def token_membership(
    w: torch.Tensor, temperature: torch.Tensor, *, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Π of `token_statistics`, which has the equation and the arguments.

    Returns:
        [B, K, N] in the statistics' dtype (float32; float64 for float64 w), zero at masked tokens.

    Raises:
        ValueError: a shape or a dtype does not fit.
    """
    mask = _validate(w, temperature, attention_mask)
    return _membership(*_squares(w, temperature, mask), mask)


def causal_token_membership(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    *,
    initial_state: TokenStatisticsState | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Π of `causal_token_statistics`, which has the equation and the arguments.

    Returns:
        [B, K, T] in the statistics' dtype (float32; float64 for float64 w), zero at masked tokens.

    Raises:
        ValueError: a shape or a dtype does not fit.
    """
    mask = _validate_causal(w, temperature, position_bias, initial_state, attention_mask, document_ids)
    w2, temperature = _squares(w, temperature, mask)
    second_moment = _running_sum(w2, initial_state and initial_state.second_moment, _segments(document_ids, mask))
    return _causal_membership(w2, second_moment, temperature, position_bias, mask)


def token_statistics_reference(
    w: torch.Tensor,
    temperature: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """`token_statistics` as the paper writes it; autograd keeps every intermediate."""
    mask = _validate(w, temperature, attention_mask, dropout_p)
    return _bidirectional_formula(w, temperature, mask, _dropout(w, dropout_p, tokens=1), dropout_p)


def causal_token_statistics_reference(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    *,
    initial_state: TokenStatisticsState | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, TokenStatisticsState]:
    """`causal_token_statistics` as the paper writes it; autograd keeps every intermediate, documents cost O(T²)."""
    mask = _validate_causal(w, temperature, position_bias, initial_state, attention_mask, document_ids, dropout_p)
    segments = _segments(document_ids, mask)
    keep = _dropout(w, dropout_p, tokens=w.shape[2])
    return _causal_formula(w, temperature, position_bias, initial_state, mask, segments, keep, dropout_p)


def _use_formula(w):
    """Few tokens (a decode step) are cheapest in plain operations, and an exported graph may hold nothing else."""
    return w.shape[2] <= 1 or torch.compiler.is_exporting() or torch.jit.is_tracing()


def _bidirectional_formula(w, temperature, mask, keep, dropout_p):
    w2, temperature = _squares(w, temperature, mask)
    membership = _membership(w2, temperature, mask).unsqueeze(-1)
    moment = (membership * w2).sum(2, keepdim=True) / (membership.sum(2, keepdim=True) + MIN_MEMBERSHIP)
    return _output(w, mask, membership, moment, keep, dropout_p)


def _causal_formula(w, temperature, position_bias, initial_state, mask, segments, keep, dropout_p):
    w2, temperature = _squares(w, temperature, mask)
    initial = (None, None, None) if initial_state is None else initial_state
    second_moment = _running_sum(w2, initial[0], segments)
    membership = _causal_membership(w2, second_moment, temperature, position_bias, mask)
    weighted = _running_sum(membership.unsqueeze(-1) * w2, initial[1], segments)
    total = _running_sum(membership, initial[2], segments)
    moment = weighted / (total + MIN_MEMBERSHIP).unsqueeze(-1)
    out = _output(w, mask, membership.unsqueeze(-1), moment, keep, dropout_p)
    if w.shape[2] > 0:
        return out, TokenStatisticsState(second_moment[:, :, -1], weighted[:, :, -1], total[:, :, -1])
    if initial_state is None:
        initial_state = TokenStatisticsState(w2.sum(2), w2.sum(2), w2.sum((2, 3)))
    return out, initial_state


def _squares(w, temperature, mask):
    """w² and the temperature as [K, 1], in the statistics' dtype."""
    dtype = _statistics_dtype(w)
    return _real_tokens(w, mask).to(dtype).square(), temperature.reshape(-1, 1).to(dtype)


def _membership(w2, temperature, mask):
    second_moment = w2.sum(2, keepdim=True).clamp_min(MIN_SECOND_MOMENT**2)
    return _softmax_over_heads(temperature * (w2 / second_moment).sum(-1), mask)


def _causal_membership(w2, second_moment, temperature, position_bias, mask):
    score = (w2 / second_moment.clamp_min(MIN_SECOND_MOMENT)).sum(-1)
    if position_bias is not None:
        score = score + w2.shape[-1] * _real_tokens(position_bias.to(w2.dtype), mask)
    return _softmax_over_heads(temperature * score, mask)


def _softmax_over_heads(logits, mask):
    membership = logits.softmax(1)
    return membership if mask is None else membership * mask.unsqueeze(1)


def _output(w, mask, membership, moment, keep, dropout_p):
    suppression = 1 / (1 + moment)
    if keep is not None:
        suppression = suppression * keep.transpose(1, 2) / (1 - dropout_p)
    return (-_real_tokens(w, mask).to(moment.dtype) * membership * suppression).to(w.dtype)


def _real_tokens(x, mask):
    """x [B, K, N, p] or [.., K, N] with zeros, whatever it holds, at masked tokens."""
    if mask is None:
        return x
    masked = ~mask.unsqueeze(1)
    return x.masked_fill(masked if x.ndim < 4 else masked.unsqueeze(-1), 0.0)


def _running_sum(x, initial, segments):
    """Sums of x [B, K, T, ...] up to each token, restarted at every segment; `initial` [B, K, ...] opens segment 0."""
    if segments is None:
        running = x.cumsum(2)
        return running if initial is None else running + initial.unsqueeze(2)
    # One cumulative sum, less its value at the restart, would leave the rounding of earlier documents behind.
    same = (segments.unsqueeze(2) == segments.unsqueeze(1)).tril().unsqueeze(1).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        running = (same @ x.flatten(3)).reshape(x.shape) if x.ndim == 4 else (same @ x.unsqueeze(-1)).squeeze(-1)
    if initial is None:
        return running
    first = (segments == 0).reshape(x.shape[0], 1, -1, *[1] * (x.ndim - 3))
    return running + first * initial.unsqueeze(2)


def _segments(document_ids, mask):
    """The number of restarts up to each token, [B, T]; a masked token is in the segment of the real one before it."""
    if document_ids is None or document_ids.shape[1] <= 1:
        return None
    ids = document_ids
    if mask is not None:
        position = torch.arange(ids.shape[1], device=ids.device)
        last_real = torch.where(mask, position, -1).cummax(1).values
        # Nothing restarts before the first real token.
        first_real = mask.to(torch.int64).argmax(1, keepdim=True)
        ids = ids.gather(1, torch.maximum(last_real, first_real))
    return F.pad(ids[:, 1:] != ids[:, :-1], (1, 0)).cumsum(1)


def _dropout(w, dropout_p, tokens):
    """Which entries of 1 / (1 + m) dropout keeps, [B, tokens, K, p] bool; None without dropout."""
    if dropout_p == 0.0:
        return None
    shape = (w.shape[0], tokens, w.shape[1], w.shape[3])
    return torch.empty(shape, dtype=torch.bool, device=w.device).bernoulli_(1 - dropout_p)


def _statistics_dtype(w):
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def _unpack_state(packed, heads, channels):
    second_moment, weighted, membership = packed.split((heads * channels, heads * channels, heads), 1)
    shape = (heads, channels)
    return TokenStatisticsState(second_moment.unflatten(1, shape), weighted.unflatten(1, shape), membership)


class _BlockSums:
    """Running sums over a block of n chunks of C tokens in g sequences, and their adjoint.

    A triangular matrix product sums within a chunk. The sums carried from chunk to chunk are added in the
    statistics' dtype: as a factor of a matrix product, which users may run in TF32, they would stop growing.
    """

    def __init__(self, shape, segments, previous, like):
        """shape (g, n, C); segments [g, n, C] or None; previous [g] is the segment of the sums carried in."""
        g, n, c = shape
        self.segmented = segments is not None
        if self.segmented:
            ends = torch.cat([previous.unsqueeze(1), segments[..., -1]], 1)
            within = (segments.unsqueeze(3) == segments.unsqueeze(2)).tril()
            self.within = within.to(like.dtype).flatten(0, 1)
            self.opening = (segments == ends[:, :-1, None]).to(like.dtype).unsqueeze(-1)
            self.across = (ends.unsqueeze(2) == ends.unsqueeze(1)).tril().to(like.dtype)
        else:
            self.within = like.new_ones(c, c).tril().expand(g * n, c, c)
            self.opening = like.new_ones(1, 1, c, 1)
        self.closing = self.within[:, -1].reshape(g, n, c, 1) if self.segmented else self.opening

    def prefix(self, x, state):
        """x [g, n, C, f] and the sums before the block [g, f]: the sums up to every token, those after the block."""
        carried = self._carry(torch.cat([state.unsqueeze(1), self._total(self.closing, x)], 1))
        running = self.opening * carried[:, :-1].unsqueeze(2)
        running.flatten(0, 1).baddbmm_(self.within, x.flatten(0, 1))
        return running, carried[:, -1]

    def suffix(self, grad, state_grad):
        """The adjoint of `prefix`: gradients of its two results to gradients of its two arguments."""
        carried = self._carry(torch.cat([self._total(self.opening, grad), state_grad.unsqueeze(1)], 1), adjoint=True)
        running = self.closing * carried[:, 1:].unsqueeze(2)
        running.flatten(0, 1).baddbmm_(self.within.mT, grad.flatten(0, 1))
        return running, carried[:, 0]

    def _total(self, weight, x):
        if not self.segmented:
            return x.sum(2)
        return (weight.flatten(0, 1).mT @ x.flatten(0, 1)).view(x.shape[0], x.shape[1], -1)

    def _carry(self, x, adjoint=False):
        if not self.segmented:
            return x.flip(1).cumsum(1).flip(1) if adjoint else x.cumsum(1)
        across = self.across.mT if adjoint else self.across
        return (across.unsqueeze(-1) * x.unsqueeze(1)).sum(2)


class _Block(NamedTuple):
    """What forward computes of n chunks of C tokens in g sequences, [g, n, C, ...]; backward computes it again."""

    sums: _BlockSums
    valid: torch.Tensor | None  # [g or 1, n, C], False at masked tokens and padding
    w: torch.Tensor  # [.., K, p], zero where not valid
    w2: torch.Tensor  # [.., K, p]
    second_moment: torch.Tensor  # D [.., K, p]
    ratio: torch.Tensor  # w² / D [.., K, p]
    score: torch.Tensor  # the logits, not yet times temperature [.., K]
    membership: torch.Tensor  # Π [.., K], zero where not valid
    weighted: torch.Tensor  # Σ Π w² [.., K, p]
    total: torch.Tensor  # Σ Π + 1e-8 [.., K]
    final: torch.Tensor  # the packed sums after the block [g, K (2 p + 1)]


def _causal_block(rows, start, stop, w, temperature, position_bias, initial, mask, segments):
    heads, channels = w.shape[2:]
    width = heads * channels
    length = w.shape[1]
    w = _chunked(w, rows, start, stop).to(initial.dtype)
    shape = w.shape[:3]
    position = torch.arange(start, start + shape[1] * CHUNK, device=w.device)
    valid = None
    if mask is not None:
        valid = _chunked(mask, rows, start, stop)
    elif len(position) > stop - start:
        valid = (position < stop).view(1, -1, CHUNK)
    w = _fill_invalid(w, valid)
    if segments is None:
        sums = _BlockSums(shape, None, None, w)
    else:
        # Padding goes on in the last segment, as the state after the block belongs to it.
        inside = segments[rows][:, position.clamp_max(length - 1)].view(shape)
        sums = _BlockSums(shape, inside, segments[rows, max(start - 1, 0)], w)

    w2 = w.square()
    second_moment, second_final = sums.prefix(w2.flatten(3), initial[:, :width])
    second_moment = second_moment.unflatten(3, (heads, channels)).clamp_min_(MIN_SECOND_MOMENT)
    ratio = w2 / second_moment
    score = ratio.sum(-1)
    if position_bias is not None:
        score.add_(_fill_invalid(_chunked(position_bias, rows, start, stop), valid), alpha=channels)
    membership = _fill_invalid((score * temperature).softmax(-1), valid)

    weighted = w.new_empty(*shape, width + heads)
    torch.mul(w2, membership.unsqueeze(-1), out=weighted[..., :width].unflatten(3, (heads, channels)))
    weighted[..., width:] = membership
    weighted, weighted_final = sums.prefix(weighted, initial[:, width:])
    return _Block(
        sums,
        valid,
        w,
        w2,
        second_moment,
        ratio,
        score,
        membership,
        weighted[..., :width].unflatten(3, (heads, channels)),
        weighted[..., width:].add_(MIN_MEMBERSHIP),
        torch.cat([second_final, weighted_final], 1),
    )


def _chunked(x, rows, start, stop):
    """Tokens start to stop of x [B, T, ...] in chunks, [g, n, C, ...], padded with zeros."""
    x = x[rows, start:stop]
    padding = -x.shape[1] % CHUNK
    if padding:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding))
    return x.unflatten(1, (-1, CHUNK))


def _fill_invalid(x, valid):
    """x [g, n, C, ...] with zeros, whatever it holds, where not valid."""
    return x if valid is None else x.masked_fill(~valid.reshape(*valid.shape, *[1] * (x.ndim - 3)), 0.0)


def _unchunked(x, start, stop):
    return x.flatten(1, 2)[:, : stop - start]


def _row_groups(w):
    """Slices of sequences to work on together."""
    size = w.shape[0]
    if w.device.type == "cpu":
        size = max(1, CPU_ELEMENTS // (min(w.shape[1], BLOCK) * w.shape[2] * w.shape[3]))
    return [slice(row, row + size) for row in range(0, w.shape[0], size)]


def _without_autocast(function):
    """Sums in bfloat16 or float16 stop growing; autocast would put the matrix products into them."""

    @functools.wraps(function)
    def wrapped(w, *args):
        with torch.autocast(w.device.type, enabled=False):
            return function(w, *args)

    return wrapped


@torch.library.custom_op(f"{_NAMESPACE}::causal_token_statistics_forward", mutates_args=())
@_without_autocast
def _causal_forward(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    initial: torch.Tensor,
    mask: torch.Tensor | None,
    segments: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w and keep [B, T, K, p], temperature [K], position_bias [B, T, K], initial [B, K (2 p + 1)] packed.

    Returns out [B, T, K, p], the final sums packed, and those at the start of each block.
    """
    out, final, starts = _causal_forward_fake(w, temperature, position_bias, initial, mask, segments, keep, dropout_p)
    length = w.shape[1]
    for rows in _row_groups(w):
        state = initial[rows]
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            starts[rows, start // BLOCK] = state
            block = _causal_block(rows, start, stop, w, temperature, position_bias, state, mask, segments)
            state = block.final
            # 1 / (1 + m) with m = weighted / total
            scaled = block.w * (block.membership * -block.total).unsqueeze(-1)
            if keep is not None:
                scaled.mul_(_chunked(keep, rows, start, stop)).div_(1 - dropout_p)
            suppressor = block.weighted.add_(block.total.unsqueeze(-1))
            torch.div(_unchunked(scaled, start, stop), _unchunked(suppressor, start, stop), out=out[rows, start:stop])
        final[rows] = state
    return out, final, starts


@_causal_forward.register_fake
def _causal_forward_fake(w, temperature, position_bias, initial, mask, segments, keep, dropout_p):
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    blocks = (w.shape[1] + BLOCK - 1) // BLOCK
    return out, torch.empty_like(initial), initial.new_empty(w.shape[0], blocks, initial.shape[1])


@torch.library.custom_op(f"{_NAMESPACE}::causal_token_statistics_backward", mutates_args=())
@_without_autocast
def _causal_backward(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    starts: torch.Tensor,
    mask: torch.Tensor | None,
    segments: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
    grad_out: torch.Tensor,
    grad_final: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of w, temperature, position_bias (also where there is none) and the initial sums."""
    grad_w, grad_temperature, grad_bias, grad_initial = _causal_backward_fake(
        w, temperature, position_bias, starts, mask, segments, keep, dropout_p, grad_out, grad_final
    )
    grad_temperature.zero_()
    length, heads, channels = w.shape[1:]
    width = heads * channels
    for rows in _row_groups(w):
        grad_state = grad_final[rows]
        for start in reversed(range(0, length, BLOCK)):
            stop = min(start + BLOCK, length)
            initial = starts[rows, start // BLOCK]
            block = _causal_block(rows, start, stop, w, temperature, position_bias, initial, mask, segments)
            membership, total = block.membership, block.total
            gain = (membership * total).unsqueeze(-1)
            # 1 / (1 + m) = total / suppressor, so out = -w * gain / suppressor
            suppressor = block.weighted.add_(total.unsqueeze(-1))
            grad = _fill_invalid(_chunked(grad_out, rows, start, stop).to(starts.dtype), block.valid)
            if keep is not None:
                grad = grad * _chunked(keep, rows, start, stop) / (1 - dropout_p)
            grad = grad / suppressor

            grad_suppressor = grad * block.w
            grad_membership = grad_suppressor.sum(-1)
            grad_suppressor.div_(suppressor)
            grad_sums = grad.new_empty(*grad.shape[:3], width + heads)
            torch.mul(grad_suppressor, gain, out=grad_sums[..., :width].unflatten(3, (heads, channels)))
            grad_sums[..., width:] = membership * (total * grad_suppressor.sum(-1) - grad_membership)
            grad_sums, grad_weighted_initial = block.sums.suffix(grad_sums, grad_state[:, width:])
            grad_weighted = grad_sums[..., :width].unflatten(3, (heads, channels))

            grad_membership = (block.w2 * grad_weighted).sum(-1) + grad_sums[..., width:] - total * grad_membership
            centred = grad_membership - (membership * grad_membership).sum(-1, keepdim=True)
            grad_logit = membership * centred
            grad_temperature += (grad_logit * block.score).sum((0, 1, 2))
            grad_score = grad_logit * temperature
            grad_bias[rows, start:stop] = _unchunked(grad_score, start, stop) * channels

            # Minus the gradient of w² as a numerator; times the ratio, that of D, which its floor stops.
            grad_ratio = -grad_score.unsqueeze(-1) / block.second_moment
            grad_second = torch.ops.aten.threshold_backward(
                block.ratio.mul_(grad_ratio), block.second_moment, MIN_SECOND_MOMENT
            )
            grad_second, grad_second_initial = block.sums.suffix(grad_second.flatten(3), grad_state[:, :width])
            grad_w2 = grad_second.unflatten(3, (heads, channels)).sub_(grad_ratio)
            grad_w2.addcmul_(grad_weighted, membership.unsqueeze(-1))
            grad.mul_(-gain).addcmul_(grad_w2, block.w, value=2)
            grad_w[rows, start:stop] = _unchunked(grad, start, stop)
            grad_state = torch.cat([grad_second_initial, grad_weighted_initial], 1)
        grad_initial[rows] = grad_state
    return grad_w, grad_temperature, grad_bias, grad_initial


@_causal_backward.register_fake
def _causal_backward_fake(
    w, temperature, position_bias, starts, mask, segments, keep, dropout_p, grad_out, grad_final
):
    return (
        torch.empty_like(w, memory_format=torch.contiguous_format),
        torch.empty_like(temperature),
        starts.new_empty(w.shape[:3]),
        torch.empty_like(grad_final, memory_format=torch.contiguous_format),
    )


def _causal_setup_context(ctx, inputs, output):
    *tensors, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, output[2])


def _causal_vjp(ctx, grad_out, grad_final, _):
    w, temperature, position_bias, initial, mask, segments, keep, starts = ctx.saved_tensors
    if torch.is_grad_enabled():
        bias = None if position_bias is None else position_bias.mT
        state = _unpack_state(initial, *w.shape[2:])
        out, final = _causal_formula(w.transpose(1, 2), temperature, bias, state, mask, segments, keep, ctx.dropout_p)
        results = (out.transpose(1, 2), torch.cat([sums.flatten(1) for sums in final], 1))
        grads = _differentiable_vjp(
            results, (w, temperature, position_bias, initial), (grad_out, grad_final), ctx.needs_input_grad
        )
    else:
        grads = list(
            _causal_backward(
                w, temperature, position_bias, starts, mask, segments, keep, ctx.dropout_p, grad_out, grad_final
            )
        )
        if position_bias is None:
            grads[2] = None
    return *grads, None, None, None, None


def _differentiable_vjp(outputs, inputs, grads, needed):
    """Gradients that can be differentiated again, through the formula."""
    wanted = [x for x, needs in zip(inputs, needed, strict=False) if needs]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
    return [next(found) if needs else None for _, needs in zip(inputs, needed, strict=False)]


torch.library.register_autograd(_causal_forward, _causal_vjp, setup_context=_causal_setup_context)


@torch.library.custom_op(f"{_NAMESPACE}::token_statistics_forward", mutates_args=())
def _bidirectional_forward(
    w: torch.Tensor,
    temperature: torch.Tensor,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """w [B, N, K, p], temperature [K], keep [B, 1, K, p]; returns out [B, N, K, p]."""
    out = _bidirectional_forward_fake(w, temperature, mask, keep, dropout_p)
    for rows in _row_groups(w):
        x, w2, _, _, membership, moment, _ = _bidirectional_rows(rows, w, temperature, mask)
        suppression = -1 / (1 + moment)
        if keep is not None:
            suppression = suppression * keep[rows] / (1 - dropout_p)
        torch.mul(torch.mul(x, membership.unsqueeze(-1), out=w2), suppression, out=out[rows])
    return out


@_bidirectional_forward.register_fake
def _bidirectional_forward_fake(w, temperature, mask, keep, dropout_p):
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def _bidirectional_rows(rows, w, temperature, mask):
    """What forward computes for some sequences; backward computes it again."""
    w = w[rows].to(temperature.dtype)
    if mask is not None:
        w = w.masked_fill(~mask[rows, :, None, None], 0.0)
    w2 = w.square()
    second_moment = w2.sum(1, keepdim=True).clamp_min_(MIN_SECOND_MOMENT**2)
    score = (w2 / second_moment).sum(-1)
    membership = (score * temperature).softmax(-1)
    if mask is not None:
        membership.mul_(mask[rows].unsqueeze(-1))
    total = membership.sum(1, keepdim=True).add_(MIN_MEMBERSHIP).unsqueeze(-1)
    moment = (w2 * membership.unsqueeze(-1)).sum(1, keepdim=True) / total
    return w, w2, second_moment, score, membership, moment, total


@torch.library.custom_op(f"{_NAMESPACE}::token_statistics_backward", mutates_args=())
def _bidirectional_backward(
    w: torch.Tensor,
    temperature: torch.Tensor,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
    grad_out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of w and temperature."""
    grad_w, grad_temperature = _bidirectional_backward_fake(w, temperature, mask, keep, dropout_p, grad_out)
    grad_temperature.zero_()
    for rows in _row_groups(w):
        x, w2, second_moment, score, membership, moment, total = _bidirectional_rows(rows, w, temperature, mask)
        share = membership.unsqueeze(-1)
        suppression = 1 / (1 + moment)
        kept = suppression if keep is None else suppression * keep[rows] / (1 - dropout_p)
        grad = grad_out[rows].to(x.dtype)
        if mask is not None:
            grad = grad.masked_fill(~mask[rows, :, None, None], 0.0)

        grad_product = grad * x
        grad_moment = (grad_product * share).sum(1, keepdim=True) * kept * suppression
        grad_weighted = grad_moment / total
        grad_total = -(grad_weighted * moment).sum(-1)
        grad_membership = (w2 * grad_weighted).sub_(grad_product.mul_(kept)).sum(-1) + grad_total
        centred = grad_membership - (membership * grad_membership).sum(-1, keepdim=True)
        grad_logit = membership * centred
        grad_temperature += (grad_logit * score).sum((0, 1))
        grad_ratio = (grad_logit * temperature).unsqueeze(-1) / second_moment
        grad_second = (grad_ratio * w2).sum(1, keepdim=True) / -second_moment
        grad_second.masked_fill_(second_moment <= MIN_SECOND_MOMENT**2, 0.0)
        grad_w2 = grad_ratio.add_(grad_second).addcmul_(share, grad_weighted)
        torch.addcmul(grad * share * -kept, grad_w2, x, value=2, out=grad_w[rows])
    return grad_w, grad_temperature


@_bidirectional_backward.register_fake
def _bidirectional_backward_fake(w, temperature, mask, keep, dropout_p, grad_out):
    return torch.empty_like(w, memory_format=torch.contiguous_format), torch.empty_like(temperature)


def _bidirectional_setup_context(ctx, inputs, output):
    *tensors, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors)


def _bidirectional_vjp(ctx, grad_out):
    w, temperature, mask, keep = ctx.saved_tensors
    if torch.is_grad_enabled():
        out = _bidirectional_formula(w.transpose(1, 2), temperature, mask, keep, ctx.dropout_p).transpose(1, 2)
        grads = _differentiable_vjp((out,), (w, temperature), (grad_out,), ctx.needs_input_grad)
    else:
        grads = _bidirectional_backward(w, temperature, mask, keep, ctx.dropout_p, grad_out)
    return *grads, None, None, None


torch.library.register_autograd(_bidirectional_forward, _bidirectional_vjp, setup_context=_bidirectional_setup_context)


def _validate(w, temperature, attention_mask, dropout_p=0.0):
    """Checks the arguments of both operators; returns the mask as bool."""
    if w.ndim != 4 or not w.is_floating_point():
        raise ValueError(f"w must be a float tensor [batch, heads, tokens, channels], got {w.dtype} {tuple(w.shape)}.")
    batch, heads, length, _ = w.shape
    if temperature.shape not in ((heads,), (heads, 1)) or not temperature.is_floating_point():
        raise ValueError(
            f"temperature must be a float tensor [{heads}] or [{heads}, 1], one value for each head of w, "
            f"got {temperature.dtype} {tuple(temperature.shape)}."
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}.")
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask must be [batch, tokens] = [{batch}, {length}] as w, got {tuple(attention_mask.shape)}."
        )
    return attention_mask.bool()


def _validate_causal(w, temperature, position_bias, initial_state, attention_mask, document_ids, dropout_p=0.0):
    mask = _validate(w, temperature, attention_mask, dropout_p)
    batch, heads, length, channels = w.shape
    if position_bias is not None and (
        position_bias.shape not in ((heads, length), (batch, heads, length)) or not position_bias.is_floating_point()
    ):
        raise ValueError(
            f"position_bias must be None or a float tensor [{heads}, {length}] or [{batch}, {heads}, {length}], the "
            f"bias of each token of w in each head, got {position_bias.dtype} {tuple(position_bias.shape)}."
        )
    if document_ids is not None and (document_ids.shape != (batch, length) or document_ids.is_floating_point()):
        raise ValueError(
            f"document_ids must be integers [batch, tokens] = [{batch}, {length}] as w, "
            f"got {document_ids.dtype} {tuple(document_ids.shape)}."
        )
    if initial_state is not None:
        shapes = ((batch, heads, channels), (batch, heads, channels), (batch, heads))
        for name, sums, shape in zip(TokenStatisticsState._fields, initial_state, shapes, strict=True):
            if sums.shape != shape or sums.dtype != _statistics_dtype(w):
                raise ValueError(
                    f"initial_state.{name} must be {_statistics_dtype(w)} {shape}, "
                    f"got {sums.dtype} {tuple(sums.shape)}."
                )
    return mask
