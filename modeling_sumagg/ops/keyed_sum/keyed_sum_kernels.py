"""The keyed sum as Triton kernels: `causal_keyed_sum` and its gradients, in chunks of C tokens.

    S_t = a_t S_{t-1} + k_t v_tᵀ,    y_t = S_tᵀ q_t

Forward takes two kernels. The first walks over the chunks of a head and writes the state before each chunk. The second
has one program for each chunk and head. With D_ij the decay from token j to token i of a chunk,

    y = (q kᵀ ∘ D) v + D_i,before q S

Backward walks twice, forward for the states and backward for their gradients dS, and has again one program for each
chunk and head:

    dA = dy vᵀ ∘ D,    dv = (q kᵀ ∘ D)ᵀ dy + D_after,j k dS,    dq = dA k + D_i,before dy Sᵀ,    dk = dAᵀ q + D_after,j v dSᵀ

The gradient of the logarithm of a decay is the sum over all pairs of tokens that the decay lies between, which are
differences of running sums of q ∘ dq and k ∘ dk. Everything is float32 but the sums of logarithms, which are float64.
"""

import torch

from ..dispatch import register_kernel
from ..triton_helpers import contiguous, given, on_its_device, tl, triton
from .keyed_sum_torch import keyed_sum_chunks


BLOCK_T = 32  # tokens of a chunk; at least 16, as a factor of a matrix product
MAX_BLOCK = 64  # channels of a value in one program


@triton.jit
def load_decays(log_decay_ptr, starts_ptr, token, T, K, HAS_STARTS: tl.constexpr):
    """
    Of the tokens of one chunk: the running sum of the logarithms of their decays, float64, that of the whole chunk, and the
    document of each token within the chunk, 0 for that of the state before.
    """
    in_sequence = token < T
    log_decay = tl.load(log_decay_ptr + token * K, mask=in_sequence, other=0.0).to(tl.float64)
    ids = (token * 0).to(tl.int32)
    if HAS_STARTS:
        start = (tl.load(starts_ptr + token, mask=in_sequence, other=0) != 0).to(tl.int32)
        log_decay = tl.where(start != 0, 0.0, log_decay)
        ids = tl.cumsum(start, 0)
    return tl.cumsum(log_decay, 0), tl.sum(log_decay, 0), ids


