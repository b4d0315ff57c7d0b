"""The frame of every model over a sequence: it knows no operator of a family."""

from .attention import Attention
from .heads import ForCausalLM, ForMaskedLM, ForSequenceClassification, ForTokenClassification
from .layers import MLP, DecoderLayer
from .layout import SequenceLayout
from .model import DecoderModel, DecoderPreTrainedModel
from .recurrence import recur


__all__ = [
    "MLP",
    "Attention",
    "DecoderLayer",
    "DecoderModel",
    "DecoderPreTrainedModel",
    "ForCausalLM",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "SequenceLayout",
    "recur",
]
