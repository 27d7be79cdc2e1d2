"""How much should the autoencoder compress? Latent diffusion against f, at equal seconds (report figure 41).

    python -m nanodiff.report.compression                            f = 1 (pixels) to 32, some 50 minutes
    python -m nanodiff.report.compression --factors 2,4,8 --seconds 60 --autoencoder_seconds 60

For every f the scripts train an autoencoder and then a diffusion model on its latents, each as many steps as the
seconds allow (a short run says how many), on ten classes of the drawn worlds. Quality is measured on samples: what the
reader recognises, and the Fréchet distance on its features. Everything lies in the folder --out; what is finished there
is not done again. Source: Rombach et al. 2022 (arXiv 2112.10752), section 4.1, figures 6 and 7.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanodiff import plots, worlds
from nanodiff.classifiers import worlds as classifier
from nanodiff.errors import check
from nanodiff.files import write_text
from nanodiff.flags import check_folder, entry, parse
from nanodiff.formats import stable_diffusion_folder
from nanodiff.metrics import agreement
from nanodiff.pipelines import stable_diffusion
from nanodiff.report import text_to_image
from nanodiff.worlds import prompts

ROOT = Path(__file__).resolve().parents[1]  # where the training scripts are
# Of each f: widths of the autoencoder's levels, channels of its latents, widths and attention of the U-Net's levels.
# Small latents have more channels, as in the paper's table 8; a U-Net has no level below a side of 2.
SIZES = {1: ("", 3, "48,64,96", "2"), 2: ("24,48", 2, "48,64,96", "1,2"), 4: ("24,48,96", 4, "48,64,96", "1,2"),
         8: ("24,48,96,96", 4, "64,96,96", "0,1,2"), 16: ("24,48,96,96,96", 8, "96,128", "0,1"),
         32: ("24,48,96,96,96,96", 16, "128", "0")}
BATCH = 16  # pictures a step, of every training
TEN = "striped,chequered,dotted,grid,spiralled,circle,star,ring,zero,one"


@dataclass
class Config:
    factors: str = "1,2,4,8,16,32"  # f, pixels of a side for one of the latent's, with commas; 1: no autoencoder
    autoencoder_seconds: float = 150  # of training every autoencoder
    seconds: float = 300  # of training every diffusion model
    names: str = TEN  # classes of the drawn worlds
    pictures: int = 6000  # drawn pictures to train on
    text: str = ""  # folder of the frozen text encoder (default: the one that ships)
    samples: int = 300  # pictures to judge
    seed: int = 0  # of pictures, weights and noise
    out: str = "runs/compression"  # folder for everything


@entry
def main(argv=None):
    """Trains and measures a model for every f; prints and draws the comparison."""
    config, _ = parse(Config, argv, __doc__)
    try:
        factors = [int(f) for f in config.factors.split(",")]
    except ValueError:
        factors = [0]
    for f in factors:
        check(f in SIZES, f"--factors holds {config.factors}; expected some of {', '.join(map(str, SIZES))}")
    check(config.names, "--names is empty; expected some classes of the drawn worlds, with commas between")
    names = worlds.chosen(config.names)
    for field, least in dict(autoencoder_seconds=1, seconds=1, pictures=64, samples=6).items():
        check(getattr(config, field) >= least, f"--{field} is {getattr(config, field)}; expected {least} or more")
    check_folder("--out", config.out)
    if config.text:
        stable_diffusion_folder.load_text_encoder(config.text)  # a wrong one is found before minutes of training
    kept = {"out": "", "factors": ""}  # may differ when the study goes on
    said, settings = Path(config.out) / "settings.json", json.dumps(dataclasses.asdict(config) | kept, indent=1) + "\n"
    check(not said.exists() or said.read_text() == settings, f"--out {config.out} holds a study of other settings (see "
          f"{said}); expected the same, or another folder")
    said.parent.mkdir(parents=True, exist_ok=True)
    write_text(said, settings)
    rows = []
    for f in factors:
        done = Path(config.out) / f"f{f}" / "numbers.json"
        if not done.exists():
            numbers = measured(config, f, names)
            write_text(done, json.dumps(numbers, indent=1) + "\n")
        rows.append(json.loads(done.read_text()))
        print(table(rows), flush=True)
    write_text(Path(config.out) / "figure41.md", table(rows) + "\n")
    lines = {"class read right": ([row["f"] for row in rows], [row["class"] for row in rows]),
             "Frechet / 100": ([row["f"] for row in rows], [row["frechet"] / 100 for row in rows])}
    plots.save(plots.curves(lines, f"Latent diffusion after {config.seconds:g} s against f", "f (1 is pixels)", log_x=True),
               Path(config.out) / "figure41.png")
    print(f"done: {config.out}")


def measured(config, f, names):
    """Trains both parts for one f and judges samples -> dict of numbers."""
    folder, channels = Path(config.out) / f"f{f}", SIZES[f]
    numbers = {"f": f, "psnr": float("inf")}
    autoencoder = "none"
    if f > 1:
        flags = ["--channels", channels[0], "--latent_channels", str(channels[1]), "--pictures", str(config.pictures),
                 "--crop", str(min(64, max(32, 4 * f))), "--seed", str(config.seed)]
        numbers["autoencoder_steps"] = trained("train_kl_autoencoder.py", flags, folder / "autoencoder",
                                               config.autoencoder_seconds)
        autoencoder = str(folder / "autoencoder" / "model")
        kept = json.loads((folder / "autoencoder" / "reconstructions.json").read_text())["groups"]["all"]
        numbers |= {"psnr": kept["psnr"], "copies_read": kept["read_reconstruction"]}
    flags = ["--autoencoder", autoencoder, "--channels", channels[2], "--attention", channels[3],
             "--names", ",".join(names), "--pictures", str(config.pictures), "--seed", str(config.seed)]
    flags += ["--text", config.text] if config.text else []
    numbers["steps"] = trained("train_ldm.py", flags, folder / "ldm", config.seconds)
    log = [json.loads(line) for line in (folder / "ldm" / "log.jsonl").read_text().splitlines()]
    numbers |= {"seconds": loop_seconds(log), "images_per_second": BATCH * numbers["steps"] / loop_seconds(log)}
    sd, reader = stable_diffusion.load(folder / "ldm" / "model"), classifier.load_reader()
    wanted = prompts.prompts(-(-config.samples // len(names)), names)[:config.samples]
    started = time.time()
    x = text_to_image.draw(sd, [caption for caption, _, _ in wanted], config.seed, steps=20, guidance=3.0)
    numbers["seconds_an_image"] = (time.time() - started) / len(x)
    real, train = (worlds.load(split, 64, len(x), names).pixels for split in ("test", "train"))
    found = agreement.compare(*(classifier.read_all(reader, one).features for one in (x, real, train)))
    plots.save(text_to_image.contact_sheet(x, [name for _, name, _ in wanted]), folder / "samples.png")
    agreed = agreement.prompt_agreement(x, wanted, reader)
    return numbers | {"class": agreed["class"], "colours": agreed["colours"], "frechet": found["frechet"],
                      "frechet_floor": found["frechet_floor"], "n": len(x)}


def loop_seconds(log):
    """Seconds of a training's steps from the rows of its log: what it drew and encoded before, and its previews at both
    ends, are not among them."""
    rows = [row for row in log if "seconds" in row]
    return (rows[-1]["seconds"] - rows[0]["seconds"]) / (rows[-1]["step"] - rows[0]["step"]) * rows[-1]["step"]


def trained(script, flags, folder, seconds):
    """Runs a training script for about so many seconds of its loop -> its steps; a first short run tells the rate."""
    if (folder / "model").is_dir() and (folder / "steps").exists():
        return int((folder / "steps").read_text())
    quiet = ["--preview_every", "1000000", "--checkpoint_every", "1000000", "--batch", str(BATCH)]
    trial = folder.with_name(folder.name + "-trial")
    for part in (4, 40, 400):  # the log's clock ticks in tenths of a second: of a fast machine more steps are timed
        shutil.rmtree(trial, ignore_errors=True)
        # stopped and not finished: what a script measures at its end is no part of the rate
        run(script, [*flags, *quiet, "--steps", "1000000", "--stop", str(3 * part), "--log_every", str(part), "--warmup", "0"],
            trial)
        rows = [json.loads(line) for line in (trial / "log.jsonl").read_text().splitlines()]
        times = {row["step"]: row["seconds"] for row in rows if "seconds" in row}
        timed = times[3 * part] - times[part]
        if timed >= 2:
            break
    steps = max(12, round(2 * part * seconds / max(0.1, timed)))
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted call left
    run(script, [*flags, *quiet, "--log_every", str(max(1, steps // 20)), "--steps", str(steps)], folder)
    write_text(folder / "steps", str(steps))
    return steps


def run(script, flags, folder):
    """One training script as a user would start it; UserError when it fails."""
    print(f"{script} {' '.join(flags)} --out {folder}", flush=True)
    code = subprocess.run([sys.executable, str(ROOT / script), *flags, "--out", str(folder)]).returncode
    check(code == 0, f"{script} ended with exit code {code}; expected 0, see what it printed above")


def table(rows):
    """The numbers as Markdown."""
    lines = ["| f | PSNR dB | copies read | LDM steps | seconds | training img/s | class read | colours | Fréchet (floor) | "
             "s an image |", "|---" * 10 + "|"]
    for row in rows:
        copies = f"{row['copies_read']:.1%}" if "copies_read" in row else ""
        lines.append(f"| {row['f']} | {row['psnr']:.1f} | {copies} | {row['steps']:,} | "
                     f"{row['seconds']:.0f} | {row['images_per_second']:.0f} | {row['class']:.1%} | {row['colours']:.1%} | "
                     f"{row['frechet']:.1f} ({row['frechet_floor']:.1f}), n = {row['n']} | {row['seconds_an_image']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
