"""The definition of the weighted mean, to be read and tested against; no checkpoint carries it."""

import torch

from ..running_sum.running_sum_reference import causal_sum_reference


def causal_mean_reference(
    x: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    weight: torch.Tensor | None = None,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    relu: bool = False,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """[`causal_mean`] by the loop of [`causal_sum_reference`] over the weights, and over the terms times their weights."""
    heads = log_decay.shape[-1]
    weights = x.new_ones(heads, dtype=torch.float64) if weight is None else weight.double()
    weights = weights.expand(*x.shape[:2], heads)
    sums, total = (None, None) if initial_state is None else initial_state
    arguments = {"log_decay": log_decay, "attention_mask": attention_mask, "document_ids": document_ids}
    totals, total = causal_sum_reference(weights, initial_state=total, **arguments)
    terms = x.double().relu() if relu else x.double()
    terms = terms.unflatten(2, (heads, -1)) * weights.unsqueeze(-1)
    sums_of_tokens, sums = causal_sum_reference(terms.flatten(2), initial_state=sums, **arguments)
    totals = totals.unsqueeze(-1)
    means = torch.where(totals == 0, 0, sums_of_tokens.unflatten(2, (heads, -1)) / totals)
    return means.flatten(2).to(x.dtype), (sums, total)
