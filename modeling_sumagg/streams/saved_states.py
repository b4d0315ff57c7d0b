"""A decode state as named tensors, and the state of a stream as a file that only its own model takes back."""

import functools
import hashlib
import json
import os
import reprlib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..common.whole_files import write_whole
from ..decoder.cache import SlidingWindowLayer, adopt_cache, append_columns
from ..decoder.recurrence import RecurrentLayer
from ..models.modeling_sumagg_speech import FramesLayer, adopt_cache_of_frames


# Of the state of an operator, the tensors that hold counts, or sums of weights, squares or memberships.
NEVER_NEGATIVE = {"causal_mean": (1,), "causal_token_statistics": (0, 1, 2), "stack_frames": (1,)}
# How many tokens a cache has seen; that of a speech model, how many frames, and how many tokens.
LENGTHS = ("length", "length_of_blocks")


def cache_to_tensors(cache: DynamicCache) -> dict[str, torch.Tensor]:
    """
    The content of a dynamic cache under names that a safetensors file can have; [`cache_from_tensors`] is the inverse.

    Args:
        cache (`transformers.DynamicCache`): a cache that a forward pass has filled. The record for `crop` is left out.

    Returns:
        `dict[str, torch.Tensor]`: `length` (0-d, int64: the number of tokens seen, padding included; in a speech model
        the number of frames, and `length_of_blocks` the number of tokens), `real_tokens` (`[B, length]`, bool, where
        some tokens are padding), and for every layer `i`
        `layers.{i}.{operator}.{j}` (the tensors of a recurrent state, sliding attention's columns among them), or
        `layers.{i}.keys` and `.values` of full attention.

    Raises:
        `TypeError`: the cache is static.
        `ValueError`: the cache is empty, or it holds recorded tokens.
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


def cache_from_tensors(tensors: dict[str, torch.Tensor], model: PreTrainedModel) -> DynamicCache:
    """
    The cache from which [`cache_to_tensors`] made the tensors, on the devices of the model.

    The model reads one token first. Its state after that token has the operators, shapes and dtypes that every state of
    this model has.

    Args:
        tensors (`dict[str, torch.Tensor]`): the tensors, on any device.
        model (`PreTrainedModel`): the model that filled the cache.

    Raises:
        `ValueError`: a tensor is missing or unknown, has another shape or dtype than in a state of this model, has
            entries that are not finite, or has negative entries where they cannot be.
    """
    reference = _cache_after_one_token(model)
    expected = cache_to_tensors(reference)
    optional = {"real_tokens": torch.empty(1, 0, dtype=torch.bool, device=model.device)}
    # Sliding attention also holds which of its columns are real, unless all are.
    optional |= {
        f"layers.{i}.{append_columns.__name__}.2": layer.keys.new_empty(1, 0, dtype=torch.bool)
        for i, layer in enumerate(reference.layers)
        if isinstance(layer, SlidingWindowLayer)
    }
    known = {**expected, **optional}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - known.keys())
    if missing or unknown:
        raise ValueError(f"Not the tensors of a state of this model: missing {missing}, unknown {unknown}.")
    length, *blocks = [_length(name, tensors[name]) for name in LENGTHS if name in expected]
    batch_sizes = {tensor.shape[:1] for name, tensor in tensors.items() if name not in LENGTHS}
    if len(batch_sizes) != 1 or sum(map(sum, batch_sizes)) < 1:
        raise ValueError(f"All tensors must have one batch size, at least 1, got {sorted(map(list, batch_sizes))}.")
    for name in [name for name in tensors if name not in LENGTHS]:
        if name == "real_tokens":
            _check(name, tensors[name], known[name], length, {1: length})
            continue
        i = int(name.split(".")[1])
        seen = blocks[0] if i and blocks else length
        _check(name, tensors[name], known[name], seen, _num_columns(reference.layers[i], seen, name))
    return build_cache({name: tensor.to(known[name].device) for name, tensor in tensors.items()}, model.config)


def build_cache(tensors: dict[str, torch.Tensor], config: PreTrainedConfig) -> DynamicCache:
    """
    The cache that holds the tensors, which nobody has changed since [`cache_to_tensors`] took them from a cache of a model
    with this config. Gradients pass through them. [`cache_from_tensors`] checks tensors of unknown origin.
    """
    cache = DynamicCache(config=config)
    (adopt_cache_of_frames if "length_of_blocks" in tensors else adopt_cache)(cache, config)
    length, real_tokens = int(tensors["length"]), tensors.get("real_tokens")
    for i, layer in enumerate(cache.layers):
        length = int(tensors["length_of_blocks"]) if i == 1 and "length_of_blocks" in tensors else length
        names = [name for name in tensors if name.startswith(f"layers.{i}.")]
        if isinstance(layer, RecurrentLayer):
            states: dict[str, list[torch.Tensor]] = {}
            for name in sorted(names, key=lambda name: int(name.rpartition(".")[2])):
                states.setdefault(name.split(".")[2], []).append(tensors[name])
            layer.lazy_initialization(tensors[names[0]])
            layer.states = {operator: tuple(state) for operator, state in states.items()}
            layer.cumulative_length = length
            # The first of these layers knows the padding of all.
            layer.real_tokens, real_tokens = real_tokens, None
        else:
            keys, values = (tensors[f"layers.{i}.{name}"] for name in ("keys", "values"))
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
    return cache


@torch.no_grad()
def _cache_after_one_token(model: PreTrainedModel) -> DynamicCache:
    config, cache = model.config, DynamicCache(config=model.config)
    if model.main_input_name == "input_features":
        inputs = torch.zeros(1, config.subsampling_factor, config.num_mel_bins, device=model.device)
    else:
        inputs = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model(inputs, past_key_values=cache, use_cache=True)
    return cache


def _length(name: str, tensor: torch.Tensor) -> int:
    # A model of frames may not have completed its first token.
    least = 1 if name == "length" else 0
    if tensor.dtype != torch.int64 or tensor.shape != () or tensor.item() < least:
        raise ValueError(f"`{name}` must be one int64 number of at least {least}, got {tensor}.")
    return int(tensor)


def _num_columns(layer: CacheLayerMixin, length: int, name: str) -> dict[int, int]:
    """The one dimension of an attention layer's tensor that depends on the number of tokens seen, and its size."""
    if f".{append_columns.__name__}." in name:
        return {1 if name.endswith(".2") else 2: min(length, layer.most_columns)}
    return {} if isinstance(layer, RecurrentLayer) else {2: length}


