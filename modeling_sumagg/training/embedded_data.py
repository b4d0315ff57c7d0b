"""
Small real data sets that need no network: they come with Python and with scikit-learn.

They need what the example scripts need: `pip install 'modeling-sumagg[examples]'`.
"""

import ast
import math
import re
import sysconfig
import zlib
from collections import Counter
from pathlib import Path

import numpy as np


try:
    from datasets import (  # type: ignore[import-untyped]
        ClassLabel,
        Dataset,
        DatasetDict,
        Features,
        Image,
        Value,
    )
    from PIL import Image as PILImage
    from sklearn.datasets import load_digits, load_sample_images  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(
        f"The embedded data sets need {error.name}: run `pip install 'modeling-sumagg[examples]'`."
    ) from error


# Not in every Python, installed by others, or tables written by a program.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}

# What `standard_library_functions` says in numbers.
SIGNATURE_COLUMNS = [
    "positional_parameters",
    "keyword_only_parameters",
    "defaults",
    "variadic_parameters",
    "annotations",
    "decorators",
    "is_method",
]


def standard_library_files() -> list[Path]:
    """
    The sources of the Python standard library, sorted by path, without its tests and without generated files.

    Raises:
        `FileNotFoundError`: this Python comes without the sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts) and not path.name.startswith("_sysconfig")
    ]
    if not files:
        raise FileNotFoundError(f"There are no Python sources in {root}. Train on text files of your own instead.")
    return files


def standard_library_sources() -> DatasetDict:
    """
    The standard library's sources as text, for language modelling.

    Returns:
        Columns `path` and `text`, one row a file, in `train` (90 % of the files), `validation` and `test` (5 % each).
        A checksum of its path puts a file into its split, so that it is the same in every version of Python.
    """
    root = Path(sysconfig.get_path("stdlib"))
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for path in standard_library_files():
        name = path.relative_to(root).as_posix()
        split = {0: "validation", 1: "test"}.get(zlib.crc32(name.encode()) % 20, "train")
        rows[split].append({"path": name, "text": path.read_text(encoding="utf-8")})
    return DatasetDict({split: Dataset.from_list(files) for split, files in rows.items()})


def standard_library_packages(lines_per_document: int = 150) -> DatasetDict:
    """
    Which package of the standard library a piece of source code belongs to, for classifying long documents.

    The classes are the packages with at least eight files. Every line that names one of them is removed, and the files
    are cut into documents of `lines_per_document` lines; all those of a file are in the same split.

    Returns:
        Columns `text` and `label`, in `train` (70 % of each package's files), `validation` and `test` (15 % each).
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in standard_library_files() if path.parent != root]
    packages = [path.relative_to(root).parts[0] for path in files]
    names = sorted(package for package, count in Counter(packages).items() if count >= 8)
    revealing = re.compile("|".join(names), re.IGNORECASE)
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    for label, name in enumerate(names):
        members = [path for path, package in zip(files, packages, strict=True) if package == name]
        members.sort(key=lambda path: zlib.crc32(path.relative_to(root).as_posix().encode()))
        for index, path in enumerate(members):
            share = index / len(members)
            split = "validation" if share < 0.15 else "test" if share < 0.3 else "train"
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not revealing.search(line)]
            for start in range(0, len(lines), lines_per_document):
                rows[split].append({"text": "\n".join(lines[start : start + lines_per_document]), "label": label})
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return DatasetDict({split: Dataset.from_list(documents, features=features) for split, documents in rows.items()})


