"""A small world of textures and things with known truth, drawn from a seed. Report: section 1 (DTD, MNIST).

Every picture has one class, one figure colour and one ground colour, and a caption that says so (grammar.py). The
textures are a procedural counterpart of the Describable Textures Dataset (Cimpoi et al. 2014, arXiv 1311.3618), under
its class names; things are eight shapes and the digits of MNIST. Class and colours are drawn apart, light and area
vary, so that colour alone does not tell the class; strokes are 2 pixels of 64 or more and the two colours far apart,
so that a latent of 16 x 16 can hold them and a thumbnail of 8 x 8 cannot.

    picture, caption = draw(7, "honeycombed", 64)

NEW classes are drawn by the same machinery, and held out of the base model as concepts to be taught later. Each class
misses two of the eleven colours in either role (`met`): whether a model can combine them is a test of composition.
"""

import functools
import zlib
from dataclasses import dataclass

import numpy as np

from nanodiff.data import captions
from nanodiff.errors import UserError, nearest
from nanodiff.worlds import patterns, things
from nanodiff.worlds.fields import TAU, between, noise, turned

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
             "crystalline", "zigzagged", "woven")  # nobody can see which of the two colours is the figure's
CONTRAST = 46  # CIELAB units that the figure's colour is away from the ground's; 2 is just visible

UPRIGHT = {"knitted": 0.35, "scaly": 0.35, "braided": 0.3, "stratified": 0.5, "waffled": 0.5, "studded": 0.35,
           "bubbly": 0.0, "cracked": 0.0}  # radians
SPLITS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Scene:
    """What a picture shows, before it is drawn: the truth that a reader is asked for."""
    seed: int
    name: str  # one of NAMES
    colours: tuple  # (figure, ground), names of COLOURS
    count: int | None  # things: 1 or 2; digits: 1; textures: None
    split: str  # "train", "val" or "test": another split is another scene, with other digits of MNIST


def draw(seed, name, size, split="train", colours=None, count=None, pairs="met"):
    """(picture uint8 [size,size,3], caption) of one scene; the arguments and errors of `scene` and `paint`."""
    one = scene(seed, name, split, colours, count, pairs)
    return paint(one, size), captions.caption(one)


def scene(seed, name, split="train", colours=None, count=None, pairs="met"):
    """The Scene number `seed` (0, 1, ...) of a class, the same for the same arguments.

    colours  (figure, ground), names of COLOURS: anything but twice the same; None chooses among `pairs`
    count    things only: 1 or 2 of them; None chooses
    pairs    "met": those of the training world; "unmet": those that it misses; "all": both

    UserError for an unknown name, split, colour or kind of pairs, equal colours, another count, a negative seed.
    """
    _check(seed, name, split, colours, count, pairs)
    random = _random(seed, name, split, 0)
    choice = allowed(name, pairs)[int(random.integers(len(allowed(name, pairs))))]
    number = int(random.integers(1, 3)) if name in THINGS else 1 if name in DIGITS else None
    return Scene(int(seed), name, choice if colours is None else tuple(colours), count or number, split)


def paint(one, size):
    """The picture of a Scene, uint8 [size,size,3]: the same at every size, but for its resolution.

    UserError when size is below 16, where strokes would be thinner than half a pixel.
    """
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 16:
        raise UserError(f"size is {size!r}, but pictures are squares of at least 16 pixels a side; expected 64, say")
    random = _random(one.seed, one.name, one.split, 1)
    x, y = _grid(2 * int(size))  # two samples a pixel each way, averaged below
    light = _light(x, y, random)
    if one.name in THINGS:
        figure, tone = things.shapes(one.name, one.count, x, y, random), 0.0
    elif one.name in DIGITS:
        figure, tone = things.digit(DIGITS.index(one.name), one.split, x, y, random), 0.0
    else:
        figure, tone = getattr(patterns, one.name)(*_bent(x, y, UPRIGHT.get(one.name, TAU), random), random)
    tone = tone * between(random, 0.4, 1) + _relief(figure, size / 32, random) + _uneven(x, y, random)
    front, ground = (_jittered(colour, random) for colour in one.colours)
    # Shading works on black and on white alike: it both scales and shifts
    shade = light * (1 + 0.3 * tone), 42 * tone
    planes = []
    for i in range(3):
        plane = (ground[i] + (front[i] - ground[i]) * figure) * shade[0] + shade[1]
        plane = plane.reshape(size, 2, size, 2)
        planes.append((plane[:, 0, :, 0] + plane[:, 0, :, 1] + plane[:, 1, :, 0] + plane[:, 1, :, 1]) / 4)
    return np.clip(np.stack(planes, -1) + 0.5, 0, 255).astype(np.uint8)


