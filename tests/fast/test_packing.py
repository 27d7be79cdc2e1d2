"""The convolution with packed weights: nn.Conv2d's answers and nn.Conv2d's state, in every way that it runs."""

import contextlib
import copy
import functools
import weakref

import pytest
import torch
from torch import nn

from conftest import same
from nanodiff import fast
from nanodiff.fast import packing, winograd
from nanodiff.fast.packing import Conv2d

WAYS = ("plain", "small", "packed", "winograd")
needs_packing = pytest.mark.skipif(not packing.AVAILABLE, reason="this PyTorch has no oneDNN to pack weights for")


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def within(monkeypatch):
    """A stack of contexts, closed when the test ends: in it `pair` holds its layers `packed`."""
    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(pair, "stack", stack, raising=False)
        yield stack


def pair(*args, seed=0, **kwargs):
    """A Conv2d, frozen and within `packed`, and an nn.Conv2d with the same weights."""
    ours, plain = Conv2d(*args, **kwargs), nn.Conv2d(*args, **kwargs)
    pair.stack.enter_context(fast.packed(ours))
    with torch.no_grad():
        for i, p in enumerate(plain.parameters()):
            p.copy_(noise(*p.shape, seed=seed + i))
    ours.load_state_dict(plain.state_dict())
    return ours.eval().requires_grad_(False), plain.eval().requires_grad_(False)


@pytest.fixture
def force(monkeypatch):
    """force(way): layers of any size go that way; returns the list of the ways that were gone."""
    gone = []

    def watched(name, function):
        @functools.wraps(function)
        def run(*args):
            gone.append(name)
            return function(*args)
        return run

    if packing.AVAILABLE:
        monkeypatch.setattr(torch._C._nn, "thnn_conv2d", watched("small", torch._C._nn.thnn_conv2d))
    monkeypatch.setattr(winograd, "convolve", watched("winograd", winograd.convolve))
    monkeypatch.setattr(Conv2d, "pack", watched("packed", Conv2d.pack))

    def choose(way):
        monkeypatch.setattr(packing, "LEAST", 0 if way == "packed" else 2**60)
        monkeypatch.setattr(packing, "FEW", 2**60 if way == "small" else 0)
        monkeypatch.setattr(winograd, "pays", lambda shape, out: way == "winograd")
        return gone

    return choose


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernel, stride, padding", [(1, 1, 0), (3, 1, 1), (3, 1, 0), (3, 2, 1), (3, 2, 0), (1, 2, 1)])
def test_every_way_gives_the_answers_of_nn_conv2d(kernel, stride, padding, way, force):
    gone = force(way)
    whole = (kernel, stride, padding) == (3, 1, 1)  # what Winograd's method can do
    expected_way = {"winograd": ["winograd"] if whole else [], "plain": []}.get(way, [way])
    for channels, out, bias in ((6, 10, True), (32, 48, False), (3, 4, True)):
        ours, plain = pair(channels, out, kernel, stride=stride, padding=padding, bias=bias)
        for batch, height, width in ((1, 8, 12), (3, 12, 8)):
            x = noise(batch, channels, height, width)
            expected = plain(x)
            for memory_format in (torch.contiguous_format, torch.channels_last):
                given = x.contiguous(memory_format=memory_format)
                before = given.clone()
                del gone[:]
                with torch.no_grad():
                    y = ours(given)
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-5 * expected.abs().max().item())
                assert torch.equal(given, before)
                if packing.AVAILABLE and memory_format == torch.contiguous_format:
                    assert gone == expected_way
        assert ours.packed == (way == "packed" and packing.AVAILABLE)


