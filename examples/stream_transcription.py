"""Write down what is said while it is being said: every word once, as soon as it is certain, in constant memory.

    python run_speech_recognition_ctc.py
    python stream_transcription.py --model runs/speech-recognition --input talk.flac
    python stream_transcription.py --model runs/speech-recognition --microphone
    ffmpeg -i talk.mp4 -f s16le -ac 1 -ar 16000 - | python stream_transcription.py --model runs/speech-recognition

A pipe carries 16-bit little-endian samples of one channel. Another rate than the model's is resampled: that of a file
stands in the file, that of a pipe is what --sampling_rate says, and cannot be checked: 8 kHz taken for 16 kHz sounds
twice as fast. The channels of a file are averaged.

A word is printed when the model has heard its end, and never taken back. Ctrl-C saves the state to --state, and with
--resume the next run goes on in the middle of a word: a file from where the first run stopped, a pipe from what comes next.

The model needs a state of constant size: causal, without full attention.
"""

import argparse
import contextlib
import os
import queue
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import soundfile
import soxr
import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCTC,
    AutoProcessor,
)

import modeling_sumagg  # noqa: F401  (registers the models)
from modeling_sumagg.streams.speech_stream import SpeechStream


def read_file(path: Path, chunk_ms: int, first: int) -> tuple[int, Iterator[np.ndarray]]:
    """The sampling rate of an audio file, and its samples from the `first` on, channels averaged."""
    if not path.is_file():
        raise ValueError(f"There is no audio file {str(path)!r}.")
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is empty or no audio file: {error.error_string}") from error
    if not file.frames:
        raise ValueError(f"{path} is empty: it has no samples.")
    file.seek(first)
    size = file.samplerate * chunk_ms // 1000
    blocks = file.blocks(size, dtype="float32", always_2d=True)
    return file.samplerate, (block.mean(axis=1) for block in blocks)


