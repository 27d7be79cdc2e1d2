"""Every way of teaching a model something new, side by side: what is learned, what it costs, what is forgotten.

    python -m nanodiff.compare                    the closing table: every method, three seeds, the same seconds
    python -m nanodiff.compare --quick            one seed and a smaller budget
    python -m nanodiff.compare --steps 300        the same optimiser steps for all, instead of the same seconds
    python -m nanodiff.compare --study noun       one of the report's questions (see studies.py), in the same way
    python -m nanodiff.compare --out FOLDER       goes on with the cells that FOLDER does not hold yet

A cell is one training script, run as a user would run it, and then measured by the classifier that the repository
ships: nothing of what it judges was in the training. Written are a table with the report's claims beside it
(compare.md), all numbers (compare.json) and a sheet of pictures (compare.png). Report: section 4.2, tables 5 to 16 and
the closing table.
"""

import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nanodiff
from nanodiff import plots, worlds
from nanodiff.errors import UserError, check, nearest
from nanodiff.files import DATA, write_text
from nanodiff.finetune.lesson import is_drawn, picture_side
from nanodiff.flags import (AtLeast, Count, CountOrZero, NotEmpty, NotNegative, OneOf, Positive, entry, parse,
                            set_defaults)
from nanodiff.report.judge import Judge, MATERIAL, VERSION
from nanodiff.report.restore import restore
from nanodiff.report.studies import STUDIES, moment, verdicts, write_lesson

SCRIPTS = DATA.parent  # the repository, where the training scripts lie


@dataclass
class Config:
    model: str = ""  # the model that is taught: of the drawn worlds (default: the small one that ships)
    study: Annotated[str, OneOf(STUDIES)] = "methods"  # which question of the report
    concept: str = "woven"  # what is taught: woven, slices of drawn specimens, or a drawn class such as zigzagged
    pictures: Annotated[int, AtLeast(16)] = 120  # pictures to learn from
    seconds: Positive = 90.0  # of training, the same for all
    steps: CountOrZero = 0  # optimiser steps, the same for all, instead of --seconds
    seeds: Annotated[tuple[int, ...], NotEmpty()] = (0, 1, 2)  # of the trainings
    n: Annotated[int, AtLeast(6)] = 60  # pictures of the taught prompts that are judged, and of the class noun
    base: Count = 4  # prompts of every class of the base world that are judged
    guidance: NotNegative = 0.0  # scale of classifier-free guidance (0: the model's own)
    sample_steps: Count = 20  # steps of dpm++2m
    quick: bool = False  # one seed, 60 seconds, fewer pictures
    out: str = ""  # folder of all that is written; one that exists is gone on with (default: runs/compare-STUDY)


