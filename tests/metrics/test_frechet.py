"""The Fréchet distance against closed forms, and where it must refuse or warn (Heusel et al. 2017)."""

import warnings

import numpy as np
import pytest
import torch

from nanodiff.errors import UserError
from nanodiff.metrics import frechet
from nanodiff.metrics.frechet import frechet_distance, frechet_from_moments, moments


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed)).Q


@pytest.mark.parametrize("mean1, std1, mean2, std2",
                         [(0, 1, 0, 1), (0.3, 1, -0.7, 2.5), (1, 0.1, 1, 0.3), (2, 0, -1, 0)])
def test_one_dimension_is_squared_difference_of_means_plus_of_deviations(mean1, std1, mean2, std2):
    distance = frechet_from_moments([mean1], [[std1 ** 2]], [mean2], [[std2 ** 2]])
    assert distance == pytest.approx((mean1 - mean2) ** 2 + (std1 - std2) ** 2, abs=1e-12)


def test_commuting_covariances_compare_eigenvalue_by_eigenvalue():
    basis, a, b = rotation(6), torch.linspace(0.1, 4, 6).double(), torch.linspace(3, 0.5, 6).double() ** 2
    mean = normal(1, 6)[0]
    distance = frechet_from_moments(mean, basis * a @ basis.T, torch.zeros(6), basis * b @ basis.T)
    assert distance == pytest.approx(float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()), abs=1e-12)


def test_two_by_two_covariances_that_do_not_commute():
    # tr (AB)^1/2 = (tr AB + 2 (det AB)^1/2)^1/2 for 2 x 2 matrices
    a, b = (m.T @ m for m in (normal(2, 2, 1), normal(2, 2, 2)))
    root = ((a @ b).trace() + 2 * torch.det(a @ b).sqrt()).sqrt()
    assert frechet_from_moments(torch.zeros(2), a, torch.zeros(2), b) == pytest.approx(
        float(a.trace() + b.trace() - 2 * root), abs=1e-12)


def test_rank_one_covariance_against_the_identity():
    u = normal(1, 50)[0]  # tr (uu')^1/2 = |u|
    distance = frechet_from_moments(torch.zeros(50), torch.outer(u, u), torch.zeros(50), torch.eye(50))
    assert distance == pytest.approx(float(u @ u + 50 - 2 * u.norm()), abs=1e-10)


def test_trace_of_the_root_agrees_with_the_eigenvalues_of_the_product():
    x, y = normal(300, 40, 1) @ normal(40, 40, 2), normal(300, 40, 3) + 0.5
    values = np.linalg.eigvals(np.cov(x.numpy(), rowvar=False) @ np.cov(y.numpy(), rowvar=False))
    reference = float((x.mean(0) - y.mean(0)).square().sum() + moments(x)[1].trace() + moments(y)[1].trace()
                      - 2 * np.sqrt(values.real.clip(min=0)).sum())
    assert frechet_distance(x, y) == pytest.approx(reference, abs=1e-6)


def test_the_covariance_is_numpys_and_has_the_shape_dims_by_dims():
    x = normal(30, 7) @ normal(7, 7, 1)
    mean, cov = moments(x)
    assert cov.shape == (7, 7)
    assert np.abs(cov.numpy() - np.cov(x.numpy(), rowvar=False)).max() < 1e-13
    assert np.abs(mean.numpy() - x.numpy().mean(0)).max() < 1e-14


@pytest.mark.parametrize("n, dims", [(500, 16), (10, 64), (2, 300)])
@pytest.mark.filterwarnings("ignore:Fréchet distance from n")
def test_two_equal_sets_are_at_no_distance(n, dims):
    x = 10 * normal(n, dims) + 3
    assert 0 <= frechet_distance(x, x.flip(0)) < 1e-3


def test_fewer_rows_than_dimensions_give_a_finite_number_and_a_warning_with_both():
    x, y = normal(10, 64, 1), normal(10, 64, 2)
    with pytest.warns(UserWarning, match="n = 10 .*64 dimensions"):
        distance = frechet_distance(x, y)
    assert isinstance(distance, float) and np.isfinite(distance)
    # The rank is 9 of 64; the trace of the root is the sum of singular values of the two data matrices' product
    a, b = ((z - z.mean(0)) / 3 for z in (x, y))
    expected = ((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
                - 2 * torch.linalg.matrix_norm(a @ b.T, "nuc"))
    assert distance == pytest.approx(float(expected), abs=1e-9)


def test_enough_rows_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(normal(64, 64, 1), normal(64, 64, 2))


def test_one_row_has_no_covariance():
    with pytest.raises(UserError, match="n = 1"):
        moments(normal(1, 4))
    with pytest.raises(UserError, match="n = 1"):
        frechet_distance(normal(1, 4), normal(1, 4))
    for x, y in ((normal(1, 64), normal(5, 64)), (normal(5, 64), normal(1, 64))):
        with pytest.raises(UserError, match="n = 1"):
            frechet_distance(x, y, unequal_n=True)


def test_sets_of_unequal_size_are_refused_unless_asked_for():
    x, y = normal(60, 8, 1), normal(50, 8, 2)
    with pytest.raises(UserError, match="60 and 50"):
        frechet_distance(x, y)
    assert frechet_distance(x, y, unequal_n=True) == frechet_from_moments(*moments(x), *moments(y))


def test_small_n_biases_the_distance_upward():
    means = [np.mean([frechet_distance(normal(n, 8, s), normal(n, 8, 100 + s)) for s in range(20)])
             for n in (20, 40, 80)]
    assert means[0] > 1.5 * means[1] > 2 * means[2] > 0  # about proportional to 1/n, though the truth is 0


def test_features_that_are_not_finite_or_do_not_fit_are_refused():
    x = normal(20, 4)
    bad = x.clone()
    bad[7, 1] = float("nan")
    with pytest.raises(UserError, match="first is row 7"):
        frechet_distance(bad, x)
    with pytest.raises(UserError, match="4 and 3 dimensions"):
        frechet_distance(x, x[:, :3])
    with pytest.raises(UserError, match=r"\[20, 2, 2\]"):
        frechet_distance(x.view(20, 2, 2), x.view(20, 2, 2))


def test_arrays_lists_and_float32_tensors_are_taken_and_not_changed():
    x, y = normal(40, 5, 1), normal(40, 5, 2)
    before = x.clone()
    expected = frechet_distance(x, y)
    assert frechet_distance(x.numpy(), y.tolist()) == pytest.approx(expected, abs=1e-12)
    assert frechet_distance(x.float(), y.float()) == pytest.approx(expected, abs=1e-4)
    assert torch.equal(x, before)


def test_a_matrix_square_root_from_scipy_is_not_needed():
    assert "scipy" not in vars(frechet) and "sqrtm(" not in open(frechet.__file__).read()
