"""The definition of the causal convolution, to be read and tested against; no checkpoint carries it."""

import torch


def causal_convolution_reference(
    x: torch.Tensor,
    *,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[`causal_convolution`], one token of one row at a time, over a list of the inputs before it; zero where masked."""
    past = weight.shape[1] - 1
    state = x.new_zeros(x.shape[0], past, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    outputs, states = [], []
    for b, inputs in enumerate(list(row) for row in state):
        document = None
        for t in range(x.shape[1]):
            if attention_mask is not None and not attention_mask[b, t]:
                outputs.append(torch.zeros_like(x[b, t]))
                continue
            if document_ids is not None:
                if document is not None and document != document_ids[b, t]:
                    inputs = [torch.zeros_like(x[b, t])] * past
                document = document_ids[b, t]
            inputs = [*inputs, x[b, t]]
            y = (torch.stack(inputs) * weight.T).sum(0)
            outputs.append(y if bias is None else y + bias)
            inputs = inputs[1:]
        states.append(torch.stack(inputs))
    return torch.stack(outputs).view(x.shape) if outputs else x, torch.stack(states)
