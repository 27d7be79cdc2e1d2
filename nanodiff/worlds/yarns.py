"""The geometry of a 3D weave: each yarn as a curved surface with a thickness over it, and how they share the voxels.

Weft yarns lie straight along the height in layers; warp yarns run along the width and undulate between them; binder
yarns run with the warp and tie the layers together, straight up and down between the weft columns ("orthogonal") or
slanting through them ("interlock", where the warp too changes from layer to layer). A yarn is two maps, its middle and
its half thickness, so that a volume is painted as intervals. Where two yarns want one voxel, the one that it lies
deeper in has it, as with yarns that press on each other. Sections are super-ellipses: Barr (1981), "Superquadrics and
angle-preserving transformations".
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import cKDTree

from nanodiff.worlds import scanner

PLAN = 800_000  # voxels of the grid on which the fill of a specimen is settled, whatever its own resolution


@dataclass(frozen=True)
class Design:
    """One specimen in numbers; lengths of yarns and layers follow from counts and shape. `design` makes it."""

    seed: int
    state: str
    shape: tuple  # voxels: depth, height, width
    compaction: float  # thickness as a share of the loose cloth's
    warp: float  # warp stacks over the height
    weft: float  # weft columns over the width
    layers: float  # weft layers through the depth
    weave: str  # one of WEAVES
    fibre: float  # share of the volume that is to be yarn
    rest: float  # room above and below the weft layers, in layers: the outermost warp or binder, and some air
    swell: float = 0.0  # how far every yarn grows (or shrinks), in layers: settles the fill
    gap: float = 0.006  # the least distance between yarns, in layers
    holes: tuple = ()  # (depth, height, width as shares of the volume; three half axes in layers) of pores and cracks

    @property
    def periods(self):
        """{"depth", "height", "width"}: voxels from weft layer to layer, warp stack to stack, weft column to column."""
        return {"depth": self.shape[0] / (self.layers + self.rest), "height": self.shape[1] / self.warp,
                "width": self.shape[2] / self.weft}


class Yarn(NamedTuple):
    """A yarn as maps over two axes: at each place its middle and half thickness along the third, `axis`."""

    label: int
    axis: int  # 0 for warp and weft (maps over height x width), 1 for binder (maps over depth x width)
    start: tuple  # the maps' first voxel on their two axes
    centre: np.ndarray  # float32, voxels
    half: np.ndarray  # float32, voxels; negative outside the yarn: minus the distance from it
    along: np.ndarray  # int16, voxels along the yarn and across it, where the fibre texture is looked up
    across: np.ndarray
    number: int  # tells the yarns of one specimen apart


# --- the cloth ----------------------------------------------------------------------------------------------------

def woven(one):
    """All yarns of a specimen that its volume shows."""
    layers, number = range(math.ceil(one.layers)), range(-1, math.ceil(max(one.warp, one.weft)) + 2)
    rng = np.random.default_rng([one.seed, 2])
    loop = ((1, -1), (1, 1, -1, -1))[int(rng.random() < 0.3)]  # over one and under one, or two and two
    crimp = 0.5 if one.weave == "interlock" else rng.uniform(0.08, 0.16)
    lift = 0.5 if one.weave == "interlock" else 1.0  # an orthogonal weave's warp lies between two layers, not round one
    size = {"warp": (rng.uniform(0.27, 0.33), rng.uniform(0.20, 0.24), rng.uniform(2.0, 2.6), rng.uniform(1.6, 2.2)),
            "weft": (rng.uniform(0.41, 0.46), rng.uniform(0.24, 0.28), rng.uniform(2.4, 3.4), rng.uniform(1.5, 2.0))}
    yarns = []
    for layer in layers:
        columns = _columns(one, layer)
        for k in number:
            if k < one.weft + 1:
                place = np.full(one.shape[1], _layer(one, layer, 0.5), np.float32)
                yarns.append(_lying(one, 2, layer, k, columns[k + 1], place, size["weft"]))
            if k < one.warp + 1 and (one.weave == "interlock" or layer < one.layers - 1):
                q = np.interp(np.arange(one.shape[2]), columns, np.arange(len(columns)) - 1.0)
                turn = np.floor(q).astype(int)
                side = np.take(loop, np.arange(-2, len(columns) + 2) + k, mode="wrap")
                ramp = np.clip((q - turn - 0.5) / 0.75 + 0.5, 0, 1)
                ramp = ramp * ramp * (3 - 2 * ramp)
                side = side[turn + 2] + (side[turn + 3] - side[turn + 2]) * ramp
                place = _layer(one, layer, lift + crimp * side).astype(np.float32)
                yarns.append(_lying(one, 1, layer, k, (k + 0.5) * one.periods["height"], place, size["warp"]))
    for k in range(0, math.ceil(one.warp) + 1):
        yarns.append(_standing(one, k, rng.uniform(0.13, 0.16)))
        rng = np.random.default_rng([one.seed, 2, k])
    return [yarn._replace(number=n) for n, yarn in enumerate(y for y in yarns if y is not None)]


def _layer(one, layer, share):
    """The depth (voxels) at a share of the way through a layer."""
    return (one.rest / 2 + layer + share) * one.periods["depth"]


def _columns(one, layer):
    """Where a layer's weft yarns cross the width, voxels, from column -1 on: pressed layers slip into each other."""
    n = math.ceil(max(one.warp, one.weft)) + 4
    common = np.random.default_rng([one.seed, 3]).uniform(-0.05, 0.05, n)
    rng = np.random.default_rng([one.seed, 3, layer])
    slip = rng.uniform(-0.45, 0.45) * max(0.0, 1 - one.compaction)
    own = rng.uniform(-0.05, 0.05, n)
    return (np.arange(n) - 0.5 + common + own + slip) * one.periods["width"]


