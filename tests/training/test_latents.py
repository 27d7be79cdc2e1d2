"""Cached latents: distributions, flips and crops; nothing depends on the batch."""

import pytest
import torch

from nanodiff import rng
from nanodiff.data.images import Images
from nanodiff.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
from nanodiff.training import latents
from nanodiff.training.batches import Batches

SCALE = 0.7


@pytest.fixture(scope="module")
def autoencoder():
    """f = 2, with random weights and noise of about e^-1 in its latents."""
    sizes = KLAutoencoderConfig(channels=(8, 8), latent_channels=2, blocks=1, groups=4, scaling_factor=SCALE)
    net = KLAutoencoder(sizes, torch.Generator().manual_seed(0)).eval().requires_grad_(False)
    net.quant_conv.bias[2:] -= 2
    return net


def pictures(n=6, size=8, **options):
    """n pictures of noise, none of them symmetric."""
    pixels = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Images(pixels, torch.arange(n), [str(i) for i in range(n)], [f"picture {i}" for i in range(n)], **options)


def test_the_cache_keeps_mean_and_deviation_times_the_scaling_factor(autoencoder):
    data = pictures()
    cache = latents.encode(autoencoder, data)
    posterior = autoencoder.encode(data.read(torch.arange(6), torch.arange(6)))
    assert cache.shape == (2, 4, 4) and cache.mean.shape == cache.std.shape == (6, 1, 2, 4, 4)
    assert torch.allclose(cache.mean[:, 0], SCALE * posterior.mean, atol=1e-6)
    assert torch.allclose(cache.std[:, 0], SCALE * torch.exp(0.5 * posterior.logvar), atol=1e-6)
    assert cache.captions == data.captions and cache.classes == data.classes and torch.equal(cache.labels, data.labels)


def test_two_draws_of_a_picture_differ_and_their_mean_and_deviation_are_the_caches(autoencoder):
    cache = latents.encode(autoencoder, pictures())
    n = 4000
    draws = cache.read(torch.full((n,), 3), rng.scramble(0, torch.arange(n)))
    assert not torch.equal(draws[0], draws[1])
    error = cache.std[3, 0] / n**0.5  # of a mean of n draws
    assert ((draws.mean(0) - cache.mean[3, 0]).abs() < 5 * error).all()
    assert torch.allclose(draws.std(0), cache.std[3, 0], rtol=0.08)


def test_two_passes_over_the_data_give_different_latents_of_every_picture(autoencoder):
    cache = latents.encode(autoencoder, pictures())
    batches = Batches(cache, 6)
    passes = [batches.get(step)[:2] for step in (0, 1)]
    first, second = (x[index.argsort()] for x, index in passes)
    assert not (first == second).flatten(1).any(1).any()
    assert torch.equal(batches.get(1)[0], passes[1][0])  # and the same again when asked again


def test_a_draw_depends_on_its_own_number_alone(autoencoder):
    cache = latents.encode(autoencoder, pictures(), variants=3)
    index, draw = torch.tensor([0, 4, 2, 2]), torch.tensor([5, -17, 2**40, 8])
    together = cache.read(index, draw)
    assert torch.equal(torch.cat([cache.read(i[None], d[None]) for i, d in zip(index, draw)]), together)
    assert not torch.equal(together[2], together[3])


def test_both_orientations_of_a_flipped_set_are_stored_and_read(autoencoder):
    data = pictures(n=3, flip=True)
    cache = latents.encode(autoencoder, data, variants=8)
    plain = latents.encode(autoencoder, pictures(n=3)).mean[:, 0]
    flipped = Images(data.pixels.flip(-1))
    mirrored = latents.encode(autoencoder, flipped).mean[:, 0]
    index, draw = torch.arange(3).repeat(40), rng.scramble(1, torch.arange(120))
    cache.std = torch.zeros_like(cache.std)
    z = cache.read(index, draw)
    for i in range(3):
        draws = z[index == i]
        as_is, as_mirror = ((draws - orientation[i]).flatten(1).norm(dim=1) < 1e-4 for orientation in (plain, mirrored))
        assert as_is.any() and as_mirror.any() and (as_is | as_mirror).all()


def test_every_stored_variant_is_read_about_equally_often():
    mean = torch.arange(4.0).view(1, 4, 1, 1, 1)
    cache = latents.Latents(mean, torch.zeros_like(mean))
    z = cache.read(torch.zeros(4000, dtype=torch.long), rng.scramble(0, torch.arange(4000)))
    counts = z.flatten().long().bincount(minlength=4)
    assert ((counts - 1000).abs() < 5 * (4000 * 0.25 * 0.75) ** 0.5).all()


@pytest.mark.parametrize("variants", [1, 3])
def test_the_batch_in_which_pictures_are_encoded_changes_nothing(autoencoder, variants):
    data = pictures(n=5, flip="both")
    expected = latents.encode(autoencoder, data, variants, batch=64)
    for batch in (1, 2, 7):
        cache = latents.encode(autoencoder, data, variants, batch)
        assert torch.allclose(cache.mean, expected.mean, atol=1e-5)
        assert torch.allclose(cache.std, expected.std, atol=1e-5)
    other_seed = latents.encode(autoencoder, data, variants, seed=1)
    assert not torch.allclose(other_seed.mean, expected.mean, atol=1e-5)  # another seed flips others
