"""Inception-v3 for the Fréchet Inception Distance: 2,048 features of a picture, from the reference weights.

    net = inception.load("pt_inception-2015-12-05-6726825d.pth")        your own file; nothing is downloaded
    x = inception.features(net, pictures)                              [n, 2048]
    print(net.score, frechet_distance(x, inception.features(net, real)))

The weights are those that TensorFlow published on 2015-12-05, under the names that pytorch-fid and torch-fidelity use.
The network differs from torchvision's: it has 1,008 outputs, its average pooling does not count the padding, and its
last block pools by maximum where all others average. Only a Fréchet distance on exactly these weights is called FID:
other weights give other numbers.
Sources: Szegedy et al. 2016 (arXiv 1512.00567), section 6 and figures 5 to 7 and 10, for the blocks; Heusel et al. 2017
(arXiv 1706.08500) for the distance.
"""

import hashlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.data.images import in_channels, load as load_picture
from nanodiff.errors import UserError, nearest
from nanodiff.formats.weights import load_strictly, read_weights
from nanodiff.pixels import to_uint8

SIDE = 299
FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
DIGEST = "6726825d"  # the first digits of the published file's SHA-256, as in its name
VARIABLE = "NANODIFF_INCEPTION"  # the environment variable that holds the path of the file
RESIZES = ("torch-fidelity", "pytorch-fid")


class Conv(nn.Module):
    """Convolution, batch normalisation by stored statistics (epsilon 0.001), ReLU."""

    def __init__(self, channels, out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = Norm(out)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Norm(nn.Module):
    """Batch normalisation with fixed statistics: four stored vectors and no counter."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=0.001)


def average_pool(x):
    """The mean over 3x3 neighbours; at the border over those that exist."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max_pool(x):
    """The maximum over 3x3 neighbours."""
    return F.max_pool2d(x, 3, 1, 1)


class Fine(nn.Module):
    """Block at 35x35: 1x1, 5x5, two 3x3 in a row, and pooling (figure 5, with the 5x5 of the published weights)."""

    def __init__(self, channels, pooled):
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(channels, 48, 1), Conv(48, 64, 5, 1, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64, 1), Conv(64, 96, 3, 1, 1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 1, 1)
        self.branch_pool = Conv(channels, pooled, 1)

    def forward(self, x):
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)),
                          self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          self.branch_pool(average_pool(x))], 1)


class FineToMiddle(nn.Module):
    """From 35x35 to 17x17: a 3x3 and a double 3x3 with stride 2, and a maximum (figure 10)."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, 2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 64, 1), Conv(64, 96, 3, 1, 1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2)

    def forward(self, x):
        return torch.cat([self.branch3x3(x), self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
                          F.max_pool2d(x, 3, 2)], 1)


class Middle(nn.Module):
    """Block at 17x17: 1x1, one and two 7x7, each as a row and a column, and pooling (figure 6)."""

    def __init__(self, channels, narrow):
        super().__init__()
        row, column = dict(kernel=(1, 7), padding=(0, 3)), dict(kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = Conv(channels, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(channels, narrow, 1), Conv(narrow, narrow, **row)
        self.branch7x7_3 = Conv(narrow, 192, **column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(channels, narrow, 1), Conv(narrow, narrow, **column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(narrow, narrow, **row), Conv(narrow, narrow, **column)
        self.branch7x7dbl_5 = Conv(narrow, 192, **row)
        self.branch_pool = Conv(channels, 192, 1)

    def forward(self, x):
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
                          self.branch7x7dbl_5(self.branch7x7dbl_4(double)), self.branch_pool(average_pool(x))], 1)


class MiddleToCoarse(nn.Module):
    """From 17x17 to 8x8: a 3x3 and a 7x7-then-3x3 with stride 2, and a maximum, after figure 10."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(channels, 192, 1), Conv(192, 320, 3, 2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(channels, 192, 1), Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1), padding=(3, 0)), Conv(192, 192, 3, 2)

    def forward(self, x):
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(seven), F.max_pool2d(x, 3, 2)], 1)


