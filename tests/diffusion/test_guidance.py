"""Classifier-free guidance: the formula, one batched call, and scale 1 as off."""

import pytest
import torch

from nanodiff.diffusion import Schedule, guidance, samplers
from nanodiff.diffusion.grid import Level


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


def test_a_guided_denoiser_leaves_its_inputs_alone_and_runs_in_a_sampler():
    schedule = Schedule.scaled_linear()
    x, context, negative = X.clone(), EMBEDDINGS[0].clone(), EMBEDDINGS[1].clone()
    denoise = guidance.classifier_free(lambda x, t, c: 0.1 * x + 0.01 * c.mean((1, 2))[:, None], context, negative, 7.5)
    assert torch.isfinite(samplers.sample("dpm++2m", denoise, x, schedule, 5)).all()
    assert torch.equal(x, X) and torch.equal(context, EMBEDDINGS[0]) and torch.equal(negative, EMBEDDINGS[1])


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_above_a_step_the_condition_alone_is_asked_in_one_call_of_b_whatever_the_order_of_the_calls(scale):
    network = Network()

    def at_level(denoise):
        return lambda x, level: denoise(x, level.t_like(x).float())

    predict = guidance.below(6, at_level(guidance.classifier_free(network, *LABELS, scale)),
                             at_level(guidance.classifier_free(network, LABELS[0])))
    for t, size in ((9, 3), (0, 6), (6, 3), (5.9, 6), (9, 3)):
        network.batches.clear()
        level = Level(t, signal=0.6, noise=0.8)
        prediction = predict(X, level)
        assert network.batches == [size]
        expected = guidance.classifier_free(Network(), *LABELS, scale if size == 6 else 1.0)(X, level.t_like(X).float())
        torch.testing.assert_close(prediction, expected, rtol=0, atol=0)