@triton.jit
def keyed_states_kernel(
    a_ptr,  # [B, T, G, N], float32: keys, or queries with REVERSE
    b_ptr,  # [B, T, K, P]: values, or gradients of the outputs
    log_decay_ptr,  # [B, T, K]
    starts_ptr,  # [B, T], bool
    initial_ptr,  # [B, K, N, P]: the state before the first chunk, or the gradient of that after the last
    states_ptr,  # [B, K, n, N, P]: the state before each chunk, or the gradient of the state after it
    final_ptr,  # [B, K, N, P]
    T,
    K,
    G,
    N,
    P,
    num_chunks,
    REVERSE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // K, program % K
    key = tl.arange(0, BLOCK_N)
    channel = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_keys, in_head = key < N, channel < P
    of_state = key[:, None] * P + channel[None, :]
    in_state = in_keys[:, None] & in_head[None, :]
    log_decay_ptr += batch * T * K + head
    starts_ptr += batch * T
    a_ptr += batch * T * G * N + head // (K // G) * N
    b_ptr += batch * T * K * P + head * P
    state = tl.load(initial_ptr + program * N * P + of_state, mask=in_state, other=0.0)
    for i in range(0, num_chunks):
        chunk = num_chunks - 1 - i if REVERSE else i
        tl.store(states_ptr + (program * num_chunks + chunk) * N * P + of_state, state, mask=in_state)
        token = chunk * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        in_sequence = token < T
        within, total, ids = load_decays(log_decay_ptr, starts_ptr, token, T, K, HAS_STARTS)
        a = tl.load(
            a_ptr + token[:, None] * G * N + key[None, :], mask=in_sequence[:, None] & in_keys[None, :], other=0.0
        )
        b = tl.load(
            b_ptr + token[:, None] * K * P + channel[None, :], mask=in_sequence[:, None] & in_head[None, :], other=0.0
        )
        # What is left of a term after the chunk; or of the state before the chunk at a token.
        last = tl.max(ids, 0)
        if REVERSE:
            factor = tl.where(ids == 0, tl.exp(within), 0.0)
        else:
            factor = tl.where(ids == last, tl.exp(total - within), 0.0)
        increment = tl.dot(tl.trans(a * factor.to(tl.float32)[:, None]), b, input_precision="ieee")
        # In float32 a decay of almost 1 is exact as its distance from 1.
        loss = (tl.exp(total) - 1.0).to(tl.float32)
        state = tl.where(last == 0, state + loss * state, 0.0) + increment
    tl.store(final_ptr + program * N * P + of_state, state, mask=in_state)


@triton.jit
def keyed_outputs_kernel(
    q_ptr,  # [B, T, G, N]
    k_ptr,  # [B, T, G, N]
    v_ptr,  # [B, T, K, P]
    log_decay_ptr,  # [B, T, K]
    starts_ptr,  # [B, T]
    states_ptr,  # [B, K, n, N, P]
    y_ptr,  # [B, T, K, P]
    T,
    K,
    G,
    N,
    P,
    num_chunks,
    HAS_STARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // K, program % K
    chunk = tl.program_id(1)
    row, key = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N)
    channel = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    token = chunk * BLOCK_T + row.to(tl.int64)
    in_sequence, in_keys, in_head = token < T, key < N, channel < P
    of_keys = (batch * T + token[:, None]) * G * N + head // (K // G) * N + key[None, :]
    in_chunk = in_sequence[:, None] & in_keys[None, :]
    of_values = ((batch * T + token[:, None]) * K + head) * P + channel[None, :]
    in_values = in_sequence[:, None] & in_head[None, :]
    within, _, ids = load_decays(log_decay_ptr + batch * T * K + head, starts_ptr + batch * T, token, T, K, HAS_STARTS)
    q = tl.load(q_ptr + of_keys, mask=in_chunk, other=0.0)
    k = tl.load(k_ptr + of_keys, mask=in_chunk, other=0.0)
    v = tl.load(v_ptr + of_values, mask=in_values, other=0.0)
    of_state = (program * num_chunks + chunk) * N * P + key[:, None] * P + channel[None, :]
    state = tl.load(states_ptr + of_state, mask=in_keys[:, None] & in_head[None, :], other=0.0)
    seen = (row[:, None] >= row[None, :]) & (ids[:, None] == ids[None, :])
    decays = tl.exp(tl.where(seen, within[:, None] - within[None, :], 0.0)).to(tl.float32)
    scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee") * decays, 0.0)
    into = tl.where(ids == 0, tl.exp(within), 0.0).to(tl.float32)
    y = tl.dot(scores, v, input_precision="ieee") + into[:, None] * tl.dot(q, state, input_precision="ieee")
    tl.store(y_ptr + of_values, y, mask=in_values)


@triton.jit
def keyed_gradients_kernel(
    q_ptr,  # [B, T, G, N]
    k_ptr,  # [B, T, G, N]
    v_ptr,  # [B, T, K, P]
    log_decay_ptr,  # [B, T, K]
    starts_ptr,  # [B, T]
    states_ptr,  # [B, K, n, N, P]: the state before each chunk
    grad_states_ptr,  # [B, K, n, N, P]: the gradient of the state after it
    grad_y_ptr,  # [B, T, K, P]
    grad_q_ptr,  # [B, T, K, N]
    grad_k_ptr,  # [B, T, K, N]
    grad_v_ptr,  # [B, T, K, P]
    grad_log_decay_ptr,  # [B, T, K]
    T,
    K,
    G,
    N,
    P,
    num_chunks,
    HAS_STARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // K, program % K
    chunk = tl.program_id(1)
    row, key = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_N)
    token = chunk * BLOCK_T + row.to(tl.int64)
    in_sequence, in_keys = token < T, key < N
    of_keys = (batch * T + token[:, None]) * G * N + head // (K // G) * N + key[None, :]
    in_chunk = in_sequence[:, None] & in_keys[None, :]
    within, total, ids = load_decays(
        log_decay_ptr + batch * T * K + head, starts_ptr + batch * T, token, T, K, HAS_STARTS
    )
    last = tl.max(ids, 0)
    seen = (row[:, None] >= row[None, :]) & (ids[:, None] == ids[None, :])
    decays = tl.where(seen, tl.exp(tl.where(seen, within[:, None] - within[None, :], 0.0)), 0.0).to(tl.float32)
    into = tl.where(ids == 0, tl.exp(within), 0.0).to(tl.float32)
    out = tl.where(ids == last, tl.exp(total - within), 0.0).to(tl.float32)
    through = tl.where(last == 0, tl.exp(total), 0.0).to(tl.float32)

    # 1. The gradients of the scores, and of queries and keys by the states, over all channels of the values.
    q = tl.load(q_ptr + of_keys, mask=in_chunk, other=0.0)
    k = tl.load(k_ptr + of_keys, mask=in_chunk, other=0.0)
    scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="ieee"), 0.0)
    grad_scores = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
    from_state = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    to_state = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    carried = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, P, BLOCK_P):
        channel = first + tl.arange(0, BLOCK_P)
        of_values = ((batch * T + token[:, None]) * K + head) * P + channel[None, :]
        in_values = in_sequence[:, None] & (channel < P)[None, :]
        of_state = (program * num_chunks + chunk) * N * P + key[:, None] * P + channel[None, :]
        in_state = in_keys[:, None] & (channel < P)[None, :]
        v = tl.load(v_ptr + of_values, mask=in_values, other=0.0)
        grad_y = tl.load(grad_y_ptr + of_values, mask=in_values, other=0.0)
        state = tl.load(states_ptr + of_state, mask=in_state, other=0.0)
        grad_state = tl.load(grad_states_ptr + of_state, mask=in_state, other=0.0)
        grad_scores += tl.dot(grad_y, tl.trans(v), input_precision="ieee")
        from_state += tl.dot(grad_y, tl.trans(state), input_precision="ieee")
        to_state += tl.dot(v, tl.trans(grad_state), input_precision="ieee")
        carried += tl.sum(state * grad_state, 1)
        # 2. The gradients of the values.
        grad_v = tl.dot(tl.trans(scores * decays), grad_y, input_precision="ieee")
        grad_v += out[:, None] * tl.dot(k, grad_state, input_precision="ieee")
        tl.store(grad_v_ptr + of_values, grad_v, mask=in_values)
    grad_scores = tl.where(seen, grad_scores * decays, 0.0)
    from_state *= into[:, None]
    to_state *= out[:, None]
    grad_q = tl.dot(grad_scores, k, input_precision="ieee") + from_state
    grad_k = tl.dot(tl.trans(grad_scores), q, input_precision="ieee") + to_state
    of_head = ((batch * T + token[:, None]) * K + head) * N + key[None, :]
    tl.store(grad_q_ptr + of_head, grad_q, mask=in_chunk)
    tl.store(grad_k_ptr + of_head, grad_k, mask=in_chunk)

    # 3. The gradients of the logarithms of the decays: of the pairs of tokens from each token on, and of the states.
    departures = tl.sum(k * to_state, 1)
    change = tl.sum(grad_scores * scores, 1) - tl.sum(grad_scores * scores, 0) + tl.sum(q * from_state, 1) - departures
    later = tl.where(row[:, None] <= row[None, :], change[None, :], 0.0)
    grad_log_decay = tl.sum(later, 1) + tl.sum(departures, 0) + through * tl.sum(carried, 0)
    if HAS_STARTS:
        start = tl.load(starts_ptr + batch * T + token, mask=in_sequence, other=0) != 0
        grad_log_decay = tl.where(start, 0.0, grad_log_decay)
    tl.store(grad_log_decay_ptr + (batch * T + token) * K + head, grad_log_decay, mask=in_sequence)


