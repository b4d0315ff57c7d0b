"""What several tests share: tiny models, and a comparison relative to the size of the whole tensor."""

import torch
from transformers import Cache, set_seed

from modeling_sumagg import SumAggConfig


LAYER_TYPES = {
    "pure": ["summation", "summation"],
    "hybrid": ["summation", "full_attention", "summation"],
    "sliding": ["summation", "sliding_attention"],
}


def sumagg_config(layers: str = "hybrid", **kwargs) -> SumAggConfig:
    """A tiny config whose layers are those of `LAYER_TYPES[layers]`."""
    arguments = {
        "vocab_size": 61,
        "hidden_size": 16,
        "num_hidden_layers": len(LAYER_TYPES[layers]),
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "layer_types": LAYER_TYPES[layers],
        "sliding_window": 5,
        "max_position_embeddings": 64,
    }
    return SumAggConfig(**{**arguments, **kwargs})


def build(model_class, config, seed: int = 0):
    """A model in eval mode whose weights, biases included, are large enough for every part to matter."""
    set_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def cache_tensors(cache: Cache) -> list[torch.Tensor]:
    """Every tensor that a cache holds from one forward pass to the next."""
    held = []
    for layer in cache.layers:
        held += layer.state if hasattr(layer, "state") else (layer.keys, layer.values)
    return held


def assert_close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-5) -> None:
    """No element is off by more than `rtol` times the largest magnitude expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.numel() > 0:
        error = (actual.detach().double() - expected.detach().double()).abs().max()
        limit = rtol * expected.detach().double().abs().max()
        assert error <= limit, f"off by {error:.3g}, allowed {limit:.3g}"
