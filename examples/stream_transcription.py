"""Write down what is said while it is being said: every word once, as soon as it is certain, in constant memory.

    python run_speech_recognition_ctc.py
    python stream_transcription.py --model runs/speech-recognition --input talk.flac
    python stream_transcription.py --model runs/speech-recognition --microphone
    ffmpeg -i talk.mp4 -f s16le -ac 1 -ar 16000 - | python stream_transcription.py --model runs/speech-recognition

A pipe carries 16-bit little-endian samples of one channel. Another rate than the model's is resampled: that of a file
stands in the file, that of a pipe is what --sampling_rate says, and cannot be checked: 8 kHz taken for 16 kHz sounds
twice as fast. The channels of a file are averaged.

A word is printed when the model has heard its end, and never taken back. The state is saved to --state every minute, and
at Ctrl-C, SIGTERM, SIGHUP or when nobody reads the output any more. With --resume the next run continues in the middle of
a word: a file from the sample at which the first run stopped, a pipe with what comes next.

The model needs a state of constant size: causal, without full attention.
"""

import argparse
import contextlib
import os
import queue
import select
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import soxr
import torch
from transformers import AutoModelForCTC, AutoProcessor

import modeling_sumagg  # noqa: F401  (registers the models)
from modeling_sumagg.streams.audio import MAX_RATE, MIN_RATE, open_audio, read_blocks
from modeling_sumagg.streams.speech_stream import SpeechStream
from modeling_sumagg.streams.stream_scripts import (
    Interruptions,
    StateFile,
    spell_out_controls,
    standard_input,
    user_errors,
    whole_number,
)


