"""VQGAN: an autoencoder with a codebook that is trained to look right, and a GPT that learns to write its codes (Esser
et al. 2021, arXiv 2012.09841; report section 2).

    python train_vqgan.py                              digits: 7x7 codes each, written for a class that one asks for
    python train_vqgan.py --data worlds --size 32 --steps 3000 --gpt_steps 3000     drawn textures and things in colour
    python train_vqgan.py --autoencoder runs/vqvae-001     the GPT alone, over the codes of train_vqvae.py
    python train_vqgan.py --resume runs/vqgan-001      goes on exactly where the run was stopped or killed

Stage one learns the codes: L1 + perceptual distance + commitment, and from --adversarial_start on a patch
discriminator's opinion. Stage two freezes them and maximises log p(codes | class), one code after the other. It is
judged in bits a code beside the entropy of the codes alone, and by how many of its pictures are read as their class.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F

from nanodiff import plots, rng
from nanodiff.classifiers import digits, worlds as world_classifier
from nanodiff.data import images
from nanodiff.data.images import in_channels
from nanodiff.errors import check
from nanodiff.files import write_text
from nanodiff.flags import (AtLeast, BelowOne, Between, Count, CountOrZero, MultipleOf, NotNegative, Positive, Share,
                            entry, parse, resumed)
from nanodiff.formats.model_folder import load_model, save_model
from nanodiff.metrics import codebook as measures
from nanodiff.metrics.perceptual import load_distance
from nanodiff.models.discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from nanodiff.models.gpt import GPT, GPTConfig
from nanodiff.models.vqvae import VQVAE, VQVAEConfig, perplexity, used
from nanodiff.pipelines import vqgan
from nanodiff.pipelines.vqgan import VQGAN
from nanodiff.training import datasets
from nanodiff.training.batches import Batches
from nanodiff.training.distributed import processes
from nanodiff.training.run import MAY_CHANGE, Run, RunConfig, free_folder
from nanodiff.training.step import EMA, learning_rate


@dataclass
class Config(RunConfig):
    data: str = "mnist"  # mnist, cifar10, dtd, worlds or woven (drawn), or a folder of pictures, or TIFF volumes
    root: str = ""  # where the files of a named data set lie (default: the repository's data folder)
    download: bool = False  # fetch cifar10 or dtd when it is not there
    size: Annotated[CountOrZero, MultipleOf(4)] = 0  # side of the pictures in pixels (0: the data's own)
    autoencoder: str = ""  # folder of a trained VQ-VAE, in place of stage one
    codes: Count = 128  # entries of the codebook
    code_channels: Count = 32  # width of an entry
    beta: NotNegative = 0.25  # weight of the commitment term
    decay: Annotated[float, Between(0, 1, open="both")] = 0.99  # of the codebook's running means
    patience: Count = 10  # steps without use after which a code starts anew
    channels: Count = 64  # width of the autoencoder at a quarter of the side
    residual_layers: CountOrZero = 2  # residual layers of its encoder, and of its decoder
    residual_channels: Count = 32  # width inside them
    perceptual: NotNegative = 0.1  # weight of the perceptual distance (0: none)
    adversarial: NotNegative = 0.1  # weight of the adversarial loss, times the adaptive weight (0: no discriminator)
    disc_start: Share = 0.4  # share of stage one after which the discriminator begins to learn
    adversarial_start: Share = 0.5  # share of stage one after which the adversarial loss counts
    disc_channels: Annotated[int, AtLeast(8), MultipleOf(8)] = 16  # width of the discriminator's first level
    steps: Count = 500  # optimiser steps of stage one
    batch: Count = 64  # pictures of one micro-batch of stage one
    lr: Positive = 2e-3  # peak learning rate of stage one, of autoencoder and discriminator
    gpt_steps: Count = 1500  # optimiser steps of stage two
    gpt_batch: Count = 64  # pictures of one micro-batch of stage two
    gpt_lr: Positive = 3e-3  # peak learning rate of stage two
    gpt_width: Count = 96  # numbers that stand for a code between the GPT's layers
    gpt_layers: Count = 4  # its layers
    gpt_heads: Count = 4  # its attention heads
    gpt_dropout: BelowOne = 0.0  # share of activations dropped in it
    warmup: CountOrZero = 50  # optimiser steps of linear learning-rate warm-up, of each stage
    ema: BelowOne = 0.0  # decay of the averaged weights, which are then what is saved and drawn (0: no averaging)
    stop: CountOrZero = 0  # end this call after so many steps of both stages in all, to be resumed (0: at the end)
    preview_every: Count = 250  # steps between measurements and pictures
    checkpoint_every: Count = 250  # steps between checkpoints
    temperature: NotNegative = 1.0  # of the samples: below 1 the likely codes become likelier
    top_k: CountOrZero = 0  # samples draw among the k likeliest codes alone (0: among all)
    samples: Count = 100  # pictures of each class that are judged in the end


STAGES = ("codes", "gpt")  # folders inside the run's
STAGE_ONE = {"codes", "code_channels", "channels", "residual_layers", "residual_channels", "beta", "decay", "patience",
             "perceptual", "adversarial", "disc_start", "adversarial_start", "disc_channels", "steps", "batch", "lr"}


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        if Path(config.resume).name in STAGES:  # the folder of a stage stands for that of both
            config.resume = str(Path(config.resume).parent)
        config = resumed(config, given, "vqgan", MAY_CHANGE)
    check_flags(config)
    training, held_out, _ = datasets.load_splits(config.data, config.root, config.size, config.download, config.seed)
    folder = Path(config.resume) if config.resume else free_folder(config.out, "vqgan")
    autoencoder = None
    if config.autoencoder:  # a resumed run has its own copy, which nobody trains further
        place = folder / "codes" / "model" if config.resume else config.autoencoder
        autoencoder = load_model(place, VQVAE, VQVAEConfig)
        for name in sorted(given & STAGE_ONE):
            check(False, f"--{name} {getattr(config, name)} belongs to stage one, and --autoencoder "
                  f"{config.autoencoder}, with {autoencoder.config.codes} codes, takes its place; expected one of them")
    check_data(config, training, autoencoder or VQVAE(sizes(config, training.shape[0])))
    steps_before = 0 if autoencoder else config.steps  # of stage one
    codes_run = None if autoencoder else Run(stage(config, folder / "codes"), "vqgan-codes")
    gpt_run = Run(stage(config, folder / "gpt", steps=config.gpt_steps, batch=config.gpt_batch, lr=config.gpt_lr,
                        stop=max(0, config.stop - steps_before)), "vqgan-gpt")
    if not config.resume:
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"script": "vqgan", **dataclasses.asdict(config)}
        write_text(folder / "config.json", json.dumps(settings, indent=1) + "\n")
        if autoencoder is not None:
            save_model(autoencoder, folder / "codes" / "model")

    if autoencoder is None:
        autoencoder = train_codes(codes_run, training, held_out)
        if autoencoder is None or 0 < config.stop <= steps_before:
            return
    gpt = train_gpt(gpt_run, autoencoder, training, held_out)
    if gpt is not None:
        model = VQGAN(autoencoder, gpt, training.shape, training.classes, config.data)
        finish(config, folder, model, held_out)


# --- stage one: the codes -------------------------------------------------------------------------------------------

def train_codes(run, training, held_out):
    """Trains the autoencoder; returns it frozen, or None when it was stopped before."""
    config = run.config
    batches = Batches(training, config.batch, config.seed, config.gradient_accumulation, workers=config.workers)
    generator = torch.Generator().manual_seed(config.seed)
    net = VQVAE(sizes(config, training.shape[0]), generator).to(run.device)
    disc = PatchDiscriminator(training.shape[0], config.disc_channels, generator=generator).to(run.device)
    distance = load_distance().to(run.device) if config.perceptual else None
    ema = EMA(net, config.ema) if config.ema else None
    final = ema.net if ema else net  # the weights that are measured, drawn and saved
    optimiser = torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)
    disc_optimiser = torch.optim.Adam(disc.parameters(), lr=config.lr, betas=(0.5, 0.9), fused=True)
    run.track(net=net, ema=ema, optimiser=optimiser, disc=disc, disc_optimiser=disc_optimiser)
    variance = measures.pixel_variance(training)
    run.print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(training):,} training pictures of "
              f"{training.shape}")

    for step in run.steps():
        lr = learning_rate(step, config)
        if step and run.due(config.preview_every):
            preview_codes(run, final, held_out, variance)
        disc_learns = config.adversarial > 0 and step >= config.disc_start * config.steps
        disc_counts = config.adversarial > 0 and step >= config.adversarial_start * config.steps
        vectors, pairs, weights = [], [], []  # encoder's vectors, codes; pictures, reconstructions; adaptive weights
        for micro in run.micro_batches():
            x, index, _ = batches.get(step, micro)  # [B, C, H, W]
            x = x.to(run.device)
            with run.autocast():
                y, commitment, codes, h = net(x)
            y = y.float()
            reconstruction = error(y, x, distance, config)
            loss = reconstruction + commitment
            if disc_counts:
                disc.requires_grad_(False)
                adversarial = -disc(y).mean()
                weights.append(adaptive_weight(reconstruction, adversarial, net.last_weight))
                loss = loss + config.adversarial * weights[-1] * adversarial
                disc.requires_grad_(True)
            run.backward(loss, index)
            vectors.append((h.detach(), codes))
            pairs.append((x, y.detach()))
        h, codes = (torch.cat(part) for part in zip(*vectors))  # of all micro-batches
        net.codebook.ema_update(h, codes, rng.generator(config.seed, rng.REVIVAL, step))
        run.update(net, optimiser, lr)
        if ema:
            ema.update(net)
        numbers = {"weight": mean(weights)} if disc_counts else {}
        if disc_learns:
            numbers["disc"] = train_discriminator(run, disc, disc_optimiser, pairs, lr)
        run.record(step=step, l1=mean([(y - x).abs().mean() for x, y in pairs]),
                   perplexity=perplexity(codes, config.codes), used=used(codes, config.codes), **numbers)
        run.log(step, lr)

    if not run.finished:
        return None
    _, codes = preview_codes(run, final, held_out, variance)
    plots.save(measures.codebook_picture(final, codes), run.path("codebook.png"))
    plots.save(measures.reconstructions(final, held_out), run.path("reconstructions.png"))
    return final.eval().requires_grad_(False)


def train_discriminator(run, disc, optimiser, pairs, lr):
    """One step of the discriminator on pairs (real, fake) of micro-batches; returns its mean hinge loss."""
    losses = []
    for x, y in pairs:
        losses.append(hinge_loss(disc(x), disc(y)))
        run.scaler.scale(losses[-1] / len(pairs)).backward()
    run.update(disc, optimiser, lr)
    return mean(losses)


def mean(values):
    """The mean of 0-dim tensors, as a number."""
    return sum(float(value.detach()) for value in values) / len(values)


def error(y, x, distance, config):
    """The reconstruction error of pictures y for x: mean absolute difference, and the perceptual distance.

    The distance is that of the worlds' classifier, for grey pictures too: the digit classifier judges the samples, so
    the decoder must not be trained by it.
    """
    l1 = (y - x).abs().mean()
    if distance is None:
        return l1
    return l1 + config.perceptual * distance(in_channels(y, 3), in_channels(x, 3)).mean()


def preview_codes(run, net, held_out, variance):
    """Measures the codes of all held-out pictures and saves the autoencoder; reconstructions and curves so far. Returns
    (numbers, codes)."""
    save_model(net, run.folder / "model")
    numbers, codes = measures.measure(net, held_out, variance)
    run.record(step=run.step, **{f"held_out_{name}": value for name, value in numbers.items()})
    run.print(f"step {run.step}  " + measures.sentence(numbers, net.config.codes))
    plots.save(measures.reconstructions(net, held_out, 48), run.path(f"previews/{run.step:08d}.png"))
    lines = {name: {"training batch": run.history(name), "held out": run.history(f"held_out_{name}")}
             for name in ("perplexity", "used")}
    pages = [plots.curves({"L1": run.history("l1")}, "Mean absolute error of training batches", "step", log_y=True),
             plots.curves(lines["perplexity"], "Perplexity of the codes", "step"),
             plots.curves(lines["used"], "Share of the codebook that is used", "step"),
             plots.curves({"its hinge loss": run.history("disc"), "adaptive weight": run.history("weight")},
                          "The discriminator", "step", log_y=True)]
    plots.save(plots.stack(pages), run.path("curves.png"))
    return numbers, codes


# --- stage two: the GPT ---------------------------------------------------------------------------------------------

def train_gpt(run, autoencoder, training, held_out):
    """Trains the GPT on the codes of the training pictures; returns it frozen, or None when it was stopped before."""
    config, K = run.config, autoencoder.config.codes
    autoencoder = autoencoder.to(run.device)
    codes, test = (measures.encode_all(autoencoder, part).flatten(1) for part in (training, held_out))  # [N, length]
    labels, test_labels = ((part.labels if training.classes else torch.zeros(len(part), dtype=torch.int64))
                           for part in (training, held_out))
    batches = Batches(training, config.batch, config.seed, config.gradient_accumulation)  # only which, not the pictures
    net = GPT(gpt_sizes(config, K, codes.shape[1], training.classes), torch.Generator().manual_seed(config.seed))
    net = net.to(run.device).train()
    ema = EMA(net, config.ema) if config.ema else None
    final = ema.net if ema else net  # the weights that are measured, drawn and saved
    optimiser = torch.optim.Adam(net.parameters(), lr=config.lr, betas=(0.9, 0.95), fused=True)
    run.track(net=net, ema=ema, optimiser=optimiser)
    bits = {"unigram": measures.table_bits(codes, test, K),
            "unigram_by_place": measures.table_bits(codes, test, K, by_place=True)}
    run.print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(codes):,} pictures of {codes.shape[1]} "
              f"codes of {K}; bits a code on held-out pictures from the codes' shares alone: {bits['unigram']:.3f}, "
              f"from their shares at each place: {bits['unigram_by_place']:.3f}")

    for step in run.steps():
        lr = learning_rate(step, config)
        if step and run.due(config.preview_every):
            preview_gpt(run, final, autoencoder, training, bits, test, test_labels)
        for micro in run.micro_batches():
            index, _, _ = batches.plan(step, micro)
            code, label = codes[index].to(run.device), labels[index].to(run.device)  # [B, length], [B]
            with run.autocast():
                logits = net(code[:, :-1], label)  # [B, length, K]
            loss = F.cross_entropy(logits.float().flatten(0, 1), code.flatten())  # nats a code
            run.backward(loss, index)
        run.update(net, optimiser, lr)
        if ema:
            ema.update(net)
        run.log(step, lr)

    if not run.finished:
        return None
    bits["nll"] = preview_gpt(run, final, autoencoder, training, bits, test, test_labels)
    write_text(run.path("bits.json"), json.dumps(bits | {"ratio": bits["nll"] / bits["unigram"]}, indent=1) + "\n")
    return final.eval().requires_grad_(False)


def preview_gpt(run, net, autoencoder, training, bits, test, test_labels):
    """Bits a code of held-out pictures (all of them at the end, 2,000 before), a few samples, the curves so far."""
    some = images.spread(test, len(test) if run.finished else 2000)
    found = measures.gpt_bits(net, test[some], test_labels[some])
    run.record(step=run.step, bits=found)
    run.print(f"step {run.step}  {found:.3f} bits a code on {len(some):,} held-out pictures, "
              f"{found / bits['unigram']:.1%} of what the codes' shares alone give")
    model = VQGAN(autoencoder, net, training.shape, training.classes, run.config.data)
    plots.save(sample_sheet(model, run.config, 6), run.path(f"previews/{run.step:08d}.png"))
    steps, nats = run.history("loss")
    ends = [0, run.step]
    plots.save(plots.curves({"training": (steps, [loss / math.log(2) for loss in nats]),
                             "held out": run.history("bits"), "shares alone": (ends, [bits["unigram"]] * 2),
                             "shares by place": (ends, [bits["unigram_by_place"]] * 2)},
                            "Bits a code", "step"), run.path("curves.png"))
    return found


# --- what came of it ------------------------------------------------------------------------------------------------

def finish(config, folder, model, held_out):
    """Saves the model; a sheet of samples of each class; how many samples are read as their class."""
    vqgan.save(model, folder / "model")
    plots.save(sample_sheet(model, config, 16), folder / "samples.png")
    numbers = json.loads((folder / "gpt" / "bits.json").read_text())
    print("bits a code on held-out pictures: {nll:.3f}, against {unigram:.3f} from the codes' shares alone: {ratio:.1%}"
          .format(**numbers))
    label = torch.arange(max(1, len(model.classes))).repeat(config.samples)
    x = model.generate(len(label), config.seed + 1, label, config.temperature, config.top_k)
    if held_out.labels is not None and (found := recognised(config, x, label, model.classes)) is not None:
        some = images.spread(held_out, 2000)
        real = held_out.read(some, some)
        copies = measures.decode_all(model.autoencoder, measures.encode_all(model.autoencoder, held_out)[some])
        numbers |= {"samples": len(x), "recognised": found, "real_pictures": len(real)}
        for name, judged in (("recognised_real", real), ("recognised_reconstructions", copies)):
            numbers[name] = recognised(config, judged, held_out.labels[some], model.classes)
        print(f"{len(x)} samples: {found:.1%} read as their class (held-out pictures {numbers['recognised_real']:.1%}, "
              f"their reconstructions {numbers['recognised_reconstructions']:.1%}, n = {len(real)})")
    write_text(folder / "numbers.json", json.dumps(numbers, indent=1) + "\n")
    print(f"done: {folder}")


def recognised(config, x, label, classes):
    """The share of pictures x [n, C, H, W] that the project's classifier takes for their class; None without one."""
    if config.data == "mnist" and x.shape[1:] == (1, 28, 28):
        _, probabilities = digits.classify(digits.load_classifier(), x)
        return float((probabilities.argmax(1) == label).double().mean())  # "not a digit" is wrong, too
    if config.data in ("worlds", "woven"):
        names = world_classifier.classify(world_classifier.load_classifier(), x).names()
        return sum(name == classes[i] for name, i in zip(names, label.tolist())) / len(names)
    return None


