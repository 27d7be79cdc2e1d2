"""Drawing codes with a key/value cache against drawing them without: the same codes, how much sooner.

    python tests/benchmarks/bench_gpt.py [--codes 256] [--pictures 10] [--pairs 7]

Nothing else should run. Printed: medians of alternating pairs, the ratio beside its bar of 5, whether the codes agree.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanodiff.models.gpt import GPT, GPTConfig  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=256, help="codes of a picture")
    parser.add_argument("--pictures", type=int, default=10, help="pictures drawn at once")
    parser.add_argument("--pairs", type=int, default=7, help="alternating pairs")
    args = parser.parse_args()
    net = GPT(GPTConfig(codes=128, length=args.codes), torch.Generator().manual_seed(0)).eval()
    label = torch.arange(args.pictures) % net.config.classes
    times, equal = {True: [], False: []}, True
    for pair in range(args.pairs + 1):  # the first is not counted
        drawn = {}
        for cache in (True, False):
            generators = [torch.Generator().manual_seed(1000 * pair + i) for i in range(args.pictures)]
            started = time.perf_counter()
            drawn[cache] = net.sample(label, generator=generators, cache=cache)
            times[cache].append(time.perf_counter() - started)
        equal = equal and torch.equal(drawn[True], drawn[False])
    ratios = sorted(plain / cached for cached, plain in list(zip(times[True], times[False]))[1:])
    cached, plain = (statistics.median(times[cache][1:]) for cache in (True, False))
    print(f"{args.pictures} x {args.codes} codes, {sum(p.numel() for p in net.parameters()):,} parameters, "
          f"{torch.get_num_threads()} threads")
    print(f"with a cache {cached:.2f} s, without {plain:.2f} s: {statistics.median(ratios):.1f} times sooner "
          f"({ratios[0]:.1f} to {ratios[-1]:.1f}; bar 5); codes {'identical' if equal else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
