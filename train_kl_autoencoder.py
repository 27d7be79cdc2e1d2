"""The autoencoder of latent diffusion: pictures to small latents and back (Rombach et al. 2022; report section 4.1.1).

    python train_kl_autoencoder.py                     the one that ships: 64x64 pictures of the drawn worlds, f = 4
    python train_kl_autoencoder.py --data FOLDER --size 128 --channels 32,64,128,128    your own pictures, f = 8
    python train_kl_autoencoder.py --regulariser vq    a codebook instead of the slight KL term
    python train_kl_autoencoder.py --measure data/nano-sd/vae    no training: what an autoencoder keeps of pictures
    python train_kl_autoencoder.py --resume runs/kl-autoencoder-001     goes on exactly where the run was stopped

The loss is L1 + perceptual distance + KL, and from --adversarial_start on a patch discriminator's opinion; the same at
half the size keeps the latents smooth (Kouzelis et al. 2025, arXiv 2502.09509; Skorokhodov et al. 2025, arXiv
2502.14831). They are then brought to unit variance; the run's model/ is a diffusers AutoencoderKL, which train_ldm.py
--autoencoder takes.
"""

import functools
import json
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F

from nanodiff import fast, plots, rng, worlds
from nanodiff.data import images
from nanodiff.errors import check
from nanodiff.files import write_text
from nanodiff.flags import (AtLeast, BelowOne, Count, CountOrZero, MultipleOf, NotEmpty, NotNegative, Positive, Share,
                            entry, parse, resumed)
from nanodiff.formats.stable_diffusion_folder import load_autoencoder, save_autoencoder
from nanodiff.metrics.perceptual import load_distance
from nanodiff.metrics.reconstructions import (code_statistics, latent_statistics, measure, psnr_and_ssim, reconstruct,
                                              table)
from nanodiff.models.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from nanodiff.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig, VQAutoencoder, balance
from nanodiff.models.vqvae import MovingCodebook, perplexity, used
from nanodiff.training import datasets
from nanodiff.training.batches import Batches
from nanodiff.training.distributed import pick_device, processes
from nanodiff.training.run import MAY_CHANGE, Run, RunConfig, free_folder
from nanodiff.training.step import EMA, learning_rate


@dataclass
class Config(RunConfig):
    data: str = "everything"  # everything that is drawn here (worlds and woven), a named data set, a folder or volumes
    size: Annotated[int, AtLeast(16)] = 64  # side of the pictures in pixels
    pictures: Count = 20_000  # drawn pictures to train on (--data everything)
    crop: CountOrZero = 32  # side of the random crops that are trained on (0: whole pictures)
    whole: Share = 0.15  # last share of the steps, which sees whole pictures, fewer at a time
    regulariser: Literal["kl", "vq"] = "kl"  # of the latents; vq is a codebook
    kl_weight: NotNegative = 1e-6  # of the KL in nats a picture, beside the summed reconstruction error of its pixels
    codes: Annotated[int, AtLeast(2)] = 512  # entries of the codebook (--regulariser vq)
    channels: Annotated[tuple[Count, ...], NotEmpty()] = (24, 48, 96)  # width of each of n levels: f = 2^(n-1)
    latent_channels: Count = 4  # numbers a latent pixel
    blocks: Count = 1  # ResNet blocks a level of the encoder (one more in the decoder)
    perceptual: NotNegative = 0.1  # weight of the perceptual distance (0: none)
    lpips: str = ""  # weights of LPIPS (VGG-16 and its linear layers, one safetensors file) for the classifier's
    equivariance: NotNegative = 0.25  # weight of the error at half the size: half a latent must be half a picture
    adversarial: NotNegative = 0.2  # weight of the adversarial loss, times the adaptive weight (0: no discriminator)
    disc_start: Share = 0.5  # share of the steps after which the discriminator begins to learn
    adversarial_start: Share = 0.6  # share of the steps after which the adversarial loss counts
    disc_channels: Annotated[int, AtLeast(8), MultipleOf(8)] = 32  # width of the discriminator's first level
    measure: str = ""  # folder of an autoencoder to be measured on the held-out pictures, without any training
    steps: Count = 3000  # optimiser steps in all
    batch: Count = 16  # crops of one micro-batch, over all processes
    lr: Positive = 1e-3  # peak learning rate
    ema: BelowOne = 0.998  # decay of the averaged weights, which are what is saved
    preview_every: Count = 500  # steps between reconstructions of held-out pictures
    checkpoint_every: Count = 1000  # steps between checkpoints


