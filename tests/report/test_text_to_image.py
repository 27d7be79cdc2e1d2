"""Judging text-to-image models by pictures of which it is known how good they are: real ones, copies, noise."""

import json
import re

import pytest
import torch

from nanodiff import worlds
from nanodiff.classifiers.worlds import load_reader
from nanodiff.data import captions
from nanodiff.errors import UserError
from nanodiff.metrics.agreement import composition, distribution, diversity, prompt_agreement as agreement
from nanodiff.report import text_to_image
from nanodiff.report.text_to_image import Sizes, draw, measure
from nanodiff.worlds import textures
from nanodiff.worlds.prompts import alike, asked, paint, prompts, scenes

NAMES = ("dotted", "striped", "star", "grid")
RUNS = [{"sampler": "ddim", "steps": 50, "guidance": 3.0}, {"sampler": "dpm++2m", "steps": 20, "guidance": 3.0}]


@pytest.fixture(scope="module")
def reader():
    return load_reader()


@pytest.fixture(scope="module")
def real():
    """Held-out pictures and more training pictures, as `distribution` takes them."""
    return worlds.load("test", n=140, names=NAMES).pixels, worlds.load("train", n=300, names=NAMES).pixels


class Perfect:
    """A model that draws of every caption a new real picture of its scene, and an autoencoder that loses nothing."""
    device, encode, decode = "cpu", staticmethod(lambda x, generator: x), staticmethod(lambda z: z)

    def __init__(self, names=NAMES, n=40):
        kinds = [("test", "met", 0), ("test", "unmet", 0), ("test", "met", 1), ("val", "met", 0)]
        made = [scene for split, pairs, seed in kinds for scene in scenes(n, names, pairs, seed, split)]
        self.known, self.calls = {captions.caption(scene): scene for scene in made}, []

    def generate(self, captions, *, seed, first, output, progress, **run):
        assert output == "tensor" and not progress
        self.calls.append((len(captions), seed, first, run))
        drawn = paint([alike(self.known[caption], first + i + 101)[-1] for i, caption in enumerate(captions)], 64)
        return drawn.float() / 127.5 - 1


# --- what is asked for ----------------------------------------------------------------------------------------------

def test_prompts_are_of_every_class_in_turn_with_the_colours_that_they_name():
    found = prompts(60, NAMES)
    assert len(found) == 60 * 4 and [name for _, name, _ in found[:8]] == 2 * list(NAMES)
    kinds = set()
    for caption, name, colours in found:
        words = {"grey" if word == "gray" else word for word in re.findall(r"[\w@]+", caption)} & set(textures.COLOURS)
        assert words == set(colours) - {None} and all(textures.met(name, colour) for colour in words)
        kinds.add(tuple(colour is None for colour in colours))
    assert len(kinds) == 3 and found == prompts(60, NAMES)
    assert found[2::4] == prompts(60, (NAMES[2],)) and found != prompts(60, NAMES, split="val")
    assert all(None not in colours for _, _, colours in prompts(10, NAMES, "unmet", all_named=True))
    with pytest.raises(UserError, match="0 prompts of each of 4 classes"):
        prompts(0, NAMES)
    with pytest.raises(UserError, match="nearest: dotted"):
        prompts(1, ("doted",))


def test_scenes_of_prompts_are_no_held_out_and_no_training_pictures_and_their_likes_are_others_again():
    some = scenes(5, NAMES)
    held_out = {scene.seed for split in worlds.SPLITS for scene in worlds.load(split, n=3, names=NAMES).scenes}
    assert not {scene.seed for scene in some} & held_out
    assert all(worlds.SPLITS["test"] + 100_000 < scene.seed < 10_000_000 for scene in some)
    others = alike(some[2], 6)
    assert len({scene.seed for scene in others} | {some[2].seed}) == 7
    assert {(one.name, one.colours, one.count) for one in others} == {("star", some[2].colours, some[2].count)}


def test_unmet_scenes_hold_a_colour_that_training_never_shows_with_the_class():
    for scene in scenes(20, NAMES, "unmet"):
        assert not all(textures.met(scene.name, colour) for colour in scene.colours)


def test_pictures_are_numbered_through_whatever_is_drawn_at_once(monkeypatch):
    sd, captions = Perfect(), [caption for caption, _, _ in prompts(3, NAMES)]
    whole = draw(sd, captions, seed=4, **RUNS[0])
    monkeypatch.setattr(text_to_image, "AT_ONCE", 5)
    assert torch.equal(draw(sd, captions, seed=4, **RUNS[0]), whole) and whole.shape == (12, 3, 64, 64)
    assert sd.calls == [(12, 4, 0, RUNS[0]), (5, 4, 0, RUNS[0]), (5, 4, 5, RUNS[0]), (2, 4, 10, RUNS[0])]


