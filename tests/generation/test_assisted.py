"""Going back over tokens, and the decoding modes that need it: assisted decoding and prompt lookup."""

import copy
import pickle

import pytest
import torch
from scipy.stats import chi2
from transformers import (
    CompileConfig,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    set_seed,
)
from transformers.cache_utils import StaticLayer

from modeling_sumagg.common.compatibility import CACHE_NAME, find_cache

from .kinds import CONFIGS, KINDS, MAIN_KINDS, VOCAB_SIZE, build, greedy_alone, logits_alone, tiny_model


NEW_TOKENS = 12
PROMPT = (5, 9, 2, 30, 7, 7)


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCAB_SIZE, n_positions=128, n_embd=16, n_layer=2, n_head=2, eos_token_id=None)
    return build(GPT2LMHeadModel, config)


def smaller(model: PreTrainedModel) -> PreTrainedModel:
    """Another model of the family: other weights, another width, and the layers in another number."""
    config = copy.deepcopy(model.config)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 8, 16, 1
    config.layer_types = config.layer_types[-1:]
    return build(type(model), config, seed=1)


def all_state(cache: DynamicCache, real: torch.Tensor) -> list[torch.Tensor]:
    """Every tensor that a cache holds; of the keys and values of full attention, those of real tokens."""
    held = []
    for layer in cache.layers:
        if hasattr(layer, "state"):
            # Which columns of sliding attention are real is left out where all are.
            held += layer.state[:2] if "append_columns" in layer.states else layer.state
        else:
            held += [layer.keys.transpose(1, 2)[real], layer.values.transpose(1, 2)[real]]
    return held


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("removed", [0, 1, 3, 4, 7])
def test_crop_restores_the_state_after_any_recorded_token(kind, removed):
    model = tiny_model(kind, torch.float64)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([PROMPT, PROMPT[::-1]]), cache=cache)
        cache.activate_past_recording()
        # Over one segment or two of them, and padding counts as a token.
        new = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]])
        mask = torch.ones(2, 13, dtype=torch.long)
        mask[1, 10] = 0
        model(new[:, :4], attention_mask=mask[:, :10], cache=cache)
        model(new[:, 4:], attention_mask=mask, cache=cache)
        cache.crop(-removed)

        expected = DynamicCache(config=model.config)
        model(torch.tensor([PROMPT, PROMPT[::-1]]), cache=expected)
        for t in range(7 - removed):
            model(new[:, t : t + 1], attention_mask=mask[:, : 7 + t], cache=expected)
    assert cache.get_seq_length() == expected.get_seq_length() == 13 - removed
    real = mask[:, : 13 - removed].bool()
    for actual, state in zip(all_state(cache, real), all_state(expected, real), strict=True):
        torch.testing.assert_close(actual, state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_crop_beyond_the_record_is_an_error_and_never_a_wrong_state(kind):
    model = tiny_model(kind)
    cache = DynamicCache(config=model.config)
    model(torch.tensor([PROMPT]), cache=cache)
    with pytest.raises(ValueError, match="activate_past_recording"):
        copy.deepcopy(cache).crop(-1)
    cache.activate_past_recording()
    model(torch.tensor([[1, 2, 3]]), cache=cache)
    too_far = copy.deepcopy(cache)
    with pytest.raises(ValueError, match="3 were recorded"):
        too_far.crop(-4)
    # An attention layer before the one that refused has gone back already: the cache is of no use any more.
    if model.config.layer_types[0] == "full_attention":
        with pytest.raises(ValueError, match="halfway"):
            model(torch.tensor([[4]]), cache=too_far)
    else:
        assert too_far.get_seq_length() == 9
        logits = model(torch.tensor([[4]]), cache=too_far).logits[0, -1]
        torch.testing.assert_close(logits, logits_alone(model, [*PROMPT, 1, 2, 3, 4])[-1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(1)
    cache.crop(0)
    with pytest.raises(ValueError, match="0 were recorded"):
        cache.crop(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_filled_cache_is_refused_with_candidates_and_stays_as_it_was(kind):
    model = tiny_model(kind)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.tensor([PROMPT[:4]]), cache=cache)
    for helper in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": smaller(model)}, {"assistant_early_exit": 1}):
        with pytest.raises(ValueError, match="start from an empty cache, and this one has seen 4 tokens: leave"):
            model.generate(torch.tensor([PROMPT]), cache=cache, max_new_tokens=NEW_TOKENS, **helper)
    written = model.generate(torch.tensor([PROMPT]), cache=cache, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert written[0, len(PROMPT) :].tolist() == greedy_alone(model, PROMPT, NEW_TOKENS)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_recorded_in_ordinary_decoding(kind):
    model = tiny_model(kind)
    outputs = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )
    for layer, layer_type in zip(find_cache(outputs).layers, model.config.layer_types, strict=True):
        if layer_type == "sliding_attention":
            assert layer.keys.shape[-2] == model.config.sliding_window - 1 + model.config.attention_sinks
        elif layer_type != "full_attention":
            assert not layer.records
            sums = {name: state for name, state in layer.states.items() if name != "causal_convolution"}
            for name, state in sums.items():
                dtype = torch.float32 if name == "causal_keyed_sum" else torch.float64
                assert all(tensor.dtype == dtype for tensor in state)


@pytest.mark.skipif(
    not getattr(StaticLayer, "is_croppable", False), reason="transformers below 5.24 cannot crop its own"
)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_a_static_cache_goes_back_in_assisted_decoding_and_prompt_lookup(kind, compiled):
    model = tiny_model(kind)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "cache_implementation": "static"}
    if compiled:
        options["compile_config"] = CompileConfig(backend="aot_eager", fullgraph=True)
        options["compile_config"]._compile_all_devices = True
    expected = greedy_alone(model, PROMPT, NEW_TOKENS)
    for helper in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": smaller(model)}):
        assert model.generate(torch.tensor([PROMPT]), **options, **helper)[0, len(PROMPT) :].tolist() == expected


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}], ids=str)
@pytest.mark.parametrize("kind", MAIN_KINDS)
@torch.no_grad()
def test_a_cache_that_is_given_back_records_no_more(kind, options):
    model = tiny_model(kind)
    first = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **options
    )
    cache = find_cache(first)
    size = len(pickle.dumps(cache))
    history = first.sequences[0].tolist()
    for token in (*history[-1:], 6, 21, 6, 4, 4):
        logits = model(torch.tensor([[token]]), **{CACHE_NAME: cache}).logits
    expected = logits_alone(model, [*history, 6, 21, 6, 4, 4])[-1]
    torch.testing.assert_close(logits[0, -1], expected, rtol=1e-4, atol=1e-4)
    recurrent = [layer for layer in cache.layers if hasattr(layer, "records")]
    assert recurrent and not any(layer.records or layer.record_past for layer in recurrent)
    if len(recurrent) == len(cache.layers):
        assert len(pickle.dumps(cache)) < size + 100


