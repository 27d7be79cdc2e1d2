"""Material measures of a tomogram, from its grey values alone: fibre fraction, porosity, yarn period. `distances`
compares two sets of slices by such measures.

The functions take a picture [H,W] or a volume [D,H,W] of any dtype and return numbers. They need no labels.

"Ground" is what lies between the yarns, air or resin. The share of yarn is found in two steps: Otsu's threshold
separates yarn and ground (Otsu 1979, "A threshold selection method from gray-level histograms"). Then each voxel counts
by its grey, between the levels of pure ground and pure yarn. This is right for blurred edges and for gaps thinner than
a voxel, because blur and sharpening preserve the mean. Report: section 1 (materials), figures 3-7.
"""

import numpy as np
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter, gaussian_filter1d, minimum_filter
from scipy.stats import wasserstein_distance

from nanodiff.errors import UserError

DENOISE = 1.0  # sigma in voxels: fibre texture and noise are correlated over 1-3 voxels, the thinnest yarns are 4 thick


def otsu(x, bins=512):
    """(threshold, share) of x: the threshold with the greatest variance between its two classes, and that variance as a
    share of the total.

    The share is 0.64 for one bell curve and close to 1 for two separate levels. UserError for a single grey value.
    """
    low, high = np.percentile(x, [0.05, 99.95])
    if not high > low:
        raise UserError("the picture has a single grey value; expected at least two materials in it")
    counts, edges = np.histogram(x, bins, (low, high))
    p, centres = counts / counts.sum(), (edges[1:] + edges[:-1]) / 2
    below, mean = p.cumsum(), (p * centres).cumsum()
    between_variance = (mean[-1] * below - mean) ** 2 / np.maximum(below * (1 - below), 1e-12)
    best = int(between_variance[:-1].argmax())
    total_variance = np.sum(p * (centres - mean[-1]) ** 2)
    return float(edges[best + 1]), float(between_variance[best] / total_variance)


def fibre_fraction(grey):
    """Share of a picture or volume inside yarns, 0..1. grey [H,W] or [D,H,W] is brighter where fibres are.

    The ground may be air or resin. UserError when the picture shows no two materials.
    """
    grey, ground, yarn, _ = _levels(grey)
    return float(np.clip(np.mean((grey - ground) / (yarn - ground)), 0, 1))


def porosity(grey, resin=False):
    """Share of a picture or volume that is air, 0..1.

    A dry part (resin=False) is air wherever it is not yarn. In a part with resin, a hole is darker than the resin by
    more than 4 standard deviations of the denoised resin. Each voxel of a hole counts by its missing grey, relative to
    the contrast between its surroundings and the largest holes. Blur shrinks the outline of a small hole but preserves
    this sum. Pores of 2 voxels and less vanish in the noise.
    """
    if not resin:
        return 1 - fibre_fraction(grey)
    grey, ground, _, in_ground = _levels(grey)
    smooth = gaussian_filter(grey, DENOISE)
    deviation = 1.4826 * np.median(np.abs(smooth[in_ground] - np.median(smooth[in_ground])))  # robust: from the median
    darkest = minimum_filter(smooth, 7)
    core = (darkest < ground - 4 * deviation) & (smooth < (ground + darkest) / 2)
    inner = binary_erosion(core)
    if not core.any():
        return 0.0
    air = float(np.percentile(grey[inner], 25)) if inner.any() else float(smooth[core].min())
    hole = binary_dilation(core, iterations=2)
    outside = (~hole).astype(np.float32)
    weight = gaussian_filter(outside, 2.5, truncate=3) + 1e-4
    expected = (gaussian_filter(grey * outside, 2.5, truncate=3) + 1e-4 * ground) / weight  # grey without the hole
    return float(np.clip(((expected - grey) / (expected - air))[hole].sum() / grey.size, 0, 1))


