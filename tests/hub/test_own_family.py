"""Families of somebody else: `register_family` outside of the package, and self-contained checkpoints of them."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from checkpoints import auto_map, auto_map_of, code_file, code_modules
from safetensors.torch import save_file
from testing import build, sumagg_config

import modeling_sumagg
from modeling_sumagg import SumAggConfig, SumAggForCausalLM, register_family
from modeling_sumagg.publishing.hub import create_model_card, update_folder
from modeling_sumagg.publishing.remote_code import flatten_imports


@pytest.fixture
def gated_sum(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "own_family")
    yield importlib.import_module("gated_sum")
    modeling_sumagg.FAMILIES.pop("gated_sum")
    for name in ("gated_sum", "gates"):
        sys.modules.pop(name)


def tiny(gated_sum):
    config = gated_sum.GatedSumConfig(**{key: getattr(sumagg_config(), key) for key in ("vocab_size", "layer_types")})
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "num_sum_heads": 2}
    for name, size in sizes.items():
        setattr(config, name, size)
    return build(gated_sum.GatedSumForCausalLM, config)


def test_it_loads_where_neither_it_nor_the_package_is(gated_sum, tmp_path, clean_python, run_script):
    model = tiny(gated_sum)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    assert auto_map(folder) == auto_map_of(
        folder,
        AutoConfig="gated_sum.GatedSumConfig",
        AutoModel="gated_sum.GatedSumModel",
        AutoModelForCausalLM="gated_sum.GatedSumForCausalLM",
    )
    written = code_modules(folder)
    assert {"gated_sum", "gates", "modeling_sumagg", "registration", "running_sum"} <= written
    assert "__init__" not in written and "modeling_tost" not in written
    input_ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        save_file({"input_ids": input_ids, "output": model(input_ids).logits}, f"{folder}.safetensors")
    assert run_script(clean_python, "load_own.py", folder, tmp_path / "again", HF_HUB_OFFLINE="1").endswith("ok\n")

    first = code_file(folder, "gated_sum").read_text().splitlines()[0]
    assert (
        first
        == f"# From the Python package gated_sum, by modeling-sumagg {modeling_sumagg.__version__}, module gated_sum."
    )
    gates = code_file(folder, "gates")
    gates.write_text(first.replace("module gated_sum", "module gates") + "\n")
    assert f"changed: {gates.name}" in update_folder(folder)
    card = create_model_card(
        model,
        model_id="user/model",
        dataset_type="random",
        dataset_name="random tokens",
        steps=1,
        hyperparameters={},
        metrics={"perplexity": 61.0},
        baselines={"uniform": {"perplexity": 61.0}},
    )
    assert "A model of the type `gated_sum` (`GatedSumForCausalLM`)" in card.text
    assert "{{" not in card.text and "bibtex" not in card.text


def test_the_source_is_what_was_written(gated_sum):
    source = Path(gated_sum.__file__).read_text()
    flat, modules = flatten_imports(source, "gated_sum")
    expected = (
        source.replace("from gates import", "from .gates import")
        .replace("import modeling_sumagg\n", "from .registration import register_family\n")
        .replace("modeling_sumagg.register_family(", "register_family(")
        .replace(
            "from modeling_sumagg import SumAggConfig, SumAggForCausalLM\n",
            "from .configuration_sumagg import SumAggConfig\nfrom .modeling_sumagg import SumAggForCausalLM\n",
        )
        .replace("from modeling_sumagg.ops.running_sum.running_sum", "from .running_sum")
    )
    assert flat == expected
    assert set(modules) == {
        "gates",
        "modeling_sumagg.configuration.configuration_sumagg",
        "modeling_sumagg.models.modeling_sumagg",
        "modeling_sumagg.ops.running_sum.running_sum",
        "modeling_sumagg.common.registration",
    }


def in_module(name: str) -> tuple[type, type]:
    """A config and a model that say that they are of a module."""
    config_class = types.new_class("OwnConfig", (SumAggConfig,))
    config_class.__module__, config_class.model_type = name, "own"
    model_class = types.new_class("OwnForCausalLM", (SumAggForCausalLM,))
    model_class.__module__, model_class.config_class = name, config_class
    return config_class, model_class


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("__main__", None, "OwnConfig was defined in a script or a notebook.*Move it to a module of its own"),
        ("sourceless", None, "The source of the module sourceless cannot be read"),
        (
            "running_sum",
            "from modeling_sumagg.ops.running_sum.running_sum import causal_sum",
            r"both be written to \*running_sum.py: rename",
        ),
        (
            "whole",
            "import modeling_sumagg\nx = modeling_sumagg.SumAggConfig",
            "whole, line 1.*imports a module as a whole",
        ),
        ("alias", "import modeling_sumagg.heads as heads", "alias, line 1.*imports a module as a whole"),
        (
            "constant",
            "from modeling_sumagg import __version__",
            "imports __version__ from the package modeling_sumagg",
        ),
        (
            "missing",
            "from modeling_sumagg.ops.subtraction import x",
            "source of the module .*subtraction cannot be read",
        ),
        (
            "docstring",
            '"""Use it as\n\n    from .elsewhere import x\n"""\nfrom modeling_sumagg import SumAggConfig',
            "reads `from .elsewhere import`.*write it in another way",
        ),
        (
            "broken",
            "from modeling_sumagg import SumAggConfig\nx = (",
            "source of broken, as it is now, is no Python: .* in 'x = \\('",
        ),
    ],
)
def test_code_that_no_checkpoint_can_carry_is_refused_at_once(module, source, reason, tmp_path, monkeypatch):
    if source is not None:
        (tmp_path / f"{module}.py").write_text(source + "\n")
        monkeypatch.syspath_prepend(tmp_path)
    elif module != "__main__":
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    config_class, model_class = in_module(module)
    with pytest.raises(ValueError, match=reason):
        register_family(config_class, {"AutoModelForCausalLM": model_class})
    assert "own" not in modeling_sumagg.FAMILIES


def test_the_name_of_no_auto_class_is_refused():
    with pytest.raises(ValueError, match="'AutoModelForCausalLanguage' is not the name of an Auto class"):
        register_family(SumAggConfig, {"AutoModelForCausalLanguage": SumAggForCausalLM})


def test_a_module_of_a_package_takes_its_relative_imports_along(tmp_path, monkeypatch):
    package = tmp_path / "own_package"
    (package / "parts").mkdir(parents=True)
    (package / "parts" / "inner_gate.py").write_text("def inner():\n    return 1\n")
    (package / "own_model.py").write_text(
        "import json\n\nfrom own_package.parts.inner_gate import inner\n\nfrom .parts.inner_gate import inner as twice\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flat, modules = flatten_imports((package / "own_model.py").read_text(), "own_package.own_model")
    assert flat == "import json\n\nfrom .inner_gate import inner\n\nfrom .inner_gate import inner as twice\n"
    assert set(modules) == {"own_package.parts.inner_gate"}
    (package / "__init__.py").write_text("from .own_model import inner\n")
    assert flatten_imports("from .own_model import inner\n", "own_package") == (
        "from .own_model import inner\n",
        ["own_package.own_model"],
    )
