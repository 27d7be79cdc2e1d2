"""The drawers of the textures of textures.py: where the figure lies and how it is shaded. Report: section 1 (DTD).

Lengths are in pixels of a picture of 64 x 64, whatever the size that is drawn; x and y [n,n] float32 count from the
middle of the picture and are turned and bent by the caller. `random` is a NumPy generator, and what a drawer takes
from it does not depend on n, so that one seed is one scene at every size.

A drawer returns (figure, tone), each [n,n] or a number: figure is 0 on the ground and 1 on the figure, tone -1 in the
deepest shade and 1 in the brightest light. Each keeps at least 15 % of the picture for either colour and draws nothing
thinner than 2 pixels. The class names are 29 of the 47 of Cimpoi et al. 2014 (arXiv 1311.3618). Each is
defined by its order, so that no two overlap; those of DTD that would (lined, banded, polka-dotted ...) are left out.
"""

import numpy as np

from nanodiff.worlds.fields import (SOFT, TAU, between, cell, covering, hexagon, inside, nearest_two, noise, of_cell,
                                    over_and_under, steeper, to_nearest, turned)


# --- straight and regular -----------------------------------------------------------------------------------------

def striped(x, y, random):
    """Equal straight stripes."""
    return covering(to_nearest(x, between(random, 9, 17)), (0.35, 0.65), random), 0.0


def chequered(x, y, random):
    """A board of squares."""
    pitch = between(random, 8, 13)
    high = pitch * between(random, 0.85, 1.18)
    column, row, lx, ly = cell(x, y, pitch, high)
    reach = np.minimum(pitch / 2 - np.abs(lx), high / 2 - np.abs(ly))
    return inside(np.where((column + row) % 2 == 0, reach, -reach) + between(random, -0.5, 0.5), random), 0.0


def dotted(x, y, random):
    """Equal flat discs in rows."""
    pitch = between(random, 12, 17)
    shift = 0.5 * (random.random() < 0.5)
    _, _, lx, ly = cell(x, y, pitch, pitch * (0.87 if shift else 1), shift)
    return covering(np.hypot(lx, ly), (0.2, 0.36), random), 0.0


def grid(x, y, random):
    """Thin lines that cross at right angles."""
    pitch = between(random, 11, 17)
    field = np.minimum(to_nearest(x, pitch), to_nearest(y, pitch * between(random, 0.85, 1.18)))
    return covering(field, (0.3, 0.45), random), 0.0


def honeycombed(x, y, random):
    """Hexagonal cells with thin walls."""
    return covering(hexagon(x, y, between(random, 13, 19)), (0.28, 0.45), random), 0.0


def waffled(x, y, random):
    """Broad ridges round square pits, whose walls are lit from one side."""
    pitch = between(random, 14, 19)
    _, _, lx, ly = cell(x, y, pitch, pitch)
    half = pitch * between(random, 0.33, 0.39)  # of a pit
    pit = np.maximum(np.abs(lx), np.abs(ly)) - half
    slope = np.where(np.abs(lx) > np.abs(ly), np.sign(lx) * 0.8, np.sign(ly))
    return inside(-pit, random), 0.9 * slope * (pit < 0) * (pit > -half * 0.65)


def studded(x, y, random):
    """Pyramids in rows: four faces, each lit in its own way."""
    pitch = between(random, 15, 20)
    _, _, lx, ly = cell(x, y, pitch, pitch * between(random, 0.85, 1), 0.5)
    figure = inside(np.abs(lx) + np.abs(ly) - pitch * between(random, 0.4, 0.46), random)
    face = np.where(lx < 0, np.where(ly < 0, 1.0, 0.25), np.where(ly < 0, -0.4, -1.0))
    return figure, face * figure


def pleated(x, y, random):
    """Folds: each runs smoothly from one colour to the other and ends at a sharp edge."""
    pitch = between(random, 11, 18)
    u = x / pitch - np.floor(x / pitch)
    fall = np.clip((1 - u) * pitch / between(random, *SOFT), 0, 1)
    start, end = between(random, 0, 0.25), between(random, 0.7, 1)
    return np.clip((u - start) / (end - start), 0, 1) ** between(random, 0.7, 1.4) * fall, 0.0


