"""The keyed sum by PyTorch's operations: chunks of matrix products, and one decode step."""

import torch
from torch.autograd.function import once_differentiable

from ..kernels.kernel_dispatch import is_recorded, is_transformed


CHUNK = 32  # tokens whose scores are one matrix
BLOCK = 32 * CHUNK  # tokens that are worked on at once; bounds memory


def keyed_sum_step(values, keys, queries, log_decay, state):
    """
    One token: `S = a S + k vᵀ`, `y = qᵀ S`.

    Args:
        values `[B, K, P]`, keys and queries `[B, G, N]`, log_decay `[B, K]`, state `[B, K, N, P]`: of one dtype.

    Returns:
        `tuple`: y `[B, K, P]` and S.
    """
    heads = values.shape[1] // keys.shape[1]
    keys, queries = (t.repeat_interleave(heads, 1) if heads > 1 else t for t in (keys, queries))
    state = torch.addcmul(state * log_decay.exp()[..., None, None], keys.unsqueeze(3), values.unsqueeze(2))
    return (queries.unsqueeze(2) @ state).squeeze(2), state


def keyed_sum_chunks(values, keys, queries, log_decay, state, starts=None):
    """
    All tokens, chunk by chunk.

    Args:
        values (`[B, T, K, P]`), keys, queries (`[B, T, G, N]`), log_decay (`[B, T, K]`): of one dtype, float32 or
            float64, and finite.
        state (`[B, K, N, P]`): before the first token.
        starts (`[B, T]`, bool, *optional*): where a document begins, whose first decay is not read.

    Returns:
        `tuple`: the outputs `[B, T, K, P]` and the state after the last token.
    """
    arguments = values, keys, queries, log_decay, state, starts
    if torch.is_grad_enabled() and not is_recorded() and not is_transformed():
        return _KeyedSum.apply(*arguments)
    return _forward(*arguments)[:2]


def _forward(values, keys, queries, log_decay, state, starts):
    """The outputs, the last state, and the state before each block."""
    outputs, states = [], []
    parts = _blocks(values, keys, queries, log_decay, starts)
    for block in parts:
        states.append(state)
        v, k, q, decay = _chunks(*block, heads=log_decay.shape[2])
        inner = _chunk_states(_increments(v, k, decay), decay.through, state)
        y = ((q @ k.mT) * decay.within) @ v + decay.into[..., None] * (q @ inner[:, :, :, :-1])
        state = inner[:, :, :, -1].flatten(1, 2)
        outputs.append(_tokens(y, block[0].shape[1]))
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state, states


class _KeyedSum(torch.autograd.Function):
    """Keeps the inputs and one state a block, and computes the scores again for the gradients."""

    @staticmethod
    def forward(ctx, values, keys, queries, log_decay, state, starts):
        y, final, states = _forward(values, keys, queries, log_decay, state, starts)
        ctx.save_for_backward(values, keys, queries, log_decay, state, starts, *states)
        return y, final

    @staticmethod
    def backward(ctx, grad_y, grad_state):
        *inputs, starts = ctx.saved_tensors[:6]
        if torch.is_grad_enabled():  # The gradient has gradients in turn.
            with torch.enable_grad():
                leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in inputs]
                outputs = _forward(*leaves, starts)[:2]
            return *torch.autograd.grad(outputs, leaves, (grad_y, grad_state), create_graph=True), None
        return *_vjp(grad_y, grad_state, *inputs, starts, ctx.saved_tensors[6:]), None


