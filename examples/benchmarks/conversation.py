"""Seconds to the first token of each turn of a conversation, and the bytes that are kept between turns.

    python examples/benchmarks/conversation.py --output_dir conversation

Summation aggregation with a `PrefixStore`, beside GPT-2 and Llama of the same width, depth and vocabulary, with random
weights. "again" reads every turn from the beginning of the conversation, "copied cache" continues from a copy of the keys
and values that the turn before left.
"""

import copy
import inspect
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from benchmark_utils import COLORS, BenchmarkArguments, hardware
from language_models import LanguageModelArguments, build_model
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from transformers import Cache, DynamicCache, HfArgumentParser, PreTrainedModel
from transformers.generation import BaseStreamer

from modeling_sumagg.streams import PrefixStore
from modeling_sumagg.training.plots import label_logarithmic


STORE, AGAIN, COPIED = "prefix store", "again", "copied cache"
CASES = [
    ("SumAgg", STORE),
    ("SumAgg", AGAIN),
    ("SumAgg, full attention last", STORE),
    ("GPT-2", AGAIN),
    ("GPT-2", COPIED),
    ("Llama", AGAIN),
    ("Llama", COPIED),
]
LINES = {STORE: "-", AGAIN: ":", COPIED: "--"}


@dataclass
class ConversationArguments(BenchmarkArguments):
    turns: int = field(default=10, metadata={"help": "Questions with their answers."})
    question_tokens: int = field(default=268, metadata={"help": "Tokens of each question."})
    answer_tokens: int = field(default=32, metadata={"help": "Tokens of each answer."})
    hidden_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 12
    vocab_size: int = 8192

    def __post_init__(self):
        super().__post_init__()
        for name in ("turns", "question_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    @property
    def tokens_of_a_turn(self) -> int:
        return self.question_tokens + self.answer_tokens

    def model(self, name: str) -> PreTrainedModel:
        """The model of this name as in `language_models.py`, with positions for the whole conversation."""
        shared = {key: getattr(self, key) for key in ("output_dir", "device", "dtype", "threads")}
        sizes = {key: getattr(self, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
        arguments = LanguageModelArguments(**shared, **sizes, vocab_size=self.vocab_size, work="decode")
        torch.manual_seed(0)
        return build_model(arguments, name, self.turns * self.tokens_of_a_turn)


@dataclass
class Row:
    """One turn of one case: the `seconds` to its first token in every run, and the bytes kept after it."""

    case: str
    turn: int
    seconds: list[float]
    kept_bytes: int

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


class FirstToken(BaseStreamer):
    """When the first token of an answer is there."""

    def __init__(self):
        self.calls = 0
        self.start = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        # The first call brings the prompt.
        self.calls += 1
        if self.calls == 2:
            self.seconds = time.perf_counter() - self.start

    def end(self) -> None:
        pass


def cache_bytes(cache: Cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def make_generate(model: PreTrainedModel, way: str) -> tuple[Callable[..., torch.Tensor], Callable[[], int]]:
    """`generate` with what a way keeps from turn to turn, and how many bytes that is."""
    if way == STORE:
        store = PrefixStore(model)
        return store.generate, lambda: store.nbytes
    if way == AGAIN:
        return model.generate, lambda: 0
    kept = DynamicCache(config=model.config)
    # Its name in this version of transformers.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def generate(input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
        nonlocal kept
        # The cache of this turn stays whole while the next one is written, as for two continuations of one beginning.
        cache = copy.deepcopy(kept)
        output = model.generate(input_ids, **{name: cache}, **kwargs)
        kept = cache
        return output

    return generate, lambda: cache_bytes(kept)


def converse(arguments: ConversationArguments, model: PreTrainedModel, way: str) -> list[tuple[float, int, list[int]]]:
    """Of each turn the seconds to its first token, the bytes kept, and the whole text so far."""
    draw = torch.Generator().manual_seed(0)
    generate, kept_bytes = make_generate(model, way)
    text, turns = torch.zeros(1, 0, dtype=torch.long), []
    number = arguments.answer_tokens
    for _ in range(arguments.turns):
        question = torch.randint(1, arguments.vocab_size, (1, arguments.question_tokens), generator=draw)
        text = torch.cat([text, question], dim=1)
        streamer = FirstToken()
        text = generate(
            text.to(arguments.device),
            max_new_tokens=number,
            min_new_tokens=number,
            do_sample=False,
            pad_token_id=0,
            streamer=streamer,
        ).cpu()
        turns.append((streamer.seconds, kept_bytes(), text[0].tolist()))
    return turns


def table(rows: list[Row], turns: list[int]) -> str:
    """Of some turns the milliseconds to the first token and the KiB kept."""
    found = {(row.case, row.turn): row for row in rows}
    header = "| | " + " | ".join(f"turn {turn}" for turn in turns) + " | last ÷ second | kept at the end |"
    lines = [header, "|---" * (len(turns) + 3) + "|"]
    for case in dict.fromkeys(row.case for row in rows):
        times = " | ".join(f"{found[case, turn].median * 1e3:.1f} ms" for turn in turns)
        ratio = found[case, turns[-1]].median / found[case, 2].median
        lines.append(f"| {case} | {times} | {ratio:.2f} | {found[case, turns[-1]].kept_bytes / 1024:,.0f} KiB |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], title: str, path: Path) -> None:
    """A panel of the times and one of the bytes, turn by turn."""
    panels = {"seconds to the first token": "s", "bytes kept": "B"}
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    for axes, (label, unit) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axes.set(xlabel="turn", ylabel=label, yscale="log")
        for case in dict.fromkeys(row.case for row in rows):
            name, _, way = case.rpartition(", ")
            points = [row for row in rows if row.case == case and (unit == "s" or row.kept_bytes)]
            values = [row.median if unit == "s" else row.kept_bytes for row in points]
            style = {"linestyle": LINES[way], "color": COLORS[name], "marker": "o", "markersize": 3}
            axes.plot([row.turn for row in points], values, label=case, **style)
        label_logarithmic(axes.yaxis, EngFormatter(unit))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.suptitle(title.replace("; ", "\n", 1), fontsize="medium")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    (arguments,) = HfArgumentParser(ConversationArguments).parse_args_into_dataclasses()
    arguments.set_up()
    models = {name: arguments.model(name) for name, _ in CASES}
    rows, texts = [], {}
    for name, way in CASES:
        # The first conversation is not counted: it loads code and fills pools of memory.
        runs = [converse(arguments, models[name], way) for _ in range(arguments.repetitions + 1)][1:]
        case = f"{name}, {way}"
        seconds = np.array([[turn[0] for turn in run] for run in runs]).T.tolist()
        rows += [Row(case, i + 1, seconds[i], turn[1]) for i, turn in enumerate(runs[0])]
        text = [turn[2] for turn in runs[0]]
        if texts.setdefault(name, text) != text:
            raise RuntimeError(
                f"{case} wrote another text than the same model did without: this is a fault, report it."
            )
        print(f"{case}: {rows[-1].median * 1e3:.1f} ms to the first token of turn {arguments.turns}", flush=True)

    folder, where = Path(arguments.output_dir), hardware(arguments.device)
    folder.mkdir(parents=True, exist_ok=True)
    title = (
        f"A conversation of {arguments.turns} turns of {arguments.tokens_of_a_turn} tokens; width "
        f"{arguments.hidden_size}, {arguments.num_hidden_layers} layers, {arguments.vocab_size:,} tokens in the vocabulary"
    )
    described = [asdict(row) | {"median": row.median} for row in rows]
    results = {"title": title, "hardware": where, "arguments": asdict(arguments), "rows": described}
    (folder / "conversation.json").write_text(json.dumps(results, indent=1) + "\n")
    facts = ", ".join(f"{key} {value}" for key, value in where.items())
    shown = sorted({1, 2, (arguments.turns + 1) // 2, arguments.turns})
    text = f"{title}. {facts}, {arguments.dtype}.\n\nTime to the first token:\n\n{table(rows, shown)}"
    (folder / "conversation.md").write_text(text)
    plot(rows, title, folder / "conversation.png")
    print(f"\n{text}\nWritten to {folder}: conversation.json, conversation.md, conversation.png")


if __name__ == "__main__":
    main()
