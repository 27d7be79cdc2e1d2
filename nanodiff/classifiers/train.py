"""Train the reader on pictures of all the drawn worlds, measure it on held-out seeds, and save it with its page.

    python -m nanodiff.classifiers.train

Writes data/reader/worlds.safetensors (half precision) and worlds.md beside it: how it was made and what was measured.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from nanodiff import worlds
from nanodiff.classifiers.digit_negatives import blur
from nanodiff.classifiers.negatives import HELD_OUT_KINDS, TRAINING_KINDS, nonsense
from nanodiff.classifiers.worlds import (COMMAND, NONSENSE, Reader, SIZE, WEIGHTS, as_picture, calibration_error,
                                         fit_temperature, initialise, load_reader, read_all)
from nanodiff.errors import check
from nanodiff.files import write_text
from nanodiff.flags import check_folder, entry, parse
from nanodiff.formats.weights import write_weights
from nanodiff.pixels import to_uint8
from nanodiff.worlds import textures

CLASSES = (*worlds.DRAWN, *worlds.WOVEN, NONSENSE)
COLOURS = tuple(textures.COLOURS)
NO_ANSWER = -100  # woven slices have no colours, textures no number: cross_entropy skips this label


@dataclass
class Config:
    pictures: int = 800  # drawn pictures of every class of textures, things and digits
    specimens: int = 24  # woven specimens of every state
    scale: float = 0.25  # their size, of the report's volumes
    slices: int = 1500  # pictures of every woven class, cropped from their slices
    epochs: int = 7  # passes through all of them
    batch: int = 64  # pictures in a step
    lr: float = 3e-3  # the highest learning rate
    test: int = 200  # held-out pictures of every class; half as many more set the temperature
    test_specimens: int = 8  # held-out specimens of every state; half as many more set the temperature
    workers: int = 2  # processes that draw
    seed: int = 0  # of pictures, order, noise and weights
    out: str = ""  # safetensors file (default: the one that ships); a page is written beside it


@entry
def main(argv=None):
    """Draws, trains, calibrates, saves, measures what was saved."""
    config, _ = parse(Config, argv, __doc__)
    for field in ("pictures", "specimens", "slices", "epochs", "batch", "test", "test_specimens", "workers"):
        check(getattr(config, field) >= 1, f"--{field} is {getattr(config, field)}; expected 1 or more")
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
    some = draw(config, "val", -(-config.test // 2), -(-config.test_specimens // 2), -(-config.test // 2))
    some = with_nonsense(some, torch.Generator().manual_seed(config.seed + 1))
    net.temperature = fit_temperature(read_all(net, some["x"]).classes, some["class"])
    minutes = (time.time() - started) / 60
    write_weights(out, net.half().state_dict(), {
        "temperature": f"{net.temperature:.4f}", "classes": json.dumps(net.classes), "colours": json.dumps(net.colours),
        "config": json.dumps(vars(config) | {"out": ""})})
    figures = measure(load_reader(out), draw(config, "test", config.test, config.test_specimens, config.test))
    print(f"temperature {net.temperature:.3f}, {minutes:.1f} minutes\n{table(figures)}")
    write_text(out.with_suffix(".md"), page(config, out, net, minutes, figures))


def draw(config, split, pictures, specimens, slices):
    """Pictures of every class but nonsense -> dict: x uint8 [N,3,64,64]; class, figure, ground, count int64 [N]."""
    drawn = worlds.load(split, SIZE, pictures * len(worlds.DRAWN), worlds.DRAWN, seed=config.seed,
                        workers=config.workers, pairs="all")
    data = {"x": drawn.pixels, "class": drawn.labels}
    for place, role in enumerate(("figure", "ground")):
        data[role] = torch.tensor([COLOURS.index(shown(scene)[place]) for scene in drawn.scenes])
    data["count"] = torch.tensor([scene.count - 1 if scene.name in textures.THINGS else NO_ANSWER
                                  for scene in drawn.scenes])
    cut = worlds.cut(split, SIZE, slices * len(worlds.WOVEN), seed=config.seed, workers=config.workers, specimens=specimens,
                     scale=config.scale)
    by_class = cut.labels.argsort(stable=True)  # the order in which the reader that ships was trained
    data["x"] = torch.cat([data["x"], cut.pixels[by_class]])
    data["class"] = torch.cat([data["class"], cut.labels[by_class] + CLASSES.index(cut.classes[0])])
    for role in ("figure", "ground", "count"):
        data[role] = F.pad(data[role], (0, len(cut)), value=NO_ANSWER)
    return data


def shown(scene):
    """(figure, ground) colours as a reader can tell them: in the order of COLOURS where nobody sees which is which."""
    return sorted(scene.colours, key=COLOURS.index) if scene.name in textures.SYMMETRIC else scene.colours


def with_nonsense(data, generator, share=0.1):
    """The pictures of `draw` with a share of nonsense made of them."""
    rows = torch.randperm(len(data["x"]), generator=generator)[:int(share * len(data["x"]))]
    wrong = nonsense(as_picture(data["x"][rows]), generator)
    full = {name: F.pad(column, (0, len(rows)), value=NO_ANSWER) for name, column in data.items() if name != "x"}
    full["class"][len(data["x"]):] = CLASSES.index(NONSENSE)
    return {"x": torch.cat([data["x"], to_uint8(wrong)]), **full}


def train(config, data):
    """A Reader trained on the pictures of `draw` and on nonsense made of them anew in every epoch."""
    generator = torch.Generator().manual_seed(config.seed)
    net = Reader(CLASSES, COLOURS).to(memory_format=torch.channels_last)
    initialise(net, generator)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    steps = int(len(data["x"]) * 1.1) // config.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, config.epochs * steps, pct_start=0.15)
    for epoch in range(config.epochs):
        started, total = time.time(), 0.0
        now = with_nonsense(data, generator)
        order = torch.randperm(len(now["x"]), generator=generator)
        for step in range(steps):
            rows = order[step * config.batch:(step + 1) * config.batch]
            x = moved(as_picture(now["x"][rows]), generator)
            answers = net(x.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(answers["class"], now["class"][rows], label_smoothing=0.02)
            for role, weight in (("figure", 0.3), ("ground", 0.3), ("count", 0.1)):
                if (now[role][rows] != NO_ANSWER).any():
                    loss = loss + weight * F.cross_entropy(answers[role], now[role][rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        seconds = time.time() - started
        print(f"epoch {epoch + 1}/{config.epochs}  loss {total / steps:.4f}  {steps * config.batch / seconds:.0f} "
              f"pictures/s, {seconds * (config.epochs - epoch - 1) / 60:.0f} min left", flush=True)
    return net.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def moved(x, generator):
    """Pictures shifted by up to 4 pixels; a third is soft, a third noisy: an autoencoder's copies are a little of both."""
    down, right = torch.randint(-4, 5, (2,), generator=generator).tolist()
    x = F.pad(x, (4, 4, 4, 4), mode="reflect")[:, :, 4 + down:4 + down + SIZE, 4 + right:4 + right + SIZE]
    kind = torch.rand(len(x), 1, 1, 1, generator=generator)
    sigma = float(torch.empty(1).uniform_(0.4, 1.0, generator=generator))
    soft = blur(x, sigma)
    noisy = x + 0.1 * torch.rand(len(x), 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    return torch.where(kind < 1 / 3, soft, torch.where(kind > 2 / 3, noisy, x)).clamp(-1, 1)


@torch.no_grad()
def measure(net, data, seed=0):
    """The reader's figures on held-out pictures of `draw`: shares in 0..1, by name, ready for JSON."""
    reading = read_all(net, data["x"])
    guess, label = reading.classes.argmax(1), data["class"]
    figures = {"n": len(label), "calibration_error": calibration_error(reading.classes, label), "groups": {}}
    for group, names in worlds.GROUPS.items():
        mine = torch.isin(label, torch.tensor([CLASSES.index(name) for name in names]))
        figures["groups"][group] = _share(guess[mine] == label[mine])
    seen = torch.isin(label, torch.tensor([CLASSES.index(n) for g in ("textures", "things") for n in worlds.GROUPS[g]]))
    figures["textures_and_things"] = _share(guess[seen] == label[seen])
    figures["classes"] = {name: _share(guess[label == i] == i) for i, name in enumerate(CLASSES) if name != NONSENSE}
    figures["called_nonsense"] = _share(guess == CLASSES.index(NONSENSE))
    for role, answer in (("figure", reading.figure), ("ground", reading.ground), ("count", reading.count)):
        asked = data[role] != NO_ANSWER
        figures[role] = _share(answer.argmax(1)[asked] == data[role][asked])
    both = torch.stack([reading.figure.argmax(1), reading.ground.argmax(1)]).sort(0).values
    wanted, asked = torch.stack([data["figure"], data["ground"]]).sort(0).values, data["figure"] != NO_ANSWER
    figures["both_colours"] = _share((both == wanted).all(0)[asked])
    generator, figures["nonsense"] = torch.Generator().manual_seed(seed), {}
    x = as_picture(data["x"][torch.randperm(len(label), generator=generator)[:2000]])
    for name, kind in {**TRAINING_KINDS, **HELD_OUT_KINDS}.items():
        wrong = read_all(net, nonsense(x, generator, {name: kind})).classes.argmax(1)
        figures["nonsense"][name] = _share(wrong == CLASSES.index(NONSENSE))
    figures["rejected"] = sum(figures["nonsense"][name] for name in TRAINING_KINDS) / len(TRAINING_KINDS)
    figures["rejected_unseen"] = sum(figures["nonsense"][name] for name in HELD_OUT_KINDS) / len(HELD_OUT_KINDS)
    pairs = torch.stack([label, guess])[:, guess != label]
    kinds, counts = pairs.unique(dim=1, return_counts=True)
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
    lines = [f"| {figures['n']:,} pictures of held-out seeds | read right | bar |", "|---|---|---|"]
    for text, value, bar in rows:
        shown = "; ".join(f"{100 * one:.2f} %" for one in (value if isinstance(value, tuple) else (value,)))
        lines.append(f"| {text} | {shown} | {bar} |")
    lines += ["", "| nonsense | in training | rejected |", "|---|---|---|"]
    lines += [f"| {name} | {'no' if name in HELD_OUT_KINDS else 'yes'} | {100 * share:.1f} % |"
              for name, share in figures["nonsense"].items()]
    low = sorted(figures["classes"].items(), key=lambda item: item[1])[:8]
    lines += ["", "Hardest classes: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in low) + ".",
              "Most confused: " + ", ".join(f"{a} read as {b} ({n})" for a, b, n in figures["confused"]) + "."]
    return "\n".join(lines)


def page(config, out, net, minutes, figures):
    """What is written beside the weights."""
    flags = " ".join(f"--{name} {value}" for name, value in vars(config).items()
                     if name != "out" and value != getattr(Config, name))
    size, parameters = out.stat().st_size / 1e6, sum(p.numel() for p in net.parameters()) / 1e3
    return f"""# The reader of the drawn worlds

`{out.name}` ({size:.2f} MB, {parameters:.0f} k parameters in half precision): the judge of drawn and generated pictures, see
`nanodiff/classifiers/worlds.py`. This project trained it on pictures that it draws itself (and MNIST's digits,
`data/mnist/`), so its weights fall under this project's licence. Made, with this page, by

    {f'{COMMAND} {flags}'.strip()}

in {minutes:.0f} minutes on two CPU cores: {config.pictures} pictures of each of {len(worlds.DRAWN)} drawn classes (all pairs of class and
colour), {config.slices} slices of each of the nine woven classes from {config.specimens} specimens of each state, and nonsense made of
them (`nanodiff/classifiers/negatives.py`), {config.epochs} times. Other seeds set the temperature ({net.temperature:.3f}); no choice was made
on the seeds that give the figures below.

{table(figures)}
"""


if __name__ == "__main__":
    main()
