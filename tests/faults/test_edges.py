"""Edges: no tokens, odd shapes and dtypes of inputs and labels, and a static cache that is full."""

import pytest
import torch
from testing import assert_close
from torch.nn import functional as F
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from .kinds import CAUSAL_KINDS, KINDS, greedy, logits, tiny_model


CLASSIFIERS = [kind for kind in KINDS if "classifier" in kind]
TAGGERS = [kind for kind in KINDS if kind.endswith("tagger")]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind, attention):
    model = tiny_model(kind)
    model.set_attn_implementation(attention)
    empty = torch.zeros(3, 0, dtype=torch.long)
    for inputs in (
        {"input_ids": empty},
        {"input_ids": empty, "attention_mask": empty},
        {"input_ids": empty, "position_ids": empty},
        {"inputs_embeds": torch.zeros(3, 0, 16)},
    ):
        outputs = logits(model, inputs)
        assert outputs.isfinite().all()
        assert outputs.shape == ((3, model.config.num_labels) if kind in CLASSIFIERS else (3, 0, outputs.shape[-1]))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_without_a_batch_are_refused(kind):
    model = tiny_model(kind)
    with pytest.raises(ValueError, match=r"`input_ids` must have the shape \[B, T\], got \[5\]"):
        model(torch.ones(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`inputs_embeds` must have the shape \[B, T, d\], got \[5, 16\]"):
        model(inputs_embeds=torch.ones(5, 16))
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(torch.ones(1, 5, dtype=torch.long), inputs_embeds=torch.ones(1, 5, 16))
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape .*got \[5\]"):
        model(torch.ones(1, 5, dtype=torch.long), attention_mask=torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_ids_of_any_dtype(kind, dtype):
    model = tiny_model(kind)
    ids, mask = torch.randint(61, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    expected = logits(model, {"input_ids": ids, "attention_mask": mask})
    assert_close(logits(model, {"input_ids": ids.int(), "attention_mask": mask.to(dtype)}), expected)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_labels_of_rows(kind):
    ids = torch.randint(61, (4, 6))
    model = tiny_model(kind, num_labels=3)
    scores = logits(model, {"input_ids": ids})
    classes = torch.tensor([0, 2, 1, 1])
    assert model(ids, labels=classes).loss.item() == pytest.approx(F.cross_entropy(scores, classes).item())
    classes[2] = -100
    assert model(ids, labels=classes).loss.item() == pytest.approx(F.cross_entropy(scores, classes).item())
    for wrong, message in (
        (torch.tensor([0, 3, 1, 1]), r"in \[0, 3\), .* got 3"),
        (torch.tensor([0, -1, 1, 1]), r"in \[0, 3\), .* got -1"),
        (torch.tensor([True, False, True, True]), "integer dtype, got torch.bool"),
        (torch.tensor([0.0, 1.0, 1.0, 1.0]), "integer dtype, got torch.float32"),
        (classes[:3], r"the shape \[B\] = \[4\], got \[3\]"),
    ):
        with pytest.raises(ValueError, match=f"`labels`.*{message}"):
            model(ids, labels=wrong)

    several = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    expected = F.binary_cross_entropy_with_logits(scores, several.float()).item()
    model = tiny_model(kind, num_labels=3, problem_type="multi_label_classification")
    for labels in (several, several.bool(), several.float()):
        assert model(ids, labels=labels).loss.item() == pytest.approx(expected)

    model = tiny_model(kind, num_labels=1)
    values = logits(model, {"input_ids": ids})[:, 0]
    targets = torch.tensor([1.5, -2.0, 0.0, 3.0])
    for labels in (targets, targets[:, None]):
        assert model(ids, labels=labels).loss.item() == pytest.approx(F.mse_loss(values, targets).item())


@pytest.mark.parametrize("kind", [*CAUSAL_KINDS, "sumagg-bidirectional", *TAGGERS])
def test_labels_of_tokens(kind):
    model = tiny_model(kind)
    num_classes = model.config.num_labels if kind in TAGGERS else 61
    ids = torch.randint(61, (2, 6))
    labels = torch.zeros(2, 6, dtype=torch.long)
    for value in (num_classes, -1):
        wrong = labels.clone()
        wrong[1, 4] = value
        with pytest.raises(ValueError, match=rf"`labels` must be in \[0, {num_classes}\), .* got {value}"):
            model(ids, labels=wrong)
    for wrong in (labels.bool(), labels.float()):
        with pytest.raises(ValueError, match="`labels` .*integer dtype"):
            model(ids, labels=wrong)
    with pytest.raises(ValueError, match=r"`labels` must have the shape \[B, T\] = \[2, 6\], got \[2, 5\]"):
        model(ids, labels=labels[:, 1:])
    assert model(ids, labels=labels.int()).loss.item() == pytest.approx(model(ids, labels=labels).loss.item())


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
@torch.no_grad()
def test_a_full_static_cache(kind):
    model = tiny_model(kind)
    ids = torch.randint(61, (1, 12))
    for lengths in ((12,), (8, 4), (7, 1, 1)):
        cache = StaticCache(config=model.config, max_cache_len=8)
        parts = ids[:, : sum(lengths)].split(lengths, dim=1)
        if "full_attention" in model.config.layer_types:
            for part in parts[:-1]:
                model(part, cache=cache)
            with pytest.raises(ValueError, match="static cache of 8 tokens is too short: .*`max_cache_len`"):
                model(parts[-1], cache=cache)
        else:
            # States have room for any length.
            got = torch.cat([model(part, cache=cache).logits for part in parts], dim=1)
            assert_close(got, logits(model, {"input_ids": ids[:, : sum(lengths)]}), rtol=1e-4)


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_generation_up_to_the_end_of_a_static_cache(kind):
    model = tiny_model(kind)
    ids = torch.randint(61, (1, 5))
    cache = StaticCache(config=model.config, max_cache_len=8)
    generated = model.generate(ids, cache=cache, max_new_tokens=4, do_sample=False)
    assert generated.tolist() == greedy(model, ids, 4).tolist()


@pytest.mark.skipif(
    not getattr(StaticLayer, "is_croppable", False), reason="transformers below 5.24 cannot crop its own"
)
@pytest.mark.parametrize("kind", CAUSAL_KINDS)
@torch.no_grad()
def test_a_static_cache_that_records_sees_no_empty_columns(kind):
    model = tiny_model(kind)
    ids = torch.randint(61, (1, 9))
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(ids[:, :4], cache=cache)
    cache.activate_past_recording()
    model(ids[:, 4:6], cache=cache)
    cache.crop(-1)
    steps = [model(ids[:, t : t + 1], cache=cache).logits for t in range(5, 9)]
    assert_close(torch.cat(steps, dim=1), logits(model, {"input_ids": ids})[:, 5:], rtol=1e-4)
