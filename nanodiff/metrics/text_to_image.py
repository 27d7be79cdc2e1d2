"""Judging a text-to-image model of the drawn worlds: does it draw what was said, all of it, and nothing by heart?

    agreement      does the reader see the class and the colours that the prompt names
    distribution   Fréchet distance, recall and nearest training pictures of many samples, beside real pictures' floors
    diversity      how far apart are samples of one prompt, as a share of how far apart real pictures of it are
    composition    are class and colours right where training never showed the two together

These take pictures, not models; `draw` makes them, `measure` asks everything of one model and `page` puts the answers
beside their bars. Prompts are made of seeds that no training and no held-out picture has.
"""

import itertools
import time

import torch

from nanodiff import pictures
from nanodiff.data import grammar, textures, worlds
from nanodiff.data.images import from_uint8
from nanodiff.errors import UserError
from nanodiff.metrics import features
from nanodiff.metrics.neighbours import nearest_training_distance

APART = 1_000_000  # seeds between the held-out pictures of a split and the scenes of prompts
AT_ONCE = 128  # prompts that are encoded and drawn in one call
LIKENESS = ("frechet", "recall", "precision", "coverage")
BARS = {"class": 0.85, "worst_class": 0.6, "frechet": 3, "recall": 0.5, "diversity": 0.7, "composition": 0.5}


# --- what is asked for ------------------------------------------------------------------------------------------------

def scenes(n, names=worlds.BASE, pairs="met", seed=0, split="test", all_named=False):
    """n textures.Scenes of every class, the classes in turn -> list of n x len(names). Each class has its own sequence.

    pairs      "met" or "unmet": the colours that training shows with a class, or those that it never does
    all_named  only scenes whose caption names both colours
    UserError for n below 1 or what worlds and textures.scene refuse.
    """
    if n < 1 or not names:
        raise UserError(f"{n} prompts of each of {len(names)} classes cannot be made; expected at least one of each")
    first, found = worlds.first_seed(split, seed) + APART, []
    for name in names:
        every = (textures.scene(number, name, split, pairs=pairs) for number in itertools.count(first))
        named = (scene for scene in every if not all_named or None not in grammar.named_colours(scene))
        found.append(list(itertools.islice(named, n)))
    return [scene for row in zip(*found) for scene in row]


def prompts(n, names=worlds.BASE, pairs="met", seed=0, split="test", all_named=False):
    """[(caption, class, colours)] of `scenes`; colours: the (figure, ground) that the caption names, else None."""
    return [asked(scene) for scene in scenes(n, names, pairs, seed, split, all_named)]


def asked(scene):
    """(caption, class, colours) of a Scene; colours: the (figure, ground) that the caption names, else None."""
    return grammar.caption(scene), scene.name, grammar.named_colours(scene)


def draw(sd, captions, seed=0, **run):
    """Pictures float32 [n,3,H,W] in [-1, 1], one of each caption, on the CPU; picture i depends on seed and i alone.

    sd: a StableDiffusion; run: what its `generate` takes, such as sampler, steps and guidance.
    """
    parts = [sd.generate(captions[i:i + AT_ONCE], seed=seed, first=i, output="tensor", progress=False, **run).cpu()
             for i in range(0, len(captions), AT_ONCE)]
    return torch.cat(parts)


def paint(some, size):
    """Real pictures uint8 [n,3,size,size] of Scenes."""
    x = torch.stack([torch.from_numpy(textures.paint(scene, size)) for scene in some])  # [n,size,size,3]
    return x.permute(0, 3, 1, 2).contiguous()


def alike(scene, n):
    """n Scenes of the same class, colours and number of things, of seeds that no other picture has."""
    return [textures.scene(scene.seed + APART + 1000 * i, scene.name, scene.split, scene.colours, scene.count)
            for i in range(n)]


# --- judgements: of pictures, ready for JSON --------------------------------------------------------------------------

