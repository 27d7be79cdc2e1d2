"""Pictures as tensors: reading and writing one file, and a whole data set in memory.

A picture is float32 [C,H,W] in [-1, 1], C = 1 (grey) or 3 (colour): -1 is the darkest value its file can hold and 1
the brightest. 16-bit files keep all their levels, even where Pillow's own conversions would clip them at 255.
"""

import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from nanodiff.errors import UserError
from nanodiff.pixels import from_uint8, to_uint8
from nanodiff.rng import uniform

LUMA = (0.299, 0.587, 0.114)  # grey of red, green, blue: ITU-R BT.601, as in Pillow and JPEG


class Images:
    """A data set in memory, uint8 [N,C,H,W]. A batch is one index operation, without a Python call per picture.

    flip: False, True (left-right) or "both" (upside down too), decided for each draw by (seed, draw).
    """

    def __init__(self, pixels, labels=None, classes=(), captions=None, flip=False, seed=0):
        if pixels.dtype != torch.uint8 or pixels.ndim != 4:
            raise ValueError(f"pixels must be uint8 [N,C,H,W], not {pixels.dtype} {list(pixels.shape)}")
        self.pixels = pixels
        self.shape = tuple(pixels.shape[1:])
        self.labels = labels
        self.classes = list(classes)
        self.captions = captions
        self.flip, self.seed = flip, seed
        self.in_memory, self.draws = True, bool(flip)  # only flips are random

    def __len__(self):
        return len(self.pixels)

    def read(self, index, draw):
        """float32 [B,C,H,W]: the pictures at `index` int64 [B]. `draw` int64 [B] decides the flips (None: no flip)."""
        return flip_randomly(from_uint8(self.pixels.index_select(0, index)), self.flip, self.seed, draw)


def some_of(data, index):
    """The pictures at `index` [n] of a data set as Images, with their labels and captions."""
    pixels = to_uint8(data.read(index, index))
    labels = None if data.labels is None else data.labels[index]
    captions = None if data.captions is None else [data.captions[i] for i in index.tolist()]
    return Images(pixels, labels, data.classes, captions)


def spread(pictures, most):
    """Indices int64 [n] of at most `most` pictures of a data set, evenly spaced."""
    return torch.linspace(0, len(pictures) - 1, min(most, len(pictures))).round().long()


def flip_randomly(x, flip, seed, draw):
    """x [B,C,H,W], each picture mirrored left-right with probability 1/2; flip="both": also top-bottom.

    The flips follow from (seed, draw int64 [B]). UserError for another `flip`.
    """
    if flip not in (False, True, "both"):
        raise UserError(f"flip is {flip!r}; expected False, True or 'both'")
    axes = {False: (), True: (-1,), "both": (-1, -2)}[flip]
    for column, axis in enumerate(axes):
        mirrored = uniform(seed, draw, column) < 0.5  # [B]
        x = torch.where(mirrored[:, None, None, None], x.flip(axis), x)
    return x


def resize(x, height, width):
    """x [B,C,H,W] in [-1, 1] at another size: cubic interpolation, with anti-aliasing where it shrinks."""
    if x.shape[-2:] == (height, width):
        return x
    x = torch.nn.functional.interpolate(x, (height, width), mode="bicubic", antialias=True)
    return x.clamp(-1, 1)  # cubic weights overshoot at sharp edges


def in_channels(x, channels):
    """x [B,C,H,W] with 1 or 3 channels: grey is repeated, colour becomes its luma; None leaves x unchanged."""
    if channels not in (None, 1, 3):
        raise UserError(f"channels is {channels!r}; expected 1 (grey) or 3 (colour)")
    if channels == 3 and x.shape[1] == 1:
        return x.expand(-1, 3, -1, -1)
    if channels == 1 and x.shape[1] == 3:
        return (x * x.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True).clamp(-1, 1)
    return x


def convert(pixels, size, channels):
    """uint8 [N,C,H,W] at another size (number, (height, width) or None) and number of channels (1, 3 or None)."""
    height, width = pair(size) or pixels.shape[-2:]
    if (height, width) == pixels.shape[-2:] and not channels:
        return pixels
    chunks = [to_uint8(in_channels(resize(from_uint8(chunk), height, width), channels)) for chunk in pixels.split(4096)]
    return torch.cat(chunks)


def pair(size):
    """A size as (height, width): a number is a square, None stays None. UserError for an empty size."""
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UserError(f"a picture of {height} x {width} pixels is empty; expected a size of at least 1")
    return int(height), int(width)


