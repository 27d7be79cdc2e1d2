"""Grids: falling levels, sigmas of one's own, which levels a run shows the network, and the cut of an edit."""

import math

import pytest
import torch
from closed_form import oracle

from nanodiff.diffusion import Schedule, samplers
from nanodiff.diffusion.grid import sigma_table

NAMES = list(samplers.by_name)
SD = Schedule.scaled_linear()
ZERO_SNR = SD.zero_terminal_snr()
ENDS_EXACT = {"ddim": dict(final_alpha="one"), "pndm": dict(final_alpha="one")}  # the default leaves a trace of noise


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def record(states):
    return lambda i, t, x: states.append((i, t, x))


@pytest.mark.parametrize("name", NAMES)
def test_sigmas_fall_strictly_and_end_in_0_also_the_karras_ones(name):
    for steps in (1, 2, 5, 10, 26, 50):
        for karras in (False, True):
            options = {"karras": karras} if "karras" in samplers.options_of(name) else ENDS_EXACT.get(name, {})
            grid, _ = samplers.grid_for(name, SD, steps, **options)
            t, sigma = [level.t for level in grid.levels], [level.sigma for level in grid.levels]
            assert t[-1] is None and len(sigma) == steps + 1 == len(grid.steps) + 1 and sigma[-1] == 0
            assert all(a > b for a, b in zip(sigma, sigma[1:]))


@pytest.mark.parametrize("name", NAMES)
def test_repeated_time_steps_are_still_steps(name):
    # on a grid of one's own below the table's first sigma all t are 0; n updates are made all the same
    states = []
    sigmas = [0.02, 0.015, 0.01, 0.005, 0.0]
    samplers.sample(name, oracle(SD, 0.0, "x0"), draw(21, 1, 2), SD, 4, kind="x0", sigmas=sigmas,
                    on_step=record(states), generator=torch.Generator())
    assert len({float(x[0, 0]) for _, _, x in states}) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_of_ones_own_is_checked_and_may_end_above_0(name):
    x = draw(22, 1, 2)
    for wrong in ([3.0, 2.0], [3.0, 2.0, 2.0, 0.0], [3.0, 2.0, 1.0, -1.0], [1.0, 2.0, 3.0, 4.0]):
        with pytest.raises(ValueError, match="sigmas"):
            samplers.sample(name, oracle(SD, 0.0, "noise"), x, SD, 3, sigmas=wrong)
    x0 = draw(23, 1, 2)
    end = samplers.sample(name, oracle(SD, x0, "x0"), x, SD, 3, kind="x0", noises=[torch.zeros_like(x)] * 3,
                          sigmas=torch.tensor([3.0, 1.0, 0.5, 0.25]))
    assert 1e-3 < float((end * math.sqrt(1 + 0.25**2) - x0).abs().max()) < 1.0


@pytest.mark.parametrize("name", NAMES)
def test_the_first_model_input_has_unit_variance(name):
    x = draw(24, 1, 20_000)
    x = (x - x.mean()) / x.std()
    for steps in (2, 10, 50):
        for options in ({}, dict(spacing="trailing"), dict(spacing="leading"), dict(spacing="linspace")):
            seen = []
            samplers.sample(name, oracle(SD, 0.0, "noise", seen), x, SD, steps, **options)
            assert abs(float(seen[0][1].var()) - 1) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_the_levels_of_a_grid_are_those_that_a_run_shows_the_network(name):
    x, image = draw(41, 2, 3), draw(42, 2, 3)
    grids = [{}, *(dict(spacing=spacing) for spacing in ("leading", "trailing", "linspace")), dict(offset=0),
             dict(spacing="leading", offset=1), dict(sigmas=[9.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.1])]
    grids += [dict(karras=True)] if "karras" in samplers.options_of(name) else []
    for options in grids:
        for steps in (7,) if "sigmas" in options else (1, 7, 30):
            grid, own = samplers.grid_for(name, SD, steps, **options, eta=0.5)
            assert own == {"eta": 0.5} and len(grid.levels) == steps + 1
            for strength in (None, 0.01, 0.5, 1.0):
                edit = {} if strength is None else {"image": image, "strength": strength}
                levels, seen, part = [], [], grid if strength is None else grid.cut(strength)
                network = samplers.Denoiser(lambda x, level: levels.append(level) or 0.1 * x)
                for _ in samplers.by_name[name](network, x, part, samplers.step_noise(generator=torch.Generator())):
                    pass
                asked_at_the_end = name == "heun" and part.levels[-1].noise > 0
                assert tuple(dict.fromkeys(levels)) == part.levels[: None if asked_at_the_end else -1]
                samplers.sample(name, lambda x, t: seen.append(t) or 0.1 * x, x, SD, steps, **options, **edit,
                                generator=torch.Generator())
                assert all(torch.equal(t, level.t_like(x)) for t, level in zip(seen, levels, strict=True))


def test_only_where_no_signal_at_all_is_left_another_sigma_stands_in():
    little = Schedule.cosine(1000).shifted(4.0)  # leaves 1.5e-10 of the signal's power
    expected = ((1 - little.alpha_bar) / little.alpha_bar).sqrt()
    seen = []
    samplers.sample("dpm++2m", lambda x, t: torch.zeros_like(x), draw(0, 1, 1, 2, 2), little, 5, kind="x0",
                    spacing="trailing", on_step=lambda i, t, x: seen.append(x))
    # a picture of 0 leaves the noise alone, which each step scales by its share of noise in x_t
    share = (1 - little.alpha_bar).sqrt()[[999, 799, 599, 399, 199]]
    for i, x in enumerate(seen[:-1]):
        assert torch.allclose(x, draw(0, 1, 1, 2, 2) * share[i + 1] / share[0], rtol=1e-9)
    assert expected[-1] > 4096 and torch.allclose(torch.tensor(sigma_table(little)), expected, rtol=1e-12)
    none = sigma_table(ZERO_SNR)
    assert math.isclose(none[-1], 4096, rel_tol=1e-6) and none[-2] < 4096
