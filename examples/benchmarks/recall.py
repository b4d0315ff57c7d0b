"""Multi-query associative recall: accuracy over the bytes of the decode state, in the settings of Arora et al. (arXiv 2312.04927).

    python examples/benchmarks/recall.py --widths 64 --models llama keys-16 keys-64 vector --output recall.jsonl
    python examples/benchmarks/recall.py --report --output recall.jsonl

A row gives pairs of a key and a value, then asks for the value of each key again, at distances that are mostly short. All
other tokens are random. Models of two blocks are trained on rows of 64 to 256 tokens with 4 to 64 pairs, and evaluated on
rows of up to 1,024 tokens with 256 pairs. The vocabulary has 8,192 tokens. Each run is a line of the file, and is not run
again; the report takes the best learning rate of each model.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark_utils import hardware, tensor_bytes
from language_models import decode_state
from learning import GATED, IGNORED, KEYED, SCALES, markdown, optimizer_of, read_lines
from matplotlib.figure import Figure
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    LlamaConfig,
    Mamba2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    set_seed,
)

from modeling_sumagg import SumAggConfig
from modeling_sumagg.training.scripts import user_errors


VOCABULARY = 8192
# Tokens of a row, pairs in it, and the weight of such rows in training.
TRAINED = ((64, 4, 5), (128, 8, 1), (256, 16, 1), (256, 32, 1), (256, 64, 1))
EVALUATED = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
EVALUATED_ROWS = 64
DISTANCE_POWER = 0.01  # of the law by which distances are drawn; the published one


@dataclass
class RecallArguments:
    output: str = field(default="recall.jsonl", metadata={"help": "File of the runs, a line each."})
    models: list[str] | None = field(default=None, metadata={"help": "Some of the models; by default all."})
    widths: list[int] = field(default_factory=lambda: [64, 128, 256], metadata={"help": "Widths of the models."})
    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2])
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: int = field(default=20_000, metadata={"help": "Optimizer steps."})
    tokens_per_step: int = field(default=2**14, metadata={"help": "Tokens of a step."})
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    threads: int = field(default=1, metadata={"help": "Threads on a CPU."})
    report: bool = field(
        default=False, metadata={"help": "Make the table and the plot of the lines, and run nothing."}
    )

    def __post_init__(self):
        self.models = list(MODELS) if self.models is None else self.models
        if unknown := [name for name in self.models if name not in MODELS]:
            raise ValueError(f"There are no models {unknown}. Choose of {list(MODELS)}.")
        if self.tokens_per_step < 256 or self.steps < 1:
            raise ValueError(
                f"`tokens_per_step` must be at least 256 and `steps` at least 1, got {self.tokens_per_step} and {self.steps}."
            )


def recall_rows(rows: int, length: int, pairs: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rows `[rows, length]` and their labels: the label of a key that is asked for is its value, all others are ignored.

    Unlike the labels of a language model, the label of a token stands in its own column.
    """
    half = VOCABULARY // 2
    keys = 1 + torch.rand(rows, half - 1, generator=generator).topk(pairs).indices
    values = half + torch.rand(rows, half, generator=generator).topk(pairs).indices
    input_ids = torch.zeros(rows, length, dtype=torch.long)
    input_ids[:, 0 : 2 * pairs : 2], input_ids[:, 1 : 2 * pairs : 2] = keys, values
    # Places in steps of two behind the pairs, without repetition; near ones are the likeliest.
    places = torch.arange(1, length // 2 - pairs + 1, dtype=torch.float64)
    chances = (DISTANCE_POWER * places ** (DISTANCE_POWER - 1)).expand(rows, -1)
    columns = 2 * pairs + 2 * torch.multinomial(chances, pairs, generator=generator)
    labels = torch.full_like(input_ids, IGNORED).scatter(1, columns, values)
    input_ids.scatter_(1, columns, keys)
    noise = torch.randint(VOCABULARY, input_ids.shape, generator=generator)
    return torch.where(input_ids == 0, noise, input_ids), labels


def _ours(layer_types: str = "summation", **values: Any) -> Callable[[int], PreTrainedConfig]:
    def config(width: int) -> SumAggConfig:
        heads = max(1, width // 64)
        sizes = {"hidden_size": width, "num_attention_heads": heads, "num_sum_heads": heads}
        return SumAggConfig(
            vocab_size=VOCABULARY, num_hidden_layers=2, layer_types=["summation", layer_types], **{**values, **sizes}
        )

    return config


def _llama(width: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=max(1, width // 64),
        intermediate_size=8 * round(width / 3),
        tie_word_embeddings=True,
    )


def _mamba2(width: int) -> Mamba2Config:
    return Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=2,
        num_heads=2 * width // 64,
        head_dim=64,
        state_size=64,
        n_groups=1,
        chunk_size=32,
        tie_word_embeddings=True,
        initializer_range=0.02,
    )


def _gated_deltanet(width: int) -> Qwen3NextConfig:
    heads = max(1, width // 64)
    return Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=2,
        layer_types=["linear_attention"] * 2,
        linear_num_value_heads=heads,
        linear_num_key_heads=heads,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        intermediate_size=8 * round(width / 3),
        num_experts=0,
        tie_word_embeddings=True,
    )


MODELS: dict[str, tuple[str, Callable[[int], PreTrainedConfig]]] = {
    "llama": ("Llama: rotary attention", _llama),
    "mamba2": ("Mamba2, N = 64", _mamba2),
    "gated-deltanet": ("gated DeltaNet, N = 64", _gated_deltanet),
    "keys-64": ("sums with keys, N = 64", _ours(**{**KEYED, "sum_state_size": 64})),
    "keys-16": ("sums with keys, N = 16", _ours(**{**KEYED, "sum_state_size": 16})),
    "keys-1": ("sums with keys, N = 1", _ours(**{**KEYED, "sum_state_size": 1})),
    "keys-64-window": (
        "sums with keys, N = 64, a window of 64 last",
        _ours("sliding_attention", **{**KEYED, "sum_state_size": 64}, sliding_window=64),
    ),
    "vector": ("sums without keys", _ours(**GATED)),
}


def answers(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits `[n, vocabulary]` of the tokens that have a label, and their labels `[n]`. The others need no logits."""
    asked = labels != IGNORED
    hidden_states = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return model.get_output_embeddings()(hidden_states[asked]), labels[asked]


def state_bytes(model: PreTrainedModel, length: int) -> int:
    """The bytes of all tensors in the cache of one row after `length` tokens."""
    with torch.no_grad():
        outputs = model(torch.ones(1, length, dtype=torch.long, device=model.device), use_cache=True)
    return tensor_bytes(decode_state(outputs))


@torch.inference_mode()
def accuracies(model: PreTrainedModel, settings: Iterable[tuple[int, int]] = EVALUATED) -> dict[str, float]:
    """Of rows that no training sees, by their length and pairs."""
    model.eval()
    found = {}
    for length, pairs in settings:
        generator = torch.Generator().manual_seed(2**31 + length + pairs)
        right = asked = 0
        for _ in range(EVALUATED_ROWS // 8):
            rows = [part.to(model.device) for part in recall_rows(8, length, pairs, generator)]
            logits, labels = answers(model, *rows)
            right += (logits.argmax(-1) == labels).sum().item()
            asked += len(labels)
        found[f"{length}/{pairs}"] = right / asked
    model.train()
    return found


def run(arguments: RecallArguments, name: str, width: int, seed: int, learning_rate: float) -> dict[str, Any]:
    """Train and evaluate one model."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(MODELS[name][1](width)).to(arguments.device).train()
    scale = dataclasses.replace(SCALES["cpu"], warmup_steps=min(1000, arguments.steps // 10))
    optimizer, schedule = optimizer_of(model, learning_rate, scale, arguments.steps)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([float(weight) for _, _, weight in TRAINED])
    start, processor_start, curve = time.perf_counter(), time.process_time(), []
    for step in range(1, arguments.steps + 1):
        length, pairs, _ = TRAINED[torch.multinomial(weights, 1, generator=generator).item()]
        rows = recall_rows(arguments.tokens_per_step // length, length, pairs, generator)
        loss = F.cross_entropy(*answers(model, *(part.to(model.device) for part in rows)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(arguments.steps // 10, 1) == 0:
            found = accuracies(model, EVALUATED[:3])
            curve.append({"step": step, "accuracy": found})
            print(f"{name}, {width}, {learning_rate:g}: {step} steps, {time.perf_counter() - start:.0f} s, {found}")
            sys.stdout.flush()
    return {
        **run_key(arguments, name, width, seed, learning_rate),
        "accuracy": accuracies(model),
        "curve": curve,
        "parameters": model.num_parameters(),
        "state_bytes": {length: state_bytes(model, length) for length in (64, 1024)},
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor_start,
        "hardware": hardware(arguments.device),
    }


def run_key(arguments: RecallArguments, name: str, width: int, seed: int, learning_rate: float) -> dict[str, Any]:
    """What tells a run from the others."""
    training = {"steps": arguments.steps, "tokens_per_step": arguments.tokens_per_step}
    return {"model": name, "width": width, "seed": seed, "learning_rate": learning_rate, **training}


def mean_accuracy(line: dict[str, Any]) -> float:
    return sum(line["accuracy"].values()) / len(line["accuracy"])


def report(path: Path) -> str:
    """The table and the plot of all lines, the best learning rate of each model and width."""
    lines = read_lines(path)
    if not lines:
        raise ValueError(f"There are no runs in {path}.")
    best: dict[tuple, dict[str, Any]] = {}
    for line in lines:
        key = line["model"], line["width"], line["steps"], line["tokens_per_step"]
        best[key] = max(best.get(key, line), line, key=mean_accuracy)
    columns = [f"{length}/{pairs}" for length, pairs in EVALUATED]
    rows = [["model", "width", "steps", "rate", "state at 1,024 tokens", *columns]]
    rows.append(["---"] * len(rows[0]))
    order = {name: index for index, name in enumerate(MODELS)}
    for line in sorted(best.values(), key=lambda line: (line["width"], order[line["model"]], line["steps"])):
        state = f"{line['state_bytes']['1024'] / 1024:,.0f} KiB"
        cells = [
            MODELS[line["model"]][0],
            str(line["width"]),
            f"{line['steps']:,}",
            f"{line['learning_rate']:g}",
            state,
        ]
        rows.append(cells + [f"{line['accuracy'][column]:.2f}" for column in columns])
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in MODELS:
        points = sorted(
            (line["state_bytes"]["1024"] / 1024, line["accuracy"]["256/64"])
            for line in best.values()
            if line["model"] == name
        )
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=MODELS[name][0])
    axes.set(xscale="log", ylim=(-0.02, 1.02), xlabel="KiB of state after 1,024 tokens")
    axes.set(ylabel="accuracy", title="Recall of 64 pairs in 256 tokens")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=130)
    text = f"Accuracy by tokens / pairs of a row:\n\n{markdown(rows)}\n![Accuracy over state bytes]({path.stem}.png)\n"
    path.with_suffix(".md").write_text(text)
    return text


def main() -> None:
    parser = HfArgumentParser(RecallArguments, description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    with user_errors():
        (arguments,) = parser.parse_args_into_dataclasses()
        path = Path(arguments.output)
        if arguments.report:
            print(report(path))
            return
    torch.set_num_threads(arguments.threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.models:
        for width, seed, rate in (
            (width, seed, rate)
            for width in arguments.widths
            for seed in arguments.seeds
            for rate in arguments.learning_rates
        ):
            key = run_key(arguments, name, width, seed, rate)
            if any(all(line[part] == value for part, value in key.items()) for line in read_lines(path)):
                continue
            line = run(arguments, name, width, seed, rate)
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
    print(report(path))


if __name__ == "__main__":
    main()
