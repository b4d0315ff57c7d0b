"""Layers of single tokens, in blocks of tokens."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from testing import assert_close, build, sumagg_config, tiny_config, tiny_inputs, tost_text_config
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from modeling_sumagg import SumAggForCausalLM, ToSTForCausalLM, ToSTForImageClassification
from modeling_sumagg.ops import activated_linear, token_blocks, token_wise


ROWS = 4


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of `ROWS` tokens of 8 channels."""
    monkeypatch.setattr(token_blocks, "BLOCK_BYTES", ROWS * 8 * 4)


@pytest.fixture
def recomputed(monkeypatch):
    """Activations of any size are computed again in backward, in blocks of as many tokens as there are outputs."""
    monkeypatch.setattr(token_blocks, "RECOMPUTED_BYTES", 0)
    monkeypatch.setattr(token_blocks, "RECOMPUTED_BLOCK_BYTES", 0)


def _widths_and_sum(sizes: list[int]):
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sizes.append(x.shape[-2])
        return x.square() + y.sum(-1, keepdim=True)

    return function


@pytest.mark.parametrize(
    ("shape", "expected_sizes"),
    [((1, 8), [8]), ((1, 9), [4, 4, 1]), ((3, 4), [4, 4, 4]), ((5, 2), [4, 4, 2]), ((2, 0), [0])],
)
def test_blocks_hold_every_token_once(small_blocks, shape, expected_sizes):
    x, y = torch.randn(*shape, 8), torch.randn(*shape, 2)
    sizes: list[int] = []
    with torch.no_grad():
        output = token_wise(_widths_and_sum(sizes), x, y)
    assert sizes == expected_sizes
    torch.testing.assert_close(output, x * x + (y[..., :1] + y[..., 1:]), rtol=1e-6, atol=1e-6)


def test_another_dtype_and_a_view(small_blocks):
    x = torch.randn(8, 3, 8).transpose(0, 1)
    with torch.inference_mode():
        output = token_wise(lambda tokens: tokens.double() * 2, x)
    assert torch.equal(output, x.double() * 2)


def test_with_gradients_there_is_one_block(small_blocks):
    x, y = torch.randn(1, 32, 8, requires_grad=True), torch.randn(1, 32, 2)
    sizes: list[int] = []
    token_wise(_widths_and_sum(sizes), x, y).sum().backward()
    assert sizes == [32]
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_summation_model_in_blocks(small_blocks, norm_position):
    _compare_with_one_block(sumagg_config(norm_position=norm_position))


def test_token_statistics_model_in_blocks(small_blocks):
    _compare_with_one_block(tost_text_config())


def _compare_with_one_block(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    input_ids = torch.randint(config.vocab_size, (2, 24))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :5] = attention_mask[1, 20:] = 0
    expected = model(input_ids=input_ids, attention_mask=attention_mask)
    with torch.no_grad():
        output = model(input_ids=input_ids, attention_mask=attention_mask)
    torch.testing.assert_close(output.logits, expected.logits.detach(), rtol=1e-5, atol=1e-6)


def _kept_numels(function) -> list[int]:
    """The sizes of the tensors that `function` keeps for backward, each memory counted once."""
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return [tensor.numel() for tensor in kept.values()]


def _loss_and_gradients(x, act_fn, linear, function):
    x = x.clone().requires_grad_()
    loss = function(x.mul(1), act_fn, linear).float().square().sum()
    return loss, *torch.autograd.grad(loss, [x, *linear.parameters()])


def _plain(x, act_fn, linear):
    return linear(act_fn(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_the_activation_is_computed_again(recomputed, activation, bias, dtype):
    act_fn, linear = ACT2FN[activation], nn.Linear(24, 5, bias=bias, dtype=dtype)
    x = torch.randn(3, 7, 24, dtype=dtype)
    expected = _loss_and_gradients(x, act_fn, linear, _plain)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    for actual, wanted in zip(_loss_and_gradients(x, act_fn, linear, activated_linear), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)
    x.requires_grad_()
    assert sorted(_kept_numels(lambda: activated_linear(x, act_fn, linear)))[-2:] == [24 * 5, x.numel()]


def test_only_the_gradients_wanted(recomputed):
    act_fn, linear = nn.GELU(), nn.Linear(24, 5)
    x = torch.randn(3, 7, 24)
    activated_linear(x, act_fn, linear).sum().backward()
    assert x.grad is None and linear.weight.grad is not None
    frozen = nn.Linear(24, 5).requires_grad_(False)
    wanted, got = (x.clone().requires_grad_() for _ in range(2))
    frozen(act_fn(wanted)).sum().backward()
    activated_linear(got, act_fn, frozen).sum().backward()
    assert frozen.weight.grad is None
    torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-5, atol=1e-6)


def test_gradients_of_gradients(recomputed):
    linear = nn.Linear(6, 3, dtype=torch.float64)
    inputs = (torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True), linear.weight, linear.bias)

    def function(x, weight, bias):
        return activated_linear(x, nn.GELU(), linear)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_the_activation_is_computed_again_under_autocast(recomputed, activation):
    act_fn, linear = ACT2FN[activation], nn.Linear(24, 5)
    x = torch.randn(3, 7, 24, dtype=torch.bfloat16)
    results = []
    for function in (_plain, activated_linear):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = function(leaf.mul(1), act_fn, linear)
        assert output.dtype == torch.bfloat16
        results.append((output, *torch.autograd.grad(output.float().square().sum(), [leaf, *linear.parameters()])))
    for actual, wanted in zip(*results, strict=True):
        assert actual.dtype == wanted.dtype
        torch.testing.assert_close(actual.float(), wanted.float(), rtol=2e-2, atol=2e-2)


