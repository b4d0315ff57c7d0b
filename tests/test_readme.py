"""What the README and the docstrings say can be done: paths exist, modules run, examples of the docstrings run."""

import doctest
import importlib
import pkgutil
import re
import subprocess
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


def test_modules_run():
    for module in sorted(set(re.findall(r"python -m (modeling_sumagg[\w.]*)", README))):
        subprocess.run([sys.executable, "-m", module, "--help"], check=True, capture_output=True)


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    # transformers' parser knows that the fence ends an example.
    finder, runner = doctest.DocTestFinder(parser=HfDocTestParser()), doctest.DocTestRunner()
    for test in finder.find(importlib.import_module(module)):
        runner.run(test)
    assert runner.failures == 0
