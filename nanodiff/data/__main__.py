"""Inspects your volumes of woven composites, and draws synthetic ones with known labels.

    python -m nanodiff.data slices VOLUME... --out FOLDER     prints the report's table 1 for your volumes; slices.png
    python -m nanodiff.data weave --out FOLDER                draws volumes of all three states, with their labels
    python -m nanodiff.data worlds --out FOLDER               draws contact sheets of every class

Each takes --help.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from nanodiff import plots
from nanodiff.errors import check, nearest
from nanodiff.files import write_text
from nanodiff.flags import check_folder, entry, parse
from nanodiff.tomography.volumes import AXES, CAPTIONS, STATES, Volume, format_shape

LARGEST = 420  # pixels of the longest side of a slice on the sheet


@dataclass
class SlicesConfig:
    volumes: tuple = ()  # TIFF volumes, or folders of slices
    out: str = ""  # folder for slices.png
    state: str = ""  # dry, dry-compacted or injected, one for all or one each with commas (default: from the names)
    voxel: float = 0.0  # edge of a voxel in micrometres (0: from the files)
    region: str = ""  # a box Z0:Z1,Y0:Y1,X0:X1, ends may be left out (default: the whole volume)
    series: int = -1  # number of the series in files with several, from 0 (-1: the files must have one)
    captions: str = CAPTIONS  # rule of the captions: {word} for each word, or a sentence with {state} and {axis}


@dataclass
class WeaveConfig:
    out: str = ""  # folder for the volumes, new or existing
    seed: int = 0  # of the specimen
    scale: float = 0.25  # sides relative to the report's volumes (1: their full size, 1.0 GB in all)
    states: str = ",".join(STATES)  # states to draw


@dataclass
class WorldsConfig:
    out: str = ""  # folder for worlds.png, captions.txt and woven.png
    seed: int = 0  # of the pictures and specimens
    columns: int = 8  # pictures of each class
    size: int = 64  # side of a picture in pixels
    scale: float = 0.25  # sides of the specimens relative to the report's volumes


@entry
def main(argv=None):
    """Runs the sub-command that the first word names."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["--help"], ["-h"]):
        print(__doc__)
        return
    name = words[0] if words else ""
    check(name in COMMANDS, f'"{name}" is no command of nanodiff.data; expected {", ".join(COMMANDS)}'
          f"{nearest(name, COMMANDS)}")
    config_class, command = COMMANDS[name]
    config, _ = parse(config_class, words[1:], command.__doc__)
    check(config.out, "--out is missing; expected a folder to write to")
    check_folder("--out", config.out)
    command(config)


# --- slices ---------------------------------------------------------------------------------------------------------

def slices(config):
    """Counts the slices of volumes along their three axes and draws the middle ones, all at one scale."""
    check(config.volumes, "no volume was named; expected TIFF files or folders of slices")
    states = config.state.split(",") if config.state else [None]
    check(len(states) in (1, len(config.volumes)), f"--state names {len(states)} states for {len(config.volumes)} "
          "volumes; expected one for all, or one each")
    states = states * len(config.volumes) if len(states) == 1 else states
    volumes = [Volume(path, state, config.voxel or None, config.region or None, captions=config.captions,
                      series=None if config.series < 0 else config.series)
               for path, state in zip(config.volumes, states)]
    volumes.sort(key=lambda volume: STATES.index(volume.state))
    for volume in volumes:
        if volume.dtype.kind == "f":  # reading every slice finds values that are not finite; integers always are
            for _ in volume.slices(AXES[0]):
                pass
    page = draw_sheet(volumes)
    print(format_table(volumes))
    path = plots.save(page, Path(config.out) / "slices.png")
    print(f"the middle slices of each: {path}")


def format_table(volumes):
    """Table 1 of the report for these volumes, as text."""
    rows = [("state", "axis", "slices", "size", "grey range", "caption", "volume")]
    for volume in volumes:
        grey, sizes = format_grey_range(volume), volume.sizes()
        rows += [(volume.state, axis, f"{count:,}", format_shape(sizes[axis]), grey, volume.caption(axis), volume.name)
                 for axis, count in volume.counts().items()]
        voxel = " x ".join(f"{side:.4g}" for side in volume.voxel) + " µm" if volume.voxel else "unknown"
        rows.append((volume.state, "all", f"{sum(volume.shape):,}", "", "", f"voxel {voxel}", volume.name))
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    totals = [sum(volume.shape) for volume in volumes]
    classes = {(volume.state, axis) for volume in volumes for axis in AXES}
    terms = " + ".join(f"{total:,}" for total in totals) + " = " if len(totals) > 1 else ""
    return "\n".join([*lines, f"total {terms}{sum(totals):,} slices in {len(classes)} classes"])


