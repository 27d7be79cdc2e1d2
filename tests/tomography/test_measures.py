"""Estimates from the grey picture alone: on pictures with a closed form, and on drawn weaves against their labels."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from nanodiff.errors import UserError
from nanodiff.tomography import measures
from nanodiff.worlds import weave


def stripes(period, share, shape=(60, 400), noise=5.0):
    """Bright stripes that cover `share`, one each `period` pixels along the second axis, blurred and with noise."""
    x = np.arange(shape[1] * 8) / 8
    fine = np.broadcast_to((x / period) % 1 < share, (shape[0], len(x))).astype(float)
    grey = 60 + 100 * gaussian_filter(fine.reshape(*shape, 8).mean(2), 1)
    return grey + noise * np.random.default_rng(0).standard_normal(shape)


def test_otsu_of_two_levels_is_between_them_and_explains_all():
    threshold, share = measures.otsu(np.repeat([10.0, 90.0], [300, 100]))
    assert 10 < threshold < 90 and share == pytest.approx(1, abs=1e-3)


def test_otsu_of_one_bell_curve_is_two_over_pi():
    share = measures.otsu(np.random.default_rng(0).standard_normal(400_000))[1]
    assert share == pytest.approx(2 / np.pi, abs=0.01)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_the_share_of_stripes_is_found_through_blur_and_noise(share):
    grey = stripes(37.3, share)
    assert measures.fibre_fraction(grey) == pytest.approx(share, rel=0.05)
    assert measures.porosity(grey) == pytest.approx(1 - share, rel=0.06)


def test_estimates_do_not_depend_on_the_units_of_grey():
    grey = stripes(20, 0.5)
    assert measures.fibre_fraction(grey * 37 + 900) == pytest.approx(measures.fibre_fraction(grey), rel=1e-3)
    assert measures.yarn_period(grey * 37 + 900, 1) == pytest.approx(measures.yarn_period(grey, 1), rel=1e-6)


@pytest.mark.parametrize("period", [12.5, 37.3])
def test_the_period_of_stripes_is_found_to_a_fraction_of_a_pixel(period):
    assert measures.yarn_period(stripes(period, 0.5), 1) == pytest.approx(period, rel=0.01)
    assert measures.yarn_period(stripes(period, 0.5), -1, voxel=8) == pytest.approx(8 * period, rel=0.01)


def test_dark_holes_in_resin_are_counted():
    grey = stripes(40, 0.5, (200, 400), 4.0)
    y, x = np.mgrid[:200, :400]
    holes = np.zeros(grey.shape, bool)
    for cy, cx in ((40, 30), (120, 190), (160, 350)):
        holes |= (y - cy) ** 2 + (x - cx) ** 2 < 49
    grey = np.where(holes, -100.0, grey)
    assert measures.porosity(grey, resin=True) == pytest.approx(holes.mean(), rel=0.1)
    assert measures.porosity(stripes(40, 0.5), resin=True) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("state", weave.STATES)
def test_what_the_picture_says_is_what_the_labels_know(state, seed=300):
    shape = weave.scale_shape(state, 0.25)
    design = weave.make_design(seed, state, shape)
    volume, labels = weave.specimen(seed, state, shape)
    truth = weave.truth(labels)
    assert measures.fibre_fraction(volume) == pytest.approx(truth["fibre_fraction"], rel=0.1)
    assert measures.porosity(volume, resin=state == "injected") == pytest.approx(truth["porosity"], rel=0.1)
    for axis, name in enumerate(("depth", "height", "width")):
        assert measures.yarn_period(volume, axis) == pytest.approx(design.periods[name], rel=0.1)


def test_pictures_that_cannot_be_judged_are_named():
    for call, sentence in ((lambda: measures.fibre_fraction(np.ones((20, 20))), "single grey value"),
                           (lambda: measures.fibre_fraction(np.ones(20)), r"shape \[20\]"),
                           (lambda: measures.porosity(np.full((20, 20), np.nan)), "not finite"),
                           (lambda: measures.yarn_period(np.eye(30), 2), "axis is 2; expected 0 to 1"),
                           (lambda: measures.yarn_period(np.eye(10), 0), "at least 16"),
                           (lambda: measures.yarn_period(np.arange(400.0).reshape(20, 20), 0), "no period")):
        with pytest.raises(UserError, match=sentence):
            call()
