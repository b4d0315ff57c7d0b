"""Masks of every dtype and length, in dynamic and static caches, over one segment or many: each row is as it is alone."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from modeling_sumagg.common.compatibility import CACHE_NAME

from .kinds import KINDS, VOCAB_SIZE, logits_alone, tiny_model


ROOM = 20
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]


def masks() -> st.SearchStrategy[list[list[int]]]:
    """Which of the columns of two rows are real."""
    return st.integers(1, ROOM).flatmap(
        lambda length: st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=2, max_size=2)
    )


@torch.no_grad()
def assert_rows_are_alone(kind: str, rows, cuts, dtype, cache_type: str, width: str, omitted, seed: int) -> None:
    """
    Run the rows in segments that end at the `cuts`, the mask with as many columns as there are tokens, or (`"fixed"`) with
    zeros up to the room of the cache; or without it (`omitted`), where the segment has no padding.
    """
    model, draw, length = tiny_model(kind), random.Random(seed), len(rows[0])
    ids = torch.tensor([[draw.randrange(VOCAB_SIZE) for _ in row] for row in rows])
    mask, logits = torch.tensor(rows), []
    cache = None
    if cache_type == "dynamic":
        cache = DynamicCache(config=model.config)
    elif cache_type == "static":
        cache = StaticCache(config=model.config, max_cache_len=ROOM)
    ends = sorted({min(cut, length) for cut in cuts} | {length}) if cache is not None else [length]
    for first, last in zip([0, *ends], ends, strict=False):
        own = mask[:, :last].to(dtype, copy=True)
        if width == "fixed" and cache_type == "static":
            own = torch.nn.functional.pad(own, (0, ROOM - last))
        if omitted and mask[:, first:last].all():
            own = None
        logits.append(model(ids[:, first:last], attention_mask=own, **{CACHE_NAME: cache}).logits)
        if own is not None:
            own.zero_()  # the cache must not have kept the caller's tensor
    for row, real, actual in zip(ids, mask.bool(), torch.cat(logits, dim=1), strict=True):
        if real.any():
            expected = logits_alone(model, row[real].tolist())
            assert (actual[real] - expected).abs().max() <= 1e-4 * expected.abs().max()


ARGUMENTS = {
    "kind": st.sampled_from(KINDS),
    "rows": masks(),
    "cuts": st.lists(st.integers(1, ROOM), max_size=4),
    "dtype": st.sampled_from(DTYPES),
    "cache_type": st.sampled_from(["none", "dynamic", "static"]),
    "width": st.sampled_from(["growing", "fixed"]),
    "omitted": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
}


@settings(max_examples=50, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(**ARGUMENTS)
def test_every_row_is_as_it_is_alone(**arguments) -> None:
    assert_rows_are_alone(**arguments)


@pytest.mark.slow
@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(**ARGUMENTS)
def test_every_row_is_as_it_is_alone_at_length(**arguments) -> None:
    assert_rows_are_alone(**arguments)


@pytest.mark.parametrize("kind", ["sumagg-decayed-hybrid", "sumagg-sliding-full", "tost-pure"])
def test_a_mask_too_short_for_a_static_cache_is_refused(kind):
    model = tiny_model(kind)
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.long), **{CACHE_NAME: cache})
    for length in (1, 2):
        with pytest.raises(ValueError, match="`attention_mask` has 5 columns, and there are 5 tokens in the cache"):
            model(torch.ones(1, length, dtype=torch.long), attention_mask=torch.ones(1, 5), **{CACHE_NAME: cache})


@pytest.mark.parametrize("kind", ["sumagg-decayed-hybrid", "tost-pure"])
@pytest.mark.parametrize("cache_type", ["none", "dynamic", "static"])
def test_the_middle_of_a_document_without_the_state_before_it_is_refused(kind, cache_type):
    model = tiny_model(kind)
    arguments = {}
    if cache_type != "none":
        static = StaticCache(config=model.config, max_cache_len=ROOM)
        arguments[CACHE_NAME] = static if cache_type == "static" else DynamicCache(config=model.config)
    ids, position_ids = torch.ones(2, 4, dtype=torch.long), torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]])
    with pytest.raises(ValueError, match="begin at 7, in the middle of a document"):
        model(ids, position_ids=position_ids, **arguments)
    # What stands in padding is no position.
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    position_ids = torch.tensor([[0, 1, 2, 3], [5, 0, 1, 2]])
    model(ids, position_ids=position_ids, attention_mask=mask, **arguments)
    if cache_type == "none":
        with pytest.raises(ValueError, match="begin at 7"):
            model(ids[:, :1], position_ids=torch.tensor([[0], [7]]), use_cache=False)
