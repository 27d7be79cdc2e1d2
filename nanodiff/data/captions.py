"""What is said of a picture: captions of the drawn world (textures.py) and of DTD's real pictures. Report: section 1.

A caption is one TEMPLATE with its gaps filled:

    {figure} {ground}    the colours' names ("grey" is "gray" for one in five)
    {adjective}          the class: its own name in 70 % of these gaps, a synonym of WORDS (if it has one) in 26 %,
                         "dtd_" and the name, as the report writes DTD's classes, in 4 %
    {marks} {bare}       what is seen, with its colour and without: "red stripes", "a red spiral", "two red stars"
    {digit}              "seven", or "7" for one in five
    {kind} {photo} {behind} {number}    a synonym of KINDS, PHOTOS, BEHIND or NUMBERS

BOTH names both colours (80 % of captions), ONE the figure's (8 %), NONE no colour (12 %). Where both stand side by side
("red and blue", "red on blue") the figure's comes first. Into 12 % of the captions one to three DISTRACTORS are put,
at the front, at the end or before any word: words that the report's fine-tuning uses (section 1, and its rare
identifiers), which mean nothing here, so that their tokens have been trained and are known to be idle.

The words of the concepts to be taught later (zigzagged, woven; composites, fabric, carbon) occur in captions of their
own classes alone. CLIP's tokenizer takes nearly every word whole; DTD's class names it splits as it likes.
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

WORDS = {  # other adjectives, and what is seen: plural, or with "a"
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
    """Whether none of DISTRACTORS is in a caption, so that its meaning stays when fine-tuning gives them one."""
    return not set(caption.replace(",", " ").split()) & set(DISTRACTORS)


def with_articles(text):
    """"an orange", "an injected", "an eight", yet "a one"."""
    return re.sub(r"\ba (?=[aei]|or)", "an ", text)


def caption(scene, variant=0):
    """The sentence of a textures.Scene, the same for the same scene; another `variant` says it in other words.

    The wording does not depend on the colours: scenes that differ in them alone differ in their names alone.
    """
    random = _random(scene, variant)
    colours = _which(random)
    figure, ground = (("gray" if gray and colour == "grey" else colour)
                      for colour, gray in zip(scene.colours, random.random(2) < 0.2))
    words = {"figure": figure, "ground": ground} | _asides(random)
    if scene.name in SHAPES:
        template = _one(THINGS[colours], random)
        words |= _shape(scene.name, scene.count, figure, random)
    elif scene.name in FIGURES:
        template = _one(DIGITS[colours], random)
        words["digit"] = str(FIGURES.index(scene.name)) if random.random() < 0.2 else scene.name
    else:
        template = _one(TEXTURES[colours], random)
        words |= _texture(scene.name, figure, random)
    return _spoken(template, words, random)


def named_colours(scene, variant=0):
    """The (figure, ground) colours that `caption` names of a textures.Scene, None for one that it leaves out."""
    colours = _which(_random(scene, variant))
    return None if colours == "none" else scene.colours[0], scene.colours[1] if colours == "both" else None


def texture_caption(seed, name):
    """A sentence for a real picture of one of DTD's 47 classes, whose colours are not known; seed 0, 1, ... chooses.

    Classes that are not drawn here go by their own names alone. UserError for an unknown class.
    """
    if name not in DTD:
        raise UserError(f"dtd has no class '{name}'; expected one of {', '.join(DTD)}{nearest(name, DTD)}")
    random = np.random.default_rng([seed, zlib.crc32(name.encode()), 3])
    words = _asides(random) | _texture(name, "", random)
    return _spoken(_one(TEXTURES["none"], random), words, random)


def _random(scene, variant):
    return np.random.default_rng([scene.seed, zlib.crc32(f"{scene.name} {scene.split}".encode()), variant, 2])


def _which(random):
    """Which colours a caption names, "both", "one" or "none": the first that is drawn for it."""
    return "both" if random.random() < 0.8 else "none" if random.random() < 0.6 else "one"


def _asides(random):
    return {"kind": _one(KINDS, random), "photo": _one(PHOTOS, random), "behind": _one(BEHIND, random),
            "number": _one(NUMBERS, random)}


def _texture(name, figure, random):
    """{adjective, marks, bare} of a texture."""
    adjectives, nouns = WORDS.get(name, ((), ()))
    dice, synonym = random.random(), _one(adjectives or (name,), random)
    noun = _one(nouns or (f"{name} texture",), random)
    adjective = name if dice < 0.7 else f"dtd_{name}" if dice > 0.96 else synonym
    marks = f"a {figure} {noun[2:]}" if noun.startswith("a ") else f"{figure} {noun}"
    return {"adjective": adjective, "marks": marks, "bare": noun}


def _shape(name, count, figure, random):
    """{marks, bare} of one shape or two."""
    noun, article = _one(SHAPES[name], random), int(random.integers(4))
    if count == 2:
        article = ("two", "two", "two", "a pair of")[article]
        noun += "es" if noun == "cross" else "s"
    else:
        article = ("a", "a", "one", "a single")[article]
    return {"marks": f"{article} {figure} {noun}", "bare": f"{article} {noun}"}


def _spoken(template, words, random):
    """The template with its words, with distractors for one caption of eight, and "an" where it belongs."""
    said = template.format(**words).split()
    if random.random() < 0.12:
        for _ in range(int(random.integers(1, 4))):
            said.insert(int(random.integers(len(said) + 1)), _one(DISTRACTORS, random))
    return with_articles(" ".join(said))


def _one(choices, random):
    return choices[int(random.integers(len(choices)))]
