"""Which one-line mistakes in the losses the tests of the first loss notice: it should be all.

    python tests/benchmarks/broken_lines.py [--only lora]

Each edit below is made in a copy of the repository, where the tests of tests/scripts/test_first_loss*.py that belong to
it are run: one must fail. Exit code 1 when an edit passes them all, or when its line is no longer there.
"""

import argparse
import contextlib
import io
import os
import pathlib
import re
import shutil
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Which tests ask for a script's loss: words of their names.
TESTS = {"autoencoder": "an_autoencoder_descends", "vae": "a_vae_descends", "vqvae": "a_vqvae_descends",
         "gan": "both_players", "vqgan": "vqgan_descend", "ddpm": "a_ddpm_descends",
         "kl_autoencoder": "autoencoder_of_latent_diffusion", "clip": "clip_descends",
         "ldm": "test_latent_diffusion_descends",
         "finetune": "full_fine_tuning", "textual_inversion": "textual_inversion", "dreambooth": "dreambooth",
         "lora": "a_lora", "pivotal": "pivotal"}

# Script whose tests must notice | file, if it is not the script | part of a line, everywhere | what stands there then.
EDITS = """
autoencoder | | cross_entropy(logits.float(), level).mean() | cross_entropy(logits.float(), level).sum()
autoencoder | | level = levels(x) | level = levels(-x)
autoencoder | | logits = ddp_net(x) | logits = ddp_net(x.flip(0))
autoencoder | nanodiff/models/autoencoder.py | return each.flatten(-3).sum(-1) | return each.flatten(-3).mean(-1)
vae | | (reconstruction + config.kl_weight * kl).mean() | (reconstruction + kl).mean()
vae | | (reconstruction + config.kl_weight * kl).mean() | (reconstruction + 0 * config.kl_weight * kl).mean()
vae | | (reconstruction + config.kl_weight * kl).mean() | (reconstruction + config.kl_weight * kl.detach()).mean()
vae | | (reconstruction + config.kl_weight * kl).mean() | (config.kl_weight * kl).mean()
vae | | posterior.kl() if config.analytic else | posterior.kl() if True else
vae | | cross_entropy(logits.float(), level).mean(0) | cross_entropy(logits.float(), level).sum(0)
vae | | sampled_kl(z, posterior).mean(0) | sampled_kl(z, posterior)[0]
vae | | generator=rng.generator(config.seed, 0, step) | generator=rng.generator(config.seed, 1, step)
vae | | noises[position].to(run.device) | noises[:len(x)].to(run.device)
vae | nanodiff/models/vae.py | z = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise | z = posterior.mean + torch.exp(posterior.logvar) * noise
vqvae | | .square().mean() / variance | .square().mean()
vqvae | | loss = nmse + codebook_loss | loss = nmse
vqvae | nanodiff/models/vqvae.py | F.mse_loss(chosen, h.detach()) + self.beta * | F.mse_loss(chosen, h.detach()) +
vqvae | nanodiff/models/vqvae.py | return F.mse_loss(chosen, h.detach()) + | return
vqvae | nanodiff/models/vqvae.py | return F.mse_loss(chosen, h.detach()) + | return F.mse_loss(chosen, h) +
vqvae | nanodiff/models/vqvae.py | return self.beta * F.mse_loss(h, chosen.detach()) | return F.mse_loss(h, chosen.detach())
vqvae | nanodiff/models/vqvae.py | return h + (chosen - h).detach() | return chosen.detach()
gan | | loss + config.penalty * gan.gradient_penalty | loss + gan.gradient_penalty
gan | | loss = loss + config.penalty * gan.gradient_penalty(disc, x, fake, share) | pass
gan | | gan.gradient_penalty(disc, x, fake, share) | gan.gradient_penalty(disc, fake, x, share)
gan | | loss = -gap | loss = gap
gan | | loss = -gan.value(disc(x), disc(fake)) | loss = gan.value(disc(x), disc(fake))
gan | | gan.value(disc(x), disc(fake)) | gan.value(disc(x), disc(x))
gan | | gan.clip_weights(disc, config.weight_clip) | pass
gan | | loss = -fake.mean() | loss = fake.mean()
gan | | if config.loss == "minimax" else | if config.loss != "minimax" else
gan | | loss.backward() | (0 * loss).backward()
gan | nanodiff/models/gan.py | .norm(dim=1) - 1).square() | .norm(dim=1)).square()
gan | nanodiff/models/gan.py | share * real + (1 - share) * fake | 0.5 * real + 0.5 * fake
gan | nanodiff/models/gan.py | return F.logsigmoid(real).mean() + F.logsigmoid(-fake).mean() | return F.logsigmoid(real).mean()
gan | nanodiff/models/gan.py | return real.mean() - fake.mean() | return -fake.mean()
vqgan | | loss = reconstruction + commitment | loss = reconstruction
vqgan | | loss = reconstruction + commitment | loss = reconstruction + 4 * commitment
vqgan | | loss + config.adversarial * weights[-1] * adversarial | loss + weights[-1] * adversarial
vqgan | | loss + config.adversarial * weights[-1] * adversarial | loss + config.adversarial * adversarial
vqgan | | loss = loss + config.adversarial * weights[-1] * adversarial | pass
vqgan | | l1 + config.perceptual * distance | l1 + distance
vqgan | | return l1 + config.perceptual * distance(in_channels(y, 3), in_channels(x, 3)).mean() | return l1
vqgan | | l1 = (y - x).abs().mean() | l1 = (y - x).square().mean()
vqgan | | adversarial = -disc(y).mean() | adversarial = disc(y).mean()
vqgan | | step >= config.adversarial_start * config.steps | step >= config.disc_start * config.steps
vqgan | | hinge_loss(disc(x), disc(y)) | hinge_loss(disc(y), disc(x))
vqgan | | losses[-1] / len(pairs) | 0 * losses[-1] / len(pairs)
vqgan | | net(code[:, :-1], label) | net(code[:, :-1], 0 * label)
vqgan | | logits.float().flatten(0, 1), code.flatten() | logits.float().flatten(0, 1), code.roll(1, 1).flatten()
vqgan | nanodiff/models/discriminator.py | first / (second + 1e-4) | second / (first + 1e-4)
vqgan | nanodiff/models/discriminator.py | F.relu(1 + fake) | F.relu(fake)
kl_autoencoder | | loss = reconstruction + regularity | loss = reconstruction
kl_autoencoder | | config.kl_weight * posterior.kl().mean() / x[0].numel() | posterior.kl().mean() / x[0].numel()
kl_autoencoder | | config.kl_weight * posterior.kl().mean() / x[0].numel() | config.kl_weight * posterior.kl().mean()
kl_autoencoder | | torch.exp(0.5 * posterior.logvar) * noise | torch.exp(0.5 * posterior.logvar)
kl_autoencoder | | l1 + config.perceptual * distance(y, x).mean() | l1
kl_autoencoder | | l1 + config.perceptual * distance(y, x).mean() | l1 + distance(y, x).mean()
kl_autoencoder | | l1 = (y - x).abs().mean() | l1 = (y - x).square().mean()
kl_autoencoder | | reconstruction + config.equivariance * error | reconstruction + error
kl_autoencoder | | reconstruction + config.equivariance * error | reconstruction + 0 * error
kl_autoencoder | | small = net.decode(F.avg_pool2d(z, 2)) | small = net.decode(z[:, :, ::2, ::2])
kl_autoencoder | | loss + config.adversarial * weight * adversarial | loss + weight * adversarial
kl_autoencoder | | loss + config.adversarial * weight * adversarial | loss + config.adversarial * adversarial
kl_autoencoder | | loss = loss + config.adversarial * weight * adversarial | pass
kl_autoencoder | | adversarial = -disc(y).mean() | adversarial = disc(y).mean()
kl_autoencoder | | step >= config.adversarial_start * config.steps | step >= config.disc_start * config.steps
kl_autoencoder | | hinge_loss(disc(x), disc(y)) | hinge_loss(disc(x), disc(x))
kl_autoencoder | | run.scaler.scale(loss / len(pairs)) | run.scaler.scale(0 * loss / len(pairs))
kl_autoencoder | | x[:n], index[:n], position[:n] | x, index, position
kl_autoencoder | | rng.CROP + axis | rng.CROP
clip | | F.cross_entropy(logits.T, pair) | F.cross_entropy(logits, pair)
clip | | F.cross_entropy(logits.T, pair)) / 2 | F.cross_entropy(logits.T, pair))
clip | | self.scale.clamp(max=math.log(100)).exp() | self.scale.clamp(max=math.log(100))
clip | | draw % config.variants | 0 * draw
ddpm | | (loss_weight(config, schedule, t) * error | (error
ddpm | | process.target(schedule, config.prediction, x0, noise, t) | noise
ddpm | | process.q_sample(schedule, x0, t, noise) | process.q_sample(schedule, noise, t, x0)
ddpm | | .square().flatten(1).mean(1)).mean() | .abs().flatten(1).mean(1)).mean()
ddpm | | x0.shape[1:], config.noise_offset) | x0.shape[1:])
ddpm | | rng.time_steps(config.seed, step, position, schedule.T) | rng.time_steps(config.seed, step, 0 * position, schedule.T)
ddpm | | torch.where(hidden, len(classes), label) | torch.where(hidden, 0, label)
ddpm | | < config.class_dropout | < 0.1
ddpm | | if config.conditional: | if False:
ddpm | | model.to_network(x0.to(run.device)) | x0.to(run.device)
ddpm | | schedule.T * process.elbo_weight | process.elbo_weight
ddpm | | process.elbo_weight(schedule, config.prediction, t) | process.elbo_weight(schedule, "x0", t)
ddpm | | config.snr_gamma if config.weight == "min-snr" | 5.0 if config.weight == "min-snr"
ddpm | | config.snr_gamma if config.weight == "min-snr" else None | None
ddpm | nanodiff/diffusion/process.py | return signal * noise - sigma * x0 | return signal * noise + sigma * x0
ddpm | nanodiff/diffusion/process.py | torch.cat([schedule.posterior_variance[1:2], schedule.posterior_variance[1:]]) | schedule.posterior_variance.clamp(min=1e-3)
ldm | | weight * error.square() | error.square()
ldm | | .square().flatten(1).mean(1)).mean() | .abs().flatten(1).mean(1)).mean()
ldm | nanodiff/training/latents.py | self.std[index, variant] * noise | noise
ldm | nanodiff/training/latents.py | (scale * posterior.mean) | (posterior.mean)
ldm | | process.target(schedule, config.prediction, x0, noise, t) | noise
ldm | | x0.shape[1:], config.noise_offset) | x0.shape[1:])
ldm | | config.snr_gamma or None | None
ldm | | process.q_sample(schedule, x0, t, noise) | process.q_sample(schedule, noise, t, x0)
ldm | | rng.time_steps(config.seed, step, position, schedule.T) | rng.time_steps(config.seed, 1, position, schedule.T)
ldm | | rng.DROPPED, step, position) < config.caption_dropout | rng.DROPPED, step, position) < 0.1
ldm | | index * variants + variant.cpu() | index * variants
ldm | | torch.where(dropped.cpu(), empty, | torch.where(dropped.cpu(), 0,
finetune | | prediction.float() - target | prediction.float() - noise
finetune | | weight * (prediction.float() - target) | (prediction.float() - target)
finetune | | .square().flatten(1).mean(1) | .abs().flatten(1).mean(1)
finetune | | config.snr_gamma or None | None
finetune | | captions(caption_rows(config, step, index, position)) | captions(index)
finetune | | process.q_sample(sd.schedule, x0, t, noise) | process.q_sample(sd.schedule, x0, t, -noise)
finetune | | lessons.end_in_noise(sd) | pass
finetune | nanodiff/finetune/lesson.py | position, shape, config.noise_offset, stream | position, shape, 0, stream
finetune | nanodiff/finetune/lesson.py | < config.caption_dropout | < 0
finetune | nanodiff/finetune/lesson.py | torch.where(dropped.cpu(), -1, index) | torch.where(dropped.cpu(), 0, index)
finetune | nanodiff/diffusion/process.py | snr.clamp(max=gamma) | snr.clamp(min=gamma)
textual_inversion | | prediction.float() - target | prediction.float() - noise
textual_inversion | | weight * (prediction.float() - target) | (prediction.float() - target)
textual_inversion | | config.snr_gamma or None | None
textual_inversion | | .square().flatten(1).mean(1) | .abs().flatten(1).mean(1)
textual_inversion | | random_rows(config, step, position, len(sentences)) | random_rows(config, step, position, 1)
textual_inversion | nanodiff/finetune/lesson.py | position, shape, config.noise_offset, stream | position, shape, 0, stream
dreambooth | | prediction.float() - target | prediction.float() - noise
dreambooth | | loss + config.prior_loss_weight * prior_loss | loss + prior_loss
dreambooth | | loss + config.prior_loss_weight * prior_loss | loss + 0 * prior_loss
dreambooth | | loss + config.prior_loss_weight * prior_loss | loss + config.prior_loss_weight * prior_loss.detach()
dreambooth | | loss = losses[:len(index)].mean() | loss = losses.mean()
dreambooth | | prior_loss = losses[len(index):].mean() | prior_loss = losses.mean()
dreambooth | | weight * (prediction.float() - target) | (prediction.float() - target)
dreambooth | | config.snr_gamma or None | None
dreambooth | | captions(caption_rows(config, step, index, position)) | captions(index)
dreambooth | nanodiff/finetune/prior.py | stream=rng.PRIOR_NOISE | stream=rng.NOISE
dreambooth | nanodiff/finetune/prior.py | rng.uniform(config.seed, rng.PRIOR_TIME, step, position) | rng.uniform(config.seed, rng.TIME, step, position)
dreambooth | nanodiff/finetune/prior.py | stream=rng.PRIOR_DROPPED | stream=rng.DROPPED
dreambooth | nanodiff/finetune/prior.py | config.seed + 1, config.gradient_accumulation | config.seed, config.gradient_accumulation
dreambooth | nanodiff/finetune/prior.py | return x0, t, noise, process.target(sd.schedule, sd.kind, x0, noise, t), captions | return x0, t, noise, noise, captions
dreambooth | nanodiff/finetune/prior.py | prior.teacher_predictions[index, copy] | prior.teacher_predictions[index, 0 * copy]
dreambooth | nanodiff/finetune/prior.py | return x0, t, noise, prior.teacher_predictions[index, copy].to(run.device), captions | return x0, t, noise, process.target(sd.schedule, sd.kind, x0, noise, t), captions
lora | | prediction.float() - target | prediction.float() - noise
lora | | target = process.target(sd.schedule, sd.kind, x0, noise, t) | target = noise
lora | | loss + config.prior_loss_weight * prior_loss | loss + prior_loss
lora | | loss + config.prior_loss_weight * prior_loss | loss + 0 * prior_loss
lora | | loss + config.prior_loss_weight * prior_loss | loss + config.prior_loss_weight * prior_loss.detach()
lora | | loss = losses[:len(index)].mean() | loss = losses.mean()
lora | | prior_loss = losses[len(index):].mean() | prior_loss = losses.mean()
lora | | weight * (prediction.float() - target) | (prediction.float() - target)
lora | | config.snr_gamma or None | None
lora | | captions(caption_rows(config, step, index, position)) | captions(index)
lora | | .square().flatten(1).mean(1) | .abs().flatten(1).mean(1)
lora | | config.alpha or config.rank | config.rank
lora | | groups.append({"params": [rows.vectors] | groups.append({"params": [rows.vectors.clone().detach()]
pivotal | | prediction.float() - target | prediction.float() - noise
pivotal | | loss + config.prior_loss_weight * prior_loss | loss + prior_loss
pivotal | | loss + config.prior_loss_weight * prior_loss | loss + 0 * prior_loss
pivotal | | loss + config.prior_loss_weight * prior_loss | loss + config.prior_loss_weight * prior_loss.detach()
pivotal | | weight * (prediction.float() - target) | (prediction.float() - target)
pivotal | | config.snr_gamma or None | None
"""


