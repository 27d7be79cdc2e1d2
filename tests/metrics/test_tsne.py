"""t-SNE: the perplexity of every row, the joint probabilities, the gradient, groups that stay apart, wrong input."""

import math

import pytest
import torch

from nanodiff.errors import UserError
from nanodiff.metrics import tsne as module
from nanodiff.metrics.tsne import (conditional_probabilities, divergence, gradient, joint_probabilities,
                                   neighbour_accuracy, principal_start, tsne)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups(n=40, d=5, distance=30.0):
    """Three far clusters of n points each, and which one every point belongs to."""
    centres = distance * torch.eye(d)[:3].double()
    label = torch.arange(3).repeat_interleave(n)
    return centres[label] + normal(3 * n, d), label


# --- similarities ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
@pytest.mark.parametrize("perplexity", [2, 30])
def test_the_entropy_of_every_row_is_log2_of_the_perplexity(perplexity, scale):
    x = scale * normal(120, 4) * torch.linspace(0.01, 3, 120)[:, None]  # dense and thin places
    for points, tolerance in ((x, 1e-9), (x.float(), 1e-4)):
        p = conditional_probabilities(points, perplexity)
        bits = -torch.xlogy(p, p).sum(1) / math.log(2)
        assert torch.allclose(bits, torch.full_like(bits, math.log2(perplexity)), rtol=0, atol=tolerance)


def test_each_row_is_a_gaussian_of_the_distances_without_the_point_itself():
    x = normal(50, 3)
    p = conditional_probabilities(x, 10)
    assert torch.equal(p.diagonal(), torch.zeros(50).double())
    assert torch.allclose(p.sum(1), torch.ones(50).double())
    square = (x[:, None] - x[None]).square().sum(2)
    for i in (0, 17, 49):
        others = torch.arange(50) != i
        beta = torch.log(p[i, others].max() / p[i, others].min()) / (square[i, others].max() - square[i, others].min())
        expected = torch.exp(-beta * square[i, others])
        assert torch.allclose(p[i, others], expected / expected.sum(), atol=1e-9)


def test_the_joint_probabilities_are_symmetric_and_sum_to_1_with_a_share_for_every_point():
    joint = joint_probabilities(normal(90, 6), 12)
    assert torch.equal(joint, joint.T) and joint.sum().item() == pytest.approx(1, abs=1e-12)
    assert joint.diagonal().abs().max() == 0 and joint.min() >= 0
    assert joint.sum(1).min() > 1 / (2 * 90)  # even for outliers: section 3.1


def test_equal_points_and_far_outliers_give_finite_probabilities():
    x = torch.cat([torch.zeros(30, 3), torch.ones(30, 3), torch.full((1, 3), 1e4)])  # more equal ones than neighbours
    p = conditional_probabilities(x, 5)
    assert p.isfinite().all() and torch.allclose(p.sum(1), torch.ones(61))
    assert torch.allclose(p[0, 1:30], torch.full((29,), 1 / 29), atol=1e-6)


# --- the gradient ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("block", [7, 64])
@pytest.mark.parametrize("exaggeration", [1.0, 12.0])
def test_the_gradient_is_autograds(monkeypatch, block, exaggeration):
    monkeypatch.setattr(module, "BLOCK", block)
    joint, y = joint_probabilities(normal(60, 5), 8), (3 * normal(60, 2, 1)).requires_grad_()
    # -e sum p log closeness + log Z: for e = 1 the divergence but for a constant
    closeness = 1 / (1 + (y[:, None] - y[None]).square().sum(2))
    closeness = closeness * (1 - torch.eye(60).double())
    energy = -exaggeration * torch.xlogy(joint, closeness + torch.eye(60).double()).sum() + closeness.sum().log()
    expected, = torch.autograd.grad(energy, y)
    assert torch.allclose(gradient(joint, y.detach(), exaggeration), expected, rtol=1e-9, atol=1e-12)
    if exaggeration == 1:
        direct, = torch.autograd.grad(divergence(joint, y), y)
        assert torch.allclose(expected, direct, rtol=1e-7, atol=1e-12)


def test_the_divergence_is_0_where_both_similarities_agree_and_above_elsewhere():
    y = normal(30, 2)
    closeness = 1 / (1 + (y[:, None] - y[None]).square().sum(2)) * (1 - torch.eye(30).double())
    q = closeness / closeness.sum()
    assert divergence(q, y).item() == pytest.approx(0, abs=1e-12)
    assert gradient(q, y).abs().max() < 1e-12
    assert divergence(q, 2 * y) > 0.01


def test_float32_is_as_good_as_float64_far_from_the_origin():
    joint, y = joint_probabilities(normal(200, 5), 8), 60 * normal(200, 2, 1)
    exact = gradient(joint, y)
    assert (gradient(joint.float(), y.float()) - exact).norm() < 1e-3 * exact.norm()


