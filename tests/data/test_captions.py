import dataclasses
import re

import pytest
from PIL import Image

from nanodiff.data import captions as grammar
from nanodiff.data import dtd
from nanodiff.data.captions import BEHIND, DISTRACTORS, DTD, KINDS, NUMBERS, PHOTOS, SHAPES, WORDS
from nanodiff.errors import UserError
from nanodiff.models.tokenizer import Tokenizer
from nanodiff.worlds import textures

BASE = textures.TEXTURES + textures.THINGS + textures.DIGITS
LATER = {"zigzagged", "zigzag", "zigzags", "woven", "weave", "weaves", "composite", "composites", "fabric", "carbon"}


@pytest.fixture(scope="module")
def said():
    """{class: 300 captions} of the base world."""
    return {name: [grammar.caption(textures.scene(seed, name)) for seed in range(300)] for name in BASE}


def words_of(captions):
    return {word.strip(",") for one in captions for word in one.split()}


def test_every_word_and_every_template_of_the_grammar_occurs(said):
    every = [caption for captions in said.values() for caption in captions]
    words = words_of(every)
    assert words >= {*KINDS, *PHOTOS, *BEHIND, *NUMBERS, *DISTRACTORS, *textures.COLOURS, "gray", "two", "one",
                     "single", "pair", "paper", "handwritten", "a", "an", *"0123456789"}
    for name in textures.TEXTURES:
        adjectives, nouns = WORDS[name]
        assert words_of(said[name]) >= {name, f"dtd_{name}", *adjectives, *" ".join(nouns).split()} - {"a"}, name
    for name in textures.THINGS:
        for noun in SHAPES[name]:
            assert {noun, noun + ("es" if noun == "cross" else "s")} <= words_of(said[name])
    gap = {"photo": PHOTOS, "kind": KINDS, "behind": BEHIND, "number": NUMBERS, "figure": [*textures.COLOURS, "gray"],
           "ground": [*textures.COLOURS, "gray"], "digit": [*textures.DIGITS, *"0123456789"]}
    for templates in (grammar.TEXTURES, grammar.THINGS, grammar.DIGITS):
        for template in sum(templates.values(), ()):
            shape = re.sub(r"\{(\w+)\}", lambda m: f"({'|'.join(gap[m[1]])})" if m[1] in gap else "[^,]+", template)
            shape = re.sub(r"\ba (?=[(])", "an? ", shape)
            assert any(re.fullmatch(shape, one) for one in every), template


def test_distractors_are_in_about_an_eighth_of_the_captions_each_of_them_often(said):
    every = [one.replace(",", "").split() for captions in said.values() for one in captions]
    share = sum(any(word in DISTRACTORS for word in one) for one in every) / len(every)
    assert 0.1 < share < 0.15
    for word in DISTRACTORS:
        assert sum(word in one for one in every) > len(every) * 0.01, word
    distracted = [one for one in every if any(word in DISTRACTORS for word in one)]
    assert any(one[0] in DISTRACTORS for one in distracted) and any(one[-1] in DISTRACTORS for one in distracted)


def test_words_of_the_concepts_to_be_taught_later_never_occur_in_base_captions(said):
    for captions in said.values():
        for one in captions:
            assert not LATER & set(re.split("[ ,_]+", one)), one
    for name in textures.NEW:
        assert LATER & set(re.split("[ ,_]+", grammar.caption(textures.scene(3, name))))


def test_a_caption_follows_from_its_scene_and_another_variant_says_the_same_in_other_words():
    one = textures.scene(5, "striped")
    assert grammar.caption(one) == grammar.caption(textures.scene(5, "striped")) == textures.draw(5, "striped", 32)[1]
    several = {grammar.caption(one, variant) for variant in range(30)}
    assert len(several) > 15
    assert all(set(textures.COLOURS) & words_of([text]) <= set(one.colours) for text in several)
    assert grammar.caption(textures.scene(5, "striped", "test")) != grammar.caption(textures.scene(5, "striped"))


@pytest.mark.parametrize("name", ["dotted", "spiralled", "star", "seven"])
def test_captions_name_the_colours_of_figure_and_ground_and_nothing_else(name):
    both = 0
    for seed in range(200):
        captions = {}
        for colours in (("red", "blue"), ("orange", "white"), ("blue", "red")):
            one = grammar.caption(textures.scene(seed, name, colours=colours))
            named = [word.strip(",") for word in one.split() if word.strip(",") in textures.COLOURS]
            assert set(named) <= set(colours) and len(named) == len(set(named))
            captions[colours] = one, named
        (first, named), (other, _), (swapped, _) = captions.values()
        # The wording is the same whatever the colours: put in their places, one caption becomes the other
        names = {"red": "orange", "blue": "white"}
        moved = " ".join(re.sub("red|blue", lambda m: names[m[0]], word) for word in first.split())
        assert re.sub(r"\ban? ", "a ", moved) == re.sub(r"\ban? ", "a ", other)
        if len(named) == 2:
            both += 1
            assert len({first, other, swapped}) == 3
            # After "on" and before "ground" or "background" stands the ground's colour
            assert not re.search(r"\bon (an? )?red|red (back)?ground|red paper|blue (dots|spots|star|spiral) on", first)
        elif named:
            assert named == ["red"]  # a single colour is the figure's
    assert 0.7 < both / 200 < 0.9


