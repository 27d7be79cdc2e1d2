"""CLIP in the small: a text transformer learns to say what a picture shows (Radford et al. 2021; report section 4.1).

    python train_clip.py                               the text encoder that ships, from drawn pictures and captions
    python train_clip.py --width 96 --layers 2         a smaller one
    python train_clip.py --resume runs/clip-001        goes on exactly where the run was stopped

A caption and its picture are brought to the same place, and away from the other pairs of the batch: InfoNCE in both
directions. The picture's side is the project's reader, frozen, and one linear layer. What Stable Diffusion takes from
CLIP is the text side alone: model/text_encoder and model/tokenizer, for train_ldm.py --text.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff import fast, plots, worlds
from nanodiff.classifiers.worlds import load_reader, read_all
from nanodiff.data import captions
from nanodiff.errors import check
from nanodiff.flags import entry, parse, resumed
from nanodiff.formats.stable_diffusion_folder import save_text_encoder
from nanodiff.models.clip_text import ClipText, ClipTextConfig, Tokenizer
from nanodiff.training.batches import Batches
from nanodiff.training.run import EMA, MAY_CHANGE, Run, RunConfig


@dataclass
class Config(RunConfig):
    pictures: int = 20_000  # drawn pictures
    variants: int = 6  # captions of each, in other words
    width: int = 96  # of the text states
    layers: int = 3  # layers of the text transformer
    heads: int = 3  # attention heads of each
    steps: int = 1500  # optimiser steps in all
    batch: int = 192  # pairs a step
    lr: float = 2e-3  # peak learning rate
    decay: float = 0.05  # weight decay
    ema: float = 0.99  # decay of the averaged weights, which are what is saved
    preview_every: int = 250  # steps between looks at held-out pairs
    checkpoint_every: int = 500  # steps between checkpoints


class Clip(nn.Module):
    """The two towers: token ids [B, 77] and reader's features [B, 128] to unit vectors [B, width]."""

    def __init__(self, text, features, generator=None):
        super().__init__()
        self.text = text
        self.text_projection, self.image_projection = (nn.Linear(n, text.config.width, bias=False)
                                                       for n in (text.config.width, features))
        for layer in (self.text_projection, self.image_projection):
            nn.init.normal_(layer.weight, 0, layer.in_features**-0.5, generator=generator)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start; its logits are never above 100

    def forward(self, ids, features):
        """Logits [B, B]: how well text i fits picture j."""
        # What stands behind the last end token of the batch is seen by none before it: leaving it out changes nothing
        longest = int((ids == self.text.config.eos_id).int().argmax(1).max()) + 1
        text = F.normalize(self.text_projection(self.text(ids[:, :longest])[1]), dim=1)
        image = F.normalize(self.image_projection(features), dim=1)
        return self.scale.clamp(max=math.log(100)).exp() * text @ image.T


def info_nce(logits):
    """Which of B pictures belongs to each text, and which text to each picture: mean cross-entropy of both, in nats.

    logits [B, B], text i's picture is i. log B where all are equal. Source: Radford et al. 2021, figure 3.
    """
    pair = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2


class Pairs:
    """Captions, by their token ids [N, V, 77], and reader's features [N, 128] of N pictures; a data set of places."""

    def __init__(self, found, variants, tokenizer, reader):
        self.features = read_all(reader, found.pixels).features
        self.features = self.features / self.features.std()
        texts = [captions.caption(scene, v) for scene in found.scenes for v in range(variants)]
        self.ids = tokenizer(texts).view(len(found), variants, -1)
        self.labels, self.shape, self.in_memory = found.labels, (1,), True

    def __len__(self):
        return len(self.features)

    def read(self, index, draw):
        return draw


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "clip", MAY_CHANGE)
    for name, least in dict(pictures=config.batch, variants=1, width=1, layers=1, heads=1, decay=0, batch=2).items():
        check(getattr(config, name) >= least, f"--{name} is {getattr(config, name)}; expected {least} or more")
    sizes = ClipTextConfig(width=config.width, layers=config.layers, heads=config.heads, mlp=4 * config.width)
    run = Run(config, "clip")
    tokenizer, reader = Tokenizer.shipped(), load_reader()
    print("drawing the pictures: about a minute", flush=True)
    drawn = (worlds.load(split, 64, n, workers=max(1, config.workers), seed=config.seed)
             for split, n in (("train", config.pictures), ("val", max(100, config.pictures // 20))))
    training, held_out = (Pairs(found, config.variants, tokenizer, reader) for found in drawn)

    batches = Batches(training, config.batch, config.seed, config.accumulate, run.rank, run.world)
    generator = torch.Generator().manual_seed(config.seed)
    net = Clip(ClipText(sizes, generator), training.features.shape[1], generator).to(run.device).train()
    ema = EMA(net, config.ema)
    fast.speed_up(net)
    optimiser = torch.optim.AdamW(net.parameters(), config.lr, (0.9, 0.98), weight_decay=config.decay, fused=True)
    run.track(net=net, ema=ema, optimiser=optimiser)
    run.print(f"{sum(p.numel() for p in net.text.parameters()):,} parameters in the text encoder, "
              f"{training.ids.shape[0] * training.ids.shape[1]:,} pairs")

    for step in run.steps():
        if run.due(config.preview_every):
            preview(run, ema.net, tokenizer, held_out)
        for micro in range(config.accumulate):
            draw, index, _ = batches.get(step, micro)
            ids = training.ids[index, draw % config.variants].to(run.device)
            with run.autocast():
                logits = net(ids, training.features[index].to(run.device)).float()
            run.backward(info_nce(logits), index)
        run.update(net, optimiser, ema)
        run.log(step)

    if run.rank == 0 and run.finished:
        preview(run, ema.net, tokenizer, held_out)
        run.print(f"done: {run.folder}")


@torch.no_grad()
def preview(run, net, tokenizer, held_out, size=100):
    """Saves the model; of held-out captions, how often the right one of 100 pictures, and its class, is found."""
    if run.rank != 0:
        return
    save_text_encoder(net.text, tokenizer, run.folder / "model")
    places, right = torch.arange(len(held_out)), {"pair": [], "class": []}
    for some in places.split(size):
        found = net(held_out.ids[some, 0].to(run.device), held_out.features[some].to(run.device)).argmax(1).cpu()
        right["pair"].append(found == torch.arange(len(some)))
        right["class"].append(held_out.labels[some][found] == held_out.labels[some])
    pair, same = (float(torch.cat(one).double().mean()) for one in right.values())
    run.record(step=run.step, pair=pair, same_class=same)
    run.print(f"step {run.step}  a held-out caption finds its own picture among {size} in {pair:.1%}, one of its class "
              f"in {same:.1%}")
    lines = {"training loss": run.history("loss"), "own picture found": run.history("pair"),
             "its class found": run.history("same_class")}
    plots.save(plots.curves(lines, "CLIP", "step"), run.path("curves.png"))


if __name__ == "__main__":
    main()
