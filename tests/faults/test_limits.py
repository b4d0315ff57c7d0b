"""A model without a limit of length says so, and one with a limit names it."""

import pytest
import torch
from testing import sumagg_config, tost_text_config, word_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modeling_sumagg import SumAggForCausalLM, SumAggModel, ToSTForCausalLM, ToSTTextModel

from .kinds import UNLIMITED_SUMAGG, UNLIMITED_TOST


CONFIGS = {
    "sumagg-sinusoidal": (SumAggForCausalLM, sumagg_config, UNLIMITED_SUMAGG, None),
    "sumagg-none": (SumAggForCausalLM, sumagg_config, {"position_embedding_type": "none"}, None),
    "sumagg-learned": (SumAggForCausalLM, sumagg_config, {"position_embedding_type": "learned"}, 64),
    "tost-none": (ToSTForCausalLM, tost_text_config, UNLIMITED_TOST, None),
    # β is learned for each position.
    "tost-membership-bias": (ToSTForCausalLM, tost_text_config, {"position_embedding_type": "sinusoidal"}, 64),
    "tost-learned": (ToSTForCausalLM, tost_text_config, {"use_membership_bias": False}, 64),
}


def length_for_an_evaluation(config) -> int:
    """How lm-evaluation-harness finds the length at which it cuts."""
    for name in ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len", "seq_length"):
        if hasattr(config, name):
            return getattr(config, name)
    return 2048


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_names_the_limit_that_there_is(name, tmp_path):
    model_class, make_config, settings, limit = CONFIGS[name]
    model = model_class(make_config("sliding", **settings)).eval()
    model.save_pretrained(tmp_path)
    for config in (model.config, AutoConfig.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path).config):
        assert getattr(config, "max_position_embeddings", None) == limit
        assert ("max_position_embeddings" in config.to_dict()) == (limit is not None)
        assert length_for_an_evaluation(config) == (limit or 2048)
    ids = torch.ones(1, 65, dtype=torch.long)
    with torch.no_grad():
        if limit is None:
            assert model(ids.repeat(1, 50)).logits.isfinite().all()
        else:
            with pytest.raises(ValueError, match="65 tokens is too long .*`config.max_position_embeddings`"):
                model(ids)


def test_a_limit_given_to_an_unlimited_model_is_dropped():
    for make_config, settings in ((sumagg_config, UNLIMITED_SUMAGG), (tost_text_config, UNLIMITED_TOST)):
        assert not hasattr(make_config("pure", max_position_embeddings=32, **settings), "max_position_embeddings")


def test_a_limit_goes_and_comes_with_what_is_learned(tmp_path):
    SumAggForCausalLM(sumagg_config("pure")).save_pretrained(tmp_path / "learned")
    SumAggForCausalLM(sumagg_config("pure", **UNLIMITED_SUMAGG)).save_pretrained(tmp_path / "unlimited")
    unlimited = AutoModelForCausalLM.from_pretrained(tmp_path / "learned", position_embedding_type="sinusoidal")
    assert not hasattr(unlimited.config, "max_position_embeddings")
    limited = AutoModelForCausalLM.from_pretrained(
        tmp_path / "unlimited", position_embedding_type="learned", max_position_embeddings=32
    )
    assert limited.model.modulation.position_embeddings.weight.shape == (32, 16)


@pytest.mark.parametrize(
    "model",
    [
        lambda: SumAggModel(sumagg_config("pure", **UNLIMITED_SUMAGG)),
        lambda: ToSTTextModel(tost_text_config("pure", **UNLIMITED_TOST)),
    ],
)
def test_sentence_transformers_does_not_cut(model, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model().save_pretrained(tmp_path)
    word_tokenizer("right").save_pretrained(tmp_path)
    encoder = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    one, other = (encoder.encode(["w1 " * 1500 + word * 500]) for word in ("w2 ", "w3 "))
    assert abs(one - other).max() > 1e-4 * abs(one).max()
