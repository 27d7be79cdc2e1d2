"""Measure a trained DDPM, bits/dim on held-out pictures and what its samples are worth; Stable Diffusion; or pictures.

    python -m nanodiff.evaluate --model runs/ddpm-001                         bits/dim, and the samples judged
    python -m nanodiff.evaluate --model runs/ddpm-001 --table                 samplers and numbers of steps compared
    python -m nanodiff.evaluate --model runs/ldm-001 --out FOLDER             Stable Diffusion of the drawn worlds
    python -m nanodiff.evaluate --model runs/ldm-001 --guidance 1,2,3,5       which guidance to take
    python -m nanodiff.evaluate --folder PICTURES --against REAL              what the classifier sees in any pictures
    python -m nanodiff.evaluate --folder PICTURES --against REAL --inception WEIGHTS.pth      and FID and KID
    python -m nanodiff.evaluate --features A.npy B.npy                        Frechet distance of two [n, d] tables
    (instead of the flags below)

Pictures are judged by the classifier that the repository ships (nanodiff.classifiers.worlds), MNIST's digits by their
own (nanodiff.classifiers.digits). Every distance is printed with n, the features it was taken on, and the same
distance between training and test pictures: its floor. Of a folder of real pictures two halves stand for these.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from nanodiff import plots
from nanodiff.diffusion import samplers
from nanodiff.errors import check
from nanodiff.files import write_text
from nanodiff.flags import Count, CountOrZero, NotNegative, OneOf, check_folder, entry, parse
from nanodiff.metrics import agreement
from nanodiff.pipelines import ddpm, generation, stable_diffusion
from nanodiff.report import figures
from nanodiff.sample import is_stable_diffusion
from nanodiff.training import datasets
from nanodiff.training.distributed import pick_device


@dataclass
class Config:
    model: str = ""  # a run of train_ddpm.py or train_ldm.py, its model folder, a diffusers DDPM, or Stable Diffusion
    weights: Literal["ema", "raw"] = "ema"  # averaged, or a run's last checkpoint as it is
    data: str = ""  # held-out pictures: mnist, cifar10, dtd or a folder (default: what the model was trained on)
    root: str = ""  # where the files of a named data set lie
    pictures: CountOrZero = 200  # held-out pictures for bits/dim (0: leave it out)
    t_samples: Count = 50  # time steps drawn for each of them, one from each stratum
    n: CountOrZero = 1000  # samples to judge (0: none)
    sampler: Annotated[str, OneOf(samplers.by_name)] = "dpm++2m"  # of the samples (Stable Diffusion: ddim 50 and dpm++2m 20)
    steps: Count = 25  # its steps
    seed: int = 1  # of samples, time steps and noise
    table: bool = False  # judge ddim, dpm++2m, unipc and heun at 10, 15, 25 and 50 steps each
    folder: str = ""  # pictures to judge instead of a model's samples; sub-folders named as classes: what was asked for
    against: str = ""  # a folder of real pictures to compare those with
    materials: bool = False  # with --against: grey slices, judged as a materials engineer would
    voxel: NotNegative = 0.0  # with --materials: side of a pixel in micrometres (0: lengths in pixels)
    resin: bool = False  # with --materials: the part lies in resin, so that what is no yarn is no air
    inception: str = ""  # file of Inception's weights (pt_inception-2015-12-05-6726825d.pth), for FID and KID of both
    device: str = "auto"  # cpu, cuda or cuda:1; auto takes a GPU when there is one
    out: str = ""  # JSON file for the numbers (Stable Diffusion: folder for them, their page and a contact sheet)
    guidance: tuple[float, ...] = ()  # Stable Diffusion: scale (none: its own); several: compared on validation prompts
    guidance_start: float = -1.0  # Stable Diffusion: share of the way before which guidance does not act (-1: its own)
    per_class: Count = 20  # Stable Diffusion: prompts of every class (4 where guidance is compared)
    samples: CountOrZero = 2000  # Stable Diffusion: samples for Frechet distance, recall and nearest neighbours (0: none)
    training: Count = 30_000  # Stable Diffusion: training pictures among which a sample's nearest is sought
    each: CountOrZero = 8  # Stable Diffusion: samples of one prompt of every class, for diversity (0: none)
    names: str = ""  # Stable Diffusion: some classes of the drawn worlds alone (default: all of the base's)


FOR_DDPM = {"weights", "data", "root", "pictures", "t_samples", "n", "table"}
FOR_STABLE_DIFFUSION = {"guidance", "guidance_start", "per_class", "samples", "training", "each", "names"}


@entry
def main(argv=None):
    """Measures the model that the command line names and prints the numbers."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "--features" in words:
        return features_distance(words)
    config, given = parse(Config, words, __doc__)
    if config.model and is_stable_diffusion(Path(config.model) / "model"):  # a run of train_ldm.py
        config.model = str(Path(config.model) / "model")
    stable = bool(config.model) and is_stable_diffusion(config.model)
    check_flags(config, given, stable)
    if stable:
        return stable_diffusion_judged(config, given)
    if config.folder:
        check(not config.table, "--table compares samplers of a --model; expected no such flag with --folder")
        return finish(config, folder_judged(config))
    finish(config, ddpm_judged(config))


