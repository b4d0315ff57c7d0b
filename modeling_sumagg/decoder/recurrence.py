"""The state of a recurrence inside transformers' own `DynamicCache` and `StaticCache`, and the one call that runs it.

A recurrence is a function of a segment and of the state before it, which returns outputs and the state after it:

    operator(x, *, initial_state, attention_mask, document_ids, **parameters) -> (y, state)

- `x` `[B, T, ...]` holds `T` tokens, and `y` one output for each. Operators that have the tokens in another dimension are
  marked by `has_tokens_at`. Where a sequence is cut into segments makes no difference: this one contract is prefill,
  decoding, packed training, streams, and going back over tokens.
- A state is a tensor `[B, ...]` whose size does not depend on `T`, or a tuple of several; those of sums are in float32 at
  least. The state of no tokens is zero, for which `initial_state` may also be `None`.
- `attention_mask` `[B, T]`, bool, or `None` where all tokens are real. A masked token is transparent: it leaves no trace
  in the state and in the outputs of real tokens, whatever its values, and its own output is read by nobody.
- `document_ids` `[B, T]`, int64, or `None`. It counts up at each real token that begins another document, and nothing of
  the documents before reaches that one. The state before belongs to the first id, the state after to the last. An operator
  that is marked by `takes_documents` gets `Documents` in their place, with the beginnings beside the ids.
- It is a function of a module, so that it is found again by its name when a cache is copied or pickled.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map
from transformers import Cache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin
from transformers.utils import is_torchdynamo_compiling

from ..ops.documents import Documents, find_documents
from .layout import SequenceLayout


State = tuple[torch.Tensor, ...]


def recur(
    operator: Callable,
    inputs: torch.Tensor,
    layout: SequenceLayout,
    cache: Cache | None,
    layer_idx: int,
    *,
    per_token: dict[str, torch.Tensor | None] | None = None,
    **parameters,
) -> Any:
    """
    Run a recurrence over a segment; with a cache from the state that it holds, which goes on to the one after.

    Args:
        operator (`Callable`): a function of a module, as at the head of this file. A layer may run several.
        inputs (`torch.Tensor` of shape `[B, ...]`): its first argument.
        layout (`SequenceLayout`): the mask and the documents of the segment.
        cache (`transformers.Cache`, *optional*): the decode state.
        layer_idx (`int`): the layer of the cache.
        per_token (`dict`, *optional*): the arguments of the operator with one entry for each token of each row,
            `[B, ...]`, or `[1, ...]` where the rows share them.
        parameters: the other arguments.

    Returns:
        The outputs of the operator.
    """
    documents = layout.documents if getattr(operator, "takes_documents", False) else layout.document_ids
    arguments = {"attention_mask": layout.attention_mask, "document_ids": documents, **(per_token or {})}
    if cache is None:
        return operator(inputs, initial_state=None, **arguments, **parameters)[0]
    call = Call(operator, layout.position_ids.shape[1], (inputs,), arguments, parameters)
    return cache.update(inputs, None, layer_idx, call=call, restart=layout.restart)[0]


def token_dim(operator: Callable, argument: int | str) -> int:
    """The dimension of the tokens in an argument of an operator, by its place or name."""
    return getattr(operator, "token_dims", {}).get(argument, 1)


@dataclass
class Call:
    """
    One call of an operator on `length` tokens, to be made again. `inputs` and `arguments` have one entry for each row, so
    that they go where the rows go; the operator is a function of a module, so that a call can be copied and pickled.
    """

    operator: Callable
    length: int
    inputs: tuple[torch.Tensor, ...]
    arguments: dict[str, torch.Tensor | Documents | None]
    parameters: dict[str, Any]

    @property
    def name(self) -> str:
        return self.operator.__name__

    def run(self, state: State | None) -> tuple[Any, State]:
        """The outputs and the state after the one given."""
        initial_state = state[0] if state is not None and len(state) == 1 else state
        outputs, state = self.operator(*self.inputs, initial_state=initial_state, **self.arguments, **self.parameters)
        return outputs, (state,) if isinstance(state, torch.Tensor) else tuple(state)

    def first(self, length: int) -> "Call":
        """The same of the first `length` tokens: the others are masked, and so leave no trace."""
        kept = torch.arange(self.length, device=self.inputs[0].device)[None] < length
        mask = self.arguments["attention_mask"]
        mask = kept.expand(self.inputs[0].shape[0], -1) if mask is None else mask & kept
        # What is masked begins no document.
        documents = self.arguments["document_ids"]
        if isinstance(documents, Documents):
            documents = find_documents(documents.ids, mask)
        elif documents is not None:
            documents = find_documents(documents, mask).ids
        return replace(self, arguments={**self.arguments, "attention_mask": mask, "document_ids": documents})

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Call":
        batch_size = self.inputs[0].shape[0]

        def of_rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return tensor if tensor is None or tensor.shape[0] != batch_size else function(tensor)

        inputs = tuple(function(tensor) for tensor in self.inputs)
        return replace(self, inputs=inputs, arguments=tree_map(of_rows, self.arguments))


class Record(NamedTuple):
    """A call that `crop` can go back over, the state that it found, and the rows that dropped theirs `[B]`."""

    state: State | None
    call: Call
    restart: torch.Tensor | None


class RecurrentLayer(CacheLayerMixin):
    """
    The cache layer of every recurrence: the states of its operators, a few tensors `[B, ...]` of constant size.

    Attributes:
        states (`dict[str, tuple[torch.Tensor, ...]]`): by the name of an operator, its state after the last token.
        cumulative_length (`int`, or a 0-d tensor in a static cache): the tokens seen, padding included.
        record_past (`bool`): whether what `crop` needs is kept from one `crop` to the next.
        real_tokens (`torch.Tensor` of shape `[B, past]`, bool, or `None`): in the first of these layers in a cache, which
            of the tokens seen are real; `None`: all. More columns than tokens were seen may be there.
        rows_are_beams (`bool`): whether the rows are what beam search was left with, which are no sequences it returned.
        starts_over (`bool`): whether a `crop` beyond that forgets everything, because all tokens will be read again.
        recorded (`int`): the tokens seen since the last `crop`, as far as they were recorded.
    """

    supports_early_init = False
    is_croppable = True
    real_tokens: torch.Tensor | None = None
    rows_are_beams = False

    def __init__(self, **kwargs):
        super().__init__()
        self.states: dict[str, State] = {}
        self.records: dict[str, list[Record]] = {}
        self.cumulative_length = 0
        self.record_past = False
        self.starts_over = False
        self.recorded = 0

    @property
    def state(self) -> State:
        """Every tensor that is held, operator by operator."""
        return tuple(tensor for state in self.states.values() for tensor in state)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.device, self.batch_size = key_states.device, key_states.shape[0]
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor | None = None,
        *,
        call: Call,
        restart: torch.Tensor | None = None,
    ) -> tuple[Any, None]:
        """
        Make a call from the state held here, and hold the state after it.

        Args:
            key_states (`torch.Tensor` of shape `[B, ...]`): the input of the call (`Cache.update` asks for one).
            value_states: not used.
            call (`Call`): the operator with all its arguments but the state.
            restart (`torch.Tensor` of shape `[B]`, bool, *optional*): the rows in which another document begins with
                the segment. Their state is dropped first.

        Returns:
            `tuple[Any, None]`: the outputs (`Cache.update` returns pairs).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        state = self.states.get(call.name)
        if self.record_past:
            self.records.setdefault(call.name, []).append(Record(self._kept(state), call, restart))
        outputs, state = call.run(self._restarted(state, restart))
        self._hold(call.name, state)
        # A layer that runs several operators sees each token once.
        if call.name == next(iter(self.states)):
            self.cumulative_length += call.length
            self.recorded += call.length if self.record_past else 0
        return outputs, None

    @staticmethod
    def _restarted(state: State | None, restart: torch.Tensor | None) -> State | None:
        if state is None or restart is None:
            return state
        return tuple(t.masked_fill(restart.to(t.device).view(-1, *[1] * (t.dim() - 1)), 0) for t in state)

    def _kept(self, state: State | None) -> State | None:
        """The state, safe from what `_hold` does next."""
        return state

    def _hold(self, name: str, state: State | None) -> None:
        if state is None:
            self.states.pop(name, None)
        else:
            self.states[name] = state

    def initial_state(self, operator: Callable, restart: torch.Tensor | None) -> State | None:
        """The state that an operator goes on from, in which the rows `restart` `[B]` begin another document."""
        return self._restarted(self.states.get(operator.__name__), restart)

    def activate_past_recording(self) -> None:
        """Keep from now on what `crop` needs to go back over the tokens since the last `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """
        Go back by `-tokens_to_remove` tokens, and forget what was recorded.

        Raises:
            `ValueError`: the argument is positive, or more tokens would be removed than were recorded (unless
                `starts_over`).
        """
        # A tensor must not become the length.
        length = -int(tokens_to_remove)
        if length < 0:
            raise ValueError(f"`crop` takes the tokens to remove as a negative number, got {-length}.")
        if not self.is_initialized:
            return
        if length > self.recorded and self.starts_over:
            return self.reset()
        if length > self.recorded:
            raise ValueError(
                f"Cannot remove {length} tokens: {self.recorded} were recorded since the last `crop`. Call "
                "`activate_past_recording()` on the cache before the forward passes that are to be undone."
            )
        if length:
            for name, records in self.records.items():
                self._hold(name, self._state_without_last(records, length))
            self.cumulative_length -= length
        self.records = {}
        self.recorded = 0

    @classmethod
    def _state_without_last(cls, records: list[Record], length: int) -> State | None:
        """The state before the last `length` tokens of all calls of one operator."""
        remaining = -length
        while remaining < 0:
            state, call, restart = records.pop()
            remaining += call.length
        if remaining == 0:
            return state
        # `generate` goes back outside of the forward pass, where autograd may be on again.
        with torch.set_grad_enabled(call.inputs[0].requires_grad):
            call = call.first(remaining)
            if restart is not None:
                # A document begins with its first real token, which may be among those removed.
                mask = call.arguments["attention_mask"]
                restart = restart.to(mask.device) & mask.any(dim=1)
            return call.run(cls._restarted(state, restart))[1]

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor held, whose first dimension is the batch, by `function` of it."""

        def of_state(state):
            return None if state is None else tuple(function(tensor) for tensor in state)

        self.states = {name: of_state(state) for name, state in self.states.items()}
        self.records = {
            name: [
                Record(of_state(state), call.map_batch(function), None if restart is None else function(restart))
                for state, call, restart in records
            ]
            for name, records in self.records.items()
        }
        if self.real_tokens is not None:
            self.real_tokens = function(self.real_tokens)
        for state in self.states.values():
            self.batch_size = state[0].shape[0]

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

    def reset(self) -> None:
        self.states, self.records = {}, {}
        self.cumulative_length = self.recorded = 0
        self.real_tokens, self.rows_are_beams = None, False


