"""All families of generative models on the same digits: quality, coverage and speed. Which two does each have?

    python -m nanodiff.report.trilemma --models runs/vae-001,runs/vqgan-001,runs/gan-001,runs/ddpm-001
    python -m nanodiff.report.trilemma --models runs/ddpm-001 --sampler ddim --steps 50

Reads finished runs on MNIST of train_autoencoder.py, train_vae.py, train_vqgan.py, train_gan.py and train_ddpm.py (or
their model/ folders), draws the same number of samples from each, and writes trilemma.md, trilemma.json and
trilemma.png, a row of samples for each. The first row holds training digits: no model can be expected to do better.
Source: Xiao et al. 2022 (arXiv 2112.07804), figure 1; report section 2.2.2 and figure 23.
"""

import json
import time
from dataclasses import dataclass
from typing import Annotated

import torch

from nanodiff import plots
from nanodiff.classifiers import digits
from nanodiff.diffusion import samplers
from nanodiff.errors import check
from nanodiff.files import write_text
from nanodiff.flags import AtLeast, Count, NotNegative, OneOf, check_folder, entry, parse
from nanodiff.metrics import agreement
from nanodiff.pipelines.load import Model, Options, load
from nanodiff.training import datasets
from nanodiff.training.distributed import pick_device
from nanodiff.training.run import free_folder

SHAPE = (1, 28, 28)
SEEN = 0.01  # a digit with at least this share of the samples counts as drawn by the model


@dataclass
class Config:
    models: str = ""  # folders of finished runs on mnist, separated by commas
    n: Annotated[int, AtLeast(6)] = 1000  # samples of each model
    sampler: Annotated[str, OneOf(samplers.by_name)] = "dpm++2m"  # of DDPMs
    steps: Count = 25  # of the sampler
    temperature: NotNegative = 1.0  # of a GPT's codes
    seed: int = 1  # of the samples
    root: str = ""  # where mnist lies (default: the repository's data folder)
    device: str = "auto"  # cpu, cuda or cuda:1; auto takes a GPU when there is one
    out: str = ""  # folder of the table (default: the next free runs/trilemma-001, -002, ...)


@entry
def main(argv=None):
    """Draw from every model, judge and time the samples, and print and write the table and the sheet."""
    config, _ = parse(Config, argv, __doc__)
    check(config.models, "--models is missing; expected folders of finished runs with commas between, such as "
          "runs/vae-001,runs/gan-001")
    check_folder("--out", config.out or ".")
    device, classifier = pick_device(config.device), digits.load_classifier()
    training, held_out = (datasets.load("mnist", split, root=config.root or None) for split in ("train", "test"))
    options = Options(config.sampler, config.steps, config.temperature, root=config.root)
    models = [real_digits(training), *(digit_model(path, options, device) for path in config.models.split(","))]
    folder = free_folder(config.out, "trilemma")
    folder.mkdir(parents=True, exist_ok=True)

    rows, sample_rows = [], []
    for model in models:
        calls, seconds, x = timed(model, config)
        rows.append({"family": model.name, "run": model.run, "how": model.how, "calls": calls, "seconds": seconds,
                     **measure(x, held_out, training, classifier)})
        sample_rows.append(list(x[:20]))
        print(f"{model.name} ({model.run}): {sentence(rows[-1])}", flush=True)
    page = table(rows, f"{device}, {torch.get_num_threads()} threads, batches of up to 250")
    print(page)
    write_text(folder / "trilemma.json", json.dumps(rows, indent=1) + "\n")
    write_text(folder / "trilemma.md", page + "\n")
    plots.save(plots.sheet(sample_rows, [f"{model.name} ({model.run})" for model in models], scale=2),
               folder / "trilemma.png")
    print(f"done: {folder}")


# --- the families ---------------------------------------------------------------------------------------------------

def real_digits(training):
    """Training digits as a Model."""
    def draw(n, seed):
        rows = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[:n]
        return training.read(rows, rows)
    return Model("training digits", SHAPE, draw, (), "drawn without repetition", "data")


def digit_model(path, options, device):
    """The Model in a run folder or its model/; UserError unless it draws digits of 28x28."""
    model = load(path, options, device)
    check(tuple(model.shape) == SHAPE, f"{path} draws {' x '.join(map(str, model.shape))}; expected a model of mnist's "
          "1 x 28 x 28")
    return model


# --- measuring ------------------------------------------------------------------------------------------------------

def timed(model, config):
    """(network calls for one batch, seconds an image, the pictures); a batch of 2 warms up and counts the calls."""
    calls = []
    hooks = [net.register_forward_pre_hook(lambda *_: calls.append(1)) for net in model.networks]
    model.draw(2, config.seed)
    for hook in hooks:
        hook.remove()
    started = time.perf_counter()
    x = model.draw(config.n, config.seed)  # on the CPU: a GPU has finished
    return len(calls), (time.perf_counter() - started) / len(x), x


def measure(x, held_out, training, classifier):
    """The verdict of `agreement.judge_digits` on samples x, and `seen`: the number of digits that are drawn at all."""
    verdict = agreement.judge_digits(x, held_out.pixels, training.pixels, classifier)
    return {**verdict, "seen": sum(share >= SEEN for share in verdict["digit_shares"])}


def sentence(row):
    """One model's numbers in a line."""
    return ("{digit_share:.1%} read as a digit, Frechet {frechet:.2f} (floor {frechet_floor:.2f}), recall {recall:.3f} "
            "(floor {recall_floor:.3f}), rarest digit {smallest_digit_share:.1%}, n = {n}".format(**row)
            + f", {1000 * row['seconds']:.2f} ms an image")


def table(rows, machine):
    """All models as a Markdown table, with the meaning of its columns and the best model in each corner."""
    floor, models = rows[0], rows[1:]
    lines = ["| family | run | read as a digit | Frechet | kernel | precision | recall | digits drawn, rarest | "
             "copies | calls | ms an image |", "|" + "---|" * 11]
    for row in rows:
        lines.append("| {family} | {run} | {digit_share:.1%} | {frechet:.2f} | {kernel:.2f} | {precision:.3f} | "
                     "{recall:.3f} | {seen}, {smallest_digit_share:.1%} | {copies} | {calls} | {ms} |".format(
                         **row, copies="-" if row is floor else f"{row['copied_share']:.1%}",
                         ms="-" if row is floor else f"{1000 * row['seconds']:.2f}"))
    best = {"quality (Frechet)": min(models, key=lambda row: row["frechet"]),
            "coverage (recall)": max(models, key=lambda row: row["recall"]),
            "speed": min(models, key=lambda row: row["seconds"])}
    lines += ["", f"{floor['n']:,} samples each against {floor['compared']:,} test digits on the digit classifier's "
              "64 features (not FID, not KID); floors, training against test digits: "
              f"Frechet {floor['frechet_floor']:.2f}, kernel {floor['kernel_floor']:.2f}, "
              f"recall {floor['recall_floor']:.3f}. Read as a digit: with "
              f"probability 0.9 or more. Digits drawn: of ten, those with {SEEN:.0%} of the samples. Speed: {machine}.",
              "", "First in " + ", ".join(f"{corner}: {row['family']} ({row['run']})" for corner, row in best.items())
              + ".", "",
              *(f"- {row['family']} ({row['run']}): {row['how']}" for row in models)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
