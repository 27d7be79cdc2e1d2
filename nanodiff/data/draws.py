"""Random numbers that are a function of (seed, place) alone, so that they never depend on order, batch or threads.

A counter goes through the mixer of splitmix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
generators"); no generator has a state, so nothing has to be saved or kept in step.
"""

import torch


def scramble(*numbers):
    """One well-mixed int64 for each combination of whole numbers (ints or int64 tensors, broadcast together)."""
    mixed = torch.zeros((), dtype=torch.int64)
    for number in numbers:
        if not torch.is_tensor(number):
            number = torch.tensor(_signed(number), dtype=torch.int64)
        mixed = _mix((mixed ^ number) + _signed(0x9E3779B97F4A7C15))
    return mixed


def uniform(*numbers):
    """One float64 in [0, 1) for each combination of whole numbers (ints or int64 tensors, broadcast together)."""
    return (_shift(scramble(*numbers), 11)).double() * 2.0**-53


def _mix(z):
    # int64 products wrap round as the unsigned ones of the paper do
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z, places):
    """Shift right as if z were unsigned: the copies of the sign bit are masked away."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _signed(number):
    number = int(number) & (2**64 - 1)
    return number - 2**64 if number >= 2**63 else number
