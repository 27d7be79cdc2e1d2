"""LoRA adapters in training: a fresh one changes nothing, only adapters learn, and what was learnt is saved whole."""

import copy
import math

import pytest
import torch
from conftest import same
from lora_networks import PATHS, networks, output, random_parts
from torch import nn

from nanodiff.errors import UserError
from nanodiff.formats.lora_file import read_lora, write_lora
from nanodiff.models import lora
from nanodiff.models.lora import LoraPart, layers


def test_a_fresh_adapter_is_the_identity_and_its_start_depends_on_the_generator_alone():
    nets = networks()
    with torch.no_grad():
        plain = output(nets)
        parameters = lora.add(nets, PATHS, 4, 8.0, torch.Generator().manual_seed(5))
        assert torch.equal(output(nets), plain)
    again = networks(seed=9)
    lora.add(again, PATHS, 4, 8.0, torch.Generator().manual_seed(5))
    assert same([p.down for p in lora.parts(nets, "default")], [p.down for p in lora.parts(again, "default")])
    for part in lora.parts(nets, "default"):
        bound = 1 / math.sqrt(part.down[0].numel())
        assert 0.6 * bound < float(part.down.abs().max()) <= bound and not part.up.any() and part.alpha == 8
    assert {id(p) for p in parameters} == {id(p) for net in nets.values() for p in net.parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_adapters_train_in_float32_and_their_count_is_rank_times_in_plus_out(dtype):
    nets = networks(dtype=dtype)
    sizes = [(w.shape[1:].numel(), len(w)) for network, paths in PATHS.items() for path in paths
             for w in [layers(nets[network])[path].weight]]
    parameters = lora.add(nets, PATHS, 4, 2.0, torch.Generator().manual_seed(5))
    assert sum(p.numel() for p in parameters) == 4 * sum(inner + out for inner, out in sizes)
    assert all(p.dtype == torch.float32 for p in parameters)
    before = copy.deepcopy({network: lora.base_state_dict(net) for network, net in nets.items()})
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        y = output(nets)
        assert y.dtype == dtype
        y.square().mean().backward()
        optimizer.step()
    assert all(part.up.abs().max() > 0 for part in lora.parts(nets, "default"))
    assert all(p.grad.abs().max() > 0 for p in parameters)
    assert all(p.grad is None for net in nets.values() for p in net.parameters() if not p.requires_grad)
    assert same({network: lora.base_state_dict(net) for network, net in nets.items()}, before)


@pytest.mark.parametrize("training", [True, False])
def test_gradients_with_and_without_checkpointing_agree(training):
    gradients = []
    for remember in (True, False):
        nets = networks()
        parameters = lora.add(nets, PATHS, 2, 3.0, torch.Generator().manual_seed(5))
        for net in nets.values():
            net.train(training)
        output(nets, remember=remember).square().mean().backward()
        gradients.append([p.grad for p in parameters])
    ups = gradients[0][1::2]
    assert all(float(grad.abs().max()) > 0 for grad in ups)  # a frozen network does not cut any adapter off
    assert same(*gradients)


def test_gradients_are_those_of_the_formula():
    nets = {"unet": nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(12, 4)).double()}
    nets["unet"].requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 2, 3, 3), (3, 2, 1, 1), (2, 12), (4, 2), (2, 2, 4, 4))
    down, up, down2, up2, x = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes)
    parts = [LoraPart("unet", "0", down, up, 3.0), LoraPart("unet", "2", down2, up2, 1.0)]
    lora.attach(nets, parts, "a", 0.5, trainable=True)
    parameters = [p for p in nets["unet"].parameters() if p.requires_grad]
    assert len(parameters) == 4
    assert torch.autograd.gradcheck(lambda *_: nets["unet"](x), parameters)


def test_a_loaded_lora_does_not_train_unless_asked():
    nets = networks()
    lora.attach(nets, random_parts(), "a")
    assert not any(p.requires_grad for net in nets.values() for p in net.parameters())


@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_trained_saved_and_loaded_is_the_same_with_alpha_other_than_rank(names, tmp_path):
    nets = networks()
    parameters = lora.add(nets, PATHS, 4, 11.0, torch.Generator().manual_seed(5), name="mine")
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    output(nets).square().mean().backward()
    optimizer.step()
    trained = output(nets).detach()
    assert float((trained - output(networks())).abs().max()) > 1e-3
    write_lora(tmp_path / "lora.safetensors", lora.parts(nets, "mine"), names)
    other = networks()
    lora.attach(other, read_lora(tmp_path / "lora.safetensors", other), "loaded")
    assert float((output(other) - trained).abs().max()) < 1e-6
    assert {part.alpha for part in lora.parts(other, "loaded")} == {11.0}


def test_a_compiled_network_takes_adapters_under_plain_names(tmp_path):
    nets = networks()
    plain = {network: net.state_dict() for network, net in nets.items()}
    wrapped = {network: torch.compile(net) for network, net in nets.items()}  # wraps only; compiled at the first call
    lora.attach(wrapped, random_parts(), "a")
    assert [part.layer for part in lora.parts(wrapped, "a")] == [part.layer for part in lora.parts(nets, "a")]
    assert not any("_orig_mod" in part.layer for part in lora.parts(wrapped, "a"))
    assert all(same(lora.base_state_dict(wrapped[network]), plain[network]) for network in nets)
    write_lora(tmp_path / "lora.safetensors", lora.parts(wrapped, "a"))
    lora.detach(wrapped)
    assert len(read_lora(tmp_path / "lora.safetensors", wrapped)) == len(random_parts())
    assert all(same(net.state_dict(), plain[network]) for network, net in nets.items())


@pytest.mark.parametrize("paths, rank, alpha, words", [
    ({"unet": ["conv_inn"]}, 4, 1.0, "nearest: conv_in"),
    ({"vae": ["conv_in"]}, 4, 1.0, "not a layer of the vae"),
    ({"unet": ["conv_in"]}, 0, 1.0, "rank must be a whole number from 1"),
    ({"unet": ["conv_in"]}, 2.5, 1.0, "rank must be a whole number from 1"),
    ({"unet": ["conv_in"]}, 2, math.nan, "alpha finite"),
    ({"unet": []}, 2, 1.0, "changes no layer"),
])
def test_wrong_wishes_for_fresh_adapters_are_refused(paths, rank, alpha, words):
    nets = networks()
    with pytest.raises(UserError, match=words):
        lora.add(nets, paths, rank, alpha)
    assert lora.names(nets) == []
