"""The generator, its judge and the four losses: sizes, closed values, theorem 1, and who may move whom."""

import math

import pytest
import torch
from torch import nn

from nanodiff.errors import UserError
from nanodiff.formats.model_folder import load_model, save_model
from nanodiff.models import gan
from nanodiff.models.gan import Discriminator, GANConfig, Generator, generate

SMALL = GANConfig((1, 12, 10), 5, (4, 8))


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(network, config=SMALL, seed=0):
    return network(config, torch.Generator().manual_seed(seed))


def count(net):
    return sum(p.numel() for p in net.parameters())


# --- the networks ----------------------------------------------------------------------------------------------------

def test_the_defaults_are_the_reports_networks_layer_by_layer():
    net, disc = fresh(Generator, GANConfig()), fresh(Discriminator, GANConfig())
    assert count(net) == 1_708_355 and count(disc) == 663_745
    shapes = [tuple(m.weight.shape) for m in net.net if isinstance(m, nn.ConvTranspose2d)]
    assert shapes == [(256, 256, 4, 4), (256, 128, 4, 4), (128, 64, 4, 4), (64, 3, 4, 4)]
    assert [type(m).__name__ for m in disc.net] == ["Conv2d", "LeakyReLU", "Conv2d", "BatchNorm2d", "LeakyReLU",
                                                    "Conv2d", "BatchNorm2d", "LeakyReLU", "Conv2d"]
    y = net(noise(2, 256))
    assert y.shape == (2, 3, 32, 32) and disc(y).shape == (2,)
    disc.net[1].negative_slope = 0.0  # the report's ReLU is a slope of 0
    x = noise(2, 3, 32, 32)
    assert torch.equal(disc.net[1](x), torch.relu(x))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 12, 10), (2, 7, 13), (3, 5, 1)])
@pytest.mark.parametrize("levels", [1, 3])
def test_pictures_of_any_side_come_out_and_go_in(shape, levels):
    config = GANConfig(shape, 6, (4, 8, 8)[:levels])
    y = fresh(Generator, config)(noise(3, 6))
    assert y.shape == (3, *shape) and y.abs().max() <= 1
    assert fresh(Discriminator, config)(y).shape == (3,)
    smallest = gan.sides(config)[-1]
    assert smallest == tuple(math.ceil(side / 2**levels) for side in shape[1:])


def test_points_in_the_plane_come_out_of_linear_layers_without_a_last_activation():
    config = GANConfig((2,), 3, (16, 16))
    net, disc = fresh(Generator, config), fresh(Discriminator, config)
    assert net(100 * noise(50, 3)).abs().max() > 1
    assert [type(m).__name__ for m in net.net] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    assert disc(noise(50, 2)).shape == (50,)
    with torch.no_grad():  # kinks do not all pass through the middle
        assert (disc.net[0].bias.abs() > 0.01).any()


def test_another_size_channel_count_or_latent_is_refused_in_one_sentence_with_both_shapes():
    net, disc = fresh(Generator), fresh(Discriminator)
    for call, words in ((lambda: disc(noise(2, 3, 12, 10)), r"\[3, 12, 10\] do not fit .* expected \[1, 12, 10\]"),
                        (lambda: disc(noise(2, 1, 10, 12)), r"\[1, 10, 12\] do not fit .* expected \[1, 12, 10\]"),
                        (lambda: net(noise(2, 6)), r"\[6\] do not fit .* expected \[5\]")):
        with pytest.raises(UserError, match=words):
            call()
    for wrong in (dict(shape=(3, 32)), dict(latent=0), dict(channels=()), dict(channels=(8, 0))):
        with pytest.raises(UserError, match="cannot be made"):
            GANConfig(**wrong)


