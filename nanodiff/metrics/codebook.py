"""How well a VQ-VAE's codes describe pictures: error, perplexity, bits; for train_vqvae.py and train_vqgan.py."""

import math

import torch
import torch.nn.functional as F

from nanodiff import plots
from nanodiff.data import images
from nanodiff.errors import check
from nanodiff.models.vqvae import perplexity, shares, used


def pixel_variance(training, most=50_000):
    """The variance of all pixel values of at most `most` training pictures, evenly spread over the data set.

    It is the error of the best single grey level; the NMSE is divided by it. UserError when all pixels are equal.
    """
    total = squares = count = 0
    for index in images.spread(training, most).split(1000):
        x = training.read(index, index).double()
        total, squares, count = total + x.sum(), squares + x.square().sum(), count + x.numel()
    variance = float(squares / count - (total / count) ** 2)
    check(variance > 1e-9, f"all {len(training)} training pictures are of one grey level; expected some that differ")
    return variance


@torch.no_grad()
def encode_all(net, dataset, batch=250):
    """The codes int64 [N, H/4, W/4] of all pictures of a data set, on the CPU."""
    device = next(net.parameters()).device
    return torch.cat([net.encode(dataset.read(index, index).to(device)).cpu()
                      for index in torch.arange(len(dataset)).split(batch)])


@torch.no_grad()
def decode_all(net, codes, batch=250):
    """Pictures [N, C, H, W] in [-1, 1] of codes [N, H/4, W/4], on the CPU."""
    device = next(net.parameters()).device
    return torch.cat([net.decode_codes(code_batch.to(device)).clamp(-1, 1).cpu() for code_batch in codes.split(batch)])


def measure(net, held_out, variance, batch=250):
    """(numbers, codes): reconstruction error and use of codes for held-out pictures; the codes int64 [N, H/4, W/4].

    n            pictures
    nmse         mean squared error / `variance` of the training pictures (van den Oord et al.'s "recon_error")
    perplexity   of all codes together; used: share of the codebook that occurs
    bits         per picture, when an ideal code for their frequencies encodes its codes one by one
    """
    codes, squared_error = encode_all(net, held_out, batch), 0.0
    for index in torch.arange(len(held_out)).split(batch):
        error = decode_all(net, codes[index], batch) - held_out.read(index, index)
        squared_error += float(error.double().square().sum())
    K, values = net.config.codes, len(held_out) * math.prod(held_out.shape)
    numbers = {"n": len(held_out), "nmse": squared_error / values / variance, "perplexity": perplexity(codes, K),
             "used": used(codes, K)}
    return numbers | {"bits": codes[0].numel() * math.log2(numbers["perplexity"])}, codes


def sentence(numbers, K):
    """The numbers of `measure` as one line."""
    return (f"{numbers['n']:,} held-out pictures: NMSE {numbers['nmse']:.4f}, perplexity {numbers['perplexity']:.1f}, "
            f"{numbers['used'] * K:.0f} of {K} codes used, {numbers['bits']:.0f} bits a picture")


def table_bits(codes, test, K, by_place=False):
    """Bits per code of `test` [n, length] under the frequencies in `codes` [N, length], in one table or one per place.

    Every count starts at one, so that a code that never occurs in training is rare and not impossible.
    """
    place = torch.arange(codes.shape[1]) * K if by_place else 0
    tables = codes.shape[1] if by_place else 1
    counts = 1 + (codes + place).flatten().bincount(minlength=tables * K).double().view(tables, K)
    share = counts / counts.sum(1, keepdim=True)
    return float(-share.flatten()[test + place].log2().mean())


@torch.no_grad()
def gpt_bits(net, codes, labels, batch=250):
    """Bits per code of pictures' codes [n, length] with labels [n] under the GPT."""
    total, device, training = 0.0, next(net.parameters()).device, net.training
    net.eval()
    for code, label in zip(codes.to(device).split(batch), labels.to(device).split(batch)):
        total += float(F.cross_entropy(net(code[:, :-1], label).flatten(0, 1), code.flatten(), reduction="sum"))
    net.train(training)
    return total / codes.numel() / math.log(2)


def codebook_picture(net, codes, columns=32, most=1000):
    """A sheet of the mean decoded patch of each code in `codes` [N, H/4, W/4], the most used first.

    The first `most` pictures count; unused codes are left out.
    """
    codes = codes[:most]
    share = shares(codes, net.config.codes)
    order = share.argsort(descending=True, stable=True)[:int((share > 0).sum())]
    x = decode_all(net, codes)  # [N, C, H, W]
    side = x.shape[-1] // codes.shape[-1]
    patches = x.unfold(2, side, side).unfold(3, side, side).movedim(1, 3)  # [N, H/4, W/4, C, 4, 4]
    total = torch.zeros(net.config.codes, *patches.shape[3:]).index_add(0, codes.flatten(), patches.flatten(0, 2))
    mean_patch = total / (share * codes.numel()).clamp(min=1).float().view(-1, 1, 1, 1)
    rows = [list(mean_patch[batch]) for batch in order.split(columns)]
    return plots.sheet(rows, title=f"{len(order)} of {net.config.codes} codes, most used first", scale=5)


def reconstructions(net, held_out, most=96):
    """A sheet of at most `most` held-out pictures above their reconstructions (report figure 14)."""
    index = images.spread(held_out, most)
    x = held_out.read(index, index)
    device = next(net.parameters()).device
    with torch.no_grad():
        y = decode_all(net, net.encode(x.to(device)).cpu())
    return plots.reconstructions(x, y)
