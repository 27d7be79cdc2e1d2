"""Drawn 3D tomograms of woven composites, with a label for every voxel.

A volume is indexed [depth, height, width] (`volumes.py`): warp yarns run along the width, weft yarns along the height,
binder yarns along the warp and through the thickness. `yarns.py` has the geometry, `scanner.py` the grey values and
their calibration. Report: section 1, figures 3-7 and table 1 (dry, dry-compacted and injected states of one 3D weave).
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
SMALLEST = (16, 24, 24)  # voxels; in a smaller volume a layer would be thinner than the blur
COMPACTION = (0.45, 1.3)  # below, the yarns would have to overlap
BUDGET = 40_000_000  # voxels of a slab: about 1.5 GB


def make_design(seed, state, shape, compaction=None, **counts):
    """The yarns.Design of specimen `seed`. Arguments that are None or left out are drawn from the seed.

    shape       (depth, height, width) in voxels, at least SMALLEST
    compaction  thickness relative to the loose cloth's, 0.45..1.3; drawn: about 1 (dry), 0.55 (dry-compacted) or 0.8
                (injected)
    warp, weft, layers  numbers of warp stacks over the height, weft columns over the width, and weft layers through the
                depth, positive real numbers. The drawn numbers belong to the dry window (SHAPES["dry"]); other states
                have another window of the same cloth and therefore other numbers.
    weave       "orthogonal" or "interlock"

    UserError when an argument is impossible.
    """
    _check(seed, state, shape, compaction, **counts)
    warp, weft, layers, weave = (counts.get(name) for name in ("warp", "weft", "layers", "weave"))
    rng = np.random.default_rng([seed, 0])
    drawn = {"weave": WEAVES[rng.integers(2)], "layers": rng.integers(4, 7), "warp": rng.uniform(8.5, 12.5),
             "weft": rng.uniform(8, 11.5)}
    loose, jitter, air = rng.uniform(0.46, 0.52), rng.uniform(-1, 1), rng.uniform(0.2, 1.2)
    window = [side / dry_side for side, dry_side in zip(SHAPES[state], SHAPES["dry"])]
    if compaction is None:
        compaction = {"dry": 1.0, "dry-compacted": 0.55, "injected": 0.8}[state] * (1 + 0.04 * jitter)
    # compaction also closes voids inside the yarns, so the share of yarn grows by less than 1 / compaction
    fibre = min(0.9, loose * compaction**-0.82)
    design = yarns.Design(seed, state, tuple(int(side) for side in shape), float(compaction),
                          float(warp or drawn["warp"] * window[1]), float(weft or drawn["weft"] * window[2]),
                          float(layers or drawn["layers"]), weave or drawn["weave"], fibre,
                          0.5 + 0.5 * air * max(0.0, compaction - 0.6))
    return yarns.fit(design)


def specimen(seed, state, shape, compaction=None, **counts):
    """(volume uint16 [D,H,W], labels uint8 [D,H,W]) of specimen `seed` in one of the STATES.

    Arguments and errors are those of `make_design`. Labels (LABELS): 0 matrix (resin), 1 warp, 2 weft, 3 binder,
    4 void, which is the air between the yarns of a dry part, or the pores and cracks of an injected one. The same
    arguments give the same bytes.
    """
    design = make_design(seed, state, shape, compaction, **counts)
    volume, labels = np.empty(design.shape, np.uint16), np.empty(design.shape, np.uint8)
    draw(design, volume, labels)
    return volume, labels


def draw(design, volume, labels, budget=BUDGET):
    """Fills volume uint16 and labels uint8 [D,H,W] (arrays, memory-mapped or not) by a Design, slab by slab.

    A slab has about `budget` voxels; the result does not depend on it.
    """
    depth, *plane = design.shape
    scan = scanner.settings(design)
    cloth = yarns.weave(design)
    thickness = max(8, budget // math.prod(plane) - 2 * scan.halo)  # of a slab, in slices
    for z in range(0, depth, thickness):
        low, high = max(0, z - scan.halo), min(depth, z + thickness + scan.halo)
        inside = slice(z - low, min(z + thickness, depth) - low)
        slab_labels, level = _draw_slab(design, cloth, low, high, scan)
        labels[z:z + thickness] = slab_labels[inside]
        volume[z:z + thickness] = scanner.expose(level, low, inside, design.shape, scan)


def _draw_slab(design, cloth, low, high, scan):
    """(labels uint8, grey levels float32 before the scanner), each [n,H,W], of the slices low..high."""
    first, second, owner, shade = yarns.yarn_distances(design, cloth, low, high, scan)
    period = np.float32(design.periods["depth"])
    gap, surface = period * np.float32(design.gap), first - period * np.float32(design.swell)
    gap_depth = (gap - second + first) / 2  # depth inside the gap between two yarns, negative outside it
    has_resin = design.state == "injected"
    labels = np.where((surface < 0) & (gap_depth < 0), owner, np.uint8(0 if has_resin else 4))
    # the share of an edge voxel that is ground; a gap thinner than a voxel counts by its width
    ground_share = np.maximum(np.clip(surface + 0.5, 0, 1), np.clip(gap_depth + 0.5, 0, min(1, gap)))
    ground = np.float32(scan.ground)
    # where yarns touch, their fibres are less dense: a thin dark line, labelled as yarn
    ground_share = np.maximum(ground_share, scan.seam * np.clip(gap_depth + 1, 0, 1))
    level = shade + (ground - shade) * ground_share
    hole = yarns.hole_distances(design, low, high)
    if hole is not None:
        labels[hole < 0] = 4
        level += (np.float32(scan.hollow) - level) * np.clip(0.5 - hole, 0, 1)
    return labels, level


def truth(labels, design=None, voxel=None):
    """A dict of the true measures of labels uint8 [D,H,W], or of counts [5] of the labels 0..4.

    fibre_fraction, porosity  shares of yarn and of void
    shares                    {name: share} of every label
    periods_voxels            the periods of the Design, if given
    periods_um                the same in µm, if the `voxel` size is given in µm
    """
    counts = np.bincount(np.asarray(labels).ravel(), minlength=5) if np.ndim(labels) > 1 else np.asarray(labels)
    shares = counts / counts.sum()
    measures = {"fibre_fraction": float(shares[1:4].sum()), "porosity": float(shares[4]),
                "shares": {name: float(shares[label]) for label, name in LABELS.items()}}
    if design is not None:
        measures["periods_voxels"] = design.periods
        if voxel is not None:
            measures["periods_um"] = {axis: length * voxel for axis, length in design.periods.items()}
    return measures


def write(folder, seed, scale=1.0, states=STATES, voxel=20.0, **options):
    """Paths of the volumes written, {state}-{seed}.tif (uint16, contiguous), `scale` times the report's sizes.

    labels/{state}-{seed}-labels.tif has the labels, labels/{state}-{seed}.json the design and its `truth`.

    voxel    edge of a voxel in µm at scale 1, for the files' resolution tags
    options  arguments of `make_design`

    Every file is written atomically. UserError, before anything is written, when an argument is impossible.
    """
    if not 0 < scale < math.inf or not 0 < voxel < math.inf:
        raise UserError(f"scale is {scale} and voxel is {voxel}; expected positive numbers such as 0.25 and 20")
    for state in states:
        _check(seed, state, scale_shape(state, scale), options.get("compaction"),
               **{name: value for name, value in options.items() if name != "compaction"})
    folder = Path(folder)
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    paths = []
    for state in states:
        design = make_design(seed, state, scale_shape(state, scale), **options)
        paths.append(folder / f"{state}-{seed}.tif")
        size = 3 * math.prod(design.shape)  # bytes of the volume and its labels
        free = shutil.disk_usage(folder).free  # writing into a mapping on a full disk would kill the process
        if free < size:
            raise UserError(f"{folder} has {free / 1e9:.2f} GB left and {paths[-1].name} with its labels needs "
                            f"{size / 1e9:.2f}; expected room, or a smaller scale")
        _write_specimen(paths[-1], design, voxel / scale)
    return paths


def _write_specimen(path, design, voxel):
    """Writes the volume at `path`, its labels and its record; voxel: its edge in µm."""
    labels_path = path.parent / "labels" / f"{path.stem}-labels.tif"
    record_path = path.parent / "labels" / f"{path.stem}.json"
    final = (path, labels_path, record_path)
    temporary = [file.with_name(f".{file.name}.writing") for file in final]
    try:
        volume = _new_tiff(temporary[0], design.shape, np.uint16, voxel)
        labels = _new_tiff(temporary[1], design.shape, np.uint8, voxel)
        draw(design, volume, labels)
        counts = sum(np.bincount(labels[z].ravel(), minlength=5) for z in range(design.shape[0]))
        volume.flush(), labels.flush()
        del volume, labels
        record = {**asdict(design), **truth(counts, design, voxel), "voxel_um": voxel}
        temporary[2].write_text(json.dumps(record, indent=1) + "\n")
        for unfinished, name in zip(temporary[::-1], final[::-1]):
            os.replace(unfinished, name)
    finally:
        for file in temporary:
            file.unlink(missing_ok=True)


def _new_tiff(path, shape, dtype, voxel):
    """A new contiguous TIFF mapped into memory; the voxel size (µm) is in its resolution tags (voxels per cm)."""
    large = math.prod(shape) * np.dtype(dtype).itemsize > 4e9
    return tifffile.memmap(path, shape=shape, dtype=dtype, photometric="minisblack", bigtiff=large,
                           resolutionunit="CENTIMETER", resolution=(1e4 / voxel, 1e4 / voxel),
                           metadata={"axes": "ZYX", "spacing": voxel, "unit": "um"})


def scale_shape(state, scale):
    """The report's shape of a state (SHAPES), scaled, in voxels. UserError for an unknown state."""
    if state not in SHAPES:
        raise UserError(f"no state is called '{state}'; expected {', '.join(STATES)}{nearest(state, STATES)}")
    return tuple(round(side * scale) for side in SHAPES[state])


