"""Decode states in vLLM's memory: one slot a request and layer, and the one call that runs an operator on them."""

import itertools
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.registry import register_backend as register_vllm_backend
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor
from vllm.v1.kv_cache_interface import MambaSpec

from ..decoder.layout import SequenceLayout
from ..decoder.recurrence import Call, token_dim


BACKEND_NAME = "MODELING_SUMAGG"
StateSpec = tuple[tuple[int, ...], torch.dtype]
OperatorStates = dict[str, list[StateSpec]]  # by the name of the operator


@dataclass
class Group:
    """
    Requests of a step with similar numbers of tokens, as the rows of a padded batch.

    Attributes:
        requests (`torch.Tensor` of shape `[r]`, int64): their indices in the step.
        columns (`torch.Tensor` of shape `[r, T]`, int64): where their tokens stand among all tokens of the step.
        mask (`torch.Tensor` of shape `[r, T]`, bool, or `None`): the real tokens; `None`: all.
    """

    requests: torch.Tensor
    columns: torch.Tensor
    mask: torch.Tensor | None


@dataclass
class Step:
    """
    What one step of the engine brings to the recurrent layers: the tokens of its requests, one request after the other.

    Attributes:
        slots (`torch.Tensor` of shape `[R]`, int64): where the state of each of the R requests lives.
        restart (`torch.Tensor` of shape `[R]`, bool): the requests that begin with this step, whose slot is a left-over.
        groups (`list[Group]`): all requests, each in one group.
    """

    slots: torch.Tensor
    restart: torch.Tensor
    groups: list[Group]

    @classmethod
    def of_lengths(cls, lengths: list[int], slots: torch.Tensor, restart: torch.Tensor) -> "Step":
        """
        The step of requests with `lengths` tokens each. Requests of 2^i to 2^(i + 1) - 1 tokens share a group, so that at
        most half of a padded batch is padding.
        """
        starts = [0, *itertools.accumulate(lengths)]
        by_size: dict[int, list[int]] = {}
        for request, length in enumerate(lengths):
            by_size.setdefault(length.bit_length(), []).append(request)
        groups = []
        for requests in by_size.values():
            of_group = torch.tensor([lengths[request] for request in requests])[:, None]
            steps = torch.arange(int(of_group.max()))
            # Padding repeats the last token.
            columns = torch.tensor([starts[request] for request in requests])[:, None] + steps.minimum(of_group - 1)
            is_padded = bool((of_group != of_group[0]).any())
            mask = (steps < of_group).to(slots.device) if is_padded else None
            groups.append(Group(torch.tensor(requests, device=slots.device), columns.to(slots.device), mask))
        return cls(slots, restart, groups)

    def layout(self, positions: torch.Tensor) -> SequenceLayout:
        """
        The layout of `positions` `[n]`: one row for each request where each brings one token, else one row of all tokens,
        which the states tell apart.
        """
        if len(self.groups) == 1 and self.groups[0].columns.shape == (positions.shape[0], 1):
            return SequenceLayout(positions[:, None], None, None, None, {})
        return SequenceLayout(positions[None], None, None, None, {})


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Makes the [`Step`] of each group of layers; all that Python decides about it, the engine knows on the host."""

    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        common = common_attn_metadata
        slots = mamba_get_block_table_tensor(
            common.block_table_tensor,
            common.seq_lens,
            self.kv_cache_spec,
            self.vllm_config.cache_config.mamba_cache_mode,
        )[:, 0]
        lengths = common.query_start_loc_cpu.diff().tolist()
        return Step.of_lengths(lengths, slots.long(), common.seq_lens == common.query_start_loc.diff())


class RecurrentBackend(AttentionBackend):
    """What vLLM asks of a kind of layer with a state; the layers run themselves."""

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


def register_backend() -> None:
    """Enter [`RecurrentBackend`] among vLLM's, once in a process."""
    if BACKEND_NAME not in MambaAttentionBackendEnum.__members__:
        path = f"{RecurrentBackend.__module__}.{RecurrentBackend.__qualname__}"
        register_vllm_backend(BACKEND_NAME, path, is_mamba=True)


