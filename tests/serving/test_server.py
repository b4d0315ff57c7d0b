"""A server as `examples/serve.md` starts it, asked by eight clients at once."""

import itertools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch


pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: `tests/serving/run`")

import openai
import psutil

from modeling_sumagg import SumAggConfig, SumAggForCausalLM
from serving.engines import ENVIRONMENT, byte_tokenizer, expected_text, random_prompts, randomized


pytestmark = pytest.mark.serving

CLIENTS, REQUESTS, LENGTH = 8, 200, 16
SERVER_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    # oneDNN keeps what it compiled for each shape of a matrix, by default of 1,024: GPT-2's memory grows as much by it.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16",
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = SumAggConfig(
        **sizes,
        layer_types=["summation", "summation", "sliding_attention"],
        sliding_window=32,
        position_embedding_type="sinusoidal",
        position_bias=0.0,
        tie_word_embeddings=False,
    )
    return randomized(SumAggForCausalLM(config))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """The address of a server and its process."""
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16", "--enable-prefix-caching"]
    # So few blocks that all have been written to before memory is measured.
    options += ["--num-gpu-blocks-override", "48"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "ours"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [*command, *options, "--port", str(port)],
            env={**os.environ, **ENVIRONMENT, **SERVER_ENVIRONMENT},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, process, folder / "log")
            yield address, process
        finally:
            process.terminate()
            process.wait(30)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def memory_of(process: subprocess.Popen) -> int:
    """Bytes that a process and those that it started have for themselves."""
    root = psutil.Process(process.pid)
    return sum(child.memory_full_info().uss for child in [root, *root.children(recursive=True)])


def test_200_requests_of_8_clients(server, model):
    address, process = server
    prompts = random_prompts([3 + i * 7 % 200 for i in range(40)], seed=3)
    prompts = [[token % 256 for token in prompt] for prompt in prompts]
    texts = [expected_text(model, prompt, LENGTH) for prompt in prompts]
    assert len({tuple(text) for text in texts}) > 30
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)

    def ask(i: int) -> list[int]:
        answer = client.completions.create(
            model="ours",
            prompt=prompts[i],
            max_tokens=LENGTH,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        return answer.choices[0].token_ids

    with ThreadPoolExecutor(CLIENTS) as pool:
        for _ in range(3):
            assert list(pool.map(ask, range(40))) == texts
        before = memory_of(process)
        asked = list(itertools.islice(itertools.cycle(range(40)), REQUESTS))
        answers = list(pool.map(ask, asked))
        after = memory_of(process)
    assert answers == [texts[i] for i in asked]
    assert after < 1.02 * before, f"{before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after"


def test_a_stream_is_the_text_in_pieces(server):
    address, _ = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)
    request = {"model": "ours", "prompt": "A sum has no", "max_tokens": LENGTH, "temperature": 0}
    whole = client.completions.create(**request).choices[0].text
    pieces = [piece.choices[0].text for piece in client.completions.create(**request, stream=True)]
    assert len(pieces) > 1 and "".join(pieces) == whole


def test_curl(server):
    """What `curl -d` sends."""
    address, _ = server
    body = {"model": "ours", "prompt": "A sum has no", "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        usage = json.load(answer)["usage"]
    assert usage["completion_tokens"] == 4
