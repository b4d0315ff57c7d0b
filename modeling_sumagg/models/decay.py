"""The decays of running sums: learned for each head, or by each token."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers import initialization as init

from ..ops.precision import sum_dtype, without_autocast


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """The part of a bare parameter that this process holds: tensor parallelism shards it, and no module takes the part."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


class SumDecay(nn.Module):
    """
    The decay of each head, `a = sigmoid(l)`, or of each head and token, `a_t = sigmoid(W h_t + l)`, as its logarithm.

    At the start `W` is zero, and `a = exp(-1 / τ)` with time constants `τ` from `config.sum_decay_min` to
    `config.sum_decay_max` tokens, in equal ratios.

    Args:
        config (`PreTrainedConfig`): with `sum_decay` `"learned"` or `"input"`, its bounds, and `hidden_size`.
        num_heads (`int`): K.
    """

    # Neither rounded to float16 nor quantized: a decay near 1 is told from 1 by its last digits.
    keep_in_float32 = True

    def __init__(self, config: PreTrainedConfig, num_heads: int):
        super().__init__()
        self.bounds = config.sum_decay_min, config.sum_decay_max
        self.proj = nn.Linear(config.hidden_size, num_heads, bias=False) if config.sum_decay == "input" else None
        self.logit = nn.Parameter(torch.empty(num_heads))

    def forward(self, hidden_states: torch.Tensor, weight: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` `[B, T, d]` to `log a` and, if wanted, `1 - a`, float32 at least, `[B or 1, T, K]`."""
        dtype = sum_dtype(hidden_states)
        logit = own_part(self.logit)
        if self.proj is None:
            logits = logit.to(dtype).expand(1, hidden_states.shape[1], -1)
        else:
            # In the dtype of the decays: float32 in a model that was loaded in float16, and under autocast.
            with without_autocast(hidden_states):
                logits = self.proj(hidden_states.to(logit.dtype)).to(dtype) + logit.to(dtype)
        return F.logsigmoid(logits), (-logits).sigmoid() if weight else None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.proj is not None:
            init.zeros_(self.proj.weight)
        shortest, longest = (torch.tensor(bound, dtype=torch.float64).log() for bound in self.bounds)
        steps = torch.linspace(0, 1, self.logit.shape[0], dtype=torch.float64)
        rates = (-(shortest + steps * (longest - shortest))).exp()
        init.copy_(self.logit, -rates.expm1().log())
