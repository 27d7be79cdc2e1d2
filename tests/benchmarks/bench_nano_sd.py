"""How long one picture of the shipped small model takes, from the command to the file: Python, loading, 20 steps, PNG.

    python tests/benchmarks/bench_nano_sd.py [--model FOLDER] [--runs 7]

Nothing else should run. Prints the median of the runs beside its bar of 3 s, and how long it took inside the process.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nanodiff

PROMPT = "a red and blue striped texture"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--runs", type=int, default=7)
    args = parser.parse_args()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for run in range(args.runs):
            command = [sys.executable, "-m", "nanodiff.sample", "--prompt", PROMPT, "--steps", "20", "--n", "1",
                       "--guidance", "3", "--seed", "0", "--out", str(Path(folder) / str(run))]
            started = time.time()
            subprocess.run(command + (["--model", args.model] if args.model else []), check=True, capture_output=True)
            seconds.append(time.time() - started)
    print(f"one picture of 20 steps, with Python's start and the load: median {statistics.median(seconds):.2f} s of "
          f"{args.runs} ({min(seconds):.2f} to {max(seconds):.2f}); bar 3 s")
    started = time.time()
    sd = nanodiff.load(args.model or None)
    loaded = time.time()
    sd.generate(PROMPT, steps=20, guidance=3.0, seed=0, progress=False)
    first = time.time()
    sd.generate(PROMPT, steps=20, guidance=3.0, seed=0, progress=False)
    print(f"inside: load {loaded - started:.2f} s, the first picture {first - loaded:.2f} s, the next "
          f"{time.time() - first:.2f} s")


if __name__ == "__main__":
    main()
