"""Volumes of woven composites: what is in one's own, and drawn ones with known truth.

    python -m nanodiff.data slices VOLUME... --out FOLDER     table 1 of one's own volumes, printed and as a picture
    python -m nanodiff.data weave --out FOLDER                draws volumes of all three states, with their labels
    python -m nanodiff.data worlds --out FOLDER               draws contact sheets of all that can be drawn

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
from nanodiff.tomography.volumes import AXES, CAPTIONS, STATES, Volume, by

WIDE = 420  # pixels of the sheet's largest slice


@dataclass
class SlicesConfig:
    volumes: tuple = ()  # TIFF volumes, or folders of slices
    out: str = ""  # folder for slices.png
    state: str = ""  # dry, dry-compacted or injected, one for all or one each with commas (default: from the names)
    voxel: float = 0.0  # edge of a voxel in micrometres (0: as the files say)
    region: str = ""  # a box Z0:Z1,Y0:Y1,X0:X1, ends may be left out (default: the whole volume)
    series: int = -1  # of files with several series, which, from 0 (-1: they must have one)
    captions: str = CAPTIONS  # rule of the captions: {word} for each word, or a sentence with {state} and {axis}


@dataclass
class WeaveConfig:
    out: str = ""  # folder for the volumes, new or there already
    seed: int = 0  # a seed is a specimen
    scale: float = 0.25  # of the sides of the report's volumes (1: their full size, 1.0 GB in all)
    states: str = ",".join(STATES)  # which states


@dataclass
class WorldsConfig:
    out: str = ""  # folder for worlds.png, captions.txt and woven.png
    seed: int = 0  # of the pictures and specimens
    columns: int = 8  # pictures of each class
    size: int = 64  # their side in pixels
    scale: float = 0.25  # size of the specimens, of the report's volumes


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
        if volume.dtype.kind == "f":  # whole numbers are finite; for these every slice is looked at
            for _ in volume.slices(AXES[0]):
                pass
    page = sheet(volumes)
    print(table(volumes))
    path = plots.save(page, Path(config.out) / "slices.png")
    print(f"the middle slices of each: {path}")


def table(volumes):
    """Table 1 of the report for these volumes, as text."""
    rows = [("state", "axis", "slices", "size", "grey range", "caption", "volume")]
    for volume in volumes:
        grey = span(volume)
        rows += [(volume.state, axis, f"{count:,}", by(volume.sizes()[axis]), grey, volume.caption(axis), volume.name)
                 for axis, count in volume.counts().items()]
        voxel = " x ".join(f"{side:.4g}" for side in volume.voxel) + " µm" if volume.voxel else "unknown"
        rows.append((volume.state, "all", f"{sum(volume.shape):,}", "", "", f"voxel {voxel}", volume.name))
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(text.ljust(n) for text, n in zip(row, wide)).rstrip() for row in rows]
    totals = [sum(volume.shape) for volume in volumes]
    classes = {(volume.state, axis) for volume in volumes for axis in AXES}
    each = " + ".join(f"{n:,}" for n in totals) + " = " if len(totals) > 1 else ""
    return "\n".join([*lines, f"total {each}{sum(totals):,} slices in {len(classes)} classes"])


def sheet(volumes):
    """The middle slice of each axis of each volume, in rows of volumes: one scale for all, so that sizes compare."""
    scale = min(1, WIDE / max(max(volume.shape) for volume in volumes))
    size = {(v, axis): [max(1, round(n * scale)) for n in volume.sizes()[axis]]
            for v, volume in enumerate(volumes) for axis in AXES}
    widths = [max(150, *(size[v, axis][1] for v in range(len(volumes)))) for axis in AXES]
    heights = [max(size[v, axis][0] for axis in AXES) for v in range(len(volumes))]
    gap, text, left = 14, 46, 120
    page = Image.new("RGB", (left + sum(widths) + 3 * gap, 34 + sum(heights) + len(volumes) * (text + gap)), "white")
    draw = ImageDraw.Draw(page)
    y = 34
    for v, volume in enumerate(volumes):
        draw.text((8, y), volume.state, fill="black", font=plots.font(14))
        note = [short(volume.name), f"{sum(volume.shape):,} slices"]
        note += [f"grey {span(volume)}"]
        note += [f"voxel {volume.voxel[2]:.4g} um"] if volume.voxel else []
        draw.multiline_text((8, y + 20), "\n".join(note), fill="#444444", font=plots.font(10), spacing=3)
        x = left
        for axis, width in zip(AXES, widths):
            if v == 0:
                draw.text((x, 8), axis, fill="black", font=plots.font(15))
            count, own = volume.counts()[axis], volume.sizes()[axis]
            one = plots.to_pil(volume.to_picture(volume.slice(axis, count // 2)))
            page.paste(one.resize(size[v, axis][::-1], Image.Resampling.LANCZOS), (x, y))
            below = f"{count:,} of {by(own)}\n{volume.caption(axis)}"
            draw.multiline_text((x, y + size[v, axis][0] + 4), below, fill="black", font=plots.font(11), spacing=3)
            x += width + gap
        y += heights[v] + text + gap
    return page


def span(volume):
    """The grey scale of a volume as text, which becomes black and white."""
    low, high = volume.grey
    places = max(0, 3 - math.floor(math.log10(high - low)))
    return f"{low:,.{places}f} to {high:,.{places}f}"


def short(name):
    """A name that fits beside the sheet's rows."""
    return name if len(name) <= 18 else name[:8] + "..." + name[-8:]


