"""Summation aggregation models.

P. Ekin, "Summation-Based Transformers: A Path Toward Linear Complexity Sequence Modeling", TechRxiv 2025,
doi 10.36227/techrxiv.175790522.25734653.
"""

import math

import torch
from torch import nn
from transformers import Cache
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder

from .configuration.configuration_sumagg import SumAggConfig
from .decoder.attention import Attention
from .decoder.heads import ForCausalLM, ForMaskedLM, ForSequenceClassification, ForTokenClassification
from .decoder.layout import SequenceLayout
from .decoder.model import DecoderModel, DecoderPreTrainedModel, RecurrentGenerationMixin
from .decoder.positions import PositionModulation
from .decoder.recurrence import recur, register_recurrent_layer_type
from .ops.summation import bidirectional_sum, causal_sum


register_recurrent_layer_type("summation")


class SumAggSummation(nn.Module):
    """
    Summation mixer: `z_t = relu(W2 relu(W1 h_t))`, `s_t = sum_{u <= t} z_u` (over all u if the model is
    bidirectional), output `W_o s_t + b_o`.
    """

    def __init__(self, config: SumAggConfig, layer_idx: int):
        super().__init__()
        self.is_causal = config.is_causal
        self.layer_idx = layer_idx
        self.in_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.hidden_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        sum_scale: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, None]:
        """`hidden_states` `[B, T, d]` to the output of the same shape; `sum_scale` `[1 or B, T]` normalises the sums."""
        terms = self.hidden_proj(self.in_proj(hidden_states).relu())
        if self.is_causal:
            sums = recur(causal_sum, terms, layout, cache, self.layer_idx, per_token={"scale": sum_scale}, relu=True)
        else:
            sums = bidirectional_sum(
                terms.relu(),
                attention_mask=layout.attention_mask,
                document_ids=layout.document_ids,
                scale=sum_scale,
            )
        return self.out_proj(sums), None


