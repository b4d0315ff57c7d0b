"""Defaults for training these models with tools that do not know them."""

from typing import Any

import numpy as np
from torch import nn

from ..models.families import FAMILIES


def decay_parameter_names(model: nn.Module) -> list[str]:
    """
    The parameters that weight decay is for: embeddings and the weights of linear maps and convolutions.

    As in the original models, norms, biases, layer scales, temperatures, the membership's bias β and class tokens do not
    decay. `Trainer` alone leaves out only biases and layer norms, by their names: override its
    `get_decay_parameter_names` with this.

    Returns:
        `list[str]`: the names, as in `model.named_parameters()`.
    """
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    not_decayed = {"bias", *(family.not_decayed if family is not None else ())}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name.rpartition(".")[2] not in not_decayed
    ]


def feature_statistics(rows: Any) -> dict[str, list[float]]:
    """
    The means and deviations of training data, by which a [`SumAggMultimodalConfig`] standardises.

    Args:
        rows (`datasets.Dataset`, or a mapping of columns): with `numeric_features`, N numbers a row, NaN where one is not
            given, and `labels`, one or several a row.

    Returns:
        `dict[str, list[float]]`: `numeric_mean`, `numeric_std`, `label_mean` and `label_std`. The deviation of a feature
        that is constant up to rounding is 1.

    Raises:
        `ValueError`: no row gives a feature or a label.
    """
    values: dict[str, list[float]] = {}
    for name, column in (("numeric", "numeric_features"), ("label", "labels")):
        numbers = np.array(rows[column], dtype=float)
        numbers = numbers.reshape(len(numbers), -1)
        absent = np.flatnonzero(np.isnan(numbers).all(axis=0)).tolist()
        if absent:
            raise ValueError(f"No row gives entry {absent[0]} of `{column}`: leave it out.")
        lowest = np.nanmin(numbers, axis=0)
        # Sums from the lowest value: the sum of a constant is exactly zero, and large numbers lose no digits.
        above = numbers - lowest
        mean, std = lowest + np.nanmean(above, axis=0), np.nanstd(above, axis=0)
        rounding = np.finfo(float).eps * np.nanmax(np.abs(numbers), axis=0)
        values |= {f"{name}_mean": mean.tolist(), f"{name}_std": np.where(std > rounding, std, 1).tolist()}
    return values
