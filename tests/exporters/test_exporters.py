"""`torch.export`, the exporters of transformers, and `torch.compile`."""

import copy

import onnx_ir
import onnxruntime
import pytest
import torch
from testing import assert_close, build, cache_tensors, tiny_config, tiny_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from transformers import DynamicCache, StaticCache
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from modeling_sumagg import (
    SumAggForCausalLM,
    SumAggForCTC,
    SumAggForMaskedLM,
    SumAggForMultimodalRegression,
    ToSTForCausalLM,
    ToSTForImageClassification,
)


CAUSAL_LMS = (SumAggForCausalLM, ToSTForCausalLM)
# The layers that every export is tried with.
EXPORTED = [*((cls, "hybrid") for cls in CAUSAL_LMS), (SumAggForCausalLM, "converted")]
# One class of each family: a head changes nothing of how a graph is made.
FAMILIES = (*CAUSAL_LMS, SumAggForMultimodalRegression, ToSTForImageClassification)


def make(model_class, layers="hybrid"):
    return build(model_class, tiny_config(model_class, layers))


def onnx_session(exported, path) -> onnxruntime.InferenceSession:
    # The exporter of transformers 5.17 returns the program itself, later ones an object around it.
    program = getattr(exported, "program", exported)
    onnx_ir.save(getattr(program, "model", program), path)
    return onnxruntime.InferenceSession(path)


def decode_step(model, batch_size=1):
    """Inputs of one decode step, on a static cache: its length is a tensor, so that it is no constant of the graph."""
    cache = StaticCache(config=model.config, max_cache_len=32)
    step = {
        "input_ids": torch.zeros(batch_size, 1, dtype=torch.long),
        "position_ids": torch.ones(batch_size, 1).long(),
    }
    with torch.no_grad():
        model(**step, cache=cache)
    cache.reset()
    return {**step, "cache": cache}


@pytest.mark.parametrize(("model_class", "layers"), EXPORTED)
def test_torch_export(model_class, layers):
    model = make(model_class, layers)
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    inputs = {**tiny_inputs(model, 2, 6), "use_cache": False}
    shapes = {"input_ids": dynamic, "attention_mask": dynamic, "use_cache": None}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    other = {**tiny_inputs(model, 3, 11), "use_cache": False}
    with torch.no_grad():
        assert_close(program.module()(**other).logits, model(**other).logits)


@pytest.mark.slow
@pytest.mark.parametrize(("model_class", "layers"), [*EXPORTED, *((cls, "sliding") for cls in CAUSAL_LMS)])
def test_dynamo_exporter_decode_step(model_class, layers):
    model = make(model_class, layers)
    step = decode_step(model, batch_size=2)
    exported = DynamoExporter().export(model, step, DynamoConfig())
    program = getattr(exported, "program", exported).module()
    ids = torch.randint(61, (2, 7))
    with torch.no_grad():
        expected = model(ids, use_cache=True)
        for i in range(7):
            step["input_ids"], step["position_ids"] = ids[:, i : i + 1], torch.full((2, 1), i)
            outputs = program(**step)
            step["cache"] = outputs.cache
            assert_close(outputs.logits[:, 0], expected.logits[:, i])


