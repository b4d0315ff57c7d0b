"""Gradients and losses in chunks against those of the whole sequence."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from testing import assert_close, build, sumagg_config, tost_text_config
from transformers import DynamicCache, set_seed
from transformers.trainer_pt_utils import LabelSmoother

from modeling_sumagg import (
    SumAggForCausalLM,
    SumAggForMaskedLM,
    SumAggForSequenceClassification,
    SumAggForTokenClassification,
    ToSTForCausalLM,
    ToSTTextForSequenceClassification,
    ToSTTextForTokenClassification,
)
from modeling_sumagg.training import backward_in_chunks, evaluate_in_chunks
from modeling_sumagg.training.chunks import ChunkReader, KeptTensors


FREE_TOST = {"position_embedding_type": "none", "use_membership_bias": False}
PUBLISHED = {"norm_position": "post", "sum_normalization": "none", "sum_decay": "none", "lm_head_bias": True}
LANGUAGE_MODELS = {
    "pure": (SumAggForCausalLM, sumagg_config("pure")),
    "published": (SumAggForCausalLM, sumagg_config("pure", **PUBLISHED)),
    "decayed mean": (SumAggForCausalLM, sumagg_config("pure", sum_normalization="mean")),
    "keys": (SumAggForCausalLM, sumagg_config("sliding", sum_state_size=4)),
    "sliding": (SumAggForCausalLM, sumagg_config("sliding")),
    "hybrid": (SumAggForCausalLM, sumagg_config("hybrid")),
    "token statistics": (ToSTForCausalLM, tost_text_config("pure")),
    "decayed token statistics": (ToSTForCausalLM, tost_text_config("pure", sum_decay="input", **FREE_TOST)),
    "token statistics, sliding": (ToSTForCausalLM, tost_text_config("sliding", **FREE_TOST)),
    "token statistics, hybrid": (ToSTForCausalLM, tost_text_config("hybrid")),
}
CLASSIFIERS = {
    "sum": (SumAggForSequenceClassification, sumagg_config("hybrid", num_labels=3, pooling="sum")),
    "mean": (SumAggForSequenceClassification, sumagg_config("pure", num_labels=3, pooling="mean")),
    "last": (SumAggForSequenceClassification, sumagg_config("sliding", num_labels=3, pooling="last")),
    "regression": (SumAggForSequenceClassification, sumagg_config("pure", num_labels=1, pooling="sum")),
    "token statistics": (ToSTTextForSequenceClassification, tost_text_config("hybrid", num_labels=3)),
}
TAGGERS = {
    "hybrid": (SumAggForTokenClassification, sumagg_config("hybrid", num_labels=3)),
    "token statistics": (ToSTTextForTokenClassification, tost_text_config("pure", num_labels=3)),
}
LENGTH = 23


def tagging_loss_in_float64(logits, labels, num_items_in_batch=None, ignore_index=-100, **kwargs):
    """transformers' loss of a classifier of tokens, which rounds the logits to float32, without that rounding."""
    return loss_in_float64(logits, labels, None, num_items_in_batch, ignore_index, shift_labels=labels)


