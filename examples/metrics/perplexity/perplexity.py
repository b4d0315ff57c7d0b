"""Perplexity from the likelihood of each token, as a local metric of `evaluate`: loading it needs no network."""

import math

import datasets
import evaluate
import numpy as np


class Perplexity(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions: the negative log-likelihood of each token, in nats. references: the tokens.",
            features=datasets.Features(
                {"predictions": datasets.Value("float32"), "references": datasets.Value("int32")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[int]) -> dict[str, float]:
        return {"perplexity": math.exp(np.mean(predictions, dtype=np.float64))}