class Coarse(nn.Module):
    """Block at 8x8: 1x1, a 3x3 split into row beside column, a double one split likewise, and pooling (figure 7)."""

    def __init__(self, channels, pool):
        super().__init__()
        row, column = dict(kernel=(1, 3), padding=(0, 1)), dict(kernel=(3, 1), padding=(1, 0))
        self.branch1x1, self.branch3x3_1 = Conv(channels, 320, 1), Conv(channels, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, **row), Conv(384, 384, **column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(channels, 448, 1), Conv(448, 384, 3, 1, 1)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, **row), Conv(384, 384, **column)
        self.branch_pool, self.pool = Conv(channels, 192, 1), pool

    def forward(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three),
                          self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double),
                          self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """x [B, 3, 299, 299], about in [-1, 1] (see `prepare`), to features [B, 2048]; `logits` makes 1,008 of these.

    score: what a Fréchet distance on its features is called, "FID" for the reference weights alone.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = Fine(192, 32), Fine(256, 64), Fine(288, 64)
        self.Mixed_6a = FineToMiddle(288)
        self.Mixed_6b, self.Mixed_6c = Middle(768, 128), Middle(768, 160)
        self.Mixed_6d, self.Mixed_6e = Middle(768, 160), Middle(768, 192)
        self.Mixed_7a = MiddleToCoarse(768)
        self.Mixed_7b, self.Mixed_7c = Coarse(1280, average_pool), Coarse(2048, max_pool)
        self.fc = nn.Linear(2048, 1008)
        self.score = "Frechet distance on Inception features of other weights than FID's"

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # [B, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # [B, 288, 35, 35]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # [B, 768, 17, 17]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [B, 2048, 8, 8]
        return x.mean((2, 3))

    def logits(self, features):
        """Class logits [B, 1008] from features (1,000 of the classes are ImageNet's)."""
        return self.fc(features)


def load(path=None):
    """The frozen network with the weights of a file (.pth or .safetensors), loaded strictly.

    path   None: the file that $NANODIFF_INCEPTION names, else the one that pytorch-fid or torch-fidelity downloaded.
    UserError when there is none, or when it holds another network.
    """
    path = find(path)
    weights = {name: tensor for name, tensor in read_weights(path).items() if not name.endswith(".num_batches_tracked")}
    with torch.device("meta"):
        net = Inception()
    load_strictly(net, weights, path, assign=True)
    if hashlib.sha256(path.read_bytes()).hexdigest().startswith(DIGEST):
        net.score = "FID"
    return net.float().eval().requires_grad_(False)


def find(path=None):
    """The Path of the weights; a UserError names the places that were searched."""
    path = path or os.environ.get(VARIABLE)
    if path:
        if not Path(path).is_file():
            names = [file.name for file in Path(path).parent.iterdir()] if Path(path).parent.is_dir() else []
            raise UserError(f"{path} cannot be read: expected Inception's weights, {FILES[0]}"
                            + nearest(Path(path).name, names))
        return Path(path)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for name in FILES:
        if (cache / name).is_file():
            return cache / name
    raise UserError(f"there are no weights of Inception: expected their path, or {VARIABLE} with it, or {FILES[0]} in "
                    f"{cache}, where pytorch-fid puts it")


def prepare(x, resize="torch-fidelity"):
    """Inception's input [B, 3, 299, 299] from pictures [B, 1 or 3, H, W], uint8 or floats in [-1, 1].

    Floats are first rounded to the 256 levels of a file. resize: "torch-fidelity" is TensorFlow 1's bilinear resize (no
    half pixels), with levels v -> (v - 128) / 128; "pytorch-fid" is torch's bilinear, with v -> v / 127.5 - 1. Neither
    antialiases when it shrinks.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape:
        raise UserError(f"Inception expects pictures [n, 1 or 3, H, W] with n at least 1, but the shape is "
                        f"{list(x.shape)}")
    if resize not in RESIZES:
        raise UserError(f'resize "{resize}" is unknown; expected {" or ".join(RESIZES)}{nearest(resize, RESIZES)}')
    if not x.isfinite().all():
        raise UserError(f"{int((~x.isfinite()).flatten(1).any(1).sum())} of {len(x)} pictures hold values that are not "
                        "finite; the model that drew them has diverged")
    levels = in_channels(x if x.dtype == torch.uint8 else to_uint8(x), 3).float()
    if resize == "torch-fidelity":
        return (resize_tensorflow(levels, SIDE) - 128) / 128
    return 2 * F.interpolate(levels / 255, (SIDE, SIDE), mode="bilinear", align_corners=False) - 1


def resize_tensorflow(x, side):
    """x [B, C, H, W] resized to [B, C, side, side] as in TensorFlow 1: bilinear, output pixel i at i * H / side."""
    for axis in (3, 2):
        size = x.shape[axis]
        position = torch.arange(side, dtype=torch.float32, device=x.device) * (size / side)
        low = position.long()
        fraction = (position - low).view(-1, *[1] * (3 - axis))
        first, second = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
        x = first + (second - first) * fraction
    return x


@torch.no_grad()
def features(net, x, batch=32, resize="torch-fidelity"):
    """Features float32 [n, 2048], on the CPU, of pictures [n, 1 or 3, H, W] as `prepare` takes them."""
    device = net.fc.weight.device
    return torch.cat([net(prepare(pictures.to(device), resize)).cpu() for pictures in x.split(batch)])


@torch.no_grad()
def file_features(net, files, batch=32, resize="torch-fidelity"):
    """Features float32 [n, 2048], on the CPU, of picture files; they may differ in size."""
    device, features = net.fc.weight.device, []
    for start in range(0, len(files), batch):
        pictures = [prepare(load_picture(file, channels=3)[None], resize) for file in files[start:start + batch]]
        features.append(net(torch.cat(pictures).to(device)).cpu())
    return torch.cat(features)
