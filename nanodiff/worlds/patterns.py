"""One function per texture of textures.py: the shape of its figure, and its shading. Report: section 1 (DTD).

Lengths are in pixels of a picture of 64 x 64, whatever the size that is drawn. x and y [n,n] float32 are coordinates
from the middle of the picture; the caller has rotated and bent them. `rng` is a NumPy generator. The number of draws
from it does not depend on n, so that a seed gives the same scene at every size.

Each function returns (figure, tone), each [n,n] or a number. figure is 0 on the ground and 1 on the figure; tone is -1
in the deepest shade and 1 in the brightest light. Either colour covers at least 15 % of the picture, and nothing is
thinner than 2 pixels.

The class names are 29 of the 47 of Cimpoi et al. 2014 (arXiv 1311.3618). Classes of DTD whose patterns would overlap
with these (lined, banded, polka-dotted ...) are left out.
"""

import numpy as np

from nanodiff.worlds.fields import (SOFT, TAU, between, cell, cell_values, cover, hexagon, inside, nearest_two, noise,
                                    over_and_under, rotate, steepen, to_nearest)


# --- straight and regular -----------------------------------------------------------------------------------------

def striped(x, y, rng):
    """Equal straight stripes."""
    return cover(to_nearest(x, between(rng, 9, 17)), (0.35, 0.65), rng), 0.0


def chequered(x, y, rng):
    """A board of squares."""
    pitch = between(rng, 8, 13)
    height = pitch * between(rng, 0.85, 1.18)
    column, row, lx, ly = cell(x, y, pitch, height)
    reach = np.minimum(pitch / 2 - np.abs(lx), height / 2 - np.abs(ly))
    return inside(np.where((column + row) % 2 == 0, reach, -reach) + between(rng, -0.5, 0.5), rng), 0.0


def dotted(x, y, rng):
    """Equal flat discs in rows."""
    pitch = between(rng, 12, 17)
    shift = 0.5 * (rng.random() < 0.5)
    _, _, lx, ly = cell(x, y, pitch, pitch * (0.87 if shift else 1), shift)
    return cover(np.hypot(lx, ly), (0.2, 0.36), rng), 0.0


def grid(x, y, rng):
    """Thin lines that cross at right angles."""
    pitch = between(rng, 11, 17)
    field = np.minimum(to_nearest(x, pitch), to_nearest(y, pitch * between(rng, 0.85, 1.18)))
    return cover(field, (0.3, 0.45), rng), 0.0


def honeycombed(x, y, rng):
    """Hexagonal cells with thin walls."""
    return cover(hexagon(x, y, between(rng, 13, 19)), (0.28, 0.45), rng), 0.0


def waffled(x, y, rng):
    """Broad ridges round square pits, whose walls are lit from one side."""
    pitch = between(rng, 14, 19)
    _, _, lx, ly = cell(x, y, pitch, pitch)
    pit_half = pitch * between(rng, 0.33, 0.39)
    pit = np.maximum(np.abs(lx), np.abs(ly)) - pit_half
    slope = np.where(np.abs(lx) > np.abs(ly), np.sign(lx) * 0.8, np.sign(ly))
    return inside(-pit, rng), 0.9 * slope * (pit < 0) * (pit > -pit_half * 0.65)


def studded(x, y, rng):
    """Pyramids in rows: four faces of different brightness."""
    pitch = between(rng, 15, 20)
    _, _, lx, ly = cell(x, y, pitch, pitch * between(rng, 0.85, 1), 0.5)
    figure = inside(np.abs(lx) + np.abs(ly) - pitch * between(rng, 0.4, 0.46), rng)
    face = np.where(lx < 0, np.where(ly < 0, 1.0, 0.25), np.where(ly < 0, -0.4, -1.0))
    return figure, face * figure


def pleated(x, y, rng):
    """Folds: each runs smoothly from one colour to the other and ends at a sharp edge."""
    pitch = between(rng, 11, 18)
    phase = x / pitch - np.floor(x / pitch)
    edge = np.clip((1 - phase) * pitch / between(rng, *SOFT), 0, 1)
    start, end = between(rng, 0, 0.25), between(rng, 0.7, 1)
    return np.clip((phase - start) / (end - start), 0, 1) ** between(rng, 0.7, 1.4) * edge, 0.0


