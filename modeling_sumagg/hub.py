"""Model cards of what was trained, and the check of a checkpoint folder before it is uploaded.

```bash
python -m modeling_sumagg.hub DIR
```

loads the folder with `trust_remote_code=True` in a new process that cannot import this package, runs the model, reads
the card, prints what it found, and exits non-zero with the reason where something is wrong.
"""

import argparse
import importlib.resources
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import DynamicCache, PreTrainedModel


HEADS = {
    "CausalLM": ("AutoModelForCausalLM", "text-generation"),
    "MaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "SequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "TokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "MultimodalRegression": ("AutoModelForSequenceClassification", "tabular-regression"),
    "Backbone": ("AutoBackbone", "image-feature-extraction"),
    "Model": ("AutoModel", "feature-extraction"),
}
PUBLISHED_IN = {"sumagg": "doi:10.36227/techrxiv.175790522.25734653", "tost": "arxiv:2412.17810"}


def decode_state_size(model: PreTrainedModel) -> tuple[int, int] | None:
    """
    The bytes that decoding one sequence keeps, counted in the cache after a short and after a longer prompt.

    Returns:
        `tuple[int, int]` or `None`: the bytes that do not depend on the length (the states of the recurrent layers), and
        those that each token adds (the keys and values of the attention layers, up to a sliding window); `None` for a
        model that does not generate.
    """
    if not model.can_generate():
        return None

    def held(length: int) -> int:
        input_ids = torch.zeros(1, length, dtype=torch.long, device=model.device)
        with torch.no_grad():
            cache = model(input_ids, past_key_values=DynamicCache(config=model.config)).past_key_values
        tensors = (
            [*(layer.state if hasattr(layer, "state") else (layer.keys, layer.values))] for layer in cache.layers
        )
        return sum(tensor.numel() * tensor.element_size() for layer in tensors for tensor in layer)

    per_token = held(2) - held(1)
    return held(1) - per_token, per_token


def create_model_card(
    model: PreTrainedModel,
    *,
    model_id: str,
    dataset_type: str,
    dataset_name: str,
    hyperparameters: dict[str, Any],
    metrics: dict[str, float],
    baselines: dict[str, dict[str, float]],
    steps: int,
    hardware: str | None = None,
    limits: str | None = None,
    language: str | None = None,
    license: str = "apache-2.0",
) -> ModelCard:
    """
    The card of a model that was trained here, filled from the run. Save it as `README.md` beside the weights:
    `create_model_card(...).save(output_dir / "README.md")`, after a `trainer.push_to_hub`, which writes a card of its
    own there.

    Args:
        model (`PreTrainedModel`): the trained model; its family chooses the template in `hub_cards/`.
        model_id (`str`): its name on the Hub, `"user/name"`, as the code in the card loads it.
        dataset_type (`str`): the dataset's id on the Hub, or any short id for other data.
        dataset_name (`str`): the dataset in words, with its size.
        hyperparameters (`dict[str, Any]`): what the run was given, by name; of enums, such as those of
            `TrainingArguments`, the card shows the value.
        metrics (`dict[str, float]`): the measured metrics of this model on held-out data, by the name that `evaluate`
            gives them.
        baselines (`dict[str, dict[str, float]]`): the same metrics of what the model is compared with, by its name.
        steps (`int`): optimizer steps.
        hardware (`str`, *optional*): what it was trained on; by default this machine.
        limits (`str`, *optional*): what this checkpoint cannot do, beyond what the template says of its family.
        language (`str`, *optional*): language code of the data.
        license (`str`, defaults to `"apache-2.0"`): license of the weights.

    Returns:
        `huggingface_hub.ModelCard`

    Raises:
        `ValueError`: no metric, a metric without a baseline beside it, or a model that is not of this package.
    """
    if not metrics:
        raise ValueError("`metrics` is empty: a card reports what was measured.")
    for name, values in baselines.items():
        if set(values) != set(metrics):
            raise ValueError(
                f"The baseline {name!r} has the metrics {sorted(values)}, and the model {sorted(metrics)}: measure both "
                "the same way."
            )
    if not baselines:
        raise ValueError("`baselines` is empty: a metric says little without one to compare it with.")

    templates = importlib.resources.files("modeling_sumagg.hub_cards")
    model_type, architecture = model.config.model_type, type(model).__name__
    template = templates / f"{model_type}.md"
    if not template.is_file():
        raise ValueError(f"There is no card template for the model type {model_type!r}.")

    auto_class, pipeline_tag = next(head for ending, head in HEADS.items() if architecture.endswith(ending))
    family = model_type.partition("_")[0]
    card_data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=[model_type, "linear-attention", "custom_code", PUBLISHED_IN[family]],
        model_name=model_id.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type=pipeline_tag,
                dataset_type=dataset_type,
                dataset_name=dataset_name,
                metric_type=name,
                metric_value=value,
            )
            for name, value in metrics.items()
        ],
    )
    facts = {
        "model_id": model_id,
        "architecture": architecture,
        "auto_class": auto_class,
        "pipeline_tag": pipeline_tag,
        "num_parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": model.config,
        "dataset_name": dataset_name,
        "steps": steps,
        "hyperparameters": {name: getattr(value, "value", value) for name, value in hyperparameters.items()},
        "metrics": metrics,
        "baselines": baselines,
        "hardware": hardware or _hardware(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "state_size": decode_state_size(model),
        "limits": limits,
    }
    run = jinja2.Template((templates / "run.md").read_text(encoding="utf-8"), trim_blocks=True).render(**facts)
    return ModelCard.from_template(card_data, template_str=template.read_text(encoding="utf-8"), run=run, **facts)


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"


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
    script = Path(__file__).with_name("check_checkpoint.py")
    with tempfile.TemporaryDirectory() as modules:
        environment = {**os.environ, "HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-I", str(script), str(Path(folder).resolve())]
        process = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if process.returncode != 0:
        raise ValueError(process.stderr.strip().splitlines()[-1])
    for line in check_card(Path(folder) / "README.md"):
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m modeling_sumagg.hub", description=check_folder.__doc__)
    parser.add_argument("folder", help="the folder that `save_pretrained` wrote")
    try:
        check_folder(parser.parse_args().folder)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
