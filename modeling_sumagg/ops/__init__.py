"""The operators: pure functions of tensors."""

from .summation import bidirectional_sum, causal_sum, causal_sum_reference, document_runs


__all__ = ["bidirectional_sum", "causal_sum", "causal_sum_reference", "document_runs"]
