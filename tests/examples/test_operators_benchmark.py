"""The benchmark of the operators: its bytes are counted right, and its command writes what it says."""

import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def operators(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
    import operators

    return operators


def test_bandwidth_of_the_least_bytes(operators, tmp_path):
    arguments = operators.OperatorArguments(str(tmp_path), batch_size=2, hidden_size=8, num_heads=2, dtype="bfloat16")

    def moved(name, operator, backward):
        return operators.moved_bytes(arguments, name, operator, 5, backward)

    tensor = 2 * 5 * 8 * 2
    assert moved("copy", "causal_sum", True) == moved("causal_sum", "causal_sum", False) == 2 * tensor
    assert moved("causal_sum", "causal_sum", True) == 4 * tensor
    assert moved("formula", "token_statistics", True) == 5 * tensor
    rows = [operators.Row("copy", 5, [2e-9]), operators.Row("causal_sum", 5, [8e-9])]
    table = operators.bandwidth_table(rows, {("copy", 5): 2, ("causal_sum", 5): 4})
    assert table.splitlines()[2:] == ["| copy | 1 GB/s, 100% |", "| causal_sum | 0.5 GB/s, 50% |"]


def test_every_case_is_the_operator(operators, tmp_path):
    arguments = operators.OperatorArguments(str(tmp_path), batch_size=2, hidden_size=8, num_heads=2)
    for operator, (ours, formula) in operators.OPERATORS.items():
        names = operators.cases(arguments, operator)
        assert names == ["copy", operator, "formula"]
        x = operators.torch.randn(2, 70, 8)
        operators.torch.testing.assert_close(ours(x, 2), formula(x, 2))


def test_the_command(operators, tmp_path, monkeypatch):
    options = "--lengths 32 70 --hidden_size 8 --num_heads 2 --repetitions 2 --memory False --device cpu"
    monkeypatch.setattr(sys, "argv", ["operators.py", "--output_dir", str(tmp_path), *options.split()])
    operators.main()
    results = json.loads((tmp_path / "operators.json").read_text())
    # Four operators, two passes, three cases, two lengths.
    assert len(results["rows"]) == 4 * 2 * 3 * 2
    assert all(len(row["seconds"]) == 2 and row["median"] > 0 for row in results["rows"])
    assert "## causal_token_statistics, forward and backward" in (tmp_path / "operators.md").read_text()
    assert (tmp_path / "operators.png").read_bytes().startswith(b"\x89PNG")


def test_heads_that_do_not_divide_the_width(operators, tmp_path):
    with pytest.raises(ValueError, match="`num_heads` must divide `hidden_size`, got 3 and 8"):
        operators.OperatorArguments(str(tmp_path), hidden_size=8, num_heads=3)