def crosshatched(x, y, random):
    """Short pen strokes in two slanting directions."""
    slant, pitch = between(random, 0.45, 0.75), between(random, 7.5, 10)
    field = np.full_like(x, 99)
    for angle in (slant, -slant):
        along, across = turned(x, y, angle)
        length = between(random, 28, 42)
        line = np.rint(across / pitch)
        row = line.astype(np.int32)
        start = of_cell(random, row * 0, row, 0, length)
        centre = np.rint((along - start) / length) * length + start
        end = np.maximum(np.abs(along - centre) - (length / 2 - 3), 0)
        field = np.minimum(field, np.hypot(across - line * pitch - of_cell(random, row * 0 + 1, row, -1.2, 1.2), end))
    return covering(field, (0.38, 0.5), random), 0.0


# --- about one centre ---------------------------------------------------------------------------------------------

def spiralled(x, y, random):
    """One spiral of one to three arms."""
    x, y = x - between(random, -9, 9), y - between(random, -9, 9)
    arms = int(random.integers(1, 4)) * (1 if random.random() < 0.5 else -1)
    turns = np.hypot(x, y) / between(random, 10, 15) - arms * np.arctan2(y, x) / TAU
    return covering(to_nearest(turns, 1.0) * 12, (0.35, 0.6), random), 0.0


def cobwebbed(x, y, random):
    """Spokes from one centre with sagging threads between them."""
    x, y = x - between(random, -12, 12), y - between(random, -12, 12)
    sector = TAU / int(random.integers(7, 11))
    radius, angle = np.hypot(x, y), np.arctan2(y, x) + between(random, 0, 6)
    off = to_nearest(angle, sector)  # from the nearest spoke
    sag = 1 - between(random, 0.22, 0.34) * (1 - (1 - 2 * off / sector) ** 2)
    thread = to_nearest(radius / sag + between(random, 0, 5), between(random, 10, 13)) * sag
    return covering(np.minimum(thread, radius * np.sin(off)), (0.33, 0.45), random), 0.0


def veined(x, y, random):
    """A leaf: one thick midrib, side veins that leave it slantwise on both sides and thin out."""
    x = x - between(random, -8, 8)
    pitch, rise = between(random, 11, 15), between(random, 0.6, 1.0)
    out = np.abs(x)
    along = y + rise * out + out * out * between(random, 0.004, 0.012) + np.sign(x) * (pitch / 4)
    side = to_nearest(along, pitch) / (1 + rise * rise) ** 0.5
    field = np.minimum(out - between(random, 1.2, 1.8), side + out * 0.012)
    return covering(field, (0.3, 0.42), random), 0.0


# --- curved and regular -------------------------------------------------------------------------------------------

def scaly(x, y, random):
    """Rows of round scales, each row lying half on the next."""
    wide = between(random, 13, 19)
    radius, high = wide * 0.56, wide * 0.5
    figure, tone = np.zeros_like(x), np.zeros_like(x)
    line, soft = between(random, 1.0, 1.5), between(random, *SOFT)
    top = np.floor(y / high)
    for step in (2, 1, 0, -1):  # the row above is painted later, for it lies on top
        row = top + step
        start = (row % 2) * (wide / 2)
        lx = x - start - wide * np.rint((x - start) / wide)
        distance = np.hypot(lx, y - (row - 1) * high) - radius
        scale = inside(distance, soft=soft)
        figure += (inside(distance + 2 * line, soft=soft) - figure) * scale
        tone += (np.clip((y - (row - 1) * high) / radius, -1, 1) - tone) * scale
    return figure, 0.7 * tone * figure


def interlaced(x, y, random):
    """Chains of linked rings: each ring passes over the next on one side and under it on the other."""
    pitch, half = between(random, 15, 18.5), between(random, 1.7, 2.2)
    radius, soft = pitch * between(random, 0.69, 0.74), between(random, *SOFT)
    _, _, lx, ly = cell(x + pitch / 2, y - 16, pitch, 2 * (radius + half) + between(random, 2, 5), 0.5)
    rings = []
    for mx in (lx - pitch, lx, lx + pitch):
        away = np.abs(np.sqrt(mx * mx + ly * ly) - radius) - half
        rings.append((away, mx * ly / (mx * mx + ly * ly + 1e-6)))  # half the sine of twice the angle about the ring
    figure, tone = over_and_under(rings, half, 1.2, soft)
    return figure, (np.clip(tone, 0, 1) * 1.1 - 0.4) * figure


