"""A checkpoint saved with any supported version of transformers is right with any other, without the package."""

import os
import subprocess
from pathlib import Path

import pytest


PYTHONS = os.environ.get("MODELING_SUMAGG_PYTHONS", "").split(os.pathsep)
SCRIPTS = Path(__file__).parent / "scripts"


def run(python: str, script: str, *arguments: object, **environment: str) -> str:
    command = [python, SCRIPTS / script, *arguments]
    process = subprocess.run(
        [str(part) for part in command],
        env=os.environ | {"HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-6000:]
    return process.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> list[Path]:
    """What each version has saved."""
    folder = tmp_path_factory.mktemp("saved")
    for i, python in enumerate(PYTHONS):
        run(python, "save.py", folder / str(i))
    return [folder / str(i) for i in range(len(PYTHONS))]


@pytest.mark.slow
@pytest.mark.skipif(PYTHONS == [""], reason="MODELING_SUMAGG_PYTHONS names no interpreters to save and load with")
@pytest.mark.parametrize("python", PYTHONS)
def test_what_each_version_saves_is_right_with(python, saved, tmp_path):
    output = run(python, "load.py", *saved, HF_HOME=str(tmp_path))
    assert output.count(" ok\n") == 6 * len(saved)
