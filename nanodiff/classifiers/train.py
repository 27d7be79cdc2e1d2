"""Train the classifier on pictures of all the drawn worlds, measure it on held-out seeds, save it with its page.

    python -m nanodiff.classifiers.train

Writes data/reader/worlds.safetensors (half precision) and worlds.md beside it: how it was made and how well it does.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from nanodiff import worlds
from nanodiff.classifiers.digit_negatives import blur
from nanodiff.classifiers.negatives import HELD_OUT_KINDS, TRAINING_KINDS, make_nonsense
from nanodiff.classifiers.worlds import (COMMAND, NONSENSE, SIZE, WEIGHTS, WorldClassifier, as_float,
                                         calibration_error, classify, fit_temperature, initialise, load_classifier)
from nanodiff.errors import check
from nanodiff.files import write_text
from nanodiff.flags import Count, check_folder, entry, parse
from nanodiff.formats.weights import write_weights
from nanodiff.pixels import to_uint8
from nanodiff.worlds import textures

CLASSES = (*worlds.DRAWN, *worlds.WOVEN, NONSENSE)
COLOURS = tuple(textures.COLOURS)
NO_ANSWER = -100  # the label of colours in woven slices and of the count in textures: cross_entropy skips it


@dataclass
class Config:
    pictures: Count = 800  # drawn pictures of every class of textures, things and digits
    specimens: Count = 24  # woven specimens of every state
    scale: float = 0.25  # their size, of the report's volumes
    slices: Count = 1500  # pictures of every woven class, cropped from their slices
    epochs: Count = 7  # passes through all of them
    batch: Count = 64  # pictures in a step
    lr: float = 3e-3  # the highest learning rate
    test: Count = 200  # held-out pictures of every class; half as many more set the temperature
    test_specimens: Count = 8  # held-out specimens of every state; half as many more set the temperature
    workers: Count = 2  # processes that draw
    seed: int = 0  # of pictures, order, noise and weights
    out: str = ""  # safetensors file (default: the one that ships); a page is written beside it


@entry
def main(argv=None):
    """Draws pictures; trains, calibrates and saves a classifier; measures the saved file."""
    config, _ = parse(Config, argv, __doc__)
    check(not config.out or not Path(config.out).is_dir(),
          f"--out {config.out} is a folder; expected the name of a safetensors file")
    out, started = Path(config.out or WEIGHTS), time.time()
    check(out.suffix == ".safetensors", f"--out {out} does not end in .safetensors; expected the name of such a file")
    check_folder("--out", out.parent)
    least = config.pictures * len(worlds.DRAWN)
    check(config.batch <= least, f"--batch is {config.batch}, more than the {least} pictures; expected fewer")
    data = draw(config, "train", config.pictures, config.specimens, config.slices)
    print(f"{len(data['x']):,} training pictures drawn in {time.time() - started:.0f} s", flush=True)
    net = train(config, data)
    calibration = draw(config, "val", -(-config.test // 2), -(-config.test_specimens // 2), -(-config.test // 2))
    calibration = add_nonsense(calibration, torch.Generator().manual_seed(config.seed + 1))
    net.temperature = fit_temperature(classify(net, calibration["x"]).classes, calibration["class"])
    minutes = (time.time() - started) / 60
    write_weights(out, net.half().state_dict(), {
        "temperature": f"{net.temperature:.4f}", "classes": json.dumps(net.classes), "colours": json.dumps(net.colours),
        "config": json.dumps(vars(config) | {"out": ""})})
    figures = measure(load_classifier(out), draw(config, "test", config.test, config.test_specimens, config.test))
    print(f"temperature {net.temperature:.3f}, {minutes:.1f} minutes\n{table(figures)}")
    write_text(out.with_suffix(".md"), page(config, out, net, minutes, figures))


def draw(config, split, pictures, specimens, slices):
    """Pictures of every class but nonsense, a dict: x uint8 [N,3,64,64]; class, figure, ground, count int64 [N]."""
    dataset = worlds.load(split, SIZE, pictures * len(worlds.DRAWN), worlds.DRAWN, seed=config.seed,
                          workers=config.workers, pairs="all")
    data = {"x": dataset.pixels, "class": dataset.labels}
    for i, role in enumerate(("figure", "ground")):
        data[role] = torch.tensor([COLOURS.index(visible_colours(scene)[i]) for scene in dataset.scenes])
    data["count"] = torch.tensor([scene.count - 1 if scene.name in textures.THINGS else NO_ANSWER
                                  for scene in dataset.scenes])
    woven = worlds.cut(split, SIZE, slices * len(worlds.WOVEN), seed=config.seed, workers=config.workers,
                       specimens=specimens, scale=config.scale)
    by_class = woven.labels.argsort(stable=True)  # the order for the classifier that ships
    data["x"] = torch.cat([data["x"], woven.pixels[by_class]])
    data["class"] = torch.cat([data["class"], woven.labels[by_class] + CLASSES.index(woven.classes[0])])
    for role in ("figure", "ground", "count"):
        data[role] = F.pad(data[role], (0, len(woven)), value=NO_ANSWER)
    return data


def visible_colours(scene):
    """The (figure, ground) colours of a scene, in the order of COLOURS where figure and ground cannot be told apart."""
    return sorted(scene.colours, key=COLOURS.index) if scene.name in textures.SYMMETRIC else scene.colours


def add_nonsense(data, generator, share=0.1):
    """The pictures of `draw` and a share of nonsense made from them, with its labels."""
    rows = torch.randperm(len(data["x"]), generator=generator)[:int(share * len(data["x"]))]
    negatives = make_nonsense(as_float(data["x"][rows]), generator)
    labels = {name: F.pad(column, (0, len(rows)), value=NO_ANSWER) for name, column in data.items() if name != "x"}
    labels["class"][len(data["x"]):] = CLASSES.index(NONSENSE)
    return {"x": torch.cat([data["x"], to_uint8(negatives)]), **labels}


def train(config, data):
    """A WorldClassifier trained on the pictures of `draw` and on nonsense that every epoch makes anew from them."""
    generator = torch.Generator().manual_seed(config.seed)
    net = WorldClassifier(CLASSES, COLOURS).to(memory_format=torch.channels_last)
    initialise(net, generator)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = int(len(data["x"]) * 1.1) // config.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, config.epochs * steps, pct_start=0.15)
    for epoch in range(config.epochs):
        started, total = time.time(), 0.0
        epoch_data = add_nonsense(data, generator)
        order = torch.randperm(len(epoch_data["x"]), generator=generator)
        for step in range(steps):
            rows = order[step * config.batch:(step + 1) * config.batch]
            x = augment(as_float(epoch_data["x"][rows]), generator)
            logits = net(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits["class"], epoch_data["class"][rows], label_smoothing=0.02)
            for role, weight in (("figure", 0.3), ("ground", 0.3), ("count", 0.1)):
                if (epoch_data[role][rows] != NO_ANSWER).any():
                    loss = loss + weight * F.cross_entropy(logits[role], epoch_data[role][rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        seconds = time.time() - started
        print(f"epoch {epoch + 1}/{config.epochs}  loss {total / steps:.4f}  {steps * config.batch / seconds:.0f} "
              f"pictures/s, {seconds * (config.epochs - epoch - 1) / 60:.0f} min left", flush=True)
    return net.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def augment(x, generator):
    """Pictures shifted by up to 4 pixels; a third is soft, a third noisy, as an autoencoder's reconstructions are."""
    down, right = torch.randint(-4, 5, (2,), generator=generator).tolist()
    x = F.pad(x, (4, 4, 4, 4), mode="reflect")[:, :, 4 + down:4 + down + SIZE, 4 + right:4 + right + SIZE]
    choice = torch.rand(len(x), 1, 1, 1, generator=generator)
    sigma = float(torch.empty(1).uniform_(0.4, 1.0, generator=generator))
    soft = blur(x, sigma)
    noisy = x + 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    return torch.where(choice < 1 / 3, soft, torch.where(choice > 2 / 3, noisy, x)).clamp(-1, 1)


