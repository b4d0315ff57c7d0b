"""A forward pass waits for the device no more often than GPT-2's: what Python reads of a tensor is counted."""

from functools import lru_cache
from unittest import mock

import pytest
import torch
from testing import TEXT_CLASSES, build, speech_config, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
    StaticCache,
)

from modeling_sumagg import SumAggForCTC
from modeling_sumagg.common.compatibility import named_cache


# `item`, `bool` and `int` of a tensor are `_local_scalar_dense`.
READING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2", "bincount")
GPT2_CLASSES = {
    "Model": GPT2Model,
    "ForCausalLM": GPT2LMHeadModel,
    "ForMaskedLM": GPT2LMHeadModel,
    "ForSequenceClassification": GPT2ForSequenceClassification,
    "ForTokenClassification": GPT2ForTokenClassification,
}
LENGTH = 8


class HostReads(TorchDispatchMode):
    """Counts the operations whose result Python has to wait for, and `tolist` and `numpy`, which dispatch none."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.patches = [mock.patch.object(torch.Tensor, name, self._counting(name)) for name in ("tolist", "numpy")]

    def _counting(self, name: str):
        function = getattr(torch.Tensor, name)

        def call(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            getattr(t, "dtype", None) == torch.bool for t in tree_leaves(args[1:2])
        )
        self.count += name in READING or by_mask
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *args):
        for patch in self.patches:
            patch.stop()
        return super().__exit__(*args)


def reads(call) -> int:
    with HostReads() as counted:
        call()
    return counted.count


def gpt2(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    head = next(cls for name, cls in GPT2_CLASSES.items() if model_class.__name__.endswith(name))
    return head(GPT2Config(vocab_size=61, n_positions=64, n_embd=16, n_layer=2, n_head=2, pad_token_id=0)).eval()


def segment(padding: str) -> dict[str, torch.Tensor]:
    """Two rows; `padding` is on the left of the first, or only told to be nowhere, or not spoken of."""
    inputs = {"input_ids": torch.randint(1, 61, (2, LENGTH))}
    if padding != "none":
        inputs["attention_mask"] = torch.ones(2, LENGTH, dtype=torch.long)
        inputs["attention_mask"][0, : 3 if padding == "left" else 0] = 0
    return inputs


def labels(model_class: type[PreTrainedModel]) -> torch.Tensor:
    return (
        torch.tensor([0, 1]) if model_class.__name__.endswith("ForSequenceClassification") else torch.ones(2, 8).long()
    )


PADDINGS = ["none", "nowhere", "left"]
PASSES = ["training", "forward", "prefill", "decode", "static prefill", "static decode"]


def count(model: PreTrainedModel, kind: str, inputs: dict[str, torch.Tensor]) -> int:
    """The reads of one forward pass."""
    model.train(kind == "training")
    if kind == "training":
        head = {} if type(model).__name__.endswith("Model") else {"labels": labels(type(model))}
        return reads(lambda: model(**inputs, **head))
    if kind == "forward":
        return reads(lambda: model(**inputs, use_cache=False))
    with torch.no_grad():
        static = StaticCache(config=model.config, max_cache_len=LENGTH)
        cache = named_cache(static if kind.startswith("static") else DynamicCache(config=model.config))
        first = {name: tensor[:, : LENGTH - 1] for name, tensor in inputs.items()}
        num_reads = reads(lambda: model(**first, **cache))
        if kind.endswith("prefill"):
            return num_reads
        return reads(lambda: model(**{**inputs, "input_ids": inputs["input_ids"][:, -1:]}, **cache))


def counts(model: PreTrainedModel) -> dict[tuple[str, str], int]:
    kinds = PASSES if getattr(model.config, "is_causal", True) else PASSES[:2]
    return {(kind, padding): count(model, kind, segment(padding)) for kind in kinds for padding in PADDINGS}


@lru_cache
def counts_of_gpt2(model_class: type[PreTrainedModel]) -> dict[tuple[str, str], int]:
    return counts(gpt2(model_class))


@pytest.mark.parametrize("layers", ["pure", "hybrid", "sliding"])
@pytest.mark.parametrize("model_class", TEXT_CLASSES)
def test_a_forward_pass_reads_no_more_than_gpt2(model_class, layers):
    limits = counts_of_gpt2(model_class)
    own = counts(build(model_class, tiny_config(model_class, layers)))
    assert {case: number for case, number in own.items() if number > limits[case]} == {}
    # Without a mask nothing has to be decided.
    assert {case: number for case, number in own.items() if case[1] == "none" and number > 0} == {}


@pytest.mark.parametrize("layers", ["pure", "hybrid", "sliding"])
@pytest.mark.parametrize("model_class", [cls for cls in TEXT_CLASSES if cls.__name__.endswith("ForCausalLM")])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_token_of_generate_reads_no_more_than_gpt2(model_class, layers, padding):
    inputs = segment(padding)

    def of_ten_tokens(model: PreTrainedModel) -> int:
        options = {"do_sample": False, "pad_token_id": 0}
        short, long = (reads(lambda n=n: model.generate(**inputs, max_new_tokens=n, **options)) for n in (2, 12))
        return long - short

    model = build(model_class, tiny_config(model_class, layers, eos_token_id=None))
    assert of_ten_tokens(model) <= of_ten_tokens(gpt2(model_class))


def test_a_piece_of_speech_is_read_twice():
    """Whether its frames are finite, and how many tokens the row that has most of them has."""
    model, pieces = build(SumAggForCTC, speech_config("sliding")), torch.randn(2, 2, 7, 5)
    cache = model(pieces[0], use_cache=True).cache
    assert reads(lambda: model(pieces[1], cache=cache)) == 2
    assert reads(lambda: model(pieces[0])) == 1


def test_reads_are_counted():
    x = torch.arange(6)
    for call, expected in (
        (lambda: x.sum().item(), 1),
        (lambda: bool(x.any()), 1),
        (lambda: x.tolist(), 1),
        (lambda: x.numpy(), 1),
        (lambda: x[x > 2], 1),
        (lambda: x.clone().__setitem__(x > 2, x[:3]), 1),
        (lambda: (x > 2).nonzero(), 1),
        (lambda: x.unique(), 1),
        (lambda: x + 1, 0),
    ):
        assert reads(call) == expected