def crosshatched(x, y, rng):
    """Short pen strokes in two slanting directions."""
    slant, pitch = between(rng, 0.45, 0.75), between(rng, 7.5, 10)
    field = np.full_like(x, 99)
    for angle in (slant, -slant):
        along, across = rotate(x, y, angle)
        length = between(rng, 28, 42)
        line_number = np.rint(across / pitch)
        row = line_number.astype(np.int32)
        start = cell_values(rng, row * 0, row, 0, length)
        centre = np.rint((along - start) / length) * length + start
        end = np.maximum(np.abs(along - centre) - (length / 2 - 3), 0)
        offset = across - line_number * pitch - cell_values(rng, row * 0 + 1, row, -1.2, 1.2)
        field = np.minimum(field, np.hypot(offset, end))
    return cover(field, (0.38, 0.5), rng), 0.0


# --- round one centre ---------------------------------------------------------------------------------------------

def spiralled(x, y, rng):
    """One spiral of one to three arms."""
    x, y = x - between(rng, -9, 9), y - between(rng, -9, 9)
    arms = int(rng.integers(1, 4)) * (1 if rng.random() < 0.5 else -1)
    turns = np.hypot(x, y) / between(rng, 10, 15) - arms * np.arctan2(y, x) / TAU
    return cover(to_nearest(turns, 1.0) * 12, (0.35, 0.6), rng), 0.0


def cobwebbed(x, y, rng):
    """Spokes from one centre with sagging threads between them."""
    x, y = x - between(rng, -12, 12), y - between(rng, -12, 12)
    sector = TAU / int(rng.integers(7, 11))
    radius, angle = np.hypot(x, y), np.arctan2(y, x) + between(rng, 0, 6)
    from_spoke = to_nearest(angle, sector)  # radians to the nearest spoke
    sag = 1 - between(rng, 0.22, 0.34) * (1 - (1 - 2 * from_spoke / sector) ** 2)
    thread = to_nearest(radius / sag + between(rng, 0, 5), between(rng, 10, 13)) * sag
    return cover(np.minimum(thread, radius * np.sin(from_spoke)), (0.33, 0.45), rng), 0.0


def veined(x, y, rng):
    """A leaf: one thick midrib, side veins that leave it slantwise on both sides and thin out."""
    x = x - between(rng, -8, 8)
    pitch, rise = between(rng, 11, 15), between(rng, 0.6, 1.0)
    distance = np.abs(x)
    along = y + rise * distance + distance * distance * between(rng, 0.004, 0.012) + np.sign(x) * (pitch / 4)
    side = to_nearest(along, pitch) / (1 + rise * rise) ** 0.5
    field = np.minimum(distance - between(rng, 1.2, 1.8), side + distance * 0.012)
    return cover(field, (0.3, 0.42), rng), 0.0


# --- curved and regular -------------------------------------------------------------------------------------------

def scaly(x, y, rng):
    """Rows of round scales, each row lying half on the next."""
    width = between(rng, 13, 19)
    radius, height = width * 0.56, width * 0.5
    figure, tone = np.zeros_like(x), np.zeros_like(x)
    gap, soft = between(rng, 1.0, 1.5), between(rng, *SOFT)
    row_above = np.floor(y / height)
    for step in (2, 1, 0, -1):  # each row lies on top of the one below, so it is painted later
        row = row_above + step
        start = (row % 2) * (width / 2)
        lx = x - start - width * np.rint((x - start) / width)
        distance = np.hypot(lx, y - (row - 1) * height) - radius
        scale = inside(distance, soft=soft)
        figure += (inside(distance + 2 * gap, soft=soft) - figure) * scale
        tone += (np.clip((y - (row - 1) * height) / radius, -1, 1) - tone) * scale
    return figure, 0.7 * tone * figure


def interlaced(x, y, rng):
    """Chains of linked rings: each ring passes over the next on one side and under it on the other."""
    pitch, half = between(rng, 15, 18.5), between(rng, 1.7, 2.2)
    radius, soft = pitch * between(rng, 0.69, 0.74), between(rng, *SOFT)
    _, _, lx, ly = cell(x + pitch / 2, y - 16, pitch, 2 * (radius + half) + between(rng, 2, 5), 0.5)
    rings = []
    for mx in (lx - pitch, lx, lx + pitch):
        distance = np.abs(np.sqrt(mx * mx + ly * ly) - radius) - half
        height = mx * ly / (mx * mx + ly * ly + 1e-6)  # half the sine of twice the angle round the ring
        rings.append((distance, height))
    figure, tone = over_and_under(rings, half, 1.2, soft)
    return figure, (np.clip(tone, 0, 1) * 1.1 - 0.4) * figure