@torch.no_grad()
def measure(net, data, seed=0):
    """Accuracies on held-out pictures of `draw`: shares in 0..1, by name, ready for JSON."""
    predictions = classify(net, data["x"])
    predicted, label = predictions.classes.argmax(1), data["class"]
    figures = {"n": len(label), "calibration_error": calibration_error(predictions.classes, label), "groups": {}}
    for group, names in worlds.GROUPS.items():
        in_group = torch.isin(label, torch.tensor([CLASSES.index(name) for name in names]))
        figures["groups"][group] = _share(predicted[in_group] == label[in_group])
    textured = torch.isin(label, torch.tensor([CLASSES.index(n) for g in ("textures", "things")
                                               for n in worlds.GROUPS[g]]))
    figures["textures_and_things"] = _share(predicted[textured] == label[textured])
    figures["classes"] = {name: _share(predicted[label == i] == i)
                          for i, name in enumerate(CLASSES) if name != NONSENSE}
    figures["called_nonsense"] = _share(predicted == CLASSES.index(NONSENSE))
    for role, probabilities in (("figure", predictions.figure), ("ground", predictions.ground),
                                ("count", predictions.count)):
        labelled = data[role] != NO_ANSWER
        figures[role] = _share(probabilities.argmax(1)[labelled] == data[role][labelled])
    predicted_pair = torch.stack([predictions.figure.argmax(1), predictions.ground.argmax(1)]).sort(0).values
    true_pair, labelled = torch.stack([data["figure"], data["ground"]]).sort(0).values, data["figure"] != NO_ANSWER
    figures["both_colours"] = _share((predicted_pair == true_pair).all(0)[labelled])
    generator, figures["nonsense"] = torch.Generator().manual_seed(seed), {}
    x = as_float(data["x"][torch.randperm(len(label), generator=generator)[:2000]])
    for name, kind in {**TRAINING_KINDS, **HELD_OUT_KINDS}.items():
        guesses = classify(net, make_nonsense(x, generator, {name: kind})).classes.argmax(1)
        figures["nonsense"][name] = _share(guesses == CLASSES.index(NONSENSE))
    figures["rejected"] = sum(figures["nonsense"][name] for name in TRAINING_KINDS) / len(TRAINING_KINDS)
    figures["rejected_unseen"] = sum(figures["nonsense"][name] for name in HELD_OUT_KINDS) / len(HELD_OUT_KINDS)
    confusions = torch.stack([label, predicted])[:, predicted != label]
    kinds, counts = confusions.unique(dim=1, return_counts=True)
    worst = counts.argsort(descending=True)[:10].tolist()
    figures["confused"] = [[CLASSES[kinds[0, i]], CLASSES[kinds[1, i]], int(counts[i])] for i in worst]
    return figures


