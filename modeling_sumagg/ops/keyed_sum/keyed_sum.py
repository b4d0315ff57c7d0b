"""The keyed sum: sums of outer products of keys and values, read by queries."""

import torch

from ..dispatch import is_exported, kernel_of
from ..documents import Documents, check_tokens, find_documents, takes_documents
from ..precision import sum_dtype, without_autocast
from .keyed_sum_torch import keyed_sum_chunks, keyed_sum_step


@takes_documents
def causal_keyed_sum(
    values: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    weight: torch.Tensor | None = None,
    average: bool = False,
    initial_state: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | Documents | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Running sum of outer products over time, which each token reads with its query:

        S_t = a_t S_{t-1} + w_t k_t v_tᵀ,    y_t = S_tᵀ q_t

    It is the causal sum with a matrix of state a head. A value is found again by its key, where the plain sum has only
    the total of all terms. This is linear attention with a decay (Sun et al., arXiv 2307.08621; Yang et al., arXiv
    2312.06635), with `w_t = 1 - a_t` the moving average of the outer products.

    Args:
        values (`torch.Tensor` of shape `[B, T, K, P]`, any floating dtype): v, for K heads. `T` may be 0 or 1.
        keys, queries (`torch.Tensor` of shape `[B, T, G, N]`, dtype of `values`): k and q. G divides K: `K / G`
            consecutive heads share a key and a query.
        log_decay (`torch.Tensor` of shape `[B or 1, T, K]`, floating): `log a`, not positive. The decay of a token
            multiplies the state before the token.
        weight (`torch.Tensor` of shape `[B or 1, T, K]`, floating, *optional*): w. 1 if not given.
        average (`bool`, *optional*, defaults to `False`): whether the state is the moving average, `w_t = 1 - a_t`. No
            `weight` is then given.
        initial_state (`torch.Tensor` of shape `[B, K, N, P]`, floating, *optional*): S before the first token. It
            belongs to the document of the first real token. Zero if not given.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool or 0/1, *optional*): True where a token is real. A
            masked token changes no state and no output of a real token, whatever its values (NaN included). Its own
            output is zero.
        document_ids (`torch.Tensor` of shape `[B, T]`, integer, or `Documents`, *optional*): a change of id from one
            real token to the next restarts the sum.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the outputs `[B, T, K, P]` in the dtype of `values`, and the state after
        the last token `[B, K, N, P]`. State and products are float32, float64 for float64 inputs.

        A NaN or an infinity makes the later tokens of its document NaN, and in a row of one document possibly up to 31
        tokens before it. It reaches no other document, except in an exported graph.

    Raises:
        `TypeError`: an input is not floating, or `document_ids` is not integer.
        `ValueError`: shapes do not fit each other, or `weight` is given beside `average`.
    """
    _check(values, keys, queries, log_decay, weight, average, initial_state)
    batch_size, length, heads, width = values.shape
    check_tokens("values", batch_size, length, attention_mask, document_ids)
    dtype = sum_dtype(values)
    result_dtype = values.dtype
    log_decay = log_decay.to(dtype).expand(batch_size, -1, -1)
    values, keys, queries = (tensor.to(dtype) for tensor in (values, keys, queries))
    weight = None if weight is None else weight.to(dtype).expand(batch_size, -1, -1)
    if attention_mask is not None:
        padding = ~attention_mask.bool()[..., None]
        log_decay = log_decay.masked_fill(padding, 0)
        weight = None if weight is None else weight.masked_fill(padding, 0)
        values, keys, queries = (tensor.masked_fill(padding[..., None], 0) for tensor in (values, keys, queries))
    if average and length != 1:
        half = (log_decay / 2).tanh()
        weight = 2 * half / (half - 1)  # `1 - a` to all digits, as `-expm1`, which ONNX has not
    if weight is not None:
        values = values * weight[..., None]
    if initial_state is None:
        state = values.new_zeros(batch_size, heads, keys.shape[3], width)
    else:
        state = initial_state.to(dtype)
    documents = None if length < 2 else find_documents(document_ids, attention_mask)
    # Autocast would round the state.
    with without_autocast(values):
        if length == 1:
            y, state = keyed_sum_step(values[:, 0], keys[:, 0], queries[:, 0], log_decay[:, 0], state, average)
            y = y[:, None]
        else:
            y, state = _sum(values, keys, queries, log_decay, state, documents)
    return y.to(result_dtype), state


@takes_documents
def bidirectional_keyed_sum(
    values: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    weight: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | Documents | None = None,
) -> torch.Tensor:
    """
    Sum of outer products over both sides: a [`causal_keyed_sum`] and another from the end, the own term once.

    Args:
        values, keys, queries, log_decay, weight, attention_mask, document_ids: as for [`causal_keyed_sum`].

    Returns:
        `torch.Tensor` of shape `[B, T, K, P]` in the dtype of `values`, zero where masked.

    Raises:
        As [`causal_keyed_sum`].
    """
    dtype, result_dtype = sum_dtype(values), values.dtype
    tokens = [tensor.to(dtype) for tensor in (values, keys, queries)]
    decays = {"log_decay": log_decay, "weight": weight}
    documents = find_documents(document_ids, attention_mask)
    left, _ = causal_keyed_sum(*tokens, **decays, attention_mask=attention_mask, document_ids=documents)
    if documents is not None:
        documents = find_documents(documents.ids.flip(1))
    mask = None if attention_mask is None else attention_mask.flip(1)
    decays = {name: None if tensor is None else tensor.flip(1) for name, tensor in decays.items()}
    right, _ = causal_keyed_sum(
        *(tensor.flip(1) for tensor in tokens), **decays, attention_mask=mask, document_ids=documents
    )
    values, keys, queries = tokens
    share = (queries * keys).sum(-1).repeat_interleave(values.shape[2] // keys.shape[2], 2)
    own = values * (share if weight is None else share * weight.to(dtype)).unsqueeze(-1)
    if attention_mask is not None:
        own = own.masked_fill(~attention_mask.bool()[..., None, None], 0)
    return (left + right.flip(1) - own).to(result_dtype)


def _sum(values, keys, queries, log_decay, state, documents):
    """Choose the path of any number of tokens but one: none; or chunks, by the kernel or by PyTorch's operations."""
    if values.shape[1] == 0:
        return values, state
    # The kernels hold float32.
    chunks = (kernel_of(keyed_sum_chunks, values) if values.dtype == torch.float32 else None) or keyed_sum_chunks
    if documents is None or is_exported():
        return chunks(values, keys, queries, log_decay, state, None if documents is None else documents.starts)
    return _isolated(chunks, values, keys, queries, log_decay, state, documents)


