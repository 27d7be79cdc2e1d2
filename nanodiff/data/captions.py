"""Captions of drawn scenes (worlds/textures.py) and of DTD's photographs. Report: section 1.

A caption is a template whose fields are filled in:

    {figure} {ground}    colour names ("grey" is spelled "gray" in one of five)
    {adjective}          the class: its name in 70 % of captions, a synonym from WORDS (if there is one) in 26 %,
                         "dtd_" and the name, as the report writes DTD's classes, in 4 %
    {marks} {bare}       the figure, with and without its colour: "red stripes", "a red spiral", "two red stars"
    {digit}              "seven", or "7" in one of five
    {kind} {photo} {behind} {number}    one of KINDS, PHOTOS, BEHIND or NUMBERS

Templates come in three groups: "both" names both colours (80 % of captions), "one" the figure's colour (8 %), "none"
no colour (12 %). Where both colours stand side by side ("red and blue", "red on blue"), the figure's comes first.

12 % of the captions contain one to three DISTRACTORS at random places. These are the words that the report's
fine-tuning uses (section 1, and its rare identifiers). Here they mean nothing, so the base model learns to ignore
their tokens.

The words of later concepts (zigzagged, woven; composites, fabric, carbon) occur only in captions of their own classes.
CLIP's tokenizer keeps nearly every word as one token; it splits some of DTD's class names.
"""

import re
import zlib

import numpy as np

from nanodiff.errors import UserError, nearest

DISTRACTORS = ("dry", "compacted", "injected", "thickness", "warp", "weft", "sf_dry", "sf_compacted", "sf_injected",
               "sf_thickness", "sf_warp", "sf_weft", "sks", "w17h3r", "1nj3C7", "w@rp")

KINDS = ("texture", "pattern", "surface", "material")
PHOTOS = ("photo", "picture", "image")
BEHIND = ("ground", "background")
NUMBERS = ("digit", "number")
FIGURES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

WORDS = {  # class: (synonyms of the adjective, nouns of the figure: plural, or with "a")
    "striped": ((), ("stripes",)), "chequered": (("checked",), ("checks",)),
    "dotted": (("spotted",), ("dots", "spots")), "grid": ((), ("a grid",)),
    "honeycombed": (("honeycomb",), ("a honeycomb",)), "waffled": (("waffle",), ("a waffle",)),
    "studded": ((), ("studs",)), "pleated": (("folded",), ("folds",)), "crosshatched": (("hatched",), ("strokes",)),
    "spiralled": (("spiral",), ("a spiral",)), "cobwebbed": ((), ("a spider web", "a web")),
    "veined": ((), ("veins", "leaf veins")), "scaly": (("scaled",), ("scales", "fish scales")),
    "interlaced": (("linked",), ("chains",)), "braided": (("braid",), ("braids",)),
    "knitted": (("knit",), ("stitches", "knitting")), "swirly": ((), ("curls",)), "paisley": ((), ("paisley drops",)),
    "stratified": (("layered",), ("layers", "strata")), "wrinkled": ((), ("wrinkles",)),
    "marbled": (("marble",), ("marble",)), "blotchy": (("patchy",), ("patches",)), "fibrous": ((), ("fibers",)),
    "cracked": ((), ("cracks",)), "crystalline": (("faceted",), ("crystals",)), "bubbly": ((), ("bubbles",)),
    "flecked": ((), ("flecks",)),
    "zigzagged": (("zigzag",), ("zigzags",)), "woven": ((), ("a weave",)),
}
SHAPES = {"circle": ("circle", "disc"), "square": ("square",), "triangle": ("triangle",), "star": ("star",),
          "cross": ("cross",), "ring": ("ring", "hoop"), "heart": ("heart",), "crescent": ("crescent", "moon")}

TEXTURES = {
    "both": ("a {figure} and {ground} {adjective} {kind}", "{adjective} {kind} in {figure} on {ground}",
             "{adjective} {kind} in {figure} and {ground}", "a {adjective} {kind}, {figure} on {ground}",
             "a {photo} of a {adjective} {kind}, {figure} and {ground}",
             "a {photo} of a {figure} and {ground} {adjective} {kind}", "{marks} on {ground}, a {adjective} {kind}",
             "a {adjective} {kind} of {marks} on a {ground} {behind}", "a {ground} {behind} with {marks}",
             "{marks} on {ground}"),
    "one": ("a {figure} {adjective} {kind}", "a {adjective} {kind} of {marks}"),
    "none": ("a {adjective} {kind}", "a {photo} of a {adjective} {kind}", "{adjective}", "{adjective} {kind}",
             "{bare}"),
}
THINGS = {
    "both": ("{marks} on a {ground} {behind}", "{marks} on {ground}", "a {ground} {behind} with {marks}",
             "a {photo} of {marks} on {ground}", "{marks}, {ground} {behind}",
             "a {photo} of {marks} on a {ground} {behind}"),
    "one": ("{marks}", "a {photo} of {marks}"),
    "none": ("{bare}", "a {photo} of {bare}"),
}
DIGITS = {
    "both": ("a handwritten {digit} in {figure} on {ground}", "a {figure} handwritten {digit} on a {ground} {behind}",
             "the {number} {digit} in {figure} on {ground}", "a {photo} of a handwritten {digit}, {figure} on {ground}",
             "a {ground} {behind} with a handwritten {digit} in {figure}",
             "a handwritten {digit}, {figure} on {ground}", "a {figure} {digit} on {ground} paper"),
    "one": ("a {figure} handwritten {digit}", "the {number} {digit} in {figure}"),
    "none": ("a handwritten {digit}", "the {number} {digit}", "a {photo} of a handwritten {digit}"),
}

