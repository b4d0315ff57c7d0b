"""Read a text without end, keep its constant-size state, and at any moment score it or write on.

    python quickstart.py
    tail -f log.txt | python stream_generation.py --model runs/quickstart --state state.safetensors --report_every 10000

Every `--report_every` tokens, on SIGUSR1 and at the end of the input, it prints a line: how many tokens it has read,
their perplexity, and how the model would go on. Ctrl-C saves the state; with `--resume` the next run goes on from it as
if there had been no interruption: a file is read from where the first run stopped, a pipe from what comes next.

The model needs a state of constant size and positions without end: no full attention, no learned positions. That of
quickstart.py has both.
"""

import argparse
import json
import os
import select
import signal
import sys
import time
from pathlib import Path


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_sumagg  # noqa: F401  (registers the models)
from modeling_sumagg.streams.text_stream import TextStream


READ_BYTES = 1 << 16


class Signals:
    """Signals as flags, looked at between two chunks only, and a descriptor that becomes readable when one comes."""

    def __init__(self):
        self.stop = self.report = False
        self.readable, writable = os.pipe()
        os.set_blocking(writable, False)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        signal.signal(signal.SIGINT, self._stop)
        signal.signal(signal.SIGUSR1, self._report)

    def _stop(self, *_) -> None:
        self.stop = True

    def _report(self, *_) -> None:
        self.report = True


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a checkpoint: a folder or a name on the Hub")
    parser.add_argument("--input", type=Path, help="the file to read; standard input by default")
    parser.add_argument("--state", type=Path, required=True, help="the safetensors file that Ctrl-C writes")
    parser.add_argument("--resume", action="store_true", help="go on from --state")
    parser.add_argument("--chunk_bytes", type=int, default=READ_BYTES, help="the most bytes to read at once")
    parser.add_argument(
        "--report_every", type=int, default=0, help="tokens from one report to the next; 0: at the end"
    )
    parser.add_argument("--max_new_tokens", type=int, default=50, help="length of a continuation; 0: only score")
    parser.add_argument("--do_sample", action="store_true", help="sample the continuations; greedy by default")
    parser.add_argument("--json", action="store_true", help="reports for programs, with the ids of the continuation")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    signals = Signals()
    try:
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        stream = TextStream(model, AutoTokenizer.from_pretrained(arguments.model))
        source = sys.stdin.fileno() if arguments.input is None else os.open(arguments.input, os.O_RDONLY)
        if arguments.resume:
            stream.load(arguments.state)
            if arguments.input is not None:
                os.lseek(source, stream.num_bytes, os.SEEK_SET)
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    every = f"every {arguments.report_every:,} tokens and " if arguments.report_every else ""
    print(
        f"Reads {arguments.input or 'standard input'} and reports {every}at its end; Ctrl-C saves the state to "
        f"{arguments.state} and stops.",
        file=sys.stderr,
    )

    reported, began, began_at = stream.num_tokens, time.monotonic(), stream.num_tokens

    def report() -> None:
        nonlocal reported
        reported = stream.num_tokens
        tokens = []
        if arguments.max_new_tokens:
            tokens = stream.continuation(arguments.max_new_tokens, arguments.seed, do_sample=arguments.do_sample)
        text, perplexity = stream.tokenizer.decode(tokens, skip_special_tokens=True), stream.perplexity()
        if arguments.json:
            line = {"num_tokens": reported, "perplexity": perplexity, "tokens": tokens, "text": text}
            print(json.dumps(line), flush=True)
        else:
            text = " ".join(text.split())
            print(f"{reported:,} tokens, perplexity {perplexity:.4g}, and on: {text}", flush=True)

    def read_on(data: bytes) -> None:
        """Feed the stream, and stop for every report that becomes due: a byte is a token at the most."""
        while data:
            size = arguments.report_every - (stream.num_tokens - reported) if arguments.report_every else len(data)
            stream.feed(data[: max(size, 1)])
            data = data[max(size, 1) :]
            if arguments.report_every and stream.num_tokens - reported >= arguments.report_every:
                report()

    while not signals.stop:
        ready, _, _ = select.select([source, signals.readable], [], [])
        if signals.readable in ready:
            os.read(signals.readable, READ_BYTES)
        if signals.stop:
            break
        if source in ready:
            data = os.read(source, arguments.chunk_bytes)
            read_on(data)
            if not data:
                stream.feed(b"", final=True)
                report()
                break
        if signals.report:
            signals.report = False
            report()
    speed = (stream.num_tokens - began_at) / (time.monotonic() - began)
    stream.save(arguments.state)
    print(
        f"{stream.num_tokens:,} tokens, {speed:,.0f} a second. The state is in {arguments.state}: --resume goes on.",
        file=sys.stderr,
    )
    if signals.stop:
        sys.exit(130)


if __name__ == "__main__":
    main()
