"""Enter a family in the tables by which other libraries know it. A checkpoint carries this with its code.

Several copies of a family, one installed and others that came with checkpoints, may register in one process.
"""

import functools
import sys
from collections.abc import Sequence

import transformers
from transformers import PreTrainedConfig, PreTrainedModel


def register_class_names(model_type: str, models: dict[str, type[PreTrainedModel]]) -> None:
    """
    Make the task of each class known by its name: to pipelines, and to `Trainer`, which shifts smoothed labels for
    language models. The Auto classes know classes by their config, and do not tell.

    Args:
        model_type (`str`): the name of the family.
        models (`dict[str, type[PreTrainedModel]]`): the model of each Auto class, by the name of the latter.
    """
    for auto_name, model_class in models.items():
        names = getattr(transformers, auto_name)._model_mapping._model_mapping
        names.setdefault(model_type, model_class.__name__)
        if model_class.__name__ not in names.values():
            # Another copy has another class for this task.
            names[model_class.__name__] = model_class.__name__


def register_lora_target_modules(config_class: type[PreTrainedConfig], target_modules: Sequence[str]) -> None:
    """
    Tell PEFT which layers `LoraConfig()` adapts where it names no `target_modules`.

    Args:
        config_class (`type[PreTrainedConfig]`): the config of the family.
        target_modules (`Sequence[str]`): the modules whose names end in one of these.
    """
    to_dict = config_class.to_dict

    # PEFT reads the model type from here and looks it up next. It may be imported long after this, or never.
    @functools.wraps(to_dict)
    def to_dict_known_to_peft(self) -> dict:
        constants = sys.modules.get("peft.utils.constants")
        if constants is not None:
            defaults = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            defaults[config_class.model_type] = list(target_modules)
        return to_dict(self)

    config_class.to_dict = to_dict_known_to_peft
