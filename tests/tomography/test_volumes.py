import os
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
from PIL import Image
from tiff_files import SHAPE, numbers, open_quietly, write

from nanodiff.errors import UserError
from nanodiff.tomography.volumes import AXES, Volume


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and ". " not in text.replace(".tif ", "")
    return text


# --- every kind of file gives the full read -----------------------------------------------------------------------

KINDS = {
    "contiguous": ("uint16", {}), "pages": ("uint16", {"metadata": None}), "uint8": ("uint8", {}),
    "int8": ("int8", {}), "int16": ("int16", {}), "big-endian": ("uint16", {"byteorder": ">"}),
    "float32": ("float32", {}), "float64 big-endian": ("float64", {"byteorder": ">"}),
    "BigTIFF": ("uint16", {"bigtiff": True}),
    "ImageJ": ("uint16", {"imagej": True}), "one directory": ("uint16", {"truncate": True}),
    "strips": ("uint16", {"rowsperstrip": 7}), "deflate": ("uint16", {"compression": "zlib"}),
    "deflate, predictor, big-endian": ("uint16", {"compression": "zlib", "predictor": True, "byteorder": ">"}),
    "tiled": ("uint16", {"tile": (16, 16)}), "tiled in depth": ("uint16", {"tile": (16, 16, 16)}),
    "tiled, deflate, float": ("float32", {"tile": (16, 16), "compression": "zlib"}),
}
UNMAPPED = ("deflate", "tiled")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tiff_gives_the_full_read_along_every_axis_with_any_workers(tmp_path, kind):
    dtype, options = KINDS[kind]
    v = numbers(dtype)
    volume = open_quietly(write(tmp_path / "dry.tif", v, **options))
    assert volume.shape == SHAPE and volume.dtype == v.dtype and volume.counts() == dict(zip(AXES, SHAPE))
    assert volume.mapped is not (kind.split(",")[0] in UNMAPPED)
    for along, axis in enumerate(AXES):
        full = np.moveaxis(v, along, 0)
        image = volume.slice(axis, 5)
        assert image.dtype == v.dtype and image.dtype.isnative and image.flags.c_contiguous
        for block in (1, 5 * v[0].nbytes, 1 << 30):
            assert np.array_equal(np.stack([s.copy() for s in volume.slices(axis, block_bytes=block)]), full)
        assert np.array_equal(np.stack(list(volume.slices(axis, 3, 11))), full[3:11])
        for workers in (1, 4):
            fresh = open_quietly(tmp_path / "dry.tif")
            with ThreadPoolExecutor(workers) as pool:
                slices = list(pool.map(lambda i: fresh.slice(axis, i), range(len(full))))
            assert np.array_equal(np.stack(slices), full)


def test_pages_at_even_distances_are_mapped_although_directories_lie_between_them(tmp_path):
    v = numbers()
    with tifffile.TiffWriter(tmp_path / "dry.tif") as file:
        for page in v:
            file.write(page, contiguous=False, metadata=None)
    volume = Volume(tmp_path / "dry.tif")
    assert volume.mapped and np.array_equal(np.stack(list(volume.slices("weft"))), np.moveaxis(v, 2, 0))


