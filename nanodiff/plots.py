"""Grids, labelled sheets and curves, drawn with Pillow. Pictures are tensors in [-1, 1]."""

import math
import os
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from nanodiff.errors import UserError
from nanodiff.pixels import to_uint8

COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"]


def font(size=12):
    """Pillow's built-in scalable font."""
    return ImageFont.load_default(size)


def to_pil(x):
    """A Pillow image, grey or RGB, of one picture [C, H, W] in [-1, 1] with C = 1 or 3."""
    levels = to_uint8(x.detach().cpu())
    if levels.shape[0] == 1:
        return Image.fromarray(levels[0].numpy(), "L")
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy(), "RGB")


def grid(x, columns=None, scale=1, gap=2):
    """One image of all pictures [B, C, H, W], row by row, each enlarged `scale` times; about square by default."""
    columns = columns or math.ceil(math.sqrt(len(x)))
    return sheet([list(x[i:i + columns]) for i in range(0, len(x), columns)], scale=scale, gap=gap)


def sheet(rows, row_labels=None, column_labels=None, title=None, scale=1, gap=2):
    """A labelled table of pictures; `rows` is a list of lists of tensors [C, H, W], None leaves a cell empty."""
    shape = next(cell.shape for row in rows for cell in row if cell is not None)
    height, width = shape[1] * scale + gap, shape[2] * scale + gap
    left = gap + (int(max(font().getlength(text) for text in row_labels)) + 8 if row_labels else 0)
    top = gap + (20 if title else 0) + (18 if column_labels else 0)
    columns = max(len(row) for row in rows)
    total = left + columns * width
    if title:
        total = max(total, int(font(14).getlength(title)) + 8)
    page = Image.new("RGB", (total, top + len(rows) * height), "white")
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((4, 2), title, fill="black", font=font(14))
    for j, text in enumerate(column_labels or []):
        draw.text((left + j * width + width / 2, top - 16), text, fill="black", font=font(), anchor="ma")
    for i, row in enumerate(rows):
        if row_labels:
            draw.text((left - 6, top + i * height + height / 2), row_labels[i], fill="black", font=font(), anchor="rm")
        for j, cell in enumerate(row):
            if cell is not None:
                small = to_pil(cell)
                large = small.resize((shape[2] * scale, shape[1] * scale), Image.Resampling.NEAREST)
                page.paste(large, (left + j * width, top + i * height))
    return page


