"""The state of one row of a batch, and a batch made of such states."""

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedConfig

from ..decoder.cache import adopt_cache, append_columns
from ..decoder.recurrence import RecurrentLayer
from .saved_states import cache_to_tensors


# The tensors of a cache with one row and without padding, by the names of `cache_to_tensors`.
RowState = dict[str, torch.Tensor]


def _kind(name: str) -> str:
    """Of a tensor of a cache, by its name: what its third dimension `[B, H, columns, p]` holds, if anything."""
    part = name.split(".")[2]
    return {"keys": "all", "values": "all", append_columns.__name__: "window"}.get(part, "state")


def split_rows(cache: DynamicCache, real: torch.Tensor) -> list[RowState]:
    """
    What a cache holds of each of its rows, as if the row had been read alone and without padding.

    Args:
        cache (`transformers.DynamicCache`): a cache of `B` rows that has seen `C` tokens, padding included.
        real (`torch.Tensor` of shape `[B, C]`, bool): which of these tokens are real.

    Returns:
        `list[RowState]`: copies; nothing else holds their memory.
    """
    tensors = cache_to_tensors(cache)
    rows = []
    for i, seen in enumerate(real):
        row = {"length": seen.sum().cpu()}
        for name, tensor in tensors.items():
            # The length and the padding of a row are in `real`.
            kind = _kind(name) if name.startswith("layers.") else "none"
            stem, _, part = name.rpartition(".")
            if kind == "state":
                row[name] = tensor[i : i + 1].clone()
            elif kind == "all":
                row[name] = tensor[i : i + 1, :, seen.to(tensor.device)]
            elif kind == "window" and part != "2":
                in_window = tensors.get(f"{stem}.2")
                kept = slice(None) if in_window is None else in_window[i].to(tensor.device)
                row[name] = tensor[i : i + 1, :, kept].clone()
        rows.append(row)
    return rows


def join_rows(rows: list[RowState | None], real: torch.Tensor, config: PreTrainedConfig) -> DynamicCache:
    """
    A cache of several rows, each with a state of its own; [`split_rows`] is the inverse.

    Args:
        rows (`list[RowState | None]`): the states of `B` rows; `None` stands for a row without tokens.
        real (`torch.Tensor` of shape `[B, C]`, bool): the columns of the cache in which the tokens of a row stand, as
            many as its state has seen.
        config (`PreTrainedConfig`): the config of the model that filled the states.

    Returns:
        `transformers.DynamicCache`: it shares no memory with the states.
    """
    cache = DynamicCache(config=config)
    filled = next((row for row in rows if row is not None), None)
    if filled is None:
        return cache
    adopt_cache(cache, config)
    # The first recurrent layer knows the padding of all.
    real_tokens = None if real.all() else real
    for i, layer in enumerate(cache.layers):
        held: dict[str, list[torch.Tensor]] = {}
        for name, like in filled.items():
            if not name.startswith(f"layers.{i}."):
                continue
            kind = _kind(name)
            nothing = torch.zeros_like(like) if kind == "state" else like[:, :, :0]
            parts = [nothing if row is None else row[name] for row in rows]
            if kind == "all":
                parts = [_spread(part, seen) for part, seen in zip(parts, real, strict=True)]
            elif kind == "window":
                columns = min(real.shape[1], layer.most_columns)
                num_real = torch.tensor([part.shape[2] for part in parts])
                parts = [F.pad(part, (0, 0, columns - part.shape[2], 0)) for part in parts]
            held.setdefault(name.split(".")[2], []).append(torch.cat(parts))
        if not isinstance(layer, RecurrentLayer):
            layer.update(*(held[name][0] for name in ("keys", "values")))
            continue
        if append_columns.__name__ in held:
            in_window = torch.arange(columns) >= columns - num_real[:, None]
            if not in_window.all():
                held[append_columns.__name__].append(in_window.to(parts[0].device))
        layer.lazy_initialization(next(iter(held.values()))[0])
        layer.states = {operator: tuple(state) for operator, state in held.items()}
        layer.cumulative_length = real.shape[1]
        layer.real_tokens, real_tokens = real_tokens, None
    return cache


def _spread(columns: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Keys or values `[1, H, length, p]` in those of the columns `[1, H, C, p]` that are `real` `[C]`, zeros elsewhere."""
    spread = columns.new_zeros(*columns.shape[:2], len(real), columns.shape[3])
    spread[:, :, real.to(columns.device)] = columns
    return spread


__all__ = ["RowState", "join_rows", "split_rows"]
