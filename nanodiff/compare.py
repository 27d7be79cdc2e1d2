"""Every way of teaching a model something new, side by side: what is learned, what it costs, what is forgotten.

    python -m nanodiff.compare                    the closing table: every method, three seeds, the same seconds
    python -m nanodiff.compare --quick            one seed and a smaller budget
    python -m nanodiff.compare --steps 300        the same optimiser steps for all, instead of the same seconds
    python -m nanodiff.compare --study noun       one of the report's questions (see STUDIES), in the same way
    python -m nanodiff.compare --out FOLDER       goes on with the cells that FOLDER does not hold yet

A cell is one training script, run as a user would run it, and then measured by the reader that the repository ships:
nothing of what it judges was in the training. Report: section 4.2, tables 5 to 16 and the closing table.
"""

import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

import nanodiff
from nanodiff import pictures
from nanodiff.checkpoint import write_text
from nanodiff.data import HOME, worlds
from nanodiff.errors import UserError, nearest
from nanodiff.flags import check, entry, parse
from nanodiff.metrics import features, text_to_image
from nanodiff.metrics.frechet import frechet_distance

SCRIPTS = HOME.parent  # the repository, where the training scripts lie
PAIRS = (("red", "white"), ("blue", "yellow"), ("green", "black"), ("orange", "purple"), ("pink", "brown"),
         ("white", "blue"), ("black", "yellow"), ("purple", "white"), ("red", "black"), ("green", "pink"))


@dataclass
class Config:
    model: str = ""  # the model that is taught: of the drawn worlds (default: the small one that ships)
    study: str = "methods"  # which cells: methods, prior, noun, words
    concept: str = "zigzagged"  # the drawn class that is taught: zigzagged or woven
    pictures: int = 120  # pictures to learn from
    seconds: float = 90.0  # of training, the same for all
    steps: int = 0  # optimiser steps, the same for all, instead of --seconds
    seeds: str = "0,1,2"  # of the trainings, with commas between
    n: int = 60  # pictures of the taught prompt that are judged, and of the class noun
    base: int = 4  # prompts of every class of the base world that are judged
    guidance: float = 0.0  # scale of classifier-free guidance (0: the model's own)
    sample_steps: int = 20  # steps of dpm++2m
    quick: bool = False  # one seed, 60 seconds, fewer pictures
    out: str = "runs/compare"  # folder of the cells, the table and the sheet; one that exists is gone on with


@dataclass
class Cell:
    """One training: a name for its row, its script, what its pictures are asked for with, and its flags."""
    name: str
    script: str
    prompt: str
    flags: dict = field(default_factory=dict)
    noun: str = "a texture"  # the prompt without the new word


PRIOR = {"class_prompt": "a texture", "class_count": 100}


def methods(concept):
    """The report's methods, each with the words that it needs."""
    sks, new = "a sks texture", "a <new> texture"
    return [
        Cell("full fine-tuning", "train_finetune.py", f"dtd_{concept}", {"prompt": f"dtd_{concept}"}),
        Cell("textual inversion", "train_textual_inversion.py", "a texture in the style of <new>"),
        Cell("DreamBooth", "train_dreambooth.py", sks, {"prompt": sks}),
        Cell("DreamBooth, prior kept", "train_dreambooth.py", sks, {"prompt": sks, **PRIOR}),
        Cell("LoRA", "train_lora.py", sks, {"prompt": sks}),
        Cell("LoRA + DreamBooth", "train_lora.py", sks, {"prompt": sks, "dreambooth": True, **PRIOR}),
        Cell("pivotal tuning", "train_pivotal.py", new, {"prompt": new, **PRIOR}),
    ]


def prior(concept):
    """DreamBooth three ways (tables 9 to 12): many pictures, with prior preservation, ten pictures."""
    sks = "a sks texture"
    return [Cell("120 pictures", "train_dreambooth.py", sks, {"prompt": sks, "pictures": 120}),
            Cell("120 pictures, prior of 200", "train_dreambooth.py", sks,
                 {"prompt": sks, "pictures": 120, **PRIOR, "class_count": 200}),
            Cell("10 pictures", "train_dreambooth.py", sks, {"prompt": sks, "pictures": 10})]


