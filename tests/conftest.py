"""Small things that several tests need."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_runs
from nanodiff.training.checkpoint import last_checkpoint, load_checkpoint


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """Ten grey pictures of 12x12 pixels, in two classes: enough for several passes in a few steps."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(10):
        folder = root / ("stripes" if i % 2 else "blobs")
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 12), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """{name: folder} of the tiny data and models that `tiny_runs.words` needs."""
    return tiny_runs.make_places(tmp_path_factory.mktemp("tiny"))


def same(a, b):
    """True when two nested states hold the same numbers bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
            a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


def state(out):
    """The last checkpoint of a run folder."""
    return load_checkpoint(last_checkpoint(out))


def rows(out):
    """The lines of a log without what a clock says."""
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    return [{key: value for key, value in row.items() if key not in ("seconds", "images_per_second")} for row in lines]


def steps_begun(script, words, monkeypatch):
    """How many steps a training script's run is given, which does not begin."""
    class Begun(Exception):
        pass

    def begin(config, name):
        raise Begun(config.steps)
    monkeypatch.setattr(script, "Run", begin)
    with pytest.raises(Begun) as found:
        script.main(words)
    return found.value.args[0]
