"""Slips in the names of fields and of presets are refused, in every config; what transformers itself passes is not."""

import pytest
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
