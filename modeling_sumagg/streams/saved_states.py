"""A decode state as tensors with names, to be saved and loaded again."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedConfig

from ..decoder.cache import adopt_cache
from ..decoder.recurrence import RecurrentLayer
from ..modeling_sumagg_speech import FramesLayer, adopt_cache_of_frames


def cache_to_tensors(cache: DynamicCache) -> dict[str, torch.Tensor]:
    """
    What a dynamic cache holds, by names that a safetensors file can have; [`cache_from_tensors`] is the inverse.

    Args:
        cache (`transformers.DynamicCache`): a cache that a forward pass has filled. What was recorded for `crop` is
            left out.

    Returns:
        `dict[str, torch.Tensor]`: `length` (0-d, int64: the tokens seen, padding included; of speech the frames, and
        `length_of_blocks` the tokens), `real_tokens` (`[B, length]`, bool, where some are padding), and for every layer `i` `layers.{i}.{operator}.{j}` (the tensors of the state of a
        recurrence, sliding attention's columns among them), or `layers.{i}.keys` and `.values` of full attention.

    Raises:
        `TypeError`: the cache is static.
        `ValueError`: the cache is empty, or a forward pass waits for its `crop`.
    """
    if not isinstance(cache, DynamicCache):
        raise TypeError(f"Only a `DynamicCache` can be saved, got a {type(cache).__name__}.")
    if cache.get_seq_length() == 0:
        raise ValueError("The cache is empty: there is nothing to save.")
    tensors = {"length": torch.tensor(cache.get_seq_length())}
    if isinstance(cache.layers[0], FramesLayer):
        tensors["length_of_blocks"] = torch.tensor(cache.get_seq_length(1))
    real_tokens = next((layer.real_tokens for layer in cache.layers if isinstance(layer, RecurrentLayer)), None)
    if real_tokens is not None:
        tensors["real_tokens"] = real_tokens[:, : cache.get_seq_length()].contiguous()
    for i, layer in enumerate(cache.layers):
        if getattr(layer, "recorded", 0):
            raise ValueError(
                f"Layer {i} has recorded {layer.recorded} tokens. Call `crop(0)` before saving the cache."
            )
        if isinstance(layer, RecurrentLayer):
            held = {f"{name}.{j}": tensor for name, state in layer.states.items() for j, tensor in enumerate(state)}
        else:
            held = {"keys": layer.keys, "values": layer.values}
        tensors |= {f"layers.{i}.{name}": tensor.contiguous() for name, tensor in held.items()}
    return tensors


def cache_from_tensors(tensors: dict[str, torch.Tensor], config: PreTrainedConfig) -> DynamicCache:
    """
    The cache of which [`cache_to_tensors`] gave the tensors.

    Args:
        tensors (`dict[str, torch.Tensor]`): the tensors, on the device of the model.
        config (`PreTrainedConfig`): the config of the model that filled the cache.

    Raises:
        `ValueError`: the names are not those of a cache of such a model.
    """
    cache = DynamicCache(config=config)
    has_frames = "length_of_blocks" in tensors
    (adopt_cache_of_frames if has_frames else adopt_cache)(cache, config)
    left = dict(tensors)
    try:
        length = int(left.pop("length"))
        length_of_blocks = int(left.pop("length_of_blocks")) if has_frames else length
        real_tokens = left.pop("real_tokens", None)
        for i, layer in enumerate(cache.layers):
            own = [name for name in left if name.startswith(f"layers.{i}.")]
            if isinstance(layer, RecurrentLayer):
                states: dict[str, list[torch.Tensor]] = {}
                for name in sorted(own, key=lambda name: int(name.rpartition(".")[2])):
                    states.setdefault(name.split(".")[2], []).append(left.pop(name))
                if not states:
                    raise KeyError(f"layers.{i}")
                layer.lazy_initialization(next(iter(states.values()))[0])
                layer.states = {name: tuple(state) for name, state in states.items()}
                layer.cumulative_length = length if i == 0 else length_of_blocks
                # The first of these layers knows the padding of all.
                layer.real_tokens, real_tokens = real_tokens, None
            else:
                keys, values = left.pop(f"layers.{i}.keys"), left.pop(f"layers.{i}.values")
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(f"Not the tensors of a cache of this model: {error} is missing.") from None
    if left:
        raise ValueError(f"Not the tensors of a cache of this model, which has no {sorted(left)}.")
    return cache


def write_stream(
    path: Path, cache: DynamicCache | None, tensors: dict[str, torch.Tensor], counts: dict[str, int]
) -> None:
    """Write the state of a stream as safetensors, whole or not at all: its cache, other tensors, and what it counts."""
    held = {} if cache is None else {f"cache.{name}": tensor for name, tensor in cache_to_tensors(cache).items()}
    temporary = path.with_name(path.name + ".tmp")
    save_file({**held, **tensors}, temporary, metadata={"counts": json.dumps(counts)})
    os.replace(temporary, path)


def read_stream(
    path: Path, config: PreTrainedConfig, device: torch.device
) -> tuple[DynamicCache | None, dict[str, torch.Tensor], dict[str, int]]:
    """
    What [`write_stream`] wrote.

    Raises:
        `ValueError`: the file holds something else, or the cache of another model.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        if "counts" not in (file.metadata() or {}):
            raise ValueError(f"{path} holds no state that this script saved.")
        counts = json.loads(file.metadata()["counts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    cache = {name.removeprefix("cache."): tensors.pop(name) for name in list(tensors) if name.startswith("cache.")}
    return (cache_from_tensors(cache, config) if cache else None), tensors, counts
