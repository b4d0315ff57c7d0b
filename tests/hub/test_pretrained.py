"""A pretrained transformer as a model of ours: the same numbers, or an error that names what ours have not."""

import pytest
import torch
from testing import assert_close
from transformers import (
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)

from modeling_sumagg import SumAggForCausalLM
from modeling_sumagg.publishing.pretrained import convert_pretrained, converted_config


SIZES = {
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
TEACHERS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama with biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "llama 3": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "yarn": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=YARN)),
    "linear": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}),
    ),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, head_dim=8, sliding_window=None)),
    "mistral with a window": (MistralForCausalLM, MistralConfig(**SIZES, head_dim=8, sliding_window=5)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen2 with windows": (
        Qwen2ForCausalLM,
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=2),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=10, rms_norm_eps=1e-3)),
}


def random_teacher(kind: str) -> torch.nn.Module:
    set_seed(0)
    model_class, config = TEACHERS[kind]
    teacher = model_class(config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return teacher


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", TEACHERS)
def test_the_converted_model_gives_the_logits_of_its_teacher(kind, attention):
    teacher = random_teacher(kind)
    teacher.set_attn_implementation(attention)
    model = convert_pretrained(teacher)
    assert model.config._attn_implementation == attention
    input_ids = torch.randint(3, 61, (2, 40))
    with torch.no_grad():
        assert_close(model(input_ids, use_cache=False).logits, teacher(input_ids, use_cache=False).logits)
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(input_ids[:, :9], **options), teacher.generate(input_ids[:, :9], **options))


@pytest.mark.parametrize("kind", ["llama 3", "qwen2", "qwen3"])
def test_a_saved_conversion_is_read_again(kind, tmp_path):
    teacher = random_teacher(kind)
    convert_pretrained(teacher).save_pretrained(tmp_path)
    model, loading = SumAggForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    input_ids = torch.randint(3, 61, (2, 40))
    with torch.no_grad():
        assert_close(model(input_ids).logits, teacher(input_ids).logits)
    assert model.generation_config.eos_token_id == teacher.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(), "'gpt2' cannot be converted: it has no rotary positions"),
        (BloomConfig(), "no ALiBi"),
        (MixtralConfig(), "no experts"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "'dynamic'"),
    ],
)
def test_a_model_that_the_blocks_cannot_hold_is_refused(config, reason):
    with pytest.raises(ValueError, match=reason):
        converted_config(config)
