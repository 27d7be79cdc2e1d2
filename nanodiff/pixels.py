"""Pictures as float32 in [-1, 1] and as the uint8 that files hold."""

import torch


def from_uint8(pixels):
    """0..255 to float32 in [-1, 1]; both ends are exact."""
    return (pixels / 127.5).sub_(1)


def to_uint8(x):
    """[-1, 1] to uint8, to the nearest level (halves go up), values outside cut off."""
    return ((x.float() + 1) * 127.5 + 0.5).floor().clamp(0, 255).to(torch.uint8)
