"""The built wheel, installed beside nothing of the repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# `-I` keeps the repository off the path: only the folder given is added to what is installed.
SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
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
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True)
    (tmp_path / "elsewhere").mkdir()
    run = subprocess.run(
        [sys.executable, "-I", "-c", SCRIPT, str(site)],
        cwd=tmp_path / "elsewhere",
        check=True,
        capture_output=True,
        text=True,
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
            sys.executable,
            "examples/quickstart.py",
            "--steps",
            "2",
            "--max_new_tokens",
            "5",
            *sizes.split(),
            *files.split(),
        ],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(site)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "the logits are identical" in run.stdout
    assert (tmp_path / "elsewhere" / "out" / "model.safetensors").is_file()
