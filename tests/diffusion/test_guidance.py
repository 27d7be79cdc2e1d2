"""Classifier-free guidance: the formula, one batched call, and scale 1 as off."""

import pytest
import torch

from nanodiff.diffusion import Schedule, guidance, samplers


class Network:
    """A linear network of x, t and a condition that remembers how it was called."""

    def __init__(self):
        self.batches = []

    def __call__(self, x, t, context):
        assert len(x) == len(t) == len(context)
        self.batches.append(len(x))
        level = context.to(x.dtype) if context.ndim == 1 else context.mean((1, 2))
        return x * t.to(x.dtype)[:, None] + level[:, None]


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, T = draw(0, 3, 5), torch.tensor([1, 5, 9])
LABELS, EMBEDDINGS = (torch.tensor([1, 2, 3]), torch.tensor([10])), (draw(1, 3, 77, 8), draw(2, 1, 77, 8))


@pytest.mark.parametrize("context,negative", [
    LABELS, EMBEDDINGS, (LABELS[0][:1], LABELS[1]), (EMBEDDINGS[0][:1], EMBEDDINGS[1])])
@pytest.mark.parametrize("scale", [0.0, 0.5, 7.5])
def test_guidance_is_the_formula_in_one_call_of_twice_the_batch(context, negative, scale):
    network = Network()
    guided = guidance.classifier_free(network, context, negative, scale)(X, T)
    assert network.batches == [6]
    cond = network(X, T, context.expand(3, *context.shape[1:]))
    uncond = network(X, T, negative.expand(3, *negative.shape[1:]))
    torch.testing.assert_close(guided, uncond + scale * (cond - uncond))


@pytest.mark.parametrize("context,negative", [LABELS, EMBEDDINGS])
def test_scale_1_is_the_conditional_network_bit_for_bit_in_one_call_of_b(context, negative):
    network = Network()
    for given in (negative, None):
        assert torch.equal(guidance.classifier_free(network, context, given, 1.0)(X, T), network(X, T, context))
    assert network.batches == [3] * 4


def test_scale_0_is_the_negative_context_alone():
    guided = guidance.classifier_free(Network(), *LABELS, 0.0)(X, T)
    torch.testing.assert_close(guided, Network()(X, T, LABELS[1].expand(3)), rtol=0, atol=0)


def test_a_negative_context_for_each_sample_keeps_its_place():
    negative = torch.tensor([20, 30, 40])
    guided = guidance.classifier_free(Network(), LABELS[0], negative, 3.0)(X, T)
    for i in range(3):
        row = slice(i, i + 1)
        one = guidance.classifier_free(Network(), LABELS[0][row], negative[row], 3.0)(X[row], T[row])
        torch.testing.assert_close(guided[row], one)


def test_guidance_without_a_negative_context_raises():
    with pytest.raises(ValueError, match="negative"):
        guidance.classifier_free(Network(), LABELS[0], scale=2.0)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
@pytest.mark.parametrize("context,negative", [LABELS, EMBEDDINGS, (EMBEDDINGS[0][:1], EMBEDDINGS[1])])
def test_what_prepare_makes_of_the_contexts_is_made_once_and_shown_at_every_step(context, negative, scale):
    prepared, given = [], []

    def prepare(both):
        prepared.append(both)
        return {"twice": 2 * both}

    def network(x, t, context):
        given.append(context)
        return Network()(x, t, context["twice"])

    def one_by_one(x, t):
        return guidance.classifier_free(Network(), 2 * context, 2 * negative, scale)(x, t)

    denoise = guidance.classifier_free(network, context, negative, scale, prepare)
    for step in range(4):
        torch.testing.assert_close(denoise(X + step, T), one_by_one(X + step, T))
    assert len(prepared) == 1 and all(one is given[0] for one in given)
    parts = [context] if scale == 1 else [negative, context]
    assert torch.equal(prepared[0], torch.cat([part.expand(3, *part.shape[1:]) for part in parts]))


def test_another_size_of_batch_is_prepared_by_itself_and_the_first_one_stays():
    sizes = []
    denoise = guidance.classifier_free(
        Network(), LABELS[0][:1], LABELS[1], 2.0, lambda both: sizes.append(len(both)) or both)
    for n in (3, 2, 3, 2, 1):
        expected = guidance.classifier_free(Network(), LABELS[0][:1], LABELS[1], 2.0)(X[:n], T[:n])
        assert torch.equal(denoise(X[:n], T[:n]), expected)
    assert sizes == [6, 4, 2]


def test_a_guided_denoiser_leaves_its_inputs_alone_and_runs_in_a_sampler():
    schedule = Schedule.scaled_linear()
    x, context, negative = X.clone(), EMBEDDINGS[0].clone(), EMBEDDINGS[1].clone()
    denoise = guidance.classifier_free(lambda x, t, c: 0.1 * x + 0.01 * c.mean((1, 2))[:, None], context, negative, 7.5)
    assert torch.isfinite(samplers.dpmpp_2m(denoise, x, schedule, 5)).all()
    assert torch.equal(x, X) and torch.equal(context, EMBEDDINGS[0]) and torch.equal(negative, EMBEDDINGS[1])


def test_where_guidance_does_not_act_the_condition_alone_is_asked_in_one_call_of_b():
    network, steps = Network(), ((9.0, False), (6.0, False), (5.9, True), (0.0, True))
    denoise = guidance.classifier_free(network, *LABELS, 3.0, acts=[steered for _, steered in steps])
    for t, steered in steps:
        network.batches.clear()
        t = torch.full((3,), t)
        found = denoise(X, t)
        assert network.batches == [6 if steered else 3]
        expected = guidance.classifier_free(Network(), *LABELS, 3.0 if steered else 1.0)(X, t)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
