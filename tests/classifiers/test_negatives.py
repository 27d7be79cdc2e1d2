"""Pictures of nothing: they repeat with their seed, leave their sources alone, and hold no picture any more."""

import pytest
import torch

from nanodiff.classifiers.negatives import HELD_OUT_KINDS, TRAINING_KINDS, make_nonsense

KINDS = {**TRAINING_KINDS, **HELD_OUT_KINDS}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=24):
    """Stripes of many widths, angles and colours: [n,3,64,64]."""
    side = torch.linspace(-1, 1, 64)
    angle = torch.arange(n) * 0.7
    wave = torch.sin((side * angle.cos()[:, None, None] + side[:, None] * angle.sin()[:, None, None]) * 20)
    return wave[:, None] * torch.tensor([0.9, -0.8, 0.5])[:, None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_repeats_with_its_seed_and_leaves_the_pictures_alone(kind):
    x = pictures()
    before = x.clone()
    y = make_nonsense(x, generator(5), {kind: KINDS[kind]})
    assert torch.equal(x, before)
    assert torch.equal(y, make_nonsense(x, generator(5), {kind: KINDS[kind]}))
    assert not torch.equal(y, make_nonsense(x, generator(6), {kind: KINDS[kind]}))
    assert y.shape == x.shape and y.abs().max() <= 1 and y.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_the_picture_it_was_made_of(kind):
    x = pictures(60)
    y = make_nonsense(x, generator(1), {kind: KINDS[kind]})
    a, b = (p.mean(1) - p.mean((1, 2, 3))[:, None, None] for p in (x, y))  # grey, less its mean
    correlation = (a * b).sum((1, 2)) / (a.norm(dim=(1, 2)) * b.norm(dim=(1, 2))).clamp(min=1e-6)
    assert correlation.abs().mean() < 0.35


@pytest.mark.slow
def test_about_half_of_it_is_grey_and_every_kind_occurs():
    y = make_nonsense(pictures(400), generator(2))
    grey = (y.amax(1) - y.amin(1)).amax((1, 2)) < 1e-5
    assert 0.35 < grey.double().mean() < 0.65
    assert y.flatten(1).std(1).min() < 0.3 and y.flatten(1).std(1).max() > 0.5  # blank pages, and noise
