"""What a tomograph makes of a part: grey levels, fibre texture, blur, edges, noise, rings, beam hardening.

Calibrated against slices of a real dry 3D weave (NASA, PuMA's small_weave) and of carbon fibre in polyamide (Blarr and
Klinder, KIT, doi 10.35097/1822), on a scale of 255 levels: dry yarns about 100 levels above air; within a material
15-25 levels of texture and noise that is correlated over 1-3 voxels, long along the yarns, and only 3 levels of white
noise; edges 4 voxels wide that overshoot by 10-25 levels (phase contrast); a resin little darker than the yarns, and
twice the white noise.
All lengths that belong to the scanner are in voxels, and shorten with the voxels a layer has.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter1d

TILE = (32, 64, 256)  # normal to the yarn's surface, across it, along it; powers of two


@dataclass(frozen=True)
class Scan:
    """How one specimen looks; levels are of 255."""

    seed: int
    ground: float  # between the yarns: air, or resin
    yarns: tuple  # of warp, weft, binder
    hollow: float  # a pore in resin
    grain: tuple  # fibre texture in warp, weft, binder, before the blur
    rough: float  # voxels by which fibres stick out of a yarn's surface
    seam: float  # how much less dense yarns are where they meet, as a share of their contrast
    blur: float  # voxels, before the noise
    noise: float  # before `soften`
    soften: float  # voxels, after the noise: what correlates it
    halo_width: float  # voxels, of the overshoot at edges
    overshoot: float
    white: float
    rings: float
    cupping: float
    axis: int  # the part turned about: 1 height, 2 width
    low: float  # 16-bit value of level 0
    gain: float  # 16-bit values a level

    @property
    def halo(self):
        """Voxels beyond a slab that its filters reach."""
        return _radius(self.blur) + _radius(self.soften) + _radius(self.halo_width)


def settings(one):
    """The Scan of a Design: every seed has its own contrast, levels, noise and artefacts, shared by its states."""
    rng = np.random.default_rng([one.seed, 20])
    size = one.periods["depth"] / one.compaction / 58  # 1 at the real slices' resolution
    air, contrast, split, order = rng.uniform(55, 75), rng.uniform(100, 118), rng.uniform(8, 26), rng.random() < 0.8
    strength, mixed = rng.uniform(0.8, 1.2), rng.uniform(35, 45)
    white, rings, cupping, axis = rng.uniform(1.3, 2.0), rng.uniform(1, 2.5), rng.uniform(0, 0.05), rng.integers(1, 3)
    low, gain, overshoot = rng.uniform(3000, 12000), rng.uniform(90, 180), rng.uniform(0.8, 1.1)
    wet = one.state == "injected"
    ground, lift = (rng.uniform(78, 90), mixed) if wet else (air, contrast + 8 * max(0.0, 1 - one.compaction))
    split = split * (0.35 if wet else 1.0) * (1 if order else -1)
    yarns = tuple(ground + lift + split * share for share in (-0.5, 0.5, 0.2))
    blur, soften = min(0.95, max(0.4, 0.85 * size**0.6)), min(0.85, max(0.55, 0.85 * size**0.3))
    after = math.sqrt(blur**2 + soften**2)
    # texture of about one voxel across and nine along loses this much to the blur; noise this much to the softening
    kept, left = 1 / (1 + after**2), (2 * math.sqrt(math.pi) * soften) ** -1.5
    scale = min(1.0, max(0.5, size**0.4))  # larger voxels average over more fibres
    grain = tuple(strength * scale * levels / kept for levels in ((12, 11, 10) if wet else (17, 11, 12)))
    noise = strength * scale * (6.5 if wet else 9.5) / left
    rough = 0.25 if wet else 0.5 * min(1, size + 0.3)
    return Scan(one.seed, ground, yarns, rng.uniform(15, 35), grain, rough, 0.4, blur, noise, soften,
                2.1 * after, overshoot * (0.7 if wet else 1), white * (2.6 if wet else 1), rings, cupping, axis,
                low, gain)


def shade(scan, yarn, grain):
    """The grey levels of a yarn's voxels with texture `grain`."""
    own = np.random.default_rng([scan.seed, 21, yarn.number]).normal(0, 3)
    return np.float32(scan.yarns[yarn.label - 1] + own) + np.float32(scan.grain[yarn.label - 1]) * grain


