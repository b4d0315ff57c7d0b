"""
The model that a training script begins with: its arguments, its config, its tokenizer, and its adapters.

It needs what the example scripts need: `pip install 'modeling-sumagg[examples]'`.
"""

import contextlib
import difflib
import json
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GPT2Tokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ..configuration import TextConfig, preset_path


try:
    from peft import LoraConfig, PeftModel, get_peft_model
except ImportError as error:
    raise ImportError(f"The scripts need {error.name}: run `pip install 'modeling-sumagg[examples]'`.") from error


@dataclass
class ModelArguments:
    """The model to train: a checkpoint, a preset or a script's small one, whole or by adapters."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A checkpoint to start from: a folder or a Hub id."}
    )
    preset: str | None = field(
        default=None, metadata={"help": "A named architecture to train from scratch, such as sumagg-hybrid-small."}
    )
    config_overrides: str = field(
        default="{}",
        metadata={"help": 'Config values to replace, as JSON: \'{"hidden_size": 384, "num_hidden_layers": 8}\'.'},
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights, such as bfloat16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flex_attention, ..."})
    lora_rank: int = field(default=0, metadata={"help": "Train LoRA adapters of this rank; 0: the whole model."})
    lora_alpha: int = field(default=16, metadata={"help": "The update of a weight is scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers to adapt; by default those that mix tokens."}
    )

    def __post_init__(self):
        checkpoint = self.model_name_or_path
        if checkpoint is not None and self.preset is not None:
            raise ValueError("Give --model_name_or_path or --preset, not both.")
        # Before the Hub is asked for such a name.
        if checkpoint in TextConfig.preset_names and not Path(checkpoint).exists():  # type: ignore[arg-type]
            raise ValueError(f"{checkpoint} is a preset, an architecture without weights: give it as --preset.")
        if self.lora_rank < 0:
            raise ValueError(f"--lora_rank must be at least 0, got {self.lora_rank}.")
        if self.lora_rank and checkpoint is None:
            raise ValueError("--lora_rank adapts a trained model: name it with --model_name_or_path.")
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"--dtype must be a floating dtype of torch such as bfloat16, got {self.dtype!r}.")


@dataclass
class TextModelArguments(ModelArguments):
    """The same with the tokenizer."""

    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "A tokenizer: a folder or a Hub id. By default the checkpoint's, or one learned from the data."
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Tokens of a tokenizer learned from the data."})


def load_config(
    arguments: ModelArguments,
    defaults: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    **values,
) -> PreTrainedConfig:
    """
    The config of the checkpoint, of the preset, or of `defaults`, with `values` and then the overrides in it.

    Args:
        arguments (`ModelArguments`): names the checkpoint or the preset, and the overrides: a JSON object of fields,
            for a new model also a `model_type` of transformers.
        defaults (`dict[str, Any]`): `model_type` and other fields; a field that another family lacks is left out.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): gives a new model its vocabulary and its special tokens.

    Raises:
        `ValueError`: the overrides are not a JSON object, have a field that the config lacks (the message names the
            nearest that it has), or a value that it does not take.
        `OSError`: there is no such checkpoint.
    """
    checkpoint = arguments.model_name_or_path
    given = arguments.config_overrides[:200]
    try:
        overrides = json.loads(arguments.config_overrides)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--config_overrides {given!r} is not JSON: {error}.") from error
    if not isinstance(overrides, dict):
        raise ValueError(f'--config_overrides must be a JSON object such as {{"hidden_size": 64}}, got {given}.')
    if arguments.preset is not None:
        defaults, _ = PreTrainedConfig.get_config_dict(preset_path(arguments.preset))
    defaults = dict(defaults)
    if checkpoint is not None:
        config_class = type(AutoConfig.from_pretrained(checkpoint))
    else:
        model_type = defaults.pop("model_type")
        model_type = overrides.pop("model_type", model_type)
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise ValueError(f"There is no model type {model_type!r}.{_nearest(str(model_type), CONFIG_MAPPING)}")
        config_class = CONFIG_MAPPING[model_type]
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map, "num_labels"}
    for name in overrides:
        if name not in known:
            raise ValueError(f"{config_class.__name__} has no field {name!r}.{_nearest(name, known)}")
    with _overrides_at_fault(arguments):
        if checkpoint is not None:
            return AutoConfig.from_pretrained(checkpoint, **{**values, **overrides})
        named = {name: value for name, value in defaults.items() if name in known}
        if tokenizer is not None:
            named |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            named["vocab_size"] = len(tokenizer)
        return config_class(**{**named, **values, **overrides})


@contextlib.contextmanager
def _overrides_at_fault(arguments: ModelArguments) -> Iterator[None]:
    """An error of any type is a value of --config_overrides that the config does not take, where it is used."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    except (OSError, ValueError):
        raise
    except Exception as error:
        if arguments.config_overrides == "{}":
            raise
        raise ValueError(
            f"--config_overrides {arguments.config_overrides[:200]} make no model: {type(error).__name__}: {error}."
        ) from error


def _nearest(name: str, known: Any) -> str:
    matches = difflib.get_close_matches(name, sorted(known), n=1)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def load_tokenizer(arguments: TextModelArguments, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that the arguments name, or the checkpoint's, or a byte-level BPE learned from `texts`."""
    name = arguments.tokenizer_name or arguments.model_name_or_path
    if name is not None:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"The tokenizer of {name} has no end-of-text token (`eos_token`), which ends each text.")
        return tokenizer
    tokenizer = GPT2Tokenizer(pad_token="<|endoftext|>", padding_side="left")
    return tokenizer.train_new_from_iterator(texts, arguments.vocab_size)


def load_model(auto_class: Any, arguments: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """The checkpoint's weights in a model of `auto_class`, with a new head for other classes, or a new model."""
    options = {"dtype": arguments.dtype, "attn_implementation": arguments.attn_implementation}
    with _overrides_at_fault(arguments):
        if arguments.model_name_or_path is None:
            return auto_class.from_config(config, **options)
        return auto_class.from_pretrained(
            arguments.model_name_or_path, config=config, ignore_mismatched_sizes=True, **options
        )


def add_adapters(model: PreTrainedModel, arguments: ModelArguments, **options) -> PeftModel:
    """The model with LoRA adapters of the arguments, and with `options` of a script for `LoraConfig`."""
    config = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        **{"target_modules": arguments.target_modules, **options},
    )
    # Warnings of PEFT, now and when it saves: a name of transformers' that it still uses, that adapted embeddings are
    # saved, as they should be, and tied ones in a model that ties none.
    for message in (".*gradient_checkpointing", "Setting `save_embedding_layers`", "Model with `tie_word_embeddings"):
        warnings.filterwarnings("ignore", message)
    adapted = get_peft_model(model, config)
    trained, total = adapted.get_nb_trainable_parameters()
    print(f"LoRA trains {trained:,} of {total:,} parameters.")
    return adapted


def model_max_length(config: PreTrainedConfig) -> int:
    """What a tokenizer calls so: the most tokens that the model takes, or the number that stands for no limit."""
    endless = getattr(config, "position_embedding_type", None) in ("sinusoidal", "none")
    if endless and not getattr(config, "use_membership_bias", False):
        return VERY_LARGE_INTEGER
    return getattr(config, "max_position_embeddings", VERY_LARGE_INTEGER)
