import json
import warnings

import numpy as np
import pytest
import tifffile
import torch

from nanodiff.data.folder import Folder
from nanodiff.data.images import Images
from nanodiff.errors import UserError
from nanodiff.tomography import slices
from nanodiff.tomography.slices import FITS, Slices, split_of, tiles, to_units, write_slices
from nanodiff.tomography.volumes import AXES, STATES, Volume
from nanodiff.training import datasets
from nanodiff.training.batches import Batches

SHAPE = (24, 60, 80)


def numbers(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(0, 65536, shape).astype(np.uint16)


def volume(state="dry", shape=SHAPE, **options):
    return Volume.of(numbers(shape), state, percentiles=(0, 100), **options)


def places(size, index=None, draw=None, shape=SHAPE, **options):
    """A data set, and the depth, height and width [B, H, W] of each pixel of its pictures: of three volumes
    whose voxels tell one coordinate each."""
    sets = [Slices([Volume.of(np.indices(shape)[k].astype(np.uint8), "dry", value_range=(0, 100))], size, **options)
            for k in range(3)]
    index = torch.arange(len(sets[0])) if index is None else index
    draw = torch.zeros_like(index) if draw is None else draw
    return sets[0], *((data.read(index, draw)[:, 0].double() + 1) * 50 for data in sets)


def whole(*numbers):
    """Coordinates without the rounding of the pictures."""
    assert all((n - n.round()).abs().max() < 0.01 for n in numbers)
    return [n.round().long() for n in numbers]


def read_all(data, draw=0):
    """All pictures of a data set, in one draw."""
    return data.read(torch.arange(len(data)), torch.full((len(data),), draw))


# --- splits -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [8, 10, 49, 99, 100, 197, 359, 970])
@pytest.mark.parametrize("options", [{}, {"gap": 0}, {"gap": 1, "share": 0.3}, {"blocks": 4, "gap": 2}])
def test_no_test_slice_lies_within_the_gap_of_a_training_slice(count, options):
    train, test = (split_of(count, split, **options) for split in ("train", "test"))
    gap = options.get("gap", min(16, max(1, count // 20)))
    assert train and test and not set(train) & set(test)
    assert min(abs(i - j) for i in train for j in test) == gap + 1  # never nearer, and no slice wasted
    assert all(0 <= i < count for i in train + test) and train == sorted(train)
    if count >= 49:
        assert abs(len(test) / count - options.get("share", 0.1)) < 0.03
    assert split_of(count, None) == list(range(count))


def test_the_pictures_of_a_split_come_from_its_slices_alone():
    for split in ("train", "test"):
        data, *coordinates = places(16, shape=(40, 60, 80), split=split, axes=("warp", "weft"))
        _, height, width = whole(*coordinates)
        for axis, place in (("warp", height), ("weft", width)):
            members = data.labels == data.classes.index(f"dry {axis}")
            coordinates = place[members].flatten(1)
            assert (coordinates == coordinates[:, :1]).all()
            assert coordinates[:, 0].tolist() == split_of(60 if axis == "warp" else 80, split)
            assert [data.source(i)[2] for i in members.nonzero().flatten()] == coordinates[:, 0].tolist()


def test_impossible_splits_are_refused():
    for count, options, message in ((3, {"gap": 5}, "3 slices leaves none for training"),
                                    (9, {"share": 1}, "share is 1"),
                                    (9, {"gap": -1}, "gap -1"), (9, {"blocks": 0}, "blocks 0")):
        with pytest.raises(UserError, match=message):
            split_of(count, "train", **options)
    with pytest.raises(UserError, match="no split 'val'; expected train or test"):
        split_of(100, "val")


# --- pictures -----------------------------------------------------------------------------------------------------

def test_the_nine_classes_come_state_by_state_with_their_captions():
    data = Slices([volume(state) for state in reversed(STATES)], 16)
    assert data.classes == [f"{state} {axis}" for state in STATES for axis in AXES]
    assert data.labels.bincount().tolist() == 3 * list(SHAPE) and data.labels.dtype == torch.int64
    for i in (0, 100, len(data) - 1):
        state, axis = data.classes[data.labels[i]].split()
        assert data.captions[i] == " ".join(f"sf_{word}" for word in (*state.split("-"), axis))
    assert Slices([volume("injected")], 16, axes=("weft", "warp"), captions=False).captions is None
    assert Slices([volume("injected")], 16, axes=("weft",)).classes == ["injected weft"]


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_float32_in_the_range_and_grey(fit, channels):
    data = Slices([volume()], (12, 20), fit=fit, channels=channels)
    x = read_all(data)
    assert x.shape[1:] == data.shape == (channels, 12, 20) and x.dtype == torch.float32
    assert x.min() >= -1 and x.max() <= 1 and torch.equal(x[:, 0], x[:, -1])
    if fit in ("crop", "tile"):
        assert x.min() < -0.9 and x.max() > 0.9


def test_crops_are_exact_pieces_of_the_slice_and_reach_every_place():
    draw = torch.arange(4000)
    _, *coordinates = places(20, torch.full_like(draw, 7), draw, axes=("warp",))  # slices of 24 x 80: 5 x 61 places
    depth, height, width = whole(*coordinates)
    top, left = depth[:, 0, 0], width[:, 0, 0]
    assert (height == 7).all() and set(top.tolist()) == set(range(5)) and set(left.tolist()) == set(range(61))
    assert torch.equal(depth, top[:, None, None] + torch.arange(20)[None, :, None].expand(4000, 20, 20))
    assert torch.equal(width, left[:, None, None] + torch.arange(20)[None, None, :].expand(4000, 20, 20))


def test_crops_of_a_test_set_are_central_and_the_same_in_every_draw():
    data, *coordinates = places(20, axes=("warp",), split="test")
    depth, _, width = whole(*coordinates)
    assert (depth[:, 0, 0] == 2).all() and (width[:, 0, 0] == 30).all()
    assert torch.equal(read_all(data, 0), read_all(data, 1))


def test_tiles_cover_the_slice_once_and_are_all_counted():
    data, *coordinates = places(12, axes=("thickness",), fit="tile")
    assert len(data) == 24 * (60 // 12) * (80 // 12)
    depth, height, width = whole(*coordinates)
    first = depth[:, 0, 0] == 0
    pixels = set(zip(height[first].flatten().tolist(), width[first].flatten().tolist()))
    assert len(pixels) == first.sum() * 144 == 60 * 72  # no pixel twice
    assert tiles((60, 80), (12, 12))[0] == (0, 4)  # what is left over lies half on either side


def test_resizing_keeps_the_proportions_and_squashing_does_not():
    first, draw = torch.zeros(300, dtype=torch.int64), torch.arange(300)
    data, _, height, width = places(30, first, draw, axes=("thickness",), fit="resize")
    assert data.groups[0].size == (30, 40)
    for slope in (height[:, -3] - height[:, 2], width[:, :, -3] - width[:, :, 2]):
        assert ((slope / 25 - 2).abs() < 0.02).all()  # one scale, 1/2, for both directions
    assert len(width[:, 0, 0].round().unique()) == 11 and (height[:, 0, 0] == height[0, 0, 0]).all()
    _, _, height, width = places(30, first[:1], axes=("thickness",), fit="squash")
    assert abs((height[0, -3, 0] - height[0, 2, 0]) / 25 - 2) < 0.02
    assert abs((width[0, 0, -3] - width[0, 0, 2]) / 25 - 80 / 30) < 0.02


@pytest.mark.parametrize("fit", ["resize", "squash"])
def test_fine_noise_is_averaged_when_slices_are_made_smaller(fit):
    data = Slices([volume()], 15, axes=("thickness",), fit=fit)
    assert read_all(data).std() < 0.25 < 0.5 < Slices([volume()], 15, axes=("thickness",)).read(
        torch.arange(24), torch.arange(24)).std()


def test_crops_at_half_the_resolution_show_twice_as_much():
    data, _, _, width = places(20, axes=("thickness",), scale=0.5)
    assert data.groups[0].size == (30, 40)
    assert ((width[:, :, -3] - width[:, :, 2]) / 15 - 2).abs().max() < 0.02


def test_slices_smaller_than_the_picture_are_enlarged_until_they_just_cover_it():
    data = Slices([volume()], 48, axes=("weft",))  # slices of 24 x 60
    assert data.groups[0].size == (48, 120) and read_all(data).shape == (80, 1, 48, 48)


def test_without_a_size_slices_stay_as_they_are_if_they_are_of_one_size():
    dry = volume()
    data = Slices([dry], axes=("warp",))
    assert data.shape == (1, 24, 80)
    expected = torch.stack([dry.to_picture(s) for s in dry.slices("warp")])
    assert (read_all(data) - expected).abs().max() < 2 / 65535
    with pytest.raises(UserError, match="sizes 24x60, 24x80, 60x80; expected one for all .--size"):
        Slices([dry])


def test_pictures_do_not_depend_on_workers_batch_memory_or_kind_of_file(tmp_path):
    tifffile.imwrite(tmp_path / "dry.tif", numbers())
    tifffile.imwrite(tmp_path / "dry-deflate.tif", numbers(), compression="zlib")

    def stream(name, workers, batch, memory):
        np.random.seed(workers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = Slices([tmp_path / name], 16, flip="both", seed=3, memory=memory)
        assert data.in_memory is (memory > 0)
        batches = Batches(data, batch, seed=1, workers=workers)
        return torch.cat([batches.get(step)[0] for step in range(240 // batch)])

    x = stream("dry.tif", 0, 4, 1 << 30)
    for name, workers, batch, memory in (("dry.tif", 3, 8, 0), ("dry-deflate.tif", 2, 6, 0),
                                         ("dry-deflate.tif", 0, 4, 1 << 30)):
        assert torch.equal(x, stream(name, workers, batch, memory))
    assert len(x.flatten(1).unique(dim=0)) == 240


def test_large_sets_are_prepared_in_one_announced_file_that_disappears(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.warns(UserWarning, match="164 slices are prepared in a temporary file of 0.0 GB in") as warned:
        data = Slices([volume()], 16, memory=1000)
    assert len(warned) == 1 and not list(tmp_path.iterdir()) and not data.in_memory
    assert torch.equal(read_all(data), read_all(Slices([volume()], 16)))
    monkeypatch.setattr("os.statvfs", lambda path: type("Full", (), {"f_bavail": 1, "f_frsize": 4096}))
    with pytest.raises(UserError, match="has no room for"):
        Slices([volume()], 16, memory=1000)


@pytest.mark.parametrize("fit", FITS)
def test_with_a_mask_only_pictures_that_are_mostly_inside_are_made(fit):
    mask = np.zeros(SHAPE, bool)
    mask[4:20, 10:50, 20:70] = True
    grey = Volume.of(np.where(mask, 200, 50).astype(np.uint8), "dry", value_range=(50, 200), mask=mask)
    size = (20, 20)
    data = Slices([grey], size, axes=("thickness",), fit=fit, covered=0.7 if fit in ("crop", "tile") else 0.3)
    x = data.read(torch.arange(len(data)).repeat(50), torch.arange(50 * len(data)))
    inside = ((x + 1) / 2).mean((1, 2, 3))
    assert inside.min() >= (0.7 if fit in ("crop", "tile") else 0.3) - 0.01
    assert sorted({data.source(i)[2] for i in range(len(data))}) == list(range(4, 20))  # no slice above or below
    with pytest.raises(UserError, match="covers 99% of no picture of 59x59"):
        Slices([grey], 59, axes=("thickness",), fit=fit, covered=0.99)


def test_wrong_options_are_refused():
    for options, message in (({"fit": "crpo"}, 'fit "crpo" is unknown.*nearest: crop'),
                             ({"channels": 2}, "channels is 2"),
                             ({"axes": ("wrap",)}, "axes are wrap"), ({"scale": 0}, "scale is 0"),
                             ({"fit": "resize", "scale": 0.5}, "scale is 0.5 with fit resize"),
                             ({"size": 0}, "at least 1"),
                             ({"place": "middle"}, "place is")):
        with pytest.raises(UserError, match=message):
            Slices([volume()], **{"size": 16, **options})
    with pytest.raises(UserError, match="no volumes"):
        Slices([], 16)
    x = numbers().astype(np.float32)
    x[20, 59, 79] = np.nan
    with pytest.raises(UserError, match="array holds nan in thickness slice 20, row 59, column 79"):
        Slices([Volume.of(x, "dry")], 16)


# --- by name ------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    for i, state in enumerate(STATES):
        tifffile.imwrite(tmp_path / f"{state}-0.tif", numbers((24, 60, 80 - i)), photometric="minisblack")
    (tmp_path / "labels").mkdir()
    tifffile.imwrite(tmp_path / "labels" / "dry-0-labels.tif", numbers(), photometric="minisblack")
    (tmp_path / "sheet.png").write_bytes(b"")
    return tmp_path


def test_a_volume_or_a_folder_of_volumes_is_loaded_by_its_path(folder):
    train = datasets.load(folder, size=16, captions=None, value_range=None)
    assert isinstance(train, Slices) and len(train.classes) == 9 and train.shape == (1, 16, 16)
    assert train.captions is None and len(train.volumes) == 3 and train.place == "random"
    test, name = datasets.load_held_out(folder, train, captions=None)
    assert name == "test slices" and test.classes == train.classes and test.place == "centre"
    for i in range(0, len(test), 7):
        name, axis, number = test.source(i)
        neighbours = [train.source(j)[2] for j in range(len(train)) if train.source(j)[:2] == (name, axis)]
        assert min(abs(number - other) for other in neighbours) > 1
    injected = datasets.load(str(folder / "injected-0.tif"), size=16, channels=3, fit="tile")
    assert injected.classes == [f"injected {axis}" for axis in AXES] and injected.shape == (3, 16, 16)
    assert injected.captions[0] == "sf_injected sf_thickness" and Batches(injected, 4).get(0)[0].shape == (4, 3, 16, 16)
    with pytest.raises(UserError, match="no split 'val'"):
        datasets.load(folder, split="val", size=16)


def test_whole_volumes_are_held_out_where_the_folder_says_so(tmp_path):
    for split, seed in (("train", 1), ("test", 2)):
        (tmp_path / split).mkdir()
        tifffile.imwrite(tmp_path / split / f"dry-{seed}.tif", numbers(seed=seed), photometric="minisblack")
    train = datasets.load(tmp_path, size=16)
    test, _ = datasets.load_held_out(tmp_path, train)
    assert len(train) == len(test) == sum(SHAPE)
    assert train.source(0)[0] == "dry-1.tif" and test.source(0)[0] == "dry-2.tif"
    (tmp_path / "test" / "dry-2.tif").rename(tmp_path / "test" / "injected-2.tif")
    with pytest.raises(UserError, match="expected the same states in both"):
        datasets.load_held_out(tmp_path, train)


def test_two_boxes_share_no_voxel_or_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "dry.tif", np.indices(SHAPE)[2].astype(np.uint8), photometric="minisblack")
    boxes = {"region": ":,:,:45", "test_region": ":,:,50:", "value_range": (0, 100)}
    train = datasets.load(tmp_path / "dry.tif", size=12, **boxes)
    test, _ = datasets.load_held_out(tmp_path / "dry.tif", train, **boxes)
    assert len(train) == 24 + 60 + 45 and len(test) == 24 + 60 + 30
    (train_columns,), (test_columns,) = whole((read_all(train) + 1) * 50), whole((read_all(test) + 1) * 50)
    assert set(train_columns.flatten().tolist()) == set(range(45))
    assert set(test_columns.flatten().tolist()) == set(range(50, 80))
    with pytest.raises(UserError, match="share voxels"):
        datasets.load(tmp_path / "dry.tif", size=12, region=":,:,:45", test_region=":,:,44:")


def test_folders_of_pictures_stay_folders_of_pictures(tmp_path):
    for i in range(3):
        tifffile.imwrite(tmp_path / f"dry-{i}.tif", numbers()[i], photometric="minisblack")
    assert isinstance(datasets.load(tmp_path, size=16), Folder)
    tifffile.imwrite(tmp_path / "dry-9.tif", numbers(), photometric="minisblack")
    with pytest.warns(UserWarning, match="1 of 4 pictures .*dry-9.tif.*is a stack"):
        assert isinstance(datasets.load(tmp_path, size=16), Folder)
    assert isinstance(datasets.load("mnist", split="test"), Images)
    (tmp_path / "deep").mkdir()
    assert slices.volume_files(tmp_path / "deep") == []


# --- back to the volume's units -----------------------------------------------------------------------------------

def test_generated_slices_are_written_in_the_volumes_units_from_the_record_alone(tmp_path):
    dry = Volume.of(numbers(), "dry", voxel=12.5)
    record = json.loads(json.dumps(dry.record()))
    x = torch.rand(5, 1, 20, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for channels in (1, 3):
        write_slices(x.expand(-1, channels, -1, -1), tmp_path / "dry-generated.tif", record)
        back = Volume(tmp_path / "dry-generated.tif")
        assert back.dtype == np.uint16 and back.shape == (5, 20, 30) and np.allclose(back.voxel, 12.5)
        low, high = dry.grey
        exact = low + (x[:, 0].double().numpy() + 1) / 2 * (high - low)
        assert np.abs(np.stack(list(back.slices("thickness"))) - exact).max() <= 0.51
    ends = to_units(torch.tensor([[-1.0, 1.0], [-3.0, 3.0]]), record)
    assert np.array_equal(ends[0], ends[1]) and np.abs(ends[0] - dry.grey).max() <= 0.5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dry-generated.tif"]


def test_slices_that_cannot_be_written_leave_nothing_behind(tmp_path):
    record = volume().record()
    x = torch.zeros(2, 1, 4, 4)
    for pictures, name, message in ((x, "a.png", "ends in .tif"), (x[0], "a.tif", "pictures are .1, 4, 4"),
                                    (x * torch.nan, "a.tif", "finite")):
        with pytest.raises(UserError, match=message):
            write_slices(pictures, tmp_path / name, record)
    with pytest.raises(FileNotFoundError):
        write_slices(x, tmp_path / "no" / "a.tif", record)
    assert not list(tmp_path.iterdir())


def test_a_box_for_testing_is_shown_at_the_grey_scale_of_the_training_box(tmp_path):
    v = np.random.default_rng(0).integers(0, 1000, (20, 40, 40), dtype=np.uint16)
    v[:, :, 20:] += 20_000
    tifffile.imwrite(tmp_path / "dry.tif", v)
    boxes = dict(region=":,:,0:20", test_region=":,:,20:40", fit="resize")
    training, held_out = (datasets.load(tmp_path / "dry.tif", split, size=8, **boxes)
                          for split in ("train", "test"))
    assert training.volumes[0].grey == held_out.volumes[0].grey and training.volumes[0].grey[1] < 1000
    assert held_out.read(torch.arange(3), torch.arange(3)).min() == 1  # all brighter than anything in training


def test_a_folder_of_slices_is_a_volume_when_its_state_is_told(tmp_path):
    v = numbers()
    for i, page in enumerate(v):
        tifffile.imwrite(tmp_path / f"slice{i}.tif", page)
    assert isinstance(datasets.load(tmp_path, size=8), Folder)
    with pytest.warns(UserWarning, match="is a folder of slices"):
        data = datasets.load(tmp_path, size=8, state="injected", gap=1)
    assert isinstance(data, Slices) and data.classes[0] == "injected thickness"


def test_an_unpacked_copy_is_given_back_when_the_slices_are_prepared(tmp_path):
    tifffile.imwrite(tmp_path / "dry.tif", numbers(), compression="zlib")
    with pytest.warns(UserWarning, match="compressed"):
        data = Slices([tmp_path / "dry.tif"], 8)
    assert data.volumes[0]._array is None and np.array_equal(data.volumes[0].slice("weft", 3), numbers()[:, :, 3])
