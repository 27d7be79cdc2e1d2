"""Kernel Inception Distance: the squared maximum mean discrepancy between two sets of features, without bias.

Unlike the Fréchet distance it assumes no Gaussian, and its expectation does not depend on n: small sets give noisier
numbers, not larger ones. It is called KID only for the features of the reference Inception.
Source: Binkowski et al. 2018 (arXiv 1801.01401), section 4; the unbiased estimate is Gretton et al. 2012, equation 3.
"""

import torch

from nanodiff.errors import UserError
from nanodiff.metrics.frechet import features_as_float64


def kernel(x, y):
    """k(x, y) = (x . y / d + 1)^3, [n, m], for each pair of rows of x [n, d] and y [m, d]."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mmd2(x, y, unbiased=True):
    """Squared MMD between features x [n, d] and y [m, d]: a float in the kernel's unit (not times 1000).

    unbiased   True leaves out the pairs of a row with itself: two sets of one distribution give 0 on average, and a
               number below 0 half of the time. False includes these pairs and is never below 0.
    UserError for n or m below 2.
    """
    x, y = _pair(x, y)
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    if not unbiased:
        return float(xx.mean() + yy.mean() - 2 * xy.mean())
    n, m = len(x), len(y)
    return float((xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.mean())


def kernel_distance(x, y, subsets=100, size=1000, seed=0):
    """Mean and standard deviation of `mmd2` over random subsets of features x [n, d], y [m, d]: a dict of numbers.

        kid, kid_deviation   over the subsets, in the kernel's unit: many papers print 1000 times this
        subsets, size        number of subsets, and rows of each set in one (at most n and m)
        n, m                 rows of the two sets
    Rows of a subset are drawn without repetition, with `seed`. UserError for n, m, size or subsets too small.
    """
    x, y = _pair(x, y)
    size = min(size, len(x), len(y))
    if subsets < 1 or size < 2:
        raise UserError(f"{subsets} subsets of {size} rows cannot be compared; expected 1 or more of 2 or more")
    if size == len(x) == len(y):
        subsets = 1  # every subset would be the whole set
    generator, estimates = torch.Generator().manual_seed(seed), []
    for _ in range(subsets):
        rows, other_rows = (torch.randperm(len(z), generator=generator)[:size] for z in (x, y))
        estimates.append(mmd2(x[rows], y[other_rows]))
    estimates = torch.tensor(estimates, dtype=torch.float64)
    return {"kid": float(estimates.mean()), "kid_deviation": float(estimates.std(correction=0)), "subsets": subsets,
            "size": size, "n": len(x), "m": len(y)}


def _pair(x, y):
    """Both as float64; UserError unless they have one width and two rows or more."""
    x, y = features_as_float64(x), features_as_float64(y)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared: use one network")
    if min(len(x), len(y)) < 2:
        raise UserError(f"the kernel distance needs at least 2 rows of each set, but they have {len(x)} and {len(y)}")
    return x, y
