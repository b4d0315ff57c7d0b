"""Half precision: nothing is rounded before it is normalised, and what is rounded is rounded once."""

import pytest
import torch
from testing import sumagg_config, tost_text_config

from modeling_sumagg import SumAggConfig, SumAggForSequenceClassification, SumAggModel, ToSTTextModel

from .kinds import INPUTS, KINDS, assert_near, logits, marked, tiny_model


UNDECAYED = SumAggConfig.values_of_0_1
MIXERS = {
    "mean": {**UNDECAYED, "sum_normalization": "mean"},
    "sqrt": {**UNDECAYED, "sum_normalization": "sqrt"},
    "decayed": {"sum_decay_min": 100.0, "sum_decay_max": 10_000.0},
}
HALVES = {torch.float16: 2**-11, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_sums_over_many_tokens(is_causal, mixer, dtype):
    config = sumagg_config(
        "pure",
        **{**MIXERS[mixer], "is_causal": is_causal, "position_embedding_type": "sinusoidal"},
        initializer_range=0.5,
    )
    model = SumAggModel(config).eval()
    ids = torch.randint(61, (1, 8192))
    expected = model(ids, use_cache=False).last_hidden_state
    actual = model.to(dtype)(ids, use_cache=False).last_hidden_state
    assert actual.isfinite().all()
    # At the far end as at the near one.
    for part in (slice(0, 100), slice(8000, None)):
        assert_near(actual[:, part], expected[:, part], 8 * HALVES[dtype])


@pytest.mark.parametrize("how", ["autocast", "half"])
@torch.no_grad()
def test_the_mean_over_a_long_document_has_no_overflow(how):
    config = sumagg_config(
        "pure",
        is_causal=False,
        pooling="mean",
        num_labels=3,
        position_embedding_type="sinusoidal",
        initializer_range=0.5,
    )
    model = SumAggForSequenceClassification(config).eval()
    # A sum of 8192 terms of about 12 overflows float16.
    model.pooler.proj.weight.mul_(12)
    ids = torch.randint(61, (1, 8192))
    expected = model(ids).logits
    with torch.autocast("cpu", dtype=torch.float16, enabled=how == "autocast"):
        actual = (model if how == "autocast" else model.half())(ids).logits
    assert_near(actual, expected, 0.01)


@pytest.mark.parametrize("how", ["autocast", "parameters"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", marked(KINDS))
@torch.no_grad()
def test_each_kind_in_half_precision(kind, dtype, how):
    model = tiny_model(kind)
    inputs = {name: make() for name, make in INPUTS.items()}
    expected = {name: logits(model, inputs[name]) for name in INPUTS}
    if how == "parameters":
        model.to(dtype)
    for name in INPUTS:
        with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
            assert_near(logits(model, inputs[name]), expected[name], 12 * HALVES[dtype])


@pytest.mark.parametrize("family", ["sumagg", "tost"])
@torch.no_grad()
def test_positions_are_rounded_once(family):
    if family == "sumagg":
        model = SumAggModel(sumagg_config("pure", position_embedding_type="sinusoidal")).bfloat16()
    else:
        config = tost_text_config("pure", position_embedding_type="sinusoidal", use_membership_bias=False)
        model = ToSTTextModel(config).bfloat16()
    embeddings = torch.randn(1, 9, 16, dtype=torch.bfloat16)
    positions = torch.arange(10**6, 10**6 + 9)[None]
    angles = positions[..., None].double() / 10000 ** (torch.arange(0, 16, 2).double() / 16)
    code = torch.cat([angles.sin(), angles.cos()], dim=-1)
    exact = embeddings.double() * (code + 2) if family == "sumagg" else embeddings.double() + code
    actual = model.add_positions(embeddings, positions)
    # Half a unit in the last place, and the float32 arithmetic before it.
    assert ((actual.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01 + 1e-6).all()
