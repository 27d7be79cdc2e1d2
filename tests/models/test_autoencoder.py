"""The autoencoder: the report's sizes, mirrored halves, the cross-entropy and its floor, pictures that do not fit."""

import math

import pytest
import torch
from torch import nn

from conftest import same
from nanodiff.errors import UserError
from nanodiff.models.autoencoder import (Autoencoder, AutoencoderConfig, cross_entropy, drawn, entropy, initialise,
                                         levels, picture)
from nanodiff.pixels import from_uint8


def fresh(seed=0, **sizes):
    return Autoencoder(AutoencoderConfig(**sizes), torch.Generator().manual_seed(seed))


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def count(net):
    return sum(p.numel() for p in net.parameters())


# --- the networks ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes, parameters", [
    ({}, 913_736),
    ({"widths": (500, 120, 32), "latent": 2}, 913_898),
    ({"widths": (512, 128, 64), "latent": 2}, 952_722),
    ({"net": "conv", "shape": (3, 32, 32), "widths": (12, 24, 48), "latent": 512}, 835_067),
])
def test_the_reports_networks_have_the_reports_number_of_parameters(sizes, parameters):
    assert count(fresh(**sizes)) == parameters


@pytest.mark.parametrize("sizes", [
    {"shape": (1, 28, 28)}, {"shape": (3, 5, 7), "widths": ()}, {"shape": (2, 6, 4), "widths": (9,)},
    {"net": "conv", "shape": (1, 28, 28), "widths": (4, 8)}, {"net": "conv", "shape": (4, 24, 16), "widths": (4, 6, 8)},
    {"net": "conv", "shape": (3, 2, 2), "widths": (4,)}])
def test_any_channels_and_sides_that_fit_come_back_in_their_shape(sizes):
    net = fresh(latent=3, **sizes)
    x = noise(2, *sizes["shape"])
    z = net.encode(x)
    assert z.shape == (2, 3) and net.decode(z).shape == x.shape and torch.equal(net(x), net.decode(z))


@pytest.mark.parametrize("sizes", [{"widths": (9, 5)}, {"net": "conv", "widths": (4, 6)}])
def test_the_decoder_is_the_encoder_backwards(sizes):
    net = fresh(shape=(2, 8, 8), latent=3, **sizes)
    layers = [[one for one in half if isinstance(one, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))]
              for half in (net.encoder, net.decoder)]
    for there, back in zip(layers[0], reversed(layers[1])):
        shape = back.weight.shape
        assert there.weight.shape == ((shape[1], shape[0]) if len(shape) == 2 else shape)
    for half in (net.encoder, net.decoder):
        assert sum(isinstance(one, nn.ReLU) for one in half) == len(sizes["widths"])
        assert not isinstance(half[-1], nn.ReLU)


def test_the_latent_is_linear_unless_a_relu_is_asked_for():
    x = noise(64, 1, 28, 28)
    plain, cut = fresh(latent=4).encode(x), fresh(latent=4, latent_relu=True).encode(x)
    assert plain.min() < 0 and torch.equal(cut, plain.clamp(min=0))


def test_the_network_sees_levels_from_0_to_1_and_no_more_of_a_pixel():
    net = fresh(shape=(1, 2, 2), widths=(), latent=4)
    with torch.no_grad():
        net.encoder[1].weight.copy_(torch.eye(4))
        net.encoder[1].bias.zero_()
    x = torch.tensor([-1.0, 0, 0.5, 1]).view(1, 1, 2, 2)
    assert net.encode(x).tolist() == [[0, 0.5, 0.75, 1]]


def test_weights_follow_from_the_generator_alone_and_spread_as_pytorchs_own():
    torch.manual_seed(7)
    first = fresh(3, net="conv", shape=(3, 32, 32), widths=(12, 24), latent=64)
    torch.manual_seed(8)
    again = fresh(3, net="conv", shape=(3, 32, 32), widths=(12, 24), latent=64)
    assert same(dict(first.state_dict()), dict(again.state_dict()))
    assert not torch.equal(first.decoder[0].weight, fresh(4, net="conv", shape=(3, 32, 32), widths=(12, 24),
                                                          latent=64).decoder[0].weight)
    for layer in (nn.Linear(50, 40), nn.Conv2d(6, 40, 4), nn.ConvTranspose2d(40, 6, 4)):
        own = layer.weight.detach().clone()
        initialise(layer, torch.Generator().manual_seed(0))
        assert not torch.equal(own, layer.weight)
        assert layer.weight.abs().max().item() == pytest.approx(own.abs().max().item(), rel=0.05)
        assert layer.weight.std().item() == pytest.approx(own.std().item(), rel=0.1)


