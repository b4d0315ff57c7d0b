"""An argument does what it says, or is refused by its name."""

import pytest
import torch
from testing import sumagg_config
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationConfig, QuantizedCache
from transformers.cache_utils import DynamicLayer

from modeling_sumagg import SumAggForCausalLM

from .kinds import CAUSAL_KINDS, greedy, marked, tiny_model


LOSS_KINDS = [*CAUSAL_KINDS, "sumagg-bidirectional", "sumagg-tagger", "tost-tagger"]


@pytest.mark.parametrize("ignored", [-1, -100, 7])
@pytest.mark.parametrize("kind", marked(LOSS_KINDS))
def test_ignore_index(kind, ignored):
    model = tiny_model(kind)
    num_classes = model.config.num_labels if kind.endswith("tagger") else 61
    ids = torch.randint(61, (2, 9))
    labels = torch.randint(min(num_classes, 7), (2, 9))
    is_ignored = torch.rand(2, 9) < 0.4
    labels[is_ignored] = ignored
    outputs = model(ids, labels=labels, ignore_index=ignored)
    scores, targets, kept = outputs.logits, labels, ~is_ignored
    if kind in CAUSAL_KINDS:
        scores, targets, kept = scores[:, :-1], targets[:, 1:], kept[:, 1:]
    expected = -F.log_softmax(scores.double(), dim=-1)[kept].gather(1, targets[kept][:, None]).mean()
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    if ignored != -100 and num_classes <= 61:
        other = -100 if ignored == -1 else -1
        labels[0, 3] = other if other != -100 else -5
        with pytest.raises(
            ValueError, match=rf"in \[0, {num_classes}\), or {ignored} to be ignored, got {labels[0, 3]}"
        ):
            model(ids, labels=labels, ignore_index=ignored)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="PyTorch has no linear_cross_entropy")
@pytest.mark.parametrize("kind", marked([*CAUSAL_KINDS, "sumagg-bidirectional"]))
def test_ignore_index_of_the_fused_loss(kind):
    model = tiny_model(kind, fuse_linear_cross_entropy=True)
    ids = torch.randint(61, (2, 9))
    labels = ids.masked_fill(torch.rand(2, 9) < 0.4, -1)
    expected = model(ids, labels=labels, ignore_index=-1).loss
    fused = model.train()(ids, labels=labels, ignore_index=-1)
    assert fused.logits is None and fused.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    labels[0, 3] = 61
    with pytest.raises(ValueError, match=r"in \[0, 61\), or -1 to be ignored, got 61"):
        model(ids, labels=labels, ignore_index=-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": -3}, "`sliding_window` must be at least 1, got -3"),
        ({"sliding_window": "wide"}, "sliding_window"),
        ({"num_hidden_layers": 1}, "`num_hidden_layers` = 1 entries, got 2"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"layer_types": ["summation", "lstm"]}, "lstm"),
        ({"num_attention_heads": 3}, "`num_attention_heads` must divide"),
        ({"hidden_dropout": 1.0}, "`hidden_dropout` must be in"),
        ({"pooling": "max"}, "pooling"),
        ({"position_embedding_type": "rotary"}, "position_embedding_type"),
    ],
)
@pytest.mark.parametrize("auto", [True, False])
def test_what_is_changed_on_loading_is_validated(changes, message, auto, tmp_path):
    SumAggForCausalLM(sumagg_config("sliding")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        (AutoModelForCausalLM if auto else SumAggForCausalLM).from_pretrained(tmp_path, **changes)


def test_what_is_changed_on_loading_works(tmp_path):
    model = tiny_model("sumagg-sliding", sliding_window=4)
    model.save_pretrained(tmp_path)
    ids = torch.randint(61, (1, 12))
    loaded = SumAggForCausalLM.from_pretrained(tmp_path, sliding_window=2, num_labels=5, dtype=torch.float64)
    assert loaded.config.num_labels == 5 and loaded.dtype == torch.float64
    model.config.sliding_window = 2
    torch.testing.assert_close(loaded(ids).logits.float(), model(ids).logits, rtol=1e-4, atol=1e-4)
    first = SumAggForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1, layer_types=["summation"])
    assert len(first.model.layers) == 1


@pytest.mark.parametrize("kind", marked(CAUSAL_KINDS))
def test_early_exits_that_do_not_exist_are_refused(kind):
    model = tiny_model(kind)
    num_hidden_layers = model.config.num_hidden_layers
    ids, settings = torch.randint(1, 61, (1, 7)), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for early_exit in (0, -1, num_hidden_layers + 1):
        for given in (
            {"assistant_early_exit": early_exit, **settings},
            {"generation_config": GenerationConfig(assistant_early_exit=early_exit, **settings)},
        ):
            with pytest.raises(ValueError, match=rf"`assistant_early_exit` must be in \[1, {num_hidden_layers}\]"):
                model.generate(ids, **given)


@pytest.mark.parametrize("kind", marked(CAUSAL_KINDS))
def test_quantized_caches_are_refused(kind):
    model = tiny_model(kind)
    with pytest.raises(ValueError, match="`cache_implementation='quantized'`"):
        model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, cache_implementation="quantized")


def test_a_quantized_cache_of_full_attention_is_left_to_transformers(monkeypatch):
    model = tiny_model("sumagg-hybrid", layer_types=["full_attention"] * 3)
    # The backends for this are seldom installed.
    monkeypatch.setattr(
        QuantizedCache,
        "__init__",
        lambda self, backend, config: super(QuantizedCache, self).__init__([DynamicLayer() for _ in range(3)]),
    )
    ids = torch.randint(61, (1, 5))
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="quantized")
    assert generated.tolist() == greedy(model, ids, 4).tolist()
