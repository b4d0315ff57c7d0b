"""The operators as Triton kernels. Only `kernel_dispatch` can be imported where Triton is not installed."""

import importlib

from .kernel_dispatch import provide_kernels


MODULES = {
    "running_sum": "running_sum_kernels",
    "decayed_sum": "decayed_sum_kernels",
    "INTERPRETED": "running_sum_kernels",
}


def _load(name: str):
    """A kernel, from the module that defines it."""
    return getattr(importlib.import_module(f".{MODULES.get(name, 'token_statistics_kernels')}", __name__), name)


provide_kernels(_load)
