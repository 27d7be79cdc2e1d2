"""The autoencoders against diffusers' AutoencoderKL (golden/make_stable_diffusion.py) and against their promises."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

import tiny_sd
from nanodiff.errors import UserError
from nanodiff.formats.diffusers_folder import plain_names
from nanodiff.formats.stable_diffusion_folder import vae_config_from
from nanodiff.formats.weights import load_strictly
from nanodiff.models.blocks import Downsample
from nanodiff.models.kl_autoencoder import DiagonalGaussian, KLAutoencoder, KLAutoencoderConfig, VQAutoencoder

GOLDEN, INFO = tiny_sd.golden(), tiny_sd.info()
SIZES = ("24x32", "20x12")


@functools.cache
def golden_net(name):
    with torch.device("meta"):
        net = KLAutoencoder(vae_config_from(tiny_sd.SETTINGS[name]["vae"]))
    load_strictly(net, plain_names(tiny_sd.draw_model(name)["vae"]), name, assign=True)
    return net.eval().requires_grad_(False)


def small(**changes):
    return KLAutoencoderConfig(**{"channels": (4, 8), "blocks": 1, "groups": 2, **changes})


def lively(net, seed=0):
    """The net with all weights random, none 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_near(y, expected, bar=2e-5):
    assert y.shape == expected.shape
    assert (y - expected).abs().max() <= bar * expected.abs().max()


# --- against diffusers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_mean_logvar_and_decoded_pictures_equal_the_reference_up_to_the_border(name, size, gradients):
    net, start = golden_net(name), f"{name}/vae/"
    with torch.set_grad_enabled(gradients):
        latent = net.encode(GOLDEN[f"{start}image_{size}"].clone().requires_grad_(gradients))
        assert_near(latent.mean, GOLDEN[f"{start}mean_{size}"])
        assert_near(latent.logvar, GOLDEN[f"{start}logvar_{size}"])
        assert_near(net.decode(GOLDEN[f"{start}z_{size}"]), GOLDEN[f"{start}decoded_{size}"])


