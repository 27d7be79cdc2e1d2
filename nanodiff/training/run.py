"""What every training needs and no paper describes: flags, a run folder, checkpoints, exact resume, processes, the log.

A script owns its loop; this module is called from it:

    run = Run(config, "ddpm")                          # the folder, device and precision
    ema = EMA(net, config.ema)                         # nanodiff.training.step has the arithmetic: learning_rate, EMA
    run.track(net=net, ema=ema, optimiser=optimiser)   # what a checkpoint holds; restored here on --resume
    ddp_net = run.ddp(net)                             # averages gradients over processes; in one process net itself
    for step in run.steps():                           # saves, and stops cleanly on SIGTERM or Ctrl-C
        lr = learning_rate(step, config)
        for micro in run.micro_batches():
            loss = ... ddp_net(x) ...
            run.backward(loss, index)
        run.update(net, optimiser, lr)                 # clips, checks, steps
        ema.update(net)
        run.log(step, lr)

Under torchrun --batch is divided among the processes, and their gradients are averaged. That is done by `run.ddp` for
the one module whose forward gives the loss its inputs, while `backward` runs. Where DistributedDataParallel cannot be
used (a loss that needs torch.autograd.grad), call run.average_gradients(net) before run.update in its place.

Resume is exact because nothing random has a history: batches, crops and noise are functions of (seed, step, sample);
what torch keeps (weights, EMA, optimiser, scaler, generators) is in the checkpoint.
"""

import contextlib
import dataclasses
import json
import math
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nanodiff.errors import Diverged, UserError, check
from nanodiff.files import write_text
from nanodiff.flags import Count, CountOrZero, NotNegative, Positive, check_values
from nanodiff.rng import seed_of
from nanodiff.training import distributed
from nanodiff.training.checkpoint import (all_finite, checkpoints, last_checkpoint, load_checkpoint, random_state,
                                          save_checkpoint, set_random_state)


@dataclass
class RunConfig:
    """Flags that every training script has; a script's own dataclass adds to them and may change the defaults."""

    out: str = ""  # run folder; by default the next free runs/NAME-001, -002, ...
    resume: str = ""  # folder of a run to continue exactly where its last checkpoint stands
    steps: Count = 1000  # optimiser steps in all
    stop: CountOrZero = 0  # end this call after so many steps in all, saved, to be resumed (0: at --steps)
    batch: Count = 64  # pictures of one micro-batch, over all processes
    gradient_accumulation: Count = 1  # micro-batches in one optimiser step
    lr: Positive = 2e-4  # peak learning rate
    warmup: CountOrZero = 100  # optimiser steps of linear learning-rate warm-up
    lr_end: NotNegative = 0.0  # last learning rate as a share of the peak, reached along a cosine (1: constant)
    clip: NotNegative = 1.0  # largest gradient norm (0: no clipping)
    seed: int = 0  # of initial weights, data order, crops and noise
    device: str = "auto"  # cpu, cuda or cuda:1; auto takes a GPU when there is one
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"  # autocast of the network (fp16 on CUDA alone)
    tf32: bool = True  # let CUDA multiply float32 matrices in TF32
    workers: CountOrZero = 2  # batches of picture files read ahead
    log_every: Count = 50  # steps between progress lines
    preview_every: Count = 500  # steps between pictures from fixed noise
    checkpoint_every: Count = 500  # steps between checkpoints
    keep: Count = 2  # checkpoints kept


# On resume these may differ from the saved run; any other change would make another training of it.
MAY_CHANGE = {"resume", "stop", "device", "workers", "log_every", "checkpoint_every", "keep"}


