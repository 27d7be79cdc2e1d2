"""Generative adversarial networks: a generator and its judge, four layers each, and the four losses of `train_gan.py`.

The generator G makes pictures from latents z; the discriminator D says how likely a picture is real, a Wasserstein
critic how much it likes it. Logits come out of both: no sigmoid at the end.
Sources: Goodfellow et al. 2014 (arXiv 1406.2661); Arjovsky et al. 2017 (arXiv 1701.07875); Gulrajani et al. 2017 (arXiv
1704.00028); the layers are those of the report's CIFAR-10 notebook; report sections 2.2.1 to 2.2.3.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff import rng
from nanodiff.errors import UserError


@dataclass
class GANConfig:
    """Sizes of a generator and its judge. The defaults are the report's: 1,708,355 and 663,745 parameters."""

    shape: tuple = (3, 32, 32)  # of a picture (C, H, W); (d,) makes both of linear layers, for points
    latent: int = 256  # numbers in z
    channels: tuple = (64, 128, 256)  # width at a half, a quarter, ... of the side; of points: of each hidden layer
    leak: float = 0.0  # slope of the judge's activation below 0 (0: ReLU)
    norm: bool = True  # batch normalisation in the judge of pictures (never in a Wasserstein critic)

    def __post_init__(self):
        if len(self.shape) not in (1, 3) or min([*self.shape, *self.channels, self.latent]) < 1 or not self.channels:
            raise UserError(f"a GAN for shape {list(self.shape)} with {self.latent} latents and widths "
                            f"{list(self.channels)} cannot be made; expected [C, H, W] or [d] and numbers from 1")


