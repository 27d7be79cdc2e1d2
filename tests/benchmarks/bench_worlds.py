"""The drawn world in numbers: time a picture, what colour alone gives away, and how much of it is fine structure.

    python tests/benchmarks/bench_worlds.py [--train 1000] [--test 100] [--sheet sheet.png]

Colour alone: a two-layer network on the mean, covariance and per-channel histograms (16 bins) of a picture at 64 x 64
learns the class from `--train` pictures of each class and is asked about `--test` others. Fine structure: the peak
signal-to-noise ratio, averaged over pictures, of each picture brought down to 8 x 8 and up again (Pillow, bicubic).
`--sheet` writes ten seeds of every class as one labelled picture. One thread: set OMP_NUM_THREADS=1.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from nanodiff import plots
from nanodiff.worlds import textures

GROUPS = {"textures": textures.TEXTURES, "things": textures.THINGS, "digits": textures.DIGITS}
NAMES = sum(GROUPS.values(), ())


def drawn(split, count):
    """uint8 [classes,count,64,64,3], and milliseconds of processor time a picture of each class."""
    pixels, taken = np.empty((len(NAMES), count, 64, 64, 3), np.uint8), []
    for i, name in enumerate(NAMES):
        textures.draw(0, name, 64, split)  # MNIST is read once
        started = time.process_time()
        for seed in range(count):
            pixels[i, seed] = textures.draw(seed, name, 64, split)[0]
        taken.append((time.process_time() - started) / count * 1e3)
    return pixels, taken


def statistics(pixels):
    """float32 [N,57]: mean, covariance and histograms of uint8 [N,64,64,3]."""
    rows = []
    for picture in pixels:
        x = picture.reshape(-1, 3)
        histograms = [np.bincount(x[:, i] >> 4, minlength=16) / len(x) for i in range(3)]
        x = x / 255
        rows.append(np.concatenate([x.mean(0), np.cov(x.T)[np.triu_indices(3)], *histograms]))
    return torch.from_numpy(np.array(rows, np.float32))


def colour_alone(train, test, epochs=60):
    """Which of the test pictures [classes,count,...] the network on statistics names rightly: bool [classes,count]."""
    torch.manual_seed(0)
    x, y = statistics(train.reshape(-1, 64, 64, 3)), torch.arange(len(NAMES)).repeat_interleave(train.shape[1])
    mean, std = x.mean(0), x.std(0) + 1e-6
    net = torch.nn.Sequential(torch.nn.Linear(x.shape[1], 256), torch.nn.ReLU(), torch.nn.Dropout(0.2),
                              torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Dropout(0.2),
                              torch.nn.Linear(256, len(NAMES)))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(256):
            optimizer.zero_grad()
            F.cross_entropy(net((x[batch] - mean) / std), y[batch]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        said = net.eval()((statistics(test.reshape(-1, 64, 64, 3)) - mean) / std).argmax(1)
    return said.reshape(len(NAMES), -1) == torch.arange(len(NAMES))[:, None]


def thumbnail_psnr(picture):
    """dB of a picture against itself at 8 x 8, enlarged again."""
    image = Image.fromarray(picture)
    again = image.resize((8, 8), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC)
    error = (np.asarray(again, np.float64) - picture) ** 2
    return 10 * np.log10(255**2 / error.mean())


def contact_sheet(pixels):
    """Ten pictures of each class, enlarged twice, in two halves side by side."""
    cells = torch.from_numpy(pixels[:, :10]).permute(0, 1, 4, 2, 3) / 127.5 - 1
    half = -(-len(NAMES) // 2)
    parts = [plots.sheet([list(row) for row in cells[i:i + half]], NAMES[i:i + half], scale=2, gap=4)
             for i in (0, half)]
    page = Image.new("RGB", (sum(p.width for p in parts), max(p.height for p in parts)), "white")
    page.paste(parts[0], (0, 0))
    page.paste(parts[1], (parts[0].width, 0))
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=100)
    parser.add_argument("--sheet", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, taken = drawn("train", options.train)
    test, _ = drawn("test", options.test)
    right = colour_alone(train, test).double().mean(1).numpy()
    psnr = np.array([np.mean([thumbnail_psnr(picture) for picture in row]) for row in test])
    print(f"{len(NAMES)} classes of the base world, and held out {', '.join(textures.NEW)}\n")
    print("| class | ms a picture | colour alone | thumbnail |\n|---|---|---|---|")
    for i, name in enumerate(NAMES):
        print(f"| {name} | {taken[i]:.2f} | {right[i]:.0%} | {psnr[i]:.1f} dB |")
    print("\n| group | classes | ms a picture (bar: 4) | colour alone (bar: 30 %) | thumbnail (bar: 20 dB) |")
    print("|---|---|---|---|---|")
    for group, names in [*GROUPS.items(), ("all", NAMES)]:
        at = [NAMES.index(name) for name in names]
        print(f"| {group} | {len(at)} | {np.mean(np.array(taken)[at]):.2f}, slowest {np.max(np.array(taken)[at]):.2f} |"
              f" {right[at].mean():.1%} | {psnr[at].mean():.1f} dB |")
    if options.sheet:
        print(f"\nwrote {plots.save(contact_sheet(train), options.sheet)}")


if __name__ == "__main__":
    main()