# --- judgements -----------------------------------------------------------------------------------------------------

def test_real_pictures_agree_with_their_captions_and_others_do_not(reader):
    some = scenes(15, NAMES)
    x, wanted = paint(some, 64), [asked(scene) for scene in some]
    found = agreement(x, wanted, reader)
    assert found["n"] == 60 and found["class"] >= 0.95 and found["colours"] >= 0.95
    assert found["class_and_colours"] >= 0.9
    assert found["worst_class"] == found["by_class"][found["worst"]] == min(found["by_class"].values())
    assert set(found["by_class"]) == set(NAMES) and found["rejected"] <= 0.02
    moved = agreement(x.roll(1, 0), wanted, reader)  # every picture has its neighbour's caption
    assert moved["class"] <= 0.05 and moved["colours"] < 0.5
    noise = agreement(torch.randn(60, 3, 64, 64, generator=torch.Generator().manual_seed(0)), wanted, reader)
    assert noise["rejected"] >= 0.95 and noise["class"] <= 0.05


def test_colours_that_the_caption_leaves_out_do_not_count_for_it(reader):
    some = scenes(60, ("dotted",))
    bare = [scene for scene in some if captions.named_colours(scene) == (None, None)]
    told = [scene for scene in some if captions.named_colours(scene) != (None, None)][:10]
    swapped = paint([textures.scene(scene.seed, "dotted", "test", ("white", "black")) for scene in told], 64)
    x = torch.cat([paint(bare, 64), swapped])
    found = agreement(x, [asked(scene) for scene in [*bare, *told]], reader)
    assert len(bare) >= 3 and found["colours"] <= 0.2  # 1 if those that name no colour were right and counted
    assert found["class_and_colours"] >= 0.9 * len(bare) / len(x)


def test_new_real_pictures_lie_at_the_floor_and_are_no_copies(reader, real):
    new = paint(scenes(35, NAMES), 64)
    found = distribution(new, *real, real[0], reader)
    json.dumps(found)
    assert found["n"] == 140 and found["training"] == 300
    assert found["frechet"] <= 1.5 * found["frechet_floor"] and found["recall"] >= 0.6
    assert found["frechet_copies"] < 1e-6 and found["recall_copies"] == 1
    assert found["nearest_train"] == pytest.approx(found["nearest_test"], rel=0.15)
    assert not found["memorised"] and found["copied_share_test"] <= 0.01


def test_copies_of_training_pictures_are_told_and_noise_is_far_away(reader, real):
    copied = distribution(real[1][:140], *real, None, reader)
    assert copied["memorised"] and copied["copied_share"] == 1
    assert copied["nearest_train"] < 1e-3 < copied["nearest_test"]
    assert copied["frechet"] == copied["frechet_floor"] and "frechet_copies" not in copied
    noise = distribution(torch.randn(140, 3, 64, 64, generator=torch.Generator().manual_seed(0)), *real, None, reader)
    assert noise["frechet"] > 5 * noise["frechet_floor"] and noise["recall"] < 0.05
    with pytest.raises(UserError, match="139 samples, 140 held-out and 300 training"):
        distribution(real[1][:139], *real, None, reader)


def test_one_picture_for_a_prompt_has_no_diversity_and_real_ones_have_that_of_real_ones(reader):
    some = scenes(3, NAMES, all_named=True)
    real, other = (paint([one for scene in some for one in alike(scene, 12)[part]], 64)
                   for part in (slice(0, 6), slice(6, 12)))
    names = [scene.name for scene in some]
    found = diversity(other, real, names, 6, reader)
    assert found["ratio"] == pytest.approx(1, abs=0.15) and found["pixel_ratio"] == pytest.approx(1, abs=0.15)
    assert found["worst_ratio"] < found["ratio"] and set(found["by_class"]) == set(NAMES)
    assert sum(found["by_class"].values()) / 4 == pytest.approx(found["ratio"])
    same = diversity(real[::6].repeat_interleave(6, 0), real, names, 6, reader)
    assert same["ratio"] < 1e-3 and same["pixel_ratio"] < 1e-3
    half = real.clone().view(12, 6, 3, 64, 64)
    half[:, 3:] = half[:, :3]  # each picture twice: 12 of 15 pairs are left
    half = half.flatten(0, 1)
    assert diversity(half, real, names, 6, reader)["ratio"] == pytest.approx(0.8, abs=0.08)
    for each, n in ((1, 12), (6, 71)):
        with pytest.raises(UserError, match="at least 2"):
            diversity(other[:n], real[:n], names, each, reader)


