"""Summation aggregation models.

P. Ekin, "Summation-Based Transformers: A Path Toward Linear Complexity Sequence Modeling", TechRxiv 2025,
doi 10.36227/techrxiv.175790522.25734653.
"""

import math

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    MaskedLMOutput,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import attention
from .cache import adopt_cache
from .configuration.configuration_sumagg import SumAggConfig
from .generation import RecurrentGenerationMixin
from .heads import (
    ForCausalLM,
    ForSequenceClassification,
    ForTokenClassification,
    language_model_loss,
)
from .ops.summation import bidirectional_sum, causal_sum
from .ops.token_blocks import activated_linear, token_wise
from .sequence import (
    SequenceLayout,
    check_ids,
    create_attention_masks,
    last_real_hidden_states,
    sequence_layout,
    sinusoidal_positions,
)


class SumAggPositionModulation(nn.Module):
    """
    Position modulation, `h_t = E[x_t] * (P_t + b)`, elementwise, with a learned table P, a sinusoidal one, or P = 0.
    """

    def __init__(self, config: SumAggConfig):
        super().__init__()
        self.position_embedding_type = config.position_embedding_type
        self.position_bias = config.position_bias
        if config.position_embedding_type == "learned":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        if self.position_embedding_type == "none":
            return inputs_embeds * self.position_bias
        if self.position_embedding_type == "learned":
            check_ids("position_ids", position_ids, self.position_embeddings.num_embeddings, "positions of the table")
            positions = self.position_embeddings(position_ids)
        else:
            positions = sinusoidal_positions(position_ids, inputs_embeds.shape[-1]).to(inputs_embeds.dtype)
        return inputs_embeds * (positions + self.position_bias)


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
        sum_scale: torch.Tensor | None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        terms = token_wise(lambda tokens: self.hidden_proj(self.in_proj(tokens).relu()), hidden_states)
        mask, document_ids = layout.attention_mask, layout.document_ids
        if not self.is_causal:
            sums = bidirectional_sum(terms.relu(), attention_mask=mask, document_ids=document_ids)
            return self.out_proj(sums if sum_scale is None else sums * sum_scale)
        scale = None if sum_scale is None else sum_scale.squeeze(-1)
        if past_key_values is None:
            sums, _ = causal_sum(terms, attention_mask=mask, document_ids=document_ids, relu=True, scale=scale)
        else:
            scale = None if scale is None else scale.expand(terms.shape[0], -1)
            sums, _ = past_key_values.update(
                terms,
                None,
                self.layer_idx,
                restart=layout.restart,
                per_token={"attention_mask": mask, "document_ids": document_ids, "scale": scale},
                parameters={"relu": True},
            )
        return self.out_proj(sums)


class SumAggAttention(nn.Module):
    """Softmax attention, full or sliding, through transformers' attention interface."""

    def __init__(self, config: SumAggConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = config.is_causal
        self.is_sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layout: SequenceLayout,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        if past_key_values is not None:
            padding = {"attention_mask": layout.attention_mask} if self.is_sliding else {}
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx, **padding)

        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attention(
            self,
            interface,
            query_states,
            key_states,
            value_states,
            attention_mask,
            position_ids=layout.position_ids,
            **kwargs,
        )
        return self.out_proj(output), weights


