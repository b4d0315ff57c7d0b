"""How many operations a decode step hands to PyTorch, beside GPT-2 and Llama: where launches are waited for, they set its time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from modeling_sumagg import SumAggConfig, SumAggForCausalLM, ToSTForCausalLM, ToSTTextConfig
from modeling_sumagg.common.compatibility import CACHE_NAME, find_cache


LAYERS = 4
SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
SUMS = ["summation"] * LAYERS
KINDS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=LAYERS, n_head=4, vocab_size=97)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=128)),
    "default": lambda: SumAggForCausalLM(SumAggConfig(**SIZES)),
    "keys": lambda: SumAggForCausalLM(SumAggConfig(**SIZES, layer_types=SUMS)),
    "no keys": lambda: SumAggForCausalLM(SumAggConfig(**SIZES, layer_types=SUMS, sum_state_size=None)),
    "token statistics": lambda: ToSTForCausalLM(ToSTTextConfig(**SIZES)),
}


class Operations(TorchDispatchMode):
    """Counts the operations that return new tensors; views cost no launch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        schema = operation._schema
        is_view = any(result.alias_info is not None for result in schema.returns) and not schema.is_mutable
        self.count += not is_view and "_unsafe_view" not in schema.name and "empty" not in schema.name
        return operation(*arguments, **(keywords or {}))


@torch.no_grad()
def operations_of_a_step(kind: str) -> int:
    model = KINDS[kind]().eval()
    cache = find_cache(model(torch.ones(1, 8, dtype=torch.long), use_cache=True))
    token = {"input_ids": torch.ones(1, 1, dtype=torch.long), CACHE_NAME: cache}
    model(**token)
    with Operations() as operations:
        model(**token)
    return operations.count


# Limits to go down.
@pytest.mark.parametrize(
    ("kind", "limit"), [("default", 151), ("keys", 146), ("no keys", 146), ("token statistics", 123)]
)
def test_a_decode_step_has_few_operations(kind, limit):
    assert operations_of_a_step(kind) <= limit


def test_a_decode_step_has_fewer_operations_than_one_of_llama():
    assert operations_of_a_step("keys") < operations_of_a_step("llama")
    assert operations_of_a_step("default") < operations_of_a_step("llama")
