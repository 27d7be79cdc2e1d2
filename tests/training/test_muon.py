"""Muon against its definition (all singular values near 1) and, where it is AdamW, against torch's."""

import copy

import pytest
import torch
from torch import nn

from nanodiff.models.cond_unet import CondUNet, CondUNetConfig
from nanodiff.training.muon import Muon, orthogonalise


def rotation(n, seed):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


@pytest.mark.parametrize("m, n", [(8, 8), (6, 30), (30, 6), (1, 12), (12, 1)])
def test_singular_values_become_about_one_and_the_vectors_stay(m, n):
    k = min(m, n)
    left, right = rotation(m, 0)[:, :k], rotation(n, 1)[:, :k]
    strengths = torch.logspace(-1.5, 1, k, dtype=torch.float64)  # one direction 300 times as strong as another
    result = left.T @ orthogonalise([left @ strengths.diag() @ right.T])[0] @ right
    assert 0.65 < result.diag().min() and result.diag().max() < 1.25
    assert (result - result.diag().diag()).abs().max() < 1e-10


def test_scale_of_the_gradient_is_forgotten_and_zeros_stay_zeros():
    g = torch.randn(5, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.allclose(*orthogonalise([g, 1e-3 * g]), atol=1e-12)
    assert torch.equal(orthogonalise([torch.zeros(4, 6)])[0], torch.zeros(4, 6))


def test_a_convolution_moves_by_the_same_length_in_every_direction():
    conv = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False)).double()
    before = conv[0].weight.detach().clone()
    optimiser = Muon(conv, lr=1e-2)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    conv(x).square().sum().backward()
    optimiser.step()
    moved = torch.linalg.svdvals((conv[0].weight - before).flatten(1)) / (1e-2 * 0.2 * 36**0.5)
    assert 0.65 < moved.min() and moved.max() < 1.25


def test_first_last_embeddings_and_vectors_are_adamws():
    net = CondUNet(CondUNetConfig(channels=(8, 16), attention=(1,), heads=(1, 1), context_channels=8, groups=4,
                                  blocks=1))
    model = nn.ModuleDict({"unet": net, "words": nn.Embedding(5, 8)})
    matrices, others = (set(map(id, group["params"])) for group in Muon(model).param_groups)
    parameters = dict(model.named_parameters())
    assert matrices | others == set(map(id, parameters.values())) and not matrices & others
    for name, parameter in parameters.items():
        expected = parameter.ndim > 1 and not name.startswith(("unet.conv_in", "unet.conv_out", "words"))
        assert (id(parameter) in matrices) == expected, name


def test_what_is_no_matrix_moves_as_torchs_adamw_moves_it():
    generator = torch.Generator().manual_seed(3)
    ours = nn.ParameterList([torch.randn(7, generator=generator)])
    theirs = copy.deepcopy(ours)
    a = Muon(ours, lr=3e-2, betas=(0.9, 0.98), weight_decay=0.1)
    b = torch.optim.AdamW(theirs.parameters(), lr=3e-2, betas=(0.9, 0.98), weight_decay=0.1)
    for _ in range(20):
        grad = torch.randn(7, generator=generator)
        ours[0].grad, theirs[0].grad = grad.clone(), grad.clone()
        a.step()
        b.step()
    assert torch.allclose(ours[0], theirs[0], atol=1e-6)


def test_momentum_and_nesterov_by_hand():
    net = nn.ParameterList([torch.zeros(2, 3, dtype=torch.float64)])
    optimiser, momentum, expected = Muon(net, lr=0.1, momentum=0.9), torch.zeros(2, 3, dtype=torch.float64), 0
    for seed in range(3):
        grad = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        net[0].grad = grad.clone()
        optimiser.step()
        momentum = 0.9 * momentum + grad
        expected = expected - 0.1 * 0.2 * 3**0.5 * orthogonalise([grad + 0.9 * momentum])[0]
    assert torch.allclose(net[0].detach(), expected, atol=1e-12)


def test_the_state_is_whole_when_saved_and_loaded():
    def steps(net, optimiser, n, first=0):
        for i in range(first, first + n):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(i))
            net(x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()

    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimiser = Muon(net, weight_decay=0.01)
    steps(net, optimiser, 3)
    copied = copy.deepcopy(net)
    again = Muon(copied)
    again.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    steps(net, optimiser, 3, 3)
    steps(copied, again, 3, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), copied.parameters()))

