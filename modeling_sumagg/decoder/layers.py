"""The block of a decoder: a mixer and a feed-forward layer, beside a residual stream."""

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention import Attention, RMSNorm
from .layout import SequenceLayout


def make_norm(config: PreTrainedConfig) -> nn.Module:
    """The norm of `config.norm_type`, by default a layer norm, over the channels of a token."""
    norm_class = RMSNorm if getattr(config, "norm_type", "layer") == "rms" else nn.LayerNorm
    return norm_class(config.hidden_size, eps=config.layer_norm_eps)


class MLP(nn.Module):
    """Feed-forward layer, `W_b act(W_a h + a) + b`; a gated one is `W_b (act(W_g h + g) * (W_a h + a)) + b`."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        sizes, bias = (config.hidden_size, config.intermediate_size), getattr(config, "mlp_bias", True)
        self.gate_proj = nn.Linear(*sizes, bias=bias) if config.mlp_gate else None
        self.up_proj = nn.Linear(*sizes, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.down_proj = nn.Linear(*sizes[::-1], bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class DecoderLayer(GradientCheckpointingLayer):
    """
    One block: `h = h + mixer(LN(h))`, `h = h + mlp(LN(h))`; or, post-norm, `h = LN(h + mixer(h))`, `h = LN(h + mlp(h))`.

    A family derives its own, with its mixer as `mixer_class`. Where `config.layer_types` names one of the family's
    recurrent types, the block mixes by `mixer_class(config, layer_idx)`, elsewhere it attends. A mixer is called as
    `mixer(hidden_states, layout, cache=cache, **kwargs)` and returns its output `[B, T, d]`, and what the model is to
    return among its `attentions`, or `None`.
    """

    mixer_class: type[nn.Module]

    def __init__(self, config: PreTrainedConfig, layer_idx: int, *, norm_first: bool = True):
        super().__init__()
        self.norm_first = norm_first
        if config.layer_types[layer_idx] in config.recurrent_layer_types:
            self.mixer = self.mixer_class(config, layer_idx)
        else:
            bias = getattr(config, "attention_bias", True)
            self.mixer = Attention(config, layer_idx, bias=bias, output_name="out_proj")
        self.mlp = MLP(config)
        self.mixer_norm, self.mlp_norm = make_norm(config), make_norm(config)
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
