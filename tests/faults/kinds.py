"""The kinds of text models that the tests of faults run over: tiny, every parameter random."""

import pytest
import torch
from testing import build, sumagg_config, tost_text_config
from transformers import PreTrainedModel

from modeling_sumagg import (
    SumAggForCausalLM,
    SumAggForMaskedLM,
    SumAggForSequenceClassification,
    SumAggForTokenClassification,
    ToSTForCausalLM,
    ToSTTextForSequenceClassification,
    ToSTTextForTokenClassification,
)


UNLIMITED_SUMAGG = {"position_embedding_type": "sinusoidal", "sum_normalization": "mean"}
UNLIMITED_TOST = {"position_embedding_type": "none", "use_membership_bias": False}
_KINDS = {
    "sumagg-pure": (SumAggForCausalLM, sumagg_config, "pure", {}),
    "sumagg-hybrid": (SumAggForCausalLM, sumagg_config, "hybrid", {"norm_position": "post", "lm_head_bias": True}),
    "sumagg-sliding": (SumAggForCausalLM, sumagg_config, "sliding", UNLIMITED_SUMAGG),
    "sumagg-converted": (SumAggForCausalLM, sumagg_config, "converted", {}),
    "sumagg-bidirectional": (SumAggForMaskedLM, sumagg_config, "hybrid", {"is_causal": False}),
    "sumagg-classifier": (SumAggForSequenceClassification, sumagg_config, "hybrid", {"num_labels": 3}),
    "sumagg-classifier-mean": (
        SumAggForSequenceClassification,
        sumagg_config,
        "pure",
        {"is_causal": False, "pooling": "mean", **UNLIMITED_SUMAGG},
    ),
    "sumagg-tagger": (SumAggForTokenClassification, sumagg_config, "sliding", {"is_causal": False}),
    "tost-pure": (ToSTForCausalLM, tost_text_config, "pure", {}),
    "tost-hybrid": (
        ToSTForCausalLM,
        tost_text_config,
        "hybrid",
        {"use_bias": True, "position_embedding_type": "sinusoidal"},
    ),
    "tost-sliding": (ToSTForCausalLM, tost_text_config, "sliding", UNLIMITED_TOST),
    "tost-classifier": (ToSTTextForSequenceClassification, tost_text_config, "hybrid", {"num_labels": 3}),
    "tost-tagger": (ToSTTextForTokenClassification, tost_text_config, "pure", {"num_labels": 3}),
}
KINDS = list(_KINDS)
# Every operator, head, layer type and position type once; the others are for the slow tests.
MAIN_KINDS = ["sumagg-hybrid", "sumagg-sliding", "sumagg-classifier-mean", "tost-hybrid", "tost-classifier"]
CAUSAL_KINDS = [kind for kind, (model_class, *_) in _KINDS.items() if model_class.__name__.endswith("ForCausalLM")]


def marked(kinds: list[str]) -> list:
    """The kinds as parameters, those that are not among the main ones marked as slow."""
    return [kind if kind in MAIN_KINDS else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


def tiny_model(kind: str, **changes) -> PreTrainedModel:
    """The model of a kind, with changes to its config."""
    model_class, config, layers, settings = _KINDS[kind]
    return build(model_class, config(layers, **{**settings, **changes}))


def padded_inputs(batch_size: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    """Ids with padding on the left of the first row, and inside of the last."""
    mask = torch.ones(batch_size, length, dtype=torch.long)
    mask[0, :2] = 0
    mask[-1, 4] = 0
    return {"input_ids": torch.randint(61, (batch_size, length)), "attention_mask": mask}


def packed_inputs(length: int = 9) -> dict[str, torch.Tensor]:
    """Two documents in the first row, three in the second."""
    positions = [[*range(4), *range(length - 4)], [*range(2), *range(3), *range(length - 5)]]
    return {"input_ids": torch.randint(61, (2, length)), "position_ids": torch.tensor(positions)}


INPUTS = {
    "plain": lambda: {"input_ids": torch.randint(61, (2, 9))},
    "padded": padded_inputs,
    "packed": packed_inputs,
}


def named_layers(model: torch.nn.Module, *types: type) -> list[tuple[str, torch.nn.Module]]:
    """The modules of these types, by their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, types)]


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    return model(**inputs, **kwargs).logits


@torch.no_grad()
def greedy(model: PreTrainedModel, input_ids: torch.Tensor, steps: int) -> torch.Tensor:
    """The ids with so many more, each found by a forward pass over everything before it."""
    for _ in range(steps):
        input_ids = torch.cat([input_ids, model(input_ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return input_ids


def assert_near(actual: torch.Tensor, expected: torch.Tensor, error: float) -> None:
    """Within `error` of the norm of what is expected."""
    assert actual.shape == expected.shape
    assert (actual.float() - expected.float()).norm() < error * expected.float().norm()
