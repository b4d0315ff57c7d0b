"""The documents of a packed row: what operators take, and that nothing of one document reaches another."""

from unittest import mock

import pytest
import torch
from testing import assert_close

from modeling_sumagg.ops import (
    Documents,
    bidirectional_mean,
    bidirectional_sum,
    causal_convolution,
    causal_convolution_reference,
    causal_keyed_sum,
    causal_keyed_sum_reference,
    causal_mean,
    causal_mean_reference,
    causal_sum,
    causal_sum_reference,
    causal_token_statistics,
    causal_token_statistics_reference,
    sliding_window_attention,
)
from modeling_sumagg.ops.documents import find_documents
from modeling_sumagg.ops.token_statistics import token_statistics_torch


# Three documents, of which the borders are within chunks and tiles of every size, and the token that is no number.
BORDERS, LENGTH, BAD, SIZE, HEADS = (21, 43), 90, 28, 6, 2
IDS = torch.bucketize(torch.arange(LENGTH), torch.tensor(BORDERS), right=True)[None]
OTHERS = IDS[0] != 1


def to_heads(x):
    return x.unflatten(2, (HEADS, SIZE // HEADS))


def plain_sum(x, decays, operator, **arguments):
    return operator(x, **arguments)


def decayed_sum(x, decays, operator, **arguments):
    return operator(x, log_decay=decays, **arguments)


def mean(x, decays, operator, **arguments):
    return operator(x, log_decay=decays, weight=-torch.expm1(decays), **arguments)


def convolution(x, decays, operator, **arguments):
    weight = torch.linspace(-1, 1, SIZE * 4).view(SIZE, 4).to(x)
    return operator(x, weight=weight, bias=weight[:, 0], **arguments)


def keyed_sum(x, decays, operator, **arguments):
    heads = to_heads(x)
    return operator(heads, heads[:, :, :1], heads[:, :, 1:], log_decay=decays, **arguments)


def statistics(x, decays, operator, **arguments):
    out, state = operator(to_heads(x).transpose(1, 2), torch.ones(HEADS).to(x), None, **arguments)
    return out.transpose(1, 2), state


def decayed_statistics(x, decays, operator, **arguments):
    return statistics(x, decays, operator, log_decay=decays, **arguments)


OPERATORS = {
    plain_sum: (causal_sum, causal_sum_reference),
    decayed_sum: (causal_sum, causal_sum_reference),
    mean: (causal_mean, causal_mean_reference),
    convolution: (causal_convolution, causal_convolution_reference),
    keyed_sum: (causal_keyed_sum, causal_keyed_sum_reference),
    statistics: (causal_token_statistics, causal_token_statistics_reference),
    decayed_statistics: (causal_token_statistics, causal_token_statistics_reference),
}


def tensors_of(state):
    return [state] if isinstance(state, torch.Tensor) else list(state)


def draw(value):
    """Terms and decays, and the same with a token that is no number."""
    torch.manual_seed(0)
    x, decays = torch.randn(1, LENGTH, SIZE), -torch.rand(1, LENGTH, HEADS)
    bad_x, bad_decays = x.clone(), decays.clone()
    bad_x[0, BAD] = value
    # Also what a layer computes of such a token.
    bad_decays[0, BAD] = torch.nan
    return x, decays, bad_x, bad_decays


def check_isolation(call, value, *, device="cpu", compiled=False):
    """Outputs and states of the other documents against the loop in float64, and all that comes after the bad token."""
    operator, reference = OPERATORS[call]
    x, decays, *inputs = draw(value)
    expected, expected_state = call(x.double(), decays.double(), reference, document_ids=IDS)
    arguments = {"document_ids": IDS.to(device)}

    def run(x, decays):
        y, state = call(x, decays, operator, **arguments)
        return y, *tensors_of(state)

    if compiled:
        run = torch.compile(run, fullgraph=True, backend="eager")
    inputs = [tensor.to(device).requires_grad_(not compiled) for tensor in inputs]
    with torch.set_grad_enabled(not compiled), mock.patch.object(token_statistics_torch, "BLOCK_SIZE", 32):
        y, *state = run(*inputs)
        grads = [] if compiled else torch.autograd.grad(y[:, OTHERS].sum(), inputs, allow_unused=True)
    tolerance = 1e-5
    assert_close(y[:, OTHERS].detach().cpu(), expected[:, OTHERS], tolerance)
    after = y[0, BAD : BORDERS[1]].detach().flatten(1)
    if call is convolution:
        after = after[:4]
    assert not after.isfinite().any(1).any() if value != value else not after.isfinite().all(1).any()
    for tensor, exact in zip(state, tensors_of(expected_state), strict=True):
        assert_close(tensor.detach().cpu(), exact, tolerance)
    for grad in grads:
        assert grad is None or grad[:, OTHERS].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("call", OPERATORS)
def test_what_is_no_number_stays_in_its_document(call, value):
    check_isolation(call, value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("call", OPERATORS)
def test_what_is_no_number_stays_in_its_document_in_a_compiled_graph(call, value):
    check_isolation(call, value, compiled=True)


@pytest.mark.parametrize("operator", [bidirectional_sum, bidirectional_mean])
@pytest.mark.parametrize("decayed", [False, True])
def test_what_is_no_number_stays_in_its_document_on_both_sides(operator, decayed):
    if operator is bidirectional_mean and not decayed:
        return
    x, decays, bad_x, bad_decays = draw(torch.nan)
    expected = operator(x.double(), document_ids=IDS, **({"log_decay": decays.double()} if decayed else {}))
    y = operator(bad_x, document_ids=IDS, **({"log_decay": bad_decays} if decayed else {}))
    assert_close(y[:, OTHERS], expected[:, OTHERS])
    assert y[:, ~OTHERS].isnan().any()


def test_what_is_no_number_stays_in_its_document_in_sliding_attention():
    key, value = torch.randn(2, 1, 2, LENGTH, 4)
    query, positions = torch.randn(1, 2, LENGTH, 4), torch.arange(LENGTH) - torch.tensor([0, *BORDERS])[IDS]
    arguments = {"sliding_window": 16, "scaling": 0.5, "positions": positions}
    expected = sliding_window_attention(query.double(), key.double(), value.double(), **arguments)
    for bad in (torch.nan, torch.inf):
        key[:, :, BAD], value[:, :, BAD] = bad, bad
        y = sliding_window_attention(query, key, value, **arguments)
        sees = (IDS[0] == 1) & (torch.arange(LENGTH) >= BAD)
        assert_close(y[:, :, ~sees][:, :, :BAD], expected[:, :, ~sees][:, :, :BAD])
        assert_close(y[:, :, OTHERS], expected[:, :, OTHERS])
        assert y[:, :, BAD : BORDERS[1]].isnan().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("call", OPERATORS)
def test_operators_take_documents_for_their_ids(call, masked):
    operator, reference = OPERATORS[call]
    x, decays, *_ = draw(0)
    mask = torch.arange(LENGTH)[None] % 5 != 2 if masked else None
    # The ids of what is masked mean nothing.
    ids = (IDS * 7 - 3).masked_fill(~mask, 1) if masked else IDS * 7 - 3
    documents = find_documents(ids, mask)
    assert torch.equal(documents.ids, IDS) and torch.equal(documents.starts[0].nonzero()[:, 0], torch.tensor(BORDERS))
    expected, expected_state = call(x.double(), decays.double(), reference, document_ids=ids, attention_mask=mask)
    y, state = call(x, decays, operator, document_ids=documents, attention_mask=mask)
    real = torch.ones(LENGTH, dtype=torch.bool) if mask is None else mask[0]
    assert_close(y[:, real], expected[:, real], 1e-5)
    for tensor, exact in zip(tensors_of(state), tensors_of(expected_state), strict=True):
        assert_close(tensor, exact, 1e-5)


def test_padding_belongs_to_the_document_before_it():
    mask = torch.tensor([[0, 1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()
    documents = find_documents(torch.tensor([[9, 4, 9, 4, 9, 2, 9]] * 2), mask)
    assert isinstance(documents, Documents)
    assert documents.ids.tolist() == [[0, 0, 0, 0, 0, 1, 1], [0] * 7]
    assert documents.starts.nonzero().tolist() == [[0, 5]]
