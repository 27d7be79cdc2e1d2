"""Judging a text-to-image model of the drawn worlds: agreement with prompts, likeness, diversity, copies.

`draw` makes the pictures, `measure` takes all measures of metrics/agreement.py for one model, and `page` prints them
with their bars. Prompts (worlds/prompts.py) come from seeds of no training and no held-out picture.
"""

import dataclasses
import time
from dataclasses import dataclass

import torch

from nanodiff import plots, worlds
from nanodiff.classifiers import worlds as world_classifier
from nanodiff.data import captions
from nanodiff.metrics import agreement
from nanodiff.pixels import from_uint8
from nanodiff.worlds import prompts

AT_ONCE = 128  # prompts per call of `generate`
BARS = {"class": 0.85, "worst_class": 0.6, "frechet": 3, "recall": 0.5, "diversity": 0.7, "composition": 0.5}


def draw(sd, captions, seed=0, **options):
    """Pictures float32 [n,3,H,W] in [-1, 1], one for each caption, on the CPU; picture i depends on seed and i alone.

    sd: a StableDiffusion; options: arguments of its `generate`, such as sampler, steps and guidance.
    """
    options |= {"seed": seed, "output": "tensor", "progress": False}
    batches = [sd.generate(captions[i:i + AT_ONCE], first=i, **options).cpu() for i in range(0, len(captions), AT_ONCE)]
    return torch.cat(batches)


# --- all measures of one model ----------------------------------------------------------------------------------------

@dataclass
class Sizes:
    """The numbers of pictures that `measure` draws."""
    per_class: int = 20  # prompts of every class, for agreement and composition
    samples: int = 2000  # of all classes, for the distribution (0: skip it)
    training: int = 30_000  # training pictures for the comparison
    each: int = 8  # samples of one prompt of every class, for diversity (0: skip it)


