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

import torch
import torch.nn.functional as F

from nanodiff import fast, plots, rng, worlds
from nanodiff.classifiers.worlds import load_reader, read_all
from nanodiff.data import images
from nanodiff.errors import check, nearest
from nanodiff.files import write_text
from nanodiff.flags import entry, parse, resumed
from nanodiff.formats.stable_diffusion_folder import load_autoencoder, save_autoencoder
from nanodiff.metrics.image_quality import psnr, ssim
from nanodiff.metrics.perceptual import load_distance
from nanodiff.models.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from nanodiff.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig, VQAutoencoder, balance
from nanodiff.models.vqvae import MovingCodebook, perplexity, used
from nanodiff.training import datasets
from nanodiff.training.batches import Batches
from nanodiff.training.distributed import pick_device
from nanodiff.training.run import EMA, MAY_CHANGE, Run, RunConfig, free_folder


@dataclass
class Config(RunConfig):
    data: str = "everything"  # everything that is drawn here (worlds and woven), a named data set, a folder or volumes
    size: int = 64  # side of the pictures in pixels
    pictures: int = 20_000  # drawn pictures to train on (--data everything)
    crop: int = 32  # side of the random crops that are trained on (0: whole pictures)
    whole: float = 0.15  # last share of the steps, which sees whole pictures, fewer at a time
    regulariser: str = "kl"  # of the latents: kl or vq (a codebook)
    kl_weight: float = 1e-6  # of the KL in nats a picture, beside the summed reconstruction error of its pixels
    codes: int = 512  # entries of the codebook (--regulariser vq)
    channels: str = "24,48,96"  # width of each level; n levels make latents f = 2^(n-1) times smaller
    latent_channels: int = 4  # numbers a latent pixel
    blocks: int = 1  # ResNet blocks a level of the encoder (one more in the decoder)
    perceptual: float = 0.1  # weight of the perceptual distance (0: none)
    lpips: str = ""  # weights of LPIPS (VGG-16 and its linear layers in one safetensors file) in place of the reader
    equivariance: float = 0.25  # weight of the same error at half the size: half a latent must be half the picture
    adversarial: float = 0.2  # weight of the discriminator's opinion, times the adaptive weight (0: no discriminator)
    disc_start: float = 0.5  # share of the steps after which the discriminator begins to learn
    adversarial_start: float = 0.6  # share of the steps after which the autoencoder hears of it
    disc_channels: int = 32  # width of the discriminator's first level
    measure: str = ""  # folder of an autoencoder to be measured on the held-out pictures, without any training
    steps: int = 3000  # optimiser steps in all
    batch: int = 16  # crops a micro-batch and process
    lr: float = 1e-3  # peak learning rate
    ema: float = 0.998  # decay of the averaged weights, which are what is saved
    preview_every: int = 500  # steps between reconstructions of held-out pictures
    checkpoint_every: int = 1000  # steps between checkpoints


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
    sizes = autoencoder_config(config)
    distance = load_distance(config.lpips) if config.perceptual else None
    run = Run(config, "kl-autoencoder")
    vq = config.regulariser == "vq"
    check(run.world == 1 or not vq, "the codebook follows the pictures of one process; expected python, not torchrun, or "
          "--regulariser kl")
    training, held_out, held_out_name = load_data(config)
    batches = Batches(training, config.batch, config.seed, config.accumulate, run.rank, run.world, config.workers)
    generator, kind = torch.Generator().manual_seed(config.seed), {"kl": KLAutoencoder, "vq": VQAutoencoder}
    net = kind[config.regulariser](sizes, generator)
    if vq:  # codes that follow what chose them, and start anew when nothing does
        net.quantize = MovingCodebook(sizes.codes, sizes.latent_channels, generator=generator)
    net = net.to(run.device).train()
    disc = PatchDiscriminator(training.shape[0], config.disc_channels, generator=generator).to(run.device)
    ema = EMA(net, config.ema)
    fast.speed_up(net)
    fast.speed_up(ema.net)  # which draws the previews
    optimiser = torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)
    disc_optimiser = torch.optim.Adam(disc.parameters(), lr=config.lr, betas=(0.5, 0.9), fused=True)
    run.track(net=net, ema=ema, optimiser=optimiser, disc=disc, disc_optimiser=disc_optimiser)
    distance = distance and distance.to(run.device)
    run.print(f"{sum(p.numel() for p in net.parameters()):,} parameters, f = {sizes.factor}, {len(training):,} "
              f"training pictures of {training.shape}, {held_out_name} to measure")

    scaled = config.equivariance > 0 and not vq and sizes.factor > 1
    for step in run.steps():
        if run.due(config.preview_every):
            preview(run, ema.net, held_out)
        whole = not config.crop or step >= (1 - config.whole) * config.steps
        judged = config.adversarial > 0 and step >= config.disc_start * config.steps
        heard = config.adversarial > 0 and step >= config.adversarial_start * config.steps
        fakes, chosen = [], []
        for micro in range(config.accumulate):
            x, index, position = batches.get(step, micro)  # [B, C, H, W]
            x, index, position = seen(x, index, position, config, step, whole)
            x = x.to(run.device)
            with run.autocast():
                if vq:
                    h = net.encode(x)
                    z, regularity, codes = net.quantize(h)
                    y = net.decoder(net.post_quant_conv(z))
                    chosen.append((h.detach(), codes))
                else:
                    posterior = net.encode(x)
                    noise = rng.normal(config.seed, step, position, posterior.mean.shape[1:]).to(run.device)
                    z = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
                    y = net.decode(z)
                    regularity = config.kl_weight * posterior.kl().mean() / x[0].numel()  # both terms a pixel's number
            reconstruction = error(y.float(), x, distance, config)
            if scaled and min(z.shape[2:]) > 1:  # smooth latents are easier to diffuse
                with run.autocast():
                    small = net.decode(F.avg_pool2d(z, 2))
                fits = x[:, :, :2 * small.shape[2], :2 * small.shape[3]]  # of an odd side the last latents are left out
                halved = error(small.float(), F.avg_pool2d(fits, 2), distance, config)
                reconstruction = reconstruction + config.equivariance * halved
            loss = reconstruction + regularity
            if heard:
                disc.requires_grad_(False)
                opinion = -disc(y.float()).mean()
                weight = adaptive_weight(reconstruction, opinion, net.decoder.conv_out.weight)
                run.note(weight=weight)
                loss = loss + config.adversarial * weight * opinion
                disc.requires_grad_(True)
            run.backward(loss, index)
            fakes.append((x, y.detach().float()))
        if vq:
            h, codes = (torch.cat(part) for part in zip(*chosen))  # of all micro-batches
            net.quantize.follow(h, codes, rng.generator(config.seed, 8, step))
            run.note(perplexity=perplexity(codes, sizes.codes), used=used(codes, sizes.codes))
        run.update(net, optimiser, ema)
        if judged:
            for x, y in fakes:
                disc_loss = hinge_loss(disc(x), disc(y))
                run.note(disc=disc_loss.detach())
                run.scaler.scale(disc_loss / config.accumulate).backward()
            run.update(disc, disc_optimiser)
        run.log(step)

    if run.rank != 0 or not run.finished:
        return None
    numbers = finish(run, ema.net, training, held_out)
    run.print(f"done: {run.folder}")
    return ema.net, numbers


