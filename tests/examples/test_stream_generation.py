"""examples/stream_generation.py: chunks of any size, interruption and resumption, scores."""

import importlib.util
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import EXAMPLES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from modeling_sumagg import SumAggConfig, SumAggForCausalLM
from modeling_sumagg.streams import text_stream
from modeling_sumagg.streams.saved_states import cache_to_tensors


SCRIPT = EXAMPLES / "stream_generation.py"
TEXT = (
    "".join(
        f"Line {i}: the sum of {i} and {i + 1} is {2 * i + 1}; naïve 和 ∑ says  {'so' * (i % 4)}.\n" for i in range(60)
    )
    + "x" * 2500
    + " " * 2300
    + "the end"
)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("stream_generation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=["<|endoftext|>"]
    )
    bpe.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(folder)
    set_seed(0)
    config = SumAggConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        layer_types=["summation", "sliding_attention", "summation"],
        sliding_window=8,
        position_embedding_type="sinusoidal",
        initializer_range=0.3,
    )
    SumAggForCausalLM(config).save_pretrained(folder)
    return folder


def chunks(data: bytes, seed: int):
    """The data in chunks of 1 to 300 bytes, cut inside words and characters."""
    sizes = random.Random(seed)
    start = 0
    while start < len(data):
        size = sizes.choice([1, 2, 3, sizes.randint(4, 300)])
        yield data[start : start + size]
        start += size


def load(example, checkpoint):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    return example.TextStream(AutoModelForCausalLM.from_pretrained(checkpoint), tokenizer)


def test_the_state_does_not_depend_on_the_chunks(example, checkpoint):
    whole = load(example, checkpoint)
    whole.feed(TEXT.encode())
    whole.feed(b"", final=True)
    ids = [whole.tokenizer.bos_token_id, *whole.tokenizer(TEXT[: TEXT.index("xxxxxx")])["input_ids"]]
    split = load(example, checkpoint)
    seen = []
    tokenize = split._tokenize
    split._tokenize = lambda pieces: [seen.append(tokens := tokenize(pieces)), tokens][1]
    for chunk in chunks(TEXT.encode(), seed=0):
        split.feed(chunk)
        assert len(split.pending) <= text_stream.BLOCK_TOKENS
    split.feed(b"", final=True)
    # The tokens are those of the whole text, and the state is that of one chunk, to the last bit.
    tokens = [split.tokenizer.bos_token_id, *sum(seen, [])]
    assert tokens[: len(ids)] == ids
    assert split.tokenizer.decode(tokens[1:]) == TEXT
    assert (split.pending, split.loss, split.num_scored) == (whole.pending, whole.loss, whole.num_scored)
    for name, tensor in cache_to_tensors(whole.cache).items():
        assert torch.equal(tensor, cache_to_tensors(split.cache)[name]), name

    # The perplexity and the continuation are those of one forward pass over the whole text.
    with torch.no_grad():
        logits = whole.model(torch.tensor([tokens])).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:]))
    assert math.isclose(split.perplexity(), loss.exp().item(), rel_tol=1e-4)
    for _ in range(5):
        with torch.no_grad():
            tokens.append(whole.model(torch.tensor([tokens])).logits[0, -1].argmax().item())
    assert split.continuation(5, seed=0, do_sample=False) == tokens[-5:]
    assert split.continuation(5, seed=0, do_sample=True) == whole.continuation(5, seed=0, do_sample=True)


def test_a_saved_state_goes_on_as_if_nothing_had_happened(example, checkpoint, tmp_path):
    data = TEXT.encode()
    for cut in (0, 1, 700, data.index("和".encode()) + 1, len(data)):
        stream = load(example, checkpoint)
        stream.feed(data[:cut])
        stream.save(tmp_path / "state.safetensors")
        resumed = load(example, checkpoint)
        resumed.load(tmp_path / "state.safetensors")
        assert resumed.num_bytes == cut
        for one in (stream, resumed):
            one.feed(data[cut:])
            one.feed(b"", final=True)
        assert (stream.pending, stream.loss) == (resumed.pending, resumed.loss)
        assert stream.continuation(4, 0, do_sample=False) == resumed.continuation(4, 0, do_sample=False)


def start(checkpoint: Path, *arguments: object, **kwargs) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, "--model", checkpoint, "--max_new_tokens", "20", *arguments]
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


@pytest.mark.slow
def test_ctrl_c_saves_and_resume_gives_the_same_tokens(checkpoint, tmp_path):
    data = TEXT.encode()
    (tmp_path / "text.txt").write_bytes(data)
    uninterrupted = start(
        checkpoint, "--input", tmp_path / "text.txt", "--state", tmp_path / "a.safetensors", "--json"
    )
    expected, errors = uninterrupted.communicate(timeout=300)
    assert uninterrupted.returncode == 0, errors

    # A pipe that stays open: the process waits in the middle of a character for more.
    state, middle = tmp_path / "b.safetensors", data.index("和".encode()) + 1
    interrupted = start(checkpoint, "--state", state, "--chunk_bytes", "100", stdin=subprocess.PIPE)
    interrupted.stdin.write(data[:middle])
    interrupted.stdin.flush()
    # A report on demand shows that it has begun to read.
    reports = b""
    os.set_blocking(interrupted.stdout.fileno(), False)
    began = time.monotonic()
    while b"tokens" not in reports:
        assert interrupted.poll() is None and time.monotonic() - began < 300
        time.sleep(1)
        if _handles(interrupted.pid, signal.SIGUSR1):
            interrupted.send_signal(signal.SIGUSR1)
        reports += interrupted.stdout.read() or b""
    interrupted.send_signal(signal.SIGINT)
    interrupted.wait(timeout=60)
    assert interrupted.returncode == 130
    interrupted.stdin.close()

    resumed = start(checkpoint, "--state", state, "--resume", "--json", stdin=subprocess.PIPE)
    output, errors = resumed.communicate(data[middle:], timeout=300)
    assert resumed.returncode == 0, errors
    assert output == expected
    assert len(json.loads(expected.splitlines()[-1])["tokens"]) == 20


def _handles(pid: int, number: int) -> bool:
    """Whether a process has installed a handler for a signal (before that, SIGUSR1 would end it)."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1], 16)
    return bool(caught >> (number - 1) & 1)


def test_errors_of_users_are_one_line(error_of, checkpoint, tmp_path):
    script, state = "stream_generation.py", ["--state", "s.safetensors", "--input", "a.txt"]
    assert "'a.txt'" in error_of(script, "--model", checkpoint, *state, output_dir="").replace("PosixPath", "")
    (tmp_path / "a.txt").touch()
    assert "s.safetensors" in error_of(script, "--model", checkpoint, "--resume", *state, output_dir="")
    (tmp_path / "s.safetensors").write_bytes(b"no state")
    error_of(script, "--model", checkpoint, "--resume", *state, output_dir="")
