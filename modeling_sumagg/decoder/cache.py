"""The cache layers of sliding attention, and how the caches that users and `generate` bring are made to fit a model."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.utils import is_tracing

from .recurrence import Call, RecurrentLayer, State, StaticRecurrentLayer


def append_columns(
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    initial_state: State | None,
    attention_mask: torch.Tensor | None,
    document_ids: None,
    num_columns: int,
    position_ids: torch.Tensor | None = None,
    num_sinks: int = 0,
) -> tuple[tuple[torch.Tensor, torch.Tensor], State]:
    """
    The recurrence of sliding attention, whose state are the keys and values of the last real tokens, and before them
    those of the first `num_sinks` tokens of the last document.

    Args:
        key, value (`torch.Tensor` of shape `[B, H, T, p]`): those of a segment.
        initial_state (`tuple`, *optional*): the keys and values `[B, H, P, p]` before it, and `[B, P]`, bool, which of
            these columns are real (left out: all). Real ones are at the right end.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool, *optional*): the real tokens of the segment.
        document_ids: not used; documents are told apart by the mask of the attention.
        num_columns (`int`): how many columns the state holds at most, those of the sinks included.
        position_ids (`torch.Tensor` of shape `[1 or B, T]`, *optional*): of the segment; needed with sinks.
        num_sinks (`int`, defaults to 0): sinks of a document.

    Returns:
        `tuple`: the keys and values `[B, H, P + T, p]` that attention sees, and the state after the segment.
    """
    past_key, past_value, *past_real = (key[:, :, :0], value[:, :, :0]) if initial_state is None else initial_state
    keys, values = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
    first = max(keys.shape[2] - num_columns, 0)
    is_all_real = not past_real and attention_mask is None
    if is_all_real and (first == 0 or num_sinks == 0):
        state = (keys[:, :, first:], values[:, :, first:])
        # The slice of a long prefill would keep all its columns alive; after a decode step a copy costs more.
        return (keys, values), tuple(tensor.clone() for tensor in state) if first > num_columns else state

    length = key.shape[2]
    before = past_real[0] if past_real else past_key.new_ones(past_key[:, 0, :, 0].shape, dtype=torch.bool)
    new = key.new_ones(key[:, 0, :, 0].shape, dtype=torch.bool) if attention_mask is None else attention_mask
    real = torch.cat([before, new], dim=1)
    if is_all_real:
        order = torch.arange(keys.shape[2], device=keys.device).expand_as(real)
    elif length == 1:
        # Where the new token is padding it goes to the left end, where padding is dropped first.
        order = torch.arange(keys.shape[2], device=keys.device)
        order = torch.where(real[:, -1:], order, order.roll(1))
    else:
        # The newest real columns first, padding last; ONNX knows `topk`, and no `argsort`.
        recency = real * torch.arange(1, real.shape[1] + 1, device=real.device)
        order = recency.topk(real.shape[1], dim=1).indices.flip(1)
    kept = torch.arange(first, keys.shape[2], device=keys.device)
    if num_sinks and first:
        # Real columns are now at the right end. From there the last document begins so many columns to the left as its
        # last token has a position; if it reaches further back than the columns, these are its sinks and its last ones.
        num_real = real.sum(1, keepdim=True)
        last = (new * torch.arange(length, device=new.device)).argmax(1, keepdim=True)
        position = position_ids.expand(new.shape[0], -1).gather(1, last)
        begin = keys.shape[2] - torch.minimum(num_real, position + 1)
        rank = kept - first
        kept = torch.where(rank < num_sinks, torch.minimum(kept, begin + rank), kept)
        order = order.gather(1, kept)
    else:
        order = order[:, first:]
    columns = order[:, None, :, None]
    state = tuple(t.gather(2, columns.expand(-1, t.shape[1], -1, t.shape[3])) for t in (keys, values))
    return (keys, values), state if is_all_real else (*state, real.gather(1, order))


@dataclass
class AppendColumns(Call):
    """A call of [`append_columns`], which can be cut, so that what was all real stays so."""

    def first(self, length: int) -> "AppendColumns":
        arguments = {
            name: value[:, :length] if isinstance(value, torch.Tensor) else value
            for name, value in self.arguments.items()
        }
        inputs = tuple(tensor[:, :, :length] for tensor in self.inputs)
        return replace(self, length=length, inputs=inputs, arguments=arguments)


class SlidingWindowLayer(RecurrentLayer):
    """
    Cache layer of sliding attention: keys and values of the last `sliding_window - 1` *real* tokens of every row, and of
    its `num_sinks` first ones. It holds the state of a sum beside them.

    transformers' own sliding layers keep the last columns, padding included, so that padding inside a continued
    segment pushes real tokens out. This one keeps the real tokens, moved to the right end.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, num_sinks: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.sliding_window, self.num_sinks = sliding_window, num_sinks

    @property
    def columns(self) -> State | None:
        """Keys and values `[B, H, P, p]`, the newest last, and unless all are real `[B, P]`, bool, which are."""
        return self.states.get(append_columns.__name__)

    # The base class of transformers sets both to `None` at the start.
    keys = property(lambda self: self.columns[0] if self.columns else None, lambda self, value: None)
    values = property(lambda self: self.columns[1] if self.columns else None, lambda self, value: None)

    @property
    def num_columns(self) -> int:
        return self.columns[0].shape[2] if self.columns else 0

    @property
    def most_columns(self) -> int:
        return self.sliding_window - 1 + self.num_sinks

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        call: Call | None = None,
        restart: torch.Tensor | None = None,
    ) -> tuple[Any, Any]:
        """
        Append a segment `[B, H, T, p]`, of which `attention_mask` `[B, T]` says which tokens are real, and return the
        columns kept so far with the segment behind them, `[B, H, P + T, p]`; or make the `call` of a sum.
        """
        if call is not None:
            return super().update(key_states, call=call, restart=restart)
        call = AppendColumns(
            append_columns,
            key_states.shape[2],
            (key_states, value_states),
            {"attention_mask": attention_mask, "document_ids": None, "position_ids": position_ids},
            {"num_columns": self.most_columns, "num_sinks": self.num_sinks},
        )
        return super().update(key_states, call=call)[0]

    def real_columns(self, attention_mask: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor | None:
        """
        Which of the columns that [`~SlidingWindowLayer.update`] returns are real, `[B, P + T]`; `None`: all of them.

        Args:
            attention_mask (`torch.Tensor` of shape `[B, T]`, *optional*): which tokens of the segment are real.
            inputs (`torch.Tensor` of shape `[B, T, ...]`): any tensor of the segment, for the shape and the device.
        """
        past = self.past_real(inputs)
        if attention_mask is None:
            if past is None:
                return None
            attention_mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        if past is None:
            past = torch.ones(inputs.shape[0], self.num_columns, dtype=torch.bool, device=inputs.device)
        return torch.cat([past.to(inputs.device), attention_mask.to(inputs.device)], dim=1)

    def past_real(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """Which of the columns held are real, `[B, P]`; `None`: all."""
        return self.columns[2] if self.columns and len(self.columns) > 2 else None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_columns + query_length, self.get_seq_length() - self.num_columns

    def get_max_length(self) -> int:
        return self.sliding_window


class StaticSlidingLayer(SlidingWindowLayer, StaticRecurrentLayer):
    """[`SlidingWindowLayer`] in a `StaticCache`: all its columns are there from the start, empty, and stay in place."""

    @property
    def num_columns(self) -> int:
        return self.most_columns

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        super().lazy_initialization(key_states)
        columns = key_states.new_zeros(*key_states.shape[:2], self.num_columns, key_states.shape[3])
        self._hold(append_columns.__name__, (columns, columns, self.past_real(key_states)))

    def past_real(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.columns:
            return self.columns[2]
        return torch.zeros(inputs.shape[0], self.num_columns, dtype=torch.bool, device=inputs.device)


# What may stand where an attention layer of a type is, in a dynamic and in a static cache; elsewhere, recurrent layers.
_ATTENTION_LAYERS: dict[str, tuple[type[CacheLayerMixin], ...]] = {
    "full_attention": (DynamicLayer, StaticLayer),
    "sliding_attention": (SlidingWindowLayer, StaticSlidingLayer),
}


def _own_layer(
    layer: CacheLayerMixin, layer_type: str, config: PreTrainedConfig, record_past: bool
) -> CacheLayerMixin:
    """The layer, or, in place of an empty one that another copy of this code or transformers made, one of ours."""
    initialized_early = isinstance(layer, StaticSlidingWindowLayer) and layer.is_initialized
    if (
        layer_type == "full_attention"
        or (layer.is_initialized and not initialized_early)
        or layer.get_seq_length() > 0
    ):
        return layer
    is_static = isinstance(layer, StaticSlidingWindowLayer) or type(layer).__name__.startswith("Static")
    arguments = {"max_cache_len": layer.max_cache_len} if is_static else {}
    if layer_type != "sliding_attention":
        cls: type[RecurrentLayer] = StaticRecurrentLayer if is_static else RecurrentLayer
        is_ours, is_recurrent = isinstance(layer, RecurrentLayer), type(layer).__name__ == cls.__name__
    else:
        cls = StaticSlidingLayer if is_static else SlidingWindowLayer
        arguments |= {"sliding_window": config.sliding_window, "num_sinks": config.attention_sinks}
        is_ours = isinstance(layer, SlidingWindowLayer)
        is_recurrent = isinstance(layer, DynamicSlidingWindowLayer | StaticSlidingWindowLayer) or (
            type(layer).__name__ == cls.__name__
        )
    if is_ours or not is_recurrent:
        return layer
    own = cls(**arguments)
    own.record_past = record_past
    if initialized_early:
        own.lazy_initialization(layer.keys[:, :, :0])
    return own


class EarlyExitCache(DynamicCache):
    """The cache of the first layers of a model. A forward pass with it ends after them."""

    def __init__(self, config: PreTrainedConfig, num_layers: int):
        super().__init__(config=config)
        del self.layers[num_layers:]


def start_over(cache: Cache) -> None:
    """
    Empty the layers of an assistant's cache if one of them had to forget everything ([`~RecurrentLayer.crop`]).

    An assistant with another tokenizer goes back further than the tokens since the last `crop`, where what it said is
    read as other tokens. `generate` hands it all tokens again.
    """
    lengths = [int(layer.get_seq_length()) for layer in cache.layers]
    if 0 in lengths:
        for layer, length in zip(cache.layers, lengths, strict=True):
            if length > 0:
                layer.crop(-length)


def adopt_cache(cache: Cache, config: PreTrainedConfig) -> None:
    """
    Make `cache` fit a model with recurrent layers, in place; a cache that already fits is left as it is.

    A `DynamicCache()` that was made without a config gets the layers of `config`. As long as they are empty,
    transformers' own sliding layers are replaced by [`SlidingWindowLayer`], and the layers of another copy of this
    module by its own: layer types are registered by name for the whole process, and a checkpoint may bring its own
    version of this code.

    Args:
        cache (`transformers.Cache`): the cache passed to the model.
        config (`PreTrainedConfig`): the model's config, with `layer_types`.

    Raises:
        `ValueError`: the cache holds another number or other types of layers, or its layers have seen different numbers
            of tokens.
    """
    if cache.layer_class_to_replicate is not None and not cache.layers:
        cache.layers = DynamicCache(config=config).layers
        cache.layer_class_to_replicate = None
    layer_types = config.layer_types
    if isinstance(cache, EarlyExitCache):
        layer_types = layer_types[: len(cache.layers)]
    if len(cache.layers) != len(layer_types):
        raise ValueError(
            f"`cache` has {len(cache.layers)} layers and the model {len(layer_types)}. Make the cache with "
            "`DynamicCache(config=model.config)`."
        )
    # Of the cache as a whole: transformers' static sliding layers have no record that could be switched on.
    record_past = any(getattr(layer, "record_past", False) for layer in cache.layers)
    for i, layer_type in enumerate(layer_types):
        layer = cache.layers[i] = _own_layer(cache.layers[i], layer_type, config, record_past)
        if layer_type in _ATTENTION_LAYERS:
            fits = isinstance(layer, _ATTENTION_LAYERS[layer_type])
        else:
            fits = isinstance(layer, RecurrentLayer) and not isinstance(layer, SlidingWindowLayer)
        if not fits:
            raise ValueError(
                f"Layer {i} of the model is of type {layer_type!r}, and `cache` has a {type(layer).__name__} there. Make "
                "the cache with `DynamicCache(config=model.config)` or `StaticCache(config=model.config, "
                "max_cache_len=...)`, and fill it with this model only."
            )
    if any(getattr(layer, "rows_are_beams", False) for layer in cache.layers):
        raise ValueError(
            "The rows of `cache` are the beams that beam search was left with, and not the sequences that it returned: "
            "start from an empty cache."
        )
    if not cache.is_compileable and not is_tracing():
        # `crop` goes from layer to layer, and attention layers go back further than recurrent ones can.
        lengths = [layer.get_seq_length() for layer in cache.layers]
        if len({length for length in lengths if not isinstance(length, torch.Tensor)}) > 1:
            raise ValueError(
                f"The layers of `cache` have seen different numbers of tokens, {lengths}: a forward pass or a `crop` has "
                "failed halfway. Start again from an empty cache, or from a copy made before."
            )
