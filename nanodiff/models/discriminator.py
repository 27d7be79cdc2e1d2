"""The patch discriminator: says of every patch of a picture whether it is real, to keep an autoencoder from blurring.

Sources: Isola et al. 2017 (arXiv 1611.07004), section 3.2.2, for judging patches; Esser et al. 2021 (arXiv 2012.09841),
equations 6 and 7, for its loss and the adaptive weight; report section 4.1.1.
"""

import torch
import torch.nn.functional as F
from torch import nn

LARGEST_WEIGHT = 1e4


class PatchDiscriminator(nn.Module):
    """Pictures x [B, in_channels, H, W] to logits [B, 1, H / 2^layers, W / 2^layers] (about): above 0 is "real".

    channels   width after the first convolution; it doubles with each of `layers` halvings of the side, up to 8 times
    Group normalisation, so that the score of one picture does not depend on its neighbours in the batch.
    """

    def __init__(self, in_channels=3, channels=32, layers=2, generator=None):
        super().__init__()
        found, width = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)], channels
        for layer in range(1, layers + 1):
            out = channels * min(2**layer, 8)
            stride = 2 if layer < layers else 1
            found += [nn.Conv2d(width, out, 4, stride, 1, bias=False), nn.GroupNorm(8, out), nn.LeakyReLU(0.2)]
            width = out
        self.net = nn.Sequential(*found, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x):
        return self.net(x)


def hinge_loss(real, fake):
    """The discriminator's loss: real logits are pushed above 1, fake ones below -1, and no further."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction_loss, adversarial_loss, last_weight, average=lambda gradient: gradient):
    """How much the adversarial term counts, so that both pull the decoder's last layer equally hard; detached.

    |d reconstruction / d last_weight| / (|d adversarial / d last_weight| + 1e-4), within [0, 1e4]; 0 where the second
    gradient is 0 (a term that pulls nowhere needs no weight). average: a gradient's mean over all processes, each of
    which has the losses of a part of the batch. Source: Esser et al. 2021, equation 7.
    """
    first, second = (average(torch.autograd.grad(loss, last_weight, retain_graph=True)[0]).norm()
                     for loss in (reconstruction_loss, adversarial_loss))
    weight = (first / (second + 1e-4)).clamp(0, LARGEST_WEIGHT).detach()
    return torch.where(second > 0, weight, torch.zeros_like(weight))