def test_the_way_follows_from_size_and_purpose(monkeypatch):
    gone = []
    for name in ("is_small", "pack"):
        monkeypatch.setattr(Conv2d, name, lambda self, *args, f=getattr(Conv2d, name), name=name: (
            gone.append((name, answer := f(self, *args))), answer)[1])
    ours, _ = pair(64, 64, 3, padding=1)  # 36,864 weights
    with torch.no_grad():
        ours(noise(1, 64, 4, 4))
        ours(noise(1, 64, 12, 12))
    expected = [("is_small", True), ("is_small", False), ("pack", None)]
    assert gone == (expected if packing.AVAILABLE else [])
    few, _ = pair(32, 32, 3, padding=1)  # 9,216 weights are not worth packing
    with torch.no_grad():
        few(noise(1, 32, 32, 32))
    assert not few.packed


# --- the state stays nn.Conv2d's -------------------------------------------------------------------------------------

def packed_pair(force, *args, **kwargs):
    """A packed Conv2d and an nn.Conv2d with the same weights."""
    force("packed")
    ours, plain = pair(*args, **kwargs)
    with torch.no_grad():
        ours(noise(1, args[0], 8, 8))
    assert ours.packed
    return ours, plain


SIZES = [(7, 9, 3), (64, 33, 3), (5, 70, 1)]  # not the multiples of 8 or 16 that oneDNN packs in


@needs_packing
@pytest.mark.parametrize("size", SIZES)
def test_state_dict_is_plain_and_bit_identical_while_packed(size, force):
    ours, plain = packed_pair(force, *size, padding=size[-1] // 2)
    assert same(dict(ours.state_dict()), dict(plain.state_dict())) and ours.packed
    assert ours.state_dict()["weight"].layout == torch.strided
    assert same(dict(nn.Sequential(ours).state_dict()), dict(nn.Sequential(plain).state_dict()))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in plain.parameters())
    assert [name for name, _ in ours.named_parameters()] == ["weight", "bias"]
    assert torch.equal(ours.plain_weight(), plain.weight) and ours.packed


@needs_packing
@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_load_into_a_packed_layer(assign, force):
    ours, _ = packed_pair(force, 8, 16, 3, padding=1)
    other = pair(8, 16, 3, padding=1, seed=5)[1]
    ours.load_state_dict({key: tensor.clone() for key, tensor in other.state_dict().items()}, assign=assign)
    assert not ours.packed and same(dict(ours.state_dict()), dict(other.state_dict()))
    ours.requires_grad_(False)  # an assigned weight is the given tensor's
    x = noise(1, 8, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), other(x), rtol=1e-5, atol=1e-5)
    assert ours.packed


@needs_packing
@pytest.mark.parametrize("change", [
    lambda net: net.train(), lambda net: net.to(torch.float64), lambda net: net.half(), lambda net: net.bfloat16(),
    lambda net: net.to(memory_format=torch.channels_last), lambda net: copy.deepcopy(net)])
def test_training_moving_and_copying_see_plain_weights(change, force):
    ours, plain = packed_pair(force, 8, 16, 3, padding=1)
    net = nn.Sequential(ours)
    changed = change(net)
    assert not changed[0].packed and changed[0].weight.layout == torch.strided
    assert torch.equal(changed[0].weight, plain.weight.to(changed[0].weight.dtype))
    x = noise(2, 8, 8, 8).to(changed[0].weight.dtype)
    plain.to(x.dtype)
    with torch.no_grad():
        torch.testing.assert_close(changed(x), plain(x), rtol=1e-5, atol=1e-5)


@needs_packing
def test_a_copy_is_a_layer_of_its_own(force):
    ours, plain = packed_pair(force, 8, 16, 3, padding=1)
    twin = copy.deepcopy(nn.ModuleList([ours, ours]))
    assert twin[0] is twin[1] and type(twin[0]) is Conv2d and twin[0] is not ours
    with torch.no_grad():
        twin[0].weight.zero_()
    assert torch.equal(ours.plain_weight(), plain.weight)


