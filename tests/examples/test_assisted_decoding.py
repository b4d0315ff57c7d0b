"""examples/benchmarks/assisted_decoding.py on models that have learned a repetitive text."""

import copy
import importlib.util
import random
from pathlib import Path

import pytest
import torch
from transformers import set_seed

from modeling_sumagg import SumAggConfig, SumAggForCausalLM, ToSTForCausalLM, ToSTTextConfig


SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "assisted_decoding.py"
PHRASES = [[3, 7, 11, 2, 19], [5, 6, 5, 8], [13, 4, 9, 17, 1, 12, 10]]
SIZES = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    SumAggForCausalLM: SumAggConfig(**SIZES, max_position_embeddings=128),
    ToSTForCausalLM: ToSTTextConfig(
        **SIZES,
        max_position_embeddings=128,
        layer_types=["token_statistics", "full_attention"],
        layerscale_value=1.0,
    ),
}


def text(length: int, draw: random.Random) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += draw.choice(PHRASES) * draw.randint(1, 3)
    return tokens[:length]


@pytest.mark.parametrize("model_class", CONFIGS)
def test_a_trained_model_saves_calls_and_changes_no_token(model_class):
    spec = importlib.util.spec_from_file_location("assisted_decoding", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    set_seed(0)
    draw = random.Random(0)
    model = model_class(CONFIGS[model_class])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        batch = torch.tensor([text(48, draw) for _ in range(8)])
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1.5

    model.eval()
    results = script.compare(
        model,
        [text(24, draw) for _ in range(8)],
        {"prompt lookup": {"prompt_lookup_num_tokens": 5}, "assistant": {"assistant_model": copy.deepcopy(model)}},
        max_new_tokens=16,
    )
    assert results["greedy"] == {"calls": 8 * 16, "tokens": 8 * 16, "differing": 0}
    for mode in ("prompt lookup", "assistant"):
        assert results[mode]["differing"] == 0
        assert results[mode]["tokens"] == 8 * 16
        assert results[mode]["calls"] < 8 * 16 * 0.7, results
