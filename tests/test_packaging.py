"""The built wheel, installed beside nothing of the repository, and the order of the package's wings."""

import ast
import graphlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# Who may know whom: a module imports from its own floor and from lower ones. The decoder is on the floor without a name.
FLOORS = (
    {"configuration", "ops", "registration"},
    None,
    {"modeling_*"},
    {"families"},
    {"publishing", "training", "serving"},
)
SCRIPT = """
import json
import re
from pathlib import Path
import torch
import modeling_sumagg
from modeling_sumagg.configuration import preset_path
from transformers import AutoConfig, AutoModelForCausalLM

presets = sorted(path.stem for path in Path(preset_path("sumagg-hybrid-small")).parent.glob("*.json"))
for name in presets:
    AutoConfig.from_pretrained(preset_path(name))
sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
model = AutoModelForCausalLM.from_config(modeling_sumagg.SumAggConfig(**sizes))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses = []
for _ in range(5):
    loss = model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    losses.append(loss.item())
print(json.dumps({"file": modeling_sumagg.__file__, "presets": presets, "losses": losses}))
"""


def modules() -> dict[str, Path]:
    """The files of the package by module name, without the package itself and its commands."""
    files = {}
    for folder, prefix in (("modeling_sumagg", ""), ("configuration", "configuration.")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            files[prefix + ".".join(part for part in parts if part != "__init__")] = path
    return {name.rstrip("."): path for name, path in files.items() if name not in COMMANDS}


COMMANDS = ("", "hub", "convert_original_checkpoint")


def floor(module: str) -> int:
    wing = module.partition(".")[0]
    names = [wing, "modeling_*" if wing.startswith("modeling_") else wing]
    return next((i for i, wings in enumerate(FLOORS) if wings and wings & set(names)), 1)


def test_imports_point_one_way():
    files = modules()
    assert len(files) > 20 and "families" in files
    known: dict[str, set[str]] = {}
    for name, path in files.items():
        package = (
            f"modeling_sumagg.{name}" if path.name == "__init__.py" else f"modeling_sumagg.{name}".rpartition(".")[0]
        )
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                target = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                target = target.partition(".")[2]
                assert target in files, f"{name}, line {node.lineno}: an import from the package itself or a command"
                assert floor(target) <= floor(name), f"{name}, line {node.lineno}, imports {target}, which is above it"
                known.setdefault(name, set()).add(target)
    list(graphlib.TopologicalSorter(known).static_order())
    wings = {wing for name in ("configuration", "ops") for wing in known if wing.partition(".")[0] == name}
    for name in wings:
        assert {target.partition(".")[0] for target in known[name]} <= {name.partition(".")[0]}, name


@pytest.mark.slow
def test_wheel(tmp_path):
    # From a copy: setuptools leaves what it built beside the sources, and packs it again the next time.
    source = tmp_path / "source"
    for folder in ("configuration", "hub_cards", "modeling_sumagg"):
        shutil.copytree(ROOT / folder, source / folder)
    for file in ("LICENSE", "README.md", "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist"), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    # Of its own it has our package alone; the others are found through the path file.
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv").rglob("site-packages")
    (site / "others.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [*pip, "--python", str(python), "install", "-q", "--no-deps", "--force-reinstall", str(wheel)], check=True
    )
    (tmp_path / "elsewhere").mkdir()
    run = subprocess.run(
        [python, "-I", "-c", SCRIPT], cwd=tmp_path / "elsewhere", check=True, capture_output=True, text=True
    )
    result = json.loads(run.stdout.splitlines()[-1])
    assert Path(result["file"]).is_relative_to(site)
    assert result["presets"] == sorted(path.stem for path in (ROOT / "configuration" / "presets").glob("*.json"))
    assert result["losses"][-1] < result["losses"][0]

    # The main job too, from the examples alone.
    shutil.copytree(ROOT / "examples", tmp_path / "elsewhere" / "examples")
    (tmp_path / "elsewhere" / "text.txt").write_text("to be or not to be, that is the question.\n" * 200)
    sizes = "--vocab_size 300 --hidden_size 16 --num_hidden_layers 2 --num_attention_heads 2 --context_length 32"
    files = "--train_files text.txt --held_out_files text.txt --output_dir out"
    run = subprocess.run(
        [
            python,
            "examples/quickstart.py",
            "--steps",
            "2",
            "--max_new_tokens",
            "5",
            *sizes.split(),
            *files.split(),
        ],
        cwd=tmp_path / "elsewhere",
        check=True,
        capture_output=True,
        text=True,
    )
    assert re.search(r"forward: \[1, 8, \d+\], finite", run.stdout) and "card: text-generation" in run.stdout
    assert (tmp_path / "elsewhere" / "out" / "model.safetensors").is_file()
