"""Classifiers that go on from a cache: what they pool is that of the whole text, and of each row alone."""

import itertools

import pytest
import torch
from testing import assert_close, build, sumagg_config, tost_text_config
from transformers import DynamicCache, StaticCache

from modeling_sumagg import SumAggForSequenceClassification, ToSTTextForSequenceClassification
from modeling_sumagg.common.compatibility import CACHE_NAME


LENGTH = 12
MASK = torch.tensor([[1] * 12, [0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1], [1, 1, 1, 0, 1, 0, 1, 1, 0, 0, 0, 0]])
POOLINGS = ["sum", "mean", "last", "tost"]


def classifier(pooling: str, layers: str = "hybrid", **changes):
    changes = {"num_labels": 3, "position_embedding_type": "none", **changes}
    if pooling == "tost":
        config = tost_text_config(layers, use_membership_bias=False, **changes)
        return build(ToSTTextForSequenceClassification, config).double()
    return build(SumAggForSequenceClassification, sumagg_config(layers, pooling=pooling, **changes)).double()


@pytest.mark.parametrize("cuts", [[1, 2, 5, 8]], ids=str)
@pytest.mark.parametrize("cache_type", ["dynamic", "static", "static, fixed mask"])
@pytest.mark.parametrize("layers", ["pure", "hybrid", "sliding"])
@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_in_segments_is_the_whole_text_and_each_row_alone(pooling, layers, cache_type, cuts):
    model, ids = classifier(pooling, layers), torch.randint(61, (3, LENGTH))
    cache = DynamicCache(config=model.config)
    if cache_type != "dynamic":
        cache = StaticCache(config=model.config, max_cache_len=LENGTH + 4)
    for first, last in itertools.pairwise([0, *cuts, LENGTH]):
        mask = MASK[:, :last]
        if cache_type == "static, fixed mask":
            mask = torch.nn.functional.pad(mask, (0, LENGTH + 4 - last))
        logits = model(ids[:, first:last], attention_mask=mask, **{CACHE_NAME: cache}).logits
        for row, real, actual in zip(ids[:, :last], MASK[:, :last].bool(), logits, strict=True):
            if real.any():
                assert_close(actual, model(row[real][None], use_cache=False).logits[0], rtol=1e-9)


@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_what_is_pooled_goes_back_with_the_tokens(pooling):
    model, ids = classifier(pooling), torch.randint(61, (2, LENGTH))
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], **{CACHE_NAME: cache})
    cache.activate_past_recording()
    model(ids[:, 5:10], **{CACHE_NAME: cache})
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    logits = model(ids.flip(0)[:, 8:], **{CACHE_NAME: cache}).logits
    assert_close(logits, model(ids.flip(0), use_cache=False).logits, rtol=1e-9)


@pytest.mark.parametrize("pooling", ["sum", "last"])
def test_layers_that_hold_no_state_hold_none_of_the_pooler(pooling):
    model, ids = classifier(pooling, layer_types=["full_attention"] * 3), torch.randint(61, (2, LENGTH))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        assert_close(model(ids[:, :6], **{CACHE_NAME: cache}).logits, model(ids[:, :6]).logits, rtol=1e-9)
    with pytest.raises(ValueError, match="pass the whole text and no `cache`"):
        model(ids[:, 6:], **{CACHE_NAME: cache})
    model = classifier(pooling, num_hidden_layers=0, layer_types=[])
    with pytest.raises(ValueError, match="A model without layers has no decode state"):
        model(ids, **{CACHE_NAME: DynamicCache(config=model.config)})


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_means_over_many_tokens_whatever_the_dtype_of_the_mask(dtype):
    model = classifier("mean", num_hidden_layers=0, layer_types=[])
    ids, mask = torch.randint(61, (2, 3001)), torch.ones(2, 3001)
    mask[0, 2500:] = 0
    terms = (model.get_input_embeddings()(ids) * 2.0 @ model.pooler.proj.weight.T).relu()
    means = torch.stack([terms[0, :2500].sum(0) / 2500, terms[1].sum(0) / 3001])
    expected = means @ model.score.weight.T + model.score.bias
    assert_close(model(ids, attention_mask=mask.to(dtype)).logits, expected, rtol=1e-6)
