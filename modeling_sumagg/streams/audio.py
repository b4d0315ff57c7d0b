"""
Recorded sound for speech models: files to samples, and samples to the frames of a feature extractor, all at once or as
they come.

It needs `pip install 'modeling-sumagg[speech]'`.
"""

import io
import os
from collections.abc import Iterator

import numpy as np
from transformers import SequenceFeatureExtractor


try:
    import soundfile  # type: ignore[import-untyped]
    import soxr  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(f"Audio needs {error.name}: run `pip install 'modeling-sumagg[speech]'`.") from error


# Of what a file may name, in Hz. From a rate of 1 Hz a few KB would be resampled to hundreds of MB.
MIN_RATE, MAX_RATE = 1000, 768_000
# Read at once, of all channels together.
BLOCK_SAMPLES = 1 << 20


def check_samples(samples: np.ndarray, name: str = "The audio") -> None:
    """
    Args:
        samples (`np.ndarray`): what should be samples of one channel, any number of them.
        name (`str`): what to call it in an error.

    Raises:
        `ValueError`: the samples are not floating-point numbers of one channel, or one is not a finite number.
    """
    if samples.ndim != 1:
        raise ValueError(f"{name} must be one channel `[samples]`, got shape {list(samples.shape)}: average channels.")
    if not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"{name} must be floating-point numbers from -1 to 1, got {samples.dtype}: divide 16-bit integers by 32768."
        )
    finite = np.isfinite(samples)
    if not finite.all():
        raise ValueError(
            f"{name} has samples that are not finite numbers, the first of them sample {finite.argmin()}."
        )


def open_audio(source: str | os.PathLike | bytes) -> soundfile.SoundFile:
    """
    Open an audio file for reading.

    Args:
        source (`str`, `os.PathLike` or `bytes`): the file, or its content: wav, flac, ogg, mp3 and whatever else
            libsndfile reads.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: the file is empty, is no audio, names an impossible sampling rate, or does not tell its length.
    """
    name = _name(source)
    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise FileNotFoundError(f"There is no audio file {name!r}.")
    if not (len(source) if isinstance(source, bytes) else os.path.getsize(source)):
        raise ValueError(f"{name} is empty: 0 bytes.")
    if name.lower().endswith(".raw"):
        raise ValueError(f"{name} has no header that tells its format: convert it to wav or flac.")
    try:
        file = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else os.fspath(source))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name} is no audio file that can be read: {error.error_string}") from error
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        raise ValueError(
            f"{name} names a sampling rate of {file.samplerate} Hz; it must be from {MIN_RATE} to {MAX_RATE} Hz."
        )
    if file.frames >= 2**62:
        raise ValueError(
            f"{name} does not tell how long it is: write it anew, for example by `ffmpeg -i FILE new.flac`."
        )
    return file


