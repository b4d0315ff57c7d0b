"""What an auditor asks of the code in a checkpoint: readable, the source itself, and nothing but tensors."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from testing import multimodal_config, sumagg_config, tost_config, tost_text_config
from transformers.dynamic_module_utils import get_imports

from modeling_sumagg import __version__
from modeling_sumagg.publishing.remote_code import flatten_imports


CONFIGS = {
    "sumagg": sumagg_config,
    "sumagg_multimodal": multimodal_config,
    "tost": tost_config,
    "tost_text": tost_text_config,
}
MODULES = {
    "collections",
    "contextlib",
    "dataclasses",
    "difflib",
    "functools",
    "huggingface_hub.dataclasses",
    "huggingface_hub.errors",
    "inspect",
    "itertools",
    "logging",
    "math",
    "re",
    "sys",
    "threading",
    "torch",
    "transformers",
    "triton",
    "typing",
}
# Whatever reads, writes, runs or looks up by a computed name.
FORBIDDEN_NAMES = {"__import__", "breakpoint", "compile", "eval", "exec", "globals", "input", "locals", "open", "vars"}
FORBIDDEN_ATTRIBUTES = {
    "__builtins__",
    "__globals__",
    "__subclasses__",
    "from_pretrained",
    "hub",
    "load",
    "load_state_dict_from_url",
    "popen",
    "push_to_hub",
    "save",
    "save_pretrained",
    "system",
}


@pytest.fixture(params=CONFIGS)
def export(request, tmp_path) -> Path:
    CONFIGS[request.param]().save_pretrained(tmp_path)
    return tmp_path


def imported(tree: ast.Module) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


def test_the_export_only_computes(export):
    for path in export.glob("*.py"):
        tree = ast.parse(path.read_text())
        for name in imported(tree):
            assert name in MODULES or name.partition(".")[0] in MODULES, f"{path.name} imports {name}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                assert node.id not in FORBIDDEN_NAMES, f"{path.name}:{node.lineno} uses {node.id}"
            # What Triton's language loads is a tensor.
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) != "tl":
                assert node.attr not in FORBIDDEN_ATTRIBUTES, f"{path.name}:{node.lineno} uses .{node.attr}"
            elif isinstance(node, ast.ImportFrom) and node.level > 0:
                assert node.level == 1 and (export / f"{node.module}.py").is_file(), f"{path.name}:{node.lineno}"


def test_nothing_but_torch_and_transformers_must_be_installed(export):
    for path in export.glob("*.py"):
        needed = set(get_imports(path)) - sys.stdlib_module_names
        assert needed <= {"huggingface_hub", "torch", "transformers"}, path.name


def test_the_export_is_the_source(export):
    package = Path(importlib.util.find_spec("modeling_sumagg").origin).parent
    for path in export.glob("*.py"):
        header, module = path.read_text().split("\n", 1)[0].rsplit("module ", 1)
        assert header.startswith(f"# From the Python package modeling-sumagg {__version__} (Apache-2.0), ")
        source = Path(importlib.util.find_spec(module.rstrip(".")).origin)
        assert source.is_relative_to(package.parent)
        ours, theirs = ast.parse(source.read_text()), ast.parse(path.read_text())

        def own(tree: ast.Module) -> list[str]:
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.level > 0:
                    # Where a function imports it, only the name of the module differs.
                    node.module, node.level = None, 1
            statements = [node for node in tree.body if not (isinstance(node, ast.ImportFrom) and node.level > 0)]
            return [ast.dump(node) for node in statements]

        added = own(theirs)[len(own(ours)) :]
        assert own(theirs)[: len(own(ours))] == own(ours)
        assert all(re.search(r"register_(for_auto_class|class_names|lora_target_modules)'", call) for call in added)
        assert ast.get_docstring(theirs)


def test_the_export_is_formatted(export):
    pytest.importorskip("ruff")
    settings = Path(__file__).parents[2] / "pyproject.toml"
    for command in (["check"], ["format", "--check"]):
        process = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", settings, export],
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stdout


def test_only_what_a_family_needs_is_written(tmp_path):
    tost_config().save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.glob("*.py")}
    assert "modeling_tost.py" in written
    assert not written & {"modeling_sumagg.py", "modeling_tost_text.py", "cache.py", "generation.py"}


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("from . import __version__", "imports __version__ from the package modeling_sumagg"),
        ("from modeling_sumagg import unknown", "imports unknown from the package modeling_sumagg"),
        ("import modeling_sumagg.ops.summation as ops", "imports a module as a whole"),
        ("import modeling_sumagg\nx = modeling_sumagg.SumAggConfig", "imports a module as a whole"),
    ],
)
def test_an_import_that_a_flat_folder_cannot_have_is_refused(statement, reason):
    with pytest.raises(ValueError, match=f"^modeling_sumagg.modeling_x, line 2.*{reason}"):
        flatten_imports(f"import torch\n{statement}\n", "modeling_sumagg.modeling_x")


def test_names_from_a_package_come_from_the_modules_that_define_them():
    source = (
        "if True:\n    from modeling_sumagg import SumAggModel, ToSTModel as Vision, SumAggForCausalLM\n    x = 1\n"
    )
    flat, modules = flatten_imports(source, "gated_sum")
    assert flat == (
        "if True:\n    from .modeling_sumagg import SumAggModel, SumAggForCausalLM\n"
        "    from .modeling_tost import ToSTModel as Vision\n    x = 1\n"
    )
    assert sorted(modules) == ["modeling_sumagg.modeling_sumagg", "modeling_sumagg.modeling_tost"]


def test_imports_inside_functions_are_flattened():
    source = "def f():\n    from .ops.summation import causal_sum\n\n    return causal_sum\n"
    flat, modules = flatten_imports(source, "modeling_sumagg.modeling_x")
    assert flat == source.replace(".ops.summation", ".summation")
    assert modules == ["modeling_sumagg.ops.summation"]
