"""train_vqgan.py from the outside: exact resume of both stages, who hears whom, bits and samples, wrong input."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import train_vqgan as script
from conftest import rows, same, state
from nanodiff import worlds
from nanodiff.formats.model_folder import load_model, save_model
from nanodiff.metrics import codebook as measures
from nanodiff.models.gpt import GPT, GPTConfig
from nanodiff.models.vqvae import VQVAE, VQVAEConfig
from nanodiff.pipelines import vqgan
from nanodiff.pixels import from_uint8
from nanodiff.training import datasets
from nanodiff.training.checkpoint import checkpoints
from nanodiff.training.run import Run


@pytest.fixture(scope="session")
def two_kinds(tmp_path_factory):
    """Twelve pictures of 16x16 pixels: stripes that lie or stand, with something in them that can be learned."""
    root, rng = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)
    place = np.arange(16) / 16
    for i in range(12):
        folder = root / ("lying" if i % 2 else "standing")
        folder.mkdir(exist_ok=True)
        wave = 127.5 + 120 * np.sin(2 * np.pi * (2 * place + rng.uniform()))
        picture = np.repeat(wave[:, None] if i % 2 else wave[None], 16, 1 if i % 2 else 0)
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def words(folder, out, **changes):
    """Flags of a training that takes seconds: in stage one the discriminator learns from step 2 and is heard from 3."""
    flags = {"data": folder, "out": out, "channels": 8, "residual_layers": 1, "residual_channels": 4, "codes": 12,
             "code_channels": 4, "patience": 2, "batch": 4, "steps": 6, "disc_start": 0.33, "adversarial_start": 0.5,
             "disc_channels": 8, "perceptual": 0, "gpt_batch": 4, "gpt_steps": 5, "gpt_width": 8, "gpt_layers": 1,
             "gpt_heads": 2, "warmup": 2, "workers": 0, "log_every": 1, "preview_every": 3, "checkpoint_every": 2,
             "samples": 3, "device": "cpu", **changes}
    if "autoencoder" in changes:  # in place of stage one, whose flags are then refused
        flags = {name: value for name, value in flags.items() if name not in script.STAGE_ONE}
    return [f"--{name}={value}" for name, value in flags.items()]


def read(path):
    return json.loads(path.read_text())


def log(out, key):
    return [row[key] for row in rows(out) if key in row]


@pytest.fixture(scope="module")
def straight(two_kinds, tmp_path_factory):
    """Both stages without a break, everything switched on."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    script.main(words(two_kinds, out, ema=0.9, gpt_dropout=0.1, perceptual=0.1))
    return out


# --- exact resume ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_stage_that_was_killed_before_its_first_checkpoint_begins_again(two_kinds, straight, tmp_path):
    out = tmp_path / "run"
    script.main(words(two_kinds, out, ema=0.9, gpt_dropout=0.1, perceptual=0.1, stop=8, keep=9, checkpoint_every=50))
    shutil.rmtree(out / "gpt" / "checkpoints" / "00000002")  # that of the stop: what a kill would not have written
    assert not checkpoints(out / "gpt")
    script.main([f"--resume={out}"])
    assert same(state(out / "gpt"), state(straight / "gpt")) and rows(out / "gpt") == rows(straight / "gpt")


# --- stage one: who hears whom ---------------------------------------------------------------------------------------

def test_each_update_leaves_the_other_network_alone_and_without_gradients(two_kinds, tmp_path, monkeypatch):
    parts, updates = {}, []
    plain_update, plain_track = Run.update, Run.track

    def track(self, **tracked):
        parts[self.name] = tracked
        plain_track(self, **tracked)

    def update(self, net, optimiser, lr):
        tracked = parts[self.name]
        kind, other = ("net", "disc") if net is tracked["net"] else ("disc", "net")
        before = {name: tensor.clone() for name, tensor in tracked[other].state_dict().items()}
        assert all(p.grad is None or not p.grad.any() for p in tracked[other].parameters())
        assert any(p.grad is not None and p.grad.any() for p in net.parameters())
        plain_update(self, net, optimiser, lr)
        assert same(dict(tracked[other].state_dict()), before)
        updates.append((self.step, kind))

    monkeypatch.setattr(Run, "track", track)
    monkeypatch.setattr(Run, "update", update)
    script.main(words(two_kinds, tmp_path / "run", gradient_accumulation=2, batch=2, stop=6, preview_every=100))
    assert updates == [(step, kind) for step in range(6) for kind in ("net", "disc") if kind == "net" or step >= 2]


def test_the_discriminator_learns_before_it_is_heard_and_then_pulls_the_autoencoder(two_kinds, straight, tmp_path):
    assert len(log(straight / "codes", "disc")) == 4 and len(log(straight / "codes", "weight")) == 3
    assert all(0 < weight < 1e4 for weight in log(straight / "codes", "weight"))
    changes = dict(ema=0.9, gpt_dropout=0.1, perceptual=0.1, stop=6)
    script.main(words(two_kinds, tmp_path / "deaf", adversarial_start=1, **changes))
    deaf = tmp_path / "deaf" / "codes"
    assert log(deaf, "loss")[:3] == log(straight / "codes", "loss")[:3] and log(deaf, "weight") == []
    assert not same(state(deaf)["net"], state(straight / "codes")["net"])


