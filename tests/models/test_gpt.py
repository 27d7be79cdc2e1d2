"""The GPT: nothing of what comes later is seen, a cache changes nothing, every picture draws by itself."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanodiff.errors import UserError
from nanodiff.models.gpt import GPT, Cache, GPTConfig, chosen

K, LENGTH = 11, 12


def small(seed=0, **changes):
    """A GPT whose weights are large enough that its answers differ."""
    sizes = {"codes": K, "length": LENGTH, "classes": 3, "width": 16, "layers": 2, "heads": 2, **changes}
    net, generator = GPT(GPTConfig(**sizes), torch.Generator().manual_seed(seed)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return net.eval()


def some_codes(n=4, length=LENGTH - 1):
    return torch.randint(K, (n, length), generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 2, 1])[:n]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_code_changes_the_logits_behind_it_and_none_before():
    net, (codes, label) = small(), some_codes()
    with torch.no_grad():
        before = net(codes, label)
        for place in (0, 5, LENGTH - 2):
            other = codes.clone()
            other[:, place] = (other[:, place] + 1) % K
            after = net(other, label)
            torch.testing.assert_close(after[:, :place + 1], before[:, :place + 1], rtol=0, atol=1e-6)
            assert bool(((after - before)[:, place + 1:].abs().amax(2) > 1e-4).all())


def test_the_class_changes_the_logits_of_every_place_and_pictures_do_not_see_each_other():
    net, (codes, label) = small(), some_codes()
    with torch.no_grad():
        before = net(codes, label)
        other = label.clone()
        other[1] = 0
        after = net(codes, other)
    assert bool(((after - before)[1].abs().amax(1) > 1e-4).all())
    torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], rtol=0, atol=1e-6)


def test_logits_with_a_cache_are_those_without():
    net, (codes, label) = small().double(), some_codes()
    with torch.no_grad():
        whole, caches = net(codes, label), [Cache(LENGTH) for _ in net.layers]
        for place in range(LENGTH):
            before = net.class_embedding(label) if place == 0 else net.code_embedding(codes[:, place - 1])
            torch.testing.assert_close(net.next(before, place, caches), whole[:, place], rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 3}, {"temperature": 0}])
def test_samples_with_a_cache_are_those_without(options):
    net, label = small(), torch.tensor([0, 1, 2, 0, 1, 2])
    with_cache, without = (net.sample(label, generator=generators(*range(6)), cache=cache, **options)
                           for cache in (True, False))
    assert with_cache.shape == (6, LENGTH) and torch.equal(with_cache, without)


def test_a_sample_depends_on_its_own_generator_and_not_on_its_neighbours():
    net, label = small(), torch.tensor([0, 1, 2])
    together = net.sample(label, generator=generators(5, 6, 7))
    assert torch.equal(net.sample(label[1:2], generator=generators(6)), together[1:2])
    assert torch.equal(net.sample(label.flip(0), generator=generators(7, 6, 5)), together.flip(0))
    assert not torch.equal(net.sample(label, generator=generators(8, 6, 7))[0], together[0])
    assert torch.equal(net.sample(label, 5, generator=generators(5, 6, 7)), together[:, :5])


def test_samples_have_the_probabilities_that_the_logits_say():
    net, label, n = small(), torch.tensor([2]), 4000
    first = net.sample(label.expand(n), 1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net(torch.zeros(1, 0, dtype=torch.int64), label)[0, 0].softmax(0)
    share = first.flatten().bincount(minlength=K) / n
    assert bool(((share - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt() + 1e-3).all())
    assert share.max() - share.min() > 0.05  # not merely uniform


def test_top_k_and_temperature_draw_what_they_say():
    logits, draw = torch.tensor([[2.0, 0.0, 1.0, -1.0]]).expand(1000, 4), (torch.arange(1000) + 0.5).double() / 1000
    share = [chosen(logits, draw, temperature, top_k).bincount(minlength=4) / 1000
             for temperature, top_k in ((1, 0), (2, 0), (1, 2), (1, 1), (0, 0), (1, 4))]
    softmax = logits[0].softmax(0)
    for found, expected in zip(share, (softmax, (logits[0] / 2).softmax(0), softmax * torch.tensor([1, 0, 1, 0])
                                       / (softmax[0] + softmax[2]), torch.tensor([1.0, 0, 0, 0]),
                                       torch.tensor([1.0, 0, 0, 0]), softmax)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.002)
    edge = torch.tensor([1 - 1e-16], dtype=torch.float64)
    assert chosen(torch.tensor([[0.0, 0.0, -200.0]]), edge, 1, 0).item() < 2  # never one that cannot be


def test_a_fresh_gpt_knows_nothing_and_says_so():
    net = GPT(GPTConfig(), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    codes, label = torch.randint(128, (16, 49), generator=generator), torch.randint(10, (16,), generator=generator)
    with torch.no_grad():
        nats = F.cross_entropy(net(codes[:, :-1], label).flatten(0, 1), codes.flatten())
    assert nats.item() == pytest.approx(math.log(128), abs=0.1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), GPT(GPTConfig(), torch.Generator().manual_seed(0))
                                                 .parameters()))


def test_a_gpt_learns_a_rule_that_needs_class_and_order():
    """Code i is (class + i (class + 1)) mod K: after a few steps hardly a doubt is left."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(K, LENGTH, 3, 32, 1, 2), torch.Generator().manual_seed(0))
    label = torch.arange(3)
    codes = (label[:, None] + torch.arange(LENGTH) * (label[:, None] + 1)) % K
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimiser.zero_grad()
        loss = F.cross_entropy(net(codes[:, :-1], label).flatten(0, 1), codes.flatten())
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        optimiser.step()
    assert loss.item() < 0.2
    assert torch.equal(net.eval().sample(label, temperature=0), codes)