def braided(x, y, rng):
    """Ropes of three strands that cross over and under each other."""
    width = between(rng, 22, 32)
    length = width * between(rng, 1.3, 1.7)
    x = x - between(rng, 0, 20)
    x = x - width * np.rint(x / width)
    half, soft = width * between(rng, 0.115, 0.155), between(rng, *SOFT)
    strands = []
    for strand in range(3):
        phase = TAU * (y / length + strand / 3)
        slope = width * 0.3 * TAU / length * np.cos(phase)
        distance = np.abs(x - width * 0.3 * np.sin(phase)) / np.sqrt(1 + slope * slope) - half
        strands.append((distance, np.sin(2 * phase)))
    figure, tone = over_and_under(strands, half, 1, soft)
    return figure, (np.clip(tone, 0, 1) * 1.2 - 0.6) * figure


def knitted(x, y, rng):
    """Columns of stitches: two slanting loops make a V."""
    width, height = between(rng, 13, 17), between(rng, 8.5, 10.5)
    column = np.rint(x / width)
    lx = x - column * width
    ly = y + np.abs(lx) * between(rng, 0.75, 1.0)
    ly = ly - height * np.rint(ly / height)
    mx = (np.abs(lx) - width / 4) / (width / 4)
    loop = 1 - mx * mx * between(rng, 1, 1.3) - (ly / (height * between(rng, 0.36, 0.45))) ** 2
    figure = inside(-loop * height * 0.3, rng)
    return figure, (np.clip(loop, 0, 1) - 0.4) * figure


def swirly(x, y, rng):
    """Curls, some clockwise and some anticlockwise."""
    pitch = between(rng, 21, 27)
    column, row, lx, ly = cell(x + between(rng, 0, 30), y + between(rng, 0, 30), pitch, pitch * 0.9, 0.5)
    hand = np.sign(cell_values(rng, column, row, -1, 1))
    step = between(rng, 6.3, 7.5)
    angle = hand * np.arctan2(ly, lx) / TAU + cell_values(rng, column, row)
    radius = np.hypot(lx, ly) / step
    arm = np.rint(radius - angle)
    end = pitch * 0.47 / step  # turns from the middle at which the arm ends
    field = np.maximum(np.abs(radius - angle - arm), arm + angle - end + 0.25) * step
    return inside(field - between(rng, 1.5, 2.0), rng), 0.0


def paisley(x, y, rng):
    """Bent drops with an eye, all in one direction or each in its own."""
    pitch = between(rng, 19, 24)
    column, row, lx, ly = cell(x, y, pitch, pitch * 0.95, 0.5)
    angle = cell_values(rng, column, row, 0, TAU) if rng.random() < 0.5 else between(rng, 0, TAU)
    lx, ly = rotate(lx, ly, angle)
    size = pitch * between(rng, 0.25, 0.31)
    lx, ly = lx / size + 0.25, ly / size + 0.45
    lx = lx - 0.3 * np.clip(ly, 0, 3) ** 2
    tail = np.clip(1 - np.clip(ly, 0, 9) / 2.1, 0, 1) ** 0.8
    drop = np.where(ly < 0, np.hypot(lx, ly) - 1, np.maximum(np.abs(lx) - tail, ly - 2.1)) * size
    eye = (np.hypot(lx, ly) - 0.42) * size
    return inside(np.maximum(drop, -eye), rng), 0.0


# --- irregular ----------------------------------------------------------------------------------------------------

def stratified(x, y, rng):
    """Layers of uneven thickness and several tones, with wavy boundaries."""
    bend = 5 * (noise(x, y, rng, 22, 26) - 0.5) + 7 * (noise(x, y, rng, 46, 30) - 0.5)
    tops = -60 + np.cumsum(rng.uniform(3.5, 11.5, 28))
    tones = between(rng, 0, 0.35) * rng.random(29)
    tones[::2] = 1 - tones[::2]
    soft = between(rng, *SOFT)
    stops = np.stack([tops - soft / 2, tops + soft / 2], 1).ravel()
    return np.interp(y + bend, stops, np.repeat(tones, 2)[1:-1]).astype(np.float32), 0.0


def wrinkled(x, y, rng):
    """Lit folds that run roughly one way, and fork and end."""
    height = np.zeros_like(x)
    pitch = between(rng, 9, 13)
    for angle in np.linspace(-0.55, 0.55, 7) + rng.uniform(-0.08, 0.08, 7):
        wave = TAU / (pitch * between(rng, 0.85, 1.18))
        height += np.sin(wave * (x * float(np.sin(angle)) + y * float(np.cos(angle))) + between(rng, 0, TAU))
    level = between(rng, -0.5, 0.5)
    return steepen(0.5 + (height - level) * 0.3, rng, 6), np.clip(height / 3, -1, 1) * 0.4


def marbled(x, y, rng):
    """Bands drawn out and stirred into each other."""
    stir = noise(x, y, rng, 17) + 0.35 * noise(x, y, rng, 8)
    phase = x / between(rng, 26, 40) + between(rng, 2.2, 3.0) * stir
    band = 0.5 + 0.5 * np.sin(TAU * phase)
    return steepen(band ** between(rng, 0.8, 1.6), rng, 7), 0.0


