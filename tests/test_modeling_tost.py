"""The ToST vision models, held to a float64 rewriting of the paper, and to what transformers' models promise."""

import json
import math

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors.torch import load_file, save_file
from testing import assert_close, build
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from modeling_sumagg import ToSTBackbone, ToSTConfig, ToSTForImageClassification, ToSTModel
from modeling_sumagg.models.modeling_tost import (
    ToSTClassAttention,
    ToSTLayerScale,
    fourier_position_code,
    tost_image_processor,
)


def tiny_config(**kwargs) -> ToSTConfig:
    arguments = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 8,
        "image_size": 32,
        "num_labels": 5,
    }
    return ToSTConfig(**{**arguments, **kwargs})


def images(batch_size: int, height: int = 32, width: int = 32, num_channels: int = 3) -> torch.Tensor:
    return torch.randn(batch_size, num_channels, height, width, generator=torch.Generator().manual_seed(1))


def position_code(height: int, width: int) -> torch.Tensor:
    """The code of every patch from Python's own sines, float64 [64, height, width]."""
    code = torch.empty(64, height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            for offset, number, last in ((0, row + 1, height), (32, column + 1, width)):
                for i in range(32):
                    angle = 2 * math.pi * number / (last + 1e-6) / 10000 ** (2 * (i // 2) / 32)
                    code[offset + i, row, column] = math.cos(angle) if i % 2 else math.sin(angle)
    return code


def forward_in_float64(model: ToSTForImageClassification, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """The evaluation forward pass, image by image and head by head, from nothing but the weights."""
    config = model.config
    weights = {name.removeprefix("tost."): tensor.double() for name, tensor in model.state_dict().items()}
    head_dim = config.hidden_size // config.num_attention_heads
    heads = [slice(k * head_dim, (k + 1) * head_dim) for k in range(config.num_attention_heads)]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x):
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    def mlp(x, name):
        return linear(gelu(linear(x, f"{name}.mlp.fc1")), f"{name}.mlp.fc2")

    def token_statistics(x, name):
        w = linear(x, f"{name}.w_proj")
        temperature = weights[f"{name}.temperature"].flatten()
        logits = []
        for k, head in enumerate(heads):
            unit = w[:, head] / w[:, head].norm(dim=0).clamp_min(1e-12)
            logits.append(temperature[k] * unit.square().sum(-1))
        membership = torch.stack(logits).softmax(0)
        out = torch.empty_like(w)
        for share, head in zip(membership, heads, strict=True):
            moment = (share[:, None] * w[:, head].square()).sum(0) / (share.sum() + 1e-8)
            out[:, head] = -w[:, head] * share[:, None] / (1 + moment)
        return linear(out, f"{name}.o_proj"), membership

    def class_attention(x, name):
        q, k, v = linear(x, f"{name}.qkv").split(config.hidden_size, dim=-1)
        read = [(k[:, head] @ q[0, head] / head_dim**0.5).softmax(0) @ v[:, head] for head in heads]
        return linear(torch.cat(read), f"{name}.o_proj")

    outputs = {"logits": [], "features": [], "attentions": []}
    for image in pixel_values.double():
        x = image[None]
        num_stages = {8: 3, 16: 4}[config.patch_size]
        for stage in range(num_stages):
            name = f"embeddings.patch_embeddings.projection.{2 * stage}"
            x = F.conv2d(x, weights[f"{name}.convolution.weight"], stride=2, padding=1)
            mean, variance, scale, shift = (
                weights[f"{name}.normalization.{statistic}"][:, None, None]
                for statistic in ("running_mean", "running_var", "weight", "bias")
            )
            x = (x - mean) / (variance + 1e-5).sqrt() * scale + shift
            x = gelu(x) if stage < num_stages - 1 else x
        name = "embeddings.position_embeddings.projection"
        code = position_code(*x.shape[-2:]).flatten(1).T
        x = x[0].flatten(1).T + code @ weights[f"{name}.weight"][:, :, 0, 0].T + weights[f"{name}.bias"]

        memberships = []
        for index in range(config.num_hidden_layers):
            name = f"encoder.layers.{index}"
            branch, membership = token_statistics(norm(x, f"{name}.norm1"), f"{name}.attention")
            memberships.append(membership)
            x = x + weights[f"{name}.layer_scale1.scale"] * branch
            x = x + weights[f"{name}.layer_scale2.scale"] * mlp(norm(x, f"{name}.norm2"), name)
        x = torch.cat((weights["cls_token"][0], x))
        for index in range(config.num_class_attention_layers):
            name = f"class_attention_layers.{index}"
            branch = norm(x, f"{name}.norm1")
            branch = torch.cat((class_attention(branch, f"{name}.attention")[None], branch[1:]))
            x = norm(x + weights[f"{name}.layer_scale1.scale"] * branch, f"{name}.norm2")
            branch = torch.cat((weights[f"{name}.layer_scale2.scale"] * mlp(x[:1], name), x[1:]))
            x = x + branch
        feature = norm(x, "layernorm")[0]
        outputs["features"].append(feature)
        outputs["logits"].append(linear(feature, "classifier"))
        outputs["attentions"].append(torch.stack(memberships))
    return {name: torch.stack(values) for name, values in outputs.items()}


def vary_batch_norm(model: nn.Module) -> None:
    """Running statistics as training leaves them, not the mean 0 and variance 1 of a new model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)


@pytest.mark.parametrize(
    "patch_size, height, width, num_channels",
    [(8, 8, 8, 3), (8, 24, 56, 1), (8, 64, 32, 5), (16, 16, 16, 3), (16, 48, 32, 3), (16, 32, 80, 2)],
)
def test_forward_is_the_papers_in_float64(patch_size, height, width, num_channels):
    model = build(ToSTForImageClassification, tiny_config(patch_size=patch_size, num_channels=num_channels))
    vary_batch_norm(model)
    pixel_values = images(2, height, width, num_channels)
    with torch.no_grad():
        outputs = model(pixel_values, output_attentions=True)
        features = model.tost(pixel_values).pooler_output
    expected = forward_in_float64(model, pixel_values)
    assert_close(outputs.logits, expected["logits"])
    assert_close(features, expected["features"])
    assert_close(torch.stack(outputs.attentions, dim=1), expected["attentions"])


@pytest.mark.parametrize("height, width", [(1, 1), (3, 7), (14, 14), (40, 5)])
def test_position_code_in_float64(height, width):
    code = fourier_position_code(height, width)
    assert code.shape == (1, 64, height, width) and code.dtype == torch.float32
    # The angles reach 2π, so float32 rounds them by up to 2.4e-7.
    torch.testing.assert_close(code[0].double(), position_code(height, width), rtol=0, atol=1e-6)


def test_membership_is_shared_among_the_heads():
    model = build(ToSTModel, tiny_config())
    with torch.no_grad():
        attentions = model(images(3, 24, 40), output_attentions=True).attentions
    assert len(attentions) == 2
    for membership in attentions:
        assert membership.shape == (3, 4, 15) and membership.dtype == torch.float32
        assert_close(membership.sum(1), torch.ones(3, 15))
        # A test of nothing if every head had the same share.
        assert membership.std(1).min() > 1e-3


def test_hidden_states_are_the_residual_stream():
    model = build(ToSTModel, tiny_config())
    pixel_values = images(2)
    with torch.no_grad():
        outputs = model(pixel_values, output_hidden_states=True)
        patches = model.embeddings(pixel_values)
        assert_close(outputs.hidden_states[0], patches)
        for layer, hidden_states in zip(model.encoder.layers, outputs.hidden_states[1:], strict=True):
            patches = layer(patches)
            assert_close(hidden_states, patches)
    assert outputs.last_hidden_state.shape == (2, 17, 32)
    assert_close(outputs.last_hidden_state[:, 0], outputs.pooler_output)
    assert outputs.attentions is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_agree(implementation, tmp_path):
    model = build(ToSTForImageClassification, tiny_config())
    model.save_pretrained(tmp_path)
    other = AutoModelForImageClassification.from_pretrained(tmp_path, attn_implementation=implementation)
    with torch.no_grad():
        assert_close(
            other(images(2)).logits, forward_in_float64(model, images(2))["logits"].to(torch.float32), rtol=1e-5
        )
        assert len(other(images(2), output_attentions=True).attentions) == 2


def test_save_and_load_through_the_auto_classes(tmp_path):
    model = build(ToSTForImageClassification, tiny_config(num_labels=2, id2label={0: "cat", 1: "dog"}))
    vary_batch_norm(model)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is ToSTConfig and config.id2label == {0: "cat", 1: "dog"}
    with torch.no_grad():
        expected = model(images(2), output_hidden_states=True)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert type(loaded) is ToSTForImageClassification
        torch.testing.assert_close(loaded(images(2)).logits, expected.logits, rtol=1e-5, atol=1e-6)
        body = AutoModel.from_pretrained(tmp_path)
        assert type(body) is ToSTModel
        torch.testing.assert_close(
            body(images(2)).pooler_output, model.tost(images(2)).pooler_output, rtol=1e-5, atol=1e-6
        )


def test_backbone_gives_the_feature_maps_of_chosen_blocks(tmp_path, caplog):
    model = build(ToSTForImageClassification, tiny_config(num_hidden_layers=3))
    vary_batch_norm(model)
    model.save_pretrained(tmp_path)
    caplog.clear()
    backbone = ToSTBackbone.from_pretrained(tmp_path, out_features=["stem", "stage2"])
    assert backbone.channels == [32, 32]
    assert not caplog.records
    pixel_values = images(2, 24, 40)
    with torch.no_grad():
        hidden_states = model(pixel_values, output_hidden_states=True).hidden_states
        outputs = backbone(pixel_values)
    assert outputs.hidden_states is None
    for feature_map, index in zip(outputs.feature_maps, (0, 2), strict=True):
        assert feature_map.shape == (2, 32, 3, 5)
        for row in range(3):
            for column in range(5):
                assert torch.equal(feature_map[:, :, row, column], hidden_states[index][:, row * 5 + column])
    # AutoBackbone.from_pretrained takes no folders, of any model.
    last = AutoBackbone.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(last) is ToSTBackbone
    with torch.no_grad():
        outputs = last(pixel_values, output_hidden_states=True, output_attentions=True)
    assert last.out_features == ["stage3"]
    assert [len(value) for value in (outputs.feature_maps, outputs.hidden_states, outputs.attentions)] == [1, 4, 3]


def test_images_of_a_batch_do_not_meet():
    model = build(ToSTForImageClassification, tiny_config())
    pixel_values = images(4, 24, 40)
    with torch.no_grad():
        together = model(pixel_values).logits
        alone = torch.cat([model(image[None]).logits for image in pixel_values])
    assert_close(together, alone)


SEVERAL_LABELS = torch.tensor([[1, 0, 0, 1, 1]] * 3)


@pytest.mark.parametrize(
    "labels, problem_type, loss",
    [
        (torch.tensor([0, 4, 2]), None, lambda logits, y: F.cross_entropy(logits, y)),
        (torch.tensor([0, 4, 2], dtype=torch.uint8), None, lambda logits, y: F.cross_entropy(logits, y.long())),
        (torch.tensor([0, -100, 2]), None, lambda logits, y: F.cross_entropy(logits[[0, 2]], y[[0, 2]])),
        *(
            (SEVERAL_LABELS.to(dtype), None, lambda logits, y: F.binary_cross_entropy(logits.sigmoid(), y.float()))
            for dtype in (torch.float32, torch.float64, torch.int64, torch.bool)
        ),
        (torch.linspace(-1, 1, 15).view(3, 5), "regression", lambda logits, y: (logits - y).square().mean()),
        (torch.arange(15).view(3, 5), "regression", lambda logits, y: (logits - y).square().mean()),
    ],
)
def test_losses(labels, problem_type, loss):
    model = build(ToSTForImageClassification, tiny_config(problem_type=problem_type))
    outputs = model(images(3), labels=labels)
    assert outputs.loss.dtype == torch.float32
    assert_close(outputs.loss, loss(outputs.logits, labels))


def test_ignore_index():
    model = build(ToSTForImageClassification, tiny_config())
    outputs = model(images(3), labels=torch.tensor([-1, 4, 2]), ignore_index=-1)
    assert_close(outputs.loss, F.cross_entropy(outputs.logits[1:], torch.tensor([4, 2])))


def test_loss_of_a_large_error_in_half_precision():
    model = build(ToSTForImageClassification, tiny_config(problem_type="regression")).half()
    outputs = model(images(3), labels=torch.full((3, 5), 1000.0))
    assert outputs.logits.dtype == torch.float16
    assert_close(outputs.loss, (outputs.logits.float() - 1000).square().mean())


@pytest.mark.parametrize(
    "labels, problem_type, message",
    [
        (torch.tensor([0, 5, 2]), None, r"`labels` must be in \[0, 5\), or -100 to be ignored, got 5"),
        (torch.tensor([0, -1, 2]), None, r"`labels` must be in \[0, 5\), or -100 to be ignored, got -1"),
        (torch.tensor([0, 1]), None, r"`labels` must have the shape \[B\] = \[3\], got \[2\]"),
        (torch.tensor(1), None, r"`labels` must have the shape \[B\] = \[3\], got \[\]"),
        (torch.tensor([True, False, True]), None, "`labels` are indices of 5 classes .*torch.bool: .*`labels.long"),
        (torch.tensor([0.0, 1.0, 2.0]), None, "`labels` are indices of 5 classes .*torch.float32"),
        (torch.zeros(3, 4), "regression", r"\[B, num_labels\] = \[3, 5\], got \[3, 4\]"),
    ],
)
def test_wrong_labels_are_refused_with_the_numbers(labels, problem_type, message):
    model = build(ToSTForImageClassification, tiny_config(problem_type=problem_type))
    with pytest.raises(ValueError, match=message):
        model(images(3), labels=labels)


def test_training_learns_a_batch():
    model = ToSTForImageClassification(tiny_config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pixel_values, labels = images(10), torch.arange(10) % 5
    losses = []
    for _ in range(30):
        loss = model(pixel_values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("problem_type", ["regression", "multi_label_classification", "single_label_classification"])
def test_gradient_accumulation_is_a_larger_batch(problem_type, tmp_path):
    pixel_values, labels = images(8, 8, 8), torch.randint(2, (8, 5)).float()
    if problem_type == "single_label_classification":
        labels = torch.arange(8) % 5
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixel_values, labels, strict=True)]
    start = build(ToSTForImageClassification, tiny_config(problem_type=problem_type)).state_dict()
    updates = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model = build(ToSTForImageClassification, tiny_config(problem_type=problem_type))
        # Batch norm takes the statistics of the batch in training, whatever its size.
        model.tost.embeddings.patch_embeddings.train = lambda mode: None
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            max_steps=1,
            learning_rate=1e-2,
            max_grad_norm=0,
            optim="sgd",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
        )
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        updates.append({name: weight - start[name] for name, weight in model.state_dict().items()})
    assert updates[0]["classifier.weight"].abs().max() > 1e-4
    for name, update in updates[0].items():
        torch.testing.assert_close(updates[1][name], update, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = build(ToSTForImageClassification, tiny_config()).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model(images(2), labels=torch.tensor([1, 3]), output_attentions=True).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"])
def test_dropout_is_for_training_alone(rate):
    model = build(ToSTForImageClassification, tiny_config(**{rate: 0.5}))
    plain = build(ToSTForImageClassification, tiny_config())
    with torch.no_grad():
        assert torch.equal(model(images(4)).logits, plain(images(4)).logits)
        for module in (model, plain):
            # Batch statistics are no dropout.
            module.train().tost.embeddings.patch_embeddings.eval()
        assert not torch.equal(model(images(4)).logits, model(images(4)).logits)
        assert torch.equal(plain(images(4)).logits, plain(images(4)).logits)


def test_stochastic_depth_drops_branches_of_whole_images():
    layer_scale = ToSTLayerScale(tiny_config(layerscale_value=0.5), drop_path_rate=0.25).train()
    branch = torch.ones(4000, 3, 32)
    hidden_states = torch.zeros_like(branch)
    kept = layer_scale(hidden_states, branch)
    per_image = kept.flatten(1)
    assert torch.equal(per_image.amin(1), per_image.amax(1))
    assert per_image.unique().tolist() == pytest.approx([0, 0.5 / 0.75])
    # Five standard deviations of the mean of 4,000 draws.
    assert kept.mean().item() == pytest.approx(0.5, abs=5 * 0.5 * (0.25 / 0.75 / 4000) ** 0.5)
    assert torch.equal(layer_scale(hidden_states + 1, 0 * branch), hidden_states + 1)
    assert torch.equal(layer_scale.eval()(hidden_states, branch), 0.5 * branch)


def test_class_attention_is_never_dropped():
    model = ToSTModel(tiny_config(drop_path_rate=0.3))
    rates = {
        name: module.drop_path_rate for name, module in model.named_modules() if isinstance(module, ToSTLayerScale)
    }
    assert len(rates) == 8
    assert {rate for name, rate in rates.items() if "class_attention" in name} == {0.0}
    assert {rate for name, rate in rates.items() if "class_attention" not in name} == {0.3}


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_class_attention_by_hand(implementation, qkv_bias):
    config = tiny_config(qkv_bias=qkv_bias)
    config._attn_implementation = implementation
    attention = ToSTClassAttention(config).double()
    hidden_states = torch.randn(3, 17, 32, dtype=torch.float64)
    query, key, value = attention.qkv(hidden_states).split(32, dim=-1)
    heads = []
    for head in range(4):
        channels = slice(8 * head, 8 * head + 8)
        scores = query[:, :1, channels] @ key[..., channels].mT / 8**0.5
        heads.append(scores.softmax(-1) @ value[..., channels])
    expected = attention.o_proj(torch.cat(heads, dim=-1))
    assert expected.shape == (3, 1, 32)
    # The softmax of the eager attention is in float32.
    assert_close(attention(hidden_states), expected, rtol=1e-10 if implementation == "sdpa" else 1e-5)


def test_initial_weights_are_the_originals():
    model = ToSTForImageClassification(tiny_config(hidden_size=64, layerscale_value=1e-5))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.15), name
            assert not module.bias.any(), name
        elif isinstance(module, nn.Conv2d):
            # torch's default is uniform within 1 / sqrt(inputs).
            bound = module.weight[0].numel() ** -0.5
            assert 0.8 * bound < module.weight.abs().max() <= bound, name
        elif isinstance(module, ToSTLayerScale):
            assert torch.equal(module.scale, torch.full((64,), 1e-5)), name
    assert model.tost.cls_token.std().item() == pytest.approx(0.02, rel=0.4)
    for layer in model.tost.encoder.layers:
        assert torch.equal(layer.attention.temperature, torch.ones(4, 1))


def test_what_a_checkpoint_lacks_is_initialised(tmp_path):
    build(ToSTForImageClassification, tiny_config(layerscale_value=0.25)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lacking = (
        "temperature",
        "layer_scale1.scale",
        "cls_token",
        "running_var",
        "convolution.weight",
        "classifier.bias",
    )
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(lacking)}
    assert len(weights) - len(kept) == 2 + 4 + 1 + 3 + 3 + 1
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    state_dict = ToSTForImageClassification.from_pretrained(tmp_path).state_dict()
    for name, tensor in state_dict.items():
        if name in kept:
            assert torch.equal(tensor, kept[name]), name
        elif name.endswith(("temperature", "running_var")):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif name.endswith("scale"):
            assert torch.equal(tensor, torch.full_like(tensor, 0.25)), name
        elif name.endswith("classifier.bias"):
            assert not tensor.any()
        else:
            assert 0 < tensor.std() < 0.5, name


def test_half_precision_keeps_the_statistics_in_float32():
    model = build(ToSTForImageClassification, tiny_config())
    with torch.no_grad():
        expected = model(images(2)).logits
        outputs = model.to(torch.bfloat16)(images(2), output_attentions=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.attentions[0].dtype == torch.float32
    assert_close(outputs.logits, expected, rtol=0.05)


def test_compiles_into_one_graph():
    model = build(ToSTForImageClassification, tiny_config())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        for size in ((32, 32), (24, 40)):
            assert_close(compiled(images(2, *size)).logits, model(images(2, *size)).logits)


def test_wrong_images_are_refused_with_the_numbers():
    model = build(ToSTForImageClassification, tiny_config(num_channels=1))
    with pytest.raises(ValueError, match="have 3 channels, the model takes 1"):
        model(images(1))
    with pytest.raises(ValueError, match=r"36 x 32 .*patches of 8 x 8"):
        model(images(1, 36, 32, 1))
    with pytest.raises(ValueError, match=r"32 x 4 .*patches of 8 x 8"):
        model(images(1, 32, 4, 1))
    with pytest.raises(ValueError, match=r"\[B, channels, height, width\], got \[3, 32, 32\].*`pixel_values\[None\]`"):
        model(images(1)[0])


@pytest.mark.parametrize(
    "argument, message",
    [
        ({"hidden_act": "nope"}, "hidden_act .*got 'nope'"),
        ({"drop_path_rate": 2.0}, r"drop_path_rate .*\[0, 1\), got 2.0"),
        ({"patch_size": 14}, "patch_size must be 8 or 16 .*got 14"),
    ],
)
@pytest.mark.parametrize("model_class", [ToSTForImageClassification, ToSTBackbone])
def test_arguments_of_from_pretrained_are_checked(model_class, argument, message, tmp_path):
    ToSTForImageClassification(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        model_class.from_pretrained(tmp_path, **argument)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"patch_size": 14}, "patch_size must be 8 or 16 .*got 14"),
        ({"hidden_size": 30}, "hidden_size must be a multiple of 4, got 30"),
        ({"hidden_size": 36, "patch_size": 16}, "hidden_size must be a multiple of 8, got 36"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"image_size": (32, 20)}, r"image_size must be a multiple of patch_size 8, or two .*got \(32, 20\)"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate .*\[0, 1\), got 1.0"),
        ({"hidden_size": 32.5}, "'hidden_size' expected int"),
        ({"hidden_act": "nope"}, "hidden_act must be one of .*'relu'.*got 'nope'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 0, got -1"),
        ({"mlp_ratio": 0}, "mlp_ratio must leave at least one channel of 32, got 0"),
        ({"image_size": [32]}, r"two \(height, width\), got \[32\]"),
    ],
)
def test_wrong_configs_are_refused_with_the_numbers(values, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**values)


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours with some noise, so that a wrong filter or crop shows."""
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 4, height))
    waves = np.stack((np.sin(x * y), np.cos(x + y), np.sin(3 * x) * np.cos(2 * y)), axis=-1)
    noise = np.random.default_rng(0).normal(scale=0.2, size=waves.shape)
    return Image.fromarray((127.5 + 100 * (waves + noise).clip(-1.2, 1.2)).astype(np.uint8))


@pytest.mark.parametrize("width, height", [(300, 200), (90, 150), (64, 64)])
def test_image_processor_is_the_published_preprocessing(width, height, tmp_path):
    config = tiny_config(image_size=64)
    tost_image_processor(config).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    image = photo(width, height)
    pixel_values = processor(image, return_tensors="np")["pixel_values"]

    scale = 64 / min(width, height)
    resized = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = (resized.width - 64) // 2, (resized.height - 64) // 2
    pixels = np.asarray(resized.crop((left, top, left + 64, top + 64)), dtype=np.float64) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(pixel_values, expected.transpose(2, 0, 1)[None], atol=1e-5)


def test_image_processor_takes_rectangles_and_other_channels():
    processor = tost_image_processor(tiny_config(image_size=(32, 64)))
    assert processor(photo(300, 200), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 64)
    processor = tost_image_processor(tiny_config(num_channels=1))
    grey = processor(photo(50, 40).convert("L"), return_tensors="pt")["pixel_values"]
    assert grey.shape == (1, 1, 32, 32)
    assert processor.image_mean == pytest.approx([0.449]) and processor.image_std == pytest.approx([0.226])


def test_image_processor_loads_without_this_package(tmp_path):
    """Its class is one of transformers; `tests/hub/scripts/pull.py` loads one in a process that has no other."""
    tost_image_processor(tiny_config()).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor).__module__.startswith("transformers.")
    loaded = json.loads(processor.to_json_string())
    assert loaded["image_processor_type"] == "BitImageProcessor"
    assert loaded["size"] == {"shortest_edge": 32} and loaded["crop_size"] == {"height": 32, "width": 32}


def test_image_classification_pipeline(tmp_path):
    config = tiny_config(num_labels=3, id2label={0: "ant", 1: "bee", 2: "cat"})
    model = build(ToSTForImageClassification, config)
    model.save_pretrained(tmp_path)
    tost_image_processor(config).save_pretrained(tmp_path)
    result = pipeline("image-classification", model=str(tmp_path))(photo(90, 60))
    with torch.no_grad():
        logits = model(**tost_image_processor(config)(photo(90, 60), return_tensors="pt")).logits[0]
    expected = {config.id2label[index]: share for index, share in enumerate(logits.softmax(0).tolist())}
    assert {entry["label"]: pytest.approx(entry["score"], rel=1e-4) for entry in result} == expected