# --- one file -----------------------------------------------------------------------------------------------------

def load(path, channels=None, background=255, value_range=None):
    """The picture in a file (or a Pillow image) as float32 [C,H,W] in [-1, 1], rotated by its EXIF orientation.

    channels     1, 3 or None (as in the file)
    background   colour behind transparent pixels: a grey level or (red, green, blue), 0..255
    value_range  (low, high): the file's values that become -1 and 1, such as (0, 4095) for a 12-bit camera; default:
                 the whole range of the file's type (0..255, 0..65535; 0..1 for floats). Values outside are clipped.

    UserError names the file when it is broken, holds a stack, or holds floats outside 0..1 without a value_range.
    """
    try:
        if isinstance(path, Image.Image):
            decoded = _pillow_array(path)
        elif Path(path).suffix.lower() in (".tif", ".tiff"):
            decoded = _open_tiff(path)
        else:
            decoded = _open_pillow(path)
        array, limits, alpha, orientation = decoded
        if array.size == 0:
            raise UserError(f"has no pixels ({list(array.shape)})")
        array = _orient(array if array.ndim == 3 else array[:, :, None], orientation)  # [H,W,samples]
        x, alpha = _scale(array, limits, alpha, value_range)
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} cannot be read as a picture: Pillow knows no format that begins like it") from None
    except Exception as error:  # decoders raise all kinds of exceptions on broken files
        raise UserError(f"{path} cannot be read as a picture: {str(error) or type(error).__name__}") from error
    x = torch.from_numpy(x).permute(2, 0, 1)[None]  # [1,C,H,W]
    if alpha is not None:
        backdrop = torch.tensor(background, dtype=torch.float32).div(127.5).sub(1).reshape(-1, 1, 1)  # [1 or 3,1,1]
        opacity = torch.from_numpy(alpha)
        x = x * opacity + backdrop * (1 - opacity)
    return in_channels(x, channels)[0].contiguous()


def given(image):
    """[B,3,H,W] in [-1, 1] from a user's picture: a path, a Pillow image, or a tensor [C,H,W] or [B,C,H,W]."""
    if isinstance(image, torch.Tensor):
        if image.ndim not in (3, 4):
            raise UserError(f"the image has shape {list(image.shape)}; expected [B, 3, H, W]")
        return image if image.ndim == 4 else image[None]
    if not isinstance(image, (str, os.PathLike, Image.Image)):
        raise UserError(f"the image is a {type(image).__name__}; expected a path, a Pillow image or a tensor")
    return load(image, channels=3)[None]


def given_mask(mask):
    """[B,1,H,W] of 0 and 1 (white) from a path, a Pillow image or a tensor in [0, 1] of any leading dimensions."""
    if isinstance(mask, torch.Tensor):
        if mask.ndim < 2:
            raise UserError(f"the mask has shape {list(mask.shape)}; expected [H, W] or [B, 1, H, W]")
        return (mask.reshape(-1, 1, *mask.shape[-2:]) >= 0.5).float()
    return (given(mask).mean(1, keepdim=True) >= 0).float()


def _open_pillow(path):
    """(array [H,W] or [H,W,samples], (lowest, highest) value of its type, kind of alpha or None, EXIF orientation).

    The kind of alpha is "straight" or "premultiplied".
    """
    with Image.open(path) as image:
        if image.format == "PNG" and image.mode in ("RGB", "RGBA") and "16B" in str(image.tile):
            warnings.warn("Pillow keeps the upper 8 bits of 16-bit colour PNG files; TIFF files keep all 16")
        return _pillow_array(image)


def _pillow_array(image):
    """The same as `_open_pillow`, of a Pillow image."""
    orientation = image.getexif().get(0x0112, 1)
    if image.mode.startswith("I"):
        return np.asarray(image), (0, 65535), None, orientation
    if image.mode == "F":
        return np.asarray(image), (0, 1), None, orientation
    if image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGB")
    return np.asarray(image), (0, 255), "straight" if image.mode == "RGBA" else None, orientation


