"""The config: defaults, refusals, presets."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from testing import LAYER_TYPES, sumagg_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from modeling_sumagg import SumAggConfig
from modeling_sumagg.configuration import preset_path


def test_every_layer_sums_but_the_last_by_default():
    assert SumAggConfig(num_hidden_layers=3).layer_types == ["summation", "summation", "full_attention"]
    assert SumAggConfig(num_hidden_layers=1).layer_types == ["full_attention"]
    assert SumAggConfig(num_hidden_layers=0).layer_types == []


@pytest.mark.parametrize("layers", LAYER_TYPES)
def test_round_trip_through_a_file(layers, tmp_path):
    config = sumagg_config(layers, sum_normalization="mean", pooling="last", num_labels=7)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is SumAggConfig and loaded.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layer_types": ["sum"]}, r"`layer_types` may hold \['summation', .*got \['sum'\]"),
        ({"layer_types": ["summation"] * 3, "num_hidden_layers": 2}, "`num_hidden_layers` = 2 entries, got 3"),
        ({"num_attention_heads": 5}, "must divide `hidden_size`, got 5 heads for a width of 768"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1, got 0"),
        ({"vocab_size": 0}, "`vocab_size` must be at least 1, got 0"),
        ({"hidden_size": -1}, "`hidden_size` must be at least 1, got -1"),
        ({"num_hidden_layers": -1, "layer_types": []}, "-1"),
        ({"sliding_window": 0}, "`sliding_window` must be at least 1, got 0"),
        ({"hidden_dropout": 1.0}, r"`hidden_dropout` must be in \[0, 1\), got 1.0"),
        ({"hidden_size": 15, "num_attention_heads": 3, "position_embedding_type": "sinusoidal"}, "even .*got 15"),
        ({"position_embedding_type": "rotary"}, r"'position_embedding_type' expected one of \(.*got rotary"),
        ({"norm_position": "sandwich"}, r"'norm_position' expected one of \(.*got sandwich"),
        ({"sum_normalization": "max"}, r"'sum_normalization' expected one of \(.*got max"),
        ({"pooling": "max"}, r"'pooling' expected one of \(.*got max"),
        ({"hidden_size": "768"}, "hidden_size"),
        ({"layer_types": "summation"}, "layer_types"),
        ({"is_causal": "yes"}, "is_causal"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        SumAggConfig(**arguments)


def num_parameters(d, vocab, positions, mlp, sums, attentions, head):
    """The weights of a model by hand."""
    norms = 2 * 2 * d
    feed_forward = 2 * d * mlp + mlp + d
    blocks = sums * (3 * d * d + d) + attentions * (4 * d * d + 4 * d) + (sums + attentions) * (norms + feed_forward)
    return vocab * d + positions * d + blocks + (2 * d if sums + attentions else 0) + head


@pytest.mark.parametrize(
    "preset, auto_class, expected",
    [
        (
            "sumagg-published-lm",
            AutoModelForCausalLM,
            num_parameters(512, 50257, 256, 512, 3, 1, head=512 * 50257 + 50257),
        ),
        (
            "sumagg-published-classifier",
            AutoModelForSequenceClassification,
            num_parameters(256, 10000, 512, 0, 0, 0, head=256 * 256 + 2 * 256 + 2),
        ),
        ("sumagg-hybrid-small", AutoModelForCausalLM, num_parameters(768, 50257, 1024, 3072, 11, 1, head=0)),
    ],
)
def test_presets(preset, auto_class, expected):
    config = AutoConfig.from_pretrained(preset_path(preset))
    assert type(config) is SumAggConfig
    known = SumAggConfig().to_dict()
    with open(preset_path(preset)) as file:
        assert set(json.load(file)) <= set(known)
    with torch.device("meta"):
        model = auto_class.from_config(config)
    assert model.config.architectures == [type(model).__name__]
    assert model.num_parameters() == expected


def test_an_unknown_preset():
    with pytest.raises(ValueError, match="no preset 'sumagg-huge'.*sumagg-published-lm"):
        preset_path("sumagg-huge")


def test_importing_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import modeling_sumagg, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)