def agreement(x, wanted, reader):
    """Does the reader see in pictures x [n,3,H,W] what was asked for (`prompts`)? Shares in 0..1:

        class, by_class, rejected     as in features.agreement; worst_class (share), worst (its name)
        colours                       the named colours are there, of the prompts that name any
        class_and_colours             both are right, of all prompts
    """
    names, colours = [name for _, name, _ in wanted], [pair for _, _, pair in wanted]
    reading = features.read_all(reader, x)
    found = {"n": len(x), **features.agreement(reading, names, colours)}
    found["worst"] = min(found["by_class"], key=found["by_class"].get)
    naming = [i for i, pair in enumerate(colours) if pair != (None, None)]
    seen = reading.colours()
    right = [features.same_colours(seen[i], colours[i]) for i in naming]
    return found | {"colours": sum(right) / max(1, len(right))}


def distribution(x, real, train, copies, reader):
    """Are samples x [m,3,H,W], as a set, like held-out real pictures [m,...], and not copies of training pictures?

    train [l,...], l >= m: the pictures that the model was trained on, the first m stand in for perfect samples
    copies [m,...]: the held-out pictures through the model's autoencoder and back, or None
    On the reader's features, so this is not FID: n (= m), and each of frechet, recall, precision, coverage for samples,
    with "_floor" for the m training pictures, with "_copies" for the copies; nearest_train and nearest_test, the median
    distance of samples and of held-out pictures to the nearest of all `training` pictures; copied_share (see
    neighbours.nearest_training_distance) and copied_share_test. UserError when the numbers of pictures differ.
    """
    if not len(x) == len(real) <= len(train) or copies is not None and len(copies) != len(real):
        raise UserError(f"{len(x)} samples, {len(real)} held-out and {len(train)} training pictures cannot be "
                        "compared: as many held-out pictures as samples are needed, and no fewer for training")
    seen, real, train = (features.read_all(reader, part).features for part in (x, real, train))
    found = {"n": len(x), "training": len(train), **features.compare(seen, real, train[:len(x)])}
    if copies is not None:
        copied = features.compare(features.read_all(reader, copies).features, real, train[:len(x)])
        found |= {name + "_copies": copied[name] for name in LIKENESS}
    near = nearest_training_distance(seen, train, real)
    limit = 0.5 * near["test_distance"].quantile(0.01)
    return found | {"nearest_train": near["median"], "nearest_test": near["test_median"],
                    "copied_share": near["copied_share"], "memorised": near["memorised"],
                    "copied_share_test": float((near["test_distance"] <= limit).double().mean())}


def diversity(x, real, names, each, reader):
    """How far apart are samples of one prompt? x and real: pictures [p x each,3,H,W], `each` of every prompt together.

    names [p]: the prompts' classes. The mean distance between two pictures of a prompt, of samples over real pictures:
    ratio and worst_ratio on the reader's features, by_class, and pixel_ratio; means over prompts.
    """
    if each < 2 or len(x) != len(real) or len(x) != each * len(names):
        raise UserError(f"{len(x)} samples and {len(real)} real pictures were given for {len(names)} prompts; expected "
                        f"{each} for each, and at least 2")
    seen, known = (features.read_all(reader, part).features for part in (x, real))
    ratio = _spread(seen, each) / _spread(known, each)
    pixels = _spread(features.as_picture(x), each) / _spread(features.as_picture(real), each)
    by_class = {name: float(ratio[[i for i, other in enumerate(names) if other == name]].mean())
                for name in dict.fromkeys(names)}
    return {"prompts": len(names), "each": each, "ratio": float(ratio.mean()), "worst_ratio": float(ratio.min()),
            "pixel_ratio": float(pixels.mean()), "by_class": by_class}


def _spread(x, each):
    """Mean distance between two of the `each` rows of every prompt: x [p x each, ...] -> [p]."""
    x = x.flatten(1).double().unflatten(0, (-1, each))
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2)) / (each * (each - 1))


def composition(x, some, reader):
    """Are class and both colours right in x [n,3,H,W]? some: the Scenes asked for, whose colours training never shows.

    n, class, colours and class_and_colours (shares in 0..1), by_class {class: class_and_colours}, and by_pair
    {class: {colour that training never shows with it: [right, n]}}; a scene of two such colours counts for both.
    """
    reading = features.read_all(reader, x)
    named = [a == scene.name for a, scene in zip(reading.names(), some)]
    coloured = [features.same_colours(seen, scene.colours) for seen, scene in zip(reading.colours(), some)]
    by_class, by_pair = {}, {}
    for a, b, scene in zip(named, coloured, some):
        by_class.setdefault(scene.name, []).append(a and b)
        for colour in scene.colours:
            if not textures.met(scene.name, colour):
                pair = by_pair.setdefault(scene.name, {}).setdefault(colour, [0, 0])
                pair[0], pair[1] = pair[0] + (a and b), pair[1] + 1
    return {"n": len(some), "class": sum(named) / len(some), "colours": sum(coloured) / len(some),
            "class_and_colours": sum(a and b for a, b in zip(named, coloured)) / len(some),
            "by_class": {name: sum(right) / len(right) for name, right in by_class.items()}, "by_pair": by_pair}


