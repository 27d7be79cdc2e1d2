"""The report's figures on adversarial networks: 16 and 19 losses and Frechet distance, 17 collapse, tables 2, 3."""

import torch

from nanodiff import plots
from nanodiff.metrics.gan_samples import PointJudge
from nanodiff.worlds import mixtures


def draw_curves(run):
    """figure16 or figure19 (losses and Frechet distance over steps) and figure17 (are samples all alike?)."""
    number, history = 19 if run.config.loss.startswith("wasserstein") else 16, run.history
    losses = {"discriminator": history("loss"), "generator": history("generator"), "Wasserstein gap": history("gap")}
    pages = [plots.curves({name: line for name, line in losses.items() if line[0]}, run.config.loss, "step", "loss")]
    if history("frechet")[0]:
        lines = {"fresh noise": history("frechet"), "the report's way": history("frechet_sixteen"),
                 "floor (training pictures)": history("frechet_floor")}
        pages.append(plots.curves(lines, "Frechet distance", "step", log_y=True))
    else:
        pages.append(plots.curves({"modes covered": history("covered")}, "modes covered", "step"))
        pages.append(plots.curves({"quality": history("quality")}, "share within 3 deviations", "step"))
    plots.save(plots.stack(pages), run.path(f"figures/figure{number}_losses.png"))
    steps, values = history("diversity")
    lines = {"samples": (steps, values), "real": (steps, [1.0] * len(steps)),
             "warned of below": (steps, [run.config.alike] * len(steps))}
    plots.save(plots.curves(lines, "How far samples are apart, real ones = 1", "step"),
               run.path("figures/figure17_collapse.png"))


def draw_steps(run, judge):
    """The same noise through up to eight states of the generator, as table 2, or 3 for the Wasserstein losses."""
    loss, files = run.config.loss, sorted(run.folder.glob("previews/*.pt"))
    files = [files[i] for i in sorted({round(i / 7 * (len(files) - 1)) for i in range(8)})]
    samples = [torch.load(file, weights_only=True) for file in files]
    labels = [f"step {int(file.stem)}" for file in files]
    if isinstance(judge, PointJudge):
        page = plots.sheet([[mixtures.scatter(x, judge.mixture) for x in samples]], None, labels, loss)
    else:
        page = plots.sheet([list(x) for x in samples], labels, title=f"{loss}: the same noise as training goes on",
                           scale=zoom(samples[0]))
    plots.save(page, run.path(f"figures/table{3 if loss.startswith('wasserstein') else 2}_samples.png"))


def zoom(x):
    """How many screen pixels a pixel of x [B, C, H, W] is drawn with."""
    return max(1, round(56 / x.shape[2]))
