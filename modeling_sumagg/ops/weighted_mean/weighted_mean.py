"""Weighted means over a sequence in which earlier terms decay, causal and bidirectional."""

import torch

from ..dispatch import kernel_of
from ..documents import Documents, find_documents, takes_documents
from ..running_sum.running_sum import check_sequence, masked_terms, per_token, state_before
from .weighted_mean_torch import mean_of_token, means_of_segment


@takes_documents
def causal_mean(
    x: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    weight: torch.Tensor | None = None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | Documents | None = None,
    relu: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    r"""
    Weighted mean over time in which earlier terms decay, exact from the first token on:

        m_t = s_t / n_t,    s_t = a_t s_{t-1} + v_t x_t,    n_t = a_t n_{t-1} + v_t

    With weights `v = 1` and without decay it is the plain mean; with `v_t = 1 - a_t`, that is
    `weight=-torch.expm1(log_decay)`, `s_t` is the moving average whose first tokens are too small by `n_t`.

    Args:
        x, log_decay, attention_mask, document_ids, relu: as for [`causal_sum`].
        weight (`torch.Tensor` of shape `[K]` or `[B or 1, T, K]`, floating, *optional*):
            v, not negative, for the heads of `log_decay`. 1 if not given. However small the weights, the derivatives by `x`
            and by the logarithms of weights and decays are of the size of those of a mean.
        initial_state (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            The sums before the first token, s `[B, D]` and n `[B, K]`. Zero if not given.

    Returns:
        `tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]`: the means `[B, T, D]` in the dtype of `x`, rounded once,
        zero where the weights are; and the final state, in the dtype of that of [`causal_sum`].

    Raises:
        `TypeError`: `x`, `log_decay` or `weight` is not floating, or `document_ids` is not integer.
        `ValueError`: a shape does not fit `x`, or `weight` has other heads than `log_decay`.
    """
    check_sequence(x, attention_mask, document_ids)
    decays, weights = _decays_and_weights(log_decay, weight, x, attention_mask)
    sums, total = (None, None) if initial_state is None else initial_state
    sums = state_before("initial_state[0]", sums, x.shape[2], x)
    total = state_before("initial_state[1]", total, decays.shape[2], x)
    documents = find_documents(document_ids, attention_mask)
    means, *state = _means(x, decays, weights, sums, total, attention_mask, documents, relu)
    return means.to(x.dtype), tuple(state)


def _means(x, decays, weights, sums, total, mask, documents, relu):
    """Choose the path: no tokens; one token, in few operations; the kernel; two scans."""
    if x.shape[1] == 0:
        return x, sums, total
    if x.shape[1] == 1:
        return mean_of_token(masked_terms(x, mask), decays, weights, sums, total, relu)
    kernel = kernel_of(causal_mean, x)
    if kernel is not None:
        return kernel(x, decays, weights, sums, total, documents, relu)
    return means_of_segment(masked_terms(x, mask), decays, weights, sums, total, documents, relu)[:3]


@takes_documents
def bidirectional_mean(
    x: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    weight: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | Documents | None = None,
) -> torch.Tensor:
    """
    Weighted mean over both sides in which distant terms decay: as [`causal_mean`], of [`bidirectional_sum`].

    Args:
        x, log_decay, attention_mask, document_ids: as for [`bidirectional_sum`].
        weight (`torch.Tensor` of shape `[K]` or `[B or 1, T, K]`, floating, *optional*): not negative, for the heads of
            `log_decay`. 1 if not given.

    Returns:
        `torch.Tensor` of shape `[B, T, D]` in the dtype of `x`, zero where the weights are.

    Raises:
        As [`causal_mean`].
    """
    check_sequence(x, attention_mask, document_ids)
    decays, weights = _decays_and_weights(log_decay, weight, x, attention_mask)
    if x.shape[1] == 0:
        return x
    terms = masked_terms(x, attention_mask)
    sums = state_before("sums", None, x.shape[2], x)
    total = state_before("total", None, decays.shape[2], x)
    weights = weights.to(total.dtype)

    def of_side(terms, decays, weights, documents):
        means, _, _, totals = means_of_segment(terms, decays, weights, sums, total, documents)
        return means, totals

    # 1. The means of both sides, each with the own term, and their weights.
    tokens = terms, decays, weights
    documents = find_documents(document_ids, attention_mask)
    left, left_weight = of_side(*tokens, documents)
    ids = None if documents is None else documents.ids.flip(1)
    right, right_weight = (t.flip(1) for t in of_side(*(t.flip(1) for t in tokens), find_documents(ids)))  # type: ignore[call-arg]
    # 2. Joined by the shares of their weights, and without the own term once.
    both = left_weight + right_weight - weights
    both = both.masked_fill(both == 0, 1)
    means = sum(
        t.unflatten(2, (decays.shape[2], -1)) * (weight / both).to(t.dtype).unsqueeze(-1)
        for t, weight in ((left, left_weight), (right, right_weight), (terms, -weights))
    )
    return means.flatten(2).to(x.dtype)


def _decays_and_weights(log_decay, weight, x, attention_mask):
    decays = per_token("log_decay", log_decay, x, attention_mask)
    heads = decays.shape[2]
    if weight is not None and weight.shape[-1] != heads:
        raise ValueError(
            f"`weight` must be given for the {heads} heads of `log_decay`, got the shape {list(weight.shape)}."
        )
    return decays, per_token("weight", x.new_ones(heads) if weight is None else weight, x, attention_mask)