def _num_lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def standard_library_functions() -> DatasetDict:
    """
    How long a function of the standard library is, for regression from text and numbers.

    Every function with a docstring is one row; of several with the same code, one. Those of a package, or of a module
    outside of packages, are all in the same split, which a checksum of its name decides.

    Returns:
        Columns `text` (the name, and the docstring after it), numbers that its signature shows
        (`SIGNATURE_COLUMNS`), and `label`, the natural logarithm of its number of lines without the docstring; in
        `train` (about 70 % of the packages), `validation` and `test` (about 15 % each).
    """
    root = Path(sysconfig.get_path("stdlib"))
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    seen = set()
    for path in standard_library_files():
        share = zlib.crc32(path.relative_to(root).parts[0].encode()) % 100
        split = "validation" if share < 15 else "test" if share < 30 else "train"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node) is None:
                continue
            code = ast.dump(node)
            if code in seen:
                continue
            seen.add(code)
            arguments, docstring = node.args, node.body[0]
            positional = [*arguments.posonlyargs, *arguments.args]
            lines = _num_lines(node) - _num_lines(docstring)
            annotated = [argument for argument in (*positional, *arguments.kwonlyargs) if argument.annotation]
            numbers = (
                len(positional),
                len(arguments.kwonlyargs),
                len(arguments.defaults) + sum(default is not None for default in arguments.kw_defaults),
                (arguments.vararg is not None) + (arguments.kwarg is not None),
                len(annotated) + (node.returns is not None),
                len(node.decorator_list),
                int(bool(positional) and positional[0].arg in ("self", "cls")),
            )
            rows[split].append(
                {
                    "text": f"{node.name}\n{ast.get_docstring(node)}",
                    **dict(zip(SIGNATURE_COLUMNS, numbers, strict=True)),
                    "label": math.log(max(lines, 1)),
                }
            )
    return DatasetDict({split: Dataset.from_list(functions) for split, functions in rows.items()})


def handwritten_digits() -> DatasetDict:
    """
    The UCI handwritten digits of scikit-learn: 1,797 grey images of 8 x 8 pixels in ten classes.

    Returns:
        Columns `image` (PIL, mode L) and `label`, in `train` (1,257), `validation` (180) and `test` (360): always the
        same split, every class in the same share of each.
    """
    digits = load_digits()
    # scikit-learn's grey levels are 0 to 16.
    pixels = (digits.images / 16 * 255).round().astype("uint8")
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    images = [PILImage.fromarray(image) for image in pixels]
    dataset = Dataset.from_dict({"image": images, "label": digits.target}, features=features)
    rest = dataset.train_test_split(test_size=360, stratify_by_column="label", seed=0)
    training = rest["train"].train_test_split(test_size=180, stratify_by_column="label", seed=0)
    return DatasetDict(train=training["train"], validation=training["test"], test=rest["test"])


def sample_photos() -> dict[str, PILImage.Image]:
    """The two photos of scikit-learn by name, `china` and `flower`: RGB, 640 x 427 pixels."""
    photos = load_sample_images()
    return {
        Path(name).stem: PILImage.fromarray(pixels)
        for name, pixels in zip(photos.filenames, photos.images, strict=True)
    }


def photo_crops(num_train: int = 4000, num_test: int = 500) -> DatasetDict:
    """
    Random squares of `sample_photos`, a quarter to three fifths of the photo's height, resized to 64 x 64 pixels, to be
    told apart by where they come from: each photo is divided into 3 x 4 cells, and the label is the cell of the crop's
    centre.

    Returns:
        Columns `image` (PIL, RGB) and `label`, in `train` and `test`: always the same crops.
    """
    photos = sample_photos()
    rows, columns = 3, 4
    names = [f"{photo} {row}.{column}" for photo in photos for row in range(rows) for column in range(columns)]
    random = np.random.default_rng(0)

    def crops(number: int) -> Dataset:
        images, labels = [], []
        for _ in range(number):
            index = random.integers(len(photos))
            photo = list(photos.values())[index]
            side = int(random.uniform(0.25, 0.6) * photo.height)
            left, top = (int(random.integers(length - side)) for length in photo.size)
            box = (left, top, left + side, top + side)
            images.append(photo.resize((64, 64), PILImage.Resampling.BICUBIC, box=box))
            row, column = (top + side / 2) * rows // photo.height, (left + side / 2) * columns // photo.width
            labels.append(int((index * rows + row) * columns + column))
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"image": images, "label": labels}, features=features)

    return DatasetDict(train=crops(num_train), test=crops(num_test))