def measure(sd, classifier, runs, sizes=Sizes(), names=worlds.BASE, seed=0, say=print):
    """(numbers ready for `page` and JSON, contact sheet) of a StableDiffusion.

    runs       [{"sampler", "steps", "guidance", perhaps "guidance_start"}]: agreement is measured with each, all else
               with the first
    say        called with progress messages
    """
    per_class, samples, training, each = dataclasses.astuple(sizes)
    numbers, run = {"runs": runs, "seed": seed, "names": list(names), "agreement": {}}, runs[0]
    prompt_rows = prompts.prompts(per_class, names)
    for other_run in runs:
        started = time.time()
        x = draw(sd, [caption for caption, _, _ in prompt_rows], seed, **other_run)
        shares = agreement.prompt_agreement(x, prompt_rows, classifier) | {
            "seconds_an_image": (time.time() - started) / len(x)}
        numbers["agreement"][run_name(other_run)] = shares
        say(f"{run_name(other_run)}: {agreement_sentence(shares)}")
        if other_run is run:
            sheet = contact_sheet(x, [name for _, name, _ in prompt_rows])
    size = x.shape[-1]

    scenes = prompts.scenes(per_class, names, "unmet", all_named=True)
    x = draw(sd, [captions.caption(scene) for scene in scenes], seed + 1, **run)
    numbers["composition"] = agreement.composition(x, scenes, classifier)
    say(f"never met in training: class and both colours right {numbers['composition']['class_and_colours']:.1%}")
    if each:
        scenes = prompts.scenes(1, names, all_named=True)
        x = draw(sd, [captions.caption(scene) for scene in scenes for _ in range(each)], seed + 2, **run)
        real = prompts.paint([other for scene in scenes for other in prompts.alike(scene, each)], size)
        numbers["diversity"] = agreement.diversity(x, real, [scene.name for scene in scenes], each, classifier)
        say(f"diversity within a prompt: {numbers['diversity']['ratio']:.2f} of real pictures'")
    if samples:
        # As many of each class as real pictures below
        prompt_rows = prompts.prompts(-(-samples // len(names)), names, seed=1)[:samples]
        x = draw(sd, [caption for caption, _, _ in prompt_rows], seed + 3, **run)
        say(f"{samples:,} samples are drawn; now as many held-out pictures and {max(training, samples):,} of training")
        real = worlds.load("test", size, samples, names).pixels
        train = worlds.load("train", size, max(training, samples), names).pixels
        numbers["distribution"] = agreement.distribution(x, real, train, reconstruct(sd, real, seed), classifier)
        distribution = numbers["distribution"]
        say(f"Frechet distance {distribution['frechet']:.2f}, recall {distribution['recall']:.2f}")
    return numbers, sheet


def compare_guidance(sd, classifier, runs, per_class=4, names=worlds.BASE, seed=0, say=print):
    """{run: numbers} for the same few validation prompts with every run: for the choice of guidance.

    Too little guidance costs agreement, too much costs Fréchet distance and recall (Ho & Salimans 2022). Both are
    measured, the latter against as many validation pictures. Test prompts stay unused, to judge the choice.
    """
    prompt_rows, table = prompts.prompts(per_class, names, split="val"), {}
    for run in runs:
        x = draw(sd, [caption for caption, _, _ in prompt_rows], seed, **run)
        if not table:
            pixels = [worlds.load(split, x.shape[-1], len(prompt_rows), names).pixels for split in ("val", "train")]
            real, floor = (world_classifier.classify(classifier, part).features for part in pixels)
        shares = agreement.prompt_agreement(x, prompt_rows, classifier)
        if len(prompt_rows) > 5:  # coverage needs five neighbours
            shares |= agreement.compare(world_classifier.classify(classifier, x).features, real, floor)
        table[run_name(run)] = shares
        say(f"{run_name(run)}: {agreement_sentence(shares)}")
    return table


def reconstruct(sd, x, seed=0, batch=64):
    """Reconstructions in [-1, 1] of pictures uint8 [n,3,H,W] by sd's autoencoder, from posterior draws, on the CPU."""
    generator = torch.Generator(sd.device).manual_seed(seed)
    return torch.cat([sd.decode(sd.encode(from_uint8(pixels), generator)).clamp(-1, 1).cpu()
                      for pixels in x.split(batch)])


# --- tables -----------------------------------------------------------------------------------------------------------

def run_name(run):
    """A run's name: sampler, steps and guidance."""
    start = f" from {run['guidance_start']:g} on" if run.get("guidance_start") else ""
    return f"{run['sampler']}, {run['steps']} steps, guidance {run['guidance']:g}{start}"


def agreement_sentence(shares):
    """The shares of `prompt_agreement` as one line."""
    return (f"class {shares['class']:.1%} of {shares['n']:,} (worst {shares['worst']} {shares['worst_class']:.1%}), "
            f"named colours {shares['colours']:.1%}, both {shares['class_and_colours']:.1%}, "
            f"nonsense {shares['rejected']:.1%}")


def contact_sheet(x, names, columns=10):
    """A sheet with one row for each class: its first pictures in x [n,3,H,W]; names: their classes."""
    rows = {name: [picture for picture, other in zip(x, names) if other == name][:columns]
            for name in dict.fromkeys(names)}
    return plots.sheet(list(rows.values()), list(rows))


def page(numbers):
    """The numbers of `measure` as Markdown with their bars, then a table of all classes and unmet pairs."""
    rows = []

    def row(label, value, bar="", met=None):
        rows.append(f"| {label} | {value} | {bar} | {'' if met is None else 'yes' if met else '**no**'} |")

    def at_least(label, share, bar, text=None):
        row(label, text or f"{share:.1%}", f">= {BARS[bar]:.0%}", share >= BARS[bar])

    for name, result in numbers["agreement"].items():
        at_least(f"{name}: class as asked for, {result['n']:,} samples", result["class"], "class")
        worst = f"{result['worst']} {result['worst_class']:.1%}"
        at_least("- worst class", result["worst_class"], "worst_class", worst)
        row("- named colours; class and colours", f"{result['colours']:.1%}; {result['class_and_colours']:.1%}")
        row("- classified as nonsense; seconds an image", f"{result['rejected']:.1%}; {result['seconds_an_image']:.2f}")
    if result := numbers.get("distribution"):
        kinds = [kind for kind in ("_floor", "_copies") if "frechet" + kind in result]
        floors = [result["frechet" + kind] for kind in kinds]
        row(f"Fréchet distance on the classifier's 128 features, n = {result['n']:,} each", f"{result['frechet']:.2f}",
            f"<= {BARS['frechet']} x {max(floors):.2f}", result["frechet"] <= BARS["frechet"] * max(floors))
        row("- floors: training pictures; reconstructions", "; ".join(f"{value:.2f}" for value in floors))
        for name in agreement.LIKENESS[1:]:
            bar, floor_values = BARS.get(name), "; ".join(f"{result[name + kind]:.3f}" for kind in kinds)
            row(f"{name} (floors)", f"{result[name]:.3f} ({floor_values})", f">= {bar}" if bar else "",
                result[name] >= bar if bar else None)
        row(f"median distance to the nearest of {result['training']:,} training pictures",
            f"{result['nearest_train']:.2f}", f">= {result['nearest_test']:.2f}, held-out pictures'",
            result["nearest_train"] >= result["nearest_test"])
        row("copies of training pictures (held-out pictures')", f"{result['copied_share']:.2%} "
            f"({result['copied_share_test']:.2%})", "<= 1 %", not result["memorised"])
    if result := numbers.get("diversity"):
        row(f"diversity within a prompt over real pictures', {result['prompts']} prompts x {result['each']}",
            f"{result['ratio']:.2f}", f">= {BARS['diversity']}", result["ratio"] >= BARS["diversity"])
        row("- of the worst prompt; in pixels", f"{result['worst_ratio']:.2f}; {result['pixel_ratio']:.2f}")
    if result := numbers.get("composition"):
        at_least(f"pairs never met in training: class and both colours, {result['n']:,} samples",
                 result["class_and_colours"], "composition")
        row("- class alone; colours alone", f"{result['class']:.1%}; {result['colours']:.1%}")
    head = ["| what | measured | bar | met |", "|---|---|---|---|"]
    note = f"All but the agreement with {run_name(numbers['runs'][0])}; pictures by seed {numbers['seed']}."
    return "\n".join([*head, *rows, "", note, "", *class_table(numbers)])


def class_table(numbers):
    """Lines of Markdown: agreement, diversity and composition of every class, with all pairs unmet in training."""
    runs = list(numbers["agreement"].values())
    measures = {name: numbers.get(name) for name in ("diversity", "composition")}
    head = [*(f"class right: {name}" for name in numbers["agreement"]),
            *(["diversity"] if measures["diversity"] else []),
            *(["never met: both right", "with the colour: right of n"] if measures["composition"] else [])]
    lines = ["| class | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name in numbers["names"]:
        cells = [f"{shares['by_class'][name]:.0%}" for shares in runs]
        if measures["diversity"]:
            cells.append(f"{measures['diversity']['by_class'][name]:.2f}")
        if measures["composition"]:
            pairs = sorted(measures["composition"]["by_pair"][name].items())
            cells += [f"{measures['composition']['by_class'][name]:.0%}",
                      ", ".join(f"{colour} {right} of {n}" for colour, (right, n) in pairs)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def guidance_table(table):
    """The runs of `compare_guidance` as Markdown."""
    lines = ["| validation prompts | class | worst class | named colours | both | nonsense | Fréchet (floor) | "
             "recall (floor) |", "|---" * 8 + "|"]
    for name, result in table.items():
        likeness = [f"{result[key]:.2f} ({result[key + '_floor']:.2f})" if key in result else ""
                    for key in ("frechet", "recall")]
        lines.append(f"| {name}, n = {result['n']} | {result['class']:.1%} | "
                     f"{result['worst']} {result['worst_class']:.0%} | {result['colours']:.1%} | "
                     f"{result['class_and_colours']:.1%} | {result['rejected']:.1%} | " + " | ".join(likeness) + " |")
    return "\n".join(lines)