def noun(concept):
    """The class noun: the right one, a wrong one, none (section 4.2.3)."""
    return [Cell(name, "train_dreambooth.py", prompt, {"prompt": prompt})
            for name, prompt in (("a sks texture", "a sks texture"), ("a sks circle", "a sks circle"), ("sks", "sks"))]


def words(concept):
    """A rare word, a class name as the report writes it, a word that means something else, and plain words."""
    return [Cell(prompt, "train_lora.py", prompt, {"prompt": prompt})
            for prompt in ("a sks texture", f"dtd_{concept}", "a striped texture", f"a {concept} texture")]


STUDIES = {"methods": methods, "prior": prior, "noun": noun, "words": words}


@entry
def main(argv=None):
    """Trains and measures the cells that are not there yet; writes the table and the sheet of all."""
    config, given = parse(Config, argv, __doc__)
    if config.quick:
        quick = {"seeds": "0", "seconds": 60.0, "n": 30, "base": 2}
        for name in quick.keys() - given:
            setattr(config, name, quick[name])
    seeds = check_flags(config)
    cells = STUDIES[config.study](config.concept)
    folder = Path(config.out)
    settings = {name: value for name, value in vars(config).items() if name not in ("out", "quick", "seeds")}
    kept = folder / "compare.json"
    check(not kept.exists() or json.loads(kept.read_text())["settings"] == settings, f"--out {folder} holds cells "
          "of other flags; expected the same ones, or another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not kept.exists():
        write_text(kept, json.dumps({"settings": settings}, indent=1) + "\n")
    judge = Judge(config)
    untaught = judged(folder / "not taught", lambda: judge.measure(nanodiff.load(config.model or None), "a texture",
                                                                   "a texture", folder / "not taught"))
    rows = {}
    for cell in cells:
        for seed in seeds:
            place = place_of(folder, cell, seed)
            rows.setdefault(cell.name, []).append(judged(place, lambda: taught(config, cell, seed, place, judge)))
            print(f"{cell.name}, seed {seed}: {sentence(rows[cell.name][-1])}", flush=True)
    text = table(untaught, rows, config)
    write_text(folder / "compare.md", text + "\n")
    write_text(kept, json.dumps({"settings": settings, "not taught": untaught, "cells": rows}, indent=1) + "\n")
    sheet = [pictures_of(folder / "not taught")] + [
        pictures_of(place_of(folder, cell, seeds[0])) for cell in cells]
    pictures.save(pictures.sheet(sheet, ["not taught", *(cell.name for cell in cells)]), folder / "compare.png")
    print(text)


def place_of(folder, cell, seed):
    """The folder of one cell and seed."""
    return folder / cell.name.replace(" ", "-").replace(",", "") / f"seed-{seed}"


def judged(place, make):
    """What `make` measures, kept in numbers.json of a cell's folder: made once."""
    kept = place / "numbers.json"
    if not kept.exists():
        place.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps(make(), indent=1) + "\n")
    return json.loads(kept.read_text())


# --- one cell -------------------------------------------------------------------------------------------------------

def taught(config, cell, seed, place, judge):
    """Trains a cell and measures it: the judge's numbers and what the script says of its cost."""
    flags = {"data": config.concept, "pictures": config.pictures, "seed": seed, "each": 1, "model": config.model,
             "retention": "a texture", **cell.flags}
    steps = config.steps or affordable(config, cell, flags, place)
    run = place / "run"
    shutil.rmtree(run, ignore_errors=True)  # half a training of a call that was broken off
    run_script(cell.script, {**flags, "steps": steps, **shorter(cell, steps), "preview_every": steps,
                             "checkpoint_every": steps, "out": run})
    cost = json.loads((run / "results.json").read_text())
    numbers = judge.measure(load_taught(config, run), cell.prompt, cell.noun, place)
    names = ("steps", "seconds", "memory", "trained", "file_bytes")
    return {**numbers, **{name: cost[name] for name in names}}


