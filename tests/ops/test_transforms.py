"""The operators under what acts on their operations: the transforms of `torch.func`, `torch.jit.trace` and ONNX."""

import pytest
import torch
from testing import assert_close
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_leaves

from modeling_sumagg.ops import (
    bidirectional_sum,
    causal_convolution,
    causal_mean,
    causal_sum,
    causal_token_statistics,
    sliding_window_attention,
    token_statistics,
)


LENGTH, SIZE, HEADS = 40, 6, 3


def shape_arguments(x, mask, documents):
    arguments = {}
    if mask is not None:
        arguments["attention_mask"] = mask.expand(x.shape[0], -1)
    if documents is not None:
        arguments["document_ids"] = documents.expand(x.shape[0], -1)
    return arguments


def to_heads(x):
    # ONNX would keep the length that `unflatten` saw.
    return x.reshape(x.shape[0], x.shape[1], HEADS, SIZE // HEADS).transpose(1, 2)


def plain(x, **arguments):
    return causal_sum(x, relu=True, scale=x.detach()[:1, :, 0].abs(), **arguments)


def decayed(x, **arguments):
    return causal_sum(x, log_decay=-x[..., :HEADS].abs(), scale=x[..., :HEADS].abs(), **arguments)


def mean(x, **arguments):
    return causal_mean(x, log_decay=-x[0, 0, :HEADS].abs(), weight=x[..., :HEADS].abs() + 0.1, **arguments)


def bidirectional(x, **arguments):
    return bidirectional_sum(x, scale=x.detach()[:1, :1, 0], **arguments)


def convolution(x, **arguments):
    return causal_convolution(x, weight=x[0, :4].T, bias=x[0, 0], **arguments)


def causal_statistics(x, **arguments):
    w = to_heads(x)
    return causal_token_statistics(w, x[0, 0, :HEADS].abs(), x[..., :HEADS].transpose(1, 2), **arguments)


def statistics(x, **arguments):
    arguments.pop("document_ids", None)
    return token_statistics(to_heads(x), x[0, 0, :HEADS].abs(), **arguments)


def sliding(x, **arguments):
    w = to_heads(x)
    return sliding_window_attention(w, w * 2, w * 3, sliding_window=7, scaling=0.5)


OPERATORS = [plain, decayed, mean, bidirectional, convolution, causal_statistics, statistics, sliding]


def loss(outputs):
    return sum(
        (output.double() * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum() for output in outputs
    )


@pytest.fixture(params=[False, True], ids=["", "packed"])
def tokens(request):
    """The mask and the documents of a row, or neither."""
    if not request.param:
        return None, None
    return (torch.arange(LENGTH) % 5 != 1)[None], (torch.arange(LENGTH) // 13)[None]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_of_each_sample(operator, tokens):
    x = torch.randn(3, LENGTH, SIZE, dtype=torch.float64)

    def loss_of_one(row):
        return loss(tree_leaves(operator(row[None], **shape_arguments(row[None], *tokens))))

    expected = []
    for row in x:
        leaf = row.clone().requires_grad_()
        expected.append(torch.autograd.grad(loss_of_one(leaf), leaf)[0])
    assert_close(grad(loss_of_one)(x[0]), expected[0], 1e-10)
    assert_close(vmap(grad(loss_of_one))(x), torch.stack(expected), 1e-10)


@pytest.mark.parametrize("operator", OPERATORS)
def test_batches_of_gradients(operator, tokens):
    x = torch.randn(2, LENGTH, SIZE, dtype=torch.float64, requires_grad=True)
    outputs = [t for t in tree_leaves(operator(x, **shape_arguments(x, *tokens))) if t.requires_grad]
    batch = [torch.randn(3, *t.shape, dtype=t.dtype) for t in outputs]
    (actual,) = torch.autograd.grad(outputs, x, batch, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        (expected,) = torch.autograd.grad(outputs, x, [grads[i] for grads in batch], retain_graph=True)
        assert_close(actual[i], expected, 1e-10)


# PyTorch's attention has no forward derivative on a CPU.
@pytest.mark.parametrize("operator", OPERATORS[:-1])
def test_directional_derivatives(operator, tokens):
    x, direction = torch.randn(2, 2, LENGTH, SIZE, dtype=torch.float64)

    def function(x):
        return loss(tree_leaves(operator(x, **shape_arguments(x, *tokens))))

    _, actual = jvp(function, (x,), (direction,))
    leaf = x.clone().requires_grad_()
    expected = (torch.autograd.grad(function(leaf), leaf)[0] * direction).sum()
    assert_close(actual, expected, 1e-9)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        assert_close(torch.autograd.forward_ad.unpack_dual(function(dual)).tangent, expected, 1e-9)


class Module(torch.nn.Module):
    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, x, mask, documents):
        outputs = tree_leaves(self.operator(x, **shape_arguments(x, mask, documents)))
        # What is not used is no input of an ONNX graph.
        return outputs[0] + 0 * mask.sum() * documents.sum(), *outputs[1:]


def draw(length):
    x = torch.randn(2, length, SIZE)
    return x, torch.arange(length).expand(2, -1) % 5 != 1, torch.arange(length).expand(2, -1) // 13


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_trace_serves_every_length(operator):
    module = Module(operator)
    traced = torch.jit.trace(module, draw(9), check_trace=False)
    for length in (9, 40, 150):
        inputs = draw(length)
        for actual, expected in zip(traced(*inputs), module(*inputs), strict=True):
            assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("operator", [plain, decayed, causal_statistics, statistics, sliding])
def test_onnx_by_tracing_serves_every_length(operator, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    module, names = Module(operator), ["x", "mask", "documents"]
    torch.onnx.export(
        module,
        draw(9),
        tmp_path / "model.onnx",
        dynamo=False,
        opset_version=17,
        input_names=names,
        dynamic_axes={name: {1: "length"} for name in names},
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for length in (9, 40, 150):
        inputs = draw(length)
        actual = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
        for result, expected in zip(actual, module(*inputs), strict=True):
            assert_close(torch.tensor(result), expected)
