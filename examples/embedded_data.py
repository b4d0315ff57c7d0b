"""Small real data sets that need no network: they come with Python and with scikit-learn."""

import sysconfig
import zlib
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits


# Not in every Python, installed by others, or tables written by a program.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


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
    rows = {"train": [], "validation": [], "test": []}
    for path in standard_library_files():
        name = path.relative_to(root).as_posix()
        split = {0: "validation", 1: "test"}.get(zlib.crc32(name.encode()) % 20, "train")
        rows[split].append({"path": name, "text": path.read_text(encoding="utf-8")})
    return DatasetDict({split: Dataset.from_list(files) for split, files in rows.items()})


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