def test_dropout_acts_in_training_alone():
    net, (codes, label) = small(dropout=0.5), some_codes()
    assert torch.equal(net(codes, label), net(codes, label))
    assert not torch.equal(net.train()(codes, label), net(codes, label))


def test_samples_drop_nothing_and_leave_the_training_as_it_was():
    net, (_, label) = small(dropout=0.5), some_codes()
    draws = [torch.Generator().manual_seed(i) for i in (1, 1)]
    still, before = net.sample(label, generator=draws[0]), torch.get_rng_state()
    assert torch.equal(net.train().sample(label, generator=draws[1]), still)
    assert net.training and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("codes, label, expected", [
    (torch.zeros(2, LENGTH, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "n below 12, its positions"),
    (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), r"codes \[2, 3\] and labels \[3\]"),
    (torch.tensor([[K]]), torch.tensor([0]), "code 11 is unknown to this GPT; expected 0 to 10"),
    (torch.tensor([[0]]), torch.tensor([3]), "class 3 is unknown to this GPT; expected 0 to 2"),
    (torch.tensor([[-1]]), torch.tensor([0]), "code -1 is unknown")])
def test_codes_and_classes_that_it_does_not_know_are_refused(codes, label, expected):
    with pytest.raises(UserError, match=expected):
        small()(codes, label)


def test_sampling_refuses_what_cannot_be_drawn():
    net, label = small(), torch.tensor([0, 1])
    for options, expected in (({"length": LENGTH + 1}, "13 codes cannot be drawn; expected 1 to 12"),
                              ({"temperature": -1}, "temperature -1"), ({"top_k": -1}, "top_k -1"),
                              ({"generator": generators(1)}, "1 generators were given for 2 samples")):
        with pytest.raises(UserError, match=expected):
            net.sample(label, **options)
    for sizes, expected in (({"width": 15}, "15 cannot be split among 2 heads"), ({"codes": 0}, "codes is 0"),
                            ({"dropout": 1.0}, "dropout is 1.0")):
        with pytest.raises(UserError, match=expected):
            small(**sizes)
