"""What lower precision costs: perplexity on Python's own sources, of models trained on them for a moment."""

import inspect
import statistics
import textwrap
import unittest.case

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import TorchAoConfig, set_seed

from modeling_sumagg import SumAggConfig, SumAggForCausalLM, ToSTForCausalLM, ToSTTextConfig


LENGTH = 128
# The largest ratio of perplexities that is allowed.
ALLOWED = {"float16": 1.005, "bfloat16": 1.02, "int8": 1.02, "int4": 1.15}
LOADING = {
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "int8": {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())},
    "int4": {
        "quantization_config": TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    },
}


def blocks_of_bytes(*modules) -> torch.Tensor:
    text = "".join(inspect.getsource(module) for module in modules).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().unfold(0, LENGTH, LENGTH)


def perplexity(model, blocks: torch.Tensor) -> float:
    with torch.no_grad():
        return model(blocks, labels=blocks).loss.float().exp().item()


@pytest.mark.slow
@pytest.mark.parametrize("model_class", (SumAggForCausalLM, ToSTForCausalLM))
def test_perplexity(model_class, tmp_path):
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    if model_class is SumAggForCausalLM:
        config = SumAggConfig(**sizes, max_position_embeddings=LENGTH)
    else:
        config = ToSTTextConfig(**sizes, max_position_embeddings=LENGTH, layerscale_value=1.0)
    set_seed(0)
    model = model_class(config)
    training, held_out = blocks_of_bytes(inspect, unittest.case), blocks_of_bytes(statistics, textwrap)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        batch = training[torch.randint(len(training), (16,))]
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)

    exact = perplexity(model, held_out)
    assert exact < 20, f"not trained: {exact}"
    print(f"\n{model_class.__name__}: float32 {exact:.3f}", end="")
    ratios = {}
    for name, arguments in LOADING.items():
        lower = perplexity(model_class.from_pretrained(tmp_path, **arguments), held_out)
        ratios[name] = lower / exact
        print(f", {name} {lower:.3f}", end="")
    print()
    assert all(ratio <= ALLOWED[name] for name, ratio in ratios.items()), ratios
