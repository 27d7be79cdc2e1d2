"""One Muon step of the small base model's U-Net: the small squares carried along, against the textbook iteration.

    python tests/benchmarks/bench_muon.py [--pairs 9]

Both do the same to every matrix; what differs is the number of products. Printed: medians of alternating pairs, the
ratio, the largest difference, and what part of a training step (16 latents) the optimiser is.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_ldm  # noqa: E402
from nanodiff import fast  # noqa: E402
from nanodiff.training.muon import COEFFICIENTS, Muon, orthogonalise  # noqa: E402


def textbook(matrices, steps=5):
    """Jordan et al.'s iteration as they print it, one matrix at a time."""
    found, (a, b, c) = [], COEFFICIENTS
    for matrix in matrices:
        x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(steps):
            square = x @ x.T
            x = a * x + (b * square + c * square @ square) @ x
        found.append(x if matrix.shape[0] <= matrix.shape[1] else x.T)
    return found


def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="alternating pairs")
    pairs = parser.parse_args().pairs
    generator = torch.Generator().manual_seed(0)
    net = fast.speed_up(train_ldm.CondUNet(train_ldm.unet_config(train_ldm.Config(), 4, 96), generator))
    x, t, context = torch.randn(16, 4, 16, 16), torch.arange(16) * 60, torch.randn(16, 77, 96)
    optimiser = Muon(net)
    matrices = [torch.randn(p.flatten(1).shape, generator=generator) for p in optimiser.param_groups[0]["params"]]

    def backward():
        net(x, t, context).square().mean().backward()

    times = [(seconds(lambda: textbook(matrices)), seconds(lambda: orthogonalise(matrices)), seconds(backward),
              seconds(optimiser.step)) for _ in range(pairs + 1)][1:]
    plain, ours, network, whole = (statistics.median(column) for column in zip(*times))
    ratios = sorted(ours / plain for plain, ours, _, _ in times)
    error = max(float((a - b).abs().max()) for a, b in zip(textbook(matrices), orthogonalise(matrices)))
    print(f"{len(matrices)} matrices, {sum(m.numel() for m in matrices):,} numbers, {torch.get_num_threads()} threads")
    print(f"textbook {1000 * plain:.0f} ms, ours {1000 * ours:.0f} ms: ratio {statistics.median(ratios):.2f} "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f}), largest difference {error:.1e}")
    print(f"a training step: network {1000 * network:.0f} ms, Muon {1000 * whole:.0f} ms")


if __name__ == "__main__":
    main()