@needs_packing
def test_memory_holds_one_of_the_two_weights(force):
    force("packed")
    ours, _ = pair(8, 16, 3, padding=1)
    plain = weakref.ref(ours.weight)
    with torch.no_grad():
        ours(noise(1, 8, 8, 8))
        packed = weakref.ref(ours.held)
        assert plain() is None and packed() is not None
        ours.unpack()
        assert packed() is None


@needs_packing
def test_evaluation_mode_alone_does_not_unpack(force):
    ours, _ = packed_pair(force, 8, 16, 3, padding=1)
    weight = ours.held
    assert nn.Sequential(ours).eval()[0].held is weight and ours.packed


@needs_packing
def test_a_change_of_size_packs_again_and_a_change_of_batch_does_not(force):
    gone, (ours, plain) = force("packed"), packed_pair(force, 8, 16, 3, padding=1)
    del gone[:]
    with torch.no_grad():
        for batch, height, width, packs in ((4, 8, 8, 0), (1, 8, 16, 1), (2, 5, 7, 1), (1, 5, 7, 0), (1, 8, 8, 1)):
            x = noise(batch, 8, height, width)
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
            assert len(gone) == packs
            del gone[:]
    assert torch.equal(ours.plain_weight(), plain.weight)


# --- gradients -------------------------------------------------------------------------------------------------------

def test_a_weight_that_is_trained_is_never_packed(force):
    force("packed")
    ours, plain = pair(8, 16, 3, padding=1)
    ours.requires_grad_(True)
    with torch.no_grad():
        torch.testing.assert_close(ours(noise(1, 8, 8, 8)), plain(noise(1, 8, 8, 8)), rtol=1e-5, atol=1e-5)
    assert not ours.packed
    weight = ours.weight
    ours(noise(1, 8, 8, 8)).sum().backward()
    assert ours.weight is weight and weight.grad.abs().max() > 0


@needs_packing
@pytest.mark.parametrize("stride, padding", [(1, 1), (2, 0)])
def test_gradients_pass_through_a_packed_frozen_layer(stride, padding, force):
    ours, plain = packed_pair(force, 8, 16, 3, stride=stride, padding=padding)
    x = noise(2, 8, 8, 8).requires_grad_()
    y = plain(x)
    direction = noise(*y.shape, seed=2)
    expected, = torch.autograd.grad((y * direction).sum(), x)
    gradient, = torch.autograd.grad((ours(x) * direction).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    assert not ours.packed and ours.weight.grad is None  # unpacked once, not at every call


@needs_packing
@pytest.mark.parametrize("inference", [False, True])
def test_a_layer_that_was_packed_can_be_trained(inference, force):
    force("packed")
    ours, plain = pair(8, 16, 3, padding=1)
    with torch.inference_mode(inference), torch.no_grad():
        ours(noise(1, 8, 8, 8))
    assert ours.packed
    ours.requires_grad_(True).train()  # in either order
    assert not ours.packed and ours.weight.requires_grad and ours.weight.is_leaf
    x = noise(2, 8, 8, 8)
    ours(x).square().sum().backward()
    plain.requires_grad_(True)(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)
    ours.requires_grad_(False).eval()
    with torch.no_grad():
        ours(x)
    assert ours.packed
    ours.train().requires_grad_(True)
    assert ours.weight.requires_grad and not ours.packed


@needs_packing
def test_gradients_asked_for_without_train_unpack_at_the_next_call(force):
    for gradients in (False, True):
        ours, plain = packed_pair(force, 8, 16, 3, padding=1)
        ours.requires_grad_(True)
        x = noise(2, 8, 6, 6)  # not the size that it was packed for
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
        assert not ours.packed and ours.weight.requires_grad and ours.weight.layout == torch.strided


@needs_packing
@pytest.mark.parametrize("order", ["made while packed", "made before"])
def test_an_optimiser_trains_the_weight_that_the_layer_computes_with(order, force):
    ours, plain = pair(8, 16, 3, padding=1)
    if order == "made before":
        optimiser = torch.optim.SGD(ours.parameters(), lr=0.1)
    force("packed")
    with torch.no_grad():
        ours(noise(1, 8, 8, 8))
    assert ours.packed
    if order == "made while packed":
        optimiser = torch.optim.SGD(ours.parameters(), lr=0.1)
    ours.requires_grad_(True)
    ours(noise(1, 8, 8, 8)).square().sum().backward()
    optimiser.step()
    assert optimiser.param_groups[0]["params"][0] is ours.weight
    assert (ours.weight - plain.weight).abs().max() > 1e-3


# --- elsewhere -------------------------------------------------------------------------------------------------------

def test_without_pytorchs_internal_names_every_layer_is_nn_conv2d(force, monkeypatch):
    gone = force("packed")
    monkeypatch.setattr(packing, "AVAILABLE", False)
    monkeypatch.setattr(winograd, "pays", lambda shape, out: True)
    ours, plain = pair(8, 16, 3, padding=1)
    with torch.no_grad():
        assert torch.equal(ours(noise(1, 8, 8, 8)), plain(noise(1, 8, 8, 8)))
    assert not gone and not ours.packed


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_than_float32_run_as_nn_conv2d(dtype, force):
    gone = force("packed")
    ours, plain = (layer.to(dtype) for layer in pair(8, 16, 3, padding=1))
    with torch.no_grad():
        assert torch.equal(ours(noise(1, 8, 8, 8).to(dtype)), plain(noise(1, 8, 8, 8).to(dtype)))
    assert not gone and not ours.packed


def test_groups_and_dilation_are_kept(force):
    for way in WAYS:
        force(way)
        ours, plain = pair(8, 16, 3, padding=2, groups=4, dilation=2)
        x = noise(2, 8, 9, 10)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)


