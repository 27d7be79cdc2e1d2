"""Stable Diffusion's U-Net against diffusers' (golden/make_stable_diffusion.py) and against its own promises."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

import tiny_sd
from nanodiff.errors import UserError
from nanodiff.formats.stable_diffusion_folder import unet_config_from
from nanodiff.formats.weights import load_strictly
from nanodiff.models.blocks import Attention, ResnetBlock
from nanodiff.models.cond_unet import (CondUNet, CondUNetConfig, SpatialTransformer, TransformerBlock, to_map,
                                       to_tokens)

GOLDEN, INFO = tiny_sd.golden(), tiny_sd.info()
CASES = [key for key in GOLDEN if "/unet/y_" in key]
FIRST = {"sd1": "sd1/unet/y_8x12_t500", "sd2": "sd2/unet/y_10x13_t500"}
BLOCKS = [key for key in GOLDEN if "/unet/block/" in key]
weights = functools.cache(lambda name: tiny_sd.draw_model(name)["unet"])


def golden_net(name, dtype=torch.float32):
    with torch.device("meta"):
        net = CondUNet(unet_config_from(tiny_sd.SETTINGS[name]["unet"]))
    own = {key: tensor.to(dtype, copy=True) for key, tensor in weights(name).items()}
    load_strictly(net, own, name, assign=True)
    return net.eval().requires_grad_(False)


shared_net = functools.cache(golden_net)  # for tests that change nothing in it


def inputs(key):
    """x, t, context of a recorded output."""
    name, size, t = key.split("/")[0], *key.split("_")[1:]
    t = torch.tensor(INFO[name]["unet"]["mixed"] if t == "mixed" else int(t[1:]))
    return GOLDEN[f"{name}/unet/x_{size}"], t, GOLDEN[f"{name}/unet/context"]


def assert_near(y, expected, bar=2e-5):
    assert y.shape == expected.shape
    assert (y - expected).abs().max() <= bar * expected.abs().max()


def small(**changes):
    return CondUNetConfig(**{"channels": (4, 8), "blocks": 1, "attention": (0,), "heads": (2, 2), "context_channels": 3,
                             "groups": 2, **changes})


def lively(net, seed=0):
    """The net with all weights random, none 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net.eval()


