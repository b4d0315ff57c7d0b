"""
What training scripts have in common: arguments for `HfArgumentParser`, and what is read before the training, with
errors for whoever typed the command line.

It needs what the example scripts need: `pip install 'modeling-sumagg[examples]'`.
"""

import contextlib
import copy
import difflib
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GPT2Tokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)
from transformers.integrations import unset_hf_deepspeed_config
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ..configuration import TextConfig, preset_path
from ..families import FAMILIES
from ..publishing.cards import save_model_card
from .defaults import decay_parameter_names


try:
    from datasets import DatasetDict, IterableDatasetDict, load_dataset  # type: ignore[import-untyped]
    from datasets.exceptions import DatasetGenerationError  # type: ignore[import-untyped]
    from peft import LoraConfig, PeftModel, get_peft_model
except ImportError as error:
    raise ImportError(f"The scripts need {error.name}: run `pip install 'modeling-sumagg[examples]'`.") from error


LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {"sample_by": "document"}),
}


# What a card says of how a model was trained.
HYPERPARAMETERS = ("learning_rate", "lr_scheduler_type", "weight_decay", "per_device_train_batch_size", "seed")


class DecayTrainer(Trainer):
    """[`~transformers.Trainer`] with weight decay on what [`decay_parameter_names`] names, as in the original models."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)


@dataclass
class ModelArguments:
    """The model to train: a checkpoint, a preset or a script's small one, whole or by adapters."""

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
    lora_rank: int = field(default=0, metadata={"help": "Train LoRA adapters of this rank; 0: the whole model."})
    lora_alpha: int = field(default=16, metadata={"help": "The update of a weight is scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers to adapt; by default those that mix tokens."}
    )

    def __post_init__(self):
        if self.model_name_or_path is not None and self.preset is not None:
            raise ValueError("Give --model_name_or_path or --preset, not both.")
        if self.lora_rank and self.model_name_or_path is None:
            raise ValueError("--lora_rank adapts a trained model: name it with --model_name_or_path.")


@dataclass
class TextModelArguments(ModelArguments):
    """The same with the tokenizer."""

    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "A tokenizer: a folder or a Hub id. By default the checkpoint's, or one learned from the data."
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of a tokenizer learned from the data."})


@dataclass
class DataArguments:
    """Where the data is. A script adds the names of the columns that it reads."""

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
    held_out_share: float = field(
        default=0.1, metadata={"help": "Share of the training rows split off where there is no held-out split."}
    )

    def __post_init__(self):
        if self.dataset_name is not None and self.train_file is not None:
            raise ValueError("Give --dataset_name or --train_file, not both.")
        for split in ("validation", "test"):
            if getattr(self, f"{split}_file", None) is not None and self.train_file is None:
                raise ValueError(f"--{split}_file needs a --train_file.")


@dataclass
class LabelledDataArguments(DataArguments):
    """The same with a column to predict."""

    test_file: str | None = field(
        default=None, metadata={"help": "The same, to evaluate on at the end.", "aliases": ["--test_dir"]}
    )
    label_column_name: str = field(default="label", metadata={"help": "Column with what is to be predicted."})


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """
    End the program with one line instead of a traceback where a file, an option or a value is wrong. For what comes
    before the training: where an error of these types is a fault of the program, its traceback is needed.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def load_config(
    arguments: ModelArguments,
    defaults: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    **values,
) -> PreTrainedConfig:
    """
    The config of the checkpoint, of the preset, or of `defaults`, with `values` and then the overrides in it.

    Args:
        arguments (`ModelArguments`): names the checkpoint or the preset, and the overrides: a JSON object of fields,
            for a new model also a `model_type` of transformers.
        defaults (`dict[str, Any]`): `model_type` and other fields; what another family lacks is left out.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): gives a new model its vocabulary and its special tokens.

    Raises:
        `ValueError`: the overrides are not a JSON object, have a field that the config lacks (the message names the
            nearest that it has), or a value that it does not take.
        `OSError`: there is no such checkpoint.
    """
    checkpoint = arguments.model_name_or_path
    try:
        overrides = json.loads(arguments.config_overrides)
    except json.JSONDecodeError as error:
        raise ValueError(f"--config_overrides {arguments.config_overrides!r} is not JSON: {error}.") from error
    if not isinstance(overrides, dict):
        raise ValueError(f'--config_overrides must be a JSON object such as {{"hidden_size": 64}}, got {overrides!r}.')
    if arguments.preset is not None:
        defaults, _ = PreTrainedConfig.get_config_dict(preset_path(arguments.preset))
    defaults = dict(defaults)
    if checkpoint is not None and checkpoint in TextConfig.preset_names and not Path(checkpoint).exists():
        raise ValueError(f"{checkpoint} is a preset, an architecture without weights: give it as --preset.")
    if checkpoint is not None:
        config_class = type(AutoConfig.from_pretrained(checkpoint))
    else:
        model_type = defaults.pop("model_type")
        model_type = overrides.pop("model_type", model_type)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"There is no model type {model_type!r}.{_nearest(model_type, CONFIG_MAPPING)}")
        config_class = CONFIG_MAPPING[model_type]
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map, "num_labels"}
    for name in overrides:
        if name not in known:
            raise ValueError(f"{config_class.__name__} has no field {name!r}.{_nearest(name, known)}")
    try:
        if checkpoint is not None:
            return AutoConfig.from_pretrained(checkpoint, **{**values, **overrides})
        fields = {name: value for name, value in defaults.items() if name in known}
        if tokenizer is not None:
            fields |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            fields["vocab_size"] = len(tokenizer)
        return config_class(**{**fields, **values, **overrides})
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def _nearest(name: str, known: Any) -> str:
    matches = difflib.get_close_matches(name, sorted(known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def load_tokenizer(arguments: TextModelArguments, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that the arguments name, or the checkpoint's, or a byte-level BPE learned from `texts`."""
    name = arguments.tokenizer_name or arguments.model_name_or_path
    if name is not None:
        return AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer = GPT2Tokenizer(pad_token="<|endoftext|>", padding_side="left")
    return tokenizer.train_new_from_iterator(texts, arguments.vocab_size)


