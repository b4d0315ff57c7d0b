"""Which of its paths an operator takes: PyTorch's operations, or Triton kernels, which come with the package."""

from typing import Any

import torch
from torch.autograd import forward_ad


# The code in a checkpoint has none.
_kernels: Any = None


def provide_kernels(kernels: Any) -> None:
    """
    Let the operators of this copy of the code use kernels.

    Args:
        kernels: has them by name, and `are_chosen(device_type)`, which says whether tensors there go to them.
    """
    global _kernels
    _kernels = kernels


def kernel(name: str) -> Any:
    """The kernel of a name, where [`takes_kernels`] holds."""
    return getattr(_kernels, name)


def takes_kernels(x: torch.Tensor) -> bool:
    """
    Whether an operator on `x` runs as Triton kernels; see [`~modeling_sumagg.ops.set_kernels`].

    Raises:
        `ImportError`: the mode is `"triton"` and Triton cannot be imported.
        `ValueError`: the mode is `"triton"`, and `x` is neither on a CUDA device nor in Triton's interpreter.
    """
    if _kernels is None or x.numel() == 0 or is_exported() or is_transformed():
        return False
    return _kernels.are_chosen(x.device.type)


def is_exported() -> bool:
    """Whether a graph is recorded that leaves this process: by `torch.export`, `torch.jit.trace` or for ONNX."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def is_recorded() -> bool:
    """Whether the operations are recorded as a graph, exported or compiled, that serves every length."""
    return torch.compiler.is_compiling() or is_exported()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation acts on the operations, which must be plain."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