class Stop:
    """Ctrl-C as a flag that is looked at between two chunks only, so that no chunk is lost or heard by half."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, *_) -> None:
        self.asked = True


def read_pipe(source: int, sampling_rate: int, chunk_ms: int, stop: Stop) -> Iterator[np.ndarray]:
    """The 16-bit samples that come from a descriptor, as soon as they come, at most a chunk at once."""
    held, began = b"", True
    while not stop.asked:
        if not select.select([source], [], [], 0.1)[0]:
            continue
        data = os.read(source, 2 * (sampling_rate * chunk_ms // 1000))
        if not data:
            break
        if began and data.startswith((b"RIFF", b"fLaC", b"OggS", b"ID3")):
            raise ValueError(
                "A pipe carries bare 16-bit samples, and this is an audio file: give it as --input, or convert it with "
                "`ffmpeg -i FILE -f s16le -ac 1 -ar 16000 -`."
            )
        began, data = False, held + data
        held = data[len(data) // 2 * 2 :]
        yield np.frombuffer(data[: len(data) // 2 * 2], dtype="<i2").astype(np.float32) / 2**15


def read_microphone(sampling_rate: int, chunk_ms: int, stop: Stop) -> Iterator[np.ndarray]:
    """What the default microphone hears."""
    try:
        import sounddevice
    except (ImportError, OSError) as error:
        raise ValueError(f"--microphone needs `pip install sounddevice` and PortAudio: {error}.") from error
    heard: queue.Queue = queue.Queue()
    options = {"samplerate": sampling_rate, "channels": 1, "dtype": "float32"}
    size = sampling_rate * chunk_ms // 1000
    with sounddevice.InputStream(
        **options, blocksize=size, callback=lambda samples, *_: heard.put(samples[:, 0].copy())
    ):
        while not stop.asked:
            with contextlib.suppress(queue.Empty):
                yield heard.get(timeout=0.1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a checkpoint: a folder or a name on the Hub")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--input", type=Path, help="the audio file to read; standard input by default")
    source.add_argument("--microphone", action="store_true", help="listen to the default microphone")
    parser.add_argument("--sampling_rate", type=int, help="of a pipe, in Hz; the model's by default")
    parser.add_argument("--chunk_ms", type=int, default=100, help="milliseconds of audio to hear at once")
    parser.add_argument("--state", type=Path, help="the safetensors file that Ctrl-C, or the end, writes")
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--times", action="store_true", help="a word a line, after the second at which it was certain")
    parser.add_argument("--threads", type=int, default=1, help="threads of the processor to compute with")
    arguments = parser.parse_args()
    if arguments.resume and not arguments.state:
        parser.error("--resume goes on from --state: name the file.")
    if arguments.chunk_ms < 1 or arguments.threads < 1:
        parser.error("--chunk_ms and --threads must be at least 1.")
    if arguments.sampling_rate and (arguments.input or arguments.microphone):
        parser.error("--sampling_rate is for a pipe: a file names its own, and a microphone has the model's.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    stop = Stop()
    torch.set_num_threads(arguments.threads)
    try:
        model = AutoModelForCTC.from_pretrained(arguments.model)
        stream = SpeechStream(model, AutoProcessor.from_pretrained(arguments.model))
        if arguments.resume:
            stream.load(arguments.state)
        rate = own_rate = stream.features.sampling_rate
        if arguments.input:
            own_rate, pieces = read_file(arguments.input, arguments.chunk_ms, stream.num_samples)
        elif arguments.microphone:
            pieces = read_microphone(rate, arguments.chunk_ms, stop)
        else:
            own_rate = arguments.sampling_rate or rate
            pieces = read_pipe(sys.stdin.fileno(), own_rate, arguments.chunk_ms, stop)
        if own_rate != rate and arguments.state:
            raise ValueError(
                f"Audio of {own_rate} Hz is resampled to {rate} Hz, and the state of that cannot be saved: convert the "
                "audio, or leave out --state."
            )
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    resampler = soxr.ResampleStream(own_rate, rate, 1, dtype="float32") if own_rate != rate else None
    where = arguments.input or ("the microphone" if arguments.microphone else "standard input")
    resampled = f", resampled from {own_rate:,} to {rate:,} Hz" if resampler else ""
    print(f"Writes down what {where} says{resampled}; Ctrl-C stops.", file=sys.stderr)

    busy, began_at = 0.0, stream.num_samples

    def write(words: list[str]) -> None:
        for word in words:
            at = f"{stream.num_samples / own_rate:9.2f} " if arguments.times else ""
            print(f"{at}{word}", end="\n" if arguments.times else " ", flush=True)

    def hear(samples: np.ndarray, last: bool = False) -> None:
        nonlocal busy
        begins = time.perf_counter()
        words = stream.feed(samples if resampler is None else resampler.resample_chunk(samples, last=last))
        busy += time.perf_counter() - begins
        stream.num_samples += len(samples)
        write(words)

    try:
        for samples in pieces:
            hear(samples)
            if stop.asked:
                break
        else:
            hear(np.zeros(0, dtype=np.float32), last=True)
        if not stream.num_samples and not stop.asked:
            raise ValueError(f"{where} has no audio.")
    except ValueError as error:
        sys.exit(f"error: after {stream.num_samples / own_rate:.2f} s: {' '.join(str(error).split())}")
    if arguments.state:
        stream.save(arguments.state)
    if not stop.asked:
        write(stream.finish())
    if not arguments.times:
        print()
    seconds = (stream.num_samples - began_at) / own_rate
    size = sum(tensor.numel() * tensor.element_size() for tensor in stream.tensors().values())
    kept = f" It is in {arguments.state}: --resume goes on." if arguments.state else ""
    print(
        f"{seconds:,.1f} s of audio, real-time factor {busy / max(seconds, 1e-9):.3f} in chunks of "
        f"{arguments.chunk_ms} ms on {torch.get_num_threads()} thread(s). The state has {size:,} bytes.{kept}",
        file=sys.stderr,
    )
    if stop.asked:
        sys.exit(130)


if __name__ == "__main__":
    main()
