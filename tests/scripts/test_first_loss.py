"""The first loss of every training script by hand, term by term: from the batch, the noise and the network's answer.

Each test trains one step on a tiny set with a learning rate of almost 0. It computes the loss again in plain torch from
the formula of the paper, compares it with the log, and its gradient with what the optimiser was given. The pictures,
the noise and the time steps are asked for by their addresses (seed, step, place), the networks for their answers alone.
The scripts that condition on a text are in test_first_loss_of_text.py. tests/benchmarks/broken_lines.py breaks one line
of a script after the other and expects these tests to fail.
"""

import pytest
import torch
import torch.nn.functional as F

from nanodiff import rng
from nanodiff.diffusion import Schedule
from nanodiff.formats.model_folder import load_model
from nanodiff.metrics.perceptual import load_distance
from nanodiff.models.vqvae import VQVAE, VQVAEConfig
from nanodiff.training import datasets
from nanodiff.training.batches import Batches
from nanodiff.worlds import mixtures
from recorded import SEED, agree, agree_gradient, record

pytestmark = pytest.mark.filterwarnings("ignore")


def batches(folder, n, accumulation=1, **options):
    """(data set, [(pictures, index, position) of each micro-batch of the first step])."""
    training = datasets.both(str(folder), **options)[0]
    made = Batches(training, n, SEED, accumulation)
    return training, [made.get(0, micro) for micro in range(accumulation)]


def cross_entropy(logits, x):
    """-sum (l log p + (1 - l) log(1 - p)) over a picture's values, with levels l = (x + 1) / 2: [..., B]."""
    level = (x + 1) / 2
    return -(level * F.logsigmoid(logits) + (1 - level) * F.logsigmoid(-logits)).flatten(-3).sum(-1)


def normal_log(z, mean, logvar):
    """log N(z; mean, exp(logvar)), summed over the last dimension."""
    return torch.distributions.Normal(mean, torch.exp(logvar / 2)).log_prob(z).sum(-1)


# --- autoencoders -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"net": "conv", "widths": "4,6", "batch": 2, "gradient_accumulation": 2}])
def test_an_autoencoder_descends_the_cross_entropy_of_the_levels(places, tmp_path, changes):
    found = record("autoencoder", places, tmp_path / "run", **changes)
    _, micro = batches(places["pictures"], changes.get("batch", 4), changes.get("gradient_accumulation", 1))
    agree(found, sum(cross_entropy(found.net(x), x).mean() for x, _, _ in micro) / len(micro))


@pytest.mark.parametrize("changes", [
    {}, {"samples": 4}, {"analytic": False, "samples": 4}, {"analytic": False, "kl_weight": 0.5}, {"kl_weight": 0.0},
    {"net": "conv", "widths": "4,6", "batch": 2, "gradient_accumulation": 2, "samples": 2, "kl_weight": 3.0}])
def test_a_vae_descends_reconstruction_plus_kl_in_closed_form_or_from_its_own_draws(places, tmp_path, changes):
    found = record("vae", places, tmp_path / "run", **changes)
    samples, accumulation, loss = changes.get("samples", 1), changes.get("gradient_accumulation", 1), 0
    noises = torch.randn(4, samples, 3, generator=rng.generator(SEED, rng.NOISE, 0))  # one draw for the whole step
    for x, _, position in batches(places["pictures"], changes.get("batch", 4), accumulation)[1]:
        q = found.net.encode(x)
        z = q.mean[:, None] + torch.exp(q.logvar / 2)[:, None] * noises[position]  # [B, L, latent]
        kl = 0.5 * (q.mean**2 + q.logvar.exp() - 1 - q.logvar).sum(1)
        if not changes.get("analytic", True):
            kl = (normal_log(z, q.mean[:, None], q.logvar[:, None]) - normal_log(z, *torch.zeros(2))).mean(1)
        reconstruction = cross_entropy(found.net.decode(z), x[:, None].expand(-1, samples, -1, -1, -1)).mean(1)
        loss = loss + (reconstruction + changes.get("kl_weight", 1.0) * kl).mean() / accumulation
    agree(found, loss)


def nearest(table, h):
    """The vectors of a codebook [K, D] nearest to h [B, D, H, W], and their codes [B, H, W]."""
    codes = (h[:, None] - table[None, :, :, None, None]).square().sum(2).argmin(1)
    return table[codes].permute(0, 3, 1, 2), codes


@pytest.mark.parametrize("changes", [{"beta": 0.25}, {"beta": 2}, {"beta": 2, "codebook": "ema"},
                                     {"beta": 0.5, "batch": 2, "gradient_accumulation": 2}])