# --- the map ---------------------------------------------------------------------------------------------------------

def test_far_groups_stay_apart_and_the_divergence_falls():
    x, label = groups()
    y = tsne(x, perplexity=10, steps=300)
    assert y.shape == (120, 2) and y.dtype == torch.float32 and y.mean(0).abs().max() < 1e-4
    assert neighbour_accuracy(y, label) == 1
    within = max((y[label == i] - y[label == i].mean(0)).norm(dim=1).max() for i in range(3))
    apart = torch.pdist(torch.stack([y[label == i].mean(0) for i in range(3)])).min()
    assert apart > 2 * within
    joint = joint_probabilities(x, 10)
    assert divergence(joint, y.double()) < 0.5 * divergence(joint, principal_start(x, 0))


def test_neighbours_on_a_line_stay_neighbours():
    x = torch.linspace(0, 10, 100)[:, None] * torch.ones(1, 4)
    y = tsne(x, perplexity=5, steps=400)
    between = torch.cdist(y, y)
    near = between.fill_diagonal_(torch.inf).argsort(1)[:, :4]  # the four nearest on the map
    assert ((near - torch.arange(100)[:, None]).abs().float().mean()) < 3


def test_the_map_follows_from_points_and_seed_alone():
    x, _ = groups(15)
    torch.manual_seed(1)
    first = tsne(x, 5, steps=60)
    torch.manual_seed(2)
    assert torch.equal(first, tsne(x, 5, steps=60)) and torch.equal(first, tsne(x.view(45, 5, 1), 5, steps=60))
    assert not torch.equal(first, tsne(x, 5, steps=60, seed=1))


def test_the_start_shows_the_widest_direction_and_never_two_equal_places():
    x = normal(80, 6) * torch.tensor([1, 1, 9, 1, 1, 4.0])
    y = principal_start(x, 0)
    assert y[:, 0].std().item() == pytest.approx(1e-4, rel=0.05)
    assert torch.corrcoef(torch.stack([y[:, 0], x[:, 2]]))[0, 1] > 0.95
    assert torch.corrcoef(torch.stack([y[:, 1], x[:, 5]]))[0, 1] > 0.9
    same = principal_start(torch.ones(20, 3), 0)
    assert same.isfinite().all() and len(same.unique(dim=0)) == 20
    assert principal_start(normal(20, 1), 0).shape == (20, 2)


# --- what the picture shows -------------------------------------------------------------------------------------------

def test_the_commonest_label_of_the_nearest_others_counts():
    y = torch.tensor([[0.0, 0], [1, 0], [2, 0], [100, 0], [101, 0], [102, 0]])
    assert neighbour_accuracy(y, torch.tensor([0, 0, 0, 1, 1, 1]), k=2) == 1
    assert neighbour_accuracy(y, torch.tensor([0, 1, 1, 0, 0, 0]), k=2) == pytest.approx(3 / 6)  # ties go to label 0
    assert neighbour_accuracy(y, torch.tensor([0, 0, 0, 1, 1, 1]), k=5) == 0  # all others: the other group has more


def test_labels_without_a_pattern_are_guessed_at_chance():
    y = normal(2500, 2)  # more than one block of rows
    label = torch.randint(0, 10, (2500,), generator=torch.Generator().manual_seed(0))
    assert neighbour_accuracy(y, label) == pytest.approx(0.1, abs=0.03)


# --- wrong input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("x, perplexity, expected", [
    (torch.zeros(90, 3), 30, "perplexity of 30 needs more than 90 points, but n = 90; expected 1 to 29"),
    (torch.zeros(20, 3), 0.5, "perplexity of 0.5"), (torch.zeros(20, 3), math.nan, "perplexity of nan"),
    (torch.zeros(20), 5, r"\[20\]"), (torch.zeros(20, 0), 5, r"\[20, 0\]"), (torch.zeros(0, 3), 5, r"\[0, 3\]"),
    (torch.tensor([[0.0], [1], [math.nan], [3], [math.inf]]), 1, "2 of 5 points .* row 2")])
def test_points_that_have_no_map_are_refused(x, perplexity, expected):
    with pytest.raises(UserError, match=expected):
        tsne(x, perplexity)


def test_too_few_points_or_labels_have_no_accuracy():
    with pytest.raises(UserError, match="k = 10.*n = 10"):
        neighbour_accuracy(torch.zeros(10, 2), torch.zeros(10, dtype=torch.long))
    with pytest.raises(UserError, match="20 points and 19 labels"):
        neighbour_accuracy(torch.zeros(20, 2), torch.zeros(19, dtype=torch.long))