class RecurrentState(MambaBase):
    """
    The states of one layer for all requests, as a layer of vLLM's cache.

    Args:
        operators (`OperatorStates`): the state of each operator of the layer by the operator's name, shape
            and dtype of every tensor of one request.
        prefix (`str`): the name of the layer in the engine.
        page_size (`int`): the bytes of a page, which hold the state of any layer.
    """

    def __init__(self, operators: OperatorStates, prefix: str, page_size: int):
        self.prefix = prefix
        self.page_size = page_size
        self.specs, self.places = pages(operators)
        self.kv_cache = tuple(torch.empty(0, dtype=dtype) for _, dtype in self.specs)
        context = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"Two layers are called {prefix!r}.")
        context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum[BACKEND_NAME]

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for shape, _ in self.specs)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(dtype for _, dtype in self.specs)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MambaSpec:
        # Pages of one size for all layers, whose states may differ.
        spec = super().get_kv_cache_spec(vllm_config)
        return replace(spec, page_size_padded=max(self.page_size, spec.page_size_padded or 0))

    def run(self, call: Call, step: Step) -> Any:
        """Make a call from the states of the requests of a step, and hold the states after it; returns the outputs."""
        rows = call.inputs[0].shape[0]
        if rows > 1 or call.length == 1:
            return self._run(call, step.slots, step.restart)
        # One row holds all tokens of the step: each group becomes a batch of its own.
        outputs: Any = None
        for group in step.groups:
            y = self._run(_of_group(call, group), step.slots[group.requests], step.restart[group.requests])
            dim = token_dim(call.operator, 0)
            y = y.movedim(dim, 1)
            if outputs is None:
                outputs = y.new_zeros(call.length + 1, *y.shape[2:])
            # The outputs of padding go to a place of their own behind the last one.
            columns = group.columns if group.mask is None else torch.where(group.mask, group.columns, call.length)
            outputs[columns] = y
        return outputs[None, : call.length].movedim(1, dim)

    def _run(self, call: Call, slots: torch.Tensor, restart: torch.Tensor) -> Any:
        held = [self.kv_cache[place] for place in self.places[call.name]]
        state = tuple(tensor[slots].masked_fill_(restart.view(-1, *[1] * (tensor.dim() - 1)), 0) for tensor in held)
        outputs, state = call.run(state)
        for tensor, new in zip(held, state, strict=True):
            tensor[slots] = new.to(tensor.dtype)
        return outputs


def _of_group(call: Call, group: Group) -> Call:
    """The call of one row, of the tokens of a group as a padded batch."""

    def tokens(name: str | int, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        dim = token_dim(call.operator, name)
        return tensor.movedim(dim, 1)[0][group.columns].movedim(1, dim)

    inputs = tuple(tokens(i, tensor) for i, tensor in enumerate(call.inputs))
    arguments = {name: tokens(name, tensor) for name, tensor in call.arguments.items()}
    arguments["attention_mask"] = group.mask
    return replace(call, length=group.columns.shape[1], inputs=inputs, arguments=arguments)


class EngineCache:
    """What the layers take as their cache for one step: `update`, which makes a call on the states in vLLM's memory."""

    def __init__(self, states: dict[int, RecurrentState], steps: dict[str, Step]):
        self.states, self.steps = states, steps

    def update(self, key_states: torch.Tensor, value_states: None, layer_idx: int, *, call: Call, restart: None):
        """As [`~transformers.Cache.update`] for a recurrence, see [`~modeling_sumagg.decoder.recurrence.recur`]."""
        state = self.states[layer_idx]
        return state.run(call, self.steps[state.prefix]), None


def pages(operators: OperatorStates) -> tuple[list[StateSpec], dict[str, list[int]]]:
    """
    The tensors of all operators of a layer in the order in which they lie in a page of memory, and the places of those of
    each operator. The widest dtypes come first, so that each is aligned.
    """
    specs = [(name, spec) for name, state in operators.items() for spec in state]
    order = sorted(range(len(specs)), key=lambda i: -specs[i][1][1].itemsize)
    places: dict[str, list[int]] = {name: [] for name in operators}
    for i, (name, _) in enumerate(specs):
        places[name].append(order.index(i))
    return [specs[i][1] for i in order], places


def page_size(operators: OperatorStates) -> int:
    """The bytes of the states of one layer and request, rounded up so that pages stay aligned."""
    size = sum(prod(shape) * dtype.itemsize for state in operators.values() for shape, dtype in state)
    return -(-size // 16) * 16


class StateRecorder:
    """A cache that notes down the states of the calls that a mixer makes, of one request."""

    def __init__(self):
        self.operators: dict[str, list[StateSpec]] = {}

    def update(self, key_states: torch.Tensor, value_states: None, layer_idx: int, *, call: Call, restart: None):
        outputs, state = call.run(None)
        self.operators[call.name] = [(tuple(tensor.shape[1:]), tensor.dtype) for tensor in state]
        return outputs, None