def test_a_vqvae_descends_error_over_variance_plus_codebook_plus_commitment(places, tmp_path, changes):
    found = record("vqvae", places, tmp_path / "run", **changes)
    accumulation = changes.get("gradient_accumulation", 1)
    training, micro = batches(places["pictures"], changes.get("batch", 4), accumulation, size=12)
    everything = torch.arange(len(training))
    variance, loss = training.read(everything, everything).var(correction=0), 0
    for x, _, _ in micro:
        h = found.net.pre_quant(x)
        e, _ = nearest(found.net.codebook.embedding.weight, h)
        y = found.net.decode(h + (e - h).detach())
        loss = loss + (y - x).square().mean() / variance + changes["beta"] * (h - e.detach()).square().mean()
        if changes.get("codebook") != "ema":  # a moving codebook follows without a gradient
            loss = loss + (e - h.detach()).square().mean()
    agree(found, loss / len(micro))


def hinge(real, fake):
    """The discriminator's loss (Esser et al. 2021): half of each side's mean violation of the margin."""
    return 0.5 * (1 - real).clamp(min=0).mean() + 0.5 * (1 + fake).clamp(min=0).mean()


def balanced(reconstruction, opinion, last):
    """The adaptive weight: both pull the last layer equally hard (Esser et al. 2021, equation 7)."""
    first, second = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, opinion))
    return (first / (second + 1e-4)).clamp(0, 1e4).detach()


@pytest.mark.parametrize("changes", [
    {"adversarial": 0.0}, {"adversarial": 0.7}, {"adversarial": 0.3, "perceptual": 2.0},
    {"adversarial": 0.7, "adversarial_start": 1}])
def test_the_codes_of_a_vqgan_descend_l1_perceptual_commitment_and_the_weighted_opinion(places, tmp_path, changes):
    found = record("vqgan", places, tmp_path / "run", beta=2.0, gpt_steps=1, **changes)
    (x, _, _), = batches(places["kinds"], 4)[1]
    net, disc = found.net, found.disc
    h = net.pre_quant(x)
    e, _ = nearest(net.codebook.embedding.weight, h)
    y = net.decode(h + (e - h).detach())
    reconstruction = (y - x).abs().mean()
    if "perceptual" in changes:
        with torch.no_grad():
            distance = load_distance()
        reconstruction = reconstruction + 2.0 * distance(y.repeat(1, 3, 1, 1), x.repeat(1, 3, 1, 1)).mean()
    loss = reconstruction + 2.0 * (h - e.detach()).square().mean()
    heard = changes["adversarial"] and changes.get("adversarial_start", 0) == 0
    if heard:
        opinion = -disc(y).mean()
        loss = loss + changes["adversarial"] * balanced(reconstruction, opinion, net.last_weight) * opinion
    codes = [row for row in found.log if row.get("step") == 1 and "loss" in row][0]
    assert codes["loss"] == pytest.approx(float(loss), rel=1e-5)
    agree_gradient(found, loss)
    assert len(found.gradients) == (3 if changes["adversarial"] else 2)  # codes, discriminator, GPT
    if changes["adversarial"]:  # it learns, heard or not
        agree(found, hinge(disc(x), disc(y.detach())), "disc", step=1)


def test_the_gpt_of_a_vqgan_descends_the_cross_entropy_of_the_next_code_given_the_class(places, tmp_path):
    found = record("vqgan", places, tmp_path / "run", gpt_steps=1, gpt_lr=1e-30)
    autoencoder, net = load_model(tmp_path / "run/codes/model", VQVAE, VQVAEConfig), found.parts[1]["net"]
    training, ((x, index, _),) = batches(places["kinds"], 4)
    code = autoencoder.encode(x).flatten(1)  # [B, 16]
    logits = net(code[:, :-1], training.labels[index])
    chosen = logits.log_softmax(2).gather(2, code[..., None])
    gpt = [row["loss"] for row in found.log if row.get("step") == 1 and "loss" in row][1]
    assert gpt == pytest.approx(-float(chosen.mean()), rel=1e-5)
    agree_gradient(found, -chosen.mean(), step=-1)


@pytest.mark.parametrize("changes", [
    {"kl_weight": 2.0, "perceptual": 0, "adversarial": 0, "equivariance": 0},
    {"kl_weight": 0.0, "perceptual": 3.0, "adversarial": 0, "equivariance": 0.0},
    {"kl_weight": 0.0, "perceptual": 3.0, "adversarial": 0, "equivariance": 0.5, "crop": 0},
    {"kl_weight": 1.0, "perceptual": 1.0, "adversarial": 0.5, "equivariance": 0.25},
    {"kl_weight": 0.1, "perceptual": 0, "adversarial": 0.5, "adversarial_start": 1, "equivariance": 0.25},
    {"kl_weight": 0.1, "perceptual": 0, "adversarial": 0.5, "whole": 1},
    {"regulariser": "vq", "perceptual": 0, "adversarial": 0.5, "equivariance": 0.25}])
