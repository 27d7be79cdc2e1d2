"""Drawn pictures of textures and things with known class and colours. Report: section 1 (DTD, MNIST).

    picture, caption = draw(7, "honeycombed", 64)

Every picture has one class, one figure colour and one ground colour, and a caption that names them (nanodiff/data/captions.py).
The textures imitate the Describable Textures Dataset (Cimpoi et al. 2014, arXiv 1311.3618), under its class names.
Things are eight shapes and the digits of MNIST.

Class and colours are independent, and light and area vary, so that colour alone does not reveal the class. Strokes are
at least 2 of 64 pixels wide and the two colours differ strongly: a latent of 16 x 16 can hold a picture, a thumbnail of
8 x 8 cannot.

The NEW classes are held out of the base model and serve as new concepts for fine-tuning. Each class misses two of the
eleven colours in either role (`met`): a model that draws it in such a colour has composed what it learnt.
"""

import functools
import zlib
from dataclasses import dataclass

import numpy as np

from nanodiff.data import captions
from nanodiff.errors import UserError, nearest
from nanodiff.worlds import patterns, things
from nanodiff.worlds.fields import TAU, between, noise, rotate

TEXTURES = ("striped", "chequered", "dotted", "grid", "honeycombed", "waffled", "studded", "pleated", "crosshatched",
            "spiralled", "cobwebbed", "veined", "scaly", "interlaced", "braided", "knitted", "swirly", "paisley",
            "stratified", "wrinkled", "marbled", "blotchy", "fibrous", "cracked", "crystalline", "bubbly", "flecked")
NEW = ("zigzagged", "woven")
THINGS = tuple(things.SHAPES)
DIGITS = captions.FIGURES
NAMES = TEXTURES + NEW + THINGS + DIGITS

COLOURS = {"red": (206, 28, 36), "orange": (245, 132, 22), "yellow": (247, 222, 45), "green": (35, 150, 62),
           "blue": (32, 78, 205), "purple": (118, 42, 158), "pink": (247, 150, 188), "brown": (112, 66, 30),
           "black": (20, 20, 24), "white": (243, 243, 240), "grey": (128, 129, 131)}
SYMMETRIC = ("striped", "chequered", "pleated", "spiralled", "stratified", "wrinkled", "marbled", "blotchy", "fibrous",
             "crystalline", "zigzagged", "woven")  # figure and ground look alike, so either colour may be the figure's
CONTRAST = 46  # least distance of the two colours in CIELAB units; 2 is just visible

UPRIGHT = {"knitted": 0.35, "scaly": 0.35, "braided": 0.3, "stratified": 0.5, "waffled": 0.5, "studded": 0.35,
           "bubbly": 0.0, "cracked": 0.0}  # range of the rotation in radians; other textures: all directions
SPLITS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Scene:
    """The content of a picture: what a classifier is asked to recognise."""
    seed: int
    name: str  # one of NAMES
    colours: tuple  # (figure, ground), names of COLOURS
    count: int | None  # things: 1 or 2; digits: 1; textures: None
    split: str  # "train", "val" or "test"; each has its own scenes and its own digits of MNIST


def draw(seed, name, size, split="train", colours=None, count=None, pairs="met"):
    """(picture uint8 [size,size,3], caption) of one scene; the arguments and errors of `scene` and `paint`."""
    drawn_scene = scene(seed, name, split, colours, count, pairs)
    return paint(drawn_scene, size), captions.caption(drawn_scene)


def scene(seed, name, split="train", colours=None, count=None, pairs="met"):
    """The Scene number `seed` (0, 1, ...) of a class, the same for the same arguments.

    colours  (figure, ground), two different names of COLOURS; None: random among `pairs`
    count    of things only, 1 or 2; None: random
    pairs    "met": colours that training shows with the class; "unmet": those that it does not; "all": both

    UserError for an unknown name, split, colour or kind of pairs, equal colours, another count, a negative seed.
    """
    _check(seed, name, split, colours, count, pairs)
    rng = _generator(seed, name, split, 0)
    choices = allowed(name, pairs)
    random_colours = choices[int(rng.integers(len(choices)))]
    if name in THINGS:
        random_count = int(rng.integers(1, 3))
    else:
        random_count = 1 if name in DIGITS else None
    return Scene(int(seed), name, random_colours if colours is None else tuple(colours), count or random_count, split)


