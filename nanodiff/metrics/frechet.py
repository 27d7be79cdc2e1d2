"""Fréchet distance between two sets of features, each taken as a Gaussian (Heusel et al. 2017, eq. 6).

    d² = |mean1 - mean2|² + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^½)

The last trace needs no matrix square root. If cov1 = F1 F1' and cov2 = F2 F2', the eigenvalues of cov1 cov2 are the
squared singular values of F1' F2, so the trace is the sum of those singular values. It is real and never negative, also
for covariances without full rank. The number is called FID only for the features of the reference Inception.
"""

import warnings

import torch

from nanodiff.errors import UserError


def moments(x):
    """Mean [d] and covariance [d, d] of features x [n, d] in float64, with n - 1 as in numpy.cov(x, rowvar=False).

    x is a tensor or an array. UserError when n < 2, or when a value is not finite.
    """
    x = features_as_float64(x)
    if len(x) < 2:
        raise UserError(f"a covariance needs at least 2 rows of features, but n = {len(x)}")
    mean = x.mean(dim=0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)  # [d], [d, d]


def frechet_distance(x, y, *, unequal_n=False):
    """Squared Fréchet distance d² >= 0 between features x [n, d] and y [n, d] (Heusel et al. 2017, eq. 6).

    It is biased upward by about 1/n (Chong and Forsyth 2020, arXiv 1911.07023): report n beside the number. Sets of
    unequal size raise UserError unless `unequal_n=True`. Warns when n < d: the covariance then lacks full rank.
    """
    x, y = features_as_float64(x), features_as_float64(y)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared: use one network")
    if len(x) != len(y) and not unequal_n:
        raise UserError(f"the Fréchet distance depends on n, so both sets need the same n, "
                        f"but they have {len(x)} and {len(y)} rows; use the first {min(len(x), len(y))} of each")
    n, dims = min(len(x), len(y)), x.shape[1]
    if 1 < n < dims:
        warnings.warn(f"Fréchet distance from n = {n} rows of {dims} dimensions: the covariance lacks full rank and "
                      f"the distance is biased upward", stacklevel=2)
    if 1 < n and max(len(x), len(y)) < dims:  # the centred rows are smaller factors: F1' F2 is [n, n]
        (mean1, rows1), (mean2, rows2) = ((z.mean(0), (z - z.mean(0)) / (len(z) - 1) ** 0.5) for z in (x, y))
        trace_root = torch.linalg.svdvals(rows1 @ rows2.T).sum()
        distance = (mean1 - mean2).square().sum() + rows1.square().sum() + rows2.square().sum() - 2 * trace_root
        return max(float(distance), 0.0)
    return frechet_from_moments(*moments(x), *moments(y))


def frechet_from_moments(mean1, cov1, mean2, cov2):
    """Squared Fréchet distance between N(mean1, cov1) and N(mean2, cov2); means [d], covariances [d, d] -> float."""
    mean1, cov1, mean2, cov2 = (torch.as_tensor(a, dtype=torch.float64) for a in (mean1, cov1, mean2, cov2))
    d = len(mean1)
    if not (mean1.shape == mean2.shape == (d,) and cov1.shape == cov2.shape == (d, d)):
        raise UserError(f"expected means [d] and covariances [d, d], but got {tuple(mean1.shape)}, "
                        f"{tuple(cov1.shape)}, {tuple(mean2.shape)} and {tuple(cov2.shape)}")
    trace_root = torch.linalg.svdvals(_factor(cov1).T @ _factor(cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_root
    return max(float(distance), 0.0)  # rounding leaves about -1e-14 for equal sets


def _factor(cov):
    """F [d, d] with F F' = cov, from the symmetric eigenvalues."""
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    # Eigenvalues below rounding come from rank deficiency. Their roots (1e-16 -> 1e-8) would add up over dimensions.
    floor = len(cov) * torch.finfo(torch.float64).eps * values.abs().max()
    return vectors * torch.where(values > floor, values, 0).sqrt()


def features_as_float64(x):
    """Features as a float64 tensor [n, d]; UserError when they are not [n, d] or hold a NaN or an infinity."""
    x = torch.as_tensor(x, dtype=torch.float64).detach()
    if x.ndim != 2 or 0 in x.shape:
        raise UserError(f"features are expected as [n, d] with n and d at least 1, but the shape is {list(x.shape)}")
    if not x.isfinite().all():
        rows = (~x.isfinite().all(dim=1)).nonzero().flatten()
        raise UserError(f"{len(rows)} of {len(x)} rows of features are not finite, the first is row {rows[0]}")
    return x
