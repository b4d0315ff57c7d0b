"""Tiny checkpoints of every family and head class, with inputs and what the model made of them beside each."""

import inspect
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from testing import build, sumagg_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import modeling_sumagg
from modeling_sumagg import SumAggMultimodalConfig, ToSTConfig, ToSTTextConfig
from modeling_sumagg.modeling_tost import tost_image_processor


WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(58))]


def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def tost_config(**kwargs) -> ToSTConfig:
    return ToSTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=8, image_size=16, num_labels=3, **kwargs
    )


def tost_text_config(**kwargs) -> ToSTTextConfig:
    return ToSTTextConfig(
        vocab_size=61,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        **kwargs,
    )


def text_config(**kwargs):
    return sumagg_config("hybrid", pad_token_id=0, eos_token_id=1, **kwargs)


def multimodal_config(**kwargs) -> SumAggMultimodalConfig:
    return SumAggMultimodalConfig(
        vocab_size=61,
        num_numeric_features=4,
        image_size=16,
        patch_size=8,
        hidden_size=16,
        head_hidden_sizes=[8],
        **kwargs,
    )


def save_with_outputs(model: PreTrainedModel, folder: Path) -> None:
    """Save a model, what to preprocess with, and `folder.safetensors` with inputs and outputs."""
    model.save_pretrained(folder)
    if model.main_input_name == "pixel_values":
        tost_image_processor(model.config).save_pretrained(folder)
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        tokenizer().save_pretrained(folder)
        inputs = {"input_ids": torch.randint(3, 61, (2, 7))}
    if isinstance(model.config, SumAggMultimodalConfig):
        inputs |= {"numeric_features": torch.randn(2, 4), "pixel_values": torch.randn(2, 3, 16, 16)}
    with torch.no_grad():
        output = model(**inputs).to_tuple()[0]
    output = output[-1] if isinstance(output, tuple) else output
    inputs["output"] = output.contiguous()
    auto_class = next(key for key, name in auto_map(folder).items() if name.endswith(f".{type(model).__name__}"))
    save_file(inputs, folder.with_suffix(".safetensors"), metadata={"auto_class": auto_class})


def save_every_class(root: Path) -> list[str]:
    """One checkpoint for each pair of a config class and an Auto class that the package registers."""
    root.mkdir(parents=True)
    configs = [text_config(), tost_text_config(), tost_config(), multimodal_config()]
    names = []
    for name, cls in vars(modeling_sumagg).items():
        if inspect.isclass(cls) and issubclass(cls, PreTrainedModel):
            config = next(config for config in configs if type(config) is cls.config_class)
            causal = {"is_causal": False} if name.endswith("MaskedLM") else {}
            config = type(config)(**config.to_diff_dict() | causal)
            save_with_outputs(build(cls, config), root / name)
            names.append(name)
    assert len(names) >= 12, names
    return names


def auto_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text())["auto_map"]
