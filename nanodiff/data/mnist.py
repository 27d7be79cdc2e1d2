"""MNIST, or any data set in its four IDX files (LeCun, Cortes & Burges), plain or gzipped. Report: section 1."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from nanodiff.data.images import Images, convert
from nanodiff.errors import UserError

STEMS = {"train": "train", "test": "t10k"}


def load(root, split="train", size=None, channels=None, flip=None, seed=0):
    """The digits in a folder's IDX files -> images.Images, uint8 [N,1,28,28] unless `size` or `channels` ask otherwise.

    Labels are 0..9. UserError when a file is missing or cut short, or when images and labels do not match.
    """
    if split not in STEMS:
        raise UserError(f"mnist has no split '{split}': give train or test")
    pixels = read_idx(_find(root, f"{STEMS[split]}-images", "idx3-ubyte"), dimensions=3)  # [N,28,28]
    labels = read_idx(_find(root, f"{STEMS[split]}-labels", "idx1-ubyte"), dimensions=1)  # [N]
    if len(pixels) != len(labels):
        raise UserError(f"{root} holds {len(pixels)} {split} images but {len(labels)} labels: the files do not match")
    if len(labels) and labels.max() > 9:
        raise UserError(f"the {split} labels in {root} reach {labels.max()} where 0 to 9 are expected")
    pixels = convert(torch.from_numpy(pixels)[:, None], size, channels)
    return Images(pixels, torch.from_numpy(labels).long(), [str(d) for d in range(10)], flip=flip or False, seed=seed)


def read_idx(path, dimensions):
    """The array in an IDX file, uint8 with `dimensions` dimensions. UserError when the file is damaged.

    The header is big-endian: two zero bytes, 8 for unsigned bytes, the number of dimensions, then each size as uint32.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            raw = file.read()
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is cut short or damaged ({error}): copy or download it again") from None
    start = 4 + 4 * dimensions
    if len(raw) < start or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{path} begins with {raw[:4].hex() or 'nothing'}, but an IDX file of {dimensions} dimensions"
                        f" begins with 000008{dimensions:02x}")
    sizes = [int(n) for n in np.frombuffer(raw, ">u4", dimensions, 4)]
    if len(raw) - start != math.prod(sizes):
        raise UserError(f"{path} promises {math.prod(sizes)} bytes ({' x '.join(map(str, sizes))}) but holds"
                        f" {len(raw) - start}: copy or download it again")
    return np.frombuffer(bytearray(raw), np.uint8, offset=start).reshape(sizes)


def _find(root, stem, kind):
    """The path of a file under its official name or the common variant with a dot, gzipped or plain."""
    names = [f"{stem}{mark}{kind}{end}" for mark in "-." for end in (".gz", "")]
    for name in names:
        if (Path(root) / name).is_file():
            return Path(root) / name
    raise UserError(f"{root} has no {names[0]} (or {names[1]}): mnist needs its four IDX files, as in the repository's"
                    " folder data/mnist")
