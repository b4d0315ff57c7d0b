"""The running sum over time, `s_t = a_t s_{t-1} + x_t`, in PyTorch's operations: what the causal operators share."""

import torch
import torch.nn.functional as F

from ..dispatch import is_exported, is_recorded, is_transformed, kernel_of
from ..documents import Documents
from ..precision import without_autocast


LOOP_CHUNK = 32  # tokens that the loop on a CPU walks over, in all chunks at the same time
SHORT_LOOP_CHUNK = 8  # in sequences of less than LOOP_CHUNK² / 4 tokens
SUM_CHUNK = 32  # tokens summed by one triangular matrix product
DECAY_CHUNK = 16  # with decays, whose triangle is another for each chunk and head
EXPORTED_DECAY_CHUNK = 64  # of chunks of chunks the exporter cannot prove that every length has some


def scan(
    x: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial: torch.Tensor,
    documents: Documents | None = None,
    relu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `s_t = exp(log_decay_t) s_{t-1} + x_t`, from `s_0 = initial`, and from 0 where another document begins.

    No decay is ever divided by, and no sum over one document has a term of another.

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, float32 or float64, `T` > 0): the terms.
        log_decay (`torch.Tensor` of shape `[B or 1, T, K]`, dtype of `x`, or `None`): logarithms of the decays, not
            positive; each of the K is that of `D / K` consecutive channels. `None`: no decay.
        initial (`torch.Tensor` of shape `[B, D]`, [`state_dtype`]): the sum before the first token.
        documents (`Documents`, *optional*): those of the tokens.
        relu (`bool`): sum `max(x, 0)`.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sums `[B, T, D]` in the dtype of `x`, and the last one `[B, D]` in that
        of `initial`.
    """
    # A matrix product in reduced precision would round the sums.
    with without_autocast(x):
        kernel = kernel_of(scan, x)
        if kernel is not None:
            return kernel(x, log_decay, initial, documents, relu)
        # A loop is the fastest on a CPU; a graph that serves every length has none, and a transform takes plain operations.
        if x.device.type == "cpu" and not is_recorded() and not is_transformed(x):
            return _LoopScan.apply(x, log_decay, initial, documents, relu)
        x = x.relu() if relu else x
        if log_decay is None and documents is None:
            if x.device.type == "cpu" and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
                return _sum_chunks(x, initial)
            y = x.cumsum(1)
            # A slice would keep the sums of the whole segment alive for as long as the state.
            return y + initial[:, None].to(y.dtype), initial + y[:, -1]
        if log_decay is None:
            log_decay = x.new_zeros(1, x.shape[1], 1)
        starts = None if documents is None else documents.starts
        heads = log_decay.shape[-1]
        sizes = (EXPORTED_DECAY_CHUNK,) if is_exported() else (DECAY_CHUNK, DECAY_CHUNK)
        y, final = _scan_chunks(to_heads(x, heads), log_decay, to_heads(initial, heads), starts, sizes)
        return flat(y), flat(final)


def advanced(state: torch.Tensor, increment: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """`a S + increment`, of `loss` `a - 1`: in float32 a decay of 1 - 1e-6 is exact to one digit, its loss to seven."""
    return state + torch.addcmul(increment, loss, state)


def join_segments(increments: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """
    The states before each segment of a sequence and after the last, `[n + 1, *heads, *sizes]`.

    Args:
        increments `[n, *heads, *sizes]`: the states after segments that were summed from zero.
        log_decay `[n, *heads]`: of each whole segment, `-inf` where a document begins.
        state: before the first segment, as large as an increment.
    """
    losses = log_decay.expm1()[(..., *[None] * (increments.dim() - log_decay.dim()))]
    state = state.reshape(increments.shape[1:])
    if torch.is_grad_enabled() or is_transformed(increments):
        states = [state]
        for loss, increment in zip(losses, increments, strict=True):
            states.append(advanced(states[-1], increment, loss))
        return torch.stack(states)
    states = increments.new_empty(len(increments) + 1, *state.shape)
    states[0] = state
    for i, increment in enumerate(increments):
        torch.addcmul(increment, losses[i], states[i], out=states[i + 1])
        states[i + 1] += states[i]
    return states


# Neither `unflatten`, of which ONNX keeps the other sizes that it saw, nor `flatten`, which batched gradients do not know.
def to_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


class _LoopScan(torch.autograd.Function):
    """[`scan`] by [`_loop`], which keeps its results for backward only where a decay needs them."""

    @staticmethod
    def forward(ctx, x, log_decay, initial, documents, relu):
        y, final = _loop(x, log_decay, initial, documents, relu)
        ctx.documents, ctx.relu = documents, relu
        ctx.save_for_backward(x if relu else None, log_decay, initial, None if log_decay is None else y)
        return y, final

    @staticmethod
    def backward(ctx, grad, grad_final):
        x, log_decay, initial, y = ctx.saved_tensors
        decay = None if log_decay is None else shifted(log_decay).flip(1)
        reverse = None
        if ctx.documents is not None:
            reverse = Documents(ctx.documents.ids.flip(1), shifted(ctx.documents.starts).flip(1))
        grad, _ = scan(grad.flip(1), decay, grad_final, reverse)
        starts = None if ctx.documents is None else ctx.documents.starts
        grads = scan_vjp(grad.flip(1), y, log_decay, initial, starts, needs_decay=ctx.needs_input_grad[1])
        grad = torch.ops.aten.threshold_backward(grads[0], x, 0) if ctx.relu else grads[0]
        return grad, *grads[1:], None, None


def shifted(tensor):
    """What comes one token later, at the end nothing."""
    return F.pad(tensor[:, 1:], (0, 0) * (tensor.dim() - 2) + (0, 1))


def scan_vjp(grad, y, log_decay, initial, starts, *, needs_decay):
    """
    The gradients of `x`, `log_decay` (`None` if not needed) and `initial` of [`scan`], whose sums were `y`, from those of
    all that each term is in, which are a sum with the same decays from the end.
    """
    if log_decay is None:
        return grad, None, grad[:, 0].to(initial.dtype)
    heads = log_decay.shape[-1]
    decay = log_decay.exp()
    grad_initial = to_heads(grad[:, 0], heads).to(initial.dtype) * decay[:, 0, :, None]
    grad_decay = None
    if needs_decay:
        first = (grad_initial * to_heads(initial, heads)).sum(-1)
        later = (to_heads(grad[:, 1:], heads) * to_heads(y[:, :-1], heads)).sum(-1)
        grad_decay = torch.cat([first.to(y.dtype).unsqueeze(1), decay[:, 1:] * later], 1)
        if starts is not None:
            grad_decay = grad_decay.masked_fill(starts.unsqueeze(-1), 0)
        grad_decay = grad_decay.sum_to_size(log_decay.shape)
    return grad, grad_decay, flat(grad_initial)


def _loop(x, log_decay, initial, documents, relu):
    """
    [`scan`] by loops: memory is read and written twice, and a term reaches no token before it, whatever its value.

    1. Sum within chunks of tokens: a loop over the tokens of a chunk, in all chunks at the same time.
    2. Sum over the chunks, in the dtype of the state: the sum before each chunk.
    3. Add to each token the sum before its chunk, decayed on the way, unless another document has begun.
    """
    length = x.shape[1]
    chunk = LOOP_CHUNK if length >= LOOP_CHUNK**2 / 4 else SHORT_LOOP_CHUNK
    chunk = min(chunk, length)
    heads = 1 if log_decay is None else log_decay.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums, terms, carry = (to_heads(tensor, heads) for tensor in (y, x, initial))
    decay = None if log_decay is None else log_decay.exp()
    starts = None if documents is None else documents.starts

    # 1. Within chunks.
    for i in range(chunk):
        term, part = terms[:, i::chunk], sums[:, i::chunk]
        term = term.relu() if relu else term
        if i == 0:
            part.copy_(term)
            continue
        before = sums[:, i - 1 :: chunk][:, : term.shape[1]]
        if decay is None:
            torch.add(term, before, out=part)
        else:
            torch.addcmul(term, decay[:, i::chunk, :, None], before, out=part)
        # Selected, as an infinity times a decay of zero is no number.
        if starts is not None and starts[:, i::chunk].any():
            begins = starts[:, i::chunk]
            part[begins] = term[begins]

    # 2. Over the chunks.
    carries = torch.cat([sums[:, chunk - 1 : length - 1 : chunk], sums[:, -1:]], 1).to(initial.dtype)
    carries = torch.cat([carry.unsqueeze(1), carries], 1)
    reach = ids = None
    if log_decay is not None:
        # From the beginning of a chunk to each of its tokens: the logarithm of the decay, then the decay.
        reach = F.pad(log_decay, (0, 0, 0, -length % chunk)).unflatten(1, (-1, chunk)).cumsum(2).unsqueeze(-1)
        through = reach[:, :, -1].to(initial.dtype).exp()
        reach.exp_()
    if documents is not None:
        # Of the last token before each chunk, and of its own last token.
        ids = documents.ids
        ids_before = torch.cat([ids[:, :1], ids[:, chunk - 1 : length - 1 : chunk]], 1)
        ends_apart = (torch.cat([ids_before[:, 1:], ids[:, -1:]], 1) != ids_before)[..., None, None]
        through = None if reach is None else through.masked_fill(ends_apart, 0)
    if reach is None and ids is None:
        carries = carries.cumsum(1)
    else:
        for i in range(1, carries.shape[1]):
            before = carries[:, i - 1]
            if ids is not None:
                before = before.masked_fill(ends_apart[:, i - 1], 0)
            if reach is None:
                carries[:, i] += before
            else:
                carries[:, i].addcmul_(through[:, i - 1], before)

    # 3. To each token.
    before = carries[:, :-1].to(y.dtype)
    for i in range(chunk):
        part = sums[:, i::chunk]
        count = part.shape[1]
        apart = None if ids is None else ids[:, i::chunk] != ids_before[:, :count]
        kept = None if apart is None else part[apart]
        if reach is None:
            part += before[:, :count]
        else:
            part.addcmul_(reach[:, :count, i], before[:, :count])
        if apart is not None:
            part[apart] = kept
    return y, flat(carries[:, -1]).clone()


def _sum_chunks(x, initial):
    """The running sum `[B, T, D]` by products with a lower triangle of ones, as a compiler likes it."""
    triangle = torch.ones(SUM_CHUNK, SUM_CHUNK, dtype=x.dtype, device=x.device).tril()
    y = triangle @ to_chunks(x, SUM_CHUNK)
    carries = torch.cat([initial[:, None], y[:, :, -1].to(initial.dtype)], 1).cumsum(1)
    y = y + carries[:, :-1, None].to(y.dtype)
    return y.flatten(1, 2)[:, : x.shape[1]], carries[:, -1].clone()


def _scan_chunks(x, log_decay, initial, starts, sizes):
    """
    [`scan`] of `x` `[B, T, K, p]` by matrix products: within chunks, and for the sums before them, within chunks of chunks,
    of the `sizes` given, and at last over all that is left; so every length has the same graph.
    """
    # 1. Cut into chunks of C tokens; at last all tokens are one, in the dtype of the state.
    length = x.shape[1]
    if sizes:
        x, log_decay = (to_chunks(tensor, sizes[0]) for tensor in (x, log_decay))
        starts = None if starts is None else to_chunks(starts, sizes[0])
    else:
        x, log_decay = (tensor.to(initial.dtype).unsqueeze(1) for tensor in (x, log_decay))
        starts = None if starts is None else starts.unsqueeze(1)

    # 2. Sum within chunks.
    if starts is None:
        y = decay_weights(log_decay) @ x.transpose(2, 3)
    else:
        ids = starts.long().cumsum(2)
        seen = (ids.unsqueeze(3) == ids.unsqueeze(2)).tril().unsqueeze(2)
        # Zero times NaN is NaN: what is no finite number is left out, and makes one of the tokens that see it.
        is_finite = x.isfinite()
        y = decay_weights(log_decay, seen) @ torch.where(is_finite, x, 0).transpose(2, 3)
        reached = seen.to(x.dtype) @ (~is_finite).to(x.dtype).transpose(2, 3)
        y = y.masked_fill(reached > 0, torch.nan)
    y = y.transpose(2, 3)

    # 3. Sum over the chunks; of the last, shorter chunk too: its end is filled with nothing that does not decay.
    reach = log_decay.cumsum(2)
    if sizes:
        begun = None if starts is None else starts.any(2)
        ends, final = _scan_chunks(y[:, :, -1], reach[:, :, -1], initial, begun, sizes[1:])
        before = torch.cat([initial.unsqueeze(1), ends], 1)[:, :-1].to(y.dtype)
    else:
        before, final = initial.unsqueeze(1), None

    # 4. Add to each token the sum before its chunk.
    before = reach.exp().unsqueeze(-1) * before.unsqueeze(2)
    if starts is not None:
        before = before.masked_fill((ids > 0)[..., None, None], 0)
    y = (y + before).reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
    return (first_tokens(y, length), final) if sizes else (y, y[:, -1].clone())


def decay_weights(log_decay, seen=None):
    """
    The decay `[..., K, C, C]` from each token to those after it, of `log_decay` `[..., C, K]`, and zero but where a token
    is `seen` `[..., C, C]`.
    """
    log_decay = log_decay.transpose(-1, -2)
    ordered = torch.ones(log_decay.shape[-1], log_decay.shape[-1], dtype=torch.bool, device=log_decay.device).tril()
    # As sums over the tokens in between: the difference of two sums from the beginning would cancel.
    between = torch.where(ordered.tril(-1), log_decay.unsqueeze(-1), 0).cumsum(-2)
    return torch.where(ordered if seen is None else seen, between.exp(), 0)


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
