"""Linear-time sequence aggregators as native transformers models; importing registers them with the auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessorPil,
)

from .configuration.configuration_tost import ToSTConfig
from .modeling_tost import ToSTBackbone, ToSTForImageClassification, ToSTModel


AutoConfig.register("tost", ToSTConfig, exist_ok=True)
AutoModel.register(ToSTConfig, ToSTModel, exist_ok=True)
AutoModelForImageClassification.register(ToSTConfig, ToSTForImageClassification, exist_ok=True)
AutoBackbone.register(ToSTConfig, ToSTBackbone, exist_ok=True)
AutoImageProcessor.register(ToSTConfig, image_processor_classes={"pil": BitImageProcessorPil}, exist_ok=True)

__all__ = ["ToSTBackbone", "ToSTConfig", "ToSTForImageClassification", "ToSTModel"]