class _Calls:
    """Counts the forward passes of a model."""

    def __init__(self, model: PreTrainedModel):
        self.count = 0
        self.handle = model.register_forward_hook(self._add)

    def _add(self, *args) -> None:
        self.count += 1


ASSISTANTS = {"itself": lambda model: model, "its copy": copy.deepcopy, "smaller": smaller, "gpt2": lambda _: gpt2()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("assistant", ASSISTANTS)
def test_assisted_decoding_is_greedy_decoding(kind, assistant):
    model = tiny_model(kind)
    assistant_model = ASSISTANTS[assistant](model)
    calls = _Calls(model)
    generated = model.generate(
        torch.tensor([PROMPT]), assistant_model=assistant_model, max_new_tokens=NEW_TOKENS, do_sample=False
    )
    calls.handle.remove()
    assert generated[0, len(PROMPT) :].tolist() == greedy_alone(model, PROMPT, NEW_TOKENS)
    if assistant == "its copy":
        # Every candidate is accepted: at least two tokens a call.
        assert calls.count <= NEW_TOKENS / 2


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_assistant_of_gpt2(kind):
    model = gpt2()
    generated = model.generate(
        torch.tensor([PROMPT]), assistant_model=tiny_model(kind), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    assert generated[0, len(PROMPT) :].tolist() == greedy_alone(model, PROMPT, NEW_TOKENS)


@pytest.mark.parametrize("kind", MAIN_KINDS)
@pytest.mark.parametrize("assistant", ["itself", "smaller"])
@pytest.mark.parametrize("mask", [[0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1, 0]], ids=str)
def test_assisted_decoding_of_a_padded_prompt(kind, assistant, mask):
    model = tiny_model(kind)
    generated = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.tensor([mask]),
        assistant_model=ASSISTANTS[assistant](model),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    prompt = tuple(token for token, real in zip(PROMPT, mask, strict=True) if real)
    assert generated[0, len(PROMPT) :].tolist() == greedy_alone(model, prompt, NEW_TOKENS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [[1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]], ids=str)
def test_prompt_lookup_is_greedy_decoding(kind, mask):
    model = tiny_model(kind)
    prompt = (4, 8, 15, 4, 8, 15, 4, 8, 15)
    generated = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.tensor([mask]),
        prompt_lookup_num_tokens=3,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    real = tuple(token for token, is_real in zip(prompt, mask, strict=True) if is_real)
    assert generated[0, len(prompt) :].tolist() == greedy_alone(model, real, NEW_TOKENS)


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_prompt_lookup_stops_at_eos(kind):
    model, prompt = tiny_model(kind), (4, 8, 15, 4, 8, 15, 4, 8, 15)
    expected = greedy_alone(model, prompt, NEW_TOKENS)
    eos_token_id = expected[-1]
    generated = model.generate(
        torch.tensor([prompt]),
        prompt_lookup_num_tokens=3,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=eos_token_id,
    )
    assert generated[0, len(prompt) :].tolist() == expected[: expected.index(eos_token_id) + 1]


@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_the_next_turn_after_assisted_decoding(kind):
    model = tiny_model(kind)
    first = model.generate(
        torch.tensor([PROMPT]),
        assistant_model=smaller(model),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
    )
    history = (*first.sequences[0].tolist(), 6, 21, 6)
    second = model.generate(
        torch.tensor([history]), cache=find_cache(first), max_new_tokens=NEW_TOKENS, do_sample=False
    )
    assert second[0, len(history) :].tolist() == greedy_alone(model, history, NEW_TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sumagg-hybrid", "tost-pure"])
def test_assisted_sampling_follows_the_speculative_rule(kind):
    # A small vocabulary, so that the joint distribution of two tokens can be counted.
    config = copy.deepcopy(CONFIGS[kind])
    config.vocab_size = 4
    model = build(type(tiny_model(kind)), config)
    assistant = build(type(model), config, seed=1)
    assistant.generation_config.num_assistant_tokens = 2
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    prompt, num_samples = [1, 2, 3], 400

    def probabilities(of: PreTrainedModel) -> torch.Tensor:
        first = logits_alone(of, prompt)[-1].softmax(-1)
        return torch.cat([first[t] * logits_alone(of, [*prompt, t])[-1].softmax(-1) for t in range(4)]).double()

    set_seed(0)
    counts = torch.zeros(16, dtype=torch.float64)
    for _ in range(num_samples):
        tokens = model.generate(
            torch.tensor([prompt]), assistant_model=assistant, max_new_tokens=4, do_sample=True, top_k=0
        )[0]
        counts[tokens[3] * 4 + tokens[4]] += 1

    def statistic(expected: torch.Tensor) -> float:
        return ((counts - num_samples * expected) ** 2 / (num_samples * expected)).sum().item()

    # Pearson's statistic of 16 cells: one in a million right samplers exceeds the limit, the draft's own distribution far.
    limit = chi2.ppf(1 - 1e-6, df=15)
    assert statistic(probabilities(model)) < limit
    assert statistic(probabilities(assistant)) > limit
