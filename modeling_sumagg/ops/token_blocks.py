"""Layers that act on each token by itself, over a long sequence."""

from collections.abc import Callable

import torch


BLOCK_BYTES = 4 * 2**20  # of an argument
# glibc keeps freed memory at hand up to twice the largest piece that was freed so far, of those below 32 MiB. Twice this
# is enough for a block in a feed-forward layer four times as wide as its input.
KEPT_BYTES = 7 * BLOCK_BYTES


def token_wise(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """
    `function(*inputs)`, for a function of each token by itself; without gradients on a CPU in blocks of tokens.

    The allocator returns large tensors to the system, which fills every page with zeros when it is asked for again. What
    a block needs in between is small enough to be kept, and to stay in the cache of the processor; and the memory beside
    inputs and output does not grow with the sequence.

    Args:
        function (`Callable`): of tensors `[..., D_i]` to a tensor `[..., D]`, each token by itself.
        inputs (`torch.Tensor` of shape `[B, T, D_i]`): all of the same `B` and `T`.

    Returns:
        `torch.Tensor` of shape `[B, T, D]`.
    """
    x = inputs[0]
    rows = max(1, BLOCK_BYTES // (x.shape[-1] * x.itemsize))
    is_traced = torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()
    if is_traced or torch.is_grad_enabled() or x.device.type != "cpu" or x.shape[:-1].numel() <= 2 * rows:
        return function(*inputs)

    tokens = [tensor.flatten(0, -2).unsqueeze(0) for tensor in inputs]
    torch.empty(KEPT_BYTES, dtype=torch.uint8)  # freed at once, and never touched
    output = None
    for start in range(0, tokens[0].shape[1], rows):
        block = function(*(tensor[:, start : start + rows] for tensor in tokens))
        if output is None:
            output = block.new_empty(*x.shape[:-1], block.shape[-1])
            output_tokens = output.view(1, -1, block.shape[-1])
        output_tokens[:, start : start + rows] = block
    return output
