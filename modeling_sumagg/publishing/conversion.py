"""Convert a checkpoint of the original implementations into one that transformers loads.

    python -m modeling_sumagg convert --model_family tost \
        --checkpoint_path best_model.pth --output_dir tost-small-12-p16 --id2label imagenet_labels.json
"""

import argparse
import json
import re
import textwrap
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..models.families import FAMILIES, StateDict
from .files import refuse_what_is_there, unfinished_folder


SUFFIXES = (".safetensors", ".pt", ".pth")


def read_state_dict(checkpoint_path: str | Path) -> StateDict:
    """
    The tensors of an original checkpoint by name: `.safetensors`, or `.pt` and `.pth` holding a state dict, alone or
    under `"model"`. The prefixes of `torch.compile` and `DistributedDataParallel` are removed.

    Raises:
        `ValueError`: no such file, another kind of file, a damaged one, or one that holds something else than tensors by
            name; the message says which, and what to do.
    """
    path = Path(checkpoint_path)
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in SUFFIXES)
        raise ValueError(
            f"{path} is a folder: give the checkpoint's file{f', such as {inside[0]}' if inside else ''}."
        )
    if path.suffix not in SUFFIXES:
        raise ValueError(f"The checkpoint must be a .safetensors, .pt or .pth file, got {checkpoint_path}.")
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: download or copy it again.")
    try:
        if path.suffix == ".safetensors":
            checkpoint = safetensors.torch.load_file(path)
        else:
            # The original training scripts store their parsed arguments beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged file can end in any error of the unpickler.
    except Exception as error:
        if other := re.search(r"Unsupported global: GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} holds objects of the class {other[1]}, and a checkpoint's code is not run: load it where you "
                "trust it, and save its tensors alone with `torch.save(model.state_dict(), path)`."
            ) from error
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged, cut off, or no {path.suffix} file. Compare "
            f"its size, {path.stat().st_size:,} bytes, with that of its source, and download or copy it again."
        ) from error
    state_dict = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state_dict, dict):
        what = f"of shape {list(state_dict.shape)}" if isinstance(state_dict, torch.Tensor) else ""
        raise ValueError(
            f"{path} holds {'one' if what else 'a'} {type(state_dict).__name__} {what}".rstrip()
            + ", and not tensors by name: save them with `torch.save(model.state_dict(), path)`."
        )
    return {
        re.sub(r"^(_orig_mod\.|module\.)+", "", str(name)): tensor
        for name, tensor in state_dict.items()
        if isinstance(tensor, torch.Tensor)
    }


