"""What a sampling run computes once: the U-Net's answers, from fewer products."""

import functools

import pytest
import torch

import tiny_sd
from nanodiff import fast
from nanodiff.fast import networks
from nanodiff.formats.stable_diffusion_folder import unet_config_from
from nanodiff.formats.weights import load_strictly
from nanodiff.models import lora
from nanodiff.models.blocks import ResnetBlock
from nanodiff.models.cond_unet import CondUNet, TransformerBlock
from nanodiff.models.unet import UNet, UNetConfig

GOLDEN = tiny_sd.golden()
CASES = [key for key in GOLDEN if "/unet/y_" in key and "mixed" not in key]
weights = functools.cache(lambda name: tiny_sd.draw_model(name)["unet"])


def net_of(name):
    with torch.device("meta"):
        net = CondUNet(unet_config_from(tiny_sd.SETTINGS[name]["unet"]))
    load_strictly(net, {key: tensor.clone() for key, tensor in weights(name).items()}, name, assign=True)
    return fast.speed_up(net.eval().requires_grad_(False))


def inputs(key):
    """x, t, context of a recorded output."""
    name, size, t = key.split("/")[0], *key.split("_")[1:]
    return GOLDEN[f"{name}/unet/x_{size}"], int(t[1:]), GOLDEN[f"{name}/unet/context"]


def assert_near(y, expected):
    assert y.shape == expected.shape and (y - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("key", CASES)
def test_the_function_gives_the_answers_of_the_network(key):
    net, (x, t, context) = net_of(key.split("/")[0]), inputs(key)
    network = fast.once_a_run(net, [1, t, 7.5])
    before = [y.clone() for y in (x, context)]
    for _ in range(2):  # what is remembered serves more than one call
        assert_near(network(x, t, context), GOLDEN[key])
    assert_near(network(x, torch.tensor(t), context), GOLDEN[key])  # a tensor, and another number, at the call
    assert_near(network(x, t + 0.0, context.clone()), GOLDEN[key])
    assert_near(network(x, 400, context), net(x, 400, context))
    assert_near(network(x, 7.5, context), net(x, 7.5, context))
    assert (network(x, 7.5, context) - GOLDEN[key]).abs().max() > 1e-3 * GOLDEN[key].abs().max()
    assert all(torch.equal(a, b) for a, b in zip((x, context), before))
    assert not hasattr(context, "made")


@torch.no_grad()
def test_texts_are_projected_once_and_times_all_at_once():
    net, (x, t, context), rows = net_of("sd1"), inputs("sd1/unet/y_8x12_t500"), {"text": 0, "time": 0}
    attention = next(m for m in net.modules() if isinstance(m, TransformerBlock)).attn2
    resnet = next(m for m in net.modules() if isinstance(m, ResnetBlock))
    for name, layer in (("text", attention.to_k), ("time", resnet.time_emb_proj)):
        layer.register_forward_hook(lambda layer, args, y, name=name: rows.update({name: rows[name] + 1}))
    network, other = fast.once_a_run(net, [1, 5, 9]), context.flip(1)
    assert rows == {"text": 0, "time": 1}
    for t in (9, 5, 1):
        network(x, t, context)
        network(x, t, other)
    assert rows == {"text": 2, "time": 1}
    for i in range(5):  # of the last four texts alone
        network(x, 1, context + i)
    network(x, 1, context)
    assert rows == {"text": 8, "time": 1}


@torch.no_grad()
def test_a_new_function_sees_a_new_adapter():
    net, (x, t, context) = net_of("sd1"), inputs("sd1/unet/y_8x12_t500")
    network = fast.once_a_run(net, [t])
    before = network(x, t, context)
    adapters = lora.add({"unet": net}, lora.find_targets({"unet": net}, ["attention", "resnet"]), 2, 2.0)
    for p in adapters:
        p.add_(0.1)
    fast.speed_up(net)
    after = net(x, t, context)
    assert (after - before).abs().max() > 1e-3
    assert_near(fast.once_a_run(net, [t])(x, t, context), after)


@pytest.mark.parametrize("dtype, bar", [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_in_half_precision_it_stays_near_float32(dtype, bar):
    net, (x, t, context) = net_of("sd1"), inputs("sd1/unet/y_8x12_t500")
    exact = net(x, t, context)
    y = fast.once_a_run(net.to(dtype), [t])(x.to(dtype), t, context)  # of a float32 text
    assert y.dtype == dtype and (y.float() - exact).abs().max() < bar * exact.abs().max()


def test_a_plain_a_compiled_and_another_network_are_given_back():
    plain = CondUNet(unet_config_from(tiny_sd.SETTINGS["sd1"]["unet"]))
    ddpm = fast.speed_up(UNet(UNetConfig(channels=(8,), groups=4, attention=())))
    compiled = net_of("sd1")
    compiled._compiled_call_impl = compiled._call_impl
    for net in (plain, ddpm, compiled):
        assert fast.once_a_run(net, [1, 2]) is net
    assert type(net_of("sd1")) is networks.CondUNet
