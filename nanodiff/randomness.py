"""Random numbers that depend on their address alone: (seed, step, sample) and never on batch, workers or ranks.

A counter-based generator: every number is a hash of where it is used, so there is no state to save or to share.
Two processes with half the batch each draw what one process with the whole batch draws, on the CPU as on a GPU.
"""

import math

import torch

# The mixing constants of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"),
# written as signed 64-bit integers because torch has no unsigned ones; products wrap around.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def _shift(z, n):
    """Logical right shift; torch's >> on int64 repeats the sign bit."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def mix(z):
    """A bijective scramble of int64 tensors in which every output bit depends on every input bit."""
    z = z + _GOLDEN
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    return z ^ _shift(z, 31)


def _keys(seed, step, sample, n):
    """int64 [B, n]: one 64-bit hash for each of n numbers of each sample; `sample` is int64 [B]."""
    start = mix(torch.tensor([seed, step], dtype=torch.int64))
    key = mix(mix(start[0] ^ mix(start[1])).to(sample.device) + sample)  # [B]
    return mix(key[:, None] + torch.arange(1, n + 1, device=sample.device) * _GOLDEN)


def uniform(seed, step, sample, n=1):
    """float64 [B, n] in [0, 1): the same for sample i whatever stands beside it. `sample` is int64 [B]."""
    return _shift(_keys(seed, step, sample, n), 11).double() * 2.0**-53


def normal(seed, step, sample, shape):
    """float32 [B, *shape] standard normal numbers (Box-Muller), reproducible for each sample by itself."""
    n = math.prod(shape)
    u = uniform(seed, step, sample, 2 * ((n + 1) // 2))
    radius = (-2 * torch.log1p(-u[:, 0::2])).sqrt()
    angle = 2 * math.pi * u[:, 1::2]
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], 2)  # [B, n/2, 2]
    return z.flatten(1)[:, :n].float().view(-1, *shape)
