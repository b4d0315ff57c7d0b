"""The operators as Triton kernels. Only `kernel_dispatch` can be imported where Triton is not installed."""

import importlib

from .kernel_dispatch import provide_kernels


def _load(name: str):
    """A kernel, from the module that defines it."""
    module = "token_statistics_kernels" if name.startswith(("causal", "bidirectional")) else "running_sum_kernels"
    return getattr(importlib.import_module(f".{module}", __name__), name)


provide_kernels(_load)
