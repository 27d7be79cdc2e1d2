"""The VAE: the report's sizes, the KL and both forms of the bound, and a model whose log p(x) is known."""

import math

import pytest
import torch

from nanodiff.diffusion import gaussian
from nanodiff.errors import UserError
from nanodiff.models.autoencoder import cross_entropy
from nanodiff.models.kl_autoencoder import DiagonalGaussian
from nanodiff.models.vae import VAE, VAEConfig, importance_weighted_bound, log_normal, sampled_kl


def fresh(seed=0, **sizes):
    return VAE(VAEConfig(**sizes), torch.Generator().manual_seed(seed))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws(posterior, n, seed=0):
    """z [n, B, latent] from a posterior."""
    return posterior.mean + torch.exp(0.5 * posterior.logvar) * normal(n, *posterior.mean.shape, seed=seed)


# --- the network -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes, parameters", [
    ({}, 652_824),
    ({"widths": (512, 128, 64), "latent": 2}, 952_852),
    ({"net": "conv", "shape": (3, 32, 32), "widths": (12, 24, 48), "latent": 512}, 1_228_795)])
def test_the_reports_networks_have_the_reports_number_of_parameters(sizes, parameters):
    assert sum(p.numel() for p in fresh(**sizes).parameters()) == parameters


@pytest.mark.parametrize("sizes", [{"shape": (2, 6, 4), "widths": (9,)},
                                   {"net": "conv", "shape": (3, 8, 4), "widths": (4, 6)}])
def test_several_draws_of_a_latent_are_decoded_as_each_by_itself(sizes):
    net = fresh(latent=3, **sizes)
    x = torch.rand(5, *sizes["shape"]) * 2 - 1
    posterior = net.encode(x)
    assert posterior.mean.shape == posterior.logvar.shape == (5, 3) and posterior.kl().shape == (5,)
    z = draws(posterior, 4).float()
    logits = net.decode(z)
    assert logits.shape == (4, *x.shape)
    assert torch.allclose(logits[2], net.decode(z[2]), atol=1e-6)
    noise = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1))
    again, latents, _ = net(x, noise)
    assert torch.allclose(latents, posterior.mean + posterior.logvar.exp().sqrt() * noise, atol=1e-6)
    assert torch.allclose(again, net.decode(latents), atol=1e-6)


# --- the KL ----------------------------------------------------------------------------------------------------------

def test_the_kl_is_the_closed_form_summed_over_the_latent():
    mean, logvar = normal(6, 5), normal(6, 5, seed=1)
    expected = [gaussian.kl(m, torch.diag(v.exp()), torch.zeros(5).double(), torch.eye(5).double())
                for m, v in zip(mean, logvar)]
    assert torch.allclose(DiagonalGaussian(mean, logvar).kl(), torch.stack(expected))


def test_twice_the_dimensions_give_twice_the_kl():
    mean, logvar = normal(6, 5), normal(6, 5, seed=1)
    double = DiagonalGaussian(torch.cat([mean, mean], 1), torch.cat([logvar, logvar], 1))
    assert torch.allclose(double.kl(), 2 * DiagonalGaussian(mean, logvar).kl())


def test_the_kl_is_0_for_the_prior_itself_and_changes_with_the_encoder_alone():
    net = fresh(shape=(1, 4, 4), widths=(6,), latent=2)
    x = torch.rand(3, 1, 4, 4) * 2 - 1
    assert DiagonalGaussian(torch.zeros(3, 2), torch.zeros(3, 2)).kl().tolist() == [0, 0, 0]
    gradients = torch.autograd.grad(net.encode(x).kl().sum(), list(net.parameters()), allow_unused=True)
    for (name, _), gradient in zip(net.named_parameters(), gradients):
        assert (gradient is None) == name.startswith("decoder.")
    with torch.no_grad():
        for p in (net.encoder[-1].weight, net.encoder[-1].bias):
            p.zero_()
    assert net.encode(x).kl().tolist() == [0, 0, 0]


