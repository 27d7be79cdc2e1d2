"""Slices of tomography volumes as training pictures: crops, tiles or resized slices, split without leaks.

Neighbouring slices of a volume are near copies of each other. When some are used for training and their neighbours for
testing, a model that memorises looks good (Yagis et al. 2021, doi 10.1038/s41598-021-01681-w). So whole blocks of
slices are held out along each axis, with an unused gap on either side.

The blocks do not separate the axes: a warp slice crosses the blocks of the thickness and weft slices, so each training
slice of the other axes contains a line of voxels of a test slice. Only two boxes of a volume (`region`, `test_region`)
or whole volumes in train/ and test/ are strictly separate.
"""

import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanodiff.data import images
from nanodiff.data.folder import EXTENSIONS
from nanodiff.errors import UserError, check, nearest
from nanodiff.rng import uniform
from nanodiff.tomography.volumes import (AXES, CAPTIONS, CLASSES, Volume, format_shape, parse_region, state_of,
                                         to_units)

FITS = ("crop", "tile", "resize", "squash")
MEMORY = 512 << 20  # bytes of prepared pictures; larger sets are kept in a temporary file
LEVELS = 32767.5  # half of the uint16 levels of prepared pictures, between -1 and 1


class Group(NamedTuple):
    """The prepared slices of one axis of one volume."""

    volume: Volume
    axis: str
    indices: list  # numbers of the slices along the axis
    size: tuple  # (height, width) of a prepared picture, at least the crop's
    pictures: np.ndarray  # uint16 [n, height, width]
    inside: np.ndarray = None  # bool [n, height, width], if there is a mask