def test_the_autoencoder_of_latent_diffusion_descends_every_term_of_its_loss(places, tmp_path, changes):
    found = record("kl_autoencoder", places, tmp_path / "run", **changes)
    training = datasets.load(str(places["colours"]), "train", channels=3, size=32, seed=SEED, captions=None)
    x, _, position = Batches(training, 4, SEED).get(0)
    if changes.get("whole"):  # as many whole pictures as the crops have pixels: one of four
        x, position = x[:1], position[:1]
    elif changes.get("crop", 16):
        top, left = ((rng.uniform(SEED, rng.CROP + axis, 0, position) * 17).long().tolist() for axis in (0, 1))
        x = torch.stack([one[:, i:i + 16, j:j + 16] for one, i, j in zip(x, top, left)])
    net, distance = found.net, load_distance()

    def error(y, x):
        seen = changes.get("perceptual") and min(x.shape[2:]) >= 16
        return (y - x).abs().mean() + (changes["perceptual"] * distance(y, x).mean() if seen else 0)

    if changes.get("regulariser") == "vq":
        h = net.encode(x)
        e, _ = nearest(net.quantize.embedding.weight, h)
        y, regularity = net.decoder(net.post_quant_conv(h + (e - h).detach())), 0.25 * (h - e.detach()).square().mean()
        reconstruction = error(y, x)
    else:
        q = net.encode(x)
        z = q.mean + torch.exp(q.logvar / 2) * rng.normal(SEED, 0, position, q.mean.shape[1:])
        kl = 0.5 * (q.mean**2 + q.logvar.exp() - 1 - q.logvar).flatten(1).sum(1)
        y, regularity = net.decode(z), changes.get("kl_weight", 1e-6) * kl.mean() / (3 * x.shape[2] * x.shape[3])
        reconstruction = error(y, x)
        halved = error(net.decode(F.avg_pool2d(z, 2)), F.avg_pool2d(x, 2))
        reconstruction = reconstruction + changes.get("equivariance", 0.25) * halved
    loss = reconstruction + regularity
    if changes["adversarial"] and not changes.get("adversarial_start"):
        opinion = -found.disc(y).mean()
        weight = balanced(reconstruction, opinion, net.decoder.conv_out.weight)
        loss = loss + changes["adversarial"] * weight * opinion
    agree(found, loss)
    assert len(found.gradients) == (2 if changes["adversarial"] else 1)
    if changes["adversarial"]:
        agree(found, hinge(found.disc(x), found.disc(y.detach())), "disc", step=1)


# --- GANs -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data, loss", [("grid", "minimax"), ("grid", "non-saturating"), ("grid", "wasserstein"),
                                        ("grid", "wasserstein-gp"), ("{pictures}", "wasserstein-gp")])
def test_both_players_of_a_gan_descend_their_papers_losses(places, tmp_path, data, loss):
    sizes = {} if data == "grid" else {"channels": "4,8", "latent": 3, "batch": 4}
    found = record("gan", places, tmp_path / "run", data=data, loss=loss, penalty=3.0, weight_clip=0.2, **sizes)
    net, disc, latent = found.net, found.disc, (sizes.get("latent", 2),)
    if data == "grid":
        made = mixtures.Points(mixtures.load("grid"), 8, SEED)
    else:
        made = Batches(datasets.both(str(places["pictures"]))[0], 4, SEED)
    critic, gaps = [], []
    for update in range(2):  # --n_critic 2
        x, _, position = made.get(update)
        fake = net(rng.normal(SEED, update, position, latent)).detach()
        if loss.startswith("wasserstein"):
            gaps.append(disc(x).mean() - disc(fake).mean())
            critic.append(-gaps[-1])
            if loss == "wasserstein-gp":
                share = rng.uniform(SEED, rng.PENALTY, update, position).float().view(-1, *[1] * (x.ndim - 1))
                between = (share * x + (1 - share) * fake).requires_grad_()
                slope, = torch.autograd.grad(disc(between).sum(), between, create_graph=True)
                critic[-1] = critic[-1] + 3.0 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
        else:
            critic.append(-(F.logsigmoid(disc(x)).mean() + F.logsigmoid(-disc(fake)).mean()))
        agree_gradient(found, critic[-1], step=update, rtol=2e-3)
        if loss == "wasserstein":  # the critic's weights are clipped after each of its updates
            with torch.no_grad():
                assert max(float(p.abs().max()) for p in disc.parameters()) > 0.2 or update
                for p in disc.parameters():
                    p.clamp_(-0.2, 0.2)
    agree(found, sum(critic) / 2, step=None)
    if gaps:
        assert found.mean("gap") == pytest.approx(float(sum(gaps) / 2), rel=1e-4, abs=1e-6)
    answer = disc(net(rng.normal(SEED, 0, position, latent, stream=1)))
    generator = {"minimax": F.logsigmoid(-answer).mean(), "non-saturating": -F.logsigmoid(answer).mean()}
    agree(found, generator.get(loss, -answer.mean()), "generator", step=2)
    assert len(found.gradients) == 3 and found.optimisers[0] is found.optimisers[1] is found.disc_optimiser


