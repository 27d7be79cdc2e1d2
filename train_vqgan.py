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

import torch
import torch.nn.functional as F

from nanodiff import plots, rng
from nanodiff.classifiers import digits, worlds as classifier
from nanodiff.data import images
from nanodiff.data.images import in_channels
from nanodiff.errors import check
from nanodiff.files import write_text
from nanodiff.flags import entry, parse, resumed
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
from nanodiff.training.run import EMA, MAY_CHANGE, Run, RunConfig, free_folder


@dataclass
class Config(RunConfig):
    data: str = "mnist"  # mnist, cifar10, dtd, worlds or woven (drawn), or a folder of pictures, or TIFF volumes
    root: str = ""  # where the files of a named data set lie (default: the repository's data folder)
    download: bool = False  # fetch cifar10 or dtd when it is not there
    size: int = 0  # side of the pictures in pixels (0: the data's own); 4 must divide it
    autoencoder: str = ""  # folder of a trained VQ-VAE, in place of stage one
    codes: int = 128  # entries of the codebook
    code_channels: int = 32  # width of an entry
    beta: float = 0.25  # weight of the commitment term
    decay: float = 0.99  # of the codebook's running means
    patience: int = 10  # steps without use after which a code starts anew
    channels: int = 64  # width of the autoencoder at a quarter of the side
    residual_layers: int = 2  # residual layers of its encoder, and of its decoder
    residual_channels: int = 32  # width inside them
    perceptual: float = 0.1  # weight of the perceptual distance (0: none)
    adversarial: float = 0.1  # weight of the discriminator's opinion, times the adaptive weight (0: no discriminator)
    disc_start: float = 0.4  # share of stage one after which the discriminator begins to learn
    adversarial_start: float = 0.5  # share of stage one after which the autoencoder hears of it
    disc_channels: int = 16  # width of the discriminator's first level
    steps: int = 500  # optimiser steps of stage one
    batch: int = 64  # pictures a micro-batch of stage one
    lr: float = 2e-3  # peak learning rate of stage one, of autoencoder and discriminator
    gpt_steps: int = 1500  # optimiser steps of stage two
    gpt_batch: int = 64  # pictures a micro-batch of stage two
    gpt_lr: float = 3e-3  # peak learning rate of stage two
    gpt_width: int = 96  # numbers that stand for a code between the GPT's layers
    gpt_layers: int = 4  # its layers
    gpt_heads: int = 4  # its attention heads
    gpt_dropout: float = 0.0  # share of activations dropped in it
    warmup: int = 50  # optimiser steps of linear learning-rate warm-up, of each stage
    ema: float = 0.0  # decay of the averaged weights, which are then what is saved and drawn (0: no averaging)
    stop: int = 0  # end this call after so many steps of both stages in all, to be resumed (0: at the end)
    preview_every: int = 250  # steps between measurements and pictures
    checkpoint_every: int = 250  # steps between checkpoints
    temperature: float = 1.0  # of the samples: below 1 the likely codes become likelier
    top_k: int = 0  # samples draw among the k likeliest codes alone (0: among all)
    samples: int = 100  # pictures of each class that are judged in the end


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
    training, held_out, _ = datasets.both(config.data, config.root, config.size, config.download, config.seed)
    folder = Path(config.resume) if config.resume else free_folder(config.out, "vqgan")
    autoencoder = None
    if config.autoencoder:  # a resumed run has its own copy, which nobody trains further
        autoencoder = load_model(folder / "codes" / "model" if config.resume else config.autoencoder, VQVAE, VQVAEConfig)
        for name in sorted(given & STAGE_ONE):
            check(False, f"--{name} {getattr(config, name)} belongs to stage one, and --autoencoder {config.autoencoder}, "
                  f"with {autoencoder.config.codes} codes, takes its place; expected one of the two flags")
    check_data(config, training, autoencoder or VQVAE(sizes(config, training.shape[0])))
    before = 0 if autoencoder else config.steps  # steps of stage one
    one = None if autoencoder else Run(stage(config, folder / "codes"), "vqgan-codes")
    two = Run(stage(config, folder / "gpt", steps=config.gpt_steps, batch=config.gpt_batch, lr=config.gpt_lr,
                    stop=max(0, config.stop - before)), "vqgan-gpt")
    if not config.resume:
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"script": "vqgan", **dataclasses.asdict(config)}
        write_text(folder / "config.json", json.dumps(settings, indent=1) + "\n")
        if autoencoder is not None:
            save_model(autoencoder, folder / "codes" / "model")

    if autoencoder is None:
        autoencoder = train_codes(one, training, held_out)
        if autoencoder is None or 0 < config.stop <= before:
            return
    gpt = train_gpt(two, autoencoder, training, held_out)
    if gpt is not None:
        model = VQGAN(autoencoder, gpt, training.shape, training.classes, config.data)
        finish(config, folder, model, held_out)