def check_flags(config, given, stable):
    """Raises UserError where flags do not go together, before anything is read."""
    check(bool(config.model) != bool(config.folder), "give one of --model and --folder; expected a run folder such as "
          "runs/ddpm-001, a folder of pictures, or --features A.npy B.npy")
    check(config.folder or not config.against, "--against compares the pictures of --folder, which is missing")
    check(config.against or not config.inception, "--inception compares the pictures of --folder with those of "
          "--against; expected all three")
    check(config.against or not config.materials, "--materials compares the slices of --folder with those of --against; "
          "expected all three")
    check(config.materials or not (config.voxel or config.resin), "--voxel and --resin are for --materials; expected it, too")
    for name in sorted(given & (FOR_DDPM if stable else FOR_STABLE_DIFFUSION)):
        check(False, f"--{name} belongs to {'a DDPM' if stable else 'Stable Diffusion'}, and "
              f"{config.model or config.folder} is {'Stable Diffusion' if stable else 'none'}; expected no such flag")
    check(stable or not config.out or Path(config.out).parent.is_dir(),
          f"--out {config.out} lies in no existing folder")
    check(stable or not Path(config.out or "nothing").is_dir(), f"--out {config.out} is a folder; expected a JSON file in it, "
          f"such as {Path(config.out) / 'judged.json'}")


def ddpm_judged(config):
    """Bits/dim of held-out pictures, and what the samples are worth."""
    model = ddpm.load(config.model, config.weights, pick_device(config.device))
    name = config.data or model.data
    check(name, "the model does not say what it was trained on; expected --data mnist, cifar10, dtd or a folder")
    options = dict(root=config.root or None, size=model.shape[1:], channels=model.shape[0])
    digits = name == "mnist" and model.shape == (1, 28, 28)
    check(digits or not config.table, "--table is judged by the digit classifier; expected a model of mnist at 28x28")
    if name not in datasets.NAMED:
        options["captions"] = None
    training = datasets.load(name, "train", flip=False, **options)
    held_out, held_out_name = datasets.load_held_out(name, training, **options)
    if config.n:  # a missing classifier is found before minutes of sampling
        from nanodiff.classifiers import digits as digit_classifier, worlds as world_classifier
        classifier = digit_classifier.load_classifier() if digits else world_classifier.load_classifier()
    print(f"held out: {len(held_out)} {held_out_name}")

    numbers = {}
    if config.pictures:
        started = time.time()
        numbers["bound"], _ = figures.bound(model, held_out, config.pictures, config.t_samples, config.seed)
        print(figures.bound_sentence(numbers["bound"]) + f", {time.time() - started:.0f} s", flush=True)
    if digits and config.n:
        wanted = [(config.sampler, config.steps)]
        if config.table:
            wanted = [(name, steps) for name in ("ddim", "dpm++2m", "unipc", "heun") for steps in (10, 15, 25, 50)]
            print("| sampler | steps | read as a digit | smallest | Frechet (floor) | recall (floor) | ms an image |")
            print("|---|---|---|---|---|---|---|")
        for sampler, steps in wanted:
            verdict = judge(model, config, sampler, steps, held_out, training, classifier)
            numbers[f"{sampler} {steps}"] = verdict
            if config.table:
                print(f"| {sampler} | {steps} | {verdict['digit_share']:.1%} | {verdict['smallest_digit_share']:.1%} | "
                      f"{verdict['frechet']:.2f} ({verdict['frechet_floor']:.2f}) | {verdict['coverage']:.3f} "
                      f"({verdict['coverage_floor']:.3f}) | {verdict['seconds_an_image'] * 1000:.0f} |", flush=True)
            else:
                print(figures.verdict_sentence(verdict))
    elif config.n and min(config.n, len(held_out), len(training)) < 6:
        print("samples are not judged: 6 or more of them, of held-out and of training pictures are needed")
    elif config.n:
        x = model.generate(config.n, config.sampler, config.steps, config.seed)
        numbers["judged"] = agreement.judge(x, first(held_out), first(training), classifier)
        print(sentence(numbers["judged"]))
    return numbers