def copy_of(root, folder):
    """A copy of the repository without what git ignores; the data is the same folder."""
    for name in ("nanodiff", "tests"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*root.glob("train_*.py"), root / "setup.cfg"]:
        shutil.copy(file, folder)
    (folder / "data").symlink_to(root / "data")


def first_failure(folder, script):
    """The name of the first test of a script's loss that fails in a copy of the repository; "" when all pass."""
    read, write = os.pipe()
    child = os.fork()  # torch is imported by now, and nothing of the repository
    if child == 0:
        os.chdir(folder)
        sys.dont_write_bytecode, sys.path[:0] = True, [str(folder)]
        import pytest
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "", "-k", TESTS[script],
                                "tests/scripts/test_first_loss.py", "tests/scripts/test_first_loss_of_text.py"])
        failed = re.findall(r"^(?:FAILED|ERROR) \S*?(\w+(?:\[[^\]]*\])?)(?: |$)", said.getvalue(), re.MULTILINE)
        answer = failed[0] if failed else "" if code == 0 else f"pytest ended with {code}: {said.getvalue()[-300:]}"
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", help="the edits of this script alone")
    given = parser.parse_args()
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    import PIL.Image, scipy, tokenizers, torch, torch.nn.parallel  # noqa: F401, E401: once for all edits
    torch.set_num_threads(1)
    edits = [[part.strip() for part in line.split("|")] for line in EDITS.strip().splitlines()]
    edits = [edit for edit in edits if given.only in ("", edit[0])]
    missed = 0
    with tempfile.TemporaryDirectory() as work:
        folder = pathlib.Path(work) / "copy"
        folder.mkdir()
        copy_of(ROOT, folder)
        for script in dict.fromkeys(edit[0] for edit in edits):
            failed = first_failure(folder, script)
            if failed:
                raise SystemExit(f"the tests of {script} fail without any edit: {failed}")
        print("| script | file | line | edit | noticed by |\n|---|---|---|---|---|", flush=True)
        for script, file, old, new in edits:
            path = folder / (file or f"train_{script}.py")
            source = path.read_text()
            if source.count(old) < 1:
                failed = "NO SUCH LINE"
            else:
                path.write_text(source.replace(old, new))
                failed = first_failure(folder, script) or "NOTHING"
                path.write_text(source)
            missed += failed in ("NOTHING", "NO SUCH LINE")
            print(f"| {script} | {path.name} | `{old}` | `{new}` | {failed} |", flush=True)
    print(f"{len(edits)} edits, {missed} not noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
