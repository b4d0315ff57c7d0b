"""Which path an operator takes: PyTorch's operations, or the Triton kernel that is registered for them."""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad


# The code in a checkpoint has no kernels, and leaves both as they are.
_kernels: dict[Callable, Callable] = {}
_are_chosen: Callable[[str], bool] | None = None


def register_kernel(operation: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated function as the kernel of a function of PyTorch's operations with the same arguments."""

    def register(kernel: Callable) -> Callable:
        _kernels[operation] = kernel
        return kernel

    return register


def set_mode(are_chosen: Callable[[str], bool]) -> None:
    """Let kernels run on tensors of the device types for which `are_chosen` is true."""
    global _are_chosen
    _are_chosen = are_chosen


def kernel_of(operation: Callable, x: torch.Tensor) -> Callable | None:
    """
    The kernel of a function, if the function runs as a kernel on `x`; see [`~modeling_sumagg.ops.set_kernels`].

    Raises:
        `ImportError`: the mode is `"triton"` and Triton cannot be imported.
        `ValueError`: the mode is `"triton"`, and `x` is neither on a CUDA device nor in Triton's interpreter.
    """
    if _are_chosen is None or x.numel() == 0 or is_exported() or is_transformed(x):
        return None
    return _kernels.get(operation) if _are_chosen(x.device.type) else None


def is_exported() -> bool:
    """Whether a graph is recorded that leaves this process: by `torch.export`, `torch.jit.trace` or for ONNX."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def is_recorded() -> bool:
    """Whether the operations are recorded as a graph, exported or compiled, that serves every length."""
    return torch.compiler.is_compiling() or is_exported()


def is_transformed(x: torch.Tensor) -> bool:
    """
    Whether a transform acts on operations on `x`, which must then be plain: one of `torch.func`, forward-mode
    differentiation, or a batch of gradients (`torch.autograd.grad(..., is_grads_batched=True)`).
    """
    is_batched = not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(x)
    return is_batched or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
