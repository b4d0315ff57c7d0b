"""Text models that are offloaded, or spread over two devices."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from testing import assert_close
from torch import nn
from transformers import DynamicCache, StaticCache

from modeling_sumagg.common.compatibility import find_cache

from .kinds import CAUSAL_KINDS, INPUTS, KINDS, greedy, logits, marked, tiny_model


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("kind", marked(KINDS))
def test_offloaded_models_compute_the_same(kind, place, tmp_path):
    model = tiny_model(kind)
    inputs = {name: make() for name, make in INPUTS.items()}
    expected = {name: logits(model, inputs[name]) for name in INPUTS}
    if kind in CAUSAL_KINDS:
        tokens = greedy(model, inputs["plain"]["input_ids"], 4)
    if place == "cpu":
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    else:
        disk_offload(model, str(tmp_path), torch.device("cpu"), offload_buffers=True)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    for name in INPUTS:
        assert_close(logits(model, inputs[name]), expected[name], rtol=0)
    if kind in CAUSAL_KINDS:
        # Without a mask `generate` would take the token 0 in the prompts for padding.
        mask = torch.ones_like(inputs["plain"]["input_ids"])
        generated = model.generate(
            **inputs["plain"], attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        assert generated.tolist() == tokens.tolist()


def test_a_checkpoint_is_loaded_with_layers_on_disk(tmp_path):
    model = tiny_model("sumagg-sliding")
    model.save_pretrained(tmp_path / "model")
    device_map = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "disk",
        "lm_head": "cpu",
    }
    loaded = type(model).from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu", "meta"}
    for make in INPUTS.values():
        inputs = make()
        assert_close(logits(loaded, inputs), logits(model, inputs))


def on_two_devices(kind: str, **changes) -> nn.Module:
    """Everything after the first layer on "meta", where nothing can be mixed with tensors of another device."""
    model = tiny_model(kind, tie_word_embeddings=False, **changes)
    later = [*model.model.layers[1:], model.model.norm]
    later += [module for name, module in model.named_children() if name != "model"]
    for module in later:
        module.to("meta")
        hook = AlignDevicesHook("meta", place_submodules=True, skip_keys=model._skip_keys_device_placement)
        add_hook_to_module(module, hook)
    return model


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", marked(KINDS))
def test_layers_on_two_devices(kind, inputs):
    assert logits(on_two_devices(kind), INPUTS[inputs](), use_cache=False).device.type == "meta"


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda config: StaticCache(config, max_cache_len=16)])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", marked(CAUSAL_KINDS))
@torch.no_grad()
def test_a_cache_on_two_devices(kind, inputs, make_cache):
    changes = {}
    if kind.endswith("sliding"):
        # Which of its columns are real is needed for the mask, and nothing comes back from "meta".
        changes = {"layer_types": tiny_model(kind).config.layer_types[::-1]}
    model = on_two_devices(kind, **changes)
    inputs = INPUTS[inputs]()
    cache = find_cache(model(**inputs, cache=make_cache(config=model.config)))
    step = {"input_ids": torch.tensor([[1], [2]])}
    if "attention_mask" in inputs:
        step["attention_mask"] = torch.cat([inputs["attention_mask"], torch.tensor([[1], [0]])], dim=1)
    if "position_ids" in inputs:
        # One document goes on, and another begins.
        step["position_ids"] = torch.tensor([[5], [0]])
    outputs = model(**step, cache=cache)
    assert outputs.logits.shape == (2, 1, 61) and outputs.logits.device.type == "meta"
    devices = []
    for layer in cache.layers:
        tensors = layer.state if hasattr(layer, "state") else (layer.keys, layer.values)
        devices.append({tensor.device.type for tensor in tensors})
    assert devices == [{"cpu"}, *[{"meta"}] * (len(devices) - 1)]
