"""Convert into a folder, or update one, and be killed at every step, or run out of space: what is left each time?

Prints one JSON object: how often the folder was the old one, the new one and something else.
"""

import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import transformers

from modeling_sumagg.convert_original_checkpoint import convert_original_checkpoint
from modeling_sumagg.hub import update_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def in_a_child(action, *, kill_at: int | None = None, file_size: int | None = None) -> int:
    """Run an action in a process that is killed at its n-th step in the folder; how the process ended."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    steps = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal steps
        if event.startswith("ctypes.") or any(str(parent) in str(argument) for argument in arguments):
            steps += 1
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    if kill_at is not None:
        sys.addaudithook(count)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    try:
        action()
    except Exception as error:
        print(type(error).__name__, error, file=sys.stderr)
        os._exit(1)
    os._exit(0)


what, source, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
parent = folder.parent
transformers.logging.disable_progress_bar()
old = contents(folder)
backup = shutil.copytree(folder, parent.parent / "backup", symlinks=True)


def act() -> None:
    if what == "convert":
        convert_original_checkpoint("sumagg", source, folder)
    else:
        update_folder(folder)


def reset() -> None:
    shutil.rmtree(parent)
    shutil.copytree(backup, folder, symlinks=True)


act()
new = contents(folder)
assert new != old
left: Counter = Counter()
broken = []


def note(step: str) -> None:
    found = contents(folder) if folder.is_dir() else None
    kind = "old" if found == old else "new" if found == new else "broken"
    left[kind] += 1
    if kind == "broken":
        broken.append(step)


step, ended = 0, -1
while ended != 0:
    step += 1
    reset()
    ended = in_a_child(act, kill_at=step)
    assert ended in (0, signal.SIGKILL), ended
    note(f"killed at step {step}")
refused = 0
sizes = sorted({len(content) for content in new.values()})
for size in sizes[:: max(1, len(sizes) // 6)]:
    reset()
    ended = in_a_child(act, file_size=size - 1)
    refused += ended != 0
    note(f"files of at most {size - 1} bytes")
    assert ended == 0 or [path.name for path in parent.iterdir()] == [folder.name], "what was written beside stays"
print(json.dumps({**left, "broken steps": broken, "refused": refused}))
