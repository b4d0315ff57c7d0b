"""What the Triton kernels must do, on a GPU (`test_kernels_gpu.py`) or in Triton's interpreter (`test_kernels.py`)."""

import os

import pytest
import test_decays
import test_documents
import test_keyed_sum
import test_summation
import test_token_statistics
import torch
from test_token_statistics import TOLERANCES, loop_bidirectional, loop_causal, requiring_grad
from testing import assert_close

from modeling_sumagg.ops import (
    TokenStatisticsState,
    causal_convolution,
    causal_keyed_sum,
    causal_keyed_sum_reference,
    causal_mean,
    causal_sum,
    causal_sum_reference,
    causal_token_statistics,
    causal_token_statistics_reference,
    set_kernels,
    token_statistics,
)
from modeling_sumagg.ops.running_sum import running_sum_kernels
from modeling_sumagg.ops.token_statistics import token_statistics_kernels


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# In the interpreter, whose tiles are short, four of them, the last not full; a block of channels and more than two.
MANY_TILES, MEAN_SIZES = (53, [(53, 6, 2), (35, 37, 1)]) if INTERPRETED else (133, [(133, 6, 2), (40, 70, 1)])


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    set_kernels("triton")
    if INTERPRETED:
        # Short sequences then have many tiles.
        monkeypatch.setattr(running_sum_kernels, "BLOCK_T", 16)
        monkeypatch.setattr(running_sum_kernels, "BLOCK_BYTES", 64)
        monkeypatch.setattr(token_statistics_kernels, "TILE_SIZE", 16)
    yield
    set_kernels("auto")


@pytest.fixture
def many_processors(monkeypatch):
    """A sequence is cut into segments."""
    monkeypatch.setattr(running_sum_kernels, "num_processors", lambda device: 1000)
    monkeypatch.setattr(running_sum_kernels, "SEGMENT_TILES", 1)
    monkeypatch.setattr(running_sum_kernels, "DECAY_SEGMENT_TILES", 1)


def to_device(*values):
    """Tensors, states and dictionaries of them on the device; the layout stays."""
    moved = []
    for value in values:
        if isinstance(value, dict):
            moved.append({name: to_device(x)[0] for name, x in value.items()})
        elif isinstance(value, TokenStatisticsState):
            moved.append(TokenStatisticsState(*to_device(*value)))
        elif isinstance(value, tuple | list):
            moved.append(to_device(*value))
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
    dtypes = [x.dtype, torch.float64, x.dtype, torch.float32][: len(actual)]
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
    x, arguments = test_summation.draw(2, MANY_TILES, 5, masked=packed, packed=packed, dtype=dtype, seed=1)
    check_sum(x, arguments, stateful=True, fused=packed)


