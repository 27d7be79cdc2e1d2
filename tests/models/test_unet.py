"""The DDPM U-Net against diffusers' UNet2DModel (tests/golden/make_unet.py) and against its own promises."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanodiff.errors import UserError
from nanodiff.formats.diffusers_folder import load_strictly, unet_config_from
from nanodiff.models.blocks import ResnetBlock, SpatialAttention
from nanodiff.models.unet import UNet, UNetConfig

GOLDEN = Path(__file__).parents[1] / "golden"
INFO = json.loads((GOLDEN / "unet.json").read_text())
CASES = {case["key"]: case for case in INFO["cases"]}
STORE = load_file(GOLDEN / "unet.safetensors")

spec = importlib.util.spec_from_file_location("make_unet", GOLDEN / "make_unet.py")
make_unet = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_unet)


def golden_net(case, dtype=torch.float32):
    shapes = INFO["state_dict_shapes"][case["config"]]
    weights = make_unet.draw_weights(shapes, case["seed"])
    net = UNet(unet_config_from(INFO["configs"][case["config"]])).to(dtype)
    load_strictly(net, {k: torch.from_numpy(v).to(dtype) for k, v in weights.items()}, "golden")
    return net


def inputs(case, dtype=torch.float32):
    label = None if case["label"] is None else torch.tensor(case["label"])
    return STORE[case["key"] + "/x"].to(dtype), torch.tensor(case["t"]), label


def small(**changes):
    return UNetConfig(**{"channels": (8, 16), "groups": 4, "heads": 4, **changes})


def lively(net, seed=0):
    """The net with all weights random, none 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return net.eval()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("key", CASES)
def test_output_equals_the_reference(key):
    case = CASES[key]
    with torch.no_grad():
        y = golden_net(case)(*inputs(case))
    assert (y - STORE[key + "/y"]).abs().max() <= 1e-5


@pytest.mark.parametrize("key", CASES)
def test_every_block_equals_the_reference(key):
    case, seen = CASES[key], {}
    net = golden_net(case)
    for name in make_unet.BLOCKS:
        net.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    net(*inputs(case))
    for name in make_unet.BLOCKS:
        assert (seen[name][:1] - STORE[f"{key}/inner/{name}"]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("key", CASES)
def test_gradients_equal_the_reference(key):
    case = CASES[key]
    net = golden_net(case, torch.float64)  # the network is as exact as its weights are
    x, t, label = inputs(case, torch.float64)
    x.requires_grad_()
    (net(x, t, label) * STORE[key + "/weight"]).sum().backward()
    gradients = {"x": x.grad, **{name: net.get_parameter(name).grad for name in make_unet.GRADIENTS}}
    for name, gradient in gradients.items():
        reference = STORE[f"{key}/grad/{name}"].double()
        assert (gradient - reference).abs().max() <= 2e-5 * reference.abs().max() + 1e-6, name  # float32 sinusoids


def test_cifar10_network_has_the_published_number_of_weights():
    with torch.device("meta"):
        net = UNet(UNetConfig.cifar10())
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


def test_sizes_reach_from_one_to_thirty_six_million_weights():
    with torch.device("meta"):
        tiny = UNet(UNetConfig(channels=(32, 64, 64), blocks=1, groups=8))
        default = UNet(UNetConfig())
    assert 0.5e6 < sum(p.numel() for p in tiny.parameters()) < 1.5e6
    assert 35e6 < sum(p.numel() for p in default.parameters()) < 36e6


def test_every_norm_has_the_eps_and_groups_of_the_config():
    net = UNet(small(eps=1e-3, mid_groups=2))
    norms = {name: m for name, m in net.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    assert len(norms) == 2 * len([m for m in net.modules() if isinstance(m, ResnetBlock)]) \
        + len([m for m in net.modules() if isinstance(m, SpatialAttention)]) + 1
    for name, norm in norms.items():
        assert norm.eps == 1e-3, name
        assert norm.num_groups == (2 if name == "mid_block.attentions.0.group_norm" else 4), name
    assert all(m.eps == 1e-6 for m in UNet(small()).modules() if isinstance(m, torch.nn.GroupNorm))


def test_fresh_network_predicts_zero_and_can_still_learn():
    net = UNet(small(), torch.Generator().manual_seed(0))
    x = noise(2, 3, 8, 8)
    y = net(x, torch.tensor([3, 7]))
    assert not y.any()
    ((y - x) ** 2).mean().backward()
    assert net.conv_out.weight.grad.abs().max() > 0


def test_the_generator_decides_the_fresh_weights():
    a, b, c = (UNet(small(num_classes=3), torch.Generator().manual_seed(s)).state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["conv_in.weight"], c["conv_in.weight"])
    assert not torch.equal(a["class_embedding.weight"], c["class_embedding.weight"])


def test_time_may_be_one_number_or_one_a_picture_integer_or_float():
    net, x = lively(UNet(small())), noise(2, 3, 8, 8)
    one = net(x, torch.tensor([7, 7]))
    for t in (7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7.0, 7.0]), torch.tensor([7])):
        assert torch.equal(net(x, t), one)
    mixed = net(x, torch.tensor([7, 900]))
    torch.testing.assert_close(mixed[:1], one[:1], rtol=1e-5, atol=1e-5)
    assert (mixed[1] - one[1]).abs().max() > 1e-3


