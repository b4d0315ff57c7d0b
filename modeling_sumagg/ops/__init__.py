"""The operators: pure functions of tensors."""

from .causal_convolution.causal_convolution import causal_convolution
from .causal_convolution.causal_convolution_reference import causal_convolution_reference
from .document_runs import document_runs
from .documents import Documents
from .kernel_modes import set_kernels
from .keyed_sum.keyed_sum import bidirectional_keyed_sum, causal_keyed_sum
from .keyed_sum.keyed_sum_reference import causal_keyed_sum_reference
from .running_sum.running_sum import bidirectional_sum, causal_sum
from .running_sum.running_sum_reference import causal_sum_reference
from .sliding_attention import sliding_window_attention
from .stacked_frames import stack_frames
from .token_statistics.token_statistics import (
    causal_token_membership,
    causal_token_statistics,
    causal_token_statistics_reference,
    token_membership,
    token_statistics,
    token_statistics_reference,
)
from .token_statistics.token_statistics_reference import TokenStatisticsState
from .weighted_mean.weighted_mean import bidirectional_mean, causal_mean
from .weighted_mean.weighted_mean_reference import causal_mean_reference


__all__ = [
    "Documents",
    "TokenStatisticsState",
    "bidirectional_keyed_sum",
    "bidirectional_mean",
    "bidirectional_sum",
    "causal_convolution",
    "causal_convolution_reference",
    "causal_keyed_sum",
    "causal_keyed_sum_reference",
    "causal_mean",
    "causal_mean_reference",
    "causal_sum",
    "causal_sum_reference",
    "causal_token_membership",
    "causal_token_statistics",
    "causal_token_statistics_reference",
    "document_runs",
    "set_kernels",
    "sliding_window_attention",
    "stack_frames",
    "token_membership",
    "token_statistics",
    "token_statistics_reference",
]
