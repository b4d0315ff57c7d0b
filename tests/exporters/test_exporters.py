"""`torch.export`, the exporters of transformers, and `torch.compile`."""

import copy

import onnx_ir
import onnxruntime
import pytest
import torch
from testing import assert_close, build, cache_tensors, sumagg_config
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from transformers import DynamicCache, StaticCache
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from modeling_sumagg import (
    SumAggForCausalLM,
    SumAggForMaskedLM,
    SumAggForSequenceClassification,
    SumAggForTokenClassification,
    SumAggModel,
    ToSTBackbone,
    ToSTConfig,
    ToSTForCausalLM,
    ToSTForImageClassification,
    ToSTModel,
    ToSTTextConfig,
    ToSTTextForSequenceClassification,
    ToSTTextForTokenClassification,
    ToSTTextModel,
)


CAUSAL_LMS = (SumAggForCausalLM, ToSTForCausalLM)
# The language models of both families by default; what differs from them by a head is slow.
TEXT_MODELS = (
    *CAUSAL_LMS,
    SumAggForMaskedLM,
    *(
        pytest.param(model_class, marks=pytest.mark.slow)
        for model_class in (
            SumAggModel,
            SumAggForSequenceClassification,
            SumAggForTokenClassification,
            ToSTTextModel,
            ToSTTextForSequenceClassification,
            ToSTTextForTokenClassification,
        )
    ),
)
IMAGE_MODELS = (ToSTModel, ToSTForImageClassification, ToSTBackbone)


def make(model_class):
    if model_class.config_class is ToSTConfig:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
        return build(model_class, ToSTConfig(**sizes, num_class_attention_layers=1, image_size=32, num_labels=3))
    if model_class.config_class is ToSTTextConfig:
        sizes = {"vocab_size": 61, "hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64}
        layer_types = ["token_statistics", "full_attention", "token_statistics"]
        return build(model_class, ToSTTextConfig(**sizes, num_hidden_layers=3, layer_types=layer_types))
    return build(model_class, sumagg_config("hybrid", is_causal=model_class is not SumAggForMaskedLM))


def text_inputs(batch_size, length):
    """Ids, and a mask with padding on the left of the first row."""
    mask = torch.ones(batch_size, length, dtype=torch.long)
    mask[0, :2] = 0
    return {"input_ids": torch.randint(61, (batch_size, length)), "attention_mask": mask}


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
        model(**step, past_key_values=cache)
    cache.reset()
    return {**step, "past_key_values": cache}


@pytest.mark.parametrize("model_class", CAUSAL_LMS)
def test_torch_export(model_class):
    model = make(model_class)
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    inputs = {**text_inputs(2, 6), "use_cache": False}
    shapes = {"input_ids": dynamic, "attention_mask": dynamic, "use_cache": None}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    other = {**text_inputs(3, 11), "use_cache": False}
    with torch.no_grad():
        assert_close(program.module()(**other).logits, model(**other).logits)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", CAUSAL_LMS)
def test_dynamo_exporter_decode_step(model_class):
    model = make(model_class)
    step = decode_step(model, batch_size=2)
    exported = DynamoExporter().export(model, step, DynamoConfig())
    program = getattr(exported, "program", exported).module()
    ids = torch.randint(61, (2, 7))
    with torch.no_grad():
        expected = model(ids, use_cache=True)
        for i in range(7):
            step["input_ids"], step["position_ids"] = ids[:, i : i + 1], torch.full((2, 1), i)
            outputs = program(**step)
            step["past_key_values"] = outputs.past_key_values
            assert_close(outputs.logits[:, 0], expected.logits[:, i])


@pytest.mark.slow
@pytest.mark.parametrize("model_class", (*CAUSAL_LMS, SumAggForMaskedLM, SumAggForSequenceClassification))
def test_onnx_forward(model_class, tmp_path):
    model = make(model_class)
    model.config.use_cache = False
    shapes = dict.fromkeys(("input_ids", "attention_mask"), {0: Dim.AUTO, 1: Dim.AUTO})
    exported = OnnxExporter().export(model, text_inputs(2, 6), OnnxConfig(dynamic_shapes=shapes))
    session = onnx_session(exported, tmp_path / "model.onnx")
    other = text_inputs(3, 11)
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in other.items()})
    with torch.no_grad():
        assert_close(torch.from_numpy(logits), model(**other).logits, rtol=1e-4)