def error(y, x, distance, config):
    """The reconstruction error of pictures y for x: mean absolute difference, and the perceptual distance (of sides from
    16: smaller ones its networks cannot see)."""
    found = (y - x).abs().mean()
    return found if distance is None or min(x.shape[2:]) < 16 else found + config.perceptual * distance(y, x).mean()


def seen(x, index, position, config, step, whole):
    """What a step is shown of a batch [B, C, H, W]: a random crop of each, or fewer whole pictures of that area.

    Where a crop lies follows from (seed, step, position) alone.
    """
    if not config.crop:
        return x, index, position
    if whole:
        n = max(1, round(len(x) * config.crop**2 / (x.shape[2] * x.shape[3])))
        return x[:n], index[:n], position[:n]
    corner = [(rng.uniform(config.seed, 5 + axis, step, position) * (x.shape[2 + axis] - config.crop + 1)).long()
              for axis in (0, 1)]
    crops = [one[:, top:top + config.crop, left:left + config.crop] for one, top, left in zip(x, *map(list, corner))]
    return torch.stack(crops), index, position


# --- what came of it ------------------------------------------------------------------------------------------------

def preview(run, net, held_out):
    """Reconstructions of a few held-out pictures, their PSNR and SSIM in the log."""
    if run.rank != 0:
        return
    save_autoencoder(net, run.folder / "model")
    some = images.spread(held_out, 96)
    x = held_out.read(some, some)
    y = reconstructed(net, x)
    quality, likeness = (float(one.mean()) for one in likenesses(x, y))
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
    return numbers | found


