import json
import math
from pathlib import Path

import pytest
import torch

from nanodiff.diffusion import Schedule, elbo, gaussian, process

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "elbo_gaussian.json").read_text())
EVERY_VALUE = torch.arange(256, dtype=torch.float64) / 127.5 - 1  # the 8-bit values in [-1, 1]
SHORT = Schedule.linear(20, 1e-2, 0.3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, shape=(1, 4, 4), seed=0):
    return EVERY_VALUE[torch.randint(0, 256, (n, *shape), generator=seeded(seed))].float()


# --- exact terms for Gaussian data ---------------------------------------------------------------------------------

@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"N({case['mean']},{case['std']}^2)")
def test_gaussian_terms_agree_with_sixty_digit_arithmetic(case):
    schedule = Schedule.linear(GOLDEN["T"], GOLDEN["start"], GOLDEN["end"])
    for reverse in ("exact", "small", "large"):
        found = elbo.gaussian_terms(schedule, case["mean"], case["std"], reverse)
        for name in ("L_T", "entropy", "marginal_kl"):
            assert float(found[name]) == pytest.approx(case[name], rel=1e-12, abs=1e-15)
        kept = found["L_t"][torch.tensor(GOLDEN["t"]) - 1]
        torch.testing.assert_close(kept, torch.tensor(case[reverse]["L_t"], dtype=torch.float64), rtol=1e-9, atol=1e-14)
        assert float(found["L_0"]) == pytest.approx(case[reverse]["L_0"], abs=1e-11)
        assert float(found["total"]) == pytest.approx(case[reverse]["total"], rel=1e-12, abs=1e-10)


@pytest.mark.parametrize("mean, std", [(0, 1), (0.5, 0.2), (-1, 0.01), (0.3, 0.001), (2, 3), (5, 10), (0, 0.5)])
@pytest.mark.parametrize("schedule", [Schedule.linear(), Schedule.scaled_linear(), Schedule.cosine(), SHORT,
                                      Schedule.linear().zero_terminal_snr(), Schedule.from_betas([0.4])])
def test_with_the_exact_reverse_step_only_the_start_costs_bits(schedule, mean, std):
    found = elbo.gaussian_terms(schedule, mean, std)
    assert abs(float(found["total"] - found["entropy"] - found["marginal_kl"])) < 1e-10
    for reverse in ("small", "large"):
        assert float(elbo.gaussian_terms(schedule, mean, std, reverse)["total"] - found["total"]) > -1e-10


def gaussian_data(n, mean, std, seed=0):
    return mean + std * torch.randn(n, 1, generator=seeded(seed), dtype=torch.float64)


def best_denoiser(schedule, mean, std, kind="x0"):
    """The exact E[x_0 | x_t] of data N(mean, std^2), as a network that predicts `kind`."""
    def denoise(x_t, t):
        signal = process.at(schedule.alpha_bar.sqrt(), t, x_t)
        sigma = process.at((1 - schedule.alpha_bar).sqrt(), t, x_t)
        x0, _ = gaussian.bayes(mean, std**2, x_t, signal, sigma**2)
        return {"x0": x0, "noise": (x_t - signal * x0) / sigma, "v": (signal * x_t - x0) / sigma}[kind]
    return denoise


@pytest.mark.slow
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.5, 0.2), (2.0, 3.0)])
def test_the_best_denoiser_measured_step_by_step_gives_the_exact_terms(mean, std, variance):
    x0 = gaussian_data(2000, mean, std)
    found = elbo.terms(best_denoiser(SHORT, mean, std), x0, SHORT, "x0", generator=seeded(1), variance=variance,
                       batch=50_000)
    exact = elbo.gaussian_terms(SHORT, mean, std, variance)
    steps = found.nats[:, 1:]
    error = steps.std(0) / len(x0) ** 0.5
    assert float(((steps.mean(0) - exact["L_t"]).abs() / (error + 1e-12)).max()) < 4.5
    total = steps.sum(1)
    assert abs(float(total.mean() - exact["L_t"].sum())) < 4 * float(total.std()) / len(x0) ** 0.5
    assert abs(float(found.prior.mean() - exact["L_T"])) < 4 * float(found.prior.std()) / len(x0) ** 0.5


