"""`cache` and `past_key_values` are one argument and one output, on every supported version of transformers."""

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from accelerate.utils import convert_to_fp32
from peft import LoraConfig, get_peft_model
from testing import TEXT_CLASSES, build, cache_tensors, sumagg_config, tiny_config, tost_text_config, word_tokenizer
from torch.nn.parallel import scatter_gather
from torch.utils import _pytree as pytree
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments, pipeline
from transformers.utils import logging

from modeling_sumagg import SumAggForCausalLM, ToSTForCausalLM
from modeling_sumagg.common.compatibility import CACHE_NAME


NAMES = ["cache", "past_key_values"]
CAUSAL_CLASSES = [cls for cls in TEXT_CLASSES if not cls.__name__.endswith("ForMaskedLM")]
IDS = [[5, 9, 2, 30, 7, 7, 11, 4], [3, 4, 8, 15, 16, 23, 42, 1]]


@pytest.fixture(params=[SumAggForCausalLM, ToSTForCausalLM])
def model(request):
    return build(request.param, tiny_config(request.param))


@pytest.fixture
def input_ids():
    return torch.tensor(IDS)


@torch.no_grad()
def greedy_alone(model, row: list[int], num_tokens: int) -> list[int]:
    tokens = list(row)
    for _ in range(num_tokens):
        tokens.append(model(torch.tensor([tokens]), use_cache=False)[0][0, -1].argmax().item())
    return tokens


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("model_class", CAUSAL_CLASSES)
@torch.no_grad()
def test_both_names_fill_the_same_cache(model_class, static, input_ids):
    model = build(model_class, tiny_config(model_class))
    caches, results = [], []
    for name in NAMES:
        cache = StaticCache(config=model.config, max_cache_len=8) if static else DynamicCache(config=model.config)
        model(input_ids[:, :5], **{name: cache})
        results.append(model(input_ids[:, 5:], **{name: cache, "return_dict": False})[0])
        caches.append(cache)
    assert torch.equal(*results)
    assert [int(cache.get_seq_length()) for cache in caches] == [8, 8]
    for one, other in zip(*map(cache_tensors, caches), strict=True):
        assert torch.equal(one, other)
    if model_class.__name__.endswith(("ForCausalLM", "Model", "ForTokenClassification")):
        whole = model(input_ids, use_cache=False)[0]
        torch.testing.assert_close(results[0], whole[:, 5:], rtol=1e-4, atol=1e-5)


def test_one_cache_under_one_name(model, input_ids):
    cache = DynamicCache(config=model.config)
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="`cache` and `past_key_values`"):
            call(input_ids, cache=cache, past_key_values=DynamicCache(config=model.config))
    with torch.no_grad():
        assert model(input_ids, cache=None, past_key_values=cache)["cache"] is cache
    assert cache.get_seq_length() == 8


@torch.no_grad()
def test_outputs_have_both_names(model, input_ids):
    cache = DynamicCache(config=model.config)
    for module, first in ((model, "logits"), (model.model, "last_hidden_state")):
        outputs = module(input_ids, cache=cache)
        assert outputs.cache is outputs.past_key_values is cache
        for name in NAMES:
            assert name in outputs
            assert outputs[name] is outputs.get(name) is cache
        assert "kv_state" not in outputs and outputs.get("kv_state") is None
        assert list(outputs) == [first, CACHE_NAME]
        assert outputs.to_tuple()[1] is outputs[1] is cache
        assert module(input_ids[:, :1], cache=cache, return_dict=False)[1] is cache
        other = DynamicCache(config=model.config)
        outputs["cache"] = other
        assert outputs.past_key_values is outputs[1] is other
        outputs.cache = cache
        assert outputs["past_key_values"] is outputs[1] is cache
        without = module(input_ids, use_cache=False)
        assert without.cache is None and without.past_key_values is None and "cache" not in without


