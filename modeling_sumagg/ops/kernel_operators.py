"""The Triton kernels as operators of PyTorch, with gradients and for compilers, and when they are used.

Triton is imported when one of them runs first.
"""

import functools
import importlib
import logging
import sys
from typing import Any

import torch

from .causal_convolution import convolution_gradients
from .kernels.kernel_dispatch import provide_kernels
from .scan import scan_vjp, shifted
from .summation import mean_of_sums


logger = logging.getLogger(__name__)

MODES = ("auto", "triton", "torch")
MODULES = {
    "running_sum": "running_sum_kernels",
    "decayed_sum": "decayed_sum_kernels",
    "decayed_mean": "decayed_mean_kernels",
    "decayed_mean_gradients": "decayed_mean_kernels",
    "convolution": "causal_convolution_kernels",
    "convolution_weight_gradient": "causal_convolution_kernels",
    "INTERPRETED": "running_sum_kernels",
}

_mode = "auto"


def set_kernels(mode: str) -> None:
    """
    Choose how [`causal_sum`], [`causal_token_statistics`] and [`token_statistics`] are computed in this process.

    When `modeling_sumagg` is imported, the environment variable `MODELING_SUMAGG_KERNELS` chooses.

    Args:
        mode (`str`):
            `"auto"`, the default: by Triton kernels for CUDA tensors if Triton can be imported, else by PyTorch's
            operations. `"triton"`: always by the kernels; CPU tensors too, which need Triton's interpreter, that is
            `TRITON_INTERPRET=1` in the environment before Triton is imported. `"torch"`: always by PyTorch's operations.
            An exported graph holds PyTorch's operations in each mode.

    Raises:
        `ValueError`: another mode.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"The mode of the kernels must be one of {MODES}, got {mode!r}.")
    _mode = mode


def are_chosen(device_type: str) -> bool:
    """Whether operators on tensors of such a device run as kernels."""
    return _mode != "torch" and _has_kernels(_mode, device_type)


# A compiler takes the answer as a constant, and does not follow the imports.
@torch.compiler.assume_constant_result
def _has_kernels(mode: str, device_type: str) -> bool:
    if mode == "auto":
        return device_type == "cuda" and _has_triton()
    if device_type != "cuda" and not triton_function("INTERPRETED").value:
        raise ValueError(
            f"The Triton kernels run on CUDA tensors, got one on {device_type!r}. Choose `set_kernels('auto')`, or "
            "set TRITON_INTERPRET=1 in the environment before Triton is imported."
        )
    return True


@functools.cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        logger.warning(
            "Triton cannot be imported (%s): the operators run as PyTorch operations, slower than its kernels. Install "
            "`triton`, or choose this path by `set_kernels('torch')`.",
            error,
        )
        return False
    return True


def triton_function(name: str) -> Any:
    """What launches a kernel, from the module that defines it."""
    module = MODULES.get(name, "token_statistics_kernels")
    return getattr(importlib.import_module(f".kernels.{module}", __package__), name)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return triton_function(name)


@torch.library.custom_op("modeling_sumagg::running_sum", mutates_args=())
def running_sum(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    scale: torch.Tensor | None,
    initial: torch.Tensor,
    mask: torch.Tensor | None,
    runs: torch.Tensor | None,
    relu: bool,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton kernel of `causal_sum`, or with `reverse` of its adjoint. The kernel documents the arguments."""
    return triton_function("running_sum")(x, gate, scale, initial, mask, runs, relu=relu, reverse=reverse)


@running_sum.register_fake
def _running_sum_fake(x, gate, scale, initial, mask, runs, relu, reverse):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(initial, memory_format=torch.contiguous_format)


def _running_sum_setup_context(ctx, inputs, output):
    x, gate, scale, _, mask, runs, relu, ctx.reverse = inputs
    ctx.save_for_backward(x if relu else gate, scale, mask, runs)


def _running_sum_vjp(ctx, grad_y, grad_final):
    # Linear but for the sign of the terms, so that the adjoint has derivatives of every order in turn.
    gate, scale, mask, runs = ctx.saved_tensors
    grad_x, grad_initial = running_sum(grad_y, gate, scale, grad_final, mask, runs, False, not ctx.reverse)
    return grad_x, None, None, grad_initial, None, None, None, None


running_sum.register_autograd(_running_sum_vjp, setup_context=_running_sum_setup_context)


