"""The running sum over time, `s_t = a_t s_{t-1} + x_t`, in PyTorch's operations: what the causal operators share."""

import contextlib

import torch
import torch.nn.functional as F

from .batched_gradients import one_by_one
from .documents import Documents
from .kernels.kernel_dispatch import is_exported, is_recorded, is_transformed, kernel, takes_kernels


LOOP_CHUNK = 32  # tokens that the loop on a CPU walks over, in all chunks at the same time
SHORT_LOOP_CHUNK = 8  # in sequences of less than LOOP_CHUNK² / 4 tokens
SUM_CHUNK = 32  # tokens summed by one triangular matrix product
DECAY_CHUNK = 16  # with decays, whose triangle is another for each chunk and head
EXPORTED_DECAY_CHUNK = 64  # of chunks of chunks the exporter cannot prove that every length has some


def state_dtype(x: torch.Tensor) -> torch.dtype:
    """
    The dtype of sums that are held from one segment to the next: float64, with which a stream of 3e7 tokens goes on as it
    began, and float32 on devices that have no float64.
    """
    return torch.float32 if x.device.type == "mps" else torch.float64


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Autocast would run matrix products in bfloat16 or float16, in which sums stop growing; "meta" has none."""
    device_type = x.device.type
    if not _has_autocast(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


# The compiler of PyTorch 2.11 does not know the question.
@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def scan(
    x: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial: torch.Tensor,
    documents: Documents | None = None,
    *,
    relu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `s_t = exp(log_decay_t) s_{t-1} + x_t`, from `s_0 = initial`, and from 0 where another document begins.

    No decay is ever divided by, and no sum over one document has a term of another.

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, float32 or float64, `T` > 0): the terms.
        log_decay (`torch.Tensor` of shape `[B or 1, T, K]`, dtype of `x`, or `None`): logarithms of the decays, not
            positive; each of the K is that of `D / K` consecutive channels. `None`: no decay.
        initial (`torch.Tensor` of shape `[B, D]`, [`state_dtype`]): the sum before the first token. `[B, R, D]` with
            `documents.state_ids`: that of each document.
        documents (`Documents`, *optional*): those of the tokens.
        relu (`bool`): sum `max(x, 0)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sums `[B, T, D]` in the dtype of `x`, and the last one `[B, D]` in that
        of `initial`; of each document, where each has its own, and that before it of one without tokens.
    """
    if documents is not None and documents.state_ids is not None:
        return _scan_documents(x, log_decay, initial, documents, relu)
    restarts = None if documents is None else documents.starts
    # A matrix product in reduced precision would round the sums.
    with without_autocast(x):
        is_kernel = (log_decay is not None or restarts is not None) and takes_kernels(x)
        if not is_kernel and x.device.type == "cpu" and not is_recorded() and not is_transformed():
            return _LoopScan.apply(x, log_decay, initial, restarts, relu)
        if restarts is not None:
            log_decay = restarting(x.new_zeros(1, 1, 1) if log_decay is None else log_decay, documents)
        if is_kernel:
            return kernel("decayed_sum")(x, log_decay, initial, relu, False)
        if relu:
            x = x.relu()
        if log_decay is not None:
            heads = log_decay.shape[-1]
            sizes = (EXPORTED_DECAY_CHUNK,) if is_exported() else (DECAY_CHUNK, DECAY_CHUNK)
            y, final = _scan_chunks(_to_heads(x, heads), log_decay, _to_heads(initial, heads), sizes)
            return y.flatten(-2), final.flatten(-2)
        if x.device.type == "cpu" and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return _sum_chunks(x, initial)
        y = x.cumsum(1)
        # A slice would keep the sums of the whole segment alive for as long as the state.
        return y + initial[:, None].to(y.dtype), initial + y[:, -1]


def restarting(log_decay: torch.Tensor, documents: Documents | None) -> torch.Tensor:
    """Logarithms of decays `[B or 1, T, K]` after which nothing is left where another document begins."""
    return log_decay if documents is None else torch.where(documents.starts.unsqueeze(-1), -torch.inf, log_decay)


def _scan_documents(x, log_decay, initial, documents, relu):
    """[`scan`] with one initial sum for each document `[B, R, D]`: the sums of the documents alone, and what is left of it."""
    starts, index, mask = documents
    none = initial.new_zeros(x.shape[0], x.shape[2])
    y, _ = scan(x, log_decay, none, Documents(starts), relu=relu)
    order = torch.arange(x.shape[1], device=x.device).expand_as(index)
    if mask is not None:
        order = order.masked_fill(~mask, -1)
    last = torch.full_like(initial[..., 0], -1, dtype=torch.long).scatter_reduce(1, index, order, "amax")

    def last_of_documents(tensor):
        ends = tensor.gather(1, last.clamp_min(0)[..., None].expand(-1, -1, tensor.shape[2]))
        return ends.masked_fill((last < 0)[..., None], 0).to(initial.dtype)

    ends = last_of_documents(y)
    own = initial.to(y.dtype).gather(1, index[..., None].expand(-1, -1, y.shape[2]))
    if log_decay is None:
        return y + own, initial + ends
    heads = log_decay.shape[-1]
    left, _ = scan(log_decay.expand(*index.shape, heads), None, none[:, :heads], Documents(starts))
    y = y + (_to_heads(own, heads) * left.exp().unsqueeze(-1)).flatten(2)
    left = last_of_documents(left).exp().unsqueeze(-1)
    return y, (_to_heads(initial, heads) * left).flatten(2) + ends


