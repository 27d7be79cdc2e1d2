"""Stable Diffusion's autoencoder: pictures to latents of an eighth of the side and back, so that diffusion is cheap.

The encoder gives a Gaussian for each latent pixel, held near N(0, 1) by a slight KL term (KLAutoencoder), or the
nearest entry of a codebook (VQAutoencoder). Attribute names are the keys of diffusers' AutoencoderKL and VQModel.
Source: Rombach et al. 2022 (arXiv 2112.10752), section 3.1 and appendix G; Esser et al. 2021 (arXiv 2012.09841) for its
parts; report section 4.1.1, figures 38, 41.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanodiff.diffusion.process import randn_like
from nanodiff.errors import UserError, nearest
from nanodiff.models.blocks import (ACTIVATIONS, Downsample, MidBlock, ResnetBlock, SpatialAttention, Upsample,
                                    initialise)
from nanodiff.models.vqvae import Codebook


@dataclass
class KLAutoencoderConfig:
    """Every size of the autoencoder; the defaults are Stable Diffusion's (83,653,863 parameters, f = 8)."""

    in_channels: int = 3  # channels of the pictures
    out_channels: int = 3  # channels of the reconstructions
    latent_channels: int = 4  # channels of a latent
    channels: tuple[int, ...] = (128, 256, 512, 512)  # width of each level; n levels make latents 2 ** (n - 1) smaller
    blocks: int = 2  # ResNet blocks a level of the encoder (one more in the decoder)
    mid_attention: bool = True  # self-attention at the smallest size
    groups: int = 32  # groups of every group normalisation
    activation: str = "silu"  # silu (swish), gelu, relu or mish
    quant_conv: bool = True  # a 1x1 convolution behind the encoder and one before the decoder
    scaling_factor: float = 0.18215  # latents times this have about unit variance: what the U-Net is shown
    codes: int = 0  # entries of the codebook (VQAutoencoder); 0: none
    code_channels: int | None = None  # width of a codebook entry; None: latent_channels

    def __post_init__(self):
        self.channels = tuple(self.channels)
        if self.activation not in ACTIVATIONS:
            raise UserError(f'activation "{self.activation}" is unknown; expected one of {", ".join(ACTIVATIONS)}'
                            + nearest(self.activation, ACTIVATIONS))
        if not self.channels or min(self.channels) < 1 or min(self.blocks, self.groups, self.latent_channels) < 1:
            raise UserError(f"channels {self.channels}, blocks {self.blocks}, groups {self.groups} and "
                            f"latent_channels {self.latent_channels} must all be at least 1")
        for width in self.channels:
            if width % self.groups:
                raise UserError(f"{width} channels cannot be split into {self.groups} groups: "
                                "groups must divide every entry of channels")
        if not self.scaling_factor > 0:
            raise UserError(f"scaling_factor must be above 0, not {self.scaling_factor}")

    @property
    def factor(self):
        """How many pixels of a side make one of the latent's: f in the paper."""
        return 2 ** (len(self.channels) - 1)


