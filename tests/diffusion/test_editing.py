"""Editing from a state: partial noising, shared states, interpolation."""

import math

import pytest
import torch
from closed_form import alpha_bar_at, mixture, oracle

from nanodiff.diffusion import Schedule, editing, process, samplers

NAMES = list(samplers.by_name)
SD = Schedule.scaled_linear()
MEANS = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]], dtype=torch.float64)
STDS, WEIGHTS = torch.full((3,), 0.1, dtype=torch.float64), torch.full((3,), 1 / 3, dtype=torch.float64)

ENDS_EXACT = {"ddim": dict(final_alpha="one"), "pndm": dict(final_alpha="one")}  # the default leaves a trace of noise


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.slow
def test_sdedit_is_the_sampler_started_from_the_noised_picture():
    image, noise = draw(0, 2, 3), draw(1, 2, 3)
    seen = []
    end = editing.sdedit("ddim", oracle(SD, image, "v", seen), image, SD, 20, 0.6, noise, kind="v",
                         final_alpha="one")
    t, first = seen[0]
    torch.testing.assert_close(first, process.q_sample(SD, image, t, noise), rtol=0, atol=1e-14)
    assert len(seen) == 12 and int(t[0]) == 551
    torch.testing.assert_close(end, image, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_edit_with_an_oracle_returns_the_picture_for_every_strength_and_step_count(name):
    x0, x = draw(17, 1, 2), draw(18, 1, 2)
    for steps in range(10, 41):
        for tenth in range(1, 11):
            end = samplers.sample(name, oracle(SD, x0, "noise"), x, SD, steps, image=x0, strength=tenth / 10,
                                  generator=torch.Generator(), **ENDS_EXACT.get(name, {}))
            assert float((end - x0).abs().max()) < 1e-5, (steps, tenth)


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_starts_from_the_picture_noised_to_the_level_of_its_first_step(name):
    image, x = draw(34, 2, 3), draw(35, 2, 3)
    for strength in (1.0,) if name == "dpm++2m_karras" else (0.5, 1.0):  # karras: t is rounded on the way
        seen = []
        samplers.sample(name, oracle(SD, 0.0, "x0", seen), x, SD, 10, kind="x0", image=image, strength=strength)
        t, first = seen[0]
        alpha_bar = alpha_bar_at(SD, t[0])
        expected = math.sqrt(alpha_bar) * image + math.sqrt(1 - alpha_bar) * x
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)


def first_level(name, steps, strength):
    """sigma of the state from which an edit starts: a run on a black picture with noise 1."""
    seen = []
    one = torch.ones(1, 1, dtype=torch.float64)
    samplers.sample(name, oracle(SD, 0.0, "noise", seen), one, SD, steps, image=0 * one, strength=strength)
    return float(seen[0][1])


@pytest.mark.parametrize("steps", [4, 20, 50])
@pytest.mark.parametrize("name", NAMES)
def test_the_start_noise_falls_strictly_with_strength_and_strength_1_starts_at_the_first_step(name, steps):
    levels = [first_level(name, steps, i / steps) for i in range(1, steps + 1)]
    assert all(a < b for a, b in zip(levels, levels[1:]))
    seen = []
    samplers.sample(name, oracle(SD, 0.0, "noise", seen), torch.ones(1, 1, dtype=torch.float64), SD, steps)
    edited = []
    one = torch.ones(1, 1, dtype=torch.float64)
    samplers.sample(name, oracle(SD, 0.0, "noise", edited), one, SD, steps, image=0 * one, strength=1.0)
    assert [float(t) for t, _ in seen] == [float(t) for t, _ in edited]


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_takes_the_share_of_the_steps_that_strength_says(name):
    for steps, strength, taken in ((10, 0.5, 5), (10, 0.01, 1), (50, 0.58, 29), (4, 0.3, 1), (20, 1.0, 20)):
        seen = []
        samplers.sample(name, oracle(SD, 0.0, "noise", seen), draw(19, 1, 1), SD, steps, image=draw(20, 1, 1),
                        strength=strength)
        calls = {"heun": 2 * taken - 1, "pndm": taken + (taken > 1)}.get(name, taken)
        assert len(seen) == calls