def yarn_period(grey, axis, voxel=None):
    """The distance from yarn to yarn along an axis of a picture or volume, in voxels, or in µm given the `voxel` size.

    It is the first peak of the autocorrelation along the axis that reaches half of the highest peak. A volume is
    averaged along either other axis, because yarns stand out in the mean along their length; the view with the higher
    peak counts. UserError when the picture is too short for two periods, or has none.
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
    correlations = [_autocorrelation(view) for view in views]
    correlation = max(correlations, key=lambda values: max(values[_peaks(values)], default=0))
    peaks = _peaks(correlation)
    if not peaks:
        raise UserError(f"no period is found along axis {axis} of {n} voxels; expected at least two yarns")
    lag = next(lag for lag in peaks if correlation[lag] >= 0.5 * max(correlation[peaks]))
    before, top, after = correlation[lag - 1:lag + 2]
    period = lag + 0.5 * (before - after) / (before - 2 * top + after)  # vertex of the parabola through three lags
    return float(period if voxel is None else period * voxel)


# --- distances of two sets of slices ----------------------------------------------------------------------------------

def two_point(grey, longest=None):
    """S2(r), r = 0, 1, ... longest voxels: the probability that both ends of a line of length r lie inside yarns.

    grey     [H,W], or a set of slices [n,H,W]; Otsu's threshold after denoising separates the yarns
    longest  default: half the shorter side

    S2(0) is the fibre fraction; S2 tends to its square at great lengths. It is averaged over all directions; lines that
    leave the slice do not count. Source: Torquato 2002, Random Heterogeneous Materials, section 2.1.
    """
    slices = np.asarray(grey, np.float32).reshape(-1, *np.shape(grey)[-2:])
    _, height, width = slices.shape
    longest = min(height, width) // 2 if longest is None else longest
    size = (2 * height, 2 * width)  # zero padding: the correlation must not wrap round the edge
    pairs_inside = np.zeros(size)
    for image in slices:
        smooth = gaussian_filter(image, DENOISE)
        pairs_inside += np.fft.irfft2(np.abs(np.fft.rfft2(smooth > otsu(smooth)[0], size)) ** 2, size)
    pairs = np.fft.irfft2(np.abs(np.fft.rfft2(np.ones((height, width)), size)) ** 2, size) * len(slices)
    length = _wrapped_radius(size).round().astype(int)
    near = length <= longest
    return np.bincount(length[near], pairs_inside[near]) / np.bincount(length[near], pairs[near])


def radial_spectrum(grey, bins=24):
    """log10 of the power in `bins` rings of spatial frequency, 0 to 0.5 per voxel, of slices [n,H,W] or one [H,W].

    The mean is subtracted and a Hann window suppresses the edges. The logarithm is that of the mean over slices.
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
    """A dict of distances (floats) between two sets of slices [n,H,W] of one size; all are 0 for equal sets.

    grey       Wasserstein-1 distance of the grey histograms, as a share of b's range (1st to 99th percentile)
    two_point  mean |S2_a - S2_b| over all lengths up to half the shorter side, a probability
    spectrum   root mean square difference of the log10 radial power spectra, decades
    period     |difference| of the median yarn periods along each slice's width, voxels, or µm given `voxel`
    porosity   |difference| of the mean shares of air in a dry part; left out with resin=True

    period and porosity are left out when they can be measured in fewer than half of the slices of either set.
    UserError when the sizes differ.
    """
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    if a.ndim != 3 or b.ndim != 3 or a.shape[1:] != b.shape[1:]:
        raise UserError(f"slices of shape {list(a.shape)} and {list(b.shape)} cannot be compared; expected two sets "
                        "[n,H,W] of one height and width")
    low, high = np.percentile(b, [1, 99])
    result = {"grey": wasserstein_distance(a[:, ::2, ::2].ravel(), b[:, ::2, ::2].ravel()) / max(high - low, 1e-12),
              "two_point": np.abs(two_point(a) - two_point(b)).mean(),
              "spectrum": np.sqrt(np.mean((radial_spectrum(a) - radial_spectrum(b)) ** 2))}
    periods = [_median_period(slices, voxel) for slices in (a, b)]
    if None not in periods:
        result["period"] = abs(periods[0] - periods[1])
    porosities = [None if resin else _mean_measure(slices, porosity) for slices in (a, b)]
    if None not in porosities:
        result["porosity"] = abs(porosities[0] - porosities[1])
    return {name: float(value) for name, value in result.items()}


