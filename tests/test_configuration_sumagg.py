"""The config: defaults, refusals, presets."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from testing import LAYER_TYPES, sumagg_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from modeling_sumagg import SumAggConfig, ToSTTextConfig
from modeling_sumagg.configuration import preset_path


def test_every_layer_sums_but_the_last_by_default():
    assert SumAggConfig(num_hidden_layers=3).layer_types == ["summation", "summation", "sliding_attention"]
    assert SumAggConfig(num_hidden_layers=1).layer_types == ["sliding_attention"]
    assert SumAggConfig(num_hidden_layers=0).layer_types == []


def test_sums_decay_unless_they_are_normalised_by_the_root_of_their_number():
    for given, (decay, normalization) in (
        ({}, ("input", "mean")),
        ({"sum_normalization": "sqrt"}, ("none", "sqrt")),
        ({"sum_normalization": "none"}, ("input", "none")),
        ({"sum_decay": "none"}, ("none", "sqrt")),
        ({"sum_decay": "learned"}, ("learned", "mean")),
    ):
        config = SumAggConfig(**given)
        assert (config.sum_decay, config.sum_normalization) == (decay, normalization)


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
        ({"sum_decay": "tokens"}, r"'sum_decay' expected one of \(.*got tokens"),
        (
            {"sum_decay_min": 0},
            "`sum_decay_min` must be at least 0.01 and not above `sum_decay_max`, got 0 and 256.0 tokens",
        ),
        ({"sum_decay_min": 4, "sum_decay_max": 2.0}, "got 4 and 2.0 tokens"),
        ({"num_sum_heads": 5}, "`num_sum_heads` must divide `hidden_size`, got 5 heads for a width of 768"),
        (
            {"sum_normalization": "sqrt", "sum_decay": "input"},
            "needs sums without decays, but `sum_decay` is 'input': choose 'mean' or 'none'",
        ),
        ({"conv_kernel_size": 1}, "`conv_kernel_size` must be at least 2, or None, got 1"),
        ({"conv_kernel_size": 4, "is_causal": False}, "`conv_kernel_size` = 4 is for causal models"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "{'default': .*'linear': .*got .*'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "the same for all attention layers"),
        (
            {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
            r"'linear': \['factor'\].*got .*'factor': 2.0",
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "got .*partial_rotary_factor"),
        ({"hidden_size": 15, "num_attention_heads": 3}, "even width of attention heads, got 15 / 3"),
    ],
)
def test_bad_values_are_refused(arguments, message):
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        SumAggConfig(**arguments)


def test_rotary_positions_are_in_the_form_of_transformers():
    default = {"rope_type": "default", "rope_theta": 10000.0}
    assert SumAggConfig().rope_parameters == default
    assert SumAggConfig(rope_theta=500.0).rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    assert SumAggConfig(rope_parameters=None).rope_parameters is None
    assert ToSTTextConfig().rope_parameters is None
    assert ToSTTextConfig(rope_theta=10000.0).rope_parameters == default
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    assert SumAggConfig(rope_parameters={"rope_type": "linear", "factor": 4.0}).rope_parameters == linear


@pytest.mark.parametrize("rope_parameters", [None, {"rope_type": "default", "rope_theta": 500.0}])
def test_no_rotary_positions_stay_none_in_a_file(rope_parameters, tmp_path):
    SumAggConfig(rope_parameters=rope_parameters).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope_parameters


def test_a_file_of_before_decays_means_what_it_meant(tmp_path):
    old = {"model_type": "sumagg", "hidden_size": 64, "num_attention_heads": 4, "sum_normalization": "sqrt"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.sum_decay, config.sum_gate, config.conv_kernel_size, config.rope_parameters) == (
        "none",
        False,
        None,
        None,
    )
    assert config.position_embedding_type == "learned" and config.max_position_embeddings == 1024
    assert not config.mlp_gate and config.intermediate_size == 256
    changed = AutoConfig.from_pretrained(tmp_path, sum_decay="input", sum_normalization="mean")
    assert changed.sum_decay == "input" and not changed.sum_gate and not changed.mlp_gate


def test_a_file_of_0_2_means_what_it_meant(tmp_path):
    SumAggConfig(hidden_size=64, num_attention_heads=4, sum_state_size=None).save_pretrained(tmp_path)
    old = json.loads((tmp_path / "config.json").read_text())
    for name in ("sum_state_size", "num_sum_key_heads"):
        del old[name]
    for layer_types in (old["layer_types"], None):
        old["layer_types"] = layer_types
        (tmp_path / "config.json").write_text(json.dumps(old))
        config = AutoConfig.from_pretrained(tmp_path)
        assert config.sum_state_size is None and config.layer_types == ["summation"] * 11 + ["full_attention"]
    assert AutoConfig.from_pretrained(tmp_path, sum_state_size=16).sum_state_size == 16


def test_sums_have_keys_by_default_where_they_can():
    config = SumAggConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=3)
    assert (config.sum_state_size, config.num_sum_key_heads) == (16, None)
    assert config.layer_types == ["summation", "summation", "sliding_attention"] and config.sliding_window == 256
    for options in ({"sum_decay": "none"}, {"sum_map": "relu"}, {"conv_before": "mixer"}):
        config = SumAggConfig(num_hidden_layers=3, **options)
        assert config.sum_state_size is None and config.layer_types[-1] == "full_attention"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sum_state_size": 0}, "`sum_state_size` must be at least 1, or None, got 0"),
        ({"num_sum_key_heads": 5}, "`num_sum_key_heads` must divide `num_sum_heads` = 12, got 5"),
        ({"sum_state_size": 8, "sum_decay": "none"}, "needs .*got .*'sum_decay': 'none'"),
    ],
)
def test_keys_that_cannot_be_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        SumAggConfig(**options)


def test_a_convolution_and_a_skip_come_together_by_default():
    options = [{}, {"is_causal": False}, {"conv_kernel_size": None}, {"conv_kernel_size": 2, "sum_skip": False}]
    found = [(config.conv_kernel_size, config.sum_skip) for config in (SumAggConfig(**each) for each in options)]
    assert found == [(4, True), (None, False), (None, False), (2, False)]


def test_gated_feed_forward_layers_have_as_many_parameters():
    plain, gated = SumAggConfig(mlp_gate=False), SumAggConfig()
    assert (plain.intermediate_size, gated.intermediate_size) == (3072, 2048)
    # Groups of 128 quantized weights, or of what divides a smaller width.
    for width, expected in ((2, 6), (64, 192), (96, 256), (512, 1408), (1024, 2688)):
        assert SumAggConfig(hidden_size=width, num_attention_heads=1).intermediate_size == expected
    assert SumAggConfig(intermediate_size=100).intermediate_size == 100


def num_parameters(d, vocab, positions, mlp, sums, attentions, head, mlp_maps=2):
    """The weights of a model by hand."""
    norms = 2 * 2 * d
    feed_forward = mlp_maps * d * mlp + (mlp_maps - 1) * mlp + d
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
        # With keys, gates, decays, skips, norms and convolutions in the mixers that sum, and gates in the feed-forward layers.
        *(
            (
                f"sumagg-{name}",
                AutoModelForCausalLM,
                num_parameters(
                    d, 50257, 0, mlp, sums, windows, sums * (2 * d * d + (16 + heads) * d + 2 * heads), mlp_maps=3
                ),
            )
            for name, d, mlp, sums, windows, heads in (
                ("small", 768, 1792, 11, 1, 12),
                ("hybrid-small", 768, 1792, 11, 1, 12),
                ("pure-small", 768, 1792, 12, 0, 12),
                ("medium", 1024, 2432, 23, 1, 16),
                ("large", 1280, 3008, 35, 1, 20),
            )
        ),
    ],
)
def test_presets(preset, auto_class, expected):
    config = AutoConfig.from_pretrained(preset_path(preset))
    assert type(config) is SumAggConfig
    known = {"architectures", "model_type", *(field.name for field in dataclasses.fields(SumAggConfig))}
    with open(preset_path(preset)) as file:
        assert set(json.load(file)) <= known
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


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_key_value_heads": 3}, "`num_key_value_heads` must divide `num_attention_heads` = 2, got 3"),
        ({"head_dim": 0}, "`head_dim` must be at least 1, got 0"),
        ({"head_dim": 5}, "even width of attention heads, got 5"),
        ({"attention_sinks": -1}, "`attention_sinks` must be at least 0"),
        ({"attention_sinks": 1, "is_causal": False}, "0 in a bidirectional model"),
        ({"attention_sum": True, "sum_decay": "none"}, "`attention_sum` is for causal models with a `sum_decay`"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ],
)
def test_the_parts_of_a_llama_are_checked(values, reason):
    with pytest.raises(Exception, match=reason):
        sumagg_config("sliding", **values)


def test_a_config_without_the_parts_of_a_llama_is_written_as_before():
    assert not {"num_key_value_heads", "head_dim"} & SumAggConfig().to_dict().keys()
