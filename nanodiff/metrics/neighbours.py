"""Measures by nearest neighbours: coverage, precision and recall, copies of training pictures.

Distances are Euclidean and computed in chunks of rows, so memory grows with n and not with n².
"""

import torch

from nanodiff.errors import UserError
from nanodiff.metrics.frechet import features_as_float64

CHUNK = 1000


def coverage(real, samples, k=5):
    """Share of real points that have a sample among their k nearest neighbours (Naeem et al. 2020, eq. 6).

    real [n, d], samples [m, d] -> float in 0..1. Neighbours are the other real points and the samples. Equivalently, a
    sample lies inside the ball that reaches to the k-th nearest other real point. For n = m and one
    distribution the expectation is about 1 - 2^-k (0.969 for k = 5), not 1. UserError when n <= k.
    """
    real, samples = features_as_float64(real), features_as_float64(samples)
    radius = kth_distance(real, k)
    nearest, _ = nearest_neighbour(real, samples)
    return float((nearest <= radius).double().mean())


def precision_recall(real, samples, k=3):
    """Precision and recall of Kynkäänniemi et al. (2019, eqs. 1, 2): two floats in 0..1.

    Precision is the share of samples [m, d] inside the ball of some real point [n, d]; a ball reaches to the k-th
    nearest other real point. Recall is the same with the roles exchanged. UserError when n <= k or m <= k.
    """
    real, samples = features_as_float64(real), features_as_float64(samples)
    return _share_inside(samples, real, kth_distance(real, k)), _share_inside(real, samples, kth_distance(samples, k))


def kth_distance(x, k):
    """Distance [n] of each row of x [n, d] to its k-th nearest other row."""
    if not 1 <= k < len(x):
        raise UserError(f"k = {k} nearest neighbours need more than k points, but n = {len(x)}")
    distances = []
    for start in range(0, len(x), CHUNK):
        d = torch.cdist(x[start:start + CHUNK], x)  # [chunk, n]
        rows = torch.arange(len(d), device=d.device)
        d[rows, start + rows] = torch.inf  # a point is not its own neighbour; an equal second point is one
        distances.append(d.kthvalue(k, dim=1).values)
    return torch.cat(distances)


def nearest_neighbour(x, pool):
    """Distance [n] of each row of x [n, d] to its nearest row of pool [m, d], and that row's index [n].

    Rows may have any shape [...] and either integer or float type; the search runs in float32 or wider.
    """
    x, pool = (a.flatten(1) if a.is_floating_point() else a.flatten(1).float() for a in (x, pool))
    if x.shape[1] != pool.shape[1]:
        raise UserError(f"pictures or features of {x.shape[1]} and {pool.shape[1]} values cannot be compared")
    distance, index = [], []
    for start in range(0, len(x), CHUNK):
        rows = x[start:start + CHUNK]
        best = torch.full((len(rows),), torch.inf, dtype=rows.dtype, device=rows.device)
        best_index = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        for first in range(0, len(pool), 10 * CHUNK):
            d, row = torch.cdist(rows, pool[first:first + 10 * CHUNK]).min(dim=1)
            best_index = torch.where(d < best, first + row, best_index)
            best = torch.minimum(d, best)
        # cdist multiplies matrices, with an error of about 1e-2 where the distance is 0: recompute it
        distance.append((rows - pool[best_index]).norm(dim=1))
        index.append(best_index)
    return torch.cat(distance), torch.cat(index)


def nearest_training_distance(samples, train, test):
    """Distance of each sample to its nearest training picture, with that of held-out pictures, and which are copies.

    samples [n, ...], train [m, ...], test [l, ...]: pictures in one range, or features. A sample is a copy when its
    distance is at most half of the 1 % quantile of the held-out pictures' distances. Returns a dict:
        distance, index      [n]: to the nearest training picture, and its index
        test_distance        [l]: the same for the held-out pictures
        median, test_median  of both distances
        copied               [n] bool
        copied_share         share of copies
        memorised            True when more than 1 % of the samples are copies
    A model that repeats its training set passes FID and fails this check (Carlini et al. 2023, section 4).
    """
    distance, index = nearest_neighbour(samples, train)
    test_distance, _ = nearest_neighbour(test, train)
    copied = distance <= 0.5 * test_distance.quantile(0.01)
    copied_share = float(copied.double().mean())
    return {"distance": distance, "index": index, "test_distance": test_distance,
            "median": float(distance.median()), "test_median": float(test_distance.median()),
            "copied": copied, "copied_share": copied_share, "memorised": copied_share > 0.01}


def _share_inside(x, centres, radius):
    """Share of rows of x that lie in at least one ball around the centres."""
    inside = [(torch.cdist(rows, centres) <= radius).any(dim=1) for rows in x.split(CHUNK)]  # [chunk, m] -> [chunk]
    return float(torch.cat(inside).double().mean())
