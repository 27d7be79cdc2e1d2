"""Slices of tomography volumes as training pictures: crops, tiles or resized slices, split without leaks, written back.

Neighbouring slices of a volume are near copies of each other: with some for training and their neighbours for testing,
a model that learns by heart looks good (Yagis et al. 2021, doi 10.1038/s41598-021-01681-w). So whole blocks of slices
are held out along each axis, with a gap that is used for neither. What this cannot do: a warp slice still crosses the
blocks of the thickness and weft slices, so the voxels of a test slice are met again, a line in each training slice of
the other axes. Strictly apart are only two boxes of a volume (`region`, `test_region`), or whole volumes in train/ and
test/.
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
from nanodiff.tomography.volumes import AXES, CAPTIONS, CLASSES, Volume, box, by, state_of, to_units

FITS = ("crop", "tile", "resize", "squash")
MEMORY = 512 << 20  # bytes of prepared pictures; more go into a temporary file
LEVELS = 32767.5  # prepared pictures are uint16: half of the levels between -1 and 1


class Group(NamedTuple):
    """The prepared slices of one axis of one volume."""

    volume: Volume
    axis: str
    indices: list  # which of the axis' slices
    size: tuple  # of a prepared picture, at least the crop's
    pictures: np.ndarray  # uint16 [n, height, width]
    inside: np.ndarray = None  # bool [n, height, width], where there is a mask


class Slices:
    """Slices of one or several volumes as a data set (see `nanodiff.data`); classes are the state and axis of a slice.

    volumes    Volumes, or paths of their files
    size       pixels of a picture, one number or (height, width); None: slices as they are, all of one size
    axes       which of AXES
    fit        "crop"    a piece of the slice at its own resolution; the place is drawn anew for each draw
               "tile"    as many pieces beside each other as fit, around the centre; each is a picture of its own
               "resize"  the whole slice, made smaller (averaging) until it just covers the picture, its proportions
                         kept; what sticks out of the longer side is cut off, at a place drawn for each draw
               "squash"  the whole slice in the picture's proportions
               Slices smaller than the picture are enlarged until they just cover it.
    scale      crops and tiles are cut out of slices at `scale` times their own resolution (averaging)
    split      "train" or "test": blocks of slices, see `split_of`; None: all slices
    blocks, share, gap   as in `split_of`
    place      of crops: "random", or "centre", the default of "test"
    channels   1 or 3 (equal ones); flip, seed: as in `images.Images`
    captions   False: none
    covered    with a mask: crops, tiles and slices of which a smaller share is inside are left out, as are slices that
               have no place for such a crop
    memory     bytes; larger sets are prepared in a temporary file

    Slices are read once, in blocks, and kept as uint16 at the resolution needed. UserError when nothing is left.
    """

    def __init__(self, volumes, size=None, axes=AXES, fit="crop", scale=1.0, split=None, blocks=2, share=0.1, gap=None,
                 place=None, channels=1, flip=False, seed=0, captions=True, covered=0.5, memory=MEMORY):
        check(fit in FITS, f'fit "{fit}" is unknown; expected {", ".join(FITS)}{nearest(fit, FITS)}')
        check(channels in (None, 1, 3), f"channels is {channels}; expected 1 (grey) or 3 (equal colours)")
        check(place in (None, "random", "centre"), f'place is "{place}"; expected random or centre')
        check(0 < scale <= 16 and (scale == 1 or fit in ("crop", "tile")),
              f"scale is {scale} with fit {fit}; expected a number above 0, such as 0.5, for crops or tiles")
        check(axes and set(axes) <= set(AXES), f"axes are {', '.join(axes)}; expected some of {', '.join(AXES)}")
        self.volumes = [one if isinstance(one, Volume) else Volume(one) for one in volumes]
        check(self.volumes, "there are no volumes; expected one or more")
        self.fit, self.place, self.covered = fit, place or ("centre" if split == "test" else "random"), covered
        self.channels, self.flip, self.seed = channels or 1, flip, seed
        todo = [(volume, axis, split_of(volume.counts()[axis], split, blocks, share, gap))
                for volume in self.volumes for axis in AXES if axis in axes]
        sizes = {by(volume.sizes()[axis]) for volume, axis, _ in todo}
        check(size is not None or len(sizes) == 1,
              f"the slices have the sizes {', '.join(sorted(sizes))}; expected one for all (--size)")
        self.size = images.pair(size) or tuple(max(1, round(n * scale)) for n in todo[0][0].sizes()[todo[0][1]])
        self.shape = (self.channels, *self.size)
        self._prepare(todo, scale, memory)
        self._list(captions)

    def __len__(self):
        return len(self.items)

    # --- preparing ---

    def _prepare(self, todo, scale, memory):
        """Reads every slice once, block by block, into one array for each group."""
        sizes = [prepared_size(volume.sizes()[axis], self.size, self.fit, scale) for volume, axis, _ in todo]
        many = [len(indices) * math.prod(size) for (*_, indices), size in zip(todo, sizes)]
        masked = [volume.mask is not None for volume, *_ in todo]
        need = 2 * sum(many) + sum(n for n, has in zip(many, masked) if has)
        self.in_memory = need <= memory
        if not self.in_memory:
            free = os.statvfs(tempfile.gettempdir()) if hasattr(os, "statvfs") else None
            check(free is None or free.f_bavail * free.f_frsize > need,
                  f"{tempfile.gettempdir()} has no room for {need / 1e9:.1f} GB of slices of this resolution; expected "
                  "a smaller scale, fewer axes, or TMPDIR set to another place")
            warnings.warn(f"{sum(len(one[2]) for one in todo):,} slices are prepared in a temporary file of "
                          f"{need / 1e9:.1f} GB in {tempfile.gettempdir()}")
        self.groups = []
        for (volume, axis, indices), size, has in zip(todo, sizes, masked):
            volume.grey  # measured before anything long begins
            pictures = self._filled(volume, axis, indices, size, volume.to_picture, np.uint16)
            inside = None
            if has:
                mask = lambda a: torch.from_numpy((a != 0).astype(np.float32) * 2 - 1)[None]  # noqa: E731
                inside = self._filled(volume.mask, axis, indices, size, mask, bool)
            self.groups.append(Group(volume, axis, indices, size, pictures, inside))
        for volume in self.volumes:
            volume.release()

    def _filled(self, volume, axis, indices, size, to_picture, kind):
        """Slices of an axis at a size: [n, *size] as uint16 levels or bool, in memory or a file without a name."""
        file = None if self.in_memory else tempfile.TemporaryFile(prefix="nanodiff-")
        array = np.empty((len(indices), *size), kind) if file is None else None
        row = 0
        for start, stop in runs(indices):
            for one in volume.slices(axis, start, stop):
                x = images.resize(to_picture(one)[None], *size)[0, 0].numpy()
                x = (x > 0 if kind is bool else np.floor((x + 1) * LEVELS + 0.5)).astype(kind)
                if file is None:
                    array[row] = x
                else:
                    file.write(x.data)  # and not into a mapping, where a full disk would end the process
                row += 1
        if file is not None:
            file.flush()
            array = np.memmap(file, kind, "r", shape=(len(indices), *size))
            file.close()
        return array

    def _list(self, captions):
        """The pictures: items int64 [N, 4] of (group, row, top, left), where top is -1 for a place to be drawn."""
        items = []
        height, width = self.size
        for number, group in enumerate(self.groups):
            places = tiles(group.size, self.size) if self.fit == "tile" else [(-1, -1)]
            for row in range(len(group.indices)):
                shares = self._shares(group, row)
                for top, left in places:
                    if shares is None or (shares.max() if top < 0 else shares[top, left]) >= self.covered:
                        items.append((number, row, top, left))
        check(items, f"the mask covers {self.covered:.0%} of no picture of {by(self.size)}; expected a larger one, or "
              "smaller pictures")
        self.items = torch.tensor(items)
        names = [f"{group.volume.state} {group.axis}" for group in self.groups]
        self.classes = [name for name in CLASSES if name in names]
        place = torch.tensor([self.classes.index(name) for name in names])
        self.labels = place[self.items[:, 0]]
        said = [group.volume.caption(group.axis) for group in self.groups]
        self.captions = [said[number] for number, *_ in items] if captions else None

    def _shares(self, group, row):
        """Which share of a crop lies inside the mask, for every place [H-h+1, W-w+1]; None without a mask."""
        if group.inside is None:
            return None
        height, width = self.size
        table = np.pad(group.inside[row].cumsum(0, np.int64).cumsum(1), ((1, 0), (1, 0)))  # sums over boxes from 0, 0
        table = table[height:] - table[:-height]
        return (table[:, width:] - table[:, :-width]) / (height * width)

    # --- reading ---

    def read(self, index, draw):
        """The pictures of places `index` int64 [B] as float32 [B,C,H,W]; `draw` int64 [B] decides crops and flips."""
        down, right = uniform(self.seed, draw, 2).tolist(), uniform(self.seed, draw, 3).tolist()
        x = torch.stack([self._one(*item, d, r) for item, d, r in zip(self.items[index].tolist(), down, right)])
        return images.flipped(images.in_channels(x, self.channels), self.flip, self.seed, draw)

    def _one(self, number, row, top, left, down, right):
        """A picture [1, h, w]; down and right in [0, 1) choose the place of a crop."""
        group, (height, width) = self.groups[number], self.size
        if top < 0:
            down, right = (down, right) if self.place == "random" else (0.5, 0.5)
            top, left = int(down * (group.size[0] - height + 1)), int(right * (group.size[1] - width + 1))
            shares = self._shares(group, row)
            if shares is not None and shares[top, left] < self.covered:
                allowed = np.argwhere(shares >= self.covered)
                if self.place == "random":
                    top, left = allowed[int(down * len(allowed))].tolist()
                else:
                    top, left = allowed[np.abs(allowed - (top, left)).sum(1).argmin()].tolist()
        x = group.pictures[row, top:top + height, left:left + width]
        return torch.from_numpy(x.astype(np.float32)).div_(LEVELS).sub_(1)[None]

    def source(self, i):
        """(volume's name, axis, slice) of picture i."""
        number, row = self.items[i, :2].tolist()
        group = self.groups[number]
        return group.volume.name, group.axis, group.indices[row]

    def records(self):
        """`Volume.record` of every volume, for the run's files: generated slices are written back with them."""
        return [volume.record() for volume in self.volumes]


def prepared_size(own, size, fit, scale):
    """(height, width) at which slices of the size `own` are kept: never less than the picture's `size`."""
    if fit == "squash":
        return size
    cover = max(size[0] / own[0], size[1] / own[1])
    scale = cover if fit == "resize" else max(cover, scale)
    return tuple(max(least, round(n * scale)) for n, least in zip(own, size))


def tiles(whole, size):
    """[(top, left)] of as many tiles as fit beside each other in a slice, around its centre; none overlap."""
    rows, columns = whole[0] // size[0], whole[1] // size[1]
    top, left = (whole[0] - rows * size[0]) // 2, (whole[1] - columns * size[1]) // 2
    return [(top + i * size[0], left + j * size[1]) for i in range(rows) for j in range(columns)]


# --- splits ---------------------------------------------------------------------------------------------------------

def split_of(count, split, blocks=2, share=0.1, gap=None):
    """The slices of an axis of `count` that belong to "train" or "test" (None: all), as a list of their numbers.

    `blocks` runs of neighbouring slices, `share` of all together and evenly spaced, are for testing (one run where
    there are fewer than 100 slices). The `gap` slices on either side of each are for neither: |test - training| > gap.
    Default: a twentieth of the axis, 1 to 16 slices. Where structures are longer than that, such as yarns along their
    own axis, no gap is enough: see the head of this file. UserError when no slice is left for training.
    """
    if split is None:
        return list(range(count))
    check(split in ("train", "test"), f"volumes have no split '{split}'; expected train or test")
    check(0 < share < 1 and blocks >= 1 and (gap or 0) >= 0, f"share is {share}, blocks {blocks} and gap {gap}; "
          "expected a share between 0 and 1, 1 block or more, and a gap of 0 slices or more")
    blocks = min(blocks, count // 50) if count >= 100 else 1
    gap = min(16, max(1, count // 20)) if gap is None else gap
    long = max(1, round(share * count / blocks))
    starts = [round((b + 0.5) * count / blocks - long / 2) for b in range(blocks)]
    test = [i for start in starts for i in range(start, start + long)]
    if split == "test":
        return test
    train = [i for i in range(count) if all(i < start - gap or i >= start + long + gap for start in starts)]
    check(train, f"an axis of {count} slices leaves none for training, with {len(test)} for testing and gaps of {gap}; "
          "expected a smaller share or gap")
    return train


def runs(indices):
    """[(start, stop)] of the stretches of neighbours in ascending numbers."""
    breaks = [i for i in range(1, len(indices)) if indices[i] != indices[i - 1] + 1]
    return [(indices[a], indices[b - 1] + 1) for a, b in zip([0, *breaks], [*breaks, len(indices)])]


# --- by name --------------------------------------------------------------------------------------------------------

def volume_files(path, split="train"):
    """The TIFF volumes that `path` names: itself, or the files in it or in its sub-folder for the split.

    [] when it is something else, such as a folder of pictures: one in which a TIFF has a single page, or in which other
    pictures lie beside stacks that do not have a state in their name.
    """
    path = Path(path)
    if path.is_file():
        return [path] if path.suffix.lower() in (".tif", ".tiff") else []
    path = next((path / name for name in (split, "train") if (path / name).is_dir()), path)
    beside = [one for one in sorted(path.iterdir()) if one.is_file() and not one.name.startswith(".")]
    found = [one for one in beside if one.suffix.lower() in (".tif", ".tiff")]
    kinds = []
    for one in found:
        kinds.append(is_stack(one))
        if kinds[-1] is False:
            return []
    try:
        if any(one.suffix.lower() in EXTENSIONS for one in beside if one not in found):
            [state_of(one) for one in found]
    except UserError:
        return []
    return found if True in kinds else []


def is_stack(path):
    """Whether a TIFF holds several slices; None when it is broken."""
    import tifffile
    try:
        with tifffile.TiffFile(path) as file:
            return len(file.pages) > 1 or len(file.series[0].shape) > 2 and file.series[0].axes != "YXS"
    except Exception:  # decoders raise nearly everything there is
        return None


def load(path, split="train", size=None, captions=CAPTIONS, region=None, test_region=None, **options):
    """The slices of a TIFF volume, or of all in a folder -> Slices. Whole volumes are held out when the folder has the
    sub-folders train/ and test/, a box of each volume with `test_region`, else blocks of slices.

    region, test_region   boxes for training and for testing that share no voxel (see `volumes.box`)
    captions              the rule, see `Volume.caption`; None: no captions
    options               of `Volume` (state, voxel, mask, series, value_range) and of `Slices`
    """
    own = {name: options.pop(name) for name in ("state", "voxel", "mask", "series", "value_range") if name in options}
    state, mask = own.get("state"), own.get("mask")
    files = volume_files(path, split) or ([Path(path)] if state and Path(path).is_dir() else [])
    check(files, f"{path} holds no volumes; expected a multi-page TIFF, or a folder of them")
    check(split in ("train", "test"), f"volumes have no split '{split}'; expected train or test")
    check(mask is None or len(files) == 1, f"one mask was given for the {len(files)} volumes in {path}; expected one")
    whole = Path(path).is_dir() and all((Path(path) / name).is_dir() for name in ("train", "test"))
    here = test_region if test_region and split == "test" else region
    rule = CAPTIONS if captions in (None, "auto") else captions
    volumes = []
    for file in files:
        scale = own.get("value_range")
        if test_region and split == "test" and scale is None:  # one grey scale a volume: that of the part for training
            scale = Volume(file, region=region, **own).grey
        volumes.append(Volume(file, region=here, captions=rule, **{**own, "value_range": scale}))
    if test_region:
        for volume in volumes:
            check(apart(region, test_region, volume), f"the regions {region} and {test_region} share voxels; expected "
                  "two boxes that lie apart")
    options.setdefault("place", "centre" if split == "test" else "random")
    return Slices(volumes, size, split=None if whole or test_region else split, captions=captions is not None, **options)


def apart(region, other, volume):
    """Whether two boxes of a volume share no voxel."""
    sides = zip(box(region, volume.file_shape, volume.path), box(other, volume.file_shape, volume.path))
    return any(b <= c or d <= a for (a, b), (c, d) in sides)


# --- back to the volume's units -------------------------------------------------------------------------------------

def write_slices(pictures, path, record, voxel=None):
    """Writes generated slices [B, 1, h, w] (or 3 equal channels) in [-1, 1] as one 16-bit TIFF of B pages, in the units
    of the volume of `record` (see `Volume.record`; the volume itself is not needed). Whole, or not at all.

    voxel: micrometres a pixel, where the pictures were made at another size than the volume's own.
    """
    import tifffile

    if pictures.ndim != 4 or pictures.shape[1] not in (1, 3) or not torch.isfinite(pictures).all():
        raise UserError(f"slices [B, 1, h, w] of finite numbers can be written, not {list(pictures.shape)}")
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


