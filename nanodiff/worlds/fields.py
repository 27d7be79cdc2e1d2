"""What the drawers of patterns.py and things.py are made of: distances, lattices and noise on a plane of samples.

Lengths are in pixels of a picture of 64 x 64; x and y [n,n] float32 are places on the plane. `random` is a NumPy
generator; how many numbers a function takes from it does not depend on n. Python numbers leave float32 as it is.
"""

import numpy as np

TAU = 2 * np.pi
SOFT = (0.8, 2.0)  # width of an edge


def between(random, low, high):
    """One number drawn evenly from low..high, as a Python float, which leaves float32 arrays as they are."""
    return low + (high - low) * float(random.random())


def turned(x, y, angle):
    """The places as seen after a turn by an angle, a number or [n,n]."""
    c, s = np.cos(np.float32(angle)), np.sin(np.float32(angle))
    return x * c + y * s, y * c - x * s


def inside(distance, random=None, soft=None):
    """1 where a signed distance is negative, 0 where positive, a ramp `soft` wide between them."""
    soft = between(random, *SOFT) if soft is None else soft
    return np.clip(0.5 - distance / soft, 0, 1)


def over_and_under(strands, half, reach, soft):
    """Strands (distance outside of it, height) of half width `half`, painted where they are the highest and at most
    `reach` away -> figure, and 1 in the middle of a strand to 0 at its edge (and below, outside)."""
    best, figure, tone = (np.full_like(strands[0][0], start) for start in (-9, 0, 0))
    for away, height in strands:
        top = (away < reach) & (height > best)
        best = np.where(top, height, best)
        figure = np.where(top, inside(away, soft=soft), figure)
        tone = np.where(top, -away / half, tone)
    return figure, tone


def steeper(level, random, high):
    """A level 0..1 with more of both ends: from as it is to `high` times as steep, which is nearly two colours."""
    return np.clip(0.5 + (level - 0.5) * high ** between(random, 0.1, 1), 0, 1)


def covering(field, share, random):
    """The figure that covers about `share` (low, high) of the picture: the places where a distance is smallest."""
    every = max(1, len(field) // 64)
    part = np.sort(field[every // 2::every, every // 2::every], axis=None)
    return inside(field - float(part[int(between(random, *share) * (part.size - 1))]), random)


def to_nearest(x, pitch):
    """Distance to the nearest multiple of pitch, 0..pitch/2."""
    return np.abs(x - pitch * np.rint(x / pitch))


def cell(x, y, wide, high, shift=0.0):
    """Places on a lattice: column and row (int) of the nearest point, and the way from it; odd rows shift by a part."""
    row = np.rint(y / high)
    start = (row % 2) * (shift * wide)
    column = np.rint((x - start) / wide)
    return column.astype(np.int32), row.astype(np.int32), x - start - column * wide, y - row * high


def of_cell(random, column, row, low=0.0, high=1.0):
    """One number in low..high for each cell of a lattice, the same on all of the cell."""
    table = random.uniform(low, high, (32, 32)).astype(np.float32)
    return table[row % 32, column % 32]


def hexagon(x, y, pitch):
    """Distance to the nearest wall of a honeycomb of cells `pitch` wide: 0 on the walls, pitch/2 in the middle."""
    _, _, ax, ay = cell(x, y, pitch, pitch * 3**0.5)
    _, _, bx, by = cell(x - pitch / 2, y - pitch * 0.75**0.5, pitch, pitch * 3**0.5)
    first = ax * ax + ay * ay < bx * bx + by * by
    lx, ly = np.abs(np.where(first, ax, bx)), np.abs(np.where(first, ay, by))
    return pitch / 2 - np.maximum(lx, 0.5 * lx + 0.75**0.5 * ly)


def noise(x, y, random, wide, high=None):
    """Smooth noise in 0..1 with lumps of that size: random numbers on a lattice, blended (Perlin's fade) between."""
    u, v = x / wide + 16, y / (high or wide) + 16
    i, j = np.floor(u), np.floor(v)
    u, v = u - i, v - j
    i, j = i.astype(np.int32), j.astype(np.int32)
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    table = random.random((64, 64)).astype(np.float32)
    flat, start = table.ravel(), (j % 63) * 64 + i % 63
    top, bottom = flat[start], flat[start + 64]
    top = top + (flat[start + 1] - top) * u
    return top + (bottom + (flat[start + 65] - bottom) * u - top) * v


def nearest_two(x, y, random, pitch, jitter=0.9):
    """Distances to the nearest and second nearest of scattered points, and a number 0..1 of the nearest one's own."""
    side = int(np.ceil(50 / pitch)) * 2 + 1
    steps = (np.arange(side) - side // 2) * pitch
    points = np.stack(np.meshgrid(steps, steps), -1) + random.uniform(-0.5, 0.5, (side, side, 2)) * jitter * pitch
    values = random.permutation(side * side) / (side * side - 1)
    points = points.reshape(-1, 2)
    seen = (np.abs(points) < np.array([np.abs(x).max(), np.abs(y).max()]) + 0.7 * pitch).all(1)
    first = np.full_like(x, 1e6)
    second, value, step = first.copy(), np.zeros_like(x), np.empty_like(x)
    for (px, py), one in zip(points[seen].tolist(), values[seen].tolist()):
        distance = x - px
        distance *= distance
        np.subtract(y, py, out=step)
        step *= step
        distance += step
        np.copyto(value, one, where=distance < first)
        np.minimum(second, np.maximum(first, distance, out=step), out=second)
        np.minimum(first, distance, out=first)
    return np.sqrt(first), np.sqrt(second), value
