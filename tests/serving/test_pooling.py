"""Classifiers and bare models as vLLM's pooling models, prompts whole and in chunks."""

import pytest
import torch


pytest.importorskip("vllm", reason="needs vLLM, in an environment of its own: `tests/serving/run`")

from modeling_sumagg import (
    SumAggConfig,
    SumAggForSequenceClassification,
    SumAggModel,
    ToSTTextConfig,
    ToSTTextForSequenceClassification,
    ToSTTextModel,
)
from serving.engines import CONVERTED, SIZES, Engine, byte_tokenizer, random_prompts, randomized


pytestmark = pytest.mark.serving

LABELS = {"num_labels": 3}
SHORT = {**SIZES, "num_hidden_layers": 2, "max_position_embeddings": 512}
CLASSIFIERS = {
    "sum": lambda: SumAggForSequenceClassification(SumAggConfig(**SHORT, **LABELS, pooling="sum")),
    "mean": lambda: SumAggForSequenceClassification(
        SumAggConfig(**SHORT, **LABELS, pooling="mean", layer_types=["summation"] * 2)
    ),
    "last": lambda: SumAggForSequenceClassification(SumAggConfig(**SHORT, **LABELS, pooling="last")),
    "token statistics": lambda: ToSTTextForSequenceClassification(
        ToSTTextConfig(**SHORT, **LABELS, layerscale_value=0.5)
    ),
    "attention": lambda: SumAggForSequenceClassification(
        SumAggConfig(**SHORT, **LABELS, layer_types=["full_attention", "sliding_attention"], sliding_window=32)
    ),
    "converted": lambda: SumAggForSequenceClassification(
        SumAggConfig(**{**SHORT, **LABELS, **CONVERTED, "layer_types": ["sliding_attention"] * 2, "pooling": "mean"})
    ),
    "both sides": lambda: SumAggForSequenceClassification(SumAggConfig(**SHORT, **LABELS, is_causal=False)),
}
BARE = {
    "sums": lambda: SumAggModel(SumAggConfig(**SHORT)),
    "token statistics": lambda: ToSTTextModel(ToSTTextConfig(**SHORT, layerscale_value=0.5)),
}
PROMPTS = random_prompts([1, 2, 31, 32, 33, 64, 150, 400])


def started(model, folder) -> Engine:
    """An engine that reads 64 tokens of a prompt at a time, at most, if the model is causal."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    tokens = {"max_num_batched_tokens": 64} if model.config.is_causal else {}
    return Engine(folder, runner="pooling", max_model_len=512, skip_tokenizer_init=False, **tokens)


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers(kind, tmp_path):
    from vllm import PoolingParams

    torch.manual_seed(0)
    model = randomized(CLASSIFIERS[kind]())
    engine = started(model, tmp_path)
    try:
        outputs = engine.llm.classify(
            [{"prompt_token_ids": prompt} for prompt in PROMPTS],
            pooling_params=PoolingParams(task="classify", use_activation=False),
            use_tqdm=False,
        )
    finally:
        engine.close()
    logits = torch.tensor([output.outputs.probs for output in outputs])
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([prompt])).logits for prompt in PROMPTS])
    assert expected.std(dim=0).min() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", BARE)
def test_embeddings_are_of_the_last_token(kind, tmp_path):
    torch.manual_seed(0)
    model = randomized(BARE[kind]())
    engine = started(model, tmp_path)
    try:
        outputs = engine.llm.embed([{"prompt_token_ids": prompt} for prompt in PROMPTS], use_tqdm=False)
    finally:
        engine.close()
    vectors = torch.tensor([output.outputs.embedding for output in outputs])
    with torch.no_grad():
        last = torch.cat([model(torch.tensor([prompt])).last_hidden_state[:, -1] for prompt in PROMPTS])
    expected = torch.nn.functional.normalize(last, dim=-1)
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)


def test_a_published_classifier_has_no_blocks(tmp_path):
    torch.manual_seed(0)
    config = SumAggConfig(**{**SHORT, "num_hidden_layers": 0}, **LABELS, pooling="sum", position_bias=1.0)
    model = randomized(SumAggForSequenceClassification(config))
    engine = started(model, tmp_path)
    try:
        outputs = engine.llm.classify([{"prompt_token_ids": prompt} for prompt in PROMPTS], use_tqdm=False)
    finally:
        engine.close()
    probabilities = torch.tensor([output.outputs.probs for output in outputs])
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([prompt])).logits for prompt in PROMPTS]).softmax(dim=-1)
    torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-4)


def test_a_window_to_both_sides_is_refused(tmp_path):
    config = SumAggConfig(**SHORT, is_causal=False, layer_types=["summation", "sliding_attention"], sliding_window=32)
    with pytest.raises(ValueError, match="'sliding_attention'"):
        started(SumAggModel(config), tmp_path)
