"""
vLLM's layers in the places of our own: sharded linear maps, embedding tables, attention over paged memory; and attention
to a window whose keys and values are a state.
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv
from vllm.config import CacheConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention as EngineAttention
from vllm.model_executor.layers.attention import EncoderOnlyAttention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from ..decoder.attention import Attention
from ..decoder.cache import append_columns
from ..decoder.layout import SequenceLayout
from ..decoder.recurrence import State, recur


# Tokens of a window that are computed at once.
PART_LENGTH = 256
PARALLEL_LINEARS = {
    "colwise": (ColumnParallelLinear, {}),
    "colwise_gather_output": (ColumnParallelLinear, {"gather_output": True}),
    "rowwise": (RowParallelLinear, {}),
    "rowwise_split_input": (RowParallelLinear, {"input_is_parallel": False}),
    None: (ReplicatedLinear, {}),
}


class ServedAttention(nn.Module):
    """
    An [`~modeling_sumagg.decoder.attention.Attention`] in an engine, up to its queries, keys and values.

    Args:
        attention (`Attention`): the layer whose place it takes.
        maps (`dict[str, nn.Module]`, *optional*): what [`engine_maps`] returned, in the places of its linear maps.
    """

    def __init__(self, attention: Attention, maps: dict[str, nn.Module] | None = None):
        super().__init__()
        self.kind = type(attention)
        self.config, self.layer_idx = attention.config, attention.layer_idx
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.output_name = attention.output_name
        replaced = ("q_proj", "k_proj", "v_proj", self.output_name) if maps else ()
        for name, part in attention.named_children():
            if name not in replaced:
                self.add_module(name, part)
        for name, part in (maps or {}).items():
            self.add_module(name, part)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`hidden_states` `[B, T, d]` to the queries, keys and values `[B, H, T, p]`, without their positions."""
        if hasattr(self, "qkv_proj"):
            of_keys = self.qkv_proj.num_kv_heads * self.head_dim
            sizes = [self.qkv_proj.num_heads * self.head_dim, of_keys, of_keys]
            # A map of the engine takes one row of tokens.
            projected = (
                self.qkv_proj(hidden_states.flatten(0, 1)).unflatten(0, hidden_states.shape[:2]).split(sizes, -1)
            )
        else:
            projected = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        query, key, value = (x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for x in projected)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def output(self, mixed: torch.Tensor) -> torch.Tensor:
        """What the heads give, `[B, T, H · p]`, to the output of the layer `[B, T, d]`."""
        return getattr(self, self.output_name)(mixed.flatten(0, 1)).unflatten(0, mixed.shape[:2])


