"""The definition of the causal sum, to be read and tested against; no checkpoint carries it."""

import torch

from ..precision import state_dtype
from .running_sum import scaled


def causal_sum_reference(
    x: torch.Tensor,
    *,
    log_decay: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    relu: bool = False,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`causal_sum`], one token at a time: slow, and the definition of every other path."""
    batch_size, length, hidden_size = x.shape
    dtype = state_dtype(x)
    state = x.new_zeros(batch_size, hidden_size, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if log_decay is not None:
        decay = log_decay.to(dtype).exp().expand(batch_size, length, log_decay.shape[-1])
        decay = decay.repeat_interleave(hidden_size // log_decay.shape[-1], dim=-1)
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
                if log_decay is not None:
                    row = decay[b, t] * row
                row = row + (x[b, t].relu() if relu else x[b, t]).to(dtype)
            rows.append(row)
        state = torch.stack(rows) if rows else state
        outputs.append(state)
    y = torch.stack(outputs, dim=1) if outputs else x.to(dtype)
    return scaled(y, scale).to(x.dtype), state
