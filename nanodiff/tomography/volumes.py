"""Tomography volumes of woven composites, slice by slice along three axes (report: section 1, table 1, figures 3-7).

A volume is a multi-page TIFF (BigTIFF, ImageJ stacks and both byte orders too) or a folder with a TIFF or PNG file for
each slice. It is indexed [depth, height, width]: thickness slices v[i] (height x width), warp slices v[:, j] (depth x
width), weft slices v[:, :, k] (depth x height). Uncompressed files are mapped into memory, and nothing is read before
it is asked for; others are decoded page by page, which is announced. `slices.py` makes training pictures of them.
"""

import math
import os
import re
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import torch

from nanodiff.errors import UserError, check, nearest
from nanodiff.files import nearest_file
from nanodiff.tomography.tiff import Voxels, by, open_folder, open_tiff

AXES = ("thickness", "warp", "weft")
STATES = ("dry", "dry-compacted", "injected")
CLASSES = tuple(f"{state} {axis}" for state in STATES for axis in AXES)  # the nine of the report's table 1
CAPTIONS = "sf_{word}"  # the report's rule: each word of state and axis is marked as one of its own (table 1)
PERCENTILES = (0.1, 99.9)  # of the voxels: black and white. A scan's few hot voxels must not set its contrast
BLOCK = 64 << 20  # bytes of a block of slices that lie across the file: 8 passes over the report's largest volume
THREADS = min(4, os.cpu_count() or 1)  # that turn a block
SAMPLE = 64, 4_000_000  # slices and voxels that the grey scale is measured on


