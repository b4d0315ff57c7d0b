"""A text that arrives in pieces: which models read it, what it costs, and what it says of nothing."""

import importlib
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

import modeling_sumagg
from modeling_sumagg import SumAggConfig, ToSTTextConfig
from modeling_sumagg.streams.text_stream import TextStream, check_constant_state

from .conftest import byte_tokenizer


@pytest.fixture(scope="module")
def gated_sum():
    """The README's own mixer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2] / "examples" / "own_mixer")
        yield importlib.import_module("gated_sum")
    modeling_sumagg.FAMILIES.pop("gated_sum")
    sys.modules.pop("gated_sum")


def test_an_own_mixer_reads_a_stream(gated_sum, tmp_path):
    torch.manual_seed(0)
    config = gated_sum.GatedSumConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, position_embedding_type="none"
    )
    model = gated_sum.GatedSumForCausalLM(config).eval()
    text = "Gates decide, tokens add; näher dran.\n".encode() * 5
    stream = TextStream(model, byte_tokenizer())
    for start in range(0, 100, 7):
        stream.feed(text[start : min(start + 7, 100)])
    stream.save(tmp_path / "state")
    resumed = TextStream(model, byte_tokenizer())
    resumed.load(tmp_path / "state")
    resumed.feed(text[100:], final=True)

    ids = torch.tensor([[256, *byte_tokenizer()(text.decode())["input_ids"]]])
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none")
    assert resumed.num_tokens == ids.shape[1] and resumed.num_bytes == len(text)
    assert math.isclose(resumed.perplexity(), losses.mean().exp().item(), rel_tol=1e-5)
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    with pytest.raises(ValueError, match="same config with other weights"):
        TextStream(model, byte_tokenizer()).load(tmp_path / "state")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(), "type 'gpt2' cannot read a stream: its config has no `recurrent_layer_types`"),
        (
            SumAggConfig(layer_types=["summation", "full_attention"], num_hidden_layers=2),
            r"Layers \[1\] of the model attend to the whole text",
        ),
        (
            SumAggConfig(num_hidden_layers=1, layer_types=["summation"], position_embedding_type="learned"),
            r"learned parameters for 1024 positions \(`max_position_embeddings`\)",
        ),
        (ToSTTextConfig(position_embedding_type="sinusoidal"), "learned parameters for 1024 positions"),
        (SumAggConfig(num_hidden_layers=1, is_causal=False), "A bidirectional model needs the whole text at once"),
    ],
    ids=["gpt2", "full attention", "learned positions", "membership bias", "bidirectional"],
)
def test_models_without_a_constant_state_are_refused_with_what_trains_a_fitting_one(config, message):
    with pytest.raises(ValueError, match=rf"{message}.*`python examples/quickstart.py` trains .* runs/quickstart"):
        check_constant_state(config)


def test_the_tokens_of_a_long_chunk_are_joined_in_linear_time(text_stream):
    stream = text_stream()
    ids = [[index % 256] for index in range(200_000)]
    stream.tokenizer = lambda pieces, add_special_tokens: {"input_ids": ids}
    began = time.perf_counter()
    assert len(stream._tokenize(["a"])) == len(ids)
    # `sum(ids, [])` would copy 20 billion ids.
    assert time.perf_counter() - began < 10


def test_nothing_and_the_impossible_have_a_perplexity(text_stream):
    stream = text_stream()
    assert math.isnan(stream.perplexity())
    stream.loss, stream.num_scored = 1e6, 1
    assert stream.perplexity() == math.inf
    # NumPy's generator, which `generate` seeds, takes 32 bits.
    stream.feed(b"a b c")
    assert len(stream.continuation(2, seed=2**40 - 1, do_sample=True, eos_token_id=None)) == 2
