"""Which of its paths an operator takes: what it is called under, and which tensors go to the Triton kernels."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad


logger = logging.getLogger(__name__)

MODES = ("auto", "triton", "torch")

_mode = "auto"
# The code in a checkpoint has none: it computes by PyTorch's operations, and the kernels come with the package.
_load: Callable[[str], Any] | None = None


def provide_kernels(load: Callable[[str], Any]) -> None:
    """Let the operators of this copy of the code use kernels: `load` finds one by its name."""
    global _load
    _load = load


def kernel(name: str) -> Any:
    """The kernel of a name, where [`takes_kernels`] holds."""
    assert _load is not None
    return _load(name)


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


def takes_kernels(x: torch.Tensor) -> bool:
    """
    Whether an operator on `x` runs as Triton kernels; see [`set_kernels`].

    Raises:
        `ImportError`: the mode is `"triton"` and Triton cannot be imported.
        `ValueError`: the mode is `"triton"`, and `x` is neither on a CUDA device nor in Triton's interpreter.
    """
    if _load is None or _mode == "torch" or x.numel() == 0 or is_exported() or is_transformed():
        return False
    return _has_kernels(_mode, x.device.type)


def is_exported() -> bool:
    """Whether a graph is recorded that leaves this process: by `torch.export`, `torch.jit.trace` or for ONNX."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def is_recorded() -> bool:
    """Whether the operations are recorded as a graph, exported or compiled, that serves every length."""
    return torch.compiler.is_compiling() or is_exported()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation acts on the operations, which must be plain."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


# A compiler takes the answer as a constant, and does not follow the imports.
@torch.compiler.assume_constant_result
def _has_kernels(mode: str, device_type: str) -> bool:
    if mode == "auto":
        return device_type == "cuda" and _has_triton()
    if device_type != "cuda" and not kernel("INTERPRETED").value:
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