def finish(config, numbers):
    """Writes the numbers where --out says."""
    if config.out:
        write_text(config.out, json.dumps(numbers, indent=1) + "\n")


def stable_diffusion_judged(config, given):
    """Judges Stable Diffusion on the drawn worlds, or compares scales of guidance; see metrics/text_to_image.py."""
    from nanodiff import worlds
    from nanodiff.classifiers import worlds as world_classifier
    from nanodiff.report import text_to_image
    check_folder("--out", config.out or ".")
    names = worlds.chosen(config.names)
    check(len(set(names)) == len(names), f"--names {config.names} holds a class twice; expected each once")
    scales = config.guidance
    check(config.each != 1, "--each is 1; expected 2 samples of a prompt or more, whose distance can be taken, or 0")
    check(config.samples == 0 or config.samples >= max(6, len(names)), f"--samples is {config.samples}; expected 0, or "
          f"{max(6, len(names))} or more: one of every class, and five neighbours")
    classifier = world_classifier.load_classifier()  # a missing one is found before minutes of sampling
    sd = stable_diffusion.load(config.model, device=pick_device(config.device))
    ways = [(config.sampler, config.steps)] if given & {"sampler", "steps"} else [("ddim", 50), ("dpm++2m", 20)]
    begin = sd.guidance_start if config.guidance_start == -1 else config.guidance_start
    more = {"guidance_start": begin} if begin or sd.guidance_start else {}
    runs = [{"sampler": sampler, "steps": steps, "guidance": scale, **more}
            for sampler, steps in ways for scale in scales or [sd.guidance]]
    for run in runs:
        generation.check_run(sd, **run)

    def say(line):
        print(line, flush=True)
    if len(scales) > 1:
        per_class = config.per_class if "per_class" in given else 4
        numbers = text_to_image.compare_guidance(sd, classifier, runs, per_class, names, config.seed, say)
        page, name, sheet = text_to_image.guidance_table(numbers), "guidance", None
    else:
        sizes = text_to_image.Sizes(config.per_class, config.samples, config.training, config.each)
        numbers, sheet = text_to_image.measure(sd, classifier, runs, sizes, names, config.seed, say)
        page, name = text_to_image.page(numbers), "judged"
    print(page)
    if config.out:
        folder = Path(config.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{name}.json", json.dumps(numbers, indent=1) + "\n")
        write_text(folder / f"{name}.md", page + "\n")
        if sheet:
            plots.save(sheet, folder / "samples.png")


def first(found, most=2000):
    """At most that many pictures of a data set, evenly from all of it: float32 [n,C,H,W] in [-1, 1]."""
    index = torch.linspace(0, len(found) - 1, min(most, len(found))).long()
    return torch.cat([found.read(part, part) for part in index.split(250)])


def folder_judged(config):
    """The classifier's verdict on the pictures of a folder, with agreement when sub-folders are named as its classes."""
    from nanodiff.classifiers import worlds as world_classifier
    from nanodiff.metrics import inception
    classifier, numbers = world_classifier.load_classifier(), {}
    net = inception.load(config.inception).to(pick_device(config.device)) if config.inception else None
    judged, real = folder_pictures(config.folder), None
    if config.against:
        real = folder_pictures(config.against)
        check(len(judged) >= 6 and len(real) >= 12, f"--folder {config.folder} holds {len(judged)} pictures and "
              f"--against {config.against} {len(real)}; expected 6 and 12 or more")
    x = first(judged, len(judged))
    predictions = world_classifier.classify(classifier, x)
    counts = predictions.classes.argmax(1).bincount(minlength=len(classifier.classes)) / len(x)
    numbers["class_shares"] = {name: float(share) for name, share in zip(classifier.classes, counts) if share > 0}
    print(f"{len(x)} pictures are read as " + ", ".join(
        f"{name} {share:.1%}" for name, share in sorted(numbers["class_shares"].items(), key=lambda item: -item[1])))
    if judged.classes and set(judged.classes) <= set(classifier.classes):
        names = [judged.classes[label] for label in judged.labels.tolist()]
        numbers["agreement"] = found = agreement.agreement(predictions, names)
        print(f"read as their folder's name: {found['class']:.1%} (worst class {found['worst_class']:.1%})")
    if real is not None:
        files = [[one.root / name for name in one.files] for one in (judged, real)]
        real = first(real, max(12, 2 * len(x)))
        real = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(config.seed))]
        numbers["judged"] = agreement.judge(x, real[::2], real[1::2], classifier)  # real against real is the floor
        print(sentence(numbers["judged"]))
        if config.materials:
            numbers["materials"] = slices_judged(*files, config)
        if net is not None:
            numbers["inception"] = inception_judged(net, *files, config)
    return numbers


