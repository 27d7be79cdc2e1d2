"""The smallest run there is: one linear layer, for tests of what every training stands on."""

from dataclasses import dataclass

import torch

from nanodiff.training.run import Run, RunConfig
from nanodiff.training.step import EMA, learning_rate


@dataclass
class Small(RunConfig):
    width: int = 3  # of the layer


def make(tmp_path, **changes):
    """A run with a tracked linear layer, its EMA and optimiser; draws on every global generator as it goes."""
    config = Small(out=str(tmp_path / "run"), **{"steps": 6, "warmup": 0, "log_every": 1, "checkpoint_every": 2,
                                                 "device": "cpu", **changes})
    if changes.get("resume"):
        config.out = ""
    run = Run(config, "small")
    net = torch.nn.Linear(3, 2)
    ema = EMA(net, 0.9)
    optimiser = torch.optim.Adam(net.parameters(), lr=config.lr)
    run.track(net=net, ema=ema, optimiser=optimiser)
    return run, net, ema, optimiser


def go(run, net, ema, optimiser):
    for step in run.steps():
        lr = learning_rate(step, run.config)
        for micro in run.micro_batches():
            x = torch.randn(run.config.batch, 3)  # the global generator: its state must be in the checkpoint
            run.backward(net(x).square().mean(), torch.arange(run.config.batch))
        run.update(net, optimiser, lr)
        ema.update(net)
        run.log(step, lr)
