"""A short causal convolution, whose last inputs are decode state."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache
from transformers import initialization as init

from ..ops.causal_convolution import causal_convolution
from .layout import SequenceLayout
from .recurrence import recur


class CausalConvolution(nn.Module):
    """
    Depthwise causal convolution over the real tokens of a document, SiLU after it.

    Args:
        hidden_size (`int`): the channels, d.
        kernel_size (`int`): the tokens that an output sees, its own included.
        layer_idx (`int`): the layer of the cache.
    """

    def __init__(self, hidden_size: int, kernel_size: int, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.weight = nn.Parameter(torch.empty(hidden_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_states: torch.Tensor, layout: SequenceLayout, cache: Cache | None = None) -> torch.Tensor:
        """`hidden_states` `[B, T, d]` to the outputs of the same shape."""
        parameters = {"weight": self.weight, "bias": self.bias}
        return F.silu(recur(causal_convolution, hidden_states, layout, cache, self.layer_idx, **parameters))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5  # as PyTorch starts its convolutions
        init.uniform_(self.weight, -bound, bound)
        init.zeros_(self.bias)
