import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from nanodiff.data import mnist
from nanodiff.errors import UserError
from nanodiff.files import DATA
from nanodiff.worlds import patterns, textures, things
from nanodiff.worlds.fields import hexagon, nearest_two, noise
from nanodiff.worlds.textures import COLOURS, DIGITS, NAMES, NEW, SYMMETRIC, TEXTURES, THINGS

SEEDS = range(12)


def near(pixels, colour):
    """bool [H,W]: pixels nearer to this of COLOURS than to any other."""
    table = np.array(list(COLOURS.values()), float)
    return np.linalg.norm(pixels[:, :, None] - table, axis=-1).argmin(-1) == list(COLOURS).index(colour)


def plane():
    """Places of 128 x 128 samples: float32 [128,128] twice, columns first."""
    return np.meshgrid(*[np.linspace(-31.75, 31.75, 128, dtype=np.float32)] * 2)


# --- scenes -------------------------------------------------------------------------------------------------------

def test_there_are_at_least_22_textures_8_things_10_digits_and_two_new_concepts():
    assert len(TEXTURES) >= 22 and len(THINGS) == 8 and len(DIGITS) == 10 and NEW == ("zigzagged", "woven")
    assert len(set(NAMES)) == len(NAMES) == len(TEXTURES) + 20 and set(SYMMETRIC) < set(TEXTURES + NEW)
    assert all(callable(getattr(patterns, name)) for name in TEXTURES + NEW)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_is_one_picture_and_another_seed_split_or_class_another(name):
    picture, caption = textures.draw(3, name, 64)
    again, same = textures.draw(3, name, 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8 and picture.flags.c_contiguous
    assert np.array_equal(picture, again) and caption == same
    for other in (textures.draw(4, name, 64), textures.draw(3, name, 64, "test"), textures.draw(3, name, 64, "val")):
        assert not np.array_equal(picture, other[0])
    scene = textures.scene(3, name)
    assert np.array_equal(picture, textures.paint(scene, 64)) and scene == textures.scene(3, name)
    assert (scene.seed, scene.name, scene.split) == (3, name, "train") and len(set(scene.colours)) == 2
    assert scene.count in ((1, 2) if name in THINGS else (1,) if name in DIGITS else (None,))


def test_given_colours_and_counts_are_kept_and_leave_all_else_as_it_was():
    scene = textures.scene(8, "heart", colours=("black", "pink"), count=2)
    assert scene.colours == ("black", "pink") and scene.count == 2
    assert {textures.scene(seed, "heart").count for seed in range(20)} == {1, 2}
    dark, light = (textures.paint(textures.scene(8, "dotted", colours=pair), 64)
                   for pair in (("black", "white"), ("white", "black")))
    assert np.corrcoef(dark.ravel(), light.ravel())[0, 1] < -0.7  # the same dots in exchanged colours
    assert textures.scene(8, "dotted", colours=["red", "blue"]).colours == ("red", "blue")


def test_every_class_misses_two_colours_of_eleven_in_either_role_and_they_are_spread_evenly():
    missed = {name: [colour for colour in COLOURS if not textures.met(name, colour)] for name in NAMES}
    assert len(COLOURS) == 11 and all(len(colours) == 2 for colours in missed.values())
    counts = Counter(sum(missed.values(), []))
    assert set(counts) == set(COLOURS) and max(counts.values()) - min(counts.values()) <= 4
    for name in NAMES:
        for pairs, met in (("met", True), ("unmet", False)):
            drawn_pairs = [textures.scene(seed, name, pairs=pairs).colours for seed in range(150)]
            assert all(met == all(textures.met(name, colour) for colour in pair) for pair in drawn_pairs)
            assert all(textures.contrast(*pair) >= textures.CONTRAST for pair in drawn_pairs)
        assert len(set(textures.allowed(name))) + len(set(textures.allowed(name, "unmet"))) == len(
            textures.allowed(name, "all"))
    colours = Counter(sum((textures.scene(seed, "grid").colours for seed in range(900)), ()))
    assert set(colours) == set(COLOURS) - set(missed["grid"]) and min(colours.values()) > 70


def test_contrast_is_the_distance_in_cielab():
    # scikit-image 0.25: deltaE_cie76 of rgb2lab of the two colours
    assert textures.contrast("black", "white") == textures.contrast("white", "black")
    assert abs(textures.contrast("black", "white") - 89.1) < 0.5 and textures.contrast("red", "red") == 0
    assert textures.contrast("red", "orange") < textures.CONTRAST < textures.contrast("red", "green")


# --- pictures -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TEXTURES + NEW)
def test_both_colours_of_a_texture_are_on_a_good_part_of_the_picture(name):
    for seed in SEEDS:
        x, y = plane()
        figure, tone = getattr(patterns, name)(x, y, np.random.default_rng(seed))
        assert figure.dtype == np.float32 and np.asarray(tone).dtype in (np.float32, np.float64)
        assert 0 <= figure.min() and figure.max() <= 1 and 0.14 < figure.mean() < 0.86
        assert np.abs(tone).max() <= 2.1


@pytest.mark.parametrize("name", NAMES)
def test_colours_are_the_ones_that_the_caption_may_name(name):
    right = 0
    for seed in SEEDS:
        scene = textures.scene(seed, name)
        picture = textures.paint(scene, 64)
        areas = {colour: near(picture, colour).mean() for colour in COLOURS}
        right += set(sorted(areas, key=areas.get)[-2:]) == set(scene.colours)
    assert right >= 6  # shading and mixed tones go through other colours


@pytest.mark.parametrize("name", NAMES)
def test_a_scene_is_the_same_at_every_size(name):
    for seed in range(4):
        small, large = (textures.draw(seed, name, size)[0].astype(float) for size in (64, 128))
        averaged = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
        # Where one strand cuts off another the edge is hard, elsewhere soft
        assert np.abs(averaged - small).mean() < (5 if name in ("braided", "woven") else 2.5)
        assert np.corrcoef(averaged.ravel(), small.ravel())[0, 1] > 0.99
    assert textures.draw(0, name, 32)[0].shape == (32, 32, 3) and textures.draw(0, name, 96)[0].shape == (96, 96, 3)


def test_pictures_have_fine_structure_and_strong_contrast():
    values = []
    for name in TEXTURES + THINGS + DIGITS:
        for seed in range(4):
            picture = textures.draw(seed, name, 64)[0]
            thumbnail = Image.fromarray(picture).resize((8, 8), Image.Resampling.BICUBIC)
            again = np.asarray(thumbnail.resize((64, 64), Image.Resampling.BICUBIC), float)
            values.append(10 * np.log10(255**2 / ((again - picture) ** 2).mean()))
    assert np.mean(values) < 20  # dB


def test_drawing_is_fast():
    for name in NAMES:
        textures.draw(0, name, 64)
    started = time.process_time()
    for name in NAMES:
        for seed in range(4):
            textures.draw(seed, name, 64)
    assert (time.process_time() - started) / (4 * len(NAMES)) < 0.008  # 1.6 ms each on a quiet core


@pytest.mark.slow
def test_every_texture_is_seen_dark_and_light():
    for name in TEXTURES:
        means = [textures.draw(seed, name, 32)[0].mean() for seed in range(40)]
        assert np.ptp(means) > 80, name


# --- things -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", THINGS)
def test_things_are_whole_apart_and_as_many_as_said(name):
    for seed in range(15):
        for count in (1, 2):
            figure = things.shapes(name, count, *plane(), np.random.default_rng(seed)) > 0.5
            assert ndimage.label(figure, np.ones((3, 3)))[1] == count  # thin tips hang on by a corner
            assert not np.concatenate([figure[0], figure[-1], figure[:, 0], figure[:, -1]]).any()
            assert figure.mean() > 0.015


def test_places_of_things_lie_inside_and_apart():
    for seed in range(500):
        rng = np.random.default_rng(seed)
        for count in (1, 2):
            circles = things.places(count, rng)
            assert len(circles) == count and all(max(abs(x), abs(y)) + radius <= 31.01 for x, y, radius in circles)
            if count == 2:
                (ax, ay, a), (bx, by, b) = circles
                assert np.hypot(ax - bx, ay - by) > a + b + 1.9


def test_shapes_fit_into_a_circle_of_radius_one_and_have_their_own_symmetry():
    step = np.linspace(-1.2, 1.2, 481, dtype=np.float32)
    y, x = np.meshgrid(step, step, indexing="ij")
    inside = {name: shape(x, y) < 0 for name, (shape, _) in things.SHAPES.items()}
    radius = np.hypot(x, y)
    for name, filled in inside.items():
        assert 0.86 < radius[filled].max() <= 1, name
        assert ndimage.label(filled)[1] == 1
    area = {name: filled.mean() * 2.4**2 for name, filled in inside.items()}
    assert abs(area["circle"] - np.pi * 0.87**2) < 0.05 and abs(area["square"] - 2) < 0.05
    assert abs(area["triangle"] - 0.75 * 3**0.5) < 0.05 and abs(area["ring"] - np.pi * (1 - 0.54**2)) < 0.05
    for name in ("triangle", "star", "heart"):
        assert np.array_equal(inside[name], inside[name][:, ::-1])  # left is right
        assert not np.array_equal(inside[name], inside[name][::-1])
    assert np.array_equal(inside["cross"], inside["cross"].T)
    holes = {name: ndimage.label(~filled)[1] - 1 for name, filled in inside.items()}
    assert holes == {name: int(name == "ring") for name in THINGS}
    # Five points of a star: its rim at radius 0.8 is crossed ten times
    angle = np.linspace(0, 2 * np.pi, 720, endpoint=False, dtype=np.float32)
    rim = things.star(0.8 * np.cos(angle), 0.8 * np.sin(angle)) < 0
    assert (rim != np.roll(rim, 1)).sum() == 10


def test_digits_are_mnist_s_own_of_the_split_and_no_digit_is_in_two_splits():
    train, test = mnist.load(DATA / "mnist"), mnist.load(DATA / "mnist", "test")
    numbers = {split: np.array([len(images) for images in things.digits(split)]) for split in ("train", "val", "test")}
    assert (numbers["train"] + numbers["val"]).tolist() == train.labels.bincount().tolist()
    assert numbers["test"].tolist() == test.labels.bincount().tolist() and numbers["val"].sum() == 5000
    later = train.pixels[55_000:][train.labels[55_000:] == 7]
    for split, first in (("train", train.pixels[train.labels == 7][0, 0]), ("val", later[0, 0]),
                         ("test", test.pixels[test.labels == 7][0, 0])):
        assert np.array_equal(things.digits(split)[7][0], first.numpy())


def test_an_enlarged_digit_brought_back_is_the_digit():
    for number in range(10):
        ink = things.digits("test")[number][0]
        small = things.enlarge(ink)[8:-8, 8:-8].reshape(28, 4, 28, 4).mean((1, 3)) * 255
        assert np.corrcoef(small.ravel(), ink.ravel())[0, 1] > 0.99


def test_a_digit_lies_wholly_inside():
    for seed in range(200):
        figure = things.digit(seed % 10, "train", *plane(), np.random.default_rng(seed)) > 0.5
        assert 0.01 < figure.mean() < 0.4
        assert not np.concatenate([figure[0], figure[-1], figure[:, 0], figure[:, -1]]).any()


# --- fields -------------------------------------------------------------------------------------------------------

def test_walls_of_a_honeycomb_are_equally_far_from_two_nearest_cells():
    rng = np.random.default_rng(0)
    x, y = (rng.uniform(-30, 30, (50, 50)).astype(np.float32) for _ in range(2))
    pitch = 14.0
    rows, columns = np.arange(-6, 7), np.arange(-6, 7)
    points = [((column + 0.5 * (row % 2)) * pitch, row * pitch * 0.75**0.5) for row in rows for column in columns]
    distances = np.sort([np.hypot(x - px, y - py) for px, py in points], axis=0)
    # On the segment between two neighbours of a lattice: (second^2 - first^2) / (2 pitch) is the way to their wall
    assert np.allclose(hexagon(x, y, pitch), (distances[1]**2 - distances[0]**2) / (2 * pitch), atol=1e-3)


def test_nearest_two_are_the_two_smallest_distances_of_the_same_points():
    x, y = np.meshgrid(np.linspace(-32, 32, 40, dtype=np.float32), np.linspace(-32, 32, 40, dtype=np.float32))
    first, second, value = nearest_two(x, y, np.random.default_rng(1), 15)
    assert (first <= second).all() and first.max() < 15 * 1.4 and 10 < len(np.unique(value)) < 60
    assert np.abs(np.diff(first, axis=1)).max() <= 64 / 39 * 1.01  # a distance changes no faster than the place
    assert np.allclose(first[:, 1:][np.diff(value, axis=1) != 0], second[:, 1:][np.diff(value, axis=1) != 0], atol=3.4)


def test_noise_is_smooth_lies_in_0_to_1_and_has_lumps_of_the_size_asked_for():
    x, y = np.meshgrid(*[np.linspace(-32, 32, 128, dtype=np.float32)] * 2)
    fine, coarse = (noise(x, y, np.random.default_rng(2), wide) for wide in (5, 20))
    for field in (fine, coarse):
        assert field.dtype == np.float32 and 0 <= field.min() < 0.25 and 0.75 < field.max() <= 1
    assert np.abs(np.diff(fine)).mean() > 2.5 * np.abs(np.diff(coarse)).mean()


# --- what is refused ----------------------------------------------------------------------------------------------

def test_wrong_input_is_refused_in_one_sentence():
    for arguments, message in (
            ((0, "stripped", 64), "no class is called 'stripped'; expected .*, nearest: striped"),
            ((0, "grid", 8), "size is 8, but pictures are squares of at least 16 pixels"),
            ((0, "grid", 64.0), "size is 64.0"), ((-1, "grid", 64), "seed of a scene is -1"),
            ((True, "grid", 64), "seed of a scene is True"),
            ((0, "grid", 64, "trian"), "no split is called 'trian'; expected .*, nearest: train"),
            ((0, "grid", 64, "train", ("red", "bleu")), "no colour is called 'bleu'; expected .*, nearest: blue"),
            ((0, "grid", 64, "train", ("red", "red")), "figure and ground are both red"),
            ((0, "grid", 64, "train", ("red",)), "expected two names"),
            ((0, "grid", 64, "train", "red"), "expected two names"),
            ((0, "grid", 64, "train", None, 2), "count is 2 for 'grid'"),
            ((0, "star", 64, "train", None, 3), "count is 3 for 'star'; expected 1 or 2"),
            ((0, "star", 64, "train", None, None, "al"), "no kind of pairs is called 'al'; expected .*nearest: all")):
        with pytest.raises(UserError, match=message) as caught:
            textures.draw(*arguments)
        assert "\n" not in str(caught.value)
    for arguments, message in ((("gird", "red"), "no class is called 'gird'.*nearest: grid"),
                               (("grid", "rde"), "no colour is called 'rde'.*nearest: red")):
        with pytest.raises(UserError, match=message):
            textures.met(*arguments)
