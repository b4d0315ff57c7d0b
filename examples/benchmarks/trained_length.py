"""Whether long sequences help: a model that is trained on short rows, and on long ones in chunks, with as many tokens.

    python examples/benchmarks/trained_length.py --output_dir examples/benchmarks/results/trained_length

All begin from one model, which is trained on rows of 256 tokens of source code. Then each length continues with the same number of
steps, of as many tokens, at the same learning rate. The perplexity is that of held-out rows of the longest length, by the number
of tokens before, read in chunks.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from learning import (
    SCALES,
    LearningArguments,
    Texts,
    TrainingStep,
    build_model,
    load_data,
    markdown,
    matched_sizes,
    optimizer_of,
)
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import nn
from transformers import HfArgumentParser, PreTrainedModel, set_seed

from modeling_sumagg.training import backward_in_chunks, evaluate_in_chunks
from modeling_sumagg.training.plots import label_logarithmic


FIRST_LENGTH = 256


@dataclass
class TrainedLengthArguments:
    output_dir: str = field(default="trained_length", metadata={"help": "Folder of the numbers, table and picture."})
    model: str = field(
        default="keyed-windows", metadata={"help": "A model of `learning.py` without a limit of length."}
    )
    lengths: list[int] = field(default_factory=lambda: [1024, 65536], metadata={"help": "Tokens of a row."})
    first_steps: int = field(default=1500, metadata={"help": f"Steps on rows of {FIRST_LENGTH} tokens, 2,048 each."})
    steps: int = field(default=40, metadata={"help": "Steps at each length."})
    tokens_per_step: int = field(default=65536, metadata={"help": "Of the steps at each length."})
    chunk_length: int = field(default=2048, metadata={"help": "Tokens of a chunk."})
    held_out_rows: int = field(default=4, metadata={"help": "Rows of the longest length to evaluate on."})
    first_learning_rate: float = 4e-3
    learning_rate: float = 2e-3
    dtype: str = field(default="bfloat16", metadata={"help": "Of the matrix products, by autocast."})
    seed: int = 0
    threads: int = 1
    cache_dir: str = field(default="runs/learning", metadata={"help": "Folder for the tokens."})

    def __post_init__(self):
        wrong = [length for length in self.lengths if length < 2 or self.tokens_per_step % length]
        if wrong:
            raise ValueError(f"`lengths` must divide the {self.tokens_per_step} tokens of a step, got {wrong}.")


def continued(arguments: TrainedLengthArguments, model: PreTrainedModel, texts: Texts, length: int) -> PreTrainedModel:
    """The model after the steps of one length; each length reads the same number of tokens of the same texts."""
    model = copy.deepcopy(model).train()
    optimizer, schedule = optimizer_of(model, arguments.learning_rate, SCALES["cpu"], arguments.steps)
    generator = torch.Generator().manual_seed(arguments.seed)
    dtype = getattr(torch, arguments.dtype)
    rows = arguments.tokens_per_step // length
    # As many tokens at a time as a chunk has: a row in chunks, or several rows at once.
    rows_at_once = max(1, arguments.chunk_length // length)
    for step in range(arguments.steps):
        input_ids, _ = texts.batch(rows, length, generator)
        for part in input_ids.split(rows_at_once):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                backward_in_chunks(
                    model,
                    part,
                    part,
                    chunk_length=arguments.chunk_length,
                    num_items_in_batch=rows * (length - 1),
                )
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"rows of {length:,}: step {step + 1} of {arguments.steps}", flush=True)
    return model.eval()


def perplexity_by_position(
    arguments: TrainedLengthArguments, model: PreTrainedModel, rows: torch.Tensor
) -> dict[str, float]:
    """Perplexity of the tokens with 1 to 63, 64 to 127, 128 to 255, ... tokens before them."""
    dtype = getattr(torch, arguments.dtype)
    sums = torch.zeros(rows.shape[1], dtype=torch.float64)
    for row in rows.split(1):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = evaluate_in_chunks(model, row, row, chunk_length=arguments.chunk_length)
        sums += found.token_losses[0].double()
    values = {"all": (sums[1:].sum() / (len(rows) * (len(sums) - 1))).exp().item()}
    start, end = 1, 64
    while start < len(sums):
        part = sums[start:end]
        values[f"{start}-{min(end, len(sums)) - 1}"] = (part.sum() / (len(rows) * len(part))).exp().item()
        start, end = end, 2 * end
    return values


def report(results: dict[str, dict[str, float]], title: str, folder: Path) -> str:
    """Write the table and the picture."""
    parts = list(next(iter(results.values())))
    table = [["tokens before", *(part.replace("-", "–") for part in parts)], ["---"] * (1 + len(parts))]
    table += [[name, *(f"{values[part]:.2f}" for part in parts)] for name, values in results.items()]
    text = f"# {title}\n\n{markdown(table)}"
    (folder / "trained_length.md").write_text(text, encoding="utf-8")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, values in results.items():
        ends = [int(part.split("-")[1]) for part in parts[1:]]
        axes.plot(ends, [values[part] for part in parts[1:]], marker="o", markersize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens before", ylabel="perplexity on held-out code")
    axes.xaxis.set_major_formatter(EngFormatter())
    label_logarithmic(axes.yaxis, "{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize="small")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(folder / "trained_length.png", dpi=130)
    return text


def main() -> None:
    (arguments,) = HfArgumentParser(TrainedLengthArguments).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    data = LearningArguments(data="code", context=FIRST_LENGTH, dtype=arguments.dtype, cache_dir=arguments.cache_dir)
    texts, scale = load_data(data), SCALES["cpu"]
    set_seed(arguments.seed)
    sizes = matched_sizes(arguments.model, scale, texts.vocab_size, FIRST_LENGTH)
    model = build_model(arguments.model, scale, texts.vocab_size, FIRST_LENGTH, **sizes).train()
    optimizer, schedule = optimizer_of(model, arguments.first_learning_rate, scale, arguments.first_steps)
    training_step = TrainingStep(model, optimizer, schedule, getattr(torch, arguments.dtype))
    generator = torch.Generator().manual_seed(arguments.seed)
    for _ in range(arguments.first_steps):
        training_step([texts.batch(scale.tokens_per_step // FIRST_LENGTH, FIRST_LENGTH, generator)])
    longest = max(arguments.lengths)
    rows, _ = texts.held_out(longest, arguments.held_out_rows * longest)
    results = {"before": perplexity_by_position(arguments, model.eval(), rows)}
    for length in arguments.lengths:
        trained = continued(arguments, model, texts, length)
        results[f"rows of {length:,}"] = perplexity_by_position(arguments, trained, rows)
        print(json.dumps(results), flush=True)
    tokens = arguments.steps * arguments.tokens_per_step / 1e6
    title = (
        f"{arguments.model} continued on {tokens:.1f} million tokens of code; {len(rows)} held-out rows of {longest:,}"
    )
    text = report(results, title, folder)
    (folder / "trained_length.json").write_text(
        json.dumps({"arguments": vars(arguments), "perplexity": results}, indent=1) + "\n", encoding="utf-8"
    )
    print(text)


if __name__ == "__main__":
    main()
