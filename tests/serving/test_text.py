"""vLLM writes what `generate` writes, token for token, however it cuts, mixes, drops and shares the requests."""

import copy

import pytest
import torch


pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: `tests/serving/run`")

from modeling_sumagg.serving.layers import keeps_state
from modeling_sumagg.serving.states import StepBuilder
from serving.engines import KINDS, Engine, expected_text, make_model, random_prompts


pytestmark = pytest.mark.serving

LENGTH = 16  # tokens generated
# 32 prompts of 1 to 2,000 tokens, of which some fit into one chunk, and some end with one.
LENGTHS = [1, 1, 2, 3, 5, 8, 13, 21, 31, 32, 33, 63, 64, 65, 66, 100, 127, 128, 129, 130, 192, 193, 200, 256, 257, 300]
LENGTHS += [400, 512, 513, 700, 1000, 2000]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return make_model(kind)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts():
    prompts = random_prompts(LENGTHS)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    return [prompts[i] for i in order]


@pytest.fixture(scope="module")
def texts(model, prompts):
    texts = [expected_text(model, prompt, LENGTH) for prompt in prompts]
    # Texts of one token over and over would be the same whatever the state.
    assert len({token for text in texts for token in text}) > 30
    assert len({tuple(text) for text in texts}) > 20
    return texts


@pytest.fixture(scope="module")
def whole(folder):
    """An engine that reads most prompts in one step, without prefix caching."""
    engine = Engine(folder)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def chunked(folder, model):
    """An engine that reads 64 tokens a step, with prefix caching, and memory for few requests at a time."""
    engine = Engine(
        folder,
        max_num_batched_tokens=64,
        long_prefill_token_threshold=48,
        enable_prefix_caching=True,
        num_gpu_blocks_override=24 if attends(model) else 12,
    )
    yield engine
    engine.close()


def attends(model) -> bool:
    """Whether keys and values live in the engine's memory."""
    return not all(keeps_state(model.config, kind) for kind in model.config.layer_types)


def has_states(model) -> bool:
    return any(keeps_state(model.config, kind) for kind in model.config.layer_types)


def assert_same(model, prompts, found, expected, tie=1e-4, most=1):
    """The same texts; up to `most` may end in another way from two tokens on whose logits differ by less than `tie`."""
    different = 0
    for prompt, text, other in zip(prompts, found, expected, strict=True):
        first = next((i for i, (a, b) in enumerate(zip(text, other, strict=True)) if a != b), None)
        if first is not None:
            different += 1
            with torch.no_grad():
                logits = model(torch.tensor([prompt + other[:first]])).logits[0, -1].float()
            assert logits[other[first]] - logits[text[first]] < tie, f"{len(prompt)} tokens: {text}, not {other}"
    assert different <= most


def test_mixed_lengths(whole, model, prompts, texts):
    assert_same(model, prompts, whole.greedy(prompts, LENGTH), texts)


def test_chunks_of_64_tokens_and_preemption(chunked, model, prompts, texts):
    preempted = chunked.count("vllm:num_preemptions")
    assert_same(model, prompts, chunked.greedy(prompts, LENGTH), texts)
    assert chunked.count("vllm:num_preemptions") > preempted or not has_states(model)


def test_shared_prefixes_come_from_the_cache(chunked, model):
    prefix, *tails = random_prompts([300, 1, 20, 100], seed=1)
    prompts = [prefix, *[prefix[: 300 - i] + tail for i, tail in enumerate(tails)]]
    expected = [expected_text(model, prompt, LENGTH) for prompt in prompts]
    assert_same(model, prompts[:1], chunked.greedy(prompts[:1], LENGTH), expected[:1])
    hits = chunked.count("vllm:prefix_cache_hits")
    assert_same(model, prompts, chunked.greedy(prompts, LENGTH), expected)
    assert chunked.count("vllm:prefix_cache_hits") >= hits + 4 * 256


def test_samples_and_their_probabilities(whole, model):
    prompts = random_prompts([1, 40, 300], seed=2)
    first, second = (whole.sample(prompts, 12, n=3, temperature=1.0, seed=5, logprobs=0) for _ in range(2))
    for prompt, output, again in zip(prompts, first, second, strict=True):
        samples = [list(sample.token_ids) for sample in output.outputs]
        assert samples == [list(sample.token_ids) for sample in again.outputs]
        assert len({tuple(sample) for sample in samples}) == 3
        for sample in output.outputs:
            ids = list(sample.token_ids)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(dim=-1)[torch.arange(len(ids)), ids]
            found = torch.tensor([step[token].logprob for step, token in zip(sample.logprobs, ids, strict=True)])
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def empty_keys_and_values(worker) -> None:
    """The caches of attention, each a tensor; the states of a layer are a list, and stay as they are."""
    for cache in worker.model_runner.kv_caches:
        if isinstance(cache, torch.Tensor):
            cache.zero_()


@pytest.mark.parametrize("broken", ["nothing is carried on", "a slot is not emptied"])
def test_a_broken_state_is_seen(chunked, model, prompts, texts, broken, monkeypatch):
    if not has_states(model):
        pytest.skip("no decode states")
    build = StepBuilder.build

    def build_broken(self, *args, **kwargs):
        step = build(self, *args, **kwargs)
        step.restart = torch.full_like(step.restart, broken == "nothing is carried on")
        return step

    # What an earlier request left weighs most where few tokens have been added to it.
    shortest, longest = (65, 300) if broken == "nothing is carried on" else (1, 64)
    chosen = [i for i, prompt in enumerate(prompts) if shortest <= len(prompt) <= longest]
    some, expected = [prompts[i] for i in chosen], [texts[i] for i in chosen]
    monkeypatch.setattr(StepBuilder, "build", build_broken)
    chunked.llm.reset_prefix_cache()
    wrong = chunked.greedy(some, LENGTH)
    monkeypatch.undo()
    chunked.llm.reset_prefix_cache()
    # What was in a slot may have been no number, and then neither are keys and values; attention multiplies by 0 what is
    # left of them in the rest of a block.
    chunked.llm.collective_rpc(empty_keys_and_values)
    assert sum(a != b for a, b in zip(wrong, expected, strict=True)) > 1
    assert_same(model, some, chunked.greedy(some, LENGTH), expected)


def test_bfloat16_differs_at_near_ties_only(model, prompts, tmp_path):
    model = copy.deepcopy(model).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    some = [prompt for prompt in prompts if len(prompt) < 300][::3]
    engine = Engine(tmp_path, dtype="bfloat16")
    try:
        found = engine.greedy(some, LENGTH)
    finally:
        engine.close()
    expected = [expected_text(model, prompt, LENGTH) for prompt in some]
    assert_same(model, some, found, expected, tie=0.05, most=len(some) // 2)