def sides(config):
    """(height, width) at each level, from the picture's to the smallest; each is half of the last, rounded up."""
    found = [tuple(config.shape[1:])]
    for _ in config.channels:
        found.append(tuple(-(-side // 2) for side in found[-1]))
    return found


def _kernels(larger):
    """Kernel of a convolution of stride 2 and padding 1 between a side and its half: 4, or 3 for an odd side."""
    return tuple(4 - side % 2 for side in larger)


class Generator(nn.Module):
    """Latents z [B, latent] to pictures [B, C, H, W] in [-1, 1]: transposed convolutions, batch norm, ReLU, tanh.

    For points of shape (d,): linear layers, ReLU, no last activation, [B, d]. Weights are drawn from `generator`.
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        widths = [config.latent, *reversed(config.channels)]
        if len(config.shape) == 1:
            self.net = _linear(widths, config.shape[0], nn.ReLU())
        else:
            levels = sides(config)[::-1]  # smallest first
            layers, kernel, stride = [], levels[0], (1, 0)  # from one pixel to the smallest side
            for larger, width, out in zip(levels[1:], widths, widths[1:]):
                layers += [nn.ConvTranspose2d(width, out, kernel, *stride), nn.BatchNorm2d(out), nn.ReLU()]
                kernel, stride = _kernels(larger), (2, 1)
            self.net = nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], config.shape[0], kernel, 2, 1), nn.Tanh())
        _initialise(self, generator)

    def forward(self, z):
        _expect(z, "latents", (self.config.latent,))
        return self.net(z if len(self.config.shape) == 1 else z[:, :, None, None])


class Discriminator(nn.Module):
    """Pictures x [B, C, H, W] (or points [B, d]) to one logit each [B]: above 0 is "real"; a critic's score.

    With config.norm the statistics are those of the batch at hand and none are kept, so asking moves nothing. Without,
    the score of a picture does not depend on its neighbours, as the Wasserstein losses need.
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config, act = config, nn.LeakyReLU(config.leak)
        if len(config.shape) == 1:
            self.net = _linear([config.shape[0], *config.channels], 1, act)
        else:
            levels, layers, width = sides(config), [], config.shape[0]
            for i, (larger, out) in enumerate(zip(levels, config.channels)):
                layers.append(nn.Conv2d(width, out, _kernels(larger), 2, 1))
                if config.norm and i > 0:
                    layers.append(nn.BatchNorm2d(out, track_running_stats=False))
                layers.append(act)
                width = out
            self.net = nn.Sequential(*layers, nn.Conv2d(width, 1, levels[-1]))
        _initialise(self, generator)

    def forward(self, x):
        _expect(x, "pictures", self.config.shape)
        return self.net(x).flatten()


@torch.no_grad()
def generate(net, n, seed=0, first=0, batch=250):
    """Pictures first ... first+n-1 of `seed` from a Generator: [n, C, H, W] in [-1, 1] (or points [n, d]), on the CPU.

    A picture of a network in eval mode depends on its number and the seed alone (up to the rounding of convolutions).
    """
    device, drawn = next(net.parameters()).device, []
    for index in torch.arange(first, first + n, device=device).split(batch):
        drawn.append(net(rng.normal(seed, 0, index, (net.config.latent,), stream=4)).cpu())
    return torch.cat(drawn)


def _expect(x, what, shape):
    if tuple(x.shape[1:]) != tuple(shape):
        raise UserError(f"{what} of shape {list(x.shape[1:])} do not fit this network; expected {list(shape)}")


def _linear(widths, out, act):
    layers = []
    for width, following in zip(widths, widths[1:]):
        layers += [nn.Linear(width, following), act]
    return nn.Sequential(*layers, nn.Linear(widths[-1], out))


def _initialise(net, generator):
    """Convolutions as in Radford et al. 2016 (arXiv 1511.06434): deviation 0.02, no offset. Linear layers as in torch:
    uniform, and their offsets too, or all the kinks of a network of the plane would lie at its middle."""
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0, 0.02, generator=generator)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            for tensor in (layer.weight, layer.bias):
                nn.init.uniform_(tensor, -layer.in_features**-0.5, layer.in_features**-0.5, generator=generator)


# --- losses ---------------------------------------------------------------------------------------------------------

def value(real, fake):
    """V(D, G) = E log D(x) + E log(1 - D(G(z))) of logits on real and generated pictures, in nats.

    The discriminator climbs it. The best one for densities p and q is D = p / (p + q), where V = 2 JSD(p, q) - 2 log 2;
    the lowest that G can make of this is -2 log 2, at q = p. Goodfellow et al. 2014, equation 1, theorem 1; report (3).
    """
    return F.logsigmoid(real).mean() + F.logsigmoid(-fake).mean()


def minimax(fake):
    """E log(1 - D(G(z))), the generator's part of V, which it descends; flat where D is sure. Goodfellow et al. 2014,
    equation 1."""
    return F.logsigmoid(-fake).mean()


def non_saturating(fake):
    """-E log D(G(z)): the same fixed point, but steep where D is sure. Goodfellow et al. 2014, section 3."""
    return -F.logsigmoid(fake).mean()


def wasserstein(real, fake):
    """E f(x) - E f(G(z)): the critic f climbs it; over all 1-Lipschitz f its top is the earth mover's distance.

    Arjovsky et al. 2017, equation 2. The generator descends -E f(G(z)), `-fake.mean()`.
    """
    return real.mean() - fake.mean()


@torch.no_grad()
def clip_weights(critic, limit):
    """Every weight back into [-limit, limit], after an update: keeps f Lipschitz. Arjovsky et al. 2017, algorithm 1."""
    for weight in critic.parameters():
        weight.clamp_(-limit, limit)


def gradient_penalty(critic, real, fake, share):
    """E (|grad f(y)| - 1)^2 at y = share x + (1 - share) G(z): soft Lipschitz. Gulrajani et al. 2017, equation 3.

    share [B] in [0, 1], one number a picture. The norm is over all of a picture's dimensions; where it is 0 its
    gradient is taken as 0.
    """
    share = share.to(real.dtype).view(-1, *[1] * (real.ndim - 1))  # [B, 1, 1, 1]
    y = (share * real + (1 - share) * fake.detach()).requires_grad_()
    gradient, = torch.autograd.grad(critic(y).sum(), y, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()
