"""The forward process, conversions between kinds of prediction, targets, weights and noise."""

import pytest
import torch

from nanodiff.diffusion import Schedule, process

KINDS = ("noise", "x0", "v")


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_single_steps_compose_to_the_closed_form():
    schedule = Schedule.linear(50)
    x, noise_variance = torch.ones(1, 1, dtype=torch.float64), 0.0
    for i in range(schedule.T):
        t = torch.tensor([i])
        x = process.q_step(schedule, x, t, torch.zeros_like(x))
        added = process.q_step(schedule, torch.zeros_like(x), t, torch.ones_like(x)) ** 2
        noise_variance = float(schedule.alpha[i]) * noise_variance + float(added)
        mean = process.q_sample(schedule, torch.ones_like(x), t, torch.zeros_like(x))
        std = process.q_sample(schedule, torch.zeros_like(x), t, torch.ones_like(x))
        assert abs(float(x - mean)) < 1e-14 and abs(noise_variance - float(std) ** 2) < 1e-14


def test_the_posterior_of_pure_signal_is_the_state_before():
    # x_t and x_{t-1} without any noise: the posterior mean must be sqrt(alpha_bar_{t-1}) x0
    schedule, x0 = Schedule.cosine(50), draw(0, 49, 3, 2, 2)
    t, none = torch.arange(1, 50), torch.zeros(49, 3, 2, 2, dtype=torch.float64)
    x_t, before = process.q_sample(schedule, x0, t, none), process.q_sample(schedule, x0, t - 1, none)
    mean, variance = process.posterior(schedule, x0, x_t, t)
    torch.testing.assert_close(mean, before, rtol=0, atol=1e-12)
    assert variance.shape == (49, 1, 1, 1) and (variance > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prediction_leads_back_to_x0_noise_and_v(kind):
    schedule, x0, noise = Schedule.scaled_linear(), draw(1, 4, 3, 2, 2), draw(2, 4, 3, 2, 2)
    t = torch.tensor([0, 10, 500, 999])
    x_t = process.q_sample(schedule, x0, t, noise)
    prediction = process.target(schedule, kind, x0, noise, t)
    torch.testing.assert_close(process.to_x0(schedule, prediction, kind, x_t, t), x0, rtol=0, atol=1e-11)
    torch.testing.assert_close(process.to_noise(schedule, prediction, kind, x_t, t), noise, rtol=0, atol=1e-11)
    v = process.target(schedule, "v", x0, noise, t)
    torch.testing.assert_close(process.to_v(schedule, prediction, kind, x_t, t), v, rtol=0, atol=1e-11)


def test_one_mistake_costs_the_same_whatever_is_predicted():
    schedule, x0, noise = Schedule.scaled_linear(), draw(3, 5, 6), draw(4, 5, 6)
    t = torch.tensor([3, 100, 300, 600, 999])
    x_t, wrong = process.q_sample(schedule, x0, t, noise), x0 + draw(5, 5, 6)
    costs = []
    for kind in KINDS:
        signal, sigma = schedule.alpha_bar[t].sqrt()[:, None], (1 - schedule.alpha_bar[t]).sqrt()[:, None]
        wrong_noise = (x_t - signal * wrong) / sigma
        prediction = {"noise": wrong_noise, "x0": wrong, "v": signal * wrong_noise - sigma * wrong}[kind]
        error = ((prediction - process.target(schedule, kind, x0, noise, t)) ** 2).sum(1)
        costs.append(process.loss_weight(schedule, kind, t, gamma=5).double() * error)
    torch.testing.assert_close(costs[0], costs[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(costs[0], costs[2], rtol=1e-6, atol=0)


def test_min_snr_weights_have_their_published_form_and_the_simple_weight_is_one():
    schedule, t = Schedule.scaled_linear(), torch.tensor([3, 100, 300, 600, 999])
    snr = schedule.snr[t]
    kept = snr.clamp(max=5)
    for kind, expected in (("noise", kept / snr), ("x0", kept), ("v", kept / (snr + 1))):
        torch.testing.assert_close(process.loss_weight(schedule, kind, t, gamma=5), expected.float())
        assert (process.loss_weight(schedule, kind, t) == 1).all()


def test_an_unknown_kind_and_noise_at_zero_snr_raise_everywhere():
    schedule, x, t = Schedule.scaled_linear(50).zero_terminal_snr(), torch.zeros(1, 2), torch.tensor([49])
    for bad, match in (("noise", "zero terminal SNR"), ("eps", "kind must be")):
        for call in (
            lambda: process.to_x0(schedule, x, bad, x, t), lambda: process.to_noise(schedule, x, bad, x, t),
            lambda: process.to_v(schedule, x, bad, x, t), lambda: process.target(schedule, bad, x, x, t),
            lambda: process.loss_weight(schedule, bad, t), lambda: process.loss_weight(schedule, bad, t, gamma=5),
        ):
            with pytest.raises(ValueError, match=match):
                call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pictures_still_get_noise_at_the_first_step(dtype):
    schedule = Schedule.scaled_linear()
    x0, noise = draw(6, 1, 3, 8, 8).to(dtype), draw(7, 1, 3, 8, 8).to(dtype)
    noisy = process.q_sample(schedule, x0, torch.tensor([0]), noise)
    assert noisy.dtype == dtype and not torch.equal(noisy, x0)
    assert schedule.alpha_bar.dtype == torch.float64 and float(schedule.alpha_bar[0]) < 1
    for kind in KINDS:
        assert torch.isfinite(process.to_x0(schedule, noise, kind, noisy, torch.tensor([0]))).all()


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    x = torch.zeros(4, 3, 2, 2)
    batch = process.randn_like(x, [torch.Generator().manual_seed(s) for s in (5, 6, 7, 8)])
    for i, seed in enumerate((5, 6, 7, 8)):
        alone = process.randn_like(x[:1], torch.Generator().manual_seed(seed))
        assert torch.equal(batch[i : i + 1], alone)
    with pytest.raises(ValueError, match="3 generators"):
        process.randn_like(x, [torch.Generator()] * 3)


def test_offset_noise_shifts_whole_channels():
    like, generator = torch.zeros(200, 2, 16, 16), torch.Generator()
    noise = process.offset_noise(like, 0.5, generator.manual_seed(0))
    # the mean of a channel has variance 1/256 from the pixels and 0.25 from the offset
    assert abs(float(noise.mean((2, 3)).var()) - (0.25 + 1 / 256)) < 0.05
    assert abs(float((noise - noise.mean((2, 3), keepdim=True)).var()) - 1) < 0.02
    plain = process.offset_noise(like, 0.0, generator.manual_seed(0))
    difference = noise - plain
    assert float((difference - difference[:, :, :1, :1]).abs().max()) < 1e-6
    assert float(difference[:, 0, 0, 0].sub(difference[:, 1, 0, 0]).abs().min()) > 0


def test_no_function_changes_its_inputs():
    schedule, t = Schedule.linear(50), torch.tensor([0, 49])
    x0, noise = draw(8, 2, 1, 2, 2), draw(9, 2, 1, 2, 2)
    copies = x0.clone(), noise.clone(), t.clone(), schedule.alpha_bar.clone()
    process.q_sample(schedule, x0, t, noise), process.q_step(schedule, x0, t, noise)
    process.posterior(schedule, x0, noise, t), process.offset_noise(x0, 0.1)
    schedule.zero_terminal_snr()
    for kind in KINDS:
        process.to_x0(schedule, noise, kind, x0, t), process.to_noise(schedule, noise, kind, x0, t)
        process.to_v(schedule, noise, kind, x0, t), process.target(schedule, kind, x0, noise, t)
        process.loss_weight(schedule, kind, t, 5)
    for now, then in zip((x0, noise, t, schedule.alpha_bar), copies):
        assert torch.equal(now, then)
