"""Random weights and pictures for Inception, the same on every machine: tests need no file of 95 MB."""

import numpy as np
import torch

from nanodiff.metrics.inception import Inception


def weights(seed=0):
    """A state dict with the names and shapes of the published file, num_batches_tracked included.

    Every tensor has a NumPy generator of its own, seeded by its place in the sorted names.
    """
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Inception().state_dict().items()}
    state_dict = {}
    for place, name in enumerate(sorted(shapes)):
        draw = np.random.Generator(np.random.PCG64([seed, place]))
        if name.endswith("running_var"):
            x = draw.uniform(0.5, 1.5, shapes[name])
        elif name.endswith("bn.weight"):
            x = draw.uniform(0.8, 1.2, shapes[name])
        elif len(shapes[name]) == 1:
            x = draw.uniform(-0.1, 0.1, shapes[name])
        else:  # uniform, with the variance 2 / inputs that keeps activations alive through ReLUs
            limit = (6 / np.prod(shapes[name][1:])) ** 0.5
            x = draw.random(shapes[name], np.float32) * np.float32(2 * limit) - np.float32(limit)
        state_dict[name] = torch.from_numpy(np.asarray(x, np.float32))
        if name.endswith("running_var"):
            state_dict[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    return state_dict


def pictures(n, side, seed=0):
    """uint8 [n, 3, side, side]: waves in colour with some noise on them."""
    draw = np.random.Generator(np.random.PCG64([seed, n, side]))
    y, x = np.mgrid[:side, :side] / side
    waves = draw.uniform(-3, 3, (3, n, 3, 1, 1))
    smooth = np.sin(2 * np.pi * (waves[0] * x + waves[1] * y + waves[2]))
    return torch.from_numpy((127.5 + 100 * smooth + draw.uniform(-20, 20, smooth.shape)).astype(np.uint8))
