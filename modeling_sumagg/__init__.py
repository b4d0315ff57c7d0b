"""Linear-time sequence aggregators as native transformers models; importing registers them with the auto classes."""

from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification, BitImageProcessorPil

# transformers 5.17 takes the top-level name away where torchvision is missing, though it needs none.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_vision_available

from .configuration.configuration_tost import ToSTConfig
from .modeling_tost import ToSTBackbone, ToSTForImageClassification, ToSTModel

AutoConfig.register("tost", ToSTConfig, exist_ok=True)
AutoModel.register(ToSTConfig, ToSTModel, exist_ok=True)
AutoModelForImageClassification.register(ToSTConfig, ToSTForImageClassification, exist_ok=True)
AutoBackbone.register(ToSTConfig, ToSTBackbone, exist_ok=True)
if is_vision_available():
    AutoImageProcessor.register(ToSTConfig, image_processor_classes={"pil": BitImageProcessorPil}, exist_ok=True)


__all__ = ["ToSTBackbone", "ToSTConfig", "ToSTForImageClassification", "ToSTModel"]
