"""The table and the plot of the serving benchmark; its servers need vLLM, and run in `tests/serving`."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture
def benchmark_module(monkeypatch):
    folder = Path(__file__).parents[2] / "examples" / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    # Not by its name, which `tests/serving` has too.
    spec = importlib.util.spec_from_file_location("serving_benchmark", folder / "serving.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_table_and_plot(benchmark_module, tmp_path):
    row = benchmark_module.Row
    rows = [
        row("gpt2", 512, 8, 2.0, 64.0, 2**20),
        row("gpt2", 64, 8, 4.0, 128.0, 2**19),
        row("sums", 512, 8, 3.0, 96.0, 2**13),
    ]
    assert benchmark_module.table(rows).splitlines()[2:] == [
        "| 64 | 8 | gpt2 | 4.00 | 128 | 512 |",
        "| 512 | 8 | gpt2 | 2.00 | 64 | 1024 |",
        "| 512 | 8 | sums | 3.00 | 96 (1.50 ×) | 8 |",
    ]
    benchmark_module.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_models_of_one_size(benchmark_module, tmp_path):
    arguments = benchmark_module.ServingArguments(str(tmp_path), hidden_size=128, num_hidden_layers=2)
    configs = {case: benchmark_module.make_config(arguments, case) for case in arguments.cases}
    assert {(c.hidden_size, c.num_hidden_layers, c.vocab_size) for c in configs.values()} == {(128, 2, 8192)}
    assert configs["sums"].layer_types == ["summation"] * 2
    assert configs["hybrid"].layer_types == ["summation", "full_attention"]
    with pytest.raises(ValueError, match="'gpt3'"):
        benchmark_module.make_config(arguments, "gpt3")
