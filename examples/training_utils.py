"""What the training scripts have in common: arguments, data, models, baselines, plots, and the check of what was saved."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import evaluate
import matplotlib.pyplot as plt
import numpy as np
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    BaseImageProcessor,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import unset_hf_deepspeed_config

from modeling_sumagg.configuration import preset_path
from modeling_sumagg.hub import create_model_card
from modeling_sumagg.training import decay_parameter_names


END_OF_TEXT = "<|endoftext|>"

# A model for a few minutes on two cores; `--config_overrides` changes it.
SMALL_MODEL = {
    "model_type": "sumagg",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    # Of classifiers made from it.
    "pooling": "mean",
}

DATA_LOADERS = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "document"}),
}


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A checkpoint to start from: a folder or a Hub id."}
    )
    preset: str | None = field(
        default=None, metadata={"help": "A named architecture to train from scratch, such as sumagg-hybrid-small."}
    )
    config_overrides: str = field(
        default="{}",
        metadata={"help": 'Config values to replace, as JSON: \'{"hidden_size": 384, "num_hidden_layers": 8}\'.'},
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights, such as bfloat16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flex_attention, ..."})

    def __post_init__(self):
        if self.model_name_or_path is not None and self.preset is not None:
            raise ValueError("Give --model_name_or_path or --preset, not both.")


@dataclass
class TextModelArguments(ModelArguments):
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "A tokenizer: a folder or a Hub id. By default the checkpoint's, or one learned from the data."
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of a tokenizer learned from the data."})


@dataclass
class DataArguments:
    embedded_source: ClassVar[str] = "Python's standard library"

    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "A csv, json, jsonl, parquet or txt file, or a folder with one folder of images a class.",
            "aliases": ["--train_dir"],
        },
    )
    validation_file: str | None = field(
        default=None, metadata={"help": "The same for the held-out data.", "aliases": ["--validation_dir"]}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; needs --max_steps."})
    held_out_share: float = field(
        default=0.1, metadata={"help": "Share of the training rows split off where there is no held-out split."}
    )
    held_out_rows: int = field(default=100, metadata={"help": "The same as a number of rows, for --streaming."})

    def __post_init__(self):
        if self.dataset_name is not None and self.train_file is not None:
            raise ValueError("Give --dataset_name or --train_file, not both.")
        if self.validation_file is not None and self.train_file is None:
            raise ValueError("--validation_file needs a --train_file.")

    @property
    def source(self) -> str:
        return self.dataset_name or self.train_file or self.embedded_source


@dataclass
class TextDataArguments(DataArguments):
    text_column_name: str = field(default="text", metadata={"help": "Column with the texts."})


@dataclass
class LabelledDataArguments(DataArguments):
    test_file: str | None = field(
        default=None, metadata={"help": "A file to evaluate on at the end.", "aliases": ["--test_dir"]}
    )
    label_column_name: str = field(default="label", metadata={"help": "Column with what is to be predicted."})

    def __post_init__(self):
        super().__post_init__()
        if self.test_file is not None and self.train_file is None:
            raise ValueError("--test_file needs a --train_file.")
        if self.streaming:
            raise ValueError("All the labels are read before training: --streaming is for run_clm.py.")


@dataclass
class Task:
    """What a script prepares for `Trainer`, and what it compares the result with."""

    auto_class: type
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase | BaseImageProcessor
    train_dataset: Dataset | IterableDataset
    # `validation`, and `test` where there is one.
    held_out: dict[str, Dataset | IterableDataset]
    # The rest of the arguments of `Trainer`.
    trainer_arguments: dict[str, Any]
    source: str
    metric: str
    # The metric by baseline and by held-out split.
    baselines: Callable[[], dict[str, dict[str, float]]]


def parse_arguments(dataclasses: tuple[type, ...], **defaults) -> tuple:
    """Parse the command line into `dataclasses`, of which the last is `TrainingArguments`, with defaults of a script."""
    parser = HfArgumentParser(dataclasses)
    parser.set_defaults(report_to="none", dataloader_pin_memory=torch.accelerator.is_available(), **defaults)
    arguments = parser.parse_args_into_dataclasses()
    # `Trainer` finds the newest checkpoint in its folder itself.
    if arguments[-1].resume_from_checkpoint == "last":
        arguments[-1].resume_from_checkpoint = True
    return arguments


def load_splits(
    arguments: DataArguments, embedded: Callable[[], DatasetDict], columns: dict[str, str], seed: int
) -> DatasetDict | IterableDatasetDict:
    """
    The splits of the Hub's data set, of the files, or of the embedded data, with the columns renamed.

    Args:
        arguments (`DataArguments`): where the data is.
        embedded (`Callable`): makes the embedded data.
        columns (`dict[str, str]`): for each column to return, its name in the data.
        seed (`int`): seed of the split, where the data has none.

    Returns:
        `DatasetDict` or, if they are streamed, `IterableDatasetDict`: `train`, `validation`, and more if there are.

    Raises:
        `ValueError`: an ending that has no loader, a missing column, or too few rows to hold some out.
    """
    if arguments.dataset_name is not None:
        splits = load_dataset(arguments.dataset_name, arguments.dataset_config_name, streaming=arguments.streaming)
    elif arguments.train_file is not None:
        files = {split: getattr(arguments, f"{split}_file", None) for split in ("train", "validation", "test")}
        files = {split: path for split, path in files.items() if path is not None}
        if Path(arguments.train_file).is_dir():
            patterns = {split: f"{path}/**" for split, path in files.items()}
            splits = load_dataset("imagefolder", data_files=patterns, streaming=arguments.streaming)
        else:
            # One at a time: they may differ in columns that are not used.
            splits = {name: _load_file(path, arguments.streaming) for name, path in files.items()}
    else:
        splits = embedded()
        if arguments.streaming:
            splits = {name: split.to_iterable_dataset() for name, split in splits.items()}
    splits = (IterableDatasetDict if arguments.streaming else DatasetDict)(splits)
    for name, split in splits.items():
        found = split.column_names or list(next(iter(split)))
        missing = sorted(set(columns.values()) - set(found))
        if missing:
            raise ValueError(
                f"The {name} split of {arguments.source} has no column {missing[0]!r}. Its columns are {found}: choose "
                + " and ".join(
                    f"the column for `{column}` with --{column}_column_name"
                    for column in columns
                    if hasattr(arguments, f"{column}_column_name")
                )
                + "."
            )
        renamed = {old: new for new, old in columns.items() if old != new}
        splits[name] = split.select_columns(list(columns.values())).rename_columns(renamed)
    if "validation" not in splits:
        _hold_out(splits, arguments, seed)
    return splits


def _load_file(path: str, streaming: bool):
    ending = Path(path).suffix
    if ending not in DATA_LOADERS:
        raise ValueError(f"A data file ends with one of {sorted(DATA_LOADERS)}, got {path!r}.")
    builder, options = DATA_LOADERS[ending]
    return load_dataset(builder, data_files=path, split="train", streaming=streaming, **options)


def _hold_out(splits: DatasetDict | IterableDatasetDict, arguments: DataArguments, seed: int) -> None:
    if arguments.streaming:
        splits["validation"] = splits["train"].take(arguments.held_out_rows)
        splits["train"] = splits["train"].skip(arguments.held_out_rows)
        return
    if len(splits["train"]) < 2:
        raise ValueError(
            f"{arguments.source} has {len(splits['train'])} rows: too few to hold some out. Give a --validation_file."
        )
    parts = splits["train"].train_test_split(arguments.held_out_share, seed=seed)
    splits["train"], splits["validation"] = parts["train"], parts["test"]


def load_tokenizer(arguments: TextModelArguments, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that the arguments name, or one learned from the texts."""
    name = arguments.tokenizer_name or arguments.model_name_or_path
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    return train_tokenizer(texts, arguments.vocab_size)


