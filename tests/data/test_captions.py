import dataclasses
import re

import pytest
from PIL import Image

from nanodiff.data import captions, dtd
from nanodiff.data.captions import BEHIND, DISTRACTORS, DTD, KINDS, NUMBERS, PHOTOS, SHAPES, WORDS
from nanodiff.errors import UserError
from nanodiff.models.tokenizer import Tokenizer
from nanodiff.worlds import textures

BASE = textures.TEXTURES + textures.THINGS + textures.DIGITS
LATER = {"zigzagged", "zigzag", "zigzags", "woven", "weave", "weaves", "composite", "composites", "fabric", "carbon"}


@pytest.fixture(scope="module")
def texts():
    """{class: 300 captions} of the base world."""
    return {name: [captions.caption(textures.scene(seed, name)) for seed in range(300)] for name in BASE}


def words_of(texts):
    return {word.strip(",") for text in texts for word in text.split()}


def test_every_word_and_every_template_of_the_grammar_occurs(texts):
    all_texts = sum(texts.values(), [])
    words = words_of(all_texts)
    assert words >= {*KINDS, *PHOTOS, *BEHIND, *NUMBERS, *DISTRACTORS, *textures.COLOURS, "gray", "two", "one",
                     "single", "pair", "paper", "handwritten", "a", "an", *"0123456789"}
    for name in textures.TEXTURES:
        adjectives, nouns = WORDS[name]
        assert words_of(texts[name]) >= {name, f"dtd_{name}", *adjectives, *" ".join(nouns).split()} - {"a"}, name
    for name in textures.THINGS:
        for noun in SHAPES[name]:
            assert {noun, noun + ("es" if noun == "cross" else "s")} <= words_of(texts[name])
    gap = {"photo": PHOTOS, "kind": KINDS, "behind": BEHIND, "number": NUMBERS, "figure": [*textures.COLOURS, "gray"],
           "ground": [*textures.COLOURS, "gray"], "digit": [*textures.DIGITS, *"0123456789"]}
    for templates in (captions.TEXTURES, captions.THINGS, captions.DIGITS):
        for template in sum(templates.values(), ()):
            shape = re.sub(r"\{(\w+)\}", lambda m: f"({'|'.join(gap[m[1]])})" if m[1] in gap else "[^,]+", template)
            shape = re.sub(r"\ba (?=[(])", "an? ", shape)
            assert any(re.fullmatch(shape, text) for text in all_texts), template


def test_distractors_are_in_about_an_eighth_of_the_captions_each_of_them_often(texts):
    sentences = [text.replace(",", "").split() for text in sum(texts.values(), [])]
    distracted = [words for words in sentences if set(words) & set(DISTRACTORS)]
    assert 0.1 < len(distracted) / len(sentences) < 0.15
    for distractor in DISTRACTORS:
        assert sum(distractor in words for words in sentences) > len(sentences) * 0.01, distractor
    assert any(words[0] in DISTRACTORS for words in distracted)
    assert any(words[-1] in DISTRACTORS for words in distracted)


def test_words_of_later_concepts_never_occur_in_base_captions(texts):
    for text in sum(texts.values(), []):
        assert not LATER & set(re.split("[ ,_]+", text)), text
    for name in textures.NEW:
        assert LATER & set(re.split("[ ,_]+", captions.caption(textures.scene(3, name))))


def test_a_caption_follows_from_its_scene_and_another_variant_says_the_same_in_other_words():
    scene = textures.scene(5, "striped")
    again = captions.caption(textures.scene(5, "striped"))
    assert captions.caption(scene) == again == textures.draw(5, "striped", 32)[1]
    variants = {captions.caption(scene, variant) for variant in range(30)}
    assert len(variants) > 15
    assert all(set(textures.COLOURS) & words_of([text]) <= set(scene.colours) for text in variants)
    assert captions.caption(textures.scene(5, "striped", "test")) != captions.caption(textures.scene(5, "striped"))


@pytest.mark.parametrize("name", ["dotted", "spiralled", "star", "seven"])
def test_captions_name_the_colours_of_figure_and_ground_and_nothing_else(name):
    both = 0
    for seed in range(200):
        by_colours = {}
        for colours in (("red", "blue"), ("orange", "white"), ("blue", "red")):
            text = captions.caption(textures.scene(seed, name, colours=colours))
            named = [word.strip(",") for word in text.split() if word.strip(",") in textures.COLOURS]
            assert set(named) <= set(colours) and len(named) == len(set(named))
            by_colours[colours] = text, named
        (first, named), (other, _), (swapped, _) = by_colours.values()
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


