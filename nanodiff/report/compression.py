"""How much should the autoencoder compress? Latent diffusion for several f at equal training time (report figure 41).

    python -m nanodiff.report.compression                            f = 1 (pixels) to 32, some 50 minutes
    python -m nanodiff.report.compression --factors 2,4,8 --seconds 60 --autoencoder_seconds 60

For every f the scripts train an autoencoder and then a diffusion model on its latents, on ten classes of the drawn
worlds. A short run measures how many steps fit into the given seconds. Quality is measured on samples: agreement of the
classifier with the prompts, and the Fréchet distance on its features. All results are in the folder --out; a second
call continues there. Source: Rombach et al. 2022 (arXiv 2112.10752), section 4.1, figures 6 and 7.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nanodiff import plots, worlds
from nanodiff.classifiers import worlds as world_classifier
from nanodiff.errors import check
from nanodiff.files import write_text
from nanodiff.flags import AtLeast, OneOf, check_folder, entry, parse
from nanodiff.formats import stable_diffusion_folder
from nanodiff.metrics import agreement
from nanodiff.pipelines import stable_diffusion
from nanodiff.report import text_to_image
from nanodiff.worlds import prompts

ROOT = Path(__file__).resolve().parents[2]  # the folder of the training scripts
# Per f: widths of the autoencoder's levels, channels of its latents, widths and attention of the U-Net's levels.
# Small latents have more channels, as in the paper's table 8. No U-Net level has a side below 2.
SIZES = {1: ("", 3, "48,64,96", "2"), 2: ("24,48", 2, "48,64,96", "1,2"), 4: ("24,48,96", 4, "48,64,96", "1,2"),
         8: ("24,48,96,96", 4, "64,96,96", "0,1,2"), 16: ("24,48,96,96,96", 8, "96,128", "0,1"),
         32: ("24,48,96,96,96,96", 16, "128", "0")}
BATCH = 16  # pictures per step in all trainings
TEN = "striped,chequered,dotted,grid,spiralled,circle,star,ring,zero,one"


@dataclass
class Config:
    factors: tuple[Annotated[int, OneOf(SIZES)], ...] = tuple(SIZES)  # f, pixels per latent along a side; 1: none
    autoencoder_seconds: Annotated[float, AtLeast(1)] = 150  # of training for each autoencoder
    seconds: Annotated[float, AtLeast(1)] = 300  # of training for each diffusion model
    names: str = TEN  # classes of the drawn worlds
    pictures: Annotated[int, AtLeast(64)] = 6000  # drawn pictures for training
    text: str = ""  # folder of the frozen text encoder (default: the one that ships)
    samples: Annotated[int, AtLeast(6)] = 300  # pictures for the measures
    seed: int = 0  # of pictures, weights and noise
    out: str = "runs/compression"  # folder of all results


@entry
def main(argv=None):
    """Train and measure a model for every f; print and plot the comparison."""
    config, _ = parse(Config, argv, __doc__)
    check(config.names, "--names is empty; expected some classes of the drawn worlds, with commas between")
    names = worlds.chosen(config.names)
    check_folder("--out", config.out)
    if config.text:
        stable_diffusion_folder.load_text_encoder(config.text)  # found before minutes of training when it is wrong
    ignored = {"out": "", "factors": ()}  # may differ when a study continues
    settings_file = Path(config.out) / "settings.json"
    settings = json.dumps(dataclasses.asdict(config) | ignored, indent=1) + "\n"
    check(not settings_file.exists() or settings_file.read_text() == settings, f"--out {config.out} holds a study of "
          f"other settings (see {settings_file}); expected the same, or another folder")
    settings_file.parent.mkdir(parents=True, exist_ok=True)
    write_text(settings_file, settings)
    rows = []
    for f in config.factors:
        numbers_file = Path(config.out) / f"f{f}" / "numbers.json"
        if not numbers_file.exists():
            numbers = measure_factor(config, f, names)
            write_text(numbers_file, json.dumps(numbers, indent=1) + "\n")
        rows.append(json.loads(numbers_file.read_text()))
        print(table(rows), flush=True)
    write_text(Path(config.out) / "figure41.md", table(rows) + "\n")
    lines = {"class right": ([row["f"] for row in rows], [row["class"] for row in rows]),
             "Frechet / 100": ([row["f"] for row in rows], [row["frechet"] / 100 for row in rows])}
    title = f"Latent diffusion after {config.seconds:g} s against f"
    plots.save(plots.curves(lines, title, "f (1 is pixels)", log_x=True), Path(config.out) / "figure41.png")
    print(f"done: {config.out}")


def measure_factor(config, f, names):
    """A dict of numbers for one f, after training both parts and drawing samples."""
    folder, sizes = Path(config.out) / f"f{f}", SIZES[f]
    numbers = {"f": f, "psnr": float("inf")}
    autoencoder = "none"
    if f > 1:
        flags = ["--channels", sizes[0], "--latent_channels", str(sizes[1]), "--pictures", str(config.pictures),
                 "--crop", str(min(64, max(32, 4 * f))), "--seed", str(config.seed)]
        numbers["autoencoder_steps"] = train_for_seconds("train_kl_autoencoder.py", flags, folder / "autoencoder",
                                                         config.autoencoder_seconds)
        autoencoder = str(folder / "autoencoder" / "model")
        reconstruction = json.loads((folder / "autoencoder" / "reconstructions.json").read_text())["groups"]["all"]
        numbers |= {"psnr": reconstruction["psnr"], "copies_read": reconstruction["read_reconstruction"]}
    flags = ["--autoencoder", autoencoder, "--channels", sizes[2], "--attention", sizes[3],
             "--names", ",".join(names), "--pictures", str(config.pictures), "--seed", str(config.seed)]
    flags += ["--text", config.text] if config.text else []
    numbers["steps"] = train_for_seconds("train_ldm.py", flags, folder / "ldm", config.seconds)
    log = [json.loads(line) for line in (folder / "ldm" / "log.jsonl").read_text().splitlines()]
    numbers |= {"seconds": loop_seconds(log), "images_per_second": BATCH * numbers["steps"] / loop_seconds(log)}
    sd, classifier = stable_diffusion.load(folder / "ldm" / "model"), world_classifier.load_classifier()
    prompt_rows = prompts.prompts(-(-config.samples // len(names)), names)[:config.samples]
    started = time.time()
    x = text_to_image.draw(sd, [caption for caption, _, _ in prompt_rows], config.seed, steps=20, guidance=3.0)
    numbers["seconds_an_image"] = (time.time() - started) / len(x)
    real, train = (worlds.load(split, 64, len(x), names).pixels for split in ("test", "train"))
    likeness = agreement.compare(*(world_classifier.classify(classifier, pictures).features
                                   for pictures in (x, real, train)))
    plots.save(text_to_image.contact_sheet(x, [name for _, name, _ in prompt_rows]), folder / "samples.png")
    shares = agreement.prompt_agreement(x, prompt_rows, classifier)
    return numbers | {"class": shares["class"], "colours": shares["colours"], "frechet": likeness["frechet"],
                      "frechet_floor": likeness["frechet_floor"], "n": len(x)}


def loop_seconds(log):
    """Seconds of a training's steps, from the rows of its log: without drawing, encoding and previews at both ends."""
    rows = [row for row in log if "seconds" in row]
    return (rows[-1]["seconds"] - rows[0]["seconds"]) / (rows[-1]["step"] - rows[0]["step"]) * rows[-1]["step"]


