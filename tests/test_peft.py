"""LoRA on every family: default layers, merging, saving and reloading, gradient checkpointing."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from testing import sumagg_config
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    set_seed,
)

from modeling_sumagg import SumAggConfig, SumAggSpeechConfig, ToSTConfig, ToSTTextConfig
from modeling_sumagg.models.families import FAMILIES


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
DOCUMENTS = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([1, 0])}
SUMAGG = SumAggConfig(vocab_size=20, **SIZES)
SPEECH = SumAggSpeechConfig(num_mel_bins=5, vocab_size=20, **SIZES, apply_spec_augment=False, mask_feature_length=5)
FRAMES = torch.linspace(-1, 1, 2 * 32 * 5).view(2, 32, 5).sin()
TOST_TEXT = ToSTTextConfig(vocab_size=20, layerscale_value=1.0, **SIZES)
TOST = ToSTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3)
CASES = {
    "sumagg language model": (AutoModelForCausalLM, SUMAGG, TEXT, None),
    "converted language model": (AutoModelForCausalLM, sumagg_config("converted"), TEXT, None),
    "sumagg classifier": (AutoModelForSequenceClassification, SUMAGG, DOCUMENTS, ["score", "pooler"]),
    "speech recogniser": (
        AutoModelForCTC,
        SPEECH,
        {"input_features": FRAMES, "labels": torch.tensor([[3, 4, 3], [5, -100, -100]])},
        ["lm_head"],
    ),
    "audio classifier": (
        AutoModelForAudioClassification,
        SPEECH,
        {"input_features": FRAMES, "labels": torch.tensor([1, 0])},
        ["score", "pooler"],
    ),
    "tost_text language model": (AutoModelForCausalLM, TOST_TEXT, TEXT, None),
    "tost_text classifier": (AutoModelForSequenceClassification, TOST_TEXT, DOCUMENTS, ["score"]),
    "tost classifier": (
        AutoModelForImageClassification,
        TOST,
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16), "labels": torch.tensor([2, 0])},
        ["classifier", "patch_embeddings"],
    ),
}


def train(model: torch.nn.Module, batch: dict[str, torch.Tensor], steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("case", CASES)
def test_adapters_train_save_reload_and_merge(case, tmp_path):
    auto_class, config, batch, modules_to_save = CASES[case]
    auto_class.from_config(config).save_pretrained(tmp_path / "base")
    base = auto_class.from_pretrained(tmp_path / "base")
    untouched = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(modules_to_save=modules_to_save)).train()
    adapted = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "lora_A" in name
    }
    assert adapted and adapted <= set(FAMILIES[config.model_type].lora_target_modules)
    if getattr(config, "attention_sum", False):
        assert {"q_proj", "v_proj", "sum_gate"} <= adapted
    losses = train(model, batch)
    assert losses[-1] < losses[0]
    for name, parameter in model.get_base_model().named_parameters():
        name = name.replace("base_layer.", "")
        if name in untouched:
            assert torch.equal(parameter, untouched[name]), name

    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        assert not torch.allclose(expected, auto_class.from_pretrained(tmp_path / "base").eval()(**batch).logits)
    model.save_pretrained(tmp_path / "adapters")
    reloaded = PeftModel.from_pretrained(auto_class.from_pretrained(tmp_path / "base"), tmp_path / "adapters").eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(**batch).logits, expected, rtol=1e-5, atol=1e-6)
    merged = reloaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    merged = auto_class.from_pretrained(tmp_path / "merged").eval()
    assert not any("lora" in name for name in merged.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["sumagg classifier", "tost_text classifier"])
def test_embeddings_can_be_adapted(case):
    auto_class, config, batch, _ = CASES[case]
    model = get_peft_model(auto_class.from_config(config), LoraConfig(target_modules=["embed_tokens"])).train()
    losses = train(model, batch)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_leaves_the_training_of_adapters_as_it_is(case, use_reentrant):
    auto_class, config, batch, modules_to_save = CASES[case]
    losses = []
    for checkpointing in (False, True):
        set_seed(0)
        base = auto_class.from_config(config)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model = get_peft_model(base, LoraConfig(modules_to_save=modules_to_save)).train()
        losses.append(train(model, batch))
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
