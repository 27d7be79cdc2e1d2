"""What a VAE's bound is on pictures: both of its terms, and a tighter bound on log p(x)."""

import torch

from nanodiff import rng
from nanodiff.data.images import spread
from nanodiff.models.autoencoder import cross_entropy, entropy, levels
from nanodiff.models.vae import importance_weighted_bound


@torch.no_grad()
def measure(net, images, seed, most=10_000):
    """Means in nats a picture over at most that many pictures, evenly spread, one draw each: reconstruction, kl, their
    sum minus_elbo, and floor, the entropy of the levels."""
    places, device = spread(images, most), next(net.parameters()).device
    total = torch.zeros(3, dtype=torch.float64)
    for index in places.split(500):
        x = images.read(index, index).to(device)
        level, posterior = levels(x), net.encode(x)
        noise = rng.normal(seed, -1, index.to(device), (net.config.latent,))
        logits = net.decode(posterior.mean + torch.exp(0.5 * posterior.logvar) * noise)
        for i, nats in enumerate((cross_entropy(logits, level), posterior.kl(), entropy(level))):
            total[i] += nats.double().sum().cpu()
    reconstruction, kl, floor = (total / len(places)).tolist()
    return {"reconstruction": reconstruction, "kl": kl, "minus_elbo": reconstruction + kl, "floor": floor}


@torch.no_grad()
def measure_bound(net, images, k, seed, most=2000):
    """The importance-weighted bound on -log p(x) with k draws beside the same draws' -ELBO (k = 1), means in nats."""
    places, device = spread(images, most), next(net.parameters()).device
    tight = loose = 0.0
    for index in places.split(max(1, 2000 // k)):
        x = images.read(index, index).to(device)
        posterior = net.encode(x)
        noise = rng.normal(seed, -2, index.to(device), (k, net.config.latent)).transpose(0, 1)
        z = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise  # [k, B, latent]
        log_likelihood = -cross_entropy(net.decode(z), levels(x))  # [k, B]
        tight -= float(importance_weighted_bound(log_likelihood, z, posterior).double().sum())
        loose -= float((log_likelihood.mean(0) - posterior.kl()).double().sum())
    return {"pictures": len(places), "draws": k, "minus_log_p": tight / len(places), "minus_elbo": loose / len(places)}


@torch.no_grad()
def posteriors(net, x):
    """Means and standard deviations [N, latent] of q(z|x) for pictures x, on the CPU."""
    device = next(net.parameters()).device
    gaussians = [net.encode(part.to(device)) for part in x.split(500)]
    return (torch.cat([q.mean for q in gaussians]).cpu(),
            torch.cat([torch.exp(0.5 * q.logvar) for q in gaussians]).cpu())