class DiagonalGaussian:
    """A normal distribution for every number of a latent: mean and logvar [B, C, H, W], logvar kept in -30 ... 20."""

    def __init__(self, mean, logvar):
        self.mean, self.logvar = mean, logvar.clamp(-30, 20)

    def sample(self, generator=None):
        """A draw [B, C, H, W]; generator: one, or a list with one for each picture."""
        return self.mean + torch.exp(0.5 * self.logvar) * randn_like(self.mean, generator)

    def mode(self):
        """The most likely latent: the mean."""
        return self.mean

    def kl(self):
        """KL(this, N(0, 1)) in nats, summed over each latent's numbers: [B] (Kingma & Welling 2014, appendix B)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)


class EncoderBlock(nn.Module):
    """One level of the encoder: ResNet blocks, then half the size (padded right and bottom)."""

    def __init__(self, resnets, downsample=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([downsample] if downsample is not None else [])

    def forward(self, x):
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class DecoderBlock(nn.Module):
    """One level of the decoder: ResNet blocks, then twice the size."""

    def __init__(self, resnets, upsample=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.upsamplers = nn.ModuleList([upsample] if upsample is not None else [])

    def forward(self, x):
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class Half(nn.Module):
    """What encoder and decoder share: the smallest level and the way out of the network."""

    def __init__(self, config, width, out_width, out_channels):
        super().__init__()
        self.config = config
        attention = SpatialAttention(width, 1, width, config.groups) if config.mid_attention else None
        self.mid_block = MidBlock([self.resnet(width, width), self.resnet(width, width)], attention)
        self.conv_norm_out = nn.GroupNorm(config.groups, out_width, 1e-6)
        self.conv_out = nn.Conv2d(out_width, out_channels, 3, padding=1)

    def resnet(self, in_channels, out_channels):
        return ResnetBlock(in_channels, out_channels, None, self.config.groups, 1e-6, self.config.activation)

    def out(self, x):
        return self.conv_out(ACTIVATIONS[self.config.activation](self.conv_norm_out(x)))


class Encoder(Half):
    """Pictures [B, in_channels, H, W] to maps [B, out_channels, H / f, W / f]."""

    def __init__(self, config, out_channels):
        super().__init__(config, config.channels[-1], config.channels[-1], out_channels)
        width, last = config.channels[0], len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, out in enumerate(config.channels):
            resnets = [self.resnet(width if i == 0 else out, out) for i in range(config.blocks)]
            self.down_blocks.append(EncoderBlock(resnets, Downsample(out, padding=0) if level < last else None))
            width = out

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.out(self.mid_block(x))


class Decoder(Half):
    """Latents [B, latent_channels, h, w] to pictures [B, out_channels, f h, f w]."""

    def __init__(self, config):
        super().__init__(config, config.channels[-1], config.channels[0], config.out_channels)
        width = config.channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.up_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(config.channels))):
            resnets = [self.resnet(width if i == 0 else out, out) for i in range(config.blocks + 1)]
            self.up_blocks.append(DecoderBlock(resnets, Upsample(out) if level > 0 else None))
            width = out

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.out(x)


class KLAutoencoder(nn.Module):
    """encode(x) -> DiagonalGaussian, decode(z) -> pictures; z is raw, not times config.scaling_factor.

    x [B, 3, H, W] in [-1, 1], H and W multiples of f = config.factor (else UserError)
    z [B, latent_channels, H / f, W / f]
    generator: draws the initial weights (None: torch's own); under torch.device("meta") there are none to draw.
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = c = config
        self.encoder = Encoder(c, 2 * c.latent_channels)
        self.decoder = Decoder(c)
        self.quant_conv = nn.Conv2d(2 * c.latent_channels, 2 * c.latent_channels, 1) if c.quant_conv else None
        self.post_quant_conv = nn.Conv2d(c.latent_channels, c.latent_channels, 1) if c.quant_conv else None
        if not self.encoder.conv_in.weight.is_meta:
            initialise(self, generator)

    @property
    def dtype(self):
        """Of the weights, and of the pictures and latents that go in; a norm's is never in an order of its own."""
        return self.decoder.conv_norm_out.weight.dtype

    def encode(self, x):
        """The distribution of the latents of pictures x [B, 3, H, W] in [-1, 1]."""
        self.check_size(x)
        h = self.encoder(x)
        mean, logvar = (h if self.quant_conv is None else self.quant_conv(h)).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar)

    def decode(self, z, tile=0, overlap=0.25):
        """Pictures [B, 3, f h, f w] from latents z [B, C, h, w], about in [-1, 1].

        tile: side of the latent squares that are decoded one by one, for large pictures (0: all at once). Neighbours
        share `overlap` of a tile, across which they are blended. Each tile is normalised by itself, so that tiled
        pictures differ a little from whole ones.
        """
        if tile and max(z.shape[2:]) > tile:
            return self._decode_tiles(z, tile, max(1, int(tile * overlap)))
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def forward(self, x, generator=None):
        """(reconstruction, distribution) of pictures x through a random latent: what training needs."""
        posterior = self.encode(x)
        return self.decode(posterior.sample(generator)), posterior

    def _decode_tiles(self, z, tile, shared):
        f = self.config.factor
        if not 0 < shared < tile:
            raise UserError(f"tiles of {tile} that share {shared} cannot be: tile must be 0 (none) or at least 2, and "
                            "overlap above 0 and below 1")
        x = None

        def starts(length):
            return [*range(0, max(length - tile, 0), tile - shared), max(length - tile, 0)]

        for top in starts(z.shape[2]):
            for left in starts(z.shape[3]):
                piece = self.decode(z[:, :, top : top + tile, left : left + tile])
                ramps = [_ramp(piece.shape[d], shared * f, start > 0, start + tile < z.shape[d])
                         for d, start in ((2, top), (3, left))]
                share = (ramps[0][:, None] * ramps[1]).to(piece)
                if x is None:
                    x = piece.new_zeros(*piece.shape[:2], f * z.shape[2], f * z.shape[3])
                    weight = piece.new_zeros(x.shape[2:])
                place = (slice(f * top, f * top + piece.shape[2]), slice(f * left, f * left + piece.shape[3]))
                x[:, :, place[0], place[1]] += share * piece
                weight[place] += share
        return x / weight

    def check_size(self, x):
        f = self.config.factor
        height, width = x.shape[2:]
        if height % f or width % f:
            raise UserError(f"a picture of {height}x{width} does not fit this autoencoder: both sides must be "
                            f"multiples of {f}; {max(f, round(height / f) * f)}x{max(f, round(width / f) * f)} would fit")


