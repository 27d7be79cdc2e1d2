"""speed_up: another forward, the same network; in all that is done with one."""

import contextlib
import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conftest import same
from nanodiff import fast
from nanodiff.fast import FASTER, frozen, packing
from nanodiff.models import lora
from nanodiff.models.clip_text import ClipText, ClipTextConfig
from nanodiff.models.cond_unet import CondUNet, CondUNetConfig
from nanodiff.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
from nanodiff.models.unet import UNet, UNetConfig
from nanodiff.pipelines import attention_maps
from nanodiff.training.step import EMA


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cond_unet():
    return CondUNet(CondUNetConfig(channels=(8, 16), blocks=1, attention=(0, 1), heads=(2, 2), context_channels=6,
                                   groups=4))


def unet():
    return UNet(UNetConfig(channels=(8, 16), blocks=1, attention=(1,), heads=2, groups=4, num_classes=3))


NETWORKS = {  # name: (a network, its inputs)
    "U-Net": (unet, (noise(2, 3, 8, 12), torch.tensor([3, 700]), torch.tensor([0, 3]))),
    "text U-Net": (cond_unet, (noise(2, 4, 8, 12), torch.tensor([3, 700]), noise(2, 5, 6, seed=2))),
    "autoencoder": (lambda: KLAutoencoder(KLAutoencoderConfig(channels=(8, 16), blocks=1, groups=4)),
                    (noise(2, 3, 8, 12),)),
    "text model": (lambda: ClipText(ClipTextConfig(vocab_size=20, width=8, layers=2, heads=2, mlp=16, positions=7)),
                   (torch.arange(14).view(2, 7),)),
}


def draw(name):
    """A network with all its weights random."""
    net = NETWORKS[name][0]()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(0.3 * noise(*p.shape, seed=i))
    return net.eval()


