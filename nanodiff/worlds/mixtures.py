"""Two mixtures of Gaussians in the plane, where one sees at a glance which modes a generator has lost.

    ring    8 modes on the unit circle, deviation 0.01
    grid    25 modes, 5 by 5 from -4 to 4, deviation 0.05
As in Srivastava et al. 2017 (arXiv 1705.07761, section 5.1), with the sizes of Lin et al. 2018 (arXiv 1712.04086).
Points are drawn as they are asked for: there is no end to them.
"""

import math

import torch

from nanodiff import rng

NAMED = ("ring", "grid")


class Mixture:
    """Equal shares of round Gaussians with means [modes, 2] and one deviation."""

    def __init__(self, means, deviation):
        self.means, self.deviation, self.shape = means.float(), deviation, (means.shape[1],)

    def points(self, seed, step, position):
        """float32 [B, 2]: points that follow from (seed, step, each one's position int64 [B]) alone."""
        which = (rng.uniform(seed, rng.MODE, step, position) * len(self.means)).long()
        noise = rng.normal(seed, step, position, self.shape, stream=rng.POSTERIOR)
        return self.means.to(position.device)[which] + self.deviation * noise


class Points:
    """Batches of a mixture, asked for as `batches.Batches` is."""

    def __init__(self, mixture, batch, seed=0):
        self.mixture, self.position, self.seed = mixture, torch.arange(batch), seed

    def get(self, step):
        """-> points [batch, 2], their names, their places in the batch."""
        return self.mixture.points(self.seed, step, self.position), self.position, self.position


def load(name):
    """The mixture "ring" or "grid"."""
    if name == "ring":
        angle = 2 * math.pi * torch.arange(8) / 8
        return Mixture(torch.stack([angle.cos(), angle.sin()], 1), 0.01)
    place = torch.linspace(-4, 4, 5)
    return Mixture(torch.cartesian_prod(place, place), 0.05)


def scatter(samples, mixture, side=200):
    """A picture [3, side, side] in [-1, 1]: samples [n, 2] as red pixels, a blue ring about every mode, a grey frame.

    The ring has a radius of 3 deviations, or of 3 pixels where that is more; samples outside the picture are left out.
    """
    limit = 1.4 * float(mixture.means.abs().max())
    pixel = 2 * limit / side
    place = (torch.arange(side) + 0.5) * pixel - limit
    y, x = torch.meshgrid(-place, place, indexing="ij")
    distance = torch.cdist(torch.stack([x, y], -1).flatten(0, 1), mixture.means).amin(1).view(side, side)
    around = (distance - max(3 * mixture.deviation, 3 * pixel)).abs() < 0.7 * pixel
    picture = torch.ones(3, side, side)
    picture[:, around] = torch.tensor([0.2, 0.5, 1.0])[:, None]
    samples = samples[(samples.abs() < limit).all(1)]
    column, row = ((samples[:, 0] + limit) / pixel).long(), ((limit - samples[:, 1]) / pixel).long().clamp(max=side - 1)
    picture[:, row, column.clamp(max=side - 1)] = torch.tensor([0.3, -0.9, -0.9])[:, None]
    picture[:, [0, -1]] = picture[:, :, [0, -1]] = 0.5  # a frame: several stand side by side
    return picture