def test_the_prediction_kinds_of_one_denoiser_have_one_bound():
    x0 = gaussian_data(50, 0.5, 0.2)
    bounds = [elbo.bits_per_dim(best_denoiser(SHORT, 0.5, 0.2, kind), x0, SHORT, kind, generator=seeded())
              for kind in process.KINDS]
    assert bounds[0]["nats"] == pytest.approx(bounds[1]["nats"], rel=1e-9)
    assert bounds[0]["nats"] == pytest.approx(bounds[2]["nats"], rel=1e-9)


# --- the single terms -----------------------------------------------------------------------------------------------

def test_prior_kl_is_the_kl_from_a_standard_normal():
    x0 = torch.randn(3, 2, 4, generator=seeded(), dtype=torch.float64)
    for schedule in (SHORT, Schedule.linear(), Schedule.from_betas([0.1])):
        left = schedule.alpha_bar[-1]
        mean, cov = left.sqrt() * x0.flatten(1), (1 - left) * torch.eye(8, dtype=torch.float64)
        expected = gaussian.kl(mean, cov, torch.zeros_like(mean), torch.eye(8, dtype=torch.float64))
        torch.testing.assert_close(elbo.prior_kl(schedule, x0), expected, rtol=1e-9, atol=1e-14)
    assert elbo.prior_kl(SHORT.zero_terminal_snr(), x0).tolist() == [0, 0, 0]


def test_step_kl_is_the_kl_between_the_posterior_and_the_models_step():
    generator = seeded(3)
    x0, x_t, guess = torch.randn(3, 5, 2, 3, generator=generator, dtype=torch.float64)
    t = torch.tensor([1, 5, 19, 1, 12])
    for variance, table in (("small", SHORT.posterior_variance), ("large", SHORT.beta)):
        found = elbo.step_kl(SHORT, x0, x_t, t, guess, variance)
        for i in range(5):
            eye = torch.eye(6, dtype=torch.float64)
            mean, true_variance = process.posterior(SHORT, x0[i:i + 1], x_t[i:i + 1], t[i:i + 1])
            model_mean, _ = process.posterior(SHORT, guess[i:i + 1], x_t[i:i + 1], t[i:i + 1])
            expected = gaussian.kl(mean.flatten(), float(true_variance) * eye, model_mean.flatten(), table[t[i]] * eye)
            assert float(found[i]) == pytest.approx(float(expected), rel=1e-9)


def test_a_perfect_prediction_costs_nothing_with_the_small_variance_and_something_with_the_large():
    x0, x_t = torch.randn(2, 19, 3, generator=seeded())
    t = torch.arange(1, 20)
    assert elbo.step_kl(SHORT, x0, x_t, t, x0).tolist() == [0.0] * 19
    assert bool((elbo.step_kl(SHORT, x0, x_t, t, x0, "large") > 0).all())


@pytest.mark.parametrize("kind", process.KINDS)
@pytest.mark.parametrize("schedule", [Schedule.linear(), Schedule.cosine(), SHORT])
def test_elbo_weight_times_squared_error_is_step_kl(schedule, kind):
    t = torch.arange(1, schedule.T)
    generator = seeded(4)
    x0, noise, wrong = torch.randn(3, len(t), 4, generator=generator, dtype=torch.float64)
    x_t = process.q_sample(schedule, x0, t, noise)
    prediction = process.target(schedule, kind, x0, noise, t) + 0.1 * wrong
    guess = process.to_x0(schedule, prediction, kind, x_t, t)
    expected = process.elbo_weight(schedule, kind, t) * (0.1 * wrong).square().sum(1)
    torch.testing.assert_close(elbo.step_kl(schedule, x0, x_t, t, guess), expected, rtol=1e-6, atol=1e-12)


def test_step_kl_refuses_the_decoders_step_and_an_unknown_variance():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="decoder_nll"):
        elbo.step_kl(SHORT, x, x, torch.tensor([3, 0]), x)
    with pytest.raises(ValueError, match='"small" or "large", not "medium"'):
        elbo.step_kl(SHORT, x, x, torch.tensor([3, 1]), x, "medium")


def test_decoder_agrees_with_sixty_digit_arithmetic_far_into_the_tails():
    golden = GOLDEN["decoder"]
    expected = torch.tensor(golden["log_likelihood"], dtype=torch.float64)  # [value, mean, log_scale]
    assert float(expected.min()) < -3e6
    for k, log_scale in enumerate(golden["log_scales"]):
        x0, mean = torch.meshgrid(EVERY_VALUE[golden["values"]], torch.tensor(golden["means"], dtype=torch.float64),
                                  indexing="ij")
        found = -elbo.decoder_nll(x0.reshape(-1, 1), mean.reshape(-1, 1), log_scale)
        torch.testing.assert_close(found, expected[:, :, k].flatten(), rtol=1e-11, atol=1e-50)


