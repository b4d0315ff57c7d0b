"""
Update a folder, save into it, or convert to one, and be killed at every step, or run out of space: what is left?

Prints one JSON object: how often the folder held the old model, the new one and something else, and how often the
action was refused for lack of space. A model is its `config.json` with the code that it names and the weights; without
a `config.json` nothing loads. Other files may be left beside it.
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
from transformers import AutoConfig

from modeling_sumagg.publishing.conversion import convert_original_checkpoint
from modeling_sumagg.publishing.hub import update_folder


def model_in(folder: Path) -> dict[str, bytes] | None:
    """The config, the code that it needs and the weights; `None`: nothing could be loaded."""
    if not (folder / "config.json").exists():
        return None
    config = (folder / "config.json").read_bytes()
    module = json.loads(config)["auto_map"]["AutoConfig"].partition(".")[0]
    prefix = module[: module.index("configuration")]
    paths = [*folder.glob("*.safetensors"), *folder.glob(f"{prefix}*.py")]
    if not prefix:
        # Of the old layout.
        paths = [path for path in paths if not path.name.startswith("sumagg_")]
    return {"config.json": config} | {path.name: path.read_bytes() for path in paths}


def in_a_child(action, *, kill_at: int | None = None, file_size: int | None = None) -> int:
    """Run an action in a process that is killed at its n-th step in the folder; how the process ended."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    steps = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal steps
        if any(str(parent) in str(argument) for argument in arguments):
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
if what == "convert":
    shutil.rmtree(folder)
    parent.mkdir(exist_ok=True)
backup = shutil.copytree(parent, parent.parent / "backup", symlinks=True)
old = model_in(folder)
config = AutoConfig.from_pretrained(folder) if what == "save" else None


def act() -> None:
    if what == "convert":
        convert_original_checkpoint("sumagg", source, folder)
    elif what == "save":
        config.save_pretrained(folder)
    else:
        update_folder(folder)


def reset() -> None:
    shutil.rmtree(parent)
    shutil.copytree(backup, parent, symlinks=True)


act()
new = model_in(folder)
sizes = sorted({path.stat().st_size for path in folder.iterdir()})
assert new is not None and new != old
left: Counter = Counter()
broken = []


def note(step: str) -> None:
    found = model_in(folder)
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
for size in sizes[:: max(1, len(sizes) // 6)]:
    reset()
    ended = in_a_child(act, file_size=size - 1)
    refused += ended != 0
    note(f"files of at most {size - 1} bytes")
    if what == "convert" and ended != 0:
        assert not folder.exists(), "what was written stays"
print(json.dumps({**left, "broken steps": broken, "refused": refused}))
