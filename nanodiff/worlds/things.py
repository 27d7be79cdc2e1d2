"""Things on a plain ground: eight shapes, and handwritten digits of MNIST. Report: section 1.

Lengths are in pixels of a picture of 64 x 64, whatever the size that is drawn; x and y [n,n] float32 count from the
middle of the picture. A figure is [n,n] in 0..1: 0 on the ground and 1 on the thing.
"""

import functools

import numpy as np
from PIL import Image

from nanodiff.data import mnist
from nanodiff.files import DATA
from nanodiff.worlds.fields import SOFT, TAU, between, inside

# Signed distances (about so: negative inside) of shapes that fit closely into the circle of radius 1 about the origin,
# and how far each may be turned: a heart or a triangle on its head would still be one, but a digit would not


def circle(x, y):
    """A disc."""
    return np.hypot(x, y) - 0.87  # no larger than the others, that its area does not tell it


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


SHAPES = {"circle": (circle, 0.0), "square": (square, TAU), "triangle": (triangle, TAU / 10), "star": (star, TAU),
          "cross": (cross, TAU), "ring": (ring, 0.0), "heart": (heart, TAU / 14), "crescent": (crescent, TAU)}


def shapes(name, count, x, y, random):
    """`count` (1 or 2) equal shapes of one name: wholly inside the picture, apart, each turned its own way."""
    shape, turn = SHAPES[name]
    figure, soft = np.zeros_like(x), between(random, *SOFT)
    for px, py, radius in places(count, random):
        angle = between(random, -turn / 2, turn / 2)
        c, s = float(np.cos(angle)) / radius, float(np.sin(angle)) / radius
        lx, ly = (x - px) * c + (y - py) * s, (y - py) * c - (x - px) * s
        figure = np.maximum(figure, inside(shape(lx, ly) * radius, soft=soft))
    return figure


def places(count, random):
    """Where one or two things lie: a list of (x, y, radius) whose circles touch neither each other nor the border."""
    if count == 1:
        radius = between(random, 14, 27)
        free = 31 - radius
        return [(between(random, -free, free), between(random, -free, free), radius)]
    for _ in range(100):
        one, two = between(random, 9.5, 15), between(random, 9.5, 15)
        found = [(between(random, radius - 31, 31 - radius), between(random, radius - 31, 31 - radius), radius)
                 for radius in (one, two)]
        if np.hypot(found[0][0] - found[1][0], found[0][1] - found[1][1]) > one + two + 2:
            return found
    return [(-15.5, -15.5, 12.0), (15.5, 15.5, 12.0)]


def digit(number, split, x, y, random):
    """One MNIST digit (of the split's own), enlarged smoothly, moved and turned a little."""
    ink = digits(split)[number]
    ink = enlarged(ink[int(random.integers(len(ink)))])
    scale = 112 / between(random, 46, 66)  # the strokes take the middle 20 of 28 pixels
    angle = between(random, -0.2, 0.2)
    c, s = float(np.cos(angle)), float(np.sin(angle))
    # The box of the ink, turned, stays inside the picture
    rows, columns = (np.flatnonzero((ink > 0.2).any(axis)) / scale for axis in (1, 0))
    top, bottom, left, right = map(float, (rows[0], rows[-1], columns[0], columns[-1]))
    wide, high = (right - left) / 2, (bottom - top) / 2
    free_x, free_y = 30.5 - wide * c - high * abs(s), 30.5 - high * c - wide * abs(s)
    x, y = x - between(random, -free_x, free_x), y - between(random, -free_y, free_y)
    u, v = x * c + y * s + (left + right) / 2, y * c - x * s + (top + bottom) / 2
    u, v = u * scale, v * scale
    return np.clip((between_pixels(ink, u, v) - 0.2) / between(random, 0.4, 0.6), 0, 1)


def enlarged(ink):
    """uint8 [28,28] as float32 [128,128] in 0..1: four times as large, cubic, with an empty border of 8."""
    wide = Image.fromarray(np.pad(ink, 2))  # a few digits touch the edge, which goes on outside
    return np.asarray(wide.resize((128, 128), Image.Resampling.BICUBIC), np.float32) / 255


def between_pixels(picture, u, v):
    """The picture [H,W] at columns u and rows v, blended between the four pixels about; its border goes on outside."""
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
    """The digits of data/mnist, uint8 [N,28,28] for each of 0..9: its test digits, or of its training digits the first
    55,000 ("train") or the last 5,000 ("val"). UserError when the files are not there."""
    data = mnist.load(DATA / "mnist", "test" if split == "test" else "train")
    part = {"train": slice(0, 55_000), "val": slice(55_000, None), "test": slice(None)}[split]
    pixels, labels = data.pixels[part, 0].numpy(), data.labels[part].numpy()
    return [pixels[labels == number] for number in range(10)]
