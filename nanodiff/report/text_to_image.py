"""Judging a text-to-image model of the drawn worlds: does it draw what was said, all of it, and nothing by heart?

`draw` makes the pictures, `measure` asks everything of metrics/agreement.py about one model, and `page` puts the answers
beside their bars. Prompts (worlds/prompts.py) are made of seeds that no training and no held-out picture has.
"""

import dataclasses
import time
from dataclasses import dataclass

import torch

from nanodiff import plots, worlds
from nanodiff.classifiers import worlds as classifier
from nanodiff.data import captions
from nanodiff.metrics import agreement
from nanodiff.pixels import from_uint8
from nanodiff.worlds import prompts

AT_ONCE = 128  # prompts that are encoded and drawn in one call
BARS = {"class": 0.85, "worst_class": 0.6, "frechet": 3, "recall": 0.5, "diversity": 0.7, "composition": 0.5}


def draw(sd, captions, seed=0, **run):
    """Pictures float32 [n,3,H,W] in [-1, 1], one of each caption, on the CPU; picture i depends on seed and i alone.

    sd: a StableDiffusion; run: what its `generate` takes, such as sampler, steps and guidance.
    """
    parts = [sd.generate(captions[i:i + AT_ONCE], seed=seed, first=i, output="tensor", progress=False, **run).cpu()
             for i in range(0, len(captions), AT_ONCE)]
    return torch.cat(parts)


# --- all of it, of one model ------------------------------------------------------------------------------------------

@dataclass
class Sizes:
    """How much `measure` draws."""
    per_class: int = 20  # prompts of every class, for agreement and for composition
    samples: int = 2000  # of all classes, for the distribution (0: leave it out)
    training: int = 30_000  # training pictures to compare them with
    each: int = 8  # samples of one prompt of every class, for diversity (0: leave it out)


