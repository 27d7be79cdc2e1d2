"""Reading all 5,485 slices of report-size TIFF volumes: memory and speed, block-wise against slice by slice.

    python tests/benchmarks/bench_volumes.py [VOLUME...] [--some 40]

Without volumes, three of the report's sizes are written (textured noise, uint16, 1.0 GB in a temporary folder). Every
slice is read along every axis, once as a copy in memory alone, and once with each pixel used (summed; the sums along
the three axes must be equal). The bar on speed is on the second: a copy of a thickness slice is one memcpy. Memory
is RssAnon of /proc/self/status, watched every 5 ms by a thread; the files are in the page cache, as after writing.
Each speed is the best of three passes, so that other programs on the machine count less.
Slices are then read one by one for comparison (--some of each axis), as copies.
"""

import argparse
import pathlib
import tempfile
import threading
import time

import numpy as np
import tifffile

from nanodiff.tomography.volumes import AXES, Volume, format_shape
from nanodiff.worlds.weave import SHAPES


class AnonymousMemory(threading.Thread):
    """The most RssAnon, in MB, between start() and stop()."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.ended = rss_anon(), threading.Event()

    def run(self):
        while not self.ended.wait(0.005):
            self.most = max(self.most, rss_anon())

    def stop(self):
        self.ended.set()
        self.join()
        return max(self.most, rss_anon())


def rss_anon():
    """This process's anonymous resident memory in MB."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def textured(path, shape, seed=0):
    """A volume of noise in stripes, written page by page out of one block of random numbers."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 20000, (shape[1] + 97, shape[2] + 89)).astype(np.uint16)
    stripes = (8000 * np.sin(np.arange(shape[2]) / 9)).astype(np.int32) + 20000
    array = tifffile.memmap(path, shape=shape, dtype="uint16", photometric="minisblack")
    for d in range(shape[0]):
        down, right = d * 31 % 97, d * 17 % 89
        array[d] = noise[down:down + shape[1], right:right + shape[2]] + stripes
    array.flush()


def read_all(volume, axis, use):
    """Pixels a second of reading every slice in blocks, and with `use` the sum of all pixels."""
    start, total = time.perf_counter(), 0
    for one in volume.slices(axis):
        if use:
            total += int(one.sum(dtype=np.int64))
    return volume.shape[0] * volume.shape[1] * volume.shape[2] / (time.perf_counter() - start), total


def read_single(volume, axis, some):
    """Pixels a second of reading slices one by one, evenly spaced over the axis."""
    numbers = np.linspace(0, volume.counts()[axis] - 1, some).astype(int)
    start = time.perf_counter()
    pixels = sum(volume.slice(axis, i).size for i in numbers)
    return pixels / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("volumes", nargs="*")
    parser.add_argument("--some", type=int, default=40, help="slices of each axis read one by one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = options.volumes
        if not paths:
            start = time.perf_counter()
            for state, shape in SHAPES.items():
                paths.append(f"{folder}/{state}.tif")
                textured(paths[-1], shape)
            print(f"wrote {sum(pathlib.Path(path).stat().st_size for path in paths) / 1e9:.2f} GB in "
                  f"{time.perf_counter() - start:.0f} s")
        measure(paths, options.some)


def measure(paths, some):
    volumes = [Volume(path) for path in paths]
    for volume in volumes:  # once through, so that the page cache holds what it can
        read_single(volume, "thickness", volume.shape[0])
    before, watch = rss_anon(), AnonymousMemory()
    watch.start()
    used, copied = {}, {}
    for _ in range(3):
        for volume in volumes:
            for axis in AXES:
                for found, use in ((used, True), (copied, False)):
                    found[volume.name, axis] = max(found.get((volume.name, axis), (0, 0)), read_all(volume, axis, use))
    most = watch.stop()
    print("Mpx/s, blocks used and copied, slices copied one by one, gain")
    for volume in volumes:
        assert len({used[volume.name, axis][1] for axis in AXES}) == 1, "the axes hold different pixels"
        for axis, count in volume.counts().items():
            fast, slow = copied[volume.name, axis][0], read_single(volume, axis, min(some, count))
            print(f"{volume.name:24} {axis:10} {count:6} {format_shape(volume.sizes()[axis]):>9} "
                  f"{used[volume.name, axis][0] / 1e6:6.0f} {fast / 1e6:6.0f} {slow / 1e6:6.0f}  {fast / slow:.1f}")
    voxels = {volume.name: np.prod(volume.shape, dtype=float) for volume in volumes}
    for what, rate in (("copied", copied), ("used", used)):
        rates = {axis: sum(voxels.values()) / sum(n / rate[name, axis][0] for name, n in voxels.items())
                 for axis in AXES}
        ratio = max(rates.values()) / min(rates.values())
        print(f"all, {what}: " + ", ".join(f"{axis} {value / 1e6:.0f} Mpx/s" for axis, value in rates.items())
              + f"; slowest 1/{ratio:.1f} of the fastest")
    print(f"slices {sum(sum(volume.shape) for volume in volumes):,}  (of the report's volumes: 5,485)")
    print(f"anonymous memory {most - before:.0f} MB above the {before:.0f} MB before, bar 200 MB: "
          f"{'met' if most - before <= 200 else 'MISSED'}")
    print(f"slowest axis 1/{ratio:.1f} of the fastest (used), bar 1/4: {'met' if ratio <= 4 else 'MISSED'}")


if __name__ == "__main__":
    main()