def _to_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    # Not `unflatten`, of which ONNX keeps the other sizes that it saw.
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


class _LoopScan(torch.autograd.Function):
    """
    A loop over the tokens of a chunk, in all chunks at the same time; then one over the chunks, for what each goes on
    from. Memory is read and written twice, and what a token adds reaches no token before it, whatever it is.
    """

    @staticmethod
    def forward(ctx, x, log_decay, initial, restarts, relu):
        y, final = _loop(x, log_decay, initial, restarts, relu)
        ctx.relu = relu
        ctx.save_for_backward(x if relu else None, log_decay, initial, restarts, None if log_decay is None else y)
        return y, final

    @staticmethod
    @one_by_one
    def backward(ctx, grad, grad_final):
        x, log_decay, initial, restarts, y = ctx.saved_tensors
        reverse_decay = None if log_decay is None else shifted(log_decay).flip(1)
        reverse_restarts = None if restarts is None else shifted(restarts).flip(1)
        grad, _ = _LoopScan.apply(grad.flip(1), reverse_decay, grad_final, reverse_restarts, False)
        grad, grad_decay, grad_initial = scan_vjp(
            grad.flip(1), y, log_decay, initial, restarts, needs_decay=ctx.needs_input_grad[1]
        )
        if ctx.relu:
            grad = torch.ops.aten.threshold_backward(grad, x, 0)
        return grad, grad_decay, grad_initial, None, None


def shifted(tensor):
    """What comes one token later, at the end nothing."""
    return F.pad(tensor[:, 1:], (0, 0) * (tensor.dim() - 2) + (0, 1))


def scan_vjp(grad, y, log_decay, initial, restarts, *, needs_decay):
    """
    The gradients of `x`, `log_decay` (`None` if not needed) and `initial` of [`scan`], whose sums were `y`, from those of
    all that each term is in, which are a sum with the same decays from the end.
    """
    if log_decay is None:
        grad_initial = grad[:, 0] if restarts is None else grad[:, 0].masked_fill(restarts[:, :1], 0)
        return grad, None, grad_initial.to(initial.dtype)
    heads = log_decay.shape[-1]
    decay = log_decay.exp()
    grad_initial = _to_heads(grad[:, 0], heads).to(initial.dtype) * decay[:, 0, :, None]
    if restarts is not None:
        grad_initial = grad_initial.masked_fill(restarts[:, 0, None, None], 0)
    grad_decay = None
    if needs_decay:
        first = (grad_initial * _to_heads(initial, heads)).sum(-1)
        later = (_to_heads(grad[:, 1:], heads) * _to_heads(y[:, :-1], heads)).sum(-1)
        grad_decay = torch.cat([first.to(y.dtype).unsqueeze(1), decay[:, 1:] * later], 1)
        if restarts is not None:
            grad_decay = grad_decay.masked_fill(restarts.unsqueeze(-1), 0)
        grad_decay = grad_decay.sum_to_size(log_decay.shape)
    return grad, grad_decay, grad_initial.flatten(1)


def _loop(x, log_decay, initial, restarts, relu):
    length = x.shape[1]
    chunk = LOOP_CHUNK if length >= LOOP_CHUNK**2 / 4 else SHORT_LOOP_CHUNK
    heads = 1 if log_decay is None else log_decay.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums, terms, carry = (_to_heads(tensor, heads) for tensor in (y, x, initial))
    _loop_within_chunks(sums, terms, None if log_decay is None else log_decay.exp(), restarts, chunk, relu)

    def last_of_chunks(tensor):
        return torch.cat([tensor[:, chunk - 1 : length - 1 : chunk], tensor[:, -1:]], 1)

    carries = torch.cat([carry.unsqueeze(1), last_of_chunks(sums).to(initial.dtype)], 1)
    reach = is_cut = None
    if log_decay is not None:
        # From the beginning of a chunk to each of its tokens: the logarithm of the decay, then the decay.
        reach = F.pad(log_decay, (0, 0, 0, -length % chunk)).unflatten(1, (-1, chunk)).cumsum(2).unsqueeze(-1)
        over = reach[:, :, -1].to(initial.dtype).exp()
        reach.exp_()
    if restarts is not None:
        is_cut = restarts.clone()
        for i in range(1, min(chunk, length)):
            part = is_cut[:, i::chunk]
            part |= is_cut[:, i - 1 :: chunk][:, : part.shape[1]]
        ends_cut = last_of_chunks(is_cut)[..., None, None]
    if reach is None and is_cut is None:
        carries = carries.cumsum(1)
    else:
        for i in range(1, carries.shape[1]):
            before = carries[:, i - 1]
            if is_cut is not None:
                before = before.masked_fill(ends_cut[:, i - 1], 0)
            if reach is None:
                carries[:, i] += before
            else:
                carries[:, i].addcmul_(over[:, i - 1], before)

    before = carries[:, :-1].to(y.dtype)
    for i in range(min(chunk, length)):
        part = sums[:, i::chunk]
        apart = None if is_cut is None else is_cut[:, i::chunk]
        if apart is not None:
            kept = part[apart]
        if reach is None:
            part += before[:, : part.shape[1]]
        else:
            part.addcmul_(reach[:, : part.shape[1], i], before[:, : part.shape[1]])
        if apart is not None:
            part[apart] = kept
    return y, carries[:, -1].flatten(1).clone()