def _block(size: int, largest: int | None = None) -> int:
    block = max(16, triton.next_power_of_2(size))
    return block if largest is None else min(block, largest)


class _Sizes:
    """The sizes that all kernels of one call take."""

    def __init__(self, values: torch.Tensor, keys: torch.Tensor):
        self.batch, self.length, self.heads, self.width = values.shape
        self.groups, self.size = keys.shape[2:]
        self.num_chunks = triton.cdiv(self.length, BLOCK_T)
        self.arguments = self.length, self.heads, self.groups, self.size, self.width, self.num_chunks
        self.blocks = {"BLOCK_T": BLOCK_T, "BLOCK_N": _block(self.size), "BLOCK_P": _block(self.width, MAX_BLOCK)}
        self.stripes = triton.cdiv(self.width, self.blocks["BLOCK_P"])

    def states(self, a, b, log_decay, starts, initial, *, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The states `[B, K, n, N, P]` before each chunk, or the gradients of those after it, and the last."""
        states = initial.new_empty(self.batch, self.heads, self.num_chunks, self.size, self.width)
        final = torch.empty_like(initial)
        keyed_states_kernel[self.batch * self.heads, self.stripes](
            a,
            b,
            log_decay,
            *given(starts, instead=a),
            initial,
            states,
            final,
            *self.arguments,
            REVERSE=reverse,
            HAS_STARTS=starts is not None,
            **self.blocks,
        )
        return states, final


@on_its_device
def launch_keyed_sum(
    values: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs and the last state of [`keyed_sum_chunks`], for float32 arguments."""
    values, keys, queries, log_decay, state, starts = contiguous(values, keys, queries, log_decay, state, starts)
    sizes = _Sizes(values, keys)
    states, final = sizes.states(keys, values, log_decay, starts, state, reverse=False)
    y = torch.empty_like(values)
    keyed_outputs_kernel[sizes.batch * sizes.heads, sizes.num_chunks, sizes.stripes](
        queries,
        keys,
        values,
        log_decay,
        *given(starts, instead=keys),
        states,
        y,
        *sizes.arguments,
        HAS_STARTS=starts is not None,
        **sizes.blocks,
    )
    return y, final


@on_its_device
def launch_keyed_sum_gradients(
    grad_y: torch.Tensor,
    grad_final: torch.Tensor,
    values: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the first five arguments of [`launch_keyed_sum`] from those of its results."""
    arguments = contiguous(grad_y, grad_final, values, keys, queries, log_decay, state, starts)
    grad_y, grad_final, values, keys, queries, log_decay, state, starts = arguments
    sizes = _Sizes(values, keys)
    states, _ = sizes.states(keys, values, log_decay, starts, state, reverse=False)
    grad_states, grad_state = sizes.states(queries, grad_y, log_decay, starts, grad_final, reverse=True)
    grad_q = keys.new_empty(sizes.batch, sizes.length, sizes.heads, sizes.size)
    grad_k, grad_v, grad_log_decay = (torch.empty_like(t) for t in (grad_q, values, log_decay))
    keyed_gradients_kernel[sizes.batch * sizes.heads, sizes.num_chunks](
        queries,
        keys,
        values,
        log_decay,
        *given(starts, instead=keys),
        states,
        grad_states,
        grad_y,
        grad_q,
        grad_k,
        grad_v,
        grad_log_decay,
        *sizes.arguments,
        HAS_STARTS=starts is not None,
        **sizes.blocks,
    )
    # The heads of a group share their key and query.
    grad_k, grad_q = (grad.unflatten(2, (sizes.groups, -1)).sum(3) for grad in (grad_k, grad_q))
    return grad_v, grad_k, grad_q, grad_log_decay, grad_state


@torch.library.custom_op("modeling_sumagg::keyed_sum", mutates_args=())
def keyed_sum(
    values: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`launch_keyed_sum`] for autograd and compilers."""
    return launch_keyed_sum(values, keys, queries, log_decay, state, starts)


@keyed_sum.register_fake
def _keyed_sum_fake(values, keys, queries, log_decay, state, starts):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (values, state))


@torch.library.custom_op("modeling_sumagg::keyed_sum_backward", mutates_args=())
def keyed_sum_backward(
    grad_y: torch.Tensor,
    grad_final: torch.Tensor,
    values: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    log_decay: torch.Tensor,
    state: torch.Tensor,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[`launch_keyed_sum_gradients`] for compilers."""
    return launch_keyed_sum_gradients(grad_y, grad_final, values, keys, queries, log_decay, state, starts)


@keyed_sum_backward.register_fake
def _keyed_sum_backward_fake(grad_y, grad_final, values, keys, queries, log_decay, state, starts):
    leaves = values, keys, queries, log_decay, state
    return tuple(torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in leaves)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _vjp(ctx, grad_y, grad_final):
    *leaves, starts = ctx.saved_tensors
    if torch.is_grad_enabled():  # The gradient has gradients in turn.
        leaves = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
        outputs = keyed_sum_chunks(*leaves, starts)  # type: ignore[call-arg]
        return *torch.autograd.grad(outputs, leaves, (grad_y, grad_final), create_graph=True), None
    return *keyed_sum_backward(grad_y, grad_final, *leaves, starts), None


keyed_sum.register_autograd(_vjp, setup_context=_setup_context)


@register_kernel(keyed_sum_chunks)
def keyed_sum_by_kernels(values, keys, queries, log_decay, state, starts=None):
    return keyed_sum(values, keys, queries, log_decay, state, starts)