def _slow(rng, s, waves=4):
    """A smooth random curve over s with mean 0 and variance 1; s counts yarns crossed, /10."""
    f, phase = rng.uniform(0.4, 3.5, waves), rng.uniform(0, 2 * np.pi, waves)
    return np.cos(2 * np.pi * f * s[:, None] + phase).sum(1) * math.sqrt(2 / waves)


def _lying(one, label, layer, number, middle, place, size):
    """The warp (1) or weft (2) yarn at `middle` (voxels across), whose depth along its length is `place` [n]."""
    period, across, length = one.periods["depth"], *((1, 2) if label == 1 else (2, 1))
    pitch = one.periods["height" if label == 1 else "width"]
    step = one.periods["width" if label == 1 else "height"]
    pressed = max(0.0, 1 - one.compaction)
    rng = np.random.default_rng([one.seed, 4, label, layer, number + 1])
    s = np.arange(one.shape[length]) / step / 10
    middle = middle + pitch * (0.035 * _slow(rng, s) + rng.uniform(-0.03, 0.03))
    a = pitch * size[0] * (1 + 0.3 * pressed) * (1 + 0.06 * _slow(rng, s))
    b = period * size[1] * (1 + 0.3 * pressed) * (1 + 0.08 * _slow(rng, s))
    n, m = size[2] * (1 - 0.2 * pressed), size[3] * (1 - 0.5 * pressed) * (1 + 0.08 * _slow(rng, s))
    tilt, bend = 0.12 * _slow(rng, s), 0.14 * _slow(rng, s)
    place = place + period * (0.03 + 0.05 * pressed) * _slow(rng, s)
    reach = 0.3 * period
    low = max(0, math.floor((middle - a).min() - reach))
    high = min(one.shape[across], math.ceil((middle + a).max() + reach))
    if low >= high:
        return None
    off = np.arange(low, high, dtype=np.float32)[:, None] - middle.astype(np.float32)  # [across, length]
    u = off / a.astype(np.float32)
    steep = np.sqrt(1 + np.gradient(place) ** 2).clip(1, 2.5)
    inside = np.clip(1 - np.abs(u) ** np.float32(n), 0, 1) ** (1 / m).astype(np.float32)
    half = inside * (b * steep).astype(np.float32) - np.maximum(np.abs(u) - 1, 0) * a.astype(np.float32)
    centre = (place + (b * tilt) * u + (b * bend) * (u * u).clip(0, 1.5)).astype(np.float32)
    along = np.broadcast_to(np.arange(one.shape[length], dtype=np.int16), off.shape)
    centre += _sheet(one, *((np.arange(low, high), np.arange(one.shape[2])) if label == 1
                            else (np.arange(one.shape[1]), np.arange(low, high))), label)
    maps = [centre, half, along, np.round(off).astype(np.int16)]
    if label == 2:
        maps = [np.ascontiguousarray(one_map.T) for one_map in maps]
    return Yarn(label, 0, (low, 0) if label == 1 else (0, low), *maps, 0)


def _sheet(one, y, x, label=1):
    """How far the cloth sags at rows y and columns x, voxels [y, x] (for a weft, [x, y]); a pressed one is flat."""
    rng = np.random.default_rng([one.seed, 6])
    depth = one.periods["depth"] * 0.10 * max(0.0, one.compaction - 0.55)
    sag = np.outer(_slow(rng, y / one.periods["height"] / 20), _slow(rng, x / one.periods["width"] / 20)) * depth
    return (sag if label == 1 else sag.T).astype(np.float32)


