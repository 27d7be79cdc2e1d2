"""The fast layer with LoRA: the outputs and gradients of the plain one, also around packed convolutions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nanodiff import fast
from nanodiff.fast import lora as fast_lora
from nanodiff.fast.packing import AVAILABLE, Conv2d
from nanodiff.models import lora
from nanodiff.models.lora import LoraPart, delta

LAYERS = {"linear": (lambda: nn.Linear(6, 5), (2, 4, 6)), "no bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
          "1x1": (lambda: nn.Conv2d(6, 5, 1), (2, 6, 7, 8)),
          "stride 2": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 7, 8)),
          "dilated, not square": (lambda: nn.Conv2d(6, 5, (1, 3), padding=(0, 2), dilation=2), (2, 6, 7, 8))}


@pytest.fixture(params=LAYERS)
def layer_and_shape(request):
    """(layer, shape of its input), the layer drawn from a seed."""
    make, shape = LAYERS[request.param]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(), shape


@pytest.mark.parametrize("trained", [False, True])
def test_a_small_layer_with_its_change_worked_in_is_the_layer_with_adapters_beside_it(layer_and_shape, trained,
                                                                                      monkeypatch):
    """Outputs and the gradients of input, adapters and, where it is trained too, base; of two adapters at once, while a
    third is merged."""
    layer, shape = layer_and_shape
    draw = torch.Generator().manual_seed(0)
    x, found, beside = torch.randn(shape, generator=draw), [], lora.Adapter.forward
    tail = [1] * (layer.weight.ndim - 2)
    parts = [[LoraPart("unet", "0", torch.randn(rank, *layer.weight.shape[1:], generator=draw),
                       torch.randn(5, rank, *tail, generator=draw), 2.0)] for rank in (3, 1, 2)]
    for small in (fast_lora.SMALL, 0):
        monkeypatch.setattr(fast_lora, "SMALL", small)
        nets = {"unet": nn.Sequential(copy.deepcopy(layer).requires_grad_(False))}
        for name, part, scale in zip("abc", parts, (0.7, 1.0, 0.5)):
            lora.attach(nets, part, name, scale, trainable=True)
        lora.merge(nets, "c")
        fast.speed_up(nets["unet"])[0].base.requires_grad_(trained)
        with torch.no_grad(), fast.packed(nets["unet"]):
            nets["unet"](x)  # which may pack a frozen weight
        calls = []
        monkeypatch.setattr(lora.Adapter, "forward", lambda self, *args: (
            calls.append(self.name), beside(self, *args))[1])
        asked = x.clone().requires_grad_(True)
        y = nets["unet"](asked)
        assert calls == ([] if small else ["a", "b"])
        learning = [p for p in nets["unet"].parameters() if p.requires_grad]
        found.append([y, *torch.autograd.grad(y.square().sum(), [asked, *learning], allow_unused=True)])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_under_autocast_the_change_stays_beside_the_weight():
    """A bfloat16 sum of a weight of 1 and a change of 1e-3 would be the weight."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False).requires_grad_(False))
    nn.init.ones_(net[0].weight)
    part = LoraPart("unet", "0", torch.eye(1, 4), torch.full((4, 1), 1e-3), 1.0)
    lora.attach({"unet": net}, [part], "a", trainable=True)
    fast.speed_up(net)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(torch.tensor([[1.0, -1.0, 1.0, -1.0]]))  # nothing from the weight, the change's 1e-3
    torch.testing.assert_close(y.detach().float(), torch.full((1, 4), 1e-3), rtol=0.01, atol=0)


@pytest.mark.skipif(not AVAILABLE, reason="this build of torch packs no weights")
def test_packed_convolutions_take_a_lora_and_come_back():
    conv = Conv2d(64, 64, 3, padding=1).requires_grad_(False)
    plain, nets = conv.weight.clone(), {"unet": nn.Sequential(conv)}
    draw = torch.Generator().manual_seed(0)
    x, down, up = (torch.randn(*shape, generator=draw) for shape in ((1, 64, 8, 8), (2, 64, 3, 3), (64, 2, 1, 1)))
    part = LoraPart("unet", "0", down, up, 0.1)
    with torch.no_grad(), fast.packed(nets["unet"]):
        before = nets["unet"](x)
        assert conv.packed
        lora.attach(nets, [part], "a")
        expected = F.conv2d(x, plain + delta(part), conv.bias, padding=1)
        assert torch.allclose(nets["unet"](x), expected, atol=1e-4) and conv.packed
        lora.merge(nets)
        assert torch.allclose(nets["unet"](x), expected, atol=1e-4) and conv.packed
        assert torch.equal(lora.base_state_dict(nets["unet"])["0.weight"], plain)
        lora.detach(nets)
        assert nets["unet"][0] is conv and torch.equal(conv.weight, plain)
        assert torch.equal(nets["unet"](x), before)


def test_a_fast_layer_is_the_plain_one_with_and_without_gradients(layer_and_shape):
    layer, shape = layer_and_shape
    draw, nets = torch.Generator().manual_seed(0), {"unet": nn.Sequential(layer)}
    for name, rank in (("a", 2), ("b", 3)):
        down = torch.randn(rank, *layer.weight.shape[1:], generator=draw)
        up = torch.randn(5, rank, *[1] * (layer.weight.ndim - 2), generator=draw)
        lora.attach(nets, [LoraPart("unet", "0", down, up, 2.0)], name, 0.7, trainable=True)
    x = torch.randn(shape, generator=draw)
    expected = nets["unet"](x)
    assert type(nets["unet"][0]) is lora.LoraLayer
    fast.speed_up(nets["unet"])
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(nets["unet"](x), expected, rtol=1e-5, atol=1e-5)
