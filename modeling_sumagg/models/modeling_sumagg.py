"""Summation aggregation models.

P. Ekin, "Summation-Based Transformers: A Path Toward Linear Complexity Sequence Modeling", TechRxiv 2025,
doi 10.36227/techrxiv.175790522.25734653.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..configuration.configuration_sumagg import SumAggConfig
from ..decoder.attention import Attention, rms_norm
from ..decoder.heads import (
    ForCausalLM,
    ForMaskedLM,
    ForSequenceClassification,
    ForTokenClassification,
    last_token,
    pool,
)
from ..decoder.layers import DecoderLayer
from ..decoder.layout import SequenceLayout
from ..decoder.model import DecoderModel, DecoderPreTrainedModel
from ..decoder.recurrence import recur
from ..ops.causal_convolution.causal_convolution import causal_convolution
from ..ops.keyed_sum.keyed_sum import bidirectional_keyed_sum, causal_keyed_sum
from ..ops.precision import sum_dtype
from ..ops.running_sum.running_sum import bidirectional_sum, causal_sum
from ..ops.weighted_mean.weighted_mean import bidirectional_mean, causal_mean
from .decay import SumDecay, own_part
from .position_modulation import PositionModulation


class SumAggConvolution(nn.Module):
    """Depthwise causal convolution over the real tokens of a document, SiLU after it."""

    def __init__(self, config: SumAggConfig, layer_idx: int, channels: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.weight = nn.Parameter(torch.empty(channels, config.conv_kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, hidden_states: torch.Tensor, layout: SequenceLayout, cache: Cache | None = None) -> torch.Tensor:
        """`hidden_states` `[B, T, channels]` to the outputs of the same shape."""
        parameters = {"weight": own_part(self.weight), "bias": own_part(self.bias)}
        return F.silu(recur(causal_convolution, hidden_states, layout, cache, self.layer_idx, **parameters))


class SumAggSummation(nn.Module):
    """
    Summation mixer: `z_t = relu(W2 relu(W1 h_t))`, or linear, `z_t = W h_t`; `s_t = sum_{u <= t} z_u` (over all u if the
    model is bidirectional); output `W_o s_t + b_o`.

    With decays `a` of its heads, `s_t = a_t s_{t-1} + z_t`, or normalised the mean of the terms `z` with weights `1 - a`,
    which decay; with a skip `s_t + z_t` stands for `s_t`; with a gate the output is `W_o (silu(W_g h_t) * s_t) + b_o`. A
    causal convolution may stand before it all, or before the map of the terms.
    """

    def __init__(self, config: SumAggConfig, layer_idx: int):
        super().__init__()
        self.is_causal = config.is_causal
        self.sum_normalization = config.sum_normalization
        self.sum_skip = config.sum_skip
        self.conv_before = config.conv_before
        self.layer_idx = layer_idx
        width = config.hidden_size
        self.conv = SumAggConvolution(config, layer_idx, width) if config.conv_kernel_size is not None else None
        self.in_proj = nn.Linear(width, width, bias=False) if config.sum_map == "relu" else None
        self.hidden_proj = nn.Linear(width, width, bias=False)
        self.decay = SumDecay(config, config.num_sum_heads) if config.sum_decay != "none" else None
        self.gate_proj = nn.Linear(width, width, bias=False) if config.sum_gate else None
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        sum_scale: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states` `[B, T, d]` to the output of the same shape; `sum_scale` `[1 or B, T]` normalises the sums."""
        inputs = hidden_states if self.conv is None else self.conv(hidden_states, layout, cache)
        hidden_states = inputs if self.conv_before == "mixer" else hidden_states
        relu = self.in_proj is not None  # which a causal sum without a skip does itself
        terms = self.hidden_proj(inputs if self.in_proj is None else self.in_proj(inputs).relu())
        if relu and (self.sum_skip or not self.is_causal):
            terms, relu = terms.relu(), False
        per_token: dict[str, torch.Tensor | None] = {"scale": sum_scale}
        if self.decay is not None:
            is_mean = self.sum_normalization == "mean"
            log_decay, weight = self.decay(hidden_states, weight=is_mean)
            per_token = {"log_decay": log_decay, "weight": weight} if is_mean else {"log_decay": log_decay}
        operator: Callable
        if self.is_causal:
            operator = causal_mean if "weight" in per_token else causal_sum
            sums = recur(operator, terms, layout, cache, self.layer_idx, per_token=per_token, relu=relu)
        else:
            operator = bidirectional_mean if "weight" in per_token else bidirectional_sum
            delimiters = {"attention_mask": layout.attention_mask, "document_ids": layout.documents}
            sums = operator(terms, **delimiters, **per_token)
        if self.sum_skip:
            sums = sums + terms
        if self.gate_proj is not None:
            sums = sums * F.silu(self.gate_proj(hidden_states))
        return self.out_proj(sums), None