def _standing(one, number, width):
    """The binder yarn beside warp stack `number`; `width` is half of its own, in distances between stacks."""
    depth, height, across = one.shape
    period, pitch = one.periods["depth"], one.periods["height"]
    rng = np.random.default_rng([one.seed, 5, number])
    path = _path(one, number)
    tangent = np.gradient(path, axis=0)
    x = np.arange(across)
    y = (number * pitch + pitch * (0.05 * _slow(rng, x / one.periods["width"] / 10) + rng.uniform(-0.04, 0.04)))
    path[:, 0] += np.interp(path[:, 1], x, _sheet(one, np.array([number * pitch]), x)[0])
    thick = period * rng.uniform(0.17, 0.21) * (1 - 0.3 * max(0.0, 1 - one.compaction))
    reach = 0.3 * period
    grid = np.stack(np.meshgrid(np.arange(depth), x, indexing="ij"), -1).reshape(-1, 2)
    far, at = cKDTree(path).query(grid, distance_upper_bound=thick + reach)
    at = np.minimum(at, len(path) - 1)
    far = np.minimum(far, thick + reach)
    away = grid - path[at]
    side = (away[:, 0] * tangent[at, 1] - away[:, 1] * tangent[at, 0]) / np.hypot(*tangent[at].T).clip(1e-6)
    wide = pitch * width * (1 + 0.1 * _slow(rng, at / one.periods["width"] / 10))
    u = far / thick
    half = np.clip(1 - u**2.4, 0, 1) ** 0.6 * wide - np.maximum(u - 1, 0) * thick
    half = half.reshape(depth, across).astype(np.float32)
    centre = np.broadcast_to(y.astype(np.float32), half.shape)
    return Yarn(3, 1, (0, 0), centre, half, at.reshape(half.shape).astype(np.int16),
                np.round(side).clip(-999, 999).reshape(half.shape).astype(np.int16), 0)


