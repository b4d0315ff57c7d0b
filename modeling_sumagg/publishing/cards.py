"""Model cards, rendered from the facts of a run."""

import importlib.resources
import json
import math
import os
import platform
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ..common.whole_files import write_whole
from ..models.families import FAMILIES
from .files import printable, refuse_foreign_readme
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
# Entities, so that no name can end a cell, begin a link or be HTML.
MARKDOWN = str.maketrans({character: f"&#{ord(character)};" for character in "&<>|[]*`~\\"})
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
    The bytes that decoding one sequence keeps, counted in the cache after prompts of two lengths.

    Returns:
        `tuple[int, int]` or `None`: the bytes that do not depend on the length (the states of recurrent layers, and the keys
        and values of full windows), and the bytes that each token adds (the keys and values of full attention); `None` for
        a model that neither generates nor listens to a stream.
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

    # Every window is full after so many tokens.
    length = (getattr(config, "sliding_window", None) or 1) + getattr(config, "attention_sinks", 0)
    per_token = held(length + 1) - held(length)
    return held(length) - length * per_token, per_token


class Markdown(str):
    """Text that stands in a card as it is; all other text is escaped."""


def create_model_card(
    model: torch.nn.Module,
    *,
    model_id: str,
    dataset_name: str,
    metrics: dict[str, Any],
    baselines: dict[str, dict[str, Any]],
    evaluated_on: str | None = None,
    num_examples: int | None = None,
    dataset_type: str = "other",
    hyperparameters: dict[str, Any] | None = None,
    steps: int | None = None,
    units: dict[str, str] | None = None,
    base_model: str | None = None,
    prompt: str | None = None,
    sample: str | None = None,
    numeric_features: list[str] | None = None,
    hardware: str | None = None,
    limits: str | None = None,
    language: str | None = None,
    license: str = "apache-2.0",
) -> ModelCard:
    """
    The card of a trained model, or of an adapter, from the facts of its run. [`save_model_card`] also writes it beside the
    weights and checks them.

    Names and values are escaped: they can neither break a table nor add Markdown, HTML or code.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the trained model; its family chooses the template in `hub_cards/`.
        model_id (`str`): its name on the Hub, `"user/name"`, as the code in the card loads it.
        dataset_name (`str`): the data that it was trained on, in words, with its size.
        metrics (`dict[str, float]`): the measured metrics of this model on held-out data, by the name that `evaluate`
            gives them; Python's, NumPy's or torch's numbers.
        baselines (`dict[str, dict[str, float]]`): the same metrics of the models that it is compared with, by their names.
        evaluated_on (`str`, *optional*): the data of the metrics, in words.
        num_examples (`int`, *optional*): the number of examples in it.
        dataset_type (`str`, defaults to `"other"`): the id of that data on the Hub, or any short id.
        hyperparameters (`dict[str, Any]`, *optional*): the values that the run was given, by name. Of enums, such as those
            of `TrainingArguments`, the card shows the value.
        steps (`int`, *optional*): optimizer steps.
        units (`dict[str, str]`, *optional*): the unit of each metric, beyond those of `UNITS`.
        base_model (`str`, *optional*): the checkpoint that the training began with; of an adapter its base. The card names
            a local folder without the folders above it.
        prompt (`str`, *optional*): a text for the code in the card of a language model.
        sample (`str`, *optional*): a text that the model wrote.
        numeric_features (`list[str]`, *optional*): the names of the numbers that a multimodal model takes, in their order.
        hardware (`str`, *optional*): the machine of the training; by default that of the model's device.
        limits (`str`, *optional*): Markdown on the limits of this checkpoint, beyond those of its family.
        language (`str`, *optional*): language code of the data.
        license (`str`, defaults to `"apache-2.0"`): license of the weights.

    Returns:
        `huggingface_hub.ModelCard`

    Raises:
        `ValueError`: no metric, one that is not a finite number, or one without a baseline beside it; a unit of a metric
            that is not there; a name that UTF-8 cannot write; a model that is of no registered family; or an adapter whose
            base model has no name.
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
    metrics = {name: _measured(name, value) for name, value in metrics.items()}
    baselines = {of: {name: _measured(name, value) for name, value in each.items()} for of, each in baselines.items()}

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
    if adapter is not None:
        base_model = base_model or adapter.base_model_name_or_path
        if not base_model:
            raise ValueError("The adapter names no base model: load the model that it adapts by `from_pretrained`.")
    is_local = base_model is not None and Path(base_model).exists()
    if is_local:
        base_model = Path(base_model).resolve().name  # type: ignore[arg-type]

    pipeline_tag = family.pipeline_tag or PIPELINE_TAGS[auto_class]
    card_data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers" if adapter is None else "peft",
        base_model=base_model,
        base_model_relation=None if base_model is None else "finetune" if adapter is None else "adapter",
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
                dataset_name=evaluated_on or dataset_name,
                metric_type=name,
                metric_value=float(f"{value:.6g}"),
            )
            for name, value in metrics.items()
        ],
    )
    layer_types = Counter(getattr(base.config, "layer_types", None) or ())
    facts = {
        "model_id": model_id,
        "architecture": architecture,
        "auto_class": auto_class,
        "pipeline_tag": pipeline_tag,
        "base_model": base_model,
        "base_is_local": is_local,
        "adapter": adapter,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "dtype": str(base.dtype).removeprefix("torch."),
        "config": base.config,
        "layers": Markdown(", ".join(f"{count} of the type {_code(kind)}" for kind, count in layer_types.items())),
        "context_length": context_length(base.config) if hasattr(base.config, "vocab_size") else None,
        "dataset_name": dataset_name,
        "evaluated_on": evaluated_on,
        "num_examples": num_examples,
        "steps": steps,
        "hyperparameters": {name: getattr(value, "value", value) for name, value in (hyperparameters or {}).items()},
        "metrics": metrics,
        "units": {name: (UNITS | units).get(name) for name in metrics},
        "baselines": baselines,
        "prompt": prompt,
        # A line of tildes would end the block of the sample.
        "sample": Markdown(textwrap.indent(sample, "    ") if sample and "~~~" in sample else sample or ""),
        "features_in_words": Markdown(printable(", ".join(numeric_features or ["those of the training data"]))),
        "typical_features": Markdown(
            [float(f"{mean:.4g}") for mean in getattr(base.config, "numeric_mean", None) or ()]
            or [0.0] * getattr(base.config, "num_numeric_features", 0)
        ),
        "hardware": hardware or hardware_of(model),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "state_size": decode_state_size(base),
        "limits": Markdown(limits or ""),
        "citation": Markdown(family.paper.citation if family.paper is not None else ""),
    }
    templates = importlib.resources.files("modeling_sumagg.hub_cards")
    template = templates / f"{model_type}.md"
    if not template.is_file():
        template = templates / "family.md"
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, finalize=_escaped, keep_trailing_newline=True
    )
    environment.filters |= {"python": _python_string, "code": _code, "number": _number}
    run = environment.from_string((templates / "run.md").read_text(encoding="utf-8")).render(**facts)
    text = environment.from_string(template.read_text(encoding="utf-8")).render(
        card_data=Markdown(card_data.to_yaml()), run=Markdown(run), **facts
    )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"A card is UTF-8, which cannot write {ascii(error.object[error.start])}: rename it."
        ) from error
    return ModelCard(text)


def save_model_card(
    model: torch.nn.Module, folder: str | os.PathLike, *, model_id: str | None = None, check: bool = True, **facts
) -> ModelCard:
    """
    Write the card of a trained model, or of an adapter, as `README.md` into the folder that it was saved to, and check
    that the folder loads and runs where this package is not installed, as `python -m modeling_sumagg check FOLDER` does.

    `Trainer.push_to_hub` and PEFT's `save_pretrained` write cards of their own: call this after them.

    Args:
        model (`PreTrainedModel` or `PeftModel`): the trained model.
        folder (`str` or `os.PathLike`): where `save_pretrained` put it.
        model_id (`str`, *optional*): its name on the Hub, `"user/name"`; by default the name of the folder.
        check (`bool`, defaults to `True`): whether to load and run the folder in a clean process.
        facts: the other arguments of [`create_model_card`], of which `dataset_name`, `metrics` and `baselines` are needed.

    Returns:
        `huggingface_hub.ModelCard`

    Raises:
        `ValueError`: `folder` holds no model, or a `README.md` that is no model card, or a fact is one that
            [`create_model_card`] refuses (nothing is written then); or the check failed. The message is the reason.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ValueError(f"{folder} holds no model: save it there first.")
    refuse_foreign_readme(folder)
    card = create_model_card(model, model_id=model_id or folder.resolve().name, **facts)
    write_whole(folder / "README.md", str(card).encode())
    if check:
        check_folder(folder)
    return card


def hardware_of(model: torch.nn.Module) -> str:
    """The device that the parameters of a model are on."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{platform.machine()}, {device.type}"
    return f"{platform.machine()} CPU, threads: {torch.get_num_threads()}"


def _measured(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (RuntimeError, TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"A metric must be a finite number, got {str(value)[:40]} for {name!r}.")
    return number


def _escaped(value: Any) -> str:
    return value if isinstance(value, Markdown) else printable(value).translate(MARKDOWN)


def _python_string(value: Any) -> str:
    """A literal for the code in a card."""
    return Markdown(json.dumps(str(value), ensure_ascii=not str(value).isprintable()))


def _code(value: Any) -> str:
    """A code span, in which entities would show as they are."""
    return Markdown(f"`{printable(value).replace('`', chr(39)).replace('|', '/')}`")


def _number(value: float) -> str:
    """Four digits, and no power of ten for large numbers."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
