"""The Triton kernels without a GPU: in Triton's interpreter, and compiled for an H100."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modeling_sumagg.ops import causal_sum, kernel_modes, set_kernels


def run_python(*arguments, **environment):
    """In another process: Triton chooses between its compiler and its interpreter when it is imported."""
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(__file__).parent,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr


# Of the dtypes, which the names of the cases number, float32 alone; derivatives of both orders take the interpreter longest.
FEW = "(loop or pytorch or keyed_sum_and) and not (dtype1 or dtype2 or dtype3 or statistics)"


@pytest.mark.parametrize("cases", [FEW, pytest.param(f"not ({FEW})", marks=pytest.mark.slow)], ids=["few", "others"])
def test_in_the_interpreter(cases):
    pytest.importorskip("triton")
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "kernel_cases.py", "-k", cases, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_every_kernel_compiles_for_an_h100(tmp_path):
    """The compiler refuses what the interpreter takes, such as a variable that changes its type."""
    pytest.importorskip("triton")
    run_python("compile_kernels.py", TRITON_CACHE_DIR=str(tmp_path))


@pytest.fixture
def mode():
    yield
    set_kernels("auto")


def test_modes(mode):
    with pytest.raises(ValueError, match=r"one of \('auto', 'triton', 'torch'\), got 'cuda'"):
        set_kernels("cuda")
    pytest.importorskip("triton")
    set_kernels("triton")
    with pytest.raises(ValueError, match="run on CUDA tensors, got one on 'cpu'.*TRITON_INTERPRET=1"):
        causal_sum(torch.ones(1, 2, 3))


def test_without_triton_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    kernel_modes._has_triton.cache_clear()
    with caplog.at_level(logging.WARNING):
        answers = {kernel_modes._has_kernels("auto", "cuda") for _ in range(3)}
    kernel_modes._has_triton.cache_clear()
    assert answers == {False} and len(caplog.records) == 1
    assert "Triton cannot be imported" in caplog.text and "set_kernels('torch')" in caplog.text
