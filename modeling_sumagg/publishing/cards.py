"""Model cards of what was trained."""

import importlib.resources
import os
import platform
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ..families import FAMILIES
from .folder_checks import check_folder


PIPELINE_TAGS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoBackbone": "image-feature-extraction",
    "AutoModel": "feature-extraction",
}
# Of the metrics that `units` need not name.
UNITS = {
    "accuracy": "fraction",
    "f1": "fraction",
    "loss": "nats",
    "perplexity": "per token",
    "r2": "1 is perfect, 0 the mean",
}


def context_length(config: PreTrainedConfig) -> int | None:
    """The most tokens that a text model takes; `None`: there is no limit."""
    ends = getattr(config, "position_embedding_type", "learned") == "learned"
    return config.max_position_embeddings if ends or getattr(config, "use_membership_bias", False) else None


def decode_state_size(model: PreTrainedModel) -> tuple[int, int] | None:
    """
    The bytes that decoding one sequence keeps, counted in the cache after a short and after a longer prompt.

    Returns:
        `tuple[int, int]` or `None`: the bytes that do not depend on the length (the states of the recurrent layers), and
        those that each token adds (the keys and values of the attention layers, up to a sliding window); `None` for a
        model that neither generates nor listens to a stream.
    """
    config, streams = model.config, getattr(model, "can_stream", False)
    if not streams and not model.can_generate():
        return None

    def held(length: int) -> int:
        if streams:
            inputs = torch.zeros(1, length * config.subsampling_factor, config.num_mel_bins, device=model.device)
        else:
            inputs = torch.zeros(1, length, dtype=torch.long, device=model.device)
        with torch.no_grad():
            outputs = model(inputs, use_cache=True)
        (cache,) = (value for value in outputs.values() if isinstance(value, Cache))
        tensors = (
            [*(layer.state if hasattr(layer, "state") else (layer.keys, layer.values))] for layer in cache.layers
        )
        return sum(tensor.numel() * tensor.element_size() for layer in tensors for tensor in layer)

    per_token = held(2) - held(1)
    return held(1) - per_token, per_token


