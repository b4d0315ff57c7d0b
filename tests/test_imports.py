"""Imports point one way, and a checkpoint carries what its family imports, and nothing of another one."""

import ast
import graphlib
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path

import pytest

import modeling_sumagg
from modeling_sumagg.publishing.moved_modules import MOVED
from modeling_sumagg.publishing.remote_code import flat_sources


ROOT = Path(__file__).parents[1]
PACKAGE = "modeling_sumagg"
# What each part may import of the others. A part is the longest of these names that a module's name begins with.
PARTS = {
    "configuration": [],
    "ops": [],
    "common": [],
    "decoder": ["common", "ops.sliding_attention", "ops.documents"],
    # Parts that several families share.
    "models": ["common", "ops.precision"],
    "models.modeling_": ["common", "configuration", "decoder", "models.decay", "models.position_modulation", "ops"],
    # The mixers and blocks of the text models, over what is heard.
    "models.modeling_sumagg_speech": ["common", "configuration", "decoder", "models.modeling_sumagg", "ops"],
    "models.families": ["configuration", "models.modeling_"],
    "publishing": ["common", "configuration", "decoder", "models.families"],
    # A plugin for an engine: nobody imports it, and it knows the models.
    "serving": ["decoder", "models.families", "ops.documents", "ops.running_sum.running_sum"],
    "streams": ["common", "decoder", "models.modeling_sumagg_speech"],
    "training": ["common", "configuration", "decoder", "models.families", "ops", "publishing"],
    # Each of the commands imports what it needs.
    "__main__": ["publishing", "training"],
    # The package itself, which gathers the names.
    "": ["configuration", "models", "publishing", "training.data_collator"],
}
# What users, and so the examples, import; the rest may change with any version.
PUBLIC = {
    "modeling_sumagg",
    "modeling_sumagg.configuration",
    "modeling_sumagg.decoder",
    "modeling_sumagg.models.modeling_tost",
    "modeling_sumagg.ops",
    "modeling_sumagg.publishing.hub",
    "modeling_sumagg.streams",
    "modeling_sumagg.training",
}
# All modules of these are public.
PUBLIC_PACKAGES = ("modeling_sumagg.streams.", "modeling_sumagg.training.")


def package_files() -> dict[str, Path]:
    """Every module of the package by its name."""
    files = {}
    for folder, prefix in ((ROOT / PACKAGE, PACKAGE), (ROOT / "configuration", f"{PACKAGE}.configuration")):
        for path in folder.rglob("*.py"):
            parts = (prefix, *path.relative_to(folder).with_suffix("").parts)
            files[".".join(part for part in parts if part != "__init__")] = path
    return files


FILES = package_files()


