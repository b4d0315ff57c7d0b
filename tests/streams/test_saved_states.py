"""A state is taken back by its own model alone, whole, and nothing that happens to a writer loses it."""

import functools
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from testing import speech_processor
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM

from modeling_sumagg.common import whole_files
from modeling_sumagg.streams import saved_states
from modeling_sumagg.streams.saved_states import SavedStream, cache_from_tensors, cache_to_tensors, fingerprint
from modeling_sumagg.streams.speech_stream import SpeechStream
from modeling_sumagg.streams.text_stream import TextStream

from .conftest import (
    TEXT_MODELS,
    byte_tokenizer,
    header_of,
    in_a_child,
    shared_model,
    speech_model,
    start_child,
    text_model,
)


TEXT = "The sum of 19 and 23 is 42, naïvely; and so on. ".encode() * 4


def state_of(stream) -> dict[str, torch.Tensor]:
    cached = {} if stream.cache is None else cache_to_tensors(stream.cache)
    return {**cached, **stream.own_state()[0]}


def assert_same_state(one, other) -> None:
    first, second = state_of(one), state_of(other)
    assert first.keys() == second.keys() and one.own_state()[1] == other.own_state()[1]
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.fixture
def saved(text_stream, tmp_path):
    """A stream of means in the midst of a text, and its file."""
    stream, path = text_stream("means"), tmp_path / "state.safetensors"
    stream.feed(TEXT)
    stream.save(path)
    return stream, path


def test_only_the_model_that_wrote_a_state_takes_it_back(text_stream, tmp_path):
    for kind in TEXT_MODELS:
        stream = text_stream(kind)
        stream.feed(TEXT)
        stream.save(tmp_path / kind)
    for kind, other in itertools.product(TEXT_MODELS, TEXT_MODELS):
        stream = text_stream(kind)
        if kind == other:
            stream.load(tmp_path / other)
            whole = text_stream(kind)
            for one in (stream, whole):
                one.feed(TEXT if one is stream else TEXT + TEXT, final=True)
            assert_same_state(stream, whole)
            continue
        with pytest.raises(ValueError, match=f"{other} holds no state of this stream: it is of a model of"):
            stream.load(tmp_path / other)
        assert_same_state(stream, text_stream(kind))


def test_a_refusal_says_what_differs(text_stream, saved, tmp_path):
    _, path = saved
    with pytest.raises(ValueError, match="another config: `sliding_window` 5, not 6$"):
        text_stream(model=text_model(sliding_window=6)).load(path)
    other = text_stream(model=text_model())
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1e-6
    with pytest.raises(ValueError, match="same config with other weights"):
        other.load(path)
    half = text_stream(model=text_model().bfloat16())
    with pytest.raises(ValueError, match="same config with other weights"):
        half.load(path)
    with pytest.raises(FileNotFoundError, match="no state '.*nothing'"):
        other.load(tmp_path / "nothing")
    for name, content in {"empty": b"", "text": b"no state", "lying": (2**60).to_bytes(8, "little") + b"{}"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} holds no state of this stream: it is no safetensors file"):
            other.load(tmp_path / name)
    with pytest.raises(ValueError, match="it is no file"):
        other.load(tmp_path)
    # As version 0.2 wrote it, and as nobody did.
    for metadata in (
        {"counts": json.dumps({"num_bytes": 3})},
        {"stream": "["},
        {"stream": "[" * 100_000},
        {"stream": "{}"},
    ):
        safetensors.torch.save_file({"pending": torch.zeros(1)}, tmp_path / "old", metadata=metadata)
        with pytest.raises(ValueError, match="not written by `save` of a stream of this version"):
            other.load(tmp_path / "old")


def test_a_fingerprint_is_of_the_config_and_the_weights_alone(tmp_path):
    model = text_model()
    expected = fingerprint(model)
    model.save_pretrained(tmp_path)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")) == expected
    assert fingerprint(torch.compile(model)) == expected
    assert json.loads(json.dumps(expected)) == expected
    assert fingerprint(text_model(num_sum_heads=1))["config"]["num_sum_heads"] == 1
    # A quantized weight is a tensor made of tensors.
    weight = model.lm_head.weight.detach()
    digests = set()
    for scale in (torch.ones_like(weight), torch.full_like(weight, 2.0)):
        model.lm_head.weight = torch.nn.Parameter(TwoTensor(weight, scale), requires_grad=False)
        digests.add(fingerprint(model)["weights"])
    assert len({*digests, expected["weights"]}) == 3
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="lm_head.weight is offloaded"):
        fingerprint(model)


