"""The check of a checkpoint folder before it is uploaded."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard


def check_card(path: Path) -> list[str]:
    """
    Read a model card and say what it declares.

    Raises:
        `ValueError`: the card is missing, its YAML is not valid, or a field that the Hub needs is missing.
    """
    if not path.is_file():
        raise ValueError(f"There is no model card: {path} is missing. `create_model_card` makes one.")
    data = ModelCard(path.read_text(encoding="utf-8")).data
    for field in ("license", "pipeline_tag", "tags", "eval_results"):
        if not data.get(field):
            raise ValueError(f"The metadata of {path} has no `{field}`.")
    if data.library_name != "transformers":
        raise ValueError(f"`library_name` in {path} must be 'transformers', got {data.library_name!r}.")
    results = ", ".join(f"{result.metric_type} {result.metric_value}" for result in data.eval_results)
    return [f"card: {data.pipeline_tag}, license {data.license}, {results} on {data.eval_results[0].dataset_name}"]


def check_folder(folder: str | os.PathLike) -> None:
    """
    Check a checkpoint before it is uploaded, and print what was found. See the head of this module.

    Raises:
        `ValueError`: something is wrong; the message is the reason.
    """
    script = Path(__file__).with_name("clean_process.py")
    with tempfile.TemporaryDirectory() as modules:
        environment = {**os.environ, "HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-I", str(script), str(Path(folder).resolve())]
        process = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if process.returncode != 0:
        raise ValueError(process.stderr.strip().splitlines()[-1])
    for line in check_card(Path(folder) / "README.md"):
        print(line)
