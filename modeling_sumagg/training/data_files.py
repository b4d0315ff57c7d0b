"""
Data files as people have them, read as they are or refused with the file, the line and the remedy.

Every value of a csv is text: nothing guesses that the label 01 is the number 1. Rows are counted as an editor counts them.
Nothing is kept from one run to the next, so that a file with new content is read anew.

It needs what the example scripts need: `pip install 'modeling-sumagg[examples]'`.
"""

import csv
import functools
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]


try:
    from datasets import ClassLabel, Dataset, Features, Value  # type: ignore[import-untyped]
    from datasets.arrow_writer import ArrowWriter  # type: ignore[import-untyped]
    from PIL import Image as PILImage
except ImportError as error:
    raise ImportError(f"The data files need {error.name}: run `pip install 'modeling-sumagg[examples]'`.") from error


# Where a row is, such as "line 7", counted as an editor counts, or "row 7" of parquet; and its values by column.
Row = tuple[str, dict[str, Any]]
# The column of a data set that says where a row was.
PLACE = "__place__"
FILE = {"bytes": Value("binary"), "path": Value("string")}
# Pillow makes everything above 255 white when it converts these to RGB.
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def name_of(path: str | Path) -> str:
    """What to call a file or folder in a card: its name without the folders above it, but for `photos/train`."""
    path = Path(path)
    if path.name in ("train", "validation", "valid", "val", "test", "metadata.csv"):
        return "/".join(path.parts[-2:])
    return path.name


def read_csv(path: str) -> Iterator[Row]:
    # Documents are longer than the module's limit of 131,072 characters a cell.
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            header = next(reader, [])
            for name in header:
                if header.count(name) > 1:
                    raise ValueError(f"{path}, line 1: two columns are named {name!r}. Rename one.")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise ValueError(
                        f"{path}, line {line}: {len(cells)} cells, where line 1 names {len(header)} columns. A cell with "
                        'a comma or a line break stands in quotes, and a quote in it is written "".'
                    )
                if cells:
                    yield f"line {line}", dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f'{path}, line {line}: {error}. A cell stands in quotes as a whole, and a quote in it is written "".'
            ) from error


def read_json(path: str) -> Iterator[Row]:
    """An object a line, or one array of objects."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        is_array = file.read(io.DEFAULT_BUFFER_SIZE).lstrip().startswith("[")
        file.seek(0)
        if is_array:
            entries = enumerate(_parse_json(file.read(), path, 1), 1)
            rows: Iterable[tuple[str, Any]] = ((f"entry {index}", row) for index, row in entries)
        else:
            lines = ((line, text) for line, text in enumerate(file, 1) if text.strip())
            rows = ((f"line {line}", _parse_json(text.strip(), path, line)) for line, text in lines)
        for place, row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"{path}, {place}: must be a JSON object such as {{...}}, got {str(row)[:40]}.")
            yield place, row


def _parse_json(text: str, path: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        place = line + getattr(error, "lineno", 1) - 1
        raise ValueError(
            f"{path}, line {place}: no JSON: {error}. Write one object a line, or all in one array."
        ) from error


def read_parquet(path: str) -> Iterator[Row]:
    """A column of classes gives their names."""
    file, row = _open_parquet(path), 0
    features = Features.from_arrow_schema(file.schema_arrow)
    classes = {name: feature.names for name, feature in features.items() if isinstance(feature, ClassLabel)}
    for batch in file.iter_batches(1000):
        for values in batch.to_pylist():
            for name, names in classes.items():
                values[name] = names[values[name]] if values[name] is not None and values[name] >= 0 else None
            row += 1
            yield f"row {row}", values


def _open_parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except ValueError as error:
        raise ValueError(f"{path} is no parquet file: {error}") from error


def read_text(path: str) -> Iterator[Row]:
    """The whole file is one document."""
    yield "line 1", {"text": read_document(path)}


def read_document(path: str) -> str:
    """
    The text of a file, whatever its name.

    Raises:
        `ValueError`: the file is not UTF-8; the message names the line.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".csv": read_csv,
    ".json": read_json,
    ".jsonl": read_json,
    ".parquet": read_parquet,
    ".txt": read_text,
}


