"""Original ToST vision checkpoints through the command line converter, against the originals' own outputs."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from testing import assert_close
from transformers import AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_sumagg import __main__
from modeling_sumagg import convert_original_checkpoint as converter


GOLDEN = Path(__file__).parent / "golden" / "tost_vision_p16.safetensors"


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """The original weights, the inputs and outputs, and the original constructor arguments."""
    with safe_open(GOLDEN, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weights."): tensor for key, tensor in tensors.items() if key.startswith("weights.")}
    return weights, {key: tensor for key, tensor in tensors.items() if not key.startswith("weights.")}, config


def write_checkpoint(weights: dict[str, torch.Tensor], folder: Path, container: str) -> Path:
    if container == "safetensors":
        save_file(weights, folder / "original.safetensors")
        return folder / "original.safetensors"
    prefix = {"compiled": "_orig_mod.", "distributed and compiled": "module._orig_mod."}.get(container, "")
    checkpoint = {prefix + name: tensor for name, tensor in weights.items()}
    if container != "bare":
        # What the authors' training script saves beside the weights.
        checkpoint = {
            "model": checkpoint,
            "optimizer": {"state": {0: {"step": 1.0}}, "param_groups": [{"lr": 1e-3}]},
            "epoch": 399,
            "args": argparse.Namespace(model="tost_cab_small_12_p16", lr=5e-4, device="cuda"),
        }
    torch.save(checkpoint, folder / "original.pth")
    return folder / "original.pth"


@pytest.mark.parametrize("container", ["bare", "training", "compiled", "distributed and compiled", "safetensors"])
def test_converted_checkpoint_computes_what_the_original_does(golden, container, tmp_path, capsys):
    weights, tensors, original = golden
    path = write_checkpoint(weights, tmp_path, container)
    arguments = ["--model_family", "tost", "--checkpoint_path", str(path), "--output_dir", str(tmp_path / "converted")]
    __main__.main(["convert", *arguments])

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "converted")
    with torch.no_grad():
        assert_close(model(tensors["input.pixel_values"]).logits, tensors["output.logits"])
        assert_close(model.tost(tensors["input.pixel_values"]).pooler_output, tensors["output.features"])
    config = model.config
    assert config.architectures == ["ToSTForImageClassification"]
    read = {
        "patch_size": config.patch_size,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_classes": config.num_labels,
        "cls_attn_layers": config.num_class_attention_layers,
        "qkv_bias": config.qkv_bias,
        "mlp_ratio": config.mlp_ratio,
    }
    assert read == {name: original[name] for name in read}
    parameters = sum(t.numel() for name, t in weights.items() if "running_" not in name and "num_batches" not in name)
    assert model.num_parameters() == parameters
    assert f"{parameters:,} parameters" in capsys.readouterr().out
    processor = AutoImageProcessor.from_pretrained(tmp_path / "converted")
    assert processor.size.shortest_edge == processor.crop_size.height == processor.crop_size.width == 224


def other_sizes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An original of another shape: patch 8, one channel, no bias in U and q, k, v, a narrow MLP, one class block."""
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if not name.startswith(("cls_attn_blocks.1.", "patch_embed.")) and not name.endswith("qkv.bias")
    }
    for name, tensor in weights.items():
        if ".mlp.fc1." in name:
            weights[name] = tensor[:50].clone()
        elif name.endswith(".mlp.fc2.weight"):
            weights[name] = tensor[:, :50].clone()
    for stage, (in_channels, out_channels) in enumerate(((1, 8), (8, 16), (16, 32))):
        prefix = f"patch_embed.proj.{2 * stage}"
        weights[f"{prefix}.0.weight"] = torch.randn(out_channels, in_channels, 3, 3)
        for name in ("weight", "bias", "running_mean", "running_var"):
            weights[f"{prefix}.1.{name}"] = torch.rand(out_channels)
        weights[f"{prefix}.1.num_batches_tracked"] = torch.tensor(7)
    return weights


