"""The cache layers themselves: what they hold, going back, and the batch operations of `generate`."""

import copy
import io
import pickle

import pytest
import torch
from testing import LAYER_TYPES, assert_close, build, cache_tensors, sumagg_config
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from modeling_sumagg import SumAggForCausalLM
from modeling_sumagg.configuration import SumAggConfig
from modeling_sumagg.decoder.cache import SlidingWindowLayer


MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1], [1] * 12, [1, 1, 1, 1, 0, 0, 0, 0, 1, 0, 1, 1]])


def filled(model, input_ids, *, first=0, cache=None, record=False):
    """The cache after the columns from `first` on of `input_ids`."""
    if cache is None:
        cache = DynamicCache(config=model.config)
    if record:
        cache.activate_past_recording()
    mask = MASK[: input_ids.shape[0], : input_ids.shape[1]]
    with torch.no_grad():
        model(input_ids[:, first:], attention_mask=mask, cache=cache)
    return cache


def next_logits(model, cache, rows=slice(None)):
    """What the model says after one more token, from a copy of the cache; `rows` of `MASK` are in it."""
    mask = torch.cat([MASK[:, : cache.get_seq_length()], torch.ones(3, 1)], dim=1)[rows]
    with torch.no_grad():
        return model(torch.full((len(mask), 1), 7), attention_mask=mask, cache=copy.deepcopy(cache)).logits[:, 0]


@pytest.fixture(params=LAYER_TYPES)
def model(request):
    return build(SumAggForCausalLM, sumagg_config(request.param, position_embedding_type="sinusoidal"))


@pytest.fixture
def input_ids():
    return torch.randint(0, 61, (3, 12))


@pytest.mark.parametrize("begins", [1, 3])
def test_crop_goes_back_over_the_beginning_of_a_document(model, input_ids, begins):
    position_ids = torch.tensor([[*range(6), *range(begins)]])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids[:, :6], cache=cache)
        cache.activate_past_recording()
        model(input_ids[:, 6 : 6 + begins], position_ids=position_ids[:, 6:], cache=cache)
        cache.crop(-begins)
        actual = model(input_ids[:, 9:], position_ids=torch.arange(6, 9)[None], cache=cache).logits
        expected = model(input_ids[:, [*range(6), 9, 10, 11]], use_cache=False).logits[:, 6:]
    assert_close(actual, expected)


@pytest.mark.parametrize("segments", [(12,), (5, 12), (5, 6, 9, 12), tuple(range(1, 13))])
def test_crop_goes_back_to_any_recorded_token(model, input_ids, segments):
    for length in (0, 1, 4, 5, 7, 11, 12):
        cache = DynamicCache(config=model.config)
        for first, last in zip((0, *segments), segments, strict=False):
            filled(model, input_ids[:, :last], first=first, cache=cache, record=True)
        cache.crop(length - 12)
        assert cache.get_seq_length() == length
        if length:
            shorter = filled(model, input_ids[:, :length])
            assert_close(next_logits(model, cache), next_logits(model, shorter))
            for layer, expected in zip(cache.layers, shorter.layers, strict=True):
                if not isinstance(layer, DynamicLayer | SlidingWindowLayer):
                    assert_close(layer.state[0], expected.state[0])


def test_generation_goes_on_after_a_crop(model, input_ids):
    cache = filled(model, input_ids[:, :8], record=True)
    for _ in range(2):
        cache.crop(-2)
        filled(model, input_ids[:, :8], first=6, cache=cache)
    assert_close(next_logits(model, cache), next_logits(model, filled(model, input_ids[:, :8])))


