"""What every training needs and no paper describes: flags, a run folder, checkpoints, exact resume, EMA, the log.

A script owns its loop; this module is called from it:

    run = Run(config, "ddpm")                          # the folder, device and precision
    run.track(net=net, ema=ema, optimiser=optimiser)   # what a checkpoint holds; restored here on --resume
    for step in run.steps():                           # saves, and stops cleanly on SIGTERM or Ctrl-C
        for micro in range(config.accumulate):
            loss = ...
            run.backward(loss, index)
        run.update(net, optimiser, ema)
        run.log(step)

Resume is exact because nothing random has a history: batches, crops and noise are functions of (seed, step, sample);
what torch keeps (weights, EMA, optimiser, scaler, generators) is in the checkpoint.
"""

import contextlib
import copy
import dataclasses
import json
import math
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nanodiff.errors import Diverged, UserError, check
from nanodiff.files import write_text
from nanodiff.rng import seed_of
from nanodiff.training.checkpoint import (all_finite, checkpoints, last_checkpoint, load_checkpoint, random_state,
                                          save_checkpoint, set_random_state)
from nanodiff.training.distributed import (any_process, average_gradients, join_processes, memory, peak_memory,
                                           pick_device, precision_of)


@dataclass
class RunConfig:
    """Flags that every training script has; a script's own dataclass adds to them and may change the defaults."""

    out: str = ""  # run folder; by default the next free runs/NAME-001, -002, ...
    resume: str = ""  # folder of a run to continue exactly where its last checkpoint stands
    steps: int = 1000  # optimiser steps in all
    stop: int = 0  # end this call after so many steps in all, saved, to be resumed (0: at --steps)
    batch: int = 64  # pictures a micro-batch and process
    accumulate: int = 1  # micro-batches summed into one optimiser step
    lr: float = 2e-4  # peak learning rate
    warmup: int = 100  # optimiser steps of linear learning-rate warm-up
    lr_end: float = 0.0  # last learning rate as a share of the peak, reached along a cosine (1: constant)
    clip: float = 1.0  # largest gradient norm (0: no clipping)
    ema: float = 0.999  # decay of the averaged weights, warmed up as (1 + n) / (10 + n) (0: no averaging)
    seed: int = 0  # of initial weights, data order, crops and noise
    device: str = "auto"  # cpu, cuda or cuda:1; auto takes a GPU when there is one
    precision: str = "fp32"  # fp32, or autocast to bf16 or fp16 (fp16 on CUDA alone)
    tf32: bool = True  # let CUDA multiply float32 matrices in TF32
    workers: int = 2  # batches of picture files read ahead
    log_every: int = 50  # steps between progress lines
    preview_every: int = 500  # steps between pictures from fixed noise
    checkpoint_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept


# On resume these may differ from the saved run; any other change would make another training of it.
MAY_CHANGE = {"resume", "stop", "device", "workers", "log_every", "checkpoint_every", "keep"}