class SumAggMLP(nn.Module):
    """Feed-forward layer, `W_b act(W_a h + a) + b`."""

    def __init__(self, config: SumAggConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return activated_linear(self.up_proj(hidden_states), self.act_fn, self.down_proj)


class SumAggDecoderLayer(GradientCheckpointingLayer):
    """
    One block. Post-norm, as published: `h = LN(h + mixer(h))`, `h = LN(h + mlp(h))`. Pre-norm: `h = h + mixer(LN(h))`,
    `h = h + mlp(LN(h))`.
    """

    def __init__(self, config: SumAggConfig, layer_idx: int):
        super().__init__()
        self.is_summation = config.layer_types[layer_idx] == "summation"
        self.norm_first = config.norm_position == "pre"
        self.mixer = SumAggSummation(config, layer_idx) if self.is_summation else SumAggAttention(config, layer_idx)
        self.mlp = SumAggMLP(config)
        # Marked here, as `_init_weights` of a model outside transformers sees only modules with weights of their own.
        self.mixer.out_proj.adds_to_stream = self.mlp.down_proj.adds_to_stream = self.norm_first
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layout: SequenceLayout,
        sum_scale: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        mixer_input = self.mixer_norm(hidden_states) if self.norm_first else hidden_states
        if self.is_summation:
            mixed = self.mixer(mixer_input, layout, sum_scale, past_key_values=past_key_values)
        else:
            mixed, _ = self.mixer(mixer_input, attention_mask, layout, past_key_values=past_key_values, **kwargs)
        return token_wise(self._after_mixer, hidden_states, mixed)

    def _after_mixer(self, hidden_states: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.dropout(mixed)
        if not self.norm_first:
            hidden_states = self.mixer_norm(hidden_states)

        mlp_input = self.mlp_norm(hidden_states) if self.norm_first else hidden_states
        hidden_states = hidden_states + self.dropout(self.mlp(mlp_input))
        return hidden_states if self.norm_first else self.mlp_norm(hidden_states)


class SumAggPreTrainedModel(PreTrainedModel):
    config: SumAggConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SumAggDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": SumAggDecoderLayer,
        "attentions": OutputRecorder(SumAggAttention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "adds_to_stream", False):
            # Each of the 2 L residual branches adds to the same stream, so each starts smaller.
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, std=std)


class SumAggModel(SumAggPreTrainedModel):
    """
    The bare summation aggregation model.

    A masked token is transparent: nothing sees it, and its own output repeats that of the last real token before it.
    """

    def __init__(self, config: SumAggConfig):
        super().__init__(config)
        # `from_pretrained(..., num_hidden_layers=...)` sets attributes of a config that was valid before.
        config.validate_layer_type()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.modulation = SumAggPositionModulation(config)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([SumAggDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        # The published classifier has no blocks, and then no norm either.
        self.norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if config.num_hidden_layers else nn.Identity()
        )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `[B, T]`, *optional*): token ids. Exactly one of `input_ids` and
                `inputs_embeds` is needed.
            attention_mask (`torch.Tensor` of shape `[B, past + T]`, *optional*): 1 for real tokens, 0 for padding,
                which may stand anywhere.
            position_ids (`torch.LongTensor` of shape `[1, T]` or `[B, T]`, *optional*): the position of each token in
                its document. Position 0 begins a document: restarting positions pack several into one row. By default
                the real tokens are counted.
            past_key_values ([`~transformers.Cache`], *optional*): the decode state of the tokens before these.
            inputs_embeds (`torch.FloatTensor` of shape `[B, T, d]`, *optional*): embeddings, before modulation.
            use_cache (`bool`, *optional*): whether to return the decode state.

        Raises:
            `ValueError`: not exactly one of `input_ids` and `inputs_embeds`; an id outside the vocabulary; a position
                beyond a learned table; a mask or positions of the wrong shape; a cache of another model, or any in a
                bidirectional model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            check_ids("input_ids", input_ids, self.config.vocab_size, "ids of the vocabulary")
            inputs_embeds = self.embed_tokens(input_ids)

        if not self.config.is_causal:
            if past_key_values is not None:
                raise ValueError("A bidirectional model has no decode state: pass no `past_key_values`.")
            use_cache = False
        if past_key_values is not None:
            adopt_cache(past_key_values, self.config)
        elif use_cache and self.config.num_hidden_layers > 0:
            past_key_values = DynamicCache(config=self.config)
            adopt_cache(past_key_values, self.config)

        layout = sequence_layout(inputs_embeds, attention_mask, position_ids, past_key_values)
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = create_attention_masks(self.config, inputs_embeds, masks, past_key_values, position_ids)

        hidden_states = self.dropout(self.modulation(inputs_embeds, layout.position_ids))
        sum_scale = self._sum_scale(layout, hidden_states)
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks.get(layer_type),
                layout=layout,
                sum_scale=sum_scale,
                past_key_values=past_key_values,
                **kwargs,
            )
        hidden_states = last_real_hidden_states(self.norm(hidden_states), layout.attention_mask)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _sum_scale(self, layout: SequenceLayout, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """`1 / n` or `1 / sqrt(n)` for the `n` tokens that each sum adds, `[B or 1, T, 1]`; `None`: not normalised."""
        if self.config.sum_normalization == "none" or "summation" not in self.config.layer_types:
            return None
        if self.config.is_causal:
            count = layout.position_ids[..., None].float() + 1
        else:
            ones = torch.ones_like(hidden_states[..., :1], dtype=torch.float32)
            count = bidirectional_sum(
                ones, attention_mask=layout.attention_mask, document_ids=layout.document_ids
            ).clamp(min=1)
        scale = count.reciprocal() if self.config.sum_normalization == "mean" else count.rsqrt()
        return scale.to(hidden_states.dtype)


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


class SumAggForMaskedLM(SumAggPreTrainedModel):
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

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedLMOutput:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `[B, T]`, *optional*): the token ids to predict; -100 is ignored.

        With `labels`, in training and with `config.fuse_linear_cross_entropy`, there is a loss but no `logits`.

        The other arguments and the errors are those of [`SumAggModel.forward`]. Also raised:
            `ValueError`: `labels` of another shape than the logits, or outside the vocabulary; an output layer that
                the fused loss does not know.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        loss, logits = language_model_loss(self, outputs.last_hidden_state, labels, is_causal=False, **kwargs)
        return MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


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

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        if self.pooling == "last":
            # `SumAggModel` repeats the last real token over the padding after it.
            return hidden_states[:, -1]
        if attention_mask is None:
            attention_mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool)
        pooled = bidirectional_sum(self.proj(hidden_states).relu(), attention_mask=attention_mask)[:, 0]
        if self.pooling == "mean":
            pooled = pooled / attention_mask.sum(dim=1, keepdim=True).clamp(min=1)
        return pooled


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