def braided(x, y, random):
    """Ropes of three strands that cross over and under each other."""
    wide = between(random, 22, 32)
    length = wide * between(random, 1.3, 1.7)
    x = x - between(random, 0, 20)
    x = x - wide * np.rint(x / wide)
    half, soft = wide * between(random, 0.115, 0.155), between(random, *SOFT)
    strands = []
    for strand in range(3):
        phase = TAU * (y / length + strand / 3)
        slope = wide * 0.3 * TAU / length * np.cos(phase)
        away = np.abs(x - wide * 0.3 * np.sin(phase)) / np.sqrt(1 + slope * slope) - half
        strands.append((away, np.sin(2 * phase)))
    figure, tone = over_and_under(strands, half, 1, soft)
    return figure, (np.clip(tone, 0, 1) * 1.2 - 0.6) * figure


def knitted(x, y, random):
    """Columns of stitches: two slanting loops make a V."""
    wide, high = between(random, 13, 17), between(random, 8.5, 10.5)
    column = np.rint(x / wide)
    lx = x - column * wide
    ly = y + np.abs(lx) * between(random, 0.75, 1.0)
    ly = ly - high * np.rint(ly / high)
    mx = (np.abs(lx) - wide / 4) / (wide / 4)
    loop = 1 - mx * mx * between(random, 1, 1.3) - (ly / (high * between(random, 0.36, 0.45))) ** 2
    figure = inside(-loop * high * 0.3, random)
    return figure, (np.clip(loop, 0, 1) - 0.4) * figure


def swirly(x, y, random):
    """Several curls, each wound its own way."""
    pitch = between(random, 21, 27)
    column, row, lx, ly = cell(x + between(random, 0, 30), y + between(random, 0, 30), pitch, pitch * 0.9, 0.5)
    hand = np.sign(of_cell(random, column, row, -1, 1))
    step = between(random, 6.3, 7.5)
    angle = hand * np.arctan2(ly, lx) / TAU + of_cell(random, column, row)
    radius = np.hypot(lx, ly) / step
    arm = np.rint(radius - angle)
    end = pitch * 0.47 / step  # turns from the middle, where the arm is cut across
    field = np.maximum(np.abs(radius - angle - arm), arm + angle - end + 0.25) * step
    return inside(field - between(random, 1.5, 2.0), random), 0.0


def paisley(x, y, random):
    """Bent drops with an eye, each turned its own way."""
    pitch = between(random, 19, 24)
    column, row, lx, ly = cell(x, y, pitch, pitch * 0.95, 0.5)
    turn = of_cell(random, column, row, 0, TAU) if random.random() < 0.5 else between(random, 0, TAU)
    lx, ly = turned(lx, ly, turn)
    size = pitch * between(random, 0.25, 0.31)
    lx, ly = lx / size + 0.25, ly / size + 0.45
    lx = lx - 0.3 * np.clip(ly, 0, 3) ** 2
    tail = np.clip(1 - np.clip(ly, 0, 9) / 2.1, 0, 1) ** 0.8
    drop = np.where(ly < 0, np.hypot(lx, ly) - 1, np.maximum(np.abs(lx) - tail, ly - 2.1)) * size
    eye = (np.hypot(lx, ly) - 0.42) * size
    return inside(np.maximum(drop, -eye), random), 0.0


# --- irregular ----------------------------------------------------------------------------------------------------

def stratified(x, y, random):
    """Layers of uneven thickness and several tones, each boundary with a course of its own."""
    bend = 5 * (noise(x, y, random, 22, 26) - 0.5) + 7 * (noise(x, y, random, 46, 30) - 0.5)
    tops = -60 + np.cumsum(random.uniform(3.5, 11.5, 28))
    tones = between(random, 0, 0.35) * random.random(29)
    tones[::2] = 1 - tones[::2]
    soft = between(random, *SOFT)
    stops = np.stack([tops - soft / 2, tops + soft / 2], 1).ravel()
    return np.interp(y + bend, stops, np.repeat(tones, 2)[1:-1]).astype(np.float32), 0.0


def wrinkled(x, y, random):
    """Lit folds that run roughly one way, and fork and end."""
    height = np.zeros_like(x)
    pitch = between(random, 9, 13)
    for angle in np.linspace(-0.55, 0.55, 7) + random.uniform(-0.08, 0.08, 7):
        wave = TAU / (pitch * between(random, 0.85, 1.18))
        height += np.sin(wave * (x * float(np.sin(angle)) + y * float(np.cos(angle))) + between(random, 0, TAU))
    level = between(random, -0.5, 0.5)
    return steeper(0.5 + (height - level) * 0.3, random, 6), np.clip(height / 3, -1, 1) * 0.4


def marbled(x, y, random):
    """Bands drawn out and stirred into each other."""
    stir = noise(x, y, random, 17) + 0.35 * noise(x, y, random, 8)
    phase = x / between(random, 26, 40) + between(random, 2.2, 3.0) * stir
    band = 0.5 + 0.5 * np.sin(TAU * phase)
    return steeper(band ** between(random, 0.8, 1.6), random, 7), 0.0


