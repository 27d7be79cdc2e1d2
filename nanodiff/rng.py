"""Random numbers that depend on their address alone: (seed, step, sample) and never on batch, workers or ranks.

A counter-based generator: every number is a hash of its address, so there is no state to save or to share. Two
processes with half the batch each draw the same numbers as one process with the whole batch, on the CPU as on a GPU.
The hash is the mixer of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators").
"""

import math

import torch

# The streams: what a number is drawn for. Numbers of different streams are independent; a number may stand for two uses
# that never meet in one training.
NOISE = 0  # the noise (or the generator's latent) of a training step
OFFSET_NOISE, GENERATOR_LATENT = 1, 1  # one number a channel, added to it; the latent of a GAN's generator update
TIME = 2  # the noising step t
DROPOUT = 3  # whether a caption or a class is left out, for guidance
SAMPLING = 4  # the first state of a sample, and the noise of every sampling step
MODE, PREVIEW = 5, 5  # which Gaussian of a mixture; a GAN's previews
CROP = 5  # the top row of a crop; its left column: CROP + 1
EDITED, MASKED = 5, 6  # the latent of a picture that is edited, and of what its mask leaves
POSTERIOR = 6  # a latent from its posterior; a point about its mode
ENCODING, PENALTY = 7, 7  # the crop and flip of each encoded variant; the place between real and fake, WGAN-GP's
WORDING, REVIVAL = 8, 8  # which of several captions; which vectors take the places of unused codes
CODES = 9  # the codes that a GPT writes
PRIOR_NOISE, PRIOR_TIME, PRIOR_DROPOUT, PRIOR_COPY = 10, 12, 13, 14  # of prior preservation (11: its offset noise)


def scramble(*numbers):
    """One well-mixed int64 for each combination of whole numbers (ints or int64 tensors, broadcast together)."""
    mixed = _hash(numbers)
    return mixed if torch.is_tensor(mixed) else torch.tensor(mixed)


def uniform(*numbers):
    """One float64 in [0, 1) for each combination of whole numbers (ints or int64 tensors, broadcast together)."""
    return _shift(scramble(*numbers), 11).double() * 2.0**-53


def normal(seed, step, sample, shape, stream=NOISE):
    """float32 [B, *shape] standard normal numbers (Box-Muller) for the samples with the indices `sample` int64 [B].

    Another `stream` gives independent numbers, for a second purpose at the same step.
    """
    n = math.prod(shape)
    number = torch.arange(2 * ((n + 1) // 2), device=sample.device)
    u = uniform(seed, stream, step, sample[:, None], number)  # [B, n or n + 1]
    radius = (-2 * torch.log1p(-u[:, 0::2])).sqrt()
    angle = 2 * math.pi * u[:, 1::2]
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], 2)  # [B, n / 2, 2]
    return z.flatten(1)[:, :n].float().view(-1, *shape)


def noise(seed, step, sample, shape, offset=0.0, stream=NOISE):
    """`normal` plus `offset` times one number for each channel, from stream + OFFSET_NOISE (Guttenberg 2023)."""
    plain = normal(seed, step, sample, shape, stream)
    return plain + offset * normal(seed, step, sample, (shape[0], 1, 1), stream + OFFSET_NOISE) if offset else plain


def time_steps(seed, step, sample, T):
    """int64 [B], uniform in 0 ... T-1: the noising step of each sample in a training step."""
    return (uniform(seed, TIME, step, sample) * T).long()


def generator(*numbers):
    """A torch.Generator on the CPU, seeded by whole numbers such as (seed, purpose, step)."""
    return torch.Generator().manual_seed(seed_of(*numbers))


def seed_of(*numbers):
    """A seed in 0 ... 2^63 - 1 for a torch.Generator, from ints: int(scramble(*numbers)) without its sign."""
    return _hash(numbers) & (2**63 - 1)


class StepNoises:
    """The noise of every sampling step, drawn on demand: noises[i] is float32 [B, *shape].

    Picture j's noise depends on (seed, i, index[j]) alone, so a picture is the same in every batch.
    """

    def __init__(self, seed, index, shape):
        self.seed, self.index, self.shape = seed, index, shape

    def __getitem__(self, i):
        return normal(self.seed, i + 1, self.index, self.shape, stream=SAMPLING)


def _hash(numbers):
    """`scramble` in Python integers as long as all numbers are ints: one-element tensors are many times slower."""
    mixed = 0
    for number in numbers:
        mixed = _mix(_wrap((mixed ^ (number if torch.is_tensor(number) else _signed(number))) + GOLDEN))
    return mixed


def _mix(z):
    z = _wrap((z ^ _shift(z, 30)) * FIRST)
    z = _wrap((z ^ _shift(z, 27)) * SECOND)
    return z ^ _shift(z, 31)


def _wrap(z):
    """z modulo 2^64; int64 tensors wrap around by themselves, as the unsigned numbers of the paper do."""
    return z if torch.is_tensor(z) else _signed(z)


def _shift(z, places):
    """z shifted right as if it were unsigned: the copies of the sign bit are masked."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _signed(number):
    """A Python integer modulo 2^64 as the int64 with the same bits."""
    number = int(number) & (2**64 - 1)
    return number - 2**64 if number >= 2**63 else number


GOLDEN, FIRST, SECOND = (_signed(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
