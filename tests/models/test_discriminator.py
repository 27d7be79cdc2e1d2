"""The patch discriminator, its loss and the adaptive weight: closed values, and what must not leak between samples."""

import pytest
import torch
from torch import nn

from nanodiff.models.discriminator import LARGEST_WEIGHT, PatchDiscriminator, adaptive_weight, hinge_loss


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fresh(seed=0, **changes):
    return PatchDiscriminator(**{"channels": 8, "generator": torch.Generator().manual_seed(seed), **changes})


# --- the network -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, patches", [((32, 32), (6, 6)), ((16, 24), (2, 4)), ((64, 32), (14, 6))])
def test_there_is_one_logit_for_each_patch(size, patches):
    assert fresh()(noise(2, 3, *size)).shape == (2, 1, *patches)
    assert fresh(in_channels=1, layers=3)(noise(2, 1, 64, 64)).shape[:2] == (2, 1)


def test_a_logit_looks_at_its_patch_alone_but_for_the_normalisation():
    disc = fresh()
    for module in disc.modules():
        if isinstance(module, nn.GroupNorm):  # it takes means over the whole picture
            module.forward = lambda x: x
    x = noise(1, 3, 64, 64).requires_grad_()
    disc(x)[0, 0, 0, 0].backward()
    assert x.grad[0, :, 30:, :].abs().max() == 0 and x.grad[0, :, :, 30:].abs().max() == 0
    assert x.grad[0, :, :16, :16].abs().max() > 0


def test_the_score_of_one_sample_does_not_depend_on_its_neighbours():
    disc, x = fresh().train(), noise(4, 3, 32, 32)
    together = disc(x)
    others = torch.cat([x[:1], 100 * noise(3, 3, 32, 32, seed=1)])
    for scores in (disc(x[:1]), disc(others)[:1], disc(x.flip(0))[-1:]):
        torch.testing.assert_close(scores, together[:1], rtol=1e-5, atol=1e-6)
    assert not [name for name, _ in disc.named_buffers()]  # nothing is remembered from batch to batch


def test_scores_can_be_negative_and_exceed_1():
    disc = fresh()
    with torch.no_grad():
        disc.net[-1].weight.mul_(100)
    scores = disc(noise(4, 3, 32, 32))
    assert scores.min() < -1 and scores.max() > 1
    assert isinstance(disc.net[-1], nn.Conv2d)  # nothing squeezes them


def test_initial_weights_follow_the_generator():
    a, b, other = (fresh(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["net.0.weight"], other["net.0.weight"])
    assert a["net.2.weight"].std().item() == pytest.approx(0.02, rel=0.1)


# --- the loss --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("real, fake, loss", [
    ([2.0, 1.0], [-1.0, -5.0], 0.0),  # right by the margin: nothing left to learn
    ([0.0, 0.0], [0.0, 0.0], 1.0),
    ([0.5, -1.0], [0.0, -2.0], 0.5 * (1.25 + 0.5)),
    ([-3.0], [4.0], 0.5 * (4 + 5))])
def test_the_hinge_loss_has_its_closed_values(real, fake, loss):
    assert hinge_loss(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(loss)


def test_the_hinge_loss_pulls_only_where_the_margin_is_not_kept():
    real, fake = torch.tensor([0.9, 1.1], requires_grad=True), torch.tensor([-1.1, -0.9], requires_grad=True)
    hinge_loss(real, fake).backward()
    assert real.grad.tolist() == [-0.25, 0] and fake.grad.tolist() == [0, 0.25]


# --- the adaptive weight ---------------------------------------------------------------------------------------------

def losses(reconstruction, adversarial):
    """A last weight [2] and two losses that are linear in it, with the given gradients."""
    weight = torch.zeros(2, requires_grad=True)
    return (weight * torch.tensor(reconstruction)).sum(), (weight * torch.tensor(adversarial)).sum(), weight


def test_it_is_the_ratio_of_the_gradients_norms():
    weight = adaptive_weight(*losses([3.0, 4.0], [0.0, 2.0]))
    assert weight.item() == pytest.approx(5 / (2 + 1e-4))
    twice = adaptive_weight(*losses([6.0, 8.0], [0.0, 2.0]))
    assert twice.item() == pytest.approx(2 * weight.item())


def test_with_it_both_terms_pull_equally_hard():
    reconstruction, adversarial, weight = losses([3.0, 4.0], [12.0, -5.0])
    scaled = adaptive_weight(reconstruction, adversarial, weight) * adversarial
    pulls = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (reconstruction, scaled)]
    torch.testing.assert_close(pulls[1], pulls[0], rtol=1e-4, atol=0)


def test_it_is_detached_and_the_graph_stays_for_the_step_itself():
    reconstruction, adversarial, last = losses([3.0, 4.0], [0.0, 2.0])
    weight = adaptive_weight(reconstruction, adversarial, last)
    assert not weight.requires_grad and last.grad is None
    (reconstruction + weight * adversarial).backward()
    torch.testing.assert_close(last.grad, torch.tensor([3.0, 4 + 2 * weight.item()]))


@pytest.mark.parametrize("reconstruction, adversarial, expected", [
    ([1.0, 0.0], [0.0, 0.0], 0.0), ([0.0, 0.0], [0.0, 0.0], 0.0), ([0.0, 0.0], [1.0, 0.0], 0.0),
    ([5.0, 0.0], [1e-12, 0.0], LARGEST_WEIGHT), ([1e30, 0.0], [1.0, 0.0], LARGEST_WEIGHT)])
def test_it_stays_finite_and_within_0_and_10_000(reconstruction, adversarial, expected):
    weight = adaptive_weight(*losses(reconstruction, adversarial))
    assert weight.isfinite() and weight.item() == expected and LARGEST_WEIGHT == 1e4


def test_a_detached_graph_raises_where_it_would_have_passed_unseen():
    reconstruction, adversarial, weight = losses([3.0, 4.0], [0.0, 2.0])
    for pair in ((reconstruction.detach(), adversarial), (reconstruction, adversarial.detach())):
        with pytest.raises(RuntimeError, match="does not require grad"):
            adaptive_weight(*pair, weight)
    unused = torch.zeros(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="not have been used"):
        adaptive_weight(reconstruction, adversarial, unused)
    with torch.no_grad(), pytest.raises(RuntimeError):
        adaptive_weight(*losses([3.0, 4.0], [0.0, 2.0]))


# --- one step of each ------------------------------------------------------------------------------------------------

def test_the_critics_step_leaves_no_gradient_in_the_generator_and_the_generators_none_in_the_critic():
    disc, decoder = fresh(), nn.Conv2d(3, 3, 3, padding=1)
    x = noise(2, 3, 16, 16)
    y = decoder(x)
    hinge_loss(disc(x), disc(y.detach())).backward()
    assert all(p.grad is None for p in decoder.parameters()) and all(p.grad is not None for p in disc.parameters())
    disc.zero_grad(set_to_none=True)
    disc.requires_grad_(False)
    (-disc(y).mean()).backward()  # the adversarial term alone
    assert all(p.grad.abs().max() > 0 for p in decoder.parameters()) and all(p.grad is None for p in disc.parameters())
