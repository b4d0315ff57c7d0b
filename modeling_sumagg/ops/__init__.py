"""The operators: pure functions of tensors."""

import os

from .causal_convolution import causal_convolution
from .documents import document_runs
from .kernel_operators import set_kernels
from .keyed_sum.keyed_sum import causal_keyed_sum
from .keyed_sum.keyed_sum_reference import causal_keyed_sum_reference
from .sliding_attention import sliding_window_attention
from .stacked_frames import stack_frames
from .summation import bidirectional_mean, bidirectional_sum, causal_mean, causal_sum
from .summation_reference import causal_sum_reference
from .token_statistics.formula import TokenStatisticsState
from .token_statistics.operators import (
    causal_token_membership,
    causal_token_statistics,
    causal_token_statistics_reference,
    token_membership,
    token_statistics,
    token_statistics_reference,
)


__all__ = [
    "TokenStatisticsState",
    "bidirectional_mean",
    "bidirectional_sum",
    "causal_convolution",
    "causal_keyed_sum",
    "causal_keyed_sum_reference",
    "causal_mean",
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

set_kernels(os.environ.get("MODELING_SUMAGG_KERNELS", "auto"))
