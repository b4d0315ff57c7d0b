"""Linear-time sequence aggregators as native transformers models; importing registers them with the Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitImageProcessorPil,
)

# transformers 5.17 takes the top-level name away where torchvision is missing, though it needs none.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_vision_available

from .configuration import SumAggConfig, ToSTConfig
from .modeling_sumagg import (
    SumAggForCausalLM,
    SumAggForMaskedLM,
    SumAggForSequenceClassification,
    SumAggForTokenClassification,
    SumAggModel,
)
from .modeling_tost import ToSTBackbone, ToSTForImageClassification, ToSTModel


__version__ = "0.1.0"

AutoConfig.register("sumagg", SumAggConfig, exist_ok=True)
AutoModel.register(SumAggConfig, SumAggModel, exist_ok=True)
AutoModelForCausalLM.register(SumAggConfig, SumAggForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(SumAggConfig, SumAggForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(SumAggConfig, SumAggForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(SumAggConfig, SumAggForTokenClassification, exist_ok=True)

AutoConfig.register("tost", ToSTConfig, exist_ok=True)
AutoModel.register(ToSTConfig, ToSTModel, exist_ok=True)
AutoModelForImageClassification.register(ToSTConfig, ToSTForImageClassification, exist_ok=True)
AutoBackbone.register(ToSTConfig, ToSTBackbone, exist_ok=True)
if is_vision_available():
    AutoImageProcessor.register(ToSTConfig, image_processor_classes={"pil": BitImageProcessorPil}, exist_ok=True)


__all__ = [
    "SumAggConfig",
    "SumAggForCausalLM",
    "SumAggForMaskedLM",
    "SumAggForSequenceClassification",
    "SumAggForTokenClassification",
    "SumAggModel",
    "ToSTBackbone",
    "ToSTConfig",
    "ToSTForImageClassification",
    "ToSTModel",
]