# --- all of it, of one model ------------------------------------------------------------------------------------------

def measure(sd, reader, runs, per_class=20, samples=2000, training=30_000, each=8, names=worlds.BASE, seed=0,
            say=print):
    """Everything above of a StableDiffusion -> (numbers ready for `page` and JSON, contact sheet).

    runs       [{"sampler", "steps", "guidance", perhaps "guidance_start"}]: agreement is measured with each, the rest
               with the first
    per_class  prompts of every class, for agreement and for composition
    samples    of them all, for the distribution (0: leave it out); training: training pictures to compare them with
    each       samples of one prompt of every class, for diversity (0: leave it out)
    say        is told what has been done
    """
    numbers, run = {"runs": runs, "seed": seed, "names": list(names), "agreement": {}}, runs[0]
    wanted = prompts(per_class, names)
    for one in runs:
        started = time.time()
        x = draw(sd, [caption for caption, _, _ in wanted], seed, **one)
        found = agreement(x, wanted, reader) | {"seconds_an_image": (time.time() - started) / len(x)}
        numbers["agreement"][run_name(one)] = found
        say(f"{run_name(one)}: {agreement_sentence(found)}")
        if one is run:
            sheet = contact_sheet(x, [name for _, name, _ in wanted])
    size = x.shape[-1]

    some = scenes(per_class, names, "unmet", all_named=True)
    x = draw(sd, [grammar.caption(scene) for scene in some], seed + 1, **run)
    numbers["composition"] = composition(x, some, reader)
    say(f"never met in training: class and both colours right {numbers['composition']['class_and_colours']:.1%}")
    if each:
        some = scenes(1, names, all_named=True)
        x = draw(sd, [grammar.caption(scene) for scene in some for _ in range(each)], seed + 2, **run)
        real = paint([other for scene in some for other in alike(scene, each)], size)
        numbers["diversity"] = diversity(x, real, [scene.name for scene in some], each, reader)
        say(f"diversity within a prompt: {numbers['diversity']['ratio']:.2f} of real pictures'")
    if samples:
        wanted = prompts(-(-samples // len(names)), names, seed=1)[:samples]  # of each class as many as real ones below
        x = draw(sd, [caption for caption, _, _ in wanted], seed + 3, **run)
        say(f"{samples:,} samples are drawn; now as many held-out pictures and {max(training, samples):,} of training")
        real = worlds.load("test", size, samples, names).pixels
        train = worlds.load("train", size, max(training, samples), names).pixels
        numbers["distribution"] = distribution(x, real, train, through(sd, real, seed), reader)
        found = numbers["distribution"]
        say(f"Frechet distance {found['frechet']:.2f}, recall {found['recall']:.2f}")
    return numbers, sheet


def compare_guidance(sd, reader, runs, per_class=4, names=worlds.BASE, seed=0, say=print):
    """The same few prompts of the validation split with every run -> {run: numbers}: what guidance is chosen by.

    Too little guidance costs agreement, too much costs Fréchet distance and recall (Ho & Salimans 2022); both are
    there, against as many validation pictures. Test prompts are left alone, so that they can judge the choice.
    """
    wanted, table = prompts(per_class, names, split="val"), {}
    for one in runs:
        x = draw(sd, [caption for caption, _, _ in wanted], seed, **one)
        if not table:
            drawn = [worlds.load(split, x.shape[-1], len(wanted), names).pixels for split in ("val", "train")]
            real, floor = (features.read_all(reader, one).features for one in drawn)
        found = agreement(x, wanted, reader)
        if len(wanted) > 5:  # neighbours are sought among five others
            found |= features.compare(features.read_all(reader, x).features, real, floor)
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
    return pictures.sheet(list(rows.values()), list(rows))


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
        for name in LIKENESS[1:]:
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
