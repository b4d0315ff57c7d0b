"""Token statistics in blocks of tokens, with an analytic backward that computes again what it needs: training keeps w and
little else. Letters as in `token_statistics_reference`.
"""

import functools
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..documents import Documents
from ..precision import without_autocast
from .token_statistics_reference import (
    MIN_MEMBERSHIP,
    MIN_SECOND_MOMENT,
    TokenStatisticsState,
    bidirectional_formula,
    causal_formula,
)


CHUNK_SIZE = 16  # tokens summed by one triangular matrix product
BLOCK_SIZE = 256  # tokens worked on at a time, whole chunks; backward starts from the sums before each block
CPU_BLOCK_ELEMENTS = 2**19  # sequences share a block on a CPU up to this size: its temporaries stay in the cache

# Registered operators are global, and a checkpoint may bring its own copy of this file.
_NAMESPACE = re.sub(r"\W", "_", __name__)


def pack(state):
    """The state as one tensor `[B, K (2p + 1)]`."""
    return torch.cat([sums.flatten(1) for sums in state], dim=1)


def unpack(packed, num_heads, head_dim):
    width = num_heads * head_dim
    second_moment, weighted, membership = packed.split((width, width, num_heads), dim=1)
    shape = (num_heads, head_dim)
    return TokenStatisticsState(second_moment.unflatten(1, shape), weighted.unflatten(1, shape), membership)


class _BlockSums:
    """
    Running sums over a block of n chunks of C tokens in g sequences, and their adjoint.

    A triangular matrix product sums within a chunk. What is carried from chunk to chunk is added in its own dtype: as a
    factor of a matrix product, which users may run in TF32 or less, a long sum would stop growing. What belongs to another
    document is selected away, as zero times NaN is NaN.
    """

    def __init__(self, w, ids, previous_id):
        """`w` `[g, n, C, ...]`, the documents `[g, n, C]` or `None`, and that `[g]` of the sums before the block."""
        g, n, c = w.shape[:3]
        self.num_chunks = n
        self.across = self.opening = self.closing = None
        if ids is None:
            self.within = w.new_ones(c, c).tril().expand(g * n, c, c)
        else:
            ends = torch.cat([previous_id.unsqueeze(1), ids[..., -1]], dim=1)
            self.across = (ends.unsqueeze(2) == ends.unsqueeze(1)).tril()
            within = (ids.unsqueeze(3) == ids.unsqueeze(2)).tril()
            self.within = within.to(w.dtype).flatten(0, 1)
            # The tokens of the document before their chunk, and those of the document in which it ends.
            self.opening = (ids == ends[:, :-1, None]).unsqueeze(-1)
            self.closing = within[:, :, -1].unsqueeze(-1)

    def prefix(self, x, initial):
        """`x` `[g, n, C, f]` and the sums before the block `[g, f]`: the sums up to each token, those after the block."""
        running = self._multiply(self.within, x)
        carried = torch.cat([initial.unsqueeze(1), running[:, :, -1].to(initial.dtype)], dim=1)
        carried = carried.cumsum(1) if self.across is None else self._sum_seen(self.across, carried)
        running += self._select(self.opening, carried[:, :-1].to(running.dtype).unsqueeze(2))
        return running, carried[:, -1]

    def suffix(self, grad, grad_final):
        """The adjoint of `prefix`: the gradients of its two results to those of its two arguments."""
        running = self._multiply(self.within.transpose(-1, -2), grad)
        first = running[:, :, 0] if self.opening is None else self._select(self.opening[:, :, 0], running[:, :, 0])
        carried = torch.cat([first, grad_final.unsqueeze(1)], dim=1)
        if self.across is None:
            carried = carried.flip(1).cumsum(1).flip(1)
        else:
            carried = self._sum_seen(self.across.transpose(-1, -2), carried)
        running += self._select(self.closing, carried[:, 1:].unsqueeze(2))
        return running, carried[:, 0]

    def _multiply(self, terms, x):
        """For each token the sum of the `terms` `[g · n, C, C]`, zeros and ones, of `x` `[g, n, C, f]`."""
        x = x.flatten(0, 1)
        y = terms.bmm(x)
        if self.across is not None and not y.sum().isfinite():
            is_bad = ~x.isfinite()
            y = terms.bmm(x.masked_fill(is_bad, 0)).masked_fill_(terms.bmm(is_bad.to(x.dtype)) > 0, torch.nan)
        return y.unflatten(0, (-1, self.num_chunks))

    @staticmethod
    def _select(where, x):
        return x if where is None else torch.where(where, x, 0)

    @staticmethod
    def _sum_seen(seen, x):
        return torch.where(seen.unsqueeze(-1), x.unsqueeze(1), 0).sum(2)