def create_model_card(
    model: torch.nn.Module,
    *,
    model_id: str,
    dataset_type: str,
    dataset_name: str,
    hyperparameters: dict[str, Any],
    metrics: dict[str, float],
    baselines: dict[str, dict[str, float]],
    steps: int,
    units: dict[str, str] | None = None,
    sample: str | None = None,
    hardware: str | None = None,
    limits: str | None = None,
    language: str | None = None,
    license: str = "apache-2.0",
) -> ModelCard:
    """
    The card of a model that was trained here, filled from the run, or of an adapter. [`save_model_card`] also writes it
    beside the weights and checks them.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the trained model; its family chooses the template in `hub_cards/`.
        model_id (`str`): its name on the Hub, `"user/name"`, as the code in the card loads it.
        dataset_type (`str`): the dataset's id on the Hub, or any short id for other data.
        dataset_name (`str`): the dataset in words, with its size.
        hyperparameters (`dict[str, Any]`): what the run was given, by name; of enums, such as those of
            `TrainingArguments`, the card shows the value.
        metrics (`dict[str, float]`): the measured metrics of this model on held-out data, by the name that `evaluate`
            gives them.
        baselines (`dict[str, dict[str, float]]`): the same metrics of what the model is compared with, by its name.
        steps (`int`): optimizer steps.
        units (`dict[str, str]`, *optional*): the unit of each metric, beyond those of `UNITS`.
        sample (`str`, *optional*): a sample of what the model makes.
        hardware (`str`, *optional*): what it was trained on; by default this machine.
        limits (`str`, *optional*): what this checkpoint cannot do, beyond what the template says of its family.
        language (`str`, *optional*): language code of the data.
        license (`str`, defaults to `"apache-2.0"`): license of the weights.

    Returns:
        `huggingface_hub.ModelCard`

    Raises:
        `ValueError`: no metric, a metric without a baseline beside it, a unit of a metric that is not there, a model that
            is of no registered family, or an adapter whose base model has no name.
    """
    units = units or {}
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
    if not set(units) <= set(metrics):
        raise ValueError(f"`units` names {sorted(set(units) - set(metrics))}, and the metrics are {sorted(metrics)}.")

    adapter = model.active_peft_config if hasattr(model, "active_peft_config") else None
    base = model if adapter is None else model.get_base_model()
    model_type, architecture = base.config.model_type, type(base).__name__
    family = FAMILIES.get(model_type)
    auto_class = next(
        (name for name, cls in (family.models if family else {}).items() if cls.__name__ == architecture), None
    )
    if family is None or auto_class is None:
        raise ValueError(
            f"{architecture} is a class of none of the registered families, which are {', '.join(sorted(FAMILIES))}: see "
            "`modeling_sumagg.register_family`."
        )
    base_model = None if adapter is None else adapter.base_model_name_or_path
    if adapter is not None and not base_model:
        raise ValueError("The adapter names no base model: load the model that it adapts by `from_pretrained`.")

    pipeline_tag = family.pipeline_tag or PIPELINE_TAGS[auto_class]
    card_data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers" if adapter is None else "peft",
        base_model=base_model,
        base_model_relation=None if adapter is None else "adapter",
        pipeline_tag=pipeline_tag,
        tags=[
            model_type,
            "linear-attention",
            *(["custom_code"] if adapter is None else [adapter.peft_type.value.lower()]),
            *([family.paper.tag] if family.paper is not None else []),
        ],
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
        "base_model": base_model,
        "adapter": adapter,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "dtype": str(base.dtype).removeprefix("torch."),
        "config": base.config,
        "context_length": context_length(base.config) if hasattr(base.config, "vocab_size") else None,
        "dataset_name": dataset_name,
        "steps": steps,
        "hyperparameters": {name: getattr(value, "value", value) for name, value in hyperparameters.items()},
        "metrics": metrics,
        "units": {name: (UNITS | units).get(name) for name in metrics},
        "baselines": baselines,
        "sample": sample,
        "hardware": hardware or _hardware(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "state_size": decode_state_size(base),
        "limits": limits,
        "citation": family.paper.citation if family.paper is not None else None,
    }
    templates = importlib.resources.files("modeling_sumagg.hub_cards")
    template = templates / f"{model_type}.md"
    if not template.is_file():
        template = templates / "family.md"
    run = jinja2.Template((templates / "run.md").read_text(encoding="utf-8"), trim_blocks=True).render(**facts)
    return ModelCard.from_template(card_data, template_str=template.read_text(encoding="utf-8"), run=run, **facts)


def save_model_card(
    model: torch.nn.Module,
    folder: str | os.PathLike,
    *,
    dataset_name: str,
    metrics: dict[str, float],
    baselines: dict[str, dict[str, float]],
    hyperparameters: dict[str, Any],
    steps: int,
    model_id: str | None = None,
    dataset_type: str = "other",
    units: dict[str, str] | None = None,
    sample: str | None = None,
    hardware: str | None = None,
    limits: str | None = None,
    language: str | None = None,
    license: str = "apache-2.0",
    check: bool = True,
) -> ModelCard:
    """
    Write the card of a trained model, or of an adapter, as `README.md` into the folder that it was saved to, and check
    that the folder loads and runs where this package is not installed, as `python -m modeling_sumagg.hub FOLDER` does.

    `Trainer.push_to_hub` and PEFT's `save_pretrained` write cards of their own: call this after them.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the trained model.
        folder (`str` or `os.PathLike`): where `save_pretrained` put it.
        model_id (`str`, *optional*): its name on the Hub, `"user/name"`; by default the name of the folder.
        check (`bool`, defaults to `True`): whether to load and run the folder in a clean process.

    The other arguments, and the errors that are raised before anything is written, are those of [`create_model_card`].

    Returns:
        `huggingface_hub.ModelCard`

    Raises:
        `ValueError`: `folder` holds no model, or the check failed; the message is the reason.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder} holds no model: save it there first.")
    card = create_model_card(
        model,
        model_id=model_id or folder.resolve().name,
        dataset_type=dataset_type,
        dataset_name=dataset_name,
        hyperparameters=hyperparameters,
        metrics=metrics,
        baselines=baselines,
        steps=steps,
        units=units,
        sample=sample,
        hardware=hardware,
        limits=limits,
        language=language,
        license=license,
    )
    card.save(folder / "README.md")
    if check:
        check_folder(folder)
    return card


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"