def _hooked(linear: nn.Linear, act_fn: nn.Module) -> nn.Linear:
    linear.register_forward_hook(lambda module, args, output: 2 * output)
    return linear


def _replaced(linear: nn.Linear, act_fn: nn.Module) -> nn.Linear:
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)
    return linear


def _adapted(linear: nn.Linear, act_fn: nn.Module) -> nn.Module:
    config = LoraConfig(target_modules=["0"], init_lora_weights=False)
    return inject_adapter_in_model(config, nn.Sequential(linear))[0]


def _hooked_activation(linear: nn.Linear, act_fn: nn.Module) -> nn.Linear:
    act_fn.register_forward_hook(lambda module, args, output: 2 * output)
    return linear


@pytest.mark.parametrize("change", [_hooked, _replaced, _adapted, _hooked_activation])
def test_what_acts_on_the_modules_acts_here(recomputed, change):
    act_fn, linear, x = nn.GELU(), nn.Linear(24, 5), torch.randn(3, 7, 24)
    before = linear(act_fn(x))
    linear = change(linear, act_fn)
    expected = linear(act_fn(x))
    assert (expected - before).abs().max() > 0.1
    assert torch.equal(activated_linear(x.requires_grad_(), act_fn, linear), expected)


def test_an_activation_with_parameters_gets_their_gradients(recomputed):
    act_fn = nn.PReLU()
    activated_linear(torch.randn(3, 7, 24), act_fn, nn.Linear(24, 5)).sum().backward()
    assert act_fn.weight.grad.abs() > 0


def test_function_transforms_and_compilers_get_the_formula(recomputed):
    act_fn, linear, x = nn.GELU(), nn.Linear(24, 5), torch.randn(3, 7, 24)

    def loss(x):
        return activated_linear(x, act_fn, linear).sum()

    (expected,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    per_sample = torch.func.vmap(torch.func.grad(loss))(x.detach()[:, None])[:, 0]
    torch.testing.assert_close(per_sample, expected, rtol=1e-5, atol=1e-6)
    tangent = torch.randn_like(x)
    _, change = torch.func.jvp(loss, (x.detach(),), (tangent,))
    torch.testing.assert_close(change, (expected * tangent).sum(), rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        change = forward_ad.unpack_dual(loss(forward_ad.make_dual(x.detach(), tangent))).tangent
    torch.testing.assert_close(change, (expected * tangent).sum(), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    on_meta = nn.Linear(24, 5, device="meta")
    assert activated_linear(torch.randn(3, 7, 24, device="meta", requires_grad=True), act_fn, on_meta).shape == (
        3,
        7,
        5,
    )


def test_operations_are_counted_as_those_of_the_formula(recomputed):
    model = nn.Sequential(nn.GELU(), nn.Linear(24, 5))
    counts = []
    for function in (_plain, activated_linear):
        x = torch.randn(3, 7, 24, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            function(x, *model).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 3 * 7 * 24 * 5


@pytest.mark.parametrize("model_class", [SumAggForCausalLM, ToSTForCausalLM, ToSTForImageClassification])
def test_models_keep_less_and_train_the_same(recomputed, monkeypatch, model_class):
    model = build(model_class, tiny_config(model_class)).train()
    inputs = tiny_inputs(model)
    inputs["labels"] = inputs.get("input_ids", torch.tensor([0, 1]))
    results = []
    for size, checkpointing in ((2**40, False), (0, False), (0, True)):
        monkeypatch.setattr(token_blocks, "RECOMPUTED_BYTES", size)
        other = copy.deepcopy(model)
        if checkpointing:
            other.gradient_checkpointing_enable()
        kept = sum(_kept_numels(lambda other=other: other(**inputs)))
        loss = other(**inputs).loss
        loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in other.parameters()])
        results.append((kept, loss.detach(), gradients))
    assert results[0][0] > results[1][0] > results[2][0]
    for _, loss, gradients in results[1:]:
        assert_close(loss, results[0][1])
        assert_close(gradients, results[0][2])
