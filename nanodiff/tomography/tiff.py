"""Readers of volume files: TIFF files of many kinds, and folders of slices. Voxels are read only on demand.

Opening a file checks it. UserError says in one sentence what is wrong with it.
"""

import functools
import logging
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from nanodiff.errors import UserError, check

PAGE_LIMIT = 256 << 20  # bytes that may be decoded at once, where one compressed page has all slices
MICROMETRES = {"micron": 1, "microns": 1, "um": 1, "µm": 1, "mm": 1e3, "cm": 1e4, "nm": 1e-3, "inch": 25400,
               2: 25400, 3: 1e4, 4: 1e3, 5: 1}  # of ImageJ's units, and of TIFF's ResolutionUnit


class Voxels(NamedTuple):
    """The voxels of a file: an array (mapped, or in memory), or a function that reads one page."""

    shape: tuple  # depth, height, width
    dtype: np.dtype  # in this machine's byte order
    array: np.ndarray = None
    read_page: object = None  # i -> [height, width], where there is no array
    obstacle: str = ""  # why the file cannot be mapped into memory
    voxel: tuple = None  # micrometres along depth, height, width, where the file has them


def format_shape(shape):
    """The text "702x970" of a shape (702, 970)."""
    return "x".join(str(side) for side in shape)


def open_tiff(path, series=None):
    """The Voxels of a multi-page TIFF. UserError when it is broken, cut short, in colour or no volume."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # the checks below replace its messages on stderr
    try:
        with tifffile.TiffFile(path) as file:
            check_pages(path, file)
            volume = choose_series(path, file.series, series)
            shape = (math.prod(volume.shape[:-2]), *volume.shape[-2:])
            dtype = np.dtype(volume.dtype).newbyteorder("=")
            pages = file.pages[volume.keyframe.index:][:shape[0]] if len(file.pages) > 1 else [file.pages[0]]
            voxel = voxel_size(file)
            array = _map_pages(path, file, pages, shape, dtype)
            if array is not None:
                return Voxels(shape, dtype, array, voxel=voxel)
            if len(pages) == 1:  # three planes, or tiles with a depth
                check(math.prod(shape) * dtype.itemsize <= PAGE_LIMIT,
                      f"{path} has all its slices in one compressed page; expected a page for each slice")
                return Voxels(shape, dtype, pages[0].asarray(maxworkers=1).reshape(shape), voxel=voxel)
            pages[0].asarray(maxworkers=1)  # raises now if the codec is missing
            first = pages[0]
            obstacle = "is compressed" if first.compression != 1 else "is tiled" if first.is_tiled else "is packed"
            return Voxels(shape, dtype, None, functools.partial(_read_page, file, pages), obstacle, voxel)
    except Exception as error:  # decoders raise all kinds of exceptions
        raise read_error(path, error) from None


def _map_pages(path, file, pages, shape, dtype):
    """The pages mapped into memory as one array; None unless they are uncompressed and evenly spaced in the file."""
    size = shape[1] * shape[2] * dtype.itemsize  # bytes of a page
    offsets = [page.dataoffsets[0] for page in pages if page.is_final]
    step = offsets[1] - offsets[0] if len(offsets) > 1 else size
    if len(offsets) < len(pages) or any(b - a != step or step <= 0 for a, b in zip(offsets, offsets[1:])):
        return None
    end = offsets[0] + step * (shape[0] - 1) + size
    check(end <= file.filehandle.size,
          f"{path} is cut short: its {shape[0]} slices need {end:,} bytes of {file.filehandle.size:,}")
    strides = (step, shape[2] * dtype.itemsize, dtype.itemsize)
    return np.ndarray(shape, dtype.newbyteorder(file.byteorder), np.memmap(path, np.uint8, "r"), offsets[0], strides)


def _read_page(file, pages, i):
    """Page i of a TIFF [height, width], decoded; the file is open only meanwhile."""
    file.filehandle.open()
    with file.filehandle:
        return pages[i].asarray(maxworkers=1)


def open_folder(path):
    """The Voxels of a folder with one grey TIFF or PNG for each slice, in natural order."""
    import tifffile

    files = [file for file in Path(path).iterdir() if re.search(r"^[^.].*\.(tiff?|png)$", file.name, re.IGNORECASE)]
    files.sort(key=lambda file: [(text, int(n or 0)) for text, n in re.findall(r"(\D*)(\d*)", file.name.lower())])
    check(len(files) > 1, f"{path} holds {len(files)} slices; expected a volume of several .tif, .tiff or .png files")
    shape, dtype, voxel = read_header(files[0])
    for file in files[1:]:
        other_shape, other_dtype, _ = read_header(file)
        check((other_shape, other_dtype) == (shape, dtype), f"{file} is {format_shape(other_shape)} ({other_dtype}) "
              f"where {files[0].name} is {format_shape(shape)} ({dtype}); expected slices of one size")

    def read_page(i):
        is_png = files[i].suffix.lower() == ".png"
        return np.asarray(Image.open(files[i]) if is_png else tifffile.imread(files[i]))

    return Voxels((len(files), *shape), dtype, None, read_page, "is a folder of slices", voxel)


def check_pages(path, file):
    """UserError unless all pages that a TIFF promises are in the file, complete and of one size."""
    pages, tiff, raw = list(file.pages), file.tiff, file.filehandle
    raw.seek(pages[-1].offset)
    byteorder = "little" if file.byteorder == "<" else "big"
    raw.seek(int.from_bytes(raw.read(tiff.tagnosize), byteorder) * tiff.tagsize, 1)
    next_offset = raw.read(tiff.offsetsize)  # of the page after the last one that tifffile could read
    check(next_offset == bytes(tiff.offsetsize), f"{path} is cut short: the page after its first "
          f"{len(pages)} is not in its {raw.size:,} bytes")
    promised = _promised_pages(file, pages)
    check(len(pages) in (1, promised), f"{path} promises {promised} slices but holds {len(pages)}; expected as many")
    several_series = len(file.shaped_metadata or ()) > 1
    first = pages[0]
    for i, page in enumerate(pages):
        check(several_series or (page.shape, page.dtype) == (first.shape, first.dtype),
              f"page {i} of {path} is {format_shape(page.shape)} {page.dtype} where page 0 is "
              f"{format_shape(first.shape)} {first.dtype}; expected one size")
        end = max((offset + count for offset, count in zip(page.dataoffsets, page.databytecounts)), default=0)
        check(end <= raw.size, f"{path} is cut short: its page {i} ends at byte {end:,} of {raw.size:,}")


def _promised_pages(file, pages):
    """The number of pages by the metadata of tifffile or ImageJ; without metadata, the number that is there."""
    if not file.is_shaped:
        return (file.imagej_metadata or {}).get("images", len(pages))
    promised = 0
    for series in file.shaped_metadata or ():
        page = pages[min(promised, len(pages) - 1)]
        promised += math.prod(series["shape"]) // math.prod(page.shape)
    return promised


def choose_series(path, candidates, number):
    """The series of a TIFF: the only one, or the one of that number. UserError when it is no grey volume."""
    check(len(candidates) == 1 or number is not None, f"{path} holds {len(candidates)} series, of "
          f"{' and '.join(format_shape(series.shape) for series in candidates)}; expected one, or the number of one "
          "from 0 (--series)")
    check((number or 0) in range(len(candidates)),
          f"{path} has no series {number}; expected 0 to {len(candidates) - 1}")
    series = candidates[number or 0]
    # Three planes in one page are three slices: so tifffile writes (3, H, W), whether meant as colours or not.
    faults = ((series.axes != "SYX" and "S" in series.axes, "is in colour"),
              (series.dtype.kind not in "buif", f"holds {series.dtype}"),
              (math.prod(series.shape[:-2]) < 2, "holds one page"),
              (sum(side > 1 for side in series.shape[:-2]) > 1, f"has {len(series.shape)} dimensions"))
    for is_wrong, fault in faults:
        check(not is_wrong, f"{path} {fault} ({format_shape(series.shape)}, axes {series.axes}); expected several grey "
              "slices of numbers [depth, height, width]")
    if series.keyframe.photometric.name in ("MINISWHITE", "PALETTE") and series.dtype.kind != "b":
        warnings.warn(f"{path} asks for an inverted or coloured display; its values are used unchanged")
    return series


def voxel_size(file):
    """Micrometres along depth, height and width from a TIFF's tags, or None when they hold no size.

    Height and width come from the resolution in ImageJ's unit, or per inch or centimetre. The depth is ImageJ's
    spacing, else the width. 72 and 96 per inch are the resolution of screens, not of scanners, and are ignored.
    """
    tags, imagej = file.pages[0].tags, file.imagej_metadata or {}
    down, right = (tags[number].value if number in tags else (0, 1) for number in (283, 282))
    down, right = (a / b if b else 0 for a, b in (down, right))  # pixels per unit
    unit = str(imagej.get("unit", "")).lower().replace("\\u00b5", "µ").replace("μ", "µ")
    if not file.is_imagej and 296 in tags and not (tags[296].value == 2 and right in (72, 96)):
        unit = int(tags[296].value)
    length = MICROMETRES.get(unit)
    if not (length and down > 0 and right > 0):
        return None
    return abs(imagej.get("spacing", 0)) * length or length / right, length / down, length / right


def read_header(path):
    """((height, width), dtype, voxel size or None) of a file with one slice, without decoding it."""
    import tifffile

    try:
        if path.suffix.lower() == ".png":
            with Image.open(path) as image, open(path, "rb") as file:
                dtype = {"1": "?", "L": "u1", "I;16": "u2", "I;16B": "u2", "I": "u2"}.get(image.mode)
                check(dtype, f"{path} is in colour ({image.mode}); expected grey slices")
                check(b"IEND" in file.read()[-12:], f"{path} is cut short; expected the PNG file's end")
                return image.size[::-1], np.dtype(dtype), None
        with tifffile.TiffFile(path) as file:
            check_pages(path, file)
            page = file.pages[0]
            check(len(file.pages) == 1 and page.ndim == 2, f"{path} is {len(file.pages)} x {format_shape(page.shape)}; "
                  "expected one grey slice, in a folder of slices")
            return page.shape, page.dtype.newbyteorder("="), voxel_size(file)
    except Exception as error:
        raise read_error(path, error) from None


def read_error(path, error):
    """The UserError, one sentence, for a file that cannot be read because of `error`."""
    text = "it is cut short or damaged" if "corrupted" in str(error) else f"{error!s:.200}"
    if "imagecodecs" in text:
        text = text.split(":")[0].rpartition(".")[2]
        text = f"its compression {text} needs the package imagecodecs; expected deflate or none"
    return error if isinstance(error, UserError) else UserError(f"{path} cannot be read as a volume: {text}")