class Slices:
    """A data set (see `nanodiff.data`) of the slices of one or several volumes. Classes are state and axis of a slice.

    volumes    Volumes, or paths of their files
    size       pixels of a picture, one number or (height, width); None: whole slices, which must have one size
    axes       which of AXES
    fit        "crop"    a crop of the slice at full resolution, at another place in each draw
               "tile"    all tiles that fit without overlap, around the centre; each is a picture of its own
               "resize"  the whole slice, shrunk with its proportions until it just covers the picture, then cropped
                         along its longer side at another place in each draw
               "squash"  the whole slice in the picture's proportions
               Slices smaller than the picture are enlarged until they just cover it.
    scale      crops and tiles are cut from slices at `scale` times their own resolution (averaging)
    split      "train" or "test": blocks of slices, see `split_of`; None: all slices
    blocks, share, gap   as in `split_of`
    place      of crops: "random", or "centre", the default of "test"
    channels   1 or 3 (equal ones); flip, seed: as in `images.Images`
    captions   False: none
    covered    least share of a picture inside the mask, if there is one; crops are placed where they reach it, and
               tiles and slices that cannot are left out
    memory     bytes; larger sets are prepared in a temporary file

    Slices are read once, in blocks, and kept as uint16 at the resolution needed. UserError when no picture is left.
    """

    def __init__(self, volumes, size=None, axes=AXES, fit="crop", scale=1.0, split=None, blocks=2, share=0.1, gap=None,
                 place=None, channels=1, flip=False, seed=0, captions=True, covered=0.5, memory=MEMORY):
        check(fit in FITS, f'fit "{fit}" is unknown; expected {", ".join(FITS)}{nearest(fit, FITS)}')
        check(channels in (None, 1, 3), f"channels is {channels}; expected 1 (grey) or 3 (equal colours)")
        check(place in (None, "random", "centre"), f'place is "{place}"; expected random or centre')
        check(0 < scale <= 16 and (scale == 1 or fit in ("crop", "tile")),
              f"scale is {scale} with fit {fit}; expected a number above 0, such as 0.5, for crops or tiles")
        check(axes and set(axes) <= set(AXES), f"axes are {', '.join(axes)}; expected some of {', '.join(AXES)}")
        self.volumes = [volume if isinstance(volume, Volume) else Volume(volume) for volume in volumes]
        check(self.volumes, "there are no volumes; expected one or more")
        self.fit, self.place, self.covered = fit, place or ("centre" if split == "test" else "random"), covered
        self.channels, self.flip, self.seed = channels or 1, flip or False, seed
        sources = [(volume, axis, split_of(volume.counts()[axis], split, blocks, share, gap))
                   for volume in self.volumes for axis in AXES if axis in axes]
        sizes = [volume.sizes()[axis] for volume, axis, _ in sources]
        check(size is not None or len(set(sizes)) == 1, "the slices have the sizes "
              f"{', '.join(sorted(set(map(format_shape, sizes))))}; expected one for all (--size)")
        self.size = images.pair(size) or tuple(max(1, round(side * scale)) for side in sizes[0])
        self.shape = (self.channels, *self.size)
        self._prepare_groups(sources, scale, memory)
        self._list_pictures(captions)

    def __len__(self):
        return len(self.items)

    # --- preparing ---

    def _prepare_groups(self, sources, scale, memory):
        """Sets `groups` and `in_memory`; reads every slice of the sources [(volume, axis, indices)] once, in blocks."""
        sizes = [prepared_size(volume.sizes()[axis], self.size, self.fit, scale) for volume, axis, _ in sources]
        need = 0  # bytes: uint16 pictures, and bool masks
        for (volume, _, indices), size in zip(sources, sizes):
            need += len(indices) * math.prod(size) * (2 if volume.mask is None else 3)
        self.in_memory = need <= memory
        if not self.in_memory:
            free = os.statvfs(tempfile.gettempdir()) if hasattr(os, "statvfs") else None
            check(free is None or free.f_bavail * free.f_frsize > need,
                  f"{tempfile.gettempdir()} has no room for {need / 1e9:.1f} GB of slices of this resolution; expected "
                  "a smaller scale, fewer axes, or TMPDIR set to another place")
            count = sum(len(indices) for _, _, indices in sources)
            warnings.warn(f"{count:,} slices are prepared in a temporary file of {need / 1e9:.1f} GB in "
                          f"{tempfile.gettempdir()}")
        self.groups = []
        for (volume, axis, indices), size in zip(sources, sizes):
            volume.grey  # raises errors of the grey scale before the long work
            pictures = self._prepare_slices(volume, axis, indices, size, volume.to_picture, np.uint16)
            inside = None
            if volume.mask is not None:
                inside = self._prepare_slices(volume.mask, axis, indices, size, mask_picture, bool)
            self.groups.append(Group(volume, axis, indices, size, pictures, inside))
        for volume in self.volumes:
            volume.release()

    def _prepare_slices(self, volume, axis, indices, size, to_picture, dtype):
        """Slices of an axis at a size: [n, *size], uint16 levels or bool, in memory or in a temporary file."""
        file = None if self.in_memory else tempfile.TemporaryFile(prefix="nanodiff-")
        array = np.empty((len(indices), *size), dtype) if file is None else None
        row = 0
        for start, stop in runs(indices):
            for values in volume.slices(axis, start, stop):
                x = images.resize(to_picture(values)[None], *size)[0, 0].numpy()
                x = (x > 0 if dtype is bool else np.floor((x + 1) * LEVELS + 0.5)).astype(dtype)
                if file is None:
                    array[row] = x
                else:
                    file.write(x.data)  # writing into a mapping on a full disk would kill the process
                row += 1
        if file is not None:
            file.flush()
            array = np.memmap(file, dtype, "r", shape=(len(indices), *size))
            file.close()
        return array

    def _list_pictures(self, captions):
        """Sets labels, classes, captions and items int64 [N, 4]: (group, row, top, left); top -1 is a random place."""
        items = []
        for number, group in enumerate(self.groups):
            places = tiles(group.size, self.size) if self.fit == "tile" else [(-1, -1)]
            for row in range(len(group.indices)):
                shares = self._mask_shares(group, row)
                for top, left in places:
                    if shares is None or (shares.max() if top < 0 else shares[top, left]) >= self.covered:
                        items.append((number, row, top, left))
        check(items, f"the mask covers {self.covered:.0%} of no picture of {format_shape(self.size)}; expected a "
              "larger mask, or smaller pictures")
        self.items = torch.tensor(items)
        names = [f"{group.volume.state} {group.axis}" for group in self.groups]
        self.classes = [name for name in CLASSES if name in names]
        group_labels = torch.tensor([self.classes.index(name) for name in names])
        self.labels = group_labels[self.items[:, 0]]
        texts = [group.volume.caption(group.axis) for group in self.groups]
        self.captions = [texts[number] for number, *_ in items] if captions else None

    def _mask_shares(self, group, row):
        """The share of a crop inside the mask, for every place [H-h+1, W-w+1]; None without a mask."""
        if group.inside is None:
            return None
        height, width = self.size
        sums = np.pad(group.inside[row].cumsum(0, np.int64).cumsum(1), ((1, 0), (1, 0)))  # over boxes from (0, 0)
        sums = sums[height:] - sums[:-height]
        return (sums[:, width:] - sums[:, :-width]) / (height * width)

    # --- reading ---

    def read(self, index, draw):
        """float32 [B,C,H,W]: the pictures at `index` int64 [B]; `draw` int64 [B] decides crops and flips."""
        down, right = uniform(self.seed, draw, 2).tolist(), uniform(self.seed, draw, 3).tolist()
        crops = zip(self.items[index].tolist(), down, right)
        x = torch.stack([self._read_picture(*item, d, r) for item, d, r in crops])
        return images.flip_randomly(images.in_channels(x, self.channels), self.flip, self.seed, draw)

    def _read_picture(self, number, row, top, left, down, right):
        """One picture [1, h, w] of an item; down and right in [0, 1) choose the place of a crop."""
        group, (height, width) = self.groups[number], self.size
        if top < 0:
            down, right = (down, right) if self.place == "random" else (0.5, 0.5)
            top, left = int(down * (group.size[0] - height + 1)), int(right * (group.size[1] - width + 1))
            shares = self._mask_shares(group, row)
            if shares is not None and shares[top, left] < self.covered:
                places = np.argwhere(shares >= self.covered)
                nearest_place = np.abs(places - (top, left)).sum(1).argmin()
                top, left = places[int(down * len(places)) if self.place == "random" else nearest_place].tolist()
        x = group.pictures[row, top:top + height, left:left + width]
        return torch.from_numpy(x.astype(np.float32)).div_(LEVELS).sub_(1)[None]

    def source(self, i):
        """(volume's name, axis, number of the slice) of picture i."""
        number, row = self.items[i, :2].tolist()
        group = self.groups[number]
        return group.volume.name, group.axis, group.indices[row]

    def records(self):
        """[`Volume.record`] of the volumes; `write_slices` needs one to write generated slices."""
        return [volume.record() for volume in self.volumes]


