"""Slips in the names of fields and of presets are refused, in every config; what transformers itself passes is not."""

import math
from dataclasses import fields

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from testing import MODEL_CLASSES, build, sumagg_config, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from modeling_sumagg import (
    SumAggConfig,
    SumAggForCausalLM,
    SumAggMultimodalConfig,
    SumAggSpeechConfig,
    ToSTConfig,
    ToSTTextConfig,
)
from modeling_sumagg.configuration import preset_path


CONFIGS = (SumAggConfig, SumAggMultimodalConfig, SumAggSpeechConfig, ToSTConfig, ToSTTextConfig)


def slips(name: str) -> list[str]:
    """A letter left out, and two exchanged."""
    middle = len(name) // 2
    return [
        name[:middle] + name[middle + 1 :],
        name[:middle] + name[middle + 1] + name[middle] + name[middle + 2 :],
    ]


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_slip_in_a_name_is_refused_wherever_a_config_is_made(config_class, tmp_path):
    tiny_config(next(cls for cls in MODEL_CLASSES if cls.config_class is config_class)).save_pretrained(tmp_path)
    for name in (
        "hidden_size",
        "initializer_range",
        "patch_size" if "ToSTC" in config_class.__name__ else "vocab_size",
    ):
        for slip in slips(name):
            assert slip != name
            message = f"{config_class.__name__} has no field '{slip}'. Did you mean '{name}'"
            with pytest.raises(ValueError, match=message):
                config_class(**{slip: 64})
            with pytest.raises(ValueError, match=message):
                AutoConfig.from_pretrained(tmp_path, **{slip: 64})


def test_presets_and_models_refuse_slips(tmp_path):
    with pytest.raises(ValueError, match="SumAggConfig has no field 'hiden_size'. Did you mean 'hidden_size'"):
        AutoConfig.from_pretrained(preset_path("sumagg-published-lm"), hiden_size=64)
    build(SumAggForCausalLM, sumagg_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Did you mean 'use_cache'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_cach=False)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_what_transformers_and_users_add_to_a_config_is_kept(config_class):
    special = PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES
    names = {
        *GenerationConfig().to_dict(),
        *special,
        "torch_dtype",
        "_commit_hash",
        "tie_encoder_decoder",
        "device_map",
    }
    config_class(**dict.fromkeys(names - set(config_class.__dataclass_fields__)), my_note="kept")
    config = config_class(my_note="kept")
    assert config.my_note == "kept"
    config_class.from_dict(config.to_dict(), **dict.fromkeys(special))
    # A file, or a whole config as a dict, may come from another version.
    later = {**config.to_dict(), "hiden_size": 3}
    assert config_class.from_dict(later).hiden_size == config_class(**later).hiden_size == 3


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_preset_is_no_field(config_class, tmp_path):
    message = rf"{config_class.__name__} has no field 'preset': `AutoConfig.from_pretrained\(preset_path"
    with pytest.raises(ValueError, match=message):
        config_class(preset="sumagg-small")
    tiny_config(next(cls for cls in MODEL_CLASSES if cls.config_class is config_class)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, preset="sumagg-small")


def test_the_name_of_a_preset_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = (
        r"'sumagg-published-lm' is a preset, an architecture without weights.*preset_path\('sumagg-published-lm'\)"
    )
    for cls in (SumAggConfig, SumAggForCausalLM):
        with pytest.raises(ValueError, match=message):
            cls.from_pretrained("sumagg-published-lm")
    with monkeypatch.context() as patch:
        # The Hub is not asked.
        patch.setattr("transformers.configuration_utils.cached_file", None)
        with pytest.raises(ValueError, match=message):
            SumAggConfig.from_pretrained("sumagg-published-lm")
    # A folder of this name is one of the user's.
    build(SumAggForCausalLM, sumagg_config()).save_pretrained("sumagg-published-lm")
    assert AutoModelForCausalLM.from_pretrained("sumagg-published-lm").config.hidden_size == 16
    assert SumAggForCausalLM.from_pretrained("sumagg-published-lm").config.hidden_size == 16


def float_fields(config_class) -> list[str]:
    """The fields that may hold a float, or a list of them."""
    return [field.name for field in fields(config_class) if "float" in str(field.type)]


@pytest.mark.parametrize("config_class", CONFIGS)
@settings(max_examples=40, derandomize=True, deadline=None)
@given(data=st.data())
def test_what_is_not_finite_is_refused_in_every_field(config_class, data):
    names = float_fields(config_class)
    assert {"initializer_range"} <= set(names) and len(names) >= 5
    name = data.draw(
        st.sampled_from([name for name in names if not name.startswith(("numeric_", "label_", "feature_"))])
    )
    value = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 10**400]))
    with pytest.raises(StrictDataclassError, match=f"`?{name}`?"):
        config_class(**{name: value})


def test_what_is_not_finite_is_refused_inside_of_a_field_and_after():
    for config_class, changes in (
        (SumAggConfig, {"rope_parameters": {"rope_type": "default", "rope_theta": math.inf}}),
        (SumAggMultimodalConfig, {"num_numeric_features": 1, "numeric_mean": [math.nan], "numeric_std": [1.0]}),
        (SumAggSpeechConfig, {"feature_mean": [math.inf] * 80, "feature_std": [1.0] * 80}),
    ):
        with pytest.raises(StrictDataclassError, match="must be finite"):
            config_class(**changes)
    # `from_pretrained(..., name=value)` sets attributes of configs that were valid.
    for model_class in MODEL_CLASSES:
        config = tiny_config(model_class)
        config.initializer_range = math.inf
        with pytest.raises((ValueError, StrictDataclassError), match="`initializer_range` must be finite, got inf"):
            model_class(config)


@pytest.mark.parametrize("config_class", [SumAggConfig, ToSTConfig, ToSTTextConfig])
@pytest.mark.parametrize(
    "changes", [{"layer_norm_eps": 0.0}, {"layer_norm_eps": -1.0}, {"initializer_range": -0.1}], ids=str
)
def test_what_would_make_nan_is_refused(config_class, changes):
    with pytest.raises(StrictDataclassError, match=f"{next(iter(changes))}`? must be (above|at least) 0"):
        config_class(**changes)
