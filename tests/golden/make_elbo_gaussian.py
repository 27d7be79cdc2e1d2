"""Makes elbo_gaussian.json: the bound's terms for Gaussian data and the 8-bit decoder, in 60 digits of arithmetic.

    pip install mpmath && python tests/golden/make_elbo_gaussian.py

Every number comes from the definition (the KL of two Gaussians, differences of normal distribution functions), with
no rearrangement for the sake of rounding: with 60 digits none is needed. Nothing of nanodiff is imported.
"""

import json
from pathlib import Path

from mpmath import erfc, log, mp, mpf, pi, sqrt

mp.dps = 60
T, START, END = 1000, mpf("1e-4"), mpf("2e-2")
CASES = [("0", "1"), ("0.5", "0.2"), ("-1", "0.01"), ("0.3", "0.001"), ("2", "3"), ("5", "10"), ("0", "0.5")]
KEPT = [1, 2, 3, 5, 10, 30, 100, 300, 500, 700, 900, 998, 999]  # indices t whose L_t is written down
VALUES = [0, 1, 2, 64, 127, 128, 200, 254, 255]
MEANS = ["-1.3", "-1", "-0.996", "0", "0.003", "0.3", "1.2"]
LOG_SCALES = ["-7", "-5", "-3", "-1", "0.7"]


def kl(mean_square, v1, v2):
    """Mean KL of N(., v1) from N(., v2) when the means differ by mean_square on average of squares."""
    return (v1 / v2 - 1 - log(v1 / v2) + mean_square / v2) / 2


def gaussian_case(m, s):
    m, s2 = mpf(m), mpf(s) ** 2
    beta = [START + (END - START) * i / (T - 1) for i in range(T)]
    bar, bars = mpf(1), []
    for b in beta:
        bar *= 1 - b
        bars.append(bar)
    prior = kl(bar * (m**2 + s2), 1 - bar, mpf(1))
    terms = {"exact": [], "small": [], "large": []}
    first_tilde = beta[1] * (1 - bars[0]) / (1 - bars[1])
    for t in range(T):
        before = bars[t - 1] if t else mpf(1)
        noisy = bars[t] * s2 + 1 - bars[t]
        error = s2 * (1 - bars[t]) / noisy  # of E[x_0 | x_t]
        tilde = beta[t] * (1 - before) / (1 - bars[t])
        slope = beta[t] * sqrt(before) / (1 - bars[t])
        marginal_before = before * s2 + 1 - before
        variances = {"exact": marginal_before * beta[t] / noisy, "small": tilde if t else first_tilde, "large": beta[t]}
        for reverse, v in variances.items():
            terms[reverse].append(kl(slope**2 * error, tilde, v) if t else (log(2 * pi * v) + error / v) / 2)
    case = {"mean": float(m), "std": float(mpf(s)), "L_T": float(prior),
            "entropy": float((log(2 * pi * s2) + 1) / 2),
            "marginal_kl": float(kl(bar * m**2, bar * s2 + 1 - bar, mpf(1)))}
    for reverse, values in terms.items():
        case[reverse] = {"L_0": float(values[0]), "L_t": [float(values[t]) for t in KEPT],
                         "total": float(prior + sum(values))}
    return case


def cdf(z):
    return erfc(-z / sqrt(mpf(2))) / 2


def log_likelihood(value, mean, log_scale):
    # The arguments as the float64 numbers a program is given: far out, the 17th digit matters.
    middle, mean = mpf(value) / mpf("127.5") - 1, mpf(float(mean))
    scale = mp.exp(mpf(float(log_scale)))
    half = mpf(1) / 255
    if value == 0:
        return float(log(cdf((middle + half - mean) / scale)))
    if value == 255:
        return float(log(cdf(-(middle - half - mean) / scale)))
    low, high = (middle - half - mean) / scale, (middle + half - mean) / scale
    if low > 0:  # the mirror image: small numbers keep their digits, numbers close to 1 do not
        low, high = -high, -low
    return float(log(cdf(high) - cdf(low)))


if __name__ == "__main__":
    found = {
        "made_by": "tests/golden/make_elbo_gaussian.py", "unit": "nats", "T": T, "start": 1e-4, "end": 2e-2, "t": KEPT,
        "cases": [gaussian_case(m, s) for m, s in CASES],
        "decoder": {"values": VALUES, "means": [float(m) for m in MEANS], "log_scales": [float(s) for s in LOG_SCALES],
                    "log_likelihood": [[[log_likelihood(v, m, s) for s in LOG_SCALES] for m in MEANS] for v in VALUES]},
    }
    Path(__file__).with_name("elbo_gaussian.json").write_text(json.dumps(found) + "\n")
