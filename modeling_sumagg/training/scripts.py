"""
The beginning of a training script: its arguments, its config and model, and its data. The errors are for whoever typed the
command line. [`~modeling_sumagg.training.runs`] is its end.

It needs what the example scripts need: `pip install 'modeling-sumagg[examples]'`.
"""

import contextlib
import io
import math
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ..publishing.files import check_output_dir, printable, read_json
from .data_files import (
    PLACE,
    as_label,
    check_columns,
    check_image,
    convert_rows,
    features_of,
    is_missing,
    name_of,
    read_image_folder,
    read_rows,
    to_dataset,
)
from .defaults import decay_parameter_names
from .model_arguments import (
    ModelArguments,
    TextModelArguments,
    add_adapters,
    load_config,
    load_model,
    load_tokenizer,
    model_max_length,
)


try:
    from datasets import (  # type: ignore[import-untyped]
        Audio,
        Dataset,
        DatasetDict,
        Features,
        Image,
        IterableDataset,
        IterableDatasetDict,
        Value,
        disable_caching,
        load_dataset,
    )
    from datasets.exceptions import DatasetGenerationError  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(f"The scripts need {error.name}: run `pip install 'modeling-sumagg[examples]'`.") from error


class DecayTrainer(Trainer):
    """[`~transformers.Trainer`] with weight decay on what [`decay_parameter_names`] names, as in the original models."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)


SPLITS = ("train", "validation", "test")
# Of every script that trains, unless it says otherwise. PEFT hides the names of the labels from `Trainer`.
SHARED_DEFAULTS = {
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": torch.accelerator.is_available(),
    "label_names": ["labels"],
}


@dataclass
class SampleArguments:
    """How much of the data a short run reads."""

    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many rows, drawn at random; for a short run."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on so many rows of each held-out split, drawn at random."}
    )

    def __post_init__(self):
        for name in ("max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}.")

    def limit(self, splits: dict[str, Any], seed: int) -> dict[str, Any]:
        """The splits, `train` and the others, with at most so many rows, in their order; of a stream the first ones."""
        limited = {}
        for name, split in splits.items():
            limit = self.max_train_samples if name == "train" else self.max_eval_samples
            if limit is not None and not hasattr(split, "__len__"):
                split = split.take(limit)
            elif limit is not None and limit < len(split):
                split = split.select(sorted(random.Random(seed).sample(range(len(split)), limit)))
            limited[name] = split
        return limited


@dataclass
class DataArguments(SampleArguments):
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
        default=0.1,
        metadata={
            "help": "Share of the training rows that is held out where there is no held-out split: drawn at random, of "
            "each class alike. Of a single text file it is the end."
        },
    )
    drop_incomplete_rows: bool = field(
        default=False, metadata={"help": "Leave out rows without a label or a text, and say how many."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.dataset_name is not None and self.train_file is not None:
            raise ValueError("Give --dataset_name or --train_file, not both.")
        for split in ("validation", "test"):
            if getattr(self, f"{split}_file", None) is not None and self.train_file is None:
                raise ValueError(f"--{split}_file needs a --train_file.")
        if not 0 < self.held_out_share < 1:
            raise ValueError(f"--held_out_share must be between 0 and 1, got {self.held_out_share}.")


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
        sys.exit(f"error: {printable(str(error))}")


def run(main: Callable[[], None]) -> None:
    """Run a script. Ctrl-C ends it with one line instead of a traceback, and with the exit status that shells expect."""
    try:
        main()
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted{': ' if interrupt.args else '.'}{interrupt}", file=sys.stderr)
        sys.exit(130)


def parse_arguments(types: Sequence[type], documentation: str, **defaults) -> tuple[Any, ...]:
    """
    The arguments on the command line of a script that trains, after which its random numbers are seeded.

    `--help` explains the script's own options, and only names those of `TrainingArguments`.

    Args:
        types (`Sequence[type]`): the dataclasses of the script's own options.
        documentation (`str`): its first paragraph says what the script does.
        defaults: of the script for options of `TrainingArguments`, beside `SHARED_DEFAULTS`.

    Returns:
        `tuple`: an instance of each of `types`, and the `TrainingArguments`.

    Raises:
        `ValueError`: an option has a value that it cannot have.
        `OSError`: the output folder cannot be written to.
    """
    defaults = SHARED_DEFAULTS | defaults
    options = {"usage": "%(prog)s [options]", "allow_abbrev": False}
    if {"-h", "--help"}.intersection(sys.argv[1:]):
        given = ", ".join(f"--{name} {value}" for name, value in defaults.items() if name not in ("label_names",))
        others = ", ".join(f"--{each.name}" for each in fields(TrainingArguments) if each.name not in defaults)
        epilog = (
            f"Every option of transformers' TrainingArguments is taken too. This script sets {given}. The others are "
            f"{others}. They are explained at https://huggingface.co/docs/transformers/main_classes/trainer."
        )
        description = documentation.partition("\n\n")[0]
        HfArgumentParser(types, description=description, epilog=epilog, **options).parse_args(["--help"])
    parser = HfArgumentParser((*types, TrainingArguments), **options)
    parser.set_defaults(**defaults)
    *own, training_arguments = parser.parse_args_into_dataclasses()
    resume = training_arguments.resume_from_checkpoint
    folder = Path(training_arguments.output_dir)
    check_output_folder(folder, resumed=resume is not None)
    if resume == "last":
        training_arguments.resume_from_checkpoint = resume = last_checkpoint(folder)
        if resume is None:
            raise ValueError(f"--resume_from_checkpoint last: {folder} holds no checkpoint. Leave the option out.")
    elif resume is not None and not Path(resume, "trainer_state.json").is_file():
        raise ValueError(
            f"--resume_from_checkpoint: {resume} is no checkpoint of `Trainer`, such as runs/clm/checkpoint-100."
        )
    set_seed(training_arguments.seed)
    return (*own, training_arguments)


def check_output_folder(folder: Path, resumed: bool = False) -> None:
    """
    Make the folder that a run writes to, and say so where it replaces the model of an earlier run.

    Raises:
        `OSError`: the folder cannot be made or written to.
        `ValueError`: it is a file, it holds files that no training run wrote, or checkpoints of an earlier run that is not
            resumed.
    """
    is_earlier = check_output_dir(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None and not resumed:
        raise ValueError(
            f"{folder} holds {Path(checkpoint).name} of an earlier run: resume it with --resume_from_checkpoint last, delete "
            "it, or choose another --output_dir."
        )
    if is_earlier and not resumed:
        print(f"{printable(str(folder))} holds the model of an earlier run, which this run will replace.")


def last_checkpoint(folder: Path) -> str | None:
    """
    The last checkpoint of `Trainer` in a folder that it has written whole, if there is one. A run that was killed may leave
    one that is not: `trainer_state.json`, the last file of a checkpoint, is missing then, or ends early.
    """
    whole = {}
    for path in folder.glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        try:
            read_json(path / "trainer_state.json")
        except (OSError, ValueError):
            continue
        if step.isdecimal():
            whole[int(step)] = str(path)
    return whole[max(whole)] if whole else None


def source_of(arguments: DataArguments, embedded_name: str) -> str:
    """What to call the data: the data set of the Hub, the name of the file or folder, or the embedded data's name."""
    if arguments.dataset_name is not None:
        name = arguments.dataset_name if not Path(arguments.dataset_name).exists() else name_of(arguments.dataset_name)
        return printable(f"{name} ({arguments.dataset_config_name})" if arguments.dataset_config_name else name)
    return embedded_name if arguments.train_file is None else printable(name_of(arguments.train_file))


