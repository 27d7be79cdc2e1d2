"""Nearest-neighbour measures against brute force, and the check that finds a model which copies its training set."""

import pytest
import torch

from nanodiff.errors import UserError
from nanodiff.metrics import neighbours
from nanodiff.metrics.neighbours import (coverage, kth_distance, nearest_neighbour, nearest_training_distance,
                                         precision_recall)


def normal(n, d=3, seed=0, **options):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **options)


def distances(x, y):
    return (x[:, None] - y[None]).norm(dim=-1)  # [n, m], without any trick


@pytest.fixture(params=[7, 1000], ids=["small chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(neighbours, "CHUNK", request.param)


@pytest.mark.parametrize("k", [1, 5])
def test_coverage_is_the_share_of_real_points_with_a_sample_among_their_k_nearest(chunk, k):
    real, samples = normal(90, seed=1), 0.5 * normal(60, seed=2) + 0.7
    covered = 0
    for i in range(90):
        pool = torch.cat([real[:i], real[i + 1:], samples])
        nearest = distances(real[i:i + 1], pool)[0].argsort()[:k]
        covered += bool((nearest >= 89).any())  # numbers from 89 on are samples
    assert 0.1 < covered / 90 < 0.99
    assert coverage(real, samples, k) == pytest.approx(covered / 90)


def test_coverage_of_one_distribution_by_itself_is_one_minus_two_to_the_minus_k():
    values = [coverage(normal(300, seed=s), normal(300, seed=100 + s), k=3) for s in range(60)]
    assert sum(values) / 60 == pytest.approx(1 - 2 ** -3, abs=0.01)


def test_coverage_is_0_far_away_and_1_on_the_data_itself():
    real = normal(50)
    assert coverage(real, real + 100) == 0
    assert coverage(real, real) == 1


def test_a_dropped_mode_halves_coverage_and_leaves_precision():
    real = normal(400, seed=1)
    real[200:] += 50
    samples = normal(400, seed=2)
    precision, recall = precision_recall(real, samples)
    assert coverage(real, samples) == pytest.approx(0.5, abs=0.02)
    assert precision > 0.9 and recall == pytest.approx(0.5, abs=0.05)


def test_precision_and_recall_match_balls_drawn_by_hand(chunk):
    real, samples = normal(80, seed=1), 1.5 * normal(60, seed=2) + 0.5
    def share(x, centres, k=3):
        radius = distances(centres, centres).sort(dim=1).values[:, k]  # the first is the point itself
        return float((distances(x, centres) <= radius).any(dim=1).double().mean())
    assert precision_recall(real, samples) == pytest.approx((share(samples, real), share(real, samples)))


def test_nearest_neighbour_and_kth_distance_match_brute_force(chunk):
    x, pool = normal(40, 5, 1), normal(300, 5, 2)
    distance, index = nearest_neighbour(x, pool)
    expected = distances(x, pool).min(dim=1)
    assert torch.equal(index, expected.indices)
    assert torch.allclose(distance, expected.values, rtol=0, atol=1e-12)
    assert torch.allclose(kth_distance(pool, 4), distances(pool, pool).sort(dim=1).values[:, 4], rtol=0, atol=1e-6)


def test_a_duplicate_counts_as_a_neighbour_but_the_point_itself_does_not():
    x = torch.tensor([[0.0], [0.0], [3.0], [7.0]])
    assert kth_distance(x, 1).tolist() == [0, 0, 3, 4]


def test_the_distance_of_a_copy_is_exactly_zero():
    pool = normal(500, 784, 3).float() + 5  # far from the origin, where |a|² + |b|² - 2ab loses digits
    distance, index = nearest_neighbour(pool[100:200], pool)
    assert distance.max() == 0 and torch.equal(index, torch.arange(100, 200))


def test_k_must_be_smaller_than_the_set():
    with pytest.raises(UserError, match="k = 5.*n = 5"):
        coverage(normal(5), normal(50), k=5)
    with pytest.raises(UserError, match="3 and 4 values"):
        nearest_neighbour(normal(5, 3), normal(5, 4))


def test_a_copied_set_is_flagged_and_new_pictures_are_not():
    train, test, fresh = (normal(n, 64, s).view(n, 1, 8, 8) for n, s in ((2000, 1), (200, 2), (200, 3)))
    honest = nearest_training_distance(fresh, train, test)
    assert not honest["memorised"] and honest["copied_share"] == 0
    assert honest["median"] == pytest.approx(honest["test_median"], rel=0.05)
    noise = 0.05 * normal(200, 64, 4).view(200, 1, 8, 8)
    for copies in (train[:200], train[300:500] + noise):
        verdict = nearest_training_distance(copies, train, test)
        assert verdict["memorised"] and verdict["copied_share"] == 1
        assert verdict["median"] < 0.2 * verdict["test_median"]


def test_a_few_copies_among_new_pictures_are_found_one_by_one():
    train, test, samples = (normal(n, 64, s) for n, s in ((1000, 1), (200, 2), (200, 3)))
    samples[[3, 50, 51, 199]] = train[[7, 8, 9, 10]]
    verdict = nearest_training_distance(samples, train, test)
    assert verdict["copied"].nonzero().flatten().tolist() == [3, 50, 51, 199]
    assert verdict["index"][[3, 50, 51, 199]].tolist() == [7, 8, 9, 10]
    assert verdict["memorised"] and verdict["copied_share"] == pytest.approx(4 / 200)


def test_eight_bit_pictures_are_compared_without_wrapping():
    train = torch.tensor([[0], [200]], dtype=torch.uint8)
    assert nearest_neighbour(torch.tensor([[250]], dtype=torch.uint8), train)[0].item() == 50
