"""What a fine-tuning learns and what it forgets: pictures before and after, the held-out loss, results.json.

All pictures are drawn from the same noise: those of the lesson's prompts, and those of prompts that the model could
draw before ("retention", the report's two zebras and horse on a beach). The loss on held-out pictures is measured at
the same time steps and with the same noise. Report: sections 4.2.1 to 4.2.5, tables 5 to 16.
"""

import json

import torch

from nanodiff import fast, plots
from nanodiff.classifiers import worlds as world_classifier
from nanodiff.files import write_text
from nanodiff.finetune.lesson import picture_side
from nanodiff.formats.weights import read_safetensors, write_weights
from nanodiff.metrics.agreement import agreement
from nanodiff.pixels import from_uint8, to_uint8
from nanodiff.training import validation


def draw_prompts(sd, config, prompts, each=1):
    """Pictures [len(prompts) * each, 3, H, W] in [-1, 1], `each` of every (prompt, class), from noise of one seed."""
    side = picture_side(config.size, sd)
    return sd.generate([prompt for prompt, _ in prompts for _ in range(each)], steps=config.sample_steps, height=side,
                       width=side, guidance=config.guidance or None, sampler=config.sampler, seed=config.seed,
                       output="tensor", progress=False).cpu()


def draw_sheets(sd, config, lesson):
    """{"lesson": pictures, "retention": pictures}: --each of every lesson's prompt, two of every retention prompt."""
    return {"lesson": draw_prompts(sd, config, lesson.prompts, config.each),
            "retention": draw_prompts(sd, config, lesson.retention, 2)}


def held_out_loss(sd, lesson):
    """The mean loss of held-out pictures, at evenly spread time steps and with the same noise in every call."""
    n = len(lesson.held_out)
    index = torch.arange(n)
    x0 = lesson.held_out.read(index, index).to(sd.device)
    context = torch.cat([sd.encode_text(lesson.held_out.captions[i:i + 64]) for i in range(0, n, 64)])
    return validation.held_out_loss(sd.unet, x0, sd.schedule, sd.kind, context, batch=16)[0]


def save_previews(run, sd, lesson):
    """Draws one picture of every prompt, measures the held-out loss and draws the curves, on rank 0.

    At the first step it also draws the sheets "before" and writes them to before.safetensors.
    """
    if run.rank != 0:
        return
    with run.aside(), fast.packed(sd.unet):
        if run.step == 0:
            before = draw_sheets(sd, run.config, lesson)
            write_weights(run.path("before.safetensors"), {name: to_uint8(x) for name, x in before.items()})
        x = draw_prompts(sd, run.config, [*lesson.prompts, *lesson.retention])
        rows = [plots.grid(part, 12) for part in x.split([len(lesson.prompts), len(lesson.retention)])]
        plots.save(plots.stack(rows), run.path(f"previews/{run.step:08d}.png"),
                      {"prompts": " | ".join(prompt for prompt, _ in lesson.prompts)})
        loss = held_out_loss(sd, lesson)
        run.record(step=run.step, held_out=loss)
        run.print(f"step {run.step}  held-out loss {loss:.4f}")
        lines = {"training loss": run.history("loss"), "held-out loss": run.history("held_out")}
        plots.save(plots.curves(lines, run.name, "step"), run.path("curves.png"))


def has_stalled(run):
    """True when none of the last --patience previews has a held-out loss below the best one before; rank 0 decides."""
    losses, patience = run.history("held_out")[1] if run.rank == 0 else [], run.config.patience
    if not patience:
        return False
    return run.any(len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience]))


def write_results(run, sd, lesson, **numbers):
    """The numbers of results.json, which it writes with the sheets before and after (tables 13, 14, 16 of the report).

    lesson.png has two rows a prompt, before and after; retention.png the same for the retention prompts. numbers: those
    of the script. Added to them: the share of pictures in which the classifier finds their prompt's class, before and
    after; seconds of training in this call, without previews and saving; prepare_seconds before its first step.
    """
    config = run.config
    results = {"data": config.data, "steps": run.step, "seconds": run.seconds(), "prepare_seconds": run.prepared,
               "memory": run.peak_memory(), **numbers}
    before = {name: from_uint8(x) for name, x in read_safetensors(run.path("before.safetensors")).items()}
    with fast.packed(sd.unet):
        after = draw_sheets(sd, config, lesson)
    for name, prompts in (("lesson", lesson.prompts), ("retention", lesson.retention)):
        plots.save(before_and_after(before[name], after[name], prompts), run.path(f"{name}.png"))
        if all(label is not None for _, label in prompts):
            each = len(after[name]) // len(prompts)
            classes = [label for _, label in prompts for _ in range(each)]
            for moment, x in (("before", before[name]), ("after", after[name])):
                reading = world_classifier.classify(world_classifier.load_classifier(), x)
                results[f"{name}_{moment}"] = agreement(reading, classes)["class"]
    write_text(run.path("results.json"), json.dumps(results, indent=1) + "\n")
    for name in ("lesson", "retention"):
        if f"{name}_after" in results:
            run.print(f"{name}: the classifier finds the prompt's class in {results[name + '_before']:.1%} of the "
                      f"pictures before, in {results[name + '_after']:.1%} after")
    run.print(f"done: {run.folder}")
    return results


def before_and_after(before, after, prompts):
    """A sheet with two rows of pictures for each prompt: before, under the prompt, and after."""
    each = len(after) // len(prompts)
    rows = [list(x[i * each:(i + 1) * each]) for i in range(len(prompts)) for x in (before, after)]
    return plots.sheet(rows, [label for prompt, _ in prompts for label in (shorten(prompt), "after")])


def shorten(text, most=36):
    """A prompt as a label: its beginning."""
    return text if len(text) <= most else text[:most - 1] + "…"
