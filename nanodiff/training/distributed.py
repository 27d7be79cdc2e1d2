"""The machine that a run is on: its device and arithmetic, the processes that share the work, the memory used."""

import atexit
import os
import sys

import torch

from nanodiff.errors import UserError, check


def pick_device(name):
    """The torch.device of --device; "auto" is a GPU when there is one. Under torchrun each process has its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    check(name.split(":")[0] in ("cpu", "cuda"), f'--device "{name}" is not supported (the schedules need float64); '
          "expected cpu, cuda, cuda:1 ... or auto")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device "{name}" cannot be used here ({str(error).splitlines()[0]}); try cpu') from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def autocast_dtype(name, device):
    """The autocast dtype of --mixed_precision: None for "no"."""
    check(name != "fp16" or device.type == "cuda", f"--mixed_precision fp16 needs a CUDA device, not {device}; try "
          "bf16")
    return {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def processes():
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join_processes(device):
    """(rank, world) of this process; joins the others when started by torchrun."""
    world = processes()
    if world > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(leave_processes)
    return (torch.distributed.get_rank(), world) if world > 1 else (0, 1)


def leave_processes():
    """Ends the process group: gloo's threads, left running, now and then abort Python's exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def share_of(batch, world):
    """How many pictures of a batch each of `world` processes takes; UserError unless all take as many."""
    check(batch % world == 0, f"--batch {batch} cannot be divided among {world} processes; expected a multiple of "
          f"{world}, such as {max(1, round(batch / world)) * world}")
    return batch // world


def any_process(flag, device, world):
    """Whether any of the `world` processes says so."""
    if world == 1:
        return bool(flag)
    flag = torch.tensor(float(flag), device=device if device.type == "cuda" else "cpu")
    torch.distributed.all_reduce(flag)
    return bool(flag)


def gather(tensor, world):
    """The rows of a tensor [n, ...] of all processes, in the order of their ranks: [world * n, ...]; has a gradient."""
    if world == 1:
        return tensor
    from torch.distributed.nn.functional import all_gather  # not at the top: builds of torch without processes lack it
    return torch.cat(all_gather(tensor.contiguous()))


def mean_over_processes(tensor, world):
    """The mean of a tensor over the `world` processes, in one all_reduce."""
    if world == 1:
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total / world


def average_gradients(parameters, world):
    """Replaces every gradient by its mean over the `world` processes, in one all_reduce."""
    if world == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = mean_over_processes(torch.cat([g.flatten() for g in gradients]), world)
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))


def peak_memory(device):
    """The most memory used so far, in bytes: the GPU's on CUDA, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux: getrusage begins at the peak of the process that started this one
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory(device):
    """The most memory used so far, as text."""
    return f"{peak_memory(device) / 2**30:.2f} GiB" + (" GPU" if device.type == "cuda" else "")