def slices_judged(files, real, config):
    """tomography/measures.py on picture files of one size, as grey slices: what both show, and how far they are apart beside
    how far one half of the `real` files, drawn with --seed, is from the other."""
    from nanodiff.data import images
    from nanodiff.tomography import measures
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(config.seed)).tolist()
    sets = {"folder": files, "real": [real[i] for i in order[::2]], "other": [real[i] for i in order[1::2]]}
    sets = {name: [images.load(str(file), channels=1)[0].numpy() for file in some] for name, some in sets.items()}
    sizes = {one.shape for some in sets.values() for one in some}
    check(len(sizes) == 1, f"slices of {' and '.join(f'{h}x{w}' for h, w in sorted(sizes)[:2])} pixels cannot be compared; "
          "expected slices of one size and one scale")
    slices, voxel = {name: np.stack(some) for name, some in sets.items()}, config.voxel or None
    found = {"n": len(files), "folder": measures.summary(slices["folder"], voxel),
             "against": measures.summary(np.concatenate([slices["real"], slices["other"]]), voxel),
             "distances": measures.distances(slices["folder"], slices["real"], voxel, config.resin),
             "floors": measures.distances(slices["other"], slices["real"], voxel, config.resin)}
    unit = "um" if voxel else "pixels"
    for name in ("folder", "against"):
        shown = found[name]
        print(f"{name}: " + ", ".join([f"{shown['yarn']:.1%} yarn" if "yarn" in shown else "no share of yarn to be told",
              f"period {shown['period']:.1f} {unit} along the width" if "period" in shown else "no period along the width"]))
    units = {"grey": "of the range", "two_point": "", "spectrum": "decades", "period": unit, "porosity": ""}
    print("apart by " + ", ".join(f"{name.replace('_', ' ')} {value:.3f} {units[name]}".rstrip() + " (" + (
        f"{found['floors'][name]:.3f}" if name in found["floors"] else "-") + ")"
        for name, value in found["distances"].items()) + "; in brackets one half of the real slices from the other")
    return found


