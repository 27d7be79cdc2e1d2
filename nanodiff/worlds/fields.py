"""Building blocks of patterns.py and things.py: distances, lattices and noise on a plane of sample points.

Lengths are in pixels of a picture of 64 x 64. x and y [n,n] float32 are coordinates. `rng` is a NumPy generator; the
number of draws from it does not depend on n. Scalars are Python numbers, which keep float32 arrays float32.
"""

import numpy as np

TAU = 2 * np.pi
SOFT = (0.8, 2.0)  # range of the width of an edge


def between(rng, low, high):
    """A uniform random number in low..high, as a Python float, which keeps float32 arrays float32."""
    return low + (high - low) * float(rng.random())


def rotate(x, y, angle):
    """The coordinates in axes rotated by an angle, a number or [n,n]."""
    c, s = np.cos(np.float32(angle)), np.sin(np.float32(angle))
    return x * c + y * s, y * c - x * s


def inside(distance, rng=None, soft=None):
    """1 where a signed distance is negative, 0 where it is positive, with a ramp of width `soft` between them.

    soft: default, a random width of SOFT.
    """
    soft = between(rng, *SOFT) if soft is None else soft
    return np.clip(0.5 - distance / soft, 0, 1)


def over_and_under(strands, half, reach, soft):
    """(figure, tone) of strands that cross: at each place the highest strand within `reach` is drawn.

    strands  [(distance outside of the strand, height)], each [n,n]
    half     half of a strand's width
    tone     1 on the middle line of a strand, 0 at its edge, negative outside
    """
    highest, figure, tone = (np.full_like(strands[0][0], start) for start in (-9, 0, 0))
    for distance, height in strands:
        on_top = (distance < reach) & (height > highest)
        highest = np.where(on_top, height, highest)
        figure = np.where(on_top, inside(distance, soft=soft), figure)
        tone = np.where(on_top, -distance / half, tone)
    return figure, tone


def steepen(level, rng, factor):
    """A level 0..1 with a random contrast, from nearly unchanged to `factor` times as steep, which is nearly binary."""
    return np.clip(0.5 + (level - 0.5) * factor ** between(rng, 0.1, 1), 0, 1)


def cover(field, share, rng):
    """The figure where a field is smallest; it covers a random share, in `share` (low, high), of the picture."""
    step = max(1, len(field) // 64)
    values = np.sort(field[step // 2::step, step // 2::step], axis=None)
    threshold = float(values[int(between(rng, *share) * (values.size - 1))])
    return inside(field - threshold, rng)


def to_nearest(x, pitch):
    """Distance to the nearest multiple of pitch, 0..pitch/2."""
    return np.abs(x - pitch * np.rint(x / pitch))


def cell(x, y, width, height, shift=0.0):
    """(column, row, dx, dy): the nearest point of a lattice (int32), and the offset from it.

    Odd rows are shifted by the share `shift` of the width.
    """
    row = np.rint(y / height)
    start = (row % 2) * (shift * width)
    column = np.rint((x - start) / width)
    return column.astype(np.int32), row.astype(np.int32), x - start - column * width, y - row * height


def cell_values(rng, column, row, low=0.0, high=1.0):
    """A uniform random number in low..high for each cell of a lattice, constant on the cell."""
    table = rng.uniform(low, high, (32, 32)).astype(np.float32)
    return table[row % 32, column % 32]


def hexagon(x, y, pitch):
    """Distance to the nearest wall of a honeycomb of cells `pitch` wide: 0 on the walls, pitch/2 in the middle."""
    # The centres of the cells are the points of two rectangular lattices
    _, _, ax, ay = cell(x, y, pitch, pitch * 3**0.5)
    _, _, bx, by = cell(x - pitch / 2, y - pitch * 0.75**0.5, pitch, pitch * 3**0.5)
    a_is_nearer = ax * ax + ay * ay < bx * bx + by * by
    dx, dy = np.abs(np.where(a_is_nearer, ax, bx)), np.abs(np.where(a_is_nearer, ay, by))
    return pitch / 2 - np.maximum(dx, 0.5 * dx + 0.75**0.5 * dy)


def noise(x, y, rng, width, height=None):
    """Smooth noise in 0..1 with lumps of that size: lattice values, interpolated with Perlin's fade curve."""
    u, v = x / width + 16, y / (height or width) + 16
    i, j = np.floor(u), np.floor(v)
    u, v = u - i, v - j
    i, j = i.astype(np.int32), j.astype(np.int32)
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    table = rng.random((64, 64)).astype(np.float32)
    flat, start = table.ravel(), (j % 63) * 64 + i % 63
    top, bottom = flat[start], flat[start + 64]
    top = top + (flat[start + 1] - top) * u
    return top + (bottom + (flat[start + 65] - bottom) * u - top) * v


def nearest_two(x, y, rng, pitch, jitter=0.9):
    """(first, second, value): distances to the nearest and second nearest scattered point, and the nearest one's value.

    The points lie on a lattice of that pitch, displaced by up to jitter / 2. Their values are 0..1, all different.
    """
    side = int(np.ceil(50 / pitch)) * 2 + 1
    steps = (np.arange(side) - side // 2) * pitch
    points = np.stack(np.meshgrid(steps, steps), -1) + rng.uniform(-0.5, 0.5, (side, side, 2)) * jitter * pitch
    values = rng.permutation(side * side) / (side * side - 1)
    points = points.reshape(-1, 2)
    near = (np.abs(points) < np.array([np.abs(x).max(), np.abs(y).max()]) + 0.7 * pitch).all(1)  # the picture
    first = np.full_like(x, 1e6)  # squared distances
    second, value, scratch = first.copy(), np.zeros_like(x), np.empty_like(x)
    for (px, py), point_value in zip(points[near].tolist(), values[near].tolist()):
        distance = x - px
        distance *= distance
        np.subtract(y, py, out=scratch)
        scratch *= scratch
        distance += scratch
        np.copyto(value, point_value, where=distance < first)
        np.minimum(second, np.maximum(first, distance, out=scratch), out=second)
        np.minimum(first, distance, out=first)
    return np.sqrt(first), np.sqrt(second), value