def _open_tiff(path):
    """The same as `_open_pillow`, by tifffile, which reads 16-bit and float samples. Pillow reads what it cannot."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        page, series = file.pages[0], file.series
        if len(series) != 1 or series[0].axes not in ("YX", "YXS", "SYX"):
            raise UserError(f"is a stack {[list(stack.shape) for stack in series]}; expected one picture")
        if page.photometric.name not in ("MINISBLACK", "MINISWHITE", "RGB"):
            return _open_pillow(path)  # palettes, CMYK, YCbCr: 8 bits
        try:
            array = series[0].asarray()
        except ValueError as error:
            exact_in_pillow = page.dtype == "u1" or (page.dtype in ("u2", "f4") and page.samplesperpixel == 1)
            if "imagecodecs" not in str(error) or not exact_in_pillow:
                raise
            return _open_pillow(path)  # LZW and the like
        if series[0].axes == "SYX":
            array = array.transpose(1, 2, 0)
        if page.dtype.kind == "u":
            limits = (0, 2**int(np.max(page.bitspersample)) - 1)
        else:
            limits = (np.iinfo(page.dtype).min, np.iinfo(page.dtype).max) if page.dtype.kind == "i" else (0, 1)
        colours = 3 if page.photometric.name == "RGB" else 1
        samples = array.shape[2] if array.ndim == 3 else 1
        white_is_zero = page.photometric.name == "MINISWHITE"
        if samples not in (colours, colours + 1) or (white_is_zero and (samples > 1 or page.dtype.kind == "i")):
            raise UserError(f"has {samples} samples a pixel; expected grey or colour, with or without alpha")
        if white_is_zero:
            array = ~array if array.dtype == bool else limits[1] - array
        premultiplied = 1 in [int(kind) for kind in page.extrasamples]
        alpha = None if samples == colours else "premultiplied" if premultiplied else "straight"
        orientation = page.tags[274].value if 274 in page.tags else 1
        return array, limits, alpha, int(orientation)


def _orient(array, orientation):
    """The array [H,W,S] flipped and transposed by its EXIF orientation 1..8 (EXIF 2.3, tag 274)."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


def _scale(array, limits, alpha, value_range):
    """(float32 [H,W,1 or 3] in [-1, 1], opacity [H,W] in [0, 1] or None) of raw values [H,W,S]."""
    low, high = value_range or limits
    if not high > low:
        raise UserError(f"cannot be scaled by value_range {value_range}; expected the second number to be the larger")
    x = array.astype(np.float32 if array.dtype.itemsize <= 2 else np.float64)
    if array.dtype.kind == "f" and not np.isfinite(x).all():
        raise UserError("holds values that are not finite numbers")
    if array.dtype.kind == "f" and value_range is None and (x.min() < 0 or x.max() > 1):
        raise UserError(f"holds floats from {x.min():g} to {x.max():g}; expected a value_range, the values that become"
                        " black and white")
    opacity = None
    if alpha is not None:
        opacity = ((x[..., -1] - limits[0]) / (limits[1] - limits[0])).astype(np.float32)
        x = x[..., :-1]
        if alpha == "premultiplied":  # divide the colours by alpha, so that `load` blends both kinds the same way
            x = x / np.maximum(opacity, 1e-6)[..., None]
    x = (x - low) / ((high - low) / 2) - 1
    return np.clip(x, -1, 1).astype(np.float32), opacity


def save(x, path, bits=8):
    """Writes one picture [C,H,W] in [-1, 1] in the format of its suffix, atomically.

    bits=16 keeps 65,536 levels: grey in .png, grey or colour in .tif. ValueError when x holds a NaN or infinity.
    """
    if x.ndim != 3 or x.shape[0] not in (1, 3):
        raise ValueError(f"one picture [1 or 3,H,W] can be saved, not {list(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError(f"the picture for {path} holds values that are not finite numbers")
    path = Path(path)
    tiff = path.suffix.lower() in (".tif", ".tiff")
    if bits == 16 and not tiff and not (x.shape[0] == 1 and path.suffix.lower() == ".png"):
        raise UserError(f"{path} cannot hold 16 bits; expected .tif, or .png for grey")
    x = x.detach().cpu().permute(1, 2, 0)  # [H,W,C]
    if bits == 8:
        array = to_uint8(x).numpy()
    else:
        array = np.clip(np.floor((x.double().numpy() + 1) * 32767.5 + 0.5), 0, 65535).astype(np.uint16)
    array = np.ascontiguousarray(array[:, :, 0] if array.shape[2] == 1 else array)
    handle, unfinished = tempfile.mkstemp(suffix=path.suffix, prefix=".", dir=path.parent)
    os.close(handle)
    try:
        if bits == 16 and tiff:
            import tifffile
            tifffile.imwrite(unfinished, array, photometric="rgb" if array.ndim == 3 else "minisblack")
        else:
            Image.fromarray(array).save(unfinished)
        os.chmod(unfinished, 0o644)  # mkstemp's files are private
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
