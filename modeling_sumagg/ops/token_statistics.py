"""Token statistics, the linear-time operator of the Token Statistics Transformer (arXiv 2412.17810).

Letters as in the paper: w is the projected token, K the heads, p the channels of a head, Π (`membership`) the soft
assignment of every token to the heads, m (`moment`) the second moment of w in a head, weighted by Π.
"""

from typing import NamedTuple

import torch

MIN_SECOND_MOMENT = 1e-12  # floor of D in the causal operator, of the norm (not its square) in the bidirectional one
MIN_MEMBERSHIP = 1e-8


class TokenStatisticsState(NamedTuple):
    """The running sums of `causal_token_statistics` after a prefix of the sequence, float32 (float64 for float64 w).

    Attributes:
        second_moment: Σ w², [B, K, p].
        weighted_second_moment: Σ Π w², [B, K, p].
        membership: Σ Π, [B, K].
    """

    second_moment: torch.Tensor
    weighted_second_moment: torch.Tensor
    membership: torch.Tensor


def token_membership(
    w: torch.Tensor, temperature: torch.Tensor, *, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Π of `token_statistics`: the share of every token in every head.

        Π = softmax over heads of temp_k · Σ_c ŵ²[k, n, c],  ŵ = w / max(‖w‖₂ over the tokens, 1e-12)

    Args:
        w: [B, K, N, p], any float dtype.
        temperature: [K] or [K, 1], float.
        attention_mask: [B, N] bool or 0/1, True at real tokens.

    Returns:
        [B, K, N] in the statistics' dtype (float32; float64 for float64 w), zero at masked tokens.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    mask = _validate(w, temperature, attention_mask)
    return _membership(*_squares(w, temperature, mask), mask)


def causal_token_membership(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    *,
    initial_state: TokenStatisticsState | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Π of `causal_token_statistics`, which has the equation and the arguments.

    Returns:
        [B, K, T] in the statistics' dtype (float32; float64 for float64 w), zero at masked tokens.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    mask = _validate_causal(w, temperature, position_bias, initial_state, attention_mask, document_ids)
    w2, temperature = _squares(w, temperature, mask)
    second_moment = _running_sum(w2, initial_state and initial_state.second_moment, _segments(document_ids, mask))
    return _causal_membership(w2, second_moment, temperature, position_bias, mask)


def token_statistics_reference(
    w: torch.Tensor,
    temperature: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """`token_statistics` as the paper writes it; autograd keeps every intermediate."""
    mask = _validate(w, temperature, attention_mask, dropout_p)
    return _token_statistics(w, temperature, mask, _dropout(w, dropout_p, per_token=False))


def causal_token_statistics_reference(
    w: torch.Tensor,
    temperature: torch.Tensor,
    position_bias: torch.Tensor | None,
    *,
    initial_state: TokenStatisticsState | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, TokenStatisticsState]:
    """`causal_token_statistics` as the paper writes it; autograd keeps every intermediate.

    Documents cost a [T, T] mask here: a cumulative sum minus an offset would leave the rounding of earlier documents.
    """
    mask = _validate_causal(w, temperature, position_bias, initial_state, attention_mask, document_ids, dropout_p)
    segments = _segments(document_ids, mask)
    return _causal_token_statistics(
        w, temperature, position_bias, initial_state, mask, segments, _dropout(w, dropout_p, per_token=True)
    )


token_statistics = token_statistics_reference
causal_token_statistics = causal_token_statistics_reference


def _token_statistics(w, temperature, mask, keep):
    w2, temperature = _squares(w, temperature, mask)
    membership = _membership(w2, temperature, mask).unsqueeze(-1)
    moment = (membership * w2).sum(2, keepdim=True) / (membership.sum(2, keepdim=True) + MIN_MEMBERSHIP)
    return _output(w, mask, membership, moment, keep)


def _causal_token_statistics(w, temperature, position_bias, initial_state, mask, segments, keep):
    w2, temperature = _squares(w, temperature, mask)
    initial = initial_state or (None, None, None)
    second_moment = _running_sum(w2, initial[0], segments)
    membership = _causal_membership(w2, second_moment, temperature, position_bias, mask)
    weighted = _running_sum(membership.unsqueeze(-1) * w2, initial[1], segments)
    total = _running_sum(membership, initial[2], segments)
    moment = weighted / (total + MIN_MEMBERSHIP).unsqueeze(-1)
    out = _output(w, mask, membership.unsqueeze(-1), moment, keep)
    if w.shape[2] == 0:
        return out, initial_state or _empty_state(w)
    return out, TokenStatisticsState(second_moment[:, :, -1], weighted[:, :, -1], total[:, :, -1])


def _squares(w, temperature, mask):
    """w² (zero at masked tokens, whatever they hold) and the temperature as [K, 1], in the statistics' dtype."""
    dtype = _statistics_dtype(w)
    return _real_tokens(w, mask).to(dtype).square(), temperature.reshape(-1, 1).to(dtype)


def _membership(w2, temperature, mask):
    second_moment = w2.sum(2, keepdim=True).clamp_min(MIN_SECOND_MOMENT**2)
    return _softmax_over_heads(temperature * (w2 / second_moment).sum(-1), mask)


def _causal_membership(w2, second_moment, temperature, position_bias, mask):
    logits = (w2 / second_moment.clamp_min(MIN_SECOND_MOMENT)).sum(-1)
    if position_bias is not None:
        logits = logits + w2.shape[-1] * position_bias.to(w2.dtype)
    return _softmax_over_heads(temperature * logits, mask)


def _softmax_over_heads(logits, mask):
    if mask is None:
        return logits.softmax(1)
    mask = mask.unsqueeze(1)
    return logits.masked_fill(~mask, 0.0).softmax(1) * mask


def _output(w, mask, membership, moment, keep):
    suppression = 1 / (1 + moment)
    if keep is not None:
        suppression = suppression * keep
    return (-_real_tokens(w, mask).to(moment.dtype) * membership * suppression).to(w.dtype)


def _real_tokens(w, mask):
    return w if mask is None else w.masked_fill(~mask[:, None, :, None], 0.0)


def _running_sum(x, initial, segments):
    """Inclusive sums of x [B, K, T, ...] along T, restarted by segments; `initial` [B, K, ...] opens segment 0."""
    if segments is None:
        running = x.cumsum(2)
        return running if initial is None else running + initial.unsqueeze(2)
    same = (segments.unsqueeze(2) == segments.unsqueeze(1)).tril()
    running = (same.unsqueeze(1).to(x.dtype) @ x.reshape(*x.shape[:3], -1)).reshape(x.shape)
    if initial is None:
        return running
    first = (segments == 0).reshape(segments.shape[0], 1, -1, *[1] * (x.ndim - 3))
    return running + first * initial.unsqueeze(2)


def _segments(document_ids, mask):
    """Number of restarts up to each token [B, T]; a masked token is in the segment of the real token before it."""
    if document_ids is None:
        return None
    if document_ids.shape[1] == 0:
        return document_ids
    position = torch.arange(document_ids.shape[1], device=document_ids.device)
    last_real = position.expand_as(document_ids)
    if mask is not None:
        # Masked tokens before the first real one take its id: nothing restarts there.
        last_real = torch.where(mask, position, -1).cummax(1).values
        first_real = mask.to(torch.int64).argmax(1, keepdim=True)
        last_real = torch.where(last_real < 0, first_real, last_real)
    ids = document_ids.gather(1, last_real)
    restarts = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0))
    return restarts.cumsum(1)


def _dropout(w, dropout_p, per_token):
    """Scaled keep mask for the entries of 1/(1+m), or None without dropout."""
    if dropout_p == 0.0:
        return None
    shape = (w.shape[0], w.shape[1], w.shape[2] if per_token else 1, w.shape[3])
    keep = torch.empty(shape, dtype=torch.bool, device=w.device).bernoulli_(1 - dropout_p)
    return keep.to(_statistics_dtype(w)) / (1 - dropout_p)


def _statistics_dtype(w):
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def _empty_state(w):
    second_moment = w.new_zeros(w.shape[0], w.shape[1], w.shape[3], dtype=_statistics_dtype(w))
    return TokenStatisticsState(second_moment, second_moment.clone(), second_moment[..., 0].clone())


def _validate(w, temperature, attention_mask, dropout_p=0.0):
    """Checks the arguments both operators share; returns the mask as bool."""
    if w.ndim != 4 or not w.is_floating_point():
        raise ValueError(f"w must be a float tensor [batch, heads, tokens, channels], got {w.dtype} {tuple(w.shape)}.")
    batch, heads, length, _ = w.shape
    if temperature.shape not in ((heads,), (heads, 1)) or not temperature.is_floating_point():
        raise ValueError(
            f"temperature must be a float tensor [{heads}] or [{heads}, 1], one value for each head of w, "
            f"got {temperature.dtype} {tuple(temperature.shape)}."
        )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}.")
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask must be [batch, tokens] = [{batch}, {length}] as w, got {tuple(attention_mask.shape)}."
        )
    return attention_mask.bool()


