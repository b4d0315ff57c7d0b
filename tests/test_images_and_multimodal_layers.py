"""Images and multimodal models whose layers are quantized, adapted, offloaded, moved, traced or transformed."""

import copy

import onnxruntime
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from testing import assert_close, build, dequantized, tiny_config, tiny_inputs
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.func import functional_call, grad, vmap
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import BitsAndBytesConfig, TorchAoConfig

from modeling_sumagg import SumAggForMultimodalRegression, ToSTBackbone, ToSTForImageClassification


MODELS = (ToSTForImageClassification, ToSTBackbone, SumAggForMultimodalRegression)
NUMBERS = {"numeric_mean": [40.0, 2.0, 1e3, 0.0], "numeric_std": [10.0, 1.0, 300.0, 1.0]}
# Packed 4-bit layers on a CPU have a multiple of 32 outputs.
HEADS = ["classifier", "head", "score"]


def prediction(model: nn.Module, inputs: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    outputs = model(**inputs, **kwargs)
    return outputs.logits if "logits" in outputs else outputs.feature_maps[-1]


def wide_model(model_class) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    is_multimodal = model_class is SumAggForMultimodalRegression
    settings = {**NUMBERS, "head_hidden_sizes": [64, 32]} if is_multimodal else {}
    # 4-bit blocks hold 64 weights.
    model = build(model_class, tiny_config(model_class, hidden_size=64, **settings))
    inputs = tiny_inputs(model)
    if is_multimodal:
        mean, std = (torch.tensor(values) for values in NUMBERS.values())
        inputs["numeric_features"] = inputs["numeric_features"] * std + mean
    return model, inputs


def assert_near(actual: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    """Within `error` of the norm of what is expected."""
    assert (actual.float() - expected.float()).norm() < error * expected.float().norm()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model_class", MODELS)
def test_modules_are_called_with_the_whole_batch(model_class, training):
    """Every layer with weights is called once a pass, and what it takes and returns has all rows first."""
    # Large enough that work in blocks would pay.
    model = build(model_class, tiny_config(model_class, hidden_size=256, image_size=128)).train(training)
    inputs = {**tiny_inputs(model, batch_size=5, length=400), "pixel_values": torch.randn(5, 3, 128, 128)}
    calls: dict[str, int] = {}

    def record(name):
        def hook(module, args, output):
            calls[name] = calls.get(name, 0) + 1
            assert len(args[0]) == len(output) == 5, name

        return hook

    layers = {
        name: module
        for name, module in model.named_modules()
        if list(module.parameters()) and not list(module.children())
    }
    for name, module in layers.items():
        module.register_forward_hook(record(name))
    with torch.set_grad_enabled(training):
        prediction(model, inputs)
    assert calls == dict.fromkeys(layers, 1)


@pytest.mark.parametrize("model_class", MODELS)
def test_dynamic_quantization(model_class):
    model, inputs = wide_model(model_class)
    quantized = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    with torch.no_grad():
        assert_near(prediction(quantized, inputs), prediction(model, inputs), 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", ["torchao 8", "torchao 4", "bitsandbytes 8", "bitsandbytes 4"])
@pytest.mark.parametrize("model_class", MODELS)
def test_quantized_weights(model_class, bits, dtype, tmp_path):
    model, inputs = wide_model(model_class)
    if bits.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes")
        settings = {"load_in_8bit": True} if bits.endswith("8") else {"load_in_4bit": True}
        config = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=HEADS)
    elif bits.endswith("8"):
        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    model.save_pretrained(tmp_path)
    model = model.to(dtype)
    quantized = model_class.from_pretrained(tmp_path, dtype=dtype, quantization_config=config, device_map="cpu")
    with torch.no_grad():
        expected = prediction(dequantized(quantized, model), inputs)
        # bitsandbytes rounds what enters a layer, too.
        is_exact = bits.startswith("torchao") and dtype == torch.float32
        assert_near(prediction(quantized, inputs), expected, 1e-4 if is_exact else 0.1)


ADAPTED = {
    ToSTForImageClassification: {
        "linear": r".*(w_proj|qkv|o_proj|fc1|fc2)",
        "convolution": r".*convolution",
        "positions": r".*position_embeddings\.projection",
    },
    ToSTBackbone: {"linear": "all-linear"},
    SumAggForMultimodalRegression: {
        "linear": "all-linear",
        "convolution": r".*patch_embeddings",
        "tokens": ["embed_tokens"],
        "positions": ["position_embeddings"],
    },
}
ADAPTERS = {
    "LoRA": lambda layers: LoraConfig(target_modules=layers, init_lora_weights=False),
    "DoRA": lambda layers: LoraConfig(target_modules=layers, init_lora_weights=False, use_dora=True),
    "IA3": lambda layers: IA3Config(target_modules=layers, feedforward_modules=[], init_ia3_weights=False),
}
CASES = [
    (model_class, layers, adapter)
    for model_class, kinds in ADAPTED.items()
    for layers in kinds
    for adapter in ADAPTERS
    # IA3 knows no embeddings.
    if not (adapter == "IA3" and (layers == "tokens" or kinds[layers] == ["position_embeddings"]))
]


def assert_adapts(model: nn.Module, config, directory) -> None:
    """The adapter changes what the model computes; merged and reloaded it computes the same."""
    inputs = tiny_inputs(model)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        plain, expected = prediction(model, inputs), prediction(adapted, inputs)
        assert (expected - plain).norm() > 1e-3 * plain.norm()
        adapted.save_pretrained(directory)
        reloaded = PeftModel.from_pretrained(copy.deepcopy(model), directory).eval()
        assert_close(prediction(reloaded, inputs), expected)
        assert_close(prediction(adapted.merge_and_unload(), inputs), expected, rtol=1e-4)


@pytest.mark.parametrize(("model_class", "layers", "adapter"), CASES)
def test_adapters(model_class, layers, adapter, tmp_path):
    model = build(model_class, tiny_config(model_class))
    assert_adapts(model, ADAPTERS[adapter](ADAPTED[model_class][layers]), tmp_path)


def test_adapters_of_the_layers_of_each_feature(tmp_path):
    model = build(SumAggForMultimodalRegression, tiny_config(SumAggForMultimodalRegression))
    weights = ["feature_dense1.weight", "feature_dense2.weight"]
    config = LoraConfig(target_modules=[], target_parameters=weights, init_lora_weights=False)
    assert_adapts(model, config, tmp_path)


@pytest.mark.parametrize(
    ("model_class", "layers"), [(model_class, layers) for model_class, kinds in ADAPTED.items() for layers in kinds]
)
def test_adapters_of_a_batch(model_class, layers):
    config = ADAPTERS["LoRA"](ADAPTED[model_class][layers])
    model = get_peft_model(build(model_class, tiny_config(model_class)), config, adapter_name="a").eval()
    model.add_adapter("b", copy.deepcopy(config))
    inputs = tiny_inputs(model.get_base_model(), batch_size=4)
    with torch.no_grad():
        together = prediction(model, inputs, adapter_names=["b", "a", "__base__", "b"])
        alone = {}
        for name in ("a", "b"):
            model.set_adapter(name)
            alone[name] = prediction(model, inputs)
        with model.disable_adapter():
            alone["__base__"] = prediction(model, inputs)
    assert (alone["a"] - alone["b"]).norm() > 1e-3 * alone["a"].norm()
    expected = torch.stack([alone[name][row] for row, name in enumerate(["b", "a", "__base__", "b"])])
    assert_close(together, expected)


def without_texts(model) -> dict[str, torch.Tensor]:
    """Images alone, and for a model of texts only such as are empty."""
    inputs = {"pixel_values": tiny_inputs(model)["pixel_values"]}
    if isinstance(model, SumAggForMultimodalRegression):
        inputs["input_ids"] = torch.zeros(2, 0, dtype=torch.long)
    return inputs


@pytest.mark.parametrize("make_inputs", [tiny_inputs, without_texts])
@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("model_class", MODELS)
def test_offloaded(model_class, place, make_inputs, tmp_path):
    model = build(model_class, tiny_config(model_class))
    inputs = make_inputs(model)
    with torch.no_grad():
        expected = prediction(model, inputs)
        if place == "cpu":
            cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        else:
            disk_offload(model, str(tmp_path), torch.device("cpu"), offload_buffers=True)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert_close(prediction(model, inputs), expected, rtol=0)


@pytest.mark.parametrize("model_class", MODELS)
def test_each_part_on_disk(model_class, tmp_path):
    model = build(model_class, tiny_config(model_class, num_labels=1))
    inputs = tiny_inputs(model)
    model.save_pretrained(tmp_path / "model")
    tensors = list(model.state_dict())
    parts = [name for name, module in model.named_modules() if name.count(".") < 3 and list(module.parameters())]
    with torch.no_grad():
        expected = prediction(model, inputs)
        for index, part in enumerate(filter(None, parts)):
            elsewhere = {name: "cpu" for name in tensors if not name.startswith(f"{part}.")}
            offloaded = model_class.from_pretrained(
                tmp_path / "model", device_map={part: "disk", **elsewhere}, offload_folder=tmp_path / str(index)
            )
            assert_close(prediction(offloaded, inputs), expected)


@pytest.mark.parametrize("model_class", MODELS)
def test_two_devices(model_class):
    """The second device is "meta", which computes shapes only and refuses tensors of the first."""
    model = build(model_class, tiny_config(model_class))
    inputs = tiny_inputs(model)
    parts: list[str] = []
    for name, module in model.named_modules():
        is_whole = type(module).__name__ in model._no_split_modules or not list(module.children())
        if is_whole and list(module.parameters()) and not any(name.startswith(f"{part}.") for part in parts):
            parts.append(name)
    assert len(parts) >= 3
    for first in range(1, len(parts)):
        split = copy.deepcopy(model)
        for part in parts[first:]:
            hook = AlignDevicesHook(execution_device="meta", skip_keys=model._skip_keys_device_placement)
            add_hook_to_module(split.get_submodule(part).to("meta"), hook)
        with torch.no_grad():
            assert prediction(split, inputs).device.type == "meta", parts[first]


class Prediction(nn.Module):
    """A model of positional arguments, as tracers want them."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names
        self.eval()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return prediction(self.model, dict(zip(self.names, inputs, strict=True)))


DYNAMIC_AXES = {
    "input_ids": {0: "rows", 1: "tokens"},
    "attention_mask": {0: "rows", 1: "tokens"},
    "numeric_features": {0: "rows"},
    "pixel_values": {0: "rows"},
}
TRACED = [
    (ToSTForImageClassification, ("pixel_values",)),
    (ToSTBackbone, ("pixel_values",)),
    (SumAggForMultimodalRegression, tuple(DYNAMIC_AXES)),
    (SumAggForMultimodalRegression, ("input_ids",)),
    (SumAggForMultimodalRegression, ("pixel_values", "numeric_features")),
]


def inputs_for_tracing(model_class, names) -> tuple[nn.Module, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The model, inputs to trace it with, and others of other sizes and with gaps."""
    model = build(model_class, tiny_config(model_class))
    traced, others = tiny_inputs(model), tiny_inputs(model, batch_size=3, length=7)
    if model_class is SumAggForMultimodalRegression:
        others["numeric_features"][0, 1] = others["pixel_values"][1, 0, 3, 2] = float("nan")
        others["attention_mask"][2] = 0
    else:
        others = {"pixel_values": torch.randn(3, 3, 32, 48)}
    return Prediction(model, names), *(tuple(inputs[name] for name in names) for inputs in (traced, others))


@pytest.mark.parametrize(("model_class", "names"), TRACED)
def test_torchscript(model_class, names):
    model, inputs, others = inputs_for_tracing(model_class, names)
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs, check_trace=False)
        for arguments in (inputs, others):
            assert_close(traced(*arguments), model(*arguments))


@pytest.mark.parametrize(("model_class", "names"), TRACED)
def test_onnx_by_torchscript(model_class, names, tmp_path):
    model, inputs, others = inputs_for_tracing(model_class, names)
    path = str(tmp_path / "model.onnx")
    axes = {name: DYNAMIC_AXES[name] for name in names}
    if model_class is not SumAggForMultimodalRegression:
        axes["pixel_values"] = {0: "rows", 2: "height", 3: "width"}
    with torch.no_grad():
        torch.onnx.export(
            model, inputs, path, dynamo=False, opset_version=17, input_names=list(names), dynamic_axes=axes
        )
        session = onnxruntime.InferenceSession(path)
        for arguments in (inputs, others):
            feed = {name: tensor.numpy() for name, tensor in zip(names, arguments, strict=True)}
            (logits,) = session.run(None, feed)
            assert_close(torch.from_numpy(logits), model(*arguments))


TRANSFORMED = [
    (ToSTForImageClassification, {"problem_type": "regression"}),
    (ToSTForImageClassification, {"problem_type": "single_label_classification"}),
    (SumAggForMultimodalRegression, {**NUMBERS, "label_mean": [1.0], "label_std": [3.0]}),
    (SumAggForMultimodalRegression, {"num_labels": 3, "problem_type": "single_label_classification"}),
]


@pytest.mark.parametrize(("model_class", "settings"), TRANSFORMED)
def test_gradient_of_each_row(model_class, settings):
    model = build(model_class, tiny_config(model_class, **settings)).double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in tiny_inputs(model, 3).items()}
    labels = torch.randn(3, model.config.num_labels, dtype=torch.float64)
    if "single" in model.config.problem_type:
        labels = torch.tensor([2, 0, 1])
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, inputs, labels):
        row = {name: x[None] for name, x in inputs.items()}
        return functional_call(model, parameters, kwargs={**row, "labels": labels[None]}).loss

    of_each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, inputs, labels)
    for row in range(3):
        one = {name: x[row] for name, x in inputs.items()}
        of_one = grad(loss)(parameters, one, labels[row])
        model.zero_grad()
        model(**{name: x[None] for name, x in one.items()}, labels=labels[row : row + 1]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(of_one[name], parameter.grad, rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(of_each[name][row], parameter.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.01), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("model_class", MODELS)
def test_half_precision(model_class, dtype, error, is_autocast):
    model = build(model_class, tiny_config(model_class))
    inputs = tiny_inputs(model, batch_size=4)
    with torch.no_grad():
        expected = prediction(model, inputs)
        if not is_autocast:
            model.to(dtype)
        with torch.autocast("cpu", dtype=dtype, enabled=is_autocast):
            assert_near(prediction(model, inputs), expected, error)