def _check(name: str, tensor: torch.Tensor, like: torch.Tensor, length: int, num_columns: dict[int, int]) -> None:
    """
    Raises:
        ValueError: after `length` tokens, the tensor cannot stand where the state after one token has the tensor `like`,
            `[1, ...]`.
    """
    shape = [num_columns.get(dimension, size) for dimension, size in enumerate(like.shape)]
    if tensor.dtype != like.dtype or [*tensor.shape[1:]] != shape[1:]:
        raise ValueError(
            f"`{name}` must be of {like.dtype} with the shape {['B', *shape[1:]]}, got {tensor.dtype} and "
            f"{[*tensor.shape]}."
        )
    if not tensor.isfinite().all():
        raise ValueError(f"`{name}` must be finite, got NaN or infinity.")
    operator, index = name.split(".")[2:] if name.count(".") == 3 else ("", "0")
    if int(index) not in NEVER_NEGATIVE.get(operator, ()):
        return
    most = torch.inf if tensor.is_floating_point() else length
    if (tensor < 0).any() or (tensor > most).any():
        raise ValueError(
            f"`{name}` must be from 0 to {most} after {length} tokens, got {tensor.min().item()} to {tensor.max().item()}."
        )


def fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """
    What tells a model from every other, as JSON can hold it: its type, the fields that its config class adds to those of
    all configs, and the SHA-256 of its weights.

    Raises:
        `ValueError`: a weight is not in memory, because it is offloaded.
    """
    config = model.config
    own = {field.name for field in fields(config)} - {field.name for field in fields(PreTrainedConfig)}
    values = {name: value for name, value in config.to_dict().items() if name in own}
    weights = model.state_dict()
    for name, weight in weights.items():
        if isinstance(weight, torch.Tensor) and weight.device.type == "meta":
            raise ValueError(f"The weight {name} is offloaded. Load the whole model into memory to save its state.")
    return {
        "model_type": config.model_type,
        "config": json.loads(json.dumps(values)),
        # Without their names, which compiling a model changes.
        "weights": _digest(weight for weight in weights.values() if isinstance(weight, torch.Tensor)),
    }


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        for part in _parts(tensor.detach()):
            part = part.cpu().contiguous()
            # Of one element any stride counts as contiguous, but not for `view`.
            digest.update(part.as_strided([part.numel()], [1]).view(torch.uint8).numpy())
    return digest.hexdigest()


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a quantized weight is made of; of a plain tensor, itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]