def load_splits(
    arguments: DataArguments,
    embedded: Callable[[], DatasetDict] | None,
    columns: dict[str, str],
    *,
    seed: int,
    embedded_name: str = "the embedded data",
    numbers: Sequence[str] = (),
    optional: Sequence[str] = (),
    streaming: bool = False,
    held_out_rows: int = 100,
) -> DatasetDict | IterableDatasetDict:
    """
    The splits of the Hub's data set, of the files, or of the embedded data, with the columns renamed. The `description`
    of each says in words what it is.

    Args:
        arguments (`DataArguments`): where the data is.
        embedded (`Callable`): makes the embedded data, for which there is neither a name nor a file.
        columns (`dict[str, str]`): for each column to return, its name in the data.
        seed (`int`): seed of the split, where the data has no `validation`.
        embedded_name (`str`): what to call the embedded data.
        numbers (`Sequence[str]`): the columns to return that hold numbers. Of the others `text` and `label` hold text,
            and those of a file the names of files.
        optional (`Sequence[str]`): the columns to return that may be empty. A row without one of the others is refused or
            dropped (`--drop_incomplete_rows`); of empty texts there is a warning.
        streaming (`bool`, defaults to `False`): read the data while training.
        held_out_rows (`int`, defaults to 100): of a stream, the number of rows that become `validation`.

    Returns:
        `DatasetDict` or, if they are streamed, `IterableDatasetDict`: `train`, `validation`, `test` if there is one, and
            the other splits of the embedded data.

    Raises:
        `ValueError`: an ending without a reader, a file that cannot be read, a missing column, a value of the wrong kind,
            rows that lack something, or too few rows to hold some out.
        `OSError`: a file or a data set that is not there.
    """
    files = {split: getattr(arguments, f"{split}_file", None) for split in SPLITS}
    paths = {split: path for split, path in files.items() if path is not None}
    source = source_of(arguments, embedded_name)
    if paths:
        # One at a time: they may differ in columns that are not used.
        splits = {name: _load_file(path, streaming, columns, numbers) for name, path in paths.items()}
        names = {name: printable(name_of(path)) for name, path in paths.items()}
    else:
        given = embedded() if arguments.dataset_name is None else _load_named(arguments, streaming)  # type: ignore[misc]
        if "train" not in given:
            raise ValueError(f"{source} has no train split, only {sorted(given)}.")
        # A data set of the Hub may have others that are not meant for this.
        splits = {name: split for name, split in given.items() if name in SPLITS or arguments.dataset_name is None}
        names = {name: f"{source}, {name.replace('_', ' ')} split" for name in splits}
        for name, split in splits.items():
            if streaming and isinstance(split, Dataset):
                split = split.to_iterable_dataset()
            check_columns(names[name], columns.values(), split.column_names or list(next(iter(split))))
            renamed = {old: new for new, old in columns.items() if old != new}
            split = split.select_columns(list(columns.values())).rename_columns(renamed)
            types = {"text": "string"} | dict.fromkeys(numbers, "float64")
            for column in types.keys() & columns.keys():
                split = split.cast_column(column, Value(types[column]))
            # As files are: to decode them `datasets` would need torchcodec.
            for column, feature in (split.features or {}).items():
                if isinstance(feature, Audio):
                    split = split.cast_column(column, Audio(decode=False))
            splits[name] = split
    if paths or arguments.dataset_name is not None:
        needed = {name: columns[name] for name in columns if name not in optional}
        for name, split in splits.items():
            check = _complete_stream if streaming else _complete
            place = paths.get(name, names[name])
            splits[name] = check(split, place, needed, arguments.drop_incomplete_rows)
    if "validation" not in splits:
        parts = _hold_out_of_stream(splits["train"], source, held_out_rows) if streaming else None
        if parts is None and Path(paths.get("train", "")).suffix.lower() == ".txt":
            parts = _hold_out_end(splits["train"], source, arguments.held_out_share)
        if parts is None:
            parts = _hold_out(splits["train"], source, arguments.held_out_share, seed)
        splits["train"], splits["validation"], names["validation"] = parts
    for name, split in splits.items():
        if "image" in columns and paths:
            splits[name] = split = split.cast_column("image", Image())
        split.info.description = names[name]
    ordered = {name: splits[name] for name in dict.fromkeys([*SPLITS, *splits]) if name in splits}
    return (IterableDatasetDict if streaming else DatasetDict)(arguments.limit(ordered, seed))


