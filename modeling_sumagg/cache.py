"""The decode state of the recurrent layers, inside transformers' own `DynamicCache` and `StaticCache`.

A recurrent layer hands its inputs to `Cache.update`, as an attention layer does with its keys and values. The cache
layer runs the operator from the state it holds, keeps the final state and returns the outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.utils import is_torchdynamo_compiling, is_tracing

from .ops.summation import causal_sum
from .ops.token_statistics.formula import TokenStatisticsState
from .ops.token_statistics.operators import causal_token_statistics


State = tuple[torch.Tensor, ...]


def _mark_static(*tensors: torch.Tensor) -> None:
    # Needed for CUDA graphs, and impossible while a graph is traced.
    if not is_torchdynamo_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


class ReversibleLayer(CacheLayerMixin):
    """
    Base of our cache layers: selection along the batch, and going back over the tokens that were recorded.

    Attributes:
        cumulative_length (`int`, or a 0-d tensor in a static cache): the tokens seen, padding included.
        record_past (`bool`): whether what `crop` needs is kept from one `crop` to the next.
        recorded (`int`): the tokens seen since the last `crop`, as far as they were recorded.
    """

    is_croppable = True

    def __init__(self, **kwargs):
        super().__init__()
        self.cumulative_length = 0
        self.record_past = False
        self.recorded = 0

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor held, whose first dimension is the batch, by `function` of it."""
        raise NotImplementedError

    def remove_last(self, length: int) -> None:
        """Go back by `length` recorded tokens and drop the record."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def activate_past_recording(self) -> None:
        """Keep from now on what `crop` needs to go back over the tokens since the last `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """
        Go back by `-tokens_to_remove` tokens, and forget what was recorded.

        Raises:
            `ValueError`: the argument is positive, or more tokens would be removed than were recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes the tokens to remove as a negative number, got {tokens_to_remove}.")
        if -tokens_to_remove > self.recorded:
            raise ValueError(
                f"Cannot remove {-tokens_to_remove} tokens: {self.recorded} were recorded since the last `crop`. Call "
                "`activate_past_recording()` on the cache before the forward passes that are to be undone."
            )
        # `generate` of transformers 5.17 counts in tensors, which must not become the length.
        tokens_to_remove = int(tokens_to_remove)
        self.remove_last(-tokens_to_remove)
        self.cumulative_length += tokens_to_remove
        self.recorded = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.map_batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_batch(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.map_batch(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self.map_batch(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.map_batch(lambda t: t.to(self.device, non_blocking=True))


@dataclass
class _Segment:
    """One call of an operator: the state it found, and what it was given."""

    state: State | None
    inputs: torch.Tensor
    restart: torch.Tensor | None
    per_token: dict[str, torch.Tensor | None]
    parameters: dict[str, Any]

    @property
    def length(self) -> int:
        return self.inputs.shape[-2]

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "_Segment":
        return _Segment(
            None if self.state is None else tuple(function(t) for t in self.state),
            function(self.inputs),
            None if self.restart is None else function(self.restart),
            {name: None if t is None else function(t) for name, t in self.per_token.items()},
            self.parameters,
        )

    def first(self, length: int) -> "_Segment":
        per_token = {name: None if t is None else t[..., :length] for name, t in self.per_token.items()}
        return _Segment(self.state, self.inputs[..., :length, :], self.restart, per_token, self.parameters)


def _restarted(state: State | None, restart: torch.Tensor | None) -> State | None:
    if state is None or restart is None:
        return state
    return tuple(t.masked_fill(restart.view(-1, *[1] * (t.dim() - 1)), 0) for t in state)


class RecurrentLayer(ReversibleLayer):
    """
    Base of the cache layers that hold the state of a recurrence: a few float32 tensors `[B, ...]` of constant size.

    Attributes:
        state (`tuple[torch.Tensor, ...]` or `None`): the state after the last token; `None` before the first.
        num_states (`int`): the number of its tensors.
    """

    supports_early_init = False
    num_states: int

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.state: State | None = None
        self.segments: list[_Segment] = []

    @staticmethod
    def operator(
        inputs: torch.Tensor,
        initial_state: State | None,
        *,
        attention_mask: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        **parameters,
    ) -> tuple[torch.Tensor, State]:
        """The recurrence: inputs and the state before them to outputs and the state after them."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.device, self.batch_size = key_states.device, key_states.shape[0]
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor | None = None,
        *,
        restart: torch.Tensor | None = None,
        per_token: dict[str, torch.Tensor | None],
        parameters: dict[str, Any],
    ) -> tuple[torch.Tensor, None]:
        """
        Run the recurrence over a segment from the state held here, and hold the state after it.

        Args:
            key_states (`torch.Tensor` of shape `[B, T, D]` or `[B, K, T, p]`): the inputs of the operator.
            value_states: not used; the argument is `Cache.update`'s.
            restart (`torch.Tensor` of shape `[B]`, bool, *optional*): the rows in which another document begins
                with the segment. Their state is dropped first.
            per_token (`dict`): the operator's arguments of shape `[B, ..., T]`, the mask and the documents first.
            parameters (`dict`): its other arguments.

        Returns:
            `tuple[torch.Tensor, None]`: the outputs of the operator (`Cache.update` returns pairs).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        segment = _Segment(self.state, key_states, restart, per_token, parameters)
        outputs, state = self._run(segment)
        if self.record_past:
            self.segments.append(segment)
            self.recorded += segment.length
        self._hold(state)
        self.cumulative_length += segment.length
        return outputs, None

    def _run(self, segment: _Segment) -> tuple[torch.Tensor, State]:
        state = _restarted(segment.state, segment.restart)
        return self.operator(segment.inputs, state, **segment.per_token, **segment.parameters)

    def initial_state(self, restart: torch.Tensor | None) -> State | None:
        """The state that the next segment goes on from, in which the rows `restart` `[B]` begin another document."""
        return _restarted(self.state, restart)

    def _hold(self, state: State | None) -> None:
        self.state = state

    def remove_last(self, length: int) -> None:
        # The state after any token is the operator's own intermediate sum: run it over what remains of one segment.
        while length > 0:
            segment = self.segments.pop()
            remaining = max(segment.length - length, 0)
            length -= segment.length - remaining
            # `generate` goes back outside of the forward pass, where autograd may be on again.
            with torch.set_grad_enabled(segment.inputs.requires_grad):
                self._hold(self._run(segment.first(remaining))[1] if remaining else segment.state)
        self.segments = []

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.state is not None:
            self.state = tuple(function(t) for t in self.state)
            self.batch_size = self.state[0].shape[0]
        self.segments = [segment.map_batch(function) for segment in self.segments]

    def reset(self) -> None:
        self.state = None
        self.segments = []
        self.cumulative_length = self.recorded = 0


class StaticRecurrentLayer(RecurrentLayer):
    """
    The same state at a fixed address, and its length as a tensor, so that a compiled decode step is one graph for
    every length. `max_cache_len` bounds only the attention layers beside it: the state has room for any length.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(**kwargs)
        self.max_cache_len = max_cache_len

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        super().lazy_initialization(key_states)
        self.cumulative_length = torch.zeros((), dtype=torch.long, device=self.device)
        _mark_static(self.cumulative_length)

    def _hold(self, state: State | None) -> None:
        state = state or ()
        if self.state is None:
            self.state = tuple(t.detach().clone() for t in state)
            _mark_static(*self.state)
        else:
            for held, new in zip(self.state, state, strict=True):
                held.copy_(new)

    def activate_past_recording(self) -> None:
        raise ValueError("A static cache cannot go back. Use a dynamic cache for assisted decoding.")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def reset(self) -> None:
        # Zero is the empty state, and the addresses stay.
        for tensor in (*(self.state or ()), *((self.cumulative_length,) if self.is_initialized else ())):
            tensor.zero_()


class SummationLayer(RecurrentLayer):
    """Cache layer of a summation mixer: the running sum, one tensor `[B, D]`."""

    _layer_type: str | None = "summation"
    num_states = 1

    @staticmethod
    def operator(inputs, initial_state, *, attention_mask, document_ids, scale, relu):
        y, final_state = causal_sum(
            inputs,
            initial_state=None if initial_state is None else initial_state[0],
            attention_mask=attention_mask,
            document_ids=document_ids,
            scale=scale,
            relu=relu,
        )
        return y, (final_state,)


class StaticSummationLayer(StaticRecurrentLayer, SummationLayer):
    """[`SummationLayer`] in a `StaticCache`."""

    _layer_type = None


class TokenStatisticsLayer(RecurrentLayer):
    """Cache layer of causal token statistics: Σw² and ΣΠw² `[B, K, p]`, and ΣΠ `[B, K]`."""

    _layer_type: str | None = "token_statistics"
    num_states = 3

    @staticmethod
    def operator(inputs, initial_state, *, attention_mask, document_ids, position_bias, temperature, dropout_p):
        return causal_token_statistics(
            inputs,
            temperature,
            position_bias,
            initial_state=None if initial_state is None else TokenStatisticsState(*initial_state),
            attention_mask=attention_mask,
            document_ids=document_ids,
            dropout_p=dropout_p,
        )


class StaticTokenStatisticsLayer(StaticRecurrentLayer, TokenStatisticsLayer):
    """[`TokenStatisticsLayer`] in a `StaticCache`."""

    _layer_type = None


STATIC_LAYER_TYPE_MAPPING["summation"] = StaticSummationLayer
STATIC_LAYER_TYPE_MAPPING["token_statistics"] = StaticTokenStatisticsLayer


class SlidingWindowLayer(ReversibleLayer):
    """
    Cache layer of sliding attention: keys and values of the last `sliding_window - 1` *real* tokens of every row.

    transformers' own sliding layers keep the last columns, padding included, so that padding inside a continued
    segment pushes real tokens out. This one keeps the real tokens, moved to the right end.

    Attributes:
        keys, values (`torch.Tensor` of shape `[B, H, P, p]`): the columns kept, the newest last.
        real (`torch.Tensor` of shape `[B, P]`, bool, or `None`): which columns hold a real token; `None`: all.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, **kwargs):
        super().__init__(**kwargs)
        self.sliding_window = sliding_window
        self.real: torch.Tensor | None = None

    @property
    def num_columns(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, key_states.shape[0]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Append a segment `[B, H, T, p]`, of which `attention_mask` `[B, T]` says which tokens are real, and return the
        columns kept so far with the segment behind them, `[B, H, P + T, p]`.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        real = self.real_columns(attention_mask, key_states)
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        if self.record_past:
            self.keys, self.values, self.real = keys, values, real
            self.recorded += key_states.shape[-2]
        else:
            self._hold(*self._newest(keys, values, real))
        self.cumulative_length += key_states.shape[-2]
        return keys, values

    def real_columns(self, attention_mask: torch.Tensor | None, segment: torch.Tensor) -> torch.Tensor | None:
        """
        Which columns that [`~SlidingWindowLayer.update`] returns are real, `[B, P + T]`; `None`: all of them.

        Args:
            attention_mask (`torch.Tensor` of shape `[B, T]`, *optional*): which tokens of the segment are real.
            segment (`torch.Tensor` of shape `[B, ..., T, p]`): any tensor of the segment, for the shape and device.
        """
        if self.real is None and attention_mask is None:
            return None
        ones = torch.ones((segment.shape[0], 1), dtype=torch.bool, device=segment.device)
        past = ones.expand(-1, self.num_columns) if self.real is None else self.real
        new = ones.expand(-1, segment.shape[-2]) if attention_mask is None else attention_mask.bool()
        return torch.cat([past, new], dim=1)

    def _newest(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None):
        """The newest `sliding_window - 1` real columns, real ones at the right end."""
        first = max(keys.shape[-2] - (self.sliding_window - 1), 0)
        if real is None:
            keys, values = keys[:, :, first:], values[:, :, first:]
            # The slice of a long prefill would keep all its columns alive; after a decode step a copy costs more.
            return (keys.clone(), values.clone(), None) if first > self.sliding_window else (keys, values, None)
        # The newest real columns first, padding last; ONNX knows `topk`, and no `argsort`.
        recency = real * torch.arange(1, real.shape[1] + 1, device=real.device)
        order = recency.topk(real.shape[1] - first, dim=1).indices.flip(1)
        columns = order[:, None, :, None]
        keys = keys.gather(2, columns.expand(-1, keys.shape[1], -1, keys.shape[3]))
        values = values.gather(2, columns.expand(-1, values.shape[1], -1, values.shape[3]))
        return keys, values, real.gather(1, order)

    def _hold(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None) -> None:
        self.keys, self.values, self.real = keys, values, real

    def remove_last(self, length: int) -> None:
        if self.is_initialized:
            columns = self.num_columns - length
            real = None if self.real is None else self.real[:, :columns]
            self._hold(*self._newest(self.keys[:, :, :columns], self.values[:, :, :columns], real))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.num_columns + query_length, self.get_seq_length() - self.num_columns

    def get_max_length(self) -> int:
        return self.sliding_window

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self._hold(function(self.keys), function(self.values), None if self.real is None else function(self.real))
            self.batch_size = self.keys.shape[0]

    def reset(self) -> None:
        self.keys = self.values = self.real = None
        self.is_initialized = False
        self.cumulative_length = self.recorded = 0


class StaticSlidingLayer(SlidingWindowLayer):
    """[`SlidingWindowLayer`] in a `StaticCache`: all its columns are there from the start, empty, and stay in place."""

    is_compileable = True
    is_croppable = False

    @property
    def num_columns(self) -> int:
        return self.sliding_window - 1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys = key_states.new_zeros(*key_states.shape[:2], self.num_columns, key_states.shape[-1])
        self.values = value_states.new_zeros(*value_states.shape[:2], self.num_columns, value_states.shape[-1])
        self.real = torch.zeros(self.batch_size, self.num_columns, dtype=torch.bool, device=self.device)
        self.cumulative_length = torch.zeros((), dtype=torch.long, device=self.device)
        _mark_static(self.keys, self.values, self.real, self.cumulative_length)

    def real_columns(self, attention_mask: torch.Tensor | None, segment: torch.Tensor) -> torch.Tensor:
        if self.is_initialized:
            past = self.real
        else:
            past = torch.zeros(segment.shape[0], self.num_columns, dtype=torch.bool, device=segment.device)
        new = past.new_ones(past.shape[0], segment.shape[-2]) if attention_mask is None else attention_mask.bool()
        return torch.cat([past, new], dim=1)

    def _hold(self, keys: torch.Tensor, values: torch.Tensor, real: torch.Tensor) -> None:
        for held, new in ((self.keys, keys), (self.values, values), (self.real, real)):
            held.copy_(new)

    def activate_past_recording(self) -> None:
        raise ValueError("A static cache cannot go back. Use a dynamic cache for assisted decoding.")

    def reset(self) -> None:
        if self.is_initialized:
            for tensor in (self.keys, self.values, self.real, self.cumulative_length):
                tensor.zero_()


# What may stand where a layer of a type is: in a dynamic and in a static cache.
_LAYER_CLASSES: dict[str, tuple[type[CacheLayerMixin], ...]] = {
    "full_attention": (DynamicLayer, StaticLayer),
    "sliding_attention": (SlidingWindowLayer, StaticSlidingLayer),
    "summation": (SummationLayer, StaticSummationLayer),
    "token_statistics": (TokenStatisticsLayer, StaticTokenStatisticsLayer),
}


def _own_layer(layer: CacheLayerMixin, layer_type: str) -> CacheLayerMixin:
    """The layer, or in place of an empty recurrent one that another copy of this module made, one of our own."""
    for cls in _LAYER_CLASSES[layer_type]:
        if issubclass(cls, RecurrentLayer) and type(layer).__name__ == cls.__name__ and type(layer) is not cls:
            own = cls(**({"max_cache_len": layer.max_cache_len} if issubclass(cls, StaticRecurrentLayer) else {}))
            own.record_past = layer.record_past
            return own
    return layer


def adopt_cache(cache: Cache, config: PreTrainedConfig) -> None:
    """
    Make `cache` fit a model with recurrent layers, in place; a cache that already fits is left as it is.

    A `DynamicCache()` that was made without a config gets the layers of `config`. As long as they are empty,
    transformers' own sliding layers are replaced by [`SlidingWindowLayer`], and the recurrent layers of another copy of
    this module by its own: layer types are registered by name for the whole process, and a checkpoint may bring its
    own version of this code.

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
    if len(cache.layers) != len(config.layer_types):
        raise ValueError(
            f"`past_key_values` has {len(cache.layers)} layers and the model {len(config.layer_types)}. Make the cache "
            "with `DynamicCache(config=model.config)`."
        )
    for i, layer_type in enumerate(config.layer_types):
        layer = cache.layers[i]
        if isinstance(layer, StaticSlidingWindowLayer) and not layer.is_initialized:
            cache.layers[i] = StaticSlidingLayer(sliding_window=config.sliding_window)
        elif isinstance(layer, DynamicSlidingWindowLayer) and not layer.is_initialized:
            cache.layers[i] = SlidingWindowLayer(sliding_window=layer.sliding_window)
            cache.layers[i].record_past = layer.record_past
        elif not layer.is_initialized:
            cache.layers[i] = _own_layer(layer, layer_type)
        if not isinstance(cache.layers[i], _LAYER_CLASSES[layer_type]):
            raise ValueError(
                f"Layer {i} of the model is of type {layer_type!r}, and `past_key_values` has a "
                f"{type(layer).__name__} there. Make the cache with `DynamicCache(config=model.config)` or "
                "`StaticCache(config=model.config, max_cache_len=...)`, and fill it with this model only."
            )
    if not cache.is_compileable and not is_tracing():
        # `crop` goes from layer to layer, and attention layers go back further than recurrent ones can.
        lengths = [layer.get_seq_length() for layer in cache.layers]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"The layers of `past_key_values` have seen different numbers of tokens, {lengths}: a forward pass or a "
                "`crop` has failed halfway. Start again from an empty cache, or from a copy made before."
            )


def cache_to_tensors(cache: DynamicCache) -> dict[str, torch.Tensor]:
    """
    What a dynamic cache holds, by names that a safetensors file can have; [`cache_from_tensors`] is the inverse.

    Args:
        cache (`transformers.DynamicCache`): a cache that a forward pass has filled. What was recorded for `crop` is
            left out.

    Returns:
        `dict[str, torch.Tensor]`: `length` (0-d, int64: the tokens seen, padding included), and for every layer `i`
        `layers.{i}.state.{j}` (recurrent), or `layers.{i}.keys` and `.values`, with `.real` where there was padding.

    Raises:
        `TypeError`: the cache is static.
        `ValueError`: the cache is empty, or a forward pass waits for its `crop`.
    """
    if cache.is_compileable:
        raise TypeError("Only a dynamic cache can be saved, got a static one.")
    if cache.get_seq_length() == 0:
        raise ValueError("The cache is empty: there is nothing to save.")
    tensors = {"length": torch.tensor(cache.get_seq_length())}
    for i, layer in enumerate(cache.layers):
        if getattr(layer, "recorded", 0):
            raise ValueError(
                f"Layer {i} has recorded {layer.recorded} tokens. Call `crop(0)` before saving the cache."
            )
        if isinstance(layer, RecurrentLayer):
            held = {f"state.{j}": tensor for j, tensor in enumerate(layer.state or ())}
        else:
            held = {"keys": layer.keys, "values": layer.values, "real": getattr(layer, "real", None)}
        tensors |= {f"layers.{i}.{name}": t.contiguous() for name, t in held.items() if t is not None}
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
    adopt_cache(cache, config)
    left = dict(tensors)
    try:
        length = int(left.pop("length"))
        for i, layer in enumerate(cache.layers):
            if isinstance(layer, RecurrentLayer):
                state = [left.pop(f"layers.{i}.state.{j}") for j in range(layer.num_states)]
                layer.lazy_initialization(state[0])
                layer._hold(tuple(state))
            else:
                keys, values = left.pop(f"layers.{i}.keys"), left.pop(f"layers.{i}.values")
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
                if isinstance(layer, SlidingWindowLayer):
                    layer.real = left.pop(f"layers.{i}.real", None)
            if isinstance(layer, ReversibleLayer):
                layer.cumulative_length = length
    except KeyError as error:
        raise ValueError(f"Not the tensors of a cache of this model: {error} is missing.") from None
    if left:
        raise ValueError(f"Not the tensors of a cache of this model, which has no {sorted(left)}.")
    return cache