@lru_cache(maxsize=2)
def tile(seed):
    """Periodic texture float32 TILE of mean 0 and variance 1: fibres, long along the last axis, in bundles."""
    rng = np.random.default_rng([seed, 22])
    total = np.zeros(TILE, np.float32)
    for wide, long, share in ((0.6, 6, 0.8), (2.2, 24, 0.4)):
        one = rng.standard_normal(TILE, dtype=np.float32)
        for axis, sigma in enumerate((wide, wide, long)):
            one = gaussian_filter1d(one, sigma, axis=axis, mode="wrap")
        total += share * one / one.std()
    return total / total.std()


def grain(scan, yarn, away, i, j):
    """The texture at places of a yarn: `away` voxels from its middle surface, at i, j of its maps -> float32 [n]."""
    o = np.random.default_rng([yarn.number, 23]).integers(0, TILE)
    n = (np.rint(away).astype(np.int32) + o[0]) & (TILE[0] - 1)
    across = (yarn.across[i, j] + o[1]) & (TILE[1] - 1)
    along = (yarn.along[i, j] + o[2]) & (TILE[2] - 1)
    return tile(scan.seed)[n, across, along]


def expose(level, low, inside, shape, scan):
    """Levels float32 [n,H,W] of slices low.. as scanned: uint16 of the slices `inside` (a slice object) of them."""
    level = _smooth(level, scan.blur)
    depth, height, width = level.shape
    for z in range(depth):
        rng = np.random.default_rng([scan.seed, 24, low + z])
        level[z] += np.float32(scan.noise) * rng.standard_normal((height, width), dtype=np.float32)
    level = _smooth(level, scan.soften)
    wide = _smooth(level.copy(), scan.halo_width)[inside]
    level = level[inside]
    level += np.float32(scan.overshoot) * (level - wide)
    first = low + inside.start
    for z in range(len(level)):
        rng = np.random.default_rng([scan.seed, 25, first + z])
        bend, ring = _turned(first + z, shape, scan)
        # photon noise grows a little with the signal (less light arrives behind dense matter)
        white = rng.standard_normal((height, width), dtype=np.float32) * np.sqrt(level[z].clip(1) / 150 + 0.3)
        level[z] = level[z] * bend + ring + np.float32(scan.white) * white
    return np.rint((scan.low + scan.gain * level).clip(0, 65535)).astype(np.uint16)


def _turned(z, shape, scan):
    """Cupping (factor) and rings (levels) of one slice, [1,W] or [H,1]: functions of the distance from the axis."""
    across = shape[3 - scan.axis]
    a = np.arange(across, dtype=np.float32) - across / 2
    r = np.hypot(a, z - shape[0] / 2)
    most = math.hypot(across / 2, shape[0] / 2)
    bend = (1 + scan.cupping * ((r / most) ** 2 - 0.4)).astype(np.float32)
    profile = _rings(scan.seed, int(most) + 3)
    ring = np.float32(scan.rings) * np.interp(r, np.arange(len(profile)), profile).astype(np.float32)
    return (bend[None], ring[None]) if scan.axis == 1 else (bend[:, None], ring[:, None])


@lru_cache(maxsize=4)
def _rings(seed, n):
    rng = np.random.default_rng([seed, 26])
    profile = rng.standard_normal(n) * (rng.random(n) < 0.25)  # a few bad detector columns
    profile = gaussian_filter1d(profile, 0.8)
    return profile / profile.std()


def _radius(sigma):
    return int(3 * sigma + 0.5)


def _smooth(level, sigma):
    """A Gaussian blur of float32 [n,H,W] along all three axes."""
    for axis in (2, 1, 0):
        level = gaussian_filter1d(level, sigma, axis=axis, mode="nearest", radius=_radius(sigma))
    return level
