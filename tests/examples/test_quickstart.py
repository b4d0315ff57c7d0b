"""The quickstart: what it says of its model is so, and the model can do what it is for."""

import math
import re
from collections import Counter

import pytest
import torch
from running import Run, read_card, run_alone
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig


TEXT = "def add(first, second):\n    return first + second\n\n\n"
NUMBER = r"\s+([\d.,]+)"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Run:
    """With the check of its folder in a clean process."""
    folder = tmp_path_factory.mktemp("quickstart")
    (folder / "train.txt").write_text(TEXT * 60 + "naïve café\n" * 20, encoding="utf-8")
    (folder / "held_out.txt").write_text(TEXT * 12, encoding="utf-8")
    sizes = {"steps": 60, "context_length": 16, "vocab_size": 280, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_new_tokens": 8, "learning_rate": 1e-2}
    arguments = [item for name, value in sizes.items() for item in (f"--{name}", value)]
    files = ["--train_files", "train.txt", "--held_out_files", "held_out.txt", "--prompt", "def"]
    return run_alone("quickstart.py", folder, *arguments, *files)


def held_bytes(model, length: int) -> int:
    """The bytes of the decode state after so many tokens."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(length)[None] % model.config.vocab_size, past_key_values=cache)
    states = [layer.state if hasattr(layer, "state") else (layer.keys, layer.values) for layer in cache.layers]
    return sum(tensor.numel() * tensor.element_size() for state in states for tensor in state)


def test_the_model_beats_the_unigram_baseline_as_it_says(quickstart):
    folder, printed = quickstart
    # Everything again, from the folder, without the code of the script.
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert GenerationConfig.from_pretrained(folder).max_new_tokens == 8
    end = tokenizer.eos_token_id
    training = tokenizer((folder.parent / "train.txt").read_text(encoding="utf-8"))["input_ids"] + [end]
    training = training[: len(training) // 16 * 16]
    held_out = tokenizer(TEXT * 12)["input_ids"] + [end]
    blocks = torch.tensor(held_out[: len(held_out) // 16 * 16]).view(-1, 16)
    with torch.no_grad():
        log_probabilities = model(blocks).logits[:, :-1].double().log_softmax(-1)
    loss = -log_probabilities.gather(2, blocks[:, 1:, None]).mean().item()
    counts = Counter(training)
    predicted = blocks[:, 1:].flatten().tolist()
    total = len(training) + len(tokenizer)
    unigram = -sum(math.log((counts[token] + 1) / total) for token in predicted) / len(predicted)
    length = sum(len(tokenizer.decode([token]).encode()) for token in predicted if token != end)
    for name, nats in (("this model", loss), ("unigram frequencies", unigram)):
        per_token, per_byte = re.search(rf"{name}{NUMBER}{NUMBER}\n", printed).groups()
        assert float(per_token) == pytest.approx(math.exp(nats), rel=1e-3, abs=0.006)
        assert float(per_byte) == pytest.approx(math.exp(nats * len(predicted) / length), rel=1e-3, abs=6e-4)
    assert loss < unigram - 1
    assert "no better" not in printed

    state = int(re.search(r"one sequence: ([\d,]+) bytes, however long", printed).group(1).replace(",", ""))
    # From the first full window on.
    assert state == held_bytes(model, 256) == held_bytes(model, 1000)
    # Keys and values of two layers.
    assert f"hold {2 * 2 * 4 * 32:,} bytes a token" in printed
    assert "def" in printed.partition("The model writes, token by token drawn at random:")[2]
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    card = read_card(folder)
    for name, nats in (("**this model**", loss), ("unigram frequencies", unigram)):
        assert float(card.results[name][0]) == pytest.approx(math.exp(nats), rel=1e-3)
    assert card.data.eval_results[0].metric_value == pytest.approx(math.exp(loss), rel=1e-5)
    assert (card.training["data"], card.training["optimizer steps"]) == ("text files, 1 files", "60")
    assert (card.measured_on, card.num_examples) == ("1 other files", len(blocks))
    assert 'tokenizer("def", return_tensors="pt")' in card.text and not (folder / "training_args.bin").exists()


def test_the_model_has_no_limit_of_length_and_a_state_that_does_not_grow(quickstart):
    model = AutoModelForCausalLM.from_pretrained(quickstart.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(quickstart.folder)
    assert tokenizer.padding_side == "left" and tokenizer.model_max_length > 10**9
    inputs = tokenizer(["def", TEXT * 20], return_tensors="pt", padding=True)
    assert inputs["input_ids"].shape[1] > 200
    whole = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    alone = model.generate(**tokenizer(["def"], return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert torch.equal(whole[0, -5:], alone[0, -5:])

    assert held_bytes(model, 256) == held_bytes(model, 3000) > 0


def test_the_model_streams(quickstart):
    """As the message at the end of a refusal says, on the folder that the quickstart wrote."""
    (quickstart.folder.parent / "text.txt").write_text(TEXT * 30)
    streamed = run_alone(
        "stream_generation.py", quickstart.folder.parent, "--model", "out", "--input", "text.txt", "--state",
        "state.safetensors", "--report_every", 100, "--max_new_tokens", 4, output_dir="",
    )  # fmt: skip
    reports = [
        re.fullmatch(r"([\d,]+) tokens, perplexity [\d.]+, and on: .+", line) for line in streamed.printed.splitlines()
    ]
    counts = [int(report.group(1).replace(",", "")) for report in reports]
    tokenizer = AutoTokenizer.from_pretrained(quickstart.folder)
    assert counts[-1] == 1 + len(tokenizer(TEXT * 30)["input_ids"])
    # A report as soon as 100 tokens came, which are known a word at a time.
    assert len(counts) == counts[-1] // 100 + 1
    assert all(100 <= b - a < 110 for a, b in zip([1, *counts], counts[:-1], strict=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train_files", "train.txt"], "Give both --train_files and --held_out_files, or neither."),
        (["--train_files", "a.txt", "--held_out_files", "a.txt"], "No such file or directory: 'a.txt'"),
        (["--step", "3"], "'--step'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(error_of, arguments, message):
    assert message in error_of("quickstart.py", *arguments)


def test_too_little_text_is_refused(error_of, tmp_path):
    (tmp_path / "a.txt").write_text("a b")
    error = error_of("quickstart.py", "--train_files", "a.txt", "--held_out_files", "a.txt")
    assert "less than one --context_length of 256" in error