def _loop_within_chunks(sums, terms, decay, restarts, chunk, relu=False):
    """Write to `sums` those of `terms` `[B, T, K, p]` from the beginning of their chunk of tokens; `decay` `[B, T, K]`."""
    for i in range(min(chunk, terms.shape[1])):
        term, part = terms[:, i::chunk], sums[:, i::chunk]
        if relu:
            term = term.relu()
        if i == 0:
            part.copy_(term)
            continue
        before = sums[:, i - 1 :: chunk][:, : term.shape[1]]
        if decay is None:
            torch.add(term, before, out=part)
        else:
            torch.addcmul(term, decay[:, i::chunk, :, None], before, out=part)
        # Not by zeros as decays, times which an infinity before them would be no number.
        if restarts is not None and restarts[:, i::chunk].any():
            begins = restarts[:, i::chunk]
            part[begins] = term[begins]


def _sum_chunks(x, initial):
    """The running sum `[B, T, D]` by products with a lower triangle of ones, as a compiler likes it."""
    triangle = torch.ones(SUM_CHUNK, SUM_CHUNK, dtype=x.dtype, device=x.device).tril()
    y = triangle @ to_chunks(x, SUM_CHUNK)
    carries = torch.cat([initial[:, None], y[:, :, -1].to(initial.dtype)], 1).cumsum(1)
    y = y + carries[:, :-1, None].to(y.dtype)
    return y.flatten(1, 2)[:, : x.shape[1]], carries[:, -1].clone()


def _scan_chunks(x, log_decay, initial, sizes):
    """
    [`scan`] of `x` `[B, T, K, p]` by matrix products: within chunks, and for what they go on from, within chunks of
    chunks, of the `sizes` given, and at last over all that is left; so every length has the same graph.
    """
    length = x.shape[1]
    if not sizes:
        x, log_decay = x.to(initial.dtype), log_decay.to(initial.dtype)
        y = decay_weights(log_decay) @ x.transpose(1, 2)
        reach = log_decay.cumsum(1).exp().transpose(1, 2).unsqueeze(-1)
        y = (y + reach * initial.unsqueeze(2)).transpose(1, 2)
        return y, y[:, -1].clone()
    x, log_decay = (to_chunks(tensor, sizes[0]) for tensor in (x, log_decay))
    y = (decay_weights(log_decay) @ x.transpose(2, 3)).transpose(2, 3)
    reach = log_decay.cumsum(2)
    # Of the last, shorter chunk too: its end is filled with nothing that does not decay.
    ends, final = _scan_chunks(y[:, :, -1], reach[:, :, -1], initial, sizes[1:])
    before = torch.cat([initial.unsqueeze(1), ends], 1)[:, :-1].to(y.dtype)
    y = y + reach.exp().unsqueeze(-1) * before.unsqueeze(2)
    return first_tokens(y.flatten(1, 2), length), final


def decay_weights(log_decay):
    """The decay `[..., K, C, C]` from each token to those after it, of `log_decay` `[..., C, K]`."""
    log_decay = log_decay.transpose(-1, -2)
    length = log_decay.shape[-1]
    # As sums over the tokens in between: the difference of two sums from the beginning would cancel.
    ordered = torch.ones(length, length, dtype=torch.bool, device=log_decay.device).tril()
    between = torch.where(ordered.tril(-1), log_decay.unsqueeze(-1), 0).cumsum(-2)
    return torch.where(ordered, between.exp(), 0)


def to_chunks(x, size):
    """`[B, T, ...]` as `[B, n, size, ...]`, at least two chunks, the end filled with zeros."""
    # Written so that a compiler meets one quotient, as remainders make its symbolic shapes several times slower; and
    # never 1, of which it would make a case of its own.
    num_chunks = (x.shape[1] + 2 * size - 1) // size
    # By a constant, as ONNX keeps the padding that it saw.
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, 2 * size - 1))
    return first_tokens(x, num_chunks * size).reshape(x.shape[0], num_chunks, size, *x.shape[2:])


def first_tokens(x, length):
    # Not a slice, for which the exporter cannot prove that the end is there to be cut off.
    return x.index_select(1, torch.arange(length, device=x.device))