def noise(*shape, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- against diffusers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("key", CASES)
def test_output_equals_the_reference_with_and_without_gradients(key, gradients):
    x, t, context = inputs(key)
    with torch.set_grad_enabled(gradients):
        assert_near(shared_net(key.split("/")[0])(x.clone().requires_grad_(gradients), t, context), GOLDEN[key])


@pytest.mark.parametrize("key", BLOCKS)
def test_every_block_equals_the_reference(key):
    name, block, seen = key.split("/")[0], key.split("/")[-1], []
    net = shared_net(name)
    hook = net.get_submodule(block).register_forward_hook(lambda module, args, out: seen.append(out[:1].clone()))
    with torch.no_grad():
        net(*inputs(f"{name}/unet/y_{INFO[name]['unet']['block_case']}"))
    hook.remove()
    assert_near(seen[0], GOLDEN[key])


@pytest.mark.parametrize("name", tiny_sd.FULL_SIZE)
def test_the_full_size_network_has_the_published_number_of_weights_under_diffusers_names(name):
    facts = INFO["full_size"][name]["unet"]
    with torch.device("meta"):
        net = CondUNet(unet_config_from(INFO["full_size"][name]["settings"]["unet"]))
    shapes = {key: tensor.shape for key, tensor in net.state_dict().items()}
    assert facts["parameters"] == {"SD15": 859_520_964, "SD21": 865_910_724}[name]
    assert sum(p.numel() for p in net.parameters()) == facts["parameters"] and len(shapes) == facts["tensors"]
    assert tiny_sd.fingerprint(shapes) == facts["sha256"]


def test_the_defaults_are_stable_diffusion_1():
    assert CondUNetConfig() == unet_config_from(tiny_sd.FULL_SIZE["SD15"]["unet"])


@pytest.mark.parametrize("name, widths", [("SD15", {320: (8, 40), 640: (8, 80), 1280: (8, 160)}),
                                          ("SD21", {320: (5, 64), 640: (10, 64), 1280: (20, 64)})])
def test_attention_head_dim_is_the_number_of_heads(name, widths):
    with torch.device("meta"):
        net = CondUNet(unet_config_from(tiny_sd.FULL_SIZE[name]["unet"]))
    layers = [m for m in net.modules() if isinstance(m, Attention)]
    assert len(layers) == 2 * 16
    for layer in layers:
        channels = layer.to_q.in_features
        assert (layer.heads, layer.in_heads(torch.empty(1, 1, channels)).shape[-1]) == widths[channels]


@pytest.mark.parametrize("name, eps", [("sd1", 1e-5), ("sd2", 1e-3)])
def test_every_norm_has_its_own_eps(name, eps):
    net = shared_net(name)
    found = {(type(m).__name__, path.split(".")[-1], m.eps) for path, m in net.named_modules() if hasattr(m, "eps")}
    assert found == {("GroupNorm", "norm1", eps), ("GroupNorm", "norm2", eps), ("GroupNorm", "conv_norm_out", eps),
                     ("GroupNorm", "norm", 1e-6), *(("LayerNorm", f"norm{i}", 1e-5) for i in (1, 2, 3))}


# --- the transformer by its definition -------------------------------------------------------------------------------

def plain_attention(layer, x, context):
    q, k, v = (F.linear(y, w.weight) for y, w in ((x, layer.to_q), (context, layer.to_k), (context, layer.to_v)))
    heads = []
    for one in zip(*(y.chunk(layer.heads, -1) for y in (q, k, v))):
        share = (one[0] @ one[1].transpose(1, 2) / one[0].shape[-1] ** 0.5).softmax(-1)
        heads.append(share @ one[2])
    return F.linear(torch.cat(heads, -1), layer.to_out[0].weight, layer.to_out[0].bias)


def plain_block(block, x, context):
    n1, n2, n3 = (F.layer_norm(x, x.shape[-1:], n.weight, n.bias, 1e-5) for n in (block.norm1,) * 3)
    x = x + plain_attention(block.attn1, n1, n1)
    n2 = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-5)
    x = x + plain_attention(block.attn2, n2, context)
    n3 = F.layer_norm(x, x.shape[-1:], block.norm3.weight, block.norm3.bias, 1e-5)
    y, gate = F.linear(n3, block.ff.net[0].proj.weight, block.ff.net[0].proj.bias).chunk(2, -1)
    return x + F.linear(y * F.gelu(gate), block.ff.net[2].weight, block.ff.net[2].bias)