def inception_judged(net, files, real, config):
    """FID, KID, precision, recall and copies of picture files on Inception's features, beside their floor: half of the
    `real` files against the other half. As many of each are taken, drawn with --seed."""
    from nanodiff.metrics import inception
    from nanodiff.metrics.neighbours import nearest_training_distance
    m = min(len(files), len(real) // 2)
    drawn = torch.Generator().manual_seed(config.seed)
    made, test, training = (inception.file_features(net, some) for some in (
        [files[i] for i in torch.randperm(len(files), generator=drawn)[:m].tolist()],
        *([real[i] for i in rows.tolist()] for rows in torch.randperm(len(real), generator=drawn)[:2 * m].view(2, m))))
    near = nearest_training_distance(made, training, test)
    found = {"score": net.score, "weights": Path(config.inception).name, "resize": inception.RESIZES[0], "n": m,
             **agreement.compare(made, test, training), "nearest_train": near["median"],
             "nearest_train_test": near["test_median"], "copied_share": near["copied_share"],
             "memorised": near["memorised"]}
    print("{score} {frechet:.2f} (floor {frechet_floor:.2f}), {name} {kernel:.4g} (floor {kernel_floor:.4g}; not "
          "times 1000), precision {precision:.3f} (floor {precision_floor:.3f}), recall {recall:.3f} (floor "
          "{recall_floor:.3f}), nearest of half of the real pictures at {nearest_train:.2f} (the other half's "
          "{nearest_train_test:.2f}), {copied_share:.1%} copies, n = {n} each on Inception's 2,048 features ({weights},"
          " {resize}'s resize)".format(name="KID" if net.score == "FID" else "kernel distance", **found))
    return found


def folder_pictures(path):
    """The single pictures of a folder, without the grid and the stack that nanodiff.sample lays beside its own."""
    from nanodiff.data import folder
    from nanodiff.classifiers.worlds import SIZE
    check(Path(path).is_dir(), f"{path} is no folder; expected a folder of pictures")
    files = [file for file in folder.find(path) if Path(file).name not in ("grid.png", "slices.tif")]
    check(files, f"{path} holds no single pictures; expected some")
    return folder.Folder(path, SIZE, 3, captions=None, files=files)


def sentence(verdict):
    """What the classifier said of samples beside real pictures, as one line with its floors."""
    floors = {name: f"{verdict[name]:.3g} (floor {verdict[name + '_floor']:.3g})"
              for name in ("frechet", "kernel", "precision", "recall")}
    return (f"{verdict['n']} pictures, {verdict['rejected_share']:.1%} read as nonsense; Frechet {floors['frechet']}, "
            f"kernel distance {floors['kernel']}, precision {floors['precision']}, recall {floors['recall']}, nearest "
            f"training picture at {verdict['nearest_train']:.2f} (held-out pictures' "
            f"{verdict['nearest_train_test']:.2f}), {verdict['copied_share']:.1%} copies, on the classifier's 128 "
            f"features, n = {verdict['compared']}")


def judge(model, config, sampler, steps, held_out, training, classifier):
    """The digit classifier's verdict on config.n fresh samples, with the seconds that each took."""
    started = time.time()
    x = model.generate(config.n, sampler, steps, config.seed)
    seconds = time.time() - started
    verdict = agreement.judge_digits(x, held_out.pixels, training.pixels, classifier)
    return {**verdict, "seconds_an_image": seconds / config.n}


def features_distance(words):
    """--features A B: the Frechet distance of two tables [n, d] in .npy files, with n and d."""
    from nanodiff.metrics.frechet import frechet_distance
    files = [word for word in words if word != "--features"]
    check(len(files) == 2, f"--features takes two .npy files, not {len(files)}")
    tables = []
    for file in files:
        try:
            tables.append(torch.from_numpy(np.load(file, allow_pickle=False).astype(np.float64)))
        except (OSError, ValueError, EOFError, TypeError) as error:
            check(False, f"{file} cannot be read ({error}); expected a .npy file with numbers [n, d]")
        check(tables[-1].ndim == 2, f"{file} holds {list(tables[-1].shape)}; expected a table [n, d]")
    distance = frechet_distance(*tables)
    n, d = tables[0].shape
    print(f"Frechet distance {distance:.6g}  (n = {n} each, {d} features, given)")


if __name__ == "__main__":
    main()