def rotated(
    query: torch.Tensor, key: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys `[B, H, T, p]` at the positions whose cosines and sines are `position_embeddings`, `[B, T, p]`."""
    if position_embeddings is None:
        return query, key
    query_there, key_there = apply_rotary_pos_emb(query, key, *position_embeddings)
    return query_there.to(query.dtype), key_there.to(key.dtype)


class PagedAttention(ServedAttention):
    """
    Attention whose keys and values live in vLLM's memory. The projections of queries, keys and values are one map, sharded
    by heads.

    Args:
        attention (`Attention`): the layer whose place it takes, on the device "meta".
        maps (`dict[str, nn.Module]`): what [`engine_maps`] returned.
        prefix (`str`): its name in the engine.
    """

    def __init__(
        self,
        attention: Attention,
        maps: dict[str, nn.Module],
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ):
        super().__init__(attention, maps)
        kind = EngineAttention if attention.is_causal else EncoderOnlyAttention
        self.attn = kind(
            self.qkv_proj.num_heads,
            attention.head_dim,
            attention.scaling,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=self.config.sliding_window if attention.is_sliding else None,
            prefix=f"{prefix}.attn",
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """
        `hidden_states` `[B, T, d]`, all tokens of the step in the order of the engine, to the output of that shape;
        `position_embeddings` are the cosines and sines of rotary positions, `[B, T, p]`.
        """
        query, key, value = self.project(hidden_states)
        query, key = rotated(query, key, position_embeddings)
        output = self.attn(*(x.transpose(1, 2).flatten(2).flatten(0, 1) for x in (query, key, value)))
        return self.output(output.view(*hidden_states.shape[:2], -1)), None


class WindowAttention(ServedAttention):
    """
    Sliding attention that vLLM's own has not, with sinks or with a sum beside it. Its window, its sinks and its sum are the
    constant state of a request, as the states of recurrent layers are.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        cache: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """As [`~PagedAttention.forward`], with the `cache` of the states."""
        projected = self.project(hidden_states)
        query, key = rotated(*projected[:2], position_embeddings)
        query, key, value = (x.transpose(1, 2) for x in (query, key, projected[2]))
        mixed = recur(
            attend_to_window,
            query,
            layout,
            cache,
            self.layer_idx,
            per_token={"keys": key, "values": value, "position_ids": layout.position_ids},
            sliding_window=self.config.sliding_window,
            num_sinks=self.config.attention_sinks,
            scaling=self.scaling,
        )
        # What the family adds, from the parts that are here now.
        mixed = self.kind.complete(self, mixed, projected, hidden_states, layout, cache)
        return self.output(mixed.flatten(2)), None


def attend_to_window(
    query: torch.Tensor,
    *,
    keys: torch.Tensor,
    values: torch.Tensor,
    position_ids: torch.Tensor,
    initial_state: State | None,
    attention_mask: torch.Tensor | None,
    document_ids: None,
    sliding_window: int,
    num_sinks: int,
    scaling: float,
) -> tuple[torch.Tensor, State]:
    """
    Attention to the last tokens and to the first ones as a recurrence, over one document a row.

    Args:
        query (`torch.Tensor` of shape `[B, T, H, p]`): the queries.
        keys, values (`torch.Tensor` of shape `[B, T, G, p]`): of G heads, which divide H.
        position_ids (`torch.Tensor` of shape `[B, T]`): counted from 0.
        initial_state (`tuple`, *optional*): what an earlier call returned; zeros are the state of no tokens.
        attention_mask (`torch.Tensor` of shape `[B, T]`, bool, *optional*): the real tokens.
        sliding_window, num_sinks (`int`): how many last and first tokens are seen.
        scaling (`float`): factor of the scores.

    Returns:
        `tuple`: the outputs `[B, T, H, p]`, and the state: keys and values `[B, G, P, p]` of the sinks and the window, and
        which of these columns are real, `[B, P]`, bool. P is the same after any number of tokens.
    """
    batch_size, length, num_heads, head_dim = query.shape
    num_columns, groups = sliding_window - 1 + num_sinks, num_heads // keys.shape[2]
    if initial_state is None:
        empty = keys.new_zeros(batch_size, keys.shape[2], num_columns, head_dim)
        initial_state = empty, empty, keys.new_zeros(batch_size, num_columns, dtype=torch.bool)
    state, outputs = initial_state, []
    # In parts, so that no mask has the square of the length.
    for start in range(0, length, PART_LENGTH):
        part = slice(start, start + PART_LENGTH)
        mask = position_ids.new_ones(1, 1, dtype=torch.bool) if attention_mask is None else attention_mask[:, part]
        real = torch.cat([state[2], mask.expand(batch_size, query[:, part].shape[1])], dim=1)
        columns, state = append_columns(
            keys[:, part].transpose(1, 2),
            values[:, part].transpose(1, 2),
            initial_state=state,
            attention_mask=None if attention_mask is None else mask,
            document_ids=None,
            num_columns=num_columns,
            position_ids=position_ids[:, part],
            num_sinks=num_sinks,
        )
        # Counted in real columns. Tokens between the sinks and the window have none.
        count = real.long().cumsum(dim=1)
        distance = count[:, num_columns:, None] - count[:, None]
        is_near = (distance < sliding_window) | (count[:, None] <= num_sinks)
        output = F.scaled_dot_product_attention(
            query[:, part].transpose(1, 2),
            *(repeat_kv(x, groups) for x in columns),
            attn_mask=(real[:, None] & (distance >= 0) & is_near)[:, None],
            scale=scaling,
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), state


def keeps_state(config: PreTrainedConfig, layer_type: str) -> bool:
    """Whether the layers of a type keep a constant state of their own, and no keys and values in vLLM's memory."""
    is_beside = config.attention_sinks or getattr(config, "attention_sum", False)
    return layer_type in config.recurrent_layer_types or bool(layer_type == "sliding_attention" and is_beside)


def put_windows_in(model: nn.Module, maps_of: Callable[[Attention, str], dict[str, nn.Module]] | None = None) -> None:
    """Put a [`WindowAttention`] into each place of a bare model where attention keeps a state; `maps_of` makes its maps."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Attention) and keeps_state(module.config, module.layer_type):
            model.set_submodule(name, WindowAttention(module, None if maps_of is None else maps_of(module, name)))


def engine_maps(attention: Attention, quant_config: QuantizationConfig | None, prefix: str) -> dict[str, nn.Module]:
    """vLLM's maps for an attention layer called `prefix`: one of queries, keys and values, and that of the output."""
    config, output = attention.config, getattr(attention, attention.output_name)
    return {
        "qkv_proj": QKVParallelLinear(
            config.hidden_size,
            attention.head_dim,
            config.num_attention_heads,
            config.num_attention_heads // attention.num_key_value_groups,
            bias=attention.q_proj.bias is not None,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
            return_bias=False,
        ),
        attention.output_name: RowParallelLinear(
            output.in_features,
            output.out_features,
            bias=output.bias is not None,
            quant_config=quant_config,
            prefix=f"{prefix}.{attention.output_name}",
            return_bias=False,
        ),
    }


def put_in_engine_layers(
    model: nn.Module,
    config: PreTrainedConfig,
    cache_config: CacheConfig | None,
    quant_config: QuantizationConfig | None,
    prefix: str,
) -> None:
    """
    Put vLLM's layers into a bare model on the device "meta", sharded as its `base_model_tp_plan` says, and give memory to
    the parameters that are left.
    """
    model.embed_tokens = VocabParallelEmbedding(
        config.vocab_size, config.hidden_size, quant_config=quant_config, prefix=f"{prefix}.embed_tokens"
    )
    put_windows_in(model, lambda attention, name: engine_maps(attention, quant_config, f"{prefix}.{name}"))
    for name, module in list(model.named_modules()):
        if isinstance(module, Attention):
            maps = engine_maps(module, quant_config, f"{prefix}.{name}")
            model.set_submodule(name, PagedAttention(module, maps, cache_config, quant_config, f"{prefix}.{name}"))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, parallel_linear(module, plan_of(name, config), quant_config, f"{prefix}.{name}"))
    rank, num_processes = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        own = nn.Parameter(torch.empty(local_shape(name, parameter, config, num_processes), dtype=parameter.dtype))
        if own.shape != parameter.shape:
            set_weight_attrs(own, {"weight_loader": PartLoader(rank)})
        module_name, _, parameter_name = name.rpartition(".")
        setattr(model.get_submodule(module_name), parameter_name, own.requires_grad_(False))