# --- stage one: the codes -------------------------------------------------------------------------------------------

def train_codes(run, training, held_out):
    """Trains the autoencoder; returns it frozen, or None when it was stopped before."""
    config = run.config
    batches = Batches(training, config.batch, config.seed, config.accumulate, workers=config.workers)
    generator = torch.Generator().manual_seed(config.seed)
    net = VQVAE(sizes(config, training.shape[0]), generator).to(run.device)
    disc = PatchDiscriminator(training.shape[0], config.disc_channels, generator=generator).to(run.device)
    distance = load_distance().to(run.device) if config.perceptual else None
    average = EMA(net, config.ema) if config.ema else None
    shown = average.net if average else net
    optimiser = torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)
    disc_optimiser = torch.optim.Adam(disc.parameters(), lr=config.lr, betas=(0.5, 0.9), fused=True)
    run.track(net=net, ema=average, optimiser=optimiser, disc=disc, disc_optimiser=disc_optimiser)
    variance = measures.pixel_variance(training)
    run.print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(training):,} training pictures of "
              f"{training.shape}")

    for step in run.steps():
        if step and run.due(config.preview_every):
            preview_codes(run, shown, held_out, variance)
        said = {}  # of the discriminator, a number for each micro-batch
        judged = config.adversarial > 0 and step >= config.disc_start * config.steps
        heard = config.adversarial > 0 and step >= config.adversarial_start * config.steps
        seen, fakes = [], []
        for micro in range(config.accumulate):
            x, index, _ = batches.get(step, micro)  # [B, C, H, W]
            x = x.to(run.device)
            with run.autocast():
                h = net.maps(x)  # [B, D, H/4, W/4]
                chosen, commitment, codes = net.codebook(h)
                y = net.decode(chosen)
            y = y.float()
            reconstruction = error(y, x, distance, config)
            loss = reconstruction + commitment
            if heard:
                disc.requires_grad_(False)
                opinion = -disc(y).mean()
                weight = adaptive_weight(reconstruction, opinion, net.last_weight)
                loss = loss + config.adversarial * weight * opinion
                disc.requires_grad_(True)
                said.setdefault("weight", []).append(float(weight))
            run.backward(loss, index)
            seen.append((h.detach(), codes))
            fakes.append((x, y.detach()))
        h, codes = (torch.cat(part) for part in zip(*seen))  # of all micro-batches
        net.codebook.follow(h, codes, rng.generator(config.seed, 8, step))
        run.update(net, optimiser, average)
        if judged:
            for x, y in fakes:
                disc_loss = hinge_loss(disc(x), disc(y))
                said.setdefault("disc", []).append(float(disc_loss.detach()))
                run.scaler.scale(disc_loss / config.accumulate).backward()
            run.update(disc, disc_optimiser)
        l1 = sum(float((y - x).abs().mean()) for x, y in fakes) / len(fakes)
        run.record(step=step, l1=l1, perplexity=perplexity(codes, config.codes), used=used(codes, config.codes),
                   **{name: sum(values) / len(values) for name, values in said.items()})
        run.log(step)

    if not run.finished:
        return None
    _, codes = preview_codes(run, shown, held_out, variance)
    plots.save(measures.codebook_picture(shown, codes), run.path("codebook.png"))
    plots.save(measures.reconstructions(shown, held_out), run.path("reconstructions.png"))
    return shown.eval().requires_grad_(False)


