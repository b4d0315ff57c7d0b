"""The definition of the keyed sum, to read beside `keyed_sum.py` and to test against; no checkpoint carries it."""

import torch

from ..precision import sum_dtype


def causal_keyed_sum_reference(
    values: torch.Tensor,
    keys: torch.Tensor,
    queries: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    weight: torch.Tensor | None = None,
    average: bool = False,
    initial_state: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`causal_keyed_sum`], row by row and token by token."""
    batch_size, length, heads, width = values.shape
    dtype = sum_dtype(values)
    rows, states = [], []
    for b in range(batch_size):
        if initial_state is None:
            state = values.new_zeros(heads, keys.shape[3], width, dtype=dtype)
        else:
            state = initial_state[b].to(dtype)
        document, outputs = None, []
        for t in range(length):
            if attention_mask is not None and not attention_mask[b, t]:
                outputs.append(values.new_zeros(heads, width, dtype=dtype))
                continue
            if document_ids is not None:
                if document is not None and document != document_ids[b, t].item():
                    state = torch.zeros_like(state)
                document = document_ids[b, t].item()
            group = heads // keys.shape[2]
            key, query = (x[b, t].to(dtype).repeat_interleave(group, 0) for x in (keys, queries))
            decay = log_decay.expand(batch_size, -1, -1)[b, t].to(dtype).exp()
            value = values[b, t].to(dtype)
            if average:
                value = value * (1 - decay[:, None])
            if weight is not None:
                value = value * weight.expand(batch_size, -1, -1)[b, t].to(dtype)[:, None]
            state = decay[:, None, None] * state + key[:, :, None] * value[:, None, :]
            outputs.append(torch.einsum("kn,knp->kp", query, state))
        rows.append(torch.stack(outputs) if outputs else values[b].to(dtype))
        states.append(state)
    return torch.stack(rows).to(values.dtype), torch.stack(states)
