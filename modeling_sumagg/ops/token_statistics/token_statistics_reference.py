"""The paper's formula of token statistics in plain tensor operations, to be read beside it.

Source: Z. Wu et al., "Token Statistics Transformer: Linear-Time Attention via Variational Rate Reduction", ICLR 2025,
arXiv 2412.17810. Letters as in the paper: w is the projected token, K the heads, p the channels of a head, Π
(`membership`) the soft assignment of every token to the heads, m (`moment`) the second moment of w weighted by Π.

The arguments are those of `token_statistics`, with the mask `[B, T]` as bool or `None`, and `keep`, bool `[B, T or 1, K, p]` or
`None`: the entries of `1 / (1 + m)` that dropout keeps.
"""

from typing import NamedTuple

import torch

from ..documents import Documents
from ..precision import state_dtype, sum_dtype
from ..running_sum.running_sum_torch import scan


MIN_SECOND_MOMENT = 1e-12  # floor of D in the causal operator, of the norm (not its square) in the bidirectional one
MIN_MEMBERSHIP = 1e-8


class TokenStatisticsState(NamedTuple):
    """
    The running sums of [`causal_token_statistics`] after some tokens, in float64 (float32 on devices without float64).

    Attributes:
        second_moment (`torch.Tensor` of shape `[B, K, p]`): Σ w².
        weighted_second_moment (`torch.Tensor` of shape `[B, K, p]`): Σ Π w².
        membership (`torch.Tensor` of shape `[B, K]`): Σ Π.
    """

    second_moment: torch.Tensor
    weighted_second_moment: torch.Tensor
    membership: torch.Tensor