def paint(scene, size):
    """The picture of a Scene, uint8 [size,size,3]. Other sizes differ only in resolution.

    UserError when size is below 16, where strokes would be thinner than half a pixel.
    """
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 16:
        raise UserError(f"size is {size!r}, but pictures are squares of at least 16 pixels a side; expected 64, say")
    rng = _generator(scene.seed, scene.name, scene.split, 1)
    x, y = _grid(2 * int(size))  # 2 x 2 samples a pixel, averaged below
    light = _light(x, y, rng)
    if scene.name in THINGS:
        figure, tone = things.shapes(scene.name, scene.count, x, y, rng), 0.0
    elif scene.name in DIGITS:
        figure, tone = things.digit(DIGITS.index(scene.name), scene.split, x, y, rng), 0.0
    else:
        draw_pattern = getattr(patterns, scene.name)
        figure, tone = draw_pattern(*_bend(x, y, UPRIGHT.get(scene.name, TAU), rng), rng)
    tone = tone * between(rng, 0.4, 1) + _relief(figure, size / 32, rng) + _surface_tone(x, y, rng)
    front, ground = (_jitter(colour, rng) for colour in scene.colours)
    gain, offset = light * (1 + 0.3 * tone), 42 * tone  # a gain alone would not show on black
    planes = []
    for i in range(3):
        plane = (ground[i] + (front[i] - ground[i]) * figure) * gain + offset
        plane = plane.reshape(size, 2, size, 2)
        planes.append((plane[:, 0, :, 0] + plane[:, 0, :, 1] + plane[:, 1, :, 0] + plane[:, 1, :, 1]) / 4)
    return np.clip(np.stack(planes, -1) + 0.5, 0, 255).astype(np.uint8)


