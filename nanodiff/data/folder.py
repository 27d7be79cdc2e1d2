"""A folder of pictures as a data set: finds and checks the files, reads them with threads, crops. Report: section 1."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from nanodiff.data import caption_files, images
from nanodiff.errors import UserError
from nanodiff.rng import uniform

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".pgm", ".ppm")
SMALL = 128 * 128  # pixels; below, threads wait for Python's lock longer than they decode (measured: 2.4 times slower)


def load(path, split="train", size=None, channels=None, flip=None, seed=0, **options):
    """The pictures in `path`, or in its sub-folder of the split if there is one -> Folder.

    Training pictures are cropped at random places, the others in the centre. UserError when the split does not exist.
    """
    path = Path(path)
    names = {"test": ("test",), "val": ("val", "valid", "validation")}.get(split, (split,))
    folders = [path / name for name in names if (path / name).is_dir()]
    if not folders and split != "train":
        raise UserError(f"{path} has no sub-folder '{names[0]}'; expected one with the {split} pictures")
    options.setdefault("crop", "random" if split == "train" else "centre")
    return Folder(folders[0] if folders else path, size, channels, flip=flip or False, seed=seed, **options)


def find(root):
    """Relative paths of all picture files below a folder, sorted, without hidden ones. UserError when there is none."""
    files = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(parent, name).relative_to(root).as_posix() for name in names
                  if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    if not files:
        raise UserError(f"{root} holds no pictures; expected files that end in {', '.join(EXTENSIONS)}")
    return sorted(files)


class Folder:
    """A data set of picture files, decoded when they are read. `images.load` says which files can be decoded.

    size         pixels of the crop, one number or (height, width); None: all pictures must have one size
    channels     1, 3 or None: 3 when any picture has colour
    captions     their source (see `caption_files.find`), or a list
    crop         "random" (another place in each draw) or "centre"
    resize       True: first scale the picture, at its own aspect ratio, until it just covers the crop;
                 False: crop at full resolution (only pictures smaller than the crop are enlarged)
    flip         False, True (left-right) or "both" (top-bottom too), random in each draw
    background, value_range   as in `images.load`
    files        relative paths to use, instead of all files below root
    check        True: decode every file now, warn of broken ones, list them in `.broken` [(file, reason)] and leave
                 them out; False: a broken file stops the run when it is read
    threads      decoding threads; pictures, crops and flips do not depend on their number. None: one for small
                 pictures, else 8 or the number of cores

    Classes are the sub-folders. UserError when no readable picture is left, or when sizes differ and size is None.
    """

    def __init__(self, root, size=None, channels=None, captions="auto", crop="centre", resize=True, flip=False, seed=0,
                 background=255, value_range=None, files=None, check=True, threads=None):
        if crop not in ("random", "centre"):
            raise UserError(f"crop is {crop!r}; expected 'random' or 'centre'")
        if channels not in (None, 1, 3):
            raise UserError(f"channels is {channels!r}; expected 1 (grey) or 3 (colour)")
        self.root, self.crop, self.resize, self.flip, self.seed = Path(root), crop, resize, flip, seed
        self.in_memory = False
        self.channels, self.background, self.value_range = channels, background, value_range
        files = find(root) if files is None else list(files)
        if not isinstance(captions, (list, tuple)):
            captions = caption_files.find(root, files, captions)
        first = self._probe(files[0])
        if threads is None:
            threads = 1 if first[0] and first[0][1:].numel() < SMALL else min(8, os.cpu_count() or 1)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="pictures") if threads > 1 else None

        probes = [first] + (list(self._map(self._probe, files[1:])) if check else [])
        self.broken = [(file, reason) for file, (_, reason) in zip(files, probes) if reason]
        broken = {file for file, _ in self.broken}
        readable = [i for i, file in enumerate(files) if file not in broken]
        if broken:
            self._warn_of_broken(len(files), len(readable))
        self.files = [files[i] for i in readable]
        self.captions = [captions[i] for i in readable] if captions else None

        shapes = [shape for shape, _ in probes if shape]
        self.channels = channels or max(shape[0] for shape in shapes)
        self.size = images.pair(size)
        if self.size is None and len({shape[1:] for shape in shapes}) > 1:
            other = next(i for i, shape in enumerate(shapes) if shape[1:] != shapes[0][1:])
            (_, h, w), (_, other_h, other_w) = shapes[0], shapes[other]
            raise UserError(f"{root} holds pictures of different sizes ({self.files[0]} is {h} x {w},"
                            f" {self.files[other]} is {other_h} x {other_w}): give --size")
        self.shape = (self.channels, *(self.size or shapes[0][1:]))

        folders = [file.rpartition("/")[0] for file in files]
        self.classes = sorted(set(folders)) if any(folders) else []
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = torch.tensor([numbers[folders[i]] for i in readable]) if self.classes else None

    def __len__(self):
        return len(self.files)

    def read(self, index, draw):
        """float32 [B,C,H,W]: the pictures at `index` int64 [B]; `draw` int64 [B] decides crops and flips."""
        if self.crop == "random":
            down, right = uniform(self.seed, draw, 2).tolist(), uniform(self.seed, draw, 3).tolist()
        else:
            down = right = [0.5] * len(index)
        x = torch.stack(list(self._map(self._read_crop, index.tolist(), down, right)))
        return images.flip_randomly(x, self.flip, self.seed, draw)

    def _map(self, function, *arguments):
        """map(function, *arguments), by the threads if there are any."""
        return self.pool.map(function, *arguments) if self.pool else map(function, *arguments)

    def _read_crop(self, i, down, right):
        """The crop [C,H,W] of picture i; see `cut`."""
        x = images.load(self.root / self.files[i], self.channels, self.background, self.value_range)
        if x.shape[1:] != self.shape[1:] and self.size is None:
            raise UserError(f"{self.root / self.files[i]} is {x.shape[1]} x {x.shape[2]} pixels, the others are"
                            f" {self.shape[1]} x {self.shape[2]}: give --size")
        return cut(x, self.shape[1:], self.resize, down, right)

    def _probe(self, file):
        """(shape, None) of a readable file, (None, reason) of a broken one."""
        try:
            return images.load(self.root / file, self.channels, self.background, self.value_range).shape, None
        except UserError as error:
            return None, str(error).removeprefix(f"{self.root / file} ")

    def _warn_of_broken(self, total, readable):
        """Warns that files are broken and left out; UserError when none of the `total` files is `readable`."""
        reasons = "; ".join(f"{file}: {reason}" for file, reason in self.broken[:5])
        if len(self.broken) > 5:
            reasons += f"; and {len(self.broken) - 5} more"
        sentence = f"{len(self.broken)} of {total} pictures in {self.root} are broken ({reasons})"
        if not readable:
            raise UserError(f"{sentence}, so none is left to train on")
        warnings.warn(f"{sentence} and are left out", stacklevel=3)


def cut(x, size, resize, down, right):
    """A crop [C, *size] of x [C,H,W]; down and right in [0, 1) choose its place, 0.5 the centre.

    resize: as in Folder.
    """
    height, width = size
    scale = max(height / x.shape[1], width / x.shape[2])  # at which the picture just covers the crop
    if resize or scale > 1:
        x = images.resize(x[None], max(height, round(x.shape[1] * scale)), max(width, round(x.shape[2] * scale)))[0]
    top = int(down * (x.shape[1] - height + 1))
    left = int(right * (x.shape[2] - width + 1))
    return x[:, top:top + height, left:left + width]
