"""The loss of the language models without their logits, beside the one with them."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from testing import assert_close, build, tiny_config
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from modeling_sumagg import SumAggForCausalLM, SumAggForMaskedLM, ToSTForCausalLM
from modeling_sumagg.decoder.heads import fused_language_model_loss


LANGUAGE_MODELS = [SumAggForCausalLM, SumAggForMaskedLM, ToSTForCausalLM]

pytestmark = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="PyTorch has no linear_cross_entropy")


def labelled_batch() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(61, (3, 40))
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(torch.rand(3, 40) < 0.3, -100)}


def fused_and_plain(model_class, **kwargs):
    """A model in training that fuses its loss, and the same one that does not."""
    plain = build(model_class, tiny_config(model_class, **kwargs)).train()
    fused = copy.deepcopy(plain)
    fused.config.fuse_linear_cross_entropy = True
    return fused, plain


@pytest.mark.parametrize("num_items", [None, 50, torch.tensor(50)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_loss_and_gradients_are_those_with_logits(model_class, tied, num_items):
    bias = {} if model_class is ToSTForCausalLM else {"lm_head_bias": True}
    fused, plain = fused_and_plain(model_class, tie_word_embeddings=tied, **bias)
    batch = labelled_batch()
    losses = []
    for model in (fused, plain):
        outputs = model(**batch, num_items_in_batch=num_items)
        outputs.loss.backward()
        losses.append(outputs.loss)
        assert (outputs.logits is None) == (model is fused)
    assert_close(*losses)
    # All together: the bias of the keys has no gradient but rounding.
    gradients = (torch.cat([parameter.grad.flatten() for parameter in model.parameters()]) for model in (fused, plain))
    assert_close(*gradients)
    # The logits are there without labels and in evaluation.
    assert fused(batch["input_ids"]).logits is not None
    assert_close(fused.eval()(**batch).logits, plain.eval()(**batch).logits)


def test_no_tensor_is_as_large_as_the_logits():
    shapes = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            shapes.extend(
                tensor.numel() for tensor in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(tensor)
            )
            return result

    fused, plain = fused_and_plain(SumAggForCausalLM, vocab_size=500)
    batch = labelled_batch()
    largest = []
    for model in (plain, fused):
        shapes.clear()
        with Recorder():
            model(**batch).loss.backward()
        largest.append(max(shapes))
    assert largest[0] >= 3 * 40 * 500 > largest[1]


def test_labels_shifted_by_the_caller():
    fused, plain = fused_and_plain(ToSTForCausalLM)
    batch = labelled_batch()
    shifted = torch.randint(61, (3, 40))
    assert_close(fused(**batch, shift_labels=shifted).loss, plain(**batch, shift_labels=shifted).loss)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_class", LANGUAGE_MODELS)
def test_a_batch_without_labels_has_zero_gradients(model_class, dtype, num_items):
    fused, _ = fused_and_plain(model_class)
    batch = labelled_batch()
    batch["labels"].fill_(-100)
    loss = fused.to(dtype)(**batch, num_items_in_batch=num_items).loss
    loss.backward()
    assert loss.item() == 0
    gradients = [parameter.grad for parameter in fused.parameters() if parameter.grad is not None]
    assert gradients and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    fused, plain = (model.to(dtype) for model in fused_and_plain(SumAggForCausalLM))
    batch = labelled_batch()
    losses = [model(**batch).loss for model in (fused, plain)]
    assert losses[0].dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(
        losses[0], losses[1].to(losses[0].dtype), rtol=1e-3 if dtype == torch.bfloat16 else 1e-6, atol=0
    )


def test_autocast():
    fused, plain = fused_and_plain(SumAggForCausalLM)
    batch = labelled_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = [model(**batch).loss for model in (fused, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)
    expected, actual = plain.lm_head.weight.grad, fused.lm_head.weight.grad
    assert (expected - actual).norm() < 0.02 * expected.norm()


def test_compiled():
    fused, plain = fused_and_plain(SumAggForCausalLM, sum_decay="none")
    batch = labelled_batch()
    fused.forward = torch.compile(fused.forward, backend="aot_eager")
    losses = [model(**batch).loss for model in (fused, plain)]
    for loss in losses:
        loss.backward()
    assert_close(*losses)
    assert_close(fused.lm_head.weight.grad, plain.lm_head.weight.grad)


def test_trainer_accumulates_to_the_same_weights(tmp_path):
    weights = []
    data = [{name: tensor[0] for name, tensor in labelled_batch().items()} for _ in range(8)]
    for model in fused_and_plain(SumAggForCausalLM):
        arguments = TrainingArguments(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            use_cpu=True,
            report_to=[],
        )
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        weights.append(model.lm_head.weight.detach())
    assert_close(*weights)


def test_an_output_layer_it_cannot_read_is_refused():
    fused, _ = fused_and_plain(SumAggForCausalLM, tie_word_embeddings=False)
    model = get_peft_model(fused, LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(ValueError, match=r"whole `nn.Linear` .*peft\S*\.Linear .*`fuse_linear_cross_entropy=False`"):
        model.train()(**labelled_batch())
    part = nn.Linear(4, 6)
    part.weight = nn.Parameter(part.weight[:3].detach())
    hooked = nn.Linear(4, 6)
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    for lm_head, reason in ((part, r"of shape \[3, 4\]:"), (hooked, r"of shape \[6, 4\] and hooks:")):
        with pytest.raises(ValueError, match=reason):
            fused_language_model_loss(torch.randn(1, 2, 4), lm_head, torch.zeros(1, 2).long(), predicts_next=True)


def test_a_pytorch_without_it_is_named(monkeypatch):
    fused, _ = fused_and_plain(SumAggForCausalLM)
    monkeypatch.delattr(F, "linear_cross_entropy")
    with pytest.raises(ValueError, match="update PyTorch, or set"):
        fused(**labelled_batch())
