"""Bandwidth of the operators over the length of the sequence, beside a copy of memory on the same device.

    python examples/benchmarks/operators.py --output_dir operators

Beside each operator its formula in plain operations of PyTorch, with `--compile` also compiled; on a GPU, where
flash-linear-attention is installed, its HGRN and retention too. The bandwidth of a case is what the operator has to move
at least, each input read once and each output written once, over the time; that of the copy is what the device gives.
"""

import functools
import importlib.util
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_utils import COLORS, BenchmarkArguments, Row, benchmark, hardware, markdown_table
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from transformers import HfArgumentParser

from modeling_sumagg.ops import (
    causal_sum,
    causal_token_statistics,
    causal_token_statistics_reference,
    token_statistics,
    token_statistics_reference,
)
from modeling_sumagg.training.plots import label_logarithmic


COPY, FORMULA, COMPILED = "copy", "formula", "formula, compiled"
PASSES = ("forward", "forward and backward")


@dataclass
class OperatorArguments(BenchmarkArguments):
    lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192, 32768], metadata={"help": "Tokens."})
    batch_size: int = 1
    hidden_size: int = 768
    num_heads: int = 12
    compile: bool = field(default=False, metadata={"help": "Also time the formulas compiled by torch.compile."})

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise ValueError(f"`num_heads` must divide `hidden_size`, got {self.num_heads} and {self.hidden_size}.")


