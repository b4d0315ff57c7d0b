"""The README, the pages beside the examples and those on tasks: their commands and code run in order, in one folder, and
print the output that the pages show."""

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from running import EXAMPLES, environment
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification


ROOT = EXAMPLES.parent
PAGES = [
    "README.md",
    "examples/recipes.md",
    "examples/saved_folder.md",
    "examples/own_mixer/README.md",
    *(f"docs/tasks/{page.name}" for page in sorted((ROOT / "docs" / "tasks").glob("*.md"))),
]
WRITTEN_BY_A_MODEL = r"<!-- the model wrote what follows ([^>]+) -->\n"
OWN_MIXER = (EXAMPLES / "own_mixer" / "gated_sum.py").read_text(encoding="utf-8")
BLOCK = re.compile(rf"^(?:{WRITTEN_BY_A_MODEL})?```(bash|python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")
# Commands that make an environment or run the tests, which CI runs, and an upload.
NOT_RUN = ("python3 -m venv", "source .venv", "pip install", "hf upload")
# Seeds, machines and versions of Python, whose sources the models read, move what is measured.
TOLERANCE = 0.15
# Where a page trains for minutes: few steps, and little data where it gives none.
SHORT = {
    "quickstart.py": ["--steps", "3", "--train_files", "notes.txt", "--held_out_files", "more-notes.txt"],
    "run_clm.py": ["--max_steps", "2"],
    "run_multimodal_regression.py": ["--max_steps", "2"],
    "run_image_classification.py": ["--max_steps", "2", "--train_dir", "photos"],
    "run_speech_recognition_ctc.py": [
        *("--max_steps", "2", "--num_train_utterances", "16", "--num_held_out_utterances", "4"),
    ],
    "run_text_classification.py": [
        *("--max_steps", "2", "--train_file", "reviews.csv"),
        *("--text_column_name", "review", "--label_column_name", "stars"),
    ],
    "sft_trl.py": ["--max_steps", "2", "--eval_strategy", "no", "--max_length", "32"],
}


class Step(NamedTuple):
    """A command line, or a block of code, with the lines of output that are shown after it."""

    language: str
    code: str
    shown: tuple[str, ...] = ()
    # What a model writes is after this, and moves with the machine.
    compared_until: str = ""


def steps(page: str) -> list[Step]:
    found: list[Step] = []
    for compared_until, language, code in BLOCK.findall(page):
        if language == "text":
            found[-1] = found[-1]._replace(shown=tuple(code.splitlines()), compared_until=compared_until.strip('"'))
        elif language == "python":
            # A module. `tests/test_own_mixer.py` imports it and runs it in every mode.
            found += [Step(language, code)] if code != OWN_MIXER else []
        else:
            lines = [_without_installation(line) for line in code.splitlines()]
            found += [Step(language, line) for line in lines if not line.startswith(NOT_RUN)]
    return found


def _without_installation(line: str) -> str:
    """The script that a line runs after it has made an environment."""
    before, _, command = line.rpartition(" && .venv/bin/")
    return command if before.startswith("python3 -m venv") and "examples/" in command else line


def agree(shown: str, printed: str, compared_until: str) -> bool:
    """Whether two lines are the same but for spaces, and for numbers that are close; or begin the same way."""
    if compared_until == "the prompt":
        # Its first word, and the quotes and brackets around it.
        return printed.startswith(re.match(r"\W*\w+", shown)[0])
    if compared_until:
        shown, printed = (line.partition(compared_until)[0] for line in (shown, printed))
    if NUMBER.sub("0", shown).split() != NUMBER.sub("0", printed).split():
        return False
    pairs = zip(*([float(n.replace(",", "")) for n in NUMBER.findall(line)] for line in (shown, printed)), strict=True)
    return all(b == pytest.approx(a, rel=TOLERANCE) for a, b in pairs)


def is_in(shown: tuple[str, ...], printed: str, compared_until: str = "") -> bool:
    lines = printed.splitlines()
    windows = (lines[start : start + len(shown)] for start in range(len(lines) - len(shown) + 1))
    return any(all(agree(a, b, compared_until) for a, b in zip(shown, window, strict=True)) for window in windows)


