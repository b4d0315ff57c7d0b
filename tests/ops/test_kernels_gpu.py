"""The Triton kernels on a GPU: the cases of the interpreter, and sizes that only a GPU can take."""

import pytest
import torch
from kernel_cases import *  # noqa: F403
from testing import assert_close

from modeling_sumagg.ops import (
    causal_sum,
    causal_token_statistics,
    causal_token_statistics_reference,
    token_statistics,
    token_statistics_reference,
)


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("shape", [(8, 8192, 1024), (1, 2**20, 192), (3, 10007, 333), (2**15, 33, 2048)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_sums(shape, dtype):
    """The last of the shapes has more than 2**31 elements."""
    x = torch.randn(shape, device="cuda", dtype=dtype)
    y, state = causal_sum(x)
    for b in {0, shape[0] - 1}:
        expected = x[b].double().cumsum(0)
        assert_close(y[b], expected, max(2e-6, torch.finfo(dtype).eps))
        assert_close(state[b], expected[-1], 1e-5)


@pytest.mark.parametrize("length", [8192, 65536])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_statistics(length, dtype):
    w = torch.randn(1, length, 12, 64, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
    temperature = torch.ones(12, device="cuda", requires_grad=True)
    leaves = w.detach().double().requires_grad_(), temperature.detach().double().requires_grad_()
    weight = torch.randn_like(w)
    tolerance = 2e-5 if dtype == torch.float32 else 2**-7
    for function, reference in (
        (lambda *x: causal_token_statistics(*x, None)[0], lambda *x: causal_token_statistics_reference(*x, None)[0]),
        (token_statistics, token_statistics_reference),
    ):
        actual, expected = function(w, temperature), reference(*leaves)
        assert_close(actual, expected, tolerance)
        grads = torch.autograd.grad(actual, (w, temperature), weight)
        for grad, reference_grad in zip(grads, torch.autograd.grad(expected, leaves, weight.double()), strict=True):
            assert_close(grad, reference_grad, 1e-2)
