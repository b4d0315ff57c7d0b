"""Load a checkpoint folder where this package cannot be imported, and run it. Started by `modeling_sumagg.hub`."""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

# transformers 5.17 takes the top-level name away where torchvision is missing, though it needs none.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging


def check_files(folder: Path) -> dict[str, str]:
    """The `auto_map` of the checkpoint, whose weights are whole and in safetensors only, and whose code is there."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: it is not a checkpoint.")
    others = sorted(
        path.name for ending in ("*model*.bin", "*.ckpt", "*.h5", "*.msgpack") for path in folder.glob(ending)
    )
    if others:
        raise ValueError(f"{folder} holds weights in other formats than safetensors: {others}. Remove them.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} holds no safetensors file.")
    for path in weights:
        try:
            with safe_open(path, framework="pt") as tensors:
                print(f"{path.name}: {len(tensors.keys())} tensors")
        except Exception as error:
            raise ValueError(f"{path} is truncated or corrupted: {error}") from error
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {})
    if "AutoConfig" not in auto_map:
        raise ValueError(
            f"The config.json in {folder} has no `auto_map`: save the model with modeling_sumagg imported."
        )
    return auto_map


def run(model: transformers.PreTrainedModel) -> None:
    """One forward pass, and a short generation where the model can."""
    config, inputs = model.config, {}
    if getattr(config, "vocab_size", None):
        inputs["input_ids"] = torch.arange(8)[None] % config.vocab_size
    if getattr(config, "num_numeric_features", 0):
        inputs["numeric_features"] = torch.zeros(1, config.num_numeric_features)
    if size := getattr(config, "image_size", None):
        height, width = (size, size) if isinstance(size, int) else size
        inputs["pixel_values"] = torch.zeros(1, config.num_channels, height, width)
    with torch.no_grad():
        outputs = model(**inputs).to_tuple()
    tensors = [output for output in outputs if isinstance(output, torch.Tensor)]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError("The forward pass gives values that are not finite.")
    print(f"forward: {', '.join(str(list(tensor.shape)) for tensor in tensors)}, finite")
    if model.can_generate():
        generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        print(f"generate: {generated[0, -4:].tolist()}")


def check_checkpoint(folder: Path) -> None:
    """Load and run everything in the folder; raises where something is wrong."""
    auto_map = check_files(folder)
    classes = {name: get_class_from_dynamic_module(reference, str(folder)) for name, reference in auto_map.items()}
    config = classes["AutoConfig"].from_pretrained(folder)
    auto_name = next(name for name, cls in classes.items() if cls.__name__ == config.architectures[0])
    # `AutoBackbone` takes no local folder.
    loader = classes[auto_name] if auto_name == "AutoBackbone" else getattr(transformers, auto_name)
    model, info = loader.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    wrong = {kind: sorted(keys) for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"The weights do not fit {config.architectures[0]}: {wrong}.")
    print(f"{auto_name}: {type(model).__name__}, {model.num_parameters():,} parameters, {model.dtype}")
    print(f"also loads as: {', '.join(sorted(set(classes) - {auto_name, 'AutoConfig'}))}")
    run(model.eval())
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, and the model only {config.vocab_size}.")
        print(f"tokenizer: {type(tokenizer).__name__}, {len(tokenizer)} tokens")
    if (folder / "preprocessor_config.json").is_file():
        print(f"image processor: {type(AutoImageProcessor.from_pretrained(folder)).__name__}")


if __name__ == "__main__":
    # The documented way to make an import fail, which the type of `sys.modules` does not know.
    sys.modules["modeling_sumagg"] = None  # type: ignore[assignment]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        check_checkpoint(Path(sys.argv[1]))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
