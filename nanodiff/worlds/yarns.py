"""The geometry of a 3D weave: every yarn as a curved surface with a thickness, and the yarn that owns each voxel.

Weft yarns lie straight along the height in layers. Warp yarns run along the width and undulate between them. Binder
yarns run along the warp and tie the layers together: straight up and down between the weft columns ("orthogonal"), or
slanting through them ("interlock", where the warp too changes from layer to layer).

A yarn is two maps, its middle and its half thickness, so that it fills an interval of voxels at each place of the maps.
Where two yarns overlap, a voxel belongs to the one in which it lies deeper, like yarns that press on each other.
Sections are super-ellipses: Barr (1981), "Superquadrics and angle-preserving transformations".
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import cKDTree

from nanodiff.worlds import scanner

PLAN = 800_000  # voxels of the coarse grid on which `fit` works, whatever the specimen's own resolution


@dataclass(frozen=True)
class Design:
    """The parameters of one specimen, made by `weave.make_design`. Yarn sizes follow from the counts and the shape."""

    seed: int
    state: str
    shape: tuple  # voxels: depth, height, width
    compaction: float  # thickness relative to the loose cloth's
    warp: float  # warp stacks over the height
    weft: float  # weft columns over the width
    layers: float  # weft layers through the depth
    weave: str  # one of WEAVES
    fibre: float  # intended share of yarn in the volume
    rest: float  # space above and below the weft layers, in layers: the outermost warp or binder, and some air
    swell: float = 0.0  # growth of every yarn's surface, in layers, which adjusts the share of yarn
    gap: float = 0.006  # least distance between yarns, in layers
    holes: tuple = ()  # (depth, height, width as shares of the volume; three half axes in layers) of pores and cracks

    @property
    def periods(self):
        """{"depth", "height", "width"}: voxels from weft layer to layer, warp stack to stack, weft column to column."""
        return {"depth": self.shape[0] / (self.layers + self.rest), "height": self.shape[1] / self.warp,
                "width": self.shape[2] / self.weft}


class Yarn(NamedTuple):
    """A yarn as maps over two axes: its middle and half thickness along the third axis, `axis`."""

    label: int
    axis: int  # 0 for warp and weft (maps over height x width), 1 for binder (maps over depth x width)
    start: tuple  # the maps' first voxel on their two axes
    centre: np.ndarray  # float32, voxels
    half: np.ndarray  # float32, voxels; outside the yarn minus the distance from it
    along: np.ndarray  # int16, coordinates of the fibre texture: voxels along the yarn and across it
    across: np.ndarray
    number: int  # of the yarn in its specimen


# --- the cloth ----------------------------------------------------------------------------------------------------

def weave(design):
    """[Yarn] of all yarns that lie in the specimen's volume."""
    rng = np.random.default_rng([design.seed, 2])
    loop = ((1, -1), (1, 1, -1, -1))[int(rng.random() < 0.3)]  # over one and under one, or two and two
    is_interlock = design.weave == "interlock"
    crimp = 0.5 if is_interlock else rng.uniform(0.08, 0.16)
    lift = 0.5 if is_interlock else 1.0  # the warp of an orthogonal weave lies between two layers, not round one
    warp_section = rng.uniform(0.27, 0.33), rng.uniform(0.20, 0.24), rng.uniform(2.0, 2.6), rng.uniform(1.6, 2.2)
    weft_section = rng.uniform(0.41, 0.46), rng.uniform(0.24, 0.28), rng.uniform(2.4, 3.4), rng.uniform(1.5, 2.0)
    yarns = []
    for layer in range(math.ceil(design.layers)):
        columns = _weft_columns(design, layer)
        for k in range(-1, math.ceil(max(design.warp, design.weft)) + 2):
            if k < design.weft + 1:
                depth = np.full(design.shape[1], _layer_depth(design, layer, 0.5), np.float32)
                yarns.append(_flat_yarn(design, 2, layer, k, columns[k + 1], depth, weft_section))
            if k < design.warp + 1 and (is_interlock or layer < design.layers - 1):
                side = _warp_side(np.arange(design.shape[2]), columns, loop, k)
                depth = _layer_depth(design, layer, lift + crimp * side).astype(np.float32)
                middle = (k + 0.5) * design.periods["height"]
                yarns.append(_flat_yarn(design, 1, layer, k, middle, depth, warp_section))
    for k in range(0, math.ceil(design.warp) + 1):
        yarns.append(_binder_yarn(design, k, rng.uniform(0.13, 0.16)))
        rng = np.random.default_rng([design.seed, 2, k])
    return [yarn._replace(number=n) for n, yarn in enumerate(yarn for yarn in yarns if yarn is not None)]