def mask_picture(values):
    """float32 [1, h, w] of a mask's values [h, w]: 1 where they are not 0, else -1."""
    return torch.from_numpy((values != 0).astype(np.float32) * 2 - 1)[None]


def prepared_size(slice_size, size, fit, scale):
    """(height, width) at which slices of `slice_size` are kept; at least the picture's `size`."""
    if fit == "squash":
        return size
    cover = max(size[0] / slice_size[0], size[1] / slice_size[1])
    scale = cover if fit == "resize" else max(cover, scale)
    return tuple(max(least, round(side * scale)) for side, least in zip(slice_size, size))


def tiles(slice_size, size):
    """[(top, left)] of all tiles of `size` that fit into a slice without overlap, around its centre."""
    rows, columns = slice_size[0] // size[0], slice_size[1] // size[1]
    top, left = (slice_size[0] - rows * size[0]) // 2, (slice_size[1] - columns * size[1]) // 2
    return [(top + i * size[0], left + j * size[1]) for i in range(rows) for j in range(columns)]


# --- splits ---------------------------------------------------------------------------------------------------------

def split_of(count, split, blocks=2, share=0.1, gap=None):
    """The numbers (list of int) of the "train" or "test" slices of an axis of `count` slices; None: all.

    blocks  evenly spaced runs of neighbouring slices for testing (one run if there are fewer than 100 slices)
    share   of the slices in all these runs
    gap     unused slices on either side of each run: |test - training| > gap; None: a twentieth of the axis, 1 to 16

    No gap is enough where structures are longer, such as yarns along their own axis: see the head of this file.
    UserError when no slice is left for training.
    """
    if split is None:
        return list(range(count))
    check(split in ("train", "test"), f"volumes have no split '{split}'; expected train or test")
    check(0 < share < 1 and blocks >= 1 and (gap or 0) >= 0, f"share is {share}, blocks {blocks} and gap {gap}; "
          "expected a share between 0 and 1, 1 block or more, and a gap of 0 slices or more")
    blocks = min(blocks, count // 50) if count >= 100 else 1
    gap = min(16, max(1, count // 20)) if gap is None else gap
    length = max(1, round(share * count / blocks))
    starts = [round((block + 0.5) * count / blocks - length / 2) for block in range(blocks)]
    test = [i for start in starts for i in range(start, start + length)]
    if split == "test":
        return test
    train = [i for i in range(count) if all(i < start - gap or i >= start + length + gap for start in starts)]
    check(train, f"an axis of {count} slices leaves none for training, with {len(test)} for testing and gaps of {gap}; "
          "expected a smaller share or gap")
    return train


def runs(indices):
    """[(start, stop)] of the runs of consecutive numbers in ascending indices."""
    breaks = [i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1]
    bounds = [0, *breaks, len(indices)]
    return [(indices[first], indices[end - 1] + 1) for first, end in zip(bounds, bounds[1:])]


# --- by name --------------------------------------------------------------------------------------------------------

def volume_files(path, split="train"):
    """Paths of the TIFF volumes at `path`: the file itself, or the files in the folder or its sub-folder of the split.

    [] when the folder holds pictures rather than volumes: a TIFF in it has a single page, or it also holds pictures of
    other formats and some stacks have no state in their name.
    """
    path = Path(path)
    if path.is_file():
        return [path] if path.suffix.lower() in (".tif", ".tiff") else []
    path = next((path / name for name in (split, "train") if (path / name).is_dir()), path)
    files = [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith(".")]
    tiffs = [file for file in files if file.suffix.lower() in (".tif", ".tiff")]
    stacks = []
    for file in tiffs:
        stacks.append(is_stack(file))
        if stacks[-1] is False:
            return []
    try:
        if any(file.suffix.lower() in EXTENSIONS for file in files if file not in tiffs):
            [state_of(file) for file in tiffs]
    except UserError:
        return []
    return tiffs if True in stacks else []


def is_stack(path):
    """True when a TIFF holds several slices, False when it holds one, None when it is broken."""
    import tifffile
    try:
        with tifffile.TiffFile(path) as file:
            return len(file.pages) > 1 or len(file.series[0].shape) > 2 and file.series[0].axes != "YXS"
    except Exception:  # decoders raise all kinds of exceptions
        return None


def load(path, split="train", size=None, captions=CAPTIONS, region=None, test_region=None, **options):
    """The training or test slices of a TIFF volume, or of all volumes in a folder -> Slices.

    Held out are whole volumes when the folder has the sub-folders train/ and test/, a box of each volume with
    `test_region`, else blocks of slices.

    region, test_region   boxes for training and for testing that share no voxel (see `volumes.parse_region`)
    captions              the rule, see `Volume.caption`; None: no captions
    options               of `Volume` (state, voxel, mask, series, value_range) and of `Slices`

    UserError when there is no volume, for another split, or when the boxes overlap.
    """
    names = ("state", "voxel", "mask", "series", "value_range")
    volume_options = {name: options.pop(name) for name in names if name in options}
    state, mask = volume_options.get("state"), volume_options.get("mask")
    files = volume_files(path, split) or ([Path(path)] if state and Path(path).is_dir() else [])
    check(files, f"{path} holds no volumes; expected a multi-page TIFF, or a folder of them")
    check(split in ("train", "test"), f"volumes have no split '{split}'; expected train or test")
    check(mask is None or len(files) == 1, f"{path} holds {len(files)} volumes; expected one when a mask is given")
    has_split_folders = Path(path).is_dir() and all((Path(path) / name).is_dir() for name in ("train", "test"))
    is_test_region = test_region and split == "test"
    rule = CAPTIONS if captions in (None, "auto") else captions
    volumes = []
    for file in files:
        value_range = volume_options.get("value_range")
        if is_test_region and value_range is None:  # the test box gets the grey scale of the training box
            value_range = Volume(file, region=region, **volume_options).grey
        volumes.append(Volume(file, region=test_region if is_test_region else region, captions=rule,
                              **{**volume_options, "value_range": value_range}))
    if test_region:
        for volume in volumes:
            check(are_disjoint(region, test_region, volume), f"the regions {region} and {test_region} share voxels; "
                  "expected two boxes that do not overlap")
    options.setdefault("place", "centre" if split == "test" else "random")
    return Slices(volumes, size, split=None if has_split_folders or test_region else split,
                  captions=captions is not None, **options)


def are_disjoint(region, other, volume):
    """True when two boxes of a volume share no voxel."""
    boxes = (parse_region(box, volume.file_shape, volume.path) for box in (region, other))
    return any(stop1 <= start2 or stop2 <= start1 for (start1, stop1), (start2, stop2) in zip(*boxes))


# --- back to the volume's units -------------------------------------------------------------------------------------

def write_slices(pictures, path, record, voxel=None):
    """Writes slices [B, 1, h, w] (or 3 equal channels) in [-1, 1] as one 16-bit TIFF of B pages, atomically.

    record  the volume whose units are used, see `Volume.record`; the volume itself is not needed
    voxel   micrometres of a pixel, where the pictures have another resolution than the volume

    UserError when the pictures are no finite slices or the name is no .tif.
    """
    import tifffile

    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3) or not torch.isfinite(pictures).all():
        raise UserError(f"pictures are {list(pictures.shape)}; expected slices [B, 1, h, w] of finite numbers")
    if Path(path).suffix.lower() not in (".tif", ".tiff"):
        raise UserError(f"{path} cannot hold slices in the volume's units; expected a name that ends in .tif")
    side = voxel or (record["voxel"] or [None])[-1]
    tags = {"resolution": (1e4 / side, 1e4 / side), "resolutionunit": "CENTIMETER"} if side else {}
    temporary = Path(path).with_name(f".{Path(path).name}.writing")
    try:
        tifffile.imwrite(temporary, to_units(pictures.mean(1), record), photometric="minisblack", **tags)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


