"""Short causal convolution, one kernel for each channel, over the real tokens of a document."""

import torch

from ..dispatch import is_recorded, is_transformed, kernel_of
from ..documents import Documents, check_tokens, find_documents, takes_documents
from ..precision import sum_dtype
from .causal_convolution_torch import (
    Convolution,
    behind_one_another,
    compact,
    convolution_by_taps,
    ids_of_window,
    inputs_of_last_document,
    of_channels,
)


@takes_documents
def causal_convolution(
    x: torch.Tensor,
    *,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | Documents | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Depthwise causal convolution, `y_t = b + sum_i w_i x_{t - k + 1 + i}` over `i = 0 … k - 1`, elementwise.

    Only real tokens of the same document count as tokens before `t`; before the first there are zeros.

    Args:
        x (`torch.Tensor` of shape `[B, T, D]`, any floating dtype): the inputs.
        weight (`torch.Tensor` of shape `[D, k]`): the kernel of each channel, the newest token last; `k >= 2`.
        bias (`torch.Tensor` of shape `[D]`, *optional*): b.
        initial_state (`torch.Tensor` of shape `[B, k - 1, D]`, *optional*): the `k - 1` inputs before the first token, of
            the document of the first real token. Zero if not given.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool or 0/1, *optional*): True where a token is real.
        document_ids (`torch.Tensor` of shape `[B, T]`, integer, or `Documents`, *optional*): a change of id from one real
            token to the next begins another document.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `y` `[B, T, D]` in the dtype of `x`, computed in float32 at least and rounded
        once; and the last `k - 1` inputs `[B, k - 1, D]`, in the dtype of `x`.

    Raises:
        `TypeError`: `x` is not floating, or `document_ids` is not integer.
        `ValueError`: a shape does not fit `x`.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 2:
        raise ValueError(
            f"`x` must have the shape [B, T, D] and `weight` [D, k] with k >= 2, got {list(x.shape)} and "
            f"{list(weight.shape)}."
        )
    if not x.is_floating_point():
        raise TypeError(f"`x` must be of a floating dtype, got {x.dtype}.")
    batch_size, length, hidden_size = x.shape
    check_tokens("x", batch_size, length, attention_mask, document_ids)
    past = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(batch_size, past, hidden_size)
    elif initial_state.shape != (batch_size, past, hidden_size):
        raise ValueError(
            f"`initial_state` must have the shape [{batch_size}, {past}, {hidden_size}], got {list(initial_state.shape)}."
        )
    state = initial_state.to(x.dtype)
    mask = None if attention_mask is None else attention_mask.bool()
    documents = find_documents(document_ids, mask)
    if length == 0:
        return x, state
    if mask is not None and length > 1:
        return _convolve_compactly(x, state, weight, bias, mask, documents)
    ids = None if documents is None or length == 1 else documents.ids
    window = torch.cat([state, x], dim=1)
    y, last = _convolve(window, weight, bias, ids), window[:, length:]
    if mask is not None:
        last = torch.where(mask[..., None], last, state)
    elif ids is not None:
        last = inputs_of_last_document(last, ids, ids.new_full((batch_size, 1), length))
    # A copy, unless it is one token: a slice would keep the whole window in memory as long as the state.
    return y, last if length == 1 else last.clone()


def _convolve_compactly(x, state, weight, bias, mask, documents):
    """The same where tokens are masked: the window holds real tokens only."""
    window, rank = compact(x, state, mask)
    ids = None if documents is None else behind_one_another(documents.ids, rank, mask)
    y = _convolve(window, weight, bias, ids).gather(1, of_channels((rank - 1).clamp(min=0), x))
    counts = rank[:, -1:]
    last = window.gather(1, of_channels(counts + torch.arange(state.shape[1], device=x.device), x))
    return y, last if ids is None else inputs_of_last_document(last, ids, counts)


def _convolve(
    window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor | None
) -> torch.Tensor:
    """
    The convolution of a window `[B, k - 1 + T, D]`, `[B, T, D]`, of which the first inputs belong to the first of the `ids`
    `[B, T]`. Choose the path: one token; the kernel; plain operations for graphs and transforms; or a function of its own.
    """
    past = weight.shape[1] - 1
    dtype = sum_dtype(window)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if window.shape[1] == 1 + past:
        y = (window.to(dtype) * weight.T).sum(dim=1, keepdim=True)
        return (y if bias is None else y + bias).to(window.dtype)
    ids = None if ids is None else ids_of_window(ids, past)
    kernel = kernel_of(causal_convolution, window)
    if kernel is not None:
        return kernel(window, weight, bias, ids)
    plain = is_recorded() or is_transformed(window)
    return (convolution_by_taps if plain else Convolution.apply)(window, weight, bias, ids)