class _Block(NamedTuple):
    """What forward computes of n chunks of C tokens in g sequences `[g, n, C, ...]`, and backward computes again."""

    sums: _BlockSums
    valid: torch.Tensor | None  # [g or 1, n, C], False where masked or beyond the end
    w: torch.Tensor  # [..., K, p], zero where not valid
    w2: torch.Tensor  # [..., K, p]
    second_moment: torch.Tensor  # D [..., K, p]
    ratio: torch.Tensor  # w² / D [..., K, p]
    score: torch.Tensor  # logits before the temperature [..., K]
    membership: torch.Tensor  # Π [..., K], zero where not valid
    weighted: torch.Tensor  # Σ Π w² [..., K, p]
    total: torch.Tensor  # Σ Π + 1e-8 [..., K]
    final: torch.Tensor  # the packed sums after the block [g, K (2p + 1)]


def _compute_block(rows, start, stop, w, temperature, position_bias, initial, mask, ids):
    """The tokens from start to stop of the sequences `rows`, after the packed sums `initial` `[g, K (2p + 1)]`."""
    length, *heads = w.shape[1:]
    num_heads, head_dim = heads
    width = num_heads * head_dim
    w = _chunked(w, rows, start, stop).to(temperature.dtype)
    position = torch.arange(start, start + w.shape[1] * CHUNK_SIZE, device=w.device)
    valid = None
    if mask is not None:
        valid = _chunked(mask, rows, start, stop)
    elif position.shape[0] > stop - start:
        valid = (position < stop).view(1, -1, CHUNK_SIZE)
    w = _zero_invalid(w, valid)
    previous_id = None
    if ids is not None:
        previous_id = ids[rows, max(start - 1, 0)]
        # The end is of the last document, so that the final sums are.
        ids = ids[rows][:, position.clamp_max(length - 1)].view(w.shape[:3])
    sums = _BlockSums(w, ids, previous_id)

    w2 = w.square()
    second_moment, final_second = sums.prefix(w2.flatten(3), initial[:, :width])
    second_moment = second_moment.unflatten(3, heads).clamp_min_(MIN_SECOND_MOMENT)
    ratio = w2 / second_moment
    score = ratio.sum(-1)
    if position_bias is not None:
        score.add_(_zero_invalid(_chunked(position_bias, rows, start, stop), valid), alpha=head_dim)
    membership = _zero_invalid((score * temperature).softmax(-1), valid)

    weighted = w.new_empty(*w.shape[:3], width + num_heads)
    torch.mul(w2, membership.unsqueeze(-1), out=weighted[..., :width].unflatten(3, heads))
    weighted[..., width:] = membership
    weighted, final_weighted = sums.prefix(weighted, initial[:, width:])
    total = weighted[..., width:] + MIN_MEMBERSHIP
    weighted = weighted[..., :width].unflatten(3, heads)
    final = torch.cat([final_second, final_weighted], dim=1)
    return _Block(sums, valid, w, w2, second_moment, ratio, score, membership, weighted, total, final)


def _chunked(x, rows, start, stop):
    """The tokens from start to stop of `x` `[B, T, ...]` in chunks `[g, n, C, ...]`, the end filled with zeros."""
    x = x[rows, start:stop]
    padding = -x.shape[1] % CHUNK_SIZE
    if padding:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding))
    return x.unflatten(1, (-1, CHUNK_SIZE))


def _unchunked(x, start, stop):
    return x.flatten(1, 2)[:, : stop - start]


def _zero_invalid(x, valid):
    return x if valid is None else x.masked_fill(~valid.reshape(*valid.shape, *[1] * (x.ndim - 3)), 0.0)


