"""Runs a script of `examples/` as the command line does, alone in an empty folder, but in this process: importing torch
again takes longest."""

import contextlib
import io
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
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


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
