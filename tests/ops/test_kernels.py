"""The Triton kernels in Triton's interpreter, which is chosen for a whole process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton")


@pytest.mark.parametrize("operator", ["sum"])
def test_in_the_interpreter(operator):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "kernel_cases.py", "-k", operator]
    process = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout
