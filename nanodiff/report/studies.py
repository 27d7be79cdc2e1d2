"""The report's questions about fine-tuning, each as a list of trainings to run and claims to check.

A study is a function of the concept that returns Cells; `compare.py` runs and measures them. CLAIMS holds what the
report concludes from its pictures (sections 4.2.1 to 4.2.5), each as two groups of rows and the number in which one
should be above the other.
"""

import math
import statistics
from collections import Counter
from dataclasses import dataclass, field

from nanodiff import worlds
from nanodiff.pixels import from_uint8
from nanodiff.plots import save, to_pil

WOVEN = worlds.WOVEN  # "dry warp" and its like: the nine of the report's table 1
PRIOR = {"with_prior_preservation": True, "class_prompt": "a texture", "num_class_images": 100}
LORA = {"lr": 1e-3}  # of one word: at train_lora's own rate, found beside a prior, a LoRA alone forgets the base
UNSEEN = "dry-compacted warp"  # a state and a direction that are shown, but never together


@dataclass
class Cell:
    """One training, a row of the table: its script, what its pictures are asked for with, and its flags."""
    name: str
    script: str
    asks: dict  # {prompt: the classifier's classes that are right}
    flags: dict = field(default_factory=dict)
    lesson: list = field(default_factory=list)  # [(classes, pictures, caption)] to learn from (empty: --data CONCEPT)
    noun: str = "a texture"  # the prompt without the new word
    moments: int = 1  # at how many moments of the training it is measured, evenly spread, the last at its end
    after: str = ""  # the cell of the study whose taught model this one is taught further
    reach: bool = False  # whether the darkest and brightest picture are looked for


def right(concept):
    """The classifier's classes of a concept: "woven" is specimens, of nine classes."""
    return WOVEN if concept == "woven" else (concept,)


def spoken(name, rule="sf_{word}"):
    """The report's caption of a woven class: "sf_dry sf_compacted sf_warp"; rule: what becomes of each word."""
    return " ".join(rule.format(word=word) for word in name.replace("-", " ").split())


def words_of(names):
    """The words of the report's captions of some woven classes, each once, as --placeholder_token takes them."""
    return ",".join(dict.fromkeys(word for name in names for word in spoken(name).split()))


def having(word):
    """The woven classes of a state or a direction: "dry", "warp" and so on."""
    return tuple(name for name in WOVEN if word in name.split())


def one(name, script, prompt, concept, **more):
    """A Cell with one prompt, which is also what is said of its pictures."""
    flags = {"instance_prompt": prompt, **more.pop("flags", {})}
    return Cell(name, script, {prompt: right(concept)}, flags, **more)


# --- the studies ------------------------------------------------------------------------------------------------------

def methods(concept):
    """The report's methods, each with the words that it needs (the closing table)."""
    sks, new = "a sks texture", "a <new> texture"
    return [
        one("full fine-tuning", "train_finetune.py", f"dtd_{concept}", concept),
        Cell("textual inversion", "train_textual_inversion.py", {"a texture in the style of <new>": right(concept)}),
        one("DreamBooth", "train_dreambooth.py", sks, concept),
        one("DreamBooth, prior kept", "train_dreambooth.py", sks, concept, flags=PRIOR),
        one("LoRA", "train_lora.py", sks, concept, flags=LORA),
        one("LoRA + DreamBooth", "train_lora.py", sks, concept, flags={**LORA, **PRIOR}),
        one("LoRA + DreamBooth, old answers", "train_lora.py", sks, concept,
            flags={**LORA, **PRIOR, "teacher_predictions": 2}),
        one("pivotal tuning", "train_pivotal.py", new, concept, flags=PRIOR),
    ]


def prior(concept):
    """DreamBooth three ways, and what is forgotten over time (tables 9 to 12): many pictures, prior kept, ten."""
    sks = "a sks texture"
    more = {"120 pictures": {"pictures": 120}, "10 pictures": {"pictures": 10},
            "120 pictures, prior of 200": {"pictures": 120, **PRIOR, "num_class_images": 200}}
    return [one(name, "train_dreambooth.py", sks, concept, flags=flags, moments=3) for name, flags in more.items()]


def noun(concept):
    """The class noun: the right one, a wrong one, none (section 4.2.3)."""
    nouns = {"a sks texture": "a texture", "a sks circle": "a circle", "sks": "a texture"}  # what may drift with it
    return [one(prompt, "train_dreambooth.py", prompt, concept, noun=noun) for prompt, noun in nouns.items()]


def words(concept):
    """A rare word, a class name as the report writes it, a word that means something else, and plain words."""
    prompts = ("a sks texture", f"dtd_{concept}", "a striped texture", f"a {concept} texture")
    return [one(prompt, "train_lora.py", prompt, concept, flags=LORA, moments=3) for prompt in prompts]


def dtd(concept):
    """Full fine-tuning of several texture classes at once, "dtd_" before each name: two new, four known; without and
    with offset noise (section 4.2.1, tables 5 and 6)."""
    names = ("zigzagged", "woven", "striped", "honeycombed", "cracked", "paisley")
    lesson = [((name,), 60, f"dtd_{name}") for name in names]
    asks = {caption: classes for classes, _, caption in lesson}
    return [Cell(name, "train_finetune.py", asks, {"noise_offset": offset}, lesson, reach=True)
            for name, offset in (("dtd_ classes", 0.0), ("dtd_ classes, offset noise 0.1", 0.1))]


def inversion(concept):
    """Words for "dry", "thickness" and "warp", nine slices each, at three moments (section 4.2.2, tables 7 and 8)."""
    return [Cell(word, "train_textual_inversion.py", {f"a texture in the style of <{word}>": classes},
                 {"placeholder_token": f"<{word}>"}, [(classes, 9, f"<{word}>")], moments=3)
            for word, classes in ((word, having(word)) for word in ("dry", "thickness", "warp"))]


def woven(concept):
    """A LoRA of the nine woven classes, with "sf_" before each word and without (section 4.2.4, table 13); and with
    vectors of their own for these words, learned along."""
    cells = []
    for name, rule, flags in (("unique words", "sf_{word}", {}), ("plain words", "{word}", {}),
                              ("words learned along", "sf_{word}", {"placeholder_token": words_of(WOVEN)})):
        lesson = [((one,), 50, spoken(one, rule)) for one in WOVEN]
        asks = {caption: classes for classes, _, caption in lesson}
        cells.append(Cell(name, "train_lora.py", asks, flags, lesson, moments=3))
    return cells


def identifiers(concept):
    """LoRA + DreamBooth with four rare identifiers at once, nine slices each (section 4.2.4, table 14)."""
    meant = {"w17h3r": "dry", "1nj3C7": "injected", "sks": "thickness", "w@rp": "warp"}
    lesson = [(having(word), 9, f"a {rare} texture") for rare, word in meant.items()]
    asks = {caption: classes for classes, _, caption in lesson}
    return [Cell("LoRA + DreamBooth", "train_lora.py", asks, {**PRIOR}, lesson),
            Cell("LoRA", "train_lora.py", asks, {}, lesson)]


def unseen(concept):
    """A state and a direction whose words are shown, but never together: beside a LoRA that was shown them. Asked, too,
    in words that neither has met: "sf_compacted" without "sf_dry"."""
    asks = {spoken(name): (name,) for name in (UNSEEN, "dry-compacted weft", "dry warp")} | {"sf_compacted sf_warp": (UNSEEN,)}
    shown = {"nine classes": WOVEN, "eight classes": [name for name in WOVEN if name != UNSEEN]}
    return [Cell(name, "train_lora.py", asks, {"placeholder_token": words_of(some)}, [((one,), 50, spoken(one)) for one in some])
            for name, some in shown.items()]


def second(concept):
    """A second concept taught after the first one: what is left of the first. It is woven slices, or else zigzags."""
    first, then = "a sks texture", "a w17h3r texture"
    other = "zigzagged" if concept == "woven" else "woven"
    cells = []
    for method, script, flags in (("DreamBooth", "train_dreambooth.py", {}), ("LoRA", "train_lora.py", LORA)):
        cells.append(one(f"{method}, the first", script, first, concept, flags=flags))
        cells.append(Cell(f"{method}, then another", script, {first: right(concept), then: right(other)},
                          {**flags, "data": other, "instance_prompt": then}, after=f"{method}, the first"))
    return cells


PROMPTS = ("a sks texture", "a w17h3r texture", "a texture called sks", "sks")
KNOBS = {"lr 3e-4": {"lr": 3e-4}, "lr 5e-3": {"lr": 5e-3}, "rank 2": {"rank": 2}, "rank 32": {"rank": 32}}


def knobs(concept):
    """Does the prompt matter more than learning rate and rank? One LoRA for each (the report's last claim)."""
    prompts = [one(prompt, "train_lora.py", prompt, concept, flags=LORA) for prompt in PROMPTS]
    more = [one(name, "train_lora.py", PROMPTS[0], concept, flags=LORA | flags) for name, flags in KNOBS.items()]
    return prompts + more


STUDIES = {"methods": methods, "prior": prior, "noun": noun, "words": words, "dtd": dtd, "inversion": inversion,
           "woven": woven, "identifiers": identifiers, "unseen": unseen, "second": second, "knobs": knobs}


def write_lesson(folder, lesson, side, seed):
    """Writes a lesson's pictures into folder/train, held-out ones into folder/test, each with its caption beside it."""
    for split, most in (("train", None), ("test", max(2, 128 // len(lesson)))):
        place = folder / split
        place.mkdir(parents=True, exist_ok=True)
        wanted = [[classes[i % len(classes)] for i in range(n)][:most] for classes, n, _ in lesson]
        need = Counter(name for row in wanted for name in row)  # pictures of every class
        drawn, woven = ([name for name in need if (name in WOVEN) == kind] for kind in (False, True))
        pools = {}  # class: its pictures, each of which is taken once
        for some, load in ((drawn, worlds.load), (woven, worlds.cut)):
            if some:
                names = {} if load is worlds.cut else {"names": tuple(some)}
                every = len(WOVEN) if load is worlds.cut else len(some)
                found = load(split, side, every * max(need[name] for name in some), seed=seed, **names)
                pools |= {name: iter(found.pixels[found.labels == list(found.classes).index(name)]) for name in some}
        for i, (row, (_, _, caption)) in enumerate(zip(wanted, lesson)):
            for j, name in enumerate(row):
                save(to_pil(from_uint8(next(pools[name]))), place / f"{i:02d}-{j:04d}.png")
                (place / f"{i:02d}-{j:04d}.txt").write_text(caption + "\n")


# --- the report's claims ----------------------------------------------------------------------------------------------

@dataclass
class Claim:
    """The number `column` should be higher in all rows `above` than in any of `below`."""
    said: str
    column: str
    above: tuple
    below: tuple
    prompt: str = ""  # of fidelity, the one prompt that it is about

    def of(self, numbers):
        """The number of one row and seed."""
        return numbers["by_prompt"][self.prompt] if self.prompt else numbers[self.column]


def moment(name, number, of):
    """The row of a cell at a moment of its training; the last moment is the cell's own row."""
    return name if number == of else f"{name}, at {number}/{of}"


OTHERS = ("full fine-tuning", "DreamBooth", "DreamBooth, prior kept", "LoRA", "LoRA + DreamBooth", "pivotal tuning")
CLAIMS = {
    "methods": [
        Claim("LoRA keeps the base world better than DreamBooth", "base", ("LoRA",), ("DreamBooth",)),
        Claim("LoRA + DreamBooth keeps the base world better than DreamBooth with its prior", "base",
              ("LoRA + DreamBooth",), ("DreamBooth, prior kept",)),
        Claim("prior preservation restores the class's diversity", "spread", ("DreamBooth, prior kept",),
              ("DreamBooth",)),
        Claim("the model's old answers keep the base world better than the noise put in (not the report's)", "base",
              ("LoRA + DreamBooth, old answers",), ("LoRA + DreamBooth",)),
        Claim("textual inversion is the least faithful, by the class that is read", "fidelity", OTHERS,
              ("textual inversion",)),
        Claim("textual inversion is the least faithful, by the distance from real pictures", "frechet",
              ("textual inversion",), OTHERS),
        Claim("textual inversion has the smallest file", "file_bytes", OTHERS, ("textual inversion",))],
    "prior": [
        Claim("prior preservation restores the class's diversity", "spread", ("120 pictures, prior of 200",),
              ("120 pictures",)),
        Claim("prior preservation keeps the base world", "base", ("120 pictures, prior of 200",), ("120 pictures",)),
        *(Claim(f"10 pictures forget sooner than 120, {when}", "base", (moment("120 pictures", k, 3),),
                (moment("10 pictures", k, 3),)) for k, when in ((1, "early"), (2, "halfway"), (3, "at the end")))],
    "noun": [Claim("the right class noun is learned better than a wrong one", "fidelity", ("a sks texture",),
                   ("a sks circle",)),
             Claim("the right class noun is learned better than none", "fidelity", ("a sks texture",), ("sks",))],
    "words": [Claim(f"a unique word speeds convergence: beside a word with another meaning, {when}", "fidelity",
                    (moment("a sks texture", k, 3),), (moment("a striped texture", k, 3),))
              for k, when in ((1, "early"), (2, "halfway"))],
    "dtd": [Claim("offset noise makes darker pictures possible", "darkest", ("dtd_ classes",),
                  ("dtd_ classes, offset noise 0.1",)),
            Claim("offset noise makes brighter pictures possible", "brightest", ("dtd_ classes, offset noise 0.1",),
                  ("dtd_ classes",))],
    "inversion": [Claim("a word for warp is learned worse than those for dry and thickness", "fidelity",
                        ("dry", "thickness"), ("warp",))],
    "woven": [Claim(f"unique words speed convergence, {when}", "fidelity", (moment("unique words", k, 3),),
                    (moment("plain words", k, 3),)) for k, when in ((1, "early"), (3, "at the end"))],
    "unseen": [Claim("a state and a direction never shown together are drawn worse than shown ones (not the report's)",
                     "fidelity", ("nine classes",), ("eight classes",), spoken(UNSEEN))],
    "identifiers": [Claim("prior preservation keeps the base world", "base", ("LoRA + DreamBooth",), ("LoRA",))],
    "second": [Claim("of a first concept, LoRA keeps more than DreamBooth when a second is taught", "fidelity",
                     ("LoRA, then another",), ("DreamBooth, then another",), "a sks texture")],
}


def verdicts(study, rows):
    """Lines of Markdown: each claim of a study, its numbers, whether they confirm it. rows {name: [numbers of a seed]}.

    Confirmed or contradicted: the two means are further apart than the two uncertainties together (root of the sum of
    their squares); undecided: nearer, or with one seed a number that is no share. See `uncertainty`.
    """
    lines = []
    for claim in CLAIMS.get(study, ()):
        high, low = ({name: [claim.of(numbers) for numbers in rows[name]] for name in names}
                     for names in (claim.above, claim.below))
        a = min(high, key=lambda name: statistics.mean(high[name]))
        b = max(low, key=lambda name: statistics.mean(low[name]))
        one, other = statistics.mean(high[a]), statistics.mean(low[b])
        noise = math.hypot(uncertainty(high[a], rows[a], claim), uncertainty(low[b], rows[b], claim))
        word = "confirmed" if one - other > noise else "contradicted" if other - one > noise else "undecided"
        alone = len(high[a]) == 1 and claim.column not in ("fidelity", "base", "file_bytes")
        word, noise = ("undecided", "one seed") if alone else (word, f"+- {noise:.2g}")
        lines.append(f"- {claim.said}: **{word}** ({claim.column.replace('_', ' ')} {one:.4g} of {a}, {other:.4g} of "
                     f"{b}; {noise})")
    if study == "knobs":
        lines.append(knobs_sentence(rows))
    return lines


def uncertainty(values, numbers, claim):
    """The standard deviation over seeds (0 of one seed); of a share at least that of counting so many pictures."""
    own = statistics.stdev(values) if len(values) > 1 else 0.0
    if claim.column not in ("fidelity", "base"):
        return own
    n = sum(one["base_n"] if claim.column == "base" else one["n"] / (len(one["by_prompt"]) if claim.prompt else 1)
            for one in numbers)
    p = statistics.mean(values)
    return max(own, (p * (1 - p) / n) ** 0.5)


def knobs_sentence(rows):
    """How far fidelity and distance vary over the prompts, and over learning rates and ranks with the first prompt."""
    said, more = [], []
    for column in ("fidelity", "frechet"):
        prompts, settings = ([statistics.mean(numbers[column] for numbers in rows[name]) for name in names]
                             for names in (PROMPTS, (PROMPTS[0], *KNOBS)))
        deviations = statistics.pstdev(prompts), statistics.pstdev(settings)
        said.append(f"{column} varies by {deviations[0]:.3g} over {len(prompts)} prompts and by {deviations[1]:.3g} "
                    f"over {len(settings)} learning rates and ranks")
        more.append(deviations[0] > deviations[1])
    word = "confirmed" if all(more) else "contradicted" if not any(more) else "undecided"
    if len(rows[PROMPTS[0]]) == 1:
        word, more = "undecided", said.append("one seed")
    return f"- the prompt matters more than the hyper-parameters: **{word}** ({'; '.join(said)}; standard deviations)"