class Run:
    """One training run: its folder, its clock and its state. See the module's first lines for how it is used.

    Under `torchrun` every process makes one; gradients are averaged over them and only rank 0 writes.
    """

    def __init__(self, config, name):
        """Checks the common flags and takes the device; raises UserError, writes nothing yet (`track` does)."""
        self.config, self.name = config, name
        for field, least in dict(steps=1, batch=1, accumulate=1, keep=1, log_every=1, preview_every=1,
                                 checkpoint_every=1, warmup=0, stop=0, workers=0, clip=0, lr_end=0).items():
            check(getattr(config, field) >= least, f"--{field} is {getattr(config, field)}; expected {least} or more")
        check(config.lr > 0, f"--lr is {config.lr}; expected a number above 0, such as 2e-4")
        check(0 <= config.ema < 1, f"--ema is {config.ema}; expected 0 <= decay < 1, such as 0.999")
        self.device = pick_device(config.device)
        self.dtype = precision_of(config.precision, self.device)
        self.rank, self.world = join_processes(self.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
        self.scaler = torch.amp.GradScaler(enabled=self.dtype == torch.float16)
        torch.manual_seed(config.seed)
        np.random.seed(config.seed % 2**32)
        random.seed(config.seed)

        self.step, self.stopped, self._tracked = 0, False, {}
        self._loss, self._seen, self._before, self._started, self._clock = [], [], [], time.time(), (time.time(), 0)
        self._noted = {}
        self._aside, self.prepared, self.lr = 0.0, 0.0, 0.0  # lr: of the last update
        new = [free_folder(config.out, name) if self.rank == 0 and not config.resume else None]
        if self.world > 1:  # rank 0 alone looks and writes
            torch.distributed.broadcast_object_list(new, 0)
        self.folder = Path(config.resume) if config.resume else new[0]

    def print(self, text):
        """One line on stdout, from rank 0 alone."""
        if self.rank == 0:
            print(text, flush=True)

    def path(self, name):
        """A file's path in the run folder; its parent is made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def seconds(self):
        """Seconds of this call's loop so far, without what was done `aside`."""
        return time.time() - self._clock[0] - self._aside

    @contextlib.contextmanager
    def aside(self):
        """What is done within is no part of the training, such as pictures on the way: `seconds` leaves it out."""
        started = time.time()
        yield
        self._aside += time.time() - started

    def wait(self):
        """Until all processes are here."""
        if self.world > 1:
            torch.distributed.barrier()

    def any(self, flag):
        """Whether any process says so."""
        return any_process(flag, self.device, self.world)

    def peak_memory(self):
        """The most memory used so far, in bytes: the GPU's on CUDA, else this process's."""
        return peak_memory(self.device)

    @property
    def finished(self):
        """True when all --steps are done (not after an interrupt or --stop)."""
        return self.step >= self.config.steps

    # --- state ------------------------------------------------------------------------------------------------------

    def open(self):
        """Makes a new run's folder and its config.json, once: from now on it can be resumed."""
        if self.rank == 0 and not (self.folder / "config.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "config.json",
                       json.dumps({"script": self.name, **dataclasses.asdict(self.config)}, indent=1) + "\n")

    def track(self, **parts):
        """Names all whose state_dict a checkpoint must hold; opens the folder, or resumes its last checkpoint. A run that
        ended before its first one begins again."""
        self._tracked = {name: part for name, part in parts.items() if part is not None}
        for part in self._tracked.values():  # all processes start from rank 0's weights
            if self.world > 1 and isinstance(part, torch.nn.Module):
                for tensor in part.state_dict().values():
                    torch.distributed.broadcast(tensor, 0)
        self.open()
        self.print(f"{self.name}: {self.folder}  on {self.device}, {self.config.precision}"
                   + (f", {self.world} processes" if self.world > 1 else ""))
        if self.config.resume and checkpoints(self.folder):
            self._load(last_checkpoint(self.folder))
        elif self.config.resume:
            self.print(f"{self.folder} holds no checkpoint yet: it begins again")
            self._cut_log()

    def save(self):
        """Writes checkpoints/STEP whole or not at all; raises Diverged rather than save a weight that is not finite."""
        if self.rank != 0:
            return
        parts = {name: part.state_dict() for name, part in self._tracked.items()}
        for name, state in parts.items():
            if not all_finite(state):
                raise Diverged(f"{name} holds numbers that are not finite after step {self.step}: lower --lr")
        parts["run"] = {"step": self.step, "world": self.world, "scaler": self.scaler.state_dict(),
                        "random": random_state(), "loss": self._loss, "noted": self._noted,
                        "parts": sorted(self._tracked)}
        save_checkpoint(self.folder, self.step, parts, self.config.keep)

    def _load(self, folder):
        state = load_checkpoint(folder)
        if missing := set(self._tracked) ^ set(state["run"]["parts"]):
            raise UserError(f"{folder} and this run differ in {', '.join(sorted(missing))}; "
                            "expected a checkpoint of the same script and flags")
        check(state["run"]["world"] == self.world, f"{folder} was made by {state['run']['world']} processes, and "
              f"{self.world} would draw other batches; expected torchrun --nproc_per_node={state['run']['world']}")
        for name, part in self._tracked.items():
            part.load_state_dict(state[name])
        self.step, self._loss = state["run"]["step"], state["run"]["loss"]
        self._noted = state["run"].get("noted", {})  # older checkpoints hold none
        self.scaler.load_state_dict(state["run"]["scaler"])
        set_random_state(state["run"]["random"])
        if self.rank == 0:
            self._cut_log()
        self.print(f"resumed at step {self.step} from {folder}")

    def _cut_log(self):
        """Drops what was logged after the checkpoint by a process that was then killed, half a line included."""
        log = self.folder / "log.jsonl"
        kept = []
        for line in log.read_text().splitlines() if log.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                # the validation at this very step is made again
                if row["step"] < self.step or (row["step"] == self.step and "loss" in row):
                    kept.append(line + "\n")
        write_text(log, "".join(kept))

    # --- the loop ---------------------------------------------------------------------------------------------------

    def steps(self):
        """Yields the number of each optimiser step from where the run stands (0 ... steps-1).

        After each: a checkpoint when one is due; on SIGTERM, SIGINT or --stop a last one, and the loop ends.
        """
        last = min(self.config.steps, self.config.stop or self.config.steps)
        with self._signals():
            self._clock, self._aside = (time.time(), self.step), 0.0
            self.prepared = time.time() - self._started  # seconds of this call before the loop
            while self.step < last and not self.stopped:
                # dropout draws from torch's own generator: its numbers, too, depend on (seed, step, process) alone
                # (and torch.manual_seed would take a third of a millisecond to ask for every kind of device)
                seed = torch.manual_seed if self.device.type == "cuda" else torch.default_generator.manual_seed
                seed(seed_of(self.config.seed, self.step, self.rank))
                yield self.step
                self.step += 1
                self.stopped = self.any(self.stopped)
                if self.step % self.config.checkpoint_every == 0 or self.step == last or self.stopped:
                    self.save()
        if not self.finished:
            self.print(f"stopped at step {self.step} of {self.config.steps}; go on with --resume {self.folder}")

    def autocast(self):
        """Context in which the network runs in --precision (weights stay float32)."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def backward(self, loss, index):
        """Adds the gradient of this micro-batch's mean loss; `index` names its samples should the loss be NaN."""
        value = float(loss.detach())  # the step's one wait for the device: a NaN must not reach the weights
        if not math.isfinite(value):
            before = f" or, of the step before, {self._before}" if self._before else ""
            raise Diverged(f"the loss is {value} at step {self.step}, samples {index.tolist()}{before}: lower --lr, or "
                           "look at them")
        self._loss.append(value)
        self._seen += index.tolist()
        self.scaler.scale(loss / self.config.accumulate if self.config.accumulate > 1 else loss).backward()

    def update(self, net, optimiser, ema=None, lr=None, stage=None):
        """One optimiser step from the gradients so far: averaged over processes, clipped, checked; then the EMA.

        lr: the peak learning rate, where it is not --lr. A parameter group's "times", if it has one, multiplies it.
        stage: (first, last) steps of a part of the training that has a warm-up and a cosine of its own.
        """
        average_gradients(net.parameters(), self.world)
        self.scaler.unscale_(optimiser)
        # Without clipping the norm is a pass over all gradients for this check alone: it is left to the next loss, but
        # where the weights are saved or drawn before there is one.
        if self.config.clip or self._looked_at(self.step + 1):
            norm = get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
            if self.config.clip:
                clip_grads_with_norm_(net.parameters(), self.config.clip, norm)
            norm = float(norm)
            if not math.isfinite(norm) and not self.scaler.is_enabled():  # the fp16 scaler skips such a step by itself
                raise Diverged(f"the gradient norm is {norm} at step {self.step}, samples {self._seen}: lower --lr, or "
                               "look at them")
            self._before, self._seen = [], []
        else:
            self._before, self._seen = self._seen, []
        self.lr = learning_rate(self.step, self.config, stage) * (1 if lr is None else lr / self.config.lr)
        for group in optimiser.param_groups:
            group["lr"] = self.lr * group.get("times", 1)
        self.scaler.step(optimiser)
        self.scaler.update()
        optimiser.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(net)

    def _looked_at(self, step):
        """True when the weights that `step` begins with are saved or drawn before they give a loss."""
        config = self.config
        return (step % config.preview_every == 0 or step % config.checkpoint_every == 0
                or step in (config.steps, config.stop))

    def due(self, every):
        """True at steps 0, every, 2 every, ... of the loop."""
        return self.step % every == 0

    def note(self, **values):
        """Numbers of this step whose means since the last progress line go into the next, beside the loss."""
        for name, value in values.items():
            self._noted.setdefault(name, []).append(float(value))

    def log(self, step, **values):
        """Every --log_every steps a progress line, and a line of log.jsonl with the mean loss since the last one."""
        if (step + 1) % self.config.log_every and step + 1 != self.config.steps:
            return
        mean = torch.tensor(sum(self._loss) / len(self._loss), dtype=torch.float64)
        if self.world > 1:
            mean = mean.to(self.device if self.device.type == "cuda" else "cpu")
            torch.distributed.all_reduce(mean)
        row = {"step": step + 1, "loss": float(mean) / self.world, "lr": self.lr, **values}
        row |= {name: sum(noted) / len(noted) for name, noted in self._noted.items()}
        self._loss, self._noted = [], {}
        seconds, done = time.time() - self._clock[0], step + 1 - self._clock[1]
        pictures = done * self.config.batch * self.config.accumulate * self.world / seconds
        left = (self.config.steps - step - 1) * seconds / done
        self.record(**row, seconds=round(time.time() - self._started, 3), images_per_second=round(pictures, 1))
        self.print(f"step {step + 1}/{self.config.steps}  loss {row['loss']:.4f}  {pictures:.0f} img/s  "
                   f"ETA {int(left) // 60}:{int(left) % 60:02d}  {memory(self.device)}")

    def record(self, **row):
        """Appends one JSON object to log.jsonl."""
        if self.rank == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def history(self, key):
        """The pairs (steps, values) of `key` in log.jsonl, for a curve."""
        log = self.folder / "log.jsonl"
        rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        rows = [row for row in rows if key in row]
        return [row["step"] for row in rows], [row[key] for row in rows]

    @contextlib.contextmanager
    def _signals(self):
        """While the loop runs, SIGTERM and SIGINT ask it to end after the step; a second one ends the process."""
        def ask(number, frame):
            self.stopped = True
            signal.signal(number, before[number])
        before = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, ask)
        except ValueError:  # not in the main thread: signals go elsewhere
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# --- weights that move ----------------------------------------------------------------------------------------------

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


def learning_rate(step, config, stage=None):
    """The rate of optimiser step `step` (0-based): linear warm-up to lr, then a cosine that ends at lr * lr_end; over all
    steps, or over those of a stage (first, last)."""
    first, last = stage or (0, config.steps)
    if step - first < config.warmup:
        return config.lr * (step - first + 1) / config.warmup
    share = (step - first - config.warmup) / max(1, last - first - 1 - config.warmup)
    return config.lr * (config.lr_end + (1 - config.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, share))))


def free_folder(out, name):
    """The folder that --out names, which must be new or empty, or the next free runs/NAME-001, -002, ..."""
    if out:
        folder = Path(out)
        check(not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
              f"--out {out} exists and is not empty; expected a new folder, or --resume {out} to continue that run")
        return folder
    number = 1
    while Path(f"runs/{name}-{number:03d}").exists():
        number += 1
    return Path(f"runs/{name}-{number:03d}")
