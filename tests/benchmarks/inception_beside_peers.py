"""Is Inception here the network of FID? The same random weights in it and in the peers' networks, side by side.

    python -m venv peers && peers/bin/pip install torch torch-fidelity pytorch-fid    (one of the two is enough)
    PYTHONPATH=. peers/bin/python tests/benchmarks/inception_beside_peers.py [--n 16] [--weights FILE]

Nothing is downloaded: the weights are drawn (tests/metrics/drawn_inception.py), or taken from FILE. For each peer it
prints the largest difference of the 2,048 features over the largest feature, and the relative difference of a Fréchet
distance between two sets of n pictures on the same 2,048 features.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from nanodiff.metrics import inception
from nanodiff.metrics.frechet import frechet_distance

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "metrics"))
import drawn_inception  # noqa: E402

BARS = {"features": 1e-5, "frechet": 1e-6}


def torch_fidelity(path):
    """The function from uint8 pictures to features of torch-fidelity's network with the weights in a file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    net = FeatureExtractorInceptionV3("peer", ["2048"], feature_extractor_weights_path=str(path)).eval()
    return lambda x: net(x)[0]


def pytorch_fid(path):
    """The same of pytorch-fid's, which would download its weights: ours are given where it asks for them."""
    from pytorch_fid import inception as theirs
    theirs.load_state_dict_from_url = lambda *args, **kwargs: torch.load(path, weights_only=True)
    net = theirs.InceptionV3([theirs.InceptionV3.BLOCK_INDEX_BY_DIM[2048]]).eval()
    return lambda x: net(x / 255)[0].flatten(1)


PEERS = {"torch-fidelity": torch_fidelity, "pytorch-fid": pytorch_fid}


@torch.no_grad()
def main():
    """Prints one line a peer; exit code 1 when a bar is missed or no peer is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=16, help="pictures of each of the two sets")
    parser.add_argument("--weights", help="Inception's published weights (default: drawn ones)")
    args = parser.parse_args()
    sets = [drawn_inception.pictures(args.n, 32, seed) for seed in (0, 1)]
    missed, found = False, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.weights or Path(folder) / "drawn.pth")
        if not args.weights:
            torch.save(drawn_inception.weights(), path)
        net = inception.load(path)
        print(f"weights: {args.weights or 'drawn at random'}; the distance below is a {net.score}")
        for name, make in PEERS.items():
            try:
                peer = make(path)
            except ImportError as error:
                print(f"{name}: not installed ({error})")
                continue
            found += 1
            ours = [inception.features(net, x, resize=name) for x in sets]
            theirs = [torch.cat([peer(part).cpu() for part in x.split(8)]) for x in sets]
            apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs))
            distance, reference = frechet_distance(*ours), frechet_distance(*theirs)
            relative = abs(distance - reference) / reference
            print(f"{name}: features differ by {apart:.2g} of the largest (bar {BARS['features']:.0e}); Frechet "
                  f"distance {distance:.6f} and {reference:.6f}, relative {relative:.2g} (bar {BARS['frechet']:.0e}), "
                  f"n = {args.n}", flush=True)
            missed |= apart > BARS["features"] or relative > BARS["frechet"]
    return 1 if missed or not found else 0


if __name__ == "__main__":
    sys.exit(main())