def read_blocks(file: soundfile.SoundFile, name: str, size: int, first: int = 0) -> Iterator[np.ndarray]:
    """
    The samples of an open file as one channel, in blocks: several channels are averaged.

    Args:
        file (`soundfile.SoundFile`): of [`open_audio`].
        name (`str`): what to call it in an error.
        size (`int`): the samples of a block, at least 1; the last one may have fewer.
        first (`int`, defaults to 0): the sample to begin with.

    Yields:
        `np.ndarray`: float32 `[samples]`, full scale is -1 to 1.

    Raises:
        `ValueError`: the file ends before `first`, or before the length that its header names.
    """
    if first > file.frames:
        raise ValueError(f"{name} has {file.frames} samples, and reading should begin after {first}.")
    read = first
    cut = f"{name} was cut, or its header is wrong: of {file.frames} samples"
    while read < file.frames:
        try:
            if read == first:
                file.seek(first)
            block = file.read(size, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{cut}, those after {read} cannot be read: {error.error_string}") from error
        if not len(block):
            raise ValueError(f"{cut}, it has {read}.")
        read += len(block)
        yield block.mean(axis=1)


def read_audio(source: str | os.PathLike | bytes, sampling_rate: int = 16000) -> np.ndarray:
    """
    The samples of an audio file as one channel: several channels are averaged, and audio of another sampling rate than
    `sampling_rate` is resampled (soxr, high quality), from the rate that the file names.

    Args:
        source (`str`, `os.PathLike` or `bytes`): the file, or its content, as for [`open_audio`].
        sampling_rate (`int`, defaults to 16000): of the samples to return, in Hz.

    Returns:
        `np.ndarray`: float32 `[samples]`, full scale is -1 to 1.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: as [`open_audio`] and [`read_blocks`]; or the audio is shorter than 25 ms, or has samples that are
            not finite numbers.
    """
    name = _name(source)
    with open_audio(source) as file:
        own_rate = file.samplerate
        blocks = list(read_blocks(file, name, max(1, BLOCK_SAMPLES // file.channels)))
    samples = np.concatenate([np.zeros(0, dtype=np.float32), *blocks])
    check_samples(samples, name)
    seconds = len(samples) / own_rate
    if own_rate != sampling_rate:
        samples = soxr.resample(samples, own_rate, sampling_rate)
    if len(samples) < sampling_rate * 25 // 1000:
        raise ValueError(
            f"{name} has {len(samples)} samples at {sampling_rate} Hz, {seconds:.4f} s: 0.025 s, one frame, are the "
            "least."
        )
    return samples


def _name(source: str | os.PathLike | bytes) -> str:
    return "The audio" if isinstance(source, bytes) else str(source)


def frame_sizes(feature_extractor: SequenceFeatureExtractor) -> tuple[int, int]:
    """
    The samples of a frame, and those from one frame to the next, as the extractor itself makes them.

    transformers' [`Speech2TextFeatureExtractor`] makes frames of 25 ms every 10 ms by torchaudio. Without torchaudio it
    makes frames of 400 samples every 160, at any sampling rate.

    Raises:
        `ValueError`: an extractor of other frames.
    """
    rate = feature_extractor.sampling_rate
    for length, hop in ((400, 160), (rate * 25 // 1000, rate * 10 // 1000)):
        made = [
            len(feature_extractor(np.zeros(size, dtype=np.float32), sampling_rate=rate)["input_features"][0])
            for size in (length + hop - 1, length + hop)
        ]
        if made == [1, 2]:
            return length, hop
    raise ValueError(
        f"A stream needs frames that depend on their own 25 ms alone, as those of a `Speech2TextFeatureExtractor`, got a "
        f"{type(feature_extractor).__name__}."
    )


class FeatureStream:
    """
    The frames of audio that arrives in pieces: the same as of the whole at once, whatever the pieces.

    transformers' [`Speech2TextFeatureExtractor`] makes every frame from its own samples (offset, preemphasis and window
    are the frame's own, and there is no padding): frame `i` is of the samples `[hop * i, hop * i + length)`. So a stream
    keeps only the samples from the beginning of the next frame on, fewer than `length`.

    Args:
        feature_extractor (`Speech2TextFeatureExtractor`): with `do_ceptral_normalize=False`, as the mean of an
            utterance is not known before its end, and without dither.

    Attributes:
        length, hop (`int`): the samples of a frame, and those from one frame to the next.
        pending (`np.ndarray`): float32, the samples from the beginning of the next frame on. They are the state: kept
            and put back, they continue the stream.

    Raises:
        `ValueError`: the extractor normalises by the utterance, adds noise, or makes other frames.
    """

    def __init__(self, feature_extractor: SequenceFeatureExtractor):
        if getattr(feature_extractor, "do_ceptral_normalize", False):
            raise ValueError(
                "The feature extractor normalises by the mean of a whole utterance, which a stream does not know: make "
                "it with `do_ceptral_normalize=False`."
            )
        if getattr(feature_extractor, "dither", 0.0):
            raise ValueError(f"A stream is exact without noise: set `dither=0.0`, got {feature_extractor.dither}.")
        self.feature_extractor = feature_extractor
        self.sampling_rate = feature_extractor.sampling_rate
        self.length, self.hop = frame_sizes(feature_extractor)
        self.pending = np.zeros(0, dtype=np.float32)

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """
        Args:
            samples (`np.ndarray`): the next samples, any number of them, of one channel, full scale -1 to 1.

        Returns:
            `np.ndarray`: float32 `[F, num_mel_bins]`, the frames that they complete; `F` may be 0.

        Raises:
            `ValueError`: samples that are not finite floating-point numbers of one channel, or too large for float32.
                Nothing of them is kept.
        """
        check_samples(samples)
        waiting = np.concatenate([self.pending, samples.astype(np.float32)])
        frames = max(0, (len(waiting) - self.length) // self.hop + 1)
        if not frames:
            self.pending = waiting
            return np.zeros((0, self.feature_extractor.num_mel_bins), dtype=np.float32)
        whole = waiting[: (frames - 1) * self.hop + self.length]
        features = self.feature_extractor(whole, sampling_rate=self.sampling_rate, return_tensors="np")
        features = features["input_features"][0].astype(np.float32)
        if not np.isfinite(features).all():
            raise ValueError(f"The audio must be numbers from -1 to 1, got {np.abs(samples).max():.3g}.")
        self.pending = waiting[frames * self.hop :].copy()
        return features


__all__ = ["MAX_RATE", "MIN_RATE", "FeatureStream", "check_samples", "open_audio", "read_audio", "read_blocks"]
