"""Two processes of tensor parallelism write what one writes."""

import pytest


pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: `tests/serving/run`")

from serving.engines import Engine, expected_text, make_model, random_prompts


pytestmark = pytest.mark.serving

KINDS = ["sums, as published", "decays, gates and convolutions", "token statistics, hybrid", "converted"]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    prompts = random_prompts([1, 2, 33, 65, 100, 200])
    engine = Engine(tmp_path, tensor_parallel_size=2, max_num_batched_tokens=64)
    try:
        found = engine.greedy(prompts, 12)
    finally:
        engine.close()
    assert found == [expected_text(model, prompt, 12) for prompt in prompts]
