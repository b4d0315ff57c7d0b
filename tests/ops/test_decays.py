"""The decayed sums and means against a float64 loop in NumPy and against their own reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_summation import draw
from testing import assert_close
from torch._dynamo.testing import CompileCounter

from modeling_sumagg.ops import (
    bidirectional_mean,
    bidirectional_sum,
    causal_mean,
    causal_mean_reference,
    causal_sum,
    causal_sum_reference,
    document_runs,
)


EXTREMES = torch.log(torch.tensor([1e-6, 1 - 1e-6, 0.5, 1.0], dtype=torch.float64))


def draw_decays(shape, seed=0, kind="any"):
    """Logarithms of decays over all scales, from 1e-6 to 1 - 1e-6."""
    rng = np.random.default_rng(seed)
    if kind == "extreme":
        return EXTREMES[torch.tensor(rng.integers(len(EXTREMES), size=shape))].float()
    return -torch.tensor(10 ** rng.uniform(-6, 1.14, size=shape)).float()


def numpy_decayed_sum(x, log_decay, initial_state=None, attention_mask=None, document_ids=None):
    batch_size, length, size = x.shape
    decay = np.exp(log_decay.double().expand(batch_size, length, -1).numpy()).repeat(
        size // log_decay.shape[-1], axis=-1
    )
    x = x.double().numpy()
    state = np.zeros((batch_size, size)) if initial_state is None else initial_state.double().numpy().copy()
    y = np.zeros_like(x)
    document = [None] * batch_size
    for t in range(length):
        for b in range(batch_size):
            if attention_mask is None or attention_mask[b, t]:
                if document_ids is not None:
                    if document[b] is not None and document[b] != document_ids[b, t]:
                        state[b] = 0
                    document[b] = document_ids[b, t]
                state[b] = decay[b, t] * state[b] + x[b, t]
        y[:, t] = state
    return torch.tensor(y), torch.tensor(state)


cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "length": st.sampled_from([1, 2, 7, 8, 9, 33, 255, 256, 300, 1057]),
        "masked": st.booleans(),
        "packed": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        "seed": st.integers(0, 2**16),
    }
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    case=cases,
    heads=st.sampled_from([1, 2, 6]),
    rows=st.sampled_from([None, 1, "batch"]),
    kind=st.sampled_from(["any", "extreme"]),
    with_state=st.booleans(),
)
def test_decayed_sum_is_the_loop(case, heads, rows, kind, with_state):
    x, arguments = draw(**case, size=6)
    batch_size, length = x.shape[:2]
    shape = (heads,) if rows is None else (1 if rows == 1 else batch_size, length, heads)
    log_decay = draw_decays(shape, case["seed"], kind)
    if with_state:
        arguments["initial_state"] = torch.randn(batch_size, 6)
    y, state, total = causal_sum(x, log_decay=log_decay, return_log_decay=True, **arguments)
    expected, expected_state = numpy_decayed_sum(x, log_decay, **arguments)
    assert y.dtype == x.dtype and state.dtype == torch.float64
    tolerance = max(2e-6, torch.finfo(x.dtype).eps)
    assert_close(y, expected, tolerance)
    scale = max(expected.abs().max(), expected_state.abs().max())
    assert (state - expected_state).abs().max() <= 2e-6 * scale
    # What is left of a state of 1 where the terms are nothing.
    arguments["initial_state"] = torch.ones(batch_size, 6)
    _, left = numpy_decayed_sum(torch.zeros_like(x), log_decay, **arguments)
    assert total.shape == (batch_size, heads)
    assert_close(total.exp().repeat_interleave(6 // heads, dim=1), left, 1e-5)


@pytest.mark.parametrize("path", ["eager", "graph"])
@pytest.mark.parametrize("decay", [1e-6, 0.5, 0.999, 1 - 1e-6, "all"])
@pytest.mark.parametrize("heads", [2, 4])
def test_long_sequences(decay, heads, path, monkeypatch):
    if path == "graph":
        monkeypatch.setattr("modeling_sumagg.ops.running_sum.running_sum_torch.is_recorded", lambda: True)
    x = torch.randn(1, 16_384, 4) + 0.5
    if decay == "all":
        log_decay = draw_decays((1, 16_384, heads))
    else:
        log_decay = torch.log(torch.tensor(decay, dtype=torch.float64)).float().expand(heads)
    x, log_decay = x.requires_grad_(), log_decay.clone().requires_grad_()
    y, state = causal_sum(x, log_decay=log_decay)
    expected, expected_state = numpy_decayed_sum(x.detach(), log_decay.detach())
    assert_close(y, expected, 2e-6)
    assert_close(state, expected_state, 2e-6)

    weight = torch.randn(1, 16_384, 4)
    grads = torch.autograd.grad(y, (x, log_decay), weight)
    # The gradient of a term is the sum of what comes after it, with the decays in between.
    per_token = log_decay.detach().expand(1, 16_384, heads)
    later = torch.cat([per_token[:, 1:], per_token[:, :1]], 1)
    backward, _ = numpy_decayed_sum(weight.flip(1), torch.cat([later[:, -1:], later[:, :-1].flip(1)], 1))
    backward = backward.flip(1)
    before = torch.cat([torch.zeros(1, 1, 4), expected[:, :-1]], 1)
    expected_decay = per_token.double().exp() * (backward * before).unflatten(2, (heads, -1)).sum(-1)
    assert_close(grads[0], backward, 4e-6)
    assert_close(grads[1], expected_decay if decay == "all" else expected_decay.sum((0, 1)), 2e-5)


@pytest.mark.parametrize("tokens", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("decay", [0.9, 1 - 1e-3, 1 - 1e-6, 1.0])
def test_streams(decay, tokens):
    """A stream of one term, for which the sum is known, in segments of any length."""
    log_decay = torch.log(torch.tensor([decay], dtype=torch.float64)).float()
    state, begin, lengths = None, 0, [1, 7, 1000, 333, 4096]
    while begin < tokens:
        length = min(lengths[begin % len(lengths)], tokens - begin)
        _, state = causal_sum(torch.full((1, length, 1), 0.1), log_decay=log_decay, initial_state=state)
        begin += length
    exact = log_decay.double()
    expected = 0.1 * (torch.expm1(tokens * exact) / torch.expm1(exact) if decay < 1 else torch.tensor([tokens]))
    assert_close(state, expected.double()[None], 1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cuts", [(1, 2, 3), (8, 255, 256, 257), (300,)])
def test_segments_go_on_as_one(cuts, packed):
    length = 600
    x, arguments = draw(2, length, 6, masked=True, packed=False)
    log_decay = draw_decays((2, length, 3))
    expected, expected_state = numpy_decayed_sum(x, log_decay, **arguments)
    state, outputs, total = None, [], 0
    for first, last in zip((0, *cuts), (*cuts, length), strict=True):
        mask = arguments["attention_mask"][:, first:last]
        segment = {"log_decay": log_decay[:, first:last], "attention_mask": mask, "return_log_decay": True}
        y, state, part = causal_sum(x[:, first:last], initial_state=state, **segment)
        total = total + part
        outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), expected, 2e-6)
    assert_close(state, expected_state, 2e-6)
    assert_close(total, causal_sum(x, log_decay=log_decay, return_log_decay=True, **arguments)[2], 1e-6)


def test_segments_summed_apart_are_joined_by_their_decays():
    x, log_decay = torch.randn(2, 300, 6), draw_decays((2, 300, 3)) / 100
    _, expected = causal_sum(x, log_decay=log_decay)
    _, first = causal_sum(x[:, :120], log_decay=log_decay[:, :120])
    _, second, total = causal_sum(x[:, 120:], log_decay=log_decay[:, 120:], return_log_decay=True)
    assert_close((first.unflatten(1, (3, 2)) * total.exp()[..., None]).flatten(1) + second, expected, 1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 11, 300])
def test_derivatives(length, packed, masked):
    x, arguments = draw(2, length, 2, masked=masked, packed=packed, dtype=torch.float64)
    x = x.nan_to_num(0, 0, 0).clamp(-3, 3)
    x = torch.where(x.abs() < 0.1, 0.5, x).requires_grad_()
    log_decay = (draw_decays((2, length, 2)).double() / 4).requires_grad_()
    state = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(2, length, 2, dtype=torch.float64, requires_grad=True)

    def per_token(x, log_decay, state, scale):
        arguments["return_log_decay"] = not packed
        return causal_sum(x, log_decay=log_decay, initial_state=state, scale=scale, relu=True, **arguments)

    def per_head(x, log_decay):
        return causal_sum(x, log_decay=log_decay, attention_mask=arguments.get("attention_mask"))

    for function, inputs in (
        (per_token, (x, log_decay, state, scale)),
        (per_head, (x, log_decay[0, 0].detach().requires_grad_())),
    ):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=length > 11)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=length > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_those_of_the_reference(dtype):
    x, arguments = draw(2, 60, 6, masked=True, packed=True, dtype=dtype)
    inputs = [x, draw_decays((2, 60, 3)), torch.randn(2, 6), torch.rand(2, 60, 3)]
    weights = torch.randn(2, 60, 6).bfloat16(), torch.randn(2, 6)
    results = []
    for function, kind in ((causal_sum, None), (causal_sum_reference, torch.float64)):
        leaves = [tensor.to(kind or tensor.dtype).detach().requires_grad_() for tensor in inputs]
        y, state = function(
            leaves[0], log_decay=leaves[1], initial_state=leaves[2], scale=leaves[3], relu=True, **arguments
        )
        grads = torch.autograd.grad((y, state), leaves, (weights[0].to(y.dtype), weights[1].double()))
        results.append((y, state, *grads))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("packed", [False, True])
def test_a_decay_of_one_is_the_plain_sum(packed):
    x, arguments = draw(2, 700, 6, masked=True, packed=packed)
    plain, state = causal_sum(x, **arguments)
    for heads in (1, 3, 6):
        decayed, decayed_state = causal_sum(x, log_decay=torch.zeros(heads), **arguments)
        assert torch.equal(decayed, plain) and torch.equal(decayed_state, state)


def loop_mean(x, log_decay, weight, **arguments):
    size, heads = x.shape[2], log_decay.shape[-1]
    weight = weight.expand(*x.shape[:2], heads)
    repeated = weight.repeat_interleave(size // heads, dim=-1)
    sums, state = numpy_decayed_sum(x.double() * repeated, log_decay, **arguments)
    totals, total = numpy_decayed_sum(weight, log_decay, **arguments)
    totals = totals.repeat_interleave(size // heads, dim=-1)
    return torch.where(totals == 0, 0, sums / totals), (state, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked, packed", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["one", "moving average"])
@pytest.mark.parametrize("length", [1, 300])
def test_means_are_the_loop(length, kind, masked, packed, dtype):
    x, arguments = draw(2, length, 6, masked=masked, packed=packed, dtype=dtype)
    log_decay = draw_decays((2, length, 3))
    weight = None if kind == "one" else -torch.expm1(log_decay)
    mean, state = causal_mean(x, log_decay=log_decay, weight=weight, **arguments)
    expected, expected_state = loop_mean(x, log_decay, torch.ones(1) if weight is None else weight, **arguments)
    assert mean.dtype == dtype
    assert_close(mean, expected, 4e-6 if dtype == torch.float32 else 2.0**-8)
    for actual, sums in zip(state, expected_state, strict=True):
        assert_close(actual, sums, 2e-6)


def test_a_mean_is_exact_from_the_first_token_on_and_in_segments():
    x, log_decay = torch.randn(2, 40, 6), draw_decays((3,))
    state, outputs = None, []
    for part in (x[:, :1], x[:, 1:2], x[:, 2:17], x[:, 17:]):
        mean, state = causal_mean(part, log_decay=log_decay, initial_state=state, relu=True)
        outputs.append(mean)
    whole, _ = causal_mean(x, log_decay=log_decay, relu=True)
    assert_close(outputs[0], x[:, :1].relu(), 1e-6)
    assert_close(torch.cat(outputs, 1), whole, 2e-6)
    plain, _ = causal_mean(x, log_decay=torch.zeros(1))
    assert_close(plain, x.cumsum(1) / torch.arange(1, 41)[:, None], 1e-6)


def test_derivatives_of_the_mean():
    x = torch.randn(1, 9, 4, dtype=torch.float64, requires_grad=True)
    log_decay = draw_decays((1, 9, 2)).double().requires_grad_()
    mask = torch.arange(9)[None] > 2

    def function(x, log_decay):
        weight = -torch.expm1(log_decay)
        mean, state = causal_mean(x, log_decay=log_decay, weight=weight, attention_mask=mask)
        return mean, *state

    assert torch.autograd.gradcheck(function, (x, log_decay))
    assert torch.autograd.gradgradcheck(function, (x, log_decay))


def draw_gates(shut, logit):
    """Logits of decays `[1, 60, 2]`; shut are the first tokens of three documents, all tokens, or none."""
    logits, ids = (
        2 * torch.randn(1, 60, 2),
        torch.bucketize(torch.arange(60), torch.tensor([20, 41]), right=True)[None],
    )
    is_first = torch.tensor([t in (0, 20, 41) for t in range(60)])
    is_shut = {"first": is_first, "all": torch.ones(60).bool(), "none": torch.zeros(60).bool()}[shut]
    return torch.where(is_shut[None, :, None], logit + logits / 10, logits), ids


def check_gates(shut, logit, device="cpu"):
    """Means whose gates `1 - a` are nearly shut, and their gradients, against the loop in float64."""
    logits, ids = draw_gates(shut, logit)
    x, state = torch.randn(1, 60, 4), (torch.randn(1, 4) * 1e-30, torch.full((1, 2), 1e-30))
    weights = torch.randn(1, 60, 4)
    results = []
    for operator, dtype, place in (
        (causal_mean_reference, torch.float64, "cpu"),
        (causal_mean, torch.float32, device),
    ):
        leaves = [tensor.to(place, dtype).requires_grad_() for tensor in (x, logits)]
        decays, gates = torch.nn.functional.logsigmoid(leaves[1]), (-leaves[1]).sigmoid()
        arguments = {"document_ids": ids.to(place), "initial_state": [t.to(place, torch.float64) for t in state]}
        mean, (sums, total) = operator(leaves[0], log_decay=decays, weight=gates, **arguments)
        grads = torch.autograd.grad((mean * weights.to(mean)).sum(), leaves)
        results.append([mean, sums, total, *grads])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual.cpu(), expected, 1e-5)


@pytest.mark.parametrize("shut", ["first", "all"])
@pytest.mark.parametrize("logit", [20.0, 44.4, 60.0, 80.0])
def test_gates_that_are_nearly_shut(shut, logit):
    check_gates(shut, logit)


@pytest.mark.parametrize("operator", [causal_mean, bidirectional_mean])
@pytest.mark.parametrize("length", [1, 2, 40])
@pytest.mark.parametrize("logit", [44.4, 87.0, 95.0, 110.0])
def test_gates_of_any_logit_have_finite_gradients(logit, length, operator):
    x = torch.randn(2, length, 4, requires_grad=True)
    logits = torch.full((2, length, 2), logit, requires_grad=True)
    mean = operator(x, log_decay=torch.nn.functional.logsigmoid(logits), weight=(-logits).sigmoid())
    mean = mean if operator is bidirectional_mean else mean[0]
    grads = torch.autograd.grad(mean.square().sum(), (x, logits))
    assert all(tensor.isfinite().all() for tensor in (mean, *grads))
    # A mean of the first token alone is that token, however small its weight, unless that is zero.
    first = torch.zeros(2, 4) if (-logits).sigmoid().max() == 0 else x[:, 0]
    if length == 1:
        assert_close(mean[:, 0], first)


def test_both_sides_of_gates_that_are_nearly_shut():
    logits, ids = draw_gates("all", 60.0)
    x, weights, results = torch.randn(1, 60, 4), torch.randn(1, 60, 4), []
    for dtype in (torch.float64, torch.float32):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, logits)]
        decays, gates = torch.nn.functional.logsigmoid(leaves[1]), (-leaves[1]).sigmoid()
        # In float64 gates of 1e-26 are large enough for a quotient of two plain sums.
        if dtype == torch.float64:
            sums, totals = (
                bidirectional_sum(terms, log_decay=decays, document_ids=ids)
                for terms in ((leaves[0].unflatten(2, (2, 2)) * gates[..., None]).flatten(2), gates)
            )
            mean = sums / totals.repeat_interleave(2, dim=2)
        else:
            mean = bidirectional_mean(leaves[0], log_decay=decays, weight=gates, document_ids=ids)
        results.append([mean, *torch.autograd.grad((mean * weights.to(mean)).sum(), leaves)])
    for expected, actual in zip(*results, strict=True):
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("masked, packed", [pytest.param(False, False, marks=pytest.mark.slow), (True, True)])
def test_one_compiled_graph_serves_every_length(masked, packed):
    counter = CompileCounter()
    torch._dynamo.reset()

    def function(x, log_decay, **arguments):
        return *causal_sum(x, log_decay=log_decay, **arguments), causal_mean(x, log_decay=log_decay, **arguments)[0]

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for length in (70, 96, 33, 333, 2, 1100):
        x, arguments = draw(2, length, 6, masked=masked, packed=packed, seed=length)
        log_decay = draw_decays((2, length, 3))
        for actual, expected in zip(
            compiled(x, log_decay, **arguments), function(x, log_decay, **arguments), strict=True
        ):
            assert_close(actual, expected, 4e-6)
    assert counter.frame_count == 1


def test_compiled_training():
    x, log_decay = torch.randn(2, 50, 6, requires_grad=True), draw_decays((2, 50, 3)).requires_grad_()

    def function(x, log_decay):
        y, state = causal_sum(x, log_decay=log_decay, relu=True)
        return y.square().sum() + state.sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(x, log_decay), (x, log_decay))
    for actual, grad in zip(torch.autograd.grad(compiled(x, log_decay), (x, log_decay)), expected, strict=True):
        assert_close(actual, grad, 1e-5)


class Decayed(torch.nn.Module):
    def forward(self, x, log_decay, initial_state, attention_mask, document_ids):
        arguments = {"attention_mask": attention_mask, "document_ids": document_ids}
        return causal_sum(x, log_decay=log_decay, initial_state=initial_state, **arguments)


def test_export_serves_every_length():
    def example(length):
        x, arguments = draw(2, length, 6, masked=True, packed=True)
        return x.nan_to_num(0, 0, 0), draw_decays((2, length, 3)), torch.randn(2, 6), *arguments.values()

    length = torch.export.Dim("length", min=2)
    shapes = ({1: length}, {1: length}, None, {1: length}, {1: length})
    program = torch.export.export(Decayed(), example(50), dynamic_shapes=shapes)
    for inputs in (example(2), example(64), example(700)):
        for actual, expected in zip(program.module()(*inputs), Decayed()(*inputs), strict=True):
            assert_close(actual, expected, 4e-6)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"log_decay": torch.zeros(3)}, ValueError, r"`log_decay`.*\[K\], where K divides D = 4 .*got \[3\]"),
        ({"log_decay": torch.zeros(2, 3)}, ValueError, r"`log_decay`.*\[2, 3, K\] or \[1, 3, K\], got \[2, 3\]"),
        ({"log_decay": torch.zeros(2, 4, 2)}, ValueError, r"`log_decay`.*got \[2, 4, 2\]"),
        ({"log_decay": torch.zeros(2).long()}, TypeError, "`log_decay` must be of a floating dtype, got torch.int64"),
        ({"initial_state": torch.zeros(2, 5, 4)}, ValueError, r"`initial_state`.*\[2, 4\].*got \[2, 5, 4\]"),
        (
            {"log_decay": torch.zeros(2), "scale": torch.ones(2, 3, 4)},
            ValueError,
            r"`scale`.*of the 2 heads.*got \[2, 3, 4\]",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        causal_sum(torch.zeros(2, 3, 4), **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weight": torch.zeros(4)}, r"`weight` must be given for the 2 heads of `log_decay`, got the shape \[4\]"),
        ({"initial_state": (torch.zeros(2, 4), torch.zeros(2, 3))}, r"`initial_state\[1\]`.*\[2, 2\].*got \[2, 3\]"),
    ],
)
def test_bad_arguments_of_the_mean(arguments, message):
    with pytest.raises(ValueError, match=message):
        causal_mean(torch.zeros(2, 3, 4), log_decay=torch.zeros(2), **arguments)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional_sums_and_means_decay_to_both_sides(masked, packed):
    x, delimiters = draw(2, 11, 4, masked=masked, packed=packed)
    log_decay, weight = -torch.rand(2, 11, 2), torch.rand(2, 11, 2)
    real = delimiters.get("attention_mask", torch.ones(2, 11, dtype=torch.bool))
    runs = torch.zeros(2, 11, dtype=torch.long)
    if packed:
        runs = document_runs(delimiters["document_ids"], delimiters.get("attention_mask"))
    sums, means = torch.zeros(2, 2, 11, 4, dtype=torch.float64)
    for row in range(2):
        for head in range(2):
            decays = log_decay[row, :, head].double().where(real[row], 0)
            for t in range(11):
                own = real[row] & (runs[row] == runs[row, t])
                # Between two tokens everything decays but at the earlier of them, and going back but at the later.
                reach = torch.tensor(
                    [(decays[u + 1 : t + 1] if u <= t else decays[t:u]).sum().exp().item() for u in range(11)]
                )
                factors = (reach * own).double()
                terms = x[row, :, 2 * head : 2 * head + 2].double().where(real[row][:, None], 0)
                sums[row, t, 2 * head : 2 * head + 2] = factors @ terms
                weights = factors * weight[row, :, head]
                means[row, t, 2 * head : 2 * head + 2] = (weights @ terms) / weights.sum().clamp(min=1e-300)
    actual = bidirectional_sum(x, log_decay=log_decay, **delimiters)
    assert_close(actual[real].double(), sums[real])
    actual = bidirectional_mean(x, log_decay=log_decay, weight=weight, **delimiters)
    assert_close(actual[real].double(), means[real])
