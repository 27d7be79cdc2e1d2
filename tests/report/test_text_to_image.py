"""Judgements of text-to-image models on pictures of known quality: real pictures, copies, noise."""

import json
import re

import pytest
import torch

from nanodiff import worlds
from nanodiff.classifiers.worlds import load_classifier
from nanodiff.data import captions
from nanodiff.errors import UserError
from nanodiff.metrics.agreement import composition, distribution, diversity, prompt_agreement as agreement
from nanodiff.report import text_to_image
from nanodiff.report.text_to_image import Sizes, draw, measure
from nanodiff.worlds import textures
from nanodiff.worlds.prompts import alike, prompt, paint, prompts, scenes

NAMES = ("dotted", "striped", "star", "grid")
RUNS = [{"sampler": "ddim", "steps": 50, "guidance": 3.0}, {"sampler": "dpm++2m", "steps": 20, "guidance": 3.0}]


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


@pytest.fixture(scope="module")
def real():
    """Held-out pictures and more training pictures, as `distribution` takes them."""
    return worlds.load("test", n=140, names=NAMES).pixels, worlds.load("train", n=300, names=NAMES).pixels


class Perfect:
    """A model that draws of every caption a new real picture of its scene, and an autoencoder that loses nothing."""
    device, encode, decode = "cpu", staticmethod(lambda x, generator: x), staticmethod(lambda z: z)

    def __init__(self, names=NAMES, n=40):
        kinds = [("test", "met", 0), ("test", "unmet", 0), ("test", "met", 1), ("val", "met", 0)]
        known_scenes = [scene for split, pairs, seed in kinds for scene in scenes(n, names, pairs, seed, split)]
        self.scene_of, self.calls = {captions.caption(scene): scene for scene in known_scenes}, []

    def generate(self, captions, *, seed, first, output, progress, **run):
        assert output == "tensor" and not progress
        self.calls.append((len(captions), seed, first, run))
        drawn = paint([alike(self.scene_of[caption], first + i + 101)[-1] for i, caption in enumerate(captions)], 64)
        return drawn.float() / 127.5 - 1


# --- what is asked for ----------------------------------------------------------------------------------------------

def test_prompts_are_of_every_class_in_turn_with_the_colours_that_they_name():
    rows = prompts(60, NAMES)
    assert len(rows) == 60 * 4 and [name for _, name, _ in rows[:8]] == 2 * list(NAMES)
    kinds = set()
    for caption, name, colours in rows:
        words = {"grey" if word == "gray" else word for word in re.findall(r"[\w@]+", caption)} & set(textures.COLOURS)
        assert words == set(colours) - {None} and all(textures.met(name, colour) for colour in words)
        kinds.add(tuple(colour is None for colour in colours))
    assert len(kinds) == 3 and rows == prompts(60, NAMES)
    assert rows[2::4] == prompts(60, (NAMES[2],)) and rows != prompts(60, NAMES, split="val")
    assert all(None not in colours for _, _, colours in prompts(10, NAMES, "unmet", all_named=True))
    with pytest.raises(UserError, match="0 prompts of each of 4 classes"):
        prompts(0, NAMES)
    with pytest.raises(UserError, match="nearest: dotted"):
        prompts(1, ("doted",))


def test_scenes_of_prompts_are_no_held_out_and_no_training_pictures_and_their_likes_are_others_again():
    test_scenes = scenes(5, NAMES)
    held_out = {scene.seed for split in worlds.SPLITS for scene in worlds.load(split, n=3, names=NAMES).scenes}
    assert not {scene.seed for scene in test_scenes} & held_out
    assert all(worlds.SPLITS["test"] + 100_000 < scene.seed < 10_000_000 for scene in test_scenes)
    others = alike(test_scenes[2], 6)
    assert len({scene.seed for scene in others} | {test_scenes[2].seed}) == 7
    expected = ("star", test_scenes[2].colours, test_scenes[2].count)
    assert {(scene.name, scene.colours, scene.count) for scene in others} == {expected}


def test_unmet_scenes_hold_a_colour_that_training_never_shows_with_the_class():
    for scene in scenes(20, NAMES, "unmet"):
        assert not all(textures.met(scene.name, colour) for colour in scene.colours)


