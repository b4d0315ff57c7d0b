"""The next rename of the decode state in transformers, played: nothing is ever generated from a cache that got lost."""

import re
import types
from pathlib import Path

import pytest
import torch
import transformers
from testing import TEXT_CLASSES, build, sumagg_config, tiny_config
from transformers import DynamicCache, GenerationMixin
from transformers.generation import utils as generation_utils
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_sumagg import SumAggForCausalLM, SumAggModel, ToSTForCausalLM, ToSTTextModel
from modeling_sumagg.common import compatibility
from modeling_sumagg.common.compatibility import CACHE_NAME, NEWEST_TESTED_TRANSFORMERS
from modeling_sumagg.decoder import heads
from modeling_sumagg.decoder.generation import RecurrentGenerationMixin


PROMPT = [5, 9, 2, 30, 7, 7, 5, 9]
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beam search": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 3},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "assisted decoding": {"assistant_model": None},
}


@pytest.fixture
def renamed(monkeypatch):
    """transformers' generation with the decode state as `kv_state`, and outputs that answer to this name too."""
    source = re.sub(rf"\b{CACHE_NAME}\b", "kv_state", Path(generation_utils.__file__).read_text())
    module = types.ModuleType("transformers.generation.renamed")
    module.__package__ = "transformers.generation"
    exec(compile(source, "renamed generation/utils.py", "exec"), vars(module))
    for name, member in vars(module.GenerationMixin).items():
        if not name.startswith("__"):
            monkeypatch.setattr(GenerationMixin, name, member)

    def known(name):
        return CACHE_NAME if name == "kv_state" else name

    class Output(heads.CausalLMOutputWithPast):
        kv_state = property(lambda self: super().get(CACHE_NAME))

        def __contains__(self, name):
            return super().__contains__(known(name))

        def __getitem__(self, name):
            return super().__getitem__(known(name))

        def get(self, name, default=None):
            return super().get(known(name), default)

    monkeypatch.setattr(heads, "CausalLMOutputWithPast", Output)


@pytest.fixture
def unchecked(monkeypatch):
    """The models without what refuses a cache of an unknown name."""
    monkeypatch.setattr(compatibility, "refuse_unknown_caches", lambda arguments: None)


@pytest.fixture(params=[SumAggForCausalLM, ToSTForCausalLM])
def model(request):
    return build(request.param, tiny_config(request.param))


def generate(model, mode: str = "greedy") -> list[int]:
    options = MODES[mode]
    if "assistant_model" in options:
        options = {"assistant_model": build(type(model), model.config, seed=1)}
    return model.generate(torch.tensor([PROMPT]), max_new_tokens=6, pad_token_id=0, **options)[0].tolist()


@torch.no_grad()
def greedy_alone(model) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(6):
        tokens.append(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item())
    return tokens


@pytest.mark.parametrize("name", ["kv_state", "cache_params", "past_key_value"])
@pytest.mark.parametrize("model_class", TEXT_CLASSES)
def test_a_cache_under_an_unknown_name_is_refused(model_class, name):
    model = build(model_class, tiny_config(model_class))
    cache = DynamicCache(config=model.config)
    message = f"`{name}`.*{re.escape(transformers.__version__)}.*{re.escape(NEWEST_TESTED_TRANSFORMERS)}"
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([PROMPT]), **{name: cache})
    assert cache.get_seq_length() == 0
    # What is no cache may have any name.
    model(torch.tensor([PROMPT]), **{name: None})


def test_a_body_on_its_own_refuses_it_too():
    for model_class in (SumAggModel, ToSTTextModel):
        model = build(model_class, tiny_config(model_class))
        with pytest.raises(ValueError, match="`kv_state`"):
            model.forward(torch.tensor([PROMPT]), kv_state=DynamicCache(config=model.config))


@pytest.mark.parametrize("mode", MODES)
def test_the_forward_pass_catches_a_rename(model, mode, renamed):
    with pytest.raises(ValueError, match="A cache was passed as `kv_state`"):
        generate(model, mode)


@pytest.mark.parametrize("mode", MODES)
def test_generate_catches_a_rename_by_itself(model, mode, renamed, unchecked):
    # In candidates and chunks, what the lost cache leaves may be refused before: it cannot go back, and fits no mask.
    refused = "would be other text|Cannot remove . tokens|`attention_mask` must have the shape"
    with pytest.raises((RuntimeError, ValueError), match=refused):
        generate(model, mode)


def test_without_the_checks_there_would_be_other_text(renamed, unchecked, monkeypatch):
    for name in ("_prefill", "_update_model_kwargs_for_generation"):
        monkeypatch.delattr(RecurrentGenerationMixin, name)
    model = build(ToSTForCausalLM, tiny_config(ToSTForCausalLM, "pure"))
    try:
        assert generate(model) != greedy_alone(model)
    except ValueError as error:
        # Older transformers hand on a mask of ones, which is longer than what a lost cache leaves.
        assert "`attention_mask` must have the shape" in str(error)


def test_a_rename_that_reaches_no_cache_generates_as_ever(model, renamed):
    generated = model.generate(torch.tensor([PROMPT]), max_new_tokens=6, pad_token_id=0, use_cache=False)
    assert generated[0].tolist() == greedy_alone(model)


@pytest.mark.parametrize(("version", "expected"), [("5.17.0", 0), (NEWEST_TESTED_TRANSFORMERS, 0), ("5.99.0", 1)])
def test_one_warning_of_a_version_that_nobody_has_tested(version, expected, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    logging.get_logger().warning_once.cache_clear()
    with CaptureLogger(logging.get_logger(compatibility.__name__)) as log:
        for _ in range(2):
            SumAggForCausalLM(sumagg_config())
            ToSTTextModel(tiny_config(ToSTTextModel))
    assert log.out.count(f"This is transformers {version}.") == log.out.count(NEWEST_TESTED_TRANSFORMERS) == expected