@pytest.mark.parametrize("name", NAMES)
def test_a_strength_outside_0_to_1_raises(name):
    for strength in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match="strength"):
            samplers.sample(name, oracle(SD, 0.0, "noise"), draw(0, 1, 1), SD, 10, image=draw(1, 1, 1),
                            strength=strength)
    with pytest.raises(ValueError, match="without an image"):
        samplers.sample(name, oracle(SD, 0.0, "noise"), draw(0, 1, 1), SD, 10, strength=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_denoising_from_t_starts_at_t_with_the_state_itself(name):
    for t, steps in ((0, None), (7, None), (400, 10), (999, 25)):
        x0, noise = draw(2, 2, 3), draw(3, 2, 3)
        at_t = torch.full((2,), t)
        x_t, seen = process.q_sample(SD, x0, at_t, noise), []
        options = ENDS_EXACT.get(name, {})
        end = editing.denoise_from(name, oracle(SD, x0, "noise", seen), x_t, SD, t, steps,
                                   generator=torch.Generator(), **options)
        assert float(seen[0][0][0]) == t
        torch.testing.assert_close(seen[0][1], x_t, rtol=0, atol=1e-12)
        torch.testing.assert_close(end, x0, rtol=0, atol=1e-5)
        again = editing.noise_and_denoise(name, oracle(SD, x0, "noise"), x0, SD, t, noise, steps,
                                          generator=torch.Generator(), **options)
        torch.testing.assert_close(again, x0, rtol=0, atol=1e-5)


def test_the_whole_chain_below_t_is_visited():
    seen = []
    editing.denoise_from("ddpm", oracle(SD, 0.0, "noise", seen), draw(4, 1, 2), SD, 30)
    assert [int(t[0]) for t, _ in seen] == list(range(31))[::-1]


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m"])
def test_pure_noise_of_a_zero_snr_schedule_is_denoised_from_its_last_step(name):
    zero, seen, x = SD.zero_terminal_snr(), [], draw(5, 2, 3)

    def denoise(x, t):
        seen.append((int(t[0]), x))
        return torch.full_like(x, 0.25)

    end = editing.denoise_from(name, denoise, x, zero, 999, 10, kind="x0")
    assert seen[0][0] == 999 and torch.isfinite(end).all()
    torch.testing.assert_close(seen[0][1], x, rtol=1e-6, atol=0)


def test_pictures_from_one_late_state_agree_and_from_an_early_one_do_not():
    def spread(t):
        x_t = process.q_sample(SD, MEANS[:1], torch.tensor([t]), draw(6, 1, 2))
        pictures = editing.share("ddpm", mixture(SD, MEANS, STDS, WEIGHTS, "noise"), x_t, SD, t, 64, 50,
                                 generator=torch.Generator().manual_seed(0))
        assert pictures.shape == (64, 2)
        return float(pictures.std(0).mean())

    assert spread(100) < 0.2 < 0.5 < spread(999)


def test_a_step_outside_the_schedule_raises():
    for t in (-1, 1000):
        with pytest.raises(ValueError, match="t must be"):
            editing.denoise_from("ddim", oracle(SD, 0.0, "noise"), draw(0, 1, 1), SD, t)


def test_interpolation_begins_and_ends_at_its_states_and_keeps_unit_variance():
    a, b = draw(7, 2, 3, 64, 64), draw(8, 2, 3, 64, 64)
    torch.testing.assert_close(editing.interpolate(a, b, 0.0), a, rtol=0, atol=1e-12)
    torch.testing.assert_close(editing.interpolate(a, b, 1.0), b, rtol=0, atol=1e-12)
    for weight in (0.1, 0.5, 0.9):
        assert abs(float(editing.interpolate(a, b, weight).var()) - 1) < 0.02
    assert float((0.5 * a + 0.5 * b).var()) < 0.55  # what the straight line does


def test_interpolation_goes_along_the_great_circle_at_constant_speed():
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[math.cos(2.0), math.sin(2.0)]], dtype=torch.float64)
    weight = torch.linspace(0, 1, 5).double()
    path = editing.interpolate(a, b, weight)
    expected = torch.stack([(2 * weight).cos(), (2 * weight).sin()], 1)
    torch.testing.assert_close(path, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interpolation_of_parallel_states_is_linear(dtype):
    a = draw(9, 2, 3, 4, 4, dtype=dtype)
    torch.testing.assert_close(editing.interpolate(a, a, 0.3), a)
    torch.testing.assert_close(editing.interpolate(a, 3 * a, 0.5), 2 * a)
    torch.testing.assert_close(editing.interpolate(a, 0 * a, 0.5).isfinite().all(), torch.tensor(True))


def test_editing_leaves_its_inputs_bit_identical():
    image, noise = draw(12, 2, 3), draw(13, 2, 3)
    copies = image.clone(), noise.clone()
    editing.sdedit("heun", oracle(SD, 0.0, "noise"), image, SD, 5, 0.5, noise)
    editing.noise_and_denoise("euler", oracle(SD, 0.0, "noise"), image, SD, 300, noise, 5)
    editing.interpolate(image, noise, 0.5)
    assert torch.equal(image, copies[0]) and torch.equal(noise, copies[1])
