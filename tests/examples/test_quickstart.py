import math
import re
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import modeling_sumagg  # noqa: F401


TEXT = "def add(first, second):\n    return first + second\n\n\n"
NUMBER = r"\s+([\d.,]+)"


def test_quickstart_trains_saves_reloads_writes_and_beats_the_unigram_baseline(run_script, tmp_path, capsys):
    (tmp_path / "train.txt").write_text(TEXT * 60 + "naïve café\n" * 20, encoding="utf-8")
    (tmp_path / "held_out.txt").write_text(TEXT * 12, encoding="utf-8")
    sizes = {"steps": 60, "context_length": 16, "vocab_size": 280, "hidden_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_new_tokens": 8, "learning_rate": 1e-2}
    arguments = [item for name, value in sizes.items() for item in (f"--{name}", value)]
    folder = run_script(
        "quickstart.py",
        *arguments,
        "--train_files",
        "train.txt",
        "--held_out_files",
        "held_out.txt",
        "--prompt",
        "def",
    )
    printed = capsys.readouterr().out

    # Everything again, from the folder, without the code of the script.
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.layer_types == ["summation", "full_attention"]
    assert GenerationConfig.from_pretrained(folder).max_new_tokens == 8
    end = tokenizer.eos_token_id
    training = tokenizer((tmp_path / "train.txt").read_text(encoding="utf-8"))["input_ids"] + [end]
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

    # One float32 vector; keys and values of one layer, and of two, for 16 tokens.
    assert re.search(rf"this model{NUMBER}{NUMBER}{NUMBER}  at 16", printed).groups() == ("128", "4,096", "4,224")
    assert re.search(rf"every layer{NUMBER}{NUMBER}{NUMBER}  at 16", printed).groups() == ("0", "8,192", "8,192")
    assert "def" in printed.partition("The model writes:")[2]
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")


def test_quickstart_refuses_training_files_without_held_out_ones(run_script):
    with pytest.raises(ValueError, match="--train_files and --held_out_files"):
        run_script("quickstart.py", "--train_files", "train.txt")
