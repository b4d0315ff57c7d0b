"""What the scripts over endless streams share: signals, a state that is saved while they run, and checked options."""

import argparse
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from .saved_states import SavedStream


# The most that a kill, a crash or a power cut can undo, in seconds.
SAVE_SECONDS = 60


class Interruptions:
    """
    SIGINT (Ctrl-C), SIGTERM, SIGHUP and a closed standard output as a flag, looked at between two pieces of a stream
    only, so that no piece is read by half. SIGUSR1 asks for a report.

    Attributes:
        asked (`signal.Signals | None`): the signal that asked for the end.
        report (`bool`): whether a report was asked for.
        readable (`int`): a descriptor from which something can be read when a signal has come, for `select`.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.report = False
        self.readable, writable = os.pipe()
        os.set_blocking(writable, False)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        # Windows has neither SIGHUP nor SIGUSR1.
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)
            # `nohup` has a process ignore SIGHUP.
            if number is not None and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if signal.Signals(number).name == "SIGUSR1":
            self.report = True
        else:
            self.asked = signal.Signals(number)

    def write(self, text: str) -> None:
        """Write to standard output at once. If nobody reads it any more, the end is asked for, as by SIGPIPE."""
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            self.asked = signal.SIGPIPE
            # What is still buffered goes nowhere when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def leave(self) -> None:
        """End the process as the shell expects it after a signal, with 128 + its number, if one has asked for the end."""
        if self.asked is not None:
            sys.exit(128 + self.asked)


class StateFile:
    """
    The file of a stream's state. A script saves it before it reads anything, so that a file that cannot be written is known
    at once; then every `SAVE_SECONDS`; and when it ends.

    Args:
        path (`Path`): the file.
        stream (`SavedStream`): the stream.
        resume (`bool`): whether the stream continues from the state in the file. Otherwise there must be no such file.

    Raises:
        `FileNotFoundError`: there is no state to resume.
        `ValueError`: there is a file that would be overwritten, or that holds no state of this stream.
    """

    def __init__(self, path: Path, stream: SavedStream, resume: bool):
        self.path, self.stream, self.saved_at = path, stream, time.monotonic()
        if resume:
            stream.load(path)
        elif path.is_file():
            raise ValueError(f"{path} exists. Continue from it with --resume, or name another file as --state.")

    def save(self) -> None:
        """
        Raises:
            OSError: the file cannot be written. The state that was saved before is still there.
        """
        self.stream.save(self.path)
        self.saved_at = time.monotonic()

    def save_if_due(self) -> None:
        """Save if the last time is `SAVE_SECONDS` ago. If the file cannot be written, say so, and try again later."""
        if time.monotonic() - self.saved_at < SAVE_SECONDS:
            return
        try:
            self.save()
        except OSError as error:
            self.saved_at = time.monotonic()
            print(f"warning: the state cannot be saved, the last one is kept: {one_line(error)}", file=sys.stderr)


def standard_input() -> int:
    """
    The descriptor of standard input.

    Raises:
        ValueError: it is closed.
    """
    if sys.stdin is None:
        raise ValueError("Standard input is closed: give a file as --input.")
    return sys.stdin.fileno()


@contextlib.contextmanager
def user_errors(context: str = "") -> Iterator[None]:
    """End the process with one line for what users cause: wrong values, and files that cannot be read or written."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        sys.exit(f"error: {context}{one_line(error)}")


def one_line(error: Exception) -> str:
    return spell_out_controls(" ".join(str(error).split()))


def spell_out_controls(text: str) -> str:
    r"""The text with control characters such as `\x1b` spelled out, so that no text steers the terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: found.group().encode("unicode_escape").decode(), text)


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """The `type` of an option of `argparse` that takes a whole number from `least` to `most`."""
    allowed = f"of at least {least}" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"must be a whole number {allowed}, got {text}")
        return number

    return parse


__all__ = [
    "Interruptions",
    "StateFile",
    "one_line",
    "spell_out_controls",
    "standard_input",
    "user_errors",
    "whole_number",
]
