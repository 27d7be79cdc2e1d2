"""What a tomogram says of a woven part: fibre fraction, porosity, yarn period, from the grey values alone; and how far
two sets of slices are apart in what a materials engineer looks at (`distances`).

Nothing here knows labels or designs: a picture [H,W] or a volume [D,H,W] of any dtype goes in, numbers come out.
Share of yarn: the classes by Otsu's threshold (Otsu 1979, "A threshold selection method from gray-level histograms"),
then by mixing: a blurred edge, or a gap thinner than a voxel, counts by its grey between the levels of pure ground and
pure yarn, as blur and sharpening keep the mean. Report: section 1 (materials), figures 3-7.
"""

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter, gaussian_filter1d, minimum_filter

from scipy.stats import wasserstein_distance

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


# --- how far two sets of slices are apart -----------------------------------------------------------------------------

def two_point(grey, longest=None):
    """S2(r), r = 0, 1, ... longest voxels: the chance that both ends of a line of length r lie inside yarns.

    grey [H,W] or a set of slices [n,H,W]; inside is what Otsu's threshold says after denoising. S2(0) is the fibre
    fraction, S2 at great lengths tends to its square. All directions alike; lines that leave the slice do not count.
    longest: default half the shorter side. Source: Torquato 2002, Random Heterogeneous Materials, section 2.1.
    """
    slices = np.asarray(grey, np.float32).reshape(-1, *np.shape(grey)[-2:])
    _, height, width = slices.shape
    longest = min(height, width) // 2 if longest is None else longest
    size = (2 * height, 2 * width)  # room, so that the ends do not meet round the edge
    pairs, places = (np.zeros(size) for _ in range(2))
    for one in slices:
        smooth = gaussian_filter(one, DENOISE)
        pairs += np.fft.irfft2(np.abs(np.fft.rfft2(smooth > otsu(smooth)[0], size)) ** 2, size)
    places = np.fft.irfft2(np.abs(np.fft.rfft2(np.ones((height, width)), size)) ** 2, size) * len(slices)
    radius = _radius(size).round().astype(int)
    near = radius <= longest
    return np.bincount(radius[near], pairs[near]) / np.bincount(radius[near], places[near])


def radial_spectrum(grey, bins=24):
    """log10 of the power at `bins` rings of spatial frequency, 0 to 0.5 per voxel: slices [n,H,W] or one [H,W].

    Mean off, a Hann window against the edges; the mean over slices is taken before the logarithm.
    """
    slices = np.asarray(grey, np.float64).reshape(-1, *np.shape(grey)[-2:])
    _, height, width = slices.shape
    window = np.hanning(height + 2)[1:-1, None] * np.hanning(width + 2)[None, 1:-1]
    centred = (slices - slices.mean((1, 2), keepdims=True)) * window
    power = (np.abs(np.fft.fft2(centred)) ** 2).mean(0) / np.sum(window**2)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    ring = (frequency * 2 * bins).astype(int)
    inside = (ring < bins) & (frequency > 0)
    count = np.bincount(ring[inside], minlength=bins)
    return np.log10(np.bincount(ring[inside], power[inside], bins) / np.maximum(count, 1) + 1e-12)


def distances(a, b, voxel=None, resin=False):
    """How far two sets of slices [n,H,W] of one size are apart -> dict of floats, all 0 for equal sets.

    grey       Wasserstein-1 distance of the grey histograms, as a share of b's range (1st to 99th percentile)
    two_point  mean |S2_a - S2_b| over all lengths up to half the shorter side, a probability
    spectrum   root mean square difference of the log10 radial power spectra, decades
    period     |difference| of the median yarn periods along each slice's width, voxels, or µm given `voxel`; left out
               where fewer than half of the slices of either set show a period
    porosity   |difference| of the mean shares that are no yarn: the air of a dry part; left out of one in resin
    UserError when the sizes differ.
    """
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    if a.ndim != 3 or b.ndim != 3 or a.shape[1:] != b.shape[1:]:
        raise UserError(f"slices of shape {list(a.shape)} and {list(b.shape)} cannot be compared; expected two sets "
                        "[n,H,W] of one height and width")
    low, high = np.percentile(b, [1, 99])
    found = {"grey": wasserstein_distance(a[:, ::2, ::2].ravel(), b[:, ::2, ::2].ravel()) / max(high - low, 1e-12),
             "two_point": np.abs(two_point(a) - two_point(b)).mean(),
             "spectrum": np.sqrt(np.mean((radial_spectrum(a) - radial_spectrum(b)) ** 2))}
    measured = [(_each(x, yarn_period, 1, voxel), [] if resin else _each(x, porosity)) for x in (a, b)]
    for i, name in enumerate(("period", "porosity")[:1 if resin else 2]):
        if all(len(one[i]) * 2 >= len(x) for one, x in zip(measured, (a, b))):
            middle = np.median if name == "period" else np.mean
            found[name] = abs(middle(measured[0][i]) - middle(measured[1][i]))
    return {name: float(value) for name, value in found.items()}


def summary(slices, voxel=None):
    """What slices [n,H,W] show: {"yarn": mean share inside yarns, "period": median yarn period along the width, in voxels or
    µm given `voxel`}, each left out where fewer than half of the slices have an answer."""
    found = {"yarn": _each(slices, fibre_fraction), "period": _each(slices, yarn_period, 1, voxel)}
    return {name: float(np.median(some) if name == "period" else np.mean(some)) for name, some in found.items()
            if 2 * len(some) >= len(slices)}


def _each(slices, measure, *more):
    """measure(slice, ...) of every slice that has an answer."""
    found = []
    for one in slices:
        try:
            found.append(measure(one, *more))
        except UserError:
            continue
    return found


def _radius(size):
    """The distance from the corner of every place of an array of `size` that goes round at its edges."""
    return np.hypot(np.fft.fftfreq(size[0], 1 / size[0])[:, None], np.fft.fftfreq(size[1], 1 / size[1])[None])


# --- parts ------------------------------------------------------------------------------------------------------------

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