class Volume:
    """One scan: where its slices are, what state the part was in, and how its numbers become pictures.

    path         a TIFF file, or a folder of single slices in natural order (slice2 before slice10)
    state        one of STATES; None: from the name (see `state_of`)
    voxel        micrometres, one number or (depth, height, width); None: from the file's tags, or unknown
    region       a box "Z0:Z1,Y0:Y1,X0:X1" or three (start, stop): all else is as if it were not there
    mask         a volume of the same shape (before `region`), not 0 where there is material: a path or an array
    series       which of a file's several series, counted from 0
    value_range  (low, high): the numbers that become black and white; None: `percentiles` of a sample of the voxels
    captions     the rule of `caption`

    UserError, one sentence, when the file is broken, cut short, in colour or no volume, or no state is known.
    """

    def __init__(self, path, state=None, voxel=None, region=None, mask=None, series=None, value_range=None,
                 percentiles=PERCENTILES, captions=CAPTIONS, voxels=None):
        self.name, self.path = Path(path).name or str(path), str(path)
        check(voxels or Path(path).exists(), f"{path} is no file or folder; expected a TIFF volume"
              + nearest_file(str(path)))
        self.state, self.rule, self.percentiles = state or state_of(path), captions, tuple(percentiles)
        check(self.state in STATES, f'state "{state}" is unknown; expected {", ".join(STATES)}{nearest(state, STATES)}')
        self.caption(AXES[0])
        check(len(percentiles) == 2 and 0 <= percentiles[0] < percentiles[1] <= 100,
              f"percentiles are {percentiles}; expected two from 0 to 100 that rise")
        check(value_range is None or value_range[1] > value_range[0],
              f"the value range is {value_range}; expected the second number to be the larger one")
        self._grey = tuple(float(end) for end in value_range) if value_range is not None else None

        voxels = voxels or (open_folder(path) if Path(path).is_dir() else open_tiff(path, series))
        self.file_shape, self.dtype = voxels.shape, voxels.dtype
        self.voxel = voxels.voxel if voxel is None else tuple((np.ones(3) * voxel).tolist())
        check(not self.voxel or all(0 < side < math.inf for side in self.voxel),
              f"the voxel size of {path} is {self.voxel}; expected micrometres above 0")
        self.region = box(region, voxels.shape, self.path)
        self.shape = tuple(stop - start for start, stop in self.region)
        self.mapped, self._cut = voxels.array is not None, tuple(slice(*side) for side in self.region)
        self._array = voxels.array[self._cut] if self.mapped else None
        self._page, self._lock = voxels.page, threading.RLock()
        self.mask = None
        if mask is not None:
            given = {"voxels": Voxels(mask.shape, mask.dtype, mask)} if isinstance(mask, np.ndarray) else {}
            self.mask = Volume("mask" if given else mask, self.state, region=region, **given)
            check(self.mask.file_shape == self.file_shape, f"the mask {self.mask.path} has {by(self.mask.file_shape)} "
                  f"voxels and {self.path} {by(self.file_shape)}; expected the same")
        if voxels.why:
            size = math.prod(self.shape) * self.dtype.itemsize / 1e6
            warnings.warn(f"{self.path} {voxels.why}, so it cannot be mapped into memory: thickness slices are decoded "
                          f"one by one; for warp or weft slices all is unpacked into {tempfile.gettempdir()} "
                          f"({size:,.0f} MB)")

    @classmethod
    def of(cls, array, state, voxel=None, name="array", **options):
        """An array [depth, height, width] in memory as a Volume, such as a drawn specimen."""
        array = np.asarray(array)
        check(array.ndim == 3 and array.size and array.dtype.kind in "buif",
              f"{name} is {array.dtype} {list(array.shape)}; expected numbers [depth, height, width]")
        return cls(name, state, voxel, voxels=Voxels(array.shape, array.dtype.newbyteorder("="), array), **options)

    # --- slices ---

    def counts(self):
        """{axis: number of slices}: their sum is the state's row in the report's table 1."""
        return dict(zip(AXES, self.shape))

    def sizes(self):
        """{axis: (height, width)} of its slices in pixels."""
        depth, height, width = self.shape
        return {"thickness": (height, width), "warp": (depth, width), "weft": (depth, height)}

    def slice(self, axis, i):
        """Slice i of an axis: numbers [h, w] as the file has them, in this machine's byte order."""
        along = self._along(axis)
        check(0 <= i < self.shape[along], f"{self.path} has no {axis} slice {i}; expected 0 to {self.shape[along] - 1}")
        if along == 0 and self._array is None:
            return self._finite(self._read(i), axis, i)
        where = (slice(None),) * along + (int(i),)
        return self._finite(np.array(self._whole()[where], self.dtype, order="C"), axis, i)

    def slices(self, axis, start=0, stop=None, block_bytes=BLOCK):
        """Slices start ... stop-1 of an axis in order, as `slice` gives them. Warp and weft slices lie across the file
        and are read as blocks of neighbours: a slice is a view on its block, so copy what is to be kept."""
        along = self._along(axis)
        stop = self.shape[along] if stop is None else stop
        check(0 <= start <= stop <= self.shape[along],
              f"{self.path} has no {axis} slices {start} to {stop}; expected 0 to {self.shape[along]}")
        if along == 0:
            return (yield from (self.slice(axis, i) for i in range(start, stop)))
        array, size = self._whole(), self.sizes()[axis]
        block_bytes //= 4 if along == 1 else 1  # warp slices come in whole rows of the file: little is enough
        many = max(1, block_bytes // (math.prod(size) * self.dtype.itemsize))
        many -= many % 64 if many > 64 else 0
        parts = np.array_split(np.arange(self.shape[0]), min(THREADS, self.shape[0]))
        with ThreadPoolExecutor(len(parts)) as pool:  # turning is bound by one core: two are 1.7 times as fast (measured)
            for first in range(start, stop, many):
                block = np.empty((min(many, stop - first), *size), self.dtype)
                list(pool.map(lambda pages: turn(array, along, first, block, pages), parts))
                for i, one in enumerate(block, first):
                    yield self._finite(one, axis, i)

    def _along(self, axis):
        check(axis in AXES, f'axis "{axis}" is unknown; expected {", ".join(AXES)}{nearest(axis, AXES)}')
        return AXES.index(axis)

    def _read(self, i):
        """Page i of the region, decoded."""
        i += self.region[0][0]
        try:
            with self._lock:  # one file for all threads
                return np.array(self._page(i)[self._cut[1:]], self.dtype, order="C")
        except Exception as error:  # decoders raise nearly everything there is
            raise UserError(f"slice {i} of {self.path} cannot be decoded: {error!s:.200}") from None

    def _whole(self):
        """The region as an array; what cannot be mapped is unpacked once, page by page, into a file without a name."""
        with self._lock:
            if self._array is None:
                with tempfile.TemporaryFile(prefix="nanodiff-") as file:  # gone with its last user, even after a crash
                    for i in range(self.shape[0]):
                        file.write(self._finite(self._read(i), AXES[0], i).data)
                    file.flush()
                    self._array = np.memmap(file, self.dtype, "r", shape=self.shape)
            return self._array

    def release(self):
        """Lets go of an unpacked copy on disk; asked for another warp or weft slice, the volume unpacks itself anew."""
        with self._lock:
            if not self.mapped:
                self._array = None

    def _finite(self, array, axis, i):
        if self.dtype.kind == "f" and not np.isfinite(array).all():
            row, column = np.argwhere(~np.isfinite(array))[0].tolist()
            raise UserError(f"{self.path} holds {array[row, column]} in {axis} slice {i}, row {row}, column {column}; "
                            "expected finite numbers (a region of interest can leave such voxels out)")
        return array

    # --- numbers and pictures ---

    def caption(self, axis):
        """The words for a slice: 'sf_dry sf_compacted sf_warp' by the report's rule. A rule with {word} is applied to
        each word of state and axis; any other is a sentence such as "a {axis} slice of a {state} composite"."""
        self._along(axis)
        rest = re.sub(r"{word}" if "{word}" in self.rule else "{(state|axis)}", "", self.rule)
        check(not set(rest) & set("{}"), f'the caption rule "{self.rule}" has other fields than word or state and axis')
        words = (*self.state.split("-"), axis) if "{word}" in self.rule else ("",)
        return " ".join(self.rule.format(word=word, state=self.state, axis=axis) for word in words)

    @property
    def grey(self):
        """(low, high): the numbers that become black and white, one scale for the whole volume."""
        self._grey = self._grey or self._measured()
        return self._grey

    def _measured(self):
        """The percentiles over evenly spaced thickness slices, thinned out: the same ones every time."""
        some = np.unique(np.linspace(0, self.shape[0] - 1, min(SAMPLE[0], self.shape[0])).round().astype(int)).tolist()
        step = max(1, int((len(some) * self.shape[1] * self.shape[2] / SAMPLE[1]) ** 0.5))
        # copies, as a thinned view would keep its whole slice in memory
        sample = np.stack([self.slice(AXES[0], i)[::step, ::step].copy() for i in some]).astype(np.float64)
        if self.mask:
            sample = sample[np.stack([self.mask.slice(AXES[0], i)[::step, ::step].copy() for i in some]) != 0]
        check(len(sample), f"the mask of {self.path} is empty; expected numbers other than 0 where there is material")
        for low, high in np.percentile(sample, self.percentiles).tolist(), [float(sample.min()), float(sample.max())]:
            if high > low:  # else nearly all of it is one number
                return low, high
        warnings.warn(f"every voxel looked at in {self.path} is {low:g}, so its slices are black")
        return low, low + 1

    def to_picture(self, array):
        """Numbers [h, w] as a picture: float32 [1, h, w] in [-1, 1], cut off outside the grey scale."""
        low, high = self.grey
        exact = np.float32 if self.dtype.itemsize <= 2 else np.float64
        x = (np.asarray(array).astype(exact) - exact(low)) * exact(2 / (high - low)) - exact(1)
        return torch.from_numpy(np.clip(x, -1, 1).astype(np.float32))[None]

    def to_units(self, picture):
        """A picture in [-1, 1] as numbers in the volume's own units, see `to_units`."""
        return to_units(picture, self.record())

    def record(self):
        """All that generated slices need to be written back in this volume's units, as a dict for JSON."""
        return {"name": self.name, "state": self.state, "shape": list(self.shape), "dtype": self.dtype.name,
                "low": self.grey[0], "high": self.grey[1], "percentiles": list(self.percentiles),
                "voxel": list(self.voxel) if self.voxel else None, "region": [list(side) for side in self.region]}


def to_units(picture, record):
    """Pictures [..., h, w] in [-1, 1] in the units of the volume of a `Volume.record`: -1 is its low, 1 its high.

    8-bit volumes too become 16-bit numbers; 16-bit ones, longer integers and floats keep their type.
    """
    kind = np.dtype(record["dtype"])
    x = (picture.detach().cpu().double().numpy().clip(-1, 1) + 1) / 2
    x = record["low"] + x * (record["high"] - record["low"])
    if kind.kind == "f":
        return x.astype(kind)
    kind = np.promote_types(kind, np.int16 if kind.kind == "i" else np.uint16)
    return np.clip(np.floor(x + 0.5), np.iinfo(kind).min, np.iinfo(kind).max).astype(kind)


def turn(array, along, first, block, pages):
    """Fills block[:, d] for the thickness slices d in `pages` of array [depth, height, width]: warp slices first, first + 1,
    ... (along 1) or weft slices (along 2)."""
    page = np.empty((array.shape[1], len(block) + 16), block.dtype)[:, :len(block)]  # rows a power of 2 apart are slow
    for d in pages:
        if along == 1:
            block[:, d] = array[d, first:first + len(block)]
            continue
        page[:] = array[d, :, first:first + len(block)]
        for r, c in product(range(0, len(page), 352), range(0, len(block), 64)):  # pieces fit the cache
            block[c:c + 64, d, r:r + 352] = page[r:r + 352, c:c + 64].T


# --- names and boxes ------------------------------------------------------------------------------------------------

def state_of(path):
    """The state that a file's or folder's name tells: 'compacted' is dry-compacted, else 'dry', 'injected', as words of
    their own ('laundry' is none). UserError when it names none, or both an injected part and a dry one."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", Path(path).name).lower()
    name = re.sub(r"(?<![a-z])(not|non|un)[ _-]?(compacted|injected|dry)", " ", name)
    found = [state for state, words in (("dry-compacted", "(dry)?compacted"), ("dry", "dry"), ("injected", "injected"))
             if re.search(rf"(?<![a-z]){words}(?![a-z])", name)]
    check(found and (found[-1] != "injected" or len(found) == 1), f"the name {path} tells "
          f"{'two states' if found else 'no state'}; expected one of {', '.join(STATES)} in it, or given as the state (--state)")
    return found[0]


def box(region, shape, name):
    """((start, stop), ...) along depth, height, width of "Z0:Z1,Y0:Y1,X0:X1" (ends may be left out) or three pairs."""
    sides = region or ":,:,:"
    try:
        if isinstance(sides, str):
            sides = [[int(end) if end.strip() else None for end in side.split(":")] for side in sides.split(",")]
        sides = tuple((int(a or 0), int(n if b is None else b)) for (a, b), n in zip(sides, shape, strict=True))
    except (ValueError, TypeError):
        raise UserError(f'the region "{region}" is no box; expected "Z0:Z1,Y0:Y1,X0:X1", as "0:64,:,100:400"') from None
    check(all(0 <= a < b <= n for (a, b), n in zip(sides, shape)),
          f"the region {region} does not lie in {name}; expected a box in its {by(shape)} voxels")
    return sides
