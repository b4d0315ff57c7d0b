"""The causal convolution against a loop over the real tokens of each document, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_summation import draw
from testing import assert_close

from modeling_sumagg.ops import causal_convolution


def loop(x, weight, bias, state=None, attention_mask=None, document_ids=None):
    """The same, token by token, with the inputs before as a list."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    taps = weight.shape[1]
    y, states = torch.zeros_like(x), []
    for b in range(x.shape[0]):
        nothing = [torch.zeros_like(bias)] * (taps - 1)
        before, document = (nothing if state is None else list(state[b].double())), None
        for t in range(x.shape[1]):
            if attention_mask is not None and not attention_mask[b, t]:
                continue
            if document_ids is not None:
                if document not in (None, document_ids[b, t]):
                    before = nothing
                document = document_ids[b, t]
            window = [*before, x[b, t]]
            y[b, t] = bias + sum(weight[:, tap] * window[tap] for tap in range(taps))
            before = window[1:]
        states.append(torch.stack(before))
    return y, torch.stack(states)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(0, 12),
    st.integers(2, 5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 9),
)
def test_it_is_the_loop(batch, length, taps, masked, packed, carried, seed):
    packed = packed and length != 1  # a single token begins a document by a state of zeros
    x, arguments = draw(batch, length, 3, masked=masked, packed=packed, seed=seed)
    torch.manual_seed(seed)
    weight, bias = torch.randn(3, taps), torch.randn(3)
    state = torch.randn(batch, taps - 1, 3) if carried else None
    y, last = causal_convolution(x, weight=weight, bias=bias, initial_state=state, **arguments)
    expected, expected_last = loop(x, weight, bias, state, **arguments)
    real = arguments.get("attention_mask", torch.ones(batch, length, dtype=torch.bool))
    assert_close(y[real].double(), expected[real])
    assert_close(last.double(), expected_last)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_derivatives(masked, packed):
    x, arguments = draw(2, 6, 2, masked=masked, packed=packed, dtype=torch.float64)
    real = arguments.get("attention_mask", torch.ones(2, 6, dtype=torch.bool))[..., None]
    leaves = (x.nan_to_num(0, 0, 0), torch.randn(2, 3), torch.randn(2), torch.randn(2, 2, 2))
    leaves = tuple(leaf.double().requires_grad_() for leaf in leaves)

    def function(x, weight, bias, state):
        y, last = causal_convolution(x, weight=weight, bias=bias, initial_state=state, **arguments)
        return y.where(real, 0), last

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_it_rounds_once():
    x, weight = torch.randn(1, 40, 8).bfloat16(), torch.randn(8, 4).bfloat16()
    y, last = causal_convolution(x, weight=weight)
    expected, _ = loop(x, weight, torch.zeros(8))
    assert y.dtype == last.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)


def test_errors():
    x, weight = torch.zeros(2, 5, 3), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"`weight` \[D, k\] with k >= 2, got \[2, 5, 3\] and \[4, 4\]"):
        causal_convolution(x, weight=torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"the shape \[2, 3, 3\], got \[2, 4, 3\]"):
        causal_convolution(x, weight=weight, initial_state=torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape"):
        causal_convolution(x, weight=weight, attention_mask=torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"`x` must be of a floating dtype, got torch.int64"):
        causal_convolution(x.long(), weight=weight)
