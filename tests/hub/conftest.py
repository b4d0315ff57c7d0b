import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import dynamic_module_utils

from modeling_sumagg.publishing import cards, folder_checks


@pytest.fixture(scope="session", autouse=True)
def modules_cache(tmp_path_factory):
    """Code that is loaded from checkpoints is copied here, and not to the user's cache."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(autouse=True)
def checks_that_run(monkeypatch):
    """The tests of the examples, in the same process, leave them out."""
    monkeypatch.setattr(cards, "check_folder", folder_checks.check_folder)


@pytest.fixture(scope="session")
def clean_python(tmp_path_factory) -> Path:
    """The interpreter of a virtual environment with every package of this one but ours."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    site_packages = next(folder.rglob("site-packages"))
    for directory in map(Path, sys.path):
        if directory.name in ("site-packages", "dist-packages"):
            for entry in directory.iterdir():
                if "modeling_sumagg" not in entry.name and not (site_packages / entry.name).exists():
                    (site_packages / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    imported = subprocess.run([python, "-I", "-c", "import modeling_sumagg"], capture_output=True, text=True)
    assert "No module named 'modeling_sumagg'" in imported.stderr
    return python


@pytest.fixture
def start_script(tmp_path) -> Callable[..., subprocess.Popen]:
    """Start a script of `tests/hub/scripts` in an interpreter, with caches of its own."""

    def start(python: str | Path, script: str, *arguments: object, **environment: str) -> subprocess.Popen:
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        own = {
            "HF_HOME": str(tmp_path / "hf_home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",  # the tests of the examples, in the same process, set it
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [python, "-I", Path(__file__).parent / "scripts" / script, *arguments]
        return subprocess.Popen(
            [str(part) for part in command],
            cwd=tmp_path,
            env=inherited | own | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture
def run_script(start_script) -> Callable[..., str]:
    """Run such a script to its successful end, and return what it printed."""

    def run(*arguments: object, **environment: str) -> str:
        process = start_script(*arguments, **environment)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output[-6000:]
        return output

    return run
