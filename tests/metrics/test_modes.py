"""Mode coverage and the distance between samples: closed forms, and what collapse does to them."""

import math

import pytest
import torch

from nanodiff.errors import UserError
from nanodiff.metrics.modes import diversity, mean_distance, modes_covered
from nanodiff.worlds import mixtures

POSITION = torch.arange(2500)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_mean_distance_counts_each_pair_once_and_no_sample_with_itself():
    x = torch.tensor([[0.0, 0], [3, 4], [0, 0]])
    assert mean_distance(x) == pytest.approx((5 + 0 + 5) / 3)
    assert mean_distance(x.view(3, 1, 1, 2)) == mean_distance(x)


@pytest.mark.parametrize("d", [1, 2, 30])
def test_normal_samples_are_as_far_apart_as_the_chi_distribution_says(d):
    expected = 2 * math.gamma((d + 1) / 2) / math.gamma(d / 2)  # sqrt(2) times the mean of chi with d degrees
    assert mean_distance(normal(1000, d)) == pytest.approx(expected, rel=0.05)


def test_a_collapsed_generator_has_no_diversity_and_the_data_has_one():
    real = normal(300, 10)
    assert diversity(real[:1].expand(300, 10), real) == 0
    assert diversity(real[:2].repeat(150, 1), real) < 0.75
    assert diversity(normal(300, 10, 1), real) == pytest.approx(1, rel=0.05)
    assert diversity(0.25 * real, real) == pytest.approx(0.25)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(UserError, match="at least 2 of them, not 1"):
        mean_distance(torch.zeros(1, 5))
    with pytest.raises(UserError, match="all the same"):
        diversity(normal(3, 2), torch.zeros(3, 2))


def test_a_sample_counts_within_three_deviations_of_the_nearest_mode():
    means = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    x = torch.tensor([[0.0, 0.29], [0, 0.31], [0.7, 0], [0.72, 0], [0.9, 0.1], [5, 5]])
    coverage = modes_covered(x, means, 0.1)
    assert coverage["counts"] == [1, 2, 0] and coverage["covered"] == 2 and coverage["modes"] == 3
    assert coverage["quality"] == 0.5 and coverage["n"] == 6


@pytest.mark.parametrize("name, modes", [("ring", 8), ("grid", 25)])
def test_the_mixture_itself_covers_all_modes_with_the_share_that_a_gaussian_has_within_three_deviations(name, modes):
    mixture = mixtures.load(name)
    coverage = modes_covered(mixture.points(0, 0, POSITION), mixture.means, mixture.deviation)
    assert coverage["covered"] == coverage["modes"] == modes
    assert coverage["quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.008)
    assert max(coverage["counts"]) < 1.6 * min(coverage["counts"])


def test_one_mode_alone_and_a_blur_over_all_are_told_apart():
    mixture = mixtures.load("grid")
    one_mode = mixture.means[7] + mixture.deviation * normal(2500, 2)
    coverage = modes_covered(one_mode, mixture.means, mixture.deviation)
    assert coverage["covered"] == 1 and coverage["quality"] > 0.97
    blur = 9 * torch.rand(2500, 2, generator=torch.Generator().manual_seed(0)) - 4.5
    coverage = modes_covered(blur, mixture.means, mixture.deviation)
    assert coverage["covered"] > 15 and coverage["quality"] < 0.05  # so coverage is never told without the share


# --- the mixtures ----------------------------------------------------------------------------------------------------

def test_points_follow_from_seed_step_and_position_alone():
    mixture = mixtures.load("grid")
    points = mixture.points(3, 5, POSITION)
    assert torch.equal(mixture.points(3, 5, POSITION[100:140]), points[100:140])
    for seed, step in ((4, 5), (3, 6)):
        assert not (mixture.points(seed, step, POSITION) == points).all(1).any()
    x, index, position = mixtures.Points(mixture, 40, 3).get(5)
    assert torch.equal(x, points[:40]) and torch.equal(position, torch.arange(40)) and torch.equal(index, position)


@pytest.mark.parametrize("name, spacing, deviation", [("ring", 2 * math.sin(math.pi / 8), 0.01), ("grid", 2.0, 0.05)])
def test_modes_stand_as_the_papers_have_them(name, spacing, deviation):
    mixture = mixtures.load(name)
    apart = torch.cdist(mixture.means, mixture.means) + 100 * torch.eye(len(mixture.means))
    torch.testing.assert_close(apart.amin(1), torch.full((len(mixture.means),), spacing), rtol=1e-4, atol=0)
    x = mixture.points(0, 1, torch.arange(20_000))
    rest = x - mixture.means[torch.cdist(x, mixture.means).argmin(1)]
    assert rest.std().item() == pytest.approx(deviation, rel=0.02) and rest.mean().abs() < 0.02 * deviation * 5


def test_a_scatter_picture_has_a_ring_for_each_mode_and_a_pixel_for_each_sample():
    mixture = mixtures.load("grid")
    empty = mixtures.scatter(torch.zeros(0, 2), mixture)
    assert empty.shape == (3, 200, 200) and empty.min() >= -1 and empty.max() <= 1
    x = torch.tensor([[4.0, 4.0], [-4.0, 0.0], [99.0, 0.0]])
    drawn = mixtures.scatter(x, mixture)
    changed = (drawn != empty).any(0).nonzero()
    row, column = (changed - 99.5).T * (2 * 1.4 * 4 / 200)
    assert torch.allclose(column, torch.tensor([4.0, -4.0]), atol=0.06)
    assert torch.allclose(-row, torch.tensor([4.0, 0.0]), atol=0.06)