def _isolated(chunks, values, keys, queries, log_decay, state, documents):
    """`chunks`, whose matrix products then carry no NaN and no infinity from one document to another."""
    ids, starts = documents
    is_finite = values.isfinite().all((2, 3)) & keys.isfinite().all((2, 3)) & log_decay.isfinite().all(2)
    state_is_finite = state.isfinite().all((1, 2, 3))
    # The newest document in which something was not finite, counted from 1. Ids never decrease along a row.
    reached = torch.where(is_finite, 0, ids + 1)
    reached = torch.cat([(~state_is_finite).long()[:, None], reached], 1).cummax(1).values[:, 1:]
    is_lost = reached == ids + 1
    bad = ~is_finite[..., None]
    values, keys = (tensor.masked_fill(bad[..., None], 0) for tensor in (values, keys))
    query_is_finite = queries.isfinite().all((2, 3))
    queries = queries.masked_fill(~query_is_finite[..., None, None], 0)
    state = state.masked_fill(~state_is_finite[:, None, None, None], 0)
    y, state = chunks(values, keys, queries, log_decay.masked_fill(bad, 0), state, starts)
    y = y.masked_fill((is_lost | ~query_is_finite)[..., None, None], torch.nan)
    return y, state.masked_fill(is_lost[:, -1, None, None, None], torch.nan)


def _check(values, keys, queries, log_decay, weight, average, initial_state):
    if average and weight is not None:
        raise ValueError("`average` sets the weights to 1 - a: leave out `weight`, or set `average=False`.")
    for name, tensor in (("values", values), ("keys", keys), ("queries", queries), ("log_decay", log_decay)):
        if not tensor.is_floating_point():
            raise TypeError(f"`{name}` must be of a floating dtype, got {tensor.dtype}.")
    if values.dim() != 4:
        raise ValueError(f"`values` must have the shape [B, T, K, P], got {list(values.shape)}.")
    batch_size, length, heads, width = values.shape
    if keys.dim() != 4 or keys.shape[:2] != values.shape[:2] or keys.shape[2] < 1 or heads % keys.shape[2]:
        raise ValueError(
            f"`keys` must have the shape [B, T, G, N] = [{batch_size}, {length}, G, N], where G divides the {heads} "
            f"heads of `values`, got {list(keys.shape)}."
        )
    if queries.shape != keys.shape:
        raise ValueError(f"`queries` must have the shape {list(keys.shape)} of `keys`, got {list(queries.shape)}.")
    for name, tensor in (("log_decay", log_decay), ("weight", weight)):
        if tensor is not None and (
            tensor.dim() != 3 or tensor.shape[0] not in (1, batch_size) or tensor.shape[1:] != (length, heads)
        ):
            raise ValueError(
                f"`{name}` must have the shape [B, T, K] = [{batch_size}, {length}, {heads}], or [1, {length}, "
                f"{heads}], got {list(tensor.shape)}."
            )
    expected = (batch_size, heads, keys.shape[3], width)
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(
            f"`initial_state` must have the shape [B, K, N, P] = {list(expected)}, got {list(initial_state.shape)}."
        )