def _share(flags):
    return float(flags.double().mean())


def table(figures):
    """The figures of `measure` as Markdown."""
    group = figures["groups"]
    rows = [("textures and things", figures["textures_and_things"], ">= 97 %"), ("textures", group["textures"], ""),
            ("things", group["things"], ""), ("digits", group["digits"], ""),
            ("nine woven classes", group["woven"], ">= 97 %"),
            ("noise and nonsense rejected: kinds that training saw", figures["rejected"], ">= 99 %"),
            ("kinds that it never saw", figures["rejected_unseen"], ""),
            ("real pictures called nonsense", figures["called_nonsense"], ""),
            ("colour of the figure; of the ground", (figures["figure"], figures["ground"]), ""),
            ("both colours, in either order", figures["both_colours"], ""),
            ("one thing or two", figures["count"], ""),
            ("expected calibration error", figures["calibration_error"], "")]
    lines = [f"| {figures['n']:,} pictures of held-out seeds | classified right | bar |", "|---|---|---|"]
    for text, value, bar in rows:
        percent = "; ".join(f"{100 * share:.2f} %" for share in (value if isinstance(value, tuple) else (value,)))
        lines.append(f"| {text} | {percent} | {bar} |")
    lines += ["", "| nonsense | in training | rejected |", "|---|---|---|"]
    lines += [f"| {name} | {'no' if name in HELD_OUT_KINDS else 'yes'} | {100 * share:.1f} % |"
              for name, share in figures["nonsense"].items()]
    hardest = sorted(figures["classes"].items(), key=lambda item: item[1])[:8]
    lines += ["", "Hardest classes: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in hardest) + ".",
              "Most confused: " + ", ".join(f"{a} taken for {b} ({n})" for a, b, n in figures["confused"]) + "."]
    return "\n".join(lines)


def page(config, out, net, minutes, figures):
    """The Markdown page beside the weights: how they were made, and `table`."""
    flags = " ".join(f"--{name} {value}" for name, value in vars(config).items()
                     if name != "out" and value != getattr(Config, name))
    size, parameters = out.stat().st_size / 1e6, sum(p.numel() for p in net.parameters()) / 1e3
    return f"""# The classifier of the drawn worlds

`{out.name}` ({size:.2f} MB, {parameters:.0f} k parameters in half precision): it judges drawn and generated
pictures, see `nanodiff/classifiers/worlds.py`. This project trained it on pictures that it draws itself (and MNIST's
digits, `data/mnist/`), so its weights fall under this project's licence. Made, with this page, by

    {f'{COMMAND} {flags}'.strip()}

in {minutes:.0f} minutes on two CPU cores: {config.pictures} pictures of each of {len(worlds.DRAWN)} drawn classes
(all pairs of class and colour), {config.slices} slices of each of the nine woven classes from {config.specimens}
specimens of each state, and nonsense made of them (`nanodiff/classifiers/negatives.py`), {config.epochs} times.
Other seeds set the temperature ({net.temperature:.3f}). No choice was made on the seeds that give the figures below.

{table(figures)}
"""


if __name__ == "__main__":
    main()
