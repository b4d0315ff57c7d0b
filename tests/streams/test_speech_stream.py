"""Speech that arrives in pieces: frames at any rate and dtype, words without end, batches whose rows end early."""

import numpy as np
import pytest
import torch
from testing import assert_close, build, speech_config
from transformers import Speech2TextFeatureExtractor, WhisperFeatureExtractor


pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from modeling_sumagg import SumAggForAudioClassification
from modeling_sumagg.streams.audio import FeatureStream
from modeling_sumagg.streams.speech_stream import WORD_SYMBOLS, SpeechStream

from .conftest import shared_model, speech_model


def noise(seconds: float, rate: int = 16000) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(int(seconds * rate)) * 0.1).astype(np.float32)


class Framed25Milliseconds:
    """The frames of torchaudio, which are 25 ms at any rate; here each is the sum and the last of its samples."""

    num_mel_bins = 2

    def __init__(self, sampling_rate: int):
        self.sampling_rate = sampling_rate

    def __call__(self, samples, sampling_rate, return_tensors=None):
        length, hop = sampling_rate // 40, sampling_rate // 100
        starts = range(0, len(samples) - length + 1, hop)
        frames = [[samples[start : start + length].sum(), samples[start + length - 1]] for start in starts]
        return {"input_features": np.array([frames], dtype=np.float32)}


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 48000])
@pytest.mark.parametrize("extractor_class", [Speech2TextFeatureExtractor, Framed25Milliseconds])
def test_frames_of_pieces_are_those_of_the_whole_at_any_rate(extractor_class, rate):
    if extractor_class is Speech2TextFeatureExtractor:
        extractor = extractor_class(do_ceptral_normalize=False, sampling_rate=rate, num_mel_bins=8)
    else:
        extractor = extractor_class(rate)
    samples = noise(0.5, rate)
    whole = extractor(samples, sampling_rate=rate)["input_features"][0]
    stream = FeatureStream(extractor)
    frames = np.concatenate([stream.feed(piece) for piece in np.array_split(samples, 7)])
    np.testing.assert_array_equal(frames, whole)
    assert len(frames) > 20 and len(stream.pending) < stream.length


def test_an_extractor_of_other_frames_is_refused():
    with pytest.raises(ValueError, match="as those of a `Speech2TextFeatureExtractor`, got a WhisperFeatureExtractor"):
        FeatureStream(WhisperFeatureExtractor())


def test_samples_that_overflow_are_refused_and_not_kept():
    stream = FeatureStream(Speech2TextFeatureExtractor(do_ceptral_normalize=False))
    stream.feed(noise(0.05))
    pending = stream.pending.copy()
    with pytest.raises(ValueError, match=r"numbers from -1 to 1, got 3e\+38"), np.errstate(all="ignore"):
        stream.feed(np.full(400, 3e38, dtype=np.float32))
    np.testing.assert_array_equal(stream.pending, pending)


def test_frames_are_not_rounded_before_they_are_standardised(processor):
    """In bfloat16 a stream is as exact as a pass over the whole, whose frames stay float32 until then."""
    samples = noise(3)
    frames = processor.feature_extractor(samples, sampling_rate=16000, return_tensors="pt")["input_features"]
    statistics = {"feature_mean": frames[0].mean(0).tolist(), "feature_std": (frames[0].std(0) / 50).tolist()}
    model = speech_model("pure", **statistics).bfloat16()
    with torch.no_grad():
        whole = model(frames).logits[0]
    heard = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: (outputs := forward(*args, **kwargs), heard.append(outputs.logits[0]))[0]
    stream = SpeechStream(model, processor)
    for piece in np.array_split(samples, 9):
        stream.feed(piece)
    assert_close(torch.cat(heard), whole, rtol=0.02)


def test_a_word_without_end_comes_in_pieces_and_the_state_keeps_its_size(processor):
    draw = np.random.default_rng(1)
    sound = noise(60) * np.repeat(10 ** draw.uniform(-3, 0, 1500), 640).astype(np.float32)
    frames = processor(sound, sampling_rate=16000, return_tensors="pt")["input_features"]
    model = speech_model(feature_mean=frames[0].mean(0).tolist(), feature_std=frames[0].std(0).tolist())
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 3)
        # No blank, no end of a word.
        model.lm_head.bias[:2] = -1000
    stream, words, sizes = SpeechStream(model, processor), [], set()
    for second in np.split(sound, 60):
        words += stream.feed(second)
        sizes.add(sum(tensor.nbytes for tensor in stream.tensors().values()))
    words += stream.finish()
    assert len(sizes) == 1 and len(words) > 2
    assert {len(word) for word in words[:-1]} == {WORD_SYMBOLS}
    with torch.no_grad():
        whole = processor.batch_decode(model(frames).logits.argmax(-1))[0]
    assert "".join(words) == whole


@pytest.mark.parametrize("offsets", ["output_word_offsets", "output_char_offsets"])
def test_a_row_that_ends_early_has_the_text_and_the_times_of_the_row_alone(processor, offsets):
    torch.manual_seed(1)
    model, lengths = speech_model("pure"), [120, 61, 3, 90]
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 3)
        # Words end about every second symbol.
        model.lm_head.weight[1], model.lm_head.bias[1] = 0, 26
    frames = torch.randn(4, 120, 5)
    mask = (torch.arange(120)[None] < torch.tensor(lengths)[:, None]).long()

    def decoded(*inputs):
        with torch.no_grad():
            symbols = model(*inputs).logits.argmax(-1)
        made = processor.tokenizer.batch_decode(symbols, **{offsets: True})
        return list(zip(made["text"], made[offsets.removeprefix("output_")], strict=True))

    batch = decoded(frames, mask)
    alone = [
        decoded(row[None, :length])[0] if length > 3 else ("", []) for row, length in zip(frames, lengths, strict=True)
    ]
    assert batch == alone and len(alone[1][1]) > 1


def test_models_that_do_not_stream_are_refused(processor):
    classifier = build(SumAggForAudioClassification, speech_config("pure"))
    for model, message in (
        (speech_model("pure", is_causal=False), "A bidirectional model needs the whole recording at once"),
        (speech_model("hybrid"), r"Layers \[1\] of the model attend to the whole audio"),
        (classifier, "A SumAggForAudioClassification needs the whole recording at once"),
        (shared_model("means"), "A model of type 'sumagg' cannot hear a stream of audio"),
    ):
        with pytest.raises(ValueError, match=message + ".*run_speech_recognition_ctc.py"):
            SpeechStream(model, processor)