def _heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _sum_formula(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.cumsum(dim=1, dtype=torch.float32).to(x.dtype)


def _decays(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Logarithms of decays `[B, T, H]`, mild enough for the formula, which divides by their products."""
    return torch.full((*x.shape[:2], num_heads), -1e-4, device=x.device)


def _decayed_sum(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return causal_sum(x, log_decay=_decays(x, num_heads))[0]


def _decayed_sum_formula(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    products = _decays(x, num_heads).cumsum(1).exp().unsqueeze(-1)
    return ((x.unflatten(2, (num_heads, -1)) / products).cumsum(1) * products).flatten(2).to(x.dtype)


def _causal_statistics(function: Callable, x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return function(_heads(x, num_heads), torch.ones(num_heads, device=x.device), None)[0]


def _statistics(function: Callable, x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return function(_heads(x, num_heads), torch.ones(num_heads, device=x.device))


def _hgrn(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    from fla.ops.hgrn import fused_recurrent_hgrn

    # A forget gate that keeps everything.
    return fused_recurrent_hgrn(x, torch.zeros_like(x))[0]


def _retention(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    from fla.ops.retention import chunk_retention

    heads = x.unflatten(2, (num_heads, -1))
    return chunk_retention(heads, heads, heads)[0]


# The operator and its formula, of terms [B, T, D] and the number of heads.
OPERATORS: dict[str, tuple[Callable, Callable]] = {
    "causal_sum": (lambda x, num_heads: causal_sum(x)[0], _sum_formula),
    "causal_sum, decays": (_decayed_sum, _decayed_sum_formula),
    "causal_token_statistics": (
        functools.partial(_causal_statistics, causal_token_statistics),
        functools.partial(_causal_statistics, causal_token_statistics_reference),
    ),
    "token_statistics": (
        functools.partial(_statistics, token_statistics),
        functools.partial(_statistics, token_statistics_reference),
    ),
}
PEERS = {"HGRN (fla)": _hgrn, "retention (fla)": _retention}


def cases(arguments: OperatorArguments, operator: str) -> list[str]:
    names = [COPY, operator, FORMULA, *([COMPILED] if arguments.compile else [])]
    if operator != "token_statistics" and arguments.device.startswith("cuda") and importlib.util.find_spec("fla"):
        names += PEERS
    return names


def moved_bytes(arguments: OperatorArguments, name: str, operator: str, length: int, backward: bool) -> int:
    """The least that a case moves: the terms in, the result out; in backward gradients in and out, and w once more."""
    tensors = 2
    if backward and name != COPY:
        tensors = 4 if operator.startswith("causal_sum") else 5
    itemsize = getattr(torch, arguments.dtype).itemsize
    return tensors * arguments.batch_size * length * arguments.hidden_size * itemsize


def prepare_run(
    arguments: OperatorArguments, name: str, length: int, *, operator: str, backward: bool
) -> Callable[[], object]:
    """One pass of a case."""
    shape = arguments.batch_size, length, arguments.hidden_size
    x = torch.randn(shape, device=arguments.device, dtype=getattr(torch, arguments.dtype), requires_grad=backward)
    if name == COPY:
        target = torch.empty_like(x, requires_grad=False)
        return lambda: target.copy_(x.detach())
    ours, formula = OPERATORS[operator]
    function = PEERS.get(name, ours if name == operator else formula)
    if name == COMPILED:
        function = torch.compile(function)
    if backward:
        grad = torch.randn_like(function(x, arguments.num_heads))
        return lambda: torch.autograd.grad(function(x, arguments.num_heads), x, grad)
    return torch.no_grad()(lambda: function(x, arguments.num_heads))


def bandwidth_table(rows: list[Row], moved: dict[tuple[str, int], int]) -> str:
    """Gigabytes a second of each case, and the share of what the copy reaches."""
    sizes = sorted({row.size for row in rows})
    rates = {(row.case, row.size): moved[row.case, row.size] / row.median for row in rows}
    lines = ["| tokens | " + " | ".join(map(str, sizes)) + " |", "|---" * (len(sizes) + 1) + "|"]
    for case in dict.fromkeys(row.case for row in rows):
        cells = []
        for size in sizes:
            rate = rates.get((case, size))
            cells.append("–" if rate is None else f"{rate / 1e9:.3g} GB/s, {rate / rates[COPY, size]:.0%}")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], title: str, path: Path) -> None:
    """The bandwidth of each case as a share of the copy's in its own panel, with bars for the quartiles of its runs."""
    figure = Figure(figsize=(4.5 * len(OPERATORS), 8), layout="constrained")
    panels = figure.subplots(len(PASSES), len(OPERATORS), squeeze=False, sharey=True)
    for (column, operator), (row, title_of_pass) in itertools.product(enumerate(OPERATORS), enumerate(PASSES)):
        found = [result for result in results if (result["operator"], result["pass"]) == (operator, title_of_pass)]
        axes, sizes = panels[row][column], sorted({result["size"] for result in found})
        copies = {r["size"]: r["moved_bytes"] / r["median"] for r in found if r["case"] == COPY}
        for case in dict.fromkeys(result["case"] for result in found):
            results_of_case = [result for result in found if result["case"] == case]
            shares = np.array([
                [100 * r["moved_bytes"] / seconds / copies[r["size"]]
                 for seconds in (r["median"], *np.percentile(r["seconds"], [25, 75]))]
                for r in results_of_case
            ]).T  # fmt: skip
            axes.errorbar(
                [result["size"] for result in results_of_case],
                shares[0],
                [shares[0] - shares[2], shares[1] - shares[0]],
                color=COLORS[case],
                linestyle="--" if case == COPY else "-",
                marker="o",
                markersize=4,
                capsize=3,
                label=case,
            )
        speeds = f"copy: {min(copies.values()) / 1e9:.3g} to {max(copies.values()) / 1e9:.3g} GB/s"
        axes.set(title=f"{operator}, {title_of_pass}\n{speeds}", xscale="log", yscale="log")
        axes.set(xlabel="tokens", ylabel="share of the copy's bandwidth")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    for axes in figure.axes:
        label_logarithmic(axes.yaxis, "{x:,g} %")
        axes.yaxis.set_tick_params(labelleft=True)
    figure.suptitle(f"Bandwidth of the operators beside that of a copy; {title}")
    figure.savefig(path, dpi=120)


def main() -> None:
    (arguments,) = HfArgumentParser(OperatorArguments).parse_args_into_dataclasses()
    arguments.set_up()
    where = hardware(arguments.device)
    sizes = f"batch {arguments.batch_size}, width {arguments.hidden_size}, {arguments.num_heads} heads"
    described = ", ".join(f"{key} {value}" for key, value in where.items())
    report, results = [f"Operators, {sizes}, {arguments.dtype}. {described}.\n"], []
    for operator in OPERATORS:
        for i, title in enumerate(PASSES):
            run = functools.partial(prepare_run, operator=operator, backward=i == 1)
            rows = benchmark(arguments, arguments.lengths, cases(arguments, operator), run)
            moved = {
                (row.case, row.size): moved_bytes(arguments, row.case, operator, row.size, backward=i == 1)
                for row in rows
            }
            report.append(f"## {operator}, {title}\n\n{bandwidth_table(rows, moved)}")
            report.append(markdown_table(rows, "tokens", operator))
            for row in rows:
                facts = {"operator": operator, "pass": title, "median": row.median, "spread": row.spread}
                results.append(asdict(row) | facts | {"moved_bytes": moved[row.case, row.size]})

    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plot(results, f"{sizes}, {arguments.dtype}", folder / "operators.png")
    (folder / "operators.md").write_text("\n".join(report))
    written = {"hardware": where, "arguments": asdict(arguments), "rows": results}
    (folder / "operators.json").write_text(json.dumps(written, indent=1) + "\n")
    print("\n".join(report))


if __name__ == "__main__":
    main()
