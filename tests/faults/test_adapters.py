"""Adapters on every kind of layer of every kind of text model: merged, saved and loaded again they compute the same."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from testing import assert_close, sumagg_config
from torch import nn
from transformers import AutoModelForSequenceClassification, set_seed

from modeling_sumagg import SumAggForCausalLM

from .kinds import INPUTS, KINDS, logits, marked, named_layers, tiny_model


ADAPTERS = {
    "LoRA": lambda names: LoraConfig(target_modules=names, init_lora_weights=False),
    "DoRA": lambda names: LoraConfig(target_modules=names, init_lora_weights=False, use_dora=True),
    "IA3": lambda names: IA3Config(target_modules=names, feedforward_modules=[], init_ia3_weights=False),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", marked(KINDS))
def test_each_layer_can_be_adapted(kind, adapter, tmp_path):
    model = tiny_model(kind, tie_word_embeddings=False)
    inputs = INPUTS["padded"]()
    plain = logits(model, inputs)
    # IA3 knows no embeddings.
    layers = named_layers(model, nn.Linear, *(() if adapter == "IA3" else (nn.Embedding,)))
    # One of each name, and of those of the same name the last, and all together.
    names = [*{name.rpartition(".")[2]: name for name, _ in layers}.values()]
    for targets in (*([name] for name in names), [name for name, _ in layers]):
        adapted = get_peft_model(copy.deepcopy(model), ADAPTERS[adapter](targets)).eval()
        expected = logits(adapted, inputs)
        assert (expected - plain).norm() > 1e-4 * plain.norm(), targets
        if len(targets) > 1:
            adapted.save_pretrained(tmp_path)
            assert_close(logits(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval(), inputs), expected)
        assert_close(logits(adapted.merge_and_unload(), inputs), expected, rtol=1e-4)


@pytest.mark.parametrize("kind", marked(KINDS))
def test_each_layer_of_a_model_with_adapters_is_trained(kind):
    model = tiny_model(kind, tie_word_embeddings=False)
    names = [name for name, _ in named_layers(model, nn.Linear, nn.Embedding)]
    adapted = get_peft_model(model, LoraConfig(target_modules=names, init_lora_weights=False)).train()
    adapted(**INPUTS["packed"]()).logits.square().sum().backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * len(names)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("pooling", ["sum", "mean", "last"])
def test_a_classifier_on_a_language_model_is_the_same_after_loading_its_adapter(pooling, tmp_path):
    SumAggForCausalLM(sumagg_config("hybrid")).save_pretrained(tmp_path / "base")
    ids = torch.randint(61, (8, 7))
    logits_of, configs = (
        [],
        (LoraConfig(task_type="SEQ_CLS"), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")),
    )
    for number, config in enumerate(configs):
        set_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, pooling=pooling)
        model = get_peft_model(model, config).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            model(ids, labels=torch.arange(8) % 3).loss.backward()
            optimizer.step()
        expected = logits(model.eval(), {"input_ids": ids})
        model.save_pretrained(tmp_path / str(number))
        # As in another process.
        set_seed(2)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, pooling=pooling)
        assert_close(
            logits(PeftModel.from_pretrained(model, tmp_path / str(number)).eval(), {"input_ids": ids}), expected
        )
        logits_of.append(expected)
    assert (logits_of[0] - logits_of[1]).norm() > 1e-3 * expected.norm()
