"""Makes kid.json: the kernel distance of small sets of features, from its definition in exact fractions.

    python tests/golden/make_kid.py

Every sum runs over pairs of rows as the paper writes it (Binkowski et al. 2018, section 4). Nothing of nanodiff is
imported.
"""

import json
import random
from fractions import Fraction
from pathlib import Path


def kernel(x, y):
    return (sum(a * b for a, b in zip(x, y)) / len(x) + 1) ** 3


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def mmd2(X, Y, unbiased):
    def within(Z):
        return mean(kernel(a, b) for i, a in enumerate(Z) for j, b in enumerate(Z) if not unbiased or i != j)
    return within(X) + within(Y) - 2 * mean(kernel(a, b) for a in X for b in Y)


def rows(n, d, scale, shift):
    return [[round(random.gauss(shift, scale), 3) for _ in range(d)] for _ in range(n)]


random.seed(11)
cases = []
for name, n, m, d, shift in (("more rows than dimensions", 14, 12, 5, 0.4),
                             ("fewer rows than dimensions", 5, 6, 9, 0.3), ("one distribution", 12, 12, 4, 0)):
    X, Y = rows(n, d, 1, 0), rows(m, d, 1.3 if shift else 1, shift)
    exact = [[[Fraction(str(value)) for value in row] for row in Z] for Z in (X, Y)]
    cases.append({"name": name, "x": X, "y": Y, "unbiased": float(mmd2(*exact, True)),
                  "biased": float(mmd2(*exact, False)), "itself": float(mmd2(exact[0], exact[0], True))})
Path(__file__).with_name("kid.json").write_text(json.dumps(cases, indent=1) + "\n")
