"""What can be done with a cache beside decoding from it."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from modeling_sumagg.streams.saved_states import cache_from_tensors, cache_to_tensors

from .kinds import KINDS, MAIN_KINDS, logits_alone, tiny_model


ROWS = [[5, 9, 2, 30, 7, 7], [3, 4, 11, 12, 13, 14]]
NEXT = [[1, 2], [8, 9]]


def filled(model, **kwargs) -> DynamicCache:
    """A cache after `ROWS`, of which the last two tokens of the second row are padding."""
    cache = DynamicCache(config=model.config, **kwargs)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.no_grad():
        model(torch.tensor(ROWS), attention_mask=mask, cache=cache)
    return cache


def assert_goes_on(model, cache: Cache, rows: list[int]) -> None:
    """The cache, whose rows are the `rows` of `filled`, predicts what follows `NEXT`."""
    mask = torch.tensor([[1] * 8, [1] * 4 + [0] * 2 + [1] * 2])[rows]
    with torch.no_grad():
        logits = model(torch.tensor(NEXT)[rows], attention_mask=mask, cache=cache).logits
    for row, actual in zip(rows, logits, strict=True):
        history = (ROWS[0] if row == 0 else ROWS[1][:4]) + NEXT[row]
        torch.testing.assert_close(actual, logits_alone(model, history)[-2:], rtol=1e-4, atol=1e-4)


def tensors(cache: Cache) -> list[torch.Tensor]:
    return [t for layer in cache.layers for t in (getattr(layer, "state", None) or (layer.keys, layer.values))]


@pytest.mark.parametrize("kind", KINDS)
def test_batch_surgery(kind):
    model = tiny_model(kind)
    cache = filled(model)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    assert cache.batch_size == 3
    assert_goes_on(model, cache, [1, 0, 0])


def stock_reset_keeps_the_length() -> bool:
    """Whether `reset` of transformers' own attention layer leaves its length (it did until 5.17)."""
    layer = DynamicLayer()
    layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    layer.reset()
    return layer.get_seq_length() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_reset(kind):
    model = tiny_model(kind)
    cache = filled(model)
    cache.reset()
    inputs = torch.tensor([[4, 3, 2]])
    if "full_attention" in model.config.layer_types and stock_reset_keeps_the_length():
        with pytest.raises(ValueError, match="different numbers of tokens"):
            model(inputs, cache=cache)
        return
    assert cache.get_seq_length() == 0
    # Another batch size too.
    with torch.no_grad():
        logits = model(inputs, cache=cache).logits[0]
    torch.testing.assert_close(logits, logits_alone(model, [4, 3, 2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_copies_are_whole_and_independent(kind, copied):
    model = tiny_model(kind)
    cache = filled(model)
    twin = copied(cache)
    before = [t.clone() for t in tensors(twin)]
    assert_goes_on(model, cache, [0, 1])
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(twin), strict=True))
    assert_goes_on(model, twin, [0, 1])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_recorded_caches_are_copied_with_their_record(kind, copied):
    model = tiny_model(kind)
    cache = filled(model)
    cache.activate_past_recording()
    with torch.no_grad():
        mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 2 + [1] * 3])
        model(torch.tensor([[1, 1, 1], [2, 2, 2]]), attention_mask=mask, cache=cache)
    twin = copied(cache)
    twin.crop(-3)
    assert_goes_on(model, twin, [0, 1])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_static_caches_are_copied(kind, copied):
    model = tiny_model(kind)
    cache = StaticCache(config=model.config, max_cache_len=16)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.no_grad():
        model(torch.tensor(ROWS), attention_mask=mask, cache=cache)
    assert_goes_on(model, copied(cache), [0, 1])
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("kind", KINDS)
def test_layers_offload_and_prefetch(kind):
    model = tiny_model(kind)
    cache = filled(model)
    for layer, layer_type in zip(cache.layers, model.config.layer_types, strict=True):
        # A device of its own stands for the accelerator: what is prefetched must land there.
        if layer_type != "full_attention":
            layer.offload()
            layer.device = torch.device("meta")
            layer.prefetch()
            held = layer.state if hasattr(layer, "state") else (layer.keys, layer.values)
            assert all(t.device.type == "meta" for t in held)
    cache = filled(model)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert_goes_on(model, cache, [0, 1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads from CUDA devices only")
@pytest.mark.parametrize("kind", MAIN_KINDS)
def test_an_offloaded_cache(kind):
    model = copy.deepcopy(tiny_model(kind)).to("cuda")
    prompt = torch.tensor(ROWS[:1], device="cuda")
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    generated = model.generate(prompt, max_new_tokens=8, do_sample=False, cache_implementation="offloaded")
    assert generated.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_saved_as_safetensors(kind, tmp_path):
    model = tiny_model(kind)
    cache = filled(model)
    held = cache_to_tensors(cache)
    save_file(held, tmp_path / "cache.safetensors")
    loaded = cache_from_tensors(load_file(tmp_path / "cache.safetensors"), model)
    again = cache_to_tensors(loaded)
    assert held.keys() == again.keys()
    assert all(torch.equal(held[name], again[name]) for name in held)
    assert_goes_on(model, loaded, [0, 1])


def test_what_cannot_be_saved_or_loaded_says_why():
    model = tiny_model("sumagg-hybrid")
    with pytest.raises(ValueError, match="empty"):
        cache_to_tensors(DynamicCache(config=model.config))
    with pytest.raises(TypeError, match="a StaticCache"):
        cache_to_tensors(StaticCache(config=model.config, max_cache_len=8))
    cache = filled(model)
    held = cache_to_tensors(cache)
    with pytest.raises(ValueError, match="layers.0"):
        cache_from_tensors({name: t for name, t in held.items() if not name.startswith("layers.0.")}, model)
    with pytest.raises(ValueError, match="unknown"):
        cache_from_tensors({**held, "layers.3.causal_sum.0": held["length"]}, model)
    cache.activate_past_recording()
    with torch.no_grad():
        model(torch.tensor([[1], [2]]), cache=cache)
    with pytest.raises(ValueError, match="crop"):
        cache_to_tensors(cache)
