"""Text models whose linear layers are quantized: they compute what the plain model does with the weights so rounded."""

import pytest
import torch
from testing import RELU_TERMS, assert_close, dequantized
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import BitsAndBytesConfig, TorchAoConfig

from .kinds import CAUSAL_KINDS, INPUTS, KINDS, assert_near, logits, marked, named_layers, tiny_model


# 4-bit blocks hold 64 weights.
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def error_of(model) -> float:
    """How far rounded weights may move the outputs of random models: queries multiply keys, and these values."""
    has_keys = getattr(model.config, "sum_state_size", None) or getattr(model.config, "attention_sum", False)
    return 0.5 if has_keys else 0.1


@pytest.mark.parametrize("kind", marked(KINDS))
def test_dynamic_quantization(kind):
    gated = tiny_model(kind, **SIZES, mlp_gate=True)
    plain = tiny_model(kind, **SIZES, mlp_gate=False, **(RELU_TERMS if kind.startswith("sumagg") else {}))
    # A gate multiplies what two quantized layers put out, of random weights that no training has made robust.
    for model, error in ((plain, error_of(plain)), (gated, 0.5)):
        quantized = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert not named_layers(quantized, nn.Linear)
        for inputs in INPUTS.values():
            inputs = inputs()
            assert_near(logits(quantized, inputs), logits(model, inputs), error)


def load_quantized(model, bits: str, dtype: torch.dtype, directory) -> nn.Module:
    # Layers of 3 labels have no blocks of 4 bits.
    heads = ["lm_head", "score"]
    if bits.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        bits_arguments = {"load_in_8bit": True} if bits.endswith("8") else {"load_in_4bit": True}
        config = BitsAndBytesConfig(**bits_arguments, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=heads)
    else:
        scheme = (
            Int8WeightOnlyConfig()
            if bits.endswith("8")
            else IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
        )
        config = TorchAoConfig(scheme, modules_to_not_convert=heads)
    model.save_pretrained(directory)
    return type(model).from_pretrained(directory, dtype=dtype, quantization_config=config, device_map="cpu").eval()


QUANTIZED = [
    *(("torchao 8", dtype) for dtype in (torch.float32, torch.bfloat16)),
    ("torchao 4", torch.float32),
    ("bitsandbytes 8", torch.bfloat16),
    ("bitsandbytes 4", torch.float32),
    ("bitsandbytes 4", torch.bfloat16),
]


@pytest.mark.parametrize(("bits", "dtype"), QUANTIZED)
@pytest.mark.parametrize("kind", marked(KINDS))
def test_quantized_weights(kind, bits, dtype, tmp_path):
    model = tiny_model(kind, **SIZES)
    quantized = load_quantized(model, bits, dtype, tmp_path)
    plain = dequantized(quantized, model.to(dtype), at_least=4 * model.config.num_hidden_layers)
    for inputs in INPUTS.values():
        inputs = inputs()
        actual, expected = logits(quantized, inputs), logits(plain, inputs)
        if dtype == torch.float32 and bits.startswith("torchao"):
            assert_close(actual, expected, rtol=1e-4)
        else:
            # Rounded layer by layer in bfloat16, and bitsandbytes rounds what enters a layer to 8 bits.
            assert_near(actual, expected, error_of(model))


@pytest.mark.parametrize("kind", marked(CAUSAL_KINDS))
def test_quantized_models_decode_what_they_predict_at_once(kind, tmp_path):
    model = load_quantized(tiny_model(kind, **SIZES), "torchao 8", torch.float32, tmp_path)
    inputs = INPUTS["padded"]()
    outputs = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
    at_once = logits(model, {"input_ids": outputs.sequences, "attention_mask": mask}, use_cache=False)
    assert_close(torch.stack(outputs.logits, dim=1), at_once[:, 8:-1], rtol=1e-4)