class SavedStream:
    """
    A stream of text or speech whose state is a file.

    A subclass sets `model` and `cache`, and implements `own_state` and `restore`.
    """

    model: PreTrainedModel
    cache: DynamicCache | None

    def own_state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """The tensors of the state beside the cache, with always the same dtypes, and its counts."""
        raise NotImplementedError

    def restore(self, cache: DynamicCache | None, tensors: dict[str, torch.Tensor], counts: dict[str, int]) -> None:
        """
        Take a state over.

        Args:
            cache: of this model.
            tensors, counts: named as in `own_state`, of the same dtypes, finite, the counts not negative.

        Raises:
            `ValueError`: they contradict each other. The stream is unchanged.
        """
        raise NotImplementedError

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """That of the model, computed once: the weights of a stream do not change."""
        return fingerprint(self.model)

    def save(self, path: str | os.PathLike) -> None:
        """
        Write the state as safetensors, whole or not at all. The file names the model, and carries a checksum.

        Raises:
            `ValueError`: `path` is a folder, a device or a pipe.
            `OSError`: the file cannot be written.
        """
        tensors, counts = self.own_state()
        if self.cache is not None:
            tensors |= {f"cache.{name}": tensor for name, tensor in cache_to_tensors(self.cache).items()}
        about = {"model": self.fingerprint, "counts": counts, "checksum": _checksum(tensors, counts)}
        # A link may lead to another disk, where the state is to be.
        path = Path(path).resolve()
        write_whole(path, safetensors.torch.save(tensors, metadata={"stream": json.dumps(about)}))

    def load(self, path: str | os.PathLike) -> None:
        """
        Continue from the state that `save` wrote.

        Raises:
            `FileNotFoundError`: there is no such file.
            `ValueError`: the file holds no state of a stream, was damaged, or is of another model. The stream is unchanged.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"There is no state {str(path)!r}.")
        try:
            about, tensors = _read(path)
            _check_same_model(about["model"], self.fingerprint)
            if about["checksum"] != _checksum(tensors, about["counts"]):
                raise ValueError("it was changed or damaged: its content does not have the checksum that it names")
            cached = {name: tensor for name, tensor in tensors.items() if name.startswith("cache.")}
            own = {name: tensor for name, tensor in tensors.items() if name not in cached}
            self._check_own(own, about["counts"])
            cache = None
            if cached:
                names = {name.removeprefix("cache."): tensor for name, tensor in cached.items()}
                cache = cache_from_tensors(names, self.model)
                if cache.batch_size != 1:
                    raise ValueError(f"it has {cache.batch_size} rows, and a stream has one")
            self.restore(cache, own, about["counts"])
        except ValueError as error:
            raise ValueError(f"{path} holds no state of this stream: {error}") from None

    def _check_own(self, tensors: dict[str, torch.Tensor], counts: dict[str, int]) -> None:
        own_tensors, own_counts = self.own_state()
        for names, own_names in ((tensors.keys(), own_tensors.keys()), (counts.keys(), own_counts.keys())):
            if names != own_names:
                raise ValueError(f"it has {sorted(names)}, and this stream {sorted(own_names)}")
        for name, tensor in tensors.items():
            like = own_tensors[name]
            if tensor.dtype != like.dtype or tensor.dim() != like.dim() or not tensor.isfinite().all():
                raise ValueError(f"`{name}` must be of {like.dim()} dimensions, finite and of {like.dtype}")
        for name, count in counts.items():
            if type(count) is not int or count < 0:
                raise ValueError(f"`{name}` must be a whole number of at least 0, got {count!r}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the file says about its state, and the tensors."""
    if not path.is_file():
        raise ValueError("it is no file")
    try:
        # Read once: another process may replace the file, and `safe_open` opens it twice.
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.get("__metadata__", {})
    except SafetensorError as error:
        raise ValueError(f"it is no safetensors file ({error})") from None
    try:
        about = json.loads(metadata.get("stream", ""))
    except (ValueError, RecursionError):
        about = None
    known = {"model": dict, "counts": dict, "checksum": str}
    if not isinstance(about, dict) or any(not isinstance(about.get(name), kind) for name, kind in known.items()):
        raise ValueError("it was not written by `save` of a stream of this version")
    return about, tensors


def _checksum(tensors: dict[str, torch.Tensor], counts: dict[str, int]) -> str:
    names = sorted(tensors)
    text = json.dumps([names, counts], sort_keys=True)
    return hashlib.sha256(f"{text} {_digest(tensors[name] for name in names)}".encode()).hexdigest()


def _check_same_model(there: dict[str, Any], here: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the fingerprint of a file is not that of the model.
    """
    if there.get("model_type") != here["model_type"]:
        raise ValueError(
            f"it is of a model of type {there.get('model_type')!r}, and this one is {here['model_type']!r}"
        )
    config, own = there.get("config"), here["config"]
    # Another version of the config class may have more fields, or fewer.
    shared = sorted(config.keys() & own.keys()) if isinstance(config, dict) else []
    differing = [
        f"`{name}` {reprlib.repr(config[name])}, not {reprlib.repr(own[name])}"  # type: ignore[index]
        for name in shared
        if config[name] != own[name]  # type: ignore[index]
    ]
    if differing or not shared:
        raise ValueError(f"it is of a model of another config: {'; '.join(differing[:3])}")
    if there.get("weights") != here["weights"]:
        raise ValueError("it is of a model of the same config with other weights: load the checkpoint that wrote it")


__all__ = ["SavedStream", "build_cache", "cache_from_tensors", "cache_to_tensors", "fingerprint"]