def test_a_critic_scores_each_picture_by_itself_and_without_bounds():
    critic = fresh(Discriminator, GANConfig((1, 12, 12), 5, (4, 8), 0.2, norm=False)).train()
    assert not [m for m in critic.modules() if isinstance(m, (nn.BatchNorm2d, nn.Sigmoid, nn.Softmax))]
    x = noise(4, 1, 12, 12)
    others = torch.cat([x[:1], 100 * noise(3, 1, 12, 12, seed=1)])
    torch.testing.assert_close(critic(others)[:1], critic(x)[:1], rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        critic.net[-1].weight.mul_(1000)
    scores = critic(noise(50, 1, 12, 12))
    assert scores.min() < -1 and scores.max() > 1


def test_asking_a_discriminator_moves_nothing_in_it():
    disc = fresh(Discriminator).train()
    assert any(isinstance(m, nn.BatchNorm2d) for m in disc.modules()) and not list(disc.buffers())


def test_weights_and_pictures_follow_from_their_seeds_alone():
    net = fresh(Generator).eval()
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), fresh(Generator).state_dict().values()))
    assert not torch.equal(net.net[0].weight, fresh(Generator, seed=1).net[0].weight)
    whole = generate(net, 7, seed=3)
    assert whole.shape == (7, 1, 12, 10)
    torch.testing.assert_close(generate(net, 3, seed=3, first=2, batch=2), whole[2:5])
    assert not torch.allclose(generate(net, 7, seed=4), whole)


def test_a_saved_generator_draws_the_same_and_other_folders_are_refused(tmp_path):
    net = fresh(Generator)
    net(noise(9, 5))  # its statistics move
    save_model(net, tmp_path / "model")
    again = load_model(tmp_path, Generator, GANConfig)
    assert torch.equal(generate(again, 4), generate(net.eval(), 4)) and not again.training
    save_model(fresh(Discriminator), tmp_path / "other")
    with pytest.raises(UserError, match="holds a Discriminator; expected a Generator"):
        load_model(tmp_path / "other", Generator, GANConfig)


# --- minimax: theorem 1 of Goodfellow et al. 2014 --------------------------------------------------------------------

COUNTS = torch.tensor([[5, 1, 7, 3, 0, 4], [2, 6, 1, 5, 4, 2]])  # two densities on six places, in twentieths


def on_places(logit):
    """Samples of both densities, exactly as often as they say, through a discriminator given by its logit [6]."""
    return (logit.repeat_interleave(counts) for counts in COUNTS)


def best_logit():
    p, q = COUNTS.double() / 20
    return torch.log(p / q).clamp(-700, 700)  # of D = p / (p + q)


def jensen_shannon(p, q):
    mean = (p + q) / 2
    return float(torch.special.xlogy(p, p / mean).sum() + torch.special.xlogy(q, q / mean).sum()) / 2


def test_the_best_discriminator_gives_twice_the_jensen_shannon_divergence_minus_2_log_2():
    p, q = COUNTS.double() / 20
    expected = 2 * jensen_shannon(p, q) - 2 * math.log(2)
    assert float(gan.value(*on_places(best_logit()))) == pytest.approx(expected, abs=1e-12)


def test_no_other_discriminator_reaches_more_and_the_slope_there_is_0():
    logit = best_logit().clamp(-30, 30).requires_grad_()
    best = gan.value(*on_places(logit))
    slope, = torch.autograd.grad(best, logit)
    assert slope.abs().max() < 1e-12
    for seed in range(20):
        with torch.no_grad():
            assert gan.value(*on_places(logit + noise(6, seed=seed).double())) < best


def test_the_lowest_value_is_minus_2_log_2_where_both_densities_are_equal():
    logit = torch.zeros(6).double()  # D = 1/2 everywhere
    same = logit.repeat_interleave(COUNTS[0])
    assert float(gan.value(same, same)) == pytest.approx(-2 * math.log(2), abs=1e-15)
    for seed in range(20):
        p, q = (noise(2, 6, seed=seed).double()).softmax(1)
        assert 2 * jensen_shannon(p, q) - 2 * math.log(2) > -2 * math.log(2)
    apart = torch.eye(2).double()
    assert jensen_shannon(apart[0], apart[1]) == pytest.approx(math.log(2))


