"""A family that somebody wrote with this package, in a module of their own."""

import torch
from gates import gate
from torch import nn

import modeling_sumagg
from modeling_sumagg import SumAggConfig, SumAggForCausalLM
from modeling_sumagg.ops.running_sum.running_sum import causal_sum


class GatedSumConfig(SumAggConfig):
    model_type = "gated_sum"


class GatedSumForCausalLM(SumAggForCausalLM):
    """The language model with a gate on each layer's output."""

    config: GatedSumConfig

    def __init__(self, config: GatedSumConfig):
        super().__init__(config)
        self.gate_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.model.norm.register_forward_hook(lambda module, args, output: output + gate(self.gate_proj(output)))
        self.post_init()


class GatedSumModel(SumAggForCausalLM):
    config: GatedSumConfig

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        return causal_sum(x)[0]


modeling_sumagg.register_family(
    GatedSumConfig,
    {"AutoModelForCausalLM": GatedSumForCausalLM, "AutoModel": GatedSumModel},
    lora_target_modules=("gate_proj",),
)
