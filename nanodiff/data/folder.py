"""Any folder of pictures as a data set: found, checked, cropped and read by several threads. Report: section 1."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from nanodiff.data import caption_files, images
from nanodiff.errors import UserError
from nanodiff.rng import uniform

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".pgm", ".ppm")
SMALL = 128 * 128  # pixels: below, threads wait for Python's lock longer than they decode (measured: 2.4 times slower)


def load(path, split="train", size=None, channels=None, flip=None, seed=0, **options):
    """The pictures below `path`, or below its sub-folder for the split when it has one.

    Training pictures are cropped at random places, the others in the centre. UserError when the split is not there.
    """
    path = Path(path)
    names = {"test": ("test",), "val": ("val", "valid", "validation")}.get(split, (split,))
    found = [path / name for name in names if (path / name).is_dir()]
    if not found and split != "train":
        raise UserError(f"{path} has no sub-folder '{names[0]}' to take the {split} pictures from")
    options.setdefault("crop", "random" if split == "train" else "centre")
    return Folder(found[0] if found else path, size, channels, flip=flip or False, seed=seed, **options)


def find(root):
    """All picture files below a folder, as sorted relative paths; hidden ones are left out. UserError when none."""
    files = []
    for place, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name).relative_to(root).as_posix() for name in names
                  if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    if not files:
        raise UserError(f"{root} holds no pictures: files that end in {', '.join(EXTENSIONS)} are looked for")
    return sorted(files)


class Folder:
    """Pictures read from files when they are needed; see `images.load` for what a file may hold.

    size         pixels of the crop, one number or (height, width); None: all pictures must have one size
    channels     1, 3 or None: 3 when any picture has colour
    captions     where they come from (see `captions.find`), or a list
    crop         "random" (place drawn for each draw) or "centre"
    resize       True: first scale the picture, at its own aspect ratio, until it just covers the crop;
                 False: cut out of the picture as it is (only those smaller than the crop are enlarged)
    flip         False, True (left-right) or "both" (upside down too), decided for each draw
    background, value_range   as in `images.load`
    files        relative paths to take, instead of all that are found
    check        decode every file now; broken ones are named in a warning, listed in `.broken` [(file, reason)] and
                 left out. False trusts the files, and a broken one stops the run when it is met.
    threads      readers; pictures, crops and flips do not depend on their number. None: one for small pictures, else 8
                 or as many as there are cores

    Classes are the sub-folders. UserError when no readable picture is left or sizes differ and no size is given.
    """

    def __init__(self, root, size=None, channels=None, captions="auto", crop="centre", resize=True, flip=False, seed=0,
                 background=255, value_range=None, files=None, check=True, threads=None):
        if crop not in ("random", "centre"):
            raise UserError(f"crop is {crop!r}, but it must be 'random' or 'centre'")
        if channels not in (None, 1, 3):
            raise UserError(f"channels is {channels!r}, but pictures have 1 (grey) or 3 (colour)")
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
        bad = {file for file, _ in self.broken}
        kept = [i for i, file in enumerate(files) if file not in bad]
        if bad:
            self._report(len(files), kept)
        self.files = [files[i] for i in kept]
        self.captions = [captions[i] for i in kept] if captions else None

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
        place = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([place[folders[i]] for i in kept]) if self.classes else None

    def __len__(self):
        return len(self.files)

    def read(self, index, draw):
        """The pictures of places `index` int64 [B] as float32 [B,C,H,W]; `draw` int64 [B] decides crops and flips."""
        if self.crop == "random":
            down, right = uniform(self.seed, draw, 2).tolist(), uniform(self.seed, draw, 3).tolist()
        else:
            down = right = [0.5] * len(index)
        x = torch.stack(list(self._map(self._one, index.tolist(), down, right)))
        return images.flipped(x, self.flip, self.seed, draw)

    def _map(self, function, *arguments):
        return self.pool.map(function, *arguments) if self.pool else map(function, *arguments)

    def _one(self, i, down, right):
        x = images.load(self.root / self.files[i], self.channels, self.background, self.value_range)
        if x.shape[1:] != self.shape[1:] and self.size is None:
            raise UserError(f"{self.root / self.files[i]} is {x.shape[1]} x {x.shape[2]} pixels where the others are"
                            f" {self.shape[1]} x {self.shape[2]}: give --size")
        return cut(x, self.shape[1:], self.resize, down, right)

    def _probe(self, file):
        """-> (shape, None) of a good file, (None, reason) of a broken one."""
        try:
            return images.load(self.root / file, self.channels, self.background, self.value_range).shape, None
        except UserError as error:
            return None, str(error).removeprefix(f"{self.root / file} ")

    def _report(self, found, kept):
        named = "; ".join(f"{file}: {reason}" for file, reason in self.broken[:5])
        more = f"; and {len(self.broken) - 5} more" if len(self.broken) > 5 else ""
        sentence = f"{len(self.broken)} of {found} pictures in {self.root} are broken ({named}{more})"
        if not kept:
            raise UserError(f"{sentence}, so none is left to train on")
        warnings.warn(f"{sentence} and are left out", stacklevel=3)


def cut(x, size, resize, down, right):
    """A crop of `size` (height, width) from x [C,H,W]; down and right in [0, 1) choose its place, 0.5 the centre."""
    height, width = size
    cover = max(height / x.shape[1], width / x.shape[2])  # the scale at which the picture just covers the crop
    if resize or cover > 1:
        tall, wide = max(height, round(x.shape[1] * cover)), max(width, round(x.shape[2] * cover))
        x = images.resize(x[None], tall, wide)[0]
    top = int(down * (x.shape[1] - height + 1))
    left = int(right * (x.shape[2] - width + 1))
    return x[:, top:top + height, left:left + width]
