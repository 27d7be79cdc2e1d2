"""Small TIFF volumes for the tests of this folder."""

import warnings

import numpy as np
import tifffile

from nanodiff.tomography.volumes import Volume

SHAPE = (24, 30, 40)


def numbers(dtype="uint16", shape=SHAPE, seed=0):
    v = np.random.default_rng(seed).integers(0, 256 if np.dtype(dtype).itemsize == 1 else 60000, shape)
    return (v - (128 if dtype == "int8" else 30000 if dtype == "int16" else 0)).astype(dtype)


def write(path, v, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tifffile on (3, H, W)
        tifffile.imwrite(path, v, **options)
    return path


def open_quietly(path, state="dry", **options):
    """The Volume of a file, without the warning that it cannot be mapped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be mapped")
        return Volume(path, state, **options)