def _row_groups(w, length):
    """The sequences of `w` `[B, T, K, p]` to compute together, `length` tokens at a time."""
    batch_size = group_size = w.shape[0]
    if w.device.type == "cpu":
        group_size = max(1, CPU_BLOCK_ELEMENTS // (length * w.shape[2] * w.shape[3]))
    return [slice(row, row + group_size) for row in range(0, batch_size, group_size)]


def _without_autocast(function):
    @functools.wraps(function)
    def wrapped(w, *args):
        with without_autocast(w):
            return function(w, *args)

    return wrapped


@torch.library.custom_op(f"{_NAMESPACE}::causal_token_statistics_forward", mutates_args=())
@_without_autocast
def causal_forward(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    initial: torch.Tensor,
    mask: torch.Tensor | None,
    ids: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    `w`, `keep` `[B, T, K, p]`, `temperature` `[K]`, whose dtype is that of the statistics, `position_bias` `[B, T, K]`,
    `initial` `[B, K (2p + 1)]`, `ids` of documents `[B, T]`: the output like `w`, the packed sums before every block and,
    last, after the sequence `[B, blocks + 1, K (2p + 1)]`, and those after the sequence in the dtype of `initial`.
    """
    out, sums, final = _causal_forward_fake(w, temperature, position_bias, initial, mask, ids, keep, dropout_p)
    length = w.shape[1]

    # A function, so that the temporaries of a block are free for the next one.
    def forward_block(rows, index):
        start, stop = index * BLOCK_SIZE, min((index + 1) * BLOCK_SIZE, length)
        block = _compute_block(rows, start, stop, w, temperature, position_bias, final[rows], mask, ids)
        sums[rows, index + 1] = final[rows] = block.final
        # 1 / (1 + m) = total / (weighted + total)
        out_block = block.w * (block.membership * -block.total).unsqueeze(-1)
        if keep is not None:
            out_block.mul_(_chunked(keep, rows, start, stop)).div_(1 - dropout_p)
        divisor = block.weighted.add_(block.total.unsqueeze(-1))
        operands = (_unchunked(x, start, stop) for x in (out_block, divisor))
        torch.div(*operands, out=out[rows, start:stop])

    sums[:, 0] = final[:] = initial
    for rows in _row_groups(w, min(length, BLOCK_SIZE)):
        for index in range(sums.shape[1] - 1):
            forward_block(rows, index)
    return out, sums, final


@causal_forward.register_fake
def _causal_forward_fake(w, temperature, position_bias, initial, mask, ids, keep, dropout_p):
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    num_blocks = (w.shape[1] + BLOCK_SIZE - 1) // BLOCK_SIZE
    sums = temperature.new_empty(w.shape[0], num_blocks + 1, initial.shape[1])
    return out, sums, torch.empty_like(initial, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{_NAMESPACE}::causal_token_statistics_backward", mutates_args=())
@_without_autocast
def _causal_backward(
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
    """The gradients of `w`, `temperature`, `position_bias` (even of none) and `initial`."""
    grads = _causal_backward_fake(
        w, temperature, position_bias, sums, mask, ids, keep, dropout_p, grad_out, grad_final
    )
    grad_w, grad_temperature, grad_bias, grad_initial = grads
    grad_temperature.zero_()
    length, *heads = w.shape[1:]
    num_heads, head_dim = heads
    width = num_heads * head_dim

    # A function, so that the temporaries of a block are free for the next one.
    def backward_block(rows, index, grad_state):
        start, stop = index * BLOCK_SIZE, min((index + 1) * BLOCK_SIZE, length)
        block = _compute_block(rows, start, stop, w, temperature, position_bias, sums[rows, index], mask, ids)
        membership, total = block.membership, block.total

        # out = -w · gain / divisor, with gain = Π · total and divisor = weighted + total
        gain = (membership * total).unsqueeze(-1)
        divisor = block.weighted + total.unsqueeze(-1)
        grad = _zero_invalid(_chunked(grad_out, rows, start, stop).to(sums.dtype), block.valid) / divisor
        if keep is not None:
            grad.mul_(_chunked(keep, rows, start, stop)).div_(1 - dropout_p)
        grad_divisor = grad * block.w
        grad_gain = -grad_divisor.sum(-1)
        grad_divisor.div_(divisor)

        grad_sums = grad.new_empty(*grad.shape[:3], width + num_heads)
        torch.mul(grad_divisor, gain, out=grad_sums[..., :width].unflatten(3, heads))
        grad_sums[..., width:] = -membership * block.weighted.mul_(grad_divisor).sum(-1)
        grad_sums, grad_weighted_initial = block.sums.suffix(grad_sums, grad_state[:, width:])
        grad_weighted = grad_sums[..., :width].unflatten(3, heads)

        grad_membership = (block.w2 * grad_weighted).sum(-1) + grad_sums[..., width:] + total * grad_gain
        grad_logit = membership * (grad_membership - (membership * grad_membership).sum(-1, keepdim=True))
        grad_temperature.add_((grad_logit * block.score).sum((0, 1, 2)))
        grad_score = grad_logit * temperature
        grad_bias[rows, start:stop] = _unchunked(grad_score * head_dim, start, stop)

        # Of the ratio, by w²; times minus the ratio it is by D, unless D is at its floor.
        grad_w2 = grad_score.unsqueeze(-1) / block.second_moment
        minus_grad_second = torch.ops.aten.threshold_backward(
            block.ratio.mul_(grad_w2), block.second_moment, MIN_SECOND_MOMENT
        )
        minus_grad_second, minus_grad_initial = block.sums.suffix(minus_grad_second.flatten(3), -grad_state[:, :width])
        grad_w2.sub_(minus_grad_second.unflatten(3, heads)).addcmul_(grad_weighted, membership.unsqueeze(-1))
        operands = (_unchunked(x, start, stop) for x in (grad.mul_(-gain), grad_w2, block.w))
        torch.addcmul(*operands, value=2, out=grad_w[rows, start:stop])
        return torch.cat([-minus_grad_initial, grad_weighted_initial], dim=1)

    for rows in _row_groups(w, min(length, BLOCK_SIZE)):
        grad_state = grad_final[rows].to(sums.dtype)
        for index in reversed(range(sums.shape[1] - 1)):
            grad_state = backward_block(rows, index, grad_state)
        grad_initial[rows] = grad_state
    return grads


@_causal_backward.register_fake
def _causal_backward_fake(w, temperature, position_bias, sums, mask, ids, keep, dropout_p, grad_out, grad_final):
    return (
        torch.empty_like(w, memory_format=torch.contiguous_format),
        torch.empty_like(temperature),
        sums.new_empty(w.shape[:3]),
        torch.empty_like(grad_final, memory_format=torch.contiguous_format),
    )


def register_causal_autograd(forward, backward):
    """Give [`causal_forward`], or a kernel with its arguments and results, the gradients that `backward` computes."""

    def setup_context(ctx, inputs, output):
        *tensors, ctx.dropout_p = inputs
        ctx.save_for_backward(*tensors, output[1])

    def vjp(ctx, grad_out, _, grad_final):
        w, temperature, position_bias, initial, mask, ids, keep, sums = ctx.saved_tensors
        if torch.is_grad_enabled():
            bias = None if position_bias is None else position_bias.transpose(-1, -2)
            state = unpack(initial, *w.shape[2:])
            documents = None if ids is None else Documents(ids, F.pad(ids.diff(dim=1), (1, 0)) != 0)
            out, final = causal_formula(
                w.transpose(1, 2), temperature, bias, state, mask, None, documents, keep, ctx.dropout_p
            )
            inputs = (w, temperature, position_bias, initial)
            grads = _formula_vjp(ctx, inputs, (out.transpose(1, 2), pack(final)), (grad_out, grad_final))
        else:
            arguments = w, temperature, position_bias, sums, mask, ids, keep, ctx.dropout_p
            grads = backward(*arguments, grad_out, grad_final)
            if position_bias is None:
                grads = (*grads[:2], None, grads[3])
        return *grads, None, None, None, None

    forward.register_autograd(vjp, setup_context=setup_context)


def _formula_vjp(ctx, inputs, outputs, grads):
    """The gradients of an operator's first inputs, through its formula so that they have gradients in turn."""
    needed = ctx.needs_input_grad[: len(inputs)]
    wanted = [x for x, is_needed in zip(inputs, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
    return [next(found) if is_needed else None for is_needed in needed]


register_causal_autograd(causal_forward, _causal_backward)


@torch.library.custom_op(f"{_NAMESPACE}::token_statistics_forward", mutates_args=())
def bidirectional_forward(
    w: torch.Tensor,
    temperature: torch.Tensor,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """`w` `[B, N, K, p]`, `temperature` `[K]`, `keep` `[B, 1, K, p]`: the output like `w`."""
    out = _bidirectional_forward_fake(w, temperature, mask, keep, dropout_p)
    for rows in _row_groups(w, w.shape[1]):
        statistics = _compute_rows(rows, w, temperature, mask)
        factor = -1 / (1 + statistics.moment)
        if keep is not None:
            factor = factor * keep[rows] / (1 - dropout_p)
        out[rows] = (statistics.w * statistics.membership.unsqueeze(-1)).mul_(factor)
    return out


@bidirectional_forward.register_fake
def _bidirectional_forward_fake(w, temperature, mask, keep, dropout_p):
    return torch.empty_like(w, memory_format=torch.contiguous_format)


class _Rows(NamedTuple):
    """What forward computes of g sequences `[g, N, ...]`, and backward computes again."""

    w: torch.Tensor  # [g, N, K, p], zero where masked
    w2: torch.Tensor  # [g, N, K, p]
    second_moment: torch.Tensor  # max(‖w‖₂, 1e-12)² [g, 1, K, p]
    score: torch.Tensor  # logits before the temperature [g, N, K]
    membership: torch.Tensor  # Π [g, N, K], zero where masked
    total: torch.Tensor  # Σ Π + 1e-8 [g, 1, K, 1]
    moment: torch.Tensor  # m [g, 1, K, p]


def _compute_rows(rows, w, temperature, mask):
    """The sequences `rows` of `w` `[B, N, K, p]`."""
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
    return _Rows(w, w2, second_moment, score, membership, total, moment)


@torch.library.custom_op(f"{_NAMESPACE}::token_statistics_backward", mutates_args=())
def _bidirectional_backward(
    w: torch.Tensor,
    temperature: torch.Tensor,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
    grad_out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `w` and `temperature`."""
    grad_w, grad_temperature = _bidirectional_backward_fake(w, temperature, mask, keep, dropout_p, grad_out)
    grad_temperature.zero_()
    for rows in _row_groups(w, w.shape[1]):
        x, w2, second_moment, score, membership, total, moment = _compute_rows(rows, w, temperature, mask)
        share = membership.unsqueeze(-1)
        suppression = 1 / (1 + moment)
        kept = suppression if keep is None else suppression * keep[rows] / (1 - dropout_p)
        grad = grad_out[rows].to(x.dtype)
        if mask is not None:
            grad = grad.masked_fill(~mask[rows, :, None, None], 0.0)

        grad_product = grad * x
        grad_weighted = (grad_product * share).sum(1, keepdim=True) * kept * suppression / total
        grad_total = -(grad_weighted * moment).sum(-1)
        grad_membership = (w2 * grad_weighted).sub_(grad_product.mul_(kept)).sum(-1) + grad_total
        grad_logit = membership * (grad_membership - (membership * grad_membership).sum(-1, keepdim=True))
        grad_temperature += (grad_logit * score).sum((0, 1))

        # Of the ratio, by w²; with the sum over the tokens it is by ‖w‖₂², unless that is at its floor.
        grad_w2 = (grad_logit * temperature).unsqueeze(-1) / second_moment
        grad_second = (grad_w2 * w2).sum(1, keepdim=True) / -second_moment
        grad_second.masked_fill_(second_moment <= MIN_SECOND_MOMENT**2, 0.0)
        grad_w2.add_(grad_second).addcmul_(share, grad_weighted)
        grad_w[rows] = (grad * share).mul_(-kept).addcmul_(grad_w2, x, value=2)
    return grad_w, grad_temperature


@_bidirectional_backward.register_fake
def _bidirectional_backward_fake(w, temperature, mask, keep, dropout_p, grad_out):
    return torch.empty_like(w, memory_format=torch.contiguous_format), torch.empty_like(temperature)


def register_bidirectional_autograd(forward, backward):
    """Give [`bidirectional_forward`], or a kernel with its arguments, the gradients that `backward` computes."""

    def setup_context(ctx, inputs, output):
        *tensors, ctx.dropout_p = inputs
        ctx.save_for_backward(*tensors)

    def vjp(ctx, grad_out):
        w, temperature, mask, keep = ctx.saved_tensors
        if torch.is_grad_enabled():
            out = bidirectional_formula(w.transpose(1, 2), temperature, mask, keep, ctx.dropout_p).transpose(1, 2)
            grads = _formula_vjp(ctx, (w, temperature), (out,), (grad_out,))
        else:
            grads = backward(w, temperature, mask, keep, ctx.dropout_p, grad_out)
        return *grads, None, None, None

    forward.register_autograd(vjp, setup_context=setup_context)


register_bidirectional_autograd(bidirectional_forward, _bidirectional_backward)
