"""The report's figures on diffusion from a trained DDPM; each function takes the model and returns a picture.

Figure and table numbers are the report's: 1-3 data, 30 time embedding, 34 denoising strip, 35 loss, 36 forward process,
37 samples, 39 shared x_t, 40 rate and distortion; table 4 training progress, table 5 frequencies.
"""

import json
import math

import torch

from nanodiff import fast, plots, rng
from nanodiff.diffusion import Schedule, editing, elbo, process
from nanodiff.errors import check
from nanodiff.files import write_text
from nanodiff.metrics import agreement


def draw_all(run, model, training, held_out, samples):
    """Writes every figure and its numbers into the folder of a finished run; prints what a reader wants to know first.

    training, held_out: the run's data sets; samples [n, C, H, W]: pictures that the model has drawn.
    """
    config = run.config
    index = torch.arange(min(64, len(training)))
    shown = plots.grid(training.read(index, index), scale=_scale(model))
    plots.save(shown, run.path("figures/figure01_data.png"))
    if model.shape[0] == 3:  # grey pictures trained as colour come out tinted when something is wrong
        run.print(f"largest difference between colour channels: samples {channel_difference(samples):.0f} levels of 255, "
                  f"data {channel_difference(training.read(index, index)):.0f}")
    plots.save(checkpoints_table(run), run.path("figures/table4_training.png"))
    plots.save(denoising_strip(model), run.path("figures/figure34_denoising.png"))
    plots.save(time_embedding(model), run.path("figures/figure30_time_embedding.png"))
    x0 = held_out.read(torch.arange(min(8, len(held_out))), torch.zeros(min(8, len(held_out))).long())
    plots.save(forward_strips(x0[:2]), run.path("figures/figure36_forward.png"))
    plots.save(shared_state(model), run.path("figures/figure39_shared_x_t.png"))
    page, bands = frequency_table(x0, model.schedule)
    plots.save(page, run.path("figures/table5_frequencies.png"))
    write_text(run.path("figures/table5_frequencies.json"), json.dumps(bands, indent=1) + "\n")
    run.print("figures of the report: " + str(run.folder / "figures"))
    if config.range == "11":  # the bound is one on 8-bit pictures in [-1, 1]
        numbers, page = bound(model, held_out)
        plots.save(page, run.path("figures/figure40_rate_distortion.png"))
        write_text(run.path("bound.json"), json.dumps(numbers, indent=1) + "\n")
        run.print(bound_sentence(numbers))
    if config.data == "mnist" and model.shape == (1, 28, 28):
        from nanodiff.classifiers import digits
        x = model.generate(1000, config.sampler, config.sample_steps, seed=config.seed + 1)
        verdict = agreement.judge_digits(x, held_out.pixels, training.pixels, digits.load_classifier())
        write_text(run.path("judged.json"), json.dumps(verdict, indent=1) + "\n")
        run.print(verdict_sentence(verdict))


def verdict_sentence(verdict):
    """A verdict of `judge_digits` as one line, with its floors."""
    return (f"{verdict['n']} samples: {verdict['digit_share']:.1%} read as a digit with >= 0.9 (smallest digit "
            f"{verdict['smallest_digit_share']:.1%}); Frechet {verdict['frechet']:.2f} (floor "
            f"{verdict['frechet_floor']:.2f}), recall {verdict['coverage']:.3f} (test digits with a sample among their "
            f"5 nearest; floor {verdict['coverage_floor']:.3f}) on the digit classifier's features, "
            f"n = {verdict['compared']}")


# --- during training ------------------------------------------------------------------------------------------------

def channel_difference(x):
    """The largest difference between the channel means of one picture among x [B, 3, H, W], in levels of 0 ... 255."""
    mean = x.clamp(-1, 1).mean((2, 3))  # [B, 3]
    return float((mean.amax(1) - mean.amin(1)).max()) * 127.5


def checkpoints_table(run):
    """A sheet of samples from the same noise during training (report table 4)."""
    files = sorted(run.folder.glob("previews/*.pt"))
    indices = sorted({round((i / 7) ** 2 * (len(files) - 1)) for i in range(8)})  # denser at the beginning
    files = [files[i] for i in indices]
    rows = [list(torch.load(file, weights_only=True)) for file in files]
    return plots.sheet(rows, [f"step {int(file.stem)}" for file in files],
                       title="the same noise as training goes on", scale=_scale_of(rows[0][0]))


# --- the forward process --------------------------------------------------------------------------------------------

