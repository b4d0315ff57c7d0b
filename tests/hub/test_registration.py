"""What other libraries know of the classes by their names, from one copy of the code and from several."""

import importlib
import sys

import pytest
import torch
from checkpoints import auto_map, code_file, text_config
from peft import LoraConfig, get_peft_model
from peft.utils import constants
from testing import build, sumagg_config, tiny_config
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
)
from transformers import dynamic_module_utils as dynamic
from transformers.models.auto import modeling_auto

import modeling_sumagg
from modeling_sumagg import FAMILIES, SumAggConfig, SumAggForCausalLM, register_family
from modeling_sumagg.common.registration import register_class_names
from modeling_sumagg.configuration import TextConfig
from modeling_sumagg.decoder import DecoderPreTrainedModel
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
    modeling = code_file(tmp_path, "modeling_sumagg")
    older = modeling.read_text().replace("SumAggForCausalLM", "SumAggOlderForCausalLM")
    modeling.write_text(older.replace(".qkv_proj", ".inner_proj"))
    configuration = code_file(tmp_path, "configuration_sumagg")
    configuration.write_text(configuration.read_text().replace('"qkv_proj"', '"inner_proj"'))
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    older_class = dynamic.get_class_from_dynamic_module(f"{modeling.stem}.SumAggOlderForCausalLM", str(tmp_path))
    try:
        assert names["sumagg"] == "SumAggForCausalLM"
        assert {"SumAggForCausalLM", "SumAggOlderForCausalLM"} <= set(names.values())
        assert type(AutoConfig.from_pretrained(tmp_path)) is SumAggConfig
        assert type(AutoModelForCausalLM.from_config(sumagg_config())) is SumAggForCausalLM
        assert older_class.config_class is not SumAggConfig
        # Each copy adapts its own layers, in turn.
        for _ in range(2):
            assert "inner_proj" in adapted_layers(older_class(older_class.config_class(**text_config().to_dict())))
            assert "qkv_proj" in adapted_layers(SumAggForCausalLM(text_config()))
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


OWN_FAMILY = """
from modeling_sumagg.configuration.configuration_sumagg import SumAggConfig
from modeling_sumagg.models.modeling_sumagg import SumAggForCausalLM


class {name}Config(SumAggConfig):
    {model_type}


class {name}ForCausalLM(SumAggForCausalLM):
    config: {name}Config
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """Writes a module with a config and a model, and imports it; what it registers is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before, imported = dict(FAMILIES), []

    def write(name: str, model_type: str):
        (tmp_path / f"{name}.py").write_text(OWN_FAMILY.format(name=name.title(), model_type=model_type))
        imported.append(name)
        importlib.invalidate_caches()
        module = importlib.import_module(name)
        return getattr(module, f"{name.title()}Config"), {
            "AutoModelForCausalLM": getattr(module, f"{name.title()}ForCausalLM")
        }

    yield write
    for model_type in FAMILIES.keys() - before.keys():
        del FAMILIES[model_type]
        del CONFIG_MAPPING._extra_content[model_type]
    for name in imported:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ('model_type = "gpt2"', "'gpt2' of TakesConfig is that of transformers.*GPT2Config: give the class"),
        # Inherited, as its author forgot to give one.
        ("pass", "'sumagg' of TakesConfig is that of .*SumAggConfig: give the class a `model_type` of its own"),
        ('model_type = ""', "must be a name of letters"),
        ("model_type = None", "must be a name of letters"),
        ("""model_type = 'a"b'""", "must be a name of letters"),
        ("""model_type = 'x", {}); import os; f("y'""", "must be a name of letters"),
    ],
)
def test_a_family_takes_no_name_that_another_has(own_module, model_type, reason):
    with pytest.raises(ValueError, match=reason):
        register_family(*own_module("takes", model_type))
    assert FAMILIES["sumagg"].config_class is SumAggConfig
    assert type(AutoConfig.for_model("gpt2")) is GPT2Config and type(AutoConfig.for_model("sumagg")) is SumAggConfig


@pytest.mark.parametrize("targets", ["all-linear", ["in_proj", 3], ['a"b'], ["a\nb"]])
def test_modules_to_adapt_are_a_list_of_names(own_module, targets):
    with pytest.raises(ValueError, match=r"must be a list of .* such as \['in_proj', 'v_proj'\], got"):
        register_family(*own_module("named", 'model_type = "named"'), lora_target_modules=targets)
    assert "named" not in FAMILIES


def test_modules_to_adapt_need_a_config_that_can_tell_them():
    config_class = type("PlainConfig", (PreTrainedConfig,), {"model_type": "plain"})
    with pytest.raises(ValueError, match="is for configs that are derived from `TextConfig`, and PlainConfig is not"):
        register_family(config_class, {}, lora_target_modules=["in_proj"])


def test_who_registers_again_saves_what_was_registered_last(own_module, tmp_path, monkeypatch):
    config_class, models = own_module("first", 'model_type = "first"')
    register_family(config_class, models, lora_target_modules=["qkv_proj"])
    (tmp_path / "second.py").write_text(
        "from first import FirstForCausalLM\n\n\nclass SharperForCausalLM(FirstForCausalLM):\n    pass\n"
    )
    second = importlib.import_module("second")
    monkeypatch.setitem(sys.modules, "second", second)
    write_json = config_class.to_json_file
    for _ in range(3):
        register_family(config_class, {"AutoModelForCausalLM": second.SharperForCausalLM})
    # A save does no more than one after one registration.
    assert config_class.to_json_file is write_json
    model = AutoModelForCausalLM.from_config(config_class(**text_config().to_dict() | {"model_type": "first"}))
    assert type(model) is second.SharperForCausalLM and adapted_layers(model) == {"qkv_proj"}
    model.save_pretrained(tmp_path / "saved")
    named = auto_map(tmp_path / "saved")["AutoModelForCausalLM"]
    assert named == f"{code_file(tmp_path / 'saved', 'second').stem}.SharperForCausalLM"
    loaded = dynamic.get_class_from_dynamic_module(named, str(tmp_path / "saved"))
    assert loaded.__name__ == "SharperForCausalLM" and loaded is not second.SharperForCausalLM


def test_a_module_that_is_read_again_registers_again(own_module):
    register_family(*own_module("again", 'model_type = "again"'))
    module = importlib.reload(sys.modules["again"])
    register_family(module.AgainConfig, {"AutoModelForCausalLM": module.AgainForCausalLM})
    assert FAMILIES["again"].config_class is module.AgainConfig is type(AutoConfig.for_model("again"))


@pytest.mark.parametrize("layer_type", ["linear_attention", "conv", "full_attention", "sliding_attention"])
def test_a_layer_type_of_transformers_is_refused(layer_type):
    config_class = type(
        "ClobberConfig", (TextConfig,), {"recurrent_layer_types": (layer_type,), "model_type": "clobber"}
    )
    with pytest.raises(ValueError, match=f"`recurrent_layer_types` has '{layer_type}', a layer type of transformers"):
        type(
            "Clobber",
            (DecoderPreTrainedModel,),
            {"__annotations__": {"config": config_class}, "config_class": config_class},
        )
    llama = DynamicCache(config=LlamaConfig(num_hidden_layers=1))
    assert type(llama.layers[0]).__module__ == "transformers.cache_utils"
