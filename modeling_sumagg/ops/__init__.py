"""The operators: pure functions of tensors."""

from .sliding_attention import sliding_window_attention
from .summation import bidirectional_sum, causal_sum, causal_sum_reference, document_runs
from .token_statistics import (
    TokenStatisticsState,
    causal_token_membership,
    causal_token_statistics,
    causal_token_statistics_reference,
    token_membership,
    token_statistics,
    token_statistics_reference,
)


__all__ = [
    "TokenStatisticsState",
    "bidirectional_sum",
    "causal_sum",
    "causal_sum_reference",
    "causal_token_membership",
    "causal_token_statistics",
    "causal_token_statistics_reference",
    "document_runs",
    "sliding_window_attention",
    "token_membership",
    "token_statistics",
    "token_statistics_reference",
]