@pytest.mark.slow
def test_onnx_images(tmp_path):
    model = make(ToSTForImageClassification)
    exported = OnnxExporter().export(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, OnnxConfig())
    session = onnx_session(exported, tmp_path / "model.onnx")
    images = torch.randn(2, 3, 32, 32)
    (logits,) = session.run(["logits"], {"pixel_values": images.numpy()})
    with torch.no_grad():
        assert_close(torch.from_numpy(logits), model(images).logits, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", CAUSAL_LMS)
def test_onnx_decode_step_writes_the_same_text(model_class, tmp_path):
    model = make(model_class)
    step = decode_step(model)
    exported = OnnxExporter().export(model, copy.deepcopy(step), OnnxConfig())
    session = onnx_session(exported, tmp_path / "model.onnx")

    # The state begins as zeros, and what a step puts out goes into the next.
    names = [output.name for output in session.get_outputs()]
    dtypes = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64}
    state = {
        i.name: torch.zeros(i.shape, dtype=dtypes[i.type]).numpy()
        for i in session.get_inputs()
        if i.name.startswith("input.")
    }
    tokens = [5, 17, 40]
    for position in range(12):
        feed = {"input_ids": torch.tensor([[tokens[position]]]), "position_ids": torch.tensor([[position]])}
        outputs = session.run(names, {name: tensor.numpy() for name, tensor in feed.items()} | state)
        outputs = dict(zip(names, outputs, strict=True))
        state = {name: outputs[name.replace("input.", "output.", 1)] for name in state}
        if position + 1 == len(tokens):
            tokens.append(int(outputs["logits"].argmax()))

    written = model.generate(torch.tensor([tokens[:3]]), max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert tokens == written[0].tolist()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(torch.tensor([tokens[:12]]), past_key_values=cache)
    assert_close(torch.from_numpy(outputs["logits"])[:, 0], expected.logits[:, -1], rtol=1e-4)
    states = [torch.from_numpy(value) for name, value in state.items() if not name.endswith("cumulative_length")]
    for actual, held in zip(states, cache_tensors(cache), strict=True):
        # A static layer has empty columns after the keys and values.
        assert_close(actual[:, :, : held.shape[2]] if actual.dim() == 4 else actual, held, rtol=1e-4)


def loss_of(outputs):
    """Any scalar that depends on everything a model returns."""
    first = outputs[0]
    return sum(part.square().mean() for part in (first if isinstance(first, tuple) else (first,)))


@pytest.mark.parametrize("model_class", TEXT_MODELS)
def test_compile_text(model_class):
    torch._dynamo.reset()
    model = make(model_class)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (6, 9, 13, 20):
        inputs = {**text_inputs(2, length), "use_cache": False}
        with torch.no_grad():
            assert_close(compiled(**inputs)[0], model(**inputs)[0])
    # One graph for the first length, and one for all others.
    assert counter.frame_count <= 2

    inputs = {**text_inputs(2, 8), "use_cache": False}
    gradients = []
    for step in (compiled, model):
        model.zero_grad()
        loss_of(step(**inputs)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected, rtol=1e-4)


@pytest.mark.parametrize("model_class", IMAGE_MODELS)
def test_compile_images(model_class):
    torch._dynamo.reset()
    model = make(model_class)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for step in (compiled, model):
        model.zero_grad()
        loss = loss_of(step(images))
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected, rtol=1e-4)
