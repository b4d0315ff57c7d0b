"""Summation aggregation: the causal and the bidirectional sum over a sequence.

Source: P. Ekin, "Summation-Based Transformers: A Path Toward Linear Complexity Sequence Modeling",
TechRxiv 2025, doi 10.36227/techrxiv.175790522.25734653.
"""

import re

import torch
import torch.nn.functional as F

from .documents import check_tokens, document_runs
from .kernels.kernel_dispatch import takes_kernels
from .token_blocks import token_wise


# Long enough for the triangular product to be a matrix product, short enough for its C·T·D work to stay small.
CHUNK_SIZE = 32

# Registered operators are global, and a checkpoint may bring its own copy of this file.
_NAMESPACE = re.sub(r"\W", "_", __name__)


def causal_sum_reference(
    x: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    relu: bool = False,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`causal_sum`], one token at a time: slow, and the definition of every other path."""
    batch_size, length, hidden_size = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    state = x.new_zeros(batch_size, hidden_size, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    document: list[int | None] = [None] * batch_size
    outputs = []
    for t in range(length):
        rows = []
        for b in range(batch_size):
            row = state[b]
            if attention_mask is None or attention_mask[b, t]:
                if document_ids is not None:
                    if document[b] is not None and document[b] != document_ids[b, t].item():
                        row = torch.zeros_like(row)
                    document[b] = document_ids[b, t].item()
                row = row + (x[b, t].relu() if relu else x[b, t]).to(dtype)
            rows.append(row)
        state = torch.stack(rows) if rows else state
        outputs.append(state)
    y = torch.stack(outputs, dim=1) if outputs else x.to(dtype)
    return _scaled(y, scale).to(x.dtype), state


def causal_sum(
    x: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    relu: bool = False,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Running sum over time, `s_t = s_{t-1} + x_t`, the causal summation aggregator of the summation paper.

    Prefill, decoding, packed training and streaming are this one call: pass the state that the previous call
    returned, and the sums go on as if the segments had been one.

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, any floating dtype):
            The terms. `T` may be 0 or 1.
        initial_state (`torch.Tensor` of shape `[B, D]`, float32, *optional*):
            The sum before the first token. It belongs to the document of the first real token. Zero if not given.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool or 0/1, *optional*):
            True where a token is real. A masked position adds nothing, whatever its values (NaN included), and
            repeats the sum before it.
        document_ids (`torch.Tensor` of shape `[B, T]`, integer, *optional*):
            A change of id from one real token to the next restarts the sum. Terms of different documents are never
            added to each other, so that no rounding of an earlier document reaches a later one.
        relu (`bool`, *optional*, defaults to `False`):
            Sum `max(x, 0)` instead of `x`: on a GPU without a pass over memory of its own.
        scale (`torch.Tensor` of shape `[B, T]` or `[1, T]`, floating, *optional*):
            Multiplies the sums, and not the final state, before they are rounded to the dtype of `x`; `1 / t` makes
            them means. A constant: it gets no gradient.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the sums `[B, T, D]` in the dtype of `x`, and the final state `[B, D]`
        in float32. The accumulation is in float32 whatever the dtype of `x` (in float64 for float64).

    Raises:
        `TypeError`: `x` is not floating, or `document_ids` is not integer.
        `ValueError`: a shape does not fit `x`.
    """
    _check_sequence(x, attention_mask, document_ids)
    batch_size, length, hidden_size = x.shape
    if initial_state is not None and initial_state.shape != (batch_size, hidden_size):
        raise ValueError(
            f"`initial_state` must have the shape [B, D] = [{batch_size}, {hidden_size}] of `x`, got "
            f"{list(initial_state.shape)}."
        )
    if scale is not None and scale.shape not in ((1, length), (batch_size, length)):
        raise ValueError(
            f"`scale` must have the shape [B, T] = [{batch_size}, {length}] of `x` or [1, {length}], got "
            f"{list(scale.shape)}."
        )

    dtype = torch.promote_types(x.dtype, torch.float32)
    if initial_state is None:
        initial_state = x.new_zeros(batch_size, hidden_size, dtype=dtype)
    initial_state = initial_state.to(dtype)
    # A compiler fuses a single step with what is around it.
    if takes_kernels(x) and not (length == 1 and torch.compiler.is_compiling()):
        mask = None if attention_mask is None else attention_mask.bool()
        runs = None if document_ids is None or length == 1 else document_runs(document_ids, mask)
        return _kernel_sum(x, None, scale, initial_state, mask, runs, relu, False)

    terms = _masked_terms(x, attention_mask)
    if length == 0:
        return x, initial_state
    is_chunked = length > 1 and document_ids is None and x.device.type == "cpu" and not torch.compiler.is_exporting()
    if relu and not is_chunked:
        terms = terms.relu()
    if length == 1:
        y = terms + initial_state[:, None]
        return _scaled(y, scale).to(x.dtype), y[:, 0]

    # A matrix product in reduced precision would round the sums.
    with torch.autocast(x.device.type, enabled=False):
        if document_ids is not None:
            runs = document_runs(document_ids, attention_mask)
            y = _segmented_sum(terms, runs, initial_state, runs[:, 0])
        elif is_chunked:
            y = _chunked_sum(terms, initial_state, relu)
        else:
            y = torch.cumsum(terms, dim=1) + initial_state[:, None]
    # A slice would keep the sums of the whole segment alive for as long as the state.
    final_state = y[:, -1].clone()
    if scale is not None:
        y *= scale.detach()[..., None]
    return y.to(x.dtype), final_state


