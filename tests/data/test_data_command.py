import re

import numpy as np
import pytest
import tifffile
from PIL import Image

from nanodiff.data import __main__ as command
from nanodiff.tomography.volumes import AXES, Volume, format_shape
from nanodiff.worlds.weave import SHAPES

SIZES = {"702x970", "359x970", "359x702", "863x773", "197x773", "197x863", "701x633", "287x633", "287x701"}


def sparse(path, shape, **options):
    """A TIFF of full size of which the disk holds hardly anything: bright rows in its first and middle slices."""
    tifffile.imwrite(path, shape=shape, dtype="uint16", photometric="minisblack", **options)
    with tifffile.TiffFile(path) as file:
        start = file.pages[0].dataoffsets[0]
    rows = np.linspace(100, 60000, 40 * shape[2]).astype("<u2")
    with open(path, "r+b") as file:
        for i in (0, shape[0] // 2):
            file.seek(start + 2 * shape[1] * shape[2] * i)
            file.write(rows.tobytes())
    return str(path)


@pytest.fixture
def part(tmp_path):
    v = np.random.default_rng(0).integers(0, 60000, (24, 60, 80)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "dry-part.tif", v, resolution=(500, 500), resolutionunit="CENTIMETER")
    return str(tmp_path / "dry-part.tif")


@pytest.mark.slow
def test_the_reports_volumes_give_exactly_its_table_1(tmp_path, capsys):
    paths = [sparse(tmp_path / f"{state}.tif", shape, bigtiff=state == "dry") for state, shape in SHAPES.items()]
    command.main(["slices", *paths, "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert "total 2,031 + 1,833 + 1,621 = 5,485 slices in 9 classes" in text
    rows = re.findall(r"^(\S+) +(thickness|warp|weft) +([\d,]+) +(\d+x\d+)", text, re.MULTILINE)
    expected = [(state, axis, str(n), size) for state, shape in SHAPES.items()
                for axis, n, size in zip(AXES, shape, map(format_shape, (shape[1:], shape[::2], shape[:2])))]
    assert rows == expected and {size for *_, size in rows} == SIZES
    with Image.open(tmp_path / "out" / "slices.png") as image:
        assert image.width > 600 and image.height > 600 and np.asarray(image).std() > 20
    assert [sum(Volume(path).counts().values()) for path in paths] == [2031, 1833, 1621]


def test_the_sheet_shows_slices_in_their_true_proportions(part):
    page = np.asarray(command.draw_sheet([Volume(part)]))
    left = 120
    for axis, (height, width) in Volume(part).sizes().items():
        beyond = page[34:34 + height + 3, left:left + width + 3].mean(2)
        assert (beyond[:height, :width] < 250).mean() > 0.9 and (beyond[height:, :] == 255).all()
        assert (beyond[:, width:] == 255).all()
        left += max(150, width) + 14


def test_the_table_tells_state_count_size_grey_range_and_voxel(part, tmp_path, capsys):
    command.main(["slices", part, "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    low, high = (f"{end:,.0f}" for end in Volume(part).grey)
    assert f"{low} to {high}" in text and "voxel 20 x 20 x 20" in text and "sf_dry sf_weft" in text
    assert "total 164 slices in 3 classes" in text
    command.main(["slices", part, "--out", str(tmp_path / "out"), "--state", "injected", "--region", "4:,:,:40",
                  "--voxel", "3", "--captions", "{state}/{axis}"])
    text = capsys.readouterr().out
    assert "injected/warp" in text and "voxel 3 x 3 x 3" in text and "total 120 slices" in text and "20x40" in text


def test_wrong_input_ends_with_code_2_one_sentence_and_nothing_written(part, tmp_path, capsys):
    (tmp_path / "cut-dry.tif").write_bytes(open(part, "rb").read()[:5000])
    tifffile.imwrite(tmp_path / "part.tif", np.zeros((4, 8, 8), np.uint16), photometric="minisblack")
    tifffile.imwrite(tmp_path / "dry-one.tif", np.zeros((8, 8), np.uint16))
    hole = np.zeros((4, 8, 8), np.float32)
    hole[2, 3, 4] = np.nan
    tifffile.imwrite(tmp_path / "dry-nan.tif", hole, photometric="minisblack")
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "out")]
    for words, message in (
            ([], "no command of nanodiff.data"), (["slicse"], "nearest: slices"),
            (["slices", *out], "no volume was named"),
            (["slices", part], "--out is missing"), (["slices", part, "--out", part], "is a file"),
            (["slices", part, "--out", f"{part}/deeper"], "is a file"),
            (["slices", part, str(tmp_path / "cut-dry.tif"), *out], "is cut short"),
            (["slices", str(tmp_path / "part.tif"), *out], "has no state"),
            (["slices", str(tmp_path / "dry-one.tif"), *out], "holds one page"),
            (["slices", str(tmp_path / "dry-nan.tif"), *out], "nan in thickness slice 2, row 3, column 4"),
            (["slices", str(tmp_path / "empty"), *out, "--state", "dry"], "holds 0 slices"),
            (["slices", str(tmp_path / "dry-prat.tif"), *out], "nearest: dry-part.tif"),
            (["slices", part, *out, "--state", "wet"], 'state "wet" is unknown'),
            (["slices", part, *out, "--state", "dry,dry"], "2 states for 1 volumes"),
            (["slices", part, *out, "--region", "0:99,:,:"], "does not lie in"),
            (["slices", part, *out, "--regoin", "0:9,:,:"], "nearest: --region"),
            (["weave", *out, "--states", "dyr"], "nearest: dry"), (["weave", *out, "--scale", "-1"], "scale is -1")):
        with pytest.raises(SystemExit) as ended:
            command.main(words)
        printed = capsys.readouterr()
        assert ended.value.code == 2 and printed.out == "" and message in printed.err and printed.err.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_drawn_volumes_are_written_and_read_again(tmp_path, capsys):
    command.main(["weave", "--out", str(tmp_path / "drawn"), "--seed", "3", "--scale", "0.1",
                  "--states", "dry,injected"])
    text = capsys.readouterr().out
    assert "dry-3.tif: dry, 36x70x97 voxels, 203 slices" in text and "injected-3.tif" in text
    command.main(["slices", *(str(tmp_path / "drawn" / f"{state}-3.tif") for state in ("injected", "dry")), "--out",
                  str(tmp_path / "out")])
    assert "total 203 + 162 = 365 slices in 6 classes" in capsys.readouterr().out
