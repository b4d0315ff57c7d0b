"""`transformers.pipeline` over every class that has one: a padded batch gives what the model makes of each input alone.

transformers' own pipeline tests need modules that its source distribution lacks, and tiny models of the Hub.
"""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from testing import WORDS, build, speech_processor, tiny_config, word_tokenizer
from transformers import pipeline
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_sumagg import (
    SumAggForAudioClassification,
    SumAggForCausalLM,
    SumAggForCTC,
    SumAggForMaskedLM,
    SumAggForSequenceClassification,
    SumAggForTokenClassification,
    SumAggModel,
    ToSTForCausalLM,
    ToSTForImageClassification,
    ToSTModel,
    ToSTTextForSequenceClassification,
    ToSTTextForTokenClassification,
    ToSTTextModel,
)
from modeling_sumagg.models.modeling_tost import tost_image_processor


TEXTS = ["w5 w9 w2 w30 w7 w7", "w3 w4", "w11 w2 w8"]
NEW_TOKENS = 5
LABELS = {0: "ant", 1: "bee", 2: "cat"}
IMAGES = [
    Image.fromarray(np.random.default_rng(0).integers(256, size=size, dtype=np.uint8))
    for size in ((40, 30, 3), (20, 50, 3), (16, 16, 3))
]


def tones(length: int) -> np.ndarray:
    """So many samples, 16,000 a second, of tones of 50 ms."""
    generator = np.random.default_rng(length)
    frequencies = generator.uniform(100, 7000, size=length // 800 + 1).repeat(800)[:length]
    return 0.3 * np.sin(2 * np.pi * np.cumsum(frequencies) / 16000) + generator.normal(size=length, scale=0.01)


SOUNDS = [tones(length) for length in (16000, 9000, 4000)]
STATISTICS = {"feature_mean": [12.0] * 5, "feature_std": [4.0] * 5}


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([[WORDS.index(word) for word in text.split()]])


@pytest.fixture(params=["left", "right"])
def padding_side(request):
    return request.param


@pytest.fixture
def make_pipeline(tmp_path):
    """The pipeline of a task over a tiny checkpoint, found through the Auto classes; and the model."""

    def make(task, model_class, preprocessor=None, **config):
        model = build(model_class, tiny_config(model_class, **config))
        model.save_pretrained(tmp_path)
        (preprocessor or tost_image_processor(model.config)).save_pretrained(tmp_path)
        with CaptureLogger(logging.get_logger("transformers.pipelines.base")) as log:
            made = pipeline(task, model=str(tmp_path), device="cpu")
        assert "not supported" not in log.out
        assert type(made.model) is model_class
        return made, model

    return make


def scores(entries) -> dict:
    return {entry["label"]: pytest.approx(entry["score"], rel=1e-4) for entry in entries}


@pytest.mark.parametrize("model_class", [SumAggForCausalLM, ToSTForCausalLM])
@torch.no_grad()
def test_text_generation(model_class, padding_side, make_pipeline):
    tokenizer = word_tokenizer(padding_side)
    generate, model = make_pipeline("text-generation", model_class, tokenizer)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "return_full_text": False}
    results = generate(TEXTS, batch_size=len(TEXTS), **options)
    for text, (result,) in zip(TEXTS, results, strict=True):
        ids = ids_of(text)
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        expected = tokenizer.decode(ids[0, -NEW_TOKENS:], skip_special_tokens=True)
        assert result["generated_text"].split() == expected.split()


@torch.no_grad()
def test_fill_mask(padding_side, make_pipeline):
    fill, model = make_pipeline("fill-mask", SumAggForMaskedLM, word_tokenizer(padding_side))
    texts = [f"{TEXTS[0]} <mask> w1", "<mask> w4", "w8 <mask>"]
    for text, result in zip(texts, fill(texts, batch_size=len(texts), top_k=3), strict=True):
        ids = ids_of(text)
        expected = model(ids).logits[ids == WORDS.index("<mask>")][0].softmax(-1).topk(3)
        assert [entry["token"] for entry in result] == expected.indices.tolist()
        assert [entry["score"] for entry in result] == pytest.approx(expected.values.tolist(), rel=1e-4)


