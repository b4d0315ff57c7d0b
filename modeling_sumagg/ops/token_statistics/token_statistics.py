"""Token statistics: the operators of the Token Statistics Transformer, causal and bidirectional.

Each comes twice: the paper's formula in plain tensor operations (`*_reference`), and the same in blocks of tokens or as
Triton kernels, with an analytic backward.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..dispatch import is_exported, is_recorded, is_transformed, kernel_of
from ..documents import Documents, check_tokens, find_documents, has_tokens_at, takes_documents
from ..precision import state_dtype, sum_dtype
from .token_statistics_reference import (
    TokenStatisticsState,
    bidirectional_formula,
    bidirectional_membership,
    causal_formula,
    causal_membership,
    causal_step,
)
from .token_statistics_torch import bidirectional_forward, causal_forward, pack, unpack


FORMULA_BLOCK_ELEMENTS = 2**20  # of w, of which with decays backward computes the formula again at a time
FORMULA_LENGTH = 64  # without gradients, up to here the blocks cost more than they save


def token_statistics(
    w: torch.Tensor,
    temperature: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    r"""
    Token statistics self-attention in both directions, every sum over all N tokens:

        ŵ      = w / max(‖w‖₂ over the tokens, 1e-12)
        Π      = softmax over heads of temp_k · Σ_c ŵ²[k, n, c]
        m[k,c] = Σ_n Π[k, n] w²[k, n, c] / (Σ_n Π[k, n] + 1e-8)
        out    = -w · Π / (1 + m)

    Args:
        w (`torch.Tensor` of shape `[B, K, N, p]`, any floating dtype):
            The projected tokens; fastest as the transposed view of a contiguous `[B, N, K, p]`.
        temperature (`torch.Tensor` of shape `[K]` or `[K, 1]`, floating): temp.
        attention_mask (`torch.Tensor` of shape `[B, N]`, bool or 0/1, *optional*):
            True where a token is real. A masked one is in no sum, whatever its values (NaN included).
        dropout_p (`float`, *optional*, defaults to 0.0):
            The probability of dropping an entry of `1 / (1 + m)`. Not 0 only in training.

    Returns:
        `torch.Tensor` of shape `[B, K, N, p]` in the dtype of `w`, zero where masked; the transposed view of a
        contiguous `[B, N, K, p]`. The statistics are float32 whatever the dtype of `w` (float64 for float64).

    Raises:
        `TypeError`: an argument is not floating.
        `ValueError`: a shape does not fit `w`, or `dropout_p` is not in [0, 1).
    """
    mask = _check_arguments(w, temperature, attention_mask, dropout_p)
    keep = _dropout(w, dropout_p, length=1)
    # The kernel; a few tokens and recorded graphs by the formula; or blocks.
    forward = kernel_of(token_statistics, w)
    if forward is None and _takes_formula(w):
        return bidirectional_formula(w, temperature, mask, keep, dropout_p)
    temperature = temperature.flatten().to(sum_dtype(w))
    return (forward or bidirectional_forward)(w.transpose(1, 2), temperature, mask, keep, dropout_p).transpose(1, 2)


@takes_documents
@has_tokens_at({0: 2, "position_bias": 2})
def causal_token_statistics(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    *,
    log_decay: torch.Tensor | None = None,
    initial_state: TokenStatisticsState | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | Documents | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, TokenStatisticsState]:
    r"""
    Causal token statistics self-attention, every sum over the tokens u ≤ t, in which with `log_decay` a term has decayed
    by what all tokens after it have:

        D_t   = max(Σ_u w_u², 1e-12)
        Π_t   = softmax over heads of temp_k · Σ_c (w_t² / D_t + β[k, t])
        m_t   = Σ_u Π_u w_u² / (Σ_u Π_u + 1e-8)
        out_t = -w_t · Π_t / (1 + m_t)

    Prefill, decoding, packed training and streaming are this one call: pass the state that the previous call
    returned, and the sums go on as if the segments had been one.

    Args:
        w (`torch.Tensor` of shape `[B, K, T, p]`, any floating dtype):
            The projected tokens; fastest as the transposed view of a contiguous `[B, T, K, p]`.
        temperature (`torch.Tensor` of shape `[K]` or `[K, 1]`, floating): temp.
        position_bias (`torch.Tensor` of shape `[K, T]` or `[B, K, T]`, floating, or `None`):
            β at the position of each token.
        log_decay (`torch.Tensor` of shape `[K]` or `[B or 1, T, K]`, floating, *optional*):
            The logarithm, not positive, of the decay of each head, the same for all tokens or one for each: each of the
            three sums is multiplied by it before a token is added. With decays the formula is computed block by block, in
            backward once more; of the Triton kernels it takes that of the decayed sum.
        initial_state (`TokenStatisticsState`, *optional*):
            The sums before the first token. They belong to the document of the first real token. Zero if not given.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool or 0/1, *optional*):
            True where a token is real. A masked one is in no sum, whatever its values (NaN included).
        document_ids (`torch.Tensor` of shape `[B, T]`, integer, or `Documents`, *optional*):
            A change of id from one real token to the next restarts every sum, and no rounding of an earlier document
            reaches a later one.
        dropout_p (`float`, *optional*, defaults to 0.0):
            The probability of dropping an entry of `1 / (1 + m)`. Not 0 only in training.

    Returns:
        `tuple[torch.Tensor, TokenStatisticsState]`: the output `[B, K, T, p]` in the dtype of `w`, zero where masked,
        the transposed view of a contiguous `[B, T, K, p]`; and the sums after the last real token.

    Raises:
        `TypeError`: an argument has the wrong kind of dtype.
        `ValueError`: a shape does not fit `w`, or `dropout_p` is not in [0, 1).
    """
    mask = _check_causal_arguments(
        w, temperature, position_bias, log_decay, initial_state, attention_mask, document_ids, dropout_p
    )
    documents = find_documents(document_ids, mask) if w.shape[2] > 1 else None
    log_decay, keep = _decays(log_decay, w, mask), _dropout(w, dropout_p, w.shape[2])
    return _causal(w, temperature, position_bias, initial_state, mask, log_decay, documents, keep, dropout_p)


def _causal(w, temperature, position_bias, initial_state, mask, log_decay, documents, keep, dropout_p):
    """
    Choose the path: a decode step, which may be a kernel; the formula of a few tokens and of recorded graphs; the formula in
    blocks where there are decays; or blocks, which may be kernels.
    """
    arguments = w, temperature, position_bias, initial_state, mask, log_decay, documents, keep, dropout_p
    if w.shape[2] == 1:
        if log_decay is not None and initial_state is not None:
            initial_state = _decayed(TokenStatisticsState(*initial_state), log_decay)
        # A compiler fuses a single step with what is around it.
        is_plain = keep is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        step = kernel_of(causal_step, w) if is_plain else None
        return (step or causal_step)(w, temperature, position_bias, initial_state, mask, keep, dropout_p)
    forward = kernel_of(causal_token_statistics, w)
    if forward is None and _takes_formula(w, documents):
        return causal_formula(*arguments)
    if log_decay is not None:
        return causal_formula(*arguments) if is_recorded() else _formula_in_blocks(*arguments)
    return _in_blocks(
        forward or causal_forward, w, temperature, position_bias, initial_state, mask, documents, keep, dropout_p
    )


def _in_blocks(forward, w, temperature, position_bias, initial_state, mask, documents, keep, dropout_p):
    """The arguments of [`causal_forward`], or of the kernel in its place."""
    batch_size, num_heads, length, head_dim = w.shape
    dtype = sum_dtype(w)
    if position_bias is not None:
        position_bias = position_bias.to(dtype).transpose(-1, -2).expand(batch_size, length, num_heads)
    if initial_state is None:
        initial = w.new_zeros(batch_size, num_heads * (2 * head_dim + 1), dtype=state_dtype(w))
    else:
        initial = pack(initial_state).to(state_dtype(w))
    w, temperature = w.transpose(1, 2), temperature.flatten().to(dtype)
    ids = None if documents is None else documents.ids
    out, _, final = forward(w, temperature, position_bias, initial, mask, ids, keep, dropout_p)
    return out.transpose(1, 2), unpack(final, num_heads, head_dim)


def token_membership(
    w: torch.Tensor, temperature: torch.Tensor, *, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Π of [`token_statistics`], which documents the arguments and the errors.

    Returns:
        `torch.Tensor` of shape `[B, K, N]` in float32 (float64 for float64 `w`), zero where masked.
    """
    mask = _check_arguments(w, temperature, attention_mask)
    return bidirectional_membership(w, temperature, mask)


