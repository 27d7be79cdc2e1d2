"""The VQ-VAE: pictures as a small map of whole numbers, each the place of a vector in a codebook, and back.

What the encoder says of a place is replaced by the nearest vector of the codebook, so that a picture becomes words of
a finite language, which a transformer can then learn to write (gpt.py, vqgan.py).
Source: van den Oord et al. 2017 (arXiv 1711.00937); the network is that of the report's authors; report section 2.1,
figure 14.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.errors import UserError
from nanodiff.models.autoencoder import initialise


# --- the codebook ---------------------------------------------------------------------------------------------------

class Codebook(nn.Module):
    """The nearest of K vectors for every pixel of h [B, D, H, W] (van den Oord et al. 2017, equations 1 to 3).

    Returns the chosen vectors [B, D, H, W] with the straight-through gradient, the loss |sg(h) - e|^2 +
    beta |h - sg(e)|^2 (means), and the codes int64 [B, H, W]. Starts uniform in [-1/K, 1/K].
    """

    def __init__(self, codes, channels, beta=0.25, generator=None):
        super().__init__()
        self.embedding = nn.Embedding(codes, channels)
        self.beta = beta
        if not self.embedding.weight.is_meta:
            nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes, generator=generator)

    def forward(self, h):
        codes = self.nearest(h)
        chosen = self.look_up(codes)
        return h + (chosen - h).detach(), self.loss(h, chosen), codes

    @torch.no_grad()
    def nearest(self, h):
        """The codes int64 [B, H, W] of the vectors nearest to h [B, D, H, W]."""
        with torch.autocast(h.device.type, enabled=False):
            pixels, e = rows_of(h).float(), self.embedding.weight.float()
            # |h - e|^2 / 2 without |h|^2 / 2, which all codes share, and beside which those of a fresh codebook,
            # 1/K apart, would be lost in rounding
            return torch.addmm(e.square().sum(1) / 2, pixels, e.T, alpha=-1).argmin(1).view(len(h), *h.shape[2:])

    def look_up(self, codes):
        """The vectors [B, D, H, W] of codes [B, H, W]."""
        return self.embedding(codes).permute(0, 3, 1, 2)

    def loss(self, h, chosen):
        """What draws the codes to the encoder's vectors and, beta times as strongly, those to the codes."""
        return F.mse_loss(chosen, h.detach()) + self.beta * F.mse_loss(h, chosen.detach())


class MovingCodebook(Codebook):
    """The same codes as running means of the vectors that chose them, in place of a gradient; `ema_update` moves them.

    decay      of the running means: each is sums / counts (van den Oord et al. 2017, appendix A.1)
    patience   steps without use after which a code is dead and starts anew from a vector of the batch
    forward's loss is beta |h - sg(e)|^2 alone.
    """

    def __init__(self, codes, channels, beta=0.25, decay=0.99, patience=10, generator=None):
        super().__init__(codes, channels, beta, generator)
        self.embedding.requires_grad_(False)
        self.decay, self.patience = decay, patience
        # counts of 1 and sums of one vector: the mean is the code, and one step weighs as in all later ones
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.embedding.weight.clone())
        # steps since each code was used; what the very first batch leaves unused starts anew from it: an encoder that
        # has not learned says nearly the same of all pixels, and nearly all of them would choose one code
        self.register_buffer("idle", torch.full((codes,), patience - 1.0))

    def loss(self, h, chosen):
        return self.beta * F.mse_loss(h, chosen.detach())

    @torch.no_grad()
    def ema_update(self, h, codes, generator):
        """One step of the running means towards h [B, D, H, W], all the step's vectors, and their codes [B, H, W].

        generator: a torch.Generator on the CPU, which chooses the vectors that dead codes start from.
        """
        e, pixels, codes = self.embedding.weight, rows_of(h).float(), codes.flatten()
        n = codes.bincount(minlength=len(e)).float()
        self.counts.lerp_(n, 1 - self.decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, codes, pixels), 1 - self.decay)
        used = n > 0  # an unused code stays where it is, though its sum and its count both fade to 0
        e.copy_(torch.where(used[:, None], self.sums / self.counts[:, None].clamp(min=1e-12), e))
        self.idle.add_(1).mul_(~used)
        dead = self.idle >= self.patience
        drawn = pixels[torch.randint(len(pixels), (len(e),), generator=generator).to(pixels.device)]
        for tensor in (e, self.sums):
            tensor.copy_(torch.where(dead[:, None], drawn, tensor))
        self.counts.masked_fill_(dead, 1.0)
        self.idle.masked_fill_(dead, 0.0)


def rows_of(h):
    """h [B, D, H, W] as a table of its pixels [B H W, D]."""
    return h.permute(0, 2, 3, 1).flatten(0, 2)


def shares(codes, K):
    """How often each of K codes stands in `codes` (int64, any shape): float64 [K], 1 in all."""
    counts = codes.flatten().bincount(minlength=K).double()
    return counts / counts.sum()


def perplexity(codes, K):
    """exp of the entropy of the codes' shares: as many codes, used equally often, would say as much; 1 ... K."""
    return float(torch.special.entr(shares(codes, K)).sum().exp())


def used(codes, K):
    """The share of the K codes that occurs at all."""
    return float((shares(codes, K) > 0).double().mean())


# --- the network ----------------------------------------------------------------------------------------------------

