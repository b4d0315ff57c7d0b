"""The statistics by which a multimodal model standardises."""

from statistics import fmean, pstdev

import numpy as np
import pytest

from modeling_sumagg.training import feature_statistics


@pytest.mark.parametrize("offset", [0.0, 0.1, 1_700_000_000.0, -1e12])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e5])
def test_means_and_deviations_are_those_of_exact_arithmetic(offset, scale):
    values = (np.random.default_rng(0).normal(size=200) * scale + offset).tolist()
    rows = {"numeric_features": [[value, float(index)] for index, value in enumerate(values)], "labels": values}
    statistics = feature_statistics(rows)
    assert statistics["numeric_mean"] == pytest.approx([fmean(values), 99.5], rel=1e-14, abs=1e-14 * scale)
    # The values themselves are rounded: their deviation is no more exact than that.
    precision = max(1e-9, 4 * np.finfo(float).eps * abs(offset) / scale)
    assert statistics["numeric_std"] == pytest.approx([pstdev(values), pstdev(range(200))], rel=precision)
    assert statistics["label_mean"] == pytest.approx([fmean(values)], rel=1e-14, abs=1e-14 * scale)
    assert statistics["label_std"] == pytest.approx([pstdev(values)], rel=precision)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, -7e20, 1_700_000_000.7])
@pytest.mark.parametrize("count", [1, 3, 100, 10_000])
def test_a_constant_has_a_deviation_of_1(constant, count):
    statistics = feature_statistics(
        {"numeric_features": [[constant, 1.0 + (i > 0)] for i in range(count)], "labels": [0.0] * count}
    )
    assert statistics["numeric_std"][0] == statistics["label_std"][0] == 1
    assert statistics["numeric_mean"][0] == pytest.approx(constant, rel=1e-15)


def test_a_constant_up_to_rounding_is_constant():
    values = [0.1 + 0.2, 0.3, 0.3]
    assert len(set(values)) == 2
    assert feature_statistics({"numeric_features": [[value] for value in values], "labels": values})[
        "numeric_std"
    ] == [1.0]


def test_missing_numbers_are_left_out_and_a_feature_without_any_is_refused():
    rows = {"numeric_features": [[1.0, None], [None, 5.0], [3.0, float("nan")]], "labels": [1, 2, 3]}
    statistics = feature_statistics(rows)
    assert (statistics["numeric_mean"], statistics["numeric_std"]) == ([2.0, 5.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="No row gives entry 1 of `numeric_features`: leave it out"):
        feature_statistics({"numeric_features": [[1.0, None], [2.0, None]], "labels": [1, 2]})