@torch.no_grad()
def test_outputs_are_pickled_copied_and_gathered(model, input_ids, monkeypatch):
    outputs = model(input_ids, cache=DynamicCache(config=model.config))
    token = torch.full((2, 1), 7)
    expected = model(token, cache=copy.deepcopy(outputs.cache)).logits
    for again in (pickle.loads(pickle.dumps(outputs)), copy.deepcopy(outputs), pytree.tree_map(lambda x: x, outputs)):
        assert type(again) is type(outputs)
        assert torch.equal(again.logits, outputs.logits)
        assert torch.equal(model(token, cache=copy.deepcopy(again.past_key_values)).logits, expected)
    half = copy.copy(outputs)
    half["logits"] = outputs.logits.bfloat16()
    assert convert_to_fp32(half).logits.dtype == torch.float32
    assert convert_to_fp32(half).cache is outputs.cache
    # As `DataParallel` puts the outputs of its replicas together, which it does on GPUs only.
    monkeypatch.setattr(scatter_gather.Gather, "apply", lambda device, dim, *tensors: torch.cat(tensors, dim))
    halves = [model(row[None], use_cache=False) for row in input_ids]
    torch.testing.assert_close(scatter_gather.gather(halves, "cpu").logits, outputs.logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_outputs_are_exported(model, input_ids):
    program = torch.export.export(model, (input_ids,), {"use_cache": False}, strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    outputs = torch.export.load(file).module()(input_ids, use_cache=False)
    assert type(outputs) is type(model(input_ids))
    torch.testing.assert_close(outputs.logits, model(input_ids).logits, rtol=1e-4, atol=1e-5)
    # Different classes are different types to a pytree.
    names = {pytree.treespec_dumps(pytree.tree_structure(module(input_ids))) for module in (model, model.model)}
    assert len(names) == 2


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_generate_goes_on_from_a_cache_of_either_name(model, name):
    cache = DynamicCache(config=model.config)
    model(torch.tensor([IDS[0][:5]]), cache=cache)
    outputs = model.generate(
        torch.tensor(IDS[:1]), **{name: cache}, max_new_tokens=4, do_sample=False, return_dict_in_generate=True
    )
    assert outputs.sequences[0].tolist() == greedy_alone(model, IDS[0], 4)
    assert outputs[CACHE_NAME] is outputs.past_key_values is cache


@pytest.fixture
def messages(caplog, monkeypatch):
    """All that transformers and the models say of caches, each message even if it was said before."""
    logging.get_logger().warning_once.cache_clear()
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    logging.set_verbosity_warning()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def said() -> list[str]:
            texts = [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in caught]
            return [text for text in texts if re.search(r"\b(cache|past_key_values|cache_params)\b", text)]

        yield said


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beam search": {"num_beams": 2, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 3},
    "static cache": {"cache_implementation": "static"},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "guidance": {"guidance_scale": 1.5},
    "all outputs": {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
}


@pytest.mark.parametrize("model_class", [SumAggForCausalLM, ToSTForCausalLM])
def test_nothing_is_said_of_caches_to_who_wrote_nothing_deprecated(model_class, messages, tmp_path):
    config = {SumAggForCausalLM: sumagg_config, ToSTForCausalLM: tost_text_config}[model_class]
    model = build(model_class, config("hybrid", pad_token_id=0, eos_token_id=1, max_position_embeddings=128))
    ids = torch.tensor(IDS[:1])
    for options in MODES.values():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, **options)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, assistant_model=copy.deepcopy(model))
    cache = DynamicCache(config=model.config)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, cache=cache)
    model(ids[:, :1], cache=cache).cache.crop(0)
    generate = pipeline("text-generation", model, tokenizer=word_tokenizer())
    generate(["w1 w2", "w3"], batch_size=2, max_new_tokens=3)

    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, eval_strategy="steps", eval_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig())
    for trained in (model, adapted):
        trainer = Trainer(trained, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        predictions = trainer.predict(rows).predictions
        # The logits, and no cache beside them.
        assert predictions.shape == (2, 8, model.config.vocab_size)
    adapted.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    assert messages() == []


def test_what_is_said_is_heard(model, messages):
    logging.get_logger("transformers.test").warning("`past_key_values` is deprecated")
    warnings.warn("`cache_params` is deprecated", FutureWarning, stacklevel=1)
    assert len(messages()) == 2