@dataclass
class VQVAEConfig:
    """Every size of the VQ-VAE; the defaults are the authors' network for CIFAR-10 (694,851 parameters)."""

    in_channels: int = 3  # channels of the pictures
    channels: int = 128  # width at a quarter of the side; half of it at half the side
    residual_layers: int = 2  # residual layers of the encoder, and of the decoder
    residual_channels: int = 32  # width inside them
    codes: int = 512  # entries of the codebook
    code_channels: int = 64  # width of an entry
    beta: float = 0.25  # weight of the commitment term
    decay: float = 0.0  # of the codebook's running means, such as 0.99 (0: it learns by gradient)
    patience: int = 10  # steps without use after which a code starts anew (with a decay)

    def __post_init__(self):
        for name in ("in_channels", "residual_channels", "codes", "code_channels", "patience"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.channels < 2 or self.channels % 2 or self.residual_layers < 0:
            raise UserError(f"channels {self.channels} and residual_layers {self.residual_layers} are not possible: "
                            "expected an even width, such as 128, and 0 layers or more")
        if not 0 <= self.decay < 1 or not self.beta >= 0:
            raise UserError(f"beta {self.beta} and decay {self.decay} are not possible: expected a weight from 0 and "
                            "a decay from 0 to below 1")


class Residual(nn.Module):
    """x + conv1(relu(conv3(relu(x)))), both convolutions without biases."""

    def __init__(self, channels, inner):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(inner, channels, 1, bias=False)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class VQVAE(nn.Module):
    """encode(x) -> codes, decode_codes(codes) -> pictures; a code stands for 4x4 pixels.

    x [B, in_channels, H, W] in [-1, 1], H and W multiples of 4 (else UserError); codes int64 [B, H/4, W/4] in 0 ... K-1
    generator: draws the initial weights (None: torch's own).
    For training: y, loss, codes, h = net(x).
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = c = config
        half = c.channels // 2
        self.encoder = nn.Sequential(
            nn.Conv2d(c.in_channels, half, 4, 2, 1), nn.ReLU(),  # [B, half, H/2, W/2]
            nn.Conv2d(half, c.channels, 4, 2, 1), nn.ReLU(),  # [B, channels, H/4, W/4]
            nn.Conv2d(c.channels, c.channels, 3, padding=1),
            *(Residual(c.channels, c.residual_channels) for _ in range(c.residual_layers)), nn.ReLU())
        self.into_code = nn.Conv2d(c.channels, c.code_channels, 1)
        self.decoder = nn.Sequential(
            nn.Conv2d(c.code_channels, c.channels, 3, padding=1),
            *(Residual(c.channels, c.residual_channels) for _ in range(c.residual_layers)), nn.ReLU(),
            nn.ConvTranspose2d(c.channels, half, 4, 2, 1), nn.ReLU(),  # [B, half, H/2, W/2]
            nn.ConvTranspose2d(half, c.in_channels, 4, 2, 1))  # [B, in_channels, H, W]
        initialise(self, generator)
        sizes = (c.codes, c.code_channels, c.beta)
        self.codebook = (MovingCodebook(*sizes, c.decay, c.patience, generator) if c.decay
                         else Codebook(*sizes, generator))

    def forward(self, x):
        """(y, loss, codes, h): reconstructions of pictures x, the codebook's loss (equation 3 without the reconstruction's
        term), the codes, and the encoder's vectors h before they become codes."""
        h = self.pre_quant(x)  # [B, D, H/4, W/4]
        quantised, loss, codes = self.codebook(h)
        return self.decode(quantised), loss, codes, h

    def pre_quant(self, x):
        """The encoder's vectors [B, code_channels, H/4, W/4] of pictures x, before they become codes."""
        self.check_size(x.shape[1:])
        x = x / 2  # the authors' range of pixels
        return self.into_code(self.encoder(x.contiguous(memory_format=torch.channels_last)))

    def decode(self, chosen):
        """Pictures [B, in_channels, H, W], about in [-1, 1], from a codebook's vectors [B, code_channels, H/4, W/4]."""
        return 2 * self.decoder(chosen)

    def encode(self, x):
        """The codes int64 [B, H/4, W/4] of pictures x [B, in_channels, H, W] in [-1, 1]."""
        return self.codebook.nearest(self.pre_quant(x))

    def decode_codes(self, codes):
        """Pictures [B, in_channels, H, W] from codes [B, H/4, W/4]; UserError for a code that the codebook lacks."""
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.config.codes:
            raise UserError(f"codes from {int(codes.min())} to {int(codes.max())} are not in this codebook of "
                            f"{self.config.codes}; expected codes that the same network gave")
        return self.decode(self.codebook.look_up(codes))

    @property
    def last_weight(self):
        """The weights of the last layer before the picture."""
        return self.decoder[-1].weight

    def check_size(self, shape):
        """Raises UserError unless pictures (C, H, W) fit this network."""
        channels, height, width = shape
        wanted = self.config.in_channels
        if channels != wanted or height % 4 or width % 4 or not height * width:
            fitting = "x".join(str(max(4, round(side / 4) * 4)) for side in (height, width))
            raise UserError(f"pictures of {channels}x{height}x{width} (channels, height, width) do not fit this VQ-VAE"
                            f", which wants {wanted} channel{'s' * (wanted > 1)}: expected sides that 4 divides, such "
                            f"as {wanted}x{fitting}")
