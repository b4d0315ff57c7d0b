"""The token statistics operators against a float64 loop over tokens, outputs and all gradients."""

import importlib
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing import assert_close
from torch._dynamo.testing import CompileCounterWithBackend

from modeling_sumagg.ops.token_statistics import token_statistics as operators
from modeling_sumagg.ops.token_statistics import token_statistics_reference as formula
from modeling_sumagg.ops.token_statistics import token_statistics_torch as blocks
from modeling_sumagg.ops.token_statistics.token_statistics import (
    TokenStatisticsState,
    causal_token_membership,
    causal_token_statistics,
    causal_token_statistics_reference,
    token_membership,
    token_statistics,
    token_statistics_reference,
)


CAUSAL = [causal_token_statistics, causal_token_statistics_reference]
BIDIRECTIONAL = [token_statistics, token_statistics_reference]
# Small blocks, so that short sequences have many; and those of the operators.
BLOCKS = [
    {"CHUNK_SIZE": 2, "BLOCK_SIZE": 4, "CPU_BLOCK_ELEMENTS": 1},
    {"CHUNK_SIZE": 4, "BLOCK_SIZE": 8, "CPU_BLOCK_ELEMENTS": 50},
    {"CHUNK_SIZE": blocks.CHUNK_SIZE, "BLOCK_SIZE": blocks.BLOCK_SIZE, "CPU_BLOCK_ELEMENTS": 2**19},
]
# For outputs and for gradients, relative to the largest element. The statistics are float32 at least; a gradient may be
# the small difference of large parts.
TOLERANCES = {torch.float64: (1e-10, 1e-10), torch.float32: (2e-6, 1e-2), torch.bfloat16: (2.0**-8, 2.0**-5)}


def loop_causal(
    w, temperature, position_bias=None, state=None, attention_mask=None, document_ids=None, log_decay=None
):
    """Output, membership and final state, one token at a time."""
    batch_size, num_heads, length, head_dim = w.shape
    rows = []
    for b in range(batch_size):
        if state is None:
            second, weighted = w.new_zeros(2, num_heads, head_dim)
            total = w.new_zeros(num_heads)
        else:
            second, weighted, total = (sums[b] for sums in state)
        document, outputs, memberships = None, [], []
        for t in range(length):
            if attention_mask is not None and not attention_mask[b, t]:
                outputs.append(w.new_zeros(num_heads, head_dim))
                memberships.append(w.new_zeros(num_heads))
                continue
            if document_ids is not None:
                if document is not None and document != document_ids[b, t].item():
                    second, weighted, total = second * 0, weighted * 0, total * 0
                document = document_ids[b, t].item()
            x = w[b, :, t]
            if log_decay is not None:
                decay = log_decay.expand(batch_size, length, num_heads)[b, t].exp()
                second, weighted, total = decay[:, None] * second, decay[:, None] * weighted, decay * total
            second = second + x * x
            terms = x * x / second.clamp(min=1e-12)
            if position_bias is not None:
                terms = terms + position_bias.expand(batch_size, -1, -1)[b, :, t, None]
            membership = (temperature.reshape(-1) * terms.sum(-1)).softmax(0)
            weighted = weighted + membership[:, None] * x * x
            total = total + membership
            outputs.append(-x * membership[:, None] / (1 + weighted / (total[:, None] + 1e-8)))
            memberships.append(membership)
        rows.append((torch.stack(outputs, 1), torch.stack(memberships, 1), second, weighted, total))
    out, membership, *final = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return out, membership, final


def loop_bidirectional(w, temperature, attention_mask=None):
    """Output and membership, one token at a time."""
    batch_size, num_heads, length, head_dim = w.shape
    outs, memberships = torch.zeros_like(w), w.new_zeros(w.shape[:3])
    for b in range(batch_size):
        tokens = [t for t in range(length) if attention_mask is None or attention_mask[b, t]]
        norm2, weighted, total = w.new_zeros(num_heads, head_dim), w.new_zeros(num_heads, head_dim), 0
        for t in tokens:
            norm2 = norm2 + w[b, :, t] ** 2
        norm2 = norm2.clamp(min=1e-24)
        for t in tokens:
            membership = (temperature.reshape(-1) * (w[b, :, t] ** 2 / norm2).sum(-1)).softmax(0)
            memberships[b, :, t] = membership
            weighted = weighted + membership[:, None] * w[b, :, t] ** 2
            total = total + membership[:, None]
        for t in tokens:
            outs[b, :, t] = -w[b, :, t] * memberships[b, :, t, None].clone() / (1 + weighted / (total + 1e-8))
    return outs, memberships