class SumAggKeyedSummation(nn.Module):
    """
    Summation mixer whose terms have keys, so that a token finds a value again by its query. Each head sums a matrix:

        v, k, q = silu(conv(W h))
        S_t = a_t S_{t-1} + (1 - a_t) k_t v_tᵀ,    y_t = S_tᵀ q_t / sqrt(N)
        output W_o (silu(W_g h_t) * norm(y_t + D v_t)) + b_o

    In a bidirectional model S_t is the sum over both sides, which decays in both directions. D is one number for each head. The RMS norm over the channels of each head takes the place of the division by the sum
    of the weights. The rows of W are ordered by keys: the values of the heads that share a key, the key, the query. A part
    of the rows is then a part of the heads.
    """

    def __init__(self, config: SumAggConfig, layer_idx: int):
        super().__init__()
        self.is_causal = config.is_causal
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_sum_heads
        self.state_size = config.sum_state_size
        num_keys = config.num_sum_key_heads or config.num_sum_heads
        self.values_per_key = config.hidden_size // num_keys
        self.skip = nn.Parameter(torch.empty(config.num_sum_heads)) if config.sum_skip else None
        self.norm_weight = nn.Parameter(torch.empty(config.hidden_size))
        self.norm_eps = config.layer_norm_eps
        channels = config.hidden_size + 2 * num_keys * config.sum_state_size
        self.qkv_proj = nn.Linear(config.hidden_size, channels, bias=False)
        self.conv = None if config.conv_kernel_size is None else SumAggConvolution(config, layer_idx, channels)
        self.decay = SumDecay(config, config.num_sum_heads)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if config.sum_gate else None
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states` `[B, T, d]` to the output of the same shape."""
        inputs = self.qkv_proj(hidden_states)
        if self.conv is not None:
            inputs = self.conv(inputs, layout, cache)
        # In float32, so that the sums are rounded only after their norm.
        inputs = inputs.to(sum_dtype(inputs))
        sizes = [self.values_per_key, self.state_size, self.state_size]
        values, keys, queries = inputs.unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
        heads = values.shape[2] * values.shape[3] // self.head_dim
        values = values.reshape(*values.shape[:2], heads, self.head_dim)
        log_decay, weight = self.decay(hidden_states, weight=not self.is_causal)
        per_token = {"keys": keys, "queries": queries * self.state_size**-0.5, "log_decay": log_decay}
        if self.is_causal:
            sums = recur(causal_keyed_sum, values, layout, cache, self.layer_idx, per_token=per_token, average=True)
        else:
            delimiters = {"attention_mask": layout.attention_mask, "document_ids": layout.documents}
            sums = bidirectional_keyed_sum(values, **per_token, weight=weight, **delimiters)
        if self.skip is not None:
            sums = torch.addcmul(sums, values, own_part(self.skip)[:, None])
        sums = rms_norm(sums, self.norm_eps).flatten(-2) * own_part(self.norm_weight)
        if self.gate_proj is not None:
            sums = sums * F.silu(self.gate_proj(hidden_states))
        return self.out_proj(sums.to(hidden_states.dtype)), None


class SumAggAttentionAndSum(Attention):
    """
    Attention to a window, and beside it a sum with keys over the whole document, read by the same heads of queries:

        S_t = a_t S_{t-1} + (1 - a_t) k_t v_tᵀ,    output W_o (attention_t + g_t norm(S_tᵀ q_t)) + b_o

    q, k and v are those of the attention before their rotary positions, q and k of length one. The gate `g_t = W_g h_t` of
    each head begins closed, with `W_g` zero.
    """

    def __init__(self, config: SumAggConfig, layer_idx: int):
        super().__init__(config, layer_idx, bias=config.attention_bias, output_name="out_proj")
        self.decay = SumDecay(config, config.num_attention_heads)
        self.sum_gate = nn.Linear(config.hidden_size, config.num_attention_heads, bias=False)
        self.sum_gate.starts_closed = True

    def complete(self, output, projected, hidden_states, layout, cache):
        dtype = sum_dtype(hidden_states)
        groups = projected[0].shape[1] // projected[1].shape[1]
        queries, keys, values = (x.transpose(1, 2).to(dtype) for x in projected)
        keys, values = (x.repeat_interleave(groups, dim=2) for x in (keys, values))
        keys, queries = F.normalize(keys, dim=-1), F.normalize(queries, dim=-1)
        per_token = {"keys": keys, "queries": queries, "log_decay": self.decay(hidden_states)[0]}
        sums = recur(causal_keyed_sum, values, layout, cache, self.layer_idx, per_token=per_token, average=True)
        sums = rms_norm(sums, self.config.layer_norm_eps)
        return output + (self.sum_gate(hidden_states)[..., None] * sums).to(output.dtype)


class SumAggDecoderLayer(DecoderLayer):
    """One block: post-norm, as published, or pre-norm."""

    @staticmethod
    def mixer_class(config: SumAggConfig, layer_idx: int) -> nn.Module:
        mixer_class = SumAggSummation if config.sum_state_size is None else SumAggKeyedSummation
        return mixer_class(config, layer_idx)

    def __init__(self, config: SumAggConfig, layer_idx: int):
        super().__init__(config, layer_idx, norm_first=config.norm_position == "pre")
        if config.attention_sum and config.layer_types[layer_idx] == "sliding_attention":
            self.mixer = SumAggAttentionAndSum(config, layer_idx)
        # Marked here, as `_init_weights` of a model outside transformers sees only modules with weights of their own.
        self.mixer.out_proj.adds_to_stream = self.mlp.down_proj.adds_to_stream = self.norm_first


class SumAggPreTrainedModel(DecoderPreTrainedModel):
    config: SumAggConfig
    layer_class = SumAggDecoderLayer

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SumAggConvolution):
            bound = self.config.conv_kernel_size**-0.5  # as PyTorch starts its convolutions
            init.uniform_(module.weight, -bound, bound)
            init.zeros_(module.bias)
        elif isinstance(module, SumAggKeyedSummation):
            init.ones_(module.norm_weight)
            if module.skip is not None:
                init.ones_(module.skip)
        elif isinstance(module, SumDecay):
            module.reset_parameters()
        elif getattr(module, "starts_closed", False):
            init.zeros_(module.weight)
        elif getattr(module, "adds_to_stream", False):
            # Each of the 2 L residual branches adds to the same stream, so each starts smaller.
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, std=std)
        elif getattr(module, "starts_as_identity", False):
            # As large as a random map of its width.
            scale = self.config.initializer_range * math.sqrt(module.in_features)
            init.copy_(module.weight, scale * torch.eye(module.in_features))


class SumAggModel(SumAggPreTrainedModel, DecoderModel):
    """The bare summation aggregation model."""

    def make_positions(self, config: SumAggConfig) -> None:
        self.modulation = PositionModulation(
            config.hidden_size,
            config.position_embedding_type,
            getattr(config, "max_position_embeddings", None),
            config.position_bias,
        )

    def make_norm(self, config: SumAggConfig) -> nn.Module:
        # The published classifier has no blocks, and then no norm either.
        return super().make_norm(config) if config.num_hidden_layers else nn.Identity()

    def add_positions(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.modulation(inputs_embeds, position_ids)

    def shared_arguments(self, layout: SequenceLayout) -> dict[str, Any]:
        """
        With sums that do not decay also `sum_scale`, `1 / n` or `1 / sqrt(n)` for the `n` tokens that each sum adds,
        float32 `[1 or B, T]`.
        """
        shared, config = super().shared_arguments(layout), self.config
        if config.sum_decay != "none" or config.sum_normalization == "none" or "summation" not in config.layer_types:
            return shared
        count = layout.position_ids.float() + 1
        if not config.is_causal:
            mask, documents = layout.attention_mask, layout.documents
            of_rows = [tensor for tensor in (count, mask, *(documents or ())) if tensor is not None]
            ones = torch.ones_like(count).expand(max(map(len, of_rows)), -1)[..., None]
            count = bidirectional_sum(ones, attention_mask=mask, document_ids=documents).clamp(min=1)[..., 0]
        scale = count.reciprocal() if config.sum_normalization == "mean" else count.rsqrt()
        return {**shared, "sum_scale": scale}


class SumAggForCausalLM(SumAggPreTrainedModel, ForCausalLM):
    """The summation aggregation model with a language modelling head."""

    model_class = SumAggModel

    def __init__(self, config: SumAggConfig):
        if not config.is_causal:
            raise ValueError(
                "A causal language model needs `is_causal=True` in its config. `SumAggForMaskedLM` is the language "
                "model for a bidirectional one."
            )
        super().__init__(config)


class SumAggForMaskedLM(SumAggPreTrainedModel, ForMaskedLM):
    """The bidirectional summation aggregation model with a masked language modelling head."""

    model_class = SumAggModel

    def __init__(self, config: SumAggConfig):
        if config.is_causal:
            raise ValueError(
                "A masked language model sees both sides: set `is_causal=False` in its config (as a keyword of "
                "`from_pretrained` too)."
            )
        super().__init__(config)


def sum_and_count(
    terms: torch.Tensor,
    *,
    initial_state: tuple[torch.Tensor, torch.Tensor] | None,
    attention_mask: torch.Tensor | None,
    document_ids: None,
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """
    The sum `[B, d]` of the real terms `[B, T, d]` of each row and their number `[B, 1]`, float32 (float64 for float64), as
    outputs and as state.
    """
    dtype = sum_dtype(terms)
    if attention_mask is None:
        count = terms.new_full((terms.shape[0], 1), terms.shape[1], dtype=dtype)
    else:
        terms = terms.masked_fill(~attention_mask.bool()[..., None], 0)
        count = attention_mask.sum(dim=1, keepdim=True, dtype=dtype)
    total = terms.sum(dim=1, dtype=dtype)
    if initial_state is not None:
        total, count = total + initial_state[0], count + initial_state[1]
    return (total, count), (total, count)


class SumAggPooler(nn.Module):
    """
    One vector a sequence, `[B, d]`: `sum_t relu(W h_t)` over the real tokens as in the published classifier, its mean,
    or the hidden state of the last real token.
    """

    def __init__(self, config: SumAggConfig):
        super().__init__()
        self.pooling = config.pooling
        if config.pooling != "last":
            self.proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            # A language model's checkpoint lacks it, and PEFT saves with an adapter only the `score` after it.
            self.proj.starts_as_identity = True

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache | None = None
    ) -> torch.Tensor:
        if self.pooling == "last":
            return pool(last_token, hidden_states, attention_mask, cache)
        terms = self.proj(hidden_states).relu()
        total, count = pool(sum_and_count, terms, attention_mask, cache)
        return (total / count.clamp(min=1) if self.pooling == "mean" else total).to(terms.dtype)


class SumAggForSequenceClassification(SumAggPreTrainedModel, ForSequenceClassification):
    """
    The summation aggregation model with a sequence classification or regression head on a pooled vector. Without
    blocks (`num_hidden_layers=0`) and with `pooling="sum"` it is the published document classifier,
    `s = sum_t relu(W (E[x_t] * (P_t + 1)))`, logits `V s + c`.
    """

    model_class = SumAggModel
    pooler_class = SumAggPooler


class SumAggForTokenClassification(SumAggPreTrainedModel, ForTokenClassification):
    """The summation aggregation model with a classification head on every token."""

    model_class = SumAggModel


__all__ = [
    "SumAggForCausalLM",
    "SumAggForMaskedLM",
    "SumAggForSequenceClassification",
    "SumAggForTokenClassification",
    "SumAggModel",
    "SumAggPreTrainedModel",
]
