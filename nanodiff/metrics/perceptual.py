"""Perceptual distances between pictures: distances between a network's inner activations.

Each activation is normalised to unit length over its channels, so that all layers and places weigh alike. Squared
differences are averaged over places and summed over layers. The project's own classifier needs no further weights.
VGG-16, with linear weights fitted to human judgements, gives the published LPIPS.
Source: Zhang et al. 2018 (arXiv 1801.03924), equation 1; Rombach et al. 2022 (arXiv 2112.10752), appendix G, for its
use in training an autoencoder; report section 4.1.1.
"""

import re

import torch
from torch import nn

from nanodiff.classifiers.worlds import load_classifier
from nanodiff.errors import UserError
from nanodiff.formats.weights import load_strictly, read_weights

# VGG-16 up to relu5_3 (Simonyan & Zisserman 2015, configuration D): widths of its 3x3 convolutions, 0: a max-pooling.
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
LPIPS_LAYERS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}  # layers relu1_2, 2_2, 3_3, 4_3, 5_3 and their channels
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # from [-1, 1] to VGG-16's input range
TOLERANCE = 0.05  # how far a value may exceed the stated range: resizing overshoots


def unit_length(h, eps=1e-10):
    """Activations h [B, C, H, W] divided by their length over channels; value and gradient stay finite where h is 0."""
    return h * (h.square().sum(1, keepdim=True) + eps).rsqrt()


class ClassifierDistance(nn.Module):
    """forward(x, y) -> [B]: distance of pictures [B, 3, H, W] in [-1, 1] on the world classifier's ReLU outputs.

    0 for equal pictures, never below 0. Sides from 16 up; the classifier is convolutional, so crops need no resizing.
    Its weights are frozen, and it stays in eval mode.
    """

    def __init__(self, classifier=None):
        super().__init__()
        self.body = (classifier or load_classifier()).body
        self.eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)  # batch normalisation with the stored statistics

    def activations(self, x):
        """The ReLU outputs: from 32 channels at half the side to 192 channels at a sixteenth."""
        outputs = []
        for layer in self.body:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                outputs.append(x)
        return outputs

    def forward(self, x, y):
        return sum((unit_length(a) - unit_length(b)).square().sum(1).mean((1, 2))
                   for a, b in zip(self.activations(x), self.activations(y)))


class LPIPS(nn.Module):
    """forward(x, y) -> [B]: LPIPS 0.1 with VGG-16 of pictures [B, 3, H, W]; sides from 16 up.

    path   one .safetensors or .pth file with VGG-16's convolutions in torchvision's names (features.0.weight ...
           features.28.bias) and LPIPS' linear layers (lin0.model.1.weight ... lin4.model.1.weight), or the state dict
           of lpips.LPIPS(net="vgg"). UserError for a weight that is missing, left over or misshapen, and for a linear
           weight below 0, which could make distances negative.
    0 for equal pictures, never below 0. Its weights are frozen, and it stays in eval mode.
    """

    def __init__(self, path):
        super().__init__()
        with torch.device("meta"):
            self.features, width = nn.Sequential(), 3
            for out in VGG16:
                self.features.extend([nn.Conv2d(width, out, 3, padding=1), nn.ReLU()] if out else [nn.MaxPool2d(2)])
                width = out or width
            for i, channels in enumerate(LPIPS_LAYERS.values()):
                layer = nn.Sequential(nn.Dropout(), nn.Conv2d(channels, 1, 1, bias=False))
                setattr(self, f"lin{i}", nn.ModuleDict({"model": layer}))
        load_strictly(self, rename_lpips_keys(read_weights(path)), path, assign=True)
        for i in range(len(LPIPS_LAYERS)):
            weight = self.get_parameter(f"lin{i}.model.1.weight").detach()
            if not bool((weight >= 0).all()):
                raise UserError(f"{path}: lin{i}.model.1.weight goes down to {float(weight.min()):.3g}; expected the "
                                "linear weights of LPIPS, which are all at least 0")
        self.float().eval().requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)  # no dropout

    def activations(self, x):
        """relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of pictures in [-1, 1]."""
        outputs = []
        x = (x - x.new_tensor(SHIFT)[:, None, None]) / x.new_tensor(SCALE)[:, None, None]
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in LPIPS_LAYERS:
                outputs.append(x)
        return outputs

    def forward(self, x, y, lowest=-1):
        """Distances [B] of pictures with values in lowest ... 1, lowest being -1 or 0; UserError for other values.

        Pictures that carry a gradient are not checked: the output of a network in training may overshoot.
        """
        for z in (x, y):
            if not z.requires_grad and not bool(((z >= lowest - TOLERANCE) & (z <= 1 + TOLERANCE)).all()):
                raise UserError(f"pictures with values from {float(z.min()):.3g} to {float(z.max()):.3g} were given to "
                                f"LPIPS; expected {lowest} to 1")
        if lowest == 0:
            x, y = 2 * x - 1, 2 * y - 1
        linear = [self.lin0.model, self.lin1.model, self.lin2.model, self.lin3.model, self.lin4.model]
        return sum(layer((unit_length(a) - unit_length(b)).square()).mean((1, 2, 3))
                   for a, b, layer in zip(self.activations(x), self.activations(y), linear))


def rename_lpips_keys(weights):
    """The state dict of lpips.LPIPS under the names of `LPIPS`; one that has them already is unchanged."""
    renamed = {}
    for name, tensor in weights.items():
        if not name.startswith(("scaling_layer.", "lins.")):  # our SHIFT and SCALE; duplicates of lin0 ... lin4
            renamed[re.sub(r"^net\.slice\d\.", "features.", name)] = tensor
    return renamed


def load_distance(lpips=""):
    """The perceptual distance for training: ClassifierDistance, or LPIPS with the weights in the file `lpips`."""
    return LPIPS(lpips) if lpips else ClassifierDistance()
