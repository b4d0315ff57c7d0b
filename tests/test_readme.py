"""What the README and the docstrings say can be done: paths exist, modules run, examples of the docstrings run."""

import doctest
import importlib
import json
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from testing import build, sumagg_config, word_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageClassification
from transformers.testing_utils import HfDocTestParser

import modeling_sumagg
import modeling_sumagg.configuration
from modeling_sumagg import SumAggForCausalLM
from modeling_sumagg.hub import create_model_card


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = [
    module.name
    for package in (modeling_sumagg, modeling_sumagg.configuration)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
]


def test_paths_exist():
    """Links, and paths in code, that begin in a folder of the repository."""
    folders = "|".join(("configuration", "examples", "hub_cards", "modeling_sumagg", "tests"))
    paths = set(re.findall(rf"(?<![\w./-])(?:{folders})/[\w./-]*\w", README))
    paths |= {link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link}
    assert paths
    assert not [path for path in sorted(paths) if not (ROOT / path).exists()]


def test_tables_of_speed_are_what_the_benchmarks_wrote():
    section = (ROOT / "examples/benchmarks/README.md").read_text(encoding="utf-8").split("## Speed")[1]
    rows = re.findall(r"^\|.*", section, re.MULTILINE)
    results = [file.read_text(encoding="utf-8") for file in (ROOT / "examples/benchmarks/results").rglob("*.md")]
    assert len(rows) >= 20
    assert not [row for row in rows if not any(row in written for written in results)]


def original_checkpoint(name: str, path: Path) -> None:
    tensors = load_file(ROOT / "tests" / "golden" / f"{name}.safetensors")
    torch.save({key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}, path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that holds what the README speaks of: original checkpoints, and what the quickstart trained."""
    original_checkpoint("sumagg_hybrid", tmp_path / "model.pt")
    original_checkpoint("tost_vision_p16", tmp_path / "best_model.pth")
    original_checkpoint("tost_text", tmp_path / "ckpt.pt")
    (tmp_path / "labels.json").write_text(json.dumps({i: f"label {i}" for i in range(10)}))
    model = build(SumAggForCausalLM, sumagg_config())
    trained = tmp_path / "runs" / "quickstart"
    model.save_pretrained(trained)
    word_tokenizer().save_pretrained(trained)
    card = create_model_card(
        model,
        model_id="quickstart",
        dataset_type="text",
        dataset_name="text",
        steps=0,
        hyperparameters={},
        metrics={"perplexity": 61.0},
        baselines={"unigram frequencies": {"perplexity": 100.0}},
    )
    card.save(trained / "README.md")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_commands_run(folder):
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    modules = [command[1:] for command in commands if command[:2] == ["python", "-m"]]
    # The others make an environment: CI runs the tests', and `tests/examples` what the quickstart's starts.
    assert len(modules) == len(commands) - README.count("python3 -m venv") > 0
    for arguments in modules:
        subprocess.run([sys.executable, *arguments], check=True)
        if "tost" in arguments:
            assert AutoModelForImageClassification.from_pretrained("converted").config.id2label[3] == "label 3"
        elif "--output_dir" in arguments:
            assert AutoModelForCausalLM.from_pretrained("converted").config.model_type in arguments


@pytest.mark.slow
def test_code_runs(folder):
    # The mixer is a module, which `tests/test_own_mixer.py` imports.
    section = README.split("## Your own mixer")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True)


@pytest.mark.slow
def test_options_of_the_scripts_exist(monkeypatch, capsys):
    """Every option that the README, a script or a configuration gives to a script is one that the script knows."""
    files = [ROOT / "README.md", *(ROOT / "examples").rglob("*.py"), *(ROOT / "examples").rglob("*.yaml")]
    options: dict[str, set[str]] = {}
    for file in files:
        text = re.sub(r"\\\n[\s#]*", "", file.read_text(encoding="utf-8"))
        for script, arguments in re.findall(r"\b(examples/[\w/]+\.py)((?: +[^\n`]+)?)", text):
            options.setdefault(script, set()).update(re.findall(r"(?<=\s)--\w+", arguments))
    assert len(options) >= 8
    for script, given in options.items():
        if given:
            monkeypatch.setattr(sys, "argv", [script, "--help"])
            monkeypatch.syspath_prepend(ROOT / "examples")
            monkeypatch.syspath_prepend((ROOT / script).parent)
            with pytest.raises(SystemExit, match="0"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            assert given <= set(re.findall(r"--\w+", capsys.readouterr().out)), script


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    # transformers' parser knows that the fence ends an example.
    finder, runner = doctest.DocTestFinder(parser=HfDocTestParser()), doctest.DocTestRunner()
    for test in finder.find(importlib.import_module(module)):
        runner.run(test)
    assert runner.failures == 0
