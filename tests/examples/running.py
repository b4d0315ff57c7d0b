"""Runs a script of `examples/` as the command line does, alone in an empty folder, but in this process: importing torch
again takes longest."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub import ModelCard, ModelCardData
from transformers import set_seed


EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128}
FAMILIES = {
    "sumagg": {**TINY, "model_type": "sumagg", "layer_types": ["summation", "full_attention"]},
    "tost_text": {**TINY, "model_type": "tost_text"},
    "gpt2": {**TINY, "model_type": "gpt2"},
}


class Run(NamedTuple):
    folder: Path
    printed: str


def run_alone(name: str, cwd: Path, *arguments: object, output_dir: str = "out") -> Run:
    """Copy a script into `cwd`, run it there, and return its output folder, and what it printed."""
    shutil.copy(EXAMPLES / name, cwd)
    printed = io.StringIO()
    command = [name, *map(str, arguments), *(["--output_dir", output_dir] if output_dir else [])]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", command)
        set_seed(0)
        runpy.run_path(name, run_name="__main__")
    return Run(cwd / output_dir, printed.getvalue())


def config_overrides(family: str, **values) -> list[str]:
    """The command line arguments for a tiny model of a family."""
    return ["--config_overrides", json.dumps({**FAMILIES[family], **values})]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())


class Card(NamedTuple):
    """
    A card as its reader sees it.

    Attributes:
        data (`ModelCardData`): its metadata.
        training (`dict[str, str]`): the table of the training.
        results (`dict[str, list[str]]`): the cells of the table of results, by their first one.
        measured_on (`str`): the data of the results.
        num_examples (`int`): how many there are.
        text (`str`): the whole.
    """

    data: ModelCardData
    training: dict[str, str]
    results: dict[str, list[str]]
    measured_on: str
    num_examples: int
    text: str


def read_card(folder: Path) -> Card:
    card = ModelCard.load(folder / "README.md")

    def table(section: str) -> list[list[str]]:
        lines = card.text.partition(f"## {section}\n")[2].partition("\n## ")[0].splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]

    measured_on, number = re.search(r"Measured on (.*) \(([\d,]+) examples\)\.", card.text).groups()
    results = {name: cells for name, *cells in table("Results")}
    return Card(card.data, dict(table("Training")), results, measured_on, int(number.replace(",", "")), card.text)


def assert_card_is_true(
    folder: Path, printed: str, measured: dict[str, float], baselines: list[str], **training
) -> Card:
    """
    The numbers of a card are those that were measured: the metadata to six digits, the table to four, as printed.

    Args:
        folder, printed: of a run.
        measured: the metrics of the model, in their order.
        baselines: the names of its baselines, in their order.
        training: cells of the table of the training, by name.
    """
    card = read_card(folder)
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {name: pytest.approx(value, rel=1e-5) for name, value in measured.items()}
    assert all(len(re.sub(r"\D", "", str(value)).strip("0")) <= 6 for value in found.values())
    assert [*card.results][2:] == ["**this model**", *baselines]
    numbers = [float(cell.replace(",", "")) for cell in card.results["**this model**"]]
    assert numbers == pytest.approx([*measured.values()], rel=1e-3, abs=1e-4)
    # The last column of the first table that was printed.
    for name in baselines:
        shown = re.search(rf"([\d.e+-]+)(%?)  {re.escape(name)}\n", printed)
        value = float(shown[1]) / (100 if shown[2] else 1)
        assert float(card.results[name][0].replace(",", "")) == pytest.approx(value, rel=1e-3, abs=1e-4)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert card.training["optimizer steps"] == str(state["global_step"])
    assert card.training.items() >= {name: str(value) for name, value in training.items()}.items()
    assert str(folder.parent) not in (folder / "README.md").read_text() and not (folder / "training_args.bin").exists()
    return card


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
