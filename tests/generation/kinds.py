"""The kinds of models that the generation tests run over, tiny, with weights that make every term count."""

from functools import lru_cache

import torch
from transformers import PreTrainedModel

from modeling_sumagg import SumAggConfig, SumAggForCausalLM


VOCAB_SIZE = 32
SLIDING_WINDOW = 4

_COMMON = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 128}
_SUMAGG = {**_COMMON, "intermediate_size": 32}
CONFIGS = {
    "sumagg-pure": SumAggConfig(**_SUMAGG, num_hidden_layers=2, layer_types=["summation"] * 2),
    "sumagg-published": SumAggConfig(
        **_SUMAGG,
        num_hidden_layers=2,
        layer_types=["summation"] * 2,
        norm_position="post",
        sum_normalization="none",
        hidden_act="relu",
        lm_head_bias=True,
        tie_word_embeddings=False,
    ),
    "sumagg-sinusoidal": SumAggConfig(
        **_SUMAGG,
        num_hidden_layers=2,
        layer_types=["summation"] * 2,
        position_embedding_type="sinusoidal",
        sum_normalization="mean",
    ),
    "sumagg-hybrid": SumAggConfig(**_SUMAGG, num_hidden_layers=3),
    "sumagg-attention-first": SumAggConfig(
        **_SUMAGG, num_hidden_layers=2, layer_types=["full_attention", "summation"]
    ),
    "sumagg-sliding": SumAggConfig(
        **_SUMAGG,
        num_hidden_layers=3,
        layer_types=["summation", "sliding_attention", "summation"],
        sliding_window=SLIDING_WINDOW,
        position_embedding_type="sinusoidal",
    ),
    "sumagg-sliding-full": SumAggConfig(
        **_SUMAGG,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "summation", "full_attention"],
        sliding_window=SLIDING_WINDOW,
    ),
}
_MODELS = {"sumagg": SumAggForCausalLM}
KINDS = list(CONFIGS)


@lru_cache
def tiny_model(kind: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> PreTrainedModel:
    """The model of a kind. The same seed whatever the dtype; every parameter random, so that none is a no-op."""
    config = CONFIGS[kind]
    model = _MODELS[config.model_type](config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    model.set_attn_implementation(attention)
    return model.to(dtype)


@torch.no_grad()
def logits_alone(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """The logits `[T, V]` of one sequence on its own: one full forward pass, no cache, no mask, no padding."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def greedy_alone(model: PreTrainedModel, tokens: list[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding by a full forward pass for every token."""
    tokens = list(tokens)
    for _ in range(max_new_tokens):
        tokens.append(logits_alone(model, tokens)[-1].argmax().item())
    return tokens