def reader_of(path: str | Path) -> Callable[[str], Iterator[Row]] | None:
    return READERS.get(Path(path).suffix.lower())


def read_rows(path: str) -> Iterator[Row]:
    """
    The rows of a data file, whatever its format.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: an ending without a reader, or a file that cannot be read; the message names the line.
    """
    reader = reader_of(path)
    if not Path(path).exists():
        raise FileNotFoundError(f"There is no file or folder {path!r}.")
    if reader is None or not Path(path).is_file():
        raise ValueError(f"A data file ends with one of {sorted(READERS)}, or is a folder of images, got {path!r}.")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def _not_utf8(path: str, error: UnicodeDecodeError) -> ValueError:
    """The error with the line in which the file is no UTF-8, which `error` does not know."""
    with open(path, "rb") as file:
        line = next(line for line, text in enumerate(file, 1) if "\ufffd" in text.decode(errors="replace"))
    return ValueError(f"{path}, line {line}: {error}. Save the file as UTF-8.")


def as_text(value: Any) -> str:
    """A cell as text; empty where it is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, dict | list | bytes):
        raise ValueError(f"must be text, got {str(value)[:40]!r}")
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has half of a character, which UTF-8 cannot write: {ascii(error.object[error.start])}"
        ) from error
    return str(value)


def as_label(value: Any) -> str | None:
    """A cell as the name of a class, without spaces around it; `None` where it is missing."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return as_text(value).strip() or None


def as_number(value: Any) -> float:
    """A cell as a number; NaN where it is missing."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise ValueError(
            f"must be a finite number such as 1234.5, got {str(value)[:40]!r}. An empty cell is a number that is missing"
        )
    return number


def as_file(value: Any) -> Any:
    """A cell as the name of a file, or what parquet holds of it; `None` where it is missing."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str | dict):
        raise ValueError(f"must be the name of a file, got {str(value)[:40]!r}")
    return value


