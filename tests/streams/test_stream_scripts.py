"""What the scripts over streams share: signals, a state that is saved while they run, options, and text for a terminal."""

import argparse
import os
import signal
import sys

import pytest

from modeling_sumagg.streams import stream_scripts
from modeling_sumagg.streams.stream_scripts import (
    Interruptions,
    StateFile,
    spell_out_controls,
    standard_input,
    user_errors,
    whole_number,
)


NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_nothing_at_once(number):
    interruptions = Interruptions()
    interruptions.leave()
    os.kill(os.getpid(), number)
    assert interruptions.asked is number and os.read(interruptions.readable, 9) == bytes([number])
    with pytest.raises(SystemExit, match=str(128 + number)):
        interruptions.leave()


def test_nohup_and_reports():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interruptions = Interruptions()
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert interruptions.asked is None and interruptions.report


def test_an_output_that_nobody_reads_asks_for_the_end(monkeypatch):
    reading, writing = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    interruptions = Interruptions()
    interruptions.write("heard\n")
    assert os.read(reading, 99) == b"heard\n" and interruptions.asked is None
    os.close(reading)
    interruptions.write("unheard\n")
    assert interruptions.asked is signal.SIGPIPE
    # What comes later goes nowhere, at the end of Python too.
    interruptions.write("unheard\n")
    sys.stdout.close()


@pytest.fixture
def state(text_stream, tmp_path) -> StateFile:
    state = StateFile(tmp_path / "state", text_stream(), resume=False)
    state.save()
    return state


def test_a_state_is_not_overwritten_by_a_stream_that_does_not_continue_it(state, text_stream):
    state.stream.feed(b"some text")
    state.save()
    with pytest.raises(ValueError, match="state exists. Continue from it with --resume, or name another file"):
        StateFile(state.path, text_stream(), resume=False)
    assert StateFile(state.path, text_stream(), resume=True).stream.num_bytes == 9
    with pytest.raises(FileNotFoundError, match="no state '.*other'"):
        StateFile(state.path.with_name("other"), text_stream(), resume=True)


def test_a_state_is_saved_every_minute_and_a_full_disk_is_no_end(state, text_stream, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(stream_scripts.time, "monotonic", lambda: clock[0])
    state.save()
    saved = state.path.read_bytes()
    for seconds, text in ((59, b"some "), (60, b"text ")):
        state.stream.feed(text)
        clock[0] = seconds
        state.save_if_due()
        assert (state.path.read_bytes() == saved) == (seconds < 60)
    assert StateFile(state.path, text_stream(), resume=True).stream.num_bytes == 10

    def full(*arguments):
        raise OSError(28, "No space left on device", "state")

    saved = state.path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(stream_scripts.SavedStream, "save", full)
        for seconds in (121, 122, 182):
            clock[0] = seconds
            state.save_if_due()
    warning = "warning: the state cannot be saved, the last one is kept: [Errno 28] No space left on device: 'state'\n"
    assert capsys.readouterr().err == 2 * warning and state.path.read_bytes() == saved
    clock[0] = 242
    state.stream.feed(b"and more")
    state.save_if_due()
    assert state.path.read_bytes() != saved


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07\x1b[2Jgone", r"\x1b]0;title\x07\x1b[2Jgone"),
        ("\x9b31m red\x7f\r\n\t", r"\x9b31m red\x7f\r\n\t"),
        # Joiners and combining marks are no controls.
        ("naïve 和 हिन्दी می\u200cخواهم", "naïve 和 हिन्दी می\u200cخواهم"),
    ],
)
def test_no_text_steers_the_terminal(text, shown):
    assert spell_out_controls(text) == shown


def test_whole_numbers():
    assert whole_number(0)("0") == 0 and whole_number(1, 5)("5") == 5
    for parse, text, allowed in (
        (whole_number(0), "-1", "of at least 0, got -1"),
        (whole_number(1, 5), "6", "from 1 to 5, got 6"),
        (whole_number(1), "1.5", "of at least 1, got 1.5"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^must be a whole number {allowed}$"):
            parse(text)


def test_errors_of_users_are_one_line_without_controls():
    with pytest.raises(SystemExit, match=r"^error: after 2 s: a file \\x1b\[2J of two lines$"):
        with user_errors("after 2 s: "):
            raise ValueError("a file \x1b[2J\nof two lines")


def test_a_closed_standard_input_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="Standard input is closed: give a file as --input"):
        standard_input()
    with open(os.devnull) as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert standard_input() == file.fileno()