def _warp_side(x, columns, loop, k):
    """On which side of the weft warp yarn k lies at the columns x: -1 above, 1 below, with smooth ramps between."""
    position = np.interp(x, columns, np.arange(len(columns)) - 1.0)  # in weft columns
    column = np.floor(position).astype(int)
    sides = np.take(loop, np.arange(-2, len(columns) + 2) + k, mode="wrap")
    ramp = np.clip((position - column - 0.5) / 0.75 + 0.5, 0, 1)
    ramp = ramp * ramp * (3 - 2 * ramp)
    return sides[column + 2] + (sides[column + 3] - sides[column + 2]) * ramp


def _layer_depth(design, layer, share):
    """The depth (voxels) of a place in a layer: share 0 is its top, 1 its bottom."""
    return (design.rest / 2 + layer + share) * design.periods["depth"]


def _weft_columns(design, layer):
    """Positions of a layer's weft yarns along the width, voxels, from column -1 on. Compacted layers are displaced."""
    n = math.ceil(max(design.warp, design.weft)) + 4
    common = np.random.default_rng([design.seed, 3]).uniform(-0.05, 0.05, n)  # the same in all layers
    rng = np.random.default_rng([design.seed, 3, layer])
    slip = rng.uniform(-0.45, 0.45) * max(0.0, 1 - design.compaction)
    jitter = rng.uniform(-0.05, 0.05, n)
    return (np.arange(n) - 0.5 + common + jitter + slip) * design.periods["width"]


def _slow_curve(rng, s, waves=4):
    """A smooth random curve over s with mean 0 and variance 1; s is a tenth of the number of yarns crossed."""
    frequency, phase = rng.uniform(0.4, 3.5, waves), rng.uniform(0, 2 * np.pi, waves)
    return np.cos(2 * np.pi * frequency * s[:, None] + phase).sum(1) * math.sqrt(2 / waves)


