"""What other libraries know of the classes by their names, from one copy of the code and from several."""

import sys

import pytest
import torch
from checkpoints import text_config
from peft import LoraConfig, get_peft_model
from peft.utils import constants
from testing import build, sumagg_config, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import dynamic_module_utils as dynamic
from transformers.models.auto import modeling_auto

import modeling_sumagg
from modeling_sumagg import FAMILIES, SumAggConfig, SumAggForCausalLM
from modeling_sumagg.registration import register_class_names
from modeling_sumagg.training import decay_parameter_names


DEFAULTS = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


def adapted_layers(model) -> set[str]:
    adapted = get_peft_model(model, LoraConfig())
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_A" in name}


@pytest.mark.parametrize("model_type", ["sumagg", "sumagg_multimodal", "sumagg_speech", "tost", "tost_text"])
def test_peft_finds_the_layers_of_a_family_by_default(model_type, monkeypatch):
    monkeypatch.delitem(DEFAULTS, model_type, raising=False)
    family = FAMILIES[model_type]
    for model_class in family.models.values():
        layers = adapted_layers(model_class(tiny_config(model_class)))
        assert layers and layers <= set(family.lora_target_modules)


def test_peft_is_told_whenever_it_is_imported(monkeypatch):
    monkeypatch.delitem(DEFAULTS, "sumagg", raising=False)
    monkeypatch.delitem(sys.modules, "peft.utils.constants")
    config = sumagg_config()
    assert config.to_dict()["model_type"] == "sumagg" and "sumagg" not in DEFAULTS
    monkeypatch.setitem(sys.modules, "peft.utils.constants", constants)
    assert config.to_dict()["model_type"] == "sumagg" and "sumagg" in DEFAULTS


def test_a_checkpoints_code_leaves_the_installed_classes_as_they_are(tmp_path):
    build(SumAggForCausalLM, text_config()).save_pretrained(tmp_path)
    modeling = tmp_path / "modeling_sumagg.py"
    older = modeling.read_text().replace("SumAggForCausalLM", "SumAggOlderForCausalLM")
    modeling.write_text(older.replace(".hidden_proj", ".inner_proj"))
    configuration = tmp_path / "configuration_sumagg.py"
    configuration.write_text(configuration.read_text().replace('"hidden_proj"', '"inner_proj"'))
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    older_class = dynamic.get_class_from_dynamic_module("modeling_sumagg.SumAggOlderForCausalLM", str(tmp_path))
    try:
        assert names["sumagg"] == "SumAggForCausalLM"
        assert {"SumAggForCausalLM", "SumAggOlderForCausalLM"} <= set(names.values())
        assert type(AutoConfig.from_pretrained(tmp_path)) is SumAggConfig
        assert type(AutoModelForCausalLM.from_config(sumagg_config())) is SumAggForCausalLM
        assert older_class.config_class is not SumAggConfig
        # Each copy adapts its own layers, in turn.
        for _ in range(2):
            assert "inner_proj" in adapted_layers(older_class(older_class.config_class(**text_config().to_dict())))
            assert "hidden_proj" in adapted_layers(SumAggForCausalLM(text_config()))
    finally:
        names.pop("SumAggOlderForCausalLM")


def test_the_copy_that_registers_later_adds_no_second_entry():
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    before = dict(names)
    register_class_names("sumagg", {"AutoModelForCausalLM": SumAggForCausalLM})
    assert dict(names) == before


def test_the_records_name_what_is_there():
    """Every class that the package exports is in a record, and every name in a record is in a model."""
    exported = {cls for cls in vars(modeling_sumagg).values() if isinstance(cls, type)}
    recorded = {cls for family in FAMILIES.values() for cls in (family.config_class, *family.models.values())}
    assert {cls for cls in exported if cls.__name__.startswith(("SumAgg", "ToST"))} == recorded
    for family in FAMILIES.values():
        models = [model_class(tiny_config(model_class)) for model_class in family.models.values()]
        parameters = {name.rpartition(".")[2] for model in models for name, _ in model.named_parameters()}
        assert set(family.not_decayed) <= parameters
        for model in models:
            assert not {name.rpartition(".")[2] for name in decay_parameter_names(model)} & set(family.not_decayed)


def test_decay_leaves_out_biases_of_models_that_are_not_ours():
    model = torch.nn.ModuleDict({"linear": torch.nn.Linear(2, 3), "norm": torch.nn.LayerNorm(3)})
    assert decay_parameter_names(model) == ["linear.weight"]