def error(y, x, distance, config):
    """The reconstruction error of pictures y for x: mean absolute difference, and the perceptual distance.

    The distance is that of the reader of the drawn worlds, grey pictures too: the digit reader will judge the samples,
    and must not have taught the decoder what it likes.
    """
    found = (y - x).abs().mean()
    if distance is None:
        return found
    return found + config.perceptual * distance(in_channels(y, 3), in_channels(x, 3)).mean()


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
    codes, test = (measures.encoded(autoencoder, some).flatten(1) for some in (training, held_out))  # [N, length] each
    labels, test_labels = ((some.labels if training.classes else torch.zeros(len(some), dtype=torch.int64))
                           for some in (training, held_out))
    batches = Batches(training, config.batch, config.seed, config.accumulate)  # only which, not the pictures
    net = GPT(gpt_sizes(config, K, codes.shape[1], training.classes), torch.Generator().manual_seed(config.seed))
    net = net.to(run.device).train()
    average = EMA(net, config.ema) if config.ema else None
    shown = average.net if average else net
    optimiser = torch.optim.Adam(net.parameters(), lr=config.lr, betas=(0.9, 0.95), fused=True)
    run.track(net=net, ema=average, optimiser=optimiser)
    bits = {"unigram": measures.table_bits(codes, test, K),
            "unigram_by_place": measures.table_bits(codes, test, K, by_place=True)}
    run.print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(codes):,} pictures of {codes.shape[1]} "
              f"codes of {K}; bits a code on held-out pictures from the codes' shares alone: {bits['unigram']:.3f}, "
              f"from their shares at each place: {bits['unigram_by_place']:.3f}")

    for step in run.steps():
        if step and run.due(config.preview_every):
            preview_gpt(run, shown, autoencoder, training, bits, test, test_labels)
        for micro in range(config.accumulate):
            index, _, _ = batches.plan(step, micro)
            code, label = codes[index].to(run.device), labels[index].to(run.device)  # [B, length], [B]
            with run.autocast():
                logits = net(code[:, :-1], label)  # [B, length, K]
            loss = F.cross_entropy(logits.float().flatten(0, 1), code.flatten())  # nats a code
            run.backward(loss, index)
        run.update(net, optimiser, average)
        run.log(step)

    if not run.finished:
        return None
    bits["nll"] = preview_gpt(run, shown, autoencoder, training, bits, test, test_labels)
    write_text(run.path("bits.json"), json.dumps(bits | {"ratio": bits["nll"] / bits["unigram"]}, indent=1) + "\n")
    return shown.eval().requires_grad_(False)


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
        copies = measures.decoded(model.autoencoder, measures.encoded(model.autoencoder, held_out)[some])
        numbers |= {"samples": len(x), "recognised": found, "real_pictures": len(real)}
        for name, judged in (("recognised_real", real), ("recognised_reconstructions", copies)):
            numbers[name] = recognised(config, judged, held_out.labels[some], model.classes)
        print(f"{len(x)} samples: {found:.1%} read as their class (held-out pictures {numbers['recognised_real']:.1%}, "
              f"their reconstructions {numbers['recognised_reconstructions']:.1%}, n = {len(real)})")
    write_text(folder / "numbers.json", json.dumps(numbers, indent=1) + "\n")
    print(f"done: {folder}")


def recognised(config, x, label, classes):
    """The share of pictures x [n, C, H, W] that the project's reader takes for their class; None without one."""
    if config.data == "mnist" and x.shape[1:] == (1, 28, 28):
        _, probabilities = digits.read_all(digits.load_digit_reader(), x)
        return float((probabilities.argmax(1) == label).double().mean())  # "not a digit" is wrong, too
    if config.data in ("worlds", "woven"):
        names = classifier.read_all(classifier.load_reader(), x).names()
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
    place = {"resume": str(folder), "out": ""} if config.resume and folder.exists() else {"resume": "", "out": str(folder)}
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
    """Raises UserError for every flag whose value alone is wrong, before anything is read or written."""
    check(processes() == 1, "the codebook follows the pictures of one process; expected "
          "python, not torchrun")
    check(0 < config.decay < 1, f"--decay is {config.decay}; expected a number between 0 and 1, such as 0.99")
    for name, least in dict(gpt_steps=1, gpt_batch=1, samples=1, temperature=0, top_k=0, perceptual=0, adversarial=0,
                            disc_channels=8).items():
        check(getattr(config, name) >= least, f"--{name} is {getattr(config, name)}; expected {least} or more")
    check(config.gpt_lr > 0, f"--gpt_lr is {config.gpt_lr}; expected a number above 0, such as 3e-3")
    for name in ("disc_start", "adversarial_start"):
        check(0 <= getattr(config, name) <= 1, f"--{name} is {getattr(config, name)}; expected a share from 0 to 1")
    check(not config.adversarial or config.disc_start <= config.adversarial_start,
          f"--adversarial_start {config.adversarial_start} is before --disc_start {config.disc_start}; expected the "
          "discriminator to learn before it is heard")
    check(config.disc_channels % 8 == 0, f"--disc_channels is {config.disc_channels}; expected a multiple of 8")
    least, why = (4, "codes stand for") if config.autoencoder else least_side(config)
    check(config.size == 0 or (config.size >= least and config.size % 4 == 0), f"--size is {config.size}; expected a "
          f"multiple of 4 from {least} ({why} that), or 0 (the pictures' own)")
    sizes(config, 1)
    gpt_sizes(config, 1, 1, ())


if __name__ == "__main__":
    main()