def met(name, colour):
    """True when training shows the class in that colour, in either role. Each class misses two of the eleven colours.

    UserError for an unknown class or colour.
    """
    if name not in NAMES:
        raise UserError(_unknown("class", name, NAMES))
    if colour not in COLOURS:
        raise UserError(_unknown("colour", colour, COLOURS))
    # Neighbours in the list miss different colours, and every colour is missing in about as many classes
    number = NAMES.index(name)
    return list(COLOURS).index(colour) not in {(4 * number) % 11, (4 * number + 5 + number // 11) % 11}


@functools.lru_cache(None)
def allowed(name, pairs="met"):
    """[(figure, ground)]: colours of a class that differ by CONTRAST: those met in training, those unmet, or all."""
    contrasting = [(figure, ground) for figure in COLOURS for ground in COLOURS
                   if contrast(figure, ground) >= CONTRAST]
    if pairs == "all":
        return contrasting
    return [pair for pair in contrasting if all(met(name, colour) for colour in pair) == (pairs == "met")]


@functools.lru_cache(None)
def contrast(first, second):
    """The distance of two of COLOURS in CIELAB (1976), under the illuminant D65."""
    linear = np.array([COLOURS[first], COLOURS[second]]) / 255
    linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
    xyz = linear @ np.array([[0.4339, 0.2126, 0.0177], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8728]])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
    return float(np.linalg.norm(lab[0] - lab[1]))


def _check(seed, name, split, colours, count, pairs):
    """UserError when one of the arguments of `scene` is wrong."""
    if name not in NAMES:
        raise UserError(_unknown("class", name, NAMES))
    if split not in SPLITS:
        raise UserError(_unknown("split", split, SPLITS))
    if pairs not in ("met", "unmet", "all"):
        raise UserError(_unknown("kind of pairs", pairs, ("met", "unmet", "all")))
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UserError(f"the seed of a scene is {seed!r}; expected a whole number from 0 on")
    if count is not None and not (name in THINGS and count in (1, 2) or name in DIGITS and count == 1):
        raise UserError(f"count is {count!r} for '{name}'; expected 1 or 2, and only for {', '.join(THINGS)}")
    if colours is None:
        return
    if isinstance(colours, str) or len(colours) != 2:
        raise UserError(f"colours are {colours!r}; expected two names, of figure and ground, e.g. ('red', 'white')")
    for colour in colours:
        if colour not in COLOURS:
            raise UserError(_unknown("colour", colour, COLOURS))
    if colours[0] == colours[1]:
        raise UserError(f"figure and ground are both {colours[0]}; expected two different colours")


def _unknown(kind, name, choices):
    """The error sentence for a name that is not among the choices."""
    return f"no {kind} is called '{name}'; expected one of {', '.join(choices)}{nearest(name, choices)}"


def _generator(seed, name, split, stream):
    """The NumPy generator of a scene: stream 0 for its content, 1 for its picture."""
    return np.random.default_rng([int(seed), zlib.crc32(name.encode()), SPLITS[split], stream])


@functools.lru_cache(8)
def _grid(n):
    """Coordinates x and y [n,n] of n x n samples, in 64ths of the picture's side from its middle."""
    steps = ((np.arange(n, dtype=np.float32) + 0.5) * (64 / n) - 32).astype(np.float32)
    y, x = np.meshgrid(steps, steps, indexing="ij")
    x.flags.writeable = y.flags.writeable = False
    return x, y


def _bend(x, y, turn, rng):
    """The coordinates rotated by up to turn/2 either way, and bent by two slow waves."""
    u, v = rotate(x, y, between(rng, -turn / 2, turn / 2))
    for _ in range(2):
        direction, wave = between(rng, 0, TAU), TAU / between(rng, 45, 100)
        strength, push = between(rng, 0, 0.25) / wave, between(rng, 0, TAU)
        along = wave * (x * float(np.cos(direction)) + y * float(np.sin(direction)))
        swing = np.sin(along + between(rng, 0, TAU)) * strength
        u, v = u + swing * float(np.cos(push)), v + swing * float(np.sin(push))
    return u, v


def _light(x, y, rng):
    """Brightness [n,n], about 1 at its maximum: a slope across the picture, and darker corners."""
    direction, slope, corners = between(rng, 0, TAU), between(rng, 0, 0.3), between(rng, 0, 0.12)
    across = (x * float(np.cos(direction)) + y * float(np.sin(direction))) / 45
    return 1.06 - slope * (0.5 + 0.5 * across) - corners * (x * x + y * y) / 1024


def _relief(figure, per_pixel, rng):
    """The tone [n,n] of a figure in relief, lit from one side; 0 in one of three pictures."""
    strength, direction = max(between(rng, -0.6, 1.2), 0), between(rng, 0, TAU)
    if not strength:
        return 0.0
    step = max(1, round(per_pixel))
    padded = np.pad(figure, step, mode="edge")
    slope_x = padded[step:-step, 2 * step:] - padded[step:-step, :-2 * step]
    slope_y = padded[2 * step:, step:-step] - padded[:-2 * step, step:-step]
    return strength * (float(np.cos(direction)) * slope_x + float(np.sin(direction)) * slope_y)


def _surface_tone(x, y, rng):
    """The tone [n,n] of a slightly uneven surface."""
    strength = between(rng, 0.1, 1.3)
    return strength * (noise(x, y, rng, 22) - 0.5)


def _jitter(colour, rng):
    """[red, green, blue] of a named colour with random deviations too small to change its name."""
    return (np.array(COLOURS[colour]) * rng.uniform(0.93, 1.04) + rng.uniform(-9, 9, 3)).tolist()