def test_going_back_further_than_recorded_is_refused():
    model = build(SumAggForCausalLM, sumagg_config("pure"))
    cache, ids = DynamicCache(config=model.config), torch.randint(0, 61, (1, 8))
    model(ids[:, :5], cache=cache)
    with pytest.raises(ValueError, match="Cannot remove 1 tokens: 0 were recorded.*activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    model(ids[:, 5:], cache=cache)
    with pytest.raises(ValueError, match="Cannot remove 4 tokens: 3 were recorded"):
        cache.crop(-4)
    with pytest.raises(ValueError, match="as a negative number, got 2"):
        cache.crop(2)
    cache.crop(-1)
    with pytest.raises(ValueError, match="Cannot remove 1 tokens: 0 were recorded"):
        cache.crop(-1)


def test_a_crop_forgets_the_record(model, input_ids):
    cache = filled(model, input_ids, record=True)
    cache.crop(0)
    for layer in cache.layers:
        assert not getattr(layer, "segments", []) and getattr(layer, "recorded", 0) == 0
        if isinstance(layer, SlidingWindowLayer):
            sinks = getattr(model.config, "attention_sinks", 0)
            assert layer.keys.shape[2] == model.config.sliding_window - 1 + sinks


@pytest.mark.parametrize("record", [False, True])
def test_operations_on_the_batch(model, input_ids, record):
    logits = next_logits(model, filled(model, input_ids))
    for operation, argument, rows in (
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ):
        cache = filled(model, input_ids, record=record)
        getattr(cache, operation)(argument)
        assert cache.batch_size == len(rows)
        assert_close(next_logits(model, cache, rows), logits[rows])
        if record:
            cache.crop(-4)
            assert_close(next_logits(model, cache, rows), next_logits(model, filled(model, input_ids[:, :8]))[rows])


def test_reset_is_a_new_cache(model, input_ids):
    cache = filled(model, input_ids, record=True)
    cache.reset()
    for layer in cache.layers:
        if type(layer) is DynamicLayer and layer.get_seq_length():
            pytest.skip("older transformers fill the keys of their own layer with zeros and keep their number")
        assert layer.get_seq_length() == 0
    filled(model, input_ids.flip(1), cache=cache)
    assert_close(next_logits(model, cache), next_logits(model, filled(model, input_ids.flip(1))))


@pytest.mark.parametrize("record", [False, True])
def test_copies_are_independent(model, input_ids, record):
    cache = filled(model, input_ids[:, :8], record=record)
    expected = next_logits(model, cache)
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(cache),
        pickle.loads(pickle.dumps(cache)),
        torch.load(file, weights_only=False),
    ):
        filled(model, input_ids, first=8, cache=cache)
        assert copied.get_seq_length() == 8
        assert torch.equal(next_logits(model, copied), expected)
        cache = copied


def test_offloading_a_layer_and_fetching_it_back(model, input_ids):
    cache = filled(model, input_ids, record=True)
    expected = next_logits(model, cache)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert torch.equal(next_logits(model, cache), expected)


def test_a_static_cache_is_the_same_and_goes_back(model, input_ids):
    static = StaticCache(config=model.config, max_cache_len=20)
    for layer in static.layers:
        assert layer.is_compileable
    filled(model, input_ids[:, :7], cache=static)
    filled(model, input_ids, first=7, cache=static)
    assert_close(next_logits(model, static), next_logits(model, filled(model, input_ids)))
    addresses = [tensor.data_ptr() for tensor in cache_tensors(static)]
    static.reset()
    filled(model, input_ids.flip(1), cache=static)
    assert [tensor.data_ptr() for tensor in cache_tensors(static)] == addresses
    assert_close(next_logits(model, static), next_logits(model, filled(model, input_ids.flip(1))))
    if not static.is_croppable:
        pytest.skip("older transformers cannot crop their own static layers")
    static.reset()
    static.activate_past_recording()
    assert not static.is_compileable
    filled(model, input_ids[:, :7], cache=static)
    static.crop(-2)
    filled(model, input_ids, first=5, cache=static)
    static.crop(-3)
    assert [tensor.data_ptr() for tensor in cache_tensors(static)] == addresses
    assert_close(next_logits(model, static), next_logits(model, filled(model, input_ids[:, :9])))


def test_what_generate_asks_of_a_cache(model):
    dynamic, static = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=20)
    for cache in (dynamic, static):
        model(torch.randint(0, 61, (1, 6)), cache=cache)
        # A linear cache is taken for one that counts no tokens.
        assert not any(getattr(cache, "is_linear", [False]))
        assert cache.is_compileable == (cache is static)
        cache.activate_past_recording()
        assert not cache.is_compileable or not any(hasattr(layer, "state") for layer in cache.layers)
    assert dynamic.is_croppable
    assert static.is_croppable or not getattr(StaticLayer, "is_croppable", False)


def test_the_state_of_the_published_width_is_72_kib_a_sequence():
    config = SumAggConfig(
        vocab_size=61,
        num_hidden_layers=12,
        layer_types=["summation"] * 12,
        intermediate_size=8,
        **SumAggConfig.values_of_0_1,
    )
    model = SumAggForCausalLM(config).to(torch.bfloat16)
    cache = DynamicCache(config=config)
    for length in (1, 100, 7):
        with torch.no_grad():
            model(torch.randint(0, 61, (2, length)), cache=cache)
        assert sum(tensor.untyped_storage().nbytes() for tensor in cache_tensors(cache)) == 2 * 72 * 1024


def test_the_memory_of_sliding_attention_is_constant():
    model = build(SumAggForCausalLM, sumagg_config("sliding", position_embedding_type="sinusoidal"))
    cache, sizes = DynamicCache(config=model.config), set()
    for length in (40, 1, 1, 40, 1):
        with torch.no_grad():
            model(torch.randint(0, 61, (1, length)), cache=cache)
        sizes.add(sum(tensor.numel() for tensor in cache_tensors(cache)))
    # The sums of two heads, the last inputs of the convolution over values, keys and queries, and the keys and values.
    assert sizes == {2 * 8 * 8 + 3 * 48 + 2 * 4 * 16}
