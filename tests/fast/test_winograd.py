"""Winograd's convolution: the plain sum, by fewer products, with little more rounding."""

import pytest
import torch
import torch.nn.functional as F

from nanodiff.fast import winograd

SHAPES = [(1, 1, 1, 4, 4), (1, 3, 5, 8, 12), (2, 4, 3, 4, 20), (3, 2, 7, 16, 8), (1, 20, 30, 24, 36)]  # B, C, O, H, W


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(x, weight, bias):
    return F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("batch, channels, out, height, width", SHAPES)
def test_it_is_the_convolution_for_whole_tiles_of_any_number(batch, channels, out, height, width, with_bias):
    x, weight = noise(batch, channels, height, width), noise(out, channels, 3, 3, seed=2)
    bias = noise(out, seed=3) if with_bias else None
    expected = exact(x, weight, bias)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=memory_format)
        before = [y.clone() for y in (given, weight)]
        y = winograd.convolve(given, weight, bias)
        assert y.dtype == torch.float32 and y.shape == (batch, out, height, width)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert (y - expected).abs().max() < 2e-5 * expected.abs().max()
        assert torch.equal(given, before[0]) and torch.equal(weight, before[1])


@pytest.mark.parametrize("numbers", [1, 3 * 5 * 2, 3 * 5 * 3, 3 * 5 * 100])
def test_the_rows_of_tiles_may_be_worked_on_in_any_portions(numbers, monkeypatch):
    x, weight, bias = noise(2, 3, 28, 20), noise(4, 3, 3, 3, seed=2), noise(4, seed=3)  # 7 rows of 5 tiles
    monkeypatch.setattr(winograd, "BATCH", numbers)  # 1, 2, 3 or all rows at a time
    expected = exact(x, weight, bias)
    assert (winograd.convolve(x, weight, bias) - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("channels", [8, 64])
def test_its_rounding_errors_are_at_most_three_times_those_of_the_plain_sum(channels):
    x, weight = noise(2, channels, 32, 32), noise(channels, channels, 3, 3, seed=2)
    x += 1  # a mean, as activations have
    expected = exact(x, weight, None)
    errors = [(y - expected).square().mean().sqrt()
              for y in (winograd.convolve(x, weight, None), F.conv2d(x, weight, padding=1))]
    assert 0 < errors[0] < 3 * errors[1]


def test_every_tap_of_the_filter_counts_at_every_place_of_a_tile():
    x = noise(1, 1, 8, 8)
    for tap in range(9):
        weight = torch.zeros(1, 1, 3, 3)
        weight.view(-1)[tap] = 1
        shifted = F.pad(x, (1, 1, 1, 1))[:, :, tap // 3 :, tap % 3 :][:, :, :8, :8]
        torch.testing.assert_close(winograd.convolve(x, weight, None), shifted, rtol=0, atol=1e-5)


def test_it_builds_no_graph_and_keeps_float32_whatever_the_default_is():
    x, weight = noise(1, 2, 4, 4).requires_grad_(), noise(3, 2, 3, 3, seed=2).requires_grad_()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        y = winograd.convolve(x, weight, None)
    finally:
        torch.set_default_dtype(default)
    assert y.dtype == torch.float32 and not y.requires_grad


@pytest.mark.parametrize("shape, out, answer", [
    ((1, 128, 32, 32), 128, True), ((2, 320, 64, 64), 320, True), ((4, 128, 16, 16), 128, True),
    ((1, 128, 34, 32), 128, False), ((1, 128, 32, 33), 128, False), ((1, 128, 30, 42), 128, False),  # tiles cut off
    ((1, 128, 16, 16), 128, False),  # few pixels: the filters would cost more than they save
    ((1, 64, 64, 64), 128, False), ((1, 128, 64, 64), 4, False),  # few channels
    ((1, 1280, 32, 32), 1280, False),  # many filters
])
def test_it_pays_for_many_pixels_in_whole_tiles_and_for_middling_numbers_of_channels(shape, out, answer):
    assert winograd.pays(shape, out) is answer