def test_losses_are_those_of_the_papers_and_finite_for_sure_judges():
    real, fake = torch.tensor([0.3, -2.0, 4.0]).double(), torch.tensor([-1.0, 0.5, 2.5]).double()
    d, g = real.sigmoid(), fake.sigmoid()
    assert gan.value(real, fake).item() == pytest.approx((d.log().mean() + (1 - g).log().mean()).item())
    assert gan.minimax(fake).item() == pytest.approx((1 - g).log().mean().item())
    assert gan.non_saturating(fake).item() == pytest.approx(-g.log().mean().item())
    assert gan.wasserstein(real, fake).item() == pytest.approx((real.mean() - fake.mean()).item())
    sure = torch.tensor([1e4, -1e4])
    assert gan.value(sure, sure).isfinite() and gan.minimax(sure).isfinite() and gan.non_saturating(sure).isfinite()


def test_where_the_judge_is_sure_minimax_is_flat_and_the_non_saturating_loss_steep():
    sure = torch.tensor([-20.0]).double().requires_grad_()
    flat, = torch.autograd.grad(gan.minimax(sure), sure)
    steep, = torch.autograd.grad(gan.non_saturating(sure), sure)
    assert flat.item() == pytest.approx(-math.exp(-20), rel=1e-6) and steep.item() == pytest.approx(-1, rel=1e-6)


# --- Wasserstein -----------------------------------------------------------------------------------------------------

class Linear(nn.Module):
    """The critic f(x) = <w, x>, whose gradient is w everywhere."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return (x * self.w).flatten(1).sum(1)


@pytest.mark.parametrize("size", [0.0, 0.3, 1.0, 2.5])
def test_the_penalty_of_a_linear_critic_is_its_norm_minus_1_squared(size):
    w = noise(3, 4, 5).double()
    critic = Linear(size * w / w.norm())
    real, fake = noise(6, 3, 4, 5).double(), noise(6, 3, 4, 5, seed=1).double()
    penalty = gan.gradient_penalty(critic, real, fake, torch.rand(6))
    assert penalty.item() == pytest.approx((size - 1) ** 2, abs=1e-12)
    slope, = torch.autograd.grad(penalty, critic.w)  # a number with a gradient, finite also for a constant critic
    expected = 2 * (size - 1) * w / w.norm() if size else torch.zeros_like(w)
    torch.testing.assert_close(slope, expected)


def test_the_penalty_is_taken_between_each_pair_at_one_share_a_picture():
    seen = []

    def critic(x):
        seen.append(x)
        return x.square().flatten(1).sum(1) / 2  # its gradient is x

    real, fake, share = noise(4, 2, 3, 3), noise(4, 2, 3, 3, seed=1), torch.tensor([0.0, 0.25, 0.5, 1.0])
    penalty = gan.gradient_penalty(critic, real, fake, share)
    y = torch.stack([s * a + (1 - s) * b for s, a, b in zip(share, real, fake)])
    torch.testing.assert_close(seen[0], y)
    torch.testing.assert_close(penalty, (y.flatten(1).norm(dim=1) - 1).square().mean())


def test_the_penalty_reaches_the_critic_and_not_the_generator():
    critic = fresh(Discriminator, GANConfig((1, 12, 10), 5, (4, 8), 0.2, norm=False))
    net = fresh(Generator)
    gan.gradient_penalty(critic, noise(3, 1, 12, 10), net(noise(3, 5)), torch.rand(3)).backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in critic.named_parameters() if name.endswith("weight"))


def test_clipping_brings_every_weight_within_its_limit_and_leaves_small_ones():
    critic = fresh(Discriminator, GANConfig((2,), 2, (16,), norm=False))
    before = [p.clone() for p in critic.parameters()]
    gan.clip_weights(critic, 0.1)
    assert max(p.abs().max() for p in critic.parameters()) <= 0.1
    assert all(torch.equal(p, old.clamp(-0.1, 0.1)) for p, old in zip(critic.parameters(), before))


def test_the_best_clipped_linear_critic_measures_the_shift_between_two_sets():
    # over f(x) = w x with |w| <= c the top of E f(x) - E f(y) is c |E x - E y|
    critic, x = Linear(torch.zeros(1)), noise(50, 1)
    for _ in range(20):
        critic.zero_grad()
        (-gan.wasserstein(critic(x + 3), critic(x))).backward()
        with torch.no_grad():
            critic.w -= 0.05 * critic.w.grad
        gan.clip_weights(critic, 0.5)
    assert gan.wasserstein(critic(x + 3), critic(x)).item() == pytest.approx(0.5 * 3, rel=1e-5)
