"""transformers' own tests, from the source distribution of the installed version.

A wheel of transformers holds no tests. The source distribution holds the common ones, which import each other
relatively, so that they can be imported as a package `transformers_tests`, to which `stand_ins/transformers_tests`
contributes the few modules that the source distribution lacks.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers
from filelock import FileLock


STAND_INS = Path(__file__).parent / "stand_ins"


def fetch_transformers_tests() -> Path:
    """
    The directory that holds `transformers_tests`, filled through pip the first time.

    Raises:
        `OSError`: neither a cached copy nor the package index can be reached.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "modeling_sumagg"
    target = cache / f"transformers-{transformers.__version__}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "fetch.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache) as directory:
                _download(transformers.__version__, Path(directory))
                # Whole or not at all: an interrupted run must not leave half of it behind.
                Path(directory, "tree").rename(target)
    return target


def _download(version: str, directory: Path) -> None:
    requirement = f"transformers=={version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=transformers", requirement]
    # pip asks for the metadata, for which setuptools, but no build, is needed.
    pip = subprocess.run([*command, f"--dest={directory}"], capture_output=True, text=True)
    if pip.returncode != 0:
        raise OSError(f"`{' '.join(command[1:])}` failed: {pip.stderr.strip().splitlines()[-1:]}")
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        prefix = f"transformers-{version}/tests/"
        for member in tar.getmembers():
            if member.name.startswith(prefix):
                member.name = f"transformers_tests/{member.name.removeprefix(prefix)}"
                tar.extract(member, directory / "tree", filter="data")
    init = directory / "tree" / "transformers_tests" / "__init__.py"
    init.write_text('__path__ = __import__("pkgutil").extend_path(__path__, __name__)\n')


def import_path() -> list[str]:
    """What `sys.path` needs for `import transformers_tests`, also in the processes that distributed tests start."""
    return [str(fetch_transformers_tests()), str(STAND_INS)]