def met(name, colour):
    """Whether the training world has the class in that colour, in either role; each class misses two of the eleven.

    UserError for an unknown class or colour.
    """
    if name not in NAMES:
        raise UserError(_unknown("class", name, NAMES))
    if colour not in COLOURS:
        raise UserError(_unknown("colour", colour, COLOURS))
    # Neighbours in the list miss different colours, and every colour is missed by about as many classes
    number = NAMES.index(name)
    return list(COLOURS).index(colour) not in {(4 * number) % 11, (4 * number + 5 + number // 11) % 11}


@functools.lru_cache(None)
def allowed(name, pairs="met"):
    """The (figure, ground) colours of a class that differ by CONTRAST: met in the training world, unmet, or all."""
    every = [(one, two) for one in COLOURS for two in COLOURS if contrast(one, two) >= CONTRAST]
    return [pair for pair in every if pairs == "all" or all(met(name, colour) for colour in pair) == (pairs == "met")]


@functools.lru_cache(None)
def contrast(one, two):
    """Distance of two of COLOURS in CIELAB (1976), as D65 shows them."""
    linear = np.array([COLOURS[one], COLOURS[two]]) / 255
    linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
    xyz = linear @ np.array([[0.4339, 0.2126, 0.0177], [0.3762, 0.7152, 0.1095], [0.1899, 0.0722, 0.8728]])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)
    return float(np.linalg.norm(lab[0] - lab[1]))


def _check(seed, name, split, colours, count, pairs):
    if name not in NAMES:
        raise UserError(_unknown("class", name, NAMES))
    if split not in SPLITS:
        raise UserError(_unknown("split", split, SPLITS))
    if pairs not in ("met", "unmet", "all"):
        raise UserError(_unknown("kind of pairs", pairs, ("met", "unmet", "all")))
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UserError(f"the seed of a scene is {seed!r}, but it must be a whole number from 0 on")
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
        raise UserError(f"figure and ground are both {colours[0]}, so nothing would be seen; expected two colours")


def _unknown(what, word, known):
    return f"no {what} is called '{word}'; expected one of {', '.join(known)}{nearest(word, known)}"


def _random(seed, name, split, stream):
    return np.random.default_rng([int(seed), zlib.crc32(name.encode()), SPLITS[split], stream])


@functools.lru_cache(8)
def _grid(n):
    """Centres of n x n samples, in 64ths of the picture's side from its middle."""
    steps = ((np.arange(n, dtype=np.float32) + 0.5) * (64 / n) - 32).astype(np.float32)
    y, x = np.meshgrid(steps, steps, indexing="ij")
    x.flags.writeable = y.flags.writeable = False
    return x, y


def _bent(x, y, turn, random):
    """The places turned by up to turn/2 either way, and bent by two slow waves."""
    u, v = turned(x, y, between(random, -turn / 2, turn / 2))
    for _ in range(2):
        direction, wave = between(random, 0, TAU), TAU / between(random, 45, 100)
        strength, push = between(random, 0, 0.25) / wave, between(random, 0, TAU)
        along = wave * (x * float(np.cos(direction)) + y * float(np.sin(direction)))
        swing = np.sin(along + between(random, 0, TAU)) * strength
        u, v = u + swing * float(np.cos(push)), v + swing * float(np.sin(push))
    return u, v


def _light(x, y, random):
    """Brightness: a slope across the picture and darker corners, 1 at the best place."""
    direction, slope, corners = between(random, 0, TAU), between(random, 0, 0.3), between(random, 0, 0.12)
    across = (x * float(np.cos(direction)) + y * float(np.sin(direction))) / 45
    return 1.06 - slope * (0.5 + 0.5 * across) - corners * (x * x + y * y) / 1024


def _relief(figure, per_pixel, random):
    """Tone of a figure that stands out or lies deep, lit from one side; for two pictures of five it is flat."""
    strength, direction = max(between(random, -0.6, 1.2), 0), between(random, 0, TAU)
    if not strength:
        return 0.0
    step = max(1, round(per_pixel))
    wide = np.pad(figure, step, mode="edge")
    right = wide[step:-step, 2 * step:] - wide[step:-step, :-2 * step]
    below = wide[2 * step:, step:-step] - wide[:-2 * step, step:-step]
    return strength * (float(np.cos(direction)) * right + float(np.sin(direction)) * below)


def _uneven(x, y, random):
    """Tone of a surface that is not quite flat."""
    strength = between(random, 0.1, 1.3)
    return strength * (noise(x, y, random, 22) - 0.5)


def _jittered(colour, random):
    """The colour with a hue, strength and brightness of its own, which is still called the same."""
    return (np.array(COLOURS[colour]) * random.uniform(0.93, 1.04) + random.uniform(-9, 9, 3)).tolist()