def test_inputs_are_left_as_they_were():
    net = lively(UNet(small(num_classes=3, center_input=True, patch=2)))
    x, t, label = noise(2, 3, 8, 8), torch.tensor([3.0, 5.0]), torch.tensor([1, 3])
    before = x.clone(), t.clone(), label.clone()
    with torch.no_grad():
        net(x, t, label)
    assert all(torch.equal(a, b) for a, b in zip((x, t, label), before))


def test_sizes_that_do_not_divide_are_refused_by_name():
    net = UNet(UNetConfig(channels=(8, 8, 8, 8), groups=4, heads=1))
    with pytest.raises(UserError, match="28x28.*multiples of 8.*32x32"):
        net(noise(1, 3, 28, 28), 0)
    folded = UNet(small(patch=2))
    with pytest.raises(UserError, match="30x28.*multiples of 4"):
        folded(noise(1, 3, 30, 28), 0)
    assert folded(noise(1, 3, 28, 28), 0).shape == (1, 3, 28, 28)


def test_patch_folds_pixels_into_channels_and_back():
    folded, plain = lively(UNet(small(patch=2))), UNet(small(in_channels=12, out_channels=12))
    load_strictly(plain, folded.state_dict(), "patch")
    x = noise(2, 3, 16, 8)
    expected = torch.pixel_shuffle(plain.eval()(torch.pixel_unshuffle(x, 2), 5), 2)
    torch.testing.assert_close(folded(x, 5), expected)
    assert folded(x, 5).shape == x.shape


def test_center_input_brings_the_unit_range_to_plus_minus_one():
    centred, plain = lively(UNet(small(center_input=True))), UNet(small())
    load_strictly(plain, centred.state_dict(), "centre")
    x = noise(2, 3, 8, 8)
    torch.testing.assert_close(centred((x + 1) / 2, 5), plain.eval()(x, 5), rtol=1e-4, atol=1e-5)


def test_class_labels_matter_and_no_label_is_no_class():
    net, x = lively(UNet(small(num_classes=3))), noise(2, 3, 8, 8)
    assert net.class_embedding.weight.shape[0] == 4
    assert torch.equal(net(x, 5), net(x, 5, torch.tensor([3, 3])))
    assert (net(x, 5, torch.tensor([0, 0])) - net(x, 5, torch.tensor([1, 1]))).abs().max() > 1e-3
    with pytest.raises(UserError, match="without classes"):
        UNet(small())(x, 5, torch.tensor([0, 1]))
    with pytest.raises(UserError, match="label of 0 to 2"):
        UNet(small(num_classes=3, no_class=False))(x, 5)


def test_the_number_of_heads_is_the_number_of_heads():
    net = UNet(small(channels=(16, 32), attention=(0, 1), heads=4))
    assert {m.heads for m in net.modules() if isinstance(m, SpatialAttention)} == {4}
    net = UNet(small(channels=(16, 32), attention=(0, 1), head_dim=8))
    assert [m.heads for m in net.modules() if isinstance(m, SpatialAttention)] == [2, 2, 4, 4, 4] + [4] * 3 + [2] * 3


def test_float64_network_computes_in_float64():
    net, x = lively(UNet(small())).double(), noise(1, 3, 8, 8).double()
    bumped = x + 1e-11
    assert 0 < (net(x, 5) - net(bumped, 5)).abs().max() < 1e-9


def test_half_precision_network_stays_near_the_float32_one():
    net, x = lively(UNet(small(num_classes=2))), noise(2, 3, 8, 8)
    t, label = torch.tensor([3, 999]), torch.tensor([0, 2])
    with torch.no_grad():
        exact = net(x, t, label)
        with torch.autocast("cpu", torch.bfloat16):
            cast = net(x, t, label)
        half = net.bfloat16()(x.bfloat16(), t, label)
    assert half.dtype == torch.bfloat16
    assert (cast.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_training_under_autocast_gives_nearly_the_same_gradients():
    net, x = lively(UNet(small())).train(), noise(2, 3, 8, 8)
    gradients = []
    for enabled in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = net(x, torch.tensor([3, 9]))
        y.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.995


def test_runs_without_values_on_the_meta_device():
    with torch.device("meta"):
        net, x = UNet(small(num_classes=3)), torch.empty(2, 3, 8, 8)
    assert net(x, torch.zeros(2, device="meta")).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("changes, words", [
    ({"activation": "sillu"}, 'nearest: silu'),
    ({"groups": 5}, "8 channels cannot be split into 5 groups"),
    ({"attention": (2,)}, "levels 0 to 1"),
    ({"heads": 5}, "16 channels cannot be split into 5 equal heads"),
    ({"head_dim": 32}, "heads of 32"),
    ({"downsample_padding": 2}, "right and bottom"),
    ({"blocks": 0}, "at least 1"),
])
def test_impossible_configs_are_refused_in_one_sentence(changes, words):
    with pytest.raises(UserError, match=words):
        small(**changes)