def _path(one, number):
    """A binder's path [n, 2]: depth and width of points a voxel apart, between the weft columns."""
    count = math.ceil(one.layers)
    columns = np.stack([_columns(one, layer) for layer in range(count)])  # [layers, columns]
    gaps = (columns[:, 1:] + columns[:, :-1]) / 2
    z = _layer(one, np.arange(count), 0.5)
    top, bottom, points = _layer(one, 0, -0.06), _layer(one, count, 0.06), []
    phase = int(np.random.default_rng([one.seed, 7]).integers(2 * count)) + number * (1 if one.weave == "orthogonal"
                                                                                    else max(1, count // 2))
    for g in range(gaps.shape[1]):
        over = columns[:, g + 1].mean()
        if one.weave == "orthogonal":
            down = (g + phase) % 2 == 0
            points += [(z[j], gaps[j, g]) for j in (range(count) if down else reversed(range(count)))]
            points.append((bottom if down else top, over))
        else:
            n = (g + phase) % (2 * count)
            points.append((z[n if n < count else 2 * count - 1 - n], gaps[min(n, 2 * count - 1 - n), g]))
            if n in (count - 1, 2 * count - 1):
                points.append((bottom if n == count - 1 else top, over))
    points = np.array(points)
    length = np.concatenate([[0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
    dense = np.arange(0, length[-1])
    path = np.stack([np.interp(dense, length, points[:, i]) for i in (0, 1)], 1)
    return gaussian_filter1d(path, 0.22 * one.periods["depth"], axis=0, mode="nearest")


# --- from the cloth to voxels -------------------------------------------------------------------------------------

def depths(one, yarns, low, high, scan=None):
    """Slices low..high of the volume: (best, second, owner, shade) [n,H,W].

    best is how far outside of its nearest yarn a voxel lies (negative inside), second the same for the next yarn,
    voxels, both at most 0.3 layers; owner the nearest yarn's label; shade its grey level with the fibre texture, and
    fibres roughen its surface, when there is a `scan` (scanner.settings).
    """
    shape = (high - low, *one.shape[1:])
    reach = np.float32(0.3 * one.periods["depth"])
    best, second = np.full(shape, reach, np.float32), np.full(shape, reach, np.float32)
    owner, shade = np.zeros(shape, np.uint8), np.zeros(shape if scan else (0, 0, 0), np.float32)
    for yarn in yarns:
        place, centre, half, axis = _place(yarn, low, high, one.shape[1], reach)
        if place is None:
            continue
        away = np.arange(axis.start, axis.stop, dtype=np.float32)
        away = (away[:, None, None] if yarn.axis == 0 else away[:, None]) - centre
        d = np.abs(away) - half
        b, s = best[place], second[place]
        np.minimum(s, np.maximum(b, d), out=s)
        i, j, k = np.nonzero(d < b)
        value = d[i, j, k]
        if scan:
            row = (j, k) if yarn.axis == 0 else (i + low, k)
            grain = scanner.grain(scan, yarn, away[i, j, k], *row)
            fray = np.float32(scan.rough) * grain  # bright fibres stick out; the gaps between yarns stay as wide
            value -= fray
            s[i, j, k] -= fray
            shade[place][i, j, k] = scanner.shade(scan, yarn, grain)
        b[i, j, k] = value
        owner[place][i, j, k] = yarn.label
    return best, second, owner, shade


def _place(yarn, low, high, height, reach):
    """Where a yarn may be in slices low..high: (place in them, its two maps there, voxels along its axis), or Nones."""
    least, most = (0, height) if yarn.axis else (low, high)
    first = max(least, math.floor((yarn.centre - yarn.half.clip(0)).min() - reach))
    last = min(most, math.ceil((yarn.centre + yarn.half.clip(0)).max() + reach) + 1)
    if first >= last:
        return None, None, None, None
    axis = slice(first, last)
    if yarn.axis:
        return np.s_[:, axis, :], yarn.centre[low:high, None], yarn.half[low:high, None], axis
    (y, x), (rows, columns) = yarn.start, yarn.half.shape
    return np.s_[first - low:last - low, y:y + rows, x:x + columns], yarn.centre, yarn.half, axis


def settled(one):
    """The design with `swell` and `gap` such that its share of yarn is one.fibre, and its holes; on a coarse grid."""
    coarse = (PLAN / math.prod(one.shape)) ** (1 / 3)
    plan = replace(one, shape=tuple(round(n * coarse) for n in one.shape))
    best, second, *_ = depths(plan, woven(plan), 0, plan.shape[0])
    period = plan.periods["depth"]
    free = (second - best) / period
    gap = min(one.gap / one.compaction, float(np.quantile(free, max(0.0, 1 - 1.02 * one.fibre))))
    swell = min(0.3, float(np.quantile(np.where(free > gap, best, np.inf), one.fibre, method="lower")) / period)
    return replace(one, swell=swell, gap=gap, holes=_holes(one, best / period - swell))


def _holes(one, free):
    """Pores and cracks of an injected specimen; `free` is how far from yarns a voxel of a coarse grid lies."""
    if one.state != "injected":
        return ()
    rng = np.random.default_rng([one.seed, 8])
    holes = []
    for place in rng.random((300, 3)):
        long, radius = rng.uniform(1, 3), 0.2 * rng.lognormal(0, 0.3)
        room = float(np.clip(free[tuple((place * free.shape).astype(int))] / 0.12, 0, 1))  # a pore needs a channel
        size = np.array([1, 1, 1]) * radius * room
        size[rng.integers(1, 3)] *= long
        if size[0] > 0.01:
            holes.append((*place.tolist(), *size.tolist()))
    for place in rng.random((int(rng.integers(2, 6)), 3)):
        flat = rng.integers(3)  # thin along one axis: a layer come loose, or a yarn split along its fibres
        size = rng.uniform(0.5, 1.3, 3) * (1 if flat else np.array([1, 1.6, 1.6]))
        size[flat] = 0.03
        holes.append((*place.tolist(), *size.tolist()))
    return tuple(holes)


def hollow(one, low, high):
    """Slices low..high [n,H,W]: how far outside of the nearest pore or crack a voxel lies, at most 1; None without."""
    if not one.holes:
        return None
    found = np.ones((high - low, *one.shape[1:]), np.float32)
    period = one.periods["depth"]
    for hole in one.holes:
        centre, size = np.array(hole[:3]) * one.shape, np.maximum(np.array(hole[3:]) * period, 0.35)
        first = np.maximum(np.floor(centre - size - 2).astype(int), [low, 0, 0])
        last = np.minimum(np.ceil(centre + size + 3).astype(int), [high, *one.shape[1:]])
        if (first >= last).any():
            continue
        z, y, x = (((np.arange(a, b) - c) / s).astype(np.float32) for a, b, c, s in zip(first, last, centre, size))
        r = np.sqrt(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2)
        place = tuple(slice(a - o, b - o) for a, b, o in zip(first, last, (low, 0, 0)))
        np.minimum(found[place], (r - 1) * np.float32(size.min()), out=found[place])
    return found
