"""The operators as Triton kernels. Only `kernel_dispatch` can be imported where Triton is not installed."""