def imported(path: Path, module: str = "") -> set[str]:
    """The modules of the package that a file imports, inside functions too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            # `from . import name` may import a module, unless the package has something else of that name.
            inside = {alias.name for alias in node.names if f"{source}.{alias.name}" in FILES}
            found = {name: getattr(importlib.import_module(source), name, None) for name in inside}
            modules = {f"{source}.{name}" for name, it in found.items() if it is None or inspect.ismodule(it)}
            names |= modules or {source}
    return {name for name in names if name.partition(".")[0] == PACKAGE}


def part(module: str) -> str:
    name = module.removeprefix(PACKAGE).removeprefix(".")
    fitting = [part for part in PARTS if name.startswith(part) and (part or not name)]
    assert fitting, f"{module} has no place in the order of the parts: give it one in `PARTS`, and in the layout"
    return max(fitting, key=len)


def is_kernels(module: str) -> bool:
    """Whether a module is one of those of kernels, which import Triton and never travel with a checkpoint."""
    name = module.rpartition(".")[2]
    return name.endswith("_kernels") or name in ("kernel_modes", "triton_helpers")


def refused(module: str, target: str) -> bool:
    """Whether the order of the parts forbids that a module imports another one."""
    name, own = target.removeprefix(PACKAGE).removeprefix("."), part(module)
    if is_kernels(target) and not is_kernels(module) and module != f"{PACKAGE}.ops":
        return True
    # A family is one file, which imports no other.
    if part(target) == own and own != "models.modeling_":
        return False
    return not any(name.startswith(other) for other in PARTS[own])


@pytest.mark.parametrize("module", FILES)
def test_imports_point_one_way(module):
    assert not [target for target in imported(FILES[module], module) if refused(module, target)]


def test_no_circles():
    graph = {module: imported(path, module) for module, path in FILES.items()}
    assert sum(map(len, graph.values())) > 60
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("module", "target"),
    [
        ("configuration.configuration_text", "decoder.recurrence"),
        ("ops.running_sum.running_sum", "decoder.layout"),
        ("ops.running_sum.running_sum", "ops.running_sum.running_sum_kernels"),
        ("ops.weighted_mean.weighted_mean_torch", "ops.triton_helpers"),
        ("common.compatibility", "decoder.cache"),
        ("common.registration", "models.families"),
        ("decoder.model", "ops.running_sum.running_sum"),
        ("decoder.model", "ops.dispatch"),
        ("decoder.model", "models.families"),
        ("models.modeling_sumagg", "models.modeling_tost_text"),
        ("models.modeling_sumagg", "models.modeling_sumagg_speech"),
        ("models.modeling_sumagg", "models.families"),
        ("models.modeling_sumagg", "ops.kernel_modes"),
        ("models.decay", "models.modeling_sumagg"),
        ("models.families", "publishing.remote_code"),
        ("models.families", "serving.models"),
        ("publishing.cards", "training.runs"),
        ("decoder.recurrence", "serving.states"),
        ("serving.models", "ops.dispatch"),
    ],
)
def test_an_import_against_the_order_is_refused(module, target):
    assert refused(f"{PACKAGE}.{module}", f"{PACKAGE}.{target}")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.name)
def test_examples_import_what_is_public(path):
    assert not [name for name in imported(path) - PUBLIC if not name.startswith(PUBLIC_PACKAGES)]


def exported(model_type: str) -> dict[str, str]:
    """What a checkpoint of a family carries, by the full names of its modules."""
    sources = flat_sources(modeling_sumagg.FAMILIES[model_type])
    return {text.split("\n", 1)[0].rpartition("module ")[2].rstrip("."): text for text in sources.values()}


@pytest.mark.parametrize(
    ("model_type", "others"),
    [
        ("sumagg", ["token_statistics", "tost", "multimodal"]),
        (
            "tost_text",
            [
                "running_sum.running_sum.",
                "configuration_sumagg",
                "models.modeling_sumagg",
                "modeling_tost.",
                "modulation",
            ],
        ),
        ("tost", ["running_sum.running_sum.", "configuration_sumagg", "models.modeling_sumagg", "_text"]),
        ("sumagg_multimodal", ["tost", "configuration_text", "ops.", "models.modeling_sumagg."]),
        ("sumagg_speech", ["token_statistics", "tost", "multimodal"]),
    ],
)
def test_a_checkpoint_carries_nothing_of_another_family(model_type, others):
    modules = exported(model_type)
    assert len(modules) >= 4
    for module in modules:
        assert not [other for other in others if other in f"{module}."], module


@pytest.mark.parametrize("model_type", ["tost", "sumagg_multimodal"])
def test_no_language_model_comes_with_images_and_numbers(model_type):
    assert not [module for module in exported(model_type) if ".decoder." in module]


def test_the_decoder_has_only_what_every_decoder_needs():
    assert len([module for module in FILES if module.startswith(f"{PACKAGE}.decoder")]) <= 11


def test_the_code_that_users_of_a_checkpoint_trust_is_short():
    """A limit to go down: 3,190 of the lines are code, the others say what it does."""
    lines = {module: text.count("\n") for module, text in exported("sumagg").items()}
    assert sum(lines.values()) <= 5550, lines


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_the_module_names_of_0_2_give_the_modules_of_today(old, new):
    sys.modules.pop(f"modeling_sumagg.{old}", None)
    with pytest.warns(FutureWarning, match=f"now `modeling_sumagg.{new}`"):
        module = importlib.import_module(f"modeling_sumagg.{old}")
    assert module is importlib.import_module(f"modeling_sumagg.{new}")
    assert module.__spec__.name == f"modeling_sumagg.{new}"


def test_modules_that_were_attributes_of_the_package_still_are(monkeypatch):
    for name in ("families", "modeling_tost"):
        monkeypatch.delitem(sys.modules, f"modeling_sumagg.{name}", raising=False)
        monkeypatch.delattr(modeling_sumagg, name, raising=False)
        with pytest.warns(FutureWarning, match=f"now `modeling_sumagg.models.{name}`"):
            assert getattr(modeling_sumagg, name) is importlib.import_module(f"modeling_sumagg.models.{name}")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        modeling_sumagg.nothing  # noqa: B018
