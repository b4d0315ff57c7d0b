"""Layers that act on each token by itself, over a long sequence."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad


BLOCK_BYTES = 4 * 2**20  # of an argument
# glibc keeps freed memory at hand up to twice the largest piece that was freed so far, of those below 32 MiB.
KEPT_BYTES = 31 * 2**20

# From this size on an activation is computed again in backward: glibc hands tensors of less from one layer to the next.
RECOMPUTED_BYTES = 32 * 2**20
RECOMPUTED_BLOCK_BYTES = RECOMPUTED_BYTES // 2


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
    if _is_traced() or torch.is_grad_enabled() or x.device.type != "cpu" or x.shape[:-1].numel() <= 2 * rows:
        return function(*inputs)

    tokens = [tensor.flatten(0, -2).unsqueeze(0) for tensor in inputs]
    keep_freed_memory(x)
    output = None
    for start in range(0, tokens[0].shape[1], rows):
        block = function(*(tensor[:, start : start + rows] for tensor in tokens))
        if output is None:
            output = block.new_empty(*x.shape[:-1], block.shape[-1])
            output_tokens = output.view(1, -1, block.shape[-1])
        output_tokens[:, start : start + rows] = block
    return output


def keep_freed_memory(x: torch.Tensor) -> None:
    """
    Let the allocator of a CPU, where `x` is, keep freed memory at hand instead of returning it to the system.

    From then on that of up to 62 MiB, which is enough for a block of a feed-forward layer four times as wide as its
    input, or for all patches of an image of 1024 pixels.
    """
    if x.device.type == "cpu" and not _is_traced():
        torch.empty(KEPT_BYTES, dtype=torch.uint8)  # freed at once, and never touched


def activated_linear(x: torch.Tensor, act_fn: nn.Module, linear: nn.Module) -> torch.Tensor:
    """
    `linear(act_fn(x))`; from 32 MiB on, what the activation returns is computed again in backward instead of kept.

    The activation of a feed-forward layer needs `x` for its gradient, and the linear map needs what it returns: two
    tensors of the intermediate size, of which the second costs one pass over the first. On a CPU forward and backward
    work in blocks of tokens, and it is never whole in memory.

    Args:
        x (`torch.Tensor` of shape `[B, T, D_i]`): before the activation.
        act_fn (`nn.Module`): acts on each element by itself.
        linear (`nn.Module`): from `D_i` to `D` features. Anything but a whole `nn.Linear` (an adapter, a sharded or a
            quantized layer), or hooks on it, and it is called as a module and its input is kept.

    Returns:
        `torch.Tensor` of shape `[B, T, D]`.
    """
    is_small = x.numel() * x.itemsize < RECOMPUTED_BYTES
    if is_small or not torch.is_grad_enabled() or _is_traced() or torch._C._are_functorch_transforms_active():
        return linear(act_fn(x))
    is_plain = is_plain_linear(linear) and not is_intercepted(act_fn) and not any(True for _ in act_fn.parameters())
    if not is_plain or type(x) is not torch.Tensor or x.is_meta or forward_ad.unpack_dual(x).tangent is not None:
        return linear(act_fn(x))
    weight, bias = linear.weight, linear.bias
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype != weight.dtype:
        return linear(act_fn(x))
    # Its `forward`, as what watches the calls of all modules expects none within backward.
    return _ActivatedLinear.apply(x, weight, bias, act_fn.forward)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activate):
        ctx.save_for_backward(x, weight, bias)
        ctx.activate = activate
        # Backward runs without the autocast of forward.
        device_type = x.device.type
        ctx.autocast = {
            "device_type": device_type,
            "dtype": torch.get_autocast_dtype(device_type),
            "enabled": torch.is_autocast_enabled(device_type),
        }
        tokens = x.flatten(0, -2)
        blocks = _token_slices(tokens, weight)
        if len(blocks) == 1:
            return F.linear(activate(x).to(weight.dtype), weight, bias)
        output = x.new_empty(len(tokens), len(weight))
        for block in blocks:
            output[block] = F.linear(activate(tokens[block]).to(weight.dtype), weight, bias)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # A graph of the gradients is wanted: that of the plain formula.
            with torch.autocast(**ctx.autocast):
                output = F.linear(ctx.activate(x).to(weight.dtype), weight, bias)
            needed = [tensor for tensor, needs in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False) if needs]
            grads = iter(torch.autograd.grad(output, needed, grad, create_graph=True))
            return *(next(grads) if needs else None for needs in (needs_x, needs_weight, needs_bias)), None

        tokens, grad = x.flatten(0, -2), grad.flatten(0, -2)
        blocks = _token_slices(tokens, weight)
        grad_x = torch.empty_like(tokens) if needs_x and len(blocks) > 1 else None
        grad_weight = None
        for block in blocks:
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                leaf = tokens[block].detach().requires_grad_()
                activated = ctx.activate(leaf).to(weight.dtype)
            if needs_weight and grad_weight is None:
                grad_weight = grad[block].mT @ activated.detach()
            elif needs_weight:
                torch.addmm(grad_weight, grad[block].mT, activated.detach(), out=grad_weight)
            if needs_x:
                (grad_block,) = torch.autograd.grad(activated, leaf, grad[block] @ weight)
                if grad_x is None:
                    grad_x = grad_block
                else:
                    grad_x[block] = grad_block
        return grad_x.view_as(x) if needs_x else None, grad_weight, grad.sum(0) if needs_bias else None, None


def _token_slices(tokens: torch.Tensor, weight: torch.Tensor) -> list[slice]:
    """Blocks of tokens `[N, D_i]`; one unless they are on a CPU, and in a dtype in which gradients can be added up."""
    length = len(tokens)
    rows = length
    if tokens.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64):
        # At least as large as the weight, for each block passes over it and its gradient.
        rows = max(RECOMPUTED_BLOCK_BYTES // (tokens.shape[-1] * tokens.itemsize), len(weight))
    return [slice(start, start + rows) for start in range(0, length, rows)]


def is_plain_linear(module: nn.Module) -> bool:
    """Whether it is a whole `nn.Linear` that does nothing else: no adapter, not sharded or quantized, without hooks."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and module.weight.shape == (module.out_features, module.in_features)
        and not is_intercepted(module)
    )


def is_intercepted(module: nn.Module) -> bool:
    """Whether hooks or another `forward` act on a call of the module."""
    return "forward" in module.__dict__ or any(
        hooks
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()
