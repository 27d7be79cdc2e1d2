"""The image of a tomograph: grey levels, fibre texture, blur, edges, noise, rings, beam hardening.

Calibrated against slices of a real dry 3D weave (NASA, PuMA's small_weave) and of carbon fibre in polyamide (Blarr and
Klinder, KIT, doi 10.35097/1822), on a scale of 255 levels:

- dry yarns are about 100 levels brighter than air
- a material has 15-25 levels of texture and noise, correlated over 1-3 voxels and long along the yarns, and only 3
  levels of white noise
- edges are 4 voxels wide and overshoot by 10-25 levels (phase contrast)
- resin is little darker than the yarns, with twice the white noise

All lengths of the scanner are in voxels. They are shorter where a layer has fewer voxels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter1d

TILE = (32, 64, 256)  # voxels of the texture normal to the yarn's surface, across it, along it; powers of two


@dataclass(frozen=True)
class Scan:
    """The grey levels and artefacts of one specimen; levels are on a scale of 255."""

    seed: int
    ground: float  # level between the yarns: air, or resin
    yarns: tuple  # levels of warp, weft, binder
    hollow: float  # level of a pore in resin
    grain: tuple  # levels of the fibre texture in warp, weft, binder, before the blur
    rough: float  # voxels by which fibres stick out of a yarn's surface
    seam: float  # loss of density where yarns touch, as a share of their contrast
    blur: float  # voxels, before the noise
    noise: float  # levels, before `soften`
    soften: float  # voxels, blur after the noise, which correlates it
    halo_width: float  # voxels, of the overshoot at edges
    overshoot: float  # factor of the unsharp mask
    white: float  # levels of white noise
    rings: float  # levels of the ring artefacts
    cupping: float  # relative brightening towards the outside, by beam hardening
    axis: int  # axis of rotation: 1 height, 2 width
    low: float  # 16-bit value of level 0
    gain: float  # 16-bit values per level

    @property
    def halo(self):
        """Voxels beyond a slab on which its values depend."""
        return _filter_radius(self.blur) + _filter_radius(self.soften) + _filter_radius(self.halo_width)


def settings(design):
    """The Scan of a Design. Every seed has its own contrast, levels, noise and artefacts, the same in all states."""
    rng = np.random.default_rng([design.seed, 20])
    size = design.periods["depth"] / design.compaction / 58  # 1 at the resolution of the real slices
    air, contrast = rng.uniform(55, 75), rng.uniform(100, 118)
    split, weft_is_brighter = rng.uniform(8, 26), rng.random() < 0.8
    strength, resin_contrast = rng.uniform(0.8, 1.2), rng.uniform(35, 45)
    white, rings, cupping, axis = rng.uniform(1.3, 2.0), rng.uniform(1, 2.5), rng.uniform(0, 0.05), rng.integers(1, 3)
    low, gain, overshoot = rng.uniform(3000, 12000), rng.uniform(90, 180), rng.uniform(0.8, 1.1)
    has_resin = design.state == "injected"
    if has_resin:
        ground, contrast = rng.uniform(78, 90), resin_contrast
    else:
        ground, contrast = air, contrast + 8 * max(0.0, 1 - design.compaction)
    split = split * (0.35 if has_resin else 1.0) * (1 if weft_is_brighter else -1)
    yarns = tuple(ground + contrast + split * share for share in (-0.5, 0.5, 0.2))
    blur, soften = min(0.95, max(0.4, 0.85 * size**0.6)), min(0.85, max(0.55, 0.85 * size**0.3))
    total_blur = math.sqrt(blur**2 + soften**2)
    # the shares of amplitude left after blurring: of texture about one voxel across and nine along, and of white noise
    texture_left, noise_left = 1 / (1 + total_blur**2), (2 * math.sqrt(math.pi) * soften) ** -1.5
    scale = min(1.0, max(0.5, size**0.4))  # larger voxels average over more fibres
    texture_levels = (12, 11, 10) if has_resin else (17, 11, 12)
    grain = tuple(strength * scale * levels / texture_left for levels in texture_levels)
    noise = strength * scale * (6.5 if has_resin else 9.5) / noise_left
    rough = 0.25 if has_resin else 0.5 * min(1, size + 0.3)
    return Scan(design.seed, ground, yarns, rng.uniform(15, 35), grain, rough, 0.4, blur, noise, soften,
                2.1 * total_blur, overshoot * (0.7 if has_resin else 1), white * (2.6 if has_resin else 1), rings,
                cupping, axis, low, gain)


def shade(scan, yarn, grain):
    """The grey levels float32 [n] of a yarn's voxels with texture `grain` [n]."""
    deviation = np.random.default_rng([scan.seed, 21, yarn.number]).normal(0, 3)  # of the whole yarn
    return np.float32(scan.yarns[yarn.label - 1] + deviation) + np.float32(scan.grain[yarn.label - 1]) * grain


