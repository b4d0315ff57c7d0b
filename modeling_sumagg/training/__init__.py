"""Training: arguments and loading for scripts, trainer classes, collators, plots, baselines and data."""

from .defaults import decay_parameter_names, feature_statistics


__all__ = ["decay_parameter_names", "feature_statistics"]
