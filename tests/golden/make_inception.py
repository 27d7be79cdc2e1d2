"""Makes inception.safetensors: what the peers' networks of FID make of two drawn pictures, with drawn weights.

    pip install torch torch-fidelity pytorch-fid safetensors && PYTHONPATH=. python tests/golden/make_inception.py

The weights are those of tests/metrics/drawn_inception.py, so nothing is downloaded; features are [2, 2048].
"""

import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "metrics"), str(TESTS / "benchmarks")]
import drawn_inception  # noqa: E402
import inception_beside_peers as peers  # noqa: E402

with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    path = Path(folder) / "drawn.pth"
    torch.save(drawn_inception.weights(), path)
    x = drawn_inception.pictures(2, 32)
    made = {name: make(path)(x).float() for name, make in peers.PEERS.items()}
save_file(made, TESTS / "golden" / "inception.safetensors")
