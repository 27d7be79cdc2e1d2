"""A layer with LoRA: frozen, plus low-rank changes.

For a weight W [out, in] the layer computes, with rank much smaller than in and out,

    y = W x + scale * alpha / rank * up (down x)        down [rank, in], up [out, rank]

so that only rank * (in + out) numbers are trained. A fresh adapter has up = 0: it changes nothing until it is trained.
For a convolution, down is a convolution of the same kernel and stride onto `rank` channels, and up a 1x1 one.
Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1, equation 3.
"""

import torch
import torch.nn.functional as F
from torch import nn

SMALL = 2**17  # numbers in a weight up to which a layer that learns is computed with its change worked in


class Adapter(nn.Module):
    """One LoRA's share in one layer: down, up, alpha, and the scale that its user chose."""

    def __init__(self, name, down, up, alpha, scale=1.0):
        super().__init__()
        self.name, self.alpha, self.scale, self.merged = name, float(alpha), float(scale), False
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)

    def factor(self):
        """scale * alpha / rank."""
        return self.scale * self.alpha / len(self.down)

    def forward(self, x, base):
        """up(down(x)), before the factor; base gives a convolution's stride, padding and dilation."""
        x = x.to(self.down.dtype)
        if self.down.ndim == 2:
            return F.linear(F.linear(x, self.down), self.up)
        return F.conv2d(F.conv2d(x, self.down, None, base.stride, base.padding, base.dilation), self.up)


class LoraLayer(nn.Module):
    """A layer (nn.Linear or nn.Conv2d, here `base`) with any number of adapters around it; takes the layer's place.

    Gradients reach the adapters, and base unless whoever trains has frozen it. The output has base's dtype.
    """

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleList()
        self.kept = []  # base's own weight while adapters are merged; in a list, so that it is no parameter here
        self.train(base.training)

    def forward(self, x):
        acting = [adapter for adapter in self.adapters if not adapter.merged]
        if acting and torch.is_grad_enabled() and self.is_small():
            return self.changed(x, acting)
        y = self.base(x)
        for adapter in acting:
            y.add_(adapter(x, self.base).to(y.dtype), alpha=adapter.factor())  # in place: y is a fresh tensor
        return y

    def is_small(self):
        """Whether W + up down, made in every step, costs less than narrow products of x beside W x: 13 % of a step of the
        model that ships (8 pictures, 1 thread); most layers of SD 1.5 are far larger. Not with lower precision, in which
        W would swallow the change."""
        weight = self.base.weight
        return (weight.numel() <= SMALL and weight.dtype == torch.float32
                and not torch.is_autocast_enabled(weight.device.type))

    def changed(self, x, acting):
        """(W + sum of factor * up down) x: the same as base and adapters side by side, by one layer."""
        base = self.base
        if hasattr(base, "unpack"):  # packed for inference: a layout that only one kernel can read
            base.unpack()
        weight = base.weight.flatten(1)
        for adapter in acting:
            weight = torch.addmm(weight, adapter.up.flatten(1), adapter.down.flatten(1), alpha=adapter.factor())
        if base.weight.ndim == 2:
            return F.linear(x, weight, base.bias)
        return F.conv2d(x, weight.view_as(base.weight), base.bias, base.stride, base.padding, base.dilation, base.groups)

    @property
    def weight(self):
        """base's weight, for those who ask a network for its dtype and device; unmerged adapters are not in it."""
        return self.base.weight

    def own_weight(self):
        """base's weight without any adapter: the very Parameter that the network came with."""
        if hasattr(self.base, "unpack"):  # packed for inference: a layout that only one kernel can read
            self.base.unpack()
        return self.kept[0] if self.kept else self.base.weight

    @torch.no_grad()
    def rebuild(self):
        """Give base the weight that its merged adapters ask for: always from its own weight, so that nothing drifts."""
        own = self.own_weight()
        merged = [adapter for adapter in self.adapters if adapter.merged]
        self.kept = [own] if merged else []
        if merged:
            wide = torch.promote_types(own.dtype, torch.float32)
            weight = own.to(wide)
            for adapter in merged:
                weight = weight + adapter.scale * delta(adapter, wide).to(own.device)
            self.base.weight = nn.Parameter(weight.to(own.dtype), requires_grad=own.requires_grad)
        else:
            self.base.weight = own

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # .to(...), .half() and their like must reach the kept weight too
        for own in self.kept:
            own.data = fn(own.data)
        return self


def delta(part, dtype=torch.float32):
    """The weight change alpha / rank * up @ down of a LoraPart or an Adapter, at scale 1, in the layer's own shape.

    Linear: [out, in]. Convolution: [out, in, kh, kw], the one kernel that up after down amounts to, at any stride.
    """
    down, up = part.down.detach().to(dtype), part.up.detach().to(dtype)
    rank = len(down)
    change = part.alpha / rank * (up.reshape(len(up), rank) @ down.reshape(rank, -1))
    return change.reshape(len(up), *down.shape[1:])
