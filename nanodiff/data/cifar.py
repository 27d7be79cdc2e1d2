"""CIFAR-10 (Krizhevsky 2009) from either of its official layouts, python pickles or binary. Report: section 1.

A pickle is a program. `SafePickle` accepts only lists, dictionaries, strings and numpy arrays, and builds the arrays
itself. It never calls a function that the file names.
"""

import pickle
from pathlib import Path

import numpy as np
import torch

from nanodiff.data.download import fetch, unpack
from nanodiff.data.images import Images, convert
from nanodiff.errors import UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}


def load(root, split="train", size=None, channels=None, flip=None, download=False, seed=0):
    """CIFAR-10 in memory -> images.Images, uint8 [N,3,32,32] unless `size` or `channels` ask otherwise, labels 0..9.

    root is the folder that contains cifar-10-batches-py or cifar-10-batches-bin, or is one of them. flip=None flips the
    training pictures only. UserError when files are missing, cut short or hold anything but CIFAR-10.
    """
    if split not in FILES:
        raise UserError(f"cifar10 has no split '{split}': give train or test")
    folder = _find(Path(root))
    if folder is None and download:
        unpack(fetch(URL, Path(root) / Path(URL).name, MD5), Path(root), "cifar-10-batches-py")
        folder = _find(Path(root))
    if folder is None:
        raise UserError(f"{root} has neither cifar-10-batches-py nor cifar-10-batches-bin in it: get one with"
                        " --download, or give a folder of pictures as the data set")
    binary = (folder / "test_batch.bin").is_file()
    batches = [read_binary(folder / f"{name}.bin") if binary else read_pickle(folder / name) for name in FILES[split]]
    pixels = torch.cat([torch.from_numpy(rows).reshape(-1, 3, 32, 32) for rows, _ in batches])
    labels = torch.cat([torch.tensor(labels) for _, labels in batches])
    flip = split == "train" if flip is None else flip
    return Images(convert(pixels, size, channels), labels, CLASSES, flip=flip, seed=seed)


def _find(root):
    """The folder with the batches, root itself or one of its two official sub-folders; None when there is none."""
    for folder in (root / "cifar-10-batches-py", root / "cifar-10-batches-bin", root):
        if (folder / "test_batch").is_file() or (folder / "test_batch.bin").is_file():
            return folder
    return None


def read_binary(path):
    """(uint8 [N,3072], list of N labels) of one binary batch.

    A record is one byte of label and 3072 bytes of picture: its red, green and blue planes.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: CIFAR-10 is not complete")
    raw = path.read_bytes()
    if not raw or len(raw) % 3073:
        raise UserError(f"{path} has {len(raw)} bytes, which is not a whole number of 3073-byte records: get it again")
    records = np.frombuffer(bytearray(raw), np.uint8).reshape(-1, 3073)
    return np.ascontiguousarray(records[:, 1:]), _check_labels(path, records[:, 0].tolist())


def read_pickle(path):
    """(uint8 [N,3072], list of N labels) of one python batch. UserError when the pickle asks for anything else."""
    if not path.is_file():
        raise UserError(f"{path} is missing: CIFAR-10 is not complete")
    try:
        with open(path, "rb") as file:
            batch = SafePickle(file, encoding="bytes").load()
        rows, labels = batch[b"data"].array(), batch[b"labels"]
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except Exception as error:  # a broken pickle raises nearly everything there is
        raise UserError(f"{path} is not a CIFAR-10 batch or is cut short ({type(error).__name__}: {error})") from None
    if rows.shape != (len(labels), 3072):
        raise UserError(f"{path} holds pictures {list(rows.shape)} for {len(labels)} labels: expected [N, 3072] and N")
    return rows, _check_labels(path, labels)


def _check_labels(path, labels):
    """The labels; UserError unless all are whole numbers from 0 to 9."""
    if not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise UserError(f"{path} holds labels that are not whole numbers from 0 to 9")
    return labels


class SafePickle(pickle.Unpickler):
    """Unpickles plain values and uint8 arrays; UserError for every other name in the file."""

    def find_class(self, module, name):
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return lambda kind, shape, code: _Array()
        if (module, name) == ("numpy", "dtype"):
            return _Type
        if (module, name) == ("numpy", "ndarray"):
            return None  # an argument of _reconstruct, which ignores it
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin1")  # how Python 3 writes bytes for Python 2
        raise UserError(f"asks to run '{module}.{name}', which no data file needs; expected lists, strings and arrays")


class _Type:
    """Stands in for numpy.dtype: stores the type code, such as "u1"."""

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        pass  # byte order and alignment, irrelevant for single bytes


class _Array:
    """Stands in for numpy.ndarray: stores (version, shape, type, is Fortran order, bytes) for `array`."""

    def __setstate__(self, state):
        _, self.shape, self.type, self.fortran, self.raw = state

    def array(self):
        """The uint8 array; UserError for another type or order."""
        if self.type.code not in (b"u1", "u1") or self.fortran or not isinstance(self.raw, bytes):
            raise UserError(f"holds numbers of type {self.type.code} where uint8 in rows is expected")
        return np.frombuffer(bytearray(self.raw), np.uint8).reshape(self.shape)
