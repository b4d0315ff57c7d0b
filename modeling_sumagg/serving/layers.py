"""vLLM's layers in the places of our own: sharded linear maps, embedding tables, attention over paged memory."""

import re

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
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
from ..decoder.layout import SequenceLayout


PARALLEL_LINEARS = {
    "colwise": (ColumnParallelLinear, {}),
    "colwise_gather_output": (ColumnParallelLinear, {"gather_output": True}),
    "rowwise": (RowParallelLinear, {}),
    "rowwise_split_input": (RowParallelLinear, {"input_is_parallel": False}),
    None: (ReplicatedLinear, {}),
}


class PagedAttention(nn.Module):
    """
    An [`~modeling_sumagg.decoder.attention.Attention`] whose keys and values live in vLLM's memory. The projections of
    queries, keys and values are one map, sharded by heads.

    Args:
        attention (`Attention`): the layer whose place it takes, on the device "meta".
        prefix (`str`): its name in the engine.
    """

    def __init__(
        self,
        attention: Attention,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ):
        super().__init__()
        config = attention.config
        bias = attention.q_proj.bias is not None
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            attention.head_dim,
            config.num_attention_heads,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
            return_bias=False,
        )
        self.head_dim = attention.head_dim
        self.output_name = attention.output_name
        output = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.{self.output_name}",
            return_bias=False,
        )
        self.add_module(self.output_name, output)
        window = config.sliding_window if attention.is_sliding else None
        kind = EngineAttention if attention.is_causal else EncoderOnlyAttention
        self.attn = kind(
            self.qkv_proj.num_heads,
            attention.head_dim,
            attention.scaling,
            num_kv_heads=self.qkv_proj.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=window,
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
        query, key, value = self.qkv_proj(hidden_states.flatten(0, 1)).chunk(3, dim=-1)
        if position_embeddings is not None:
            cos, sin = (x.flatten(0, 1) for x in position_embeddings)
            heads = (x.unflatten(-1, (-1, self.head_dim)) for x in (query, key))
            query, key = (x.to(value.dtype).flatten(1) for x in apply_rotary_pos_emb(*heads, cos, sin))
        output = self.attn(query, key, value)
        return getattr(self, self.output_name)(output).view(hidden_states.shape), None


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
    for name, module in list(model.named_modules()):
        if isinstance(module, Attention):
            paged = PagedAttention(module, cache_config, quant_config, f"{prefix}.{name}")
            model.set_submodule(name, paged)
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
