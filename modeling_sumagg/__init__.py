"""Linear-time sequence aggregators as native transformers models; importing registers them with the Auto classes."""

from transformers import (
    AutoBackbone,
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

from .configuration import SumAggConfig, SumAggMultimodalConfig, ToSTConfig, ToSTTextConfig
from .data_collator import DataCollatorForMultimodalRegression
from .modeling_sumagg import (
    SumAggForCausalLM,
    SumAggForMaskedLM,
    SumAggForSequenceClassification,
    SumAggForTokenClassification,
    SumAggModel,
)
from .modeling_sumagg_multimodal import SumAggForMultimodalRegression
from .modeling_tost import ToSTBackbone, ToSTForImageClassification, ToSTModel
from .modeling_tost_text import (
    ToSTForCausalLM,
    ToSTTextForSequenceClassification,
    ToSTTextForTokenClassification,
    ToSTTextModel,
)
from .remote_code import register_family


__version__ = "0.1.0"

register_family(
    SumAggConfig,
    {
        AutoModel: SumAggModel,
        AutoModelForCausalLM: SumAggForCausalLM,
        AutoModelForMaskedLM: SumAggForMaskedLM,
        AutoModelForSequenceClassification: SumAggForSequenceClassification,
        AutoModelForTokenClassification: SumAggForTokenClassification,
    },
)
register_family(SumAggMultimodalConfig, {AutoModelForSequenceClassification: SumAggForMultimodalRegression})
register_family(
    ToSTConfig,
    {
        AutoModel: ToSTModel,
        AutoModelForImageClassification: ToSTForImageClassification,
        AutoBackbone: ToSTBackbone,
    },
)
if is_vision_available():
    AutoImageProcessor.register(ToSTConfig, image_processor_classes={"pil": BitImageProcessorPil}, exist_ok=True)
register_family(
    ToSTTextConfig,
    {
        AutoModel: ToSTTextModel,
        AutoModelForCausalLM: ToSTForCausalLM,
        AutoModelForSequenceClassification: ToSTTextForSequenceClassification,
        AutoModelForTokenClassification: ToSTTextForTokenClassification,
    },
)


__all__ = [
    "DataCollatorForMultimodalRegression",
    "SumAggConfig",
    "SumAggForCausalLM",
    "SumAggForMaskedLM",
    "SumAggForMultimodalRegression",
    "SumAggForSequenceClassification",
    "SumAggForTokenClassification",
    "SumAggModel",
    "SumAggMultimodalConfig",
    "ToSTBackbone",
    "ToSTConfig",
    "ToSTForCausalLM",
    "ToSTForImageClassification",
    "ToSTModel",
    "ToSTTextConfig",
    "ToSTTextForSequenceClassification",
    "ToSTTextForTokenClassification",
    "ToSTTextModel",
]