def _check(seed, state, shape, compaction, weave=None, **counts):
    """UserError, in one sentence, when a specimen is impossible."""
    scale_shape(state, 1)
    if not isinstance(seed, (int, np.integer)) or seed < 0:
        raise UserError(f"seed is {seed!r}; expected a whole number from 0 on")
    if len(shape) != 3 or any(n < least for n, least in zip(shape, SMALLEST)):
        raise UserError(f"shape is {tuple(shape)}; expected three numbers of voxels (depth, height, width), at least "
                        f"{SMALLEST}")
    if compaction is not None and not COMPACTION[0] <= compaction <= COMPACTION[1]:
        low, high = COMPACTION
        suggestion = "" if math.isnan(compaction) else f", nearest: {min(max(compaction, low), high)}"
        raise UserError(f"compaction is {compaction}; expected the thickness relative to the loose cloth's, "
                        f"{low} to {high}{suggestion}")
    if weave is not None and weave not in WEAVES:
        raise UserError(f"no weave is called '{weave}'; expected {' or '.join(WEAVES)}{nearest(weave, WEAVES)}")
    dimensions = {"warp": 1, "weft": 2, "layers": 0}
    for name, count in counts.items():
        if name not in dimensions:
            raise UserError(f"specimens have no argument '{name}'; expected {', '.join(dimensions)}, compaction or "
                            f"weave{nearest(name, [*dimensions, 'compaction', 'weave'])}")
        limit = shape[dimensions[name]] / 4
        if count is not None and not 1 <= count <= limit:
            raise UserError(f"{name} is {count}; expected a number of yarns from 1 to {limit:g} (4 voxels each)")
