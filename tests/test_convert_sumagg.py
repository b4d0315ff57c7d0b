"""Original summation checkpoints through the command line converter, against the originals' own outputs."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from testing import assert_close
from transformers import AutoModelForCausalLM

from modeling_sumagg import __main__
from modeling_sumagg import convert_original_checkpoint as converter


GOLDEN = Path(__file__).parent / "golden"


def read_golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict]:
    """The original weights, the inputs and outputs, and the original constructor arguments."""
    with safe_open(GOLDEN / f"sumagg_{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("weights."): tensor for key, tensor in tensors.items() if key.startswith("weights.")}
    return weights, {key: tensor for key, tensor in tensors.items() if not key.startswith("weights.")}, config


def write_checkpoint(weights: dict[str, torch.Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)


@pytest.mark.parametrize("name, suffix", [("pure", ".pt"), ("hybrid", ".safetensors"), ("hybrid", ".pth")])
def test_converted_checkpoint_computes_what_the_original_does(name, suffix, tmp_path):
    weights, golden, original = read_golden(name)
    write_checkpoint(weights, tmp_path / f"original{suffix}")
    arguments = ["--model_family", "sumagg", "--checkpoint_path", tmp_path / f"original{suffix}"]
    heads = ["--num_attention_heads", original["num_heads"]] if name == "hybrid" else []
    __main__.main(["convert", *map(str, [*arguments, "--output_dir", tmp_path / "converted", *heads])])

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    with torch.no_grad():
        outputs = model(golden["input.input_ids"], output_hidden_states=True)
    assert_close(outputs.logits, golden["output.logits"])
    assert_close(outputs.hidden_states[-1], golden["output.last_hidden_state"])
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in weights.values())
    assert model.config.max_position_embeddings == original["max_seq_len"]
    assert model.config.architectures == ["SumAggForCausalLM"]


def convert(weights: dict[str, torch.Tensor], folder: Path, **kwargs):
    write_checkpoint(weights, folder / "original.safetensors")
    return converter.convert_original_checkpoint(
        "sumagg", folder / "original.safetensors", folder / "converted", **kwargs
    )


def test_every_bad_tensor_is_listed(tmp_path):
    weights, _, _ = read_golden("pure")
    del weights["layers.1.out_proj.bias"]
    weights["extra"] = torch.zeros(1)
    weights["layers.0.norm1.weight"] = torch.ones(31)
    with pytest.raises(ValueError) as error:
        convert(weights, tmp_path)
    for name in ("layers.1.mixer.out_proj.bias", "extra", "layers.0.mixer_norm.weight"):
        assert name in str(error.value)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("name", ["token_embedding.weight", "pos_embedding.weight", "layers.0.ff.0.weight"])
def test_a_tensor_the_sizes_are_read_from_is_missing(name, tmp_path):
    weights, _, _ = read_golden("pure")
    del weights[name]
    with pytest.raises(ValueError, match=f"no tensor '{name}'"):
        convert(weights, tmp_path)


def test_the_heads_of_an_attention_layer_must_be_given(tmp_path):
    weights, _, _ = read_golden("hybrid")
    with pytest.raises(ValueError, match="--num_attention_heads"):
        convert(weights, tmp_path)
    with pytest.raises(StrictDataclassError, match="`num_attention_heads` must divide `hidden_size`, got 5"):
        convert(weights, tmp_path, num_attention_heads=5)


def test_the_attention_only_baseline_is_refused(tmp_path):
    weights, _, _ = read_golden("hybrid")
    weights = {
        key.replace("layers.2.", "layers.0."): tensor
        for key, tensor in weights.items()
        if not key.startswith(("layers.0.", "layers.1."))
    }
    with pytest.raises(ValueError, match="No layer of the checkpoint sums"):
        convert(weights, tmp_path, num_attention_heads=4)
