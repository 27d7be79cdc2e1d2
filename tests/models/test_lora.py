"""LoRA adapters: what they compute, what merging does to the weights, and that everything can be undone bit for bit."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from lora_networks import PATHS, networks, output, random_parts
from torch import nn

from nanodiff.errors import UserError
from nanodiff.models import lora, lora_extract
from nanodiff.models.lora import LoraPart, delta, layers


def weights(nets):
    """Copies of all weights."""
    return {(network, key): tensor.clone() for network, net in nets.items() for key, tensor in net.state_dict().items()}


def objects(nets):
    """All modules with the Parameter that is their weight: the objects themselves."""
    return {(network, path): (module, getattr(module, "weight", None))
            for network, net in nets.items() for path, module in net.named_modules()}


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "1x1": (lambda: nn.Conv2d(6, 5, 1), (2, 6, 7, 8)),
    "3x3": (lambda: nn.Conv2d(6, 5, 3, padding=1), (2, 6, 7, 8)),
    "stride 2": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 7, 8)),
    "dilated, not square": (lambda: nn.Conv2d(6, 5, (1, 3), padding=(0, 2), dilation=2), (2, 6, 7, 8)),
}


@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("kind", LAYERS)
def test_merged_and_unmerged_agree_with_the_definition(kind, scale):
    make, shape = LAYERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = make().double().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    down = torch.randn(3, *layer.weight.shape[1:], generator=draw, dtype=torch.float64)
    up = torch.randn(5, 3, *[1] * (layer.weight.ndim - 2), generator=draw, dtype=torch.float64)
    if kind == "linear":
        change = F.linear(F.linear(x, down), up)
    else:
        change = F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding, layer.dilation), up)
    expected = layer(x) + scale * 6 / 3 * change

    nets = {"unet": nn.Sequential(layer)}
    lora.attach(nets, [LoraPart("unet", "0", down, up, 6.0)], "a", scale)
    assert torch.allclose(nets["unet"](x), expected, rtol=0, atol=1e-12)
    lora.merge(nets)
    assert torch.allclose(nets["unet"](x), expected, rtol=0, atol=1e-12)
    assert torch.allclose(nets["unet"][0].base(x), expected, rtol=0, atol=1e-12)  # all of it is in the weight


def test_delta_has_the_shape_of_the_weight_and_each_layer_its_own_alpha():
    for part in random_parts():
        change = delta(part)
        assert change.shape == layers(networks()[part.network])[part.layer].weight.shape
        up, down = part.up.flatten(1).double(), part.down.flatten(1).double()
        assert torch.allclose(change.flatten(1).double(), part.alpha / 2 * up @ down, atol=1e-6)
    assert {part.alpha for part in random_parts()} == {3.0, 4.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ten_rounds_of_two_loras_in_any_order_leave_the_base_bit_identical(dtype):
    nets = networks(dtype=dtype)
    before, things = weights(nets), objects(nets)
    first, second = random_parts(1), random_parts(2, rank=3)
    for i in range(10):
        lora.attach(nets, first, "first", 0.3 + i)
        lora.merge(nets, "first")
        lora.attach(nets, second, "second", -0.7)
        lora.merge(nets)
        if i % 3 == 0:
            lora.unmerge(nets, "first")
        lora.set_scale(nets, "second", 1.7)
        if i % 3 == 1:
            lora.unmerge(nets)
            assert all(torch.equal(layer.base.weight, before[network, f"{path}.weight"])
                       for network, path, layer in lora.lora_layers(nets))
        lora.detach(nets, ["first", "second"][i % 2])
        assert lora.names(nets) == [["second", "first"][i % 2]]
        lora.detach(nets)
        assert same(weights(nets), before)
        now = objects(nets)
        assert now.keys() == things.keys()
        assert all(now[k][0] is things[k][0] and now[k][1] is things[k][1] for k in things)


def test_a_merge_is_computed_wide_and_rounded_once():
    first, second = random_parts(1, std=0.05), random_parts(2, std=0.05)
    for dtype in (torch.bfloat16, torch.float16):
        nets = networks(dtype=dtype)
        before = weights(nets)
        lora.attach(nets, first, "first", 0.5)
        lora.attach(nets, second, "second", 2.0)
        lora.merge(nets)
        for network, path, layer in lora.lora_layers(nets):
            parts = [next(p for p in group if (p.network, p.layer) == (network, path)) for group in (first, second)]
            wide = before[network, f"{path}.weight"].float()
            wide = wide + 0.5 * delta(parts[0]) + 2.0 * delta(parts[1])
            assert layer.base.weight.dtype == dtype and same(layer.base.weight.detach(), wide.to(dtype))


def test_the_order_of_merging_does_not_matter():
    results = []
    for order in (("first", "second"), ("second", "first")):
        nets = networks()
        lora.attach(nets, random_parts(1), "first")
        lora.attach(nets, random_parts(2), "second")
        for name in order:
            lora.merge(nets, name)
        results.append(weights(nets))
    assert same(*results)


def test_a_new_scale_reaches_merged_weights_too():
    nets, expected = networks(), networks()
    lora.attach(nets, random_parts(), "a", 0.2)
    lora.merge(nets)
    lora.set_scale(nets, "a", 0.9)
    lora.attach(expected, random_parts(), "a", 0.9)
    lora.merge(expected)
    assert same(weights(nets), weights(expected))


def test_loras_add_up_and_scales_are_their_own():
    nets, base = networks(dtype=torch.float64), networks(dtype=torch.float64)
    lora.attach(nets, random_parts(1), "first", 0.25)
    lora.attach(nets, random_parts(2, rank=3), "second")
    lora.set_scale(nets, "second", -2)
    with torch.no_grad():
        for network, path, layer in lora.lora_layers(nets):
            weight = layers(base[network])[path].weight
            for group, scale in ((random_parts(1), 0.25), (random_parts(2, rank=3), -2)):
                part = next(p for p in group if (p.network, p.layer) == (network, path))
                weight += scale * delta(part, torch.float64)
    assert lora.names(nets) == ["first", "second"]
    assert torch.allclose(output(nets), output(base), atol=1e-9)
    lora.merge(nets, "first")
    assert torch.allclose(output(nets), output(base), atol=1e-9)  # one in the weights, one beside them


def test_the_report_counts_layers_and_measures_the_change():
    nets = networks()
    parts = random_parts(paths={**PATHS, "text_model": ["2"]})
    report = lora.attach(nets, parts, "a", 0.5)
    assert report["layers"] == {"unet": 8, "text_model": 1}
    squares = {}
    for part in parts:
        weight = layers(nets[part.network])[part.layer].weight
        change, whole = squares.get(part.network, (0, 0))
        change += float((0.5 * delta(part)).square().sum())
        squares[part.network] = change, whole + float(weight.square().sum())
    for network, (change, whole) in squares.items():
        assert math.isclose(report["change"][network], math.sqrt(change / whole), rel_tol=1e-5)
    change, whole = (sum(pair) for pair in zip(*squares.values()))
    assert math.isclose(report["overall"], math.sqrt(change / whole), rel_tol=1e-5)
    assert lora.attach(nets, parts, "nothing", 0)["overall"] == 0


CONV = LoraPart("unet", "conv_in", torch.ones(2, 3, 3, 3), torch.ones(8, 2, 1, 1), 2.0)


@pytest.mark.parametrize("change, words", [
    (lambda p: p.append(LoraPart("unet", "conv_inn", CONV.down, CONV.up, 1.0)), "unet, nearest: conv_in"),
    (lambda p: p.append(LoraPart("vae", "conv_in", CONV.down, CONV.up, 1.0)), "not a layer of the vae"),
    (lambda p: p.append(p[0]), 'changes "conv_in" twice'),
    (lambda p: setattr(p[-1], "up", torch.ones(7, 2)), r"up \[7, 2\], expected .* another base model"),
    (lambda p: setattr(p[-1], "down", p[-1].down * math.nan), "not finite"),
    (lambda p: setattr(p[-1], "alpha", math.inf), "not finite"),
    (lambda p: p.clear(), "changes no layer"),
])
def test_a_lora_that_does_not_fit_leaves_the_networks_untouched(change, words):
    nets = networks()
    things, parts = objects(nets), random_parts()
    change(parts)
    with pytest.raises(UserError, match=words):
        lora.attach(nets, parts, "a")
    assert objects(nets) == things and lora.names(nets) == []


def test_names_are_unique_may_hold_dots_and_unknown_ones_are_refused():
    nets = networks()
    lora.attach(nets, random_parts(), "knit v1.5")
    with pytest.raises(UserError, match='"knit v1.5" is loaded already'):
        lora.attach(nets, random_parts(), "knit v1.5")
    for call in (lora.merge, lora.unmerge, lora.detach, lora.parts, lambda n, name: lora.set_scale(n, name, 1)):
        with pytest.raises(UserError, match='no LoRA named "knit v1.6".*nearest: knit v1.5'):
            call(nets, "knit v1.6")
    for scale in (math.nan, math.inf):
        with pytest.raises(UserError, match="finite"):
            lora.set_scale(nets, "knit v1.5", scale)
        with pytest.raises(UserError, match="finite"):
            lora.attach(nets, random_parts(), "other", scale)
    assert lora.names(nets) == ["knit v1.5"]


def test_without_any_lora_the_calls_do_nothing():
    nets = networks()
    things = objects(nets)
    for call in (lora.merge, lora.unmerge, lora.detach, lora.bake):
        call(nets)
    assert objects(nets) == things and lora.names(nets) == []


def test_a_baked_network_has_plain_layers_with_the_merged_weights():
    nets = networks()
    keys, things = weights(nets).keys(), objects(nets)
    lora.attach(nets, random_parts(), "a", 0.7)
    expected = output(nets)
    lora.bake(nets)
    assert weights(nets).keys() == keys and lora.names(nets) == []
    assert all(module is things[key][0] for key, (module, _) in objects(nets).items())
    assert torch.allclose(output(nets), expected, atol=1e-4 * float(expected.abs().max()))
    assert not torch.allclose(output(nets), output(networks()), atol=1e-2)


@pytest.mark.parametrize("merged", [False, True])
def test_the_state_dict_without_adapters_is_the_original_one(merged):
    nets = networks()
    before = {network: copy.deepcopy(dict(net.state_dict())) for network, net in nets.items()}
    lora.attach(nets, random_parts(), "a")
    if merged:
        lora.merge(nets)
    for network, net in nets.items():
        assert net.state_dict().keys() != before[network].keys()
        assert same(lora.base_state_dict(net), before[network])


def test_moving_a_merged_network_moves_the_kept_weights_too():
    nets = networks()
    before = weights(nets)
    lora.attach(nets, random_parts(), "a")
    lora.merge(nets)
    twin = copy.deepcopy(nets)
    for net in nets.values():
        net.double()
    lora.detach(nets)
    assert same(weights(nets), {key: tensor.double() for key, tensor in before.items()})
    lora.detach(twin)  # a copy is whole in itself
    assert same(weights(twin), before)


def test_half_precision_layers_keep_their_dtype_and_lose_little():
    nets, half = networks(), networks(dtype=torch.bfloat16)
    for both in (nets, half):
        lora.attach(both, random_parts(std=0.1), "a")
    y = output(half)
    assert y.dtype == torch.bfloat16
    assert half["unet"].conv_in.weight.dtype == torch.bfloat16  # a network may be asked for its type as before
    assert float((y.float() - output(nets)).abs().max()) < 0.05 * float(output(nets).abs().max())


# --- from two models back to a LoRA -----------------------------------------------------------------------------------

def test_the_extracted_lora_is_the_change_at_full_rank_and_the_nearest_one_below_it():
    before, after = networks(), networks()
    parts = random_parts(rank=4)
    lora.attach(after, parts, "a")
    lora.merge(after)
    lora.bake(after)
    for rank in (4, 2, 1):
        found = lora_extract.extract(before, after, rank)
        assert [(part.network, part.layer) for part in found] == [
            (network, path) for network, net in before.items() for path in layers(net) if path in PATHS[network]]
        for part in found:
            own, other = (layers(nets[part.network])[part.layer].weight for nets in (before, after))
            change = (other.double() - own.double()).flatten(1)
            near = part.up.flatten(1).double() @ part.down.flatten(1).double() * part.alpha / len(part.down)
            singular = torch.linalg.svdvals(change)
            left = float(singular[rank:].square().sum()) ** 0.5
            assert float((change - near).norm()) == pytest.approx(left, abs=1e-5 * float(singular[0]))


def test_nothing_is_extracted_from_equal_or_from_different_networks():
    with pytest.raises(UserError, match="the same weights"):
        lora_extract.extract(networks(), networks(), 4)
    other = networks()
    other["text_model"] = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))
    with pytest.raises(UserError, match=r"text_model 0 is \(6, 5\) in one and \(7, 5\) in the other"):
        lora_extract.extract(networks(), other, 4)