class StaticRecurrentLayer(RecurrentLayer):
    """
    The same states at fixed addresses, and their length as a tensor, so that a compiled decode step is one graph for
    every length. `max_cache_len` bounds only the attention layers beside it: the states have room for any length.
    """

    def __init__(self, max_cache_len: int, **kwargs):
        super().__init__(**kwargs)
        self.max_cache_len = max_cache_len

    @property
    def is_compileable(self) -> bool:
        # What is recorded is new with every call: it has no fixed address.
        return not self.record_past

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        super().lazy_initialization(key_states)
        self.cumulative_length = torch.zeros((), dtype=torch.long, device=self.device)
        mark_static(self.cumulative_length)

    def _kept(self, state: State | None) -> State | None:
        return None if state is None else tuple(tensor.clone() for tensor in state)

    def _hold(self, name: str, state: State | None) -> None:
        if name not in self.states and state is not None:
            self.states[name] = tuple(tensor.detach().clone() for tensor in state)
            mark_static(*self.states[name])
        elif name in self.states:
            for index, held in enumerate(self.states[name]):
                held.copy_(state[index]) if state is not None else held.zero_()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        held = self.states
        super().map_batch(function)
        for name, state in held.items():
            if all(old.shape == new.shape for old, new in zip(state, self.states[name], strict=True)):
                new, self.states[name] = self.states[name], state
                self._hold(name, new)

    def reset(self) -> None:
        # Zero is the state of no tokens, and the addresses stay.
        for tensor in self.state:
            tensor.zero_()
        if self.is_initialized:
            self.cumulative_length.zero_()
        self.records, self.recorded = {}, 0
        self.real_tokens, self.rows_are_beams = None, False


def mark_static(*tensors: torch.Tensor) -> None:
    """Tell a compiler that these stay where they are, which CUDA graphs need (and which no graph can trace)."""
    if not is_torchdynamo_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def register_recurrent_layer_type(layer_type: str) -> None:
    """
    Let `DynamicCache` and `StaticCache` hold recurrent states where a config's `layer_types` has this type.

    Raises:
        `ValueError`: transformers has a layer type of this name, whose cache layers other models need.
    """
    known = DYNAMIC_LAYER_TYPE_MAPPING.get(layer_type)
    if known is not None and known.__module__.startswith("transformers."):
        raise ValueError(
            f"`recurrent_layer_types` has {layer_type!r}, a layer type of transformers itself ({known.__name__}): give "
            "the type another name."
        )
    DYNAMIC_LAYER_TYPE_MAPPING[layer_type] = RecurrentLayer
    STATIC_LAYER_TYPE_MAPPING[layer_type] = StaticRecurrentLayer