def sample_sheet(model, config, columns):
    """A row of samples for each class."""
    names = model.classes or [""]
    label = torch.arange(len(names)).repeat_interleave(columns)
    x = model.generate(len(label), config.seed, label, config.temperature, config.top_k)
    return plots.sheet([list(row) for row in x.split(columns)], names, scale=max(1, 56 // model.shape[1]))


# --- flags and stages -----------------------------------------------------------------------------------------------

def stage(config, folder, **changes):
    """The config of one stage: its own steps, batch and rate, in its own folder, from its last checkpoint if any."""
    place = {"resume": "", "out": str(folder)}
    if config.resume and folder.exists():
        place = {"resume": str(folder), "out": ""}
    return dataclasses.replace(config, **place, **changes)


def check_data(config, training, autoencoder):
    """Raises UserError when the pictures do not fit the networks, or are fewer than a batch."""
    autoencoder.check_size(training.shape)
    least, why = least_side(config)
    check(config.autoencoder or min(training.shape[1:]) >= least, f"{why} sides from {least}, and the pictures are "
          f"{training.shape[1]}x{training.shape[2]}; expected --perceptual 0 --adversarial 0 or a larger --size")
    for name in ("gpt_batch",) if config.autoencoder else ("batch", "gpt_batch"):
        check(getattr(config, name) <= len(training), f"--{name} is {getattr(config, name)}, more than the "
              f"{len(training)} training pictures; expected at most that")


def least_side(config):
    """The smallest side of a picture that stage one's judges can take, and who asks for it."""
    if config.perceptual:
        return 16, "the perceptual distance needs"
    return (12, "the discriminator needs") if config.adversarial else (4, "codes stand for")


def sizes(config, channels):
    """The autoencoder's sizes from the flags, for pictures of so many channels."""
    return VQVAEConfig(channels, config.channels, config.residual_layers, config.residual_channels, config.codes,
                       config.code_channels, config.beta, config.decay, config.patience)


def gpt_sizes(config, codes, length, classes):
    """The GPT's sizes from the flags, for so many codes and classes."""
    return GPTConfig(codes, length, max(1, len(classes)), config.gpt_width, config.gpt_layers, config.gpt_heads,
                     config.gpt_dropout)


def check_flags(config):
    """Raises UserError where flags do not go together, before anything is read or written."""
    check(processes() == 1, "the codebook needs all pictures of a step in one process; expected python, not torchrun")
    check(not config.adversarial or config.disc_start <= config.adversarial_start,
          f"--adversarial_start {config.adversarial_start} is before --disc_start {config.disc_start}; expected the "
          "discriminator to learn before its loss counts")
    least, why = (4, "codes stand for") if config.autoencoder else least_side(config)
    check(config.size == 0 or config.size >= least, f"--size is {config.size}; expected a multiple of 4 from {least} "
          f"({why} that), or 0 (the pictures' own)")
    sizes(config, 1)
    gpt_sizes(config, 1, 1, ())


if __name__ == "__main__":
    main()
