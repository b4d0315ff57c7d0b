"""Write a folder whole or not at all."""

import ctypes
import fnmatch
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: str | os.PathLike, replaced: Iterable[str] = ()) -> Iterator[Path]:
    """
    A folder to write files into that takes the place of `path` when the block ends, with all other files of the folder
    that was there. If the block raises, the disk is full or the process is killed, `path` is what it was.

    Both are exchanged in one step on Linux and macOS. On Windows, and on file systems that cannot do that (some network
    ones), the old folder is renamed first: a process that is killed between these two calls leaves no folder at `path`,
    the new one whole beside it and the old one under the same name with `.old`. A killed process also leaves what it
    wrote beside `path`, in a folder whose name begins with a dot.

    Args:
        path (`str` or `os.PathLike`): the folder to write; it need not exist.
        replaced (`Iterable[str]`): name patterns of the files that do not stay, even if nothing of their name is written.

    Raises:
        `ValueError`: `path` is a file, the current folder, or a mount point, none of which can be replaced.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{path} is a file: give the name of a folder.")
    if target in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(
            f"{path} is replaced as a whole, which the current folder cannot be: run this from another one."
        )
    if target.is_mount():
        raise ValueError(f"{path} is replaced as a whole, which a mount point cannot be: give a folder inside it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    fresh.mkdir()
    try:
        yield fresh
        if os.name == "posix":
            for written in [*fresh.rglob("*"), fresh]:
                _sync(written)
        if target.is_dir():
            _carry_over(target, fresh, tuple(replaced))
        _put(fresh, target)
        if os.name == "posix":
            _sync(target.parent)
    finally:
        # What the block left, or, after the exchange, the old folder.
        shutil.rmtree(fresh, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _carry_over(old: Path, new: Path, replaced: tuple[str, ...]) -> None:
    shutil.copystat(old, new)
    for entry in old.iterdir():
        if (new / entry.name).exists() or any(fnmatch.fnmatch(entry.name, pattern) for pattern in replaced):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, new / entry.name)


def _link(source: str | Path, destination: str | Path) -> None:
    """The same file under a second name, or where the file system knows no such thing, a copy."""
    try:
        os.link(source, destination, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, destination, follow_symlinks=False)


def _put(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        old = target.rename(f"{new}.old")
        try:
            new.rename(target)
        except OSError:
            old.rename(target)
            raise
        old.rename(new)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; `False` where that cannot be done."""
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "linux":
        current, exchange = -100, 2
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
        return rename is not None and rename(current, names[0], current, names[1], exchange) == 0
    if sys.platform == "darwin":
        swap = 2
        return ctypes.CDLL(None).renamex_np(*names, swap) == 0
    return False
