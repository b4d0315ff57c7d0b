"""Read a text without end, keep its constant-size state, and at any moment score it or write on.

    python quickstart.py
    tail -f log.txt | python stream_generation.py --model runs/quickstart --state state.safetensors --report_every 10000

Every `--report_every` tokens, on SIGUSR1 and at the end of the input, it prints a line: how many tokens it has read,
their perplexity, and how the model would continue. The state is saved every minute, and at Ctrl-C, SIGTERM, SIGHUP or when
nobody reads the output any more. With `--resume` the next run continues as if there had been no interruption: a file from
the byte at which the first run stopped, a pipe with what comes next.

The model needs a state of constant size and positions without end: no full attention, no learned positions. That of
quickstart.py has both.
"""

import argparse
import json
import math
import os
import select
import stat
import sys
import time
from pathlib import Path


# Threads that wait for each other sleep, and leave the processor to others: read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_sumagg  # noqa: F401  (registers the models)
from modeling_sumagg.streams.stream_scripts import (
    Interruptions,
    StateFile,
    spell_out_controls,
    standard_input,
    user_errors,
    whole_number,
)
from modeling_sumagg.streams.text_stream import TextStream


READ_BYTES = 1 << 16


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a checkpoint: a folder or a name on the Hub")
    parser.add_argument("--input", type=Path, help="the file to read; standard input by default")
    parser.add_argument("--state", type=Path, required=True, help="the safetensors file that keeps the state")
    parser.add_argument("--resume", action="store_true", help="continue from --state")
    parser.add_argument(
        "--chunk_bytes", type=whole_number(1, 1 << 26), default=READ_BYTES, help="the most bytes to read at once"
    )
    parser.add_argument(
        "--report_every", type=whole_number(0), default=0, help="tokens from one report to the next; 0: at the end"
    )
    parser.add_argument(
        "--max_new_tokens", type=whole_number(0), default=50, help="length of a continuation; 0: only score"
    )
    parser.add_argument("--do_sample", action="store_true", help="sample the continuations; greedy by default")
    parser.add_argument("--json", action="store_true", help="reports for programs, with the ids of the continuation")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="seed of the sampling")
    return parser.parse_args()


def open_source(path: Path | None) -> int:
    """A descriptor of the file, or of standard input."""
    if path is None:
        return standard_input()
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a text file as --input.")
    return os.open(path, os.O_RDONLY)


def skip_what_was_read(source: int, path: Path, num_bytes: int) -> None:
    """Move to the first byte that the resumed state has not read. A pipe begins with it."""
    status = os.fstat(source)
    if not stat.S_ISREG(status.st_mode):
        return
    if status.st_size < num_bytes:
        raise ValueError(
            f"{path} has {status.st_size:,} bytes, and the state has read {num_bytes:,}: it was cut, or it is another file."
        )
    os.lseek(source, num_bytes, os.SEEK_SET)


def main() -> None:
    arguments = parse_arguments()
    interruptions = Interruptions()
    with user_errors():
        model = AutoModelForCausalLM.from_pretrained(arguments.model)
        stream = TextStream(model, AutoTokenizer.from_pretrained(arguments.model))
        source = open_source(arguments.input)
        state = StateFile(arguments.state, stream, arguments.resume)
        if arguments.input is not None:
            skip_what_was_read(source, arguments.input, stream.num_bytes)
        state.save()
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
            # JSON has no NaN and no infinity.
            known = perplexity if math.isfinite(perplexity) else None
            line = json.dumps({"num_tokens": reported, "perplexity": known, "tokens": tokens, "text": text})
        else:
            text = spell_out_controls(" ".join(text.split()))
            line = f"{reported:,} tokens, perplexity {perplexity:.4g}, and on: {text}"
        interruptions.write(f"{line}\n")

    def read_on(data: bytes) -> None:
        """Feed the stream, and stop for every report that becomes due: a byte is a token at the most."""
        while data:
            size = arguments.report_every - (stream.num_tokens - reported) if arguments.report_every else len(data)
            stream.feed(data[: max(size, 1)])
            data = data[max(size, 1) :]
            if arguments.report_every and stream.num_tokens - reported >= arguments.report_every:
                report()

    problem = None
    while interruptions.asked is None:
        ready, _, _ = select.select([source, interruptions.readable], [], [])
        if interruptions.readable in ready:
            os.read(interruptions.readable, READ_BYTES)
        if interruptions.asked is not None:
            break
        if source in ready:
            try:
                data = os.read(source, arguments.chunk_bytes)
            except OSError as error:
                problem = error
                break
            read_on(data)
            if not data:
                stream.feed(b"", final=True)
                report()
                break
        if interruptions.report:
            interruptions.report = False
            report()
        state.save_if_due()
    with user_errors():
        state.save()
        if problem is not None:
            raise problem
    speed = (stream.num_tokens - began_at) / (time.monotonic() - began)
    print(
        f"{stream.num_tokens:,} tokens, {speed:,.0f} a second. The state is in {arguments.state}: --resume continues.",
        file=sys.stderr,
    )
    interruptions.leave()


if __name__ == "__main__":
    main()
