"""Two small networks with the layers that a LoRA meets, and LoRAs for them: shared by the LoRA tests of this folder."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanodiff.models.blocks import Attention, Downsample, ResnetBlock, Upsample
from nanodiff.models.lora import LoraPart, layers


class Net(nn.Module):
    """A little of everything that a U-Net has: 3x3, 1x1 and strided convolutions, linear layers, cross-attention."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.down = Downsample(8)
        self.block = ResnetBlock(8, 12, groups=4)
        self.attention = Attention(12, 2, 6, context_channels=5)
        self.up = Upsample(12)

    def forward(self, x, context, remember=True):
        run = (lambda f, *args: f(*args)) if remember else (lambda f, *args: checkpoint(f, *args, use_reentrant=False))
        h = run(self.block, self.down(self.conv_in(x)))
        h = h + run(self.attention, h.flatten(2).transpose(1, 2), context).transpose(1, 2).unflatten(2, h.shape[2:])
        return self.up(h)


PATHS = {"unet": ["conv_in", "down.conv", "block.conv1", "block.conv_shortcut", "attention.to_q", "attention.to_k",
                  "attention.to_out.0", "up.conv"], "text_model": ["0", "2"]}


def networks(seed=0, dtype=torch.float32):
    nets = {"unet": Net(), "text_model": nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 5))}
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for net in nets.values():
            for p in net.parameters():
                p.normal_(std=0.3, generator=draw)
            net.to(dtype).requires_grad_(False).eval()
    return nets


def inputs(dtype=torch.float32):
    draw = torch.Generator().manual_seed(7)
    return torch.randn(2, 3, 8, 8, generator=draw).to(dtype), torch.randn(2, 4, 5, generator=draw).to(dtype)


def output(nets, **options):
    x, words = inputs(next(nets["text_model"].parameters()).dtype)
    return nets["unet"](x, nets["text_model"](words), **options)


def random_parts(seed=1, rank=2, alpha=3.0, paths=PATHS, std=0.3):
    nets, draw, parts = networks(), torch.Generator().manual_seed(seed), []
    for network, names in paths.items():
        for i, path in enumerate(names):
            shape = layers(nets[network])[path].weight.shape
            parts.append(LoraPart(network, path, std * torch.randn(rank, *shape[1:], generator=draw),
                                  std * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=draw),
                                  alpha + i % 2))
    return parts
