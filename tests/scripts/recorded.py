"""A training of one step, recorded: what the first losses that are computed by hand are compared with."""

import contextlib
import copy
import json
from unittest import mock

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import tiny_runs
from nanodiff.diffusion import process
from nanodiff.pipelines.stable_diffusion import StableDiffusion
from nanodiff.training.run import Run

SEED = tiny_runs.EVERY["seed"]
STILL = 1e-30  # a learning rate that moves no float32 weight: the networks answer afterwards as in the first step


class Recorded:
    """parts: what the run tracked, one dict for each stage; gradients: {parameter: gradient} at each optimiser step,
    and in optimisers whose; log: the lines of log.jsonl, stages one after the other; result: what main returned."""

    def __init__(self):
        self.parts, self.gradients, self.optimisers, self.log, self.result = [], [], [], [], None

    def __getattr__(self, name):  # found.net, found.disc, ... of the only stage
        return self.parts[0][name]

    def mean(self, key):
        """A number of the log's only line that has it."""
        value, = [row[key] for row in self.log if key in row]
        return value


def record(script, places, out, **changes):
    """Trains one tiny step and returns the Recorded; weights are as before that step, and learn gradients again.

    What the run tracks is moved a little before its first step: a fresh network may answer 0 whatever it is asked.
    """
    found, before = Recorded(), []
    plain_track = Run.track

    def track(self, **parts):
        plain_track(self, **parts)
        move([part for name, part in parts.items() if isinstance(part, torch.nn.Module)])
        found.parts.append(parts)
        before.append({name: copy.deepcopy(part.state_dict()) for name, part in parts.items()
                       if isinstance(part, torch.nn.Module)})

    def step(optimiser, args, kwargs):
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        found.gradients.append({p: p.grad.detach().clone() for p in parameters if p.grad is not None})
        found.optimisers.append(optimiser)

    flags = {"steps": 1, "lr": STILL, "clip": 0, "warmup": 0, "checkpoint_every": 1000, **changes}
    handle = register_optimizer_step_pre_hook(step)
    # what is drawn and measured on the way is no part of the loss, and takes most of the time
    with (mock.patch.object(Run, "track", track), mock.patch.object(StableDiffusion, "generate", blank),
          mock.patch.object(process, "loss_by_time", lambda *args, **options: (0.0, [0.0] * 4)),
          contextlib.redirect_stdout(None)):
        try:
            found.result = tiny_runs.module(script).main(tiny_runs.words(script, places, out, **flags))
        finally:
            handle.remove()
    for log in sorted(out.rglob("log.jsonl")):
        found.log += [json.loads(line) for line in log.read_text().splitlines()]
    for parts, weights in zip(found.parts, before):
        for name, state in weights.items():
            parts[name].load_state_dict(state)
            if isinstance(parts[name], torch.nn.Module):
                parts[name].train()
    for gradient in found.gradients:
        for parameter in gradient:
            parameter.requires_grad_(True)
    return found


@torch.no_grad()
def move(nets, by=0.05):
    """Adds noise to all parameters that learn."""
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for net in nets for p in net.parameters()):
        parameter.add_(by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def blank(sd, prompt, height=None, width=None, **options):
    """Grey pictures in place of drawn ones."""
    side = sd.settings["unet"]["sample_size"] * sd.factor
    return torch.zeros(len(prompt), 3, height or side, width or side)


def agree(found, loss, logged="loss", step=0, rtol=1e-4):
    """Asserts that the log's number is this loss, and the gradient of an optimiser step (None: of none) this loss's."""
    value = found.mean(logged)
    assert abs(value - float(loss)) <= 2e-5 * abs(value) + 1e-7, f"{logged} is {value}, by hand {float(loss)}"
    if step is not None:
        agree_gradient(found, loss, step, rtol)


def agree_gradient(found, loss, step=0, rtol=1e-4):
    """Asserts that the gradients of an optimiser step are those of this loss."""
    gradient = found.gradients[step]
    assert gradient, "the optimiser was given no gradients"
    by_hand = torch.autograd.grad(loss, list(gradient), retain_graph=True, allow_unused=True)
    assert any(one is not None and one.any() for one in by_hand), "the loss by hand has no gradient"
    largest = max(float(one.abs().max()) for one in gradient.values())
    for (parameter, seen), one in zip(gradient.items(), by_hand):
        one = torch.zeros_like(seen) if one is None else one
        difference = float((seen - one).abs().max())
        assert difference <= rtol * float(seen.abs().max()) + 1e-5 * largest, (
            f"a gradient {list(seen.shape)} differs by {difference} of at most {float(seen.abs().max())}")
