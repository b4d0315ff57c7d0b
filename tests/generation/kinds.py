"""The kinds of models that the generation tests run over, tiny, with weights that make every term count."""

import copy
from functools import lru_cache, partial

import torch
from testing import RELU_TERMS
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_sumagg import SumAggConfig, SumAggForCausalLM, ToSTForCausalLM, ToSTTextConfig


VOCAB_SIZE = 32
SLIDING_WINDOW = 4

_COMMON = {"vocab_size": VOCAB_SIZE, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 128}
_keyed_sums = partial(SumAggConfig, **_COMMON, intermediate_size=32, sum_decay_max=8.0)
_decayed_sums = partial(_keyed_sums, sum_state_size=None)
_sums = partial(_keyed_sums, **SumAggConfig.values_of_0_1)
_TOST = {**_COMMON, "intermediate_size": 32, "use_bias": True}
CONFIGS = {
    "sumagg-pure": _sums(num_hidden_layers=2, layer_types=["summation"] * 2),
    "sumagg-published": _sums(
        num_hidden_layers=2,
        layer_types=["summation"] * 2,
        norm_position="post",
        sum_normalization="none",
        hidden_act="relu",
        lm_head_bias=True,
        tie_word_embeddings=False,
    ),
    "sumagg-sinusoidal": _sums(
        num_hidden_layers=2,
        layer_types=["summation"] * 2,
        position_embedding_type="sinusoidal",
        sum_normalization="mean",
    ),
    "sumagg-hybrid": _sums(num_hidden_layers=3, layer_types=["summation", "summation", "full_attention"]),
    "sumagg-attention-first": _sums(num_hidden_layers=2, layer_types=["full_attention", "summation"]),
    "sumagg-sliding": _sums(
        num_hidden_layers=3,
        layer_types=["summation", "sliding_attention", "summation"],
        sliding_window=SLIDING_WINDOW,
        position_embedding_type="sinusoidal",
    ),
    "sumagg-sliding-full": _sums(
        num_hidden_layers=3,
        layer_types=["sliding_attention", "summation", "full_attention"],
        sliding_window=SLIDING_WINDOW,
    ),
    "sumagg-decayed": _decayed_sums(num_hidden_layers=2, layer_types=["summation"] * 2),
    "sumagg-decayed-hybrid": _decayed_sums(
        num_hidden_layers=2, layer_types=["summation", "full_attention"], num_sum_heads=4, conv_kernel_size=3
    ),
    "sumagg-decayed-sliding": _decayed_sums(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "summation"],
        sliding_window=SLIDING_WINDOW,
        sum_decay="learned",
        sum_normalization="none",
        sum_gate=False,
        conv_kernel_size=2,
        conv_before="mixer",
    ),
    "sumagg-decayed-mean": _decayed_sums(
        num_hidden_layers=2,
        layer_types=["summation"] * 2,
        **RELU_TERMS,
        sum_decay="learned",
        position_embedding_type="sinusoidal",
        rope_parameters=None,
    ),
    "sumagg-keyed": _keyed_sums(num_hidden_layers=2, layer_types=["summation"] * 2),
    "sumagg-keyed-sliding": _keyed_sums(
        num_hidden_layers=2,
        sliding_window=SLIDING_WINDOW,
        sum_state_size=3,
        num_sum_heads=4,
        num_sum_key_heads=2,
    ),
    "sumagg-sinks": _keyed_sums(
        num_hidden_layers=3,
        layer_types=["sliding_attention", "summation", "sliding_attention"],
        sliding_window=SLIDING_WINDOW,
        attention_sinks=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        attention_norm=True,
        norm_type="rms",
        attention_bias="qkv",
        mlp_bias=False,
        num_sum_heads=2,
    ),
    "sumagg-window-and-sum": _keyed_sums(
        num_hidden_layers=2,
        layer_types=["sliding_attention"] * 2,
        sliding_window=SLIDING_WINDOW,
        attention_sinks=1,
        attention_sum=True,
        num_key_value_heads=1,
    ),
    "tost-pure": ToSTTextConfig(**_TOST, num_hidden_layers=2),
    "tost-hybrid": ToSTTextConfig(**_TOST, num_hidden_layers=2, layer_types=["token_statistics", "full_attention"]),
    "tost-decayed": ToSTTextConfig(
        **_TOST, num_hidden_layers=2, sum_decay="learned", sum_decay_max=8.0, use_membership_bias=False, mlp_gate=True
    ),
    "tost-decayed-hybrid": ToSTTextConfig(
        **_TOST,
        num_hidden_layers=2,
        layer_types=["token_statistics", "full_attention"],
        sum_decay="input",
        sum_decay_max=8.0,
        rope_theta=100.0,
    ),
    "tost-sliding": ToSTTextConfig(
        **_TOST,
        num_hidden_layers=2,
        layer_types=["sliding_attention", "token_statistics"],
        sliding_window=SLIDING_WINDOW,
        position_embedding_type="sinusoidal",
        use_membership_bias=False,
    ),
}
_MODELS = {"sumagg": SumAggForCausalLM, "tost_text": ToSTForCausalLM}
KINDS = list(CONFIGS)
# One for each way of holding the state; the others differ in what is computed from it.
MAIN_KINDS = [
    "sumagg-sinusoidal",
    "sumagg-hybrid",
    "sumagg-decayed-hybrid",
    "sumagg-sliding-full",
    "sumagg-keyed-sliding",
    "sumagg-sinks",
    "sumagg-window-and-sum",
    "tost-pure",
    "tost-hybrid",
]


def build(model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model in eval mode, every parameter of it random, so that none is a no-op."""
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise)
    return model


@lru_cache
def tiny_model(kind: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> PreTrainedModel:
    """The model of a kind, with the same weights in every dtype."""
    config = copy.deepcopy(CONFIGS[kind])
    config._attn_implementation = attention
    return build(_MODELS[config.model_type], config).to(dtype)


@torch.no_grad()
def logits_alone(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """The logits `[T, V]` of one sequence on its own: one full forward pass, no cache, no mask, no padding."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


@lru_cache
def greedy_alone(model: PreTrainedModel, prompt: tuple[int, ...], max_new_tokens: int) -> list[int]:
    """The tokens that greedy decoding adds to a prompt, by a full forward pass for each of them."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(logits_alone(model, tokens)[-1].argmax().item())
    return tokens[len(prompt) :]
