"""The check of a checkpoint folder before it is uploaded. Imports nothing heavy: a clean process loads the model."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .files import code_files, printable, read_auto_map, read_json


# What the metadata of a card must have: the names in its YAML, and what they are.
CARD_FIELDS = {
    "license": "`license` (such as `apache-2.0`)",
    "library_name": "`library_name` (`transformers`, of adapters `peft`)",
    "pipeline_tag": "`pipeline_tag` (the task, such as `text-generation`)",
    "tags": "`tags` (a list)",
    "model-index": "`model-index` (what was measured: metric, value and data set)",
}
CARD_HELP = (
    f"A card begins with metadata between two lines `---`, in YAML: {', '.join(CARD_FIELDS.values())}, and of adapters "
    "`base_model`. `save_model_card` of `modeling_sumagg.publishing.hub` writes all of it."
)
# What is of use to nobody else, or tells paths of this machine.
NOT_UPLOADED = {"training_args.bin": "training_args.bin", "checkpoint-*": "checkpoint-*/*", "runs": "runs/*"}


def check_card(path: Path) -> list[str]:
    """
    Read a model card and say what it declares.

    Raises:
        `ValueError`: the card is missing, its metadata is not valid YAML, or a field that the Hub needs is missing; the
            message says what a card must have.
    """
    from huggingface_hub import ModelCard

    if not path.is_file():
        raise ValueError(f"There is no model card: {path} is missing. {CARD_HELP}")
    try:
        data = ModelCard(path.read_text(encoding="utf-8")).data
    # Any error of the YAML parser, and any that wrong types in the metadata lead to.
    except Exception as error:
        raise ValueError(f"The metadata of {path} cannot be read: {_one_line(error)}. {CARD_HELP}") from error
    missing = [name for name in CARD_FIELDS if not data.get("eval_results" if name == "model-index" else name)]
    library = "peft" if (path.parent / "adapter_config.json").is_file() else "transformers"
    if library == "peft" and not data.base_model:
        missing.append("base_model")
    if missing:
        raise ValueError(f"The metadata of {path} has no {', '.join(f'`{name}`' for name in missing)}. {CARD_HELP}")
    if data.library_name != library:
        raise ValueError(f"`library_name` in {path} must be {library!r}, got {data.library_name!r}.")
    results = ", ".join(f"{result.metric_type} {result.metric_value}" for result in data.eval_results)
    line = f"card: {data.pipeline_tag}, license {data.license}, {results} on {data.eval_results[0].dataset_name}"
    return [printable(line)]


def check_files(folder: str | os.PathLike) -> None:
    """
    Look at the files of a checkpoint without running any of them: config, code, and weights, which must be whole and in
    safetensors only.

    Raises:
        `ValueError`: this is no checkpoint that could be uploaded; the message is the reason.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'missing'}: give the folder of a checkpoint.")
    if (folder / "adapter_config.json").is_file():
        adapter = read_json(folder / "adapter_config.json")
        if not isinstance(adapter.get("base_model_name_or_path"), str):
            raise ValueError(f"The adapter_config.json in {folder} names no base model.")
    elif (folder / "config.json").is_file():
        _check_code(folder, read_json(folder / "config.json"))
    else:
        raise ValueError(f"{folder} holds no config.json: it is not a checkpoint. {_what_it_is(folder)}")
    others = sorted(
        path.name for ending in ("*model*.bin", "*.ckpt", "*.h5", "*.msgpack") for path in folder.glob(ending)
    )
    if others:
        raise ValueError(f"{folder} holds weights in other formats than safetensors: {others}. Remove them.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{folder} holds no safetensors file.")
    for path in weights:
        try:
            with safe_open(path, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is truncated or corrupted: {error}") from error


def _check_code(folder: Path, config: dict[str, Any]) -> None:
    path = folder / "config.json"
    auto_map = read_auto_map(config, path)
    if "AutoConfig" not in auto_map:
        raise ValueError(
            f"The config.json in {folder} has no `auto_map`, so this is a model of the type {config.get('model_type')!r} "
            "without code. A model of this package is saved with its code where `modeling_sumagg` is imported."
        )
    for reference in auto_map.values():
        for part in reference if isinstance(reference, list) else [reference]:
            module = str(part).partition(".")[0]
            if part is not None and "--" not in module and not (folder / f"{module}.py").is_file():
                raise ValueError(f"The `auto_map` of {path} names {part}, and there is no file {module}.py.")


def _what_it_is(folder: Path) -> str:
    """What a folder without a config holds, and what to do with it."""
    inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inside:
        return f"Checkpoints are in it, {', '.join(inside[:5])}: check one of them."
    if any(folder.glob("*.safetensors")):
        return "It holds weights alone: save the model with `save_pretrained`."
    if originals := sorted(path.name for ending in ("*.pt", "*.pth") for path in folder.glob(ending)):
        return f"It holds {originals[0]}: convert it by `python -m modeling_sumagg convert`."
    names = sorted(path.name for path in folder.iterdir())
    return f"It holds {', '.join(names[:5])}{' …' if len(names) > 5 else ''}." if names else "It is empty."


def check_folder(folder: str | os.PathLike) -> None:
    """
    Check a checkpoint before it is uploaded, and print what was found: its files are looked at, it is loaded with
    `trust_remote_code=True` and run in a new process that cannot import this package, and its card is read.

    Raises:
        `ValueError`: something is wrong; the message is the reason.
    """
    folder = Path(folder)
    check_files(folder)
    script = Path(__file__).with_name("clean_process.py")
    with tempfile.TemporaryDirectory() as place:
        finished = Path(place) / "finished"
        environment = {**os.environ, "HF_MODULES_CACHE": place, "HF_HUB_OFFLINE": "1"}
        # Nor may what a family outside of this package was written in.
        blocked = sorted({module.partition(".")[0] for _, module in code_files(folder).values()})
        command = [sys.executable, "-I", str(script), str(folder.resolve()), str(finished), *blocked]
        process = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
        whole = process.returncode == 0 and finished.exists()
    if not whole:
        raise ValueError(printable(_why_it_ended(process)))
    for line in check_card(folder / "README.md"):
        print(line)
    excluded = [exclude for pattern, exclude in NOT_UPLOADED.items() if any(folder.glob(pattern))]
    parts = ["hf", "upload", "USER/NAME", str(folder), *(part for name in excluded for part in ("--exclude", name))]
    print(f"upload it by: {shlex.join(parts)}")


def _why_it_ended(process: subprocess.CompletedProcess) -> str:
    """Why the clean process did not come to its end."""
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return f"The process that loaded the folder was killed by {name}, which the system does where memory runs out."
    if process.returncode == 0:
        return "The code in the folder ended the process that loaded it: it calls `sys.exit` or the like."
    lines = process.stderr.strip().splitlines()
    return lines[-1] if lines else f"The process that loaded the folder ended with the status {process.returncode}."


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
