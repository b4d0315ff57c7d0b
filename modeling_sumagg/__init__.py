"""Linear-time sequence aggregators as native transformers models; importing registers them with the Auto classes."""

import importlib
import sys


__version__ = "0.2.0"

# `python -m modeling_sumagg` begins with this file, and imports the models when a command needs them.
if not (sys.argv[0] == "-m" and sys.orig_argv[-len(sys.argv)] == __name__):
    from .configuration import SumAggConfig, SumAggMultimodalConfig, SumAggSpeechConfig, ToSTConfig, ToSTTextConfig
    from .models.families import FAMILIES, Family
    from .models.modeling_sumagg import (
        SumAggForCausalLM,
        SumAggForMaskedLM,
        SumAggForSequenceClassification,
        SumAggForTokenClassification,
        SumAggModel,
    )
    from .models.modeling_sumagg_multimodal import SumAggForMultimodalRegression
    from .models.modeling_sumagg_speech import SumAggForAudioClassification, SumAggForCTC, SumAggSpeechModel
    from .models.modeling_tost import ToSTBackbone, ToSTForImageClassification, ToSTModel
    from .models.modeling_tost_text import (
        ToSTForCausalLM,
        ToSTTextForSequenceClassification,
        ToSTTextForTokenClassification,
        ToSTTextModel,
    )
    from .publishing import moved_modules
    from .publishing.remote_code import register_family
    from .training.data_collator import DataCollatorForCTC, DataCollatorForMultimodalRegression

    for _family in list(FAMILIES.values()):
        register_family(**vars(_family))

    def __getattr__(name: str):
        """The modules that were attributes of the package in 0.2."""
        if name not in moved_modules.MOVED:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")


__all__ = [
    "FAMILIES",
    "DataCollatorForCTC",
    "DataCollatorForMultimodalRegression",
    "Family",
    "SumAggConfig",
    "SumAggForAudioClassification",
    "SumAggForCTC",
    "SumAggForCausalLM",
    "SumAggForMaskedLM",
    "SumAggForMultimodalRegression",
    "SumAggForSequenceClassification",
    "SumAggForTokenClassification",
    "SumAggModel",
    "SumAggMultimodalConfig",
    "SumAggSpeechConfig",
    "SumAggSpeechModel",
    "ToSTBackbone",
    "ToSTConfig",
    "ToSTForCausalLM",
    "ToSTForImageClassification",
    "ToSTModel",
    "ToSTTextConfig",
    "ToSTTextForSequenceClassification",
    "ToSTTextForTokenClassification",
    "ToSTTextModel",
    "register_family",
]