def _load_named(arguments: DataArguments, streaming: bool) -> dict[str, Any]:
    """The data set of the Hub; of a local folder without what an earlier run made of files of the same names."""
    is_local = Path(arguments.dataset_name).exists()  # type: ignore[arg-type]
    if is_local:
        if set("[]*?") & set(arguments.dataset_name):  # type: ignore[arg-type]
            raise ValueError(
                f"--dataset_name {arguments.dataset_name}: `datasets` takes []*? in the name of a folder for a pattern. "
                "Rename the folder, or name its files with --train_file."
            )
        disable_caching()
    try:
        return load_dataset(
            arguments.dataset_name,
            arguments.dataset_config_name,
            streaming=streaming,
            download_mode="force_redownload" if is_local else None,
        )
    except DatasetGenerationError as error:
        raise ValueError(f"{arguments.dataset_name} cannot be read: {error.__cause__}") from error


def _load_file(path: str, streaming: bool, columns: dict[str, str] | None = None, numbers: Sequence[str] = ()) -> Any:
    """Some columns of a file (by default all) or the images of a folder, with the place of each row."""
    if Path(path).is_dir():
        wanted = columns or {"image": "image", "label": "label"}
        check_columns(path, wanted.values(), ["image", "label"])
        features = Features(dict.fromkeys([*wanted, PLACE], Value("string")))

        def rows() -> Iterator[dict[str, Any]]:
            for row in read_image_folder(path):
                yield {**{name: row[column] for name, column in wanted.items()}, PLACE: row["image"]}
    else:
        if columns is None or streaming:
            # Of a stream the first row has to have the columns.
            found = [*next(read_rows(path), ("", {}))[1]]
            columns = columns or {name: name for name in found}
            check_columns(path, columns.values(), found)
        features = features_of(path, columns, numbers)
        features[PLACE] = Value("string")

        def rows() -> Iterator[dict[str, Any]]:
            for place, row in convert_rows(read_rows(path), path, columns, numbers):
                yield {**row, PLACE: f"{path}, {place}"}

    return IterableDataset.from_generator(rows, features=features) if streaming else to_dataset(rows(), features)


