"""A training step over the length of the sequence: read whole, and in chunks with the same gradients.

    python examples/benchmarks/long_training.py --output_dir examples/benchmarks/results/long_training

The models have the sizes of `quickstart.py`, random weights, and read random tokens. A step is the gradients of one sequence and
AdamW, each in a process of its own, of which the seconds of the processor and the peak memory are taken.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from benchmark_utils import BenchmarkArguments, Row, run_once, write_results
from transformers import AutoModelForCausalLM, GPT2Config, HfArgumentParser, PreTrainedConfig

from modeling_sumagg import SumAggConfig, ToSTTextConfig
from modeling_sumagg.training import backward_in_chunks


NAME = "long_training"
BASELINE = "SumAgg"
CHUNKS = ", in chunks"


@dataclass
class LongTrainingArguments(BenchmarkArguments):
    lengths: list[int] = field(
        default_factory=lambda: [8192, 16384, 32768, 65536, 1048576], metadata={"help": "Tokens."}
    )
    whole_up_to: int = field(default=65536, metadata={"help": "Beyond so many tokens, only in chunks."})
    attention_up_to: int = field(
        default=16384, metadata={"help": "Beyond so many tokens, no GPT-2, whose time grows with the square."}
    )
    chunk_length: int = field(default=2048, metadata={"help": "Tokens of a chunk."})
    models: list[str] | None = field(default=None, metadata={"help": "The cases by name; by default all."})
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    vocab_size: int = 4096
    sliding_window: int = 256

    def __post_init__(self):
        super().__post_init__()
        if self.chunk_length < 1 or min(self.lengths) < 2:
            raise ValueError(
                f"`chunk_length` must be at least 1 and `lengths` at least 2, got {self.chunk_length} and {self.lengths}."
            )
        ours = [name for name in configurations(self, 2) if name != "GPT-2"]
        known = [BASELINE, "GPT-2", *(name + CHUNKS for name in ours)]
        unknown = set(self.models or ()) - set(known)
        if unknown:
            raise ValueError(f"`models` must be among {known}, got {sorted(unknown)}.")
        self.models = self.models or known


def configurations(arguments: LongTrainingArguments, max_length: int) -> dict[str, PreTrainedConfig]:
    """Every model by its name, with positions for `max_length` tokens."""
    width, depth, heads = arguments.hidden_size, arguments.num_hidden_layers, arguments.num_attention_heads
    size = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
    size |= {"vocab_size": arguments.vocab_size}
    lower = ["summation"] * (depth - 1)
    gpt2 = GPT2Config(
        n_embd=width,
        n_layer=depth,
        n_head=heads,
        n_positions=max_length,
        vocab_size=arguments.vocab_size,
        attn_pdrop=0.0,
    )
    window = {"sliding_window": arguments.sliding_window}
    return {
        "SumAgg": SumAggConfig(**size, layer_types=[*lower, "summation"]),
        "SumAgg, sliding window last": SumAggConfig(**size, layer_types=[*lower, "sliding_attention"], **window),
        "ToST": ToSTTextConfig(**size, sum_decay="input", position_embedding_type="none", use_membership_bias=False),
        "GPT-2": gpt2,
    }


def prepare_run(arguments: LongTrainingArguments, name: str, length: int) -> Callable[[], object]:
    """A training step of one case."""
    config = configurations(arguments, length)[name.removesuffix(CHUNKS)]
    with torch.device(arguments.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype)).train()
    ids = torch.randint(arguments.vocab_size, (1, length), device=arguments.device)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(ids: torch.Tensor) -> None:
        if name.endswith(CHUNKS):
            backward_in_chunks(model, ids, ids, chunk_length=arguments.chunk_length)
        else:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    # The first call of everything takes longer.
    step(ids[:, :64])
    return lambda: step(ids)


def table_of_tokens(rows: list[Row]) -> str:
    """Microseconds a token, and their ratio to those of the whole sequence at the length nearest to 16,384."""
    whole = [row for row in rows if row.case == BASELINE]
    base = min(whole, key=lambda row: abs(row.size - 16384), default=None)
    lines = ["| case | tokens | µs a token |" + (f" to {base.case} at {base.size:,} |" if base else "")]
    lines.append("|---|---|---|---|" if base else "|---|---|---|")
    for row in rows:
        line = f"| {row.case} | {row.size:,} | {1e6 * row.median / row.size:.1f} |"
        lines.append(line + (f" {row.median / row.size / (base.median / base.size):.2f} × |" if base else ""))
    return "\n".join(lines) + "\n"


def main() -> None:
    (arguments,) = HfArgumentParser(LongTrainingArguments).parse_args_into_dataclasses()
    arguments.set_up()
    rows = []
    for length in sorted(arguments.lengths):
        for name in arguments.models:
            limit = arguments.attention_up_to if name == "GPT-2" else arguments.whole_up_to
            if name.endswith(CHUNKS) or length <= limit:
                runs = [run_once(arguments, prepare_run, name, length) for _ in range(arguments.repetitions)]
                seconds = [run.seconds[0] for run in runs]
                rows.append(Row(name, length, seconds, max(run.peak_bytes for run in runs)))
                print(
                    f"{name} at {length}: {rows[-1].median:.1f} s, {rows[-1].peak_bytes / 2**20:.0f} MiB", flush=True
                )
    title = (
        f"Training step: gradients of one sequence, and AdamW; width {arguments.hidden_size}, "
        f"{arguments.num_hidden_layers} layers, {arguments.vocab_size:,} tokens in the vocabulary, chunks of "
        f"{arguments.chunk_length:,} tokens"
    )
    write_results(arguments, NAME, title, "tokens", BASELINE, rows)
    table = table_of_tokens(rows)
    print(table)
    with (Path(arguments.output_dir) / f"{NAME}.md").open("a") as file:
        file.write(f"\nTime for a token:\n\n{table}")


if __name__ == "__main__":
    main()