def test_decoder_probabilities_of_the_256_values_sum_to_one():
    x0 = EVERY_VALUE.view(-1, 1)
    for mean in (-3.0, -1.0, -0.3, 0.0, 0.9999, 1.7):
        for log_scale in (-9.0, -6.0, -3.0, 0.0, 3.0):
            nll = elbo.decoder_nll(x0, torch.full_like(x0, mean), log_scale)
            assert float((-nll).exp().sum()) == pytest.approx(1, abs=1e-11)
            in_single = elbo.decoder_nll(x0.float(), torch.full_like(x0, mean), log_scale)
            assert torch.equal(in_single, nll)  # float32 pictures fall into the same bins


def test_decoder_sums_over_dimensions_and_takes_a_scale_for_each_picture():
    x0, mean = pictures(3), torch.randn(3, 1, 4, 4, generator=seeded())
    log_scale = torch.tensor([-1.0, -2.0, -5.0]).view(3, 1, 1, 1)
    found = elbo.decoder_nll(x0, mean, log_scale)
    assert found.shape == (3,) and found.dtype == torch.float64
    for i in range(3):
        single = elbo.decoder_nll(x0[i].view(16, 1), mean[i].view(16, 1), float(log_scale[i]))
        assert float(single.sum()) == pytest.approx(float(found[i]), rel=1e-12)


def test_decoder_is_the_density_times_the_bin_width_for_narrow_bins():
    x0, mean, scale = EVERY_VALUE[100:101].view(1, 1), torch.tensor([[0.3]], dtype=torch.float64), 2.0
    density = torch.distributions.Normal(mean, scale).log_prob(x0)
    found = float(elbo.decoder_nll(x0, mean, math.log(scale)))
    assert found == pytest.approx(-float(density) - math.log(2 / 255), abs=1e-6)


def test_decoder_gradients_are_finite_and_right_even_in_the_tails():
    x0 = EVERY_VALUE.view(-1, 1)
    mean = torch.linspace(-1.5, 1.5, 256, dtype=torch.float64).view(-1, 1).flip(0).requires_grad_()
    elbo.decoder_nll(x0, mean, -7.0).sum().backward()
    assert bool(mean.grad.isfinite().all())
    inputs = (torch.linspace(-0.9, 0.9, 7, dtype=torch.float64).view(-1, 1).requires_grad_(),
              torch.tensor(-1.0, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(lambda mean, log_scale: elbo.decoder_nll(x0[::40], mean, log_scale), inputs)


# --- strata, totals, curves -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, samples", [(1000, 40), (1000, 1), (1000, 999), (1000, 998), (1000, None), (50, 7),
                                        (2, 1), (1, 0), (1, None), (10, 9), (4000, 3), (1000, 500)])
def test_strata_share_out_every_step_once(T, samples):
    first, size = elbo.strata(T, samples)
    assert len(first) == (T if samples is None else samples + 1)
    assert int(first[0]) == 0 and int(size[0]) == 1 and int(size.min()) >= 1
    covered = torch.cat([torch.arange(a, a + b) for a, b in zip(first.tolist(), size.tolist())])
    assert covered.tolist() == list(range(T))


def test_strata_refuse_more_samples_than_steps():
    for samples in (0, -1, 1000):
        with pytest.raises(ValueError, match="t_samples must be between 1 and 999"):
            elbo.strata(1000, samples)


def off_by(step, value=EVERY_VALUE[77]):
    """A network that predicts x0 for pictures of one grey value and is wrong by `step` everywhere."""
    return lambda x_t, t: torch.full_like(x_t, float(value) + step)


def grey(n, value=EVERY_VALUE[77]):
    return torch.full((n, 1, 2, 2), float(value), dtype=torch.float64)


def exact_steps(schedule, step, dimensions=4):
    return process.elbo_weight(schedule, "x0", torch.arange(schedule.T)) * step**2 * dimensions  # index 0 unused