def _complete(split: Dataset, source: str, needed: dict[str, str], drop: bool) -> Dataset:
    """The rows that have all columns that are needed; if others are not dropped, an error, or a warning for empty texts."""
    places = (
        split[PLACE] if PLACE in split.column_names else [f"{source}, row {row}" for row in range(1, len(split) + 1)]
    )
    incomplete = set()
    for name, column in needed.items():
        if name == "image" and isinstance(split.features[name], Image):
            for place, image in zip(places, split.cast_column(name, Image(decode=False))[name], strict=True):
                try:
                    check_image(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))
                except ValueError as error:
                    raise ValueError(f"{place}: {column!r} {error}.") from error
            continue
        is_class = hasattr(split.features[name], "names")
        missing = [row for row, value in enumerate(split[name]) if is_missing(value) or (is_class and value < 0)]
        if not missing:
            continue
        incomplete |= set(missing)
        if drop:
            continue
        where = f"{places[missing[0]]}: {column!r} is empty"
        where += f", the first of {len(missing):,} such rows" if len(missing) > 1 else ""
        if name != "text":
            raise ValueError(f"{where}. Fill it, or leave such rows out with --drop_incomplete_rows.")
        print(f"warning: {printable(where)}; --drop_incomplete_rows leaves out rows without a text.")
    if incomplete:
        if drop:
            first = printable(places[min(incomplete)])
            print(f"{len(incomplete):,} of {len(split):,} rows are incomplete and left out; the first: {first}.")
            split = split.select([row for row in range(len(split)) if row not in incomplete])
        if not len(split):
            raise ValueError(f"{source} has no complete row.")
    return split.remove_columns(PLACE) if PLACE in split.column_names else split


def _complete_stream(split: IterableDataset, source: str, needed: dict[str, str], drop: bool) -> IterableDataset:
    """The same of a stream, whose rows are looked at when they are read; empty texts stay without a warning."""
    required = {name: column for name, column in needed.items() if drop or name != "text"}

    def is_complete(row: dict[str, Any]) -> bool:
        missing = [column for name, column in required.items() if is_missing(row[name])]
        if missing and not drop:
            place = row.get(PLACE, source)
            raise ValueError(f"{place}: {missing[0]!r} is empty. Leave such rows out with --drop_incomplete_rows.")
        return not missing

    split = split.filter(is_complete)
    return split.remove_columns(PLACE) if PLACE in (split.column_names or ()) else split


