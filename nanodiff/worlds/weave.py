"""Woven composites drawn in 3D with known truth: what a tomograph would show of a cloth that never existed.

A volume is indexed [depth, height, width] (`volumes.py`): warp yarns run along the width, weft yarns along the height,
binder yarns with the warp and through the thickness. `yarns.py` is the geometry, `scanner.py` the grey values; both
say what they were calibrated against. Report: section 1, figures 3-7 and table 1 (dry, dry-compacted and injected
states of one 3D weave).
"""

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tifffile

from nanodiff.errors import UserError, nearest
from nanodiff.tomography.volumes import STATES
from nanodiff.worlds import scanner, yarns

SHAPES = {"dry": (359, 702, 970), "dry-compacted": (197, 863, 773), "injected": (287, 701, 633)}  # report, table 1
LABELS = {0: "matrix", 1: "warp", 2: "weft", 3: "binder", 4: "void"}
WEAVES = ("orthogonal", "interlock")
SMALLEST = (16, 24, 24)  # voxels; a layer of a smaller volume would be thinner than the blur
COMPACTION = (0.45, 1.3)  # thinner than this the yarns would have to overlap
BUDGET = 40_000_000  # voxels worked on at a time: about 1.5 GB


def design(seed, state, shape, compaction=None, **counts):
    """The Design of specimen `seed`; what is None or left out is drawn from the seed, the rest is as asked.

    shape       (depth, height, width) in voxels, at least SMALLEST
    compaction  thickness as a share of the loose cloth's, 0.45..1.3; drawn: about 1 (dry), 0.55 (dry-compacted), 0.8
    warp, weft, layers  numbers of warp stacks over the height, weft columns over the width, weft layers through the
                depth: any positive real numbers, as counts are relative to the shape. Drawn counts are those of the
                loose cloth's window (SHAPES["dry"]); other states look at their own window of the same cloth.
    weave       "orthogonal" or "interlock"

    UserError when one of these is impossible.
    """
    _check(seed, state, shape, compaction, **counts)
    warp, weft, layers, weave = (counts.get(name) for name in ("warp", "weft", "layers", "weave"))
    rng = np.random.default_rng([seed, 0])
    drawn = {"weave": WEAVES[rng.integers(2)], "layers": rng.integers(4, 7), "warp": rng.uniform(8.5, 12.5),
             "weft": rng.uniform(8, 11.5)}
    loose, jitter, air = rng.uniform(0.46, 0.52), rng.uniform(-1, 1), rng.uniform(0.2, 1.2)
    window = [a / b for a, b in zip(SHAPES[state], SHAPES["dry"])]
    if compaction is None:
        compaction = {"dry": 1.0, "dry-compacted": 0.55, "injected": 0.8}[state] * (1 + 0.04 * jitter)
    # the voids inside a yarn close a little as it is pressed, so its outline holds slightly less than it did
    fibre = min(0.9, loose * compaction**-0.82)
    one = yarns.Design(seed, state, tuple(int(n) for n in shape), float(compaction),
                       float(warp or drawn["warp"] * window[1]), float(weft or drawn["weft"] * window[2]),
                       float(layers or drawn["layers"]), weave or drawn["weave"], fibre,
                       0.5 + 0.5 * air * max(0.0, compaction - 0.6))
    return yarns.settled(one)


def specimen(seed, state, shape, compaction=None, **counts):
    """Specimen `seed` in one of the STATES: (volume uint16 [D,H,W], labels uint8 [D,H,W]).

    Arguments and errors are those of `design`. Labels (LABELS): 0 matrix (resin), 1 warp, 2 weft, 3 binder, 4 void: all
    that is between the yarns of a dry part, the pores and cracks of an injected one. The same arguments give the same
    bytes.
    """
    one = design(seed, state, shape, compaction, **counts)
    volume, labels = np.empty(one.shape, np.uint16), np.empty(one.shape, np.uint8)
    draw(one, volume, labels)
    return volume, labels