def draw(
    batch_size=2,
    num_heads=3,
    length=20,
    head_dim=2,
    scale=1.0,
    dtype=torch.float64,
    biased=True,
    stateful=True,
    masked=True,
    packed=True,
    seed=0,
):
    """`w`, `temperature`, the bias and the state as inputs to differentiate, then the mask and the documents."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=dtype):
        return torch.tensor(rng.standard_normal(shape)).to(dtype)

    w = normal(batch_size, length, num_heads, head_dim).transpose(1, 2) * scale
    w[:, 0, :, 0] *= float(rng.choice([0.0, 1.0]))  # a dead channel
    bias = state = mask = ids = None
    if biased:
        bias = normal(*([batch_size, num_heads, length][int(rng.integers(2)) :])) * 0.5
    if stateful:
        kind = torch.promote_types(dtype, torch.float32)
        shape = (batch_size, num_heads, head_dim)
        state = TokenStatisticsState(
            *(normal(*shape, dtype=kind) ** 2 * scale**2 for _ in range(2)), normal(*shape[:2], dtype=kind) ** 2
        )
    if masked:
        mask = torch.tensor(rng.random((batch_size, length)) < rng.choice([0.0, 0.6, 0.9], size=(batch_size, 1)))
        garbage = torch.tensor(rng.choice([np.nan, np.inf, -np.inf, 1e4], size=w.shape)).to(dtype)
        w = torch.where(mask[:, None, :, None], w, garbage)
        if bias is not None and bias.ndim == 3:
            bias = bias.masked_fill(~mask[:, None], torch.nan)
    if packed:
        change = rng.random((batch_size, length)) < rng.choice([0.05, 0.4])
        index = np.maximum.accumulate(np.where(change, np.arange(length), 0), axis=1)
        ids = torch.tensor(np.take_along_axis(rng.choice([7, -1, 3, 2**40], size=(batch_size, length)), index, axis=1))
    temperature = normal(*[num_heads, 1][: int(rng.integers(1, 3))])
    return [w, temperature, bias, state], {"attention_mask": mask, "document_ids": ids}


def draw_for_graph(length):
    """The arguments of `Both`, of the same shapes but for the length."""
    (w, temperature, bias, state), arguments = draw(length=length, dtype=torch.float32)
    return [w, temperature.flatten(), bias.expand(2, -1, -1).contiguous(), state], arguments.values()


def requiring_grad(inputs, dtype=None):
    """Leaves of the inputs, in order: `(w, temperature, bias or None, state or None), [leaves]`."""
    leaves = []

    def leaf(x):
        leaves.append(x.detach().to(dtype or x.dtype).requires_grad_())
        return leaves[-1]

    inputs = [None if x is None else [leaf(s) for s in x] if isinstance(x, tuple) else leaf(x) for x in inputs]
    return inputs, leaves


def assert_gradients_close(outputs, leaves, expected_outputs, expected_leaves, mask):
    """Outputs, the first of them `[B, K, T, p]`, and the gradients of the leaves."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator).bfloat16().double() for x in expected_outputs]
    # A loop over masked tokens alone depends on nothing.
    loss = sum((x * weight).sum() for x, weight in zip(expected_outputs, weights, strict=True))
    loss = loss + sum(0 * x.nan_to_num(0, 0, 0).sum() for x in expected_leaves)
    expected_grads = torch.autograd.grad(loss, expected_leaves, retain_graph=True)
    if mask is not None:
        weights[0] = weights[0].masked_fill(~mask[:, None, :, None], torch.nan)
    weights = [weight.to(x.dtype) for weight, x in zip(weights, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, leaves, weights)
    tolerance, grad_tolerance = TOLERANCES[outputs[0].dtype]
    for actual, expected in zip(outputs, expected_outputs, strict=True):
        assert_close(actual, expected, tolerance)
    for actual, expected in zip(grads, expected_grads, strict=True):
        assert_close(actual, expected, grad_tolerance)


common = {
    "batch_size": st.integers(1, 3),
    "num_heads": st.integers(2, 4),
    "length": st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 33]),
    "head_dim": st.integers(1, 4),
    "scale": st.sampled_from([1e-13, 1e-6, 0.1, 1.0, 30.0]),
    "dtype": st.sampled_from(list(TOLERANCES)),
    "masked": st.booleans(),
    "seed": st.integers(0, 2**16),
}


