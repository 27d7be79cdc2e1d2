"""CLIP in the small: a text transformer learns to say what a picture shows (Radford et al. 2021; report section 4.1).

    python train_clip.py                               the text encoder that ships, from drawn pictures and captions
    python train_clip.py --width 96 --layers 2         a smaller one
    python train_clip.py --resume runs/clip-001        goes on exactly where the run was stopped

A caption and its picture are brought to the same place, and away from the other pairs of the batch: InfoNCE in both
directions. The picture's side is the project's classifier, frozen, and one linear layer. What Stable Diffusion takes
from CLIP is the text side alone: model/text_encoder and model/tokenizer, for train_ldm.py --text.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff import fast, plots, worlds
from nanodiff.classifiers.worlds import classify, load_classifier
from nanodiff.data import captions
from nanodiff.errors import check
from nanodiff.flags import AtLeast, BelowOne, Count, NotNegative, Positive, entry, parse, resumed
from nanodiff.formats.stable_diffusion_folder import save_text_encoder
from nanodiff.models.clip_text import ClipText, ClipTextConfig, Tokenizer
from nanodiff.training.batches import Batches
from nanodiff.training.run import MAY_CHANGE, Run, RunConfig
from nanodiff.training.step import EMA, learning_rate


@dataclass
class Config(RunConfig):
    pictures: Count = 20_000  # drawn pictures
    variants: Count = 6  # captions of each, in other words
    width: Count = 96  # of the text states
    layers: Count = 3  # layers of the text transformer
    heads: Count = 3  # attention heads of each
    steps: Count = 1500  # optimiser steps in all
    batch: Annotated[int, AtLeast(2)] = 192  # pairs of one micro-batch, over all processes
    lr: Positive = 2e-3  # peak learning rate
    weight_decay: NotNegative = 0.05  # of AdamW
    ema: BelowOne = 0.99  # decay of the averaged weights, which are what is saved
    preview_every: Count = 250  # steps between looks at held-out pairs
    checkpoint_every: Count = 500  # steps between checkpoints


class Clip(nn.Module):
    """The two towers: token ids [B, 77] and the classifier's features [B, 128] to unit vectors [B, width]."""

    def __init__(self, text, features, generator=None):
        super().__init__()
        self.text = text
        self.text_projection, self.image_projection = (nn.Linear(n, text.config.width, bias=False)
                                                       for n in (text.config.width, features))
        for layer in (self.text_projection, self.image_projection):
            nn.init.normal_(layer.weight, 0, layer.in_features**-0.5, generator=generator)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start; its logits are never above 100

    def forward(self, ids, features, gather=lambda vectors: vectors):
        """Logits [B, B]: how well text i fits picture j. gather: puts the vectors of all processes together."""
        # No token attends to what follows it, so what follows the batch's last end token is left out.
        longest = int((ids == self.text.config.eos_id).int().argmax(1).max()) + 1
        text = F.normalize(self.text_projection(self.text(ids[:, :longest])[1]), dim=1)
        image = F.normalize(self.image_projection(features), dim=1)
        return gather(self.scale.clamp(max=math.log(100)).exp() * text) @ gather(image).T


def info_nce(logits):
    """Which of B pictures belongs to each text, and which text to each picture: mean cross-entropy of both, in nats.

    logits [B, B], text i's picture is i. log B where all are equal. Source: Radford et al. 2021, figure 3.
    """
    pair = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2


class Pairs:
    """Captions, by their token ids [N, V, 77], and the classifier's features [N, 128] of N drawn pictures.

    A data set whose pictures are the draws of `Batches`, which choose a caption.
    """

    def __init__(self, drawn, variants, tokenizer, classifier):
        self.features = classify(classifier, drawn.pixels).features
        self.features = self.features / self.features.std()
        texts = [captions.caption(scene, v) for scene in drawn.scenes for v in range(variants)]
        self.ids = tokenizer(texts).view(len(drawn), variants, -1)
        self.labels, self.shape, self.in_memory = drawn.labels, (1,), True

    def __len__(self):
        return len(self.features)

    def read(self, index, draw):
        return draw


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "clip", MAY_CHANGE)
    check(config.pictures >= config.batch, f"--pictures is {config.pictures}; expected --batch {config.batch} or more")
    sizes = ClipTextConfig(width=config.width, layers=config.layers, heads=config.heads, mlp=4 * config.width)
    run = Run(config, "clip")
    tokenizer, classifier = Tokenizer.shipped(), load_classifier()
    print("drawing the pictures: about a minute", flush=True)
    training, held_out = (
        Pairs(worlds.load(split, 64, n, workers=max(1, config.workers), seed=config.seed), config.variants, tokenizer,
              classifier) for split, n in (("train", config.pictures), ("val", max(100, config.pictures // 20))))

    batches = Batches(training, config.batch, config.seed, config.gradient_accumulation, run.rank, run.world)
    generator = torch.Generator().manual_seed(config.seed)
    net = Clip(ClipText(sizes, generator), training.features.shape[1], generator).to(run.device).train()
    ema = EMA(net, config.ema)
    fast.speed_up(net)
    optimiser = torch.optim.AdamW(net.parameters(), config.lr, (0.9, 0.98), weight_decay=config.weight_decay,
                                  fused=True)
    run.track(net=net, ema=ema, optimiser=optimiser)
    ddp_net = run.ddp(net)
    run.print(f"{sum(p.numel() for p in net.text.parameters()):,} parameters in the text encoder, "
              f"{training.ids.shape[0] * training.ids.shape[1]:,} pairs")

    for step in run.steps():
        lr = learning_rate(step, config)
        if run.due(config.preview_every):
            preview(run, ema.net, tokenizer, held_out)
        for micro in run.micro_batches():
            draw, index, _ = batches.get(step, micro)
            ids = training.ids[index, draw % config.variants].to(run.device)
            with run.autocast():
                logits = ddp_net(ids, training.features[index].to(run.device), run.gather).float()
            run.backward(info_nce(logits), index)
        run.update(net, optimiser, lr)
        ema.update(net)
        run.log(step, lr)

    if run.rank == 0 and run.finished:
        preview(run, ema.net, tokenizer, held_out)
        run.print(f"done: {run.folder}")


@torch.no_grad()
def preview(run, net, tokenizer, held_out, size=100):
    """Saves the model; of held-out captions, how often the right one of 100 pictures, and its class, is found."""
    if run.rank != 0:
        return
    save_text_encoder(net.text, tokenizer, run.folder / "model")
    right = {"pair": [], "class": []}
    for index in torch.arange(len(held_out)).split(size):
        best = net(held_out.ids[index, 0].to(run.device), held_out.features[index].to(run.device)).argmax(1).cpu()
        right["pair"].append(best == torch.arange(len(index)))
        right["class"].append(held_out.labels[index][best] == held_out.labels[index])
    pair, same = (float(torch.cat(hits).double().mean()) for hits in right.values())
    run.record(step=run.step, pair=pair, same_class=same)
    run.print(f"step {run.step}  a held-out caption finds its own picture among {size} in {pair:.1%}, one of its class "
              f"in {same:.1%}")
    lines = {"training loss": run.history("loss"), "own picture found": run.history("pair"),
             "its class found": run.history("same_class")}
    plots.save(plots.curves(lines, "CLIP", "step"), run.path("curves.png"))


if __name__ == "__main__":
    main()