# --- diffusion --------------------------------------------------------------------------------------------------------

def weight_of(schedule, name, kind, t, gamma):
    """The weight of each sample's squared error: simple, min-SNR, or the term of the bound, per kind of prediction."""
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    if name == "simple":
        x0_weight = {"noise": snr, "x0": torch.ones_like(snr), "v": snr + 1}[kind]  # so that each kind counts 1
    elif name == "min-snr":
        x0_weight = snr.clamp(max=gamma)
    else:  # T times (snr(t-1) - snr(t)) / 2 of |x0 - prediction|^2; the decoder's step takes the variance of t = 1
        x0_weight = torch.cat([snr[:1], snr[:-1] - snr[1:]]) / 2
        variance = (1 - schedule.alpha_bar[:-1]) / (1 - schedule.alpha_bar[1:]) * schedule.beta[1:]
        x0_weight[0] = schedule.posterior_mean_x0[0] ** 2 / (2 * variance[0])
        x0_weight = x0_weight * schedule.T
    return (x0_weight / {"noise": snr, "x0": 1, "v": snr + 1}[kind])[t].float()


def noised(schedule, kind, x0, noise, t):
    """(x_t, what a network of a kind should predict): x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise."""
    alpha_bar = schedule.alpha_bar[t].view(-1, 1, 1, 1)
    signal, sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    target = {"noise": noise, "x0": x0, "v": signal * noise - sigma * x0}[kind]
    return signal * x0 + sigma * noise, target


@pytest.mark.parametrize("changes", [
    {}, {"prediction": "noise"}, {"prediction": "x0"}, {"class_dropout": 0.5}, {"noise_offset": 0.5},
    {"conditional": False, "guidance": 1.0}, {"zero_snr": True}, {"schedule": "linear"}, {"schedule": "scaled_linear"},
    {"weight": "min-snr", "snr_gamma": 2.0}, {"weight": "min-snr", "prediction": "noise"},
    {"weight": "min-snr", "prediction": "x0"}, {"weight": "elbo", "T": 3}, {"weight": "elbo", "prediction": "noise"},
    {"weight": "elbo", "prediction": "x0"}, {"range": "01"}, {"range": "standard"},
    {"batch": 4, "gradient_accumulation": 2, "class_dropout": 0.5}])
def test_a_ddpm_descends_the_weighted_error_of_its_prediction(places, tmp_path, changes):
    flags = {"batch": 8, **changes}
    found = record("ddpm", places, tmp_path / "run", **flags)
    accumulation, kind = changes.get("gradient_accumulation", 1), changes.get("prediction", "v")
    T = changes.get("T", 8)  # with 3 steps t = 0 is among the batch's
    schedule = getattr(Schedule, changes.get("schedule", "cosine"))(T)
    schedule = schedule.zero_terminal_snr() if changes.get("zero_snr") else schedule
    training, micro = batches(places["pictures"], flags["batch"], accumulation, size=12, seed=SEED)
    everything = training.read(torch.arange(len(training)), torch.arange(len(training)))
    mean, deviation = everything.mean(), everything.std()
    scale, shift = {"11": (1, 0), "01": (0.5, 0.5), "standard": (1 / deviation, -mean / deviation)}[
        changes.get("range", "11")]
    loss = 0
    for x, index, position in micro:
        x0 = scale * x + shift
        shared = rng.normal(SEED, 0, position, (1, 1, 1), stream=rng.OFFSET_NOISE)
        noise = rng.normal(SEED, 0, position, (1, 12, 12)) + changes.get("noise_offset", 0) * shared
        t = (rng.uniform(SEED, rng.TIME, 0, position) * T).long()
        assert T == 8 or 0 in t
        label = None
        if changes.get("conditional", True):  # class 2 of 2 is "hidden"
            hidden = rng.uniform(SEED, rng.DROPPED, 0, position) < changes.get("class_dropout", 0.1)
            label = torch.where(hidden, 2, training.labels[index])
            assert "class_dropout" not in changes or hidden.any() and not hidden.all()
        x_t, target = noised(schedule, kind, x0, noise, t)
        error = (found.net(x_t, t, label) - target).square().mean((1, 2, 3))
        weight = weight_of(schedule, changes.get("weight", "simple"), kind, t, changes.get("snr_gamma", 5.0))
        loss = loss + (weight * error).mean() / accumulation
    agree(found, loss)
