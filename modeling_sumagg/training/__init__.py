"""Training: arguments and loading for scripts, trainer classes, collators, plots, baselines and data."""

from .chunks import ChunkedEvaluation, backward_in_chunks, evaluate_in_chunks
from .defaults import decay_parameter_names, feature_statistics


__all__ = [
    "ChunkedEvaluation",
    "backward_in_chunks",
    "decay_parameter_names",
    "evaluate_in_chunks",
    "feature_statistics",
]
