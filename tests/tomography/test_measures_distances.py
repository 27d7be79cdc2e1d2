"""Two-point correlation, radial spectrum and the distances of two sets of slices, against closed forms."""

import numpy as np
import pytest

from nanodiff import worlds
from nanodiff.errors import UserError
from nanodiff.tomography.measures import distances, radial_spectrum, two_point


def discs(n, seed, density=0.03, radius=4, side=96):
    """Slices with discs at random places, overlapping: a Boolean model."""
    rng, y = np.random.default_rng(seed), np.arange(side)
    slices = np.zeros((n, side, side))
    for image in slices:
        for cy, cx in rng.uniform(-radius, side + radius, (rng.poisson(density * (side + 2 * radius) ** 2), 2)):
            image[np.hypot(y[:, None] - cy, y[None] - cx) <= radius] = 1
    return slices


def test_the_two_point_function_of_random_discs_is_the_boolean_models():
    density, radius = 0.012, 5.0
    values = two_point(discs(30, 0, density, radius), 20)
    r = np.arange(21.0)
    lens = np.where(r < 2 * radius, 2 * radius**2 * np.arccos(np.minimum(r / (2 * radius), 1))
                    - r / 2 * np.sqrt(np.maximum(4 * radius**2 - r**2, 0)), 0)
    union = 2 * np.pi * radius**2 - lens  # area of two discs r apart
    empty = np.exp(-density * np.pi * radius**2)
    expected = 1 - 2 * empty + np.exp(-density * union)  # Torquato 2002, equation 5.36
    assert np.abs(values - expected).max() < 0.05 and np.abs(values - expected).mean() < 0.025
    assert values[0] > values[3] > values[8]


def test_the_two_point_function_begins_with_the_share_inside_and_a_stripe_is_periodic():
    x = np.tile((np.arange(64) // 8 % 2).astype(float), (64, 1))
    values = two_point(x[None] + 1e-3 * np.random.default_rng(0).normal(size=x.shape))
    assert abs(values[0] - 0.5) < 0.02 and len(values) == 33


def test_white_noise_has_a_flat_spectrum_and_a_wave_a_peak_at_its_frequency():
    rng = np.random.default_rng(0)
    flat = radial_spectrum(rng.normal(size=(40, 64, 64)))
    assert np.abs(flat[1:]).max() < 0.1  # log10 of variance 1
    wave = np.sin(2 * np.pi * 0.2 * np.arange(64))[None].repeat(64, 0)
    assert radial_spectrum(wave + 0.01 * rng.normal(size=(64, 64)), 25).argmax() == 10  # 0.2 of 0.5 in 25 rings


@pytest.mark.slow
def test_equal_sets_are_at_distance_0_and_specimens_of_one_state_nearer_than_states():
    first, second = (worlds.cut("train", 48, 36, seed=seed, specimens=1, scale=0.15, channels=1) for seed in (0, 5))
    first, second = (data.pixels[:, 0].numpy().astype(float) for data in (first, second))
    assert all(value == 0 for value in distances(first, first).values())
    near = distances(first[1::9], second[1::9])  # dry warp
    far = distances(first[1::9], second[7::9])  # injected warp
    assert near["grey"] < far["grey"] and near["spectrum"] >= 0


def test_brighter_slices_are_as_far_apart_as_they_were_moved():
    x = np.random.default_rng(0).uniform(0, 100, (4, 32, 32))
    assert abs(distances(x + 9.8, x)["grey"] - 0.1) < 0.005  # 9.8 of the 98 between the percentiles


def test_the_period_is_in_micrometres_when_the_voxel_is_known():
    x = np.stack([np.tile(np.sin(2 * np.pi * np.arange(64) / period), (64, 1)) for period in (8, 8)])
    y = np.stack([np.tile(np.sin(2 * np.pi * np.arange(64) / period), (64, 1)) for period in (10, 10)])
    assert abs(distances(x, y)["period"] - 2) < 0.2 and abs(distances(x, y, voxel=20)["period"] - 40) < 4


def test_slices_of_two_sizes_are_refused_and_both_are_named():
    with pytest.raises(UserError, match=r"\[2, 32, 32\] and \[2, 16, 32\]"):
        distances(np.zeros((2, 32, 32)), np.zeros((2, 16, 32)))
