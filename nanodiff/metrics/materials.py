"""What a tomogram says of a woven part: fibre fraction, porosity, yarn period, from the grey values alone.

Nothing here knows labels or designs: a picture [H,W] or a volume [D,H,W] of any dtype goes in, numbers come out.
Share of yarn: the classes by Otsu's threshold (Otsu 1979, "A threshold selection method from gray-level histograms"),
then by mixing: a blurred edge, or a gap thinner than a voxel, counts by its grey between the levels of pure ground and
pure yarn, as blur and sharpening keep the mean. Report: section 1 (materials), figures 3-7.
"""

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter, gaussian_filter1d, minimum_filter

from nanodiff.errors import UserError

DENOISE = 1.0  # voxels: fibre texture and noise are correlated over 1-3 voxels, the thinnest yarns are 4 thick


def otsu(x, bins=512):
    """(threshold, share) of the two classes of x: the threshold with the greatest variance between the classes, and
    that variance as a share of the whole (0.64 for one bell curve, towards 1 for two separate levels)."""
    low, high = np.percentile(x, [0.05, 99.95])
    if not high > low:
        raise UserError("the picture has a single grey value; expected at least two materials in it")
    counts, edges = np.histogram(x, bins, (low, high))
    p, middle = counts / counts.sum(), (edges[1:] + edges[:-1]) / 2
    below, mean = p.cumsum(), (p * middle).cumsum()
    between = (mean[-1] * below - mean) ** 2 / np.maximum(below * (1 - below), 1e-12)
    best = int(between[:-1].argmax())
    return float(edges[best + 1]), float(between[best] / np.sum(p * (middle - mean[-1]) ** 2))


def fibre_fraction(grey):
    """Share of a picture or volume that lies inside yarns, 0..1: grey [H,W] or [D,H,W], brighter where fibres are.

    Air or resin between the yarns alike. UserError when there is nothing to tell apart.
    """
    grey, ground, yarn, _ = _levels(grey)
    return float(np.clip(np.mean((grey - ground) / (yarn - ground)), 0, 1))


def porosity(grey, resin=False):
    """Share of a picture or volume that is air, 0..1.

    A dry part (resin=False) is air wherever it is not yarn. In a filled one (resin=True) a hole is darker than the
    resin by more than 4 standard deviations of the denoised resin. It counts by the grey that it lacks, against what
    its surroundings let expect and the level of the largest holes: blur shrinks the outline of a small hole, but keeps
    this sum. Pores of 2 voxels and less drown in the noise.
    """
    if not resin:
        return 1 - fibre_fraction(grey)
    grey, ground, _, between = _levels(grey)
    smooth = gaussian_filter(grey, DENOISE)
    spread = 1.4826 * np.median(np.abs(smooth[between] - np.median(smooth[between])))
    deepest = minimum_filter(smooth, 7)
    core = (deepest < ground - 4 * spread) & (smooth < (ground + deepest) / 2)
    inner = binary_erosion(core)
    if not core.any():
        return 0.0
    air = float(np.percentile(grey[inner], 25)) if inner.any() else float(smooth[core].min())
    hole = binary_dilation(core, iterations=2)
    outside = (~hole).astype(np.float32)
    share = gaussian_filter(outside, 2.5, truncate=3) + 1e-4
    expected = (gaussian_filter(grey * outside, 2.5, truncate=3) + 1e-4 * ground) / share
    return float(np.clip(((expected - grey) / (expected - air))[hole].sum() / grey.size, 0, 1))


def yarn_period(grey, axis, voxel=None):
    """The distance from yarn to yarn along an axis of a picture or volume, in voxels, or in µm given the `voxel` size.

    The first peak of the autocorrelation along the axis that comes near the highest. A volume is looked through along
    either other axis, as yarns are plainest to one who looks along them, and the view with the higher peak counts.
    UserError when the picture is too short for two periods, or has none.
    """
    grey = np.asarray(grey)
    if grey.ndim not in (2, 3):
        raise UserError(f"the picture has shape {list(grey.shape)}; expected [H,W] or [D,H,W]")
    if not -grey.ndim <= axis < grey.ndim:
        raise UserError(f"axis is {axis}; expected 0 to {grey.ndim - 1}")
    n = grey.shape[axis]
    if n < 16:
        raise UserError(f"the picture has {n} voxels along axis {axis}; expected at least 16 to find a period in")
    lines = np.moveaxis(grey, axis, 0)
    views = [lines.mean(other, dtype=np.float64).reshape(n, -1) for other in range(1, grey.ndim)]
    lags = max((_correlation(view) for view in views), key=lambda lags: max(lags[_peaks(lags)], default=0))
    peaks = _peaks(lags)
    if not peaks:
        raise UserError(f"no period is found along axis {axis} of {n} voxels; expected at least two yarns")
    i = next(i for i in peaks if lags[i] >= 0.5 * max(lags[peaks]))
    a, b, c = lags[i - 1:i + 2]
    period = i + 0.5 * (a - c) / (a - 2 * b + c)  # the top of the parabola through three lags
    return float(period if voxel is None else period * voxel)


def _correlation(lines):
    """The mean autocorrelation of lines [n, k] at the lags 0 .. 2n/3, slow trends taken off; 1 at lag 0."""
    n = len(lines)
    window = np.sqrt(np.hanning(n + 2)[1:-1])[:, None]  # the air or the plates at both ends are no yarns
    lines = lines - gaussian_filter1d(lines, n / 10, axis=0, mode="nearest")
    lines = (lines - np.sum(lines * window, 0) / window.sum()) * window
    product, overlap = (np.fft.irfft(np.mean(np.abs(np.fft.rfft(x, 2 * n, axis=0)) ** 2, 1)) for x in (lines, window))
    lags = product[:n * 2 // 3] / overlap[:n * 2 // 3]  # unbiased: each lag by what overlaps
    return lags / lags[0]


def _peaks(lags):
    """The first four lags with a peak."""
    return [i for i in range(3, len(lags) - 1) if lags[i - 1] < lags[i] >= lags[i + 1] and lags[i] > 0.05][:4]


def _levels(grey):
    """(grey float32, level of the ground, levels of the yarns at every voxel, where the ground is deep)."""
    grey = np.asarray(grey, dtype=np.float32)
    if grey.ndim not in (2, 3) or min(grey.shape) < 8:
        raise UserError(f"the picture has shape {list(grey.shape)}; expected [H,W] or [D,H,W], at least 8 each way")
    if not np.isfinite(grey).all():
        raise UserError("the picture holds values that are not finite; expected grey values")
    smooth = gaussian_filter(grey, DENOISE)
    inside = smooth > otsu(smooth)[0]
    yarn, ground = minimum_filter(inside, 3), minimum_filter(~inside, 3)  # a voxel in from the edge
    if not yarn.any() or not ground.any():
        raise UserError("the picture shows no two materials; expected yarns and what is between them")
    # yarns differ in brightness: each voxel is measured against those near it
    share = gaussian_filter(yarn.astype(np.float32), 3, truncate=2) + 1e-4
    level = (gaussian_filter(np.where(yarn, grey, 0), 3, truncate=2) + 1e-4 * grey[yarn].mean()) / share
    return grey, float(grey[ground].mean()), level, ground
