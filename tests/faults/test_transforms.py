"""Transforms of `torch.func`, tracing, and both exporters to ONNX, where GPT-2 and Llama allow them."""

import onnxruntime
import pytest
import torch
from testing import assert_close
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, jvp, vmap

from .kinds import INPUTS, KINDS, logits, marked, tiny_model


def loss_of(model: nn.Module):
    """A loss as a function of the parameters and of one row `[T]` of ids, and of what else is given."""
    buffers = dict(model.named_buffers())

    def loss(parameters, ids, **others):
        others = {name: tensor[None] for name, tensor in others.items()}
        out = functional_call(model, (parameters, buffers), (), {"input_ids": ids[None], "use_cache": False, **others})
        return out.logits.square().mean()

    return loss


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("kind", marked(KINDS))
def test_gradients_of_each_sample(kind, inputs):
    model = tiny_model(kind).double()
    inputs = INPUTS[inputs]()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    loss = loss_of(model)
    names = list(inputs)

    def of_row(parameters, *row):
        return loss(parameters, row[0], **dict(zip(names[1:], row[1:], strict=True)))

    rows = [inputs[name] for name in names]
    each = vmap(grad(of_row), in_dims=(None, *[0] * len(rows)))(parameters, *rows)
    for row in range(2):
        model.zero_grad()
        model(
            **{name: inputs[name][row : row + 1] for name in names}, use_cache=False
        ).logits.square().mean().backward()
        alone = grad(of_row)(parameters, *[tensor[row] for tensor in rows])
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        largest = max(gradient.abs().max() for gradient in expected.values() if gradient is not None)
        for name, gradient in expected.items():
            gradient = torch.zeros(()) if gradient is None else gradient
            assert (each[name][row] - gradient).abs().max() <= 1e-10 * largest, name
            assert (alone[name] - gradient).abs().max() <= 1e-10 * largest, name


@pytest.mark.parametrize("kind", marked(KINDS))
def test_directional_derivatives(kind):
    model = tiny_model(kind).double()
    # The fused attention of PyTorch on a CPU has no forward derivative.
    model.set_attn_implementation("eager")
    ids = INPUTS["plain"]()["input_ids"][0]
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    direction = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    loss = loss_of(model)
    _, derivative = jvp(lambda p: loss(p, ids), (parameters,), (direction,))
    gradient = grad(loss)(parameters, ids)
    expected = sum((gradient[name] * direction[name]).sum() for name in parameters)
    assert derivative.item() == pytest.approx(expected.item(), rel=1e-8)


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@pytest.mark.parametrize("kind", marked(KINDS))
@torch.no_grad()
def test_traced_models_compute_the_same(kind):
    model = tiny_model(kind)
    example, inputs = INPUTS["padded"](), INPUTS["padded"]()
    inputs["attention_mask"] = inputs["attention_mask"].flip(0, 1)
    traced = torch.jit.trace(Logits(model), tuple(example.values()), check_trace=False)
    assert_close(traced(**inputs), logits(model, inputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", marked(KINDS))
@torch.no_grad()
def test_the_older_onnx_exporter(kind, tmp_path):
    model = tiny_model(kind)
    example, inputs = INPUTS["padded"](), INPUTS["padded"]()
    inputs["attention_mask"] = inputs["attention_mask"].flip(0, 1)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        Logits(model), tuple(example.values()), path, dynamo=False, opset_version=17, input_names=list(inputs)
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    assert_close(torch.from_numpy(actual), logits(model, inputs), rtol=1e-4)


@pytest.mark.parametrize("kind", marked(KINDS))
def test_gradients_in_batches(kind):
    """`torch.autograd`'s own batches of gradients, beside one gradient after another."""
    model = tiny_model(kind).double()
    model.set_attn_implementation("eager")
    inputs = INPUTS["padded"]()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()

    def last_logits(embeds):
        out = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], use_cache=False).logits
        return out.reshape(2, -1, out.shape[-1])[:, -1, :2]

    expected = jacobian(last_logits, embeds)
    assert_close(jacobian(last_logits, embeds, vectorize=True), expected, rtol=1e-10)
    leaf = embeds.clone().requires_grad_()
    directions = torch.randn(3, 2, 2, dtype=torch.double)
    batch = torch.autograd.grad(last_logits(leaf), leaf, directions, is_grads_batched=True)[0]
    assert_close(batch, torch.einsum("nbc,bcrtd->nrtd", directions, expected), rtol=1e-10)
