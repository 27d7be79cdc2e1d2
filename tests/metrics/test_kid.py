"""The kernel distance against its definition, and what it must not do (Binkowski et al. 2018)."""

import json
from pathlib import Path

import pytest
import torch

from nanodiff.errors import UserError
from nanodiff.metrics.kid import kernel, kernel_distance, mmd2

CASES = json.loads((Path(__file__).parents[1] / "golden" / "kid.json").read_text())


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_both_estimates_equal_exact_sums_over_pairs(case):
    x, y = torch.tensor(case["x"], dtype=torch.float64), torch.tensor(case["y"], dtype=torch.float64)
    assert mmd2(x, y) == pytest.approx(case["unbiased"], rel=1e-12, abs=1e-13)
    assert mmd2(x, y, unbiased=False) == pytest.approx(case["biased"], rel=1e-12, abs=1e-13)
    assert mmd2(x, x) == pytest.approx(case["itself"], rel=1e-12)
    assert mmd2(y, x) == pytest.approx(mmd2(x, y), rel=1e-12)


def test_the_kernel_is_a_cube_and_does_not_grow_with_the_number_of_features():
    x, y = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([[-1.0]], dtype=torch.float64)
    assert kernel(x, y).item() == (2 * -1 + 1) ** 3 and kernel(x, x).item() == 125
    for d in (1, 7, 2048):
        one = torch.ones(1, d, dtype=torch.float64)
        assert kernel(one, one).item() == pytest.approx(8)


def test_sets_of_one_distribution_are_at_0_on_average_and_below_it_half_of_the_time():
    estimates = torch.tensor([mmd2(normal(40, 3, 2 * seed), normal(40, 3, 2 * seed + 1)) for seed in range(200)])
    assert estimates.mean().abs() < 4 * estimates.std() / 200**0.5
    assert 60 < int((estimates < 0).sum()) < 160  # not clamped to 0
    assert all(mmd2(normal(40, 3, seed), normal(40, 3, seed + 500), unbiased=False) > 0 for seed in range(5))


def test_the_expectation_does_not_depend_on_n():
    # (x y + 1)^3 = sum_p binom(3, p) x^p y^p compares moments: 0, 1, 0 of N(0, 1) and 1, 2, 4 of N(1, 1) give
    # 3 (0 - 1)^2 + 3 (1 - 2)^2 + (0 - 4)^2 = 22
    for n in (10, 80):
        estimates = torch.tensor([mmd2(normal(n, 1, 2 * seed), normal(n, 1, 2 * seed + 1) + 1) for seed in range(400)])
        assert abs(float(estimates.mean()) - 22) < 4 * float(estimates.std()) / 20


def test_subsets_are_at_most_as_large_as_the_sets_and_all_numbers_are_told():
    x, y = normal(30, 4), normal(20, 4, 1) + 0.5
    distance = kernel_distance(x, y, subsets=50, size=1000)
    assert (distance["size"], distance["subsets"], distance["n"], distance["m"]) == (20, 50, 30, 20)
    assert distance["kid_deviation"] > 0
    exact = kernel_distance(x, x + 1, size=30)
    assert exact["subsets"] == 1 and exact["kid"] == pytest.approx(mmd2(x, x + 1)) and exact["kid_deviation"] == 0


def test_the_mean_over_subsets_is_near_the_whole_and_repeats_with_its_seed():
    x, y = normal(200, 4), normal(200, 4, 1) + 0.5
    distance = kernel_distance(x, y, subsets=200, size=50)
    assert abs(distance["kid"] - mmd2(x, y)) < 4 * distance["kid_deviation"] / 200**0.5
    assert distance == kernel_distance(x, y, subsets=200, size=50)
    assert distance != kernel_distance(x, y, subsets=200, size=50, seed=1)


@pytest.mark.parametrize("change, words", [
    (lambda x: x[:, :3], "5 and 3 dimensions"), (lambda x: x[:1], "at least 2 rows"),
    (lambda x: x * float("nan"), "not finite"), (lambda x: x[0], "the shape is")])
def test_features_that_cannot_be_compared_are_refused(change, words):
    x = normal(6, 5)
    with pytest.raises(UserError, match=words):
        mmd2(x, change(x))
    for wrong in ({"subsets": 0}, {"size": 1}):
        with pytest.raises(UserError, match="subsets of"):
            kernel_distance(x, x, **wrong)