def check_decayed_sum(x, log_decay, arguments):
    """Outputs and gradients against the loop over tokens in float64."""
    batch_size, length, hidden_size = x.shape
    inputs = x, log_decay, torch.randn(batch_size, hidden_size), torch.rand(1, length, log_decay.shape[-1])
    weights = torch.randn(x.shape).to(x.dtype), torch.randn(batch_size, hidden_size)

    def run(function, inputs, arguments, weights):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        x, log_decay, state, scale = leaves
        y, final = function(x, log_decay=log_decay, initial_state=state, scale=scale, relu=True, **arguments)
        return y, final, *torch.autograd.grad((y, final), leaves, (weights[0].to(y), weights[1].to(final)))

    expected = run(causal_sum_reference, [tensor.double() for tensor in inputs], arguments, weights)
    actual = run(causal_sum, to_device(*inputs), *to_device(arguments, weights))
    for result, reference in zip(actual, expected, strict=True):
        assert_close(result.cpu(), reference, max(4e-6, torch.finfo(x.dtype).eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked, packed", [(False, False), (True, True)])
@pytest.mark.parametrize("length, size, heads", [(5, 6, 1), (70, 40, 2), (35, 6, 6)])
def test_decayed_sum_is_the_loop(length, size, heads, masked, packed, dtype):
    x, arguments = test_summation.draw(2, length, size, masked=masked, packed=packed, dtype=dtype, seed=length)
    check_decayed_sum(x, test_decays.draw_decays((2, length, heads)), arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_decayed_sum_over_segments_is_the_loop(packed, many_processors):
    x, arguments = test_summation.draw(2, MANY_TILES, 5, masked=packed, packed=packed, seed=1)
    check_decayed_sum(x, test_decays.draw_decays((1, MANY_TILES, 5), kind="extreme"), arguments)


def test_derivatives_of_the_decayed_sum_of_both_orders():
    x, state = to_device(torch.randn(1, 18, 2, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64))
    x, state = torch.where(x.abs() < 0.1, 0.5, x).requires_grad_(), state.requires_grad_()
    (log_decay,) = to_device(test_decays.draw_decays((1, 18, 2)).double().requires_grad_())

    def function(x, log_decay, state):
        return causal_sum(x, log_decay=log_decay, initial_state=state, relu=True)

    assert torch.autograd.gradcheck(function, (x, log_decay, state), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, log_decay, state), fast_mode=True)


def draw_mean(length, size, heads, dtype, masked, packed):
    """The leaves of a mean, and its other arguments."""
    x, arguments = test_summation.draw(2, length, size, masked=masked, packed=packed, dtype=dtype, seed=3)
    log_decay, weight = test_decays.draw_decays((2, length, heads)), torch.rand(1, length, heads)
    return (x, log_decay, weight, torch.randn(2, size), torch.rand(2, heads)), arguments


def mean_of_leaves(x, log_decay, weight, sums, total, **arguments):
    mean, state = causal_mean(x, log_decay=log_decay, weight=weight, initial_state=(sums, total), **arguments)
    return mean, *state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked, packed", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("length, size, heads", MEAN_SIZES)
def test_mean_is_that_of_pytorch(length, size, heads, masked, packed, dtype, many_processors):
    leaves, arguments = draw_mean(length, size, heads, dtype, masked, packed)
    real = arguments.get("attention_mask", torch.ones(2, length, dtype=torch.bool))[..., None]
    grads = torch.randn(2, length, size).to(dtype), torch.randn(2, size), torch.randn(2, heads)

    def run(leaves, real, grads, arguments, mode):
        set_kernels(mode)
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        mean, *state = mean_of_leaves(*leaves, relu=True, **arguments)
        assert mean.dtype == leaves[0].dtype
        mean = mean.where(real, 0)
        grads = [grad.to(output) for grad, output in zip(grads, (mean, *state), strict=True)]
        return mean, *state, *torch.autograd.grad((mean, *state), leaves, grads)

    expected = run([leaf.double() for leaf in leaves], real, grads, arguments, "torch")
    actual = run(*to_device(leaves, real, grads, arguments), "triton")
    for result, reference in zip(actual, expected, strict=True):
        assert_close(result.cpu(), reference, max(6e-6, torch.finfo(dtype).eps))


@pytest.mark.parametrize("packed", [False, True])
def test_derivatives_of_the_mean_of_both_orders(packed):
    leaves, arguments = draw_mean(17, 2, 1, torch.float64, packed, packed)
    # The interpreter runs one row after the other.
    leaves = [leaf[:1] for leaf in leaves]
    arguments = {name: value[:1] for name, value in arguments.items()}
    x = leaves[0].nan_to_num(0, 0, 0)
    leaves = to_device(torch.where(x.abs() < 0.1, 0.5, x).clamp(-3, 3), *(leaf.double() for leaf in leaves[1:]))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    (arguments,) = to_device(arguments)

    def function(*leaves):
        return mean_of_leaves(*leaves, relu=True, **arguments)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_compiled_mean():
    leaves, arguments = to_device(*draw_mean(35, 6, 3, torch.float32, False, True))
    leaves = [leaf.nan_to_num(0, 0, 0).requires_grad_() for leaf in leaves]

    def function(*leaves):
        mean, *state = mean_of_leaves(*leaves, **arguments)
        return mean.square().sum() + sum(tensor.sum() for tensor in state)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*leaves), leaves)
    for actual, reference in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert_close(actual, reference, 4e-6)