def _flat_yarn(design, label, layer, number, middle, depth, section):
    """A warp (1) or weft (2) Yarn; None when it lies outside the volume.

    middle   position across the yarn, voxels
    depth    float32 [n]: along its length, voxels
    section  (half width in pitches, half thickness in layers, two exponents) of its super-ellipse
    """
    period, across, length = design.periods["depth"], *((1, 2) if label == 1 else (2, 1))
    pitch = design.periods["height" if label == 1 else "width"]
    step = design.periods["width" if label == 1 else "height"]
    pressure = max(0.0, 1 - design.compaction)
    rng = np.random.default_rng([design.seed, 4, label, layer, number + 1])
    s = np.arange(design.shape[length]) / step / 10
    middle = middle + pitch * (0.035 * _slow_curve(rng, s) + rng.uniform(-0.03, 0.03))
    a = pitch * section[0] * (1 + 0.3 * pressure) * (1 + 0.06 * _slow_curve(rng, s))  # half width
    b = period * section[1] * (1 + 0.3 * pressure) * (1 + 0.08 * _slow_curve(rng, s))  # half thickness
    n, m = section[2] * (1 - 0.2 * pressure), section[3] * (1 - 0.5 * pressure) * (1 + 0.08 * _slow_curve(rng, s))
    tilt, bend = 0.12 * _slow_curve(rng, s), 0.14 * _slow_curve(rng, s)
    depth = depth + period * (0.03 + 0.05 * pressure) * _slow_curve(rng, s)
    reach = 0.3 * period
    low = max(0, math.floor((middle - a).min() - reach))
    high = min(design.shape[across], math.ceil((middle + a).max() + reach))
    if low >= high:
        return None
    offset = np.arange(low, high, dtype=np.float32)[:, None] - middle.astype(np.float32)  # [across, length]
    u = offset / a.astype(np.float32)
    slant = np.sqrt(1 + np.gradient(depth) ** 2).clip(1, 2.5)  # ratio of the vertical thickness to the normal one
    profile = np.clip(1 - np.abs(u) ** np.float32(n), 0, 1) ** (1 / m).astype(np.float32)
    half = profile * (b * slant).astype(np.float32) - np.maximum(np.abs(u) - 1, 0) * a.astype(np.float32)
    centre = (depth + (b * tilt) * u + (b * bend) * (u * u).clip(0, 1.5)).astype(np.float32)
    along = np.broadcast_to(np.arange(design.shape[length], dtype=np.int16), offset.shape)
    if label == 1:
        centre += _sag(design, np.arange(low, high), np.arange(design.shape[2]))
    else:
        centre += _sag(design, np.arange(design.shape[1]), np.arange(low, high)).T
    maps = [centre, half, along, np.round(offset).astype(np.int16)]
    if label == 2:
        maps = [np.ascontiguousarray(values.T) for values in maps]
    return Yarn(label, 0, (low, 0) if label == 1 else (0, low), *maps, 0)


def _sag(design, y, x):
    """The displacement of the cloth along the depth at rows y and columns x, voxels [y, x]; 0 in a compacted one."""
    rng = np.random.default_rng([design.seed, 6])
    amplitude = design.periods["depth"] * 0.10 * max(0.0, design.compaction - 0.55)
    rows = _slow_curve(rng, y / design.periods["height"] / 20)
    columns = _slow_curve(rng, x / design.periods["width"] / 20)
    return (np.outer(rows, columns) * amplitude).astype(np.float32)


def _binder_yarn(design, number, width):
    """The binder Yarn beside warp stack `number`; width: half of its width, in distances between stacks."""
    depth, _, across = design.shape
    period, pitch = design.periods["depth"], design.periods["height"]
    rng = np.random.default_rng([design.seed, 5, number])
    path = _binder_path(design, number)
    tangent = np.gradient(path, axis=0)
    x = np.arange(across)
    s = x / design.periods["width"] / 10
    y = (number * pitch + pitch * (0.05 * _slow_curve(rng, s) + rng.uniform(-0.04, 0.04)))
    path[:, 0] += np.interp(path[:, 1], x, _sag(design, np.array([number * pitch]), x)[0])
    thickness = period * rng.uniform(0.17, 0.21) * (1 - 0.3 * max(0.0, 1 - design.compaction))
    reach = 0.3 * period
    grid = np.stack(np.meshgrid(np.arange(depth), x, indexing="ij"), -1).reshape(-1, 2)
    distance, nearest = cKDTree(path).query(grid, distance_upper_bound=thickness + reach)
    nearest = np.minimum(nearest, len(path) - 1)  # where no point of the path is within reach
    distance = np.minimum(distance, thickness + reach)
    offset = grid - path[nearest]
    cross = offset[:, 0] * tangent[nearest, 1] - offset[:, 1] * tangent[nearest, 0]
    side = cross / np.hypot(*tangent[nearest].T).clip(1e-6)  # signed distance from the path
    half_width = pitch * width * (1 + 0.1 * _slow_curve(rng, nearest / design.periods["width"] / 10))
    u = distance / thickness
    half = np.clip(1 - u**2.4, 0, 1) ** 0.6 * half_width - np.maximum(u - 1, 0) * thickness
    half = half.reshape(depth, across).astype(np.float32)
    centre = np.broadcast_to(y.astype(np.float32), half.shape)
    return Yarn(3, 1, (0, 0), centre, half, nearest.reshape(half.shape).astype(np.int16),
                np.round(side).clip(-999, 999).reshape(half.shape).astype(np.int16), 0)


