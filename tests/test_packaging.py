"""The built wheel, installed beside nothing of the repository."""

import json
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
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