def load_model(auto_class: Any, arguments: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """The checkpoint's weights in a model of `auto_class`, with a new head for other classes, or a new model."""
    options = {"dtype": arguments.dtype, "attn_implementation": arguments.attn_implementation}
    if arguments.model_name_or_path is None:
        return auto_class.from_config(config, **options)
    return auto_class.from_pretrained(
        arguments.model_name_or_path, config=config, ignore_mismatched_sizes=True, **options
    )


def add_adapters(model: PreTrainedModel, arguments: ModelArguments, **options) -> PeftModel:
    """The model with LoRA adapters of the arguments, and with `options` of a script for `LoraConfig`."""
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        **{"target_modules": arguments.target_modules, **options},
    )
    # What PEFT warns of, now and when it saves: a name of transformers' that it still uses, that adapted embeddings are
    # saved, as they should be, and tied ones in a model that ties none.
    for message in (".*gradient_checkpointing", "Setting `save_embedding_layers`", "Model with `tie_word_embeddings"):
        warnings.filterwarnings("ignore", message)
    adapted = get_peft_model(model, config)
    trained, total = adapted.get_nb_trainable_parameters()
    print(f"LoRA trains {trained:,} of {total:,} parameters.")
    return adapted


def save_checked(trainer: Trainer, auto_class: Any, hyperparameters: dict[str, Any] | None = None, **card) -> None:
    """
    Write the card of what `trainer` has trained and saved, and check that it loads where this package is not installed.

    Of adapters also save, in the folder `merged`, the model that they make, which any Auto class loads. A baseline of
    another library gets no card.

    Args:
        trainer (`Trainer`): after training; its `output_dir` is the folder.
        auto_class: the Auto class of the model, which reads it again where it was trained in pieces.
        hyperparameters (`dict`, *optional*): for the card, beside those of `trainer.args`.
        card: the other arguments of [`~modeling_sumagg.hub.save_model_card`].
    """
    folder = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # One process alone cannot run the pieces.
        unset_hf_deepspeed_config()
        model = auto_class.from_pretrained(folder)
    saved = {folder: model}
    if isinstance(model, PeftModel):
        merged = folder / "merged"
        saved[merged] = copy.deepcopy(model).merge_and_unload()
        saved[merged].save_pretrained(merged)
        trainer.processing_class.save_pretrained(merged)
    if model.config.model_type not in FAMILIES:
        return
    values = {name: getattr(trainer.args, name) for name in HYPERPARAMETERS} | (hyperparameters or {})
    for place, each in saved.items():
        print(f"\nThe check of {place}, where this package is not installed:")
        save_model_card(each, place, hyperparameters=values, steps=trainer.state.global_step, **card)


def model_max_length(config: PreTrainedConfig) -> int:
    """What a tokenizer calls so: the most tokens that the model takes, or the number that stands for no limit."""
    endless = getattr(config, "position_embedding_type", None) in ("sinusoidal", "none")
    if endless and not getattr(config, "use_membership_bias", False):
        return VERY_LARGE_INTEGER
    return getattr(config, "max_position_embeddings", VERY_LARGE_INTEGER)


