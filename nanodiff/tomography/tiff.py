"""Where a volume's numbers come from: TIFF files of many kinds, and folders of slices. Nothing is read but what is asked for.

Whatever is wrong with a file is found here, when it is opened, and said in one sentence.
"""

import logging
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from nanodiff.errors import UserError, check

WHOLE = 256 << 20  # bytes that may be decoded at once, where one compressed page has all slices
MICROMETRES = {"micron": 1, "microns": 1, "um": 1, "µm": 1, "mm": 1e3, "cm": 1e4, "nm": 1e-3, "inch": 25400,
               2: 25400, 3: 1e4, 4: 1e3, 5: 1}  # in ImageJ's units, and by TIFF's ResolutionUnit


class Voxels(NamedTuple):
    """Where a volume's numbers come from: an array (mapped, or in memory), or a function that reads one page."""

    shape: tuple  # depth, height, width
    dtype: np.dtype  # in this machine's byte order
    array: np.ndarray = None
    page: object = None  # i -> [height, width], where there is no array
    why: str = ""  # it cannot be mapped
    voxel: tuple = None  # micrometres along depth, height, width, where the file knows


def by(shape):
    """(702, 970) as '702x970'."""
    return "x".join(str(side) for side in shape)


def open_tiff(path, series=None):
    """The voxels of a multi-page TIFF -> Voxels; UserError when it is broken, cut short, in colour or no volume."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it would say on stderr is found and told here
    try:
        with tifffile.TiffFile(path) as file:
            check_pages(path, file)
            one = choose(path, file.series, series)
            shape, kind = (math.prod(one.shape[:-2]), *one.shape[-2:]), np.dtype(one.dtype).newbyteorder("=")
            pages = file.pages[one.keyframe.index:][:shape[0]] if len(file.pages) > 1 else [file.pages[0]]
            size, voxel = shape[1] * shape[2] * kind.itemsize, voxel_size(file)
            places = [page.dataoffsets[0] for page in pages if page.is_final]
            step = places[1] - places[0] if len(places) > 1 else size
            if len(places) == len(pages) and all(b - a == step > 0 for a, b in zip(places, places[1:])):
                end = places[0] + step * (shape[0] - 1) + size
                check(end <= file.filehandle.size,
                      f"{path} is cut short: its {shape[0]} slices need {end:,} bytes of {file.filehandle.size:,}")
                array = np.ndarray(shape, kind.newbyteorder(file.byteorder), np.memmap(path, np.uint8, "r"), places[0],
                                   (step, shape[2] * kind.itemsize, kind.itemsize))
                return Voxels(shape, kind, array, voxel=voxel)
            if len(pages) == 1:  # three planes, or tiles with a depth
                check(math.prod(shape) * kind.itemsize <= WHOLE,
                      f"{path} has all its slices in one compressed page; expected a page for each slice")
                return Voxels(shape, kind, pages[0].asarray(maxworkers=1).reshape(shape), voxel=voxel)
            pages[0].asarray(maxworkers=1)  # whether it can be decoded at all
            why = "is compressed" if pages[0].compression != 1 else "is tiled" if pages[0].is_tiled else "is packed"

            def page(i):
                file.filehandle.open()
                with file.filehandle:  # open for the while
                    return pages[i].asarray(maxworkers=1)
            return Voxels(shape, kind, None, page, why, voxel)
    except Exception as error:  # decoders raise nearly everything there is
        raise broken(path, error) from None


def open_folder(path):
    """The voxels of a folder with one grey TIFF or PNG for each slice, in natural order -> Voxels."""
    import tifffile

    files = [one for one in Path(path).iterdir() if re.search(r"^[^.].*\.(tiff?|png)$", one.name, re.IGNORECASE)]
    files.sort(key=lambda one: [(text, int(n or 0)) for text, n in re.findall(r"(\D*)(\d*)", one.name.lower())])
    check(len(files) > 1, f"{path} holds {len(files)} slices; expected a volume of several .tif, .tiff or .png files")
    shape, kind, voxel = probe(files[0])
    for file in files[1:]:
        other = probe(file)[:2]
        check(other == (shape, kind), f"{file} is {by(other[0])} ({other[1]}) where {files[0].name} is {by(shape)} "
              f"({kind}); expected slices of one size")
    read = {".png": Image.open}  # others are TIFF
    return Voxels((len(files), *shape), kind, None, lambda i: np.asarray(read.get(
        files[i].suffix.lower(), tifffile.imread)(files[i])), "is a folder of slices", voxel)


def check_pages(path, file):
    """UserError unless all pages that a TIFF promises are there, whole and of one size."""
    pages, tiff, raw = list(file.pages), file.tiff, file.filehandle
    raw.seek(pages[-1].offset)
    raw.seek(int.from_bytes(raw.read(tiff.tagnosize), "little" if file.byteorder == "<" else "big") * tiff.tagsize, 1)
    check(raw.read(tiff.offsetsize) == bytes(tiff.offsetsize), f"{path} is cut short: the page after its first "
          f"{len(pages)} is not in its {raw.size:,} bytes")
    promised, shaped = (file.imagej_metadata or {}).get("images", len(pages)), file.shaped_metadata or ()
    promised = 0 if file.is_shaped else promised
    for one in shaped if file.is_shaped else ():
        promised += math.prod(one["shape"]) // math.prod(pages[min(promised, len(pages) - 1)].shape)
    check(len(pages) in (1, promised), f"{path} promises {promised} slices but holds {len(pages)}; expected as many")
    for i, page in enumerate(pages):
        check(len(shaped) > 1 or (page.shape, page.dtype) == (pages[0].shape, pages[0].dtype), f"page {i} of {path} is "
              f"{by(page.shape)} {page.dtype} where page 0 is {by(pages[0].shape)} {pages[0].dtype}; expected one size")
        end = max((a + b for a, b in zip(page.dataoffsets, page.databytecounts)), default=0)
        check(end <= raw.size, f"{path} is cut short: its page {i} ends at byte {end:,} of {raw.size:,}")


def choose(path, found, series):
    """The series of a TIFF that is meant, if it is a grey volume."""
    check(len(found) == 1 or series is not None, f"{path} holds {len(found)} series, of "
          f"{' and '.join(by(one.shape) for one in found)}; expected one, or the number of one from 0 (--series)")
    check((series or 0) in range(len(found)), f"{path} has no series {series}; expected 0 to {len(found) - 1}")
    one = found[series or 0]
    # Three planes in one page are three slices: so tifffile writes (3, H, W), whether meant as colours or not.
    for wrong, what in (("S" in one.axes and one.axes != "SYX", "is in colour"), (one.dtype.kind not in "buif",
                        f"holds {one.dtype}"), (math.prod(one.shape[:-2]) < 2, "holds one page"),
                        (sum(n > 1 for n in one.shape[:-2]) > 1, f"has {len(one.shape)} dimensions")):
        check(not wrong, f"{path} {what} ({by(one.shape)}, axes {one.axes}); expected grey slices, several, of numbers "
              "[depth, height, width]")
    if one.keyframe.photometric.name in ("MINISWHITE", "PALETTE") and one.dtype.kind != "b":
        warnings.warn(f"{path} asks to be shown inverted or in a palette's colours; its numbers are taken as they are")
    return one


def voxel_size(file):
    """Micrometres along depth, height and width from a TIFF's tags, or None: its resolution in ImageJ's unit, or per
    inch or centimetre; the depth is ImageJ's spacing, else the width. 72 and 96 per inch are screens, not scanners."""
    tags, told = file.pages[0].tags, file.imagej_metadata or {}
    down, right = (tags[number].value if number in tags else (0, 1) for number in (283, 282))
    down, right = (a / b if b else 0 for a, b in (down, right))
    unit = str(told.get("unit", "")).lower().replace("\\u00b5", "µ").replace("μ", "µ")
    if not file.is_imagej and 296 in tags and not (tags[296].value == 2 and right in (72, 96)):
        unit = int(tags[296].value)
    length = MICROMETRES.get(unit)
    if not (length and down > 0 and right > 0):
        return None
    return abs(told.get("spacing", 0)) * length or length / right, length / down, length / right