def forge(path: Path, source: Path, tensors: dict[str, torch.Tensor], counts: dict) -> None:
    """A file with other content, whose checksum is right."""
    about = json.loads(header_of(source)["__metadata__"]["stream"])
    about |= {"counts": counts, "checksum": saved_states._checksum(tensors, counts)}
    path.write_bytes(safetensors.torch.save(tensors, metadata={"stream": json.dumps(about)}))


def malformed(draw, tensors: dict[str, torch.Tensor], counts: dict) -> None:
    """Change one thing so that it is wrong."""
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    kind = draw(st.sampled_from(["drop", "add", "dtype", "shape", "value", "count", "counts"]))
    if kind == "drop":
        del tensors[name]
    elif kind == "add":
        tensors[
            draw(st.sampled_from(["more", "cache.layers.0.other.0", "cache.layers.9.causal_mean.0", f"{name}0"]))
        ] = tensor.clone()
    elif kind == "dtype":
        dtypes = [
            torch.float16,
            torch.float32,
            torch.float64,
            torch.int32,
            torch.int64,
            torch.bool,
            torch.float8_e4m3fn,
        ]
        dtype = draw(st.sampled_from(dtypes))
        assume(dtype != tensor.dtype)
        tensors[name] = tensor.to(dtype)
    elif kind == "shape":
        # The end of the text may have any length, and be any bytes.
        assume(name != "held")
        changes = [tensor[None], torch.stack([tensor, tensor]), tensor.flatten()[:0], tensor.new_zeros(3, 5, 7)]
        changed = draw(st.sampled_from(changes))
        assume(changed.shape != tensor.shape)
        tensors[name] = changed
    elif kind == "value":
        assume(name != "held" and tensor.numel() > 0)
        wrong = [float("nan"), float("inf"), float("-inf")] if tensor.is_floating_point() else [-1, 10**6, -(2**62)]
        tensors[name] = tensor.clone()
        index = draw(st.integers(0, tensor.numel() - 1))
        tensors[name].view(-1)[index] = draw(st.sampled_from(wrong))
    elif kind == "count":
        count = draw(st.sampled_from([name for name in sorted(counts) if name != "num_bytes"]))
        counts[count] = draw(st.sampled_from([-1, counts[count] + 1, 2**80, 1.5, True, None, "3", [1], float("nan")]))
    else:
        count = draw(st.sampled_from(sorted(counts)))
        if draw(st.booleans()):
            del counts[count]
        else:
            counts["more"] = 1


SETTINGS = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


@functools.cache
def in_the_midst(kind: str) -> tuple[SavedStream, Path]:
    """A stream, and its file, for all examples, which leave both as they are."""
    folder = Path(tempfile.mkdtemp())
    if kind == "speech":
        stream = SpeechStream(speech_model(), speech_processor(folder))
        stream.feed(np.sin(np.arange(4321) / 9).astype(np.float32))
    else:
        stream = TextStream(shared_model(kind), byte_tokenizer())
        stream.feed(TEXT)
    stream.save(folder / "whole")
    return stream, folder / "whole"


@SETTINGS
@given(data=st.data())
@pytest.mark.parametrize("kind", ["keys", "means", "statistics", "converted", "speech"])
def test_malformed_states_are_refused(kind, data, tmp_path):
    stream, whole = in_the_midst(kind)
    before = state_of(stream)
    tensors, counts = load_file(whole), stream.own_state()[1]
    malformed(data.draw, tensors, counts)
    forge(tmp_path / "malformed", whole, tensors, counts)
    with pytest.raises(ValueError, match="malformed holds no state of this stream: "):
        stream.load(tmp_path / "malformed")
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(stream).items())