@pytest.mark.slow
def test_the_adversarial_term_does_not_ruin_what_was_learned(two_kinds, tmp_path):
    """The discriminator learns first; 200 steps after it is first heard the L1 error is below twice what it was."""
    script.main(words(two_kinds, tmp_path / "run", steps=260, disc_start=0.15, adversarial_start=0.23, stop=260,
                      lr=3e-3, preview_every=500, checkpoint_every=500))
    l1 = log(tmp_path / "run" / "codes", "l1")
    assert sum(l1[-5:]) < 2 * sum(l1[55:60]) and sum(l1[55:60]) < sum(l1[:5])
    assert len(log(tmp_path / "run" / "codes", "weight")) == 200


@pytest.mark.slow
def test_half_precision_stays_finite_and_micro_batches_give_the_step_of_their_whole(two_kinds, tmp_path):
    for name, changes in (("whole", {"batch": 8}), ("parts", {"batch": 2, "gradient_accumulation": 4})):
        script.main(words(two_kinds, tmp_path / name, steps=1, stop=1, adversarial=0, preview_every=100, **changes))
    whole, parts = (state(tmp_path / name / "codes")["net"] for name in ("whole", "parts"))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-4)
    script.main(words(two_kinds, tmp_path / "half", steps=2, stop=2, batch=2, gradient_accumulation=4, mixed_precision="bf16",
                      disc_start=0, adversarial_start=0, perceptual=0.1, preview_every=100))
    assert all(np.isfinite(log(tmp_path / "half" / "codes", "loss")))  # run.save refuses weights that are not


def test_what_is_logged_of_the_discriminator_is_the_mean_of_all_micro_batches(two_kinds, tmp_path, monkeypatch):
    said, plain = {"disc": [], "weight": []}, {"disc": script.hinge_loss, "weight": script.adaptive_weight}

    def noted(name):
        def call(*args):
            found = plain[name](*args)
            said[name].append(float(found.detach()))
            return found
        return call
    monkeypatch.setattr(script, "hinge_loss", noted("disc"))
    monkeypatch.setattr(script, "adaptive_weight", noted("weight"))
    script.main(words(two_kinds, tmp_path / "run", steps=2, stop=2, batch=2, gradient_accumulation=3, disc_start=0,
                      adversarial_start=0))
    for name, values in said.items():
        assert len(values) == 6 and len(set(values)) > 2
        assert log(tmp_path / "run" / "codes", name) == pytest.approx([sum(values[:3]) / 3, sum(values[3:]) / 3])


def test_the_error_is_the_mean_difference_and_the_perceptual_distance_also_of_grey_pictures():
    config = script.Config(perceptual=0.5)
    x, y = torch.zeros(2, 1, 8, 8), torch.full((2, 1, 8, 8), 0.25)
    assert float(script.error(y, x, None, config)) == 0.25
    assert float(script.error(y, x, lambda a, b: (a - b).square().flatten(1).sum(1), config)) == 0.25 + 0.5 * 12


# --- stage two: the GPT ----------------------------------------------------------------------------------------------

def test_the_gpt_is_trained_on_the_frozen_codes_and_told_in_bits(two_kinds, straight):
    numbers = read(straight / "numbers.json")
    autoencoder = load_model(straight / "codes", VQVAE, VQVAEConfig)
    held = datasets.load(str(two_kinds), "train", captions=None)
    codes = measures.encode_all(autoencoder, held).flatten(1)
    model = vqgan.load(straight)
    assert numbers["unigram"] == pytest.approx(measures.table_bits(codes, codes, 12))
    assert numbers["nll"] == pytest.approx(measures.gpt_bits(model.gpt, codes, held.labels), rel=1e-5)
    assert numbers["ratio"] == pytest.approx(numbers["nll"] / numbers["unigram"])
    assert model.classes == ["lying", "standing"] and model.shape == (1, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(model.autoencoder.state_dict().values(),
                                                 autoencoder.state_dict().values()))
    for name in ("samples.png", "codes/reconstructions.png", "codes/codebook.png", "codes/curves.png", "gpt/curves.png",
                 "gpt/previews/00000003.png"):
        assert (straight / name).stat().st_size > 100


