"""The config classes, and the named architectures (presets) as data."""

from pathlib import Path

from .configuration_fields import NamedFields
from .configuration_sumagg import SumAggConfig
from .configuration_sumagg_multimodal import SumAggMultimodalConfig
from .configuration_sumagg_speech import SumAggSpeechConfig
from .configuration_text import TextConfig
from .configuration_tost import ToSTConfig
from .configuration_tost_text import ToSTTextConfig


_PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.json"))}
NamedFields.preset_names = tuple(_PRESETS)


def preset_path(name: str) -> str:
    """
    The JSON file of a named architecture, for `AutoConfig.from_pretrained`.

    Args:
        name (`str`): the name of a file in `configuration/presets`, without its extension.

    Raises:
        `ValueError`: there is no such preset; the message lists them.
    """
    if name not in _PRESETS:
        raise ValueError(f"There is no preset {name!r}. The presets are {list(_PRESETS)}.")
    return str(_PRESETS[name])


__all__ = [
    "SumAggConfig",
    "SumAggMultimodalConfig",
    "SumAggSpeechConfig",
    "TextConfig",
    "ToSTConfig",
    "ToSTTextConfig",
    "preset_path",
]
