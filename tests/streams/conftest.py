"""What the tests of streams share: a tokenizer of bytes, models whose state is constant, and children that are killed."""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from testing import build, speech_config, speech_processor, sumagg_config, tost_text_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from modeling_sumagg import SumAggForCausalLM, SumAggForCTC, ToSTForCausalLM
from modeling_sumagg.streams.text_stream import TextStream


# Each holds another state: keys, means of two widths, sums, no convolution, token statistics, and window, sinks and a sum.
TEXT_MODELS = {
    "keys": {},
    "means": {"sum_state_size": None},
    "wider": {"hidden_size": 32, "sum_state_size": None},
    "sums": {"sum_normalization": "none"},
    "no convolution": {"conv_kernel_size": None, "sum_state_size": None},
    "statistics": {"use_membership_bias": False, "position_embedding_type": "sinusoidal"},
    "converted": {},
}


def text_model(kind: str = "means", **changes) -> PreTrainedModel:
    values = {"vocab_size": 257, **TEXT_MODELS[kind], **changes}
    if kind == "statistics":
        return build(ToSTForCausalLM, tost_text_config("sliding", **values))
    layers = "converted" if kind == "converted" else "sliding"
    return build(SumAggForCausalLM, sumagg_config(layers, sum_decay_max=8.0, **values))


@functools.cache
def shared_model(kind: str) -> PreTrainedModel:
    """One model of a kind for all tests, which leave it as it is."""
    return text_model(kind)


@functools.cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, and one for the beginning, 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_alone, bos_token="<bos>", clean_up_tokenization_spaces=False)


@pytest.fixture
def text_stream() -> Callable[..., TextStream]:
    """`text_stream("means")`: a stream that has read nothing, of a model that is shared, or of `model`."""
    return lambda kind="means", model=None: TextStream(model or shared_model(kind), byte_tokenizer())


@pytest.fixture(scope="session")
def processor(tmp_path_factory) -> ProcessorMixin:
    return speech_processor(tmp_path_factory.mktemp("processor"))


def speech_model(layers: str = "sliding", **values) -> PreTrainedModel:
    return build(SumAggForCTC, speech_config(layers, vocab_size=29, **values))


def start_child(action: Callable[[], None]) -> int:
    """Run an action in a copy of this process, which ends with 1 after an `OSError` or a `ValueError`; its id."""
    child = os.fork()
    if child:
        return child
    status = 2
    try:
        action()
        status = 0
    except (OSError, ValueError):
        status = 1
    finally:
        os._exit(status)


def in_a_child(action: Callable[[], None]) -> int:
    """The exit status of an action in a copy of this process; negative, the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(start_child(action), 0)[1])


def header_of(path: Path) -> dict:
    """The header of a safetensors file."""
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
