"""PSNR and SSIM against their closed forms and a plain reference; the data range is said and never guessed."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nanodiff.errors import UserError
from nanodiff.metrics.image_quality import psnr, ssim


def pair(*shape, seed=0, amount=0.3):
    """Two pictures in [-1, 1], alike but for some noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.avg_pool2d(4 * torch.randn(*shape, generator=generator), 3, 1, 1).clamp(-1, 1)
    return x, (x + amount * torch.randn(shape, generator=generator)).clamp(-1, 1)


def slow_ssim(x, y, data_range):
    """Wang et al. 2004, equation 13, of one channel [H, W], by scipy; the border where no window fits is cut."""
    def mean(z):
        return gaussian_filter(z, 1.5, truncate=3.5, mode="reflect")[5:-5, 5:-5]

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    return np.mean((2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))


def test_psnr_of_a_known_error_is_the_closed_form():
    x = torch.zeros(3, 3, 8, 9)
    y = x + torch.tensor([0.02, 0.2, 2.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(psnr(x, y, 2), torch.tensor([40.0, 20.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-5)
    one = torch.zeros(1, 1, 10, 10)
    one[0, 0, 3, 4] = 1  # an error in one of a hundred pixels
    assert psnr(one, torch.zeros_like(one), 1).item() == pytest.approx(20)
    assert psnr(one, one, 1).item() == math.inf
    assert torch.equal(psnr(x, y, 2), psnr(y, x, 2))


def test_ssim_is_1_for_equal_pictures_and_falls_with_the_noise():
    x, _ = pair(2, 3, 20, 24)
    torch.testing.assert_close(ssim(x, x, 2), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-12)
    falling = [float(ssim(*pair(1, 3, 32, 32, amount=amount), 2)) for amount in (0.05, 0.1, 0.3, 1.0)]
    assert falling == sorted(falling, reverse=True) and falling[0] > 0.9 and falling[-1] < 0.5
    assert (ssim((1 + x) / 2, (1 - x) / 2, 1) < 0).all()  # light and dark exchanged


@pytest.mark.parametrize("shape, data_range", [((2, 3, 24, 31), 2), ((1, 1, 11, 40), 2), ((1, 1, 16, 16), 255)])
def test_ssim_equals_a_plain_reference(shape, data_range):
    x, y = (z.double() * data_range / 2 for z in pair(*shape))
    expected = [np.mean([slow_ssim(a.numpy(), b.numpy(), data_range) for a, b in zip(one, other)])
                for one, other in zip(x, y)]
    assert np.abs(ssim(x, y, data_range).numpy() - expected).max() < 1e-7


def test_two_flat_pictures_have_the_closed_form_of_their_means():
    x, y = torch.full((1, 1, 12, 12), 100.0), torch.full((1, 1, 12, 12), 120.0)
    c1 = (0.01 * 255) ** 2
    assert ssim(x, y, 255).item() == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1), rel=1e-9)


def test_uint16_and_scaled_floats_give_the_same_number():
    counts = np.random.default_rng(0).integers(0, 65536, (2, 2, 1, 16, 20))
    x, y = (torch.from_numpy(z.astype(np.uint16)) for z in counts)
    scaled = [torch.from_numpy(z / 65535) for z in counts]
    for measure in (psnr, ssim):
        torch.testing.assert_close(measure(x, y, 65535), measure(*scaled, 1), rtol=1e-9, atol=0)


def test_small_unsigned_numbers_do_not_wrap_round():
    x, y = torch.full((1, 1, 11, 11), 3, dtype=torch.uint8), torch.full((1, 1, 11, 11), 5, dtype=torch.uint8)
    assert psnr(x, y, 255).item() == pytest.approx(20 * math.log10(255 / 2))


def test_each_pair_has_its_own_number():
    x, y = pair(4, 3, 16, 16)
    for measure in (psnr, ssim):
        alone = torch.cat([measure(x[i:i + 1], y[i:i + 1], 2) for i in range(4)])
        assert alone.shape == (4,) and alone.dtype == torch.float64
        torch.testing.assert_close(measure(x, y, 2), alone)


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_wrong_input_is_refused_in_one_sentence(measure):
    x = torch.zeros(2, 3, 16, 16)
    with pytest.raises(UserError, match=r"\[2, 3, 16, 16\] and \[1, 3, 16, 16\] cannot be compared"):
        measure(x, x[:1], 2)
    with pytest.raises(UserError, match=r"expected the same \[B, C, H, W\]"):
        measure(x[0], x[0], 2)
    for wrong in (0, -1, float("nan")):
        with pytest.raises(UserError, match="expected the largest possible difference, such as 255"):
            measure(x, x, wrong)
    with pytest.raises(TypeError):
        measure(x, x)  # the range is never guessed


def test_ssim_refuses_pictures_smaller_than_its_window():
    with pytest.raises(UserError, match="10x30 are too small for SSIM: expected sides from 11"):
        ssim(torch.zeros(1, 1, 10, 30), torch.zeros(1, 1, 10, 30), 2)