def test_sizes_are_read_from_the_shapes(golden, tmp_path):
    weights = other_sizes(golden[0])
    path = write_checkpoint(weights, tmp_path, "bare")
    converter.convert_original_checkpoint("tost", path, tmp_path / "converted")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "converted")
    config = model.config
    assert (config.patch_size, config.num_channels, config.qkv_bias) == (8, 1, False)
    assert config.mlp_ratio == 50 / 32
    assert (config.num_hidden_layers, config.num_class_attention_layers) == (2, 1)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == sum(t.numel() for t in weights.values())
    assert model(torch.randn(1, 1, 16, 24)).logits.shape == (1, 10)
    assert AutoImageProcessor.from_pretrained(tmp_path / "converted").do_convert_rgb is False


def test_the_dtype_of_the_original_stays(golden, tmp_path):
    weights = {name: t.half() if t.is_floating_point() else t for name, t in golden[0].items()}
    path = write_checkpoint(weights, tmp_path, "safetensors")
    converter.convert_original_checkpoint("tost", path, tmp_path / "converted")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "converted")
    assert model.dtype == torch.float16
    assert torch.equal(model.classifier.weight, weights["head.weight"])


def test_labels_come_from_a_file(golden, tmp_path):
    path = write_checkpoint(golden[0], tmp_path, "bare")
    labels = tmp_path / "labels.json"
    arguments = ["--model_family", "tost", "--checkpoint_path", str(path), "--output_dir", str(tmp_path / "converted")]
    command = ["convert", *arguments, "--id2label", str(labels)]
    names = {str(index): f"class {index}" for index in range(10)}
    labels.write_text(json.dumps(names))
    __main__.main(command)
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "converted").config
    assert config.id2label == {int(index): name for index, name in names.items()}
    assert config.label2id == {name: int(index) for index, name in names.items()}

    del names["9"]
    labels.write_text(json.dumps(names))
    command[command.index("--output_dir") + 1] = str(tmp_path / "again")
    with pytest.raises(SystemExit, match="classes 0 to 9 of the checkpoint, each once; it names 9"):
        __main__.main(command)


def test_every_bad_tensor_is_listed(golden, tmp_path):
    weights = dict(golden[0])
    del weights["blocks.1.mlp.fc2.bias"]
    weights["blocks.0.norm3.weight"] = torch.zeros(32)
    weights["pos_embeder.token_projection.bias"] = torch.zeros(31)
    path = write_checkpoint(weights, tmp_path, "bare")
    with pytest.raises(ValueError) as error:
        converter.convert_original_checkpoint("tost", path, tmp_path / "converted")
    for name in (
        "encoder.layers.1.mlp.fc2.bias",
        "encoder.layers.0.norm3.weight",
        "position_embeddings.projection.bias",
    ):
        assert name in str(error.value)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("name", ["head.weight", "blocks.0.attn.temp", "patch_embed.proj.0.0.weight"])
def test_a_tensor_the_sizes_are_read_from_is_missing(golden, name, tmp_path):
    weights = {key: tensor for key, tensor in golden[0].items() if key != name}
    path = write_checkpoint(weights, tmp_path, "training")
    with pytest.raises(ValueError, match=f"not an original tost checkpoint: it has no tensor '{name}'"):
        converter.convert_original_checkpoint("tost", path, tmp_path / "converted")


def test_another_number_of_convolutions_is_refused(golden, tmp_path):
    weights = {
        name: t for name, t in golden[0].items() if not name.startswith(("patch_embed.proj.4", "patch_embed.proj.6"))
    }
    path = write_checkpoint(weights, tmp_path, "bare")
    with pytest.raises(StrictDataclassError, match="patch_size must be 8 or 16 .*got 4"):
        converter.convert_original_checkpoint("tost", path, tmp_path / "converted")
