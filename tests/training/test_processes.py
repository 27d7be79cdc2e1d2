"""Two processes give the first gradient and loss of one, for every script that trains in several."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import state
from tiny_ldm import make_parts, words

ROOT = Path(__file__).parents[2]
TINY = {"size": 12, "batch": 4, "gradient_accumulation": 2, "warmup": 0, "clip": 0, "ema": 0, "steps": 2, "stop": 1,
        "workers": 0, "log_every": 1, "preview_every": 100, "checkpoint_every": 100, "device": "cpu"}
LATENT = {"warmup": 0, "clip": 0, "ema": 0, "stop": 1, "preview_every": 100}
UNET = {"channels": "8,8", "blocks": 1, "attention": "6", "heads": 1, "T": 20}
FLAGS = {  # two micro-batches each, so that gradients are averaged in the second alone
    "autoencoder": {"widths": "16,8", "latent": 3},
    "vae": {"widths": "16", "latent": 3, "samples": 2},
    "vqvae": {"channels": 8, "residual_channels": 4, "codes": 12, "code_channels": 4},
    "ddpm": UNET,
    "kl_autoencoder": {"size": 32, "crop": 16, "channels": "8,8", "latent_channels": 2, "disc_channels": 8,
                       "disc_start": 0, "adversarial_start": 0, "whole": 0},
    "clip": {"pictures": 24, "variants": 2, "width": 32, "layers": 1, "heads": 2},
    "ldm": {"optimiser": "adamw"},
    "ldm with its text encoder": {"optimiser": "adamw", "text": "scratch"},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGS)
def test_two_processes_give_the_gradient_and_loss_of_one(picture_folder, parts, tmp_path, name):
    script = "train_" + name.split()[0]

    def flags(out):
        if name.startswith("ldm"):
            return words(parts, out, **LATENT, **FLAGS[name])
        data = {} if name == "clip" else {"data": picture_folder}
        tiny = {key: value for key, value in TINY.items() if name != "clip" or key != "size"}
        return [f"--{key}={value}" for key, value in {**tiny, **data, **FLAGS[name], "out": out}.items()]

    importlib.import_module(script).main(flags(tmp_path / "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               str(ROOT / f"{script}.py"), *flags(tmp_path / "two")]
    # as many threads as here: sums in another order end on other last digits
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (state(tmp_path / out) for out in ("one", "two"))
    assert one["net"].keys() == two["net"].keys()  # no "module." before a name
    parts_of = {"optimiser", "disc_optimiser"} & one.keys()
    for part in parts_of:
        assert one[part]["state"].keys() == two[part]["state"].keys() != set()
        pairs = {key: (moments["exp_avg"], two[part]["state"][key]["exp_avg"])
                 for key, moments in one[part]["state"].items()}
        largest = max(a.norm() for a, _ in pairs.values())
        for key, (a, b) in pairs.items():  # Adam's first moment after one step is a tenth of the gradient
            # some gradients, such as that of a key's bias, are nothing but rounding
            assert (a - b).norm() <= 1e-5 * a.norm().clamp(min=1e-3 * largest), (part, key)
    losses = [[row["loss"] for row in map(json.loads, open(tmp_path / out / "log.jsonl")) if "loss" in row]
              for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 1
    assert done.stdout.count("stopped at step 1") == 1  # one process speaks