@pytest.mark.parametrize("shut", ["first", "all"])
@pytest.mark.parametrize("logit", [44.4, 80.0])
def test_gates_that_are_nearly_shut(shut, logit, many_processors):
    test_decays.check_gates(shut, logit, device=DEVICE)


def draw_convolution(length, size, taps, dtype, masked, packed):
    x, arguments = test_summation.draw(2, length, size, masked=masked, packed=packed, dtype=dtype, seed=4)
    leaves = x, torch.randn(size, taps), torch.randn(size), torch.randn(2, taps - 1, size).to(dtype)
    return leaves, arguments


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked, packed", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("length, size, taps", [(2, 3, 2), (70, 20, 4)])
def test_convolution_is_that_of_pytorch(length, size, taps, masked, packed, dtype):
    leaves, arguments = draw_convolution(length, size, taps, dtype, masked, packed)
    real = arguments.get("attention_mask", torch.ones(2, length, dtype=torch.bool))[..., None]
    grads = torch.randn(2, length, size).to(dtype), torch.randn(2, taps - 1, size).to(dtype)

    def run(leaves, real, grads, arguments, mode):
        set_kernels(mode)
        x, weight, bias, state = leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        y, last = causal_convolution(x, weight=weight, bias=bias, initial_state=state, **arguments)
        y = y.where(real, 0)
        return y, last, *torch.autograd.grad((y, last), leaves, (grads[0].to(y), grads[1].to(last)))

    expected = run([leaf.double() for leaf in leaves], real, grads, arguments, "torch")
    actual = run(*to_device(leaves, real, grads, arguments), "triton")
    for result, reference in zip(actual, expected, strict=True):
        assert_close(
            result.cpu().nan_to_num(0, 0, 0), reference.nan_to_num(0, 0, 0), max(4e-6, torch.finfo(dtype).eps)
        )


@pytest.mark.parametrize("packed", [False, True])
def test_derivatives_of_the_convolution_of_both_orders(packed):
    leaves, arguments = draw_convolution(9, 2, 3, torch.float64, False, packed)
    leaves, arguments = to_device([leaf.double().nan_to_num(0, 0, 0) for leaf in leaves], arguments)
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def function(x, weight, bias, state):
        return causal_convolution(x, weight=weight, bias=bias, initial_state=state, **arguments)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def test_compiled_convolution():
    leaves, arguments = to_device(*draw_convolution(40, 6, 4, torch.float32, False, True))
    leaves = [leaf.nan_to_num(0, 0, 0).requires_grad_() for leaf in leaves]

    def function(x, weight, bias, state):
        y, last = causal_convolution(x, weight=weight, bias=bias, initial_state=state, **arguments)
        return y.square().sum() + last.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*leaves), leaves)
    for actual, reference in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert_close(actual, reference, 1e-6)


def test_a_long_memory_of_the_decayed_sum():
    log_decay = torch.tensor([-1e-6])
    _, state = causal_sum(torch.ones(1, 3000, 1, device=DEVICE), log_decay=log_decay.to(DEVICE))
    exact = log_decay.double()
    assert_close(state[0].cpu(), torch.expm1(3000 * exact) / torch.expm1(exact), 1e-7)