def train_for_seconds(script, flags, folder, seconds):
    """The number of steps that a training script ran in about `seconds` of its loop; a short run gives the rate."""
    if (folder / "model").is_dir() and (folder / "steps").exists():
        return int((folder / "steps").read_text())
    no_output = ["--preview_every", "1000000", "--checkpoint_every", "1000000", "--batch", str(BATCH)]
    trial = folder.with_name(folder.name + "-trial")
    for interval in (4, 40, 400):  # the log's clock ticks in tenths of a second: a fast machine needs more steps
        shutil.rmtree(trial, ignore_errors=True)
        # --stop: measurements at the end of a script are not part of the rate
        run(script, [*flags, *no_output, "--steps", "1000000", "--stop", str(3 * interval),
                     "--log_every", str(interval), "--warmup", "0"], trial)
        rows = [json.loads(line) for line in (trial / "log.jsonl").read_text().splitlines()]
        times = {row["step"]: row["seconds"] for row in rows if "seconds" in row}
        elapsed = times[3 * interval] - times[interval]
        if elapsed >= 2:
            break
    steps = max(12, round(2 * interval * seconds / max(0.1, elapsed)))
    shutil.rmtree(folder, ignore_errors=True)  # remnants of an interrupted call
    run(script, [*flags, *no_output, "--log_every", str(max(1, steps // 20)), "--steps", str(steps)], folder)
    write_text(folder / "steps", str(steps))
    return steps


def run(script, flags, folder):
    """Run one training script as a user would; UserError when it fails."""
    print(f"{script} {' '.join(flags)} --out {folder}", flush=True)
    code = subprocess.run([sys.executable, str(ROOT / script), *flags, "--out", str(folder)]).returncode
    check(code == 0, f"{script} ended with exit code {code}; expected 0, see what it printed above")


def table(rows):
    """The numbers of all f as a Markdown table."""
    lines = ["| f | PSNR dB | copies right | LDM steps | seconds | training img/s | class right | colours | "
             "Fréchet (floor) | s an image |", "|---" * 10 + "|"]
    for row in rows:
        copies = f"{row['copies_read']:.1%}" if "copies_read" in row else ""
        lines.append(f"| {row['f']} | {row['psnr']:.1f} | {copies} | {row['steps']:,} | "
                     f"{row['seconds']:.0f} | {row['images_per_second']:.0f} | {row['class']:.1%} | "
                     f"{row['colours']:.1%} | {row['frechet']:.1f} ({row['frechet_floor']:.1f}), n = {row['n']} | "
                     f"{row['seconds_an_image']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