def draw_sheet(volumes):
    """The middle slice of each axis as a Pillow image, a row per volume. All slices have one scale."""
    scale = min(1, LARGEST / max(max(volume.shape) for volume in volumes))
    sizes = {(row, axis): [max(1, round(side * scale)) for side in volume.sizes()[axis]]
             for row, volume in enumerate(volumes) for axis in AXES}
    widths = [max(150, *(sizes[row, axis][1] for row in range(len(volumes)))) for axis in AXES]
    heights = [max(sizes[row, axis][0] for axis in AXES) for row in range(len(volumes))]
    gap, text, left = 14, 46, 120  # pixels: between slices, of the caption below a slice, of the first column
    page = Image.new("RGB", (left + sum(widths) + 3 * gap, 34 + sum(heights) + len(volumes) * (text + gap)), "white")
    draw = ImageDraw.Draw(page)
    y = 34
    for row, volume in enumerate(volumes):
        draw.text((8, y), volume.state, fill="black", font=plots.font(14))
        notes = [shorten(volume.name), f"{sum(volume.shape):,} slices", f"grey {format_grey_range(volume)}"]
        notes += [f"voxel {volume.voxel[2]:.4g} um"] if volume.voxel else []
        draw.multiline_text((8, y + 20), "\n".join(notes), fill="#444444", font=plots.font(10), spacing=3)
        x = left
        for axis, width in zip(AXES, widths):
            if row == 0:
                draw.text((x, 8), axis, fill="black", font=plots.font(15))
            count, (height_shown, width_shown) = volume.counts()[axis], sizes[row, axis]
            image = plots.to_pil(volume.to_picture(volume.slice(axis, count // 2)))
            page.paste(image.resize((width_shown, height_shown), Image.Resampling.LANCZOS), (x, y))
            caption = f"{count:,} of {format_shape(volume.sizes()[axis])}\n{volume.caption(axis)}"
            draw.multiline_text((x, y + height_shown + 4), caption, fill="black", font=plots.font(11), spacing=3)
            x += width + gap
        y += heights[row] + text + gap
    return page


def format_grey_range(volume):
    """The values of a volume that become black and white, as text."""
    low, high = volume.grey
    decimals = max(0, 3 - math.floor(math.log10(high - low)))
    return f"{low:,.{decimals}f} to {high:,.{decimals}f}"


def shorten(name):
    """A name of at most 19 characters, with dots for its middle."""
    return name if len(name) <= 18 else name[:8] + "..." + name[-8:]


# --- weave ----------------------------------------------------------------------------------------------------------

def weave(config):
    """Draws woven volumes with known labels: {state}-{seed}.tif, with labels and measures in labels/."""
    from nanodiff.worlds import weave as woven_volumes

    states = list(dict.fromkeys(config.states.split(",")))
    for state in states:
        check(state in STATES, f'--states "{state}" is unknown; expected some of {", ".join(STATES)}'
              f"{nearest(state, STATES)}")
    for path in woven_volumes.write(config.out, config.seed, config.scale, states):
        volume = Volume(path)
        print(f"{path}: {volume.state}, {format_shape(volume.shape)} voxels, {sum(volume.shape):,} slices")
    print(f"labels and truth: {Path(config.out) / 'labels'}")


# --- worlds ---------------------------------------------------------------------------------------------------------

def draw_worlds(config):
    """Draws every class of textures, things and digits, with their captions, and slices of woven specimens."""
    check(config.columns >= 1, f"--columns is {config.columns}; expected 1 or more pictures of each class")
    check(config.size >= 16, f"--size is {config.size}; expected 16 pixels or more")
    check(config.seed >= 0, f"--seed is {config.seed}; expected a whole number from 0 on")
    check(0.05 <= config.scale <= 1, f"--scale is {config.scale}; expected 0.05 to 1, such as 0.25")
    _draw_scenes(config)
    _draw_woven_slices(config)


def _draw_scenes(config):
    """Writes worlds.png, with a row of pictures per class, and captions.txt."""
    from nanodiff import worlds

    names = worlds.DRAWN
    images = worlds.load(size=config.size, n=config.columns * len(names), names=names, seed=config.seed)
    x = images.read(torch.arange(len(images)), torch.zeros(len(images), dtype=torch.long))
    half = -(-len(names) // 2)
    blocks = [plots.sheet([list(x[i::len(names)]) for i in numbers], [names[i] for i in numbers])
              for numbers in (range(half), range(half, len(names)))]
    page = Image.new("RGB", (sum(block.width for block in blocks) + 12, max(block.height for block in blocks)), "white")
    page.paste(blocks[0], (0, 0))
    page.paste(blocks[1], (blocks[0].width + 12, 0))
    path = plots.save(page, Path(config.out) / "worlds.png")
    text = "".join(f"{scene.name}\t{caption}\n" for scene, caption in zip(images.scenes, images.captions))
    write_text(Path(config.out) / "captions.txt", text)
    print(f"{config.columns} pictures of each of {len(names)} classes: {path}; their captions: captions.txt")


def _draw_woven_slices(config):
    """Writes woven.png, a row of evenly spaced slices per class."""
    from nanodiff import worlds

    specimens = max(1, config.columns // 2)
    slices = worlds.woven(size=config.size, specimens=specimens, scale=config.scale, seed=config.seed)
    rows = []
    for number in range(len(slices.classes)):
        members = (slices.labels == number).nonzero().flatten()
        index = members[((torch.arange(config.columns) + 0.5) / config.columns * len(members)).long()]
        rows.append(list(slices.read(index, index)))
    path = plots.save(plots.sheet(rows, slices.classes), Path(config.out) / "woven.png")
    print(f"slices of {specimens} specimens of each state in nine classes: {path}")


COMMANDS = {"slices": (SlicesConfig, slices), "weave": (WeaveConfig, weave), "worlds": (WorldsConfig, draw_worlds)}

if __name__ == "__main__":
    main()
