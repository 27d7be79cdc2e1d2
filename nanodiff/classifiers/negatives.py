"""Pictures of nothing: training data for "nonsense", the last class of the classifier of the drawn worlds.

A kind is a function (x, generator) -> pictures of x's shape; x [B,3,H,W] in [-1, 1] holds real pictures of mixed
classes. An unfinished model draws noise, clouds, averages and patches of several pictures. A classifier without this
class would have to give each of them a real class. Half of the negatives are grey, or grey alone would mean woven.
"""

import torch
import torch.nn.functional as F

from nanodiff.classifiers.digit_negatives import blur

BLOCK = 200  # pictures of one kind at a time


def make_nonsense(x, generator, kinds=None):
    """Pictures of nothing [B,3,H,W], one for each picture of x [B,3,H,W] in [-1, 1], each of a random kind."""
    kinds = list((kinds or TRAINING_KINDS).values())
    y = []
    for pictures in x.tensor_split(max(1, len(x) // BLOCK)):  # equal blocks: some kinds mix the pictures of one
        kind_index = torch.randint(len(kinds), (len(pictures),), generator=generator)
        block = torch.empty_like(pictures)
        for i, kind in enumerate(kinds):
            if (kind_index == i).any():
                negatives = kind(pictures, generator)[kind_index == i]  # a kind may mix all pictures of the block
                grey = torch.rand(len(negatives), 1, 1, 1, generator=generator) < 0.5
                block[kind_index == i] = torch.where(grey, negatives.mean(1, keepdim=True), negatives)
        y.append(block)
    return torch.cat(y).clamp(-1, 1)


def white_noise(x, generator):
    """Gaussian noise of any strength about any colour: a sampler's first state."""
    return _uniform(x, -0.8, 0.8, generator, 3) + _uniform(x, 0.1, 1.2, generator) * _normal(x, generator)


def uniform_noise(x, generator):
    """Every pixel any colour."""
    return torch.rand(x.shape, generator=generator) * 2 - 1


def blank(x, generator):
    """One colour, or a gradient between two, under very little noise."""
    a, b = _uniform(x, -1, 1, generator, 3), _uniform(x, -1, 1, generator, 3)
    side = torch.linspace(-1, 1, x.shape[-1])
    angle = _uniform(x, 0, 6.3, generator)
    ramp = (side * angle.cos() + side[:, None] * angle.sin()) * _uniform(x, 0, 0.7, generator) + 0.5
    return a + (b - a) * ramp.clamp(0, 1) + _uniform(x, 0, 0.05, generator) * _normal(x, generator)


def clouds(x, generator):
    """Blurred noise, independent in each channel: colours that run into each other without any order."""
    noise = blur(_normal(x, generator), _number(2.0, 7.0, generator))
    noise = noise / noise.std((2, 3), keepdim=True)
    return _uniform(x, -0.5, 0.5, generator, 3) + _uniform(x, 0.2, 0.8, generator) * noise


def noisy(x, generator):
    """A real picture under so much noise that it cannot be read: q(x_t | x_0) near its end."""
    keep = _uniform(x, 0.0, 0.2, generator)
    return keep * x + (1 - keep ** 2).sqrt() * _uniform(x, 0.4, 1, generator) * _normal(x, generator)


def averaged(x, generator):
    """The mean of several pictures: the best estimate of x0 when much noise is left."""
    n = int(torch.randint(4, 12, (1,), generator=generator))
    return sum(x[torch.randperm(len(x), generator=generator)] for _ in range(n)) / n * _number(1.0, 2.0, generator)


def scrambled(x, generator):
    """The mean spectrum of four pictures with random phases: their frequencies without any structure.

    One picture would not be enough: stripes with another phase are stripes.
    """
    modulus = torch.fft.rfft2(x).abs()
    modulus = sum(modulus[torch.randperm(len(x), generator=generator)] for _ in range(4)) / 4
    noise = torch.fft.rfft2(_normal(x, generator))
    return torch.fft.irfft2(modulus * noise / noise.abs().clamp(min=1e-9), s=x.shape[-2:])


def patches(x, generator):
    """Small squares of as many pictures side by side."""
    n = 2 ** int(torch.randint(2, 4, (1,), generator=generator))  # 4 x 4 or 8 x 8 squares
    side = x.shape[-1] // n
    y = x.clone()
    for top in range(0, n * side, side):
        for left in range(0, n * side, side):
            other = x[torch.randperm(len(x), generator=generator)]
            y[:, :, top:top + side, left:left + side] = other[:, :, top:top + side, left:left + side]
    return y


def smeared(x, generator):
    """A texture or a thing blurred until only its colours are left."""
    return blur(x, _number(9.0, 14.0, generator))


# Kinds that training never sees: they test whether the last class means "none of the known classes"

def salt_and_pepper(x, generator):
    """Black and white pixels scattered over one colour."""
    u = torch.rand(len(x), 1, *x.shape[2:], generator=generator)
    share = _uniform(x, 0.1, 0.4, generator)
    return torch.where(u < share, -1.0, torch.where(u > 1 - share, 1.0, _uniform(x, -1, 1, generator, 3)))


def shuffled_pixels(x, generator):
    """The pixels of a real picture in any order: its colours and nothing else."""
    order = torch.rand(len(x), 1, x.shape[2] * x.shape[3], generator=generator).argsort(2)
    return torch.take_along_dim(x.flatten(2), order, dim=2).view_as(x)


def blocks(x, generator):
    """Squares of 4 x 4 pixels of any colour."""
    coarse = torch.rand(len(x), 3, x.shape[2] // 4, x.shape[3] // 4, generator=generator) * 2 - 1
    return F.interpolate(coarse, x.shape[2:], mode="nearest")


TRAINING_KINDS = {kind.__name__: kind for kind in (
    white_noise, uniform_noise, blank, clouds, noisy, averaged, scrambled, patches, smeared)}
HELD_OUT_KINDS = {kind.__name__: kind for kind in (salt_and_pepper, shuffled_pixels, blocks)}


def _uniform(x, low, high, generator, channels=1):
    return torch.empty(len(x), channels, 1, 1).uniform_(low, high, generator=generator)


def _normal(x, generator):
    return torch.randn(x.shape, generator=generator)


def _number(low, high, generator):
    return float(torch.empty(1).uniform_(low, high, generator=generator))
