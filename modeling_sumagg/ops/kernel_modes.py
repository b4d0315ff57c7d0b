"""When the operators run as Triton kernels, and which modules define the kernels."""

import functools
import logging
import os

import torch

from . import dispatch


logger = logging.getLogger(__name__)

MODES = ("auto", "triton", "torch")

_mode = "auto"


def register_kernels() -> None:
    """Import the modules that register kernels, and with them Triton."""
    from .causal_convolution import causal_convolution_kernels  # noqa: F401
    from .keyed_sum import keyed_sum_kernels  # noqa: F401
    from .running_sum import running_sum_kernels  # noqa: F401
    from .token_statistics import token_statistics_kernels  # noqa: F401
    from .weighted_mean import weighted_mean_kernels  # noqa: F401


def set_kernels(mode: str) -> None:
    """
    Choose how the operators are computed in this process.

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
    register_kernels()
    from .triton_helpers import INTERPRETED

    if device_type != "cuda" and not INTERPRETED.value:
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
    register_kernels()
    return True


set_kernels(os.environ.get("MODELING_SUMAGG_KERNELS", MODES[0]))
dispatch.set_mode(are_chosen)