def test_the_colours_that_a_caption_names_are_told_beside_it(said):
    kinds = {}
    for name in BASE:
        for seed, caption in enumerate(said[name]):
            scene = textures.scene(seed, name)
            words = {"grey" if word == "gray" else word for word in words_of([caption])} & set(textures.COLOURS)
            named = grammar.named_colours(scene)
            assert words == set(named) - {None}, caption
            assert named[0] in (None, scene.colours[0]) and named[1] in (None, scene.colours[1])
            kinds[tuple(one is None for one in named)] = kinds.get(tuple(one is None for one in named), 0) + 1
    shares = {kind: count / (300 * len(BASE)) for kind, count in kinds.items()}
    assert shares == pytest.approx({(False, False): 0.8, (False, True): 0.08, (True, True): 0.12}, abs=0.02)
    one = textures.scene(3, "striped")
    for variant in range(20):
        words = {"grey" if word == "gray" else word for word in words_of([grammar.caption(one, variant)])}
        assert words & set(textures.COLOURS) == set(grammar.named_colours(one, variant)) - {None}


def test_things_are_counted_rightly():
    for seed in range(100):
        for count, words in ((1, {"a", "an", "one", "single"}), (2, {"two", "pair"})):
            found = words_of([grammar.caption(textures.scene(seed, "cross", count=count))])
            assert ("crosses" in found) == (count == 2) and words & found
            assert not {"two", "pair"} & found or count == 2


def test_a_or_an_goes_by_the_word_that_follows(said):
    for name, captions in said.items():
        for one in captions:
            assert not re.search(r"\ba (orange|eight|image|injected|interlaced)|\ban (?!orange|eight|im|in)", one), one
    assert any("an orange" in one for one in said["star"])


def test_clip_takes_nearly_every_word_of_a_caption_whole(said):
    tokenizer = Tokenizer.shipped()
    split = {"flecks", "triangles", "crescents", *DISTRACTORS, *DTD, *(f"dtd_{name}" for name in DTD)}
    for word in sorted(words_of([one for captions in said.values() for one in captions])):
        if word not in split:
            assert len(tokenizer.split(word)) == 1, word
    assert max(len(tokenizer.split(one)) for captions in said.values() for one in captions) < 60


def test_real_textures_of_all_47_classes_get_captions_without_colours():
    assert len(DTD) == len(set(DTD)) == 47 and set(textures.TEXTURES + textures.NEW) < set(DTD)
    assert set(WORDS) == set(textures.TEXTURES + textures.NEW) and set(SHAPES) == set(textures.THINGS)
    assert grammar.FIGURES == textures.DIGITS
    for name in DTD:
        captions = [grammar.texture_caption(seed, name) for seed in range(80)]
        assert captions == [grammar.texture_caption(seed, name) for seed in range(80)]
        assert len(set(captions)) > 10 and not words_of(captions) & set(textures.COLOURS)
        assert name in words_of(captions)
    assert "dtd_woven" in words_of([grammar.texture_caption(seed, "woven") for seed in range(200)])
    with pytest.raises(UserError, match="dtd has no class 'stripy'; expected .*, nearest: striped"):
        grammar.texture_caption(0, "stripy")


def test_dtd_s_pictures_are_captioned_by_the_report_s_rule_or_by_the_grammar(tmp_path):
    for name in DTD:
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / name / f"{name}_0001.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "test1.txt").write_text("".join(f"{name}/{name}_0001.jpg\n" for name in DTD))
    plain = dtd.load(tmp_path, "test", size=8)
    assert plain.captions == [f"dtd_{name}" for name in sorted(DTD)]
    told = dtd.load(tmp_path, "test", size=8, captions="grammar", seed=3)
    assert told.captions == [grammar.texture_caption(3 + i, name) for i, name in enumerate(sorted(DTD))]
    with pytest.raises(UserError, match="captions is 'gramar' where dtd has 'dtd' or 'grammar', nearest: grammar"):
        dtd.load(tmp_path, "test", captions="gramar")


def test_captions_of_scenes_that_differ_in_colour_alone_differ_where_both_are_named():
    one = textures.scene(1, "grid", colours=("red", "white"))
    other = dataclasses.replace(one, colours=("blue", "white"))
    for variant in range(30):
        first = grammar.caption(one, variant)
        assert first.replace("red", "blue") == grammar.caption(other, variant)
