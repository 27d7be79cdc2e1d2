"""The smallest run there is: one linear layer, for tests of what every training stands on."""

from dataclasses import dataclass

import torch

from nanodiff.training.run import EMA, Run, RunConfig


@dataclass
class Small(RunConfig):
    width: int = 3  # of the layer
    share: float = 0.5  # of 100 % of something
    name: str = "plain"  # a word
    loud: bool = False  # whether to shout


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
        for micro in range(run.config.accumulate):
            x = torch.randn(run.config.batch, 3)  # the global generator: its state must be in the checkpoint
            run.backward(net(x).square().mean(), torch.arange(run.config.batch))
        run.update(net, optimiser, ema)
        run.log(step)
