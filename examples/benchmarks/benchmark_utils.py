"""What the benchmarks share: interleaved timing, peak memory, and results as JSON, Markdown and PNG."""

import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, NullLocator, StrMethodFormatter

from modeling_sumagg.training.plots import label_logarithmic


FLOOR = "matrix products of "
# The same in every picture; what has attention and is compared with is black.
COLORS = {
    "SumAgg, keys, window of 64 last": "tab:blue",
    "SumAgg, keys": "mediumvioletred",
    "SumAgg": "tab:olive",
    "SumAgg, sliding window last": "tab:pink",
    "SumAgg, full attention last": "tab:brown",
    "SumAgg, plain sums": "tab:gray",
    "SumAgg, plain sums, full attention last": "rosybrown",
    "SumAgg, streamed": "deepskyblue",
    "SumAgg, in chunks": "deepskyblue",
    "SumAgg, sliding window last, in chunks": "tab:cyan",
    "ToST, in chunks": "tab:orange",
    "sum": "tab:blue",
    "causal_sum": "tab:blue",
    "causal_sum, decays": "tab:blue",
    "ToST": "tab:orange",
    "token_statistics": "tab:orange",
    "causal_token_statistics": "tab:orange",
    "GPT-2": "black",
    "ViT": "black",
    "wav2vec 2.0": "black",
    "attention": "black",
    "attention, with its weights": "dimgray",
    "Llama": "tab:red",
    "Mamba2": "tab:purple",
    "RWKV": "tab:green",
    "Parakeet": "tab:red",
    "log-mel frames alone": "tab:gray",
    "copy": "black",
    "formula": "tab:green",
    "formula, compiled": "tab:purple",
    "HGRN (fla)": "tab:brown",
    "retention (fla)": "tab:pink",
}