def _binder_path(design, number):
    """A binder's path [n, 2]: depth and width of points a voxel apart, between the weft columns."""
    count = math.ceil(design.layers)
    is_orthogonal = design.weave == "orthogonal"
    columns = np.stack([_weft_columns(design, layer) for layer in range(count)])  # [layers, columns]
    gaps = (columns[:, 1:] + columns[:, :-1]) / 2
    z = _layer_depth(design, np.arange(count), 0.5)
    top, bottom, points = _layer_depth(design, 0, -0.06), _layer_depth(design, count, 0.06), []
    phase = int(np.random.default_rng([design.seed, 7]).integers(2 * count))
    phase += number * (1 if is_orthogonal else max(1, count // 2))
    for gap in range(gaps.shape[1]):
        turning_point = columns[:, gap + 1].mean()
        if is_orthogonal:  # through all layers in one gap
            is_downward = (gap + phase) % 2 == 0
            points += [(z[j], gaps[j, gap]) for j in (range(count) if is_downward else reversed(range(count)))]
            points.append((bottom if is_downward else top, turning_point))
        else:  # one layer a gap
            n = (gap + phase) % (2 * count)
            layer = min(n, 2 * count - 1 - n)
            points.append((z[layer], gaps[layer, gap]))
            if n in (count - 1, 2 * count - 1):
                points.append((bottom if n == count - 1 else top, turning_point))
    points = np.array(points)
    length = np.concatenate([[0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
    dense = np.arange(0, length[-1])
    path = np.stack([np.interp(dense, length, points[:, i]) for i in (0, 1)], 1)
    return gaussian_filter1d(path, 0.22 * design.periods["depth"], axis=0, mode="nearest")


# --- from the cloth to voxels -------------------------------------------------------------------------------------

def yarn_distances(design, yarns, low, high, scan=None):
    """(first, second, owner, shade) [n,H,W] of the slices low..high.

    first, second  signed distance from the surface of the nearest and the second nearest yarn, voxels, negative inside;
                   at most 0.3 layers
    owner          label of the nearest yarn
    shade          grey level of the nearest yarn with its fibre texture; needs a `scan` (scanner.settings), which also
                   roughens the surfaces
    """
    shape = (high - low, *design.shape[1:])
    reach = np.float32(0.3 * design.periods["depth"])
    first, second = np.full(shape, reach, np.float32), np.full(shape, reach, np.float32)
    owner, shade = np.zeros(shape, np.uint8), np.zeros(shape if scan else (0, 0, 0), np.float32)
    for yarn in yarns:
        box, centre, half, axis = _yarn_box(yarn, low, high, design.shape[1], reach)
        if box is None:
            continue
        height = np.arange(axis.start, axis.stop, dtype=np.float32)
        height = (height[:, None, None] if yarn.axis == 0 else height[:, None]) - centre  # over the yarn's middle
        distance = np.abs(height) - half
        box_first, box_second = first[box], second[box]
        np.minimum(box_second, np.maximum(box_first, distance), out=box_second)
        i, j, k = np.nonzero(distance < box_first)
        nearest = distance[i, j, k]
        if scan:
            map_place = (j, k) if yarn.axis == 0 else (i + low, k)
            grain = scanner.grain(scan, yarn, height[i, j, k], *map_place)
            fray = np.float32(scan.rough) * grain  # bright fibres stick out; both distances keep the gap's width
            nearest -= fray
            box_second[i, j, k] -= fray
            shade[box][i, j, k] = scanner.shade(scan, yarn, grain)
        box_first[i, j, k] = nearest
        owner[box][i, j, k] = yarn.label
    return first, second, owner, shade


def _yarn_box(yarn, low, high, height, reach):
    """(box, centre, half, axis) of a yarn in the slices low..high, or four Nones when it lies outside.

    box is an index of these slices, centre and half are the yarn's maps there, axis is the slice of voxels along
    yarn.axis.
    """
    start, stop = (0, height) if yarn.axis else (low, high)
    start = max(start, math.floor((yarn.centre - yarn.half.clip(0)).min() - reach))
    stop = min(stop, math.ceil((yarn.centre + yarn.half.clip(0)).max() + reach) + 1)
    if start >= stop:
        return None, None, None, None
    axis = slice(start, stop)
    if yarn.axis:
        return np.s_[:, axis, :], yarn.centre[low:high, None], yarn.half[low:high, None], axis
    (y, x), (rows, columns) = yarn.start, yarn.half.shape
    return np.s_[start - low:stop - low, y:y + rows, x:x + columns], yarn.centre, yarn.half, axis


def fit(design):
    """The design with the `swell` and `gap` that give it the share design.fibre of yarn, and with its holes.

    The share is measured on a coarse grid of PLAN voxels.
    """
    scale = (PLAN / math.prod(design.shape)) ** (1 / 3)
    coarse = replace(design, shape=tuple(round(side * scale) for side in design.shape))
    first, second, *_ = yarn_distances(coarse, weave(coarse), 0, coarse.shape[0])
    period = coarse.periods["depth"]
    spacing = (second - first) / period
    gap = min(design.gap / design.compaction, float(np.quantile(spacing, max(0.0, 1 - 1.02 * design.fibre))))
    surface = float(np.quantile(np.where(spacing > gap, first, np.inf), design.fibre, method="lower"))
    swell = min(0.3, surface / period)
    return replace(design, swell=swell, gap=gap, holes=_draw_holes(design, first / period - swell))


def _draw_holes(design, clearance):
    """Pores and cracks of an injected specimen, as in Design.holes.

    clearance: distance of the voxels of a coarse grid from the yarns, in layers.
    """
    if design.state != "injected":
        return ()
    rng = np.random.default_rng([design.seed, 8])
    holes = []
    for place in rng.random((300, 3)):
        elongation, radius = rng.uniform(1, 3), 0.2 * rng.lognormal(0, 0.3)
        voxel = tuple((place * clearance.shape).astype(int))
        room = float(np.clip(clearance[voxel] / 0.12, 0, 1))  # pores lie in the channels between yarns
        size = np.array([1, 1, 1]) * radius * room
        size[rng.integers(1, 3)] *= elongation
        if size[0] > 0.01:
            holes.append((*place.tolist(), *size.tolist()))
    for place in rng.random((int(rng.integers(2, 6)), 3)):
        normal = rng.integers(3)  # a crack is thin along one axis: a delamination, or a yarn split along its fibres
        size = rng.uniform(0.5, 1.3, 3) * (1 if normal else np.array([1, 1.6, 1.6]))
        size[normal] = 0.03
        holes.append((*place.tolist(), *size.tolist()))
    return tuple(holes)


def hole_distances(design, low, high):
    """Signed distance [n,H,W] of the slices low..high from the nearest pore or crack, at most 1; None without holes."""
    if not design.holes:
        return None
    distance = np.ones((high - low, *design.shape[1:]), np.float32)
    period = design.periods["depth"]
    for hole in design.holes:
        centre, size = np.array(hole[:3]) * design.shape, np.maximum(np.array(hole[3:]) * period, 0.35)
        start = np.maximum(np.floor(centre - size - 2).astype(int), [low, 0, 0])
        stop = np.minimum(np.ceil(centre + size + 3).astype(int), [high, *design.shape[1:]])
        if (start >= stop).any():
            continue
        z, y, x = (((np.arange(a, b) - c) / s).astype(np.float32) for a, b, c, s in zip(start, stop, centre, size))
        radius = np.sqrt(z[:, None, None] ** 2 + y[:, None] ** 2 + x**2)  # 1 on the ellipsoid
        box = tuple(slice(a - origin, b - origin) for a, b, origin in zip(start, stop, (low, 0, 0)))
        np.minimum(distance[box], (radius - 1) * np.float32(size.min()), out=distance[box])
    return distance
