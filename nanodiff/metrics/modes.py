"""Mode collapse: the distance between samples, and the modes of a known mixture that they cover."""

import torch

from nanodiff.errors import UserError


def mean_distance(x):
    """Mean Euclidean distance between two different rows of x [n, ...], a float; UserError for n below 2.

    It is 0 when all samples are equal and falls when a generator collapses (report figure 17).
    """
    if len(x) < 2:
        raise UserError(f"a distance between samples needs at least 2 of them, not {len(x)}")
    x = x.flatten(1).double()
    # a matrix product would leave a distance of about 1e-7 between equal rows
    return float(torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum() / (len(x) * (len(x) - 1)))


def diversity(samples, real):
    """mean_distance of samples over that of real pictures: about 1 when they vary as much, 0 when all are equal."""
    real_distance = mean_distance(real)
    if real_distance == 0:
        raise UserError("the real pictures are all the same: expected some that differ")
    return mean_distance(samples) / real_distance


def modes_covered(x, means, deviation):
    """How samples x [n, d] cover the modes of a mixture of isotropic Gaussians: a dict of numbers.

        quality   share of samples within 3 standard deviations of the mean nearest to them
        covered   number of modes with at least one such sample, of `modes`
        counts    [modes] such samples of each mode
    means [modes, d]; deviation: of every mode in every direction. Samples of the mixture itself reach only
    1 - exp(-9/2) = 0.989 of quality in two dimensions. Source: Srivastava et al. 2017 (arXiv 1705.07761), section 5.1,
    with 2,500 samples.
    """
    distance, nearest = torch.cdist(x.double(), means.double()).min(1)
    counts = nearest[distance <= 3 * deviation].bincount(minlength=len(means))
    return {"quality": float(counts.sum() / len(x)), "covered": int((counts > 0).sum()), "modes": len(means),
            "counts": counts.tolist(), "n": len(x)}