def test_named_colours_are_those_in_the_caption(texts):
    counts = {}
    for name in BASE:
        for seed, caption in enumerate(texts[name]):
            scene = textures.scene(seed, name)
            words = {"grey" if word == "gray" else word for word in words_of([caption])} & set(textures.COLOURS)
            named = captions.named_colours(scene)
            assert words == set(named) - {None}, caption
            assert named[0] in (None, scene.colours[0]) and named[1] in (None, scene.colours[1])
            missing = tuple(colour is None for colour in named)
            counts[missing] = counts.get(missing, 0) + 1
    shares = {missing: count / (300 * len(BASE)) for missing, count in counts.items()}
    assert shares == pytest.approx({(False, False): 0.8, (False, True): 0.08, (True, True): 0.12}, abs=0.02)
    scene = textures.scene(3, "striped")
    for variant in range(20):
        words = {"grey" if word == "gray" else word for word in words_of([captions.caption(scene, variant)])}
        assert words & set(textures.COLOURS) == set(captions.named_colours(scene, variant)) - {None}


def test_things_are_counted_rightly():
    for seed in range(100):
        for count, numerals in ((1, {"a", "an", "one", "single"}), (2, {"two", "pair"})):
            words = words_of([captions.caption(textures.scene(seed, "cross", count=count))])
            assert ("crosses" in words) == (count == 2) and words & numerals
            assert not {"two", "pair"} & words or count == 2


def test_a_or_an_goes_by_the_word_that_follows(texts):
    for text in sum(texts.values(), []):
        assert not re.search(r"\ba (orange|eight|image|injected|interlaced)|\ban (?!orange|eight|im|in)", text), text
    assert any("an orange" in text for text in texts["star"])


def test_clip_takes_nearly_every_word_of_a_caption_whole(texts):
    tokenizer = Tokenizer.shipped()
    split = {"flecks", "triangles", "crescents", *DISTRACTORS, *DTD, *(f"dtd_{name}" for name in DTD)}
    all_texts = sum(texts.values(), [])
    for word in sorted(words_of(all_texts)):
        if word not in split:
            assert len(tokenizer.split(word)) == 1, word
    assert max(len(tokenizer.split(text)) for text in all_texts) < 60


def test_real_textures_of_all_47_classes_get_captions_without_colours():
    assert len(DTD) == len(set(DTD)) == 47 and set(textures.TEXTURES + textures.NEW) < set(DTD)
    assert set(WORDS) == set(textures.TEXTURES + textures.NEW) and set(SHAPES) == set(textures.THINGS)
    assert captions.FIGURES == textures.DIGITS
    for name in DTD:
        texts = [captions.texture_caption(seed, name) for seed in range(80)]
        assert texts == [captions.texture_caption(seed, name) for seed in range(80)]
        assert len(set(texts)) > 10 and not words_of(texts) & set(textures.COLOURS)
        assert name in words_of(texts)
    assert "dtd_woven" in words_of([captions.texture_caption(seed, "woven") for seed in range(200)])
    with pytest.raises(UserError, match="dtd has no class 'stripy'; expected .*, nearest: striped"):
        captions.texture_caption(0, "stripy")


def test_dtd_s_pictures_are_captioned_by_the_report_s_rule_or_by_the_grammar(tmp_path):
    for name in DTD:
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / name / f"{name}_0001.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "test1.txt").write_text("".join(f"{name}/{name}_0001.jpg\n" for name in DTD))
    plain = dtd.load(tmp_path, "test", size=8)
    assert plain.captions == [f"dtd_{name}" for name in sorted(DTD)]
    varied = dtd.load(tmp_path, "test", size=8, captions="grammar", seed=3)
    assert varied.captions == [captions.texture_caption(3 + i, name) for i, name in enumerate(sorted(DTD))]
    with pytest.raises(UserError, match="captions is 'gramar'; expected 'dtd' or 'grammar', nearest: grammar"):
        dtd.load(tmp_path, "test", captions="gramar")


def test_captions_of_scenes_that_differ_in_colour_alone_differ_where_both_are_named():
    scene = textures.scene(1, "grid", colours=("red", "white"))
    recoloured = dataclasses.replace(scene, colours=("blue", "white"))
    for variant in range(30):
        first = captions.caption(scene, variant)
        assert first.replace("red", "blue") == captions.caption(recoloured, variant)
