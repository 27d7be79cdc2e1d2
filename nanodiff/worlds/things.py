"""Things on a plain ground: eight shapes, and handwritten digits of MNIST. Report: section 1.

Lengths are in pixels of a picture of 64 x 64, whatever the size that is drawn. x and y [n,n] float32 are coordinates
from the middle of the picture. A figure is [n,n] in 0..1: 0 on the ground and 1 on the thing.
"""

import functools

import numpy as np
from PIL import Image

from nanodiff.data import mnist
from nanodiff.files import DATA
from nanodiff.worlds.fields import SOFT, TAU, between, inside

# Approximate signed distances (negative inside) of shapes that just fit into the unit circle


def circle(x, y):
    """A disc."""
    return np.hypot(x, y) - 0.87  # as large as the other shapes, so that its area does not give it away


def square(x, y):
    """A square on its side."""
    return np.maximum(np.abs(x), np.abs(y)) - 0.5**0.5


def triangle(x, y):
    """An equilateral triangle, point up."""
    return np.maximum(y, 0.75**0.5 * np.abs(x) - 0.5 * y) - 0.5


def star(x, y):
    """A star of five points, one up."""
    angle = np.abs((np.arctan2(x, -y) + TAU / 10) % (TAU / 5) - TAU / 10)
    radius = np.hypot(x, y)
    # The edge from a point at radius 1 to a notch at radius 0.42, 36 degrees on
    notch_x, notch_y = 0.42 * np.sin(TAU / 10), 0.42 * np.cos(TAU / 10)
    length = np.hypot(notch_x, 1 - notch_y)
    return (radius * np.sin(angle) * (1 - notch_y) + (radius * np.cos(angle) - 1) * notch_x) / length


def cross(x, y):
    """Two bars of one length at right angles."""
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.28)


def ring(x, y):
    """A disc with a hole."""
    return np.abs(np.hypot(x, y) - 0.77) - 0.23


def heart(x, y):
    """Two lobes over a point."""
    x, y = 1.05 * np.abs(x), 1.05 * y
    lobe = np.hypot(x - 0.44, y + 0.32) - 0.5
    # Below the lobes two straight sides run to the point, each a tangent of its lobe
    side = np.maximum((x - 0.44) * 0.76 + (y + 0.32) * 0.65 - 0.5, -0.12 - y + 0.76 * x - 0.32)
    return np.minimum(lobe, side)


def crescent(x, y):
    """A disc with a bite out of its right side."""
    return np.maximum(np.hypot(x, y) - 1, 0.78 - np.hypot(x - 0.52, y))


# name: (signed distance, range of its rotation in radians)
SHAPES = {"circle": (circle, 0.0), "square": (square, TAU), "triangle": (triangle, TAU / 10), "star": (star, TAU),
          "cross": (cross, TAU), "ring": (ring, 0.0), "heart": (heart, TAU / 14), "crescent": (crescent, TAU)}


def shapes(name, count, x, y, rng):
    """The figure of `count` (1 or 2) shapes of one name, each rotated, inside the picture and without overlap."""
    shape, turn = SHAPES[name]
    figure, soft = np.zeros_like(x), between(rng, *SOFT)
    for px, py, radius in places(count, rng):
        angle = between(rng, -turn / 2, turn / 2)
        c, s = float(np.cos(angle)) / radius, float(np.sin(angle)) / radius
        lx, ly = (x - px) * c + (y - py) * s, (y - py) * c - (x - px) * s
        figure = np.maximum(figure, inside(shape(lx, ly) * radius, soft=soft))
    return figure


def places(count, rng):
    """[(x, y, radius)] of one or two circles that touch neither each other nor the border."""
    if count == 1:
        return [_place(between(rng, 14, 27), rng)]
    for _ in range(100):
        radii = between(rng, 9.5, 15), between(rng, 9.5, 15)
        first, second = (_place(radius, rng) for radius in radii)
        if np.hypot(first[0] - second[0], first[1] - second[1]) > sum(radii) + 2:
            return [first, second]
    return [(-15.5, -15.5, 12.0), (15.5, 15.5, 12.0)]


def _place(radius, rng):
    """(x, y, radius) of a random circle inside the picture."""
    free = 31 - radius
    return between(rng, -free, free), between(rng, -free, free), radius


def digit(number, split, x, y, rng):
    """The figure of a random MNIST digit of the split, enlarged smoothly, moved and rotated a little."""
    samples = digits(split)[number]
    ink = enlarge(samples[int(rng.integers(len(samples)))])
    scale = 112 / between(rng, 46, 66)  # the strokes fill the middle 20 of 28 pixels
    angle = between(rng, -0.2, 0.2)
    c, s = float(np.cos(angle)), float(np.sin(angle))
    # The rotated bounding box of the ink stays inside the picture
    rows, columns = (np.flatnonzero((ink > 0.2).any(axis)) / scale for axis in (1, 0))
    top, bottom, left, right = map(float, (rows[0], rows[-1], columns[0], columns[-1]))
    half_width, half_height = (right - left) / 2, (bottom - top) / 2
    free_x = 30.5 - half_width * c - half_height * abs(s)
    free_y = 30.5 - half_height * c - half_width * abs(s)
    x, y = x - between(rng, -free_x, free_x), y - between(rng, -free_y, free_y)
    u, v = x * c + y * s + (left + right) / 2, y * c - x * s + (top + bottom) / 2
    u, v = u * scale, v * scale
    return np.clip((interpolate(ink, u, v) - 0.2) / between(rng, 0.4, 0.6), 0, 1)


def enlarge(ink):
    """float32 [128,128] in 0..1: a digit uint8 [28,28] four times as large (cubic), with an empty border of 8."""
    bordered = Image.fromarray(np.pad(ink, 2))  # `interpolate` repeats the border, and a few digits touch the edge
    return np.asarray(bordered.resize((128, 128), Image.Resampling.BICUBIC), np.float32) / 255


def interpolate(picture, u, v):
    """The picture [H,W] at columns u and rows v, bilinear between four pixels; outside, its border is repeated."""
    height, width = picture.shape
    u, v = np.clip(u, 0, width - 1.001), np.clip(v, 0, height - 1.001)
    i, j = u.astype(np.int32), v.astype(np.int32)
    u, v = u - i, v - j
    flat, start = picture.ravel(), j * width + i
    top, bottom = flat[start], flat[start + width]
    top = top + (flat[start + 1] - top) * u
    return top + (bottom + (flat[start + width + 1] - bottom) * u - top) * v


@functools.lru_cache(3)
def digits(split):
    """[uint8 [N,28,28] of each digit 0..9] in data/mnist.

    "test" is its test set, "train" the first 55,000 of its training set, "val" the last 5,000. UserError when the files
    are missing.
    """
    data = mnist.load(DATA / "mnist", "test" if split == "test" else "train")
    part = {"train": slice(0, 55_000), "val": slice(55_000, None), "test": slice(None)}[split]
    pixels, labels = data.pixels[part, 0].numpy(), data.labels[part].numpy()
    return [pixels[labels == number] for number in range(10)]
