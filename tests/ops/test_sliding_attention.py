"""Block-wise sliding attention against the masked softmax of its definition, in float64."""

import pytest
import torch
from testing import assert_close, sumagg_config

from modeling_sumagg import SumAggForCausalLM
from modeling_sumagg.ops.sliding_attention import sliding_window_attention


def masked_softmax(query, key, value, sliding_window, scaling, positions=None, num_sinks=0):
    past = key.shape[2] - query.shape[2]
    distance = torch.arange(past, key.shape[2])[:, None] - torch.arange(key.shape[2])
    is_sink = torch.arange(key.shape[2]) < num_sinks
    is_hidden = (distance < 0) | ((distance >= sliding_window) & ~is_sink)
    if positions is not None:
        is_hidden = is_hidden | (distance > positions[:, None, :, None])
    return (query @ key.mT * scaling).masked_fill(is_hidden, -torch.inf).softmax(dim=-1) @ value


@pytest.mark.parametrize("length", [1, 5, 37, 130])
@pytest.mark.parametrize(
    ("sliding_window", "past", "num_sinks"),
    [
        (1, 0, 0),
        (2, 0, 0),
        (2, 1, 0),
        (5, 0, 0),
        (5, 4, 0),
        (64, 0, 0),
        (64, 17, 0),
        (64, 63, 0),
        (1, 0, 3),
        (5, 0, 2),
        (5, 3, 2),
        (5, 6, 2),
        (64, 63, 4),
        (64, 67, 4),
    ],
)
def test_equals_the_masked_softmax_with_its_gradients(sliding_window, length, past, num_sinks):
    tensors = [torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (length, past + length, past + length)]
    results = []
    for function in (masked_softmax, sliding_window_attention):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        output = function(*leaves, sliding_window=sliding_window, scaling=0.7, num_sinks=num_sinks)
        output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected)


def draw_positions(length, past):
    """Of documents of any length in two rows; the first of a row may have begun before it."""
    positions = torch.arange(length).expand(2, -1) + past
    for row, starts in enumerate(([3, 4, 20, 64, 70], [0, 11, 90])):
        for start in starts:
            positions = torch.where(
                (torch.arange(2)[:, None] == row) & (torch.arange(length) >= start),
                torch.arange(length) - start,
                positions,
            )
    return positions


@pytest.mark.parametrize("length", [5, 37, 130])
@pytest.mark.parametrize(("sliding_window", "past"), [(1, 0), (5, 0), (5, 4), (64, 17)])
def test_packed_documents_equal_the_masked_softmax_with_its_gradients(sliding_window, length, past):
    tensors = [torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (length, past + length, past + length)]
    results = []
    for function in (masked_softmax, sliding_window_attention):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        arguments = {"sliding_window": sliding_window, "scaling": 0.7, "positions": draw_positions(length, past)}
        output = function(*leaves, **arguments)
        output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for actual, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(actual, expected)


def test_refuses_more_past_than_a_window():
    query, key = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 7, 2)
    with pytest.raises(ValueError, match="takes 0 to 3 keys before the first query, got 4"):
        sliding_window_attention(query, key, key, sliding_window=4, scaling=1.0)


@pytest.mark.parametrize("packed", [False, True])
def test_a_long_segment_needs_no_square_mask(packed):
    model = SumAggForCausalLM(sumagg_config("sliding", position_embedding_type="sinusoidal")).eval()
    reference = SumAggForCausalLM(sumagg_config("sliding", position_embedding_type="sinusoidal"))
    reference.set_attn_implementation("eager")
    reference.load_state_dict(model.state_dict())
    input_ids = torch.randint(61, (2, 50))
    shapes = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        shapes.append(kwargs["attn_mask"].shape)
        return attend(*args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = spy
    position_ids = draw_positions(50, 0) if packed else torch.arange(50).expand(2, -1)
    first, second = ({"position_ids": part} if packed else {} for part in position_ids.split([37, 13], 1))
    try:
        outputs = model(input_ids[:, :37], **first)
        logits = torch.cat([outputs.logits, model(input_ids[:, 37:], cache=outputs.cache, **second).logits], 1)
    finally:
        torch.nn.functional.scaled_dot_product_attention = attend
    assert_close(logits, reference.eval()(input_ids, position_ids=position_ids).logits)
    assert all(shape[-2:] == (5, 10) for shape in shapes) and shapes