@settings(max_examples=250, derandomize=True, deadline=None)
@given(
    case=st.fixed_dictionaries(
        {**common, "biased": st.booleans(), "stateful": st.booleans(), "packed": st.booleans()}
    ),
    sizes=st.sampled_from(BLOCKS),
)
def test_causal_is_the_loop(case, sizes):
    inputs, arguments = draw(**case)
    mask = arguments["attention_mask"]
    (w, temperature, bias, state), expected_leaves = requiring_grad(inputs, torch.float64)
    out, membership, final = loop_causal(w, temperature, bias, state, **arguments)

    for function in CAUSAL:
        (w, temperature, bias, state), leaves = requiring_grad(inputs)
        arguments["initial_state"] = None if state is None else TokenStatisticsState(*state)
        with mock.patch.multiple(blocks, **sizes):
            actual, actual_final = function(w, temperature, bias, **arguments)
            assert actual.dtype == w.dtype
            assert {x.dtype for x in actual_final} == {torch.float64}
            assert mask is None or not actual.transpose(1, 2)[~mask].any()
            assert_gradients_close((actual, *actual_final), leaves, (out, *final), expected_leaves, mask)
            with torch.no_grad():
                inferred, inferred_final = function(w, temperature, bias, **arguments)
        for actual, expected in zip((inferred, *inferred_final), (out, *final), strict=True):
            assert_close(actual, expected, TOLERANCES[w.dtype][0])
    assert_close(causal_token_membership(w, temperature, bias, **arguments), membership, 1e-5)


