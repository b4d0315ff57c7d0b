"""Convert a checkpoint of the original implementations into one that transformers loads.

    python -m modeling_sumagg.convert_original_checkpoint --model_family tost \
        --checkpoint_path best_model.pth --output_dir tost-small-12-p16 --id2label imagenet_labels.json
"""

import argparse
import json
import re
from pathlib import Path

import safetensors.torch
import torch
from transformers import PreTrainedModel

from ..families import FAMILIES


def read_state_dict(checkpoint_path: str | Path) -> dict[str, torch.Tensor]:
    """
    The tensors of an original checkpoint by name: `.safetensors`, or `.pt` and `.pth` holding a state dict, alone or
    under `"model"`. The prefixes of `torch.compile` and `DistributedDataParallel` are removed.

    Raises:
        ValueError: another kind of file.
    """
    suffix = Path(checkpoint_path).suffix
    if suffix == ".safetensors":
        checkpoint = safetensors.torch.load_file(checkpoint_path)
    elif suffix in (".pt", ".pth"):
        # The original training scripts store their parsed arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
    else:
        raise ValueError(f"The checkpoint must be a .safetensors, .pt or .pth file, got {checkpoint_path}.")
    state_dict = checkpoint.get("model", checkpoint)
    return {re.sub(r"^(_orig_mod\.|module\.)+", "", name): tensor for name, tensor in state_dict.items()}


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

    Args:
        model_family: a key of `FAMILIES`.
        checkpoint_path: see `read_state_dict`.
        output_dir: folder to write.
        num_attention_heads: heads of the attention layers, for checkpoints whose shapes do not tell.
        id2label: name of every class, for a classifier.

    Returns:
        The converted model.

    Raises:
        ValueError: not a checkpoint of this family, `num_attention_heads` is needed, or `id2label` has other classes
            than the model.
        RuntimeError: tensors are missing, unexpected or misshaped; the message lists them.
    """
    family = FAMILIES[model_family]
    state_dict = read_state_dict(checkpoint_path)
    try:
        model_class, config_arguments = family.original_format.infer(state_dict)
    except KeyError as error:
        raise ValueError(
            f"{checkpoint_path} is not an original {model_family} checkpoint: it has no tensor {error}. "
            f"It has {len(state_dict)} entries, the first of them {list(state_dict)[:5]}."
        ) from None
    if num_attention_heads is not None:
        config_arguments["num_attention_heads"] = num_attention_heads
    elif config_arguments["num_attention_heads"] is None:
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
        renamed.setdefault(tied, renamed[source])
    model.load_state_dict(renamed, assign=True)
    model.tie_weights()
    model.save_pretrained(output_dir)
    if family.image_processor is not None:
        family.image_processor(config).save_pretrained(output_dir)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_family",
        required=True,
        choices=sorted(name for name, family in FAMILIES.items() if family.original_format),
    )
    parser.add_argument("--checkpoint_path", required=True, help="a .pth, .pt or .safetensors file")
    parser.add_argument("--output_dir", required=True, help="the folder to write")
    parser.add_argument(
        "--num_attention_heads", type=int, help="heads of the attention layers, for sumagg checkpoints that have some"
    )
    parser.add_argument("--id2label", help="a JSON file with the name of every class: {index: name}")
    arguments = parser.parse_args()
    id2label = None
    if arguments.id2label is not None:
        id2label = {int(index): label for index, label in json.loads(Path(arguments.id2label).read_text()).items()}
    model = convert_original_checkpoint(
        arguments.model_family,
        arguments.checkpoint_path,
        arguments.output_dir,
        num_attention_heads=arguments.num_attention_heads,
        id2label=id2label,
    )
    print(f"{arguments.output_dir}: {type(model).__name__}, {model.num_parameters():,} parameters")
