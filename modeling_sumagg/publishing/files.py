"""The files of a saved folder: which of them this package wrote, and how it writes them. Imports nothing heavy."""

import fnmatch
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.whole_files import write_whole


# The names of a checkpoint's code files begin with this and a digest of the code: nobody else names files so.
PREFIX = "sumagg_"
HEADER_PATTERN = re.compile(r"# From the Python package .*modeling-sumagg ([^ ,]+).*, module ([\w.]+)\.$")
# `"module.Class"` in an `auto_map`, with the repository that it may name.
REFERENCE = re.compile(r"([\w./-]+--)?\w[\w/]*\.\w+")
# The first line of a file of ours is shorter than this.
LONGEST_HEADER = 500
# The folder inside of a new one in which its files are written.
UNFINISHED = ".converting"
# What training scripts, `Trainer` and `save_pretrained` write at the top of their folder.
RUN_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "processor_config.json",
    "preprocessor_config.json",
    "adapter_config.json",
    "training_args.bin",
    "trainer_state.json",
    "*_results.json",
    "README.md",
    "training.png",
    "predictions.png",
    "alignment.png",
)


def printable(text: Any) -> str:
    """The text on one line, with escapes for characters that a terminal would obey or could not show."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in " ".join(str(text).split())
    )


def read_header(path: Path) -> tuple[str, str] | None:
    """The version of modeling-sumagg that wrote a file and the module that it holds; `None`: it wrote no such file."""
    # A pipe would be waited for.
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        match = HEADER_PATTERN.match(file.readline(LONGEST_HEADER))
    return None if match is None else (match[1], match[2])


def code_files(folder: Path) -> dict[str, tuple[str, str]]:
    """The files in a folder that hold code of this package, by name, with what their headers say."""
    headers = {path.name: read_header(path) for path in sorted(folder.glob("*.py"))}
    return {name: header for name, header in headers.items() if header is not None}


def read_json(path: Path) -> dict[str, Any]:
    """
    A JSON object from a file.

    Raises:
        `ValueError`: the file does not hold one; the message is the reason.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}.")
    return value


def read_auto_map(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """
    The `auto_map` of a config: `"module.Class"` by the name of an Auto class, for tokenizers a list of two, of which one
    may be `None`. It is empty where the config has none.

    Args:
        config (`dict[str, Any]`): what the file holds.
        path (`Path`): the file, for the error.

    Raises:
        `ValueError`: it is something else.
    """
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, dict):
        raise ValueError(f"The `auto_map` of {path} must map Auto classes to code, got {auto_map!r:.80}.")
    for name, reference in auto_map.items():
        parts = reference if isinstance(reference, list) else [reference]
        if not parts or not all(
            part is None or (isinstance(part, str) and REFERENCE.fullmatch(part)) for part in parts
        ):
            raise ValueError(
                f"The `auto_map` of {path} must name `{name}` as 'module.Class' or a list of such names, got "
                f"{reference!r:.80}."
            )
    return auto_map


def flush_to_disk(*paths: Path) -> None:
    """Have the system write files, or the entries of folders, to the disk now."""
    if os.name != "posix":
        return
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def refuse_foreign_files(folder: Path, names: Iterable[str]) -> None:
    """
    Raise where a folder holds a file of one of these names that this package did not write.

    Raises:
        `ValueError`: it does; the message names the file and the remedy.
    """
    for name in names:
        if (folder / name).exists() and read_header(folder / name) is None:
            raise ValueError(
                f"{folder / name} was not written by modeling-sumagg and would be overwritten: move it away, or choose "
                "another folder."
            )


def refuse_foreign_config(path: Path) -> None:
    """
    Raises:
        `ValueError`: `path`, a `config.json`, is there and is not the config of a model.
    """
    if not path.exists():
        return
    try:
        is_config = "model_type" in read_json(path)
    except ValueError:
        is_config = False
    if not is_config:
        raise ValueError(
            f"{path} is not the config of a model and would be overwritten: move it away, or choose another folder."
        )


def refuse_foreign_readme(folder: Path) -> None:
    """
    Raises:
        `ValueError`: the folder has a `README.md` that is no model card.
    """
    path = folder / "README.md"
    if path.exists() and not _is_card(path):
        raise ValueError(
            f"{path} is no model card, which begins with a line `---`, and would be overwritten: move it away, or save "
            "the model to another folder."
        )