@takes_documents
def causal_token_membership(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    *,
    log_decay: torch.Tensor | None = None,
    initial_state: TokenStatisticsState | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | Documents | None = None,
) -> torch.Tensor:
    """
    Π of [`causal_token_statistics`], which documents the arguments and the errors.

    Returns:
        `torch.Tensor` of shape `[B, K, T]` in float32 (float64 for float64 `w`), zero where masked.
    """
    mask = _check_causal_arguments(
        w, temperature, position_bias, log_decay, initial_state, attention_mask, document_ids
    )
    documents = find_documents(document_ids, mask)
    log_decay = _decays(log_decay, w, mask)
    return causal_membership(w, temperature, position_bias, initial_state, mask, log_decay, documents)


def token_statistics_reference(
    w: torch.Tensor,
    temperature: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """[`token_statistics`] as the paper writes it; autograd keeps every intermediate."""
    mask = _check_arguments(w, temperature, attention_mask, dropout_p)
    return bidirectional_formula(w, temperature, mask, _dropout(w, dropout_p, length=1), dropout_p)


def causal_token_statistics_reference(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    *,
    log_decay: torch.Tensor | None = None,
    initial_state: TokenStatisticsState | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | Documents | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, TokenStatisticsState]:
    """[`causal_token_statistics`] as the paper writes it; autograd keeps every intermediate."""
    mask = _check_causal_arguments(
        w, temperature, position_bias, log_decay, initial_state, attention_mask, document_ids, dropout_p
    )
    documents = find_documents(document_ids, mask)
    keep = _dropout(w, dropout_p, w.shape[2])
    log_decay = _decays(log_decay, w, mask)
    return causal_formula(w, temperature, position_bias, initial_state, mask, log_decay, documents, keep, dropout_p)


def _takes_formula(w: torch.Tensor, documents: Documents | None = None) -> bool:
    """A few tokens are cheapest in plain operations; an exported graph may hold, and a transform act on, no others."""
    length = w.shape[2]
    if length <= 1 or is_exported() or is_transformed(w):
        return True
    # A compiled graph takes one path for every length; in training the formula would keep every intermediate.
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return length <= FORMULA_LENGTH and documents is None


def _formula_in_blocks(w, temperature, position_bias, initial_state, mask, log_decay, documents, keep, dropout_p):
    """[`causal_formula`] of a block of tokens after the other, for gradients computed again in backward."""
    outs, state = [], initial_state
    size = max(1, FORMULA_BLOCK_ELEMENTS // w[:, :, 0].numel())
    for start in range(0, w.shape[2], size):
        tokens = slice(start, start + size)
        block_documents = None
        if documents is not None:
            # Where a document begins with the block, the state before it is dropped here.
            begins, starts = documents.starts[:, start], documents.starts[:, start + 1 : start + size]
            block_documents = Documents(documents.ids[:, tokens], F.pad(starts, (1, 0)))
            if state is not None:
                state = TokenStatisticsState(*(t.masked_fill(begins.view(-1, *[1] * (t.dim() - 1)), 0) for t in state))
        arguments = (
            w[:, :, tokens],
            temperature,
            None if position_bias is None else position_bias[..., tokens],
            state,
            None if mask is None else mask[:, tokens],
            None if log_decay is None else log_decay[:, tokens],
            block_documents,
            None if keep is None else keep[:, tokens],
            dropout_p,
        )
        if torch.is_grad_enabled():
            out, state = checkpoint(causal_formula, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            out, state = causal_formula(*arguments)
        outs.append(out.transpose(1, 2))
    return torch.cat(outs, dim=1).transpose(1, 2), state


def _decays(log_decay, w, mask):
    """`[B or 1, T, K]` in the dtype of the statistics, zero where masked; `None` of none."""
    if log_decay is None:
        return None
    log_decay = log_decay.to(sum_dtype(w))
    if log_decay.dim() == 1:
        log_decay = log_decay.expand(1, w.shape[2], -1)
    return log_decay if mask is None else log_decay.masked_fill(~mask.unsqueeze(-1), 0)


def _decayed(state, log_decay):
    """The state `[B, K, ...]` before one token."""
    decay = log_decay[:, 0].to(state.membership.dtype).exp()
    return TokenStatisticsState(*(sums * decay.view(*decay.shape, *[1] * (sums.dim() - 2)) for sums in state))


def _dropout(w, dropout_p, length):
    """Which entries of `1 / (1 + m)` dropout keeps, bool `[B, length, K, p]`; `None` if all."""
    if dropout_p == 0.0:
        return None
    batch_size, num_heads, _, head_dim = w.shape
    keep = torch.empty(batch_size, length, num_heads, head_dim, dtype=torch.bool, device=w.device)
    return keep.bernoulli_(1 - dropout_p)


def _check_arguments(w, temperature, attention_mask, dropout_p=0.0, document_ids=None):
    """Raise for what does not fit; return the mask as bool."""
    if w.ndim != 4:
        raise ValueError(f"`w` must have the shape [B, K, T, p], got {list(w.shape)}.")
    batch_size, num_heads, length, _ = w.shape
    for name, tensor in (("w", w), ("temperature", temperature)):
        if not tensor.is_floating_point():
            raise TypeError(f"`{name}` must be of a floating dtype, got {tensor.dtype}.")
    if temperature.shape not in ((num_heads,), (num_heads, 1)):
        raise ValueError(
            f"`temperature` must have the shape [K] = [{num_heads}] or [{num_heads}, 1] for the heads of `w`, got "
            f"{list(temperature.shape)}."
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"`dropout_p` must be in [0, 1), got {dropout_p}.")
    check_tokens("w", batch_size, length, attention_mask, document_ids)
    return None if attention_mask is None else attention_mask.bool()


def _check_causal_arguments(
    w, temperature, position_bias, log_decay, initial_state, attention_mask, document_ids, dropout_p=0.0
):
    mask = _check_arguments(w, temperature, attention_mask, dropout_p, document_ids)
    batch_size, num_heads, length, head_dim = w.shape
    if position_bias is not None:
        if not position_bias.is_floating_point():
            raise TypeError(f"`position_bias` must be of a floating dtype, got {position_bias.dtype}.")
        # By parts: comparing shapes of two lengths would tie the batch to the number of heads in an exported graph.
        if position_bias.shape[-2:] != (num_heads, length) or position_bias.shape[:-2] not in ((), (batch_size,)):
            raise ValueError(
                f"`position_bias` must be None or have the shape [K, T] = [{num_heads}, {length}] or [B, K, T] = "
                f"[{batch_size}, {num_heads}, {length}] of `w`, got {list(position_bias.shape)}."
            )
    if log_decay is not None:
        if not log_decay.is_floating_point():
            raise TypeError(f"`log_decay` must be of a floating dtype, got {log_decay.dtype}.")
        is_fitting = log_decay.dim() in (1, 3) and log_decay.shape[-1] == num_heads
        if not is_fitting or (
            log_decay.dim() == 3 and not (log_decay.shape[0] in (1, batch_size) and log_decay.shape[1] == length)
        ):
            raise ValueError(
                f"`log_decay` must have the shape [K] = [{num_heads}] or [B, T, K] = [{batch_size}, {length}, "
                f"{num_heads}] of `w` or [1, {length}, {num_heads}], got {list(log_decay.shape)}."
            )
    if initial_state is not None:
        moments = (batch_size, num_heads, head_dim)
        for name, sums, shape in zip(
            TokenStatisticsState._fields, initial_state, (moments, moments, moments[:-1]), strict=True
        ):
            if sums.shape != shape:
                raise ValueError(
                    f"`initial_state.{name}` must have the shape {list(shape)} for `w`, got {list(sums.shape)}."
                )
    return mask