def test_composition_counts_pictures_with_class_and_both_colours_by_the_pair_that_was_never_met(reader):
    some = scenes(10, NAMES, "unmet", all_named=True)
    found = composition(paint(some, 64), some, reader)
    assert found["n"] == 40 and found["class_and_colours"] >= 0.9 and set(found["by_class"]) == set(NAMES)
    for name in NAMES:
        assert all(not textures.met(name, colour) for colour in found["by_pair"][name])
        assert sum(n for _, n in found["by_pair"][name].values()) >= 10
        assert all(0 <= right <= n for right, n in found["by_pair"][name].values())
    # A model that puts the nearest pair that it knows in place of the one asked for has the class right alone
    known = paint([textures.scene(scene.seed, scene.name, "test") for scene in some], 64)
    other = composition(known, some, reader)
    assert other["class"] >= 0.9 and other["class_and_colours"] <= 0.1 and other["colours"] <= 0.1


# --- all of it ------------------------------------------------------------------------------------------------------

def test_a_perfect_model_meets_every_bar_and_its_page_shows_every_class_and_pair(reader):
    sd, lines = Perfect(), []
    numbers, sheet = measure(sd, reader, RUNS, Sizes(10, 140, 150, 4), NAMES, say=lines.append)
    page = text_to_image.page(json.loads(json.dumps(numbers)))
    bars = [line for line in page.splitlines() if line.endswith(("| yes |", "| **no** |"))]
    # Whose median is the larger is chance
    assert len(bars) == 10 and sum(line.endswith("| **no** |") for line in bars) <= 1, page
    assert not any("**no**" in line for line in bars if "nearest" not in line), page
    for name in NAMES:
        assert re.search(rf"^\| {name} \| \d+% \| \d+% \| \d\.\d\d \| \d+% \| \w+ \d+ of \d+", page, re.M), page
    assert numbers["diversity"]["ratio"] == pytest.approx(1, abs=0.15) and len(lines) >= 5
    assert {run["steps"] for _, _, _, run in sd.calls} == {50, 20} and sheet.height > 4 * 64 and sheet.width > 10 * 64
    assert len({seed for _, seed, _, run in sd.calls if run["steps"] == 50}) == 4  # no two measures share their noise


def test_what_is_left_out_is_left_out_of_the_page_too(reader):
    numbers, _ = measure(Perfect(), reader, RUNS[:1], 2, 0, each=0, names=NAMES[:2], say=lambda line: None)
    page = text_to_image.page(numbers)
    assert "distribution" not in numbers and "diversity" not in numbers
    assert "never met" in page and "Fréchet" not in page and "diversity" not in page


@pytest.mark.filterwarnings("ignore:Fréchet distance from n")
def test_a_model_that_repeats_training_pictures_fails_the_page(reader):
    class Copying(Perfect):
        def generate(self, captions, *, first, **run):
            train = worlds.load("train", n=4, names=NAMES).pixels.float() / 127.5 - 1
            place = [NAMES.index(self.known[caption].name) for caption in captions]
            return train[place]
    numbers, _ = measure(Copying(), reader, RUNS[1:], 3, 40, 40, 3, NAMES, say=lambda line: None)
    page = text_to_image.page(numbers)
    assert numbers["agreement"]["dpm++2m, 20 steps, guidance 3"]["class"] > 0.8  # by class alone it would pass
    assert numbers["diversity"]["ratio"] < 1e-3 and numbers["distribution"]["memorised"]
    assert page.count("**no**") >= 5, page


@pytest.mark.filterwarnings("ignore:Fréchet distance from n")
def test_guidance_is_compared_on_prompts_of_the_validation_split(reader):
    sd, asked_for = Perfect(), []
    runs = [{**RUNS[0], "guidance": scale} for scale in (1.0, 2.5)]
    drawn = sd.generate
    sd.generate = lambda captions, **more: asked_for.append(captions) or drawn(captions, **more)
    table = text_to_image.compare_guidance(sd, reader, runs, 3, NAMES, say=lambda line: None)
    json.dumps(table)
    assert asked_for == 2 * [[caption for caption, _, _ in prompts(3, NAMES, split="val")]]
    shown = text_to_image.guidance_table(table).splitlines()
    assert list(table) == ["ddim, 50 steps, guidance 1", "ddim, 50 steps, guidance 2.5"] and len(shown) == 4
    assert all(row.count("|") == 9 for row in shown) and "n = 12" in shown[2]
    assert table["ddim, 50 steps, guidance 1"]["frechet_floor"] > 0