def loss_in_float64(
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
):
    """The same of a language model."""
    if shift_labels is None:
        logits, shift_labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), shift_labels, ignore_index=ignore_index, reduction="none")
    count = (shift_labels != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return losses.sum() / count


def make(kind, dtype=torch.float64):
    model_class, config = kind
    model = build(model_class, copy.deepcopy(config)).to(dtype)
    if dtype == torch.float64 and hasattr(model, "lm_head"):
        model.loss_function = loss_in_float64
    elif dtype == torch.float64 and not hasattr(model, "pooler"):
        model.loss_function = tagging_loss_in_float64
    return model


def name_of(kind):
    return kind[0].__name__


def text(batch_size=2, length=LENGTH):
    return torch.randint(61, (batch_size, length))


def padding(side, length=LENGTH):
    """A mask of three rows, of which one is not padded, one ends (or begins) with many masked tokens."""
    mask = torch.ones(3, length, dtype=torch.long)
    if side == "inside":
        mask[0, 3 : length - 2] = 0
        mask[1, ::3] = 0
    else:
        mask[0, length // 4 :] = 0
        mask[1, length - 2 :] = 0
    return mask.flip(1) if side == "left" else mask


def labels_of(ids, mask):
    """The ids that a real token before them predicts, those of padding among them, which it predicts too."""
    return ids.masked_fill(F.pad(mask[:, :-1], (1, 0)).cumsum(1) == 0, -100)


def gradients_of(model):
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def assert_same_gradients(actual, expected, rtol):
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max()
        # The gradient of a bias of keys is zero but for rounding.
        limit = rtol * max(gradient.abs().max(), 1e-2 * largest)
        assert error <= limit, f"{name} is off by {error:.3g}, allowed {limit:.3g}"


def assert_same_as_whole(model, input_ids, labels, chunk_length, rtol=1e-12, **inputs):
    """Loss and gradients in chunks are those of one call of the model with everything."""
    whole = model(input_ids, labels=labels, use_cache=False, **inputs).loss
    whole.backward()
    expected = gradients_of(model)
    loss = backward_in_chunks(model, input_ids, labels, chunk_length=chunk_length, **inputs)
    assert_close(loss, whole.detach(), rtol)
    assert not loss.requires_grad
    assert_same_gradients(gradients_of(model), expected, rtol)
    with torch.no_grad():
        assert_close(
            evaluate_in_chunks(model, input_ids, labels, chunk_length=chunk_length, **inputs).loss, whole, rtol
        )


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@settings(max_examples=5, deadline=None)
@given(length=st.integers(1, 40), chunk_length=st.integers(1, 41))
@example(length=12, chunk_length=1)
@example(length=12, chunk_length=100)
def test_any_length_in_chunks_of_any_length(kind, length, chunk_length):
    ids = text(2, length + 1)
    assert_same_as_whole(make(LANGUAGE_MODELS[kind]), ids, ids, chunk_length)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_in_float32(kind):
    ids = text()
    assert_same_as_whole(make(LANGUAGE_MODELS[kind], torch.float32), ids, ids, 5, rtol=1e-5)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("side", ["left", "right", "inside"])
@pytest.mark.parametrize("chunk_length", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_padding(kind, side, chunk_length):
    mask, ids = padding(side), text(3)
    assert_same_as_whole(make(LANGUAGE_MODELS[kind]), ids, labels_of(ids, mask), chunk_length, attention_mask=mask)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
@pytest.mark.parametrize("chunk_length", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_documents_packed_into_rows(kind, chunk_length):
    ids = text()
    positions = torch.stack([torch.arange(LENGTH) - 0, torch.arange(LENGTH)])
    for row, start in ((0, 4), (0, 9), (0, 10), (1, 14)):
        positions[row, start:] = torch.arange(LENGTH - start)
    labels = ids.masked_fill(positions == 0, -100)
    assert_same_as_whole(make(LANGUAGE_MODELS[kind]), ids, labels, chunk_length, position_ids=positions)
    mask = padding("right")[:2]
    labels = labels.masked_fill(mask == 0, -100)
    inputs = {"position_ids": positions, "attention_mask": mask}
    assert_same_as_whole(make(LANGUAGE_MODELS[kind]), ids, labels, chunk_length, **inputs)


@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("side", [None, "left", "right", "inside"])
@pytest.mark.parametrize("chunk_length", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_classifiers_of_sequences(kind, side, chunk_length):
    inputs = {} if side is None else {"attention_mask": padding(side)}
    labels = torch.randn(3).double() if kind == "regression" else torch.tensor([0, 2, 1])
    model, ids = make(CLASSIFIERS[kind]), text(3)
    assert_same_as_whole(model, ids, labels, chunk_length, **inputs)
    with torch.no_grad():
        logits = evaluate_in_chunks(model, ids, chunk_length=chunk_length, **inputs).logits
        assert_close(logits, model(ids, **inputs).logits, 1e-12)


@pytest.mark.parametrize("kind", TAGGERS)
@pytest.mark.parametrize("side", [None, "left", "right", "inside"])
def test_classifiers_of_tokens(kind, side):
    mask = torch.ones(3, LENGTH, dtype=torch.long) if side is None else padding(side)
    labels = torch.randint(3, (3, LENGTH)).masked_fill((mask.cumsum(1) == 0) | (torch.rand(3, LENGTH) < 0.2), -100)
    model, ids = make(TAGGERS[kind]), text(3)
    assert_same_as_whole(model, ids, labels, 4, attention_mask=mask)
    with torch.no_grad():
        logits = evaluate_in_chunks(model, ids, chunk_length=4, attention_mask=mask).logits
        real = mask.bool()
        assert_close(logits[real], model(ids, attention_mask=mask).logits[real], 1e-12)


def test_losses_of_tokens_are_those_of_the_logits():
    model, ids, mask = make(LANGUAGE_MODELS["sliding"]), text(3), padding("right")
    labels = ids.masked_fill(mask == 0, -100)
    found = evaluate_in_chunks(model, ids, labels, attention_mask=mask, chunk_length=4).token_losses
    log_probabilities = model(ids, attention_mask=mask).logits.log_softmax(-1)
    for row in range(3):
        assert found[row, 0] == 0
        for token in range(1, LENGTH):
            expected = -log_probabilities[row, token - 1, ids[row, token]] if mask[row, token] else torch.tensor(0.0)
            torch.testing.assert_close(found[row, token], expected.to(found.dtype), rtol=1e-11, atol=1e-12)


def test_number_of_items_ignored_labels_and_accumulation():
    model = make(LANGUAGE_MODELS["hybrid"])
    batches = [text(), text()]
    options = {"num_items_in_batch": torch.tensor(37), "ignore_index": 7}
    for ids in batches:
        model(ids, labels=ids, **options).loss.backward()
    expected = gradients_of(model)
    for ids in batches:
        backward_in_chunks(model, ids, ids, chunk_length=4, **options)
    assert_same_gradients(gradients_of(model), expected, 1e-12)


def test_scaled_loss():
    model, ids = make(LANGUAGE_MODELS["pure"]), text()
    loss = model(ids, labels=ids).loss
    (1024 * loss).backward()
    expected = gradients_of(model)
    returned = backward_in_chunks(model, ids, ids, chunk_length=4, loss_scale=torch.tensor(1024.0))
    assert_close(returned, loss, 1e-12)
    assert_same_gradients(gradients_of(model), expected, 1e-12)


@pytest.mark.parametrize("kind", [LANGUAGE_MODELS["sliding"], CLASSIFIERS["mean"], TAGGERS["hybrid"]], ids=name_of)
def test_label_smoothing_is_that_of_trainer(kind):
    model, ids = make(kind), text()
    is_language_model = isinstance(model, SumAggForCausalLM)
    labels = ids if is_language_model else torch.tensor([0, 2])
    if isinstance(model, SumAggForTokenClassification):
        labels = (ids % 3).masked_fill(ids % 5 == 0, -100)
    # It sums smoothed losses in float32.
    loss = LabelSmoother(0.2)(model(ids), labels, shift_labels=is_language_model)
    loss.backward()
    expected = gradients_of(model)
    assert_close(backward_in_chunks(model, ids, labels, chunk_length=4, label_smoothing=0.2), loss, 1e-6)
    assert_same_gradients(gradients_of(model), expected, 1e-6)


@pytest.mark.parametrize("kind", [*LANGUAGE_MODELS.values(), *CLASSIFIERS.values(), *TAGGERS.values()], ids=name_of)
def test_dropout_is_the_same_in_both_readings(kind):
    """Against a graph that is kept over all chunks, each read once with the same random numbers."""
    model_class, config = kind
    rates = {"hidden_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3, "classifier_dropout": 0.3}
    config = copy.deepcopy(config)
    for name, rate in rates.items():
        if hasattr(config, name):
            setattr(config, name, rate)
    model, ids = make((model_class, config)).train(), text()
    if isinstance(model, SumAggForSequenceClassification | ToSTTextForSequenceClassification):
        labels = torch.randn(2).double() if config.num_labels == 1 else torch.tensor([2, 0])
    else:
        labels = ids if hasattr(model, "lm_head") else ids % 3
    set_seed(5)
    loss = backward_in_chunks(model, ids, labels, chunk_length=6)
    after = torch.rand(3)
    actual = gradients_of(model)

    set_seed(5)
    cache, hidden_states, losses, pooled = DynamicCache(config=config), [], [], 0.0
    starts = range(0, LENGTH, 6)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100) if hasattr(model, "lm_head") else labels
    for start in starts:
        chunk = slice(start, start + 6)
        positions = torch.arange(LENGTH)[None, chunk]
        hidden_states = model.model(ids[:, chunk], position_ids=positions, past_key_values=cache).last_hidden_state
        if hasattr(model, "lm_head"):
            losses.append(F.cross_entropy(model.lm_head(hidden_states).mT, shifted[:, chunk], reduction="sum"))
            count = LENGTH * 2 - 2
        elif hasattr(model, "pooler"):
            own = model.pooler(hidden_states, None)
            kind_of_pooling = getattr(config, "pooling", "last")
            share = hidden_states.shape[1] / LENGTH if kind_of_pooling == "mean" else 1.0
            pooled = own if kind_of_pooling == "last" else pooled + share * own
            logits = model.score(model.dropout(pooled))
            count = 1
        else:
            logits = model.score(model.dropout(hidden_states))
            losses.append(F.cross_entropy(logits.mT, labels[:, chunk], reduction="sum"))
            count = LENGTH * 2
    if hasattr(model, "pooler"):
        losses = [F.mse_loss(logits[:, 0], labels) if config.num_labels == 1 else F.cross_entropy(logits, labels)]
    expected = sum(losses) / count
    expected.backward()
    assert_close(loss, expected, 1e-11)
    assert_same_gradients(actual, gradients_of(model), 1e-11)
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("kind", ["pure", "hybrid", "token statistics"])
def test_autocast(kind):
    """Gradients of a bfloat16 pass are as near to the exact ones in chunks as they are in the whole."""
    model, ids = make(LANGUAGE_MODELS[kind], torch.float32), text(2, 40)
    model(ids, labels=ids).loss.backward()
    exact = gradients_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    whole = gradients_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        backward_in_chunks(model, ids, ids, chunk_length=7)
    chunks = gradients_of(model)
    assert chunks.keys() == exact.keys()

    def error(gradients):
        return sum((gradients[name] - exact[name]).square().sum() for name in exact).sqrt()

    assert error(chunks) < 1.5 * error(whole)


def test_adapters_and_frozen_parameters():
    ids, mask = text(3), padding("right")
    labels = ids.masked_fill(mask == 0, -100)
    model = get_peft_model(make(LANGUAGE_MODELS["hybrid"]), LoraConfig(r=2, task_type=TaskType.CAUSAL_LM)).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert_same_as_whole(model, ids, labels, 4, attention_mask=mask)

    classifier = make(CLASSIFIERS["mean"])
    config = LoraConfig(r=2, task_type=TaskType.SEQ_CLS, modules_to_save=["score", "pooler"])
    classifier = get_peft_model(classifier, config).double()
    assert_same_as_whole(classifier, ids, torch.tensor([0, 1, 2]), 4, attention_mask=mask)

    frozen = make(LANGUAGE_MODELS["sliding"])
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    assert_same_as_whole(frozen, ids, labels, 4, attention_mask=mask)


def test_fused_loss():
    model_class, config = LANGUAGE_MODELS["pure"]
    config = copy.deepcopy(config)
    config.fuse_linear_cross_entropy = True
    model, ids = make((model_class, config)).train(), text()
    assert_same_as_whole(model, ids, ids, 4)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_what_is_kept_of_a_chunk_is_its_state(kind, monkeypatch):
    """The states of three chunks lie in one tensor, and keep no more memory alive, as a view of all tokens would."""
    kept, cache = [], ChunkReader.cache
    monkeypatch.setattr(
        ChunkReader, "cache", lambda self, *arguments: kept.append(arguments) or cache(self, *arguments)
    )
    model, ids = make(LANGUAGE_MODELS[kind]), text(1, 64)
    backward_in_chunks(model, ids, ids, chunk_length=16)
    # In the second reading.
    states = [state for index, state in kept[3:] if index > 0]
    assert len(states) == 3
    for name, tensor in ((name, tensor) for state in states for name, tensor in state.items()):
        if not name.endswith((".keys", ".values")):
            assert tensor.untyped_storage().nbytes() <= 3 * tensor.nbytes, name


def test_progress_counts_every_reading():
    calls = []
    model, ids = make(LANGUAGE_MODELS["pure"]), text()
    backward_in_chunks(model, ids, ids, chunk_length=6, progress=lambda *numbers: calls.append(numbers))
    assert calls == [(i, 7) for i in range(1, 8)]
    calls.clear()
    evaluate_in_chunks(model, ids, ids, chunk_length=6, progress=lambda *numbers: calls.append(numbers))
    assert calls == [(i, 4) for i in range(1, 5)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"chunk_length": 0}, ValueError, "at least 1 token, got 0"),
        ({"labels": torch.zeros(2, 5, dtype=torch.long)}, ValueError, r"`labels` must have the shape"),
        ({"labels": torch.full((2, LENGTH), 61)}, ValueError, r"`labels` must be in \[0, 61\)"),
        ({"input_ids": torch.full((2, LENGTH), -1)}, ValueError, r"`input_ids` must be in \[0, 61\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, ValueError, r"T >= 1, got \[2, 0\]"),
        ({"attention_mask": torch.ones(2, 5)}, ValueError, "`attention_mask` must have the shape"),
        ({"position_ids": torch.arange(5)[None]}, ValueError, "`position_ids` must have the shape"),
        ({"attention_mask": padding("left")[:2]}, ValueError, "Padding on the left has a label"),
        ({"label_smoothing": 1.0}, ValueError, r"must be in \[0, 1\), got 1.0"),
        ({"model": "bidirectional"}, ValueError, "bidirectional"),
        ({"model": "no layers"}, ValueError, "A model without layers"),
        ({"model": "checkpointing"}, ValueError, "gradient_checkpointing_disable"),
        ({"model": "prompts"}, ValueError, "'default' is a learned prompt"),
        ({"model": "parallel"}, TypeError, "got a DataParallel"),
        ({"model": "linear"}, TypeError, "got a Linear"),
    ],
    ids=str,
)
def test_errors_come_before_any_work(change, error, message):
    model = make(LANGUAGE_MODELS["pure"], torch.float32).train()
    inputs = {"model": model, "input_ids": text(), "labels": text(), "chunk_length": 4, **change}
    if inputs["model"] == "bidirectional":
        inputs["model"] = build(SumAggForTokenClassification, sumagg_config("pure", is_causal=False))
    elif inputs["model"] == "no layers":
        inputs["model"] = build(SumAggForCausalLM, sumagg_config("pure", num_hidden_layers=0, layer_types=[]))
    elif inputs["model"] == "checkpointing":
        model.gradient_checkpointing_enable()
        inputs["model"] = model
    elif inputs["model"] == "prompts":
        inputs["model"] = get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    elif inputs["model"] == "parallel":
        inputs["model"] = torch.nn.DataParallel(model)
    elif inputs["model"] == "linear":
        inputs["model"] = torch.nn.Linear(2, 2)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(error, match=message))
        backward_in_chunks(inputs.pop("model"), inputs.pop("input_ids"), inputs.pop("labels"), **inputs)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_masked_language_models_are_not_read_in_chunks():
    model = build(SumAggForMaskedLM, sumagg_config("pure", is_causal=False))
    with pytest.raises(TypeError, match="got a SumAggForMaskedLM"):
        backward_in_chunks(model, text(), text(), chunk_length=4)
    with pytest.raises(ValueError, match="needs|by the loss of `labels`"):
        evaluate_in_chunks(make(LANGUAGE_MODELS["pure"]), text(), chunk_length=4)


def test_states_of_many_chunks_are_few_pieces_of_memory():
    """A window grows for two chunks; from then on all chunks share one piece."""
    given = [torch.randn(min(index + 1, 3), 2) for index in range(10)]
    kept = KeptTensors(10)
    for index, tensor in enumerate(given):
        changed_later = tensor.clone()
        kept.keep(index, {"window": changed_later})
        changed_later.zero_()
    found = [kept.of(index)["window"] for index in range(10)]
    assert all(map(torch.equal, found, given))
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 3