def probe(path):
    """(height, width), dtype and voxel size of a file with one slice, from its first bytes and its end."""
    import tifffile

    try:
        if path.suffix.lower() == ".png":
            with Image.open(path) as image, open(path, "rb") as file:
                kind = {"1": "?", "L": "u1", "I;16": "u2", "I;16B": "u2", "I": "u2"}.get(image.mode)
                check(kind, f"{path} is in colour ({image.mode}); expected grey slices")
                check(b"IEND" in file.read()[-12:], f"{path} is cut short")
                return image.size[::-1], np.dtype(kind), None
        with tifffile.TiffFile(path) as file:
            check_pages(path, file)
            page = file.pages[0]
            check(len(file.pages) == 1 and page.ndim == 2,
                  f"{path} is {len(file.pages)} x {by(page.shape)}; expected one grey slice, in a folder of slices")
            return page.shape, page.dtype.newbyteorder("="), voxel_size(file)
    except Exception as error:
        raise broken(path, error) from None


def broken(path, error):
    """The one sentence about a file that cannot be read because of `error`."""
    text = "it is cut short or damaged" if "corrupted" in str(error) else f"{error!s:.200}"
    if "imagecodecs" in text:
        text = text.split(":")[0].rpartition(".")[2]
        text = f"its compression {text} needs the package imagecodecs; expected deflate or none"
    return error if isinstance(error, UserError) else UserError(f"{path} cannot be read as a volume: {text}")
