"""How long `import nanodiff` and its rooms take beside `import torch` alone: medians of alternating fresh processes.

    python tests/benchmarks/import_time.py [pairs]
"""

import statistics
import subprocess
import sys
import time

STATEMENTS = ["import torch", "import nanodiff, torch", "import nanodiff.diffusion"]

def seconds(statement):
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - started

def main(pairs=9):
    for statement in STATEMENTS:
        seconds(statement)  # files into the cache
    times = {statement: [] for statement in STATEMENTS}
    for _ in range(pairs):
        for statement in STATEMENTS:
            times[statement].append(seconds(statement))
    for statement, taken in times.items():
        ratios = sorted(b / a for a, b in zip(times[STATEMENTS[0]], taken))
        print(f"{statement:28s} median {statistics.median(taken):.3f} s, ratio {statistics.median(ratios):.3f} "
              f"({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
