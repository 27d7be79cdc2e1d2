"""Latents of unit variance: the 1x1 convolutions beside them take it up, and reconstructions stay what they were."""

import pytest
import torch

from nanodiff.errors import UserError
from nanodiff.models.kl_autoencoder import DiagonalGaussian, KLAutoencoder, KLAutoencoderConfig, balance


def network(**changes):
    """A small autoencoder, all weights random and none 0."""
    generator = torch.Generator().manual_seed(0)
    net = KLAutoencoder(KLAutoencoderConfig(channels=(4, 8), blocks=1, groups=2, **changes), generator)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net.eval().requires_grad_(False)


def unbalanced():
    """(network whose latents are far from unit variance, pictures, mean and std of their latents by channel)."""
    net, x = network(), torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    z = net.encode(x).mode()
    return net, x, z.mean((0, 2, 3)), z.std((0, 2, 3))


def test_balanced_latents_have_mean_0_and_deviation_1_and_reconstructions_are_what_they_were():
    net, x, mean, std = unbalanced()
    assert (std - 1).abs().max() > 0.1 and mean.abs().max() > 0.1
    before = net.decode(net.encode(x).mode())
    balance(net, mean, std)
    z = net.encode(x).mode()
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=1e-5, atol=0)
    assert (net.decode(z) - before).abs().max() <= 1e-5 * before.abs().max()
    unchanged = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    balance(net, torch.zeros(4), torch.ones(4))  # nothing is left to do
    assert all(torch.equal(tensor, unchanged[name]) for name, tensor in net.state_dict().items())


def test_the_noise_of_a_balanced_latent_shrinks_with_its_channel():
    net, x, mean, std = unbalanced()
    before = net.encode(x)
    balance(net, mean, std)
    after = net.encode(x)
    by_channel = std.view(-1, 1, 1)
    torch.testing.assert_close((after.logvar / 2).exp(), (before.logvar / 2).exp() / by_channel, rtol=1e-5, atol=0)
    draws = [one.sample(torch.Generator().manual_seed(0)) for one in (before, after)]
    torch.testing.assert_close(draws[1], (draws[0] - mean.view(-1, 1, 1)) / by_channel, rtol=1e-4, atol=1e-5)
    z = (before.mean - mean.view(-1, 1, 1)) / by_channel
    assert torch.allclose(after.kl(), DiagonalGaussian(z, before.logvar - 2 * by_channel.log()).kl(), rtol=1e-4)


def test_a_dead_channel_is_named_and_without_the_1x1_convolutions_nothing_can_be_balanced():
    net, _, mean, std = unbalanced()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    std[[1, 3]] = torch.tensor([0.0, float("nan")])
    with pytest.raises(UserError, match=r"channels \[1, 3\] are dead"):
        balance(net, mean, std)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    with pytest.raises(UserError, match="only with quant_conv"):
        balance(network(quant_conv=False), mean, torch.ones(4))