@dataclass
class BenchmarkArguments:
    output_dir: str = field(metadata={"help": "Folder for the JSON, the Markdown table and the plot."})
    device: str = field(
        default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu",
        metadata={"help": '"cpu", or "cuda" (the default where there is one).'},
    )
    dtype: str = field(default="float32", metadata={"help": '"float32", "bfloat16" or "float16".'})
    threads: int | None = field(
        default=None, metadata={"help": "Threads on a CPU; by default as many as torch takes."}
    )
    repetitions: int = field(default=5, metadata={"help": "Timed runs of each case, one of each in turn."})
    seconds_limit: float = field(
        default=120.0,
        metadata={"help": "A case is left out at sizes at which one run would take longer, going by smaller ones."},
    )
    compile: bool = field(default=False, metadata={"help": "Compile every model with torch.compile."})
    memory: bool = field(
        default=True, metadata={"help": "Also measure peak memory, on a CPU each case in a process of its own."}
    )

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f'`dtype` must be "float32", "bfloat16" or "float16", got {self.dtype!r}.')
        if self.repetitions < 1:
            raise ValueError(f"`repetitions` must be at least 1, got {self.repetitions}.")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"`threads` must be at least 1, got {self.threads}.")

    @property
    def warmup(self) -> int:
        """Runs of each case before the timed ones. The first call of a model changes its config: it is compiled twice."""
        return 3 if self.compile else 1

    def set_up(self) -> None:
        """Apply what holds for the whole process."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.manual_seed(0)


@dataclass
class Row:
    """One case at one size: `seconds` of every run, and where measured `peak_bytes` of memory and of a decode state."""

    case: str
    size: int
    seconds: list[float]
    peak_bytes: int | None = None
    state_bytes: int | None = None

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(high - low) / self.median


def hardware(device: str) -> dict[str, str]:
    """On what the benchmark runs, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    described = {
        "cpu": f"{names[0] if names else platform.processor()}, {os.cpu_count()} logical cores",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if torch.device(device).type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
    return described


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """
    `forward`, compiled by torch.compile for itself alone.

    torch keeps what it compiled by the code it began in, which for models of transformers is one wrapper for all, and
    falls back to eager execution after a few versions. So each call gets code of its own.
    """

    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return torch.compile(call)


def time_interleaved(
    cases: dict[str, Callable[[], object]],
    repetitions: int,
    device: str,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """
    Seconds of every run of every case, one run of each in turn, so that all meet the same disturbances.

    The first `warmup` runs of each are not counted. On a GPU every run is waited for.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repetition in range(-warmup, repetitions):
        for name, run in cases.items():
            wait()
            start = clock()
            run()
            wait()
            if repetition >= 0:
                seconds[name].append(clock() - start)
    return seconds


def run_once(
    arguments: BenchmarkArguments,
    prepare_run: Callable[[Any, str, int], Callable[[], object]],
    name: str,
    size: int,
) -> Row:
    """
    One run of a case, and the most bytes held at a time while it is prepared and run.

    On a GPU allocated bytes beyond those before; on a CPU resident ones of a fresh process, PyTorch and Python included
    (Linux only), and the seconds are those of the processor, of all threads together.
    """
    if torch.device(arguments.device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(arguments.device)
        before = torch.cuda.memory_allocated(arguments.device)
        run = prepare_run(arguments, name, size)
        seconds = time_interleaved({name: run}, 1, arguments.device, warmup=0)[name]
        return Row(name, size, seconds, torch.cuda.max_memory_allocated(arguments.device) - before)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run_alone, arguments, prepare_run, name, size).result()


def _run_alone(arguments, prepare_run, name, size):
    arguments.set_up()
    run = prepare_run(arguments, name, size)
    seconds = time_interleaved({name: run}, 1, arguments.device, warmup=0, clock=time.process_time)[name]
    status = Path("/proc/self/status").read_text().splitlines()
    (peak,) = [line.split()[1] for line in status if line.startswith("VmHWM:")]
    return Row(name, size, seconds, int(peak) * 1024)


def benchmark(
    arguments: BenchmarkArguments,
    sizes: Iterable[int],
    names: list[str],
    prepare_run: Callable[[Any, str, int], Callable[[], object]],
    grows: bool = True,
) -> list[Row]:
    """
    Time every case at every size, from the smallest to the largest.

    Args:
        names (`list[str]`): the cases.
        prepare_run (`Callable`): from the arguments, a name and a size, what to run.
        grows (`bool`): whether every case takes at least as much longer as its size grows.
    """
    rows: list[Row] = []
    last: dict[str, Row] = {}
    for size in sorted(sizes):
        wanted = []
        for name in names:
            # Some grow faster, and are then let in once too often.
            growth = size / last[name].size if grows and name in last else 1.0
            expected = last[name].median * growth if name in last else 0.0
            if expected <= arguments.seconds_limit:
                wanted.append(name)
            else:
                print(f"{name} is left out at {size}: it took {last[name].median:.1f} s at {last[name].size}.")
        runs = {name: prepare_run(arguments, name, size) for name in wanted}
        timed = time_interleaved(runs, arguments.repetitions, arguments.device, arguments.warmup)
        for name, seconds in timed.items():
            last[name] = Row(name, size, seconds)
            print(f"{name} at {size}: {_time_in_words(last[name])}", flush=True)
        # The models of one size must not stay while those of the next are made.
        del runs
        if arguments.memory:
            for name in wanted:
                last[name].peak_bytes = run_once(arguments, prepare_run, name, size).peak_bytes
        rows += [last[name] for name in wanted]
    return rows


def tensor_bytes(value: object) -> int:
    """The bytes of the tensors that an object holds, in its attributes, lists and dictionaries; each tensor counts once."""
    found: dict[int, int] = {}
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            found[each.data_ptr()] = each.nbytes
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, (list, tuple)):
            waiting += each
        elif hasattr(each, "__dict__") and not isinstance(each, (type, torch.nn.Module)):
            waiting += vars(each).values()
    return sum(found.values())


def _time_in_words(row: Row) -> str:
    return f"{_duration(row.median)} ± {row.spread / 2:.0%}"


def _duration(seconds: float) -> str:
    """Three digits, with a unit."""
    unit, factor = next(((u, f) for u, f in (("s", 1), ("ms", 1e3)) if seconds * f >= 1), ("µs", 1e6))
    value = seconds * factor
    return f"{value:.{max(2 - int(math.log10(value)), 0)}f} {unit}"


def markdown_table(rows: list[Row], size_name: str, baseline: str) -> str:
    """Medians and how many times faster than `baseline` each is; below, peak memory and its ratio."""
    sizes = sorted({row.size for row in rows})
    cases = list(dict.fromkeys(row.case for row in rows))
    found = {(row.case, row.size): row for row in rows}

    def line(case: str, cell: Callable[[Row, Row | None], str]) -> str:
        cells = (found.get((case, size)) for size in sizes)
        texts = ("–" if row is None else cell(row, found.get((baseline, row.size))) for row in cells)
        return f"| {case} | " + " | ".join(texts) + " |"

    def time_cell(row: Row, base: Row | None) -> str:
        ratio = "" if base is None or base is row else f", {base.median / row.median:.2f} ×"
        return f"{_time_in_words(row)}{ratio}"

    def memory_cell(row: Row, base: Row | None) -> str:
        if row.peak_bytes is None:
            return "–"
        ratio = "" if base is None or base is row else f", {row.peak_bytes / base.peak_bytes:.2f} ×"
        return f"{row.peak_bytes / 2**20:.0f} MiB{ratio}"

    header = f"| {size_name} | " + " | ".join(f"{size:,}".replace(",", " ") for size in sizes) + " |"
    rule = "|---" * (len(sizes) + 1) + "|"
    parts = [f"Time, and how many times faster than {baseline}:\n", header, rule]
    parts += [line(case, time_cell) for case in cases]
    if any(row.state_bytes is not None for row in rows):
        parts += ["\nThe decode state:\n", header, rule]
        parts += [line(case, lambda row, base: f"{(row.state_bytes or 0) / 2**20:.3g} MiB") for case in cases]
    if any(row.peak_bytes is not None for row in rows):
        parts += [f"\nPeak memory, and its ratio to that of {baseline}:\n", header, rule]
        parts += [line(case, memory_cell) for case in cases if any(r.case == case and r.peak_bytes for r in rows)]
    return "\n".join(parts) + "\n"


def write_results(
    arguments: BenchmarkArguments, name: str, title: str, size_name: str, baseline: str, rows: list[Row]
) -> None:
    """`{name}.json`, `.md` and `.png` in the output folder, and the table on the screen."""
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    where = hardware(arguments.device)
    described = [asdict(row) | {"median": row.median, "spread": row.spread} for row in rows]
    facts = {"title": title, "size_name": size_name, "baseline": baseline}
    results = {**facts, "hardware": where, "arguments": asdict(arguments), "rows": described}
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")

    caption = f"{title}. {', '.join(f'{key} {value}' for key, value in where.items())}, {arguments.dtype}."
    table = f"{caption}\n\n{markdown_table(rows, size_name, baseline)}"
    (folder / f"{name}.md").write_text(table)
    print(f"\n{table}")
    plot(rows, title, size_name, baseline, folder / f"{name}.png")
    print(f"Written to {folder}: {name}.json, {name}.md, {name}.png")


def plot(rows: list[Row], title: str, size_name: str, baseline: str, path: Path) -> None:
    """
    A panel of how many times faster than the baseline each case is, one of times, with a bar from the lower to the upper
    quartile of the runs, and one of the decode state, or else of peak memory; those that nothing was measured for are left
    out.
    """
    bases = {row.size: row for row in rows if row.case == baseline}
    times, state, memory = "time (median and quartiles)", "decode state (MiB)", "peak memory (MiB)"
    panels: list[tuple[str, str | Formatter, Callable[[Row], float | None]]] = [
        (
            f"times as fast as {baseline}",
            "{x:,g} ×",
            lambda row: bases[row.size].median / row.median if row.size in bases else None,
        ),
        (times, EngFormatter("s"), lambda row: row.median),
        (state, "{x:,g}", lambda row: row.state_bytes and row.state_bytes / 2**20),
        (memory, "{x:,g}", lambda row: row.peak_bytes and row.peak_bytes / 2**20),
    ]
    if any(row.state_bytes for row in rows):
        # Python, PyTorch and the weights are in the memory of a process, and a state is small beside them.
        panels.pop()
    panels = [panel for panel in panels if any(panel[2](row) is not None for row in rows)]
    figure = Figure(figsize=(1 + 4.5 * len(panels), 5.5), layout="constrained")
    for axes, (label, formatter, value) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set(xscale="log", xlabel=size_name, ylabel=label)
        for case in dict.fromkeys(row.case for row in rows):
            points = [row for row in rows if row.case == case and value(row) is not None]
            if points:
                _draw_case(axes, case, points, value, quartiles=label == times)
        sizes = sorted({row.size for row in rows})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        if label == memory:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        else:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            # Where nothing changes, the picture is to look so.
            widening = max(1.1, (8 * low / high) ** 0.5)
            axes.set_ylim(low / widening, high * widening)
            label_logarithmic(axes.yaxis, formatter)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.suptitle(title.replace("; ", "\n", 1), fontsize="medium")
    handles = dict(zip(*reversed(figure.axes[-1].get_legend_handles_labels()), strict=True))
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize="small"
    )
    figure.savefig(path, dpi=120)


def _draw_case(axes: Axes, case: str, rows: list[Row], value: Callable[[Row], float | None], quartiles: bool) -> None:
    name = case.removeprefix(FLOOR)
    color = COLORS.get(name, "gray")
    style = {"linestyle": ":", "marker": ""} if case.startswith(FLOOR) else {"linestyle": "-", "marker": "o"}
    values = [value(row) for row in rows]
    errors = None
    if quartiles:
        low, high = np.percentile([row.seconds for row in rows], [25, 75], axis=1)
        errors = np.stack([values - low, high - values])
    axes.errorbar(
        [row.size for row in rows], values, errors, color=color, markersize=4, capsize=3, label=case, **style
    )
