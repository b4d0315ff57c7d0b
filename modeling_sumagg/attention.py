"""Softmax attention as both text families use it: transformers' attention interface, and a linear path for windows."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedConfig

from .ops.sliding_attention import sliding_window_attention


def attends_in_blocks(config: PreTrainedConfig, length: int) -> bool:
    """
    Whether sliding attention over a segment of `length` tokens without padding goes block by block, without a mask.
    `"sdpa"` alone would build the mask of length × length; the other implementations have means of their own.
    """
    return config._attn_implementation == "sdpa" and config.is_causal and length > config.sliding_window


def attention(
    module: nn.Module,
    interface: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Attend with the implementation that `module.config` names.

    Args:
        module (`nn.Module`): with `config`, `scaling`, `is_causal`, `is_sliding`.
        interface (`Callable`): that implementation, from `ALL_ATTENTION_FUNCTIONS.get_interface`. (The file of a model
            makes this call itself: `set_attn_implementation` looks for it there.)
        query (`torch.Tensor` of shape `[B, H, T, p]`): the queries.
        key, value (`torch.Tensor` of shape `[B, H, P + T, p]`): those of the cache and of the segment.
        attention_mask: the mask of this type of layer that `create_attention_masks` made.

    Returns:
        `tuple[torch.Tensor, torch.Tensor | None]`: the output `[B, T, H · p]`, and the weights if the implementation
        has them.
    """
    config = module.config
    dropout = config.attention_dropout if module.training else 0.0
    if module.is_sliding and attention_mask is None and attends_in_blocks(config, query.shape[2]):
        # A cache that records its past hands over more than the window reaches.
        reach = config.sliding_window - 1 + query.shape[2]
        output = sliding_window_attention(
            query,
            key[:, :, -reach:],
            value[:, :, -reach:],
            sliding_window=config.sliding_window,
            scaling=module.scaling,
            dropout_p=dropout,
        )
        return output.transpose(1, 2).flatten(2), None
    output, weights = interface(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=module.scaling,
        sliding_window=config.sliding_window if module.is_sliding else None,
        **kwargs,
    )
    return output.flatten(2), weights
