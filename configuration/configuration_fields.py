"""Checks that all configs add to those of transformers."""

import difflib
import math
import sys
from typing import Any, ClassVar

from transformers import PreTrainedConfig


class NamedFields:
    """
    A mixin before [`~transformers.PreTrainedConfig`], which keeps or drops unknown arguments. This one raises a `ValueError`
    for an argument that is almost the name of a field (unless it was read from a file), for the name of a preset that is
    given as a checkpoint, and for NaN or infinity in any field.
    """

    # Set by the package. The code in a checkpoint has no presets.
    preset_names: ClassVar[tuple[str, ...]] = ()
    # The modules that `LoraConfig()` adapts, set when a family is registered.
    lora_target_modules: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self, **kwargs):
        # A saved config names its `model_type`. It may hold fields of other versions.
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
        if name not in cls.preset_names:
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        try:
            # A folder may have the name. The Hub is not asked for it, again and again.
            kwargs["local_files_only"] = True
            return super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        except OSError as error:
            raise ValueError(
                f"{name!r} is a preset, an architecture without weights, and no checkpoint. Create a new model by "
                f"`from_config` of an Auto class with `AutoConfig.from_pretrained(preset_path({name!r}))`, where "
                f"`preset_path` is in `modeling_sumagg.configuration`. The presets are {list(cls.preset_names)}."
            ) from error

    def to_dict(self) -> dict[str, Any]:
        # PEFT converts a config to a dict for its `model_type`, and then looks up the modules to adapt.
        constants = sys.modules.get("peft.utils.constants")
        if self.lora_target_modules and constants is not None:
            targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
            targets[self.model_type] = list(self.lora_target_modules)  # type: ignore[attr-defined]
        return super().to_dict()  # type: ignore[misc]

    def validate_all_numbers(self):
        """Part of `@strict`-powered validation, first because of its name: no field holds NaN or infinity."""
        for name in self.__dataclass_fields__:
            value = getattr(self, name, None)
            if not _is_finite(value):
                raise ValueError(f"`{name}` must be finite, got {value}.")

    @classmethod
    def _refuse_slips(cls, names) -> None:
        if "preset" in names:
            raise ValueError(
                f"{cls.__name__} has no field 'preset': `AutoConfig.from_pretrained(preset_path(name))` is its config, with "
                "`preset_path` of `modeling_sumagg.configuration`."
            )
        own = cls.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__
        for name in [name for name in names if not hasattr(cls, name)]:
            # One wrong letter, or two in a long name. The tokenizer's `pad_token` is less similar to `pad_token_id`.
            nearest = difflib.get_close_matches(name, own, n=1, cutoff=0.88)
            if nearest:
                raise ValueError(f"{cls.__name__} has no field {name!r}. Did you mean {nearest[0]!r}?")


def _is_finite(value: Any) -> bool:
    """Whether every number in a value is finite as a float."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    try:
        return not isinstance(value, int | float) or math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False