class Pixels(nn.Module):
    """No autoencoder: a picture is its own latent, f = 1, for diffusion in pixels by the same code (report figure 41)."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.config = KLAutoencoderConfig(latent_channels=3, channels=(1,), groups=1, scaling_factor=1.0)

    def encode(self, x):
        """The picture, and no doubt about it: the least variance that a DiagonalGaussian has."""
        return DiagonalGaussian(x, torch.full_like(x, -30))

    def decode(self, z, tile=0):
        return z


@torch.no_grad()
def balance(net, mean, std):
    """Shifts and scales a KLAutoencoder's latents, in place, by channel: with mean and std [C] as measured, to 0 and 1.

    The 1x1 convolutions on both sides of the latent take it up, so that reconstructions stay what they were; a diffusion
    model then sees every channel at the same strength. UserError for a channel that never changes, or no such layers.
    """
    if net.quant_conv is None:
        raise UserError("latents can be balanced only with quant_conv, the 1x1 convolutions beside them")
    if not bool((std > 1e-6).all()):
        raise UserError(f"latent channels {(~(std > 1e-6)).nonzero().flatten().tolist()} are dead: they are the same for "
                        "all pictures")
    out, into = net.quant_conv, net.post_quant_conv
    into.bias += into.weight[:, :, 0, 0] @ mean.to(into.bias)
    into.weight *= std.to(into.weight)[None, :, None, None]
    channels = len(std)
    out.bias[:channels] -= mean.to(out.bias)
    out.bias[:channels] /= std.to(out.bias)
    out.weight[:channels] /= std.to(out.weight)[:, None, None, None]
    out.bias[channels:] -= 2 * std.to(out.bias).log()  # of the log-variance: the noise shrinks with its channel


def _ramp(length, shared, at_start, at_end):
    """Weights [length] of a tile's pixels: rising from a neighbour at its start, falling to one at its end."""
    rise = torch.linspace(0, 1, shared + 2)[1:-1]
    weight = torch.ones(length)
    if at_start:
        weight[:shared] = rise
    if at_end:
        weight[length - shared:] *= rise.flip(0)
    return weight


class VQAutoencoder(nn.Module):
    """The same encoder and decoder with a codebook between them (report 4.1.1: the other regularisation).

    encode(x) -> maps [B, code_channels, H/f, W/f] before quantisation; quantise them with `quantize`; decode(h) ->
    pictures from maps, quantised first. Keys as in diffusers' VQModel.
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = c = config
        if c.codes < 1:
            raise UserError(f"codes is {c.codes}; expected the number of codebook entries, such as 512")
        width = c.code_channels or c.latent_channels
        self.encoder = Encoder(c, c.latent_channels)
        self.decoder = Decoder(c)
        self.quantize = Codebook(c.codes, width)
        self.quant_conv = nn.Conv2d(c.latent_channels, width, 1)
        self.post_quant_conv = nn.Conv2d(width, c.latent_channels, 1)
        if not self.quant_conv.weight.is_meta:
            initialise(self, generator)
            nn.init.uniform_(self.quantize.embedding.weight, -1 / c.codes, 1 / c.codes, generator=generator)

    def encode(self, x):
        KLAutoencoder.check_size(self, x)
        return self.quant_conv(self.encoder(x))

    def decode(self, h):
        return self.decoder(self.post_quant_conv(self.quantize(h)[0]))

    def forward(self, x):
        """(reconstruction, codebook loss, codes) of pictures x: what training needs."""
        chosen, loss, codes = self.quantize(self.encode(x))
        return self.decoder(self.post_quant_conv(chosen)), loss, codes