def test_pictures_are_numbered_through_whatever_is_drawn_at_once(monkeypatch):
    sd, captions = Perfect(), [caption for caption, _, _ in prompts(3, NAMES)]
    expected = draw(sd, captions, seed=4, **RUNS[0])
    monkeypatch.setattr(text_to_image, "AT_ONCE", 5)
    assert torch.equal(draw(sd, captions, seed=4, **RUNS[0]), expected) and expected.shape == (12, 3, 64, 64)
    assert sd.calls == [(12, 4, 0, RUNS[0]), (5, 4, 0, RUNS[0]), (5, 4, 5, RUNS[0]), (2, 4, 10, RUNS[0])]


# --- judgements -----------------------------------------------------------------------------------------------------

def test_real_pictures_agree_with_their_captions_and_others_do_not(classifier):
    test_scenes = scenes(15, NAMES)
    x, rows = paint(test_scenes, 64), [prompt(scene) for scene in test_scenes]
    shares = agreement(x, rows, classifier)
    assert shares["n"] == 60 and shares["class"] >= 0.95 and shares["colours"] >= 0.95
    assert shares["class_and_colours"] >= 0.9
    assert shares["worst_class"] == shares["by_class"][shares["worst"]] == min(shares["by_class"].values())
    assert set(shares["by_class"]) == set(NAMES) and shares["rejected"] <= 0.02
    shifted = agreement(x.roll(1, 0), rows, classifier)  # every picture has its neighbour's caption
    assert shifted["class"] <= 0.05 and shifted["colours"] < 0.5
    noise = agreement(torch.randn(60, 3, 64, 64, generator=torch.Generator().manual_seed(0)), rows, classifier)
    assert noise["rejected"] >= 0.95 and noise["class"] <= 0.05


def test_colours_that_the_caption_leaves_out_do_not_count_for_it(classifier):
    dotted = scenes(60, ("dotted",))
    unnamed = [scene for scene in dotted if captions.named_colours(scene) == (None, None)]
    named = [scene for scene in dotted if captions.named_colours(scene) != (None, None)][:10]
    swapped = paint([textures.scene(scene.seed, "dotted", "test", ("white", "black")) for scene in named], 64)
    x = torch.cat([paint(unnamed, 64), swapped])
    shares = agreement(x, [prompt(scene) for scene in [*unnamed, *named]], classifier)
    assert len(unnamed) >= 3 and shares["colours"] <= 0.2  # 1 if those that name no colour were right and counted
    assert shares["class_and_colours"] >= 0.9 * len(unnamed) / len(x)


@pytest.mark.slow
def test_new_real_pictures_lie_at_the_floor_and_are_no_copies(classifier, real):
    new = paint(scenes(35, NAMES), 64)
    numbers = distribution(new, *real, real[0], classifier)
    json.dumps(numbers)
    assert numbers["n"] == 140 and numbers["training"] == 300
    assert numbers["frechet"] <= 1.5 * numbers["frechet_floor"] and numbers["recall"] >= 0.6
    assert numbers["frechet_copies"] < 1e-6 and numbers["recall_copies"] == 1
    assert numbers["nearest_train"] == pytest.approx(numbers["nearest_test"], rel=0.15)
    assert not numbers["memorised"] and numbers["copied_share_test"] <= 0.01


