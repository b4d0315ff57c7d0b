"""Summation aggregation: the causal and the bidirectional sum over a sequence.

Source: P. Ekin, "Summation-Based Transformers: A Path Toward Linear Complexity Sequence Modeling",
TechRxiv 2025, doi 10.36227/techrxiv.175790522.25734653.
"""

import torch

from ..dispatch import is_recorded, is_transformed, kernel_of
from ..documents import Documents, check_tokens, find_documents, takes_documents
from ..precision import state_dtype, sum_dtype
from .running_sum_torch import scan


@takes_documents
def causal_sum(
    x: torch.Tensor,
    *,
    log_decay: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | Documents | None = None,
    relu: bool = False,
    scale: torch.Tensor | None = None,
    return_log_decay: bool = False,
) -> tuple[torch.Tensor, ...]:
    r"""
    Running sum over time, `s_t = a_t s_{t-1} + x_t`; without decays, `a_t = 1`, the causal summation aggregator of the
    summation paper.

    Prefill, decoding, packed training and streaming are this one call: pass the state that the previous call returned, and
    the segments are summed as if they were one.

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, any floating dtype):
            The terms. `T` may be 0 or 1.
        log_decay (`torch.Tensor` of shape `[K]` or `[B or 1, T, K]`, floating, *optional*):
            `log a`, not positive, the same for all tokens or one for each. `K` divides `D`: each of the `K` decays is
            that of a head of `D / K` consecutive channels, so that `K = D` is one decay for each channel. The decay of
            a token acts on the sum before it. In float32 a decay of `1 - 1e-6` is exact to six digits as its logarithm,
            and to one as itself.
        initial_state (`torch.Tensor` of shape `[B, D]`, floating, *optional*):
            The sum before the first token, which belongs to the document of the first real token. Zero if not given.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool or 0/1, *optional*):
            True where a token is real. A masked position adds nothing, whatever its values (NaN included), lets nothing
            decay, and repeats the sum before it.
        document_ids (`torch.Tensor` of shape `[B, T]`, integer, or `Documents`, *optional*):
            A change of id from one real token to the next restarts the sum. Terms of different documents are never
            added to each other, so that no rounding of an earlier document reaches a later one.
        relu (`bool`, *optional*, defaults to `False`):
            Sum `max(x, 0)` instead of `x`: without a pass over memory of its own.
        scale (`torch.Tensor` of shape `[B or 1, T]` or `[B or 1, T, K]`, floating, *optional*):
            Multiplies the sums, and not the final state, before they are rounded to the dtype of `x`; `1 / t` makes
            them means. A constant, which gets no gradient; one for each of the `K` heads of `log_decay` gets one.
        return_log_decay (`bool`, *optional*, defaults to `False`):
            Return a third tensor, the logarithm of the decay of the whole segment: what the initial state is multiplied
            by in the final one. Whoever joins segments that were summed apart needs it.

    Returns:
        `tuple`: the sums `[B, T, D]` in the dtype of `x`; the final state `[B, D]`, in float64 (float32 on devices that
        have no float64); and with `return_log_decay` the decay of the segment, `[B, K]` (`[B, 1]` without `log_decay`) in
        the same dtype, `-inf` where another document begins.

        Within a segment the accumulation is in float32 whatever the dtype of `x` (in float64 for float64), and from
        segment to segment, so from one decode step to the next, in that of the state: without decays a step adds
        nothing after 2^53 terms of one size, in float32 it would not after 2^24. No decay is divided by.

        A NaN or an infinity in a term or a decay reaches the tokens after it in its document, and no other document. In a
        compiled graph it may also reach tokens of its document before it.

    Raises:
        `TypeError`: `x` or `log_decay` is not floating, or `document_ids` is not integer.
        `ValueError`: a shape does not fit `x`.
    """
    check_sequence(x, attention_mask, document_ids)
    batch_size, length, hidden_size = x.shape
    state = state_before("initial_state", initial_state, hidden_size, x)
    _check_scale(x, scale, log_decay)
    decays = None if log_decay is None else per_token("log_decay", log_decay, x, attention_mask)
    documents = find_documents(document_ids, attention_mask)
    y, state = _sum(x, decays, state, attention_mask, documents, relu, scale)
    if not return_log_decay:
        return y, state
    if decays is None:
        decays = state.new_zeros(batch_size, length, 1)
    if documents is not None:
        decays = torch.where(documents.starts.unsqueeze(-1), -torch.inf, decays)
    return y, state, decays.to(state.dtype).sum(dim=1).expand(batch_size, -1)