def summary(slices, voxel=None):
    """{"yarn": mean share inside yarns, "period": median yarn period along the width} of slices [n,H,W].

    The period is in voxels, or in µm given `voxel`. A measure is left out when fewer than half of the slices have it.
    """
    measures = {"yarn": _mean_measure(slices, fibre_fraction), "period": _median_period(slices, voxel)}
    return {name: float(value) for name, value in measures.items() if value is not None}


def _mean_measure(slices, measure):
    """The mean of measure(slice); None when fewer than half of the slices can be measured."""
    values = _measure_each(slices, measure)
    return np.mean(values) if 2 * len(values) >= len(slices) else None


def _median_period(slices, voxel):
    """The median yarn period along the width; None when fewer than half of the slices have one."""
    values = _measure_each(slices, lambda image: yarn_period(image, 1, voxel))
    return np.median(values) if 2 * len(values) >= len(slices) else None


def _measure_each(slices, measure):
    """[measure(slice)] of the slices that can be measured."""
    values = []
    for image in slices:
        try:
            values.append(measure(image))
        except UserError:
            continue
    return values


def _wrapped_radius(size):
    """The distance from the corner [0, 0] for every element of an array of `size` with periodic boundaries."""
    return np.hypot(np.fft.fftfreq(size[0], 1 / size[0])[:, None], np.fft.fftfreq(size[1], 1 / size[1])[None])


# --- parts ------------------------------------------------------------------------------------------------------------

def _autocorrelation(lines):
    """The mean autocorrelation of lines [n, k] at the lags 0 .. 2n/3, without slow trends; 1 at lag 0."""
    n = len(lines)
    window = np.sqrt(np.hanning(n + 2)[1:-1])[:, None]  # suppresses the air or the plates at both ends
    lines = lines - gaussian_filter1d(lines, n / 10, axis=0, mode="nearest")
    lines = (lines - np.sum(lines * window, 0) / window.sum()) * window
    product, overlap = (np.fft.irfft(np.mean(np.abs(np.fft.rfft(x, 2 * n, axis=0)) ** 2, 1)) for x in (lines, window))
    correlation = product[:n * 2 // 3] / overlap[:n * 2 // 3]  # unbiased: divided by the overlap at each lag
    return correlation / correlation[0]


def _peaks(correlation):
    """The first four lags at which the correlation has a peak."""
    lags = [lag for lag in range(3, len(correlation) - 1)
            if correlation[lag - 1] < correlation[lag] >= correlation[lag + 1] and correlation[lag] > 0.05]
    return lags[:4]


def _levels(grey):
    """(grey float32, level of the ground, level of the nearby yarns at every voxel, bool mask of the ground)."""
    grey = np.asarray(grey, dtype=np.float32)
    if grey.ndim not in (2, 3) or min(grey.shape) < 8:
        raise UserError(f"the picture has shape {list(grey.shape)}; expected [H,W] or [D,H,W], at least 8 each way")
    if not np.isfinite(grey).all():
        raise UserError("the picture holds values that are not finite; expected grey values")
    smooth = gaussian_filter(grey, DENOISE)
    inside = smooth > otsu(smooth)[0]
    yarn, ground = minimum_filter(inside, 3), minimum_filter(~inside, 3)  # at least a voxel from the edge
    if not yarn.any() or not ground.any():
        raise UserError("the picture shows no two materials; expected yarns, and air or resin between them")
    # yarns differ in brightness: each voxel is compared with the yarns near it
    weight = gaussian_filter(yarn.astype(np.float32), 3, truncate=2) + 1e-4
    level = (gaussian_filter(np.where(yarn, grey, 0), 3, truncate=2) + 1e-4 * grey[yarn].mean()) / weight
    return grey, float(grey[ground].mean()), level, ground
