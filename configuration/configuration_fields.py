"""What the configs of all models refuse that transformers lets through."""

import difflib
import os
import sys
from typing import Any, ClassVar

from transformers import PreTrainedConfig


class NamedFields:
    """
    Before [`~transformers.PreTrainedConfig`], which keeps or drops an argument that it does not know: one that is almost
    the name of a field raises a `ValueError`, if it is not out of a file, and so does the name of a preset as a checkpoint.
    """

    # Of the package; a checkpoint has none.
    preset_names: ClassVar[tuple[str, ...]] = ()
    # The modules that `LoraConfig()` adapts. Registering a family sets it.
    lora_target_modules: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self, **kwargs):
        # What was saved, by whatever version, names its type.
        if "model_type" not in kwargs:
            self._refuse_slips(kwargs)
        super().__post_init__(**kwargs)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        cls._refuse_slips(kwargs)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        name = str(pretrained_model_name_or_path)
        # Before the Hub is asked for such a name, again and again.
        if name in cls.preset_names and not os.path.exists(name):
            raise ValueError(
                f"{name!r} is a preset, an architecture without weights, and no checkpoint: make a new model of "
                f"`AutoConfig.from_pretrained(preset_path({name!r}))` by `from_config` of an Auto class, with "
                f"`preset_path` of `modeling_sumagg.configuration`. The presets are {list(cls.preset_names)}."
            )
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        # PEFT asks a config for its model type as a dict, and looks up next which modules it adapts.
        constants = sys.modules.get("peft.utils.constants")
        if self.lora_target_modules and constants is not None:
            targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            targets[self.model_type] = list(self.lora_target_modules)  # type: ignore[attr-defined]
        return super().to_dict()  # type: ignore[misc]

    @classmethod
    def _refuse_slips(cls, names) -> None:
        if "preset" in names:
            raise ValueError(
                f"{cls.__name__} has no field 'preset': `AutoConfig.from_pretrained(preset_path(name))` is its config, with "
                "`preset_path` of `modeling_sumagg.configuration`."
            )
        own = cls.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__
        for name in [name for name in names if not hasattr(cls, name)]:
            # One wrong letter, or two in a long name. `pad_token`, which a tokenizer is given, is less like `pad_token_id`.
            nearest = difflib.get_close_matches(name, own, n=1, cutoff=0.88)
            if nearest:
                raise ValueError(f"{cls.__name__} has no field {name!r}. Did you mean {nearest[0]!r}?")