def test_the_log_density_is_torchs():
    z, mean, logvar = normal(7, 4), normal(4, seed=1), normal(7, 4, seed=2)
    expected = torch.distributions.Normal(mean.expand(7, 4), (0.5 * logvar).exp()).log_prob(z).sum(1)
    assert torch.allclose(log_normal(z, mean, logvar), expected)
    assert torch.allclose(log_normal(z, 0.0, 0.0), -0.5 * z.square().sum(1) - 2 * math.log(2 * math.pi))


@pytest.mark.parametrize("latent", [2, 6])
def test_the_sampled_kl_converges_to_the_closed_form_as_one_over_root_n(latent):
    posterior = DiagonalGaussian(normal(5, latent), normal(5, latent, seed=1) - 1)
    n = 20_000
    estimates = sampled_kl(draws(posterior, n), posterior)  # [n, B]
    error = (estimates.mean(0) - posterior.kl()).abs()
    assert bool((error < 4 * estimates.std(0) / n**0.5).all()) and bool((error < 0.06).all())


# --- a model whose log p(x) is known ----------------------------------------------------------------------------------

class Linear:
    """x = W z + b + noise with z ~ N(0, 1): log p(x) and p(z|x) are Gaussian and known."""

    def __init__(self, W, variance=0.3):
        values, latent = W.shape
        self.W, self.b, self.variance = W, normal(values, seed=12), variance
        self.x = normal(4, latent, seed=13) @ W.T + self.b + variance**0.5 * normal(4, values, seed=14)  # [B, values]
        self.covariance = torch.linalg.inv(torch.eye(latent).double() + W.T @ W / variance)  # of p(z|x)
        self.mean = (self.x - self.b) @ W @ self.covariance / variance  # [B, latent]
        marginal = W @ W.T + variance * torch.eye(values).double()
        self.log_p = torch.distributions.MultivariateNormal(self.b, marginal).log_prob(self.x)  # [B]

    def log_likelihood(self, z):
        """log p(x|z) [..., B] of z [..., B, latent]."""
        logvar = torch.full((self.x.shape[1],), math.log(self.variance), dtype=torch.float64)
        return log_normal(self.x, z @ self.W.T + self.b, logvar)

    def expected_log_likelihood(self, posterior):
        """E_q[log p(x|z)] [B] in closed form: at the mean, less what the spread of z adds."""
        spread = torch.exp(posterior.logvar) @ self.W.square().sum(0)
        return self.log_likelihood(posterior.mean) - 0.5 * spread / self.variance


def test_log_p_is_the_bound_plus_the_kl_to_the_true_posterior_to_rounding():
    model = Linear(normal(7, 3, seed=11))
    posterior = DiagonalGaussian(model.mean + 0.5 * normal(4, 3), normal(4, 3, seed=1) - 1)
    bound = model.expected_log_likelihood(posterior) - posterior.kl()  # equation (2)
    gap = torch.stack([gaussian.kl(m, torch.diag(v.exp()), true, model.covariance)
                       for m, v, true in zip(posterior.mean, posterior.logvar, model.mean)])
    assert torch.allclose(bound + gap, model.log_p, rtol=0, atol=1e-10) and bool((gap > 0.1).all())


def test_with_the_true_posterior_every_single_draw_gives_log_p():
    orthogonal = torch.linalg.qr(normal(7, 3, seed=6)).Q  # its columns make a posterior without correlations
    model = Linear(orthogonal * torch.tensor([2.0, 1, 0.5]))
    posterior = DiagonalGaussian(model.mean, model.covariance.diagonal().log().expand(4, 3))
    z = draws(posterior, 9)
    each = model.log_likelihood(z) - sampled_kl(z, posterior)  # [9, B]
    assert torch.allclose(each, model.log_p.expand(9, 4), rtol=0, atol=1e-10)
    assert torch.allclose(importance_weighted_bound(model.log_likelihood(z), z, posterior), model.log_p, atol=1e-10)


