"""Drawn weaves: how fast, and how well the grey picture alone tells what the labels know.

    python tests/benchmarks/bench_weave.py [first seed] [number of seeds] [scale]

Prints the seconds of writing one set of three volumes at `scale`, then for every seed and state the estimates of
tomography/measures.py beside the labels' truth, and the worst relative error of each.
"""

import sys
import tempfile
import time

from nanodiff.tomography import measures
from nanodiff.worlds import weave


def main(first=100, seeds=8, scale=0.25):
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        weave.write(folder, first, scale)
        print(f"writing three volumes at scale {scale:g}: {time.perf_counter() - started:.1f} s")
    worst = {}
    for seed in range(first, first + seeds):
        for state in weave.STATES:
            shape = weave.scale_shape(state, scale)
            design = weave.make_design(seed, state, shape)
            volume, labels = weave.specimen(seed, state, shape)
            truth = weave.truth(labels, design)
            rows = {"fibre": (measures.fibre_fraction(volume), truth["fibre_fraction"]),
                    "porosity": (measures.porosity(volume, resin=state == "injected"), truth["porosity"])}
            for axis, name in enumerate(("depth", "height", "width")):
                rows[name] = measures.yarn_period(volume, axis), design.periods[name]
            cells = []
            for name, (found, true) in rows.items():
                off = found / true - 1 if true else float("inf")
                cells.append(f"{name} {found:.4g} / {true:.4g} ({off:+.1%})")
                worst[f"{name}, {state}"] = max(worst.get(f"{name}, {state}", 0), abs(off))
            print(f"{seed} {state:13s} {design.weave:10s} " + "  ".join(cells), flush=True)
    print("worst of the errors: " + ", ".join(f"{name} {off:.1%}" for name, off in worst.items()))


if __name__ == "__main__":
    main(*(kind(word) for kind, word in zip((int, int, float), sys.argv[1:])))
