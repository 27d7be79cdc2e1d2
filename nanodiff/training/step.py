"""The arithmetic of a training step beside the gradient: the learning rate, and the averaged weights."""

import copy
import math

import torch


def learning_rate(step, config, stage=None):
    """The learning rate of optimiser step `step` (0-based): linear warm-up to lr, then a cosine to lr * lr_end.

    Over all steps, or over those of a stage (first, last).
    """
    first, last = stage or (0, config.steps)
    if step - first < config.warmup:
        return config.lr * (step - first + 1) / config.warmup
    share = (step - first - config.warmup) / max(1, last - first - 1 - config.warmup)
    return config.lr * (config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


class EMA:
    """A float32 running average of a network's weights, kept as a second network `ema.net` in eval mode.

    The decay warms up as (1 + n) / (10 + n), so that a short run is not an average of its own start. Buffers are
    copied. Source: Ho et al. 2020, section 4; the warm-up is TensorFlow's ExponentialMovingAverage(num_updates).
    """

    def __init__(self, net, decay):
        self.net = copy.deepcopy(net).float().eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, net):
        """Moves the average one step towards `net`'s weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        ours, theirs = list(self.net.parameters()), [p.detach().float() for p in net.parameters()]
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for mine, other in zip(self.net.buffers(), net.buffers()):
            mine.copy_(other)

    def state_dict(self):
        return {"net": self.net.state_dict(), "updates": self.updates}

    def load_state_dict(self, state):
        self.net.load_state_dict(state["net"])
        self.updates = state["updates"]
