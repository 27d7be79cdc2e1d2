"""Conversion between pictures as float32 in [-1, 1] and as uint8, the form of files."""

import torch


def from_uint8(pixels):
    """float32 in [-1, 1] from uint8 0..255; both ends are exact."""
    return (pixels / 127.5).sub_(1)


def to_uint8(x):
    """uint8 from floats in [-1, 1]: the nearest level, halves upwards; values outside are clipped."""
    return ((x.float() + 1) * 127.5 + 0.5).floor().clamp(0, 255).to(torch.uint8)
