"""Seconds of an epoch of train_vae.py on MNIST, beside the shortest loop that does the same work.

    python tests/benchmarks/bench_vae.py [--pairs 7] [--threads 2]

Both train 784-400-20 with Adam 1e-3 on batches of 128 in float32, fused optimiser, logits, every picture once in a new
order; they alternate in one process after an epoch of each to warm up. The short loop holds the pictures as float32
and checks nothing. Of train_vae.py the time is what its log gives: steps alone, without reading files and measuring.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_vae  # noqa: E402
from nanodiff.training import datasets  # noqa: E402

BATCH = 128


class Short:
    """The short loop: a network, an optimiser and the pictures in 0 ... 1."""

    def __init__(self, pixels):
        torch.manual_seed(0)
        self.x = pixels.flatten(1).float() / 255
        self.encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40))
        self.decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784))
        self.optimiser = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=1e-3, fused=True)

    def epoch(self):
        """Trains one epoch; returns (seconds, mean loss)."""
        started, losses = time.perf_counter(), []
        for rows in torch.randperm(len(self.x)).split(BATCH):
            x = self.x[rows]
            mean, logvar = self.encoder(x).chunk(2, 1)
            logits = self.decoder(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
            kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum()
            loss = (F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl) / len(x)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
            losses.append(loss.item())
        return time.perf_counter() - started, statistics.mean(losses)


def ours(steps):
    """Trains one epoch with train_vae.py; returns (seconds, mean loss)."""
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        spoken, sys.stdout = sys.stdout, nowhere
        try:
            train_vae.main([f"--out={folder}", f"--batch={BATCH}", f"--steps={steps}", f"--log_every={steps}",
                            f"--preview_every={steps}", "--checkpoint_every=1000000", "--importance=0", "--tsne=0",
                            "--device=cpu"])
        finally:
            sys.stdout = spoken
        row = json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[0])
    return steps * BATCH / row["images_per_second"], row["loss"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="pairs of epochs that are timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of both")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pixels = datasets.load("mnist").pixels
    steps = -(-len(pixels) // BATCH)
    print(f"torch {torch.__version__}, {args.threads} threads, {steps} steps an epoch; load average "
          f"{os.getloadavg()[0]:.2f}")
    pairs = []
    for i in range(args.pairs + 1):
        short, first = Short(pixels).epoch()
        whole, second = ours(steps)
        print(f"{f'pair {i}' if i else 'warm-up'}: short loop {short:.2f} s (loss {first:.2f}), train_vae.py "
              f"{whole:.2f} s (loss {second:.2f}), ratio {whole / short:.3f}", flush=True)
        pairs.append((short, whole))
    ratios = sorted(whole / short for short, whole in pairs[1:])
    print(f"medians: short loop {statistics.median(short for short, _ in pairs[1:]):.2f} s, train_vae.py "
          f"{statistics.median(whole for _, whole in pairs[1:]):.2f} s; ratio {statistics.median(ratios):.3f} "
          f"({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
