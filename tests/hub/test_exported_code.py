"""What an auditor asks of the code in a checkpoint: readable, the source itself, and nothing but tensors."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import code_modules
from testing import multimodal_config, sumagg_config, tost_config, tost_text_config
from transformers.dynamic_module_utils import get_imports, get_relative_imports

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
    "copy",
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
        assert {f"{name}.py" for name in get_relative_imports(path)} <= {each.name for each in export.glob("*.py")}


def test_the_export_is_the_source(export):
    package = Path(importlib.util.find_spec("modeling_sumagg").origin).parent
    for path in export.glob("sumagg_*.py"):
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
        assert all(
            re.search(r"(register_for_auto_class|register_class_names|lora_target_modules)'", it) for it in added
        )
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
    written = code_modules(tmp_path)
    assert "modeling_tost" in written
    assert not written & {"modeling_sumagg", "modeling_tost_text", "cache", "model"}


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("from . import __version__", "imports __version__ from the package modeling_sumagg"),
        ("from modeling_sumagg import unknown", "imports unknown from the package modeling_sumagg"),
        ("import modeling_sumagg.ops.documents as ops", "imports a module as a whole"),
        ("import modeling_sumagg\nx = modeling_sumagg.SumAggConfig", "imports a module as a whole"),
        ("import math, modeling_sumagg as ours\nx = ours.SumAggConfig", "imports a module as a whole"),
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
    assert sorted(modules) == ["modeling_sumagg.models.modeling_sumagg", "modeling_sumagg.models.modeling_tost"]


def test_imports_inside_functions_are_flattened():
    source = "def f():\n    from .ops.running_sum.running_sum import causal_sum\n\n    return causal_sum\n"
    flat, modules = flatten_imports(source, "modeling_sumagg.modeling_x", "ours_")
    assert flat == source.replace(".ops.running_sum.running_sum", ".ours_running_sum")
    assert modules == ["modeling_sumagg.ops.running_sum.running_sum"]


SUM = "from modeling_sumagg.ops.running_sum.running_sum import causal_sum"
FLAT_SUM = "from .p_running_sum import causal_sum"
REGISTER = "from .p_registration import register_family"
FORMS = {
    "a form feed": (f"import math\n\x0c\n{SUM}\nx = 1\n", f"import math\n\x0c\n{FLAT_SUM}\nx = 1\n"),
    "U+2028 and wide characters": (f'"""a\u2028 b ü 😀"""\n{SUM}\n', f'"""a\u2028 b ü 😀"""\n{FLAT_SUM}\n'),
    "two imports on a line": (
        f"{SUM}; from modeling_sumagg.decoder.masks import attention_masks\n",
        f"{FLAT_SUM}\nfrom .p_masks import attention_masks\n",
    ),
    "statements around an import": (f"a = ';'; {SUM}; b = 2  # why\n", f"a = ';'\n{FLAT_SUM}\nb = 2  # why\n"),
    "a semicolon at the end": (f"{SUM};\n", f"{FLAT_SUM};\n"),
    "a backslash": (f"{SUM.replace('from ', chr(92).join(['from ', chr(10) + ' ']))}\n", f"{FLAT_SUM}\n"),
    "parentheses and comments": (
        "from modeling_sumagg.ops.running_sum.running_sum import (  # sums\n    bidirectional_sum,  # both\n    causal_sum as plain,\n)\n",
        "from .p_running_sum import (  # sums\n    bidirectional_sum,  # both\n    causal_sum as plain,\n)\n",
    ),
    "behind a colon": (
        f"def f():\n  if True: {SUM}; return causal_sum\n",
        f"def f():\n  if True: \n      {FLAT_SUM}\n      return causal_sum\n",
    ),
    "a name for what is returned": (
        "from modeling_sumagg import register_family\n\nFAMILY = register_family(C, {})\n",
        f"{REGISTER}\n\nFAMILY = register_family(C, {{}})\n",
    ),
    "another name": (
        "from modeling_sumagg import SumAggModel, register_family as enter\n\nenter(C, {})\n",
        f"from .p_modeling_sumagg import SumAggModel\n{REGISTER} as enter\n\nenter(C, {{}})\n",
    ),
    "the package as a whole": (
        "import math, modeling_sumagg as ours; ours.register_family(C, {})\n",
        f"import math\n{REGISTER}\nregister_family(C, {{}})\n",
    ),
    "under try": (
        "try:\n    from modeling_sumagg import register_family\nexcept ImportError:\n    register_family = None\n",
        f"try:\n    {REGISTER}\nexcept ImportError:\n    register_family = None\n",
    ),
    "for types alone": (
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import modeling_sumagg\n",
        f"from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    {REGISTER}\n",
    ),
    "a module that was moved": (
        "from modeling_sumagg.text_stream import TextStream\n",
        "from .p_text_stream import TextStream\n",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_python_is_flattened(form, tmp_path):
    source, expected = FORMS[form]
    flat, modules = flatten_imports(source, "own_mixer", "p_")
    assert flat == expected
    ast.parse(flat)
    # What the loader of transformers, which reads lines, finds is what a folder needs.
    (tmp_path / "flat.py").write_text(flat, encoding="utf-8")
    assert set(get_relative_imports(tmp_path / "flat.py")) == {f"p_{name.rpartition('.')[2]}" for name in modules}


def test_long_imports_are_wrapped_and_those_at_the_top_sorted():
    source = (
        "from .ops.running_sum.running_sum import bidirectional_sum, causal_sum, check_sequence, masked_terms\n"
        "from .decoder.layers import DecoderLayer  # why\n"
        "\nx = 1\n"
    )
    flat, _ = flatten_imports(source, "modeling_sumagg.modeling_x", "a_prefix_of_a_really_considerable_length_")
    assert flat == (
        "from .a_prefix_of_a_really_considerable_length_layers import DecoderLayer  # why\n"
        "from .a_prefix_of_a_really_considerable_length_running_sum import (\n"
        "    bidirectional_sum,\n    causal_sum,\n    check_sequence,\n    masked_terms,\n)\n"
        "\nx = 1\n"
    )
