"""The Token Statistics Transformer (ToST) for text: "Token Statistics Transformer: Linear-Time Attention via
Variational Rate Reduction", Wu et al., ICLR 2025, arXiv 2412.17810."""

import math

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import attention
from .cache import adopt_cache
from .configuration.configuration_tost import ToSTTextConfig
from .generation import RecurrentGenerationMixin
from .heads import ForCausalLM, ForSequenceClassification, ForTokenClassification
from .ops.token_blocks import activated_linear, token_wise
from .ops.token_statistics.formula import TokenStatisticsState
from .ops.token_statistics.operators import causal_token_membership, causal_token_statistics
from .sequence import (
    SequenceLayout,
    check_ids,
    create_attention_masks,
    last_real_hidden_states,
    sequence_layout,
    sinusoidal_positions,
)


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
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: None,
        layout: SequenceLayout,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        `hidden_states` `[B, T, d]` to the output of the same shape and, with `output_attentions`, the memberships Π
        `[B, K, T]` (else `None`). The padding is in `layout`; `attention_mask` is `None`.
        """
        batch_size = hidden_states.shape[0]
        w = self.w_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        position_bias = None
        if self.membership_bias is not None:
            position_bias = self.membership_bias[:, layout.position_ids, 0].transpose(0, 1).expand(batch_size, -1, -1)
        per_token = {"attention_mask": layout.attention_mask, "document_ids": layout.document_ids}

        membership = None
        if kwargs.get("output_attentions", self.config.output_attentions):
            # Kept out of the operator, whose training path stores neither Π nor the squares.
            state = None
            if past_key_values is not None:
                state = past_key_values.layers[self.layer_idx].initial_state(layout.restart)
            state = None if state is None else TokenStatisticsState(*state)
            membership = causal_token_membership(w, self.temperature, position_bias, initial_state=state, **per_token)

        dropout_p = self.config.attention_dropout if self.training else 0.0
        if past_key_values is None:
            output, _ = causal_token_statistics(w, self.temperature, position_bias, dropout_p=dropout_p, **per_token)
        else:
            output, _ = past_key_values.update(
                w,
                None,
                self.layer_idx,
                restart=layout.restart,
                per_token={**per_token, "position_bias": position_bias},
                parameters={"temperature": self.temperature, "dropout_p": dropout_p},
            )
        return self.o_proj(output.transpose(1, 2).reshape(hidden_states.shape)), membership


class ToSTTextAttention(nn.Module):
    """Softmax attention, full or sliding, through transformers' attention interface."""

    def __init__(self, config: ToSTTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.is_sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.use_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layout: SequenceLayout,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query_states = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        key_states = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        value_states = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
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
        return self.o_proj(output), weights


class ToSTTextMLP(nn.Module):
    def __init__(self, config: ToSTTextConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.use_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return activated_linear(self.fc1(hidden_states), self.activation_fn, self.fc2)


class ToSTTextDecoderLayer(GradientCheckpointingLayer):
    """One block: `x = x + γ1 · mixer(LN(x))`, `x = x + γ2 · mlp(LN(x))`."""

    def __init__(self, config: ToSTTextConfig, layer_idx: int):
        super().__init__()
        is_statistics = config.layer_types[layer_idx] == "token_statistics"
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.attention = (ToSTTextTokenStatistics if is_statistics else ToSTTextAttention)(config, layer_idx)
        self.layer_scale1 = nn.Parameter(torch.full((config.hidden_size,), float(config.layerscale_value)))
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
        self.mlp = ToSTTextMLP(config)
        self.layer_scale2 = nn.Parameter(torch.full((config.hidden_size,), float(config.layerscale_value)))
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layout: SequenceLayout,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        mixed, _ = self.attention(
            self.norm1(hidden_states), attention_mask, layout, past_key_values=past_key_values, **kwargs
        )
        return token_wise(self._after_mixer, hidden_states, mixed)

    def _after_mixer(self, hidden_states: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        hidden_states = torch.addcmul(hidden_states, self.layer_scale1, self.dropout(mixed))
        branch = self.dropout(self.mlp(self.norm2(hidden_states)))
        return torch.addcmul(hidden_states, self.layer_scale2, branch)


class ToSTTextPreTrainedModel(PreTrainedModel):
    config: ToSTTextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ToSTTextDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": ToSTTextDecoderLayer,
        "attentions": [
            OutputRecorder(ToSTTextTokenStatistics, index=1),
            OutputRecorder(ToSTTextAttention, index=1),
        ],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ToSTTextTokenStatistics):
            init.ones_(module.temperature)
            if module.membership_bias is not None:
                init.zeros_(module.membership_bias)
        elif isinstance(module, ToSTTextDecoderLayer):
            init.constant_(module.layer_scale1, self.config.layerscale_value)
            init.constant_(module.layer_scale2, self.config.layerscale_value)
            # As in GPT-2: each of the 2 L residual branches adds to the same stream, so each starts smaller.
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.attention.o_proj.weight, std=std)
            init.normal_(module.mlp.fc2.weight, std=std)


class ToSTTextModel(ToSTTextPreTrainedModel):
    """
    The bare ToST language model, in GPT-2's frame.

    A masked token is transparent: nothing sees it, and its own output repeats that of the last real token before it.
    """

    def __init__(self, config: ToSTTextConfig):
        super().__init__(config)
        # `from_pretrained(..., num_hidden_layers=...)` sets attributes of a config that was valid before.
        config.validate_layer_type()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = (
            nn.Embedding(config.max_position_embeddings, config.hidden_size)
            if config.position_embedding_type == "learned"
            else None
        )
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList([ToSTTextDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.use_bias)
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
            inputs_embeds (`torch.FloatTensor` of shape `[B, T, d]`, *optional*): embeddings, before positions.
            use_cache (`bool`, *optional*): whether to return the decode state.
            output_attentions (`bool`, *optional*): whether to return, for each token statistics layer, the soft
                membership Π `[B, K, T]` of every token in every head, and for each attention layer (if its
                implementation is `"eager"`) its weights `[B, K, T, past + T]`.

        Raises:
            `ValueError`: not exactly one of `input_ids` and `inputs_embeds`; an id outside the vocabulary; a position
                beyond a learned table or β; a mask or positions of the wrong shape; a cache of another model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            check_ids("input_ids", input_ids, self.config.vocab_size, "ids of the vocabulary")
            inputs_embeds = self.embed_tokens(input_ids)

        if past_key_values is not None:
            adopt_cache(past_key_values, self.config)
        elif use_cache and self.config.num_hidden_layers > 0:
            past_key_values = DynamicCache(config=self.config)
            adopt_cache(past_key_values, self.config)

        layout = sequence_layout(inputs_embeds, attention_mask, position_ids, past_key_values)
        masks = attention_mask
        if not isinstance(masks, dict):
            masks = create_attention_masks(self.config, inputs_embeds, masks, past_key_values, position_ids)
        if self.position_embeddings is not None or self.config.use_membership_bias:
            what = "positions of the table" if self.position_embeddings is not None else "positions of β"
            check_ids("position_ids", layout.position_ids, self.config.max_position_embeddings, what)

        hidden_states = self.dropout(self._add_positions(inputs_embeds, layout.position_ids))
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states, masks.get(layer_type), layout=layout, past_key_values=past_key_values, **kwargs
            )
        hidden_states = last_real_hidden_states(self.norm(hidden_states), layout.attention_mask)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)

    def _add_positions(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        if self.position_embeddings is not None:
            return inputs_embeds + self.position_embeddings(position_ids)
        if self.config.position_embedding_type == "sinusoidal":
            return inputs_embeds + sinusoidal_positions(position_ids, inputs_embeds.shape[-1]).to(inputs_embeds.dtype)
        return inputs_embeds


class ToSTForCausalLM(ForCausalLM, ToSTTextPreTrainedModel, RecurrentGenerationMixin):
    """The ToST language model with its output projection."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: ToSTTextConfig):
        super().__init__(config)
        self.model = ToSTTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class ToSTTextForSequenceClassification(ForSequenceClassification, ToSTTextPreTrainedModel):
    """The ToST language model with a sequence classification or regression head on the last real token."""

    def __init__(self, config: ToSTTextConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ToSTTextModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def pooler(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        # `ToSTTextModel` repeats the last real token over the padding after it.
        return hidden_states[:, -1]


class ToSTTextForTokenClassification(ForTokenClassification, ToSTTextPreTrainedModel):
    """The ToST language model with a classification head on every token."""

    def __init__(self, config: ToSTTextConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ToSTTextModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "ToSTForCausalLM",
    "ToSTTextForSequenceClassification",
    "ToSTTextForTokenClassification",
    "ToSTTextModel",
    "ToSTTextPreTrainedModel",
]