@lru_cache(maxsize=2)
def tile(seed):
    """Periodic texture float32 TILE of mean 0 and variance 1: fibres and bundles of them, along the last axis."""
    rng = np.random.default_rng([seed, 22])
    total = np.zeros(TILE, np.float32)
    for width, length, weight in ((0.6, 6, 0.8), (2.2, 24, 0.4)):
        texture = rng.standard_normal(TILE, dtype=np.float32)
        for axis, sigma in enumerate((width, width, length)):
            texture = gaussian_filter1d(texture, sigma, axis=axis, mode="wrap")
        total += weight * texture / texture.std()
    return total / total.std()


def grain(scan, yarn, height, i, j):
    """The texture float32 [n] of a yarn at `height` [n] voxels over its middle surface, at i, j [n] of its maps."""
    origin = np.random.default_rng([yarn.number, 23]).integers(0, TILE)
    normal = (np.rint(height).astype(np.int32) + origin[0]) & (TILE[0] - 1)
    across = (yarn.across[i, j] + origin[1]) & (TILE[1] - 1)
    along = (yarn.along[i, j] + origin[2]) & (TILE[2] - 1)
    return tile(scan.seed)[normal, across, along]


def expose(level, low, inside, shape, scan):
    """uint16 [m,H,W]: the scanned slices `inside` (a slice object) of a slab.

    level  float32 [n,H,W], the slab before the scan, with a margin of scan.halo slices
    low    number of the slab's first slice
    shape  of the whole volume
    """
    level = _blur(level, scan.blur)
    depth, height, width = level.shape
    for z in range(depth):
        rng = np.random.default_rng([scan.seed, 24, low + z])
        level[z] += np.float32(scan.noise) * rng.standard_normal((height, width), dtype=np.float32)
    level = _blur(level, scan.soften)
    blurred = _blur(level.copy(), scan.halo_width)[inside]
    level = level[inside]
    level += np.float32(scan.overshoot) * (level - blurred)
    first = low + inside.start
    for z in range(len(level)):
        rng = np.random.default_rng([scan.seed, 25, first + z])
        cupping, rings = _rotation_artefacts(first + z, shape, scan)
        # photon noise grows a little with the signal (less light arrives behind dense matter)
        white = rng.standard_normal((height, width), dtype=np.float32) * np.sqrt(level[z].clip(1) / 150 + 0.3)
        level[z] = level[z] * cupping + rings + np.float32(scan.white) * white
    return np.rint((scan.low + scan.gain * level).clip(0, 65535)).astype(np.uint16)


def _rotation_artefacts(z, shape, scan):
    """(cupping as a factor, rings in levels) of slice z, each [1,W] or [H,1], by the distance from the axis."""
    across = shape[3 - scan.axis]
    offset = np.arange(across, dtype=np.float32) - across / 2
    radius = np.hypot(offset, z - shape[0] / 2)
    largest = math.hypot(across / 2, shape[0] / 2)
    cupping = (1 + scan.cupping * ((radius / largest) ** 2 - 0.4)).astype(np.float32)
    profile = _ring_profile(scan.seed, int(largest) + 3)
    rings = np.float32(scan.rings) * np.interp(radius, np.arange(len(profile)), profile).astype(np.float32)
    return (cupping[None], rings[None]) if scan.axis == 1 else (cupping[:, None], rings[:, None])


@lru_cache(maxsize=4)
def _ring_profile(seed, n):
    """The rings [n] at radius 0, 1, ... voxels, of variance 1."""
    rng = np.random.default_rng([seed, 26])
    profile = rng.standard_normal(n) * (rng.random(n) < 0.25)  # a few bad detector columns
    profile = gaussian_filter1d(profile, 0.8)
    return profile / profile.std()


def _filter_radius(sigma):
    """Voxels on either side on which a Gaussian blur depends."""
    return int(3 * sigma + 0.5)


def _blur(level, sigma):
    """A Gaussian blur of float32 [n,H,W] along all three axes."""
    for axis in (2, 1, 0):
        level = gaussian_filter1d(level, sigma, axis=axis, mode="nearest", radius=_filter_radius(sigma))
    return level