def test_a_gpt_over_a_ready_autoencoder_learns_its_codes(two_kinds, straight, tmp_path):
    codes = tmp_path / "ready"
    shutil.copytree(straight / "codes" / "model", codes)
    script.main(words(two_kinds, tmp_path / "run", autoencoder=codes, gpt_steps=60, gpt_lr=2e-2, gpt_batch=12, gpt_width=16,
                      preview_every=500, checkpoint_every=500, stop=30))
    shutil.rmtree(codes)  # trained further, moved: the run has a copy
    script.main([f"--resume={tmp_path / 'run'}"])
    assert not checkpoints(tmp_path / "run" / "codes")
    numbers = read(tmp_path / "run" / "numbers.json")
    assert numbers["nll"] < 0.6 * numbers["unigram"]  # the twelve pictures it was trained on
    assert torch.equal(vqgan.load(tmp_path / "run").autoencoder.codebook.embedding.weight,
                       load_model(straight / "codes", VQVAE, VQVAEConfig).codebook.embedding.weight)


def test_the_classifiers_say_which_share_is_of_its_class():
    held = datasets.load("mnist", "test")
    x, label = from_uint8(held.pixels[:200]), held.labels[:200]
    config = script.Config()
    assert script.recognised(config, x, label, held.classes) > 0.97
    assert script.recognised(config, x, (label + 1) % 10, held.classes) < 0.03
    assert script.recognised(config, -x, label, held.classes) < 0.3
    assert script.recognised(script.Config(data="cifar10"), x, label, held.classes) is None
    drawn = worlds.load("test", 64, 22, worlds.DRAWN, workers=1, pairs="all")
    config = script.Config(data="worlds")
    assert script.recognised(config, from_uint8(drawn.pixels), drawn.labels, drawn.classes) > 0.8
    assert script.recognised(config, from_uint8(drawn.pixels), (drawn.labels + 1) % 11, drawn.classes) < 0.2


# --- wrong input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, expected", [
    ({"disc_start": 2}, "--disc_start is 2"),
    ({"adversarial_start": 0.2}, "--adversarial_start 0.2 is before --disc_start 0.33"),
    ({"disc_channels": 12}, "a multiple of 8"),
    ({"size": 18}, "--size is 18; expected a multiple of 4"),
    ({"size": 12, "perceptual": 0.1}, "--size is 12; expected a multiple of 4 from 16 (the perceptual distance needs that)"),
    ({"size": 8}, "--size is 8; expected a multiple of 4 from 12 (the discriminator needs that)"),
    ({"decay": 0}, "--decay is 0.0"),
    ({"codes": 0}, "codes is 0"),
    ({"gpt_heads": 3}, "width 8 cannot be split among 3 heads"),
    ({"gpt_steps": 0}, "--gpt_steps is 0"),
    ({"gpt_lr": 0}, "--gpt_lr is 0"),
    ({"gpt_batch": 13}, "--gpt_batch is 13, more than the 12 training pictures"),
    ({"batch": 13}, "--batch is 13, more than the 12 training pictures"),
    ({"steps": 0}, "--steps is 0"),
    ({"temperature": -1}, "--temperature is -1"),
    ({"autoencoder": "nowhere"}, "nowhere/config.json cannot be read"),
    ({"data": "mnits"}, "nearest: mnist"),
])
def test_wrong_flags_end_with_one_sentence_before_anything_is_written(two_kinds, tmp_path, capsys, change, expected):
    with pytest.raises(SystemExit) as stop:
        script.main(words(two_kinds, tmp_path / "run", **change))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_other_models_and_pictures_of_another_shape_are_refused(two_kinds, straight, tmp_path, capsys):
    save_model(GPT(GPTConfig(width=8, layers=1)), tmp_path / "gpt")
    save_model(VQVAE(VQVAEConfig(3, 8, 1, 4, 12, 4)), tmp_path / "colour")
    (tmp_path / "config.json").write_text('{"script": "vqvae"}')
    eight = tmp_path / "eight"
    eight.mkdir()
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(eight / f"{i}.png")
    out = tmp_path / "run"
    for flags, expected in ((words(two_kinds, out, autoencoder=tmp_path / "gpt"), "holds a GPT; expected a VQVAE"),
                            (words(two_kinds, out, autoencoder=tmp_path / "colour"), "pictures of 1x16x16 (channels, "
                             "height, width) do not fit this VQ-VAE, which wants 3 channels"),
                            ([*words(two_kinds, out, autoencoder=straight / "codes"), "--codes=99"], "--codes 99 belongs to "
                             "stage one, and --autoencoder " + str(straight / "codes") + ", with 12 codes, takes its place"),
                            (words(eight, out), "the discriminator needs sides from 12, and the pictures are 8x8"),
                            ([f"--resume={tmp_path}"], "made by another script; expected vqgan"),
                            ([f"--resume={straight}", "--codes=13"], "--codes 13 contradicts"),
                            (words(two_kinds, straight), "exists and is not empty")):
        with pytest.raises(SystemExit) as stop:
            script.main(flags)
        assert stop.value.code == 2 and expected in capsys.readouterr().err
    assert not out.exists()


def test_the_plain_calls_settings_pass_the_checks(capsys):
    script.check_flags(script.Config())
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "optimiser steps of stage two (default: " in text