def load_config(
    arguments: ModelArguments, defaults: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None, **values
) -> PreTrainedConfig:
    """
    The config of the checkpoint, of the preset, or of `defaults`, with the overrides and then `values` in it. A new
    model of text gets the vocabulary and the special tokens of the tokenizer.
    """
    overrides = {**json.loads(arguments.config_overrides), **values}
    if arguments.model_name_or_path is not None:
        return AutoConfig.from_pretrained(arguments.model_name_or_path, **overrides)
    if arguments.preset is not None:
        defaults = json.loads(Path(preset_path(arguments.preset)).read_text(encoding="utf-8"))
    vocabulary = {}
    if tokenizer is not None:
        vocabulary = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        vocabulary["vocab_size"] = len(tokenizer)
    config_class = CONFIG_MAPPING[overrides.pop("model_type", defaults["model_type"])]
    # Another family may lack some of the defaults.
    known = {name: value for name, value in defaults.items() if name in config_class.__dataclass_fields__}
    return config_class(**{**known, **vocabulary, **overrides})


def load_model(auto_class: type, arguments: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """The checkpoint's weights in a model of `auto_class`, with a new head for other classes, or a new model."""
    options = {"dtype": arguments.dtype, "attn_implementation": arguments.attn_implementation}
    if arguments.model_name_or_path is None:
        return auto_class.from_config(config, **options)
    return auto_class.from_pretrained(
        arguments.model_name_or_path, config=config, ignore_mismatched_sizes=True, **options
    )


class WeightDecayTrainer(Trainer):
    """[`~transformers.Trainer`] with the weight decay of the original models, see [`decay_parameter_names`]."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    A byte-level BPE tokenizer as GPT-2's, learned from `texts`: any string can be encoded, and comes back exactly.

    The one special token, `<|endoftext|>`, ends documents and pads.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def concatenated_blocks(documents: Iterable[list[int]], separator_id: int, block_size: int) -> Iterator[list[int]]:
    """Join the tokens of the documents, a separator after each, and cut them into whole blocks; the rest is dropped."""
    buffer: list[int] = []
    for document in documents:
        buffer += [*document, separator_id]
        end = len(buffer) - len(buffer) % block_size
        for start in range(0, end, block_size):
            yield buffer[start : start + block_size]
        buffer = buffer[end:]


def unigram_cross_entropy(training_tokens: Iterable[list[int]], tokens: Iterable[list[int]], vocab_size: int) -> float:
    """
    Mean negative log-likelihood, in nats, of `tokens` under the frequencies of the training tokens (add-one smoothed):
    the best that a model can do that looks at no context. A language model does not predict the first token of a
    sequence, so that is not counted in `tokens` either.
    """
    counts = np.ones(vocab_size)
    for sequence in training_tokens:
        counts += np.bincount(sequence, minlength=vocab_size)
    negative_log_likelihood = np.log(counts.sum()) - np.log(counts)
    return float(np.mean(np.concatenate([negative_log_likelihood[sequence[1:]] for sequence in tokens])))


def load_metric(name: str) -> evaluate.Metric:
    """A metric of `examples/metrics`."""
    return evaluate.load(str(Path(__file__).parent / "metrics" / name))


def accuracy_metrics() -> Callable[[EvalPrediction], dict[str, float]]:
    """`compute_metrics` of a classifier."""
    metric = load_metric("accuracy")
    return lambda outputs: metric.compute(
        predictions=np.argmax(outputs.predictions, axis=1), references=outputs.label_ids
    )


def label_names(splits: DatasetDict) -> list[str]:
    """
    The names of the classes: those of the data set, or every value of the label column, in order.

    Raises:
        `ValueError`: a row without a label, or fewer than two classes.
    """
    feature = splits["train"].features["label"]
    if hasattr(feature, "names"):
        return feature.names
    values = set()
    for name, split in splits.items():
        missing = [row for row, label in enumerate(split["label"]) if label is None or label == ""]
        if missing:
            raise ValueError(f"Row {missing[0]} of the {name} split has no label.")
        values.update(split["label"])
    if len(values) < 2:
        raise ValueError(f"A classifier needs at least two classes, the data has {sorted(map(str, values))}.")
    numbers = all(isinstance(value, (bool, int, float)) for value in values)
    return [str(value) for value in (sorted(values) if numbers else sorted(values, key=str))]


def label_indices(splits: DatasetDict, names: list[str]) -> dict[Any, int]:
    """The index of its class for every value that the label column can have."""
    if hasattr(splits["train"].features["label"], "names"):
        return {index: index for index in range(len(names))}
    values = {value for split in splits.values() for value in split["label"]}
    return {value: names.index(str(value)) for value in values}


def label_maps(names: list[str]) -> dict[str, dict]:
    """The config's values for classes with these names."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def build_trainer(task: Task, arguments: TrainingArguments, model: nn.Module | None = None) -> WeightDecayTrainer:
    """The `Trainer` of a task, for its model or for another."""
    return WeightDecayTrainer(
        model=task.model if model is None else model,
        args=arguments,
        train_dataset=task.train_dataset,
        eval_dataset=task.held_out["validation"],
        processing_class=task.processing_class,
        **task.trainer_arguments,
    )


def train_and_evaluate(trainer: Trainer, task: Task) -> dict[str, float]:
    """Train, save the model, the state and all metrics, and return the task's metric by held-out split."""
    training = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if task.model.can_generate():
        # `Trainer` turns it off.
        task.model.config.use_cache = True
    trainer.save_model()
    trainer.save_state()
    trainer.log_metrics("train", training.metrics)
    trainer.save_metrics("train", training.metrics)
    values = {}
    for split, dataset in task.held_out.items():
        prefix = "eval" if split == "validation" else split
        metrics = trainer.evaluate(dataset, metric_key_prefix=prefix)
        trainer.log_metrics(prefix, metrics)
        trainer.save_metrics(prefix, metrics)
        values[split] = metrics[f"{prefix}_{task.metric}"]
    return values


def report(trainer: Trainer, task: Task, values: dict[str, float]) -> None:
    """Plot the training, check what was saved, write its card, and print the metric beside its baselines."""
    folder = Path(trainer.args.output_dir)
    baselines = task.baselines()
    references = {name: by_split["validation"] for name, by_split in baselines.items()}
    plot_training(trainer.state.log_history, task.metric, references, folder / "training.png")
    reloaded = check_reload(task.auto_class, trainer, trainer.data_collator([next(iter(task.held_out["validation"]))]))
    *_, reported = task.held_out
    save_model_card(
        trainer,
        reloaded,
        folder,
        task.source,
        {task.metric: values[reported]},
        {name: {task.metric: by_split[reported]} for name, by_split in baselines.items()},
    )
    print_comparison(task.metric, {type(reloaded).__name__: values, **baselines})
    print(f"Saved and reloaded from {folder}; loss and {task.metric} by step: {folder / 'training.png'}")


def print_comparison(metric: str, values: dict[str, dict[str, float]]) -> None:
    """Print the metric of the model, which comes first, and of its baselines, and which of these are not beaten."""
    (model, by_split), *baselines = values.items()
    number = ".2%" if metric == "accuracy" else ".4g"
    print(f"\n{metric.capitalize():12}" + "".join(f"{split:>12}" for split in by_split))
    for name, numbers in values.items():
        print(" " * 12 + "".join(f"{numbers[split]:12{number}}" for split in by_split) + f"  {name}")
    *_, reported = by_split
    sign = -1 if metric == "perplexity" else 1
    better = [name for name, numbers in baselines if sign * numbers[reported] >= sign * by_split[reported]]
    if better:
        print(f"{model} is no better than: {', '.join(better)}.")


def check_reload(auto_class: type, trainer: Trainer, inputs: dict[str, torch.Tensor]) -> PreTrainedModel:
    """
    Load what the trainer saved through an Auto class, compare it with the trained model, and return it.

    Raises:
        `RuntimeError`: a weight differs in any bit, or the logits by more than rounding.
    """
    folder = trainer.args.output_dir
    if trainer.is_deepspeed_enabled:
        # Else `from_pretrained` cuts the model into pieces, together with the other processes.
        unset_hf_deepspeed_config()
    reloaded = auto_class.from_pretrained(folder).to(trainer.args.device).eval()
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # The trained model is in pieces, and one process alone cannot run it.
        return reloaded
    # Without the autocast around `forward` that mixed precision leaves there.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    weights, saved = model.state_dict(), reloaded.state_dict()
    different = [name for name in weights if name not in saved or not torch.equal(weights[name], saved[name])]
    if different:
        raise RuntimeError(f"These weights in {folder} are not those of the trained model: {different}.")
    inputs = {name: tensor.to(trainer.args.device) for name, tensor in inputs.items()}
    with torch.no_grad():
        expected, logits = model(**inputs).logits, reloaded(**inputs).logits
    difference = (expected - logits).abs().max().item()
    # Where weights lie in memory decides how some processors sum.
    if difference > 16 * torch.finfo(expected.dtype).eps * expected.abs().max().item():
        raise RuntimeError(f"The model saved in {folder} gives other logits than the trained one, by {difference}.")
    return reloaded


def plot_training(log_history: list[dict], metric: str, references: dict[str, float], path: Path) -> None:
    """
    Plot a finished training.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        metric (`str`): the validation metric to draw beside the losses, without its prefix `eval_`.
        references (`dict[str, float]`): values of the same metric to draw as horizontal lines, by their labels.
        path (`Path`): the PNG to write.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, key, label in (
        (left, "loss", "training"),
        (left, "eval_loss", "validation"),
        (right, f"eval_{metric}", "validation"),
    ):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    for index, (name, value) in enumerate(references.items(), start=2):
        right.axhline(value, color=f"C{index}", linestyle="--", label=f"{name}: {value:.4g}")
    left.set(xlabel="step", ylabel="loss", title="Loss")
    right.set(xlabel="step", ylabel=metric, title=metric.capitalize())
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(framealpha=0.9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def save_model_card(
    trainer: Trainer,
    model: PreTrainedModel,
    folder: Path,
    source: str,
    metrics: dict[str, float],
    baselines: dict[str, dict[str, float]],
    **hyperparameters,
) -> None:
    """Write the card of the trained model beside its weights in `folder`, with `hyperparameters` beyond the trainer's."""
    arguments = trainer.args
    names = ("learning_rate", "lr_scheduler_type", "weight_decay", "per_device_train_batch_size", "seed")
    card = create_model_card(
        model,
        model_id=arguments.hub_model_id or folder.name,
        dataset_type=Path(source).stem,
        dataset_name=source,
        hyperparameters={name: getattr(arguments, name) for name in names} | hyperparameters,
        metrics=metrics,
        baselines=baselines,
        steps=trainer.state.global_step,
    )
    card.save(folder / "README.md")
