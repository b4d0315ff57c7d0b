"""Model cards of what was trained."""

import importlib.resources
import platform
from typing import Any

import jinja2
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import DynamicCache, PreTrainedModel

from ..families import FAMILIES


PIPELINE_TAGS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoBackbone": "image-feature-extraction",
    "AutoModel": "feature-extraction",
}


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

    family = FAMILIES[model_type]
    auto_class = next(name for name, cls in family.models.items() if cls.__name__ == architecture)
    pipeline_tag = family.pipeline_tag or PIPELINE_TAGS[auto_class]
    card_data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=[model_type, "linear-attention", "custom_code", family.paper.tag],
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
