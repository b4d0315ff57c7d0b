"""Enter a family in the tables by which other libraries know it. A checkpoint carries this with its code."""

import functools
import sys
from collections.abc import Sequence

import transformers
from transformers import PreTrainedConfig, PreTrainedModel


def register(
    config_class: type[PreTrainedConfig],
    models: dict[str, type[PreTrainedModel]],
    *,
    lora_target_modules: Sequence[str] = (),
) -> None:
    """
    Make known by name what the Auto classes, which know classes by their config, do not tell: the task of each class to
    pipelines and to `Trainer`, which shifts smoothed labels for language models, and PEFT's default layers for LoRA.

    Several copies of a family, one installed and others that came with checkpoints, may register in one process.

    Args:
        config_class (`type[PreTrainedConfig]`): the config of the family.
        models (`dict[str, type[PreTrainedModel]]`): the model of each Auto class, by the name of the latter.
        lora_target_modules (`Sequence[str]`, *optional*): the modules that `LoraConfig()` adapts.
    """
    for auto_name, model_class in models.items():
        names = getattr(transformers, auto_name)._model_mapping._model_mapping
        names.setdefault(config_class.model_type, model_class.__name__)
        if model_class.__name__ not in names.values():
            # Another copy has another class for this task.
            names[model_class.__name__] = model_class.__name__
    if not lora_target_modules:
        return
    to_dict = config_class.to_dict

    # PEFT reads the model type from here and looks it up next; it may be imported long after this, or never.
    @functools.wraps(to_dict)
    def to_dict_known_to_peft(self) -> dict:
        constants = sys.modules.get("peft.utils.constants")
        if constants is not None:
            defaults = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            defaults[config_class.model_type] = list(lora_target_modules)
        return to_dict(self)

    config_class.to_dict = to_dict_known_to_peft