def read_file(path: Path, chunk_ms: int, first: int) -> tuple[int, Iterator[np.ndarray]]:
    """The sampling rate of an audio file, and its samples from the `first` on, channels averaged."""
    file = open_audio(path)
    if not file.frames:
        raise ValueError(f"{path} is empty: it has no samples.")
    if file.frames < first:
        raise ValueError(
            f"{path} has {file.frames:,} samples, and the state has heard {first:,}: it was cut, or it is another file."
        )
    return file.samplerate, read_blocks(file, str(path), max(1, file.samplerate * chunk_ms // 1000), first)


def read_pipe(source: int, sampling_rate: int, chunk_ms: int, stop: Interruptions) -> Iterator[np.ndarray]:
    """
    The 16-bit samples that come from a descriptor, as soon as they come, at most a chunk at once.

    Half a sample stays in the pipe until its other half comes, so that a next reader of the pipe begins with a sample.
    """
    # POSIX alone has these modules; files are read without them.
    import fcntl
    import struct
    import termios

    size = 2 * max(1, sampling_rate * chunk_ms // 1000)
    is_file = stat.S_ISREG(os.fstat(source).st_mode)
    poll = select.poll()
    poll.register(source, select.POLLIN)
    began = True
    while not stop.asked:
        events = dict(poll.poll(100)).get(source, 0)
        if not events:
            continue
        waiting = size
        # Devices such as /dev/null do not tell how many bytes wait.
        with contextlib.suppress(OSError):
            if not is_file:
                (waiting,) = struct.unpack("i", fcntl.ioctl(source, termios.FIONREAD, bytes(4)))
        if waiting == 1 and not events & select.POLLHUP:
            time.sleep(0.01)
            continue
        data = os.read(source, min(size, waiting // 2 * 2))
        if not data:
            break
        if began and data.startswith((b"RIFF", b"fLaC", b"OggS", b"ID3")):
            raise ValueError(
                "A pipe carries bare 16-bit samples, and this is an audio file: give it as --input, or convert it with "
                "`ffmpeg -i FILE -f s16le -ac 1 -ar 16000 -`."
            )
        began = False
        yield np.frombuffer(data[: len(data) // 2 * 2], dtype="<i2").astype(np.float32) / 2**15


def read_microphone(sampling_rate: int, chunk_ms: int, stop: Interruptions) -> Iterator[np.ndarray]:
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
    parser.add_argument(
        "--sampling_rate", type=whole_number(MIN_RATE, MAX_RATE), help="of a pipe, in Hz; the model's by default"
    )
    parser.add_argument(
        "--chunk_ms", type=whole_number(1, 60_000), default=100, help="milliseconds of audio to hear at once"
    )
    parser.add_argument("--state", type=Path, help="the safetensors file that keeps the state")
    parser.add_argument("--resume", action="store_true", help="continue from --state")
    parser.add_argument("--times", action="store_true", help="a word a line, after the second at which it was certain")
    parser.add_argument("--threads", type=whole_number(1), default=1, help="threads of the processor to compute with")
    arguments = parser.parse_args()
    if arguments.resume and not arguments.state:
        parser.error("--resume continues from --state: name the file.")
    if arguments.sampling_rate and (arguments.input or arguments.microphone):
        parser.error("--sampling_rate is for a pipe: a file names its own, and a microphone has the model's.")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    interruptions = Interruptions()
    torch.set_num_threads(arguments.threads)
    with user_errors():
        model = AutoModelForCTC.from_pretrained(arguments.model)
        stream = SpeechStream(model, AutoProcessor.from_pretrained(arguments.model))
        state = StateFile(arguments.state, stream, arguments.resume) if arguments.state else None
        rate = own_rate = stream.features.sampling_rate
        if arguments.input:
            own_rate, pieces = read_file(arguments.input, arguments.chunk_ms, stream.num_samples)
        elif arguments.microphone:
            pieces = read_microphone(rate, arguments.chunk_ms, interruptions)
        else:
            own_rate = arguments.sampling_rate or rate
            pieces = read_pipe(standard_input(), own_rate, arguments.chunk_ms, interruptions)
        if own_rate != rate and arguments.state:
            raise ValueError(
                f"Audio of {own_rate} Hz is resampled to {rate} Hz, and the state of that cannot be saved: convert the "
                "audio, or leave out --state."
            )
        if state is not None:
            state.save()
    resampler = soxr.ResampleStream(own_rate, rate, 1, dtype="float32") if own_rate != rate else None
    where = arguments.input or ("the microphone" if arguments.microphone else "standard input")
    resampled = f", resampled from {own_rate:,} to {rate:,} Hz" if resampler else ""
    print(f"Writes down what {where} says{resampled}; Ctrl-C stops.", file=sys.stderr)

    busy, began_at = 0.0, stream.num_samples

    def write(words: list[str]) -> None:
        for word in words:
            at = f"{stream.num_samples / rate:9.2f} " if arguments.times else ""
            interruptions.write(f"{at}{spell_out_controls(word)}" + ("\n" if arguments.times else " "))

    def hear(samples: np.ndarray, last: bool = False) -> None:
        nonlocal busy
        begins = time.perf_counter()
        words = stream.feed(samples if resampler is None else resampler.resample_chunk(samples, last=last))
        busy += time.perf_counter() - begins
        write(words)

    problem = None
    try:
        for samples in pieces:
            hear(samples)
            if interruptions.asked is not None:
                break
            if state is not None:
                state.save_if_due()
        else:
            hear(np.zeros(0, dtype=np.float32), last=True)
        if not stream.num_samples and interruptions.asked is None:
            raise ValueError(f"{where} has no audio.")
    except (OSError, ValueError) as error:
        problem = error
    with user_errors(f"after {stream.num_samples / rate:.2f} s: "):
        if state is not None:
            state.save()
        if problem is not None:
            raise problem
    if interruptions.asked is None:
        write(stream.finish())
    if not arguments.times:
        interruptions.write("\n")
    seconds = (stream.num_samples - began_at) / rate
    size = sum(tensor.numel() * tensor.element_size() for tensor in stream.tensors().values())
    kept = f" It is in {arguments.state}: --resume continues." if arguments.state else ""
    print(
        f"{seconds:,.1f} s of audio, real-time factor {busy / max(seconds, 1e-9):.3f} in chunks of "
        f"{arguments.chunk_ms} ms on {torch.get_num_threads()} thread(s). The state has {size:,} bytes.{kept}",
        file=sys.stderr,
    )
    interruptions.leave()


if __name__ == "__main__":
    main()