def _validate_causal(w, temperature, position_bias, initial_state, attention_mask, document_ids, dropout_p=0.0):
    mask = _validate(w, temperature, attention_mask, dropout_p)
    batch, heads, length, channels = w.shape
    if position_bias is not None and (
        position_bias.shape not in ((heads, length), (batch, heads, length)) or not position_bias.is_floating_point()
    ):
        raise ValueError(
            f"position_bias must be None or a float tensor [{heads}, {length}] or [{batch}, {heads}, {length}], the "
            f"bias of each token of w in each head, got {position_bias.dtype} {tuple(position_bias.shape)}."
        )
    if document_ids is not None and (document_ids.shape != (batch, length) or document_ids.is_floating_point()):
        raise ValueError(
            f"document_ids must be integers [batch, tokens] = [{batch}, {length}] as w, "
            f"got {document_ids.dtype} {tuple(document_ids.shape)}."
        )
    if initial_state is not None:
        shapes = ((batch, heads, channels), (batch, heads, channels), (batch, heads))
        for name, tensor, shape in zip(TokenStatisticsState._fields, initial_state, shapes, strict=True):
            if tensor.shape != shape or tensor.dtype != _statistics_dtype(w):
                raise ValueError(
                    f"initial_state.{name} must be {_statistics_dtype(w)} {shape}, "
                    f"got {tensor.dtype} {tuple(tensor.shape)}."
                )
    return mask