MEASURED = 3300  # held-out pictures at most


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "kl-autoencoder", MAY_CHANGE)
    if config.measure:
        return measure_folder(config)
    check_flags(config)
    train(config)


def train(config):
    """Trains one autoencoder and measures it; returns (network, numbers), or None when it was stopped before."""
    distance = load_distance(config.lpips) if config.perceptual else None
    run, vq = Run(config, "kl-autoencoder"), config.regulariser == "vq"
    training, held_out, held_out_name = load_data(config)
    batches = Batches(training, config.batch, config.seed, config.gradient_accumulation, run.rank, run.world,
                      config.workers)
    net, disc = make_networks(config, training.shape[0])
    net, disc, f = net.to(run.device).train(), disc.to(run.device), net.config.factor
    ema = EMA(net, config.ema)
    fast.speed_up(net)
    fast.speed_up(ema.net)  # which draws the previews
    optimiser = torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)
    disc_optimiser = torch.optim.Adam(disc.parameters(), lr=config.lr, betas=(0.5, 0.9), fused=True)
    run.track(net=net, ema=ema, optimiser=optimiser, disc=disc, disc_optimiser=disc_optimiser)
    distance = distance and distance.to(run.device)
    run.print(f"{sum(p.numel() for p in net.parameters()):,} parameters, f = {f}, {len(training):,} training pictures "
              f"of {training.shape}, {held_out_name} to measure")

    for step in run.steps():
        lr = learning_rate(step, config)
        if run.due(config.preview_every):
            preview(run, ema.net, held_out)
        disc_learns = config.adversarial > 0 and step >= config.disc_start * config.steps
        disc_counts = config.adversarial > 0 and step >= config.adversarial_start * config.steps
        pairs, vectors = [], []  # pictures and their reconstructions; the encoder's vectors and their codes
        for micro in run.micro_batches():
            x, index, position = crop(batches.get(step, micro), config, step)  # [B, C, H, W]
            x = x.to(run.device)
            with run.autocast():
                y, z, regularity = autoencode(net, x, config, step, position, vectors)
            y = y.float()
            reconstruction = error(y, x, distance, config)
            if config.equivariance and not vq and f > 1 and min(z.shape[2:]) > 1:  # smooth latents diffuse better
                with run.autocast():
                    small = net.decode(F.avg_pool2d(z, 2))
                half = F.avg_pool2d(x, 2)[:, :, :small.shape[2], :small.shape[3]]  # an odd side's last latent has none
                reconstruction = reconstruction + config.equivariance * error(small.float(), half, distance, config)
            loss = reconstruction + regularity
            if disc_counts:
                disc.requires_grad_(False)
                adversarial = -disc(y).mean()
                weight = adaptive_weight(reconstruction, adversarial, net.decoder.conv_out.weight, run.mean)
                loss = loss + config.adversarial * weight * adversarial
                disc.requires_grad_(True)
                run.note(weight=weight)
            run.backward(loss, index)
            pairs.append((x, y.detach()))
        if vq:
            follow_codes(run, net, vectors)
        run.average_gradients(net)  # adaptive_weight calls torch.autograd.grad, which DistributedDataParallel forbids
        run.update(net, optimiser, lr)
        ema.update(net)
        if disc_learns:
            train_discriminator(run, disc, disc_optimiser, pairs, lr)
        run.log(step, lr)

    if run.rank != 0 or not run.finished:
        return None
    return ema.net, finish(run, ema.net, training, held_out)


def make_networks(config, channels):
    """The autoencoder and the discriminator, for pictures of so many channels."""
    sizes, generator = autoencoder_config(config), torch.Generator().manual_seed(config.seed)
    net = {"kl": KLAutoencoder, "vq": VQAutoencoder}[config.regulariser](sizes, generator)
    if config.regulariser == "vq":  # codes that are running means, and start anew when nothing chooses them
        net.quantize = MovingCodebook(sizes.codes, sizes.latent_channels, generator=generator)
    return net, PatchDiscriminator(channels, config.disc_channels, generator=generator)


def autoencode(net, x, config, step, position, vectors):
    """(y, z, regularity): reconstructions of pictures x, their latents, and the loss that regularises these.

    With a codebook the encoder's vectors and their codes are appended to the list `vectors`.
    """
    if config.regulariser == "vq":
        h = net.encode(x)
        z, regularity, codes = net.quantize(h)
        vectors.append((h.detach(), codes))
        return net.decoder(net.post_quant_conv(z)), z, regularity
    posterior = net.encode(x)
    noise = rng.normal(config.seed, step, position, posterior.mean.shape[1:]).to(x.device)
    z = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
    return net.decode(z), z, config.kl_weight * posterior.kl().mean() / x[0].numel()  # as the error: a pixel's number


