"""Drawn weaves: a specimen follows from its arguments, labels and grey values belong together, it can be pressed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from scipy.ndimage import binary_erosion, gaussian_filter

from nanodiff.errors import UserError
from nanodiff.tomography import measures
from nanodiff.worlds import scanner, weave

SHAPE = (40, 56, 76)


@pytest.fixture(scope="module")
def drawn():
    """{state: (design, volume, labels)} of one seed at a quarter of the report's sizes."""
    shapes = {state: weave.scale_shape(state, 0.16) for state in weave.STATES}
    return {state: (weave.make_design(5, state, shape), *weave.specimen(5, state, shape))
            for state, shape in shapes.items()}


@pytest.mark.slow
def test_the_same_arguments_give_the_same_bytes_and_another_seed_another_specimen():
    first, again, other = (weave.specimen(seed, "dry", SHAPE) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other):
        assert a.tobytes() == b.tobytes()
        assert (a != c).mean() > 0.2
    assert first[0].dtype == np.uint16 and first[1].dtype == np.uint8 and first[0].shape == first[1].shape == SHAPE


@pytest.mark.slow
def test_slabs_of_any_thickness_give_the_same_volume():
    for state in weave.STATES:
        design = weave.make_design(6, state, SHAPE)
        single, slabs = ([np.empty(SHAPE, np.uint16), np.empty(SHAPE, np.uint8)] for _ in range(2))
        weave.draw(design, *single)
        weave.draw(design, *slabs, budget=1)
        assert np.array_equal(single[0], slabs[0]) and np.array_equal(single[1], slabs[1])


@pytest.mark.slow
def test_labels_are_those_of_the_state_and_every_kind_of_yarn_is_there(drawn):
    for state, (_, _, labels) in drawn.items():
        assert set(np.unique(labels)) == ({0, 1, 2, 3, 4} if state == "injected" else {1, 2, 3, 4})
        truth = weave.truth(labels)
        assert sum(truth["shares"].values()) == pytest.approx(1)
        assert truth["fibre_fraction"] == pytest.approx(np.isin(labels, (1, 2, 3)).mean())
        assert truth["porosity"] == pytest.approx((labels == 4).mean())


@pytest.mark.slow
def test_the_share_of_yarn_is_what_the_design_asked_for(drawn):
    for design, _, labels in drawn.values():
        assert weave.truth(labels)["fibre_fraction"] == pytest.approx(design.fibre, rel=0.03)


@pytest.mark.slow
def test_pressing_keeps_most_of_the_yarn_and_raises_its_share():
    share = []
    for compaction in (1.0, 0.8, 0.6):
        shape = (round(70 * compaction), 80, 110)
        share.append(weave.truth(weave.specimen(8, "dry", shape, compaction)[1])["fibre_fraction"])
    assert share[0] < share[1] < share[2]
    for part, compaction in zip(share, (1.0, 0.8, 0.6)):
        assert part * compaction == pytest.approx(share[0], rel=0.12)


@pytest.mark.slow
@pytest.mark.parametrize("name, value, far", [("compaction", 0.70, 0.85), ("warp", 9.0, 7.0), ("weft", 8.0, 6.5)])
def test_a_little_more_of_it_is_nearly_the_same_specimen(name, value, far):
    labels = [weave.specimen(9, "dry", SHAPE, **{name: v})[1] for v in (value, value * 1.002, far)]
    near, changed = ((labels[0] != other).mean() for other in labels[1:])
    assert 0 < near < 0.04 and near < 0.2 * changed


@pytest.mark.slow
def test_a_quarter_of_the_resolution_is_the_same_specimen():
    fine = weave.specimen(10, "dry", (80, 112, 152))[1]
    coarse = weave.specimen(10, "dry", SHAPE)[1]
    assert ((fine[::2, ::2, ::2] == 4) == (coarse == 4)).mean() > 0.85


@pytest.mark.slow
def test_yarn_counts_give_the_period_of_the_labels():
    design = weave.make_design(11, "dry", (56, 120, 160), warp=8, weft=6.4, layers=4)
    labels = weave.specimen(11, "dry", (56, 120, 160), warp=8, weft=6.4, layers=4)[1]
    assert design.periods["height"] == 15 and design.periods["width"] == 25
    assert measures.yarn_period(labels == 1, 1) == pytest.approx(15, rel=0.05)
    assert measures.yarn_period(labels == 2, 2) == pytest.approx(25, rel=0.05)
    assert measures.yarn_period(labels == 2, 0) == pytest.approx(design.periods["depth"], rel=0.05)
    assert weave.truth(labels, design, voxel=20)["periods_um"]["height"] == 300


@pytest.mark.slow
def test_warp_runs_along_the_width_and_weft_along_the_height(drawn):
    labels = drawn["dry"][2]
    unchanged = {yarn: [(np.diff(labels == yarn, axis=axis) == 0).mean() for axis in range(3)] for yarn in (1, 2)}
    assert np.argmax(unchanged[1]) == 2 and np.argmax(unchanged[2]) == 1


@pytest.mark.slow
def test_dry_is_two_separate_levels_and_injected_has_less_contrast(drawn):
    contrast = {}
    for state, (_, volume, labels) in drawn.items():
        grey = volume.astype(float)
        yarn = np.isin(labels, (1, 2, 3))
        ground = ~yarn if state != "injected" else labels == 0
        contrast[state] = (grey[yarn].mean() - grey[ground].mean()) / grey[yarn].mean()
    assert measures.otsu(drawn["dry"][1].astype(np.float32))[1] >= 0.7
    assert contrast["injected"] < 0.7 * contrast["dry"]


