"""The facts about Gaussians that the derivation of diffusion models rests on.

N(m, v) has mean m and variance v, or a covariance matrix where the name says cov. Every function is differentiable,
broadcasts, and works in the precision of the tensors it is given.
Source: report sections 3.1.1 and 3.1.3, figures 24-26.
"""

import torch


def _excess(ratio, off):
    """r - 1 - log r, the price of a variance that is r times too large; `off` is r - 1, known to more digits."""
    near = off.abs() < 0.5  # there log(r) would be all rounding error, and elsewhere log1p(r - 1) would be
    return off - torch.where(near, torch.log1p(torch.where(near, off, 0)), torch.log(torch.where(near, 1, ratio)))


def kl_diagonal(mean1, variance1, mean2, variance2):
    """KL(N(mean1, variance1) || N(mean2, variance2)) in nats, one number for each element, nothing summed.

    Tensors that broadcast, variances > 0. Exactly 0 for equal arguments, and without cancellation near them.
    Report section 3.1.3 for one dimension; Kingma & Welling 2013 (arXiv 1312.6114), appendix B, for N(0, 1).
    """
    excess = _excess(variance1 / variance2, (variance1 - variance2) / variance2)
    return 0.5 * (excess + (mean1 - mean2) ** 2 / variance2)


def kl(mean1, cov1, mean2, cov2):
    """KL(N(mean1, cov1) || N(mean2, cov2)) of two Gaussians with full covariances, in nats: [...] (report 3.1.3).

    mean [..., d], cov [..., d, d]. With cov = L L^T and M = L2^-1 L1 the textbook's
    (tr(cov2^-1 cov1) - d - log det(cov2^-1 cov1) + |L2^-1 (mean1 - mean2)|^2) / 2 is a sum of terms that are all >= 0:
    the squares below M's diagonal, r - 1 - log r for each squared diagonal entry r, and the distance of the means.
    Raises ValueError for a covariance that is not symmetric and positive definite.
    """
    factor1, factor2 = _cholesky("cov1", cov1), _cholesky("cov2", cov2)
    ratio = torch.linalg.solve_triangular(factor2, factor1, upper=False)  # M, lower triangular
    distance = torch.linalg.solve_triangular(factor2, (mean1 - mean2).unsqueeze(-1), upper=False).squeeze(-1)
    d1, d2 = factor1.diagonal(dim1=-2, dim2=-1), factor2.diagonal(dim1=-2, dim2=-1)
    excess = _excess((d1 / d2) ** 2, (d1 - d2) * (d1 + d2) / d2**2)
    return 0.5 * (excess.sum(-1) + ratio.tril(-1).square().sum((-2, -1)) + distance.square().sum(-1))


def _cholesky(name, cov):
    factor, failed = torch.linalg.cholesky_ex(cov)
    if bool(failed.any()) or not torch.allclose(cov, cov.mT):  # Cholesky itself never looks above the diagonal
        raise ValueError(f"{name} must be a symmetric, positive definite covariance [..., d, d]")
    return factor


def kl_same_variance(mean1, mean2, variance):
    """KL of two Gaussians with one covariance, variance * identity: |mean1 - mean2|^2 / (2 variance), in nats: [...].

    mean [..., d], variance a number or [...]. Why the bound of a diffusion model is a mean squared error
    (report figures 24-26; Ho et al. 2020, equation 8).
    """
    return (mean1 - mean2).square().sum(-1) / (2 * variance)


def compose(signal1, variance1, signal2, variance2):
    """Two noising steps in a row as one: the signal and the variance of N(signal * x, variance).

    First N(signal1 x, variance1), then N(signal2 y, variance2) of its outcome y. Composing q(x_t | x_{t-1}) for all
    steps up to t gives q(x_t | x_0) (report section 3.1.1; Ho et al. 2020, equation 4).
    """
    return signal1 * signal2, signal2**2 * variance1 + variance2


def bayes(mean, variance, observed, signal, noise_variance):
    """Mean and variance of x ~ N(mean, variance), given observed = signal * x + N(0, noise_variance): Bayes' rule.

    With x = x_{t-1} known to be
    N(sqrt(alpha_bar_{t-1}) x_0, 1 - alpha_bar_{t-1}) and x_t observed it is the posterior of the noising process
    (report figures 24-25); with x = x_0 ~ N(m, s^2) it is the best possible denoiser of Gaussian data.
    """
    total = signal**2 * variance + noise_variance  # variance of what is observed
    return mean + signal * variance / total * (observed - signal * mean), variance * noise_variance / total
