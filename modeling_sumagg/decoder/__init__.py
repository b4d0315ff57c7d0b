"""The frame of every model over a sequence: it knows no operator of a family.

A family is a `TextConfig` with its `recurrent_layer_types`; an operator, as at the head of `recurrence.py`; a mixer that
calls it by [`recur`]; and the classes that name these: a [`DecoderLayer`] its `mixer_class`, a [`DecoderPreTrainedModel`]
its `config` and `layer_class`, a [`DecoderModel`], and each head its `model_class`. The family's `PreTrainedModel` stands
before the base among the parents of its models. `examples/own_mixer/gated_sum.py` is such a family, whole.
"""

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