def test_all_steps_give_the_exact_bound_in_bits_per_dim():
    schedule = Schedule.linear(50, 1e-3, 0.2)
    found = elbo.bits_per_dim(off_by(0.02), grey(3), schedule, "x0", generator=seeded())
    unit = 4 * math.log(2)
    steps = exact_steps(schedule, 0.02)
    decoder = elbo.decoder_nll(grey(1), grey(1) + 0.02, 0.5 * float(schedule.posterior_variance[1].log()))
    prior = elbo.prior_kl(schedule, grey(1))
    assert found["steps_bits_per_dim"] == pytest.approx(float(steps[1:].sum()) / unit, rel=1e-9)
    assert found["decoder_bits_per_dim"] == pytest.approx(float(decoder) / unit, rel=1e-9)
    assert found["prior_bits_per_dim"] == pytest.approx(float(prior) / unit, rel=1e-9)
    parts = ("prior_bits_per_dim", "steps_bits_per_dim", "decoder_bits_per_dim")
    assert found["bits_per_dim"] == pytest.approx(sum(found[part] for part in parts), rel=1e-12)
    assert found["nats"] == pytest.approx(found["bits_per_dim"] * unit, rel=1e-12)
    assert found["curve_t"].tolist() == list(range(50)) and found["bits_per_dim_of_each"].shape == (3,)
    torch.testing.assert_close(found["curve_nats"][1:], steps[1:], rtol=1e-9, atol=0)
    torch.testing.assert_close(found["curve_bits_per_dim"] * unit, found["curve_nats"])
    assert found["bits_per_dim_standard_error"] < 1e-12  # equal pictures, every t, nothing random


@pytest.mark.slow
def test_stratified_steps_are_unbiased_and_their_standard_error_is_honest():
    schedule = Schedule.linear(50, 1e-3, 0.2)
    exact = elbo.bits_per_dim(off_by(0.02), grey(1), schedule, "x0", generator=seeded())["bits_per_dim"]
    for t_samples in (1, 5, 20):
        found = elbo.bits_per_dim(off_by(0.02), grey(3000), schedule, "x0", generator=seeded(7), t_samples=t_samples,
                                  batch=100_000)
        assert 0 < found["bits_per_dim_standard_error"] < 0.2 * exact
        assert abs(found["bits_per_dim"] - exact) < 4 * found["bits_per_dim_standard_error"]
    scores = []
    for seed in range(100):  # small runs scatter by what each of them claims
        few = elbo.bits_per_dim(off_by(0.02), grey(30), schedule, "x0", generator=seeded(seed), t_samples=5, batch=1000)
        scores.append((few["bits_per_dim"] - exact) / few["bits_per_dim_standard_error"])
    assert 0.8 < float(torch.tensor(scores).std()) < 1.3


def test_stratified_and_full_estimates_agree_on_pictures_with_noise():
    schedule, x0 = Schedule.linear(60, 1e-3, 0.2), pictures(300)
    full = elbo.bits_per_dim(best_denoiser(schedule, 0.0, 0.58), x0, schedule, "x0", generator=seeded(1), batch=9000)
    some = elbo.bits_per_dim(best_denoiser(schedule, 0.0, 0.58), x0, schedule, "x0", generator=seeded(2), t_samples=8,
                             batch=9000)
    difference = full["bits_per_dim_of_each"] - some["bits_per_dim_of_each"]
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / 300**0.5
    assert full["bits_per_dim"] > 8  # uniform 8-bit noise: nothing beats 8 bits/dim


def test_terms_do_not_depend_on_the_batch_and_leave_the_global_generator_alone():
    x0, denoise = pictures(5, (3, 5)), best_denoiser(SHORT, 0.0, 0.58, "noise")
    state = torch.random.get_rng_state()
    a = elbo.terms(denoise, x0, SHORT, generator=seeded(), t_samples=6, batch=3)
    b = elbo.terms(denoise, x0, SHORT, generator=seeded(), t_samples=6, batch=64)
    c = elbo.terms(denoise, x0, SHORT, generator=seeded(1), t_samples=6, batch=64)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(a.t, b.t) and not torch.equal(a.t, c.t)
    torch.testing.assert_close(a.nats, b.nats, rtol=1e-6, atol=1e-9)


def test_every_step_is_drawn_within_its_stratum_and_all_of_them_are():
    found = elbo.terms(off_by(0.1), grey(400), SHORT, "x0", generator=seeded(), t_samples=4, batch=5000)
    assert bool((found.t >= found.first).all()) and bool((found.t < found.first + found.size).all())
    assert found.t.unique().tolist() == list(range(20))