@pytest.mark.parametrize("model_class", [SumAggForSequenceClassification, ToSTTextForSequenceClassification])
@torch.no_grad()
def test_text_classification(model_class, padding_side, make_pipeline):
    classify, model = make_pipeline("text-classification", model_class, word_tokenizer(padding_side), id2label=LABELS)
    for text, result in zip(TEXTS, classify(TEXTS, batch_size=len(TEXTS), top_k=None), strict=True):
        expected = model(ids_of(text)).logits[0].softmax(-1).tolist()
        assert scores(result) == dict(zip(LABELS.values(), expected, strict=True))


@pytest.mark.parametrize("model_class", [SumAggForTokenClassification, ToSTTextForTokenClassification])
@torch.no_grad()
def test_token_classification(model_class, padding_side, make_pipeline):
    classify, model = make_pipeline("token-classification", model_class, word_tokenizer(padding_side), id2label=LABELS)
    for text, result in zip(TEXTS, classify(TEXTS, batch_size=len(TEXTS)), strict=True):
        expected = model(ids_of(text)).logits[0].softmax(-1).max(-1)
        assert [entry["word"] for entry in result] == text.split()
        assert [entry["entity"] for entry in result] == [LABELS[index] for index in expected.indices.tolist()]
        assert [entry["score"] for entry in result] == pytest.approx(expected.values.tolist(), rel=1e-4)


@pytest.mark.parametrize("model_class", [SumAggModel, ToSTTextModel])
@torch.no_grad()
def test_feature_extraction(model_class, padding_side, make_pipeline):
    extract, model = make_pipeline("feature-extraction", model_class, word_tokenizer(padding_side))
    for text, features in zip(TEXTS, extract(TEXTS, batch_size=len(TEXTS), return_tensors=True), strict=True):
        expected = model(ids_of(text)).last_hidden_state[0]
        length = len(expected)
        real = features[0, -length:] if padding_side == "left" else features[0, :length]
        torch.testing.assert_close(real, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_image_classification(make_pipeline):
    classify, model = make_pipeline("image-classification", ToSTForImageClassification, id2label=LABELS)
    processor = tost_image_processor(model.config)
    for image, result in zip(IMAGES, classify(IMAGES, batch_size=len(IMAGES)), strict=True):
        expected = model(**processor(image, return_tensors="pt")).logits[0].softmax(-1).tolist()
        assert scores(result) == dict(zip(LABELS.values(), expected, strict=True))


@torch.no_grad()
def test_image_feature_extraction(make_pipeline):
    extract, model = make_pipeline("image-feature-extraction", ToSTModel)
    processor = tost_image_processor(model.config)
    for image, features in zip(IMAGES, extract(IMAGES, batch_size=len(IMAGES), return_tensors=True), strict=True):
        expected = model(**processor(image, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_automatic_speech_recognition(make_pipeline, tmp_path):
    processor = speech_processor(tmp_path)
    settings = {"vocab_size": len(processor.tokenizer), **STATISTICS}
    recognise, model = make_pipeline("automatic-speech-recognition", SumAggForCTC, processor, **settings)
    results = recognise(SOUNDS, batch_size=len(SOUNDS), return_timestamps="char")
    assert len({result["text"] for result in results}) == len(SOUNDS)
    for sound, result in zip(SOUNDS, results, strict=True):
        inputs = processor(sound, sampling_rate=16000, return_tensors="pt")
        path = model(**inputs).logits[0].argmax(-1).tolist()
        assert result["text"] == processor.decode(path)
        # A token of 40 ms, from the place where it begins.
        symbols = [(symbol, len(list(group))) for symbol, group in itertools.groupby(path)]
        ends = list(itertools.accumulate(length for _, length in symbols))
        expected = [
            (processor.tokenizer.convert_ids_to_tokens(symbol).replace("|", " "), 0.04 * (end - length))
            for (symbol, length), end in zip(symbols, ends, strict=True)
            if symbol != model.config.pad_token_id
        ]
        found = [(chunk["text"], pytest.approx(chunk["timestamp"][0])) for chunk in result["chunks"]]
        assert expected == found


@torch.no_grad()
def test_audio_classification(make_pipeline, tmp_path):
    extractor = speech_processor(tmp_path).feature_extractor
    settings = {"id2label": LABELS, **STATISTICS}
    classify, model = make_pipeline("audio-classification", SumAggForAudioClassification, extractor, **settings)
    for sound, result in zip(SOUNDS, classify(SOUNDS, batch_size=len(SOUNDS), top_k=3), strict=True):
        expected = model(**extractor(sound, sampling_rate=16000, return_tensors="pt")).logits[0].softmax(-1).tolist()
        assert scores(result) == dict(zip(LABELS.values(), expected, strict=True))