def bidirectional_formula(
    w: torch.Tensor,
    temperature: torch.Tensor,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    """The output `[B, K, N, p]` of [`token_statistics`]."""
    w = _real_tokens(w, mask)
    w2 = _squares(w)
    membership = _bidirectional_membership(w2, temperature, mask).unsqueeze(-1)
    moment = (membership * w2).sum(2, keepdim=True) / (membership.sum(2, keepdim=True) + MIN_MEMBERSHIP)
    return _output(w, mask, membership, moment, keep, dropout_p)


def bidirectional_membership(w: torch.Tensor, temperature: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Π `[B, K, N]` of [`token_statistics`]."""
    return _bidirectional_membership(_squares(_real_tokens(w, mask)), temperature, mask)


def causal_formula(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    initial_state: TokenStatisticsState | None,
    mask: torch.Tensor | None,
    log_decay: torch.Tensor | None,
    documents: Documents | None,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> tuple[torch.Tensor, TokenStatisticsState]:
    """The output `[B, K, T, p]` and the state of [`causal_token_statistics`]; `log_decay` `[B or 1, T, K]`."""
    w = _real_tokens(w, mask)
    w2 = _squares(w)
    initial = (None, None, None) if initial_state is None else initial_state
    second_moment, last_second = _cumulative_sums(w2, initial[0], log_decay, documents)
    membership = _causal_membership(w2, second_moment, temperature, position_bias, mask)
    weighted, last_weighted = _cumulative_sums(membership.unsqueeze(-1) * w2, initial[1], log_decay, documents)
    total, last_total = _cumulative_sums(membership, initial[2], log_decay, documents)
    moment = weighted / (total + MIN_MEMBERSHIP).unsqueeze(-1)
    out = _output(w, mask, membership.unsqueeze(-1), moment, keep, dropout_p)
    return out, TokenStatisticsState(last_second, last_weighted, last_total)


def causal_membership(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    initial_state: TokenStatisticsState | None,
    mask: torch.Tensor | None,
    log_decay: torch.Tensor | None,
    documents: Documents | None,
) -> torch.Tensor:
    """Π `[B, K, T]` of [`causal_token_statistics`]."""
    w2 = _squares(_real_tokens(w, mask))
    initial = None if initial_state is None else initial_state.second_moment
    second_moment, _ = _cumulative_sums(w2, initial, log_decay, documents)
    return _causal_membership(w2, second_moment, temperature, position_bias, mask)


def causal_step(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    initial_state: TokenStatisticsState | None,
    mask: torch.Tensor | None,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> tuple[torch.Tensor, TokenStatisticsState]:
    """
    [`causal_formula`] for one token, in as few operations as there can be: launching them is what a step costs. All of
    them are in the dtype of the state.
    """
    w = _real_tokens(w, mask)
    token = w.to(state_dtype(w)).squeeze(2)
    w2 = token.square()
    second_moment = w2 if initial_state is None else initial_state[0] + w2
    score = (w2 / second_moment.clamp_min(MIN_SECOND_MOMENT)).sum(-1)
    if position_bias is not None:
        bias = _real_tokens(position_bias.to(w2.dtype), mask).squeeze(-1)
        score = torch.add(score, bias, alpha=w2.shape[-1])
    membership = (temperature.flatten() * score).softmax(-1)
    if mask is not None:
        membership = membership * mask
    share = membership.unsqueeze(-1)
    weighted = share * w2 if initial_state is None else torch.addcmul(initial_state[1], share, w2)
    total = membership if initial_state is None else initial_state[2] + membership
    moment = weighted / (total + MIN_MEMBERSHIP).unsqueeze(-1)
    out = _output(w, mask, share.unsqueeze(2), moment.unsqueeze(2), keep, dropout_p)
    return out, TokenStatisticsState(second_moment, weighted, total)


def _squares(w: torch.Tensor) -> torch.Tensor:
    return w.to(sum_dtype(w)).square()


def _bidirectional_membership(w2: torch.Tensor, temperature: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    second_moment = w2.sum(2, keepdim=True).clamp_min(MIN_SECOND_MOMENT**2)
    return _softmax_over_heads((w2 / second_moment).sum(-1), temperature, mask)


def _causal_membership(
    w2: torch.Tensor,
    second_moment: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    score = (w2 / second_moment.clamp_min(MIN_SECOND_MOMENT)).sum(-1)
    if position_bias is not None:
        score = score + w2.shape[-1] * _real_tokens(position_bias.to(w2.dtype), mask)
    return _softmax_over_heads(score, temperature, mask)


def _softmax_over_heads(score: torch.Tensor, temperature: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    membership = (temperature.reshape(-1, 1).to(score.dtype) * score).softmax(1)
    return membership if mask is None else membership * mask.unsqueeze(1)


def _output(
    w: torch.Tensor,
    mask: torch.Tensor | None,
    membership: torch.Tensor,
    moment: torch.Tensor,
    keep: torch.Tensor | None,
    dropout_p: float,
) -> torch.Tensor:
    out = w.to(moment.dtype) * membership / (-1 - moment)
    if keep is not None:
        out = out * keep.transpose(1, 2) / (1 - dropout_p)
    # Zero already where masked, but not so its gradient.
    return _real_tokens(out.to(w.dtype), mask)


def _real_tokens(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`x` `[B, K, N, p]` or `[..., K, N]`, zero where masked."""
    if mask is None:
        return x
    masked = ~mask.unsqueeze(1)
    return x.masked_fill(masked.unsqueeze(-1) if x.ndim == 4 else masked, 0.0)


def _cumulative_sums(
    x: torch.Tensor, initial: torch.Tensor | None, log_decay: torch.Tensor | None, documents: Documents | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of `x` `[B, K, T, ...]` up to each token, from `initial` `[B, K, ...]`; and the last ones."""
    shape = x.shape[:2] + x.shape[3:]
    initial = x.new_zeros(shape, dtype=state_dtype(x)) if initial is None else initial.to(state_dtype(x))
    if x.shape[2] == 0:
        return x, initial
    if log_decay is None and documents is None:
        running = x.cumsum(2)
        # A slice would keep the sums of the whole segment alive for as long as the state.
        return running + initial.unsqueeze(2).to(x.dtype), initial + running[:, :, -1]
    tokens = x.transpose(1, 2).flatten(2)
    running, last = scan(tokens, log_decay, initial.flatten(1), documents)
    return running.view(x.shape[0], x.shape[2], *shape[1:]).transpose(1, 2), last.view(initial.shape)
