"""vLLM writes what `generate` writes, token for token, however it cuts, mixes, drops and shares the requests."""

import pytest
import torch


pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: `tests/serving/run`")

from serving.engines import KINDS, Engine, expected_text, make_model, random_prompts

from modeling_sumagg.serving.states import StepBuilder


pytestmark = pytest.mark.serving

LENGTH = 24  # tokens generated
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
def chunked(folder):
    """An engine that takes 64 tokens a step, with prefix caching, and memory for few requests at a time."""
    engine = Engine(
        folder,
        max_num_batched_tokens=64,
        long_prefill_token_threshold=48,
        enable_prefix_caching=True,
        num_gpu_blocks_override=96,
    )
    yield engine
    engine.close()


def test_mixed_lengths(folder, prompts, texts):
    engine = Engine(folder)
    try:
        assert engine.greedy(prompts, LENGTH) == texts
    finally:
        engine.close()


def test_chunks_of_64_tokens_and_preemption(chunked, kind, prompts, texts):
    preempted = chunked.count("vllm:num_preemptions")
    assert chunked.greedy(prompts, LENGTH) == texts
    assert chunked.count("vllm:num_preemptions") > preempted
