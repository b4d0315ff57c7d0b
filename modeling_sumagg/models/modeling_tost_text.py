"""The Token Statistics Transformer (ToST) for text: "Token Statistics Transformer: Linear-Time Attention via
Variational Rate Reduction", Wu et al., ICLR 2025, arXiv 2412.17810."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder

from ..common.positions import learned_positions
from ..configuration.configuration_tost_text import ToSTTextConfig
from ..decoder.attention import Attention
from ..decoder.heads import ForCausalLM, ForSequenceClassification, ForTokenClassification
from ..decoder.layout import SequenceLayout
from ..decoder.model import DecoderModel, DecoderPreTrainedModel
from ..decoder.recurrence import recur
from ..ops.token_statistics.token_statistics import causal_token_membership, causal_token_statistics
from ..ops.token_statistics.token_statistics_reference import TokenStatisticsState
from .decay import SumDecay


class ToSTTextTokenStatistics(nn.Module):
    """Causal token statistics self-attention (TSSA): one projection w = U x, its second moments, no pairwise product."""

    def __init__(self, config: ToSTTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.w_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.temperature = nn.Parameter(torch.ones(config.num_attention_heads, 1))
        self.membership_bias = (
            nn.Parameter(torch.zeros(config.num_attention_heads, config.max_position_embeddings, 1))
            if config.use_membership_bias
            else None
        )
        self.decay = SumDecay(config, config.num_attention_heads) if config.sum_decay != "none" else None
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        `hidden_states` `[B, T, d]` to the output of the same shape and, with `output_attentions`, the memberships Π
        `[B, K, T]` (else `None`).
        """
        w = self.w_proj(hidden_states)
        w = w.unflatten(-1, (w.shape[-1] // self.head_dim, self.head_dim)).transpose(1, 2)
        position_bias = None
        if self.membership_bias is not None:
            position_bias = self._membership_bias_at(self.membership_bias, layout.position_ids).expand(
                w.shape[0], -1, -1
            )

        log_decay = None if self.decay is None else self.decay(hidden_states)[0]
        membership = None
        if kwargs.get("output_attentions", self.config.output_attentions):
            # Kept out of the operator, whose training path stores neither Π nor the squares.
            state = None
            if cache is not None:
                state = cache.layers[self.layer_idx].initial_state(causal_token_statistics, layout.restart)
                state = None if state is None else TokenStatisticsState(*state)
            membership = causal_token_membership(
                w,
                self.temperature,
                position_bias,
                log_decay=log_decay,
                initial_state=state,
                attention_mask=layout.attention_mask,
                document_ids=layout.documents,
            )

        output = recur(
            causal_token_statistics,
            w,
            layout,
            cache,
            self.layer_idx,
            per_token={"position_bias": position_bias, "log_decay": log_decay},
            temperature=self.temperature,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
        )
        return self.o_proj(output.transpose(1, 2).flatten(2)), membership

    @staticmethod
    def _membership_bias_at(membership_bias: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """β `[K, max positions, 1]` at the positions `[1 or B, T]` of the tokens, `[1 or B, K, T]`."""
        return learned_positions(
            lambda ids: F.embedding(ids, membership_bias[..., 0].transpose(0, 1)).transpose(1, 2),
            position_ids,
            membership_bias.shape[1],
        )


class ToSTTextMLP(nn.Module):
    """Feed-forward layer, `W_2 act(W_1 h)`; a gated one is `W_2 (act(W_g h) * (W_1 h))`."""

    def __init__(self, config: ToSTTextConfig):
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(*sizes, bias=config.use_bias) if config.mlp_gate else None
        self.fc1 = nn.Linear(*sizes, bias=config.use_bias)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.use_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            return self.fc2(self.activation_fn(self.fc1(hidden_states)))
        return self.fc2(self.activation_fn(self.gate_proj(hidden_states)) * self.fc1(hidden_states))


class ToSTTextDecoderLayer(GradientCheckpointingLayer):
    """One block: `x = x + γ1 · mixer(LN(x))`, `x = x + γ2 · mlp(LN(x))`."""

    def __init__(self, config: ToSTTextConfig, layer_idx: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        if config.layer_types[layer_idx] == "token_statistics":
            self.attention = ToSTTextTokenStatistics(config, layer_idx)
        else:
            self.attention = Attention(config, layer_idx, bias=config.use_bias)
        self.layer_scale1 = nn.Parameter(torch.full((config.hidden_size,), float(config.layerscale_value)))
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.mlp = ToSTTextMLP(config)
        self.layer_scale2 = nn.Parameter(torch.full((config.hidden_size,), float(config.layerscale_value)))
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        mixed, _ = self.attention(self.norm1(hidden_states), layout, cache=cache, **kwargs)
        hidden_states = torch.addcmul(hidden_states, self.layer_scale1, self.dropout(mixed))
        branch = self.dropout(self.mlp(self.norm2(hidden_states)))
        return torch.addcmul(hidden_states, self.layer_scale2, branch)


class ToSTTextPreTrainedModel(DecoderPreTrainedModel):
    config: ToSTTextConfig
    layer_class = ToSTTextDecoderLayer
    _can_record_outputs = {
        "attentions": [OutputRecorder(ToSTTextTokenStatistics, index=1), OutputRecorder(Attention, index=1)]
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ToSTTextTokenStatistics):
            init.ones_(module.temperature)
            if module.membership_bias is not None:
                init.zeros_(module.membership_bias)
        elif isinstance(module, SumDecay):
            module.reset_parameters()
        elif isinstance(module, ToSTTextDecoderLayer):
            init.constant_(module.layer_scale1, self.config.layerscale_value)
            init.constant_(module.layer_scale2, self.config.layerscale_value)
            # As in GPT-2: each of the 2 L residual branches adds to the same stream, so each starts smaller.
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.attention.o_proj.weight, std=std)
            init.normal_(module.mlp.fc2.weight, std=std)


class ToSTTextModel(ToSTTextPreTrainedModel, DecoderModel):
    """
    The bare ToST language model, in GPT-2's frame. With `output_attentions` it returns, for each token statistics layer,
    the soft membership Π `[B, K, T]` of every token in every head, and for each attention layer (if its implementation
    is `"eager"`) its weights `[B, K, T, past + T]`.
    """

    def make_norm(self, config: ToSTTextConfig) -> nn.Module:
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)


class ToSTForCausalLM(ToSTTextPreTrainedModel, ForCausalLM):
    """The ToST language model with its output projection."""

    model_class = ToSTTextModel


class ToSTTextForSequenceClassification(ToSTTextPreTrainedModel, ForSequenceClassification):
    """The ToST language model with a sequence classification or regression head on the last real token."""

    model_class = ToSTTextModel


class ToSTTextForTokenClassification(ToSTTextPreTrainedModel, ForTokenClassification):
    """The ToST language model with a classification head on every token."""

    model_class = ToSTTextModel


__all__ = [
    "ToSTForCausalLM",
    "ToSTTextForSequenceClassification",
    "ToSTTextForTokenClassification",
    "ToSTTextModel",
    "ToSTTextPreTrainedModel",
]