def measure_folder(config):
    """The numbers and the sheet of `finish` for the autoencoder in the folder --measure, in a new folder."""
    net = load_autoencoder(config.measure).to(pick_device(config.device))
    check(config.size >= 16, f"--size is {config.size}; expected 16 or more")
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
    """(numbers, sheet) of reconstructions of held-out pictures, at most MEASURED; prints the table. read: by the reader,
    too."""
    some = images.spread(held_out, MEASURED)
    x = held_out.read(some, some)
    y = reconstructed(net, x)
    numbers = measure(x, y, [held_out.classes[i] for i in held_out.labels[some].tolist()] if read else None)
    print(table(numbers), flush=True)
    shown = images.spread(x, 96)
    return numbers, plots.reconstructions(x[shown], y[shown])


@torch.no_grad()
def reconstructed(net, x, batch=32):
    """Pictures [N, 3, H, W] through the most likely latent and back, in [-1, 1]."""
    device = next(net.parameters()).device
    parts = []
    with fast.packed(net):
        for part in x.split(batch):
            z = net.encode(part.to(device))
            parts.append(net.decode(z if torch.is_tensor(z) else z.mode()).float().clamp(-1, 1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def latent_statistics(net, x, batch=100):
    """Mean and standard deviation of a draw from the posterior, by channel, and its mean KL in nats a picture."""
    device = next(net.parameters()).device
    with fast.packed(net):
        posteriors = [net.encode(part.to(device)) for part in x.split(batch)]
    generator = torch.Generator(device).manual_seed(0)
    z = torch.cat([one.sample(generator) for one in posteriors]) * net.config.scaling_factor
    return {"mean": z.mean((0, 2, 3)).tolist(), "std": z.std((0, 2, 3)).tolist(),
            "noise": float(torch.cat([one.logvar for one in posteriors]).div(2).exp().mean()),
            "kl": float(torch.cat([one.kl() for one in posteriors]).mean())}


@torch.no_grad()
def code_statistics(net, x, batch=100):
    """How many entries the codebook has, the share that pictures x use, and the perplexity of their codes."""
    device, K = next(net.parameters()).device, net.config.codes
    with fast.packed(net):
        codes = torch.cat([net.quantize.nearest(net.encode(part.to(device))).cpu() for part in x.split(batch)])
    return {"codes": K, "used": used(codes, K), "perplexity": perplexity(codes, K)}


def likenesses(x, y, batch=200):
    """PSNR in dB and SSIM [N] of y for x in [-1, 1]; taken in 0 ... 1, where SSIM's luminance has a meaning."""
    parts = [((a + 1) / 2, (b + 1) / 2) for a, b in zip(x.split(batch), y.split(batch))]
    return torch.cat([psnr(b, a, 1) for a, b in parts]), torch.cat([ssim(b, a, 1) for a, b in parts])


def measure(x, y, labels=None):
    """PSNR, SSIM and (with the classes' names) the reader's rate on originals x and copies y, for all and by group."""
    quality, likeness = likenesses(x, y)
    groups = {"all": torch.ones(len(x), dtype=torch.bool)}
    if labels:
        groups |= {name: torch.tensor([one in names for one in labels]) for name, names in worlds.GROUPS.items()}
        reader = load_reader()
        right = {name: torch.tensor([a == b for a, b in zip(read_all(reader, z).names(), labels)]).double()
                 for name, z in (("original", x), ("reconstruction", y))}
    rows = {}
    for group, mine in groups.items():
        rows[group] = {"n": int(mine.sum()), "psnr": float(quality[mine].mean()), "ssim": float(likeness[mine].mean())}
        if labels:
            rows[group] |= {"read_" + name: float(good[mine].mean()) for name, good in right.items()}
    return {"groups": rows}


def table(numbers):
    """The groups of `measure` as Markdown."""
    lines = ["| held-out pictures | n | PSNR dB | SSIM | read right | reconstructions | share kept |",
             "|---|---|---|---|---|---|---|"]
    for name, row in numbers["groups"].items():
        line = f"| {name} | {row['n']:,} | {row['psnr']:.2f} | {row['ssim']:.3f} |"
        if "read_original" in row:
            line += (f" {row['read_original']:.2%} | {row['read_reconstruction']:.2%} | "
                     f"{row['read_reconstruction'] / max(row['read_original'], 1e-9):.2%} |")
        lines.append(line)
    return "\n".join(lines)


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
    held_out, name = datasets.held_out(config.data, training, **options)
    return held_out if only_held_out else (training, held_out, name)


def autoencoder_config(config):
    """The network's sizes from the flags."""
    try:
        channels = tuple(int(width) for width in config.channels.split(","))
    except ValueError:
        channels = ()
    check(channels and min(channels) > 0, f'--channels "{config.channels}" must be whole numbers with commas between, '
          "such as 24,48,96")
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
    """Raises UserError for every flag whose value alone is wrong, before anything is read or written."""
    check(config.regulariser in ("kl", "vq"), f'--regulariser "{config.regulariser}" is unknown; expected kl or vq'
          + nearest(config.regulariser, ("kl", "vq")))
    for name, least in dict(size=16, pictures=config.batch, latent_channels=1, blocks=1, codes=2, kl_weight=0,
                            perceptual=0, equivariance=0, adversarial=0, crop=0, disc_channels=8).items():
        check(getattr(config, name) >= least, f"--{name} is {getattr(config, name)}; expected {least} or more")
    for name in ("whole", "disc_start", "adversarial_start"):
        check(0 <= getattr(config, name) <= 1, f"--{name} is {getattr(config, name)}; expected a share from 0 to 1")
    check(not config.adversarial or config.disc_start <= config.adversarial_start,
          f"--adversarial_start {config.adversarial_start} is before "
          f"--disc_start {config.disc_start}; expected the discriminator to learn before it is heard")
    check(config.perceptual or not config.lpips, "--lpips gives the perceptual distance, which --perceptual 0 leaves "
          "out; expected one of them")
    check(config.disc_channels % 8 == 0, f"--disc_channels is {config.disc_channels}; expected a multiple of 8")
    for name in ("size", "crop"):
        check_size(config, autoencoder_config(config).factor, name)
    check(config.crop == 0 or config.crop >= 16, f"--crop is {config.crop}; expected 16 or more, or 0 (whole pictures)")
    check(config.crop <= config.size, f"--crop {config.crop} is larger than --size {config.size}; expected at most "
          "that")


if __name__ == "__main__":
    main()
