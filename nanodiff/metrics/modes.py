"""Does the generator make one picture only? How far samples are apart, and which modes of a known mixture they meet."""

import torch

from nanodiff.errors import UserError


def mean_distance(x):
    """Mean Euclidean distance between two different rows of x [n, ...] -> float; UserError for n below 2.

    0 for samples that are all alike: a generator that has collapsed makes it fall (report figure 17).
    """
    if len(x) < 2:
        raise UserError(f"a distance between samples needs at least 2 of them, not {len(x)}")
    x = x.flatten(1).double()
    # no matrix product: it would leave a distance of about 1e-7 between equal rows
    return float(torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum() / (len(x) * (len(x) - 1)))


def diversity(samples, real):
    """mean_distance of samples over that of real pictures: about 1 when they differ as much, 0 for one picture."""
    whole = mean_distance(real)
    if whole == 0:
        raise UserError("the real pictures are all the same: expected some that differ")
    return mean_distance(samples) / whole


def modes_covered(x, means, deviation):
    """Which modes of a mixture of round Gaussians the samples x [n, d] meet -> dict of numbers.

        quality   share of samples within 3 standard deviations of the mean nearest to them
        covered   modes that at least one such sample lies at, of `modes`
        counts    [modes] how many such samples each has
    means [modes, d]; deviation: of every mode in every direction. Even the mixture itself reaches only
    1 - exp(-9/2) = 0.989 of quality in two dimensions. Source: Srivastava et al. 2017 (arXiv 1705.07761), section 5.1,
    with 2,500 samples.
    """
    distance, nearest = torch.cdist(x.double(), means.double()).min(1)
    counts = nearest[distance <= 3 * deviation].bincount(minlength=len(means))
    return {"quality": float(counts.sum() / len(x)), "covered": int((counts > 0).sum()), "modes": len(means),
            "counts": counts.tolist(), "n": len(x)}
