"""The fast blocks: the outputs and gradients of the plain ones, in every way that they run."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F

from nanodiff import fast
from nanodiff.fast import blocks, packing, transformer, winograd
from nanodiff.models.blocks import ResnetBlock, Upsample
from nanodiff.models.clip_text import ClipTextConfig, FeedForward as ClipFeedForward
from nanodiff.models.cond_unet import FeedForward, SpatialTransformer

needs_packing = pytest.mark.skipif(not packing.AVAILABLE, reason="this PyTorch has no oneDNN to pack weights for")


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3, generator=generator)
    return module.double()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as contexts:
        yield contexts


def agree(plain, inputs):
    """The fast twin of a plain module gives its outputs and its gradients, and without gradients its outputs."""
    twin = fast.speed_up(copy.deepcopy(plain))
    assert type(twin) is not type(plain) and isinstance(twin, type(plain))
    leaves = [x.clone().requires_grad_() for x in inputs]
    direction, found = None, []
    for net in (plain, twin):
        y = net(*leaves)
        direction = noise(*y.shape, seed=9) if direction is None else direction
        found.append([y, *torch.autograd.grad((y * direction).sum(), (*leaves, *net.parameters()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-11)
    with torch.no_grad():
        before = [x.clone() for x in inputs]
        torch.testing.assert_close(twin(*inputs), found[0][0], rtol=0, atol=1e-11)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before))


# --- ResNet blocks ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("time_channels", [None, 3])
@pytest.mark.parametrize("width", [4, 6])
def test_a_resnet_block_is_the_plain_one(activation, time_channels, width):
    block = randomised(ResnetBlock(4, width, time_channels, groups=2, activation=activation))
    x = noise(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    agree(block, (x, noise(2, 3, seed=2)) if time_channels else (x,))
    agree(block, (x.contiguous(), noise(2, 3, seed=2)) if time_channels else (x.contiguous(),))


@pytest.mark.parametrize("frozen", [(), ("norm1", "norm2"), ("conv1", "conv2"), ("norm1", "conv1", "norm2", "conv2")])
def test_a_resnet_block_gives_gradients_to_whatever_learns(frozen):
    block = randomised(ResnetBlock(4, 6, groups=2))
    for name in frozen:
        block.get_submodule(name).requires_grad_(False)
    found = []
    for _ in range(2):
        x = noise(1, 4, 5, 5).requires_grad_()
        block.zero_grad()
        block(x).square().sum().backward()
        found.append({"x": x.grad, **{name: p.grad for name, p in block.named_parameters()}})
        fast.speed_up(block)
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None)
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-10)


def test_a_resnet_block_keeps_its_inputs_alone_for_the_backward_pass():
    block, sizes = fast.speed_up(ResnetBlock(8, 8, groups=4)), []
    weights = {p.data_ptr() for p in block.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda y: y.data_ptr() not in weights and sizes.append((y.data_ptr(), y.numel())) or y, lambda y: y):
        block(torch.randn(2, 8, 16, 16).requires_grad_())
    assert sum(size for _, size in set(sizes)) < 2.1 * 2 * 8 * 16 * 16  # the two inputs of norms, where torch has six


def test_a_resnet_block_drops_out_as_the_plain_one():
    block, x, found = randomised(ResnetBlock(8, 8, groups=4, dropout=0.5)).train(), noise(1, 8, 4, 4), []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(block(x))
        fast.speed_up(block)
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


@needs_packing
def test_gradients_pass_a_resnet_block_with_packed_frozen_weights(monkeypatch, stack):
    monkeypatch.setattr(packing, "LEAST", 0)
    monkeypatch.setattr(packing, "FEW", 0)
    block = fast.speed_up(randomised(ResnetBlock(8, 12, 5, groups=4))).float().requires_grad_(False)
    direction = noise(2, 12, 4, 4)
    x, time = noise(2, 8, 4, 4).float().requires_grad_(), noise(2, 5, seed=2).float()
    gradients = []
    for _ in range(2):
        gradients.append(torch.autograd.grad((block(x, time) * direction).sum(), x)[0])
        stack.enter_context(fast.packed(block))
        with torch.no_grad():
            block(x, time)
        assert block.conv1.packed and block.conv2.packed and block.conv_shortcut.packed
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


# --- upsampling and norms ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [None, (6, 10), (5, 10), (7, 11)])
def test_upsample_is_the_plain_one_at_every_size(size):
    up = randomised(Upsample(4))
    if size is None:
        agree(up, (noise(2, 4, 3, 5),))
    expected, x = up(noise(2, 4, 3, 5), size), noise(2, 4, 3, 5)
    torch.testing.assert_close(fast.speed_up(up)(x, size), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", ["few pixels", "many pixels", "packed", "winograd", "adapter"])
def test_upsample_is_the_same_in_every_way_without_gradients(way, monkeypatch):
    up = fast.speed_up(randomised(Upsample(8)).float()).requires_grad_(False)
    x = noise(2, 8, *((16, 20) if way in ("many pixels", "winograd") else (4, 6))).float()
    big = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    expected = F.conv2d(big, up.conv.weight, up.conv.bias, padding=1)
    called = []
    for place, name in ((blocks, "convolve_doubled"), (winograd, "convolve"), (packing.Conv2d, "pack")):
        def watched(*args, f=getattr(place, name), name=name):
            called.append(name)
            return f(*args)
        monkeypatch.setattr(place, name, watched)
    monkeypatch.setattr(packing, "FEW", 0)
    if way == "packed":
        monkeypatch.setattr(packing, "LEAST", 0)
    if way == "winograd":
        monkeypatch.setattr(winograd, "pays", lambda shape, out: True)
    if way == "adapter":
        up.conv = torch.nn.Sequential(up.conv)
    with torch.no_grad(), fast.packed(up):
        torch.testing.assert_close(up(x), expected, rtol=1e-5, atol=1e-4)
    if packing.AVAILABLE:
        function = {"many pixels": "convolve_doubled", "packed": "pack", "winograd": "convolve"}.get(way)
        assert called == ([function] if function else [])
    if way == "packed":
        up.requires_grad_(True)
        torch.testing.assert_close(up(x), expected, rtol=1e-5, atol=1e-4)
        assert called[-1] == "convolve_doubled"


def test_upsample_gradients_are_those_of_the_plain_layer_also_through_an_adapter():
    up, x = randomised(Upsample(4)), noise(2, 4, 3, 5).requires_grad_()
    direction, found = noise(2, 4, 6, 10, seed=2), []
    for way in ("plain", "fast", "adapter"):
        if way == "fast":
            fast.speed_up(up)
        if way == "adapter":
            up.conv = torch.nn.Sequential(up.conv)  # whatever stands in the convolution's place is called, not bypassed
        found.append(torch.autograd.grad((up(x) * direction).sum(), (x, *up.parameters())))
    for gradients in found[1:]:
        for a, b in zip(gradients, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_group_norm_of_half_precision_input_has_float32_statistics():
    x = 100 + noise(2, 8, 6, 6)  # a mean far from 0: half-precision sums would lose the deviation
    norm = blocks.GroupNorm(2, 8, eps=1e-6)
    exact = F.group_norm(x.half().double(), 2, eps=1e-6)
    for dtype, bound in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        exact = F.group_norm(x.to(dtype).double(), 2, eps=1e-6)
        y = norm.to(dtype)(x.to(dtype))
        assert y.dtype == dtype
        assert (y.double() - exact).abs().max() < bound


def test_layer_norm_of_half_precision_input_has_float32_statistics():
    x = 100 + noise(2, 64, 12)
    for dtype, bound in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        exact = F.layer_norm(x.to(dtype).double(), (12,))
        y = blocks.LayerNorm(12).to(dtype)(x.to(dtype))
        assert y.dtype == dtype and (y.double() - exact).abs().max() < bound


# --- transformers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("linear", [False, True])
def test_a_transformer_is_the_plain_one(linear):
    net = randomised(SpatialTransformer(8, 2, 5, layers=2, groups=4, linear_projection=linear))
    agree(net, (noise(2, 8, 3, 4), noise(2, 6, 5, seed=2)))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clips_feed_forward_layer_is_the_plain_one(activation):
    config = ClipTextConfig(width=8, heads=2, mlp=12, activation=activation)
    agree(randomised(ClipFeedForward(config)), (noise(2, 5, 8),))


@pytest.mark.parametrize("rows", [1, 5, 12, 100])
def test_the_feed_forward_layer_is_the_same_in_pieces(rows, monkeypatch):
    ff, x = fast.speed_up(randomised(FeedForward(4))), noise(2, 6, 4)
    expected = ff(x).detach()
    monkeypatch.setattr(transformer.FeedForward, "ROWS", rows)
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(ff(x), expected)
        turned = x.transpose(0, 1).contiguous().transpose(0, 1)  # the same numbers in another order in memory
        torch.testing.assert_close(ff(turned), expected)
    assert torch.equal(x, before)
