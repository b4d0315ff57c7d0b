"""The summation operators against a float64 loop in NumPy and against their own reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing import assert_close
from torch._dynamo.testing import CompileCounter

from modeling_sumagg.ops import bidirectional_sum, causal_sum, causal_sum_reference, document_runs


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw(batch, length, size, *, masked, packed, dtype=torch.float32, seed=0):
    """Terms, with garbage where masked, and the other arguments of `causal_sum`; ids of documents are not sorted."""
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.standard_normal((batch, length, size))).to(dtype)
    arguments = {}
    if masked:
        mask = torch.tensor(rng.random((batch, length)) < rng.choice([0.0, 0.5, 0.9], size=(batch, 1)))
        garbage = torch.tensor(rng.choice([np.nan, np.inf, -np.inf, 1e4], size=x.shape)).to(dtype)
        x = torch.where(mask[..., None], x, garbage)
        arguments["attention_mask"] = mask
    if packed:
        ids = rng.choice([7, -1, 3, 2**40], size=(batch, length))
        change = rng.random((batch, length)) < rng.choice([0.02, 0.3])
        index = np.maximum.accumulate(np.where(change, np.arange(length), 0), axis=1)
        arguments["document_ids"] = torch.tensor(np.take_along_axis(ids, index, axis=1))
    return x, arguments


def numpy_causal_sum(x, initial_state=None, attention_mask=None, document_ids=None):
    x = x.double().numpy()
    state = np.zeros_like(x[:, 0]) if initial_state is None else initial_state.double().numpy().copy()
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        document = None
        for t in range(x.shape[1]):
            if attention_mask is None or attention_mask[b, t]:
                if document_ids is not None:
                    if document is not None and document != document_ids[b, t]:
                        state[b] = 0
                    document = document_ids[b, t]
                state[b] += x[b, t]
            y[b, t] = state[b]
    return torch.tensor(y), torch.tensor(state)


def numpy_bidirectional_sum(x, attention_mask=None, document_ids=None):
    y = np.zeros(x.shape)
    for b in range(x.shape[0]):
        real = [t for t in range(x.shape[1]) if attention_mask is None or attention_mask[b, t]]
        begins = [
            t
            for i, t in enumerate(real)
            if i and document_ids is not None and document_ids[b, t] != document_ids[b, real[i - 1]]
        ]
        for first, last in zip([0, *begins], [*begins, x.shape[1]], strict=True):
            total = x[b, [t for t in real if first <= t < last]].double().sum(dim=0)
            y[b, first:last] = total.numpy()
    return torch.tensor(y)


cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "length": st.sampled_from([1, 2, 5, 31, 32, 33, 64, 97, 1057]),
        "size": st.integers(1, 4),
        "masked": st.booleans(),
        "packed": st.booleans(),
        "dtype": st.sampled_from(DTYPES),
        "seed": st.integers(0, 2**16),
    }
)


def tolerance(dtype):
    return max(2e-6, torch.finfo(dtype).eps)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(case=cases, with_state=st.booleans())
def test_causal_sum_is_the_loop(case, with_state):
    x, arguments = draw(**case)
    if with_state:
        arguments["initial_state"] = torch.randn(case["batch"], case["size"])
    y, final_state = causal_sum(x, **arguments)
    expected, expected_state = numpy_causal_sum(x, **arguments)
    assert y.dtype == x.dtype and final_state.dtype == torch.float64
    assert_close(y, expected, tolerance(x.dtype))
    # A sum of parts that cancel is as exact as the parts.
    assert (final_state - expected_state).abs().max() <= 2e-6 * max(expected.abs().max(), expected_state.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 33, 70])
def test_causal_sum_and_its_gradients_are_those_of_the_reference(length, packed, masked, dtype):
    x, arguments = draw(2, length, 3, masked=masked, packed=packed, dtype=dtype, seed=length)
    state = torch.randn(2, 3)
    weights, state_weights = torch.randn(x.shape), torch.randn(state.shape)
    results = []
    for function in (causal_sum, causal_sum_reference):
        inputs = x.clone().requires_grad_(), state.clone().requires_grad_()
        y, final_state = function(inputs[0], initial_state=inputs[1], **arguments)
        loss = (y.float() * weights).sum() + (final_state * state_weights).sum()
        results.append((y, final_state, *torch.autograd.grad(loss, inputs)))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype
        assert_close(actual, expected, 2 * tolerance(dtype))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_derivatives(packed, masked):
    x, arguments = draw(2, 35, 1, masked=masked, packed=packed, dtype=torch.float64)
    x = x.nan_to_num(0, 0, 0).requires_grad_()
    state = torch.randn(2, 1, dtype=torch.float64, requires_grad=True)

    def causal(x, state):
        return causal_sum(x, initial_state=state, **arguments)

    def bidirectional(x):
        return bidirectional_sum(x, **arguments)

    for function, inputs in ((causal, (x, state)), (bidirectional, (x,))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_segment_hands_the_state_on(dtype):
    x, state = torch.zeros(2, 0, 3, dtype=dtype), torch.randn(2, 3)
    empty = torch.zeros(2, 0, dtype=torch.long)
    for arguments in ({}, {"attention_mask": empty, "document_ids": empty}):
        for function in (causal_sum, causal_sum_reference):
            y, final_state = function(x, initial_state=state, **arguments)
            assert y.shape == x.shape and y.dtype == dtype and torch.equal(final_state, state.to(final_state.dtype))
        assert bidirectional_sum(x, **arguments).shape == x.shape
    assert torch.equal(causal_sum(x)[1], torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("cuts", [(1, 2, 3), (31, 32, 64), (40, 1000, 1050)])
def test_segments_go_on_as_one(cuts):
    x, arguments = draw(2, 1100, 3, masked=True, packed=False)
    expected, expected_state = numpy_causal_sum(x, **arguments)
    state, outputs = None, []
    for first, last in zip((0, *cuts), (*cuts, 1100), strict=True):
        mask = arguments["attention_mask"][:, first:last]
        y, state = causal_sum(x[:, first:last], initial_state=state, attention_mask=mask)
        outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), expected, 2e-6)
    assert_close(state, expected_state, 2e-6)


@pytest.mark.parametrize("border", [1, 31, 32, 40, 1030, 2100])
def test_nothing_of_an_earlier_document_is_left(border):
    x = torch.randn(1, 3000, 4)
    x[:, :border] *= 1e6
    ids = (torch.arange(3000) >= border).long()[None]
    alone, alone_state = causal_sum(x[:, border:])
    packed, packed_state = causal_sum(x, document_ids=ids, initial_state=torch.full((1, 4), 1e6))
    assert_close(packed[:, border:], alone, 1e-6)
    assert_close(packed_state, alone_state, 1e-6)
    total = x[:, border:].double().sum(dim=1, keepdim=True).expand_as(alone)
    assert_close(bidirectional_sum(x, document_ids=ids)[:, border:], total, 5e-6)


def test_half_precision_sums_keep_growing():
    x = torch.ones(1, 5000, 1, dtype=torch.bfloat16)
    y, state = causal_sum(x)
    assert state.item() == 5000 and y[0, -1].item() == torch.tensor(5000.0).bfloat16().item()


@pytest.mark.parametrize("packed", [False, True])
def test_autocast_does_not_round_the_sums(packed):
    x, arguments = draw(2, 100, 3, masked=False, packed=packed)
    expected = (*causal_sum(x, **arguments), bidirectional_sum(x, **arguments))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = (*causal_sum(x, **arguments), bidirectional_sum(x, **arguments))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype != torch.bfloat16 and torch.equal(a, e)


@pytest.mark.parametrize("packed", [False, True])
def test_final_state_holds_only_itself(packed):
    x, arguments = draw(2, 100, 3, masked=False, packed=packed)
    _, state = causal_sum(x, **arguments)
    assert state.untyped_storage().nbytes() == 2 * 3 * 8


@settings(max_examples=200, derandomize=True, deadline=None)
@given(case=cases)
def test_bidirectional_sum_is_the_loop(case):
    x, arguments = draw(**case)
    y = bidirectional_sum(x, **arguments)
    assert y.dtype == x.dtype
    assert_close(y, numpy_bidirectional_sum(x, **arguments), tolerance(x.dtype))


@pytest.mark.parametrize("masked, packed", [(False, False), (True, False), (True, True)])
def test_one_compiled_graph_serves_every_length(masked, packed):
    counter = CompileCounter()
    torch._dynamo.reset()

    def both(x, **arguments):
        return *causal_sum(x, **arguments), bidirectional_sum(x, **arguments)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=counter)
    for length in (70, 96, 33, 333, 2, 1100):
        x, arguments = draw(2, length, 3, masked=masked, packed=packed, seed=length)
        for actual, expected in zip(compiled(x, **arguments), both(x, **arguments), strict=True):
            assert_close(actual, expected, 1e-6)
    assert counter.frame_count == 1


class Sums(torch.nn.Module):
    def forward(self, x, initial_state, attention_mask):
        arguments = {"attention_mask": attention_mask}
        return *causal_sum(x, initial_state=initial_state, **arguments), bidirectional_sum(x, **arguments)


def test_export_serves_every_length():
    x, arguments = draw(2, 50, 3, masked=True, packed=False)
    state, mask = torch.randn(2, 3), arguments["attention_mask"]
    length = torch.export.Dim("length", min=2)
    program = torch.export.export(Sums(), (x, state, mask), dynamic_shapes=({1: length}, None, {1: length}))
    for cut in (50, 33, 7):
        inputs = x[:, :cut], state, mask[:, :cut]
        for actual, expected in zip(program.module()(*inputs), Sums()(*inputs), strict=True):
            assert_close(actual, expected, 1e-6)


def test_a_step_adds_its_term_after_any_number_of_tokens():
    term = torch.tensor([[[0.1, 0.3, 0.7, 1.3]]])
    begin = term[:, 0].double() * 3e7
    state = begin
    for _ in range(500):
        y, state = causal_sum(term, initial_state=state, scale=torch.full((1, 1), 1 / 30_000_500))
    _, prefilled = causal_sum(term.expand(1, 500, 4), initial_state=begin)
    for final in (state, prefilled):
        assert_close(final - begin, term[:, 0].double() * 500, 1e-6)
    assert_close(y[0, 0], term[0, 0])


def test_a_float32_state_is_taken():
    x, state = torch.randn(2, 40, 3), torch.randn(2, 3)
    for expected, actual in zip(
        causal_sum(x, initial_state=state.double()), causal_sum(x, initial_state=state), strict=True
    ):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
@pytest.mark.parametrize("log_decay", [None, torch.tensor([-0.1, -0.2, -0.3])])
@pytest.mark.parametrize("length, at", [(40, 20), (700, 37), (700, 400)])
def test_what_is_no_number_reaches_no_earlier_token_and_no_other_document(length, at, log_decay, garbage):
    x = torch.randn(1, length, 3)
    ids = torch.zeros(1, length, dtype=torch.long)
    ids[:, at + 2 :] = 1
    expected, expected_state = causal_sum(x, document_ids=ids, log_decay=log_decay)
    x[:, at] = garbage
    y, state = causal_sum(x, document_ids=ids, log_decay=log_decay)
    assert not y[:, at : at + 2].isfinite().any()
    assert torch.equal(y[:, :at], expected[:, :at]) and torch.equal(y[:, at + 2 :], expected[:, at + 2 :])
    assert torch.equal(state, expected_state)
    assert torch.equal(causal_sum(x, log_decay=log_decay)[0][:, :at], expected[:, :at])


@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional_means_are_rounded_once(packed):
    x = torch.full((1, 8192, 2), 12.3).half()
    ids = torch.arange(8192)[None] // 4096 if packed else None
    counts = torch.full((1, 8192), 4096.0) if packed else torch.full((1, 1), 8192.0)
    mean = bidirectional_sum(x, document_ids=ids, scale=1 / counts)
    assert mean.dtype == torch.float16 and torch.equal(mean, x)


def test_documents_are_numbered_by_their_real_tokens():
    ids = torch.tensor([[9, 5, 9, 9, 4, 4, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1]])
    assert document_runs(ids).tolist() == [[0, 1, 2, 2, 3, 3, 4]]
    assert document_runs(ids, mask).tolist() == [[0, 0, 0, 0, 0, 1, 2]]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"shape \[B, T, D\], got \[2, 3\]"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.long)}, TypeError, "floating dtype, got torch.int64"),
        ({"attention_mask": torch.ones(2, 4)}, ValueError, r"`attention_mask`.*\[2, 3\] of `x`, got \[2, 4\]"),
        ({"document_ids": torch.ones(1, 3).long()}, ValueError, r"`document_ids`.*\[2, 3\] of `x`, got \[1, 3\]"),
        ({"document_ids": torch.ones(2, 3)}, TypeError, "integer dtype, got torch.float32"),
        ({"scale": torch.ones(2, 4)}, ValueError, r"`scale`.*\[2, 3\] of `x` or \[1, 3\].*got \[2, 4\]"),
        ({"scale": torch.ones(3)}, ValueError, r"`scale`.*got \[3\]"),
    ],
)
def test_bad_arguments(arguments, error, message):
    arguments = {"x": torch.zeros(2, 3, 4), **arguments}
    for function in (causal_sum, bidirectional_sum):
        with pytest.raises(error, match=message):
            function(arguments["x"], **{k: v for k, v in arguments.items() if k != "x"})


def test_bad_initial_state():
    with pytest.raises(ValueError, match=r"`initial_state`.*\[2, 4\] of `x`, .*got \[2, 3\]"):
        causal_sum(torch.zeros(2, 3, 4), initial_state=torch.zeros(2, 3))
