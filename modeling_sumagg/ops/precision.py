"""The dtypes of sums and states, and autocast, which must not round them."""

import contextlib

import torch


def sum_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of the sums within a segment: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def state_dtype(x: torch.Tensor) -> torch.dtype:
    """
    The dtype of a state: float64, in which a stream of 3e7 tokens is as exact at its end as at its beginning, and float32
    on devices that have no float64.
    """
    return torch.float32 if x.device.type == "mps" else torch.float64


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Autocast would run matrix products in bfloat16 or float16, in which sums stop growing; "meta" has none."""
    device_type = x.device.type
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


# The compiler of PyTorch 2.11 does not know the question.
@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)