def error(y, x, distance, config):
    """The reconstruction error of pictures y for x: mean absolute difference, and the perceptual distance.

    Pictures with sides below 16 are too small for the networks of the distance, which is then left out.
    """
    l1 = (y - x).abs().mean()
    return l1 if distance is None or min(x.shape[2:]) < 16 else l1 + config.perceptual * distance(y, x).mean()


def follow_codes(run, net, vectors):
    """Moves the codebook towards the vectors [B, D, h, w] that chose its codes in all micro-batches of a step."""
    h, codes = (torch.cat(part) for part in zip(*vectors))
    net.quantize.ema_update(h, codes, rng.generator(run.config.seed, rng.REVIVAL, run.step))
    run.note(perplexity=perplexity(codes, net.config.codes), used=used(codes, net.config.codes))


def train_discriminator(run, disc, optimiser, pairs, lr):
    """One step of the discriminator on pairs (real, fake) of micro-batches."""
    for x, y in pairs:
        loss = hinge_loss(disc(x), disc(y))
        run.note(disc=loss.detach())
        run.scaler.scale(loss / len(pairs)).backward()
    run.average_gradients(disc)
    run.update(disc, optimiser, lr)


def crop(batch, config, step):
    """(x, index, position) of a batch for the network: a random crop of each picture x [B, C, H, W].

    In the last --whole of the steps fewer, whole pictures of the same area. Where a crop lies follows from (seed, step,
    position) alone.
    """
    x, index, position = batch
    if not config.crop:
        return x, index, position
    if step >= (1 - config.whole) * config.steps:
        n = max(1, round(len(x) * config.crop**2 / (x.shape[2] * x.shape[3])))
        return x[:n], index[:n], position[:n]
    places = [side - config.crop + 1 for side in x.shape[2:]]
    tops, lefts = ((rng.uniform(config.seed, rng.CROP + axis, step, position) * places[axis]).long() for axis in (0, 1))
    crops = [picture[:, top:top + config.crop, left:left + config.crop] for picture, top, left in zip(x, tops, lefts)]
    return torch.stack(crops), index, position


# --- what came of it ------------------------------------------------------------------------------------------------

def preview(run, net, held_out):
    """Reconstructions of a few held-out pictures, their PSNR and SSIM in the log."""
    if run.rank != 0:
        return
    save_autoencoder(net, run.folder / "model")
    some = images.spread(held_out, 96)
    x = held_out.read(some, some)
    y = reconstruct(net, x)
    quality, likeness = (float(one.mean()) for one in psnr_and_ssim(x, y))
    run.record(step=run.step, psnr=quality, ssim=likeness)
    run.print(f"step {run.step}  held-out pictures: PSNR {quality:.2f} dB, SSIM {likeness:.3f}")
    plots.save(plots.reconstructions(x, y), run.path(f"previews/{run.step:08d}.png"))
    plots.save(plots.curves({"training": run.history("loss"), "held-out PSNR / 100": (
        run.history("psnr")[0], [value / 100 for value in run.history("psnr")[1]])}, "Training loss", "step"),
               run.path("curves.png"))