@entry
def main(argv=None):
    """Trains and measures the cells that are not there yet; writes the table and the sheet of all."""
    config, given = parse(Config, argv, __doc__)
    if config.quick:
        set_defaults(config, given, seeds=(0,), seconds=60.0, n=30, base=2)
    check_flags(config)
    cells = STUDIES[config.study](config.concept)
    folder = Path(config.out or f"runs/compare-{config.study}")
    settings = {name: value for name, value in vars(config).items() if name not in ("out", "quick", "seeds")}
    settings["judge"] = VERSION
    kept = folder / "compare.json"
    check(not kept.exists() or json.loads(kept.read_text())["settings"] == settings, f"--out {folder} holds cells "
          "of other flags or by another judge; expected the same ones, or another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not kept.exists():
        write_text(kept, json.dumps({"settings": settings}, indent=1) + "\n")
    judge = Judge(config.model or None, config.n, config.base, steps=config.sample_steps, sampler="dpm++2m",
                  guidance=config.guidance or None)
    asks = {prompt: right for cell in cells for prompt, right in cell.asks.items()}
    place, reach = folder / "not taught", any(cell.reach for cell in cells)
    rows = {"not taught": judged(place, lambda: [
        measured(judge, nanodiff.load(config.model or None), asks, "a texture", reach, place / "drawn.png")])}
    for cell in cells:
        for seed in config.seeds:
            place = place_of(folder, cell.name, seed)
            found = judged(place, lambda: taught(config, cell, seed, folder, judge))
            for i, numbers in enumerate(found, 1):
                rows.setdefault(moment(cell.name, i, cell.moments), []).append(numbers)
                print(f"{moment(cell.name, i, cell.moments)}, seed {seed}: {sentence(numbers)}", flush=True)
    text = "\n".join(page(rows, config, len(config.seeds)))
    write_text(folder / "compare.md", text + "\n")
    write_text(kept, json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    drawn = {"not taught": folder / "not taught" / "drawn.png"}
    for cell in cells:
        drawn |= {moment(cell.name, i, cell.moments): place_of(folder, cell.name, config.seeds[0]) / drawn_at(i, cell.moments)
                  for i in range(1, cell.moments + 1)}
    plots.save(plots.sheet([pictures_of(path) for path in drawn.values()], list(drawn), title=SHOWN),
               folder / "compare.png")
    print(text)


def place_of(folder, name, seed):
    """The folder of one cell and seed."""
    return folder / "".join(c if c.isalnum() or c in "+-_." else "-" for c in name) / f"seed-{seed}"


def judged(place, make):
    """What `make` measures, kept in numbers.json of a cell's folder: made once."""
    kept = place / "numbers.json"
    if not kept.exists():
        place.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps(make(), indent=1) + "\n")
    return json.loads(kept.read_text())


# --- one cell -------------------------------------------------------------------------------------------------------

def taught(config, cell, seed, folder, judge):
    """Trains a cell, measures it at each of its moments: [the judge's numbers and what the script says of its cost]."""
    place = place_of(folder, cell.name, seed)
    model = taught_model(config, place_of(folder, cell.after, seed)) if cell.after else config.model
    flags = {"seed": seed, "model": model, "each": 1, "retention": "a texture", "sample_steps": config.sample_steps,
             "workers": 1}
    if cell.lesson:
        side = picture_side(0, nanodiff.load(model or None))
        shutil.rmtree(place / "lesson", ignore_errors=True)
        write_lesson(place / "lesson", cell.lesson, side, seed)
        flags |= {"data": place / "lesson", "variants": 1}
    else:
        flags |= {"data": config.concept, "pictures": config.pictures}
    flags |= cell.flags
    if "class_prompt" in flags:  # drawn by the model before it is taught: the same for all cells that set out from it
        flags["class_data"] = (place if cell.after else folder / f"class pictures {seed}") / "class"
    run, steps = place / "run", config.steps
    if not steps:
        steps = max(10, int(config.seconds / judged(place.parent / "trial", lambda: rate(cell, flags, place))["step"]))
    every = steps // cell.moments
    shutil.rmtree(run, ignore_errors=True)  # half a training of a call that was broken off
    run_script(cell.script, {**flags, "steps": steps, **shorter(cell, steps), "preview_every": steps,
                             "checkpoint_every": every, "keep": cell.moments + 1, "out": run})
    cost, found = json.loads((run / "results.json").read_text()), []
    for i in range(1, cell.moments + 1):
        at = steps if i == cell.moments else i * every
        sd = load_taught(model, run) if at == steps else restore(nanodiff.load(model or None), run, at)
        found.append(measured(judge, sd, cell.asks, cell.noun, cell.reach, place / drawn_at(i, cell.moments))
                     | {"steps": at, "seconds": cost["seconds"] * at / steps}
                     | {"memory_MiB": cost["memory"] / 2**20}
                     | {name: cost[name] for name in ("trained", "file_bytes", "prepare_seconds")})
    return found


def measured(judge, sd, asks, noun, reach, path):
    """The judge's numbers of a model; its pictures go to `path`, in one row."""
    numbers, drawn = judge.measure(sd, asks, noun, reach)
    plots.save(plots.grid(drawn, len(drawn)), path)
    return numbers


def drawn_at(i, of):
    """The name of the pictures of a moment."""
    return "drawn.png" if i == of else f"drawn-{i}.png"


def rate(cell, flags, place):
    """{"step": seconds of an optimiser step, the mean of both stages of pivotal tuning}, by a short run; once for all seeds
    of a cell. The first three steps, of each stage, warm up."""
    trial, steps = place / "trial", 30
    shutil.rmtree(trial, ignore_errors=True)
    run_script(cell.script, {**flags, **shorter(cell, steps), "steps": steps, "preview_every": steps,
                             "checkpoint_every": steps, "log_every": 1, "out": trial})
    rows = [json.loads(line) for line in (trial / "log.jsonl").read_text().splitlines()]
    clock = [row["seconds"] for row in rows if "loss" in row]  # after each step
    shutil.rmtree(trial)
    stages = [0, shorter(cell, steps).get("word_steps", 0), steps]
    return {"step": sum((end - start) / steps * (clock[end - 1] - clock[start + 2]) / (end - start - 3)
                        for start, end in zip(stages, stages[1:]) if end > start)}


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


def load_taught(model, run):
    """The StableDiffusion that a script left behind: a whole model, or `model` with a word or a LoRA or both."""
    if (run / "model").is_dir():
        return nanodiff.load(run / "model")
    sd = nanodiff.load(model or None)
    if (run / "learned_embeds.safetensors").exists():
        sd.load_embedding(str(run / "learned_embeds.safetensors"))
    if (run / "lora.safetensors").exists():
        sd.load_lora(str(run / "lora.safetensors"))
        sd.merge_lora()
    return sd


def taught_model(config, place):
    """The folder of the whole model that a cell left; a LoRA is worked into a copy of the base first."""
    if (place / "run/model/model_index.json").is_file():  # written last
        return place / "run/model"
    if not (place / "model/model_index.json").is_file():
        load_taught(config.model, place / "run").save(place / "model")
    return place / "model"


# --- what is shown ----------------------------------------------------------------------------------------------------

SHOWN = "six each: as taught, as taught in two colours, of the noun, of the base world"
SPREAD = ("fidelity", "frechet", "variety", "composition", "inside", "base", "base_frechet", "drift", "leak", "spread")
COLUMNS = {"fidelity": "{:.0%}", "frechet": "{:.1f}", "frechet_floor": "{:.1f}", "variety": "{:.2f}",
           "composition": "{:.0%}", "inside": "{:.0%}", "base": "{:.1%}", "base_frechet": "{:.1f}", "drift": "{:.1f}",
           "leak": "{:.0%}", "spread": "{:.2f}", "darkest": "{:.2f}", "brightest": "{:.2f}", "trained": "{:,.0f}",
           "file_bytes": "{:,.0f}", "steps": "{:,.0f}", "seconds": "{:.0f}", "prepare_seconds": "{:.0f}",
           "memory_MiB": "{:,.0f}"}
UNITS = {"grey": "grey (share of range)", "two_point": "two-point (probability)", "spectrum": "spectrum (decades)",
         "period": "period (pixels)", "porosity": "porosity (share)"}


def sentence(numbers):
    """The main numbers of a cell in a line."""
    return ", ".join(f"{name} {COLUMNS[name].format(numbers[name])}" for name in SPREAD if name in numbers)


def page(rows, config, seeds):
    """All rows {name: [numbers of a seed]} as lines of Markdown: the table, the claims, and what there is of materials
    and of single prompts."""
    there = [name for name in COLUMNS if any(name in numbers for found in rows.values() for numbers in found)]
    first = rows["not taught"][0]
    budget = f"{config.steps} steps" if config.steps else f"{config.seconds:g} seconds of training"
    lines = [*table(rows, {name: name.replace("_", " ") for name in there}, COLUMNS), "",
             f"Study {config.study}, concept \"{config.concept}\", {budget} each, mean ± standard deviation over "
             f"{seeds} seed{'s' if seeds > 1 else ''}; {first['n']} pictures of the taught prompts and {first['base_n']} base prompts, on the "
             "classifier's features; the floor is between real pictures of the same."]
    if claims := verdicts(config.study, rows):
        lines += ["", "What the report says of this:", "", *claims]
    woven = [name for name in MATERIAL if any(name in numbers for found in rows.values() for numbers in found)]
    if woven:
        floors = {name: [numbers[f"{name}_floor"] for found in rows.values() for numbers in found
                         if f"{name}_floor" in numbers] for name in woven}
        floor = [{name: statistics.mean(values) for name, values in floors.items() if values}]
        forms = dict.fromkeys(woven, "{:.3f}")
        lines += ["", "Materials: how far generated slices are from those of a real specimen.", "",
                  *table({**rows, "between two real specimens": floor}, {name: UNITS[name] for name in woven}, forms)]
    prompts = list(dict.fromkeys(prompt for found in rows.values() for prompt in found[-1]["by_prompt"]))
    if any(len(found[-1]["by_prompt"]) > 1 for name, found in rows.items() if name != "not taught"):
        single = {name: [numbers["by_prompt"] for numbers in found] for name, found in rows.items()}
        lines += ["", "Share of the pictures of each prompt that are read as asked for.", "",
                  *table(single, {prompt: prompt for prompt in prompts}, dict.fromkeys(prompts, "{:.0%}"))]
    return lines


def table(rows, heads, forms):
    """Lines of Markdown of the columns `heads` {key: text}: means over seeds; where there are several and it says
    something, ± their standard deviation."""
    lines = ["| | " + " | ".join(heads.values()) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, found in rows.items():
        cells = []
        for column in heads:
            values = [numbers[column] for numbers in found if column in numbers]
            text = forms[column].format(statistics.mean(values)) if values else ""
            if len(values) > 1 and (column in SPREAD or column not in COLUMNS):
                text += " ± " + forms[column].format(statistics.stdev(values))
            cells.append(text)
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def pictures_of(path):
    """A row of pictures as `measured` saved it, cut apart."""
    from PIL import Image
    from nanodiff.data.images import given
    page = given(Image.open(path).convert("RGB"))[0]
    side = page.shape[1] - 4
    return [page[:, 2:2 + side, left:left + side] for left in range(2, page.shape[2] - side, side + 2)]


def check_flags(config):
    """Raises UserError for a wrong flag before anything is trained."""
    check(is_drawn(config.concept), f'--concept "{config.concept}" is no drawn class; expected one, such as '
          "zigzagged, or woven" + nearest(config.concept, worlds.DRAWN))
    check(config.steps == 0 or config.steps >= 3, f"--steps is {config.steps}; expected 3 or more, or 0 for --seconds")
    check((SCRIPTS / "train_lora.py").exists(), f"the training scripts are not in {SCRIPTS}; expected nanodiff to run "
          "from its repository (pip install -e .)")


if __name__ == "__main__":
    main()
