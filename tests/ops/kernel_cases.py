"""What the Triton kernels must do, on a GPU (`test_kernels_gpu.py`) or in Triton's interpreter (`test_kernels.py`)."""

import os

import pytest
import test_summation
import torch
from testing import assert_close

from modeling_sumagg.ops import causal_sum, causal_sum_reference, set_kernels
from modeling_sumagg.ops.kernels import running_sum_kernels


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    set_kernels("triton")
    if INTERPRETED:
        # Short sequences then have many tiles.
        monkeypatch.setattr(running_sum_kernels, "BLOCK_T", 16)
        monkeypatch.setattr(running_sum_kernels, "BLOCK_BYTES", 64)
    yield
    set_kernels("auto")


@pytest.fixture
def many_processors(monkeypatch):
    """A sequence is cut into segments."""
    monkeypatch.setattr(running_sum_kernels, "num_processors", lambda device: 1000)
    monkeypatch.setattr(running_sum_kernels, "SEGMENT_TILES", 1)


def to_device(*values):
    """Tensors, tuples and dictionaries of them on the device; the layout stays."""
    moved = []
    for value in values:
        if isinstance(value, dict):
            moved.append({name: to_device(x)[0] for name, x in value.items()})
        elif isinstance(value, tuple):
            moved.append(tuple(to_device(*value)))
        else:
            moved.append(value.to(DEVICE) if isinstance(value, torch.Tensor) else value)
    return moved


def check_sum(x, arguments, *, stateful, fused):
    """Outputs and gradients against the loop over tokens in float64."""
    batch_size, length, hidden_size = x.shape
    state = torch.randn(batch_size, hidden_size) if stateful else None
    arguments = {**arguments, "relu": fused, "scale": torch.rand(1, length) + 0.5 if fused else None}
    weights = torch.randn(x.shape).to(x.dtype), torch.randn(batch_size, hidden_size)

    def run(function, x, state, arguments, weights):
        leaves = [t.clone().requires_grad_() for t in (x, state) if t is not None]
        y, final = function(leaves[0], initial_state=leaves[1] if stateful else None, **arguments)
        grads = torch.autograd.grad((y, final), leaves, (weights[0].to(y.dtype), weights[1].to(final.dtype)))
        return y, final, *grads

    expected = run(causal_sum_reference, x.double(), state.double() if stateful else None, arguments, weights)
    actual = run(causal_sum, *to_device(x, state, arguments, weights))
    tolerance = max(2e-6, torch.finfo(x.dtype).eps)
    for result, reference in zip(actual, expected, strict=True):
        assert_close(result.cpu(), reference, tolerance)
    accumulated = torch.promote_types(x.dtype, torch.float32)
    dtypes = [x.dtype, accumulated, x.dtype, torch.float32][: len(actual)]
    assert [result.dtype for result in actual] == dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "masked, packed, stateful, fused",
    [(False, False, False, False), (True, False, True, False), (False, True, True, True), (True, True, True, True)],
)
@pytest.mark.parametrize("length, size", [(1, 3), (35, 37)])
def test_sum_is_the_loop(length, size, masked, packed, stateful, fused, dtype):
    x, arguments = test_summation.draw(2, length, size, masked=masked, packed=packed, dtype=dtype, seed=length)
    check_sum(x, arguments, stateful=stateful, fused=fused)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_over_segments_is_the_loop(packed, dtype, many_processors):
    x, arguments = test_summation.draw(2, 133, 5, masked=packed, packed=packed, dtype=dtype, seed=1)
    check_sum(x, arguments, stateful=True, fused=packed)


@pytest.mark.parametrize("layout", [(0, 1, 2), (1, 0, 2), (0, 2, 1)])
def test_sum_of_any_layout(layout):
    x = torch.randn(2, 3, 40).permute(layout)
    check_sum(x, {}, stateful=False, fused=True)


@pytest.mark.parametrize("packed, fused", [(False, False), (True, False), (True, True)])
def test_derivatives_of_the_sum_of_both_orders(packed, fused):
    x, arguments = to_device(*test_summation.draw(1, 18, 1, masked=packed, packed=packed, dtype=torch.float64))
    x = x.nan_to_num(0, 0, 0)
    # Differences of 1e-6 must not cross the corner of the relu.
    x = torch.where(x.abs() < 0.1, 0.5, x).clamp(-3, 3).requires_grad_()
    state = torch.randn(1, 1, dtype=torch.float64, device=DEVICE, requires_grad=True)
    scale = torch.rand(1, 18, device=DEVICE) if fused else None

    def function(x, state):
        return causal_sum(x, initial_state=state, relu=fused, scale=scale, **arguments)

    assert torch.autograd.gradcheck(function, (x, state), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, state), fast_mode=True)


@pytest.mark.parametrize("border", [1, 15, 16, 40])
def test_nothing_of_an_earlier_document_is_left_in_the_sum(border, many_processors):
    x = torch.randn(1, 70, 4, device=DEVICE)
    x[:, :border] *= 1e6
    ids = (torch.arange(70, device=DEVICE) >= border).long()[None]
    packed, packed_state = causal_sum(x, document_ids=ids, initial_state=torch.full((1, 4), 1e6, device=DEVICE))
    alone, alone_state = causal_sum_reference(x[:, border:].double())
    assert_close(packed[:, border:], alone, 1e-6)
    assert_close(packed_state, alone_state, 1e-6)


def test_half_precision_sums_keep_growing():
    _, state = causal_sum(torch.ones(1, 3000, 1, dtype=torch.bfloat16, device=DEVICE))
    assert state.item() == 3000


def test_compiled_sum():
    x, arguments = to_device(*test_summation.draw(2, 35, 3, masked=True, packed=True))
    x = x.nan_to_num(0, 0, 0).requires_grad_()

    def function(x, arguments):
        y, state = causal_sum(x, relu=True, **arguments)
        return y.square().sum() + state.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(function(x, arguments), x)
    (actual,) = torch.autograd.grad(compiled(x, arguments), x)
    assert torch.equal(actual, expected)