def forward_strips(x0, columns=10):
    """A sheet of q(x_t | x_0) with the linear and the cosine schedule (report figure 36); x0 [B, C, H, W]."""
    ts = torch.linspace(0, 999, columns).long()
    rows, labels = [], []
    for number, picture in enumerate(x0):
        noise = rng.normal(0, 0, torch.tensor([number]), picture.shape)
        for name, schedule in (("linear", Schedule.linear()), ("cosine", Schedule.cosine())):
            rows.append(list(process.q_sample(schedule, picture.expand(columns, -1, -1, -1), ts, noise)))
            labels.append(name)
    return plots.sheet(rows, labels, [f"t={t}" for t in ts.tolist()], scale=_scale_of(x0[0], 56))


def frequency_table(x0, schedule, bands=((0, 0.08), (0.08, 0.2), (0.2, 0.75))):
    """(sheet, rows of {t, snr of each band}): noise hides fine detail first (report table 5).

    x0 [B, C, H, W]; bands are radial frequencies in cycles per pixel. The signal-to-noise ratio of a band at t is
    alpha_bar * (mean power of the pictures there) / (1 - alpha_bar): white noise has unit power at every frequency.
    """
    masks = [_band(x0.shape[-2:], low, high) for low, high in bands]
    spectrum = torch.fft.fft2(x0 - x0.mean((2, 3), keepdim=True)).abs().square() / x0[0, 0].numel()  # [B, C, H, W]
    power = [float(spectrum[..., mask].mean()) for mask in masks]
    first, rows, table = x0[:1], [], []
    noise = rng.normal(0, 0, torch.tensor([0]), first.shape[1:])
    for share in (0, 0.1, 0.2, 0.3, 0.5, 0.7, 1):
        t = round(share * (schedule.T - 1))
        x_t = process.q_sample(schedule, first, torch.tensor([t]), noise)
        filtered = [torch.fft.ifft2(torch.fft.fft2(x_t) * mask).real for mask in masks]
        rows.append([x_t[0], *(band[0] for band in filtered)])
        snr = float(schedule.snr[t])
        table.append({"t": t, "alpha_bar": float(schedule.alpha_bar[t]),
                      **{f"snr {low}-{high}": snr * p for (low, high), p in zip(bands, power)}})
    labels = [f"t={row['t']}" for row in table]
    columns = ["x_t", *(f"{low}-{high}" for low, high in bands)]
    return plots.sheet(rows, labels, columns, "x_t by frequency, cycles a pixel", _scale_of(x0[0], 90)), table


def _band(shape, low, high):
    fy, fx = torch.fft.fftfreq(shape[0])[:, None], torch.fft.fftfreq(shape[1])[None]
    radius = (fx.square() + fy.square()).sqrt()
    return (radius >= low) & (radius < high)