def measure(sd, reader, runs, sizes=Sizes(), names=worlds.BASE, seed=0, say=print):
    """Everything above of a StableDiffusion -> (numbers ready for `page` and JSON, contact sheet).

    runs       [{"sampler", "steps", "guidance", perhaps "guidance_start"}]: agreement is measured with each, the rest
               with the first
    say        is told what has been done
    """
    per_class, samples, training, each = dataclasses.astuple(sizes)
    numbers, run = {"runs": runs, "seed": seed, "names": list(names), "agreement": {}}, runs[0]
    wanted = prompts.prompts(per_class, names)
    for one in runs:
        started = time.time()
        x = draw(sd, [caption for caption, _, _ in wanted], seed, **one)
        found = agreement.prompt_agreement(x, wanted, reader) | {"seconds_an_image": (time.time() - started) / len(x)}
        numbers["agreement"][run_name(one)] = found
        say(f"{run_name(one)}: {agreement_sentence(found)}")
        if one is run:
            sheet = contact_sheet(x, [name for _, name, _ in wanted])
    size = x.shape[-1]

    some = prompts.scenes(per_class, names, "unmet", all_named=True)
    x = draw(sd, [captions.caption(scene) for scene in some], seed + 1, **run)
    numbers["composition"] = agreement.composition(x, some, reader)
    say(f"never met in training: class and both colours right {numbers['composition']['class_and_colours']:.1%}")
    if each:
        some = prompts.scenes(1, names, all_named=True)
        x = draw(sd, [captions.caption(scene) for scene in some for _ in range(each)], seed + 2, **run)
        real = prompts.paint([other for scene in some for other in prompts.alike(scene, each)], size)
        numbers["diversity"] = agreement.diversity(x, real, [scene.name for scene in some], each, reader)
        say(f"diversity within a prompt: {numbers['diversity']['ratio']:.2f} of real pictures'")
    if samples:
        wanted = prompts.prompts(-(-samples // len(names)), names, seed=1)[:samples]  # of each class as many as real ones below
        x = draw(sd, [caption for caption, _, _ in wanted], seed + 3, **run)
        say(f"{samples:,} samples are drawn; now as many held-out pictures and {max(training, samples):,} of training")
        real = worlds.load("test", size, samples, names).pixels
        train = worlds.load("train", size, max(training, samples), names).pixels
        numbers["distribution"] = agreement.distribution(x, real, train, through(sd, real, seed), reader)
        found = numbers["distribution"]
        say(f"Frechet distance {found['frechet']:.2f}, recall {found['recall']:.2f}")
    return numbers, sheet


def compare_guidance(sd, reader, runs, per_class=4, names=worlds.BASE, seed=0, say=print):
    """The same few prompts of the validation split with every run -> {run: numbers}: what guidance is chosen by.

    Too little guidance costs agreement, too much costs Fréchet distance and recall (Ho & Salimans 2022); both are
    there, against as many validation pictures. Test prompts are left alone, so that they can judge the choice.
    """
    wanted, table = prompts.prompts(per_class, names, split="val"), {}
    for one in runs:
        x = draw(sd, [caption for caption, _, _ in wanted], seed, **one)
        if not table:
            drawn = [worlds.load(split, x.shape[-1], len(wanted), names).pixels for split in ("val", "train")]
            real, floor = (classifier.read_all(reader, one).features for one in drawn)
        found = agreement.prompt_agreement(x, wanted, reader)
        if len(wanted) > 5:  # neighbours are sought among five others
            found |= agreement.compare(classifier.read_all(reader, x).features, real, floor)
        table[run_name(one)] = found
        say(f"{run_name(one)}: {agreement_sentence(found)}")
    return table


def through(sd, x, seed=0, batch=64):
    """Pictures uint8 [n,3,H,W] through sd's autoencoder, a draw from the posterior and back, [-1, 1], on the CPU."""
    generator = torch.Generator(sd.device).manual_seed(seed)
    return torch.cat([sd.decode(sd.encode(from_uint8(part), generator)).clamp(-1, 1).cpu() for part in x.split(batch)])


# --- what is shown ----------------------------------------------------------------------------------------------------

def run_name(run):
    """A run in words: sampler, steps and guidance."""
    begin = f" from {run['guidance_start']:g} on" if run.get("guidance_start") else ""
    return f"{run['sampler']}, {run['steps']} steps, guidance {run['guidance']:g}{begin}"


def agreement_sentence(found):
    """The shares of `agreement` as one line."""
    return (f"class {found['class']:.1%} of {found['n']:,} (worst {found['worst']} {found['worst_class']:.1%}), named "
            f"colours {found['colours']:.1%}, both {found['class_and_colours']:.1%}, nonsense {found['rejected']:.1%}")


def contact_sheet(x, names, columns=10):
    """One row for each class, its first pictures of x [n,3,H,W]; names: their classes."""
    rows = {name: [one for one, other in zip(x, names) if other == name][:columns] for name in dict.fromkeys(names)}
    return plots.sheet(list(rows.values()), list(rows))


def page(numbers):
    """The numbers of `measure` as Markdown, each beside its bar, then every class and every pair that was never met."""
    rows = []

    def row(what, value, bar="", met=None):
        rows.append(f"| {what} | {value} | {bar} | {'' if met is None else 'yes' if met else '**no**'} |")

    def at_least(what, share, bar, text=None):
        row(what, text or f"{share:.1%}", f">= {BARS[bar]:.0%}", share >= BARS[bar])

    for name, found in numbers["agreement"].items():
        at_least(f"{name}: class as asked for, {found['n']:,} samples", found["class"], "class")
        at_least("- worst class", found["worst_class"], "worst_class", f"{found['worst']} {found['worst_class']:.1%}")
        row("- named colours; class and colours", f"{found['colours']:.1%}; {found['class_and_colours']:.1%}")
        row("- read as nonsense; seconds an image", f"{found['rejected']:.1%}; {found['seconds_an_image']:.2f}")
    if found := numbers.get("distribution"):
        kinds = [kind for kind in ("_floor", "_copies") if "frechet" + kind in found]
        floors = [found["frechet" + kind] for kind in kinds]
        row(f"Fréchet distance on the reader's 128 features, n = {found['n']:,} each", f"{found['frechet']:.2f}",
            f"<= {BARS['frechet']} x {max(floors):.2f}", found["frechet"] <= BARS["frechet"] * max(floors))
        row("- floors: training pictures; reconstructions", "; ".join(f"{value:.2f}" for value in floors))
        for name in agreement.LIKENESS[1:]:
            bar, beside = BARS.get(name), "; ".join(f"{found[name + kind]:.3f}" for kind in kinds)
            row(f"{name} (floors)", f"{found[name]:.3f} ({beside})", f">= {bar}" if bar else "",
                found[name] >= bar if bar else None)
        row(f"median distance to the nearest of {found['training']:,} training pictures",
            f"{found['nearest_train']:.2f}", f">= {found['nearest_test']:.2f}, held-out pictures'",
            found["nearest_train"] >= found["nearest_test"])
        row("copies of training pictures (held-out pictures')", f"{found['copied_share']:.2%} "
            f"({found['copied_share_test']:.2%})", "<= 1 %", not found["memorised"])
    if found := numbers.get("diversity"):
        row(f"diversity within a prompt over real pictures', {found['prompts']} prompts x {found['each']}",
            f"{found['ratio']:.2f}", f">= {BARS['diversity']}", found["ratio"] >= BARS["diversity"])
        row("- of the worst prompt; in pixels", f"{found['worst_ratio']:.2f}; {found['pixel_ratio']:.2f}")
    if found := numbers.get("composition"):
        at_least(f"pairs never met in training: class and both colours, {found['n']:,} samples",
                 found["class_and_colours"], "composition")
        row("- class alone; colours alone", f"{found['class']:.1%}; {found['colours']:.1%}")
    head = ["| what | measured | bar | met |", "|---|---|---|---|"]
    note = f"All but the agreement with {run_name(numbers['runs'][0])}; pictures by seed {numbers['seed']}."
    return "\n".join([*head, *rows, "", note, "", *class_table(numbers)])


def class_table(numbers):
    """Lines of Markdown: agreement, diversity and composition of every class, with every pair that was never met."""
    runs, more = list(numbers["agreement"].values()), {name: numbers.get(name) for name in ("diversity", "composition")}
    head = [*(f"read right: {name}" for name in numbers["agreement"]), *(["diversity"] if more["diversity"] else []),
            *(["never met: both right", "with the colour: right of n"] if more["composition"] else [])]
    lines = ["| class | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name in numbers["names"]:
        cells = [f"{found['by_class'][name]:.0%}" for found in runs]
        if more["diversity"]:
            cells.append(f"{more['diversity']['by_class'][name]:.2f}")
        if more["composition"]:
            pairs = sorted(more["composition"]["by_pair"][name].items())
            cells += [f"{more['composition']['by_class'][name]:.0%}",
                      ", ".join(f"{colour} {right} of {n}" for colour, (right, n) in pairs)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def guidance_table(table):
    """The runs of `compare_guidance` as Markdown."""
    lines = ["| validation prompts | class | worst class | named colours | both | nonsense | Fréchet (floor) | "
             "recall (floor) |", "|---" * 8 + "|"]
    for name, found in table.items():
        likeness = [f"{found[key]:.2f} ({found[key + '_floor']:.2f})" if key in found else ""
                    for key in ("frechet", "recall")]
        lines.append(f"| {name}, n = {found['n']} | {found['class']:.1%} | "
                     f"{found['worst']} {found['worst_class']:.0%} | {found['colours']:.1%} | "
                     f"{found['class_and_colours']:.1%} | {found['rejected']:.1%} | " + " | ".join(likeness) + " |")
    return "\n".join(lines)
