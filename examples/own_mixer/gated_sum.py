"""A language model with its own mixer: a sum with one learned decay `a` for each head, and a gate on the output.

s_t = a s_{t-1} + (1 - a) z_t  with  z_t = W h_t,  output W_o (silu(W_g h_t) * s_t)
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from modeling_sumagg import register_family
from modeling_sumagg.configuration import TextConfig
from modeling_sumagg.decoder import (
    DecoderLayer,
    DecoderModel,
    DecoderPreTrainedModel,
    ForCausalLM,
    ForSequenceClassification,
    recur,
)


class GatedSumConfig(TextConfig):
    model_type = "gated_sum"
    recurrent_layer_types = ("gated_sum",)


def decayed_sum(z, *, initial_state, attention_mask, document_ids, decay_logit):
    """`z` `[B, T, K, p]` to the decayed sums after each token, of the same shape, and the last sum `[B, K, p]`."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    decays = decay_logit.to(dtype).sigmoid()[:, None].expand(*z.shape[:3], 1)
    sums = (1 - decays) * z
    if attention_mask is not None:
        padding = ~attention_mask[:, :, None, None]
        decays, sums = decays.masked_fill(padding, 1), sums.masked_fill(padding, 0)
    if document_ids is not None:
        begins = document_ids.diff(dim=1, prepend=document_ids[:, :1]) != 0
        decays = decays.masked_fill(begins[:, :, None, None], 0)
    # Each pass doubles the number of tokens in every sum. It never divides by a decay.
    reach = 1
    while reach < z.shape[1]:
        sums = sums + decays * F.pad(sums[:, :-reach], (0, 0, 0, 0, reach, 0))
        decays = decays * F.pad(decays[:, :-reach], (0, 0, 0, 0, reach, 0), value=1)
        reach *= 2
    if initial_state is not None:
        sums = sums + decays * initial_state[:, None]
    # A copy, because a slice would keep the sums of all tokens in memory.
    return sums.to(z.dtype), sums[:, -1].clone()


class GatedSum(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.in_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.decay_logit = nn.Parameter(torch.empty(config.num_attention_heads))
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states, layout, cache=None, **kwargs):
        z = self.in_proj(hidden_states).unflatten(-1, (self.num_heads, -1))
        sums = recur(decayed_sum, z, layout, cache, self.layer_idx, decay_logit=self.decay_logit)
        return self.out_proj(F.silu(self.gate_proj(hidden_states)) * sums.flatten(-2)), None


class GatedSumDecoderLayer(DecoderLayer):
    mixer_class = GatedSum


class GatedSumPreTrainedModel(DecoderPreTrainedModel):
    config: GatedSumConfig
    layer_class = GatedSumDecoderLayer

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, GatedSum):
            # Half lives from 1 to 280 tokens.
            init.copy_(module.decay_logit, torch.linspace(0, 6, module.num_heads))


class GatedSumModel(GatedSumPreTrainedModel, DecoderModel):
    """Embeddings, blocks, a norm."""


class GatedSumForCausalLM(GatedSumPreTrainedModel, ForCausalLM):
    model_class = GatedSumModel


class GatedSumForSequenceClassification(GatedSumPreTrainedModel, ForSequenceClassification):
    model_class = GatedSumModel


register_family(
    GatedSumConfig,
    {
        "AutoModel": GatedSumModel,
        "AutoModelForCausalLM": GatedSumForCausalLM,
        "AutoModelForSequenceClassification": GatedSumForSequenceClassification,
    },
    lora_target_modules=("in_proj", "gate_proj", "q_proj", "v_proj"),
)