def test_clip_bounds_the_predicted_picture():
    found = [elbo.terms(off_by(1.5, 0.0), grey(2, 0.0), SHORT, "x0", generator=seeded(), clip=clip).squared_error
             for clip in (False, True)]
    torch.testing.assert_close(found[0], torch.full((2, 20), 2.25, dtype=torch.float64))
    torch.testing.assert_close(found[1], torch.full((2, 20), 1.0, dtype=torch.float64))


def test_a_schedule_of_one_step_has_a_prior_and_a_decoder():
    schedule = Schedule.from_betas([0.4])
    found = elbo.bits_per_dim(off_by(0.1), grey(2), schedule, "x0", generator=seeded())
    decoder = elbo.decoder_nll(grey(1), grey(1) + 0.1, 0.5 * math.log(0.4))
    assert found["nats"] == pytest.approx(float(elbo.prior_kl(schedule, grey(1)) + decoder), rel=1e-9)


def test_zero_terminal_snr_has_a_finite_bound_for_x0_and_v():
    schedule = Schedule.linear(30, 1e-3, 0.2).zero_terminal_snr()
    for kind in ("x0", "v"):
        denoise = best_denoiser(schedule, 0.0, 0.58, kind)
        found = elbo.bits_per_dim(denoise, pictures(4), schedule, kind, generator=seeded())
        assert math.isfinite(found["bits_per_dim"]) and found["prior_bits_per_dim"] == 0


# --- rate and distortion --------------------------------------------------------------------------------------------

def test_rate_counts_what_has_been_sent_and_distortion_is_the_error_of_the_prediction():
    schedule = Schedule.linear(50, 1e-3, 0.2)
    points = elbo.rate_distortion(off_by(0.02), grey(2), schedule, "x0", generator=seeded())
    unit = 4 * math.log(2)
    steps, prior = exact_steps(schedule, 0.02), float(elbo.prior_kl(schedule, grey(1)))
    assert points["t"].tolist() == list(range(49, -1, -1))
    rate = points["rate_bits_per_dim"]
    assert float(rate[0]) == pytest.approx(prior / unit)  # x_T itself is almost free
    for i, t in enumerate(range(49, -1, -1)):  # the receiver holds x_t once every step above t is paid for
        assert float(rate[i]) == pytest.approx((prior + float(steps[t + 1:].sum())) / unit, rel=1e-9)
    torch.testing.assert_close(points["distortion_rmse"], torch.full((50,), 0.02 * 127.5, dtype=torch.float64))
    whole = elbo.bits_per_dim(off_by(0.02), grey(2), schedule, "x0", generator=seeded())
    assert float(rate[-1]) + whole["decoder_bits_per_dim"] == pytest.approx(whole["bits_per_dim"], rel=1e-9)


def test_the_rate_of_a_stratum_is_the_mean_rate_of_its_steps():
    schedule = Schedule.linear(50, 1e-3, 0.2)
    every = elbo.rate_distortion(off_by(0.02), grey(1), schedule, "x0", generator=seeded())
    rate = every["rate_bits_per_dim"].flip(0)  # t = 0 ... T-1
    found = elbo.terms(off_by(0.02), grey(20_000), schedule, "x0", generator=seeded(3), t_samples=4, batch=100_000)
    some = elbo.rate_distortion_points(found)
    first, size = found.first.tolist(), found.size.tolist()
    expected = torch.stack([rate[a:a + b].mean() for a, b in zip(first, size)]).flip(0)
    middle = torch.tensor([a + (b - 1) / 2 for a, b in zip(first, size)], dtype=torch.float64).flip(0)
    assert torch.equal(some["t"], middle)
    torch.testing.assert_close(some["rate_bits_per_dim"], expected, rtol=0.02, atol=1e-9)


def test_distortion_of_the_best_denoiser_is_its_known_error():
    x0 = gaussian_data(3000, 0.1, 0.3)
    points = elbo.rate_distortion(best_denoiser(SHORT, 0.1, 0.3), x0, SHORT, "x0", generator=seeded(5), batch=60_000)
    signal = SHORT.alpha_bar * 0.3**2
    expected = 127.5 * (0.3**2 * (1 - SHORT.alpha_bar) / (signal + 1 - SHORT.alpha_bar)).sqrt().flip(0)
    torch.testing.assert_close(points["distortion_rmse"], expected, rtol=0.06, atol=0)
    assert bool((points["rate_bits_per_dim"].diff() >= 0).all())
