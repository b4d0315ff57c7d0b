"""The keyed sum by PyTorch's operations: chunks of matrix products, and one decode step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..dispatch import is_recorded, is_transformed
from ..running_sum.running_sum_torch import advanced, decay_weights, first_tokens, join_segments, to_chunks


CHUNK = 32  # tokens whose scores are one matrix
BLOCK = 32 * CHUNK  # tokens that are in memory as chunks at once
RECORDED_CHUNK = 64  # in a graph, whose matrix over the chunks grows with the square of their number


def keyed_sum_step(values, keys, queries, log_decay, state, average=False):
    """
    One token: `S = a S + k vᵀ`, as an average `S = a S + (1 - a) k vᵀ`, and `y = qᵀ S`.

    Args:
        values `[B, K, P]`, keys and queries `[B, G, N]`, log_decay `[B, K]`, state `[B, K, N, P]`: of one dtype.

    Returns:
        `tuple`: y `[B, K, P]` and S.
    """
    heads = values.shape[1] // keys.shape[1]
    keys, queries = (t.repeat_interleave(heads, 1) if heads > 1 else t for t in (keys, queries))
    increment, loss = keys.unsqueeze(3) * values.unsqueeze(2), log_decay.expm1()[..., None, None]
    state = state.lerp(increment, -loss) if average else advanced(state, increment, loss)
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
    if is_recorded():
        return _recorded(*arguments)
    if torch.is_grad_enabled() and not is_transformed(values):
        return _KeyedSum.apply(*arguments)
    return _forward(*arguments)[:2]


def _forward(values, keys, queries, log_decay, state, starts):
    """The outputs, the last state, and the state before each block."""
    outputs, before = [], []
    for block in _blocks(values, keys, queries, log_decay, starts):
        before.append(state)
        v, k, q, decay = _chunks(*block, chunk=min(CHUNK, values.shape[1]))
        states = join_segments(_increments(v, k, decay), decay.log_through, state)
        outputs.append(_read(v, k, q, decay, states[:-1]))
        state = states[-1].reshape(state.shape)
    return _tokens(outputs, values.shape[1]), state, before


def _recorded(values, keys, queries, log_decay, state, starts):
    """[`_forward`] as one graph for every length: its chunks are joined by one matrix product instead of a loop."""
    v, k, q, decay = _chunks(values, keys, queries, log_decay, starts, chunk=RECORDED_CHUNK)
    increments = _increments(v, k, decay)
    sizes = increments.shape[1:]
    terms, state = increments.flatten(-2).permute(1, 2, 3, 0, 4), state.reshape(*sizes[:3], 1, -1)
    # 1. The states after each chunk: of the terms of the chunks before it, and of the state before all of them.
    log_through = decay.log_through.permute(1, 2, 0, 3)
    reach = log_through.cumsum(2).exp().transpose(2, 3)[..., None]
    after = decay_weights(log_through) @ terms + reach * state
    # 2. The states before each chunk.
    states = torch.cat([state, after], 3).permute(3, 0, 1, 2, 4)
    before = states[:-1].reshape(-1, *sizes)
    last = states[-1].reshape(values.shape[0], values.shape[2], *sizes[3:])
    return _tokens([_read(v, k, q, decay, before)], values.shape[1]), last


class _KeyedSum(torch.autograd.Function):
    """Keeps the inputs and one state a block, and computes the scores again for the gradients."""

    @staticmethod
    def forward(ctx, values, keys, queries, log_decay, state, starts):
        y, final, states = _forward(values, keys, queries, log_decay, state, starts)
        ctx.save_for_backward(values, keys, queries, log_decay, state, starts, *states)
        return y, final

    @staticmethod
    def backward(ctx, grad_y, grad_state):
        *inputs, starts = (saved := ctx.saved_tensors)[:6]
        if torch.is_grad_enabled():  # The gradient has gradients in turn.
            with torch.enable_grad():
                leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in inputs]
                outputs = _forward(*leaves, starts)[:2]  # type: ignore[call-arg]
            return *torch.autograd.grad(outputs, leaves, (grad_y, grad_state), create_graph=True), None
        return *_vjp(grad_y, grad_state, *inputs, starts, saved[6:]), None  # type: ignore[call-arg]


def _vjp(grad_y, grad_state, values, keys, queries, log_decay, state, starts, states):
    """The gradients of the first five inputs, block by block from the last one."""
    grads: list[list[torch.Tensor]] = [[], [], [], []]
    blocks = list(_blocks(values, keys, queries, log_decay, starts))
    grad_blocks = grad_y.split(BLOCK, 1)
    for block, grad_block, before in zip(reversed(blocks), reversed(grad_blocks), reversed(states), strict=True):
        v, k, q, decay = _chunks(*block, chunk=min(CHUNK, values.shape[1]))
        dy = _split(grad_block, v.shape[4], v.shape[2])
        # 1. The states before each chunk, and the gradients of those after it, from the last chunk to the first.
        states = join_segments(_increments(v, k, decay), decay.log_through, before)[:-1]
        reads = (decay.into[..., None] * q).transpose(-1, -2) @ dy
        grad_states = join_segments(reads.flip(0), decay.log_through.flip(0), grad_state).flip(0)
        grad_after, grad_state = grad_states[1:], grad_states[0].reshape(grad_state.shape)
        # 2. Within a chunk.
        scores = q @ k.transpose(-1, -2)
        grad_weighted = (dy @ v.transpose(-1, -2)) * decay.within
        weighted = scores * decay.within
        changes = grad_weighted * scores
        grad_v = weighted.transpose(-1, -2) @ dy
        grad_q, grad_k = grad_weighted @ k, grad_weighted.transpose(-1, -2) @ q
        # 3. What comes from earlier chunks and what goes to later ones.
        from_state = decay.into[..., None] * (dy @ states.transpose(-1, -2))
        to_state = decay.out[..., None] * (v @ grad_after.transpose(-1, -2))
        grad_v = grad_v + decay.out[..., None] * (k @ grad_after)
        grad_q, grad_k = grad_q + from_state, grad_k + to_state
        # 4. The decays, which act on the score of each pair and on the states.
        arrivals, departures = (q * from_state).sum(-1), (k * to_state).sum(-1)
        grad_log = changes.sum(-1) - changes.sum(-2) + arrivals - departures
        whole = departures.sum(-1) + decay.log_through.exp() * (grad_after * states).sum((-1, -2))
        grad_log = grad_log.flip(-1).cumsum(-1).flip(-1) + whole[..., None]
        if decay.starts is not None:
            grad_log = grad_log.masked_fill(decay.starts, 0)
        found = grad_v, grad_k.sum(3, keepdim=True), grad_q.sum(3, keepdim=True), grad_log[..., None]
        for parts, grad in zip(grads, found, strict=True):
            parts.insert(0, grad)
    grad_v, grad_k, grad_q, grad_log = (_tokens(parts, values.shape[1]) for parts in grads)
    return grad_v, grad_k, grad_q, grad_log[..., 0], grad_state


class _Decay(NamedTuple):
    """
    What is left of each term; n chunks of C tokens, K = G · R heads.

    Attributes:
        within (`[n, B, G, R, C, C]`): of the term of token j at token i of its chunk; 0 for j > i.
        into (`[n, B, G, R, C]`): of the state before the chunk at each token.
        out (`[n, B, G, R, C]`): of the term of each token after the chunk.
        log_through (`[n, B, G, R]`): of the state before the chunk after it, the logarithm.
        starts (`[n, B, 1, 1, C]`, bool, or `None`): where a document begins.
    """

    within: torch.Tensor
    into: torch.Tensor
    out: torch.Tensor
    log_through: torch.Tensor
    starts: torch.Tensor | None


def _decay(log_decay: torch.Tensor, starts: torch.Tensor | None) -> _Decay:
    """Of `log_decay` `[n, B, G, R, C]`, in its dtype."""
    if starts is not None:
        log_decay = log_decay.masked_fill(starts, 0)
    # In float64, since the difference of two long sums is a short sum.
    total = log_decay.double().cumsum(-1)
    chunk = total.shape[-1]
    is_cut = torch.ones(chunk, chunk, dtype=torch.bool, device=total.device).triu(1)
    within, into, out = total[..., :, None] - total[..., None, :], total, total[..., -1:] - total
    if starts is not None:
        ids = starts.long().cumsum(-1)
        is_cut = is_cut | (ids[..., :, None] != ids[..., None, :])
        into, out = into.masked_fill(ids > 0, -torch.inf), out.masked_fill(ids != ids[..., -1:], -torch.inf)
    within, into, out = (log.to(log_decay.dtype) for log in (within, into, out))
    return _Decay(within.masked_fill(is_cut, -torch.inf).exp(), into.exp(), out.exp(), into[..., -1], starts)


def _blocks(values, keys, queries, log_decay, starts) -> Iterator[tuple]:
    starts = [None] * -(-values.shape[1] // BLOCK) if starts is None else starts.split(BLOCK, 1)
    return zip(*(t.split(BLOCK, 1) for t in (values, keys, queries, log_decay)), starts, strict=True)


def _chunks(values, keys, queries, log_decay, starts, *, chunk: int) -> tuple:
    groups = keys.shape[2]
    v, k, q, log_decay = (_split(t, chunk, groups) for t in (values, keys, queries, log_decay[..., None]))
    starts = None if starts is None else _split(starts[..., None, None], chunk, 1)[..., 0]
    return v, k, q, _decay(log_decay[..., 0], starts)


def _split(tokens: torch.Tensor, chunk: int, groups: int) -> torch.Tensor:
    """`[B, T, G · R, X]` to `[n, B, G, R, C, X]`, zeros after the last token."""
    batch, length, heads, width = tokens.shape
    if is_recorded():
        tokens = to_chunks(tokens, chunk)
    elif length % chunk:
        tokens = F.pad(tokens, (0, 0, 0, 0, 0, -length % chunk))
    tokens = tokens.reshape(batch, -1, chunk, groups, heads // groups, width)
    return tokens.permute(1, 0, 3, 4, 2, 5).contiguous()


def _tokens(blocks: list[torch.Tensor], length: int) -> torch.Tensor:
    """Blocks `[n, B, G, R, C, X]` to `[B, T, G · R, X]`."""
    _, batch, groups, heads, _, width = blocks[0].shape
    tokens = torch.cat([chunks.permute(1, 0, 4, 2, 3, 5) for chunks in blocks], 1)
    tokens = tokens.reshape(batch, -1, groups * heads, width)
    if is_recorded():
        return first_tokens(tokens, length)
    # A slice of everything is an alias, which a batch of gradients does not know.
    return tokens if tokens.shape[1] == length else tokens[:, :length]


def _increments(v, k, decay: _Decay) -> torch.Tensor:
    """What each chunk adds to the state, `[n, B, G, R, N, P]`."""
    return k.transpose(-1, -2) @ (decay.out[..., None] * v)


def _read(v, k, q, decay: _Decay, states: torch.Tensor) -> torch.Tensor:
    """The outputs `[n, B, G, R, C, P]`: of the terms of the same chunk, and of the states before it."""
    return ((q @ k.transpose(-1, -2)) * decay.within) @ v + decay.into[..., None] * (q @ states)
