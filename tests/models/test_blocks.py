"""The parts of the networks: what each is by definition."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanodiff.models import blocks


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3, generator=generator)
    return module.double()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("t", [0, 1, 500, 999, 10.5])
@pytest.mark.parametrize("dim", [8, 16, 33])
@pytest.mark.parametrize("freq_shift", [0, 1])
def test_time_embedding_is_sines_and_cosines_in_the_order_asked_for(t, dim, freq_shift):
    half = dim // 2
    frequency = [10000 ** (-i / (half - freq_shift)) for i in range(half)]
    sin, cos = [math.sin(t * f) for f in frequency], [math.cos(t * f) for f in frequency]
    zero = [0.0] * (dim % 2)
    for flip, expected in ((False, sin + cos + zero), (True, cos + sin + zero)):
        table = blocks.time_embedding_table(torch.tensor([t]), dim, freq_shift, flip)
        assert table.dtype == torch.float64 and table.shape == (1, dim)
        assert table[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_time_embedding_starts_at_sine_0_and_cosine_1():
    assert blocks.time_embedding_table(torch.tensor([0]), 4).tolist() == [[0, 0, 1, 1]]
    assert blocks.time_embedding_table(torch.tensor([0]), 4, flip_sin_to_cos=True).tolist() == [[1, 1, 0, 0]]


def test_resnet_block_is_its_definition_and_leaves_its_inputs_alone():
    block = randomised(blocks.ResnetBlock(8, 12, time_channels=5, groups=4, eps=1e-3, activation="gelu"))
    x, time = noise(2, 8, 6, 6), noise(2, 5, seed=2)
    x_before, time_before = x.clone(), time.clone()

    n1, n2 = block.norm1, block.norm2
    h = F.conv2d(F.gelu(F.group_norm(x, 4, n1.weight, n1.bias, 1e-3)), block.conv1.weight, block.conv1.bias, padding=1)
    h = h + F.linear(F.gelu(time), block.time_emb_proj.weight, block.time_emb_proj.bias)[:, :, None, None]
    h = F.conv2d(F.gelu(F.group_norm(h, 4, n2.weight, n2.bias, 1e-3)), block.conv2.weight, block.conv2.bias, padding=1)
    expected = h + F.conv2d(x, block.conv_shortcut.weight, block.conv_shortcut.bias)

    torch.testing.assert_close(block(x, time), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(block(x, time), expected, rtol=0, atol=1e-12)
    assert torch.equal(x, x_before) and torch.equal(time, time_before)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("time_channels", [None, 3])
@pytest.mark.parametrize("width", [4, 6])
def test_resnet_block_gradients_match_finite_differences(activation, time_channels, width):
    block = randomised(blocks.ResnetBlock(4, width, time_channels, groups=2, activation=activation))
    x = noise(1, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    time = noise(1, 3, seed=2).requires_grad_() if time_channels else None
    parameters = [p for p in block.parameters()]

    def run(x, time, *values):
        names = [name for name, _ in block.named_parameters()]
        return torch.func.functional_call(block, dict(zip(names, values)), (x, time))

    assert torch.autograd.gradcheck(run, (x, time, *parameters), fast_mode=True)


def test_resnet_block_without_time_has_no_time_weights():
    block = blocks.ResnetBlock(8, 8, groups=4)
    assert not [name for name in block.state_dict() if "time" in name or "shortcut" in name]
    assert block(torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))).shape == (1, 8, 4, 4)


def test_resnet_block_drops_out_in_training_only():
    block = randomised(blocks.ResnetBlock(8, 8, groups=4, dropout=0.5))
    x = noise(1, 8, 4, 4)
    assert torch.equal(block.eval()(x), block.eval()(x))
    assert not torch.equal(block.train()(x), block.eval()(x))


@pytest.mark.parametrize("heads, head_dim", [(1, 8), (4, 2), (2, 3)])
def test_attention_is_softmax_of_scaled_products_over_each_head(heads, head_dim):
    attention = randomised(blocks.Attention(8, heads, head_dim, context_channels=5))
    x, context = noise(2, 7, 8), noise(2, 3, 5, seed=2)
    q, k, v = x @ attention.to_q.weight.T, context @ attention.to_k.weight.T, context @ attention.to_v.weight.T
    outputs = []
    for head in range(heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        share = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(head_dim)).softmax(-1)
        outputs.append(share @ v[..., part])
    expected = F.linear(torch.cat(outputs, -1), attention.to_out[0].weight, attention.to_out[0].bias)
    torch.testing.assert_close(attention(x, context), expected, rtol=0, atol=1e-12)


def test_spatial_attention_moves_with_its_pixels():
    attention = randomised(blocks.SpatialAttention(8, 2, 4, groups=2))
    x = noise(2, 8, 4, 6)
    turned = attention(x.transpose(2, 3)).transpose(2, 3)
    torch.testing.assert_close(turned, attention(x), rtol=0, atol=1e-12)
    assert (attention(x) - x).abs().max() > 0.01


def test_spatial_attention_stays_finite_in_half_precision_on_large_inputs():
    attention = blocks.SpatialAttention(8, 1, 8, groups=2)
    blocks.initialise(attention, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in (attention.to_q, attention.to_k):
            layer.weight.mul_(200)  # products of q and k beyond 65504, the largest float16
        x = 50 * noise(1, 8, 4, 4)
        q = attention.to_q(attention.group_norm(x.float()).flatten(2).transpose(1, 2))
        assert (q @ q.transpose(1, 2)).abs().max() > 65504
        assert attention.half()(x.half()).isfinite().all()


def test_downsample_pads_all_sides_or_right_and_bottom_only():
    x = noise(1, 4, 6, 6)
    for padding, pads in ((0, (0, 1, 0, 1)), (1, (1, 1, 1, 1))):
        down = randomised(blocks.Downsample(4, padding))
        expected = F.conv2d(F.pad(x, pads), down.conv.weight, down.conv.bias, stride=2)[:, :, :3, :3]
        assert down(x).shape == (1, 4, 3, 3)
        torch.testing.assert_close(down(x), expected, rtol=0, atol=1e-12)  # the border too


def test_upsample_repeats_each_pixel_before_its_convolution():
    up, x = randomised(blocks.Upsample(4)), noise(1, 4, 3, 5)
    big = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(up(x), F.conv2d(big, up.conv.weight, up.conv.bias, padding=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(6, 10), (5, 10), (6, 9), (5, 9), (7, 11)])
def test_upsample_reaches_the_size_of_an_odd_skip(size):
    up, x = randomised(blocks.Upsample(4)), noise(2, 4, 3, 5)
    rows, columns = ([i * n // big for i in range(big)] for n, big in zip(x.shape[2:], size))
    expected = F.conv2d(x[:, :, rows][:, :, :, columns], up.conv.weight, up.conv.bias, padding=1)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(up(x, size), expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(up(x, torch.Size(size)), expected, rtol=0, atol=1e-12)


def test_a_middle_block_hands_its_context_to_its_attention():
    class Add(torch.nn.Module):
        def forward(self, x, *context):
            return x + sum(context)

    resnets = [randomised(blocks.ResnetBlock(4, 4, 3, groups=2), seed) for seed in (0, 1)]
    x, time = noise(1, 4, 4, 4), noise(1, 3, seed=2)
    first = resnets[0](x, time)
    assert torch.equal(blocks.MidBlock(resnets)(x, time, 5.0), resnets[1](first, time))
    assert torch.equal(blocks.MidBlock(resnets, Add())(x, time, 5.0), resnets[1](first + 5, time))
    assert torch.equal(blocks.MidBlock(resnets, Add())(x, time), resnets[1](first, time))


def test_fresh_blocks_are_identities_and_their_weights_follow_the_generator():
    def fresh(seed):
        return blocks.initialise(blocks.MidBlock(
            [blocks.ResnetBlock(8, 8, 5, groups=2), blocks.ResnetBlock(8, 8, 5, groups=2)],
            blocks.SpatialAttention(8, 2, 4, groups=2)), torch.Generator().manual_seed(seed)).double()
    x, time = noise(2, 8, 4, 4), noise(2, 5)
    assert torch.equal(fresh(0)(x, time), x)
    a, b, c = (dict(fresh(seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    weight = "resnets.0.conv1.weight"
    assert not torch.equal(a[weight], c[weight])
    assert a[weight].var().item() == pytest.approx(2 / (8 * 9 + 8 * 9), rel=0.2)
