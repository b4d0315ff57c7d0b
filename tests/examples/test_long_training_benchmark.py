"""The benchmark of long training: its command writes what it says, whole and in chunks."""

import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def long_training(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
    import long_training

    return long_training


def test_the_command(long_training, tmp_path, monkeypatch):
    # Each row is a process.
    options = (
        "--lengths 32 70 --whole_up_to 50 --attention_up_to 50 --chunk_length 16 --hidden_size 16 --vocab_size 64"
    )
    options += " --repetitions 1 --memory False --device cpu --num_hidden_layers 2"
    models = ["SumAgg", "GPT-2", "SumAgg, in chunks"]
    command = ["long_training.py", "--output_dir", str(tmp_path), *options.split(), "--models", *models]
    monkeypatch.setattr(sys, "argv", command)
    long_training.main()
    rows = json.loads((tmp_path / "long_training.json").read_text())["rows"]
    expected = [*((name, 32) for name in models), ("SumAgg, in chunks", 70)]
    assert [(row["case"], row["size"]) for row in rows] == expected
    assert all(row["seconds"][0] > 0 and row["peak_bytes"] > 0 for row in rows)
    table = (tmp_path / "long_training.md").read_text()
    assert "| case | tokens | µs a token | to SumAgg at 32 |" in table
    assert (tmp_path / "long_training.png").read_bytes().startswith(b"\x89PNG")


def test_microseconds_a_token(long_training):
    rows = [long_training.Row("SumAgg", 10000, [2.0]), long_training.Row("SumAgg, in chunks", 20000, [6.0])]
    lines = long_training.table_of_tokens(rows).splitlines()
    assert lines[2:] == ["| SumAgg | 10,000 | 200.0 | 1.00 × |", "| SumAgg, in chunks | 20,000 | 300.0 | 1.50 × |"]


def test_unknown_cases(long_training, tmp_path):
    with pytest.raises(ValueError, match=r"`models` must be among .* got \['Llama'\]"):
        long_training.LongTrainingArguments(str(tmp_path), models=["Llama"])
