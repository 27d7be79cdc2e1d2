"""A small classifier of all the drawn worlds; it judges what a model generates.

It predicts the class of a picture (textures, things, digits, nine woven classes, or "nonsense"), the colours of figure
and ground, and whether there is one thing or two, each with a probability. Its penultimate layer gives the features for
the Fréchet distance, recall and nearest neighbours. Its weights are in data/reader/; this command makes them again:

    python -m nanodiff.classifiers.train
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from nanodiff.data import images
from nanodiff.errors import UserError
from nanodiff.files import DATA
from nanodiff.pixels import from_uint8

SIZE = 64
NONSENSE = "nonsense"
WEIGHTS = DATA / "reader" / "worlds.safetensors"
COMMAND = "python -m nanodiff.classifiers.train"


class WorldClassifier(nn.Module):
    """Convolutional classifier of colour pictures x [B,3,64,64] in [-1, 1]; 128 features, 4 heads, 0.9 M parameters.

    classes, colours: names in the order of the outputs; the last class is "nonsense".
    """

    def __init__(self, classes, colours):
        super().__init__()
        self.classes, self.colours = list(classes), list(colours)
        self.body = nn.Sequential(
            *convolution(3, 32, kernel=5, stride=2),  # [B,32,32,32]
            *convolution(32, 64, stride=2), *convolution(64, 64),  # [B,64,16,16]
            *convolution(64, 128, stride=2), *convolution(128, 128),  # [B,128,8,8]
            *convolution(128, 192, stride=2), *convolution(192, 192),  # [B,192,4,4]
            nn.Flatten(2),
        )
        self.squeeze = nn.Linear(2 * 192, 128)
        self.heads = nn.ModuleDict({"class": nn.Linear(128, len(self.classes)), "figure": nn.Linear(128, len(colours)),
                                    "ground": nn.Linear(128, len(colours)), "count": nn.Linear(128, 2)})
        self.temperature = 1.0

    def features(self, x):
        """Features [B,128] of the penultimate layer, before its nonlinearity."""
        body = self.body(x)  # [B,192,16]
        # The mean measures how much of a pattern there is, the maximum whether it occurs: a thing may be a small part
        return self.squeeze(torch.cat([body.mean(2), body.amax(2)], 1))

    def answers(self, features):
        """Logits by name from features [B,128]: class [B,classes], figure and ground [B,colours], count [B,2]."""
        return {name: head(F.relu(features)) for name, head in self.heads.items()}

    def forward(self, x):
        """Logits by name: class, figure and ground colour, count (one, two), before division by the temperature."""
        return self.answers(self.features(x))


def convolution(channels, out, kernel=3, stride=1):
    """The layers of one step of a classifier's body: convolution, batch norm, ReLU."""
    return nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()


@dataclass
class Predictions:
    """A classifier's features and probabilities for n pictures; those of the class are calibrated."""
    classifier: WorldClassifier
    features: torch.Tensor  # [n,128]
    classes: torch.Tensor  # [n,classes]
    figure: torch.Tensor  # [n,colours]
    ground: torch.Tensor  # [n,colours]
    count: torch.Tensor  # [n,2]: one, two

    def names(self):
        """The name of the likeliest class of each picture."""
        return [self.classifier.classes[i] for i in self.classes.argmax(1).tolist()]

    def colours(self):
        """The names of the likeliest (figure, ground) colours of each picture."""
        return [(self.classifier.colours[f], self.classifier.colours[g])
                for f, g in zip(self.figure.argmax(1).tolist(), self.ground.argmax(1).tolist())]


def load_classifier(path=None):
    """The trained WorldClassifier, frozen and in eval mode, from `path` or the weights that the repository ships.

    UserError when the file is missing or of another kind; it names the command that makes the weights.
    """
    path = Path(path or WEIGHTS)
    if not path.is_file():
        raise UserError(f"there are no weights of the classifier at {path}; make them with: {COMMAND}")
    try:
        with safe_open(path, "pt") as file:
            weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        net = WorldClassifier(json.loads(metadata["classes"]), json.loads(metadata["colours"]))
        net.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
        net.temperature = float(metadata["temperature"])
    except (SafetensorError, RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not hold a classifier of the drawn worlds ({reason}); make it again with: "
                        f"{COMMAND}") from error
    return net.eval().requires_grad_(False)


def as_float(x):
    """Pictures as floats in [-1, 1]: uint8 0..255 is scaled, floats are clipped as by a picture file."""
    return from_uint8(x) if x.dtype == torch.uint8 else x.float().clamp(-1, 1)


def prepare(x):
    """The classifier's input [n,3,64,64]: the middle square of pictures [n,1 or 3,H,W], uint8 or floats in [-1, 1]."""
    side = min(x.shape[-2:])
    top, left = (x.shape[-2] - side) // 2, (x.shape[-1] - side) // 2
    x = as_float(x[..., top:top + side, left:left + side])
    return images.in_channels(images.resize(x, SIZE, SIZE), 3)


@torch.no_grad()
def classify(net, x, batch=250):
    """The Predictions for pictures x [n,1 or 3,H,W], in batches, on the CPU; other sizes than 64x64 are resized.

    x is uint8 in 0..255, or floats in [-1, 1], which are clipped to that range. UserError for another shape, or when a
    value is not finite.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape:
        raise UserError(f"the classifier expects pictures [n, 1 or 3, H, W] with n at least 1, but the shape is "
                        f"{list(x.shape)}")
    if not x.isfinite().all():
        raise UserError(f"{int((~x.isfinite()).flatten(1).any(1).sum())} of {len(x)} pictures hold values that are not "
                        "finite; the model that drew them has diverged")
    device = next(net.parameters()).device
    batches = []
    for pictures in x.split(batch):
        features = net.features(prepare(pictures).to(device))
        logits = net.answers(features)
        logits["class"] = logits["class"] / net.temperature
        batches.append([features.cpu(), *(logits[name].softmax(1).cpu() for name in net.heads)])
    return Predictions(net, *(torch.cat(column) for column in zip(*batches)))


# Shared by the training of both classifiers

def fit_temperature(probabilities, labels):
    """The temperature that makes held-out labels most likely (Guo et al. 2017); probabilities [n,classes]: at T = 1."""
    logits = probabilities.double().clamp(min=1e-30).log()
    temperatures = torch.linspace(0.3, 3, 541, dtype=torch.float64)
    losses = torch.stack([F.cross_entropy(logits / t, labels) for t in temperatures])
    return float(temperatures[losses.argmin()])


def calibration_error(probabilities, labels, bins=15):
    """Expected calibration error over equal bins of confidence (Guo et al. 2017, eq. 3) -> float in 0..1."""
    confidence, guess = probabilities.double().max(dim=1)
    correct = (guess == labels).double()
    bin_index = (confidence * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_index, confidence - correct)  # n_bin * (conf - acc)
    return float(gap.abs().sum() / len(labels))


def initialise(net, generator):
    """Draw Kaiming's weights for convolutions and linear layers (He et al. 2015, eq. 10); set biases to 0."""
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
