"""Two mixtures of Gaussians in the plane. A scatter plot shows which modes a generator has lost.

    ring    8 modes on the unit circle, deviation 0.01
    grid    25 modes, 5 by 5 from -4 to 4, deviation 0.05

As in Srivastava et al. 2017 (arXiv 1705.07761, section 5.1), with the sizes of Lin et al. 2018 (arXiv 1712.04086).
Points are drawn on demand, so the data set is infinite.
"""

import math

import torch

from nanodiff import rng

NAMED = ("ring", "grid")


class Mixture:
    """A mixture of isotropic Gaussians with equal weights, means [modes, 2] and one standard deviation."""

    def __init__(self, means, deviation):
        self.means, self.deviation, self.shape = means.float(), deviation, (means.shape[1],)

    def points(self, seed, step, position):
        """float32 [B, 2]: random points, a function of (seed, step, position int64 [B])."""
        mode = (rng.uniform(seed, rng.MODE, step, position) * len(self.means)).long()
        noise = rng.normal(seed, step, position, self.shape, stream=rng.POSTERIOR)
        return self.means.to(position.device)[mode] + self.deviation * noise


class Points:
    """Batches of a mixture, with the interface of `batches.Batches`."""

    def __init__(self, mixture, batch, seed=0):
        self.mixture, self.position, self.seed = mixture, torch.arange(batch), seed

    def get(self, step):
        """(points [batch, 2], their indices, their positions in the batch); both int64 [batch] and equal."""
        return self.mixture.points(self.seed, step, self.position), self.position, self.position


def load(name):
    """The Mixture "ring" or "grid"."""
    if name == "ring":
        angle = 2 * math.pi * torch.arange(8) / 8
        return Mixture(torch.stack([angle.cos(), angle.sin()], 1), 0.01)
    coordinates = torch.linspace(-4, 4, 5)
    return Mixture(torch.cartesian_prod(coordinates, coordinates), 0.05)


def scatter(samples, mixture, side=200):
    """A picture [3, side, side] in [-1, 1]: samples [n, 2] as red pixels, a blue ring round every mode, a grey frame.

    The radius of a ring is 3 deviations, at least 3 pixels. Samples outside the picture are left out.
    """
    limit = 1.4 * float(mixture.means.abs().max())
    pixel = 2 * limit / side
    coordinates = (torch.arange(side) + 0.5) * pixel - limit
    y, x = torch.meshgrid(-coordinates, coordinates, indexing="ij")
    distance = torch.cdist(torch.stack([x, y], -1).flatten(0, 1), mixture.means).amin(1).view(side, side)
    on_ring = (distance - max(3 * mixture.deviation, 3 * pixel)).abs() < 0.7 * pixel
    picture = torch.ones(3, side, side)
    picture[:, on_ring] = torch.tensor([0.2, 0.5, 1.0])[:, None]
    samples = samples[(samples.abs() < limit).all(1)]
    column, row = ((samples[:, 0] + limit) / pixel).long(), ((limit - samples[:, 1]) / pixel).long().clamp(max=side - 1)
    picture[:, row, column.clamp(max=side - 1)] = torch.tensor([0.3, -0.9, -0.9])[:, None]
    picture[:, [0, -1]] = picture[:, :, [0, -1]] = 0.5  # frame, which separates pictures on a sheet
    return picture