def test_noise_is_correlated_and_hardly_white():
    """As in real slices: white noise of about 3 levels where the yarns stand 100 above air, the rest correlated."""
    shape = (180, 60, 80)  # layers as thick as in the real slices
    volume, labels = weave.specimen(12, "dry", shape, layers=4, warp=1.5, weft=1.5)
    air = labels == 4
    grey = volume.astype(float)
    grey *= 100 / (grey[~air].mean() - grey[air].mean())
    deep = binary_erosion(air, iterations=5)
    rest = np.where(deep, grey - gaussian_filter(grey, 4), 0)
    pairs = deep[:, :, 1:] & deep[:, :, :-1]
    lag = (rest[:, :, 1:] * rest[:, :, :-1])[pairs].mean() / rest[deep].var()
    assert 6 < rest[deep].std() < 25
    assert 0.3 < lag < 0.85
    second = grey[:, 1:-1, 1:-1] * 4  # Immerkaer's mask sees white noise and little else
    for dy, dx, weight in ((0, 1, -2), (1, 0, -2), (2, 1, -2), (1, 2, -2), (0, 0, 1), (0, 2, 1), (2, 0, 1), (2, 2, 1)):
        second = second + weight * grey[:, dy:dy + shape[1] - 2, dx:dx + shape[2] - 2]
    assert np.sqrt(np.pi / 2) * np.abs(second).mean() / 6 < 6


def test_edges_overshoot_on_both_sides():
    """A step of 100 levels through the scanner: a dip before it, a rim behind it, the plateaus where they were."""
    scan = scanner.settings(weave.make_design(13, "dry", (360, 700, 970)))
    step = np.zeros((40, 60, 80), np.float32) + np.float32(60) + 100 * (np.arange(80) >= 40).astype(np.float32)
    scanned = scanner.expose(step, 0, slice(0, 40), step.shape, replace(scan, cupping=0.0, rings=0.0))
    profile = (scanned.mean((0, 1)) - scan.low) / scan.gain
    assert profile[:25].mean() == pytest.approx(60, abs=1) and profile[-25:].mean() == pytest.approx(160, abs=1)
    assert 60 - 30 < profile[30:40].min() < 60 - 5 and 160 + 5 < profile[40:50].max() < 160 + 30


@pytest.mark.slow
def test_pores_and_cracks_are_darker_than_resin(drawn):
    _, volume, labels = drawn["injected"]
    assert volume[labels == 4].mean() < volume[labels == 0].mean() - volume[labels == 0].std()


@pytest.mark.slow
def test_a_folder_holds_the_volumes_alone_and_the_truth_beside_them(tmp_path):
    paths = weave.write(tmp_path, 14, 0.08, voxel=10)
    assert [p.name for p in paths] == [f"{state}-14.tif" for state in weave.STATES]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(p.name for p in paths), "labels"])
    assert not any(p.name.startswith(".") for p in (tmp_path / "labels").iterdir())
    volume, labels = weave.specimen(14, "injected", weave.scale_shape("injected", 0.08))
    assert np.array_equal(tifffile.memmap(paths[2], mode="r"), volume)
    assert np.array_equal(tifffile.imread(tmp_path / "labels" / "injected-14-labels.tif"), labels)
    record = json.loads((tmp_path / "labels" / "injected-14.json").read_text())
    assert record["porosity"] == pytest.approx(weave.truth(labels)["porosity"])
    with tifffile.TiffFile(paths[0]) as file:
        tags = file.pages[0].tags
        voxels, cm = tags["XResolution"].value
        assert 1e4 * cm / voxels == pytest.approx(record["voxel_um"]) == 125
        assert tags["ResolutionUnit"].value == 3  # centimetre


@pytest.mark.parametrize("arguments, sentence", [
    (dict(state="dry-compact"), "no state is called 'dry-compact'.*nearest: dry-compacted"),
    (dict(shape=(8, 70, 90)), r"shape is \(8, 70, 90\).*at least"),
    (dict(shape=(70, 90)), "three numbers of voxels"),
    (dict(compaction=0.2), "compaction is 0.2.*nearest: 0.45"),
    (dict(compaction=float("nan")), "compaction is nan; expected"),
    (dict(warp=-3), "warp is -3.*1 to 14"),
    (dict(layers=0), "layers is 0.*1 to 10"),
    (dict(weft=500), "weft is 500.*1 to 19"),
    (dict(weave="interlok"), "no weave is called 'interlok'.*nearest: interlock"),
    (dict(wefts=5), "no argument 'wefts'.*nearest: weft"),
    (dict(seed=-1), "seed is -1"),
])
def test_an_impossible_specimen_is_named_in_one_sentence(arguments, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        weave.specimen(**{"seed": 0, "state": "dry", "shape": SHAPE, **arguments})
    assert "\n" not in str(error.value)


def test_nothing_is_written_when_an_argument_is_impossible(tmp_path):
    for options in (dict(scale=-1), dict(states=("dry", "wet")), dict(compaction=9), dict(scale=0.01)):
        with pytest.raises(UserError):
            weave.write(tmp_path / "new", 0, **{"scale": 0.08, **options})
    assert not (tmp_path / "new").exists()
