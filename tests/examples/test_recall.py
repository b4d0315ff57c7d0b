"""The benchmark of associative recall: its rows by the published definition, its runs, and its report."""

import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def recall(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
    import recall

    return recall


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (64, 16), (256, 64)])
def test_rows_ask_for_the_value_of_every_key_once(recall, length, pairs):
    input_ids, labels = recall.recall_rows(40, length, pairs, torch.Generator().manual_seed(0))
    assert input_ids.shape == labels.shape == (40, length)
    distances = []
    for tokens, targets in zip(input_ids.tolist(), labels.tolist(), strict=True):
        given = dict(zip(tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
        assert len(given) == len(set(given.values())) == pairs
        assert 0 < min(given) and max(given) < 4096 <= min(given.values()) and max(given.values()) < 8192
        places = [place for place, target in enumerate(targets) if target != -100]
        assert sorted(tokens[place] for place in places) == sorted(given)
        assert all(targets[place] == given[tokens[place]] and place % 2 == 0 for place in places)
        distances += [place - 2 * pairs for place in places]
    # Near the pairs more often than by chance, and up to the end.
    assert min(distances) == 0 and max(distances) >= length - 2 * pairs - 8
    assert sum(distances) / len(distances) < 0.49 * (length - 2 * pairs) or pairs == 64
    # What is neither given nor asked for is noise.
    others = input_ids[:, 2 * pairs + 1 :: 2]
    assert others.unique().numel() > 0.5 * min(others.numel(), 8192)


def test_runs_are_lines_that_are_not_made_again(recall, tmp_path, monkeypatch, capsys):
    output = tmp_path / "recall.jsonl"
    arguments = ["--widths", "64", "--models", "llama", "keys-16", "--learning_rates", "1e-3", "3e-3"]
    arguments += ["--steps", "2", "--tokens_per_step", "256", "--output", str(output)]
    monkeypatch.setattr(recall, "EVALUATED", ((64, 4), (256, 64)))
    monkeypatch.setattr(sys, "argv", ["recall.py", *arguments])
    recall.main()
    lines = recall.read_lines(output)
    assert [(line["model"], line["learning_rate"]) for line in lines] == [
        (name, rate) for name in ("llama", "keys-16") for rate in (1e-3, 3e-3)
    ]
    state = {line["model"]: line["state_bytes"] for line in lines}
    # Keys and values of two layers; a matrix of 64 × 16 a layer, and the last 3 inputs of the convolution.
    assert state["llama"] == {"64": 2 * 2 * 64 * 64 * 4, "1024": 2 * 2 * 1024 * 64 * 4}
    assert state["keys-16"] == dict.fromkeys(("64", "1024"), 2 * 4 * (64 * 16 + 3 * (64 + 2 * 16)))
    monkeypatch.setattr(recall, "run", None)
    recall.main()
    table = capsys.readouterr().out
    assert "| sums with keys, N = 16 | 64 | 2 |" in table and output.with_suffix(".png").stat().st_size > 10_000
    monkeypatch.setattr(sys, "argv", ["recall.py", "--models", "gpt9"])
    with pytest.raises(SystemExit, match=r"no models \['gpt9'\]"):
        recall.main()