def outputs(net, name):
    """What it says of its inputs, without the autoencoder's draw."""
    inputs = NETWORKS[name][1]
    if name == "autoencoder":
        latent = net.encode(*inputs)
        return net.decode(latent.mean), latent.mean, latent.logvar
    return net(*inputs)[:1] if name == "text model" else (net(*inputs),)


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Layers of any size are treated as large ones."""
    monkeypatch.setattr(packing, "LEAST", 1)
    monkeypatch.setattr(packing, "FEW", 0)
    monkeypatch.setattr(frozen, "LEAST", 0)


@pytest.fixture(params=["fast", "packed", "packed before"])
def state(request, monkeypatch):
    """state(net): speeds the frozen network up, and has packed weights in it, or had them there before."""
    with contextlib.ExitStack() as stack:
        def prepare(net, call):
            fast.speed_up(net)
            with torch.no_grad(), contextlib.ExitStack() as short:
                if request.param != "fast":
                    (stack if request.param == "packed" else short).enter_context(fast.packed(net))
                    call(net)
                    assert has_packed(net) == packing.AVAILABLE
            assert has_packed(net) == (request.param == "packed" and packing.AVAILABLE)
            return net
        yield prepare


def has_packed(net):
    return any(m.packed for m in net.modules() if isinstance(m, packing.Conv2d))


def ask(net):
    return net(*NETWORKS["text U-Net"][1])


# --- the same network -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_those_of_the_plain_network(name):
    plain = draw(name)
    net = fast.speed_up(copy.deepcopy(plain))
    found = []
    for one in (plain, net):
        y = outputs(one, name)
        found.append([*y, *torch.autograd.grad(sum(part.square().sum() for part in y), list(one.parameters()),
                                               allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * max(1, a.abs().max().item()))
    with torch.no_grad(), fast.packed(net.requires_grad_(False)):
        for _ in range(2):
            for a, b in zip(outputs(net, name), found[0]):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1, b.abs().max().item()))
    assert not has_packed(net)


@pytest.mark.parametrize("name", NETWORKS)
def test_keys_and_parameters_stay_and_a_second_call_changes_nothing(name):
    net = draw(name)
    keys, parameters = list(net.state_dict()), list(net.parameters())
    assert fast.speed_up(net) is net
    types = [type(m) for m in net.modules()]
    assert not set(types) & set(FASTER) and set(types) & set(FASTER.values())
    fast.speed_up(net)
    assert [type(m) for m in net.modules()] == types
    assert list(net.state_dict()) == keys and all(a is b for a, b in zip(net.parameters(), parameters))


@pytest.mark.parametrize("name", NETWORKS)
def test_taken_off_again_the_network_is_the_plain_one(name):
    plain = draw(name)
    net = fast.plain(fast.speed_up(copy.deepcopy(plain)))
    assert [type(m) for m in net.modules()] == [type(m) for m in plain.modules()]
    with torch.no_grad():
        for a, b in zip(outputs(net, name), outputs(plain, name)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_fast_layer_is_its_plain_class_with_the_same_parameters():
    for plain, faster in FASTER.items():
        assert issubclass(faster, plain) and "__init__" not in vars(faster)


def test_what_is_not_known_is_left_as_it_is():
    class Own(nn.Conv2d):
        pass

    net = nn.Sequential(Own(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"),
                        nn.Conv2d(3, 3, 3, padding="same"), nn.ReLU(), nn.ConvTranspose2d(3, 3, 2))
    x, types = noise(1, 3, 6, 6), [type(m) for m in net]
    expected = net(x)
    assert [type(m) for m in fast.speed_up(net)] == types and torch.equal(net(x), expected)


def test_an_environment_variable_leaves_it_out(monkeypatch):
    monkeypatch.setenv("NANODIFF_PLAIN", "1")
    net = draw("text U-Net")
    types = [type(m) for m in net.modules()]
    assert [type(m) for m in fast.speed_up(net).modules()] == types
    with fast.packed(net):
        assert fast.once_a_run(net, [1]) is net


# --- what is done with a network --------------------------------------------------------------------------------------

def test_its_state_is_the_plain_ones_and_can_be_loaded(state):
    net, other = draw("text U-Net").requires_grad_(False), draw("text U-Net").requires_grad_(False)
    with torch.no_grad():
        other.conv_out.weight.mul_(2)
    before = copy.deepcopy(dict(net.state_dict()))
    state(net, ask)
    assert same(dict(net.state_dict()), before)
    net.load_state_dict(other.state_dict())
    assert same(dict(net.state_dict()), dict(other.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(ask(net), ask(other), rtol=1e-4, atol=1e-4)


def test_a_copy_and_an_average_are_whole_in_themselves(state):
    net = draw("text U-Net").requires_grad_(False)
    before = copy.deepcopy(dict(net.state_dict()))
    state(net, ask)
    twin, average = copy.deepcopy(net), EMA(net, 0.5)
    for one in (twin, average.net):
        assert same(dict(one.state_dict()), before) and not has_packed(one)
    with torch.no_grad():
        torch.testing.assert_close(ask(twin), ask(net))
        assert not has_packed(twin)  # nobody has opened it
        for p in twin.parameters():
            p.mul_(2)
    average.update(twin)
    share = 1 - min(0.5, 1 / 10)
    for key, tensor in average.net.state_dict().items():
        torch.testing.assert_close(tensor, before[key] + share * before[key])
    assert same(dict(net.state_dict()), before)


@pytest.mark.slow
def test_adapters_are_added_merged_and_removed(state):
    net = draw("text U-Net").requires_grad_(False)
    networks, before = {"unet": net}, copy.deepcopy(dict(net.state_dict()))
    state(net, ask)
    with torch.no_grad():
        bare = ask(net)
        places = lora.find_targets(networks, ["attention", "feedforward", "projection", "resnet"])
        for i, p in enumerate(lora.add(networks, places, 2, 2.0, torch.Generator().manual_seed(0))):
            p.copy_(0.2 * noise(*p.shape, seed=i))
        plain = draw("text U-Net").requires_grad_(False)
        lora.attach({"unet": plain}, lora.parts(networks, "default"), "default")
        expected = ask(plain)
        assert (expected - bare).abs().max() > 0.1
        fast.speed_up(net)
        for change in (lambda: None, lambda: lora.merge(networks), lambda: lora.unmerge(networks),
                       lambda: lora.merge(networks)):
            change()
            torch.testing.assert_close(ask(net), expected, rtol=1e-3, atol=1e-3)
            assert same(lora.base_state_dict(net), before)
        lora.detach(networks)
        assert same(dict(net.state_dict()), before)
        torch.testing.assert_close(ask(net), bare)


def test_adapters_learn_after_a_network_was_packed(state):
    net = draw("text U-Net").requires_grad_(False)
    state(net, ask)
    adapters = lora.add({"unet": net}, lora.find_targets({"unet": net}, ["attention", "resnet"]), 2, 2.0)
    fast.speed_up(net)
    ask(net).square().sum().backward()
    assert not has_packed(net) and all(p.grad is not None for p in adapters)


def test_attention_maps_are_those_of_the_plain_network(state):
    net = draw("text U-Net").requires_grad_(False)
    x, _, context = NETWORKS["text U-Net"][1]
    with torch.no_grad(), attention_maps.recorded(net) as expected:
        net(x, 500, context)
    state(net, ask)
    with torch.no_grad():
        for network in (net, fast.once_a_run(net, [500])):
            with attention_maps.recorded(net) as sums:
                network(x, 500, context)
            assert sums.keys() == expected.keys()
            for size, (total, count) in expected.items():
                assert sums[size][1] == count
                torch.testing.assert_close(sums[size][0], total, rtol=1e-4, atol=1e-5)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_training_computes_the_same(process_group):
    inputs, gradients = NETWORKS["text U-Net"][1], []
    for wrap in (lambda net: net, lambda net: DistributedDataParallel(fast.speed_up(net))):
        net = draw("text U-Net")
        wrap(net)(*inputs).square().mean().backward()
        gradients.append([p.grad for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * max(1, a.abs().max().item()))
    with torch.no_grad(), fast.packed(net.requires_grad_(False)):
        ask(net)


def test_a_network_trains_on_after_previews_with_packed_weights():
    """Weights and average after some steps, with and without pictures drawn in between, bit for bit."""
    found = []
    for previews in (False, True):
        net = draw("U-Net").train()
        average = EMA(net, 0.9)
        for one in (net, average.net):
            fast.speed_up(one)
        optimiser = torch.optim.Adam(net.parameters(), 1e-3)
        for _ in range(3):
            if previews:
                with torch.no_grad(), fast.packed(average.net):
                    average.net(*NETWORKS["U-Net"][1])
            net(*NETWORKS["U-Net"][1]).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
            average.update(net)
        found.append([dict(net.state_dict()), dict(average.net.state_dict())])
    assert same(*found)


@pytest.mark.slow
def test_the_plain_networks_know_nothing_of_it():
    """models/ imports without fast/."""
    names = ", ".join(["autoencoder", "blocks", "clip_text", "cond_unet", "kl_autoencoder", "lora", "unet", "vqvae"])
    code = f"import sys\nfrom nanodiff.models import {names}\nassert not any('nanodiff.fast' in m for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
