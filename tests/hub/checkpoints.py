"""Tiny checkpoints of every family and head class, with inputs and what the model made of them beside each."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from testing import MODEL_CLASSES, build, speech_processor, sumagg_config, tiny_config, tiny_inputs, word_tokenizer
from transformers import PreTrainedModel

from modeling_sumagg.models.modeling_tost import tost_image_processor


def text_config(**kwargs):
    return sumagg_config("hybrid", pad_token_id=0, eos_token_id=1, **kwargs)


def save_with_outputs(model: PreTrainedModel, folder: Path) -> None:
    """Save a model, what to preprocess with, and `folder.safetensors` with inputs and outputs."""
    model.save_pretrained(folder)
    inputs = tiny_inputs(model, length=7)
    inputs.pop("attention_mask", None)
    if "input_ids" in inputs:
        word_tokenizer().save_pretrained(folder)
    elif "input_features" in inputs:
        speech_processor(folder).save_pretrained(folder)
    else:
        tost_image_processor(model.config).save_pretrained(folder)
    with torch.no_grad():
        output = model(**inputs).to_tuple()[0]
    output = output[-1] if isinstance(output, tuple) else output
    inputs["output"] = output.contiguous()
    auto_class = next(key for key, name in auto_map(folder).items() if name.endswith(f".{type(model).__name__}"))
    save_file(inputs, folder.with_suffix(".safetensors"), metadata={"auto_class": auto_class})


def save_every_class(root: Path) -> list[str]:
    """One checkpoint for each pair of a config class and an Auto class that the package registers."""
    root.mkdir(parents=True)
    for cls in MODEL_CLASSES:
        special = {"pad_token_id": 0, "eos_token_id": 1} if hasattr(cls.config_class, "eos_token_id") else {}
        save_with_outputs(build(cls, tiny_config(cls, **special)), root / cls.__name__)
    return [cls.__name__ for cls in MODEL_CLASSES]


def auto_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text())["auto_map"]


def code_file(folder: Path, module: str) -> Path:
    """The file of a checkpoint that holds a module, by the last part of the module's name."""
    (path,) = folder.glob(f"sumagg_??????_{module}.py")
    return path


def code_modules(folder: Path) -> set[str]:
    """The last parts of the names of the modules that a checkpoint carries; all have one prefix."""
    names = [path.stem.split("_", 2) for path in folder.glob("sumagg_??????_*.py")]
    assert len({name[1] for name in names}) == 1
    others = {path.stem for path in folder.glob("*.py")} - {"_".join(name) for name in names}
    # The modules of the classes are there under their own names too.
    assert others == {name.partition(".")[0].split("_", 2)[2] for name in auto_map(folder).values()}
    return {name[2] for name in names}


def auto_map_of(folder: Path, **classes: str) -> dict[str, str]:
    """The `auto_map` of a folder that names these classes, each `"module.Class"` without the prefix."""
    return {
        auto_class: f"{code_file(folder, name.partition('.')[0]).stem}.{name.partition('.')[2]}"
        for auto_class, name in classes.items()
    }