DTD = tuple("banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous"
            " flecked freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled matted"
            " meshed paisley perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled"
            " stained stratified striped studded swirly veined waffled woven wrinkled zigzagged".split())


def is_plain(caption):
    """True when a caption contains none of DISTRACTORS, so that its meaning survives fine-tuning on them."""
    return not set(caption.replace(",", " ").split()) & set(DISTRACTORS)


def with_articles(text):
    """The text with "a" turned into "an" before vowels: "an orange", "an injected", "an eight", but "a one"."""
    return re.sub(r"\ba (?=[aei]|or)", "an ", text)


def caption(scene, variant=0):
    """The caption of a textures.Scene, the same for the same scene; every `variant` is another wording.

    The wording does not depend on the colours: two scenes that differ only in colour have captions that differ only in
    the colour names.
    """
    rng = _generator(scene, variant)
    group = _draw_group(rng)
    figure, ground = (("gray" if gray and colour == "grey" else colour)
                      for colour, gray in zip(scene.colours, rng.random(2) < 0.2))
    fields = {"figure": figure, "ground": ground} | _draw_synonyms(rng)
    if scene.name in SHAPES:
        template = _choose(THINGS[group], rng)
        fields |= _shape(scene.name, scene.count, figure, rng)
    elif scene.name in FIGURES:
        template = _choose(DIGITS[group], rng)
        fields["digit"] = str(FIGURES.index(scene.name)) if rng.random() < 0.2 else scene.name
    else:
        template = _choose(TEXTURES[group], rng)
        fields |= _texture(scene.name, figure, rng)
    return _fill(template, fields, rng)


def named_colours(scene, variant=0):
    """The (figure, ground) colours that `caption` names for a textures.Scene; None for a colour that it omits."""
    group = _draw_group(_generator(scene, variant))
    figure, ground = scene.colours
    return None if group == "none" else figure, ground if group == "both" else None


def texture_caption(seed, name):
    """A caption without colours for a photograph of one of DTD's 47 classes. The seed (0, 1, ...) chooses the wording.

    Classes that are not drawn here have no synonyms. UserError for an unknown class.
    """
    if name not in DTD:
        raise UserError(f"dtd has no class '{name}'; expected one of {', '.join(DTD)}{nearest(name, DTD)}")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), 3])
    fields = _draw_synonyms(rng) | _texture(name, "", rng)
    return _fill(_choose(TEXTURES["none"], rng), fields, rng)


def _generator(scene, variant):
    """The NumPy generator of a scene's caption."""
    return np.random.default_rng([scene.seed, zlib.crc32(f"{scene.name} {scene.split}".encode()), variant, 2])


def _draw_group(rng):
    """The group of templates, "both", "one" or "none". It is the first thing drawn for a caption."""
    if rng.random() < 0.8:
        return "both"
    return "none" if rng.random() < 0.6 else "one"


def _draw_synonyms(rng):
    """{kind, photo, behind, number}: one synonym of each."""
    return {"kind": _choose(KINDS, rng), "photo": _choose(PHOTOS, rng), "behind": _choose(BEHIND, rng),
            "number": _choose(NUMBERS, rng)}


def _texture(name, figure, rng):
    """{adjective, marks, bare} of a texture."""
    adjectives, nouns = WORDS.get(name, ((), ()))
    chance, synonym = rng.random(), _choose(adjectives or (name,), rng)
    noun = _choose(nouns or (f"{name} texture",), rng)
    adjective = name if chance < 0.7 else f"dtd_{name}" if chance > 0.96 else synonym
    marks = f"a {figure} {noun[2:]}" if noun.startswith("a ") else f"{figure} {noun}"
    return {"adjective": adjective, "marks": marks, "bare": noun}


def _shape(name, count, figure, rng):
    """{marks, bare} of one or two equal shapes."""
    noun, article = _choose(SHAPES[name], rng), int(rng.integers(4))
    if count == 2:
        article = ("two", "two", "two", "a pair of")[article]
        noun += "es" if noun == "cross" else "s"
    else:
        article = ("a", "a", "one", "a single")[article]
    return {"marks": f"{article} {figure} {noun}", "bare": f"{article} {noun}"}


def _fill(template, fields, rng):
    """The caption: the template with its fields, distractors in 12 % of the captions, and the right articles."""
    words = template.format(**fields).split()
    if rng.random() < 0.12:
        for _ in range(int(rng.integers(1, 4))):
            place = int(rng.integers(len(words) + 1))
            words.insert(place, _choose(DISTRACTORS, rng))
    return with_articles(" ".join(words))


def _choose(choices, rng):
    """One of the choices, all equally likely."""
    return choices[int(rng.integers(len(choices)))]