def as_image(value: Any, folder: Path) -> Any:
    """The same of an image that Pillow can open; a relative name is relative to `folder`."""
    value = as_file(value)
    if isinstance(value, str):
        value = str(folder / value)
        check_image(value)
    elif value is not None:
        check_image(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"])
    return value


def check_image(file: str | io.BytesIO) -> None:
    """
    Open an image as the training will.

    Raises:
        `ValueError`: Pillow cannot read it, it is larger than Pillow allows, or has more than 8 bits a channel.
    """
    try:
        image = PILImage.open(file)
        image.load()
    # Decoders raise anything: OSError, SyntaxError, DecompressionBombError, struct.error, zlib.error, IndexError.
    except Exception as error:
        raise ValueError(f"is no image that can be read: {error}") from error
    if image.mode in DEEP_MODES:
        raise ValueError(f"has more than 8 bits a channel (mode {image.mode}): save it with 8, or it becomes white")


def open_image(path: str | Path) -> PILImage.Image:
    """
    Raises:
        `ValueError`: as [`check_image`]; the message names the file.
    """
    try:
        check_image(str(path))
    except ValueError as error:
        raise ValueError(f"{path} {error}.") from error
    return PILImage.open(path)


def is_missing(value: Any) -> bool:
    """Whether a cell says nothing: empty or blank text, no number, no class."""
    return value is None or (isinstance(value, str) and not value.strip()) or value != value


def convert_rows(rows: Iterable[Row], path: str, columns: dict[str, str], numbers: Iterable[str]) -> Iterator[Row]:
    """
    Some columns of a file as the training takes them, under their new names: `label` and `text` become text, `numbers`
    float64, `image` the name of a file that Pillow opens, and everything else the name of a file.

    Raises:
        `ValueError`: there are no rows, a column is missing, or a cell does not hold such a value; the message names the
            place.
    """
    converters: dict[str, Callable[[Any], Any]] = {
        "text": as_text,
        "label": as_label,
        "image": lambda value: as_image(value, Path(path).parent),
        **dict.fromkeys(numbers, as_number),
    }
    found: dict[str, None] = {}
    for place, row in rows:
        found |= dict.fromkeys(row)
        # An object of JSON may lack what the next one has.
        if reader_of(path) is not read_json:
            check_columns(path, columns.values(), [*found])
        converted: dict[str, Any] = {}
        for name, column in columns.items():
            try:
                converted[name] = converters.get(name, as_file)(row.get(column))
            except ValueError as error:
                raise ValueError(f"{path}, {place}: {column!r} {error}.") from error
        yield place, converted
    if not found:
        raise ValueError(f"{path} has no rows.")
    check_columns(path, columns.values(), [*found])


def check_columns(source: str, wanted: Iterable[str], found: list[str]) -> None:
    """
    Raises:
        `ValueError`: the data of `source` lacks a column that is wanted.
    """
    for name in wanted:
        if name not in found:
            separator = next((mark for mark in (";", "\t") if len(found) == 1 and mark in found[0]), None)
            remedy = (
                f"its cells are separated by {separator!r}: save it with commas"
                if separator
                else "choose with the options that end in _column_name or _column_names"
            )
            raise ValueError(f"{source} has no column {name!r}. Its columns are {found}: {remedy}.")


def features_of(path: str, columns: dict[str, str], numbers: Iterable[str]) -> Features:
    """The types of the values that [`convert_rows`] makes."""
    types = {name: Value("string") for name in columns} | {name: Value("float64") for name in numbers}
    if reader_of(path) is read_parquet:
        schema = _open_parquet(path).schema_arrow
        files = [name for name in columns if name not in ("text", "label", *numbers) and columns[name] in schema.names]
        types |= {name: FILE for name in files if not str(schema.field(columns[name]).type).endswith("string")}
    return Features(types)


def read_image_folder(path: str) -> Iterator[dict[str, str]]:
    """
    The images of a folder that holds a folder of images for each class, with the names of the classes.

    Raises:
        `ValueError`: images that lie elsewhere in the folder, a class without images, or an image that cannot be read.
    """
    endings = {ending for ending, name in PILImage.registered_extensions().items() if name in PILImage.OPEN}
    example = f"Put the images of each class into a folder of its name, such as {Path(path) / 'cat' / '1.png'}"

    def is_image(file: Path) -> bool:
        return file.suffix.lower() in endings

    others: list[Path] = []
    folders = 0
    for folder in _visible(Path(path)):
        if not folder.is_dir():
            if is_image(folder):
                raise ValueError(f"{folder} is in no folder of a class. {example}.")
            others.append(folder)
            continue
        folders += 1
        images = [file for file in _visible(folder) if is_image(file) and not file.is_dir()]
        for file in _visible(folder):
            if file.is_dir() and any(is_image(each) for each in file.rglob("*")):
                raise ValueError(f"{file} is a folder in the folder of a class. {example}, or name {folder} instead.")
            if not file.is_dir() and not is_image(file):
                others.append(file)
        if not images:
            raise ValueError(f"{folder} has no images. {example}.")
        for file in images:
            open_image(file)
            yield {"image": as_text(str(file)), "label": as_text(folder.name)}
    if not folders:
        raise ValueError(f"{path} has no folders. {example}.")
    if others:
        print(f"{path}: {len(others)} files are no images by their endings and are left out, such as {others[0]}.")


def _visible(folder: Path) -> list[Path]:
    """In order; without the files that systems hide in folders."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX", "Thumbs.db")))


@functools.cache
def _temporary_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="modeling_sumagg_")


def to_dataset(rows: Iterable[dict[str, Any]], features: Features) -> Dataset:
    """The rows in a file of a temporary folder, which is gone when the program ends: no later run can read old rows."""
    with tempfile.NamedTemporaryFile(dir=_temporary_folder().name, suffix=".arrow", delete=False) as file:
        with ArrowWriter(features=features, stream=file) as writer:
            for row in rows:
                writer.write(row)
            writer.finalize()
    return Dataset.from_file(file.name)
