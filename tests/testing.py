"""What several tests share: tiny models, and a comparison relative to the size of the whole tensor."""

import copy
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Speech2TextFeatureExtractor,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2Processor,
    set_seed,
)

import modeling_sumagg
from modeling_sumagg import SumAggConfig, SumAggMultimodalConfig, SumAggSpeechConfig, ToSTConfig, ToSTTextConfig


MODEL_CLASSES = [
    cls for cls in vars(modeling_sumagg).values() if isinstance(cls, type) and issubclass(cls, PreTrainedModel)
]
TEXT_CLASSES = [
    cls for cls in MODEL_CLASSES if hasattr(cls.config_class, "layer_types") and cls.main_input_name == "input_ids"
]
# In the ids of every tokenizer and the vocabulary of every model here.
WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(57)), "<mask>"]
# The mixer of version 0.1 but for its decays.
RELU_TERMS = {
    name: SumAggConfig.values_of_0_1[name] for name in ("sum_map", "sum_skip", "conv_kernel_size", "conv_before")
}
LAYER_TYPES = {
    "pure": ["summation", "summation"],
    "hybrid": ["summation", "full_attention", "summation"],
    "sliding": ["summation", "sliding_attention"],
    "converted": ["sliding_attention", "sliding_attention"],
}
# A transformer that `linearize` has converted: a Llama with a window, sinks, and a sum beside them.
CONVERTED = {
    "attention_sinks": 2,
    "attention_sum": True,
    "sum_decay_max": 8.0,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_norm": True,
    "attention_bias": "qkv",
    "norm_type": "rms",
    "mlp_bias": False,
    "num_sum_heads": 1,
    "position_bias": 1.0,
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
        **(CONVERTED if layers == "converted" else {}),
    }
    return SumAggConfig(**{**arguments, **kwargs})


def tost_text_config(layers: str = "hybrid", **kwargs) -> ToSTTextConfig:
    """The same layers, with token statistics for the sums."""
    layer_types = [layer_type.replace("summation", "token_statistics") for layer_type in LAYER_TYPES[layers]]
    arguments = {
        "vocab_size": 61,
        "hidden_size": 16,
        "num_hidden_layers": len(layer_types),
        "num_attention_heads": 2,
        "layer_types": layer_types,
        "sliding_window": 5,
        "max_position_embeddings": 64,
    }
    return ToSTTextConfig(**{**arguments, **kwargs})


def tost_config(**kwargs) -> ToSTConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 16}
    return ToSTConfig(**{**sizes, "num_labels": 3, **kwargs})


def multimodal_config(**kwargs) -> SumAggMultimodalConfig:
    sizes = {"vocab_size": 61, "num_numeric_features": 4, "image_size": 16, "patch_size": 8, "hidden_size": 16}
    return SumAggMultimodalConfig(**{**sizes, "head_hidden_sizes": [8], **kwargs})


def speech_config(layers: str = "sliding", **kwargs) -> SumAggSpeechConfig:
    """Tiny, over frames of 5 bins."""
    arguments = {
        "num_mel_bins": 5,
        "subsampling_kernel_size": 6,
        "vocab_size": 61,
        "hidden_size": 16,
        "num_hidden_layers": len(LAYER_TYPES[layers]),
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "layer_types": LAYER_TYPES[layers],
        "sliding_window": 5,
        "sum_decay_max": 8.0,
        "mask_feature_length": 2,
    }
    return SumAggSpeechConfig(**{**arguments, **kwargs})


def tiny_config(model_class: type[PreTrainedModel], layers: str = "hybrid", **kwargs) -> PreTrainedConfig:
    """A tiny config for any class of `MODEL_CLASSES`; `layers` is for those of text."""
    if model_class.config_class is ToSTConfig:
        return tost_config(**kwargs)
    if model_class.config_class is SumAggMultimodalConfig:
        return multimodal_config(**kwargs)
    if model_class.config_class is SumAggSpeechConfig:
        return speech_config("sliding" if layers == "hybrid" else layers, **kwargs)
    if model_class.config_class is ToSTTextConfig:
        return tost_text_config(layers, **kwargs)
    return sumagg_config(layers, is_causal=not model_class.__name__.endswith("ForMaskedLM"), **kwargs)


def tiny_inputs(model: PreTrainedModel, batch_size: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """What the model takes: images, ids or frames with padding on the left of the first row, or ids and numbers."""
    config, inputs = model.config, {}
    if hasattr(config, "num_mel_bins"):
        length *= config.subsampling_factor
    mask = torch.ones(batch_size, length, dtype=torch.long)
    mask[0, :2] = 0
    if hasattr(config, "num_mel_bins"):
        inputs = {"input_features": torch.randn(batch_size, length, config.num_mel_bins), "attention_mask": mask}
    elif hasattr(config, "vocab_size"):
        inputs = {"input_ids": torch.randint(config.vocab_size, (batch_size, length)), "attention_mask": mask}
    if hasattr(config, "image_size"):
        inputs["pixel_values"] = torch.randn(batch_size, 3, 16, 16)
    if hasattr(config, "num_numeric_features"):
        inputs["numeric_features"] = torch.randn(batch_size, config.num_numeric_features)
    return inputs


def word_tokenizer(padding_side: str = "left") -> PreTrainedTokenizerFast:
    """One token a word, of `WORDS`."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {
        name: f"<{name.removesuffix('_token')}>" for name in ("pad_token", "eos_token", "unk_token", "mask_token")
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side=padding_side, **special)


def speech_processor(folder: Path, num_mel_bins: int = 5) -> Wav2Vec2Processor:
    """Frames of so many bins, and letters, words of which are told apart by a symbol of their own; 0 is the blank."""
    symbols = ["<pad>", "|", "<unk>", *(chr(ord("a") + i) for i in range(26))]
    (folder / "symbols.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    tokenizer = Wav2Vec2CTCTokenizer(folder / "symbols.json", bos_token=None, eos_token=None)
    extractor = Speech2TextFeatureExtractor(
        feature_size=num_mel_bins, num_mel_bins=num_mel_bins, do_ceptral_normalize=False
    )
    return Wav2Vec2Processor(extractor, tokenizer)


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


def dequantized(quantized: torch.nn.Module, model: torch.nn.Module, at_least: int = 4) -> torch.nn.Module:
    """The plain model with the weights that the quantized layers, `at_least` so many, stand for."""
    plain, count = copy.deepcopy(model), 0
    for name, module in quantized.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "quant_state"):
            from bitsandbytes.functional import dequantize_4bit

            dense = dequantize_4bit(weight.data, weight.quant_state)
        elif hasattr(weight, "SCB"):
            dense = weight.CB.float() * weight.SCB[:, None] / 127
        elif hasattr(weight, "qdata"):
            dense = weight.dequantize()
        else:
            continue
        plain.get_submodule(name).weight.data.copy_(dense)
        count += 1
    assert count >= at_least
    return plain