def blotchy(x, y, rng):
    """Ragged patches without any order."""
    lumps = noise(x, y, rng, between(rng, 9, 13)) + 0.3 * noise(x, y, rng, 4.5)
    return cover(-12 * lumps, (0.35, 0.6), rng), 0.0


def fibrous(x, y, rng):
    """Many fine fibres side by side, none as long as the picture."""
    strands = noise(x, y, rng, between(rng, 20, 28), between(rng, 2.6, 3.4))
    return cover(-6 * strands, (0.35, 0.6), rng), 0.0


def cracked(x, y, rng):
    """Irregular pieces with jagged cracks between them."""
    jag = between(rng, 4, 6)
    x, y = x + jag * (noise(x, y, rng, 6) - 0.5), y + jag * (noise(x, y, rng, 6) - 0.5)
    first, second, _ = nearest_two(x, y, rng, between(rng, 16, 20))
    return cover((second - first) / 2, (0.24, 0.4), rng), 0.0


def crystalline(x, y, rng):
    """Flat facets with straight edges and different tones."""
    stretch = between(rng, 1.3, 1.9)
    _, _, value = nearest_two(x, y / stretch, rng, between(rng, 9, 13))
    return steepen(1.5 * value - 0.25, rng, 1.7), 1.8 * ((value * 7) % 1) - 0.9


def bubbly(x, y, rng):
    """Round bubbles of many sizes: a rim and a glint."""
    radii = np.concatenate([rng.uniform(8, 13, 8), rng.uniform(5.5, 8, 50), rng.uniform(4, 5.5, 80)])
    centres = rng.uniform(-40, 40, (138, 2))
    distances = np.hypot(*(centres[:, None] - centres).transpose(2, 0, 1))
    overlap, free, bubbles = distances < radii + radii[:, None] + 1, np.ones(138, bool), []
    for i in range(138):  # large ones first, then those that still fit
        if free[i]:
            bubbles.append((*centres[i].tolist(), float(radii[i])))
            free &= ~overlap[i]
    rim, glint = np.full_like(x, 99), np.full_like(x, 99)
    for px, py, radius in bubbles:
        lx, ly = x - px, y - py
        rim = np.minimum(rim, np.abs(np.sqrt(lx * lx + ly * ly) - radius))
        lx += radius * 0.35
        ly += radius * 0.35
        glint = np.minimum(glint, np.sqrt(lx * lx + ly * ly) - radius * 0.25)
    soft = between(rng, *SOFT)
    glint = inside(glint, soft=soft)
    return np.maximum(inside(rim - between(rng, 1.1, 1.5), soft=soft), glint), glint


def flecked(x, y, rng):
    """Short dashes strewn in all directions."""
    pitch = between(rng, 7.6, 9.4)
    column, row, lx, ly = cell(x, y, pitch, pitch, between(rng, 0.2, 0.5))
    lx, ly = lx - cell_values(rng, column, row, -1, 1), ly - cell_values(rng, column, row, -1, 1)
    lx, ly = rotate(lx, ly, cell_values(rng, column, row, 0, TAU))
    along = np.abs(lx) - cell_values(rng, column, row, 1, 2.2) * between(rng, 0.8, 1.1)
    thick = cell_values(rng, column, row, 1.3, 1.8) * between(rng, 0.9, 1.15)
    distance = np.hypot(np.maximum(along, 0), ly) - thick
    return inside(np.where(cell_values(rng, column, row) < 0.08, 9, distance), rng), 0.0


# --- held out of the base model -----------------------------------------------------------------------------------

def zigzagged(x, y, rng):
    """Stripes that run up and down in sharp corners."""
    wave, pitch = between(rng, 18, 28), between(rng, 10, 15)
    steep = between(rng, 0.8, 1.3)
    return cover(to_nearest(y + steep * 2 ** 0.5 * to_nearest(x, wave), pitch), (0.38, 0.62), rng), 0.0


def woven(x, y, rng):
    """Flat yarns of two colours that pass over and under each other in turn."""
    pitch = between(rng, 9, 13)
    column, row, lx, ly = cell(x, y, pitch, pitch)
    upright = (column + row) % 2 == 0
    across, along = np.where(upright, lx, ly), np.where(upright, ly, lx)
    half = pitch * between(rng, 0.4, 0.44)
    tone = 0.9 - 1.1 * (along / (pitch / 2)) ** 2
    gap = inside(np.abs(across) - half, rng)
    return upright.astype(np.float32), tone * gap - 2 * (1 - gap)