def convert_original_checkpoint(
    model_family: str,
    checkpoint_path: str | Path,
    output_dir: str | Path,
    *,
    num_attention_heads: int | None = None,
    id2label: dict[int, str] | None = None,
) -> PreTrainedModel:
    """
    Write the original checkpoint at `checkpoint_path` to `output_dir` as `from_pretrained` reads it, with the config
    inferred from the tensors' shapes and, for images, the image processor. The image size of a vision model leaves no
    trace in its tensors (its positions are computed): it is the config's default.

    The folder must be new or empty, so that nothing is replaced. A conversion that fails leaves it as it was. One that is
    killed leaves no `config.json` in it, so that nothing loads half of a model.

    Args:
        model_family: a key of `FAMILIES` whose record has an `original_format`.
        checkpoint_path: see [`read_state_dict`].
        output_dir: folder to write, new or empty.
        num_attention_heads: heads of the attention layers, for checkpoints whose shapes do not tell.
        id2label: name of every class, for a classifier.

    Returns:
        The converted model.

    Raises:
        `ValueError`: no family with an original format; `output_dir` holds something; not a checkpoint of this family;
            tensors that are missing, unexpected or misshaped, all listed; `num_attention_heads` is needed; `id2label` has
            other classes than the model.
        `OSError`, `SafetensorError`: the folder cannot be written.
    """
    family = FAMILIES.get(model_family)
    if family is None or family.original_format is None:
        convertible = sorted(name for name, known in FAMILIES.items() if known.original_format is not None)
        raise ValueError(f"`model_family` must be one of {', '.join(convertible)}, got {model_family!r}.")
    refuse_what_is_there(Path(output_dir))
    state_dict = read_state_dict(checkpoint_path)
    try:
        model_class, config_arguments = family.original_format.infer(state_dict)
    except KeyError as error:
        raise ValueError(
            f"{checkpoint_path} is not an original {model_family} checkpoint: it has no tensor {error}. "
            f"It has {len(state_dict)} tensors, the first of them {list(state_dict)[:5]}."
        ) from None
    except (IndexError, ValueError) as error:
        raise ValueError(f"{checkpoint_path} cannot be converted as a {model_family} checkpoint: {error}") from error
    known_heads = config_arguments["num_attention_heads"]
    if num_attention_heads is not None:
        config_arguments["num_attention_heads"] = num_attention_heads
    elif known_heads is None:
        raise ValueError(
            "The checkpoint has attention layers, and their number of heads cannot be read from the shapes: pass "
            "--num_attention_heads (`num_attention_heads` in Python), 8 in the published experiments."
        )
    config = model_class.config_class(**config_arguments)
    if id2label is not None:
        if sorted(id2label) != list(range(config.num_labels)):
            raise ValueError(
                f"id2label must name the classes 0 to {config.num_labels - 1} of the checkpoint, each once; "
                f"it names {len(id2label)}, the first of them {sorted(id2label)[:3]}."
            )
        config.id2label = id2label
        config.label2id = {label: index for index, label in id2label.items()}

    renamed = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in family.original_format.renaming:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    with torch.device("meta"):
        model = model_class(config)
    # Some originals store a tied weight once.
    for tied, source in model.all_tied_weights_keys.items():
        if source in renamed:
            renamed.setdefault(tied, renamed[source])
    try:
        model.load_state_dict(renamed, assign=True)
    except RuntimeError as error:
        heads = f" with num_attention_heads={num_attention_heads}" if num_attention_heads is not None else ""
        if heads and known_heads is not None:
            heads += f" (their shapes tell that it is {known_heads}: leave it out)"
        raise ValueError(
            f"The tensors of {checkpoint_path} are not those of a {model_class.__name__}{heads}: {error}"
        ) from error
    model.tie_weights()
    with unfinished_folder(Path(output_dir)) as folder:
        model.save_pretrained(folder)
        if family.image_processor is not None:
            family.image_processor(config).save_pretrained(folder)
    return model


def read_labels(path: str | Path) -> dict[int, str]:
    """
    The name of every class from a JSON file, `{index: name}`.

    Raises:
        `ValueError`: no such file, or not that.
    """
    try:
        labels = json.loads(Path(path).read_text(encoding="utf-8"))
        return {int(index): label for index, label in labels.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f'{path} must be a JSON file with the name of every class, {{"0": "cat", …}}: {error}'
        ) from error


def convert_by_command(arguments: argparse.Namespace) -> None:
    """
    Convert by the arguments of the command line, and print the model.

    Raises:
        `OSError`, `ValueError`: as [`convert_original_checkpoint`]; the message is not longer than a user reads.
    """
    labels = None if arguments.id2label is None else read_labels(arguments.id2label)
    try:
        model = convert_original_checkpoint(
            arguments.model_family,
            arguments.checkpoint_path,
            arguments.output_dir,
            num_attention_heads=arguments.num_attention_heads,
            id2label=labels,
        )
    except (SafetensorError, StrictDataclassError, ValueError) as error:
        raise ValueError(textwrap.shorten(str(error), 2000, placeholder=" …")) from error
    print(f"{arguments.output_dir}: {type(model).__name__}, {model.num_parameters():,} parameters")
