"""How good an autoencoder's reconstructions are: PSNR, SSIM, classes predicted; and statistics of its latents.

    y = reconstruct(net, x)
    print(table(measure(x, y, labels)))
"""

import torch

from nanodiff import fast, worlds
from nanodiff.classifiers.worlds import classify, load_classifier
from nanodiff.metrics.image_quality import psnr, ssim
from nanodiff.models.vqvae import perplexity, used


@torch.no_grad()
def reconstruct(net, x, batch=32):
    """Pictures [N, 3, H, W] through the most likely latent and back, in [-1, 1]."""
    device = next(net.parameters()).device
    parts = []
    with fast.packed(net):
        for part in x.split(batch):
            z = net.encode(part.to(device))
            parts.append(net.decode(z if torch.is_tensor(z) else z.mode()).float().clamp(-1, 1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def latent_statistics(net, x, batch=100):
    """Mean and standard deviation of a draw from the posterior, by channel, and its mean KL in nats a picture."""
    device = next(net.parameters()).device
    with fast.packed(net):
        posteriors = [net.encode(part.to(device)) for part in x.split(batch)]
    generator = torch.Generator(device).manual_seed(0)
    z = torch.cat([one.sample(generator) for one in posteriors]) * net.config.scaling_factor
    return {"mean": z.mean((0, 2, 3)).tolist(), "std": z.std((0, 2, 3)).tolist(),
            "noise": float(torch.cat([one.logvar for one in posteriors]).div(2).exp().mean()),
            "kl": float(torch.cat([one.kl() for one in posteriors]).mean())}


@torch.no_grad()
def code_statistics(net, x, batch=100):
    """How many entries the codebook has, the share that pictures x use, and the perplexity of their codes."""
    device, K = next(net.parameters()).device, net.config.codes
    with fast.packed(net):
        codes = torch.cat([net.quantize.nearest(net.encode(part.to(device))).cpu() for part in x.split(batch)])
    return {"codes": K, "used": used(codes, K), "perplexity": perplexity(codes, K)}


def psnr_and_ssim(x, y, batch=200):
    """PSNR in dB and SSIM [N] of y for x in [-1, 1]; taken in 0 ... 1, where SSIM's luminance has a meaning."""
    parts = [((a + 1) / 2, (b + 1) / 2) for a, b in zip(x.split(batch), y.split(batch))]
    return torch.cat([psnr(b, a, 1) for a, b in parts]), torch.cat([ssim(b, a, 1) for a, b in parts])


def measure(x, y, labels=None):
    """{"groups": {group: numbers}}: PSNR and SSIM of copies y for originals x [N, 3, H, W] in [-1, 1].

    For all and by group of classes; with the classes' names also the shares of x and of y that are classified right.
    """
    quality, likeness = psnr_and_ssim(x, y)
    groups = {"all": torch.ones(len(x), dtype=torch.bool)}
    if labels:
        groups |= {name: torch.tensor([label in names for label in labels]) for name, names in worlds.GROUPS.items()}
        classifier = load_classifier()
        right = {}
        for name, pictures in (("original", x), ("reconstruction", y)):
            predicted = classify(classifier, pictures).names()
            right[name] = torch.tensor([a == b for a, b in zip(predicted, labels)]).double()
    rows = {}
    for group, members in groups.items():
        rows[group] = {"n": int(members.sum()), "psnr": float(quality[members].mean()),
                       "ssim": float(likeness[members].mean())}
        if labels:
            rows[group] |= {"read_" + name: float(hits[members].mean()) for name, hits in right.items()}
    return {"groups": rows}


def table(numbers):
    """The groups of `measure` as Markdown."""
    lines = ["| held-out pictures | n | PSNR dB | SSIM | read right | reconstructions | share kept |",
             "|---|---|---|---|---|---|---|"]
    for name, row in numbers["groups"].items():
        line = f"| {name} | {row['n']:,} | {row['psnr']:.2f} | {row['ssim']:.3f} |"
        if "read_original" in row:
            line += (f" {row['read_original']:.2%} | {row['read_reconstruction']:.2%} | "
                     f"{row['read_reconstruction'] / max(row['read_original'], 1e-9):.2%} |")
        lines.append(line)
    return "\n".join(lines)
