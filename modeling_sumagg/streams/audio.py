"""
Recorded sound for speech models: files to samples, and samples to the frames of a feature extractor, all at once or as
they come.

It needs `pip install 'modeling-sumagg[speech]'`.
"""

import io
import os

import numpy as np
from transformers import SequenceFeatureExtractor


try:
    import soundfile  # type: ignore[import-untyped]
    import soxr  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(f"Audio needs {error.name}: run `pip install 'modeling-sumagg[speech]'`.") from error


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


def read_audio(source: str | os.PathLike | bytes, sampling_rate: int = 16000) -> np.ndarray:
    """
    The samples of an audio file as one channel: several channels are averaged, and another sampling rate than the one
    asked for is resampled (soxr, high quality), by the rate that the file itself names.

    Args:
        source (`str`, `os.PathLike` or `bytes`): the file, or what stands in it: wav, flac, ogg, mp3 and whatever else
            libsndfile reads.
        sampling_rate (`int`, defaults to 16000): of the samples to return, in Hz.

    Returns:
        `np.ndarray`: float32 `[samples]`, full scale is -1 to 1.

    Raises:
        `FileNotFoundError`: there is no such file.
        `ValueError`: the file is empty, no audio, shorter than 25 ms, or has samples that are not finite numbers.
    """
    name = "The audio" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes):
        if not os.path.isfile(source):
            raise FileNotFoundError(f"There is no audio file {name!r}.")
        with open(source, "rb") as file:
            source = file.read()
    if not source:
        raise ValueError(f"{name} is empty: 0 bytes.")
    try:
        samples, own_rate = soundfile.read(io.BytesIO(source), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{name} is no audio file that can be read: {error.error_string}") from error
    samples = samples.mean(axis=1)
    check_samples(samples, name)
    if len(samples) < own_rate * 25 // 1000:
        seconds = len(samples) / own_rate
        raise ValueError(f"{name} has {len(samples)} samples, {seconds:.3f} s: 0.025 s, one frame, are the least.")
    if own_rate != sampling_rate:
        samples = soxr.resample(samples, own_rate, sampling_rate)
    return samples


class FeatureStream:
    """
    The frames of audio that arrives in pieces: the same as of the whole at once, whatever the pieces.

    transformers' [`Speech2TextFeatureExtractor`] makes every frame of its own 25 ms (offset, preemphasis and window
    are the frame's own, and there is no padding), 10 ms after the one before: frame `i` is of the samples
    `[hop * i, hop * i + length)`. So all there is to keep are the samples from which the next frame begins, less than
    25 ms.

    Args:
        feature_extractor (`Speech2TextFeatureExtractor`): with `do_ceptral_normalize=False`, as the mean of an
            utterance is not known before its end, and without dither.

    Attributes:
        pending (`np.ndarray`): float32, the samples from the beginning of the next frame on. They are the state: kept
            and put back, they continue the stream.

    Raises:
        `ValueError`: the extractor normalises by the utterance, or adds noise.
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
        self.length, self.hop = self.sampling_rate * 25 // 1000, self.sampling_rate * 10 // 1000
        self.pending = np.zeros(0, dtype=np.float32)

    def feed(self, samples: np.ndarray) -> np.ndarray:
        """
        Args:
            samples (`np.ndarray`): the next samples, any number of them, of one channel, full scale -1 to 1.

        Returns:
            `np.ndarray`: float32 `[F, num_mel_bins]`, the frames that they complete; `F` may be 0.

        Raises:
            `ValueError`: samples that are not finite floating-point numbers of one channel. Nothing of them is kept.
        """
        check_samples(samples)
        waiting = np.concatenate([self.pending, samples.astype(np.float32)])
        frames = max(0, (len(waiting) - self.length) // self.hop + 1)
        if not frames:
            self.pending = waiting
            return np.zeros((0, self.feature_extractor.num_mel_bins), dtype=np.float32)
        whole = waiting[: (frames - 1) * self.hop + self.length]
        self.pending = waiting[frames * self.hop :]
        features = self.feature_extractor(whole, sampling_rate=self.sampling_rate, return_tensors="np")
        return features["input_features"][0].astype(np.float32)


__all__ = ["FeatureStream", "check_samples", "read_audio"]
