"""Tomography volumes of woven composites, slice by slice along three axes (report: section 1, table 1, figures 3-7).

A volume is a multi-page TIFF (BigTIFF, ImageJ stacks and both byte orders too) or a folder with a TIFF or PNG file for
each slice. It is indexed [depth, height, width]: thickness slices v[i] (height x width), warp slices v[:, j] (depth x
width), weft slices v[:, :, k] (depth x height). Uncompressed files are mapped into memory and read on demand. Other
files are decoded page by page, with a warning. `slices.py` turns volumes into training pictures.
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
from nanodiff.tomography.tiff import Voxels, format_shape, open_folder, open_tiff

AXES = ("thickness", "warp", "weft")
STATES = ("dry", "dry-compacted", "injected")
CLASSES = tuple(f"{state} {axis}" for state in STATES for axis in AXES)  # the nine of the report's table 1
CAPTIONS = "sf_{word}"  # the report's rule: a prefix for each word of state and axis (table 1)
PERCENTILES = (0.1, 99.9)  # of the voxels: black and white. A scan's few hot voxels must not set its contrast
BLOCK = 64 << 20  # bytes of a block of warp or weft slices: 8 passes over the report's largest volume
THREADS = min(4, os.cpu_count() or 1)  # that transpose a block
SAMPLE = 64, 4_000_000  # slices and voxels that the grey scale is measured on


class Volume:
    """One scan: its slices, the state of its part, and the conversion between its values and pictures.

    path         a TIFF file, or a folder of single slices in natural order (slice2 before slice10)
    state        one of STATES; None: from the name (see `state_of`)
    voxel        micrometres, one number or (depth, height, width); None: from the file's tags, or unknown
    region       a box "Z0:Z1,Y0:Y1,X0:X1" or three (start, stop); voxels outside it do not exist for this object
    mask         a volume of the same shape (before `region`), not 0 where there is material: a path or an array
    series       number of the series in a file with several, from 0
    value_range  (low, high): the values that become black and white; None: `percentiles` of a sample of the voxels
    captions     the rule of `caption`

    UserError, one sentence, when the file is broken, cut short, in colour or no volume, or the state is unknown.
    """

    def __init__(self, path, state=None, voxel=None, region=None, mask=None, series=None, value_range=None,
                 percentiles=PERCENTILES, captions=CAPTIONS, voxels=None):
        self.name, self.path = Path(path).name or str(path), str(path)
        check(voxels or Path(path).exists(), f"{path} is no file or folder; expected a TIFF volume"
              + nearest_file(str(path)))
        self.state, self.caption_rule, self.percentiles = state or state_of(path), captions, tuple(percentiles)
        check(self.state in STATES, f'state "{state}" is unknown; expected {", ".join(STATES)}{nearest(state, STATES)}')
        self.caption(AXES[0])  # checks the rule
        check(len(percentiles) == 2 and 0 <= percentiles[0] < percentiles[1] <= 100,
              f"percentiles are {percentiles}; expected two from 0 to 100, the lower one first")
        check(value_range is None or value_range[1] > value_range[0],
              f"the value range is {value_range}; expected the second number to be the larger one")
        self._grey = tuple(float(value) for value in value_range) if value_range is not None else None

        voxels = voxels or (open_folder(path) if Path(path).is_dir() else open_tiff(path, series))
        self.file_shape, self.dtype = voxels.shape, voxels.dtype
        self.voxel = voxels.voxel if voxel is None else tuple((np.ones(3) * voxel).tolist())
        check(not self.voxel or all(0 < side < math.inf for side in self.voxel),
              f"the voxel size of {path} is {self.voxel}; expected micrometres above 0")
        self.region = parse_region(region, voxels.shape, self.path)
        self.shape = tuple(stop - start for start, stop in self.region)
        self.mapped, self._box = voxels.array is not None, tuple(slice(*side) for side in self.region)
        self._array = voxels.array[self._box] if self.mapped else None
        self._read_page, self._lock = voxels.read_page, threading.RLock()
        self.mask = None if mask is None else self._open_mask(mask, region)
        if voxels.obstacle:
            size = math.prod(self.shape) * self.dtype.itemsize / 1e6
            warnings.warn(f"{self.path} {voxels.obstacle}, so it cannot be mapped into memory: thickness slices are "
                          f"decoded one by one; for warp or weft slices the volume is unpacked into "
                          f"{tempfile.gettempdir()} ({size:,.0f} MB)")

    def _open_mask(self, mask, region):
        """The Volume of a mask, an array or a path. UserError when it has another shape."""
        if isinstance(mask, np.ndarray):
            mask = Volume("mask", self.state, region=region, voxels=Voxels(mask.shape, mask.dtype, mask))
        else:
            mask = Volume(mask, self.state, region=region)
        check(mask.file_shape == self.file_shape, f"the mask {mask.path} has {format_shape(mask.file_shape)} voxels "
              f"and {self.path} {format_shape(self.file_shape)}; expected the same")
        return mask

    @classmethod
    def of(cls, array, state, voxel=None, name="array", **options):
        """The Volume of an array [depth, height, width] in memory, such as a drawn specimen."""
        array = np.asarray(array)
        check(array.ndim == 3 and array.size and array.dtype.kind in "buif",
              f"{name} is {array.dtype} {list(array.shape)}; expected numbers [depth, height, width]")
        return cls(name, state, voxel, voxels=Voxels(array.shape, array.dtype.newbyteorder("="), array), **options)

    # --- slices ---

    def counts(self):
        """{axis: number of slices}; their sum is the state's row in the report's table 1."""
        return dict(zip(AXES, self.shape))

    def sizes(self):
        """{axis: (height, width)} of its slices in pixels."""
        depth, height, width = self.shape
        return {"thickness": (height, width), "warp": (depth, width), "weft": (depth, height)}

    def slice(self, axis, i):
        """Slice i of an axis: values [h, w] as in the file, in this machine's byte order."""
        along = self._dimension(axis)
        check(0 <= i < self.shape[along], f"{self.path} has no {axis} slice {i}; expected 0 to {self.shape[along] - 1}")
        if along == 0 and self._array is None:
            return self._check_finite(self._decode(i), axis, i)
        index = (slice(None),) * along + (int(i),)
        return self._check_finite(np.array(self._whole()[index], self.dtype, order="C"), axis, i)

    def slices(self, axis, start=0, stop=None, block_bytes=BLOCK):
        """Yields the slices start ... stop-1 of an axis in order, each as from `slice`.

        Warp and weft slices lie across the file and are read in blocks of neighbours. Such a slice is a view of its
        block: copy it to keep it.
        """
        along = self._dimension(axis)
        stop = self.shape[along] if stop is None else stop
        check(0 <= start <= stop <= self.shape[along],
              f"{self.path} has no {axis} slices {start} to {stop}; expected 0 to {self.shape[along]}")
        if along == 0:
            return (yield from (self.slice(axis, i) for i in range(start, stop)))
        array, size = self._whole(), self.sizes()[axis]
        block_bytes //= 4 if along == 1 else 1  # warp slices are whole rows of the file: smaller blocks are enough
        count = max(1, block_bytes // (math.prod(size) * self.dtype.itemsize))  # slices of a block
        count -= count % 64 if count > 64 else 0
        parts = np.array_split(np.arange(self.shape[0]), min(THREADS, self.shape[0]))
        with ThreadPoolExecutor(len(parts)) as pool:  # transposing is bound by the core: two are 1.7 times as fast
            for first in range(start, stop, count):
                block = np.empty((min(count, stop - first), *size), self.dtype)
                list(pool.map(lambda pages: fill_block(array, along, first, block, pages), parts))
                for i, image in enumerate(block, first):
                    yield self._check_finite(image, axis, i)

    def _dimension(self, axis):
        """0, 1 or 2: the dimension of the array along which the slices of an axis are counted."""
        check(axis in AXES, f'axis "{axis}" is unknown; expected {", ".join(AXES)}{nearest(axis, AXES)}')
        return AXES.index(axis)

    def _decode(self, i):
        """Page i of the region [height, width]."""
        i += self.region[0][0]
        try:
            with self._lock:  # one file for all threads
                return np.array(self._read_page(i)[self._box[1:]], self.dtype, order="C")
        except Exception as error:  # decoders raise all kinds of exceptions
            raise UserError(f"slice {i} of {self.path} cannot be decoded: {error!s:.200}") from None

    def _whole(self):
        """The region as an array. A file that cannot be mapped is unpacked once, by pages, into a temporary file."""
        with self._lock:
            if self._array is None:
                with tempfile.TemporaryFile(prefix="nanodiff-") as file:  # deleted with its last user, even on a crash
                    for i in range(self.shape[0]):
                        file.write(self._check_finite(self._decode(i), AXES[0], i).data)
                    file.flush()
                    self._array = np.memmap(file, self.dtype, "r", shape=self.shape)
            return self._array

    def release(self):
        """Deletes an unpacked copy on disk. The next warp or weft slice unpacks the volume again."""
        with self._lock:
            if not self.mapped:
                self._array = None

    def _check_finite(self, array, axis, i):
        """Slice i of an axis, unchanged. UserError, with the place, when a value is not finite."""
        if self.dtype.kind == "f" and not np.isfinite(array).all():
            row, column = np.argwhere(~np.isfinite(array))[0].tolist()
            raise UserError(f"{self.path} holds {array[row, column]} in {axis} slice {i}, row {row}, column {column}; "
                            "expected finite numbers (a region of interest can leave such voxels out)")
        return array

    # --- values and pictures ---

    def caption(self, axis):
        """The caption of a slice, such as "sf_dry sf_compacted sf_warp" by the report's rule.

        A rule with {word} is applied to each word of state and axis. Any other rule is a sentence, such as "a {axis}
        slice of a {state} composite".
        """
        self._dimension(axis)
        rule = self.caption_rule
        rest = re.sub(r"{word}" if "{word}" in rule else "{(state|axis)}", "", rule)
        check(not set(rest) & set("{}"),
              f'the caption rule "{rule}" has unknown fields; expected {{word}}, or {{state}} and {{axis}}')
        words = (*self.state.split("-"), axis) if "{word}" in rule else ("",)
        return " ".join(rule.format(word=word, state=self.state, axis=axis) for word in words)

    @property
    def grey(self):
        """(low, high): the values that become black and white, one scale for the whole volume."""
        self._grey = self._grey or self._measure_grey()
        return self._grey

    def _measure_grey(self):
        """(low, high): the percentiles of a fixed sample, every few voxels of evenly spaced thickness slices."""
        depth, height, width = self.shape
        indices = np.unique(np.linspace(0, depth - 1, min(SAMPLE[0], depth)).round().astype(int)).tolist()
        step = max(1, int((len(indices) * height * width / SAMPLE[1]) ** 0.5))
        # copies, because a view would keep its whole slice in memory
        sample = np.stack([self.slice(AXES[0], i)[::step, ::step].copy() for i in indices]).astype(np.float64)
        if self.mask:
            sample = sample[np.stack([self.mask.slice(AXES[0], i)[::step, ::step].copy() for i in indices]) != 0]
        check(len(sample), f"the mask of {self.path} is empty; expected numbers other than 0 where there is material")
        extremes = [float(sample.min()), float(sample.max())]  # used when the percentiles are equal
        for low, high in np.percentile(sample, self.percentiles).tolist(), extremes:
            if high > low:
                return low, high
        warnings.warn(f"every sampled voxel of {self.path} is {low:g}, so its slices are black")
        return low, low + 1

    def to_picture(self, array):
        """float32 [1, h, w] in [-1, 1]: the picture of values [h, w], clipped to the grey scale."""
        low, high = self.grey
        number = np.float32 if self.dtype.itemsize <= 2 else np.float64  # each holds the values exactly
        x = (np.asarray(array).astype(number) - number(low)) * number(2 / (high - low)) - number(1)
        return torch.from_numpy(np.clip(x, -1, 1).astype(np.float32))[None]

    def to_units(self, picture):
        """The values, in the volume's own units, of a picture in [-1, 1]; see `to_units`."""
        return to_units(picture, self.record())

    def record(self):
        """A dict for JSON with all that `slices.write_slices` needs to write pictures in this volume's units."""
        return {"name": self.name, "state": self.state, "shape": list(self.shape), "dtype": self.dtype.name,
                "low": self.grey[0], "high": self.grey[1], "percentiles": list(self.percentiles),
                "voxel": list(self.voxel) if self.voxel else None, "region": [list(side) for side in self.region]}


def to_units(picture, record):
    """Pictures [..., h, w] in [-1, 1] in the units of a volume, by its `Volume.record`: -1 is its low, 1 its high.

    8-bit volumes become 16-bit numbers; 16-bit ones, longer integers and floats keep their type.
    """
    dtype = np.dtype(record["dtype"])
    x = (picture.detach().cpu().double().numpy().clip(-1, 1) + 1) / 2
    x = record["low"] + x * (record["high"] - record["low"])
    if dtype.kind == "f":
        return x.astype(dtype)
    dtype = np.promote_types(dtype, np.int16 if dtype.kind == "i" else np.uint16)
    return np.clip(np.floor(x + 0.5), np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)


def fill_block(array, along, first, block, pages):
    """Fills block[:, d] for the thickness slices d in `pages`, from array [depth, height, width].

    block[i] is the warp slice (along 1) or weft slice (along 2) number first + i.
    """
    count = len(block)
    page = np.empty((array.shape[1], count + 16), block.dtype)[:, :count]  # rows a power of 2 apart are slow
    for d in pages:
        if along == 1:
            block[:, d] = array[d, first:first + count]
            continue
        page[:] = array[d, :, first:first + count]
        for row, column in product(range(0, len(page), 352), range(0, count, 64)):  # tiles fit the cache
            block[column:column + 64, d, row:row + 352] = page[row:row + 352, column:column + 64].T


# --- states and regions ---------------------------------------------------------------------------------------------

def state_of(path):
    """The state in the name of a file or folder: "compacted" is dry-compacted, else "dry" or "injected".

    Only whole words count ("laundry" has no state). UserError for a name without a state, or with an injected and a
    dry one.
    """
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", Path(path).name).lower()
    name = re.sub(r"(?<![a-z])(not|non|un)[ _-]?(compacted|injected|dry)", " ", name)
    patterns = {"dry-compacted": "(dry)?compacted", "dry": "dry", "injected": "injected"}
    states = [state for state, pattern in patterns.items() if re.search(rf"(?<![a-z]){pattern}(?![a-z])", name)]
    check(states and (states[-1] != "injected" or len(states) == 1), f"the name {path} has "
          f"{'two states' if states else 'no state'}; expected one of {', '.join(STATES)} in it, or the flag --state")
    return states[0]


def parse_region(region, shape, name):
    """((start, stop), ...) along depth, height, width, of "Z0:Z1,Y0:Y1,X0:X1" (ends may be left out) or three pairs.

    UserError when it is no box, or does not lie in the volume `name` of that `shape`.
    """
    sides = region or ":,:,:"
    try:
        if isinstance(sides, str):
            sides = [[int(end) if end.strip() else None for end in side.split(":")] for side in sides.split(",")]
        sides = tuple((int(start or 0), int(length if stop is None else stop))
                      for (start, stop), length in zip(sides, shape, strict=True))
    except (ValueError, TypeError):
        raise UserError(f'the region "{region}" is no box; expected "Z0:Z1,Y0:Y1,X0:X1", as "0:64,:,100:400"') from None
    check(all(0 <= start < stop <= length for (start, stop), length in zip(sides, shape)),
          f"the region {region} does not lie in {name}; expected a box in its {format_shape(shape)} voxels")
    return sides
