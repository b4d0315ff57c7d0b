"""The check of a checkpoint folder before it is uploaded."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import ModelCard

from .remote_code import read_header


def check_card(path: Path) -> list[str]:
    """
    Read a model card and say what it declares.

    Raises:
        `ValueError`: the card is missing, its YAML is not valid, or a field that the Hub needs is missing.
    """
    if not path.is_file():
        raise ValueError(f"There is no model card: {path} is missing. `save_model_card` makes one.")
    data = ModelCard(path.read_text(encoding="utf-8")).data
    for field in ("license", "pipeline_tag", "tags", "eval_results"):
        if not data.get(field):
            raise ValueError(f"The metadata of {path} has no `{field}`.")
    library = "peft" if (path.parent / "adapter_config.json").is_file() else "transformers"
    if data.library_name != library:
        raise ValueError(f"`library_name` in {path} must be {library!r}, got {data.library_name!r}.")
    if library == "peft" and not data.base_model:
        raise ValueError(f"The metadata of {path} has no `base_model`.")
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
        # Nor may what a family outside of this package was written in.
        headers = (read_header(path) for path in Path(folder).glob("*.py"))
        blocked = sorted({header[1].partition(".")[0] for header in headers if header is not None})
        command = [sys.executable, "-I", str(script), str(Path(folder).resolve()), *blocked]
        process = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if process.returncode != 0:
        raise ValueError(process.stderr.strip().splitlines()[-1])
    for line in check_card(Path(folder) / "README.md"):
        print(line)
