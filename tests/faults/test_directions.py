"""`is_causal` decides how a model is made: what would turn its attention layers alone is refused."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from testing import TEXT_CLASSES, build, speech_config, tiny_config, tost_text_config

from modeling_sumagg import SumAggForCTC, SumAggModel
from modeling_sumagg.decoder import Attention


@pytest.mark.parametrize("model_class", TEXT_CLASSES)
def test_the_argument(model_class):
    model, ids = build(model_class, tiny_config(model_class)), torch.randint(61, (2, 9))
    own = model.config.is_causal
    for inputs in ({}, {"labels": torch.tensor([0, 1])}):
        if inputs and model_class.__name__.endswith("Model"):
            continue
        if inputs and not model_class.__name__.endswith("ForSequenceClassification"):
            inputs = {"labels": torch.zeros(2, 9, dtype=torch.long)}
        expected = model(ids, **inputs)
        for is_causal in (own, None):
            actual = model(ids, is_causal=is_causal, **inputs)
            for name in ("last_hidden_state", "logits", "loss"):
                if name in expected:
                    torch.testing.assert_close(actual[name], expected[name])
        with pytest.raises(ValueError, match=f"`is_causal` is {not own}, and the layers .* made with {own}"):
            model(ids, is_causal=not own, **inputs)


@pytest.mark.parametrize("model_class", TEXT_CLASSES)
def test_a_config_that_is_changed_after(model_class):
    model = build(model_class, tiny_config(model_class))
    model.config = copy.deepcopy(model.config)
    base = getattr(model, "model", model)
    base.config = model.config
    model.config.is_causal = not model.config.is_causal
    with pytest.raises(ValueError, match="the layers of this model were made with"):
        model(torch.randint(61, (2, 9)))


def test_an_attribute_of_a_layer_cannot_be_set():
    model = build(SumAggModel, tiny_config(SumAggModel))
    for layer in model.modules():
        if isinstance(layer, Attention):
            with pytest.raises(AttributeError):
                layer.is_causal = False


def test_families_that_are_always_causal_and_speech():
    with pytest.raises(StrictDataclassError, match="models of type 'tost_text' are always causal"):
        tost_text_config(is_causal=False)
    with pytest.raises(ValueError, match="`is_causal` is False"):
        build(SumAggForCTC, speech_config())(torch.randn(1, 24, 5), is_causal=False)