def test_padding_on_all_sides_would_be_seen_in_the_reference(monkeypatch):
    # the golden files can tell: shapes would be the same
    downs = [m for m in golden_net("sd1").modules() if isinstance(m, Downsample)]
    assert len(downs) == 2
    for down in downs:
        assert down.padding == 0
        monkeypatch.setattr(down, "padding", 1)
        monkeypatch.setattr(down.conv, "padding", (1, 1))
    mean, expected = golden_net("sd1").encode(GOLDEN["sd1/vae/image_24x32"]).mean, GOLDEN["sd1/vae/mean_24x32"]
    assert mean.shape == expected.shape and (mean - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("name", tiny_sd.FULL_SIZE)
def test_the_full_size_network_has_the_published_number_of_weights_under_diffusers_names(name):
    facts = INFO["full_size"][name]["vae"]
    with torch.device("meta"):
        net = KLAutoencoder(vae_config_from(INFO["full_size"][name]["settings"]["vae"]))
    shapes = {key: tensor.shape for key, tensor in net.state_dict().items()}
    assert sum(p.numel() for p in net.parameters()) == facts["parameters"] == 83_653_863
    assert len(shapes) == facts["tensors"] and tiny_sd.fingerprint(shapes) == facts["sha256"]
    assert net.config == KLAutoencoderConfig()  # the defaults are Stable Diffusion's


def test_every_norm_has_eps_1e_6():
    norms = [m for m in golden_net("sd1").modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) > 20 and {m.eps for m in norms} == {1e-6}


# --- the distribution ------------------------------------------------------------------------------------------------

def test_samples_have_the_mean_and_the_deviation_they_should():
    mean, logvar = noise(1, 2, 3, 3), noise(1, 2, 3, 3, seed=2)
    n = 20_000
    latent = DiagonalGaussian(mean.expand(n, -1, -1, -1), logvar.expand(n, -1, -1, -1))
    z = latent.sample(torch.Generator().manual_seed(0))
    std = (logvar / 2).exp()[0]
    assert ((z.mean(0) - mean[0]) / std).abs().max() < 5 / math.sqrt(n)
    assert (z.std(0) / std - 1).abs().max() < 5 / math.sqrt(2 * n)
    assert torch.equal(latent.mode(), latent.mean)


def test_a_draw_follows_its_generator_and_one_for_each_picture_makes_it_independent_of_its_batch():
    latent = DiagonalGaussian(noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=2))
    one, same, other = (latent.sample(torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(one, same) and not torch.equal(one, other)
    batch = latent.sample([torch.Generator().manual_seed(seed) for seed in (3, 4, 5)])
    for i, seed in enumerate((3, 4, 5)):
        alone = DiagonalGaussian(latent.mean[i : i + 1], latent.logvar[i : i + 1])
        assert torch.equal(alone.sample(torch.Generator().manual_seed(seed))[0], batch[i])
    with pytest.raises(ValueError, match="2 generators were given for a batch of 3"):
        latent.sample([torch.Generator(), torch.Generator()])


def test_kl_is_the_closed_form_summed_over_each_latent_and_what_samples_say():
    mean, logvar = noise(2, 1, 2, 2, dtype=torch.float64), noise(2, 1, 2, 2, seed=2, dtype=torch.float64)
    latent = DiagonalGaussian(mean, logvar)
    normal = torch.distributions.Normal
    own, prior = normal(mean, (logvar / 2).exp()), normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(own, prior).flatten(1).sum(1)
    torch.testing.assert_close(latent.kl(), expected, rtol=1e-12, atol=0)
    n = 10_000
    many = DiagonalGaussian(mean.expand(n, 2, 1, 2, 2).flatten(0, 1), logvar.expand(n, 2, 1, 2, 2).flatten(0, 1))
    z = many.sample(torch.Generator().manual_seed(0)).view(n, *mean.shape)
    ratios = (own.log_prob(z) - prior.log_prob(z)).flatten(2).sum(2)  # [n, 2]
    assert ((ratios.mean(0) - expected).abs() < 5 * ratios.std(0) / math.sqrt(n)).all()
    twice = DiagonalGaussian(torch.cat([mean, mean], 1), torch.cat([logvar, logvar], 1))
    torch.testing.assert_close(twice.kl(), 2 * expected)
    assert torch.equal(DiagonalGaussian(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).kl(), torch.zeros(1))


def test_a_log_variance_without_bounds_stays_finite():
    for value, kept in ((1e4, 20), (-1e4, -30), (7.0, 7.0)):
        logvar = torch.full((1, 1, 2, 2), value, requires_grad=True)
        latent = DiagonalGaussian(torch.zeros(1, 1, 2, 2), logvar)
        loss = latent.kl().sum() + latent.sample(torch.Generator().manual_seed(0)).sum()
        loss.backward()
        assert latent.logvar.unique().item() == kept
        assert loss.isfinite() and logvar.grad.isfinite().all()


# --- sizes -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("levels", [1, 2, 4])
def test_the_factor_follows_from_the_levels_and_latents_are_so_much_smaller(levels):
    config = small(channels=(4,) * levels, latent_channels=3)
    f, net = 2 ** (levels - 1), KLAutoencoder(config)
    assert config.factor == f
    latent = net.encode(noise(2, 3, 2 * f, 3 * f))
    assert latent.mean.shape == latent.logvar.shape == (2, 3, 2, 3)
    assert net.decode(latent.mode()).shape == (2, 3, 2 * f, 3 * f)


def test_a_picture_whose_sides_do_not_divide_is_refused_by_name():
    net = KLAutoencoder(small(channels=(4,) * 4))
    with pytest.raises(UserError, match="30x513 does not fit.*multiples of 8; 32x512 would fit"):
        net.encode(torch.empty(1, 3, 30, 513))
    with pytest.raises(UserError, match="3x8 does not fit.*8x8 would fit"):
        net(torch.empty(1, 3, 3, 8))
    with pytest.raises(UserError, match="16x9 does not fit.*16x8 would fit"):
        VQAutoencoder(small(channels=(4,) * 4, codes=4)).encode(torch.empty(1, 3, 16, 9))


@pytest.mark.parametrize("changes, words", [
    ({"activation": "rleu"}, "nearest: relu"), ({"groups": 3}, "4 channels cannot be split into 3 groups"),
    ({"blocks": 0}, "at least 1"), ({"channels": ()}, "at least 1"), ({"latent_channels": 0}, "at least 1"),
    ({"scaling_factor": 0}, "scaling_factor must be above 0, not 0"),
    ({"scaling_factor": float("nan")}, "scaling_factor must be above 0, not nan")])
def test_impossible_configs_are_refused_in_one_sentence(changes, words):
    with pytest.raises(UserError, match=words):
        small(**changes)


# --- tiles -----------------------------------------------------------------------------------------------------------

class Enlarge(torch.nn.Module):
    """A decoder that looks at one latent pixel only, so that tiles agree with the whole exactly."""

    def forward(self, z):
        return z[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)


class Level(torch.nn.Module):
    """A decoder whose tiles differ as much as they can: each is flat, at the mean of its latents."""

    def forward(self, z):
        return z.mean((2, 3), keepdim=True).expand(-1, -1, 2 * z.shape[2], 2 * z.shape[3])


def with_decoder(decoder):
    net = KLAutoencoder(small(quant_conv=False))
    net.decoder = decoder
    return net


@pytest.mark.parametrize("size", [(5, 6), (8, 8), (9, 5), (16, 3), (13, 24), (7, 31)])
@pytest.mark.parametrize("tile, overlap", [(6, 0.25), (4, 0.5), (5, 0.9), (2, 0.1), (8, 0.25)])
def test_tiles_of_a_decoder_that_looks_at_one_pixel_make_the_whole_picture(size, tile, overlap):
    net, z = with_decoder(Enlarge()), noise(2, 4, *size)
    before = z.clone()
    torch.testing.assert_close(net.decode(z, tile, overlap), net.decode(z), rtol=0, atol=1e-5)
    flat = net.decode(torch.full_like(z, 0.7), tile, overlap)  # the weights add up to 1 everywhere
    assert (flat - 0.7).abs().max() < 1e-6
    assert torch.equal(z, before)


@pytest.mark.parametrize("side, last, steepest", [(20, 12, 1.01), (22, 14, 1.3)])
def test_neighbouring_tiles_go_over_into_each_other_without_a_seam(side, last, steepest):
    z = torch.linspace(0, 1, side).expand(1, 3, side, side)
    for turned in (False, True):  # across both axes
        y = with_decoder(Level()).decode(z.mT if turned else z, tile=8, overlap=0.25)
        y = y.mT if turned else y
        # tiles start every 6 latent pixels and at the last place that is left; each change takes 4 pixels in 5 steps
        assert y[..., 0].mean().item() == pytest.approx(3.5 / (side - 1))
        assert y[..., -1].mean().item() == pytest.approx((last + 3.5) / (side - 1))
        assert y.diff(dim=-1).min() > -1e-6 and y.diff(dim=-1).max() < steepest * 6 / (side - 1) / 5
        assert y.diff(dim=-2).abs().max() < 1e-6


@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_a_real_decoder_in_tiles_is_near_the_whole_and_the_nearer_the_larger_the_tiles(name):
    net, z = golden_net(name), noise(1, 4, 24, 32)  # all parts are alike, so that each tile is normalised as the whole
    with torch.no_grad():
        whole = net.decode(z)
        tiled = {tile: net.decode(z, tile) for tile in (12, 16, 20, 24)}
        hard = torch.cat([net.decode(part) for part in z.split(16, 3)], 3)
    errors = [((y - whole).square().mean().sqrt() / whole.std()).item() for y in tiled.values()]
    assert errors == sorted(errors, reverse=True) and 1e-4 < errors[-1] < 0.1 and errors[0] < 0.4
    seam = 16 * net.config.factor  # where tiles laid side by side meet
    jumps = [(y - whole)[..., seam - 1 : seam + 1].diff().square().mean().sqrt() for y in (tiled[16], hard)]
    assert jumps[0] < 0.5 * jumps[1]


def test_a_latent_no_larger_than_a_tile_is_decoded_at_once_and_impossible_tiles_are_refused():
    net, z = golden_net("sd1"), noise(1, 4, 5, 6)
    assert torch.equal(net.decode(z, tile=6), net.decode(z)) and torch.equal(net.decode(z, tile=0), net.decode(z))
    for tile, overlap in ((1, 0.25), (4, 1.0), (-1, 0.25)):
        with pytest.raises(UserError, match="tile must be 0 .none. or at least 2"):
            net.decode(z, tile, overlap)


# --- the whole network -----------------------------------------------------------------------------------------------

def test_a_fresh_network_follows_its_generator_and_every_weight_gets_a_gradient():
    def fresh(seed):
        return KLAutoencoder(small(), torch.Generator().manual_seed(seed)).state_dict()
    a, b, c = fresh(0), fresh(0), fresh(1)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["encoder.conv_in.weight"], c["encoder.conv_in.weight"])
    net, x = lively(KLAutoencoder(small())), noise(2, 3, 8, 8).clamp(-1, 1)
    reconstruction, posterior = net(x, torch.Generator().manual_seed(0))
    assert torch.equal(reconstruction, net.decode(posterior.sample(torch.Generator().manual_seed(0))))
    (F.mse_loss(reconstruction, x) + 1e-3 * posterior.kl().mean()).backward()
    idle = [name for name, p in net.named_parameters() if not p.grad.abs().max() > 0]
    assert not [name for name in idle if not name.endswith("to_k.bias")]  # softmax does not see a key's bias


def test_encode_and_decode_leave_their_inputs_alone_in_either_memory_format():
    net = golden_net("sd1")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, z = noise(2, 3, 8, 8).to(memory_format=memory_format), noise(2, 4, 4, 4).to(memory_format=memory_format)
        before = x.clone(), z.clone()
        with torch.no_grad():
            net.encode(x).sample()
            net.decode(z)
            net.decode(z, tile=2)
        assert torch.equal(x, before[0]) and torch.equal(z, before[1])


def test_what_is_asked_for_is_what_is_built():
    net = KLAutoencoder(small(in_channels=1, out_channels=2, mid_attention=False, quant_conv=False, activation="relu"))
    assert not [name for name in net.state_dict() if "quant" in name or "attentions" in name]
    assert net(noise(1, 1, 8, 8))[0].shape == (1, 2, 8, 8)
    assert net.encoder.down_blocks[0].resnets[0].activation is F.relu


def test_a_bfloat16_network_stays_near_the_float32_one():
    net = KLAutoencoder(golden_net("sd1").config)
    net.load_state_dict(golden_net("sd1").state_dict())
    x, z = GOLDEN["sd1/vae/image_24x32"], GOLDEN["sd1/vae/z_24x32"]
    with torch.no_grad():
        exact = net.encode(x).mean, net.decode(z)
        net = net.bfloat16()
        half = net.encode(x.bfloat16()).mean, net.decode(z.bfloat16())
    for a, b in zip(half, exact):
        assert a.dtype == torch.bfloat16 and (a.float() - b).abs().max() < 0.05 * b.abs().max()


# --- the codebook (itself in test_vqvae.py) --------------------------------------------------------------------------

def test_the_vq_autoencoders_fresh_codebook_is_uniform_within_1_over_its_size():
    w = VQAutoencoder(small(codes=200, code_channels=16)).quantize.embedding.weight
    assert w.abs().max() <= 1 / 200 and w.std().item() == pytest.approx(1 / 200 / math.sqrt(3), rel=0.1)


def test_the_vq_autoencoder_quantises_between_its_encoder_and_its_decoder():
    net = lively(VQAutoencoder(small(codes=9, code_channels=5, latent_channels=3), torch.Generator().manual_seed(0)))
    x = noise(2, 3, 8, 6).clamp(-1, 1)
    h = net.encode(x)
    assert h.shape == (2, 5, 4, 3)
    reconstruction, loss, codes = net(x)
    assert reconstruction.shape == x.shape and loss.ndim == 0
    assert codes.shape == (2, 4, 3) and 0 <= codes.min() and codes.max() < 9
    torch.testing.assert_close(net.decode(h), reconstruction)
    quantised = net.quantize(h)[0].detach()
    torch.testing.assert_close(net.decode(quantised), reconstruction)  # quantising twice changes nothing
    (F.mse_loss(reconstruction, x) + loss).backward()
    idle = [name for name, p in net.named_parameters() if not p.grad.abs().max() > 0]
    assert not [name for name in idle if not name.endswith("to_k.bias")]


def test_the_vq_autoencoder_has_vqmodels_names_and_wants_a_codebook():
    names = VQAutoencoder(small(codes=4)).state_dict()
    own = {name for name in names if not name.startswith(("encoder.", "decoder."))}
    assert own == {"quantize.embedding.weight", *(f"{part}quant_conv.{end}" for part in ("", "post_")
                                                  for end in ("weight", "bias"))}
    assert names["encoder.conv_out.weight"].shape[0] == 4  # one map, no log-variance
    with pytest.raises(UserError, match="codes is 0; expected the number of codebook entries"):
        VQAutoencoder(small())
