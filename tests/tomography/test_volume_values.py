"""What a Volume makes of its voxels: state, captions, grey scale, units, voxel size, region and mask."""

import tracemalloc

import numpy as np
import pytest
import torch
from tiff_files import SHAPE, numbers, open_quietly, write

from nanodiff.errors import UserError
from nanodiff.tomography import volumes
from nanodiff.tomography.volumes import AXES, STATES, Volume, state_of


@pytest.mark.parametrize("name, state", [
    ("dry.tif", "dry"), ("Dry_03.TIF", "dry"), ("sampleDry2.tif", "dry"), ("dry-compacted.tif", "dry-compacted"),
    ("dry_compacted_1.tif", "dry-compacted"), ("DryCompacted.tif", "dry-compacted"),
    ("drycompacted.tif", "dry-compacted"),
    ("part compacted.tif", "dry-compacted"), ("resin-injected-2.tif", "injected"), ("uncompacted-dry.tif", "dry"),
    ("laundry-injected.tif", "injected"), ("dry.not-injected.tif", "dry")])
def test_the_state_is_read_from_the_name(name, state):
    assert state_of(f"injected/{name}") == state


@pytest.mark.parametrize("name", ["laundry.tif", "part.tif", "hydry.tif", "dryer.tif", "dry-and-injected.tif"])
def test_a_name_without_one_clear_state_is_refused(name):
    with pytest.raises(UserError, match="--state"):
        state_of(name)


def test_captions_follow_the_report_or_the_given_rule():
    captions = {(state, axis): Volume.of(numbers(), state).caption(axis) for state in STATES for axis in AXES}
    assert captions["dry", "thickness"] == "sf_dry sf_thickness"
    assert captions["dry-compacted", "warp"] == "sf_dry sf_compacted sf_warp"
    assert captions["injected", "weft"] == "sf_injected sf_weft" and len(set(captions.values())) == 9
    rule = "a {axis} slice of a {state} part"
    assert Volume.of(numbers(), "dry", captions=rule).caption("warp") == "a warp slice of a dry part"


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "uint32"])
def test_pictures_go_back_to_the_volumes_units_within_half_a_step(dtype):
    v = numbers(dtype)
    volume = Volume.of(v, "dry", percentiles=(0, 100))
    assert volume.grey == (v.min(), v.max())
    x = volume.to_picture(volume.slice("warp", 4))
    assert x.dtype == torch.float32 and x.shape == (1, 24, 40) and x.min() >= -1 and x.max() <= 1
    back = volume.to_units(x)
    assert back.dtype == {"uint8": "uint16"}.get(dtype, dtype)
    assert np.abs(back[0].astype(float) - v[:, 4]).max() <= (0 if dtype != "float32" else 1e-6 * v.max())


def test_the_grey_scale_ignores_hot_voxels_and_is_the_same_every_time():
    v = numbers(shape=(100, 60, 60)) // 60
    v[50, 30, 30] = 65535
    volume = Volume.of(v, "dry")
    exact = np.percentile(v, (0.1, 99.9))
    assert np.allclose(volume.grey, exact, atol=4) and volume.grey == Volume.of(v.copy(), "dry").grey
    x = torch.cat([volume.to_picture(s) for s in volume.slices("weft")])
    assert x.min() == -1 and x.max() == 1 and (x.abs() == 1).float().mean() < 0.02
    assert Volume.of(v, "dry", value_range=(10, 20)).grey == (10, 20)


def test_a_volume_of_one_number_is_black_and_announced():
    with pytest.warns(UserWarning, match="every sampled voxel of array is 7"):
        volume = Volume.of(np.full(SHAPE, 7, np.uint8), "dry")
        assert (volume.to_picture(volume.slice("warp", 0)) == -1).all()


def test_16_bit_levels_survive():
    ramp = np.arange(65536, dtype=np.uint16).reshape(4, 128, 128)
    volume = Volume.of(ramp, "dry")
    levels = torch.cat([volume.to_picture(s).flatten() for s in volume.slices("thickness")])
    assert len(levels.unique()) > 65000 and (levels.diff() >= 0).all()


@pytest.mark.parametrize("options, expected", [
    ({"resolution": (500, 250), "resolutionunit": "CENTIMETER"}, (20, 40, 20)),
    ({"resolution": (2540, 2540), "resolutionunit": "INCH"}, (10, 10, 10)),
    ({"resolution": (72, 72), "resolutionunit": "INCH"}, None), ({}, None),
    ({"resolution": (3, 3), "resolutionunit": "NONE"}, None),
    ({"imagej": True, "resolution": (0.05, 0.05), "metadata": {"unit": "um", "spacing": 25.0}}, (25, 20, 20)),
    ({"imagej": True, "resolution": (0.05, 0.05), "metadata": {"unit": "\\u00B5m"}}, (20, 20, 20)),
    ({"imagej": True, "resolution": (0.05, 0.05), "metadata": {"unit": "micron"}}, (20, 20, 20)),
    ({"imagej": True, "resolution": (50, 50), "metadata": {"unit": "mm", "spacing": 0.03}}, (30, 20, 20)),
    ({"imagej": True, "metadata": {"unit": "pixel"}}, None)])
def test_the_voxel_size_comes_from_the_tags(tmp_path, options, expected):
    path = write(tmp_path / "dry.tif", numbers(), **options)
    voxel = Volume(path).voxel
    assert voxel is None if expected is None else np.allclose(voxel, expected, rtol=1e-4)
    assert Volume(path, voxel=7).voxel == (7, 7, 7) and Volume(path, voxel=(1, 2, 3)).voxel == (1, 2, 3)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}])
def test_a_region_is_as_if_the_rest_were_not_there(tmp_path, options):
    v = numbers()
    volume = open_quietly(write(tmp_path / "dry.tif", v, **options), region="4:20,:25,10:")
    inner = v[4:20, :25, 10:]
    assert volume.shape == inner.shape and volume.grey == Volume.of(inner, "dry").grey
    for along, axis in enumerate(AXES):
        assert np.array_equal(np.stack(list(volume.slices(axis))), np.moveaxis(inner, along, 0))
        assert np.array_equal(volume.slice(axis, 3), np.moveaxis(inner, along, 0)[3])
    assert open_quietly(tmp_path / "dry.tif", region=[(4, 20), (0, 25), (10, 40)]).region == volume.region


def test_the_grey_scale_is_that_of_the_masked_material(tmp_path):
    v = numbers()
    mask = np.zeros(SHAPE, np.uint8)
    mask[:, 10:20, 10:20] = 255
    v[mask == 0] = 65535
    volume = Volume.of(v, "dry", mask=mask)
    assert volume.grey[1] < 60000 and volume.mask.shape == SHAPE
    assert Volume.of(v, "dry", mask=write(tmp_path / "mask.tif", mask)).grey == volume.grey
    with pytest.raises(UserError, match="mask of array is empty"):
        Volume.of(v, "dry", mask=mask * 0).grey


def test_measuring_the_grey_scale_keeps_no_whole_slices(tmp_path, monkeypatch):
    """64 slices are thinned out; views of them would hold 64 whole slices, 46 MB here."""
    write(tmp_path / "dry.tif", np.random.default_rng(0).integers(0, 255, (70, 600, 1200), dtype=np.uint8))
    monkeypatch.setattr(volumes, "SAMPLE", (64, 100_000))
    tracemalloc.start()
    assert Volume(tmp_path / "dry.tif").grey == (0, 254)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6
