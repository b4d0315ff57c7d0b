"""
Load a checkpoint folder where this package cannot be imported, and run it. [`check_folder`] starts this as a script, with
the folder, the file to write at the end, and the modules that may not be imported, and has looked at the files before.
"""

import copy
import json
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

# From its own module: `transformers` may hide the name where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import logging


ADAPTED_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "FEATURE_EXTRACTION": "AutoModel",
}


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in the safetensors files of a folder, by their names."""
    shapes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            shapes.update({name: tensors.get_slice(name).get_shape() for name in tensors.keys()})
            print(f"{path.name}: {len(tensors.keys())} tensors")
    return shapes


def run(model: torch.nn.Module) -> list[torch.Tensor]:
    """One forward pass, whose tensors are returned, and a short generation where the model can."""
    config, inputs = model.config, {}
    if bins := getattr(config, "num_mel_bins", 0):
        inputs["input_features"] = torch.linspace(-1, 1, 40 * bins).view(1, 40, bins)
    elif getattr(config, "vocab_size", None):
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
    if getattr(model, "can_stream", False):
        check_stream(model, inputs["input_features"])
    if model.can_generate():
        generate = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        # A padding token among the ids would be masked by `generate`, and not by the pass over all tokens.
        mask = torch.ones_like(inputs["input_ids"])
        made = model.generate(
            **inputs, attention_mask=mask, **generate, output_logits=True, return_dict_in_generate=True
        )
        with torch.no_grad():
            expected = model(made.sequences[:, :-1]).logits[:, -4:]
        check_same("`generate`", torch.stack(made.logits, dim=1), expected)
        print(f"generate: {made.sequences[0, -4:].tolist()}")
    return tensors


def check_stream(model: torch.nn.Module, input_features: torch.Tensor) -> None:
    """Frames that come in two pieces give what they give at once."""
    outputs: dict = {}
    pieces = []
    with torch.no_grad():
        for piece in input_features.tensor_split([7], dim=1):
            outputs = model(piece, cache=outputs.get("cache"), use_cache=True)
            pieces.append(outputs[0])
        whole = model(input_features)
    check_same("A stream", torch.cat(pieces, dim=1), whole[0])
    print(f"stream: {' + '.join(str(piece.shape[1]) for piece in pieces)} tokens")


def check_same(what: str, made: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise where logits that were made with a decode state are not those of one pass over everything."""
    difference = (made - expected).abs().max() / expected.abs().max()
    if difference > torch.finfo(expected.dtype).eps ** 0.5:
        raise ValueError(
            f"{what} is wrong: its logits are off by {difference:.1e} of what a pass over all tokens gives. The code "
            f"in the folder does not fit transformers {transformers.__version__}: `python -m modeling_sumagg update "
            "FOLDER` brings it to the installed version of modeling-sumagg."
        )


def check_checkpoint(folder: Path) -> None:
    """Load and run everything in the folder; raises where something is wrong."""
    if (folder / "adapter_config.json").is_file():
        check_adapter(folder)
        return
    shapes = tensor_shapes(folder)
    auto_map = json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    classes = {
        name: get_class_from_dynamic_module(reference, str(folder))
        for name, reference in auto_map.items()
        if name.startswith(("AutoConfig", "AutoModel", "AutoBackbone"))
    }
    config = classes.pop("AutoConfig").from_pretrained(folder)
    architecture = (config.architectures or [None])[0]
    auto_name = next((name for name, cls in classes.items() if cls.__name__ == architecture), None)
    if auto_name is None:
        raise ValueError(f"The config names the architecture {architecture!r}, and its `auto_map` {auto_map}.")
    # `AutoBackbone` takes no local folder.
    loader = classes[auto_name] if auto_name == "AutoBackbone" else getattr(transformers, auto_name)
    model, info = loader.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    wrong = {kind: sorted(keys) for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"The weights do not fit {config.architectures[0]}: {wrong}.")
    print(f"{auto_name}: {type(model).__name__}, {model.num_parameters():,} parameters, {model.dtype}")
    for name in sorted(set(classes) - {auto_name}):
        print(f"as {name}: {what_it_becomes(classes[name], config, shapes)}")
    run(model.eval())
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(f"The tokenizer has {len(tokenizer)} tokens, and the model only {config.vocab_size}.")
        print(
            f"tokenizer: {type(tokenizer).__name__}, {len(tokenizer)} tokens; `AutoTokenizer` reads the config first, so it"
        )
        print("    takes `trust_remote_code=True` as the model does")
        if hasattr(config, "ctc_loss_reduction") and tokenizer.pad_token_id != config.pad_token_id:
            raise ValueError(
                f"The padding token of the tokenizer, {tokenizer.pad_token_id}, must be the blank of the model, "
                f"{config.pad_token_id} (`config.pad_token_id`)."
            )
    if hasattr(config, "num_mel_bins"):
        if any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
            extractor = AutoFeatureExtractor.from_pretrained(folder)
            if extractor.num_mel_bins != config.num_mel_bins:
                raise ValueError(
                    f"The feature extractor makes frames of {extractor.num_mel_bins} bins, and the model takes "
                    f"{config.num_mel_bins} (`config.num_mel_bins`)."
                )
            print(f"feature extractor: {type(extractor).__name__}, {extractor.sampling_rate} samples a second")
    elif (folder / "preprocessor_config.json").is_file():
        print(f"image processor: {type(AutoImageProcessor.from_pretrained(folder)).__name__}")