def reconstructions(x, y, columns=24, scale=1):
    """A sheet of pictures x [B, C, H, W] above their reconstructions y, in pairs of rows."""
    rows = []
    for start in range(0, len(x), columns):
        rows += [list(x[start:start + columns]), list(y[start:start + columns])]
    return sheet(rows, ["original", "copy"] * (len(rows) // 2), scale=scale)


def stack(pages, gap=10):
    """One image of several, stacked vertically."""
    page = Image.new("RGB", (max(p.width for p in pages), sum(p.height + gap for p in pages) - gap), "white")
    y = 0
    for image in pages:
        page.paste(image, (0, y))
        y += image.height + gap
    return page


def curves(lines, title="", x_label="", y_label="", log_x=False, log_y=False, size=(720, 420)):
    """A line chart of `lines`, {name: (xs, ys)}; a name that ends in " points" gives a scatter plot.

    Points that are not finite, or not positive on a log axis, are left out.
    """
    points = {name: [(x, y) for x, y in zip(xs, ys) if math.isfinite(x) and math.isfinite(y)
                     and (x > 0 or not log_x) and (y > 0 or not log_y)] for name, (xs, ys) in lines.items()}
    width, height = size
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    box = (70, 40, width - 16, height - 44)  # left, top, right, bottom of the plot
    draw.text((width / 2, 8), title, fill="black", font=font(15), anchor="ma")
    draw.text(((box[0] + box[2]) / 2, height - 18), x_label, fill="black", font=font(), anchor="ma")
    draw.text((6, 14), y_label, fill="black", font=font())
    all_points = [point for line in points.values() for point in line]
    if not all_points:
        draw.text((width / 2, height / 2), "no data", fill="black", font=font(), anchor="mm")
        return page
    to_x, x_ticks = _axis([x for x, _ in all_points], log_x, box[0], box[2])
    to_y, y_ticks = _axis([y for _, y in all_points], log_y, box[3], box[1])
    for value, text in x_ticks:
        draw.line((to_x(value), box[1], to_x(value), box[3]), fill="#e6e6e6")
        draw.text((to_x(value), box[3] + 5), text, fill="black", font=font(11), anchor="ma")
    for value, text in y_ticks:
        draw.line((box[0], to_y(value), box[2], to_y(value)), fill="#e6e6e6")
        draw.text((box[0] - 6, to_y(value)), text, fill="black", font=font(11), anchor="rm")
    draw.rectangle(box, outline="black")
    for number, (name, line) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(to_x(x), to_y(y)) for x, y in line]
        if name.endswith(" points") or len(places) == 1:
            radius = 3 if len(places) == 1 else 2
            for x, y in places:
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        elif places:
            draw.line(places, fill=colour, width=2)
    if len(points) > 1:
        polylines = []  # the dots of scatter plots are lines of one pixel
        for name, line in points.items():
            places = [(to_x(x), to_y(y)) for x, y in line]
            polylines += [[place] for place in places] if name.endswith(" points") else [places]
        _legend(draw, box, [name.removesuffix(" points") for name in points], polylines)
    return page


def _legend(draw, box, names, lines):
    """Draw the names of lines (lists of pixels) in the corner of the box where they hide the fewest pixels."""
    wide = max(int(font(11).getlength(name)) for name in names) + 36
    high = 16 * len(names) + 4
    samples = [(a[0] + (b[0] - a[0]) * i / 16, a[1] + (b[1] - a[1]) * i / 16)
               for line in lines for a, b in zip(line, line[1:] or line) for i in range(17)]

    def count_hidden(corner):
        x, y = corner
        return sum(x <= px <= x + wide and y <= py <= y + high for px, py in samples)
    corners = [(x, y) for y in (box[1] + 2, box[3] - high - 2) for x in (box[2] - wide - 2, box[0] + 2)]
    x, y = min(corners, key=count_hidden)
    draw.rectangle((x, y, x + wide, y + high), fill="white")
    for number, name in enumerate(names):
        middle = y + 10 + 16 * number
        draw.line((x + 4, middle, x + 24, middle), fill=COLOURS[number % len(COLOURS)], width=3)
        draw.text((x + 30, middle), name, fill="black", font=font(11), anchor="lm")


def label_map(points, labels, classes, title=""):
    """A scatter plot of points [n, 2], coloured by their labels int64 [n]; one colour when labels is None."""
    groups = {"all points": points}
    if labels is not None:
        groups = {f"{name} points": points[labels == number] for number, name in enumerate(classes)}
    lines = {name: (group[:, 0].tolist(), group[:, 1].tolist()) for name, group in groups.items()}
    return curves(lines, title, size=(720, 660))


def _axis(values, log, start, end):
    """The map from a value to its pixel, and the ticks as (value, text)."""
    low, high = min(values), max(values)
    if log:
        low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
        high += low == high
        ticks = [(10.0**p, f"1e{p}") for p in range(low, high + 1, max(1, (high - low) // 8))]
        return lambda v: start + (end - start) * (math.log10(v) - low) / (high - low), ticks
    if high == low:
        low, high = low - 0.5, high + 0.5
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    low = math.floor(low / step) * step
    high = math.ceil(high / step - 1e-9) * step
    ticks = [(low + i * step, f"{low + i * step:.6g}") for i in range(round((high - low) / step) + 1)]
    return lambda v: start + (end - start) * (v - low) / (high - low), ticks


def heat(table, scale=1):
    """A table [H, W] as a picture [1, H, W] in [-1, 1]: its lowest value is black, its highest white."""
    low, high = table.min(), table.max()
    small = (2 * (table - low) / (high - low).clamp(min=1e-12) - 1)[None].float()
    return small.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def save(image, path, text=None):
    """Write a Pillow image or a tensor [C, H, W] as PNG with the text chunks `text`, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, str(value))
    temporary = path.with_name(f".{path.name}.writing")
    (to_pil(image) if isinstance(image, torch.Tensor) else image).save(temporary, "PNG", pnginfo=info)
    os.replace(temporary, path)
    return path


def read_text(path):
    """The {name: text} that `save` wrote into a PNG; UserError when the file is no picture."""
    try:
        with Image.open(path) as image:
            return dict(getattr(image, "text", {}))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as a picture: expected a PNG ({type(error).__name__})") from None