# --- within packed(net), and after it --------------------------------------------------------------------------------

@needs_packing
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_weights_are_packed_within_and_put_back_bit_for_bit_with_their_order_in_memory(order, force):
    force("packed")
    net = fast.speed_up(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 1))).requires_grad_(False)
    net.to(memory_format=order)
    before, strides = copy.deepcopy(dict(net.state_dict())), [p.stride() for p in net.parameters()]
    with torch.no_grad():
        net(noise(1, 8, 8, 8))
        assert not any(layer.packed for layer in net)
        with fast.packed(net) as same_net:
            net(noise(1, 8, 8, 8))
            assert same_net is net and all(layer.packed for layer in net)
    assert not any(layer.packed or vars(layer).keys() & {"may_pack", "packed_for", "strides"} for layer in net)
    assert same(dict(net.state_dict()), before) and [p.stride() for p in net.parameters()] == strides


@needs_packing
def test_nested_ones_share_their_weights_and_an_error_puts_them_back(force):
    gone = force("packed")
    net = fast.speed_up(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1))).requires_grad_(False)
    with pytest.raises(KeyError), torch.no_grad(), fast.packed(net):
        for _ in range(2):
            with fast.packed(net):
                net(noise(1, 8, 8, 8))
            assert net[0].packed
        assert gone == ["packed"]
        raise KeyError
    assert not net[0].packed


def test_a_plain_network_has_nothing_to_pack():
    net = nn.Conv2d(8, 16, 3)
    with fast.packed(net):
        assert type(net) is nn.Conv2d


@needs_packing
def test_an_average_of_weights_goes_on_after_a_preview(force):
    from nanodiff.training.step import EMA

    net = fast.speed_up(nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)))
    average = EMA(net, 0.9)
    force("packed")
    with torch.no_grad(), fast.packed(average.net):
        average.net(noise(1, 8, 8, 8))
        assert average.net[0].packed
    average.update(net)
    torch.testing.assert_close(average.net[0].weight, net[0].weight)
    with torch.no_grad(), fast.packed(average.net):
        average.net(noise(1, 8, 8, 8))
        assert not EMA(average.net, 0.9).net[0].packed  # a copy of packed weights is plain
