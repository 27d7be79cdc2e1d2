"""Prints how fast each sampler's error falls when its steps are doubled: python tests/benchmarks/sampler_order.py

Gaussian data, the exact denoiser, float64, sigma from 10 to 0.1 in equal ratios. Deterministic samplers: distance from
the exact solution of the ODE. Stochastic ones: errors of mean and variance, propagated exactly. About 5 seconds.
"""

import pathlib
import sys

root = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(root), str(root / "tests" / "diffusion")]

from closed_form import moment_errors, ode_error, slopes  # noqa: E402
from nanodiff.diffusion import Schedule  # noqa: E402

STEPS = (20, 40, 80, 160, 320)


def row(label, errors, bar):
    if max(errors) < 1e-12:  # rounding has no slope
        end = "exact"
    else:
        end = " ".join(f"{s:5.2f}" for s in slopes(errors)) + f"   >= {bar}"
    print(f"{label:20s}" + "".join(f"{e:11.2e}" for e in errors) + "   " + end)


def main():
    schedule = Schedule.scaled_linear()
    print(f"{'error at N steps':20s}" + "".join(f"{n:11d}" for n in STEPS) + "   slopes")
    for name, bar in (("ddim", 0.9), ("euler", 0.9), ("heun", 1.8), ("dpm++2m", 1.8), ("unipc", 1.7), ("pndm", 1.7)):
        row(name, [ode_error(name, schedule, n) for n in STEPS], bar)
    for label, name, options in (("ddpm", "ddpm", {}), ("euler_a", "euler_a", {}), ("ddim eta=1", "ddim", {"eta": 1.0})):
        errors = [moment_errors(name, schedule, n, **options) for n in STEPS]
        row(label + " mean", [e[0] for e in errors], 0.7)
        row(label + " variance", [e[1] for e in errors], 0.7)


if __name__ == "__main__":
    main()