def what_it_becomes(model_class: type[PreTrainedModel], config: PreTrainedConfig, saved: Iterable[str]) -> str:
    """What another class than the saved one makes of the checkpoint: are all its weights there, and what are they?"""
    try:
        with torch.device("meta"):
            model = model_class(copy.deepcopy(config))
    except ValueError as error:
        return f"cannot be made: {' '.join(str(error).split())}"
    prefix = f"{model.base_model_prefix}."
    needed = {name.removeprefix(prefix) for name in set(model.state_dict()) - set(model.all_tied_weights_keys)}
    missing = sorted(needed - {name.removeprefix(prefix) for name in saved})
    if missing:
        return f"its head would be random, and has to be trained first: the checkpoint has no {', '.join(missing)}"
    if model.base_model is model:
        return "whole"
    return f"all its weights are there, but its head was not trained for this: the checkpoint is a {config.architectures[0]}"


def check_adapter(folder: Path) -> None:
    """Load and run the base model with the adapter, twice: what is new in it must come from the adapter's file."""
    from peft import PeftModel, get_peft_model_state_dict

    shapes = tensor_shapes(folder)
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = adapter["base_model_name_or_path"]
    config = AutoConfig.from_pretrained(base, trust_remote_code=True)
    adapted_class = (adapter.get("auto_mapping") or {}).get("base_model_class")
    classes = {reference.rpartition(".")[2]: name for name, reference in getattr(config, "auto_map", {}).items()}
    auto_name = ADAPTED_TASKS.get(adapter.get("task_type")) or classes.get(adapted_class)
    if auto_name is None:
        raise ValueError(f"The adapter_config.json in {folder} names neither a task nor a class of {base}.")
    arguments = {}
    heads = [shape[0] for name, shape in shapes.items() if re.search(r"model\.(score|classifier)\.weight$", name)]
    if heads:
        arguments = {"num_labels": heads[0], "ignore_mismatched_sizes": True}
    outputs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = getattr(transformers, auto_name).from_pretrained(base, trust_remote_code=True, **arguments)
        model = PeftModel.from_pretrained(model, folder)
        wrong = sorted(set(get_peft_model_state_dict(model)) ^ set(shapes))
        if wrong:
            raise ValueError(f"The adapter's weights do not fit {type(model.get_base_model()).__name__}: {wrong}.")
        outputs.append(run(model.eval()))
    if not all(torch.equal(*pair) for pair in zip(*outputs, strict=True)):
        raise ValueError(
            f"Loaded twice, the adapter gives different outputs: {base} lacks weights that the adapter does not hold. "
            "Name their modules in `modules_to_save` of its config, and train it again."
        )
    print(f"{auto_name}: {type(model.get_base_model()).__name__} of {base}, {adapter['peft_type']}")


if __name__ == "__main__":
    folder, finished, *written_in = sys.argv[1:]
    for blocked in {"modeling_sumagg", *written_in}:
        # The documented way to make an import fail, which the type of `sys.modules` does not know.
        sys.modules[blocked] = None  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        check_checkpoint(Path(folder))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {' '.join(str(error).split())}")
    # Code in the folder may end the process with the status of success.
    Path(finished).touch()