def test_equation_1_converges_to_equation_2():
    model = Linear(normal(7, 3, seed=11))
    posterior = DiagonalGaussian(model.mean + 0.2, normal(4, 3, seed=1) - 2)
    z = draws(posterior, 40_000)
    first = model.log_likelihood(z) - sampled_kl(z, posterior)  # [L, B]
    second = model.expected_log_likelihood(posterior) - posterior.kl()
    assert bool(((first.mean(0) - second).abs() < 4 * first.std(0) / 200).all())


def test_the_weighted_bound_rises_with_its_draws_to_log_p_and_with_one_is_equation_1():
    model = Linear(torch.linalg.qr(normal(7, 3, seed=6)).Q)
    posterior = DiagonalGaussian(model.mean + 0.3, model.covariance.diagonal().log().expand(4, 3) + 0.5)
    z = draws(posterior, 8192)
    likelihood = model.log_likelihood(z)  # [8192, B]
    found = [importance_weighted_bound(likelihood.view(k, -1, 4), z.view(k, -1, 4, 3), posterior).mean(0)
             for k in (1, 4, 16, 64, 8192)]
    assert torch.allclose(found[0], (likelihood - sampled_kl(z, posterior)).mean(0))
    assert all(bool((more > fewer).all()) for fewer, more in zip(found, found[1:]))
    assert torch.allclose(found[-1], model.log_p, rtol=0, atol=0.05) and bool((found[0] < model.log_p - 0.1).all())


def test_the_bernoulli_bound_of_the_network_holds_on_a_grid_of_latents():
    net = fresh(shape=(1, 2, 2), widths=(5,), latent=1).double()
    x = torch.tensor([[1.0, -1, -1, 1], [-1, -1, 1, 1]]).double().view(2, 1, 2, 2)
    grid = torch.linspace(-9, 9, 4001).double()
    log_joint = -cross_entropy(net.decode(grid.view(-1, 1, 1).expand(-1, 2, 1)), (x + 1) / 2)
    log_joint = log_joint + log_normal(grid[:, None], 0.0, 0.0)[:, None]
    log_p = torch.logsumexp(log_joint, 0) + math.log(18 / 4000)
    posterior = net.encode(x)
    z = draws(posterior, 5000)
    likelihood = -cross_entropy(net.decode(z), (x + 1) / 2)
    elbo = likelihood.mean(0) - posterior.kl()
    assert bool((elbo < log_p).all())
    assert torch.allclose(importance_weighted_bound(likelihood, z, posterior), log_p, rtol=0, atol=0.02)


# --- numbers out of range --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("analytic", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"net": "conv", "widths": (4, 8)}])
def test_values_of_1e4_give_a_finite_loss_and_gradient(sizes, analytic):
    net = fresh(**sizes)
    x = 1e4 * torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    posterior = net.encode(x)
    z = draws(posterior, 1).float()
    kl = posterior.kl() if analytic else sampled_kl(z, posterior).mean(0)
    loss = (cross_entropy(net.decode(z), (x + 1) / 2).mean(0) + kl).mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in net.parameters())
    assert posterior.logvar.abs().max() > 1  # the input did reach it


def test_the_log_variance_stays_between_minus_30_and_20():
    net = fresh(shape=(1, 4, 4), widths=(), latent=2)
    with torch.no_grad():
        net.encoder[-1].weight.fill_(1e6)
    x = torch.ones(1, 1, 4, 4)
    assert net.encode(x).logvar.tolist() == [[20, 20]] and net.encode(x).kl().isfinite().all()
    with torch.no_grad():
        net.encoder[-1].weight.fill_(-1e6)
    assert net.encode(x).logvar.tolist() == [[-30, -30]]


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 1, 32, 32)])
def test_pictures_of_another_shape_are_refused_with_both_shapes(shape):
    with pytest.raises(UserError, match="x".join(map(str, shape[1:])) + ".*expected 1x28x28"):
        fresh().encode(torch.zeros(shape))


def test_latents_of_another_size_are_refused_with_both_sizes():
    with pytest.raises(UserError, match=r"\[5, 4, 3\].*20"):
        fresh().decode(torch.zeros(5, 4, 3))