def load_splits(
    arguments: DataArguments,
    embedded: Callable[[], DatasetDict],
    columns: dict[str, str],
    *,
    seed: int,
    streaming: bool = False,
    held_out_rows: int = 100,
) -> DatasetDict | IterableDatasetDict:
    """
    The splits of the Hub's data set, of the files, or of the embedded data, with the columns renamed.

    Args:
        arguments (`DataArguments`): where the data is.
        embedded (`Callable`): makes the embedded data, for which there is neither a name nor a file.
        columns (`dict[str, str]`): for each column to return, its name in the data.
        seed (`int`): seed of the split, where the data has no `validation`.
        streaming (`bool`, defaults to `False`): read the data while training.
        held_out_rows (`int`, defaults to 100): of a stream, the number of rows that become `validation`.

    Returns:
        `DatasetDict` or, if they are streamed, `IterableDatasetDict`: `train`, `validation`, and `test` if there is one.

    Raises:
        `ValueError`: an ending without a loader, a broken file, a missing column, or too few rows to hold some out.
        `OSError`: a file or a data set that is not there.
    """
    files = {split: getattr(arguments, f"{split}_file", None) for split in ("train", "validation", "test")}
    paths = {split: path for split, path in files.items() if path is not None}
    if arguments.dataset_name is not None:
        splits = load_dataset(arguments.dataset_name, arguments.dataset_config_name, streaming=streaming)
    elif not paths:
        splits = embedded()
        if streaming:
            splits = {name: split.to_iterable_dataset() for name, split in splits.items()}
    elif Path(paths["train"]).is_dir():
        patterns = {split: f"{path}/**" for split, path in paths.items()}
        splits = load_dataset("imagefolder", data_files=patterns, streaming=streaming)
    else:
        # One at a time: they may differ in columns that are not used.
        splits = {split: _load_file(path, streaming) for split, path in paths.items()}
    source = arguments.dataset_name or arguments.train_file
    if "train" not in splits:
        raise ValueError(f"{source} has no train split, only {sorted(splits)}.")
    splits = {name: splits[name] for name in ("train", "validation", "test") if name in splits}
    for name, split in splits.items():
        found = split.column_names or list(next(iter(split)))
        for given in columns.values():
            if given not in found:
                raise ValueError(
                    f"The {name} split of {source} has no column {given!r}. Its columns are {found}: choose with the "
                    "options that end in _column_name or _column_names."
                )
        renamed = {old: new for new, old in columns.items() if old != new}
        splits[name] = split.select_columns(list(columns.values())).rename_columns(renamed)
    if "validation" not in splits and streaming:
        splits["validation"] = splits["train"].take(held_out_rows)
        splits["train"] = splits["train"].skip(held_out_rows)
    elif "validation" not in splits:
        if len(splits["train"]) < 2:
            raise ValueError(
                f"{source} has {len(splits['train'])} rows: too few to hold some out. Give a --validation_file."
            )
        parts = splits["train"].train_test_split(arguments.held_out_share, seed=seed)
        splits |= {"train": parts["train"], "validation": parts["test"]}
    ordered = {name: splits[name] for name in ("train", "validation", "test") if name in splits}
    return (IterableDatasetDict if streaming else DatasetDict)(ordered)


def encode_labels(splits: DatasetDict) -> tuple[DatasetDict, list[str]]:
    """
    Number the classes.

    Args:
        splits (`DatasetDict`): with a column `label`: a `ClassLabel`, or any text or number.

    Returns:
        `tuple[DatasetDict, list[str]]`: the splits with the index of the class, `labels`, in its place; and the names
        of the classes: those of the data set, or every value of the column, in order.

    Raises:
        `ValueError`: a row without a label, or fewer than two classes.
    """
    feature = splits["train"].features["label"]
    columns = {name: split["label"][:] for name, split in splits.items()}
    for name, labels in columns.items():
        missing = [
            row for row, label in enumerate(labels) if label in (None, "") or (hasattr(feature, "names") and label < 0)
        ]
        if missing:
            raise ValueError(f"Row {missing[0]} of the {name} split has no label.")
    if hasattr(feature, "names"):
        names = feature.names
        indices = {index: index for index in range(len(names))}
    else:
        values = set().union(*columns.values())
        numbers = all(isinstance(value, (bool, int, float)) for value in values)
        names = [str(value) for value in (sorted(values) if numbers else sorted(values, key=str))]
        indices = {value: names.index(str(value)) for value in values}
    if len(names) < 2:
        raise ValueError(f"A classifier needs at least two classes, the data has {names}.")
    encoded = {
        name: split.remove_columns("label").add_column("labels", [indices[label] for label in columns[name]])
        for name, split in splits.items()
    }
    return DatasetDict(encoded), names


def _load_file(path: str, streaming: bool):
    if Path(path).suffix not in LOADERS:
        if not Path(path).exists():
            raise FileNotFoundError(f"There is no file or folder {path!r}.")
        raise ValueError(f"A data file ends with one of {sorted(LOADERS)}, or is a folder of images, got {path!r}.")
    loader, options = LOADERS[Path(path).suffix]
    try:
        return load_dataset(loader, data_files=path, split="train", streaming=streaming, **options)
    except DatasetGenerationError as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__}") from error


__all__ = [
    "add_adapters",
    "DataArguments",
    "DecayTrainer",
    "LabelledDataArguments",
    "ModelArguments",
    "TextModelArguments",
    "encode_labels",
    "load_config",
    "load_model",
    "load_splits",
    "load_tokenizer",
    "model_max_length",
    "save_checked",
    "user_errors",
]