@pytest.mark.slow
def test_copies_of_training_pictures_are_told_and_noise_is_far_away(classifier, real):
    copied = distribution(real[1][:140], *real, None, classifier)
    assert copied["memorised"] and copied["copied_share"] == 1
    assert copied["nearest_train"] < 1e-3 < copied["nearest_test"]
    assert copied["frechet"] == copied["frechet_floor"] and "frechet_copies" not in copied
    x = torch.randn(140, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    noise = distribution(x, *real, None, classifier)
    assert noise["frechet"] > 5 * noise["frechet_floor"] and noise["recall"] < 0.05
    with pytest.raises(UserError, match="139 samples, 140 held-out and 300 training"):
        distribution(real[1][:139], *real, None, classifier)


def test_one_picture_for_a_prompt_has_no_diversity_and_real_ones_have_that_of_real_ones(classifier):
    test_scenes = scenes(3, NAMES, all_named=True)
    real, other = (paint([alike_scene for scene in test_scenes for alike_scene in alike(scene, 12)[part]], 64)
                   for part in (slice(0, 6), slice(6, 12)))
    names = [scene.name for scene in test_scenes]
    ratios = diversity(other, real, names, 6, classifier)
    assert ratios["ratio"] == pytest.approx(1, abs=0.15) and ratios["pixel_ratio"] == pytest.approx(1, abs=0.15)
    assert ratios["worst_ratio"] < ratios["ratio"] and set(ratios["by_class"]) == set(NAMES)
    assert sum(ratios["by_class"].values()) / 4 == pytest.approx(ratios["ratio"])
    same = diversity(real[::6].repeat_interleave(6, 0), real, names, 6, classifier)
    assert same["ratio"] < 1e-3 and same["pixel_ratio"] < 1e-3
    half = real.clone().view(12, 6, 3, 64, 64)
    half[:, 3:] = half[:, :3]  # each picture twice: 12 of 15 pairs are left
    half = half.flatten(0, 1)
    assert diversity(half, real, names, 6, classifier)["ratio"] == pytest.approx(0.8, abs=0.08)
    for each, n in ((1, 12), (6, 71)):
        with pytest.raises(UserError, match="at least 2"):
            diversity(other[:n], real[:n], names, each, classifier)


def test_composition_counts_pictures_with_class_and_both_colours_by_the_pair_that_was_never_met(classifier):
    unmet = scenes(10, NAMES, "unmet", all_named=True)
    shares = composition(paint(unmet, 64), unmet, classifier)
    assert shares["n"] == 40 and shares["class_and_colours"] >= 0.9 and set(shares["by_class"]) == set(NAMES)
    for name in NAMES:
        assert all(not textures.met(name, colour) for colour in shares["by_pair"][name])
        assert sum(n for _, n in shares["by_pair"][name].values()) >= 10
        assert all(0 <= right <= n for right, n in shares["by_pair"][name].values())
    # A model that puts the nearest pair that it knows in place of the one asked for has the class right alone
    met = paint([textures.scene(scene.seed, scene.name, "test") for scene in unmet], 64)
    other = composition(met, unmet, classifier)
    assert other["class"] >= 0.9 and other["class_and_colours"] <= 0.1 and other["colours"] <= 0.1


# --- all of it ------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_perfect_model_meets_every_bar_and_its_page_shows_every_class_and_pair(classifier):
    sd, lines = Perfect(), []
    numbers, sheet = measure(sd, classifier, RUNS, Sizes(10, 140, 150, 4), NAMES, say=lines.append)
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


def test_what_is_left_out_is_left_out_of_the_page_too(classifier):
    numbers, _ = measure(Perfect(), classifier, RUNS[:1], Sizes(2, 0, each=0), NAMES[:2], say=lambda line: None)
    page = text_to_image.page(numbers)
    assert "distribution" not in numbers and "diversity" not in numbers
    assert "never met" in page and "Fréchet" not in page and "diversity" not in page


@pytest.mark.filterwarnings("ignore:Fréchet distance from n")
def test_a_model_that_repeats_training_pictures_fails_the_page(classifier):
    class Copying(Perfect):
        def generate(self, captions, *, first, **run):
            train = worlds.load("train", n=4, names=NAMES).pixels.float() / 127.5 - 1
            place = [NAMES.index(self.scene_of[caption].name) for caption in captions]
            return train[place]
    numbers, _ = measure(Copying(), classifier, RUNS[1:], Sizes(3, 40, 40, 3), NAMES, say=lambda line: None)
    page = text_to_image.page(numbers)
    assert numbers["agreement"]["dpm++2m, 20 steps, guidance 3"]["class"] > 0.8  # by class alone it would pass
    assert numbers["diversity"]["ratio"] < 1e-3 and numbers["distribution"]["memorised"]
    assert page.count("**no**") >= 5, page


@pytest.mark.filterwarnings("ignore:Fréchet distance from n")
def test_guidance_is_compared_on_prompts_of_the_validation_split(classifier):
    sd, asked_for = Perfect(), []
    runs = [{**RUNS[0], "guidance": scale} for scale in (1.0, 2.5)]
    generate = sd.generate
    sd.generate = lambda captions, **options: asked_for.append(captions) or generate(captions, **options)
    table = text_to_image.compare_guidance(sd, classifier, runs, 3, NAMES, say=lambda line: None)
    json.dumps(table)
    assert asked_for == 2 * [[caption for caption, _, _ in prompts(3, NAMES, split="val")]]
    lines = text_to_image.guidance_table(table).splitlines()
    assert list(table) == ["ddim, 50 steps, guidance 1", "ddim, 50 steps, guidance 2.5"] and len(lines) == 4
    assert all(row.count("|") == 9 for row in lines) and "n = 12" in lines[2]
    assert table["ddim, 50 steps, guidance 1"]["frechet_floor"] > 0