def _sum(x, decays, state, mask, documents, relu, scale):
    """Choose the path: no tokens; the kernel of sums without decays; one token; or a scan, which may be a kernel too."""
    length = x.shape[1]
    if length == 0:
        return x, state
    is_step = length == 1
    # A compiler fuses a single token with what is around it.
    if decays is None and not (is_step and torch.compiler.is_compiling()):
        kernel = kernel_of(causal_sum, x)
        if kernel is not None:
            return kernel(x, state, mask, None if is_step else documents, relu, scale)
    terms = masked_terms(x, mask)
    if is_step:
        if decays is not None:
            decay = decays[:, 0].to(state.dtype).exp().unsqueeze(-1)
            state = (state.view(x.shape[0], decay.shape[1], -1) * decay).flatten(1)
        state = state + (terms[:, 0].relu() if relu else terms[:, 0])
        return scaled(state[:, None], scale).to(x.dtype), state
    y, state = scan(terms, decays, state, documents, relu)
    # With decays the sums are kept for backward.
    in_place = (decays is None or not torch.is_grad_enabled()) and not is_recorded() and not is_transformed(x)
    return scaled(y, scale, in_place).to(x.dtype), state


@takes_documents
def bidirectional_sum(
    x: torch.Tensor,
    *,
    log_decay: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | Documents | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Sum over the whole sequence, `s = sum_u x_u`, given to every position: the bidirectional summation aggregator. With
    decays each position has a sum of its own, that of a [`causal_sum`] and of another from the end, its own term once.

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, any floating dtype): the terms.
        log_decay (`torch.Tensor` of shape `[K]` or `[B or 1, T, K]`, floating, *optional*): as for [`causal_sum`].
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool or 0/1, *optional*): True where a token is real;
            masked positions add nothing.
        document_ids (`torch.Tensor` of shape `[B, T]`, integer, or `Documents`, *optional*): with it, every position gets
            the sum of its own document, as [`causal_sum`] delimits documents.
        scale (`torch.Tensor` of shape `[B or 1, T or 1]`, floating, *optional*): multiplies the sums before they are
            rounded to the dtype of `x`; `1 / n` makes them means. A constant: it gets no gradient.

    Returns:
        `torch.Tensor` of shape `[B, T, D]` in the dtype of `x`, accumulated in float32 (float64 for float64).

    Raises:
        `TypeError`: `x` or `log_decay` is not floating, or `document_ids` is not integer.
        `ValueError`: a shape does not fit `x`.
    """
    check_sequence(x, attention_mask, document_ids)
    _check_scale(x[:, :1] if scale is not None and scale.shape[1:] == (1,) else x, scale, None)
    terms = masked_terms(x, attention_mask)
    documents = find_documents(document_ids, attention_mask)
    if log_decay is not None:
        decays = per_token("log_decay", log_decay, x, attention_mask)
        tokens = [terms, decays, attention_mask, None if documents is None else documents.ids]
        forward, backward = (
            causal_sum(terms, log_decay=decays, attention_mask=mask, document_ids=ids)[0]
            for terms, decays, mask, ids in (tokens, [None if t is None else t.flip(1) for t in tokens])
        )
        return scaled(forward + backward.flip(1) - terms, scale).to(x.dtype)
    if documents is None:
        return scaled(terms.sum(dim=1, keepdim=True), scale).to(x.dtype).expand_as(x)
    ids = documents.ids[..., None].expand_as(terms)
    totals = torch.zeros_like(terms).scatter_add(1, ids, terms)
    return scaled(totals.gather(1, ids), scale).to(x.dtype)


def check_sequence(
    x: torch.Tensor, attention_mask: torch.Tensor | None, document_ids: torch.Tensor | Documents | None
) -> None:
    if x.dim() != 3:
        raise ValueError(f"`x` must have the shape [B, T, D], got {list(x.shape)}.")
    if not x.is_floating_point():
        raise TypeError(f"`x` must be of a floating dtype, got {x.dtype}.")
    check_tokens("x", x.shape[0], x.shape[1], attention_mask, document_ids)


def _check_scale(x: torch.Tensor, scale: torch.Tensor | None, log_decay: torch.Tensor | None) -> None:
    if scale is None:
        return
    batch_size, length = x.shape[:2]
    heads = () if log_decay is None else log_decay.shape[-1:]
    # By parts: comparing shapes of two sizes would tie one to the other in an exported graph.
    is_fitting = scale.dim() in (2, 2 + len(heads)) and scale.shape[0] in (1, batch_size)
    if not (is_fitting and scale.shape[1] == length and scale.shape[2:] in ((), heads)):
        raise ValueError(
            f"`scale` must have the shape [B, T] = [{batch_size}, {length}] of `x` or [1, {length}]"
            f"{f', or one more dimension of the {heads[0]} heads of `log_decay`' if heads else ''}, got "
            f"{list(scale.shape)}."
        )


def state_before(name: str, state: torch.Tensor | None, size: int, x: torch.Tensor) -> torch.Tensor:
    """The state `[B, size]` in its dtype, zero for none."""
    batch_size = x.shape[0]
    if state is None:
        return x.new_zeros(batch_size, size, dtype=state_dtype(x))
    if state.shape != (batch_size, size):
        raise ValueError(f"`{name}` must have the shape [{batch_size}, {size}] of `x`, got {list(state.shape)}.")
    return state.to(state_dtype(x))


def per_token(name: str, values: torch.Tensor, x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """`values` `[K]` or `[B or 1, T, K]` as `[B or 1, T, K]` in the dtype of the sums, zero where masked."""
    batch_size, length, hidden_size = x.shape
    if not values.is_floating_point():
        raise TypeError(f"`{name}` must be of a floating dtype, got {values.dtype}.")
    is_fitting = values.dim() in (1, 3) and values.shape[-1] > 0 and hidden_size % values.shape[-1] == 0
    if not is_fitting or (
        values.dim() == 3 and not (values.shape[0] in (1, batch_size) and values.shape[1] == length)
    ):
        raise ValueError(
            f"`{name}` must have the shape [K], where K divides D = {hidden_size} of `x`, or [B, T, K] = "
            f"[{batch_size}, {length}, K] or [1, {length}, K], got {list(values.shape)}."
        )
    values = values.to(sum_dtype(x))
    if values.dim() == 1:
        values = values.expand(1, length, -1)
    return values if attention_mask is None else values.masked_fill(~attention_mask.bool()[..., None], 0)


def masked_terms(x: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """`x` in the dtype of the sums, zero where masked."""
    terms = x.to(sum_dtype(x))
    if attention_mask is not None:
        terms = terms.masked_fill(~attention_mask.bool()[..., None], 0)
    return terms


def scaled(y: torch.Tensor, scale: torch.Tensor | None, in_place: bool = False) -> torch.Tensor:
    if scale is None:
        return y
    heads = y
    if scale.dim() == 2:
        scale = scale.detach()
    else:
        heads = y.unflatten(2, (scale.shape[2], y.shape[2] // scale.shape[2]))
    scale = scale.unsqueeze(-1)
    return (heads.mul_(scale) if in_place else heads * scale).flatten(2)
