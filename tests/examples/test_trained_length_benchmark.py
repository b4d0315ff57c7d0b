"""The benchmark of trained lengths: rows of several lengths with as many tokens, and perplexities by position."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def trained_length(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
    import learning
    import trained_length

    scale = learning.Scale(16, 2, 2, 300, 4, 2, 512, 512, 1024, (1e-3, 1e-2))
    monkeypatch.setitem(learning.SCALES, "cpu", scale)
    tokens = torch.arange(20_000, dtype=torch.int32) % 37
    texts = learning.Texts(tokens, tokens[:2000], 300)
    monkeypatch.setattr(trained_length, "load_data", lambda arguments: texts)
    monkeypatch.setattr(trained_length, "matched_sizes", lambda *arguments: {"intermediate_size": 16})
    return trained_length


def test_the_command(trained_length, tmp_path, monkeypatch):
    options = "--lengths 32 512 --first_steps 2 --steps 30 --tokens_per_step 512 --chunk_length 64 --held_out_rows 2"
    options += " --dtype float32 --learning_rate 1e-2"
    monkeypatch.setattr(sys, "argv", ["trained_length.py", "--output_dir", str(tmp_path), *options.split()])
    trained_length.main()
    perplexities = json.loads((tmp_path / "trained_length.json").read_text())["perplexity"]
    assert list(perplexities) == ["before", "rows of 32", "rows of 512"]
    assert list(perplexities["before"]) == ["all", "1-63", "64-127", "128-255", "256-511"]
    # The text repeats itself, so that both lengths learn it.
    assert (
        max(perplexities["rows of 32"]["all"], perplexities["rows of 512"]["all"]) < perplexities["before"]["all"] / 2
    )
    assert (tmp_path / "trained_length.png").read_bytes().startswith(b"\x89PNG")


def test_perplexities_are_those_of_the_whole_row(trained_length):
    arguments = trained_length.TrainedLengthArguments(lengths=[256], chunk_length=16, dtype="float32")
    sizes = {"intermediate_size": 16}
    model = trained_length.build_model("keyed-windows", trained_length.SCALES["cpu"], 300, 256, **sizes).eval()
    rows = torch.randint(300, (2, 150))
    found = trained_length.perplexity_by_position(arguments, model, rows)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            model(rows).logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none"
        )
    assert found["all"] == pytest.approx(math.exp(losses.mean().item()), rel=1e-5)
    assert found["64-127"] == pytest.approx(math.exp(losses[:, 63:127].mean().item()), rel=1e-5)
    assert found["128-149"] == pytest.approx(math.exp(losses[:, 127:].mean().item()), rel=1e-5)


def test_lengths_that_do_not_divide_a_step(trained_length):
    with pytest.raises(ValueError, match=r"`lengths` must divide the 65536 tokens of a step, got \[1000\]"):
        trained_length.TrainedLengthArguments(lengths=[1000])