def bidirectional_sum(
    x: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Sum over the whole sequence, `s = sum_u x_u`, given to every position: the bidirectional summation aggregator.

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, any floating dtype): the terms.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool or 0/1, *optional*): True where a token is real;
            masked positions add nothing.
        document_ids (`torch.Tensor` of shape `[B, T]`, integer, *optional*): with it, every position gets the sum
            of its own document, as [`causal_sum`] delimits documents.

    Returns:
        `torch.Tensor` of shape `[B, T, D]` in the dtype of `x`, accumulated in float32 (float64 for float64).

    Raises:
        `TypeError`: `x` is not floating, or `document_ids` is not integer.
        `ValueError`: a shape does not fit `x`.
    """
    _check_sequence(x, attention_mask, document_ids)
    terms = _masked_terms(x, attention_mask)
    if document_ids is None:
        return _scaled(terms.sum(dim=1, keepdim=True).expand_as(terms), scale).to(x.dtype)
    runs = document_runs(document_ids, attention_mask)[..., None].expand_as(terms)
    totals = torch.zeros_like(terms).scatter_add(1, runs, terms)
    return _scaled(totals.gather(1, runs), scale).to(x.dtype)


def _check_sequence(x: torch.Tensor, attention_mask: torch.Tensor | None, document_ids: torch.Tensor | None) -> None:
    if x.dim() != 3:
        raise ValueError(f"`x` must have the shape [B, T, D], got {list(x.shape)}.")
    if not x.is_floating_point():
        raise TypeError(f"`x` must be of a floating dtype, got {x.dtype}.")
    check_tokens("x", *x.shape[:2], attention_mask, document_ids)


def _masked_terms(x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """`x` in the dtype of the sums, zero where masked."""
    terms = x.to(torch.promote_types(x.dtype, torch.float32))
    if attention_mask is not None:
        terms = terms.masked_fill(~attention_mask.bool()[..., None], 0)
    return terms


def _scaled(y: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    return y if scale is None else y * scale.detach()[..., None]


def _to_chunks(x: torch.Tensor) -> torch.Tensor:
    """`[B, T, D]` as `[B, ceil(T / C), C, D]`, the end filled with zeros."""
    # Written so that a compiler meets one quotient; remainders make its symbolic shapes several times slower.
    num_chunks = (x.shape[1] + CHUNK_SIZE - 1) // CHUNK_SIZE
    padding = num_chunks * CHUNK_SIZE - x.shape[1]
    # A compiled graph pads always (by nothing, fused) and so serves every length.
    if torch.compiler.is_compiling() or padding:
        x = F.pad(x, (0, 0, 0, padding))
    return x.unflatten(1, (num_chunks, CHUNK_SIZE))


def _chunked_sum(terms: torch.Tensor, initial_state: torch.Tensor, relu: bool) -> torch.Tensor:
    """
    Running sum `[B, T, D]` as a product with a lower triangle of ones inside each chunk plus the sum before the chunk.

    Several times faster on a CPU than `torch.cumsum` along time, which walks memory with stride D. Linear but for the
    sign of the terms, so that autograd differentiates it any number of times and saves no more than that needs.
    """
    length, hidden_size = terms.shape[1:]
    triangle = torch.ones(CHUNK_SIZE, CHUNK_SIZE, dtype=terms.dtype, device=terms.device).tril()

    def sum_chunks(chunks: torch.Tensor) -> torch.Tensor:
        chunks = chunks.unflatten(-1, (CHUNK_SIZE, hidden_size))
        return torch.matmul(triangle, chunks.relu() if relu else chunks).flatten(-2)

    y = token_wise(sum_chunks, _to_chunks(terms).flatten(2)).unflatten(2, (CHUNK_SIZE, hidden_size))
    totals = torch.cat([initial_state[:, None], y[:, :-1, -1]], dim=1)
    y += totals.cumsum(dim=1)[:, :, None]
    return y.flatten(1, 2)[:, :length]


def _segmented_sum(
    terms: torch.Tensor, runs: torch.Tensor, initial_state: torch.Tensor, initial_run: torch.Tensor
) -> torch.Tensor:
    """
    Running sum `[B, T, D]` that restarts where `runs` `[B, T]` changes, begun with `initial_state` for `initial_run` `[B]`.

    The same chunks, with the triangle cut at the borders of the documents. What a chunk hands on is the sum over its
    last document only; these sums are themselves a segmented running sum over chunks, a sequence C times shorter.
    """
    length = terms.shape[1]
    chunks = _to_chunks(terms)
    num_chunks = chunks.shape[1]
    # The filling goes on with the last document, so that the last chunk ends in it too.
    filling = runs[:, -1:].expand(-1, num_chunks * CHUNK_SIZE - length)
    runs = torch.cat([runs, filling], dim=1).unflatten(1, (num_chunks, CHUNK_SIZE))
    same_document = (runs[..., :, None] == runs[..., None, :]).to(terms.dtype).tril()
    y = same_document @ chunks

    handed_on, handed_runs = initial_state[:, None], initial_run[:, None]
    if num_chunks > 1:
        last_runs = runs[:, :, -1]
        later = _segmented_sum(y[:, :, -1], last_runs, initial_state, initial_run)
        handed_on = torch.cat([handed_on, later[:, :-1]], dim=1)
        handed_runs = torch.cat([handed_runs, last_runs[:, :-1]], dim=1)
    continues = runs == handed_runs[..., None]
    y = y + torch.where(continues[..., None], handed_on[:, :, None], 0)
    return y.flatten(1, 2)[:, :length]


@torch.library.custom_op(f"{_NAMESPACE}::running_sum", mutates_args=())
def _kernel_sum(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    initial: torch.Tensor,
    mask: torch.Tensor | None,
    runs: torch.Tensor | None,
    relu: bool,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton kernel of `causal_sum`, or with `reverse` of its adjoint. The kernel documents the arguments."""
    from .kernels.running_sum_kernels import running_sum

    return running_sum(x, gate, scale, initial, mask, runs, relu=relu, reverse=reverse)


@_kernel_sum.register_fake
def _kernel_sum_fake(x, gate, scale, initial, mask, runs, relu, reverse):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(initial, memory_format=torch.contiguous_format)


def _kernel_sum_setup_context(ctx, inputs, output):
    x, gate, scale, _, mask, runs, relu, ctx.reverse = inputs
    ctx.save_for_backward(x if relu else gate, scale, mask, runs)


def _kernel_sum_vjp(ctx, grad_y, grad_final):
    # Linear but for the sign of the terms, so that the adjoint has derivatives of every order in turn.
    gate, scale, mask, runs = ctx.saved_tensors
    grad_x, grad_initial = _kernel_sum(grad_y, gate, scale, grad_final, mask, runs, False, not ctx.reverse)
    return grad_x, None, None, grad_initial, None, None, None, None


_kernel_sum.register_autograd(_kernel_sum_vjp, setup_context=_kernel_sum_setup_context)