def blotchy(x, y, random):
    """Ragged patches without any order."""
    lumps = noise(x, y, random, between(random, 9, 13)) + 0.3 * noise(x, y, random, 4.5)
    return covering(-12 * lumps, (0.35, 0.6), random), 0.0


def fibrous(x, y, random):
    """Many fine fibres side by side, none as long as the picture."""
    strands = noise(x, y, random, between(random, 20, 28), between(random, 2.6, 3.4))
    return covering(-6 * strands, (0.35, 0.6), random), 0.0


def cracked(x, y, random):
    """Irregular pieces with jagged cracks between them."""
    jag = between(random, 4, 6)
    x, y = x + jag * (noise(x, y, random, 6) - 0.5), y + jag * (noise(x, y, random, 6) - 0.5)
    first, second, _ = nearest_two(x, y, random, between(random, 16, 20))
    return covering((second - first) / 2, (0.24, 0.4), random), 0.0


def crystalline(x, y, random):
    """Flat facets with straight edges, each with a tone of its own."""
    stretch = between(random, 1.3, 1.9)
    _, _, value = nearest_two(x, y / stretch, random, between(random, 9, 13))
    return steeper(1.5 * value - 0.25, random, 1.7), 1.8 * ((value * 7) % 1) - 0.9


def bubbly(x, y, random):
    """Round bubbles of many sizes: a rim and a glint."""
    radii = np.concatenate([random.uniform(8, 13, 8), random.uniform(5.5, 8, 50), random.uniform(4, 5.5, 80)])
    middles = random.uniform(-40, 40, (138, 2))
    away = np.hypot(*(middles[:, None] - middles).transpose(2, 0, 1))
    near, free, kept = away < radii + radii[:, None] + 1, np.ones(138, bool), []
    for i in range(138):  # the large ones first, then what still fits
        if free[i]:
            kept.append((*middles[i].tolist(), float(radii[i])))
            free &= ~near[i]
    rim, glint = np.full_like(x, 99), np.full_like(x, 99)
    for px, py, radius in kept:
        lx, ly = x - px, y - py
        rim = np.minimum(rim, np.abs(np.sqrt(lx * lx + ly * ly) - radius))
        lx += radius * 0.35
        ly += radius * 0.35
        glint = np.minimum(glint, np.sqrt(lx * lx + ly * ly) - radius * 0.25)
    soft = between(random, *SOFT)
    glint = inside(glint, soft=soft)
    return np.maximum(inside(rim - between(random, 1.1, 1.5), soft=soft), glint), glint


def flecked(x, y, random):
    """Short dashes strewn in all directions."""
    pitch = between(random, 7.6, 9.4)
    column, row, lx, ly = cell(x, y, pitch, pitch, between(random, 0.2, 0.5))
    lx, ly = lx - of_cell(random, column, row, -1, 1), ly - of_cell(random, column, row, -1, 1)
    lx, ly = turned(lx, ly, of_cell(random, column, row, 0, TAU))
    along = np.abs(lx) - of_cell(random, column, row, 1, 2.2) * between(random, 0.8, 1.1)
    thick = of_cell(random, column, row, 1.3, 1.8) * between(random, 0.9, 1.15)
    distance = np.hypot(np.maximum(along, 0), ly) - thick
    return inside(np.where(of_cell(random, column, row) < 0.08, 9, distance), random), 0.0


# --- held out of the base model -----------------------------------------------------------------------------------

def zigzagged(x, y, random):
    """Stripes that run up and down in sharp corners."""
    wave, pitch = between(random, 18, 28), between(random, 10, 15)
    steep = between(random, 0.8, 1.3)
    return covering(to_nearest(y + steep * 2 ** 0.5 * to_nearest(x, wave), pitch), (0.38, 0.62), random), 0.0


def woven(x, y, random):
    """Flat yarns of two colours that pass over and under each other in turn."""
    pitch = between(random, 9, 13)
    column, row, lx, ly = cell(x, y, pitch, pitch)
    upright = (column + row) % 2 == 0
    across, along = np.where(upright, lx, ly), np.where(upright, ly, lx)
    half = pitch * between(random, 0.4, 0.44)
    tone = 0.9 - 1.1 * (along / (pitch / 2)) ** 2
    gap = inside(np.abs(across) - half, random)
    return upright.astype(np.float32), tone * gap - 2 * (1 - gap)