@pytest.mark.slow
@pytest.mark.parametrize(("model_class", "layers"), EXPORTED)
def test_onnx_forward(model_class, layers, tmp_path):
    model = make(model_class, layers)
    model.config.use_cache = False
    shapes = dict.fromkeys(("input_ids", "attention_mask"), {0: Dim.AUTO, 1: Dim.AUTO})
    exported = OnnxExporter().export(model, tiny_inputs(model, 2, 6), OnnxConfig(dynamic_shapes=shapes))
    session = onnx_session(exported, tmp_path / "model.onnx")
    other = tiny_inputs(model, 3, 11)
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in other.items()})
    with torch.no_grad():
        expected = model(**other).logits
    # Before the first real token there is nothing to predict from, and versions of transformers mask it differently.
    real = other["attention_mask"].bool() if expected.dim() == 3 else slice(None)
    assert_close(torch.from_numpy(logits)[real], expected[real], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", (ToSTForImageClassification, SumAggForMultimodalRegression))
def test_onnx_forward_of_images(model_class, tmp_path):
    model = make(model_class)
    exported = OnnxExporter().export(model, tiny_inputs(model), OnnxConfig())
    session = onnx_session(exported, tmp_path / "model.onnx")
    inputs = tiny_inputs(model)
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    with torch.no_grad():
        assert_close(torch.from_numpy(logits), model(**inputs).logits, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("model_class", "layers"), [*EXPORTED, *((cls, "sliding") for cls in CAUSAL_LMS)])
def test_onnx_decode_step_writes_the_same_text(model_class, layers, tmp_path):
    model = make(model_class, layers)
    step = decode_step(model)
    exported = OnnxExporter().export(model, copy.deepcopy(step), OnnxConfig())
    session = onnx_session(exported, tmp_path / "model.onnx")

    # The state begins as zeros, and what a step puts out goes into the next.
    names = [output.name for output in session.get_outputs()]
    dtypes = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64, "tensor(bool)": torch.bool}
    state = {
        i.name: torch.zeros(i.shape, dtype=dtypes[i.type]).numpy()
        for i in session.get_inputs()
        if i.name not in ("input_ids", "position_ids")
    }
    # Where both have one name, the exporter puts `input.` and `output.` before it; else the cache's name differs.
    after = {name: next(n for n in names if n.endswith(f".{name.partition('layers.')[2]}")) for name in state}
    tokens = [5, 17, 40]
    for position in range(12):
        feed = {"input_ids": torch.tensor([[tokens[position]]]), "position_ids": torch.tensor([[position]])}
        outputs = session.run(names, {name: tensor.numpy() for name, tensor in feed.items()} | state)
        outputs = dict(zip(names, outputs, strict=True))
        state = {name: outputs[after[name]] for name in state}
        if position + 1 == len(tokens):
            tokens.append(int(outputs["logits"].argmax()))

    written = model.generate(torch.tensor([tokens[:3]]), max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert tokens == written[0].tolist()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(torch.tensor([tokens[:12]]), cache=cache)
    assert_close(torch.from_numpy(outputs["logits"])[:, 0], expected.logits[:, -1], rtol=1e-4)
    states = [torch.from_numpy(value) for value in state.values() if value.dtype == "float32"]
    for actual, held in zip(states, cache_tensors(cache), strict=True):
        # A static layer has empty columns after the keys and values.
        assert_close(actual[:, :, : held.shape[2]] if actual.dim() == 4 else actual, held, rtol=1e-4)


def loss_and_gradients(step, model, inputs):
    """Any scalar that depends on everything a model returns, and its gradients."""
    model.zero_grad()
    first = step(**inputs)[0]
    loss = sum(part.square().mean() for part in (first if isinstance(first, tuple) else (first,)))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same_training_step(compiled, model, inputs):
    pairs = zip(loss_and_gradients(compiled, model, inputs), loss_and_gradients(model, model, inputs), strict=True)
    for actual, expected in pairs:
        # The gradient of a bias of keys is zero but for rounding.
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def no_cache(model):
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


# Sums to both sides, and frames, take longest.
@pytest.mark.parametrize(
    "model_class", [*FAMILIES, *(pytest.param(it, marks=pytest.mark.slow) for it in (SumAggForMaskedLM, SumAggForCTC))]
)
def test_compile(model_class):
    torch._dynamo.reset()
    model = make(model_class)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    takes_lengths = {"input_ids", "input_features"} & tiny_inputs(model).keys()
    for length in (6, 9, 20) if takes_lengths else ():
        inputs = {**tiny_inputs(model, length=length), **no_cache(model)}
        with torch.no_grad():
            assert_close(compiled(**inputs)[0], model(**inputs)[0])
    # One graph for the first length, and one for all others.
    assert counter.frame_count <= 2
    assert_same_training_step(compiled, model, {**tiny_inputs(model, length=8), **no_cache(model)})


@pytest.mark.slow
@pytest.mark.parametrize("model_class", FAMILIES)
def test_inductor(model_class):
    torch._dynamo.reset()
    model = make(model_class)
    compiled = torch.compile(model, fullgraph=True)
    assert_same_training_step(compiled, model, {**tiny_inputs(model), **no_cache(model)})