class SumAggMLP(nn.Module):
    """Feed-forward layer, `W_b act(W_a h + a) + b`."""

    def __init__(self, config: SumAggConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class SumAggDecoderLayer(GradientCheckpointingLayer):
    """
    One block. Post-norm, as published: `h = LN(h + mixer(h))`, `h = LN(h + mlp(h))`. Pre-norm: `h = h + mixer(LN(h))`,
    `h = h + mlp(LN(h))`.
    """

    def __init__(self, config: SumAggConfig, layer_idx: int):
        super().__init__()
        self.norm_first = config.norm_position == "pre"
        if config.layer_types[layer_idx] == "summation":
            self.mixer = SumAggSummation(config, layer_idx)
        else:
            self.mixer = Attention(config, layer_idx, bias=True, output_name="out_proj")
        self.mlp = SumAggMLP(config)
        # Marked here, as `_init_weights` of a model outside transformers sees only modules with weights of their own.
        self.mixer.out_proj.adds_to_stream = self.mlp.down_proj.adds_to_stream = self.norm_first
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        layout: SequenceLayout,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        mixer_input = self.mixer_norm(hidden_states) if self.norm_first else hidden_states
        mixed, _ = self.mixer(mixer_input, layout, cache=cache, **kwargs)
        hidden_states = hidden_states + self.dropout(mixed)
        if not self.norm_first:
            hidden_states = self.mixer_norm(hidden_states)

        mlp_input = self.mlp_norm(hidden_states) if self.norm_first else hidden_states
        hidden_states = hidden_states + self.dropout(self.mlp(mlp_input))
        return hidden_states if self.norm_first else self.mlp_norm(hidden_states)


class SumAggPreTrainedModel(DecoderPreTrainedModel):
    config: SumAggConfig
    _no_split_modules = ["SumAggDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": SumAggDecoderLayer,
        "attentions": OutputRecorder(Attention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "adds_to_stream", False):
            # Each of the 2 L residual branches adds to the same stream, so each starts smaller.
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, std=std)
        elif getattr(module, "starts_as_identity", False):
            # As large as a random map of its width.
            scale = self.config.initializer_range * math.sqrt(module.in_features)
            init.copy_(module.weight, scale * torch.eye(module.in_features))


class SumAggModel(DecoderModel, SumAggPreTrainedModel):
    """The bare summation aggregation model."""

    def __init__(self, config: SumAggConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.modulation = PositionModulation(
            config.hidden_size,
            config.position_embedding_type,
            getattr(config, "max_position_embeddings", None),
            config.position_bias,
        )
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([SumAggDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        # The published classifier has no blocks, and then no norm either.
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.num_hidden_layers else nn.Identity()
        )
        self.gradient_checkpointing = False
        self.post_init()

    def add_positions(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.modulation(inputs_embeds, position_ids)

    def shared_arguments(self, layout: SequenceLayout) -> dict[str, torch.Tensor | None]:
        """`sum_scale`, `1 / n` or `1 / sqrt(n)` for the `n` tokens that each sum adds, float32 `[1 or B, T]`, or `None`."""
        if self.config.sum_normalization == "none" or "summation" not in self.config.layer_types:
            return {"sum_scale": None}
        count = layout.position_ids.float() + 1
        if not self.config.is_causal:
            delimiters = {"attention_mask": layout.attention_mask, "document_ids": layout.document_ids}
            rows = max(tensor.shape[0] for tensor in (count, *delimiters.values()) if tensor is not None)
            ones = torch.ones_like(count).expand(rows, -1)[..., None]
            count = bidirectional_sum(ones, **delimiters).clamp(min=1)[..., 0]
        return {"sum_scale": count.reciprocal() if self.config.sum_normalization == "mean" else count.rsqrt()}


class SumAggForCausalLM(ForCausalLM, SumAggPreTrainedModel, RecurrentGenerationMixin):
    """The summation aggregation model with a language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SumAggConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError(
                "A causal language model needs `is_causal=True` in its config. `SumAggForMaskedLM` is the language "
                "model for a bidirectional one."
            )
        self.model = SumAggModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()


class SumAggForMaskedLM(ForMaskedLM, SumAggPreTrainedModel):
    """The bidirectional summation aggregation model with a masked language modelling head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SumAggConfig):
        super().__init__(config)
        if config.is_causal:
            raise ValueError(
                "A masked language model sees both sides: set `is_causal=False` in its config (as a keyword of "
                "`from_pretrained` too)."
            )
        self.model = SumAggModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()


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

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if self.pooling == "last":
            # `SumAggModel` repeats the last real token over the padding after it.
            return hidden_states[:, -1]
        if attention_mask is None:
            attention_mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
        scale = None
        if self.pooling == "mean":
            count = attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
            scale = count.float().reciprocal().expand(hidden_states.shape[:2])
        terms = self.proj(hidden_states).relu()
        return bidirectional_sum(terms, attention_mask=attention_mask, scale=scale)[:, 0]


class SumAggForSequenceClassification(ForSequenceClassification, SumAggPreTrainedModel):
    """
    The summation aggregation model with a sequence classification or regression head on a pooled vector. Without
    blocks (`num_hidden_layers=0`) and with `pooling="sum"` it is the published document classifier,
    `s = sum_t relu(W (E[x_t] * (P_t + 1)))`, logits `V s + c`.
    """

    def __init__(self, config: SumAggConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SumAggModel(config)
        self.pooler = SumAggPooler(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class SumAggForTokenClassification(ForTokenClassification, SumAggPreTrainedModel):
    """The summation aggregation model with a classification head on every token."""

    def __init__(self, config: SumAggConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = SumAggModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "SumAggForCausalLM",
    "SumAggForMaskedLM",
    "SumAggForSequenceClassification",
    "SumAggForTokenClassification",
    "SumAggModel",
    "SumAggPreTrainedModel",
]