class Run:
    """One training run: its folder, its clock and its state. See the module's first lines for how it is used.

    Under `torchrun` every process makes one, and only rank 0 writes.
    """

    def __init__(self, config, name):
        """Checks the flags and takes the device; raises UserError, writes nothing yet (`track` does)."""
        self.config, self.name = config, name
        check_values(config)
        self.device = distributed.pick_device(config.device)
        self.dtype = distributed.autocast_dtype(config.mixed_precision, self.device)
        distributed.share_of(config.batch, distributed.processes())
        self.rank, self.world = distributed.join_processes(self.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
        self.scaler = torch.amp.GradScaler(enabled=self.dtype == torch.float16)
        torch.manual_seed(config.seed)
        np.random.seed(config.seed % 2**32)
        random.seed(config.seed)

        self.step, self.stopped, self._tracked, self._ddp = 0, False, {}, []
        self._loss, self._noted = [], {}  # since the last line of the log
        self._samples, self._samples_before = [], []  # of this step and of the one before, for an error's sentence
        self._started, self._clock = time.time(), (time.time(), 0)
        self._aside, self.prepared = 0.0, 0.0
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
        return distributed.any_process(flag, self.device, self.world)

    def peak_memory(self):
        """The most memory used so far, in bytes: the GPU's on CUDA, else this process's."""
        return distributed.peak_memory(self.device)

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
        """Names all whose state_dict a checkpoint must hold; opens the folder, or resumes its last checkpoint.

        A run that ended before its first checkpoint begins again.
        """
        self._tracked = {name: part for name, part in parts.items() if part is not None}
        self.open()
        self.print(f"{self.name}: {self.folder}  on {self.device}"
                   + (f", mixed precision {self.config.mixed_precision}" if self.dtype else "")
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
        self._noted = state["run"]["noted"]
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

    def ddp(self, net):
        """`net` as a module whose backward pass averages gradients over all processes; in one process `net` itself.

        Use it for the training's forward pass alone. Its weights are those of `net`, and all processes start from rank
        0's. A checkpoint, the EMA, previews and `update` take `net`.
        """
        if self.world == 1:
            return net
        devices = [self.device] if self.device.type == "cuda" else None
        self._ddp.append(DistributedDataParallel(net, device_ids=devices))
        return self._ddp[-1]

    def mean(self, tensor):
        """The mean of a tensor over all processes."""
        return distributed.mean_over_processes(tensor, self.world)

    def gather(self, tensor):
        """The rows [n, ...] of all processes as [world * n, ...], with a gradient, for a loss that compares them."""
        return distributed.gather(tensor, self.world)

    def average_gradients(self, net):
        """Replaces the gradients of `net` by their means over all processes, where `ddp` cannot be used."""
        distributed.average_gradients(net.parameters(), self.world)

    def micro_batches(self):
        """Yields the number of each micro-batch of a step; `ddp` averages the gradients in the last one alone."""
        last = self.config.gradient_accumulation - 1
        for micro in range(last + 1):
            with contextlib.ExitStack() as stack:
                for net in self._ddp if micro < last else ():
                    stack.enter_context(net.no_sync())
                yield micro

    def autocast(self):
        """Context in which the network runs in --mixed_precision (weights stay float32)."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext()

    def backward(self, loss, index):
        """Adds the gradient of this micro-batch's mean loss; `index` names its samples should the loss be NaN."""
        value = float(loss.detach())  # the step's one wait for the device: a NaN must not reach the weights
        if not math.isfinite(value):
            before = f" or, of the step before, {self._samples_before}" if self._samples_before else ""
            raise Diverged(f"the loss is {value} at step {self.step}, samples {index.tolist()}{before}: lower --lr, or "
                           "look at them")
        self._loss.append(value)
        self._samples += index.tolist()
        count = self.config.gradient_accumulation
        self.scaler.scale(loss / count if count > 1 else loss).backward()

    def update(self, net, optimiser, lr):
        """One optimiser step at learning rate `lr` from the gradients so far, clipped and checked.

        A parameter group's "lr_scale", if it has one, multiplies lr.
        """
        self.scaler.unscale_(optimiser)
        # The norm costs a pass over all gradients. Without clipping it is computed only before a save or preview;
        # otherwise the next loss reveals a NaN.
        if self.config.clip or self._used_at(self.step + 1):
            norm = get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
            if self.config.clip:
                clip_grads_with_norm_(net.parameters(), self.config.clip, norm)
            norm = float(norm)
            if not math.isfinite(norm) and not self.scaler.is_enabled():  # the fp16 scaler skips such a step by itself
                raise Diverged(f"the gradient norm is {norm} at step {self.step}, samples {self._samples}: lower --lr, "
                               "or look at them")
            self._samples_before, self._samples = [], []
        else:
            self._samples_before, self._samples = self._samples, []
        for group in optimiser.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)
        self.scaler.step(optimiser)
        self.scaler.update()
        optimiser.zero_grad(set_to_none=True)

    def _used_at(self, step):
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

    def log(self, step, lr):
        """Every --log_every steps a progress line, and a line of log.jsonl with the mean loss since the last one."""
        if (step + 1) % self.config.log_every and step + 1 != self.config.steps:
            return
        mean = torch.tensor(sum(self._loss) / len(self._loss), dtype=torch.float64)
        if self.world > 1:
            mean = self.mean(mean.to(self.device))
        row = {"step": step + 1, "loss": float(mean), "lr": lr}
        row |= {name: sum(noted) / len(noted) for name, noted in self._noted.items()}
        self._loss, self._noted = [], {}
        seconds, done = time.time() - self._clock[0], step + 1 - self._clock[1]
        pictures = done * self.config.batch * self.config.gradient_accumulation / seconds
        left = (self.config.steps - step - 1) * seconds / done
        self.record(**row, seconds=round(time.time() - self._started, 3), images_per_second=round(pictures, 1))
        self.print(f"step {step + 1}/{self.config.steps}  loss {row['loss']:.4f}  {pictures:.0f} img/s  "
                   f"ETA {int(left) // 60}:{int(left) % 60:02d}  {distributed.memory(self.device)}")

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