def test_an_output_is_compared_in_words_and_numbers():
    assert is_in(("a   1,200 b",), "before\na 1,100 b\nafter")
    assert not is_in(("a 1,200 b",), "a 900 b")
    assert not is_in(("a 1,200 b",), "c 1,200 b")
    assert not is_in(("a 1", "b 2"), "a 1\nc\nb 2")
    assert is_in(("'def read(self):'",), "'def write(x):'", "the prompt")
    assert not is_in(("'def read('",), "'import'", "the prompt")
    assert is_in(("loss 2.1, and on: x",), "loss 2, and on: y", "and on")
    assert not is_in(("loss 2, and on: x",), "loss 3, and on: x", "and on")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """What the pages take for granted: the repository's files, data of one's own, and original checkpoints."""
    for name in ("examples", "docs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    for golden, name in (
        ("sumagg_hybrid", "model.pt"),
        ("tost_vision_p16", "best_model.pth"),
        ("tost_text", "ckpt.pt"),
    ):
        tensors = load_file(ROOT / "tests" / "golden" / f"{golden}.safetensors")
        weights = {key.removeprefix("weights."): t for key, t in tensors.items() if key.startswith("weights.")}
        torch.save(weights, tmp_path / name)
    (tmp_path / "labels.json").write_text(json.dumps({i: f"label {i}" for i in range(10)}))
    rows = [
        f"{word} {'very ' * (n % 5)}{word},{stars}" for n in range(20) for word, stars in (("good", 5), ("bad", 1))
    ]
    (tmp_path / "reviews.csv").write_text("\n".join(["review,stars", *rows]))
    houses = [
        f"{'large' if n % 2 else 'small'} house {n},{n % 4 + 1},{30 * (n % 4 + 1) + n},{900 * n}" for n in range(60)
    ]
    (tmp_path / "houses.csv").write_text("\n".join(["description,rooms,area,price", *houses]))
    for name in ("notes.txt", "more-notes.txt"):
        (tmp_path / name).write_text("One notes what one would forget, and forgets what one has noted.\n" * 400)
    soundfile.write(tmp_path / "talk.flac", np.random.default_rng(0).normal(scale=0.01, size=16000), 16000)
    for label, shade in (("day", 230), ("night", 20)):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for n in range(10):
            Image.new("RGB", (40, 32), (shade + n,) * 3).save(tmp_path / "photos" / label / f"{n}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_as_it_stands(step: Step) -> str:
    command = ["bash", "-c", step.code] if step.language == "bash" else [sys.executable, "-c", step.code]
    variables = environment() | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert process.returncode == 0, f"{step.code}\n{process.stderr[-3000:]}"
    return process.stdout


def run_for_a_short_time(step: Step) -> str:
    """In this process, since importing torch takes longest."""
    if "gated_sum" in step.code:
        # It registers a family, which other tests in this process must not find.
        return run_as_it_stands(step)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        if step.language == "python":
            exec(compile(step.code, "<page>", "exec"), {"__name__": "__main__"})
            return printed.getvalue()
        python, script, *arguments = shlex.split(step.code)
        assert python == "python"
        if script == "-m":
            script, *arguments = arguments
            # The package itself stays as it was imported.
            script = f"{script}.__main__" if script == "modeling_sumagg" else script
            patch.setattr(sys, "argv", [script, *arguments])
            patch.delitem(sys.modules, script, raising=False)
            runpy.run_module(script, run_name="__main__")
        else:
            patch.setattr(sys, "argv", [script, *arguments, *SHORT.get(Path(script).name, [])])
            runpy.run_path(script, run_name="__main__")
    return printed.getvalue()


def run_pages(run: Callable[[Step], str]) -> list[tuple[Step, str]]:
    """The printed output of each step of all pages. Conversions write to one folder, so each is checked before the next."""
    outputs = []
    # A later page repeats commands of an earlier one, whose folders it uses.
    for step in dict.fromkeys(step for page in PAGES for step in steps((ROOT / page).read_text(encoding="utf-8"))):
        outputs.append((step, run(step)))
        arguments = shlex.split(step.code) if step.language == "bash" else []
        if {"modeling_sumagg.convert_original_checkpoint", "convert"} & set(arguments):
            if "tost" in arguments:
                model = AutoModelForImageClassification.from_pretrained("converted")
                assert model.config.id2label[3] == "label 3"
            else:
                model = AutoModelForCausalLM.from_pretrained("converted")
                assert model.config.model_type in arguments
            shutil.rmtree("converted")
    # Greedy text of `generate` in padded batches, on two pages that ask for different lengths.
    texts = [printed.splitlines()[0] for step, printed in outputs if "'for name in" in "".join(step.shown)]
    assert len(texts) == 2 and texts[0].startswith(texts[1].rstrip("'")) and texts[1].startswith("'for name in")
    return outputs


@pytest.mark.full_training
def test_every_step_prints_what_the_pages_show(folder):
    outputs = run_pages(run_as_it_stands)
    assert sum(bool(step.shown) for step, _ in outputs) >= 8
    for step, printed in outputs:
        assert is_in(step.shown, printed, step.compared_until), f"{step.code}\nprinted\n{printed}"


@pytest.mark.slow
def test_every_step_runs_after_a_short_training(folder, in_a_clean_process):
    for step, printed in run_pages(run_for_a_short_time):
        # What a model knows after few steps is not what it knows after all of them.
        if "runs/" not in step.code and "quickstart.py" not in step.code:
            assert is_in(step.shown, printed, step.compared_until), f"{step.code}\nprinted\n{printed}"


def test_the_pages_are_linked_and_the_readme_is_read_in_one_go():
    readme, index = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/index.md"))
    for page in PAGES[1:]:
        listed = page.removeprefix("docs/") if page.startswith("docs/") else f"../{page}"
        assert f"]({page}" in readme or f"]({listed})" in index, page
    assert readme.count("\n") <= 200
    titles = re.findall(r"^## (.+)$", readme, re.MULTILINE)
    order = [
        "First steps",
        "The models",
        "How good is it",
        "Speed",
        "Use",
        "Train on your own data",
        "The Hub",
        "More",
    ]
    assert titles == order
