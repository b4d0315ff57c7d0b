"""Layers of single tokens, in blocks of tokens."""

import pytest
import torch
from testing import sumagg_config, tost_text_config
from transformers import AutoModelForCausalLM

from modeling_sumagg.ops import token_blocks, token_wise


ROWS = 4


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of `ROWS` tokens of 8 channels."""
    monkeypatch.setattr(token_blocks, "BLOCK_BYTES", ROWS * 8 * 4)


def _widths_and_sum(sizes: list[int]):
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sizes.append(x.shape[-2])
        return x.square() + y.sum(-1, keepdim=True)

    return function


@pytest.mark.parametrize(
    ("shape", "expected_sizes"),
    [((1, 8), [8]), ((1, 9), [4, 4, 1]), ((3, 4), [4, 4, 4]), ((5, 2), [4, 4, 2]), ((2, 0), [0])],
)
def test_blocks_hold_every_token_once(small_blocks, shape, expected_sizes):
    x, y = torch.randn(*shape, 8), torch.randn(*shape, 2)
    sizes: list[int] = []
    with torch.no_grad():
        output = token_wise(_widths_and_sum(sizes), x, y)
    assert sizes == expected_sizes
    torch.testing.assert_close(output, x * x + (y[..., :1] + y[..., 1:]), rtol=1e-6, atol=1e-6)


def test_another_dtype_and_a_view(small_blocks):
    x = torch.randn(8, 3, 8).transpose(0, 1)
    with torch.inference_mode():
        output = token_wise(lambda tokens: tokens.double() * 2, x)
    assert torch.equal(output, x.double() * 2)


def test_with_gradients_there_is_one_block(small_blocks):
    x, y = torch.randn(1, 32, 8, requires_grad=True), torch.randn(1, 32, 2)
    sizes: list[int] = []
    token_wise(_widths_and_sum(sizes), x, y).sum().backward()
    assert sizes == [32]
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_summation_model_in_blocks(small_blocks, norm_position):
    _compare_with_one_block(sumagg_config(norm_position=norm_position))


def test_token_statistics_model_in_blocks(small_blocks):
    _compare_with_one_block(tost_text_config())


def _compare_with_one_block(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    input_ids = torch.randint(config.vocab_size, (2, 24))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :5] = attention_mask[1, 20:] = 0
    expected = model(input_ids=input_ids, attention_mask=attention_mask)
    with torch.no_grad():
        output = model(input_ids=input_ids, attention_mask=attention_mask)
    torch.testing.assert_close(output.logits, expected.logits.detach(), rtol=1e-5, atol=1e-6)