def _vjp(grad_y, grad_state, values, keys, queries, log_decay, state, starts, states):
    """The gradients of the first five inputs, block by block from the last one."""
    grads = [[], [], [], []]
    blocks = list(_blocks(values, keys, queries, log_decay, starts))
    grad_blocks = grad_y.split(BLOCK, 1)
    for block, grad_block, before in zip(reversed(blocks), reversed(grad_blocks), reversed(states), strict=True):
        length = block[0].shape[1]
        v, k, q, decay = _chunks(*block, heads=log_decay.shape[2])
        dy = _split(grad_block, v.shape[4], v.shape[1])
        inner = _chunk_states(_increments(v, k, decay), decay.through, before)
        # 1. The gradients of the states, from the last chunk to the first.
        reads = (decay.into[..., None] * q).mT @ dy
        after = _chunk_states(reads.flip(3), decay.through.flip(3), grad_state).flip(3)
        grad_after, grad_state = after[:, :, :, 1:], after[:, :, :, 0].flatten(1, 2)
        # 2. Within a chunk.
        scores = q @ k.mT
        grad_weighted = (dy @ v.mT) * decay.within
        weighted = scores * decay.within
        changes = grad_weighted * scores
        grad_v = weighted.mT @ dy
        grad_q, grad_k = grad_weighted @ k, grad_weighted.mT @ q
        # 3. What comes from earlier chunks and what goes to later ones.
        from_state = decay.into[..., None] * (dy @ inner[:, :, :, :-1].mT)
        to_state = decay.out[..., None] * (v @ grad_after.mT)
        grad_v = grad_v + decay.out[..., None] * (k @ grad_after)
        grad_q, grad_k = grad_q + from_state, grad_k + to_state
        # 4. The decays, which act on the score of each pair and on the states.
        arrivals, departures = (q * from_state).sum(-1), (k * to_state).sum(-1)
        grad_log = changes.sum(-1) - changes.sum(-2) + arrivals - departures
        whole = departures.sum(-1) + decay.through * (grad_after * inner[:, :, :, :-1]).sum((-1, -2))
        grad_log = grad_log.flip(-1).cumsum(-1).flip(-1) + whole[..., None]
        if decay.starts is not None:
            grad_log = grad_log.masked_fill(decay.starts, 0)
        sums = grad_v, grad_k.sum(2, keepdim=True), grad_q.sum(2, keepdim=True), grad_log[..., None]
        for found, grad in zip(grads, sums, strict=True):
            found.append(_tokens(grad, length))
    grad_v, grad_k, grad_q, grad_log = (torch.cat(found[::-1], 1) for found in grads)
    return grad_v, grad_k, grad_q, grad_log[..., 0], grad_state


def _blocks(values, keys, queries, log_decay, starts):
    starts = [None] * -(-values.shape[1] // BLOCK) if starts is None else starts.split(BLOCK, 1)
    return zip(*(t.split(BLOCK, 1) for t in (values, keys, queries, log_decay)), starts, strict=True)


class _Decay:
    """
    What is left of each term, of dtype float32 or float64; K = G · R heads, n chunks of C tokens.

    Attributes:
        within (`[B, G, R, n, C, C]`): of the term of token j at token i of its chunk; 0 for j > i.
        into (`[B, G, R, n, C]`): of the state before the chunk at each token.
        out (`[B, G, R, n, C]`): of each token's term after the chunk.
        through (`[B, G, R, n]`): of the state before the chunk after it.
        starts (`[B, 1, 1, n, C]`, bool, or `None`): where a document begins.
    """

    def __init__(self, log_decay, starts):
        dtype = log_decay.dtype
        if starts is not None:
            log_decay = log_decay.masked_fill(starts, 0)
        # The difference of two long sums is a short sum only in float64.
        total = log_decay.double().cumsum(-1)
        length = total.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=total.device).triu(1)
        apart = total[..., :, None] - total[..., None, :]
        into, out = total, total[..., -1:] - total
        if starts is not None:
            ids = starts.cumsum(-1)
            future = future | (ids[..., :, None] != ids[..., None, :])
            into, out = into.masked_fill(ids > 0, -torch.inf), out.masked_fill(ids != ids[..., -1:], -torch.inf)
        self.within = apart.to(dtype).masked_fill(future, -torch.inf).exp()
        self.into, self.out = into.to(dtype).exp(), out.to(dtype).exp()
        self.through = self.into[..., -1]
        self.starts = starts


def _chunks(values, keys, queries, log_decay, starts, heads):
    length, groups = values.shape[1], keys.shape[2]
    chunk = min(CHUNK, length)
    v, k, q, log_decay = (_split(t, chunk, groups) for t in (values, keys, queries, log_decay[..., None]))
    starts = None if starts is None else _split(starts[..., None, None], chunk, 1)[..., 0]
    return v, k, q, _Decay(log_decay[..., 0], starts)


def _split(tokens, chunk, groups):
    """`[B, T, G · R, X]` to `[B, G, R, n, C, X]`, zeros after the last token."""
    batch, length, heads, width = tokens.shape
    if rest := -length % chunk:
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, rest))
    chunks = tokens.view(batch, -1, chunk, groups, heads // groups, width) if not rest else tokens.unflatten(1, (-1, chunk)).unflatten(3, (groups, -1))
    return chunks.permute(0, 3, 4, 1, 2, 5).contiguous()


def _tokens(chunks, length):
    """`[B, G, R, n, C, X]` to `[B, T, G · R, X]`."""
    return chunks.permute(0, 3, 4, 1, 2, 5).flatten(3, 4).flatten(1, 2)[:, :length]


def _increments(v, k, decay):
    return k.mT @ (decay.out[..., None] * v)


def _chunk_states(increments, through, state):
    """The states `[B, G, R, n + 1, N, P]` before each chunk and after the last."""
    states = [state.unflatten(1, increments.shape[1:3])]
    through = through[..., None, None]
    for i in range(increments.shape[3]):
        states.append(torch.addcmul(increments[:, :, :, i], through[:, :, :, i], states[-1]))
    return torch.stack(states, 3)
