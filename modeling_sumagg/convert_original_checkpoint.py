"""Convert a checkpoint of the original implementations into one that transformers loads.

    python -m modeling_sumagg.convert_original_checkpoint --model_family tost \
        --checkpoint_path best_model.pth --output_dir tost-small-12-p16 --id2label imagenet_labels.json
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .modeling_sumagg import SumAggForCausalLM
from .modeling_tost import ToSTForImageClassification, tost_image_processor
from .modeling_tost_text import ToSTForCausalLM


class ModelFamily(NamedTuple):
    """What converting a family of original checkpoints takes.

    Attributes:
        renaming: (pattern, replacement) pairs; all are applied, in order, to every original tensor name.
        infer: the model class and the arguments of its config, read from the original names and shapes. The number of
            attention heads is `None` where only the user can know it.
        image_processor: the image processor to save beside the model.
    """

    renaming: tuple[tuple[str, str], ...]
    infer: Callable[[dict[str, torch.Tensor]], tuple[type[PreTrainedModel], dict[str, Any]]]
    image_processor: Callable[[PreTrainedConfig], BaseImageProcessor] | None = None


def _infer_tost(state_dict: dict[str, torch.Tensor]) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    num_labels, hidden_size = state_dict["head.weight"].shape
    num_stages = sum(re.fullmatch(r"patch_embed\.proj\.\d+\.0\.weight", name) is not None for name in state_dict)
    return ToSTForImageClassification, {
        "hidden_size": hidden_size,
        "num_hidden_layers": _num_blocks(state_dict, "blocks"),
        "num_attention_heads": state_dict["blocks.0.attn.temp"].shape[0],
        "num_class_attention_layers": _num_blocks(state_dict, "cls_attn_blocks"),
        "mlp_ratio": state_dict["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "patch_size": 2**num_stages,
        "num_channels": state_dict["patch_embed.proj.0.0.weight"].shape[1],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
        "num_labels": num_labels,
    }


def _infer_sumagg(state_dict: dict[str, torch.Tensor]) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    vocab_size, hidden_size = state_dict["token_embedding.weight"].shape
    attends = [f"layers.{i}.q_proj.weight" in state_dict for i in range(_num_blocks(state_dict, "layers"))]
    if all(attends):
        raise ValueError(
            "No layer of the checkpoint sums. The original code adds positions in its attention-only baseline, where a "
            "SumAgg model multiplies by them: such a checkpoint cannot be converted."
        )
    return SumAggForCausalLM, {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(attends),
        "num_attention_heads": None if any(attends) else 1,
        "intermediate_size": state_dict["layers.0.ff.0.weight"].shape[0],
        "hidden_act": "relu",
        "layer_types": ["full_attention" if attention else "summation" for attention in attends],
        "position_embedding_type": "learned",
        "position_bias": 2.0,
        "max_position_embeddings": state_dict["pos_embedding.weight"].shape[0],
        "norm_position": "post",
        "sum_normalization": "none",
        "lm_head_bias": "output_projection.bias" in state_dict,
        "tie_word_embeddings": False,
    }


def _infer_tost_text(state_dict: dict[str, torch.Tensor]) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    embeddings = state_dict["transformer.wte.weight"]
    vocab_size, hidden_size = embeddings.shape
    return ToSTForCausalLM, {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": _num_blocks(state_dict, "transformer.h"),
        "num_attention_heads": state_dict["transformer.h.0.attn.temp"].shape[0],
        "intermediate_size": state_dict["transformer.h.0.mlp.c_fc.weight"].shape[0],
        "use_bias": "transformer.ln_f.bias" in state_dict,
        "use_membership_bias": "transformer.h.0.attn.denom_bias" in state_dict,
        "max_position_embeddings": state_dict["transformer.wpe.weight"].shape[0],
        "tie_word_embeddings": torch.equal(state_dict.get("lm_head.weight", embeddings), embeddings),
    }


def _num_blocks(state_dict: dict[str, torch.Tensor], prefix: str) -> int:
    """Number of blocks `prefix.0.`, `prefix.1.`, ... in the names."""
    return len({name.split(".")[prefix.count(".") + 1] for name in state_dict if name.startswith(f"{prefix}.")})


FAMILIES = {
    "sumagg": ModelFamily(
        renaming=(
            (r"^token_embedding\.", "embed_tokens."),
            (r"^pos_embedding\.", "modulation.position_embeddings."),
            (r"\.proj\.0\.", ".mixer.in_proj."),
            (r"\.proj\.2\.", ".mixer.hidden_proj."),
            (r"\.([qkv]|out)_proj\.", r".mixer.\1_proj."),
            (r"\.ff\.0\.", ".mlp.up_proj."),
            (r"\.ff\.2\.", ".mlp.down_proj."),
            (r"\.norm1\.", ".mixer_norm."),
            (r"\.norm2\.", ".mlp_norm."),
            (r"^final_norm\.", "norm."),
            (r"^(?!output_projection\.)", "model."),
            (r"^output_projection\.", "lm_head."),
        ),
        infer=_infer_sumagg,
    ),
    "tost": ModelFamily(
        renaming=(
            (r"^patch_embed\.proj\.(\d+)\.0\.", r"embeddings.patch_embeddings.projection.\1.convolution."),
            (r"^patch_embed\.proj\.(\d+)\.1\.", r"embeddings.patch_embeddings.projection.\1.normalization."),
            (r"^pos_embeder\.token_projection\.", "embeddings.position_embeddings.projection."),
            (r"^blocks\.(\d+)\.attn\.qkv\.", r"blocks.\1.attn.w_proj."),
            (r"^blocks\.", "encoder.layers."),
            (r"^cls_attn_blocks\.", "class_attention_layers."),
            (r"^norm\.", "layernorm."),
            (r"\.attn\.(?:to_out\.0|proj)\.", ".attention.o_proj."),
            (r"\.attn\.(w_proj|qkv)\.", r".attention.\1."),
            (r"\.attn\.temp$", ".attention.temperature"),
            (r"\.gamma([12])$", r".layer_scale\1.scale"),
            (r"^(?!head\.)", "tost."),
            (r"^head\.", "classifier."),
        ),
        infer=_infer_tost,
        image_processor=tost_image_processor,
    ),
    "tost_text": ModelFamily(
        renaming=(
            (r"^transformer\.wte\.", "model.embed_tokens."),
            (r"^transformer\.wpe\.", "model.position_embeddings."),
            (r"^transformer\.ln_f\.", "model.norm."),
            (r"^transformer\.h\.", "model.layers."),
            (r"\.ln_([12])\.", r".norm\1."),
            (r"\.attn\.c_attn\.", ".attention.w_proj."),
            (r"\.attn\.c_proj\.", ".attention.o_proj."),
            (r"\.attn\.temp$", ".attention.temperature"),
            (r"\.attn\.denom_bias$", ".attention.membership_bias"),
            (r"\.mlp\.c_fc\.", ".mlp.fc1."),
            (r"\.mlp\.c_proj\.", ".mlp.fc2."),
            (r"\.gamma([12])$", r".layer_scale\1"),
        ),
        infer=_infer_tost_text,
    ),
}


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
        model_class, config_arguments = family.infer(state_dict)
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
        for pattern, replacement in family.renaming:
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
    parser.add_argument("--model_family", required=True, choices=sorted(FAMILIES))
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


if __name__ == "__main__":
    main()
