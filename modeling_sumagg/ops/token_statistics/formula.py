"""The paper's formula of token statistics in plain tensor operations, to be read beside it.

Source: Z. Wu et al., "Token Statistics Transformer: Linear-Time Attention via Variational Rate Reduction", ICLR 2025,
arXiv 2412.17810. Letters as in the paper: w is the projected token, K the heads, p the channels of a head, Π
(`membership`) the soft assignment of every token to the heads, m (`moment`) the second moment of w weighted by Π.
"""

from typing import NamedTuple

import torch


MIN_SECOND_MOMENT = 1e-12  # floor of D in the causal operator, of the norm (not its square) in the bidirectional one
MIN_MEMBERSHIP = 1e-8


class TokenStatisticsState(NamedTuple):
    """
    The running sums of [`causal_token_statistics`] after some tokens, in float32 (float64 for float64 w).

    Attributes:
        second_moment (`torch.Tensor` of shape `[B, K, p]`): Σ w².
        weighted_second_moment (`torch.Tensor` of shape `[B, K, p]`): Σ Π w².
        membership (`torch.Tensor` of shape `[B, K]`): Σ Π.
    """

    second_moment: torch.Tensor
    weighted_second_moment: torch.Tensor
    membership: torch.Tensor


def bidirectional_formula(w, temperature, mask, keep, dropout_p):
    w = real_tokens(w, mask)
    w2, temperature = squares(w, temperature)
    membership = bidirectional_membership(w2, temperature, mask).unsqueeze(-1)
    moment = (membership * w2).sum(2, keepdim=True) / (membership.sum(2, keepdim=True) + MIN_MEMBERSHIP)
    return _output(w, mask, membership, moment, keep, dropout_p)


def causal_formula(w, temperature, position_bias, initial_state, mask, runs, keep, dropout_p):
    w = real_tokens(w, mask)
    w2, temperature = squares(w, temperature)
    initial = (None, None, None) if initial_state is None else initial_state
    second_moment = cumulative_sums(w2, initial[0], runs)
    membership = causal_membership(w2, second_moment, temperature, position_bias, mask)
    weighted = cumulative_sums(membership.unsqueeze(-1) * w2, initial[1], runs)
    total = cumulative_sums(membership, initial[2], runs)
    moment = weighted / (total + MIN_MEMBERSHIP).unsqueeze(-1)
    out = _output(w, mask, membership.unsqueeze(-1), moment, keep, dropout_p)
    if w.shape[2] > 0:
        # A slice would keep the sums up to every token alive for as long as the state.
        return out, TokenStatisticsState(*(sums[:, :, -1].clone() for sums in (second_moment, weighted, total)))
    if initial_state is None:
        initial_state = TokenStatisticsState(w2.sum(2), w2.sum(2), w2.sum((2, 3)))
    return out, initial_state


def causal_step(w, temperature, position_bias, initial_state, mask, keep, dropout_p):
    """[`causal_formula`] for one token, in as few operations as there can be: launching them is what a step costs."""
    w = real_tokens(w, mask)
    token = w.to(statistics_dtype(w)).squeeze(2)
    w2 = token.square()
    second_moment = w2 if initial_state is None else initial_state[0] + w2
    score = (w2 / second_moment.clamp_min(MIN_SECOND_MOMENT)).sum(-1)
    if position_bias is not None:
        bias = real_tokens(position_bias.to(w2.dtype), mask).squeeze(-1)
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


def squares(w, temperature):
    """w² and the temperature as `[K, 1]`, in the dtype of the statistics."""
    dtype = statistics_dtype(w)
    return w.to(dtype).square(), temperature.reshape(-1, 1).to(dtype)


def bidirectional_membership(w2, temperature, mask):
    second_moment = w2.sum(2, keepdim=True).clamp_min(MIN_SECOND_MOMENT**2)
    return _softmax_over_heads(temperature * (w2 / second_moment).sum(-1), mask)


def causal_membership(w2, second_moment, temperature, position_bias, mask):
    score = (w2 / second_moment.clamp_min(MIN_SECOND_MOMENT)).sum(-1)
    if position_bias is not None:
        score = score + w2.shape[-1] * real_tokens(position_bias.to(w2.dtype), mask)
    return _softmax_over_heads(temperature * score, mask)


def _softmax_over_heads(logits, mask):
    membership = logits.softmax(1)
    return membership if mask is None else membership * mask.unsqueeze(1)


def _output(w, mask, membership, moment, keep, dropout_p):
    out = w.to(moment.dtype) * membership / (-1 - moment)
    if keep is not None:
        out = out * keep.transpose(1, 2) / (1 - dropout_p)
    # Zero already where masked, but not so its gradient.
    return real_tokens(out.to(w.dtype), mask)


def real_tokens(x, mask):
    """`x` `[B, K, N, p]` or `[..., K, N]`, zero where masked."""
    if mask is None:
        return x
    masked = ~mask.unsqueeze(1)
    return x.masked_fill(masked.unsqueeze(-1) if x.ndim == 4 else masked, 0.0)


def cumulative_sums(x, initial, runs):
    """The sums of `x` `[B, K, T, ...]` up to each token of its run; `initial` `[B, K, ...]` is in the sums of run 0."""
    if runs is None:
        running = x.cumsum(2)
        return running if initial is None else running + initial.unsqueeze(2)
    # One cumulative sum less its value at the restart would leave the rounding of earlier documents behind.
    same_run = (runs.unsqueeze(2) == runs.unsqueeze(1)).tril().unsqueeze(1).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        running = (same_run @ (x if x.ndim == 4 else x.unsqueeze(3))).reshape(x.shape)
    if initial is None:
        return running
    first_run = (runs == 0).reshape(x.shape[0], 1, x.shape[2], *[1] * (x.ndim - 3))
    return running + first_run * initial.unsqueeze(2)


def statistics_dtype(w):
    return torch.promote_types(w.dtype, torch.float32)