@torch.library.custom_op("modeling_sumagg::decayed_sum", mutates_args=())
def decayed_sum(
    x: torch.Tensor, log_decay: torch.Tensor, initial: torch.Tensor, relu: bool, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton kernel of `scan`, or with `reverse` of its adjoint. The kernel documents the arguments."""
    return triton_function("decayed_sum")(x, log_decay, initial, relu=relu, reverse=reverse)


@decayed_sum.register_fake
def _decayed_sum_fake(x, log_decay, initial, relu, reverse):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(initial, memory_format=torch.contiguous_format)


def _decayed_sum_setup_context(ctx, inputs, output):
    x, log_decay, initial, ctx.relu, _ = inputs
    ctx.save_for_backward(x if ctx.relu else None, log_decay, initial, output[0])


def _kernelscan_vjp(ctx, grad, grad_final):
    x, log_decay, initial, y = ctx.saved_tensors
    if torch.is_grad_enabled():  # A gradient that has gradients in turn is a sum over the reversed tokens.
        grad, _ = decayed_sum(grad.flip(1), shifted(log_decay).flip(1), grad_final, False, False)
        grad = grad.flip(1)
    else:
        grad, _ = decayed_sum(grad, log_decay, grad_final, False, True)
    grad, grad_decay, grad_initial = scan_vjp(grad, y, log_decay, initial, None, needs_decay=ctx.needs_input_grad[1])
    if ctx.relu:
        grad = torch.ops.aten.threshold_backward(grad, x, 0)
    return grad, grad_decay, grad_initial, None, None


decayed_sum.register_autograd(_kernelscan_vjp, setup_context=_decayed_sum_setup_context)


@torch.library.custom_op("modeling_sumagg::decayed_mean", mutates_args=())
def decayed_mean(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    total: torch.Tensor,
    relu: bool,
    keep_rest: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Triton kernel of `causal_mean`, which documents arguments and results."""
    return triton_function("decayed_mean")(x, log_decay, weight, sums, total, relu=relu, keep_rest=keep_rest)


@decayed_mean.register_fake
def _decayed_mean_fake(x, log_decay, weight, sums, total, relu, keep_rest):
    y, sums, total = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, sums, total))
    rest = torch.empty_like(y) if keep_rest else y.new_empty(0)
    return y, rest, log_decay.new_empty(*x.shape[:2], log_decay.shape[2]), sums, total


@torch.library.custom_op("modeling_sumagg::decayed_mean_backward", mutates_args=())
def decayed_mean_backward(
    grad_y: torch.Tensor,
    grad_sums: torch.Tensor,
    grad_total: torch.Tensor,
    x: torch.Tensor,
    log_decay: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    total: torch.Tensor,
    y: torch.Tensor,
    rest: torch.Tensor,
    totals: torch.Tensor,
    relu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the first five arguments of `decayed_mean`."""
    arguments = grad_y, grad_sums, grad_total, x, log_decay, weight, sums, total, y, rest, totals
    return triton_function("decayed_mean_gradients")(*arguments, relu=relu)


@decayed_mean_backward.register_fake
def _decayed_mean_backward_fake(
    grad_y, grad_sums, grad_total, x, log_decay, weight, sums, total, y, rest, totals, relu
):
    leaves = x, log_decay, weight, sums, total
    return tuple(torch.empty_like(leaf, memory_format=torch.contiguous_format) for leaf in leaves)


def _decayed_mean_setup_context(ctx, inputs, output):
    *leaves, ctx.relu, _ = inputs
    ctx.save_for_backward(*leaves, *output[:3])


def _decayed_mean_vjp(ctx, grad_y, _grad_rest, _grad_totals, grad_sums, grad_total):
    *leaves, y, rest, totals = ctx.saved_tensors
    if torch.is_grad_enabled():  # A gradient that has gradients in turn is that of the two sums.
        leaves = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
        x, log_decay, weight, sums, total = leaves
        # What has no weight is masked, and may be anything.
        x = x.unflatten(2, (weight.shape[2], -1)).masked_fill((weight == 0).unsqueeze(-1), 0).flatten(2)
        means, *states = mean_of_sums(x.to(weight.dtype), log_decay, weight, sums, total, None, ctx.relu)
        outputs = means.to(grad_y.dtype), *states
        return *torch.autograd.grad(outputs, leaves, (grad_y, grad_sums, grad_total), create_graph=True), None, None
    return *decayed_mean_backward(grad_y, grad_sums, grad_total, *leaves, y, rest, totals, ctx.relu), None, None


decayed_mean.register_autograd(_decayed_mean_vjp, setup_context=_decayed_mean_setup_context)


@torch.library.custom_op("modeling_sumagg::convolution", mutates_args=())
def convolution(
    window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ids: torch.Tensor | None
) -> torch.Tensor:
    """The Triton kernel of `causal_convolution`, which documents the arguments."""
    return triton_function("convolution")(window, weight, bias, ids)


@convolution.register_fake
def _convolution_fake(window, weight, bias, ids):
    return window.new_empty(window.shape[0], window.shape[1] - weight.shape[1] + 1, window.shape[2])


@torch.library.custom_op("modeling_sumagg::convolution_backward", mutates_args=())
def convolution_backward(
    grad: torch.Tensor, window: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the window, the weights and the bias."""
    grad_window = triton_function("convolution")(grad, weight, None, ids, reverse=True)
    return grad_window, *triton_function("convolution_weight_gradient")(window, grad, ids, weight.dtype)


@convolution_backward.register_fake
def _convolution_backward_fake(grad, window, weight, ids):
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return window.new_empty(window.shape), grad_weight, weight.new_empty(weight.shape[0])


def _convolution_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _convolution_vjp(ctx, grad):
    window, weight, bias, ids = ctx.saved_tensors
    if torch.is_grad_enabled():
        return *convolution_gradients(grad, window, weight, bias, ids), None
    grad_window, grad_weight, grad_bias = convolution_backward(grad, window, weight, ids)
    return grad_window, grad_weight, None if bias is None else grad_bias, None


convolution.register_autograd(_convolution_vjp, setup_context=_convolution_setup_context)


provide_kernels(sys.modules[__name__])