@pytest.mark.parametrize("linear", [False, True])
def test_the_transformer_and_its_gradients_are_those_of_its_definition(linear):
    net = lively(SpatialTransformer(8, 2, 5, layers=2, groups=4, linear_projection=linear)).double()
    x, context = noise(2, 8, 3, 4, dtype=torch.float64), noise(2, 6, 5, seed=2, dtype=torch.float64)
    x, context = (y.contiguous().requires_grad_() for y in (x, context))

    h = F.group_norm(x, 4, net.norm.weight, net.norm.bias, 1e-6).flatten(2).transpose(1, 2)
    h = F.linear(h, net.proj_in.weight.flatten(1), net.proj_in.bias)  # a 1x1 convolution is a linear layer
    for block in net.transformer_blocks:
        h = plain_block(block, h, context)
    expected = F.linear(h, net.proj_out.weight.flatten(1), net.proj_out.bias).transpose(1, 2).unflatten(2, (3, 4)) + x

    torch.testing.assert_close(net(x, context), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(net(x, context), expected, rtol=0, atol=1e-12)
    direction, wanted = noise(*x.shape, seed=3, dtype=torch.float64), (x, context, *net.parameters())
    ours, plain = (torch.autograd.grad((y * direction).sum(), wanted) for y in (net(x, context), expected))
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_pixels_become_a_row_and_a_row_becomes_pixels():
    x = noise(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    tokens = to_tokens(x)
    assert tokens.shape == (2, 20, 3) and tokens.data_ptr() == x.data_ptr()
    assert torch.equal(tokens[1, 2 * 5 + 3], x[1, :, 2, 3])
    assert torch.equal(to_map(tokens, x), x)


# --- gradients -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("linear", [False, True])
def test_gradients_of_the_whole_network_match_finite_differences(linear):
    net = lively(CondUNet(small(linear_projection=linear), torch.Generator().manual_seed(0))).double()
    x, context = noise(1, 4, 3, 4, dtype=torch.float64), noise(1, 2, 3, seed=2, dtype=torch.float64)
    names, values = zip(("x", x), ("context", context), *net.named_parameters())
    weight = noise(1, 4, 3, 4, seed=3, dtype=torch.float64)

    def run(x, context, *values):
        return (torch.func.functional_call(net, dict(zip(names[2:], values)), (x, 500, context)) * weight).sum()

    gradients = torch.autograd.grad(run(*(v.requires_grad_() for v in values)), values)
    for seed in range(3):  # along a random direction no error of any gradient is lost
        way = [noise(*v.shape, seed=100 * seed + i, dtype=torch.float64) for i, v in enumerate(values)]
        up, down = (run(*(v + step * d for v, d in zip(values, way))).item() for step in (1e-6, -1e-6))
        slope = sum((g * d).sum().item() for g, d in zip(gradients, way))
        assert (up - down) / 2e-6 == pytest.approx(slope, rel=1e-6)


# --- its own promises ------------------------------------------------------------------------------------------------

def test_a_fresh_network_predicts_0_and_learns():
    net = CondUNet(small(), torch.Generator().manual_seed(0))
    x, t, context, target = noise(2, 4, 4, 4), torch.tensor([1, 600]), noise(2, 5, 3, seed=2), noise(2, 4, 4, 4, seed=3)
    assert torch.equal(net(x, t, context), torch.zeros(2, 4, 4, 4))
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(20):
        loss = F.mse_loss(net(x, t, context), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad.abs().max() > 0 for p in net.parameters())  # every weight takes part


def test_fresh_weights_follow_the_generator():
    a, b, c = (dict(CondUNet(small(), torch.Generator().manual_seed(seed)).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["conv_in.weight"], c["conv_in.weight"])


def test_one_number_is_a_time_for_the_whole_batch_and_each_item_may_have_its_own():
    net, x, context = shared_net("sd1"), noise(2, 4, 8, 8), GOLDEN["sd1/unet/context"]
    one = net(x, torch.tensor([7, 7]), context)
    for t in (7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7.0, 7.0]), torch.tensor([7])):
        assert torch.equal(net(x, t, context), one)
    mixed = net(x, torch.tensor([7, 900]), context)
    torch.testing.assert_close(mixed[:1], one[:1], rtol=1e-5, atol=1e-5)
    assert (mixed[1] - one[1]).abs().max() > 1e-3


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_inputs_are_left_as_they_were(name, memory_format):
    net, (x, t, context) = golden_net(name), inputs(FIRST[name])
    x = x.contiguous(memory_format=memory_format)
    given = (x, t, context)
    before = [y.clone() for y in given]
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            net(x, t, context)
    assert all(torch.equal(a, b) for a, b in zip(given, before))


@pytest.mark.parametrize("dtype, bar", [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_a_half_precision_network_stays_near_the_float32_one(name, dtype, bar):
    net, (x, t, context) = golden_net(name), inputs(FIRST[name])
    with torch.no_grad():
        exact = net(x, t, context)
        net, x, context = net.to(dtype), x.to(dtype), context.to(dtype)
        half = net(x, t, context)
    assert half.dtype == dtype and (half.float() - exact).abs().max() < bar * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_a_half_precision_network_stays_finite_on_inputs_50_times_too_large(name, dtype):
    net, (x, t, context) = golden_net(name), inputs(FIRST[name])
    x, context, largest = 50 * x, 50 * context, []
    for layer in net.modules():
        if isinstance(layer, Attention):
            layer.to_q.weight *= 300  # products of q and k beyond 65504, the largest float16
            layer.to_k.weight *= 300
            layer.to_q.register_forward_hook(lambda module, args, q: largest.append(q.float().abs().max().item()))
    with torch.no_grad():
        half = net.to(dtype)(x.to(dtype), t, context.to(dtype))
    assert min(largest) ** 2 > 65504
    assert half.dtype == dtype and half.isfinite().all()


def test_norms_of_a_half_precision_network_have_float32_statistics():
    norms = [m for m in golden_net("sd1").bfloat16().modules() if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm))]
    assert len(norms) > 20
    for norm in norms:
        shape = (1, norm.num_channels, 8, 8) if isinstance(norm, torch.nn.GroupNorm) else (1, 64, *norm.normalized_shape)
        x = (100 + noise(*shape)).bfloat16()  # a mean far from 0: half-precision sums would lose the deviation
        exact = copy.deepcopy(norm).double()(x.double())
        assert (norm(x).double() - exact).abs().max() < 0.02 * exact.abs().max()


def test_nine_channels_are_an_inpainting_model_that_wants_a_mask():
    net = CondUNet(small(in_channels=9))
    assert net(noise(1, 9, 8, 8), 5, noise(1, 2, 3)).shape == (1, 4, 8, 8)
    with pytest.raises(UserError, match="takes 9 channels, but 4 were given: an inpainting model wants a mask"):
        net(noise(1, 4, 8, 8), 5, noise(1, 2, 3))
    with pytest.raises(UserError, match="takes 4 channels, but 9 were given$"):
        CondUNet(small())(noise(1, 9, 8, 8), 5, noise(1, 2, 3))


def test_runs_without_values_on_the_meta_device():
    with torch.device("meta"):
        net, x, context = CondUNet(small()), torch.empty(2, 4, 9, 7), torch.empty(2, 5, 3)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert net(x, torch.zeros(2, device="meta"), context).shape == (2, 4, 9, 7)


def test_what_is_asked_for_is_what_is_built():
    net = CondUNet(small(channels=(4, 8, 16), heads=(1, 2, 4), attention=(1,), mid_attention=False, blocks=2,
                         transformer_layers=3, time_channels=10, dropout=0.1, activation="gelu"))
    transformers = {path: m for path, m in net.named_modules() if isinstance(m, SpatialTransformer)}
    assert sorted(transformers) == [f"down_blocks.1.attentions.{i}" for i in range(2)] + [
        f"up_blocks.1.attentions.{i}" for i in range(3)]
    assert all(len(m.transformer_blocks) == 3 for m in transformers.values())
    assert {m.attn1.heads for m in net.modules() if isinstance(m, TransformerBlock)} == {2}
    resnets = [m for m in net.modules() if isinstance(m, ResnetBlock)]
    assert len(resnets) == 3 * 2 + 2 + 3 * 3
    assert all(m.dropout == 0.1 and m.activation is F.gelu and m.time_emb_proj.in_features == 10 for m in resnets)
    assert net(noise(1, 4, 5, 6), 5, noise(1, 2, 3)).shape == (1, 4, 5, 6)


def test_heads_need_to_fit_only_where_there_is_attention():
    config = small(channels=(6, 8), heads=(4, 4), attention=(), mid_attention=True)
    assert CondUNet(config)(noise(1, 4, 4, 4), 5, noise(1, 2, 3)).shape == (1, 4, 4, 4)
    with pytest.raises(UserError, match="attention over 6 channels"):
        small(channels=(6, 8), heads=(4, 4), attention=(0,))
    with pytest.raises(UserError, match="attention over 6 channels"):
        small(channels=(8, 6), heads=(4, 4), attention=(), mid_attention=True)


@pytest.mark.parametrize("changes, words", [
    ({"activation": "sillu"}, 'activation "sillu" is unknown; expected one of silu.*nearest: silu'),
    ({"groups": 3}, "4 channels cannot be split into 3 groups"),
    ({"attention": (2,)}, "channels \\(4, 8\\) make levels 0 to 1"),
    ({"attention": (-1,)}, "attention at level -1 is impossible"),
    ({"heads": (3, 2)}, "4 channels cannot be split into 3 equal heads"),
    ({"heads": (2,)}, "one number for each level"),
    ({"heads": (0, 2)}, "0 equal heads"),
    ({"blocks": 0}, "at least 1"),
    ({"transformer_layers": 0}, "at least 1"),
    ({"channels": ()}, "at least 1"),
    ({"downsample_padding": 2}, "downsample_padding must be 0.*or 1"),
])
def test_impossible_configs_are_refused_in_one_sentence(changes, words):
    with pytest.raises(UserError, match=words):
        small(**changes)