def draw(one, volume, labels, budget=BUDGET):
    """Fills volume uint16 and labels uint8 [D,H,W] (arrays, memory-mapped or not) with `one` Design, slab by slab.

    No more than about `budget` voxels are worked on at a time; the result does not depend on it.
    """
    depth, *plane = one.shape
    scan = scanner.settings(one)
    cloth = yarns.woven(one)
    thick = max(8, budget // math.prod(plane) - 2 * scan.halo)
    for z in range(0, depth, thick):
        low, high = max(0, z - scan.halo), min(depth, z + thick + scan.halo)
        inside = slice(z - low, min(z + thick, depth) - low)
        label, level = _slab(one, cloth, low, high, scan)
        labels[z:z + thick] = label[inside]
        volume[z:z + thick] = scanner.expose(level, low, inside, one.shape, scan)


def _slab(one, cloth, low, high, scan):
    """Slices low..high: labels uint8 and grey levels float32 before the scanner, [n,H,W]."""
    best, second, owner, shade = yarns.depths(one, cloth, low, high, scan)
    period = np.float32(one.periods["depth"])
    gap, surface = period * np.float32(one.gap), best - period * np.float32(one.swell)
    between = (gap - second + best) / 2  # how deep in the gap between two yarns, negative outside it
    wet = one.state == "injected"
    labels = np.where((surface < 0) & (between < 0), owner, np.uint8(0 if wet else 4))
    # the share of a voxel at an edge that is yarn; a gap thinner than a voxel takes no more than its width
    bare = np.maximum(np.clip(surface + 0.5, 0, 1), np.clip(between + 0.5, 0, min(1, gap)))
    ground = np.float32(scan.ground)
    # where yarns meet their fibres lie less densely: a thin dark line, though all of it is yarn
    bare = np.maximum(bare, scan.seam * np.clip(between + 1, 0, 1))
    level = shade + (ground - shade) * bare
    hole = yarns.hollow(one, low, high)
    if hole is not None:
        labels[hole < 0] = 4
        level += (np.float32(scan.hollow) - level) * np.clip(0.5 - hole, 0, 1)
    return labels, level


def truth(labels, one=None, voxel=None):
    """What labels uint8 [D,H,W] (or counts [5] of the labels 0..4) say, as a dict.

    fibre_fraction and porosity are the shares of yarn and of void, `shares` those of every label; with a Design come
    its periods in voxels, and in µm when the `voxel` size is given in µm.
    """
    counts = np.bincount(np.asarray(labels).ravel(), minlength=5) if np.ndim(labels) > 1 else np.asarray(labels)
    shares = counts / counts.sum()
    found = {"fibre_fraction": float(shares[1:4].sum()), "porosity": float(shares[4]),
             "shares": {name: float(shares[label]) for label, name in LABELS.items()}}
    if one is not None:
        found["periods_voxels"] = one.periods
        if voxel is not None:
            found["periods_um"] = {axis: length * voxel for axis, length in one.periods.items()}
    return found


def write(folder, seed, scale=1.0, states=STATES, voxel=20.0, **options):
    """Writes {state}-{seed}.tif (uint16, contiguous) of each state, `scale` times the report's sizes -> their paths.

    labels/{state}-{seed}-labels.tif and labels/{state}-{seed}.json (the design and its truth) lie beside them. `voxel`
    is the voxel's edge in µm at scale 1, written as the files' resolution; `options` are arguments of `design`. Files
    appear whole or not at all. UserError when an argument is impossible, before anything is written.
    """
    if not 0 < scale < math.inf or not 0 < voxel < math.inf:
        raise UserError(f"scale is {scale} and voxel is {voxel}; expected positive numbers such as 0.25 and 20")
    for state in states:
        _check(seed, state, scaled(state, scale), options.get("compaction"),
               **{name: value for name, value in options.items() if name != "compaction"})
    folder = Path(folder)
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    paths = []
    for state in states:
        one = design(seed, state, scaled(state, scale), **options)
        path, beside = folder / f"{state}-{seed}.tif", folder / "labels" / f"{state}-{seed}-labels.tif"
        notes = folder / "labels" / f"{state}-{seed}.json"
        temporary = [p.with_name(f".{p.name}.writing") for p in (path, beside, notes)]
        free = shutil.disk_usage(folder).free  # writing into a mapping on a full disk would end the process
        if free < 3 * math.prod(one.shape):
            raise UserError(f"{folder} has {free / 1e9:.2f} GB left and {path.name} with its labels needs "
                            f"{3 * math.prod(one.shape) / 1e9:.2f}; expected room, or a smaller scale")
        try:
            volume, labels = (_new_tiff(p, one.shape, kind, voxel / scale)
                              for p, kind in zip(temporary, (np.uint16, np.uint8)))
            draw(one, volume, labels)
            counts = sum(np.bincount(labels[z].ravel(), minlength=5) for z in range(one.shape[0]))
            volume.flush(), labels.flush()
            del volume, labels
            record = {**asdict(one), **truth(counts, one, voxel / scale), "voxel_um": voxel / scale}
            temporary[2].write_text(json.dumps(record, indent=1) + "\n")
            for unfinished, name in zip(temporary[::-1], (notes, beside, path)):
                os.replace(unfinished, name)
        finally:
            for p in temporary:
                p.unlink(missing_ok=True)
        paths.append(path)
    return paths


def _new_tiff(path, shape, kind, voxel):
    """A contiguous TIFF of `shape` to write into; the voxel size (µm) in its resolution tags (voxels per cm)."""
    large = math.prod(shape) * np.dtype(kind).itemsize > 4e9
    return tifffile.memmap(path, shape=shape, dtype=kind, photometric="minisblack", bigtiff=large,
                           resolutionunit="CENTIMETER", resolution=(1e4 / voxel, 1e4 / voxel),
                           metadata={"axes": "ZYX", "spacing": voxel, "unit": "um"})


def scaled(state, scale):
    """The report's shape of a state (SHAPES) at a scale, voxels; UserError when there is no such state."""
    if state not in SHAPES:
        raise UserError(f"no state is called '{state}'; expected {', '.join(STATES)}{nearest(state, STATES)}")
    return tuple(round(n * scale) for n in SHAPES[state])


def _check(seed, state, shape, compaction, weave=None, **counts):
    """UserError, in one sentence, when a specimen is impossible."""
    scaled(state, 1)
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UserError(f"seed is {seed!r}; expected a whole number from 0 on")
    if len(shape) != 3 or any(n < least for n, least in zip(shape, SMALLEST)):
        raise UserError(f"shape is {tuple(shape)}; expected three numbers of voxels (depth, height, width), at least "
                        f"{SMALLEST}")
    if compaction is not None and not COMPACTION[0] <= compaction <= COMPACTION[1]:
        close = "" if compaction != compaction else f", nearest: {min(max(compaction, COMPACTION[0]), COMPACTION[1])}"
        raise UserError(f"compaction is {compaction}; expected the pressed thickness as a share of the loose one, "
                        f"{COMPACTION[0]} to {COMPACTION[1]}{close}")
    if weave is not None and weave not in WEAVES:
        raise UserError(f"no weave is called '{weave}'; expected {' or '.join(WEAVES)}{nearest(weave, WEAVES)}")
    known = {"warp": (1, 1), "weft": (2, 2), "layers": (0, 4)}  # axis; the least voxels a yarn or layer needs
    for name, count in counts.items():
        if name not in known:
            raise UserError(f"specimens have no argument '{name}'; expected {', '.join(known)}, compaction or weave"
                            f"{nearest(name, [*known, 'compaction', 'weave'])}")
        most = shape[known[name][0]] / 4
        if count is not None and not 1 <= count <= most:
            raise UserError(f"{name} is {count}; expected a number of yarns from 1 to {most:g} (4 voxels each)")