def test_what_cannot_be_mapped_is_announced_in_one_line_and_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    write(tmp_path / "dry.tif", numbers(), compression="zlib")
    with pytest.warns(UserWarning, match="is compressed.*cannot be mapped.*unpacked into .*tmp") as warned:
        volume = Volume(tmp_path / "dry.tif")
    assert len(warned) == 1
    volume.slice("weft", 3)
    assert not list((tmp_path / "tmp").iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Volume(write(tmp_path / "plain-dry.tif", numbers()))  # nothing to announce


def test_an_imagej_stack_above_4_gb_has_one_directory_and_all_its_slices(tmp_path):
    shape = (1200, 1400, 1400)  # 4.7 GB, of which the disk holds nothing
    with pytest.warns(UserWarning, match="truncating ImageJ"):
        tifffile.imwrite(tmp_path / "dry.tif", shape=shape, dtype="uint16", imagej=True)
    with tifffile.TiffFile(tmp_path / "dry.tif") as file:
        assert len(file.pages) == 1
        start = file.pages[0].dataoffsets[0]
    with open(tmp_path / "dry.tif", "r+b") as file:
        file.seek(start + 2 * (1199 * 1400 * 1400 + 7 * 1400 + 9))
        file.write(struct.pack("<H", 4321))
    volume = Volume(tmp_path / "dry.tif")
    assert volume.shape == shape and volume.mapped
    assert volume.slice("thickness", 1199)[7, 9] == 4321
    assert Volume(tmp_path / "dry.tif", region="1190:,:,:").slice("warp", 7)[9, 9] == 4321
    assert os.stat(tmp_path / "dry.tif").st_blocks * 512 < 1e7


@pytest.mark.parametrize("slices", [3, 4])
@pytest.mark.parametrize("options", [{}, {"imagej": True}, {"metadata": None, "photometric": "minisblack"},
                                     {"photometric": "rgb", "planarconfig": "separate", "compression": "zlib"}])
def test_a_stack_of_three_or_four_slices_is_grey(tmp_path, slices, options):
    v = numbers(shape=(slices, 30, 40))
    volume = open_quietly(write(tmp_path / "dry.tif", v, **options))
    assert volume.shape == v.shape
    for along, axis in enumerate(AXES):
        assert np.array_equal(np.stack(list(volume.slices(axis))), np.moveaxis(v, along, 0))


@pytest.mark.parametrize("suffix", ["tif", "png"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_folder_of_slices_is_a_volume_in_natural_order(tmp_path, suffix, dtype):
    v = numbers(dtype, (12, 30, 40))
    folder = tmp_path / "part-injected"
    folder.mkdir()
    for i, page in enumerate(v):
        name = folder / f"slice{i + 1}.{suffix.upper() if i == 4 else suffix}"
        tifffile.imwrite(name, page) if suffix == "tif" else Image.fromarray(page).save(name, "PNG")
    (folder / "notes.txt").write_text("not a slice")
    volume = open_quietly(folder, None)
    assert volume.state == "injected" and volume.dtype == dtype and not volume.mapped
    for along, axis in enumerate(AXES):
        assert np.array_equal(np.stack(list(volume.slices(axis))), np.moveaxis(v, along, 0))


def test_one_of_two_series_is_taken_when_it_is_named(tmp_path):
    a, b = numbers(), numbers(shape=(10, 20, 16), seed=1)
    with tifffile.TiffWriter(tmp_path / "dry.tif") as file:
        file.write(a)
        file.write(b)
    with pytest.raises(UserError, match="2 series, of 24x30x40 and 10x20x16.*--series") as error:
        Volume(tmp_path / "dry.tif")
    one_sentence(error)
    for series, v in enumerate((a, b)):
        volume = Volume(tmp_path / "dry.tif", series=series)
        assert np.array_equal(np.stack(list(volume.slices("warp"))), v.swapaxes(0, 1))
    with pytest.raises(UserError, match="no series 2"):
        Volume(tmp_path / "dry.tif", series=2)


# --- files that are refused ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["contiguous", "pages", "big-endian", "BigTIFF", "ImageJ", "deflate", "tiled",
                                  "one directory"])
def test_a_file_cut_short_is_found_when_it_is_open_quietly(tmp_path, kind):
    dtype, options = KINDS[kind]
    whole = write(tmp_path / "dry.tif", numbers(dtype), **options).read_bytes()
    for part in (0, 5, 100, 0.01, 0.3, 0.7, 0.95, 0.99, 0.9995):
        (tmp_path / "dry.tif").write_bytes(whole[:part if isinstance(part, int) else int(part * len(whole))])
        with pytest.raises(UserError, match="dry.tif (cannot be read|is cut short)") as error:
            Volume(tmp_path / "dry.tif")
        one_sentence(error)


@pytest.mark.parametrize("description", ['{"shape": [24, 30, 40]}', "ImageJ=1.11a\nimages=24\nslices=24\n"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_metadata_that_promise_more_slices_than_there_are_pages_are_refused_with_both_numbers(tmp_path, description,
                                                                                          compression):
    write(tmp_path / "dry.tif", numbers()[:16], metadata=None, description=description, compression=compression)
    with pytest.raises(UserError, match="promises 24 slices but holds 16") as error:
        Volume(tmp_path / "dry.tif")
    one_sentence(error)


def test_a_page_of_another_size_or_type_is_named_wherever_it_is(tmp_path):
    v = numbers()
    for odd, message in ((lambda page: page[:20], "page 12 of .*dry.tif is 20x40 uint16 where page 0 is 30x40 uint16"),
                         (lambda page: page.astype("f4"), "page 12 .*30x40 float32 where page 0 is 30x40 uint16")):
        with tifffile.TiffWriter(tmp_path / "dry.tif") as file:
            for i, page in enumerate(v):
                file.write(odd(page) if i == 12 else page, metadata=None)
        with pytest.raises(UserError, match=message) as error:
            Volume(tmp_path / "dry.tif")
        one_sentence(error)


def test_colour_single_pages_and_more_dimensions_are_refused(tmp_path):
    rgb = numbers("uint8", (5, 30, 40, 3))
    for v, options, message in ((rgb, {"photometric": "rgb"}, "is in colour"),
                                (rgb[0], {"photometric": "rgb"}, "is in colour"),
                                (numbers()[0], {}, "holds one page"), (numbers()[:1], {}, "holds one page"),
                                (numbers(shape=(4, 6, 30, 40)), {}, "has 4 dimensions"),
                                (numbers().astype("complex64"), {}, "holds complex64")):
        with pytest.raises(UserError, match=f"dry.tif {message}") as error:
            Volume(write(tmp_path / "dry.tif", v, **options))
        one_sentence(error)


def test_a_file_that_needs_imagecodecs_says_so(tmp_path):
    path = write(tmp_path / "dry.tif", numbers(), compression="zlib")
    with tifffile.TiffFile(path) as file:
        places = [page.tags["Compression"].offset for page in file.pages]
    raw = bytearray(path.read_bytes())
    for place in places:
        raw[place + 8:place + 10] = struct.pack("<H", 5)  # as if it were LZW
    path.write_bytes(raw)
    try:
        import imagecodecs  # noqa: F401
        expected = "cannot be read as a volume"
    except ImportError:
        expected = "compression LZW needs the package imagecodecs"
    with pytest.raises(UserError, match=expected) as error:
        Volume(path)
    one_sentence(error)


def test_a_damaged_page_is_named_when_it_is_met(tmp_path):
    path = write(tmp_path / "dry.tif", numbers(), compression="zlib")
    with tifffile.TiffFile(path) as file:
        place = file.pages[17].dataoffsets[0]
    raw = bytearray(path.read_bytes())
    raw[place:place + 40] = bytes(40)
    path.write_bytes(raw)
    volume = open_quietly(path)
    assert volume.slice("thickness", 16).shape == (30, 40)
    for axis, i in (("thickness", 17), ("weft", 0)):
        with pytest.raises(UserError, match="slice 17 of .*dry.tif cannot be decoded"):
            volume.slice(axis, i)


@pytest.mark.slow
def test_folders_of_slices_that_are_no_volume_are_refused(tmp_path):
    with pytest.raises(UserError, match="holds 0 slices"):
        Volume(tmp_path, "dry")
    page = numbers("uint8")[0]
    Image.fromarray(page).save(tmp_path / "a1.png")
    with pytest.raises(UserError, match="holds 1 slice"):
        Volume(tmp_path, "dry")
    for name, save, message in (
            ("a2.png", lambda p: Image.fromarray(page[:20]).save(p), "a2.png is 20x40 .uint8. where a1.png is 30x40"),
            ("a2.png", lambda p: Image.fromarray(np.stack([page] * 3, 2)).save(p), "a2.png is in colour"),
            ("a2.tif", lambda p: write(p, numbers("uint8")), "a2.tif is 24 x 30x40; expected one grey slice"),
            ("a2.tif", lambda p: p.write_bytes(b"no tiff"), "a2.tif cannot be read"),
            ("a2.png", lambda p: p.write_bytes((tmp_path / "a1.png").read_bytes()[:-20]), "a2.png is cut short"),
            ("a2.png", lambda p: p.write_bytes(b"no png"), "a2.png cannot be read")):
        save(tmp_path / name)
        with pytest.raises(UserError, match=message) as error:
            Volume(tmp_path, "dry")
        one_sentence(error)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_voxels_that_are_not_finite_are_found_with_their_place(tmp_path, bad):
    v = numbers("float32")
    v[13, 7, 29] = bad
    volume = Volume(write(tmp_path / "dry.tif", v))
    with pytest.raises(UserError, match=f"holds {bad} in thickness slice 13, row 7, column 29") as error:
        volume.grey
    one_sentence(error)
    with pytest.raises(UserError, match="weft slice 29, row 13, column 7"):
        list(volume.slices("weft"))
    assert Volume(tmp_path / "dry.tif", region=":,:,:29").grey  # without them all is well


def test_a_missing_file_and_wrong_arguments_are_answered_with_what_is_right(tmp_path):
    path = write(tmp_path / "dry-part.tif", numbers())
    with pytest.raises(UserError, match="nearest: dry-part.tif"):
        Volume(tmp_path / "dry-prat.tif")
    for options, message in (({"state": "dri"}, 'state "dri" is unknown.*nearest: dry'),
                             ({"voxel": -1}, r"voxel size of .* is \(-1.0"),
                             ({"region": "0:99,:,:"}, "does not lie in .*24x30x40"), ({"region": "1,2"}, "is no box"),
                             ({"region": "5:5,:,:"}, "does not lie in"), ({"value_range": (4, 4)}, "value range"),
                             ({"captions": "{axes}"}, "caption rule"),
                             ({"mask": numbers()[:, :, 1:]}, "the mask .*24x30x39 voxels .*24x30x40")):
        with pytest.raises(UserError, match=message) as error:
            Volume(path, **options)
        one_sentence(error)
    volume = Volume(path)
    for call, message in ((lambda: volume.slice("wrap", 0), 'axis "wrap".*nearest: warp'),
                          (lambda: volume.slice("warp", 30), "no warp slice 30; expected 0 to 29"),
                          (lambda: volume.slice("warp", -1), "no warp slice -1"),
                          (lambda: list(volume.slices("weft", 0, 41)), "no weft slices 0 to 41")):
        with pytest.raises(UserError, match=message):
            call()