def time_embedding(model):
    """A picture of the sinusoidal time embedding, one row per channel, one column per step (report figure 30)."""
    from nanodiff.models.blocks import time_embedding_table
    c = model.net.config
    table = time_embedding_table(torch.arange(model.schedule.T), c.channels[0], c.freq_shift, c.flip_sin_to_cos)
    picture = plots.heat(table.T[:, ::max(1, model.schedule.T // 500)])
    tall = picture.repeat_interleave(max(1, 256 // picture.shape[1]), 1)
    return plots.sheet([[tall]], title=f"time embedding: {c.channels[0]} channels (down) over t = 0 ... "
                                          f"{model.schedule.T - 1} (across)")


# --- the reverse process --------------------------------------------------------------------------------------------

def denoising_strip(model, n=8, columns=10, seed=0):
    """A sheet of intermediate states of ancestral sampling through all T steps (report figure 34)."""
    T = model.schedule.T
    steps_shown = {round(i * (T - 1) / (columns - 1)) for i in range(columns)}
    states = []

    def record(i, t, x):
        if i in steps_shown:
            states.append((t, model.to_picture(x).cpu()))
    model.generate(n, "ddpm", T, seed=seed, on_step=record)
    labels = [f"t={int(t.flatten()[0])}" for t, _ in states]
    return plots.sheet([[x[row] for _, x in states] for row in range(n)], None, labels, scale=_scale(model, 56))


@torch.no_grad()
def shared_state(model, shares=(0.9, 0.75, 0.5, 0.25), n=6, steps=50, seed=1):
    """A sheet of n samples from one shared x_t, for each of several t (report figure 39).

    A sample of the model is noised to t and denoised n times, by DDIM with eta = 1 and without a class. At large t the
    samples share nothing, at smaller t the kind of picture, at small t all but details.
    """
    picture = model.generate(1, "ddim", min(steps, model.schedule.T), seed=seed)
    x0, denoise = model.to_network(picture).to(model.device), model.denoiser()
    rows, labels = [], []
    for share in shares:
        t = int(share * (model.schedule.T - 1))
        index = torch.arange(n, device=model.device)
        x_t = process.q_sample(model.schedule, x0, torch.tensor([t], device=model.device),
                               rng.normal(seed, -1, index[:1], model.shape))
        with fast.packed(model.net):
            ends = editing.share("ddim", denoise, x_t, model.schedule, t, n, min(steps, t + 1), eta=1.0,
                                 kind=model.kind, noises=rng.StepNoises(seed, index, model.shape))
        rows.append([model.to_picture(x_t)[0], *model.to_picture(ends)])
        labels.append(f"t={t}")
    return plots.sheet(rows, labels, ["x_t"] + [f"end {i + 1}" for i in range(n)], scale=_scale(model, 84))


# --- numbers --------------------------------------------------------------------------------------------------------

def bound(model, held_out, n=200, t_samples=50, seed=0):
    """(numbers ready for JSON, page of L_t and rate-distortion curves) of n held-out pictures (report figure 40).

    A class-conditional network gets no class. UserError unless the network works on pictures in [-1, 1], the range of
    the 256 grey levels in L_0.
    """
    check(bool((model.scale == 1).all() and (model.shift == 0).all()),
          "bits/dim is measured on pictures in [-1, 1]; expected a model of --range 11, or --pictures 0")
    x0 = held_out.read(torch.arange(min(n, len(held_out))), torch.zeros(min(n, len(held_out))).long())
    with fast.packed(model.net):
        found = elbo.terms(model.denoiser(), x0.to(model.device), model.schedule, model.kind, clip=True, batch=model.batch,
                           t_samples=min(t_samples, model.schedule.T - 1),
                           generator=torch.Generator().manual_seed(seed))
    summary, points = elbo.summary(found), elbo.rate_distortion_points(found)
    numbers = {name: value.tolist() if isinstance(value, torch.Tensor) else value
               for name, value in (summary | points).items()}
    numbers = {"pictures": len(x0), "asked": " without their class" if model.classes else "",
               "steps drawn for each": found.t.shape[1], **numbers}
    page = plots.stack([
        plots.curves({"L_t": (numbers["curve_t"], numbers["curve_bits_per_dim"])},
                     "what each step costs", "t", "bits/dim", log_y=True),
        plots.curves({"rd": (numbers["rate_bits_per_dim"], numbers["distortion_rmse"])},
                     "progressive coding", "rate, bits/dim", "RMSE of x_0, 0 ... 255")])
    return numbers, page


def bound_sentence(numbers):
    """The bound as one line."""
    return (f"bits/dim on {numbers['pictures']} held-out pictures{numbers['asked']}: {numbers['bits_per_dim']:.3f} +- "
            f"{numbers['bits_per_dim_standard_error']:.3f} (L_T {numbers['prior_bits_per_dim']:.4f}, "
            f"steps {numbers['steps_bits_per_dim']:.3f}, L_0 {numbers['decoder_bits_per_dim']:.3f})")


def ranges_sheet(models, config, n=8):
    """(sheet, numbers) on value ranges and colours (report figures 34, 37, table 4).

    The authors trained on [0, 1] and displayed the network's output y as (y + 1) / 2: pale, nothing darker than half.
    With data of mean 0 and deviation 1 they clipped y to [-1, 1] and displayed (y + 1) / 2: saturated. The inverse of
    the data's own map gives ordinary pictures in both cases.
    """
    rows, labels, numbers = [], [], {}
    for name, model in models.items():
        pictures = model.generate(n, config.sampler, config.sample_steps, seed=config.seed)
        raw = model.to_network(pictures).clamp(-1, 1)  # y itself, displayed like a picture in [-1, 1]
        for mapping, x in (("mapped back", pictures), ("shown as (y + 1) / 2", raw)):
            rows.append(list(x))
            labels.append(f"range {name}, {mapping}")
            level = (x.clamp(-1, 1) + 1) / 2
            numbers[labels[-1]] = {"mean": float(level.mean()), "deviation": float(level.std()),
                                   "share at 0 or 1": float(((level < 0.002) | (level > 0.998)).float().mean())}
    return plots.sheet(rows, labels, title="three value ranges, two ways to show each",
                       scale=_scale_of(rows[0][0], 56)), numbers


def _scale(model, side=56):
    return max(1, math.ceil(side / model.shape[1]))


def _scale_of(picture, side=56):
    return max(1, math.ceil(side / picture.shape[1]))