@SETTINGS
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_files_are_refused(place, bit, cut, text_stream, tmp_path):
    stream, path = in_the_midst("means")
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place] ^= 1 << bit
    (tmp_path / "damaged").write_bytes(content[:place] if cut else content)
    other = text_stream("means")
    try:
        other.load(tmp_path / "damaged")
    except ValueError as error:
        assert str(error).startswith(f"{tmp_path / 'damaged'} holds no state of this stream: ")
        assert_same_state(other, text_stream("means"))
    else:
        # A name in the header that does not matter.
        assert place < 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert_same_state(other, stream)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("means", "layers.0.causal_mean.1"),
        *(("statistics", f"layers.0.causal_token_statistics.{j}") for j in range(3)),
        ("speech", "layers.0.stack_frames.1"),
    ],
)
def test_counts_weights_and_squares_are_not_negative(kind, name):
    model = speech_model() if kind == "speech" else shared_model(kind)
    inputs = torch.randn(2, 9, 5) if kind == "speech" else torch.randint(257, (2, 9))
    with torch.no_grad():
        tensors = cache_to_tensors(model(inputs, use_cache=True).past_key_values)
    assert (tensors[name] >= 0).all()
    cache_from_tensors(tensors, model)
    tensors[name] = -tensors[name] - 1
    with pytest.raises(ValueError, match=f"`{name}` must be from 0 to (inf|9) after 9 tokens, got -"):
        cache_from_tensors(tensors, model)


def killed_at_line(number: int):
    """Have this process killed at a line of `whole_files.py`, counted as they run."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename != whole_files.__file__:
            return None
        seen += event == "line"
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)


def test_a_writer_that_is_killed_leaves_the_old_state_or_the_new_one(saved):
    stream, path = saved
    old = path.read_bytes()
    stream.feed(b"more of it")
    stream.save(path)
    new, ended, found = path.read_bytes(), None, set()
    assert old != new
    for line in itertools.count(1):
        path.write_bytes(old)
        ended = in_a_child(lambda line=line: (killed_at_line(line), stream.save(path)))
        found.add(path.read_bytes())
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert line > 8 and found == {old, new}
    # What the killed writers left is in nobody's way.
    stream.save(path)
    assert path.read_bytes() == new


def test_a_full_disk_leaves_the_old_state(saved, tmp_path):
    stream, path = saved
    old = path.read_bytes()
    stream.feed(b"more of it")

    def save_on_a_disk_of(size: int):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        stream.save(path)

    stream.save(tmp_path / "new")
    size_of_new = (tmp_path / "new").stat().st_size
    (tmp_path / "new").unlink()
    for size in (0, 1, 1000, size_of_new - 1):
        assert in_a_child(lambda size=size: save_on_a_disk_of(size)) == 1
        assert path.read_bytes() == old and [*tmp_path.iterdir()] == [path]
    assert in_a_child(lambda: save_on_a_disk_of(1 << 20)) == 0 and path.read_bytes() != old


def test_two_writers_at_once_leave_a_whole_state(saved, text_stream, tmp_path):
    stream, path = saved
    other, reader = text_stream("means"), text_stream("means")
    other.feed(TEXT * 2)
    known = {len(TEXT): stream, len(TEXT) * 2: other}

    def write(one) -> None:
        for _ in range(20):
            one.save(path)

    writers = {start_child(lambda one=one: write(one)) for one in (stream, other)}
    while writers:
        writers -= {writer for writer in writers if os.waitpid(writer, os.WNOHANG)[0]}
        reader.load(path)
        assert_same_state(reader, known[reader.num_bytes])
    assert [*tmp_path.iterdir()] == [path]


def test_a_state_keeps_its_mode_and_its_links(saved, tmp_path):
    stream, path = saved
    path.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(path)
    stream.feed(b"more of it")
    stream.save(link)
    assert link.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    text = {name: tensor for name, tensor in load_file(path).items() if name == "held"}
    assert bytes(text["held"].tolist()) == b" it"
    os.mkfifo(tmp_path / "pipe")
    for place in ("pipe", "."):
        with pytest.raises(ValueError, match="is a folder, a device or a pipe"):
            stream.save(tmp_path / place)
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*no/state'"):
        stream.save(tmp_path / "no" / "state")
