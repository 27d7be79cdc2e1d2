"""Frozen layers in training: the outputs of nn.Conv2d and nn.Linear and their gradients for the input alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import same
from torch import nn

from nanodiff import fast
from nanodiff.fast import frozen
from nanodiff.fast.packing import Conv2d
from nanodiff.models import lora
from nanodiff.models.blocks import ResnetBlock, Upsample
from nanodiff.models.cond_unet import CondUNet, CondUNetConfig


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["internal", "public"])
def every_size(request, monkeypatch):
    """Layers of any size are treated as large ones, with PyTorch's internal product and without it."""
    monkeypatch.setattr(frozen, "LEAST", 0)
    if request.param == "public":
        monkeypatch.setattr(frozen, "AVAILABLE", False)


def gradient(layer, x):
    """(output, gradient for x) in a direction that is always the same."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad((y * noise(*y.shape, seed=2)).sum(), x)


def agree(found, expected, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()


SIZES = [(1, 8, 128, 4, 6), (2, 128, 128, 24, 24), (2, 6, 10, 9, 7), (1, 13, 600, 8, 8)]  # B, in, out, H, W


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel, stride, padding", [(1, 1, 0), (3, 1, 1), (3, 1, 0), (3, 2, 1), (3, 2, 0), (1, 2, 1)])
def test_a_frozen_convolution_is_nn_conv2d_with_its_gradient(kernel, stride, padding, size, wrapped, every_size):
    batch, channels, out, height, width = size
    plain = nn.Conv2d(channels, out, kernel, stride, padding)
    ours = Conv2d(channels, out, kernel, stride, padding)
    ours.load_state_dict(plain.state_dict())
    ours.requires_grad_(False)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = noise(batch, channels, height, width).contiguous(memory_format=memory_format)
        agree(gradient(lora.LoraLayer(ours) if wrapped else ours, x), gradient(plain, x))
    assert ours.weight.grad is None and same(dict(ours.state_dict()), dict(plain.state_dict()))


def test_the_way_follows_from_size():
    weight = torch.empty(128, 128, 3, 3)
    for shape, way in (((1, 128, 32, 32), "winograd"), ((1, 128, 4, 4), "product"), ((1, 128, 16, 16), "plain")):
        assert frozen.fastest(shape, torch.float32, weight, (1, 1), (1, 1)) == way
    assert frozen.fastest((1, 128, 32, 32), torch.bfloat16, weight, (1, 1), (1, 1)) == "plain"


@pytest.mark.parametrize("rows", [(3,), (2, 70), (1, 2, 5)])
def test_a_frozen_linear_layer_has_the_outputs_and_gradients_of_nn_linear(rows, every_size):
    for bias in (True, False):
        plain, ours = nn.Linear(12, 7, bias=bias), frozen.Linear(12, 7, bias=bias)
        ours.load_state_dict(plain.state_dict())
        ours.requires_grad_(False)
        for x in (noise(*rows, 12), noise(12, *rows).movedim(0, -1)):  # the second is not contiguous
            agree(gradient(ours, x), gradient(plain, x))
        assert ours(noise(0, 12).requires_grad_()).shape == (0, 7)


def test_a_layer_used_twice_and_changed_in_place_adds_its_gradients(every_size):
    plain, ours = nn.Conv2d(8, 8, 3, padding=1), Conv2d(8, 8, 3, padding=1)
    ours.load_state_dict(plain.state_dict())
    ours.requires_grad_(False)
    agree(*(gradient(lambda x, conv=conv: conv(conv(x).mul_(2)).add_(x), noise(2, 8, 6, 6)) for conv in (ours, plain)))


def test_a_layer_that_was_frozen_trains_again(every_size):
    plain, ours = nn.Conv2d(8, 16, 3, padding=1), Conv2d(8, 16, 3, padding=1)
    ours.load_state_dict(plain.state_dict())
    parameter = ours.requires_grad_(False).weight
    gradient(ours, noise(1, 8, 6, 6))
    with torch.no_grad(), fast.packed(ours):
        ours(noise(1, 8, 6, 6))  # may pack it
    gradient(ours, noise(1, 8, 5, 6))
    twin = copy.deepcopy(ours).requires_grad_(True)
    ours.requires_grad_(True)
    x = noise(2, 8, 6, 6)
    for layer in (ours, twin, plain):
        layer(x).square().mean().backward()
    assert ours.weight is parameter
    agree([ours.weight.grad, ours.bias.grad, twin.weight.grad], [plain.weight.grad, plain.bias.grad, plain.weight.grad])


def test_a_frozen_weight_is_held_once_and_nothing_of_the_input_is_kept(every_size):
    ours, kept = Conv2d(16, 16, 3, padding=1).requires_grad_(False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours(noise(1, 16, 8, 8).requires_grad_())
    assert {tensor.data_ptr() for tensor in kept} == {ours.weight.data_ptr()}
    assert not any(isinstance(value, torch.Tensor) for value in vars(ours).values())


@pytest.mark.parametrize("out", [8, 12])
def test_frozen_blocks_have_the_gradients_of_trained_ones(out, every_size):
    net, up = (fast.speed_up(block) for block in (ResnetBlock(8, out, time_channels=6, groups=4), Upsample(8)))
    x, time = noise(2, 8, 6, 6), noise(2, 6, seed=3)
    expected = gradient(lambda x: net(x, time), x), gradient(up, x)
    net.requires_grad_(False)
    up.requires_grad_(False)
    agree(gradient(lambda x: net(x, time), x), expected[0])
    agree(gradient(up, x), expected[1])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("linear_projection", [False, True])
def test_adapters_learn_in_a_frozen_network_what_they_learn_in_a_trained_one(checkpointing, linear_projection,
                                                                             every_size):
    config = CondUNetConfig(channels=(8, 16), blocks=1, attention=(0, 1), heads=(2, 2), context_channels=6, groups=4,
                            linear_projection=linear_projection)
    net, found = CondUNet(config, torch.Generator().manual_seed(0)), []
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.05 * noise(*p.shape, seed=i))
    for learns in (True, False):
        net.requires_grad_(learns)
        places = lora.find_targets({"unet": net}, ["attention", "resnet"])
        adapters = lora.add({"unet": net}, places, 2, 2.0, torch.Generator().manual_seed(5))
        with torch.no_grad():
            for i, p in enumerate(adapters):
                p.add_(0.1 * noise(*p.shape, seed=i))
        fast.speed_up(net).checkpointing = checkpointing
        y = net(noise(2, 4, 8, 8), torch.tensor([3, 700]), noise(2, 5, 6, seed=4))
        found.append([y, *torch.autograd.grad(y.square().mean(), adapters)])
        lora.detach({"unet": net})
    agree(found[1], found[0], 1e-4)


def test_nothing_before_the_first_adapter_is_in_the_graph():
    config = CondUNetConfig(channels=(8, 16), blocks=1, attention=(1,), heads=(2, 2), context_channels=6, groups=4)
    net, outputs = CondUNet(config).requires_grad_(False), {}
    lora.add({"unet": net}, lora.find_targets({"unet": net}, ["attention"]), 2, 2.0)
    fast.speed_up(net)
    for path, module in net.named_modules():
        module.register_forward_hook(lambda module, args, y, path=path: outputs.update({path: y}))
    net(noise(1, 4, 8, 8), 5, noise(1, 3, 6)).sum().backward()
    assert not any(outputs[path].requires_grad for path in ("conv_in", "time_embedding", "down_blocks.0.resnets.0"))
    assert outputs["mid_block"].requires_grad


def test_a_frozen_network_in_bfloat16_teaches_float32_adapters_nearly_the_same(every_size):
    config = CondUNetConfig(channels=(8, 16), blocks=1, attention=(0, 1), heads=(2, 2), context_channels=6, groups=4)
    net, found = CondUNet(config, torch.Generator().manual_seed(0)).requires_grad_(False), []
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.add_(0.05 * noise(*p.shape, seed=i))
    adapters = lora.add({"unet": net}, lora.find_targets({"unet": net}, ["attention", "resnet"]), 2, 2.0,
                        torch.Generator().manual_seed(5))
    fast.speed_up(net)
    for dtype in (torch.float32, torch.bfloat16):
        for layer in net.modules():
            if not isinstance(layer, (lora.LoraLayer, lora.Adapter)):
                for p in layer.parameters(recurse=False):
                    p.data = p.data.to(dtype)
        y = net(noise(2, 4, 8, 8), torch.tensor([3, 700]), noise(2, 5, 6, seed=4))
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(y.float().square().mean(), adapters)]))
        assert y.dtype == dtype and found[-1].dtype == torch.float32
    assert F.cosine_similarity(*found, dim=0) > 0.99


def test_float64_and_autocast_go_pytorchs_own_way(every_size):
    ours, x = Conv2d(4, 4, 3, padding=1).requires_grad_(False), noise(1, 4, 6, 6).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
    ours.double()
    assert torch.autograd.gradcheck(ours, [x.detach().double().requires_grad_()])
    assert torch.equal(ours(x.double()), F.conv2d(x.double(), ours.weight, ours.bias, padding=1))