def finish(run, net, training, held_out):
    """Measures the latents, brings them to unit variance, saves the model, measures and draws the reconstructions."""
    config, some = run.config, torch.arange(min(2000, len(training)))
    some = some * (len(training) // len(some))
    numbers = {}
    if config.regulariser == "kl":
        numbers["latents"] = before = latent_statistics(net, training.read(some, some))
        dead = [channel for channel, std in enumerate(before["std"]) if std < 1e-3]
        if dead:
            run.print(f"latent channels {dead} are dead (the same for all pictures): the latents stay as they are")
        else:
            balance(net, torch.tensor(before["mean"]), torch.tensor(before["std"]))
            numbers |= {"latents": latent_statistics(net, training.read(some, some)), "latents_before": before}
        for name, found in (("before", before), ("saved", numbers["latents"])):
            run.print(f"latents {name}: mean " + " ".join(f"{v:.2f}" for v in found["mean"]) + "  std "
                      + " ".join(f"{v:.2f}" for v in found["std"]) + f"  noise {found['noise']:.4f}")
    else:
        numbers["codes"] = code_statistics(net, training.read(some, some))
        run.print("of {codes} codes {used:.1%} are used, perplexity {perplexity:.1f}".format(**numbers["codes"]))
    save_autoencoder(net, run.folder / "model")
    found, page = measure_on(net, held_out, config.data == "everything")
    write_text(run.path("reconstructions.json"), json.dumps(numbers | found, indent=1) + "\n")
    plots.save(page, run.path("reconstructions.png"))
    run.print(f"done: {run.folder}")
    return numbers | found


def measure_folder(config):
    """The numbers and the sheet of `finish` for the autoencoder in the folder --measure, in a new folder."""
    net = load_autoencoder(config.measure).to(pick_device(config.device))
    check_size(config, net.config.factor)
    folder, held_out = free_folder(config.out, "kl-autoencoder-measured"), load_data(config, only_held_out=True)
    numbers, page = measure_on(net, held_out, config.data == "everything")
    some = images.spread(held_out, MEASURED)
    statistics, name = (code_statistics, "codes") if net.config.codes else (latent_statistics, "latents")
    numbers[name] = statistics(net, held_out.read(some, some))
    plots.save(page, folder / "reconstructions.png")
    write_text(folder / "reconstructions.json", json.dumps(numbers, indent=1) + "\n")
    print(f"done: {folder}")


def measure_on(net, held_out, read):
    """(numbers, sheet) of reconstructions of held-out pictures, at most MEASURED; prints the table.

    read: whether the classifier reads them, too.
    """
    some = images.spread(held_out, MEASURED)
    x = held_out.read(some, some)
    y = reconstruct(net, x)
    numbers = measure(x, y, [held_out.classes[i] for i in held_out.labels[some].tolist()] if read else None)
    print(table(numbers), flush=True)
    shown = images.spread(x, 96)
    return numbers, plots.reconstructions(x[shown], y[shown])


# --- flags ----------------------------------------------------------------------------------------------------------

def load_data(config, only_held_out=False):
    """(training pictures, held-out pictures, what these are called), or the held-out pictures alone."""
    if config.data == "everything":
        print("drawing the pictures to train and to measure on: about a minute", flush=True)
        draw = functools.partial(worlds.everything, size=config.size, seed=config.seed, workers=max(1, config.workers),
                                 specimens=4 if config.pictures >= 3000 else 1)
        held_out = draw("test", n=min(MEASURED, max(450, config.pictures)))
        return held_out if only_held_out else (draw("train", n=config.pictures), held_out, "pictures of other seeds")
    options = {"size": config.size, "seed": config.seed}
    if config.data not in datasets.NAMED:
        options["captions"] = None
    training = datasets.load(config.data, "train", channels=3, **options)
    held_out, name = datasets.load_held_out(config.data, training, **options)
    return held_out if only_held_out else (training, held_out, name)


def autoencoder_config(config):
    """The network's sizes from the flags."""
    channels = config.channels
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if all(width % g == 0 and width > g or g == 1 for width in channels))
    return KLAutoencoderConfig(channels=channels, latent_channels=config.latent_channels, blocks=config.blocks,
                               groups=groups, scaling_factor=1.0,
                               codes=config.codes if config.regulariser == "vq" else 0)


def check_size(config, factor, name="size"):
    """UserError for a side that latents `factor` times smaller do not fit."""
    side = getattr(config, name)
    check(side % factor == 0, f"--{name} {side} does not fit latents {factor} times smaller; expected a "
          f"multiple of {factor}, such as {max(1, round(side / factor)) * factor}")


def check_flags(config):
    """Raises UserError where flags do not go together, before anything is read or written."""
    check(config.pictures >= config.batch, f"--pictures is {config.pictures}; expected --batch {config.batch} or more")
    check(not config.adversarial or config.disc_start <= config.adversarial_start,
          f"--adversarial_start {config.adversarial_start} is before --disc_start {config.disc_start}; expected the "
          "discriminator to learn before its loss counts")
    check(config.perceptual or not config.lpips, "--lpips gives the perceptual distance, which --perceptual 0 leaves "
          "out; expected one of them")
    for name in ("size", "crop"):
        check_size(config, autoencoder_config(config).factor, name)
    check(config.crop == 0 or config.crop >= 16, f"--crop is {config.crop}; expected 16 or more, or 0 (whole pictures)")
    check(config.crop <= config.size, f"--crop {config.crop} is larger than --size {config.size}; expected at most "
          "that")
    check(processes() == 1 or config.regulariser == "kl", "the codebook needs all pictures of a step in one process; "
          "expected python, not torchrun, or --regulariser kl")


if __name__ == "__main__":
    main()