class PartLoader:
    """Reads into a parameter that is split along its first dimension the part of one process, `rank`."""

    def __init__(self, rank: int):
        self.rank = rank

    def __call__(self, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        size = parameter.shape[0]
        parameter.data.copy_(loaded.narrow(0, self.rank * size, size))


def local_shape(name: str, parameter: nn.Parameter, config: PreTrainedConfig, num_processes: int) -> list[int]:
    """The shape of a parameter that belongs to no linear map in one of several processes."""
    size, *others = parameter.shape
    return [size // num_processes if plan_of(name, config) == "colwise" else size, *others]


def shard_on_meta(model: nn.Module, config: PreTrainedConfig, num_processes: int) -> None:
    """Give the linear maps of a model on the device "meta" the sizes that they have in one of several processes."""
    for name, module in list(model.named_modules()):
        style = plan_of(name, config)
        if isinstance(module, nn.Linear) and style in ("colwise", "rowwise"):
            inputs, outputs = module.in_features, module.out_features
            if style == "colwise":
                outputs //= num_processes
            else:
                inputs //= num_processes
            local = nn.Linear(inputs, outputs, bias=module.bias is not None, device="meta", dtype=module.weight.dtype)
            model.set_submodule(name, local)
    for name, parameter in list(model.named_parameters()):
        shape = local_shape(name, parameter, config, num_processes)
        if list(parameter.shape) != shape:
            module_name, _, parameter_name = name.rpartition(".")
            own = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"))
            setattr(model.get_submodule(module_name), parameter_name, own)


def plan_of(name: str, config: PreTrainedConfig) -> str | None:
    """How `base_model_tp_plan` shards the module `name`, `None` if not at all."""
    for pattern, style in config.base_model_tp_plan.items():
        if re.fullmatch(pattern.replace(".", r"\.").replace("*", r"\d+"), name):
            return style
    return None


def parallel_linear(
    linear: nn.Linear, style: str | None, quant_config: QuantizationConfig | None, prefix: str
) -> LinearBase:
    """vLLM's linear map of the sizes of `linear`, sharded in the `style` of a plan of tensor parallelism."""
    if style not in PARALLEL_LINEARS:
        raise ValueError(f"{prefix} is sharded as {style!r}, which is none of {[*PARALLEL_LINEARS]}.")
    kind, arguments = PARALLEL_LINEARS[style]
    return kind(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        quant_config=quant_config,
        prefix=prefix,
        return_bias=False,
        **arguments,
    )
