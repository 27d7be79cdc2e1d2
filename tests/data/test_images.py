import struct
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from nanodiff.data import images
from nanodiff.data.images import Images
from nanodiff.errors import UserError
from nanodiff.pixels import from_uint8, to_uint8

RAMP = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16  # 4096 levels over 0 .. 65520


def png16(path, array):
    """A 16-bit PNG of [H,W] or [H,W,2..4] written by hand: Pillow writes only the grey ones."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[1 if array.ndim == 2 else array.shape[2]]
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_16_bit_grey_keeps_its_levels_in_png_and_in_tiff_of_either_byte_order(tmp_path):
    png16(tmp_path / "a.png", RAMP)
    tifffile.imwrite(tmp_path / "little.tif", RAMP, byteorder="<")
    tifffile.imwrite(tmp_path / "big.tif", RAMP, byteorder=">")
    Image.fromarray(RAMP).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    expected = torch.from_numpy(RAMP.astype(np.float64) / 32767.5 - 1).float()
    for name in ("a.png", "little.tif", "big.tif", "lzw.tif"):
        x = images.load(tmp_path / name)
        assert x.shape == (1, 64, 64) and x.dtype == torch.float32
        assert len(x.unique()) == 4096 and bool((x.flatten().diff() > 0).all())
        assert (x[0] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4", "f8"])
def test_big_and_little_endian_copies_load_to_equal_tensors(tmp_path, dtype):
    rng = np.random.default_rng(0)
    array = rng.random((9, 7, 3)) if dtype[0] == "f" else rng.integers(0, 127, (9, 7, 3))
    for order in "<>":
        tifffile.imwrite(tmp_path / f"{ord(order)}.tif", array.astype(dtype), byteorder=order, photometric="rgb")
    little, big = images.load(tmp_path / "60.tif"), images.load(tmp_path / "62.tif")
    assert torch.equal(little, big) and little.shape == (3, 9, 7)
    low, high = {"u1": (0, 255), "u2": (0, 65535), "i2": (-32768, 32767)}.get(dtype, (0, 1))
    expected = (array.astype(dtype).astype(np.float64) - low) / (high - low) * 2 - 1
    assert np.abs(little.permute(1, 2, 0).numpy() - expected).max() < 1e-6


def test_16_bit_colour_tiff_keeps_its_levels_in_either_plane_layout(tmp_path):
    array = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=-1)
    tifffile.imwrite(tmp_path / "chunky.tif", array, photometric="rgb")
    planes = array.transpose(2, 0, 1).copy()
    tifffile.imwrite(tmp_path / "planes.tif", planes, photometric="rgb", planarconfig="separate")
    x = images.load(tmp_path / "chunky.tif")
    assert torch.equal(x, images.load(tmp_path / "planes.tif"))
    assert all(len(channel.unique()) == 4096 for channel in x)


def test_16_bit_colour_png_says_that_pillow_keeps_8_bits(tmp_path):
    png16(tmp_path / "a.png", np.stack([RAMP] * 3, axis=-1))
    with pytest.warns(UserWarning, match="16-bit colour PNG"):
        x = images.load(tmp_path / "a.png")
    assert len(x.unique()) == 256


def test_an_inverted_tiff_is_turned_back(tmp_path):
    for name, array in (("b", RAMP), ("c", (RAMP >> 8).astype(np.uint8))):
        tifffile.imwrite(tmp_path / f"{name}.tif", array.max() - array, photometric="minisblack")
        tifffile.imwrite(tmp_path / f"{name}w.tif", np.iinfo(array.dtype).max - array, photometric="miniswhite")
        tifffile.imwrite(tmp_path / f"{name}p.tif", array, photometric="minisblack")
        assert torch.equal(images.load(tmp_path / f"{name}w.tif"), images.load(tmp_path / f"{name}p.tif"))


@pytest.mark.parametrize("suffix", ["jpg", "tif", "png"])
def test_every_exif_orientation_is_shown_as_pillow_shows_it(tmp_path, suffix):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 10, 3), dtype=np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        picture.save(path, exif=exif)
        with Image.open(path) as stored:
            expected = np.asarray(ImageOps.exif_transpose(stored))
        x = images.load(path)
        assert x.shape == ((3, 10, 6) if orientation >= 5 else (3, 6, 10))
        assert np.array_equal(to_uint8(x).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_transparent_pixels_become_the_stated_background(tmp_path, suffix):
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[..., 0] = 255  # red everywhere, also where nobody sees it
    rgba[:2, :, 3] = 255
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(rgba).save(path, **({"lossless": True} if suffix == "webp" else {}))
    for background, expected in ((255, (1, 1, 1)), ((0, 255, 0), (-1, 1, -1)), (0, (-1, -1, -1))):
        x = images.load(path, background=background)
        assert x.shape == (3, 4, 4)
        assert torch.allclose(x[:, 3, 3], torch.tensor(expected).float(), atol=1e-6)
        assert torch.allclose(x[:, 0, 0], torch.tensor([1.0, -1, -1]), atol=1e-6)


def test_half_transparent_pixels_are_mixed_whether_or_not_colours_are_premultiplied(tmp_path):
    straight = np.full((2, 2, 4), (200, 100, 50, 128), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "s.tif", straight, photometric="rgb", extrasamples=["unassalpha"])
    tifffile.imwrite(tmp_path / "p.tif", np.full((2, 2, 4), (100, 50, 25, 128), dtype=np.uint8), photometric="rgb",
                     extrasamples=["assocalpha"])
    cover = 128 / 255
    expected = torch.tensor([200.0, 100, 50]) * cover + 255 * (1 - cover)
    for name in "sp":
        levels = (images.load(tmp_path / f"{name}.tif")[:, 0, 0] + 1) * 127.5
        assert (levels - expected).abs().max() < 0.5


def test_grey_with_alpha_palette_and_one_bit_pictures_are_read(tmp_path):
    grey = Image.fromarray(np.full((3, 3), 100, dtype=np.uint8))
    alpha = grey.copy()
    alpha.putalpha(Image.fromarray(np.zeros((3, 3), dtype=np.uint8)))
    alpha.save(tmp_path / "la.png")
    assert bool((images.load(tmp_path / "la.png", channels=1) > 0.999).all())
    grey.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "p.png")
    assert bool((to_uint8(images.load(tmp_path / "p.png")) == 100).all())
    Image.fromarray(np.eye(3, dtype=bool)).save(tmp_path / "1.png")
    assert torch.equal(images.load(tmp_path / "1.png")[0], torch.eye(3) * 2 - 1)


def test_a_stack_and_floats_of_unknown_range_are_refused_by_name(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((3, 8, 8), np.uint16), photometric="minisblack")
    with pytest.raises(UserError, match=r"stack.tif is a stack \[\[3, 8, 8\]\]"):
        images.load(tmp_path / "stack.tif")
    tifffile.imwrite(tmp_path / "f.tif", np.linspace(-3, 5, 16, dtype=np.float32).reshape(4, 4))
    with pytest.raises(UserError, match="f.tif holds floats from -3 to 5; expected a value_range"):
        images.load(tmp_path / "f.tif")
    x = images.load(tmp_path / "f.tif", value_range=(-3, 5))
    assert torch.allclose(x.flatten(), torch.linspace(-1, 1, 16), atol=1e-6)
    tifffile.imwrite(tmp_path / "nan.tif", np.full((4, 4), np.nan, np.float32))
    with pytest.raises(UserError, match="not finite"):
        images.load(tmp_path / "nan.tif", value_range=(0, 1))


def test_all_256_levels_survive_save_and_load_in_grey_and_colour(tmp_path):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    for pixels in (levels, torch.cat([levels, levels.flip(1), levels.mT])):
        x = from_uint8(pixels)
        assert x.min() == -1 and x.max() == 1
        for suffix in ("png", "tif", "bmp"):
            images.save(x, tmp_path / f"a.{suffix}")
            assert torch.equal(images.load(tmp_path / f"a.{suffix}"), x)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bmp", "a.png", "a.tif"]  # nothing unfinished is left


def test_16_bit_pictures_survive_save_and_load(tmp_path):
    png16(tmp_path / "a.png", RAMP)
    x = images.load(tmp_path / "a.png")
    images.save(x, tmp_path / "b.png", bits=16)
    images.save(x, tmp_path / "b.tif", bits=16)
    assert torch.equal(images.load(tmp_path / "b.png"), x) and torch.equal(images.load(tmp_path / "b.tif"), x)
    images.save(x, tmp_path / "c.png")
    assert (images.load(tmp_path / "c.png") - x).abs().max() <= 1 / 255  # half a level of 8 bits
    with pytest.raises(UserError, match="cannot hold 16 bits"):
        images.save(x.expand(3, -1, -1), tmp_path / "d.png", bits=16)


def test_rounding_goes_to_the_nearest_level_and_values_outside_are_cut_off(tmp_path):
    x = torch.tensor([-7.0, -1.0, -1 + 0.9 / 255, -1 + 1.1 / 255, 1.0, 1.5])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255]
    assert to_uint8(torch.tensor([1 / 255 - 1])).item() == 1  # exactly half a level goes up
    with pytest.raises(ValueError, match="not finite"):
        images.save(torch.full((1, 2, 2), float("nan")), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file(tmp_path):
    images.save(torch.zeros(1, 2, 2), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ValueError):
        images.save(torch.zeros(4, 2, 2), tmp_path / "a.png")
    with pytest.raises(ValueError):
        images.save(torch.zeros(1, 2, 2), tmp_path / "a.unknown")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and (tmp_path / "a.png").read_bytes() == before


def test_shrinking_a_thin_ring_equals_pillows_anti_aliased_result_within_one_level():
    y, x = np.mgrid[:128, :128] - 63.5
    ring = ((np.hypot(x, y) > 50) & (np.hypot(x, y) < 51.5)).astype(np.uint8) * 255
    # in Pillow's float mode: with 8 bits it rounds and cuts off between its two passes
    small = Image.fromarray(ring.astype(np.float32)).resize((32, 32), Image.Resampling.BICUBIC)
    expected = np.asarray(small).clip(0, 255)
    ours = to_uint8(images.resize(from_uint8(torch.from_numpy(ring)[None, None]), 32, 32))[0, 0].numpy()
    assert np.abs(ours - expected).max() <= 0.51 and ours.max() > 40


def test_grey_and_colour_are_exchanged_without_a_tint():
    grey = torch.rand(2, 1, 4, 4) * 2 - 1
    colour = images.in_channels(grey, 3)
    assert (colour.amax(1) - colour.amin(1)).max() == 0
    assert torch.allclose(images.in_channels(colour, 1), grey, atol=1e-6)
    with pytest.raises(UserError, match="channels is 2"):
        images.in_channels(grey, 2)


def test_pictures_in_memory_are_read_at_their_places_and_flipped_by_the_draw_alone():
    pixels = torch.randint(0, 256, (50, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index, draw = torch.tensor([7, 7, 3, 49]), torch.tensor([0, 1, 2, 3])
    assert torch.equal(Images(pixels).read(index, draw), pixels[index].float() / 127.5 - 1)
    data = Images(pixels, flip=True, seed=1)
    seven = torch.full((400,), 7)
    plain, flipped = Images(pixels).read(seven, torch.arange(400)), data.read(seven, torch.arange(400))
    mirrored = (flipped == plain.flip(-1)).flatten(1).all(1)
    assert bool((mirrored | (flipped == plain).flatten(1).all(1)).all()) and 150 < mirrored.sum() < 250
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    assert torch.equal(data.read(seven, shuffled), flipped[shuffled])
    both = Images(pixels, flip="both").read(seven, torch.arange(400))
    assert len(both.unique(dim=0)) == 4  # neither, either and both ways
    with pytest.raises(UserError, match="flip is 'yes'"):
        Images(pixels, flip="yes").read(index, draw)


def test_a_path_a_pillow_image_and_a_tensor_are_all_pictures_to_a_user(tmp_path):
    pixels = torch.randint(0, 256, (3, 5, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = from_uint8(pixels)[None]
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    image.save(tmp_path / "a.png")
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png", image, x, x[0]):
        picture = images.given(source)
        assert picture.dtype == torch.float32 and torch.equal(picture, x)
    assert images.given(torch.zeros(2, 4, 6, 6)).shape == (2, 4, 6, 6)  # latents, or several pictures
    grey = images.given(image.convert("L"))
    assert grey.shape == (1, 3, 5, 8) and (grey.amax(1) == grey.amin(1)).all()
    image.convert("L").save(tmp_path / "grey.png")
    assert torch.equal(images.given(tmp_path / "grey.png"), grey)
    with pytest.raises(UserError, match=r"the image has shape \[8, 8\]; expected \[B, 3, H, W\]"):
        images.given(torch.zeros(8, 8))
    with pytest.raises(UserError, match="missing.png cannot be read"):
        images.given(tmp_path / "missing.png")
    with pytest.raises(UserError, match="the image is a list; expected a path, a Pillow image or a tensor"):
        images.given([image])


def test_a_pillow_image_is_seen_as_its_file_is(tmp_path):
    rgba = np.zeros((4, 6, 4), dtype=np.uint8)
    rgba[..., 0], rgba[:2, :, 3] = 255, 255  # the lower half is transparent
    transparent = Image.fromarray(rgba)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(rgba[..., :3])
    transparent.save(tmp_path / "transparent.png")
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(RAMP).save(tmp_path / "deep.png")
    for name in ("transparent.png", "turned.png", "deep.png"):
        with Image.open(tmp_path / name) as opened:
            assert torch.equal(images.given(opened), images.given(tmp_path / name))


def test_white_is_1_in_a_mask_given_as_a_path_a_pillow_image_or_a_tensor(tmp_path):
    levels = np.array([[0, 100, 127, 128, 200, 255]] * 3, dtype=np.uint8)
    expected = torch.tensor([0.0, 0, 0, 1, 1, 1]).expand(1, 1, 3, 6)
    image = Image.fromarray(levels)
    image.save(tmp_path / "mask.png")
    numbers = torch.from_numpy(levels).float() / 255
    for mask in (tmp_path / "mask.png", str(tmp_path / "mask.png"), image, image.convert("RGB"),
                 numbers, numbers[None], numbers[None, None]):
        binary = images.given_mask(mask)
        assert binary.dtype == torch.float32 and torch.equal(binary, expected)
    batch = torch.stack([numbers, 1 - numbers])
    assert torch.equal(images.given_mask(batch[:, None]), (batch[:, None] >= 0.5).float())
    assert torch.equal(images.given_mask(numbers > 0.5), expected)
    with pytest.raises(UserError, match=r"the mask has shape \[6\]; expected \[H, W\] or \[B, 1, H, W\]"):
        images.given_mask(torch.zeros(6))
