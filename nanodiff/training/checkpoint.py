"""Checkpoints on disk: written whole or not at all, numbered by step, read without executing anything.

A checkpoint is a folder checkpoints/STEP with one file NAME.pt for each part; run.pt lists the parts.
"""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import torch

from nanodiff.errors import UserError


def save_checkpoint(run_folder, step, parts, keep):
    """Write {name: state} as checkpoints/STEP: a temporary folder, fsync, one rename. Delete all but the last `keep`.

    UserError when the disk is full or read-only; the previous checkpoint is then intact.
    """
    root = Path(run_folder) / "checkpoints"
    folder, temporary = root / f"{step:08d}", root / f".writing-{step:08d}"
    try:
        for remnant in [*root.glob(".writing-*"), root / ".replaced"]:  # of a process that was killed
            shutil.rmtree(remnant, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, state in parts.items():
            with open(temporary / f"{name}.pt", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(temporary)
        if folder.exists():  # a run that resumed from an older checkpoint reaches this step again
            os.replace(folder, root / ".replaced")
        os.replace(temporary, folder)
        _sync_folder(root)
        shutil.rmtree(root / ".replaced", ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"the checkpoint of step {step} could not be written to {root} ({error}); "
                        "the one before is intact: free some space and go on with --resume") from error
    for old in checkpoints(run_folder)[:-keep]:
        if old != folder:
            shutil.rmtree(old)


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checkpoints(folder):
    """The finished checkpoint folders of a run, sorted by step."""
    root = Path(folder) / "checkpoints"
    return sorted((p for p in root.glob("*") if p.name.isdigit()), key=lambda p: int(p.name)) if root.is_dir() else []


def all_finite(state):
    """Whether all floating-point tensors of a nested state are finite."""
    if isinstance(state, torch.Tensor):
        return not state.is_floating_point() or bool(torch.isfinite(state).all())
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return all(all_finite(value) for value in values)


def last_checkpoint(folder):
    """The newest finished checkpoint of a run folder; UserError when there is none."""
    folders = checkpoints(folder)
    if not folders:
        raise UserError(f"{folder} holds no checkpoint; expected a run folder with checkpoints/00000500 or the like")
    return folders[-1]


def load_checkpoint(folder):
    """{name: state} of all parts of a checkpoint, on the CPU; executes nothing; UserError when a part is missing."""
    state = {}
    names = ["run"]
    while names:
        name = names.pop()
        path = Path(folder) / f"{name}.pt"
        if not path.is_file():
            raise UserError(f"{folder} lacks {name}.pt; expected a whole checkpoint, try an older one beside it")
        try:
            state[name] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]}); "
                            "expected a file written by this package") from error
        if name == "run":
            names += state["run"]["parts"]
    return state


def random_state():
    """The state of every global generator, in types that load without executing anything."""
    numpy = np.random.get_state()
    python = random.getstate()
    return {"torch": torch.get_rng_state(),
            "numpy": [numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]],
            "python": [python[0], list(python[1]), python[2]],
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state):
    """Set every global generator to a state from `random_state`."""
    torch.set_rng_state(state["torch"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
