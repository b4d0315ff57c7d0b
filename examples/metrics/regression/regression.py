"""R², the share of the variance that predictions explain, and their root mean squared error, as a local metric of
`evaluate`: loading it needs no network."""

import datasets
import evaluate
from sklearn.metrics import r2_score, root_mean_squared_error


class Regression(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: numbers of the same length.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {
            "r2": float(r2_score(references, predictions)),
            "rmse": float(root_mean_squared_error(references, predictions)),
        }
