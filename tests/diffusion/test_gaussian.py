import math

import pytest
import torch

from nanodiff.diffusion import Schedule, gaussian, process


def random_gaussian(d, seed, batch=()):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(*batch, d, d + 2, generator=generator, dtype=torch.float64)
    return torch.randn(*batch, d, generator=generator, dtype=torch.float64), root @ root.mT / d


def test_kl_equals_the_textbook_formula_and_torch():
    for d in (1, 2, 7):
        (mean1, cov1), (mean2, cov2) = random_gaussian(d, 1), random_gaussian(d, 2)
        inverse = torch.linalg.inv(cov2)
        expected = 0.5 * (torch.trace(inverse @ cov1) - d + (mean2 - mean1) @ inverse @ (mean2 - mean1)
                          + torch.logdet(cov2) - torch.logdet(cov1))
        found = gaussian.kl(mean1, cov1, mean2, cov2)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        normal = torch.distributions.MultivariateNormal
        torch.testing.assert_close(found, torch.distributions.kl_divergence(normal(mean1, cov1), normal(mean2, cov2)))


def test_kl_equals_its_definition_by_monte_carlo():
    (mean1, cov1), (mean2, cov2) = random_gaussian(3, 3), random_gaussian(3, 4)
    generator = torch.Generator().manual_seed(0)
    x = mean1 + torch.randn(100_000, 3, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(cov1).mT
    normal = torch.distributions.MultivariateNormal
    ratio = normal(mean1, cov1).log_prob(x) - normal(mean2, cov2).log_prob(x)
    error = float(ratio.std()) / len(x) ** 0.5
    assert abs(float(ratio.mean() - gaussian.kl(mean1, cov1, mean2, cov2))) < 4 * error


def test_kl_of_a_batch_broadcasts_and_is_zero_only_for_equal_gaussians():
    mean, cov = random_gaussian(4, 5, (3, 2))
    other_mean, other_cov = random_gaussian(4, 6)
    found = gaussian.kl(mean, cov, other_mean, other_cov)
    assert found.shape == (3, 2)
    torch.testing.assert_close(found[1, 0], gaussian.kl(mean[1, 0], cov[1, 0], other_mean, other_cov))
    assert bool((found > 0).all()) and float(gaussian.kl(mean, cov, mean, cov).abs().max()) < 1e-25


def test_kl_of_nearly_equal_gaussians_keeps_its_digits():
    step = 1e-6  # KL(N(0, (1 + step) I) || N(0, I)) = d/2 (step - log(1 + step)) = d/2 (step^2/2 - step^3/3 + ...)
    mean, cov = torch.zeros(5, dtype=torch.float64), torch.eye(5, dtype=torch.float64)
    found = float(gaussian.kl(mean, cov * (1 + step), mean, cov))
    assert found == pytest.approx(2.5 * (step**2 / 2 - step**3 / 3), rel=1e-8, abs=1e-21)


def test_kl_is_unchanged_by_any_linear_change_of_coordinates():
    (mean1, cov1), (mean2, cov2) = random_gaussian(4, 7), random_gaussian(4, 8)
    a = torch.randn(4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    moved = gaussian.kl(a @ mean1, a @ cov1 @ a.T, a @ mean2, a @ cov2 @ a.T)
    torch.testing.assert_close(moved, gaussian.kl(mean1, cov1, mean2, cov2), rtol=1e-9, atol=0)


def test_kl_diagonal_is_kl_with_a_diagonal_covariance():
    generator = torch.Generator().manual_seed(1)
    mean1, mean2 = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    variance1, variance2 = torch.rand(2, 6, generator=generator, dtype=torch.float64) + 0.01
    found = gaussian.kl_diagonal(mean1, variance1, mean2, variance2)
    assert found.shape == (6,)
    torch.testing.assert_close(found.sum(), gaussian.kl(mean1, variance1.diag(), mean2, variance2.diag()))


def test_kl_diagonal_is_exact_for_ratios_from_tiny_to_huge():
    zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for exponent in (-300, -12, -1, 1, 12, 300):
        ratio = torch.tensor(10.0, dtype=torch.float64) ** exponent
        expected = 0.5 * (float(ratio) - 1 - exponent * math.log(10))
        assert float(gaussian.kl_diagonal(zero, ratio, zero, one)) == pytest.approx(expected, rel=1e-14)
    for off in (1e-3, 1e-9, -1e-9, 0.0):
        found = float(gaussian.kl_diagonal(zero, one + off, zero, one))
        assert found == pytest.approx(off**2 / 4 - off**3 / 6, rel=1e-5, abs=1e-24)


def test_kl_is_differentiable():
    (mean1, cov1), (mean2, cov2) = random_gaussian(3, 10), random_gaussian(3, 11)

    def of_factors(mean1, root1, mean2, root2):
        return gaussian.kl(mean1, root1 @ root1.mT, mean2, root2 @ root2.mT)

    inputs = [x.requires_grad_() for x in (mean1, torch.linalg.cholesky(cov1), mean2, torch.linalg.cholesky(cov2))]
    assert torch.autograd.gradcheck(of_factors, inputs)
    variances = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in ([1.0, 2.0, 0.1], [1.0, 0.3, 9.0])]
    assert torch.autograd.gradcheck(gaussian.kl_diagonal, (inputs[0], variances[0], inputs[2], variances[1]))


@pytest.mark.parametrize("bad", [[[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.5], [0.0, 1.0]],
                                 [[math.nan, 0.0], [0.0, 1.0]]])
def test_a_covariance_that_is_not_positive_definite_or_symmetric_is_refused(bad):
    mean, cov, bad = torch.zeros(2), torch.eye(2), torch.tensor(bad)
    with pytest.raises(ValueError, match="cov1 must be"):
        gaussian.kl(mean, bad, mean, cov)
    with pytest.raises(ValueError, match="cov2 must be"):
        gaussian.kl(mean, cov, mean, bad)


def test_kl_of_equal_covariances_is_the_distance_of_the_means():
    mean1, mean2 = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for variance in (1e-4, 0.7, 30.0):
        cov = variance * torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close(gaussian.kl_same_variance(mean1, mean2, variance),
                                   gaussian.kl(mean1, cov, mean2, cov), rtol=1e-12, atol=1e-12)


SCHEDULES = {
    "linear": Schedule.linear(), "scaled_linear": Schedule.scaled_linear(), "cosine": Schedule.cosine(),
    "zero terminal SNR": Schedule.scaled_linear().zero_terminal_snr(), "one step": Schedule.from_betas([0.3]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_composing_every_noising_step_gives_q_sample(name):
    schedule = SCHEDULES[name]
    signal, variance = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    x, nothing, all_noise = (torch.full((1, 1), value, dtype=torch.float64) for value in (1.0, 0.0, 1.0))
    for i in range(schedule.T):
        t = torch.tensor([i])
        step_signal = process.q_step(schedule, x, t, nothing)[0, 0]
        step_variance = process.q_step(schedule, nothing, t, all_noise)[0, 0] ** 2
        signal, variance = gaussian.compose(signal, variance, step_signal, step_variance)
        assert abs(float(signal - process.q_sample(schedule, x, t, nothing)[0, 0])) < 1e-12
        assert abs(float(variance - process.q_sample(schedule, nothing, t, all_noise)[0, 0] ** 2)) < 1e-12


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "one step"])
def test_bayes_rule_gives_the_posterior_of_the_noising_process(name):
    schedule = SCHEDULES[name]
    t = torch.arange(1, schedule.T)
    x0 = torch.full((len(t), 1), 0.7, dtype=torch.float64)
    x_t = torch.linspace(-2, 2, len(t), dtype=torch.float64).view(-1, 1)
    before = schedule.alpha_bar[:-1].view(-1, 1)
    mean, variance = gaussian.bayes(before.sqrt() * x0, 1 - before, x_t,
                                    schedule.alpha[1:].sqrt().view(-1, 1), schedule.beta[1:].view(-1, 1))
    expected_mean, expected_variance = process.posterior(schedule, x0, x_t, t)
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=1e-11)
    torch.testing.assert_close(variance, expected_variance, rtol=1e-10, atol=0)