def affordable(config, cell, flags, place):
    """The optimiser steps that --seconds pay for, by the rate of a short run."""
    trial, steps = place / "trial", 12
    shutil.rmtree(trial, ignore_errors=True)
    run_script(cell.script, {**flags, **shorter(cell, steps), "steps": steps, "preview_every": steps,
                             "checkpoint_every": steps, "log_every": 1, "class_pictures": "", "out": trial})
    rows = [json.loads(line) for line in (trial / "log.jsonl").read_text().splitlines()]
    clock = [row["seconds"] for row in rows if "loss" in row]
    shutil.rmtree(trial)
    return max(10, int(config.seconds / ((clock[-1] - clock[3]) / (len(clock) - 4))))


def shorter(cell, steps):
    """The first stage of pivotal tuning in proportion."""
    return {"word_steps": max(1, steps * 2 // 5)} if cell.script == "train_pivotal.py" else {}


def run_script(script, flags):
    """Runs a training script; UserError with its last line when it fails."""
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items() if value != ""]
    found = subprocess.run([sys.executable, str(SCRIPTS / script), *words], capture_output=True, text=True)
    if found.returncode:
        said = (found.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{script} {' '.join(words)} ended with code {found.returncode}: {said}")


def load_taught(config, run):
    """The StableDiffusion that a script left behind: a whole model, or the base with a word or a LoRA or both."""
    if (run / "model").is_dir():
        return nanodiff.load(run / "model")
    sd = nanodiff.load(config.model or None)
    if (run / "learned_embeds.safetensors").exists():
        sd.load_embedding(str(run / "learned_embeds.safetensors"))
    if (run / "lora.safetensors").exists():
        sd.load_lora(str(run / "lora.safetensors"))
        sd.merge_lora()
    return sd


# --- what is measured -------------------------------------------------------------------------------------------------

class Judge:
    """The reader, and what it sees in the real pictures and in the untaught model's, once for all cells."""

    def __init__(self, config):
        self.config, self.reader = config, features.load_reader()
        real = worlds.load("test", 64, 2 * config.n, (config.concept,)).pixels
        seen = features.read_all(self.reader, real).features
        self.real, self.other = seen[:config.n], seen[config.n:]
        self.base = text_to_image.prompts(config.base)
        self.known = worlds.load("test", 64, len(self.base)).pixels
        self.known = features.read_all(self.reader, self.known).features
        self.nouns = {}  # prompt: features of the untaught model's pictures of it

    def draw(self, sd, prompts, seed):
        return text_to_image.draw(sd, prompts, seed, steps=self.config.sample_steps, sampler="dpm++2m",
                                  guidance=self.config.guidance or None)

    def noun(self, prompt):
        if prompt not in self.nouns:
            x = self.draw(nanodiff.load(self.config.model or None), [prompt] * self.config.n, 3)
            self.nouns[prompt] = features.read_all(self.reader, x).features
        return self.nouns[prompt]

    def measure(self, sd, prompt, noun, place):
        """Numbers of one model: fidelity and likeness of `prompt`, composition with colours, the base world, the noun.

        fidelity    share of pictures of the prompt that are read as the concept; frechet: of them against real ones
        composition share of "PROMPT in COLOUR and COLOUR" that have the concept and both colours
        base        share of base prompts' pictures read as their class; base_frechet against as many real pictures
        drift       Frechet distance of the noun's pictures before and after; leak: share of them that show the concept
        spread      how far apart pictures of the noun are, of the same before
        """
        n, concept = self.config.n, self.config.concept
        x = self.draw(sd, [prompt] * n, 1)
        reading = features.read_all(self.reader, x)
        pairs = [pair for pair in PAIRS for _ in range(max(1, n // len(PAIRS)))]
        y = self.draw(sd, [f"{prompt} in {a} and {b}" for a, b in pairs], 2)
        z = self.draw(sd, [noun] * n, 3)
        w = self.draw(sd, [caption for caption, _, _ in self.base], 4)
        after, before = features.read_all(self.reader, z), self.noun(noun)
        pictures.save(pictures.grid(torch.cat([x[:6], y[:6], z[:6], w[:6]]), 24), place / "drawn.png")
        composed = features.agreement(features.read_all(self.reader, y), [concept] * len(y), pairs)
        known = features.read_all(self.reader, w)
        return {
            "n": n, "fidelity": share(reading.names(), concept),
            "frechet": frechet_distance(reading.features, self.real),
            "frechet_floor": frechet_distance(self.other, self.real), "composition": composed["class_and_colours"],
            "base": text_to_image.agreement(w, self.base, self.reader)["class"], "base_n": len(w),
            "base_frechet": frechet_distance(known.features, self.known),
            "drift": frechet_distance(after.features, before), "leak": share(after.names(), concept),
            "spread": apart(after.features) / apart(before)}


def share(names, wanted):
    """How often a name is the wanted one."""
    return sum(name == wanted for name in names) / len(names)


def apart(x):
    """The mean distance between two rows of features [n, d]."""
    return float(torch.pdist(x.double()).mean())


# --- what is shown ----------------------------------------------------------------------------------------------------

COLUMNS = {"fidelity": "{:.0%}", "frechet": "{:.1f}", "composition": "{:.0%}", "base": "{:.1%}",
           "base_frechet": "{:.1f}", "drift": "{:.1f}", "leak": "{:.0%}", "spread": "{:.2f}",
           "trained": "{:,.0f}", "file_bytes": "{:,.0f}", "steps": "{:,.0f}", "seconds": "{:.0f}", "memory": "{:,.0f}"}


def sentence(numbers):
    """The main numbers of a cell in a line."""
    return ", ".join(f"{name} {COLUMNS[name].format(numbers[name])}" for name in list(COLUMNS)[:8])


def table(untaught, rows, config):
    """All cells as Markdown: means over seeds, and the spread (standard deviation) where there are several."""
    heads = ["method", *(name.replace("_", " ") for name in COLUMNS)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, found in {"not taught": [untaught], **rows}.items():
        cells = []
        for column, form in COLUMNS.items():
            values = [numbers[column] for numbers in found if column in numbers]
            text = form.format(statistics.mean(values)) if values else ""
            if len(values) > 1 and column in list(COLUMNS)[:8]:
                text += " ± " + form.format(statistics.stdev(values))
            cells.append(text)
        lines.append("| " + " | ".join([name, *cells]) + " |")
    budget = f"{config.steps} steps" if config.steps else f"{config.seconds:g} seconds of training"
    lines += ["", f"{config.pictures} pictures of \"{config.concept}\", {budget} each, mean ± standard deviation over "
              f"seeds {config.seeds}; {untaught['n']} pictures a prompt (Frechet floor between real pictures "
              f"{untaught['frechet_floor']:.1f}) and {untaught['base_n']} base prompts, on the reader's features."]
    return "\n".join(lines)


def pictures_of(place):
    """A cell's drawn.png, cut into its pictures: six of the prompt, of two colours, of the noun, of the base world."""
    from PIL import Image
    from nanodiff.data.images import given
    page = given(Image.open(place / "drawn.png").convert("RGB"))[0]
    side = page.shape[1] - 4
    return [page[:, 2:2 + side, 2 + i * (side + 2):2 + i * (side + 2) + side] for i in range(24)]


def check_flags(config):
    """The seeds as numbers; raises UserError for a wrong flag before anything is trained."""
    check(config.study in STUDIES, f'--study "{config.study}" is unknown; expected {", ".join(STUDIES)}'
          + nearest(config.study, STUDIES))
    check(config.concept in worlds.DRAWN, f'--concept "{config.concept}" is no drawn class; expected one, such as '
          "zigzagged"          + nearest(config.concept, worlds.DRAWN))
    for name, least in dict(pictures=1, steps=0, n=6, base=1, guidance=0, sample_steps=1).items():
        check(getattr(config, name) >= least, f"--{name} is {getattr(config, name)}; expected {least} or more")
    check(config.seconds > 0, f"--seconds is {config.seconds}; expected a number above 0, such as 90")
    check((SCRIPTS / "train_lora.py").exists(), f"the training scripts are not in {SCRIPTS}; expected nanodiff to run "
          "from its repository (pip install -e .)")
    try:
        return [int(seed) for seed in config.seeds.split(",")]
    except ValueError:
        raise UserError(f'--seeds "{config.seeds}" is no list of whole numbers; expected such as 0,1,2') from None


if __name__ == "__main__":
    main()
