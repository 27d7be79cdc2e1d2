"""The held-out loss: the mean squared error of fixed noisy copies, by hand."""

import math

import pytest
import torch

from nanodiff import rng
from nanodiff.diffusion import Schedule, process
from nanodiff.training.validation import held_out_loss


@pytest.mark.parametrize("kind", process.KINDS)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_it_is_the_mean_error_at_evenly_spread_times_whatever_the_batch(kind, batch):
    schedule, x0 = Schedule.cosine(100), torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    condition = torch.linspace(0, 1, 8).view(8, 1, 1, 1)
    mean, quarters = held_out_loss(lambda x, t, c: c * x, x0, schedule, kind, condition, batch)
    t = torch.tensor([6, 18, 31, 43, 56, 68, 81, 93])
    noise = rng.normal(0, -1, torch.arange(8), (1, 4, 4))
    x_t = process.q_sample(schedule, x0, t, noise)
    error = (condition * x_t - process.target(schedule, kind, x0, noise, t)).square().mean((1, 2, 3)).double()
    assert mean == pytest.approx(float(error.mean()), rel=1e-6)
    assert quarters == pytest.approx(error.view(4, 2).mean(1).tolist(), rel=1e-6)


def test_a_quarter_without_pictures_is_nan_and_every_call_gives_the_same():
    schedule, x0 = Schedule.linear(100), torch.zeros(2, 1, 4, 4)
    first, again = (held_out_loss(lambda x, t: x, x0, schedule, "noise") for _ in range(2))
    assert first[0] == again[0]
    assert [math.isnan(value) for value in first[1]] == [True, False, True, False]  # t = 25 and 75