def _hold_out(split: Dataset, source: str, share: float, seed: int) -> tuple[Dataset, Dataset, str]:
    """A random share of the rows, of each class alike; a class keeps at least one row to train on."""
    draw = random.Random(seed)
    has_classes = "label" in split.column_names and split.features["label"] != Value("float64")
    classes: dict[str | None, list[int]] = {}
    for row, label in enumerate(split["label"] if has_classes else [None] * len(split)):
        classes.setdefault(as_label(label), []).append(row)
    number = max(1, round(share * len(split)))
    counts = {label: min(int(share * len(rows)), len(rows) - 1) for label, rows in classes.items()}
    # Where shares are no whole numbers, the classes that miss most of theirs come first.
    for label in sorted(classes, key=lambda label: counts[label] - share * len(classes[label])):
        if sum(counts.values()) < number and counts[label] < len(classes[label]) - 1:
            counts[label] += 1
    held_out = sorted(row for label, rows in classes.items() for row in draw.sample(rows, counts[label]))
    if not held_out:
        raise ValueError(
            f"{source} has {len(split)} rows{f' in {len(classes)} classes' if has_classes else ''}: too few to hold some out. "
            "Give a --validation_file."
        )
    rest = sorted(set(range(len(split))).difference(held_out))
    name = f"{share:.3g} of the rows of {source}, drawn at random{' in each class' if has_classes else ''}"
    return split.select(rest), split.select(held_out), name


def _hold_out_end(split: Dataset, source: str, share: float) -> tuple[Dataset, Dataset, str]:
    """The last lines of a single document."""
    text = split["text"][0]
    end = text.rfind("\n", 0, math.ceil((1 - share) * len(text))) + 1 or int((1 - share) * len(text))
    parts = [Dataset.from_dict({"text": [part]}) for part in (text[:end], text[end:])]
    return *parts, f"the last {len(text) - end:,} of the {len(text):,} characters of {source}"


def _hold_out_of_stream(
    split: IterableDataset, source: str, rows: int
) -> tuple[IterableDataset, IterableDataset, str]:
    """The first rows of a stream."""
    rest = split.skip(rows)
    if rows < 1 or next(iter(rest), None) is None:
        raise ValueError(
            f"--held_out_rows {rows} of {source} leave no row to hold out or none to train on: give another number, or a "
            "--validation_file."
        )
    return rest, split.take(rows), f"the first {rows:,} rows of {source}"


def encode_labels(splits: DatasetDict) -> tuple[DatasetDict, list[str]]:
    """
    Number the classes.

    Args:
        splits (`DatasetDict`): with a column `label`: a `ClassLabel`, or any text or number.

    Returns:
        `tuple[DatasetDict, list[str]]`: the splits with the index of the class, `labels`, in its place; and the names
        of the classes: those of the data set, or every value of the column in any split, in order. Numbers are in the
        order of their values, unless one is written like a code, as 01 is.

    Raises:
        `ValueError`: a row without a label, or fewer than two classes.
    """
    feature = splits["train"].features["label"]
    columns = {name: split["label"][:] for name, split in splits.items()}
    names = getattr(feature, "names", None)
    if names is None:
        columns = {name: [as_label(label) for label in labels] for name, labels in columns.items()}
        found = set().union(*columns.values()) - {None}
        numbers = all(re.fullmatch(r"-?(0|[1-9]\d*)(\.\d+)?", name) for name in found)
        names = sorted(found, key=lambda name: (float(name), name) if numbers else (0, name))
        indices: dict[Any, int] = {name: index for index, name in enumerate(names)}
    else:
        indices = {index: index for index in range(len(names))}
    for name, labels in columns.items():
        missing = [row for row, label in enumerate(labels, 1) if label not in indices]
        if missing:
            raise ValueError(f"Row {missing[0]} of the {name} split has no label.")
    if len(names) < 2:
        raise ValueError(f"A classifier needs at least two classes, the data has {names}.")
    encoded = {
        name: split.remove_columns("label").add_column("labels", [indices[label] for label in columns[name]])
        for name, split in splits.items()
    }
    return DatasetDict(encoded), names


__all__ = [
    "DataArguments",
    "DecayTrainer",
    "LabelledDataArguments",
    "ModelArguments",
    "SampleArguments",
    "TextModelArguments",
    "add_adapters",
    "check_output_folder",
    "encode_labels",
    "last_checkpoint",
    "load_config",
    "load_model",
    "load_splits",
    "load_tokenizer",
    "model_max_length",
    "parse_arguments",
    "printable",
    "run",
    "source_of",
    "user_errors",
]
