"""Write a file whole or not at all."""

import os
import shutil
import uuid
from pathlib import Path


def write_whole(path: str | os.PathLike, content: bytes, like: Path | None = None) -> None:
    """
    Write a file, or replace one, in a single step: readers find the old content or the new one, even if this process is
    killed, the disk is full, or another process writes the same file. The content is on the disk when this returns.

    A file that is replaced keeps its mode and its owner. A symbolic link is replaced, and its target stays: pass
    `path.resolve()` to replace the target.

    Args:
        path (`str` or `os.PathLike`): the file; its folder exists.
        content (`bytes`): everything that the file will hold.
        like (`Path`, *optional*): a file whose mode and owner a new one gets; by default those of the process.

    Raises:
        `ValueError`: `path` is a folder, a device or a pipe.
        `OSError`: the file cannot be written, or its owner cannot be kept. Its old content is still there.
    """
    path = Path(path)
    model = path if path.exists() else like
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a folder, a device or a pipe: give the name of a file.")
    # A name of its own for every writer, in the same folder, since a rename cannot cross file systems.
    temporary = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex[:12]}")
    try:
        try:
            with open(temporary, "xb") as file:
                if model is not None:
                    _copy_owner_and_mode(model, temporary)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if os.name == "posix":
            _sync_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _copy_owner_and_mode(source: Path, destination: Path) -> None:
    if os.name == "posix":
        there, here = source.stat(), destination.stat()
        if (there.st_uid, there.st_gid) != (here.st_uid, here.st_gid):
            os.chown(destination, there.st_uid, there.st_gid)
    shutil.copymode(source, destination)


def _sync_folder(folder: Path) -> None:
    """Have the system write the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["write_whole"]