# --- the error -------------------------------------------------------------------------------------------------------

def test_the_cross_entropy_of_half_knowing_is_log_2_a_value():
    logits = torch.zeros(2, 3, 4, 5)
    for level in (torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4, 5), torch.rand(2, 3, 4, 5)):
        assert torch.allclose(cross_entropy(logits, level), torch.full((2,), 60 * math.log(2)))


def test_the_cross_entropy_equals_its_definition_and_is_summed_over_a_picture():
    level, logits = (noise(4, 2, 3, 3).double() + 1) / 2, 3 * noise(4, 2, 3, 3, seed=1).double()
    p = torch.sigmoid(logits)
    expected = -(level * p.log() + (1 - level) * (1 - p).log())
    assert torch.allclose(cross_entropy(logits, level), expected.sum((1, 2, 3)))
    several = torch.stack([logits, 2 * logits, -logits])  # [L, B, C, H, W], one level for all
    assert torch.equal(cross_entropy(several, level)[0], cross_entropy(logits, level))
    assert cross_entropy(several, level).shape == (3, 4)


def test_no_logits_get_below_the_entropy_and_the_right_ones_reach_it():
    level = (noise(6, 1, 5, 5).double() + 1) / 2
    floor = entropy(level)
    right = torch.logit(level)
    assert torch.allclose(cross_entropy(right, level), floor)
    for change in (0.3 * noise(6, 1, 5, 5, seed=1), torch.full((6, 1, 5, 5), 2.0)):
        assert bool((cross_entropy(right + change, level) > floor).all())
    assert entropy(torch.tensor([0.0, 1.0, 1.0, 0.0]).view(1, 1, 2, 2)).item() == 0  # black and white has none
    assert entropy(torch.full((1, 1, 2, 2), 0.5)).item() == pytest.approx(4 * math.log(2))


def test_the_drawn_picture_is_the_level_of_the_logits_in_minus_1_to_1():
    levels = torch.tensor([0.1, 0.5, 0.9]).double()
    assert torch.allclose(picture(torch.logit(levels)), 2 * levels - 1)
    net, z = fresh(shape=(1, 4, 4), widths=(6,), latent=2), noise(7, 2)
    assert torch.allclose(drawn(net, z, batch=3), picture(net.decode(z)), atol=1e-6)
    assert not drawn(net, z).requires_grad


@pytest.mark.parametrize("sizes", [{}, {"net": "conv", "widths": (4, 8)}])
def test_values_far_from_any_picture_give_a_finite_loss_and_gradient(sizes):
    net = fresh(**sizes)
    x = 1e4 * noise(2, 1, 28, 28)
    loss = cross_entropy(net(x), (x + 1) / 2).mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())


def test_a_picture_learned_by_heart_reaches_the_floor():
    net = fresh(shape=(1, 4, 4), widths=(16,), latent=2)
    x = noise(3, 1, 4, 4)
    optimiser = torch.optim.Adam(net.parameters(), lr=5e-2, fused=True)
    for _ in range(100):
        loss = cross_entropy(net(x), (x + 1) / 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    floor = entropy((x + 1) / 2).mean()
    assert floor < loss < floor + 0.1


# --- wrong input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 1, 32, 32), (2, 1, 28, 14), (1, 28, 28), (2, 784)])
def test_pictures_of_another_shape_are_refused_with_both_shapes(shape):
    with pytest.raises(UserError) as error:
        fresh().encode(torch.zeros(shape))
    assert "x".join(map(str, shape[1:])) in str(error.value) and "expected 1x28x28" in str(error.value)


def test_latents_of_another_size_are_refused_with_both_sizes():
    with pytest.raises(UserError, match=r"\[4, 3\].*\[B, 32\]"):
        fresh().decode(torch.zeros(4, 3))


@pytest.mark.parametrize("sizes, expected", [
    ({"net": "cnv"}, "nearest: conv"),
    ({"net": "conv", "widths": (12, 24, 48)}, "pictures of 1x28x28 do not fit 3 halvings .* 8 must divide .* 1x32x32"),
    ({"net": "conv", "widths": ()}, "at least one width"),
    ({"widths": (5, 0)}, "at least 1"), ({"latent": 0}, "at least 1"), ({"shape": (28, 28)}, "at least 1")])
def test_sizes_that_cannot_be_are_refused(sizes, expected):
    with pytest.raises(UserError, match=expected):
        AutoencoderConfig(**sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_levels_are_half_of_x_plus_1_bit_for_bit(dtype):
    x = torch.cat([from_uint8(torch.arange(256, dtype=torch.uint8)), torch.randn(10_000)]).to(dtype)
    assert torch.equal(levels(x), (x + 1) / 2)
