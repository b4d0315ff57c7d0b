"""A module is called once a pass, with the whole batch in the shape of its input, whoever listens to the call."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from testing import assert_close
from torch import nn

from .kinds import CAUSAL_KINDS, INPUTS, KINDS, logits, marked, named_layers, padded_inputs, tiny_model


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", marked(KINDS))
def test_each_module_is_called_once_with_the_batch(kind, inputs):
    model = tiny_model(kind)
    layers = dict(named_layers(model, nn.Linear, nn.Embedding, nn.LayerNorm))
    calls = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, output, name=name: calls[name].append(tuple(output.shape)))
    logits(model, INPUTS[inputs](), use_cache=False)
    for name, shapes in calls.items():
        rows = (2,) if "classifier" in kind and name == "score" else (2, 9)
        assert len(shapes) == 1 and shapes[0][:-1] == rows, (name, shapes)


@pytest.mark.parametrize("kind", ["sumagg-sliding", "sumagg-classifier-mean", "tost-sliding"])
def test_steering_the_last_token_of_a_long_input_steers_no_other(kind):
    model = tiny_model(kind)
    ids, direction = torch.randint(61, (3, 2500)), torch.randn(16)
    mlp, seen = model.model.layers[0].mlp, []

    def steer(module, args, output):
        seen.append(output.shape)
        return output.index_add(1, torch.tensor([2499]), direction.expand(3, 1, -1))

    block = {}
    model.model.layers[0].register_forward_hook(lambda module, args, output: block.update(output=output.detach()))
    outputs = []
    for steered in (False, True):
        handle = mlp.register_forward_hook(steer) if steered else None
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                model(ids, use_cache=False)
            outputs.append(block["output"])
        if handle is not None:
            handle.remove()
    assert seen == [(3, 2500, 16)] * 2
    for before, after in zip(outputs[:2], outputs[2:], strict=True):
        changed = (after - before).abs().amax(-1) > 1e-3
        assert changed[:, -1].all() and not changed[:, :-1].any()
    assert_close(outputs[2], outputs[3])


def with_adapters(kind: str, layers: str) -> nn.Module:
    """The model with adapters "a" and "b" on all its linear layers, or on all its embeddings."""
    model = tiny_model(kind, tie_word_embeddings=False)
    names = [name for name, _ in named_layers(model, nn.Linear if layers == "linear" else nn.Embedding)]
    config = LoraConfig(target_modules=names, init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name="a").eval()
    adapted.add_adapter("b", copy.deepcopy(config))
    return adapted


@pytest.mark.parametrize("layers", ["linear", "embedding"])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", marked(KINDS))
def test_several_adapters_in_one_batch(kind, inputs, layers):
    model = with_adapters(kind, layers)
    inputs = {name: tensor.repeat(2, 1) for name, tensor in INPUTS[inputs]().items()}
    names = ["b", "a", "__base__", "b"]
    together = logits(model, inputs, adapter_names=names)
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = logits(model, inputs)
    with model.disable_adapter():
        alone["__base__"] = logits(model, inputs)
    assert (alone["a"] - alone["b"]).norm() > 1e-3 * alone["a"].norm()
    assert_close(together, torch.stack([alone[name][row] for row, name in enumerate(names)]))


@pytest.mark.parametrize("kind", marked(CAUSAL_KINDS))
def test_generation_with_several_adapters_in_one_batch(kind):
    model = with_adapters(kind, "linear")
    inputs = padded_inputs(3)
    names = ["b", "__base__", "a"]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(**inputs, adapter_names=names, **settings)
    for row, name in enumerate(names):
        rows = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(**rows, **settings)
        else:
            model.set_adapter(name)
            alone = model.generate(**rows, **settings)
        assert together[row].tolist() == alone[0].tolist()