def write_code(folder: Path, sources: dict[str, str], like: Path | None = None) -> list[str]:
    """
    Write code into a folder. What is there already, and the same, is left alone.

    Args:
        folder (`Path`): where to write.
        sources (`dict[str, str]`): the text of each file by its name.
        like (`Path`, *optional*): a file whose mode and owner new files get.

    Returns:
        `list[str]`: the names of the files that were written.

    Raises:
        `OSError`: a file cannot be written. Those before it stay, since another process may have found them there.
    """
    written = []
    for name, source in sources.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != source:
            write_whole(path, source.encode(), like=like)
            written.append(name)
    return written


def remove_old_code(folder: Path, sources: dict[str, str]) -> list[str]:
    """Remove the code files that other versions of the code left under names of `PREFIX`; returns their names."""
    old = [name for name in code_files(folder) if name.startswith(PREFIX) and name not in sources]
    for name in old:
        (folder / name).unlink(missing_ok=True)
    return old


def refuse_what_is_there(folder: Path, but: str = "") -> None:
    """
    Raises:
        ValueError: `folder` is a file, or holds something else than `but`.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give the name of a folder to write.")
    names = sorted(path.name for path in folder.iterdir() if path.name != but) if folder.is_dir() else []
    if names:
        raise ValueError(
            f"{folder} is not empty, it holds {', '.join(names[:5])}{' …' if len(names) > 5 else ''}: give the name of a "
            "new folder, or empty this one."
        )


@contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """
    A folder inside of `target` to write files into. They become files of `target` when the block ends, `config.json` as
    the last; if the block raises, `target` is what it was.

    Raises:
        `ValueError`: `target` holds something, such as the files that another process writes at this moment.
    """
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    folder, moved = target / UNFINISHED, []
    try:
        folder.mkdir()
    except FileExistsError:
        raise ValueError(f"{folder} is there: another process writes to {target}, or one was killed.") from None
    try:
        refuse_what_is_there(target, but=UNFINISHED)
        yield folder
        names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == "config.json")
        flush_to_disk(*(folder / name for name in names))
        for name in names:
            (folder / name).rename(target / name)
            moved.append(target / name)
        flush_to_disk(target)
    except BaseException:
        for path in moved:
            path.unlink()
        shutil.rmtree(folder, ignore_errors=True)
        if is_new:
            target.rmdir()
        raise
    folder.rmdir()


def check_output_dir(folder: str | os.PathLike) -> bool:
    """
    Raise where a training run, or `save_pretrained`, would overwrite files that no run and no `save_pretrained` wrote.
    Call it before the training, and before the data is prepared.

    A folder may be written to if it does not exist, if it holds none of the files that a run writes, or if it holds a
    model that transformers or PEFT saved, or checkpoints of a run.

    Args:
        folder (`str` or `os.PathLike`): the output folder; nothing is written to it here.

    Returns:
        `bool`: whether it holds the files of an earlier run, or a saved model, which this one overwrites.

    Raises:
        `ValueError`: it is a file, lies in one, cannot be written, or holds files of somebody else; the message names
            them and the remedy.
    """
    folder = Path(folder)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not existing.is_dir():
        raise ValueError(f"{existing} is a file and not a folder: give the name of a folder to write to.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{existing} cannot be written to: change its permissions, or choose another folder.")
    if existing != folder:
        return False
    earlier = _holds_a_run(folder)
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if name.startswith(PREFIX) and read_header(folder / name) is None]
    if not earlier:
        foreign += [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in RUN_FILES)]
    elif "README.md" in names and not _is_card(folder / "README.md"):
        foreign.append("README.md")
    if foreign:
        raise ValueError(
            f"{folder} holds {', '.join(foreign)}, which no training run wrote and this one would overwrite: choose "
            "another folder, or move what it holds away."
        )
    return earlier


def _is_card(path: Path) -> bool:
    """Whether a README is a model card, which begins with metadata."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline(LONGEST_HEADER).rstrip() == "---"


def _holds_a_run(folder: Path) -> bool:
    """Whether transformers, PEFT or a training run has written to a folder."""
    for name, mark in (("config.json", "transformers_version"), ("adapter_config.json", "peft_type")):
        if (folder / name).is_file():
            try:
                return mark in read_json(folder / name)
            except ValueError:
                # `linearize` was killed in the midst of writing it.
                return (folder / "stages" / "command.json").is_file()
    return any(path.is_file() for path in folder.glob("checkpoint-*/trainer_state.json"))
