"""Time and memory of one training step of the 35.7 M-parameter CIFAR-10 U-Net, beside diffusers' UNet2DModel.

    pip install diffusers==0.42.1 && python tests/benchmarks/bench_unet.py [--pairs 9] [--batch 16] [--optimizer adamw]

Both networks hold the same weights and see the same data; steps alternate strictly (diffusers, nanodiff, ...)
in one process, after a warm-up of each. A step is forward, mean squared error, backward, optimiser, zero_grad, in
float32. Peak memory is the largest resident set of a process of its own that imports both libraries, builds one
of the networks and takes two steps. Without diffusers only nanodiff is measured.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from nanodiff import fast
from nanodiff.models.unet import UNet, UNetConfig

try:
    from diffusers import UNet2DModel
except ImportError:
    UNet2DModel = None

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def build(who):
    """The network, and predict(x, t). Both start from the same random weights (PyTorch's own initialisation)."""
    torch.manual_seed(0)
    if who == "diffusers":
        net = UNet2DModel(
            sample_size=32, block_out_channels=(128, 256, 256, 256), layers_per_block=2, norm_num_groups=32,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), norm_eps=1e-6, freq_shift=1,
            flip_sin_to_cos=False, downsample_padding=0, attention_head_dim=None)
        return net, lambda x, t: net(x, t).sample
    net = fast.speed_up(UNet(UNetConfig.cifar10()))
    return net, net


def one_step(predict, optimizer, x, t, noise):
    """One training step; returns the loss."""
    loss = F.mse_loss(predict(x, t), noise)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def batch_of(size):
    generator = torch.Generator().manual_seed(1)
    x, noise = torch.randn(2, size, 3, 32, 32, generator=generator)
    return x, torch.randint(0, 1000, (size,), generator=generator), noise


def compare(theirs, predict_theirs, ours, batch):
    """Largest differences of outputs and gradients, relative to the largest value of each tensor."""
    x, t, noise = batch
    a, b = predict_theirs(x, t), ours(x, t)
    for y in (a, b):
        F.mse_loss(y, noise).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    worst = max(((p.grad - gradients[name]).norm() / gradients[name].norm()).item()
                for name, p in ours.named_parameters() if gradients[name].norm() > 1e-6)
    print(f"outputs: max |a - b| {(a - b).abs().max():.2e} at max |a| {a.abs().max():.2f}; "
          f"gradients: worst |ga - gb| / |ga| of a tensor {worst:.2e}")
    theirs.zero_grad()
    ours.zero_grad()


def matmul_peak(n=2048, repeats=5):
    """Best float32 matrix product, GFLOP/s."""
    a = torch.rand(n, n)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best / 1e9


def interval_of_median(values, draws=10000, level=0.95):
    """Bootstrap interval of the median."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (draws, len(values))), axis=1)
    return np.quantile(medians, [(1 - level) / 2, (1 + level) / 2])


def peak_memory(who, args):
    """Peak resident memory in MB of a fresh process that takes two steps: (peak, before the first step)."""
    command = [sys.executable, os.path.abspath(__file__), "--child", who, "--batch", str(args.batch), "--optimizer",
               args.optimizer, "--threads", str(args.threads)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(out[-2]), float(out[-1])


def child(who, args):
    net, predict = build(who)
    optimizer = OPTIMIZERS[args.optimizer](net.parameters(), lr=1e-4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in range(2):
        one_step(predict, optimizer, *batch_of(args.batch))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, before)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=9, help="pairs of steps that are timed")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each network before")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="the same for both")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads of both")
    parser.add_argument("--child", choices=["diffusers", "nanodiff"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        return child(args.child, args)

    print(f"torch {torch.__version__}, {args.threads} threads, float32, batch {args.batch}, {args.optimizer}; "
          f"load average {os.getloadavg()[0]:.2f}; matmul peak {matmul_peak():.0f} GFLOP/s")
    sides = ["diffusers", "nanodiff"] if UNet2DModel else ["nanodiff"]
    peaks = {who: peak_memory(who, args) for who in sides}  # first: a child inherits its parent's peak
    nets = {who: build(who) for who in sides}
    batch = batch_of(args.batch)
    if UNet2DModel:
        nets["nanodiff"][0].load_state_dict(nets["diffusers"][0].state_dict())
        compare(*nets["diffusers"], nets["nanodiff"][0], batch)
    optimizers = {who: OPTIMIZERS[args.optimizer](net.parameters(), lr=1e-4) for who, (net, _) in nets.items()}
    seconds = {who: [] for who in sides}
    for i in range(args.warmup + args.pairs):
        for who in sides:
            start = time.perf_counter()
            loss = one_step(nets[who][1], optimizers[who], *batch)
            seconds[who].append(time.perf_counter() - start)
        line = ", ".join(f"{who} {seconds[who][-1]:.3f} s" for who in sides)
        ratio = f", ratio {seconds['nanodiff'][-1] / seconds['diffusers'][-1]:.3f}" if UNet2DModel else ""
        print(f"{'warm-up' if i < args.warmup else 'pair'} {i}: {line}{ratio}, loss {loss:.4f}", flush=True)

    timed = {who: s[args.warmup:] for who, s in seconds.items()}
    print("median seconds: " + ", ".join(f"{who} {statistics.median(s):.3f}" for who, s in timed.items()))
    if UNet2DModel:
        ratios = [a / b for a, b in zip(timed["nanodiff"], timed["diffusers"])]
        low, high = interval_of_median(ratios)
        print(f"time ratio nanodiff / diffusers: median {statistics.median(ratios):.3f} "
              f"(95 % interval {low:.3f} to {high:.3f}, {len(ratios)} pairs)")
    for who, (peak, before) in peaks.items():
        print(f"peak memory {who}: {peak:.0f} MB, of which {before:.0f} MB before the first step")
    if UNet2DModel:
        (theirs, theirs_before), (ours, ours_before) = peaks["diffusers"], peaks["nanodiff"]
        print(f"peak memory ratio: {ours / theirs:.3f} (steps alone: "
              f"{(ours - ours_before) / (theirs - theirs_before):.3f}); load average {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
