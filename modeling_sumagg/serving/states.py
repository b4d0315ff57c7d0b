"""Decode states in vLLM's memory: one slot a request and layer, and the one call that runs an operator on them."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.registry import register_backend as register_vllm_backend
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor
from vllm.v1.kv_cache_interface import MambaSpec

from ..decoder.layout import SequenceLayout
from ..decoder.recurrence import Call
from ..ops.documents import find_documents


BACKEND_NAME = "MODELING_SUMAGG"
StateSpec = tuple[tuple[int, ...], torch.dtype]
OperatorStates = dict[str, list[StateSpec]]  # by the name of the operator


@dataclass
class Step:
    """
    What one step of the engine brings to the recurrent layers: `R` requests with `T` tokens, one request after the other.

    Attributes:
        num_requests, num_tokens (`int`): R and T.
        is_decode (`bool`): every request brings one token.
        slots (`torch.Tensor` of shape `[R]`, int64): where the state of each request lives.
        restart (`torch.Tensor` of shape `[R]`, bool): the requests that begin with this step, whose slot is a left-over.
        request_ids (`torch.Tensor` of shape `[1, T]`, int64): the request of each token.
    """

    num_requests: int
    num_tokens: int
    is_decode: bool
    slots: torch.Tensor
    restart: torch.Tensor
    request_ids: torch.Tensor

    def layout(self, positions: torch.Tensor) -> SequenceLayout:
        """
        The layout of `positions` `[n]`, `n >= T` where the engine pads: one row for each request where each brings one
        token, else one packed row in which each request is a document.
        """
        length = positions.shape[0]
        if self.is_decode and length == self.num_requests:
            return SequenceLayout(positions[:, None], None, None, None, {})
        mask, request_ids = None, self.request_ids
        if length > self.num_tokens:
            mask = torch.arange(length, device=positions.device)[None] < self.num_tokens
            request_ids = nn.functional.pad(request_ids, (0, length - self.num_tokens))
        # Each request has a state of its own.
        documents = find_documents(request_ids, mask, have_states=True)
        return SequenceLayout(positions[None], mask, documents, None, {})


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
        lengths = common.query_start_loc.diff()
        num_tokens = int(common.query_start_loc_cpu[-1])
        requests = torch.arange(common.num_reqs, device=lengths.device)
        return Step(
            num_requests=common.num_reqs,
            num_tokens=num_tokens,
            is_decode=common.max_query_len == 1 and num_tokens == common.num_reqs,
            slots=slots.long(),
            restart=common.seq_lens == lengths,
            request_ids=requests.repeat_interleave(lengths, output_size=num_tokens)[None],
        )


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
        is_packed = call.arguments["document_ids"] is not None
        held = [self.kv_cache[place] for place in self.places[call.name]]
        state = tuple(
            tensor[step.slots].masked_fill_(step.restart.view(-1, *[1] * (tensor.dim() - 1)), 0) for tensor in held
        )
        outputs, state = call.run(tuple(tensor[None] for tensor in state) if is_packed else state)
        for tensor, new in zip(held, state, strict=True):
            tensor[step.slots] = (new[0] if is_packed else new).to(tensor.dtype)
        return outputs


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
