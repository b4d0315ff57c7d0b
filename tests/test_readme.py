"""What the README and the docstrings say can be done: paths exist, modules run, examples of the docstrings run."""

import doctest
import importlib
import pkgutil
import re
import runpy
import sys
from pathlib import Path

import pytest
from transformers.testing_utils import HfDocTestParser

import modeling_sumagg
import modeling_sumagg.configuration


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


@pytest.mark.slow
def test_options_of_the_scripts_exist(monkeypatch, capsys):
    """Every option that the README, a script or a configuration gives to a script is one that the script knows."""
    files = [ROOT / "README.md", *(ROOT / "examples").rglob("*.py"), *(ROOT / "examples").rglob("*.yaml")]
    files += (ROOT / "examples").glob("*.md")
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
