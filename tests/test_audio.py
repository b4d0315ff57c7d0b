"""Audio files as samples, and the frames of audio that arrives in pieces."""

import io

import numpy as np
import pytest
from transformers import Speech2TextFeatureExtractor


soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from modeling_sumagg.streams.audio import FeatureStream, check_samples, read_audio  # noqa: E402


@pytest.fixture
def extractor() -> Speech2TextFeatureExtractor:
    return Speech2TextFeatureExtractor(do_ceptral_normalize=False)


def tone(seconds: float, sampling_rate: int, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * sampling_rate)) / sampling_rate)).astype(
        "float32"
    )


def file_of(samples: np.ndarray, sampling_rate: int = 16000, subtype: str = "FLOAT") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, sampling_rate, format="WAV", subtype=subtype)
    return file.getvalue()


def pieces(samples: np.ndarray, size: int | None) -> list[np.ndarray]:
    if size is not None:
        return [samples[start : start + size] for start in range(0, len(samples), size)]
    draw = np.random.default_rng(0)
    ends = np.sort(draw.integers(0, len(samples), 20))
    return np.split(samples, ends)


@pytest.mark.parametrize("size", [1, 7, 160, 399, 400, 1600, None])
def test_frames_of_pieces_are_those_of_the_whole(extractor, size):
    length = 1100 if size == 1 else 12345
    samples = np.random.default_rng(1).normal(scale=0.1, size=length).astype(np.float32)
    whole = extractor(samples, sampling_rate=16000, return_tensors="np")["input_features"][0]
    stream = FeatureStream(extractor)
    made = [stream.feed(piece) for piece in pieces(samples, size)]
    assert all(frames.dtype == np.float32 for frames in made)
    np.testing.assert_array_equal(np.concatenate(made), whole)
    assert len(whole) == (length - 400) // 160 + 1
    np.testing.assert_array_equal(stream.pending, samples[160 * len(whole) :])


def test_a_frame_is_of_its_own_25_milliseconds(extractor):
    """The log mel energies of one frame, written out as Kaldi defines them."""
    samples = np.random.default_rng(2).normal(scale=0.1, size=2000).astype(np.float32)
    frame = samples[320:720].astype(np.float64) * 2**15
    frame -= frame.mean()
    frame = np.append(frame[0] * (1 - 0.97), frame[1:] - 0.97 * frame[:-1])
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    power = np.abs(np.fft.rfft(frame * window, 512)) ** 2

    def mel(hertz):
        return 1127 * np.log(1 + hertz / 700)

    edges = np.linspace(mel(20), mel(8000), 82)
    bins = mel(np.arange(257) * 16000 / 512)
    low, center, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    filters = np.clip(np.minimum((bins - low) / (center - low), (high - bins) / (high - center)), 0, None)
    expected = np.log(np.maximum(filters @ power, 1.192092955078125e-07))
    np.testing.assert_allclose(FeatureStream(extractor).feed(samples)[2], expected, rtol=1e-4)


def test_the_pending_samples_are_the_state(extractor):
    samples = np.random.default_rng(3).normal(scale=0.1, size=5000).astype(np.float32)
    whole = FeatureStream(extractor).feed(samples)
    before, after = FeatureStream(extractor), FeatureStream(extractor)
    first = before.feed(samples[:2345])
    assert before.pending.nbytes < 4 * 400
    after.pending = before.pending.copy()
    np.testing.assert_array_equal(np.concatenate([first, after.feed(samples[2345:])]), whole)


def test_samples_that_are_no_numbers_are_refused_and_not_kept(extractor):
    stream = FeatureStream(extractor)
    stream.feed(np.zeros(500, dtype=np.float32))
    pending = stream.pending.copy()
    broken = np.zeros(300, dtype=np.float32)
    broken[17] = np.nan
    with pytest.raises(ValueError, match="not finite numbers, the first of them sample 17"):
        stream.feed(broken)
    np.testing.assert_array_equal(stream.pending, pending)


def test_an_extractor_that_cannot_stream_is_refused():
    with pytest.raises(ValueError, match="do_ceptral_normalize=False"):
        FeatureStream(Speech2TextFeatureExtractor())
    with pytest.raises(ValueError, match=r"dither=0.0`, got 1.0"):
        FeatureStream(Speech2TextFeatureExtractor(do_ceptral_normalize=False, dither=1.0))


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((400, 2), dtype=np.float32), r"one channel `\[samples\]`, got shape \[400, 2\]"),
        (np.zeros(400, dtype=np.int16), "got int16: divide 16-bit integers by 32768"),
        (np.full(400, np.inf, dtype=np.float32), "not finite numbers, the first of them sample 0"),
    ],
)
def test_samples_of_another_kind_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        check_samples(samples)


def test_a_16_bit_file_is_read_at_full_scale(tmp_path):
    values = np.array([0, 1, -1, 16384, -32768] * 100, dtype=np.int16)
    (tmp_path / "a.wav").write_bytes(file_of(values, subtype="PCM_16"))
    samples = read_audio(tmp_path / "a.wav")
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, values / np.float32(32768))


def test_channels_are_averaged():
    left, right = tone(0.1, 16000), np.zeros(1600, dtype=np.float32)
    np.testing.assert_allclose(read_audio(file_of(np.stack([left, right], axis=1))), left / 2, atol=1e-7)


@pytest.mark.parametrize("own_rate", [8000, 22050, 48000])
def test_another_sampling_rate_is_resampled(own_rate):
    samples = read_audio(file_of(tone(1.0, own_rate), own_rate), 16000)
    assert len(samples) == pytest.approx(16000, abs=2)
    # The same tone, at 16 kHz: its ends are where the filter has half of it.
    np.testing.assert_allclose(samples[2000:14000], tone(1.0, 16000)[2000:14000], atol=2e-3)


def test_8_khz_given_as_16_khz_is_refused_where_the_rate_is_named(extractor):
    with pytest.raises(ValueError, match="8000"):
        extractor(tone(1.0, 8000), sampling_rate=8000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty: 0 bytes"),
        (b"no audio at all" * 10, "no audio file that can be read"),
        (
            file_of(np.zeros(0, dtype=np.float32)),
            "has 0 samples at 16000 Hz, 0.0000 s: 0.025 s, one frame, are the least",
        ),
        (file_of(np.zeros(399, dtype=np.float32)), "has 399 samples at 16000 Hz, 0.0249 s"),
        (
            file_of(np.append(tone(0.1, 16000), np.float32(np.nan))),
            "not finite numbers, the first of them sample 1600",
        ),
    ],
    # Files hold the time at which they were made, and so no two processes would have the same names.
    ids=["empty", "no audio", "no samples", "too short", "not finite"],
)
def test_files_that_are_no_speech_are_refused(data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_audio(data)
    (tmp_path / "broken.wav").write_bytes(data)
    with pytest.raises(ValueError, match=f"broken.wav .*{message}"):
        read_audio(tmp_path / "broken.wav")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no audio file '.*nothing.wav'"):
        read_audio(tmp_path / "nothing.wav")


def test_silence_and_a_click_have_finite_frames(extractor):
    for samples in (np.zeros(800, dtype=np.float32), np.eye(1, 800, 400, dtype=np.float32)[0]):
        assert np.isfinite(FeatureStream(extractor).feed(samples)).all()