def test_compiled_decayed_sum():
    x, log_decay = to_device(torch.randn(2, 35, 6), test_decays.draw_decays((2, 35, 3)))
    leaves = x.requires_grad_(), log_decay.requires_grad_()

    def function(x, log_decay):
        y, state = causal_sum(x, log_decay=log_decay, relu=True)
        return y.square().sum() + state.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(*leaves), leaves)
    for actual, reference in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert_close(actual, reference, 1e-6)


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


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("call", test_documents.OPERATORS)
def test_what_is_no_number_stays_in_its_document(call, value, many_processors):
    test_documents.check_isolation(call, value, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_reaches_no_token_before_it(value, dtype):
    x = torch.randn(1, 40, 4, dtype=dtype, device=DEVICE)
    x[0, 20, 1] = value
    y, _ = causal_sum(x)
    decayed, _ = causal_sum(x, log_decay=torch.full((1, 40, 2), -1e3, device=DEVICE))
    for result in (y, decayed):
        assert result[:, :20].isfinite().all() and result[..., [0, 2, 3]].isfinite().all()
        assert not result[:, 20:, 1].isfinite().any()
    assert_close(y[:, :20].cpu(), x[:, :20].double().cumsum(1).cpu(), max(2e-6, torch.finfo(dtype).eps))


def test_half_precision_sums_keep_growing():
    _, state = causal_sum(torch.ones(1, 3000, 1, dtype=torch.bfloat16, device=DEVICE))
    assert state.item() == 3000


def test_compiled_sum():
    x, arguments = to_device(*test_summation.draw(2, 35, 3, masked=True, packed=True))
    x = x.nan_to_num(0, 0, 0).requires_grad_()

    # Linear in the sums, as how the gradient of a square rounds is the compiler's.
    (weights,) = to_device(torch.randn(2, 35, 3))

    def function(x, arguments):
        y, state = causal_sum(x, relu=True, **arguments)
        return (y * weights).sum() + state.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(function(x, arguments), x)
    (actual,) = torch.autograd.grad(compiled(x, arguments), x)
    assert torch.equal(actual, expected)


def check_statistics(inputs, arguments, *, causal):
    """Outputs and gradients of what `test_token_statistics.draw` drew, against the loop over tokens in float64."""
    mask = arguments["attention_mask"]
    (w, temperature, bias, state), expected_leaves = requiring_grad(inputs, torch.float64)
    if causal:
        out, _, final = loop_causal(w, temperature, bias, state, **arguments)
    else:
        (out, _), final = loop_bidirectional(w, temperature, mask), []
        expected_leaves = expected_leaves[:2]
    weights = [torch.randn(x.shape).bfloat16().double() for x in (out, *final)]
    loss = sum((x * weight).sum() for x, weight in zip((out, *final), weights, strict=True))
    loss = loss + sum(0 * x.nan_to_num(0, 0, 0).sum() for x in expected_leaves)
    expected = (out, *final, *torch.autograd.grad(loss, expected_leaves))

    (w, temperature, bias, state), leaves = requiring_grad(to_device(*inputs))
    arguments = to_device(arguments)[0]
    if causal:
        state = None if state is None else TokenStatisticsState(*state)
        out, final = causal_token_statistics(w, temperature, bias, initial_state=state, **arguments)
    else:
        out, final = token_statistics(w, temperature, attention_mask=arguments["attention_mask"]), ()
        leaves = leaves[:2]
    assert out.dtype == w.dtype and out.transpose(1, 2).is_contiguous()
    if mask is not None:
        # The gradient of an output that is not there may be anything.
        weights[0] = weights[0].masked_fill(~mask[:, None, :, None], torch.nan)
    weights = [weight.to(x) for weight, x in zip(weights, (out, *final), strict=True)]
    actual = (out, *final, *torch.autograd.grad((out, *final), leaves, weights))
    tolerance, grad_tolerance = TOLERANCES[w.dtype]
    # The interpreter cuts bfloat16 off instead of rounding it.
    tolerance *= 2 if INTERPRETED else 1
    for i, (result, reference) in enumerate(zip(actual, expected, strict=True)):
        assert_close(result.cpu(), reference, tolerance if i <= len(final) else grad_tolerance)


STATISTICS_SIZES = {
    "odd": {"num_heads": 3, "length": 17, "head_dim": 5},
    "even": {"num_heads": 2, "length": 48, "head_dim": 16},
    "at the floor": {"num_heads": 2, "length": 35, "head_dim": 2, "scale": 1e-6},
}
STATISTICS_CASES = [
    ("odd", False, False, torch.float32),
    ("odd", True, True, torch.float64),
    ("odd", True, True, torch.bfloat16),
    ("even", True, False, torch.float32),
    ("even", False, True, torch.bfloat16),
    ("at the floor", True, True, torch.float32),
    ("at the floor", False, False, torch.float64),
]


@pytest.mark.parametrize("size, masked, packed, dtype", STATISTICS_CASES)
def test_causal_statistics_are_the_loop(size, masked, packed, dtype):
    plain = not masked and not packed
    drawn = test_token_statistics.draw(
        **STATISTICS_SIZES[size],
        masked=masked,
        packed=packed,
        dtype=dtype,
        biased=not plain,
        stateful=not plain,
        seed=1,
    )
    check_statistics(*drawn, causal=True)


@pytest.mark.parametrize("size, masked, packed, dtype", STATISTICS_CASES)
def test_bidirectional_statistics_are_the_loop(size, masked, packed, dtype):
    drawn = test_token_statistics.draw(
        **STATISTICS_SIZES[size], masked=masked, packed=False, dtype=dtype, biased=False, stateful=False, seed=2
    )
    check_statistics(*drawn, causal=False)


@pytest.mark.parametrize("packed", [False, True])
def test_statistics_over_many_tiles(packed, many_processors):
    drawn = test_token_statistics.draw(1, 2, 100, 2, dtype=torch.float32, masked=False, packed=packed)
    check_statistics(*drawn, causal=True)


@pytest.mark.parametrize("causal", [True, False])
def test_statistics_with_dropout(causal):
    w, temperature, bias = to_device(torch.randn(2, 3, 40, 8), torch.randn(3), torch.randn(3, 40))
    results = []
    for mode in ("triton", "torch"):
        set_kernels(mode)
        torch.manual_seed(0)
        leaves = [x.clone().requires_grad_() for x in (w, temperature)]
        if causal:
            out, _ = causal_token_statistics(*leaves, bias, dropout_p=0.3)
        else:
            out = token_statistics(*leaves, dropout_p=0.3)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


def test_second_derivatives_of_the_statistics():
    w, temperature = to_device(torch.randn(1, 2, 18, 1).double(), torch.ones(2).double())
    inputs = w.requires_grad_(), temperature.requires_grad_()

    def causal(w, temperature):
        out, state = causal_token_statistics(w, temperature, None)
        return out, *state

    for function in (causal, token_statistics):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("begin", [1, 16, 40])
def test_nothing_of_an_earlier_document_is_left_in_the_statistics(begin):
    w, temperature, ids = to_device(torch.randn(1, 2, 60, 3), torch.ones(2), (torch.arange(60) >= begin).long()[None])
    w[:, :, :begin] *= 1e6
    out, final = causal_token_statistics(w, temperature, None, document_ids=ids)
    expected, expected_final = causal_token_statistics_reference(w[:, :, begin:].double(), temperature.double(), None)
    for actual, reference in zip((out[:, :, begin:], *final), (expected, *expected_final), strict=True):
        assert_close(actual, reference, 2e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("masked, stateful", [(False, False), (True, True)])
@torch.no_grad()
def test_a_decode_step_of_the_statistics_is_the_loop(masked, stateful, dtype):
    inputs, arguments = test_token_statistics.draw(
        3, 3, 1, 5, masked=masked, stateful=stateful, biased=stateful, packed=False, dtype=dtype
    )
    (w, temperature, bias, state), _ = requiring_grad(inputs, torch.float64)
    out, _, final = loop_causal(w, temperature, bias, state, **arguments)
    w, temperature, bias, state, arguments = to_device(*inputs, arguments)
    actual, actual_final = causal_token_statistics(w, temperature, bias, initial_state=state, **arguments)
    assert_close(actual.cpu(), out, 2 * TOLERANCES[dtype][0])
    for sums, reference in zip(actual_final, final, strict=True):
        assert_close(sums.cpu(), reference, 2e-6)


def test_compiled_statistics():
    w, temperature, bias, state = to_device(*test_token_statistics.draw(1, 2, 18, dtype=torch.float32)[0])
    w, bias = w.nan_to_num(0, 0, 0), bias.nan_to_num(0)
    leaves = w.requires_grad_(), temperature.requires_grad_()

    def function(w, temperature):
        out, final = causal_token_statistics(w, temperature, bias, initial_state=state)
        return token_statistics(w, temperature).square().sum() + out.square().sum() + sum(x.sum() for x in final)

    expected = torch.autograd.grad(function(*leaves), leaves)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for actual, reference in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert_close(actual, reference, 1e-6)


def test_the_state_for_backward_of_the_statistics_is_small():
    w = torch.randn(2, 128, 2, 64, device=DEVICE).transpose(1, 2).requires_grad_()
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        causal_token_statistics(w, torch.ones(2, device=DEVICE), None)
    # Of each sequence the sums at the borders of the tiles, and once more, in float64, those before the first.
    borders = 128 // token_statistics_kernels.TILE_SIZE + 3
    size, sums = w.untyped_storage().nbytes(), 2 * borders * 2 * (2 * 64 + 1) * 4
    assert size <= sum(storages.values()) <= size + sums + 100


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("length, sizes", [(2, {}), (33, {"size": 17, "width": 20}), (70, {"heads": 2, "width": 70})])
def test_keyed_sum_and_its_gradients(length, sizes, cut):
    arguments = test_keyed_sum.sample(length, **sizes, cut=cut)
    expected = test_keyed_sum.gradients(causal_keyed_sum_reference, arguments)
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in arguments.items()}
    found = test_keyed_sum.gradients(causal_keyed_sum, to_device(single)[0])
    for name, actual, reference in zip(("y", "state", *test_keyed_sum.LEAVES), found, expected, strict=True):
        actual = actual.double().cpu()
        if name == "y":
            actual, reference = (test_keyed_sum.real(y, arguments) for y in (actual, reference))
        error = (actual - reference).abs().max() / reference.abs().max().clamp(min=1e-6)
        assert error < 5e-6, (name, error)


def test_second_derivatives_of_the_keyed_sum():
    arguments = to_device(test_keyed_sum.sample(20, batch=1, heads=1, groups=1, size=2, width=2, dtype=torch.float32))[
        0
    ]

    def second(values):
        y, _ = causal_keyed_sum(**{**arguments, "values": values})
        (first,) = torch.autograd.grad((y**3).sum(), values, create_graph=True)
        return torch.autograd.grad((first**2).sum(), values)[0]

    found = second(arguments["values"].requires_grad_())
    set_kernels("torch")
    assert_close(found, second(arguments["values"].requires_grad_()), 1e-5)


def test_a_value_that_is_not_finite_stays_in_its_document_of_the_keyed_sum():
    arguments = test_keyed_sum.sample(50, cut=False, dtype=torch.float32)
    arguments["document_ids"] = (torch.arange(50) >= 20).long().expand(2, -1)
    expected = causal_keyed_sum_reference(**arguments)
    arguments["values"][0, 10] = torch.nan
    arguments["keys"][1, 5] = torch.inf
    y, state = causal_keyed_sum(**to_device(arguments)[0])
    assert_close(y[:, 20:].cpu(), expected[0][:, 20:], 5e-6)
    assert_close(state.cpu(), expected[1], 5e-6)
    assert y[0, 10:20].isnan().all() and y[1, 5:20].isnan().all()
