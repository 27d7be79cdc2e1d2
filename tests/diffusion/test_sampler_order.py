"""Errors fall with the steps as fast as each sampler's order says, on Gaussian data with the exact denoiser."""

import pytest
from closed_form import moment_errors, ode_error, slopes

from nanodiff.diffusion import Schedule

STEPS = (20, 40, 80, 160)


@pytest.mark.parametrize("name,order", [
    ("ddim", 0.9), ("euler", 0.9), ("heun", 1.8), ("dpm++2m", 1.8), ("unipc", 1.7), ("pndm", 1.7)])
def test_deterministic_samplers_approach_the_solution_of_the_ode_with_their_order(name, order):
    errors = [ode_error(name, Schedule.scaled_linear(), n) for n in STEPS]
    assert min(slopes(errors)) >= order
    assert max(slopes(errors)) < 4.5  # an error that fell to rounding would say nothing


@pytest.mark.parametrize("name,options", [("ddpm", {}), ("euler_a", {}), ("ddim", {"eta": 1.0})])
def test_stochastic_samplers_have_an_exact_mean_and_a_variance_of_first_order(name, options):
    errors = [moment_errors(name, Schedule.scaled_linear(), n, **options) for n in STEPS]
    assert max(mean for mean, _ in errors) < 1e-12  # an affine denoiser: E[x0 | x_t] is what the posterior mean needs
    assert min(slopes([variance for _, variance in errors])) >= 0.7