@settings(max_examples=250, derandomize=True, deadline=None)
@given(case=st.fixed_dictionaries(common), sizes=st.sampled_from(BLOCKS))
def test_bidirectional_is_the_loop(case, sizes):
    inputs, arguments = draw(**case, biased=False, stateful=False, packed=False)
    mask = arguments["attention_mask"]
    (w, temperature, _, _), expected_leaves = requiring_grad(inputs, torch.float64)
    out, membership = loop_bidirectional(w, temperature, mask)

    for function in BIDIRECTIONAL:
        (w, temperature, _, _), leaves = requiring_grad(inputs)
        with mock.patch.multiple(blocks, **sizes):
            actual = function(w, temperature, attention_mask=mask)
            assert actual.dtype == w.dtype
            assert mask is None or not actual.transpose(1, 2)[~mask].any()
            assert_gradients_close((actual,), leaves, (out,), expected_leaves, mask)
    assert_close(token_membership(w, temperature, attention_mask=mask), membership, 1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_derivatives_of_both_orders(masked, packed):
    sizes = {"CHUNK_SIZE": 2, "BLOCK_SIZE": 4, "CPU_BLOCK_ELEMENTS": 1}
    (w, temperature, bias, state), arguments = draw(1, 2, 6, 2, masked=masked, packed=packed, seed=5)
    mask = arguments["attention_mask"]
    # Differences of 1e-6 need finite values, and no channel at the floor of its moments.
    w, bias = w.nan_to_num(0, 0, 0).clamp(-3, 3), bias.nan_to_num(0)
    w = torch.where(w == 0, 0.5, w)
    _, leaves = requiring_grad((w, temperature, bias, *state))

    def causal(w, temperature, bias, *state):
        out, final = causal_token_statistics(
            w, temperature, bias, initial_state=TokenStatisticsState(*state), **arguments
        )
        return out, *final

    def bidirectional(w, temperature):
        return token_statistics(w, temperature, attention_mask=mask)

    with mock.patch.multiple(blocks, **sizes):
        for function, inputs in ((causal, leaves), (bidirectional, leaves[:2])):
            assert torch.autograd.gradcheck(function, inputs)
            assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("function", CAUSAL)
@pytest.mark.parametrize("cut", [0, 1, 2, 16, 255, 256, 257, 599, 600])
def test_two_segments_go_on_as_one(cut, function):
    (w, temperature, bias, state), arguments = draw(2, 3, 600, 2, dtype=torch.float32, seed=cut, packed=False)
    mask = arguments["attention_mask"]
    bias = bias.expand(2, -1, -1)
    expected, expected_final = function(w, temperature, bias, initial_state=state, attention_mask=mask)
    outs = []
    for part in (slice(0, cut), slice(cut, None)):
        out, state = function(
            w[:, :, part], temperature, bias[:, :, part], initial_state=state, attention_mask=mask[:, part]
        )
        outs.append(out)
    assert_close(torch.cat(outs, 2), expected)
    for actual, sums in zip(state, expected_final, strict=True):
        assert_close(actual, sums)


@pytest.mark.parametrize("function", CAUSAL)
def test_right_padding_leaves_the_state_after_the_last_real_token(function):
    (w, temperature, bias, state), _ = draw(2, 3, 300, 2, dtype=torch.float32, masked=False)
    bias = bias.expand(2, -1, -1)
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[:, 270:] = 0
    ids = torch.arange(300).expand(2, -1) // 90
    _, expected = function(
        w[:, :, :270], temperature, bias[:, :, :270], initial_state=state, document_ids=ids[:, :270]
    )
    _, actual = function(w, temperature, bias, initial_state=state, attention_mask=mask, document_ids=ids)
    for sums, expected_sums in zip(actual, expected, strict=True):
        assert_close(sums, expected_sums)


@pytest.mark.parametrize("function", CAUSAL)
@pytest.mark.parametrize("begin", [1, 20, 256, 300])
def test_nothing_of_an_earlier_document_is_left(begin, function):
    w, temperature = torch.randn(1, 2, 400, 3), torch.ones(2)
    w[:, :, :begin] *= 1e6
    state = TokenStatisticsState(torch.full((1, 2, 3), 1e13), torch.full((1, 2, 3), 1e13), torch.full((1, 2), 1e13))
    ids = (torch.arange(400) >= begin).long()[None]
    out, final = function(w, temperature, None, initial_state=state, document_ids=ids)
    expected, _, expected_final = loop_causal(w[:, :, begin:].double(), temperature.double())
    assert_close(out[:, :, begin:], expected, 1e-6)
    for sums, expected_sums in zip(final, expected_final, strict=True):
        assert_close(sums, expected_sums, 1e-6)


def draw_decays(rows, length, num_heads=3):
    shape = (num_heads,) if rows is None else (rows, length, num_heads)
    return -(10 ** torch.empty(shape, dtype=torch.float64).uniform_(-4, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked, packed", [(False, False), (True, True)])
@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_decays_are_those_of_the_loop(length, rows, masked, packed, dtype):
    inputs, arguments = draw(2, 3, length, 2, dtype=dtype, masked=masked, packed=packed, seed=length)
    mask = arguments["attention_mask"]
    inputs.append(draw_decays(rows, length).to(torch.promote_types(dtype, torch.float32)))
    (w, temperature, bias, state, log_decay), expected_leaves = requiring_grad(inputs, torch.float64)
    out, membership, final = loop_causal(w, temperature, bias, state, log_decay=log_decay, **arguments)
    for function in CAUSAL:
        (w, temperature, bias, state, log_decay), leaves = requiring_grad(inputs)
        kwargs = {"log_decay": log_decay, "initial_state": TokenStatisticsState(*state), **arguments}
        with mock.patch.object(operators, "FORMULA_BLOCK_ELEMENTS", 16 * 2 * 3 * 2):
            actual, actual_final = function(w, temperature, bias, **kwargs)
            assert actual.dtype == dtype and {x.dtype for x in actual_final} == {torch.float64}
            assert_gradients_close((actual, *actual_final), leaves, (out, *final), expected_leaves, mask)
            with torch.no_grad():
                inferred, _ = function(w, temperature, bias, **kwargs)
        assert_close(inferred, out, TOLERANCES[dtype][0])
    assert_close(causal_token_membership(w, temperature, bias, **kwargs), membership, 1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_derivatives_with_decays(packed):
    (w, temperature, bias, state), arguments = draw(1, 2, 6, 2, masked=packed, packed=packed, seed=5)
    w, bias = w.nan_to_num(0, 0, 0).clamp(-3, 3), bias.nan_to_num(0)
    w = torch.where(w == 0, 0.5, w)
    log_decay = draw_decays(1, 6, 2).clamp(-3, -0.01)
    _, leaves = requiring_grad((w, temperature, bias, log_decay, *state))

    def function(w, temperature, bias, log_decay, *state):
        state = TokenStatisticsState(*state)
        out, final = causal_token_statistics(
            w, temperature, bias, log_decay=log_decay, initial_state=state, **arguments
        )
        return out, *final

    with mock.patch.object(operators, "FORMULA_BLOCK_ELEMENTS", 4 * 2 * 2):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("cut", [0, 1, 255, 256, 300])
def test_decayed_segments_go_on_as_one(cut):
    (w, temperature, _, state), arguments = draw(2, 3, 600, 2, dtype=torch.float32, seed=cut, packed=False)
    mask, log_decay = arguments["attention_mask"], draw_decays(2, 600).float()
    expected, _, expected_final = loop_causal(w.double(), temperature.double(), None, state, mask, None, log_decay)
    outs = []
    for part in (slice(0, cut), slice(cut, None)):
        out, state = causal_token_statistics(
            w[:, :, part],
            temperature,
            None,
            log_decay=log_decay[:, part],
            initial_state=state,
            attention_mask=mask[:, part],
        )
        outs.append(out)
    assert_close(torch.cat(outs, 2), expected, 2e-6)
    for actual, sums in zip(state, expected_final, strict=True):
        assert_close(actual, sums, 2e-6)


def test_decays_of_one_are_none():
    (w, temperature, bias, state), arguments = draw(2, 3, 300, 2, dtype=torch.float32)
    out, final = causal_token_statistics(w, temperature, bias, initial_state=state, **arguments)
    actual, actual_final = causal_token_statistics(
        w, temperature, bias, log_decay=torch.zeros(3), initial_state=state, **arguments
    )
    assert_close(actual, out, 2e-6)
    for sums, expected in zip(actual_final, final, strict=True):
        assert_close(sums, expected, 2e-6)


def test_a_step_adds_its_terms_after_any_number_of_tokens():
    (w, temperature, _, state), _ = draw(1, 2, 300, 3, dtype=torch.float32, masked=False, packed=False)
    begin = state = TokenStatisticsState(*(sums.double() * 3e7 for sums in state))
    _, _, expected = loop_causal(w.double(), temperature.double(), None, begin)
    for token in w.split(1, dim=2):
        _, state = causal_token_statistics(token, temperature, None, initial_state=state)
    _, prefilled = causal_token_statistics(w.requires_grad_(), temperature, None, initial_state=begin)
    for final in (state, prefilled):
        for sums, expected_sums, begin_sums in zip(final, expected, begin, strict=True):
            assert_close(sums - begin_sums, expected_sums - begin_sums, 1e-4)


@pytest.mark.parametrize("function", CAUSAL)
@pytest.mark.parametrize("stateful", [False, True])
def test_no_tokens(function, stateful):
    (w, temperature, bias, state), arguments = draw(2, 3, 1, 4, dtype=torch.bfloat16, stateful=stateful)
    arguments = {name: argument[:, :0] for name, argument in arguments.items()}
    out, final = function(w[:, :, :0], temperature, bias[..., :0], initial_state=state, **arguments)
    assert out.shape == (2, 3, 0, 4) and out.dtype == torch.bfloat16
    state = state or (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3))
    for sums, expected in zip(final, state, strict=True):
        assert torch.equal(sums, expected)
    for function in BIDIRECTIONAL:
        out = function(w[:, :, :0], temperature, attention_mask=arguments["attention_mask"])
        assert out.shape == (2, 3, 0, 4)


def test_low_precision_rounds_only_the_ends():
    w = torch.randn(1, 8192, 4, 8).bfloat16().transpose(1, 2)
    temperature, bias = torch.randn(4), torch.randn(4, 8192) * 0.1
    expected, expected_final = causal_token_statistics_reference(w.double(), temperature.double(), bias.double())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, final = causal_token_statistics(w, temperature, bias)
            packed, _ = causal_token_statistics(w, temperature, bias, document_ids=torch.zeros(1, 8192).long())
            start, _ = causal_token_statistics_reference(
                w[:, :, :300], temperature, bias[:, :300], document_ids=torch.zeros(1, 300).long()
            )
            both = token_statistics(w, temperature)
        assert out.dtype == packed.dtype == both.dtype == torch.bfloat16
        for sums, expected_sums in zip(final, expected_final, strict=True):
            assert_close(sums, expected_sums, 1e-6)
        # Rounded once: half a unit in the last of 8 places.
        torch.testing.assert_close(out.double(), expected, rtol=2.0**-8, atol=1e-9)
        torch.testing.assert_close(packed.double(), expected, rtol=2.0**-8, atol=1e-9)
        torch.testing.assert_close(start.double(), expected[:, :, :300], rtol=2.0**-8, atol=1e-9)
        expected_both = token_statistics_reference(w.double(), temperature.double())
        torch.testing.assert_close(both.double(), expected_both, rtol=2.0**-8, atol=1e-9)


@pytest.mark.parametrize("functions", [CAUSAL, BIDIRECTIONAL])
def test_dropout(functions):
    results = []
    w, temperature = torch.randn(4, 2, 300, 8, requires_grad=True), torch.randn(2, requires_grad=True)
    bias = (None,) if functions is CAUSAL else ()
    for function in functions:
        plain = function(w, temperature, *bias)
        torch.manual_seed(1)
        dropped = function(w, temperature, *bias, dropout_p=0.3)
        plain, dropped = (plain[0], dropped[0]) if functions is CAUSAL else (plain, dropped)
        # The bidirectional 1 / (1 + m) is one for all tokens.
        kept = dropped != 0 if functions is CAUSAL else (dropped != 0).any(2, keepdim=True)
        assert_close(dropped, torch.where(kept, plain / 0.7, 0))
        assert abs(kept.float().mean().item() - 0.7) < (0.02 if functions is CAUSAL else 0.2)
        results.append((dropped, *torch.autograd.grad(dropped.square().sum(), (w, temperature))))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


def test_training_saves_little_more_than_w():
    w = torch.randn(2, 1024, 4, 16).transpose(1, 2).requires_grad_()
    temperature, bias = torch.randn(4, requires_grad=True), torch.randn(4, 1024, requires_grad=True)

    def bytes_saved(function, *arguments):
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            function(w, temperature, *arguments)
        return sum(storages.values())

    size = w.untyped_storage().nbytes()
    assert size <= bytes_saved(causal_token_statistics, bias) <= 1.1 * size
    assert size <= bytes_saved(token_statistics) <= 1.1 * size
    assert bytes_saved(causal_token_statistics_reference, bias) >= 5 * size


def test_output_is_laid_out_as_the_projection():
    w = torch.randn(2, 3, 40, 5)
    for layout in (w, w.transpose(1, 2).contiguous().transpose(1, 2)):
        assert causal_token_statistics(layout, torch.ones(3), None)[0].transpose(1, 2).is_contiguous()
        assert token_statistics(layout, torch.ones(3)).transpose(1, 2).is_contiguous()


class Both(torch.nn.Module):
    """Both operators with every argument."""

    def __init__(self, log_decay=None):
        super().__init__()
        self.log_decay = log_decay

    def forward(self, w, temperature, bias, state, attention_mask, document_ids):
        out, final = causal_token_statistics(
            w,
            temperature,
            bias,
            log_decay=self.log_decay,
            initial_state=TokenStatisticsState(*state),
            attention_mask=attention_mask,
            document_ids=document_ids,
        )
        return token_statistics(w, temperature, attention_mask=attention_mask), out, *final


@pytest.mark.parametrize("log_decay", [None, pytest.param(torch.tensor([-0.1, -1.0, -3.0]), marks=pytest.mark.slow)])
def test_compiled_training_is_one_graph_for_every_length(log_decay):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    both = Both(log_decay)
    compiled = torch.compile(both, backend=counter, fullgraph=True)
    for length in (30, 40, 300, 700, 31):
        drawn, arguments = draw_for_graph(length)
        results = []
        for function in (both, compiled):
            inputs, leaves = requiring_grad(drawn)
            outputs = function(*inputs, *arguments)
            grads = torch.autograd.grad(sum(x.square().sum() for x in outputs), leaves)
            results.append((*outputs, *grads))
        for actual, expected in zip(*results, strict=True):
            assert_close(actual, expected)
    assert counter.frame_count == 2  # the first length, then any


@pytest.mark.parametrize("log_decay", [None, torch.tensor([-0.1, -1.0, -3.0])])
def test_export_holds_plain_operators_for_every_length(log_decay):
    both = Both(log_decay)

    def example(length):
        (*inputs, state), arguments = draw_for_graph(length)
        return *inputs, tuple(state), *arguments

    length = torch.export.Dim("length")
    shapes = ({2: length}, None, {2: length}, (None, None, None), {1: length}, {1: length})
    program = torch.export.export(both, example(20), dynamic_shapes=shapes)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    namespaces = {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}
    assert namespaces == {"aten"}
    for inputs in (example(2), example(300)):
        for actual, expected in zip(program.module()(*inputs), both(*inputs), strict=True):
            assert_close(actual, expected)


def test_another_version_of_the_file_leaves_the_operators_alone(tmp_path, monkeypatch):
    w = torch.randn(1, 2, 100, 3, requires_grad=True)
    expected, _ = causal_token_statistics(w, torch.ones(2), None)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), w)

    package = tmp_path / "checkpoint"
    source = Path(formula.__file__)
    shutil.copytree(source.parents[1], package)
    other = source.read_text().replace("MIN_MEMBERSHIP = 1e-8", "MIN_MEMBERSHIP = 1.0")
    (package / source.parent.name / source.name).write_text(other)
    monkeypatch.syspath_prepend(tmp_path)
    copy = importlib.import_module("checkpoint.token_statistics.token_statistics")
    for name in [name for name in sys.modules if name.partition(".")[0] == "checkpoint"]:
        monkeypatch.delitem(sys.modules, name)

    assert not torch.allclose(copy.causal_token_statistics(w, torch.ones(2), None)[0], expected)
    actual, _ = causal_token_statistics(w, torch.ones(2), None)
    (grad,) = torch.autograd.grad(actual.square().sum(), w)
    assert torch.equal(actual, expected) and torch.equal(grad, expected_grad)


W, TEMPERATURE, BIAS = torch.zeros(2, 3, 5, 4), torch.ones(3), torch.zeros(3, 5)
STATE = TokenStatisticsState(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": W[0]}, ValueError, r"`w` must have the shape \[B, K, T, p\], got \[3, 5, 4\]"),
        ({"w": W.long()}, TypeError, "`w` must be of a floating dtype, got torch.int64"),
        ({"temperature": TEMPERATURE.long()}, TypeError, "`temperature` must be of a floating dtype"),
        ({"temperature": torch.ones(4)}, ValueError, r"`temperature` .* \[3\] or \[3, 1\] .* got \[4\]"),
        ({"temperature": torch.ones(())}, ValueError, r"`temperature` .* got \[\]"),
        ({"attention_mask": torch.ones(2, 6)}, ValueError, r"`attention_mask` .* \[2, 5\] .* got \[2, 6\]"),
        ({"dropout_p": 1.0}, ValueError, r"`dropout_p` must be in \[0, 1\), got 1.0"),
        ({"position_bias": BIAS.long()}, TypeError, "`position_bias` must be of a floating dtype"),
        ({"position_bias": BIAS[:, :4]}, ValueError, r"`position_bias` .* \[2, 3, 5\] .* got \[3, 4\]"),
        ({"log_decay": torch.zeros(3).long()}, TypeError, "`log_decay` must be of a floating dtype, got torch.int64"),
        ({"log_decay": torch.zeros(4)}, ValueError, r"`log_decay` .* \[3\] or .* got \[4\]"),
        ({"log_decay": torch.zeros(2, 3, 5)}, ValueError, r"`log_decay` .* \[2, 5, 3\] of .* got \[2, 3, 5\]"),
        (
            {
                "initial_state": TokenStatisticsState(
                    torch.zeros(2, 4, 3, 4), torch.zeros(2, 4, 3, 4), torch.zeros(2, 4, 3)
                )
            },
            ValueError,
            r"`initial_state.second_moment` must have the shape \[2, 3, 4\] for `w`, got \[2, 4, 3, 4\]",
        ),
        ({"document_ids": torch.zeros(2, 5)}, TypeError, "`document_ids` must be of an integer dtype"),
        ({"document_ids": torch.zeros(5).long()}, ValueError, r"`document_ids` .* \[2, 5\] .* got \[5\]"),
        (
            {"initial_state": STATE._replace(membership=torch.zeros(2, 4))},
            ValueError,
            r"`initial_state.membership` must have the shape \[2, 3\] for `w`, got \[2, 4\]",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {"w": W, "temperature": TEMPERATURE, **change}
    causal_only = {"position_bias", "log_decay", "document_ids", "initial_state"} & change.keys()
    for function in () if causal_only else BIDIRECTIONAL:
        with pytest.raises(error, match=message):
            function(**arguments)
    arguments.setdefault("position_bias", BIAS)
    for function in CAUSAL:
        with pytest.raises(error, match=message):
            function(**arguments)