# --- weave ----------------------------------------------------------------------------------------------------------

def weave(config):
    """Draws woven volumes with known truth: {state}-{seed}.tif, with labels and truth in labels/."""
    from nanodiff.worlds import weave as drawn

    states = list(dict.fromkeys(config.states.split(",")))
    for state in states:
        check(state in STATES, f'--states "{state}" is unknown; expected some of {", ".join(STATES)}'
              f"{nearest(state, STATES)}")
    for path in drawn.write(config.out, config.seed, config.scale, states):
        volume = Volume(path)
        print(f"{path}: {volume.state}, {by(volume.shape)} voxels, {sum(volume.shape):,} slices")
    print(f"labels and truth: {Path(config.out) / 'labels'}")


# --- worlds ---------------------------------------------------------------------------------------------------------

def drawn_worlds(config):
    """Draws every class of textures, things and digits, with their captions, and slices of woven specimens."""
    from nanodiff import worlds

    check(config.columns >= 1, f"--columns is {config.columns}; expected 1 or more pictures of each class")
    check(config.size >= 16, f"--size is {config.size}; expected 16 pixels or more")
    check(config.seed >= 0, f"--seed is {config.seed}; expected a whole number from 0 on")
    check(0.05 <= config.scale <= 1, f"--scale is {config.scale}; expected 0.05 to 1, such as 0.25")
    names = worlds.DRAWN
    drawn = worlds.load(size=config.size, n=config.columns * len(names), names=names, seed=config.seed)
    x = drawn.read(torch.arange(len(drawn)), torch.zeros(len(drawn), dtype=torch.long))
    half = -(-len(names) // 2)
    blocks = [plots.sheet([list(x[i::len(names)]) for i in part], [names[i] for i in part])
              for part in (range(half), range(half, len(names)))]
    page = Image.new("RGB", (sum(block.width for block in blocks) + 12, max(block.height for block in blocks)), "white")
    page.paste(blocks[0], (0, 0))
    page.paste(blocks[1], (blocks[0].width + 12, 0))
    path = plots.save(page, Path(config.out) / "worlds.png")
    text = "".join(f"{scene.name}\t{caption}\n" for scene, caption in zip(drawn.scenes, drawn.captions))
    write_text(Path(config.out) / "captions.txt", text)
    print(f"{config.columns} pictures of each of {len(names)} classes: {path}; what is said of them: captions.txt")

    specimens = max(1, config.columns // 2)
    cut = worlds.woven(size=config.size, specimens=specimens, scale=config.scale, seed=config.seed)
    rows = []
    for number, name in enumerate(cut.classes):
        mine = (cut.labels == number).nonzero().flatten()
        index = mine[((torch.arange(config.columns) + 0.5) / config.columns * len(mine)).long()]
        rows.append(list(cut.read(index, index)))
    path = plots.save(plots.sheet(rows, cut.classes), Path(config.out) / "woven.png")
    print(f"slices of {specimens} specimens of each state in nine classes: {path}")


COMMANDS = {"slices": (SlicesConfig, slices), "weave": (WeaveConfig, weave), "worlds": (WorldsConfig, drawn_worlds)}

if __name__ == "__main__":
    main()
