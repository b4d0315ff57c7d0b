"""Runs the scripts of `examples/` as the command line does, in this process: importing torch again takes longest."""

import csv
import json
import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = {"cat": ["meow", "purr", "claw", "fish"], "dog": ["bark", "woof", "paw", "bone"]}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
FAMILIES = {
    "sumagg": {**TINY, "model_type": "sumagg", "layer_types": ["summation", "full_attention"]},
    "tost_text": {**TINY, "model_type": "tost_text"},
}


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture
def run_script(tmp_path, monkeypatch) -> Callable[..., Path]:
    """`run_script("run_clm.py", "--max_steps", 3)` runs it in an empty folder and returns its output folder."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: object, output_dir: str = "out") -> Path:
        command = [name, *map(str, arguments), "--output_dir", str(tmp_path / output_dir)]
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return tmp_path / output_dir

    return run


@pytest.fixture
def csv_files(tmp_path) -> list[str]:
    """`--train_file` and `--validation_file`, texts of two vocabularies, one text of each file empty."""
    draw = random.Random(0)
    arguments = []
    for split, rows in (("train", 60), ("validation", 20)):
        path = tmp_path / f"{split}.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", f"only in {split}"])
            for row in range(rows):
                label = draw.choice(sorted(WORDS))
                text = " ".join(draw.choices(WORDS[label], k=0 if row == 3 else draw.randint(3, 40)))
                writer.writerow([text, label, row])
        arguments += [f"--{split}_file", str(path)]
    return arguments


@pytest.fixture
def short_run() -> list[object]:
    return ["--max_steps", 5, "--per_device_train_batch_size", 4, "--vocab_size", 300, "--disable_tqdm", True]


@pytest.fixture
def config_overrides() -> Callable[..., list[str]]:
    """The command line arguments for a tiny model of a family."""
    return lambda family, **values: ["--config_overrides", json.dumps({**FAMILIES[family], **values})]
