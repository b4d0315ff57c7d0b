"""Softmax attention, full or sliding, through transformers' attention interface, and a linear path for windows."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..ops.sliding_attention import sliding_window_attention
from .layout import SequenceLayout


def attends_in_blocks(config: PreTrainedConfig, length: int) -> bool:
    """
    Whether sliding attention over a segment of `length` tokens without padding goes block by block, without a mask.
    `"sdpa"` alone would build the mask of length × length; the other implementations have means of their own.
    """
    return config._attn_implementation == "sdpa" and config.is_causal and length > config.sliding_window


def eager_attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args, **kwargs):
    """transformers' formula with all its weights, with a key and a value for each query."""
    key, value = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    return eager_attention_forward(module, query, key, value, *args, **kwargs)


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` over its root mean square along the last dimension."""
    if not torch.jit.is_tracing():
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    # The older ONNX exporter knows no such operation.
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467) over the last dimension, in float32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), self.eps)
        return (y * self.weight).to(x.dtype)


class Attention(nn.Module):
    """
    Softmax attention, in which several heads of queries may share one of keys and values.

    Args:
        config (`TextConfig`): its heads, `layer_types`, `sliding_window`, `attention_dropout`, `is_causal`.
        layer_idx (`int`): the block that it mixes in.
        bias (`bool` or `"qkv"`): whether the projections have a bias, or all but the output projection.
        output_name (`str`, defaults to `"o_proj"`): the name of the output projection, which differs between families.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int, *, bias: bool | str, output_name: str = "o_proj"):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.layer_type = config.layer_types[layer_idx]
        self.is_sliding = self.layer_type == "sliding_attention"
        heads, width = config.num_attention_heads, config.hidden_size
        key_heads = getattr(config, "num_key_value_heads", heads)
        self.num_key_value_groups = heads // key_heads
        self.head_dim = getattr(config, "head_dim", width // heads)
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bool(bias))
        self.k_proj = nn.Linear(width, key_heads * self.head_dim, bias=bool(bias))
        self.v_proj = nn.Linear(width, key_heads * self.head_dim, bias=bool(bias))
        is_normed = getattr(config, "attention_norm", False)
        self.q_norm = RMSNorm(self.head_dim, config.layer_norm_eps) if is_normed else None
        self.k_norm = RMSNorm(self.head_dim, config.layer_norm_eps) if is_normed else None
        self.output_name = output_name
        self.add_module(output_name, nn.Linear(heads * self.head_dim, width, bias=bias is True))

    @property
    def is_causal(self) -> bool:
        """Read by the attention implementations. It cannot be set, since recurrent layers would not follow it."""
        return self.config.is_causal

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `[B, T, d]`): the segment.
            layout (`SequenceLayout`): where its tokens stand.
            cache (`transformers.Cache`, *optional*): the keys and values before it; they are added to.
            position_embeddings (`tuple[torch.Tensor, torch.Tensor]`, *optional*): the cosines and sines of rotary
                positions, `[1 or B, T, p]`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: the output `[B, T, d]`, and the weights `[B, H, T, past + T]` if
            the attention implementation has them.
        """
        query = self._heads(self.q_proj(hidden_states))
        key = self._heads(self.k_proj(hidden_states))
        value = self._heads(self.v_proj(hidden_states))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        projected = query, key, value
        if position_embeddings is not None:
            rotated = apply_rotary_pos_emb(query, key, *position_embeddings)
            query, key = (x.to(query.dtype) for x in rotated)
        if cache is not None:
            tokens = {"attention_mask": layout.attention_mask, "position_ids": layout.position_ids}
            try:
                key, value = cache.update(key, value, self.layer_idx, **(tokens if self.is_sliding else {}))
            except IndexError:
                raise ValueError(
                    f"A static cache of {cache.layers[self.layer_idx].get_max_length()} tokens is too short: make it with "
                    "a larger `max_cache_len`, or use a `DynamicCache`."
                ) from None
        output, weights = self._attend(query, key, value, layout, **kwargs)
        output = self.complete(output, projected, hidden_states, layout, cache)
        return getattr(self, self.output_name)(output.flatten(2)), weights

    def complete(
        self,
        output: torch.Tensor,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        cache: Cache | None,
    ) -> torch.Tensor:
        """
        The values `[B, T, H, p]` for the output projection, where a family adds to those of the attention, `output`, what
        it makes of the queries, keys and values `[B, H, T, p]` before their rotary positions.
        """
        return output

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, H · p]` as `[B, H, T, p]`, with as many heads as this process has."""
        return x.unflatten(-1, (x.shape[-1] // self.head_dim, self.head_dim)).transpose(1, 2)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SequenceLayout, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        config, length = self.config, query.shape[2]
        mask = layout.masks[self.layer_type]
        dropout = config.attention_dropout if self.training else 0.0
        if length == 0:
            # Not every implementation takes no queries.
            return query.transpose(1, 2), None
        is_plain = mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)
        if self.is_sliding and is_plain and attends_in_blocks(config, length):
            output = sliding_window_attention(
                query,
                repeat_kv(key, self.num_key_value_groups),
                repeat_kv(value, self.num_key_value_groups),
                sliding_window=config.sliding_window,
                scaling=self.scaling,
                num_sinks=config.attention_sinks,
                dropout_p=dropout,
                positions=mask,
            )
            return output.transpose(1, 2), None
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention)
        return interface(
            self,
            query,
            key,
            value,
            mask,
            dropout=dropout,
            scaling=self.scaling,
            sliding_window=config.sliding_window if self.is_sliding else None,
            position_ids=layout.position_ids,
            **kwargs,
        )
