"""train_ldm.py from the outside: exact resume, what is trained and what stays, the model folder."""

import json

import pytest
import torch
from PIL import Image

import nanodiff
from nanodiff import worlds
from nanodiff.diffusion import Schedule
from nanodiff.formats.stable_diffusion_folder import load_autoencoder, load_text_encoder
from nanodiff.models.clip_text import Tokenizer
from nanodiff.training import latents
import train_ldm
from conftest import same, state
from tiny_ldm import NAMES, SCALE, make_parts, words


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def straight(parts, tmp_path_factory):
    """A run of four steps without a break: 32 pictures, so more than one pass over the 24."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    train_ldm.main(words(parts, out))
    return out


# --- from a trained model, and by which optimiser -------------------------------------------------------------------

@pytest.mark.slow
def test_a_training_starts_from_the_unet_of_another_model_and_its_sizes(parts, straight, tmp_path):
    train_ldm.main(words(parts, tmp_path / "run", init=straight / "model", channels="16,32", steps=1, stop=0,
                         lr=1e-30, weight_decay=0, ema=0, preview_every=100))
    before, after = (dict(nanodiff.load(folder / "model").unet.state_dict()) for folder in (straight, tmp_path / "run"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-25) for name in before)
    train_ldm.main(words(parts, tmp_path / "more", init=straight / "model", steps=2, preview_every=100))
    learned = dict(nanodiff.load(tmp_path / "more/model").unet.state_dict())
    assert all(not torch.equal(before[name], learned[name]) for name in before)  # nothing of it is frozen


@pytest.mark.slow
def test_a_unet_that_does_not_fit_the_other_parts_is_refused_before_anything_is_encoded(
        parts, straight, tmp_path, capsys):
    for change, said in (({"autoencoder": "none"}, "2 and 2 channels"),
                         ({"text": "scratch", "text_width": 32}, "width 16"),
                         ({"init": tmp_path / "nothing"}, "does not exist")):
        with pytest.raises(SystemExit) as stop:
            train_ldm.main(words(parts, tmp_path / "run", **{"init": straight / "model"} | change))
        found = capsys.readouterr().err
        assert stop.value.code == 2 and said in found and found.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_both_optimisers_learn_and_differ(parts, straight, tmp_path):
    train_ldm.main(words(parts, tmp_path / "run", optimiser="adamw"))
    muon, adamw = state(straight)["net"], state(tmp_path / "run")["net"]
    assert not any(torch.equal(muon[name], adamw[name]) for name in muon if name.endswith("conv1.weight"))


# --- what is trained, and what stays --------------------------------------------------------------------------------

def test_a_frozen_text_encoder_and_the_autoencoder_are_saved_as_they_were_and_are_in_no_checkpoint(parts, straight):
    model = nanodiff.load(straight / "model")
    assert same(dict(model.autoencoder.state_dict()), dict(load_autoencoder(parts / "vae").state_dict()))
    assert same(dict(model.text_model.state_dict()), dict(load_text_encoder(parts)[0].state_dict()))
    assert {key.split(".")[0] for key in state(straight)["net"]} == {"unet"}
    assert same(dict(model.unet.state_dict()), {key.removeprefix("unet."): tensor for key, tensor
                                                in state(straight)["ema"]["net"].items()})


@pytest.mark.slow
def test_frozen_networks_get_no_gradient_and_the_unet_is_in_train_mode(parts, tmp_path, monkeypatch):
    seen, loaded = [], {}
    load_text, load_vae = train_ldm.folders.load_text_encoder, train_ldm.folders.load_autoencoder
    monkeypatch.setattr(train_ldm.folders, "load_text_encoder", lambda path: loaded.setdefault("text", load_text(path)))
    monkeypatch.setattr(train_ldm.folders, "load_autoencoder", lambda path: loaded.setdefault("vae", load_vae(path)))
    update = train_ldm.Run.update

    def watched(run, net, optimiser, lr):
        assert set(dict(net.named_children())) == {"unet"} and all(module.training for module in net.modules())
        assert all(p.grad is not None for p in net.parameters())
        for frozen in (loaded["text"][0], loaded["vae"]):
            assert not frozen.training and all(p.grad is None and not p.requires_grad for p in frozen.parameters())
        seen.append(run.step)
        update(run, net, optimiser, lr)

    monkeypatch.setattr(train_ldm.Run, "update", watched)
    train_ldm.main(words(parts, tmp_path / "run", preview_every=100))
    assert seen == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"text": "scratch"}, {"train_text": True}])
def test_a_text_encoder_that_learns_is_in_train_mode_has_gradients_moves_and_is_in_the_checkpoint(
        parts, tmp_path, monkeypatch, change):
    starts, update = [], train_ldm.Run.update

    def watched(run, net, optimiser, lr):
        assert all(module.training for module in net.modules()) and set(dict(net.named_children())) == {"unet", "text"}
        reached = [bool(p.grad.any()) for p in net.text.encoder.parameters() if p.ndim > 1]
        assert all(reached) or run.step < 3  # the U-Net's last layers start at 0 and let no gradient through at first
        starts.append({key: tensor.clone() for key, tensor in net.text.state_dict().items()})
        update(run, net, optimiser, lr)

    monkeypatch.setattr(train_ldm.Run, "update", watched)
    train_ldm.main(words(parts, tmp_path / "run", preview_every=100, **change))
    if change == {"train_text": True}:
        assert same(starts[0], dict(load_text_encoder(parts)[0].state_dict()))
    held = state(tmp_path / "run")
    for key, tensor in starts[0].items():
        blind = key.endswith("k_proj.bias")  # softmax does not see it
        assert blind or not torch.equal(held["net"][f"text.{key}"], tensor)
    saved = load_text_encoder(tmp_path / "run/model")[0].state_dict()
    assert same(dict(saved), {key.removeprefix("text."): tensor for key, tensor in held["ema"]["net"].items()
                              if key.startswith("text.")})


def test_frozen_states_are_the_text_encoders_to_half_precision_and_equal_captions_are_kept_once(parts):
    text, tokenizer = load_text_encoder(parts)
    captions = ["a red star", "a blue ring", "a red star", "", "a red star"]
    ids, calls = tokenizer(captions), []
    handle = text.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    states = latents.cache_text_states(text, ids, batch=2)
    handle.remove()
    assert sum(calls) == 3 and max(calls) == 2
    found, exact = states(torch.tensor([4, 1, 3, 0])), text(ids)[0][[4, 1, 3, 0]]
    assert found.shape == (4, 77, 16) and found.dtype == torch.float32
    assert ((found - exact).abs() <= 2**-11 * exact.abs() + 2**-24).all()  # half a unit in half precision's last place
    assert torch.equal(found[0], found[3]) and not torch.equal(found[0], found[1])


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.0, 0.5])
def test_a_share_of_the_captions_is_left_out_and_the_others_belong_to_their_pictures(
        parts, tmp_path, monkeypatch, share):
    asked, shown = [], []
    plain_states, plain_get = latents.cache_text_states, train_ldm.Batches.get

    def states_of(text, ids):
        states = plain_states(text, ids)
        return lambda row: asked.append((row, len(ids) - 1)) or states(row)

    def get(self, step, micro=0):
        found = plain_get(self, step, micro)
        shown.append(found[1])
        return found

    monkeypatch.setattr(latents, "cache_text_states", states_of)
    monkeypatch.setattr(train_ldm.Batches, "get", get)
    train_ldm.main(words(parts, tmp_path / "run", caption_dropout=share, variants=3, steps=21, batch=24, gradient_accumulation=2,
                         preview_every=100, checkpoint_every=100, log_every=21, attention="none"))
    index, row, empty = torch.cat(shown), torch.cat([row for row, _ in asked]), asked[0][1]
    assert empty == 3 * 24 and len(row) == 21 * 48
    left_out = row == empty
    n, spread = len(row), (len(row) * share * (1 - share)) ** 0.5
    assert abs(int(left_out.sum()) - n * share) <= 4 * spread
    assert torch.equal(row[~left_out] // 3, index[~left_out])
    assert len((row[~left_out] % 3).unique()) == 3  # every wording is met


def test_the_latents_are_scaled_by_the_autoencoders_own_factor(parts, straight):
    settings = json.loads((straight / "model/vae/config.json").read_text())
    assert settings["scaling_factor"] == SCALE
    data = worlds.load("train", 16, 4, NAMES.split(","))
    net = load_autoencoder(parts / "vae")
    kept = latents.encode(net, data)
    raw = net.encode(data.read(torch.arange(4), torch.arange(4))).mean
    assert torch.allclose(kept.mean[:, 0], SCALE * raw, atol=1e-6)
    model = nanodiff.load(straight / "model")
    assert model.autoencoder.config.scaling_factor == SCALE
    assert torch.allclose(model.decode(kept.mean[:, 0]), net.decode(raw), atol=1e-5)


@pytest.mark.slow
def test_offset_noise_moves_whole_channels_and_is_drawn_by_sample(parts, tmp_path, monkeypatch):
    noises, q_sample = [], train_ldm.process.q_sample

    def watched(schedule, x0, t, noise):
        noises.append(noise)
        return q_sample(schedule, x0, t, noise)

    monkeypatch.setattr(train_ldm.process, "q_sample", watched)
    flags = dict(steps=8, batch=24, gradient_accumulation=1, preview_every=100, checkpoint_every=100, stop=7)
    train_ldm.main(words(parts, tmp_path / "with", noise_offset=2.0, **flags))
    noises, without = [], noises[1:]  # the first is the preview's
    with_offset = torch.cat(without)
    train_ldm.main(words(parts, tmp_path / "without", **flags))
    plain = torch.cat(noises[1:])
    moved = with_offset - plain
    assert torch.allclose(moved, moved[:, :, :1, :1].expand_as(moved), atol=1e-5)
    amounts = moved[:, :, 0, 0].flatten()
    assert len(amounts) == 7 * 24 * 2 and abs(float(amounts.std()) - 2) < 5 * 2 / (2 * len(amounts)) ** 0.5
    assert abs(float(torch.corrcoef(moved[:, :, 0, 0].T)[0, 1])) < 0.3  # each channel by itself


# --- the model folder -----------------------------------------------------------------------------------------------

def test_the_model_folder_opens_and_draws(straight):
    model = nanodiff.load(straight / "model")
    assert model.kind == "v" and torch.allclose(model.schedule.snr, Schedule.cosine().shifted(4).snr, rtol=1e-9, atol=0)
    first, second = (model.generate("a striped texture", n=2, steps=2, seed=1, output="tensor") for _ in range(2))
    assert first.shape == (2, 3, 16, 16) and torch.equal(first, second)
    assert bool(first.isfinite().all()) and not torch.equal(first[0], first[1])
    index = json.loads((straight / "model/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["vae"] == ["diffusers", "AutoencoderKL"]
    for name in ("curves.png", "previews/00000000.png", "previews/00000002.png", "previews/00000004.png"):
        assert (straight / name).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("change, kind, schedule", [
    ({"prediction": "noise", "schedule": "linear", "snr_gamma": 0, "shift": 1}, "noise", Schedule.linear()),
    ({"zero_snr": True, "schedule": "cosine", "shift": 2}, "v", Schedule.cosine().shifted(2).zero_terminal_snr()),
    ({"zero_snr": True, "schedule": "scaled_linear", "shift": 1}, "v", Schedule.scaled_linear().zero_terminal_snr())])
def test_the_folder_says_what_the_unet_predicts_and_its_noise_schedule(parts, tmp_path, change, kind, schedule):
    train_ldm.main(words(parts, tmp_path / "run", steps=1, preview_every=100, **change))
    model = nanodiff.load(tmp_path / "run/model")
    assert model.kind == kind and torch.allclose(model.schedule.alpha_bar, schedule.alpha_bar, atol=0, rtol=1e-12)
    assert model.schedule.ends_in_pure_noise == bool(change.get("zero_snr"))
    for sampler in ("ddim", "dpm++2m"):
        assert bool(model.generate("a dotted texture", steps=2, sampler=sampler, output="tensor").isfinite().all())


def test_the_classifier_is_asked_for_the_colours_that_a_prompt_names_alone():
    _, _, prompts, _ = train_ldm.load_data(train_ldm.Config(pictures=2, names=NAMES, size=16, workers=1),
                                           Tokenizer.shipped())
    assert len(prompts) == 48 and {name for _, name, _ in prompts} == {"striped", "dotted"}
    assert all(colour is None or (colour in caption or colour == "grey" and "gray" in caption)
               for caption, _, colours in prompts for colour in colours)
    assert any(None in colours for _, _, colours in prompts)


@pytest.mark.slow
def test_attention_maps_are_drawn_of_a_prompt_with_the_words_and_refused_before_training_without_one(
        parts, tmp_path, capsys):
    train_ldm.main(words(parts, tmp_path / "run", steps=1, preview_every=100, attention_of="striped"))
    assert Image.open(tmp_path / "run/attention.png").size[0] > 200  # the picture and one map
    with pytest.raises(SystemExit) as stop:
        train_ldm.main(words(parts, tmp_path / "other", attention_of="striped,crocodile"))
    assert stop.value.code == 2 and "crocodile" in capsys.readouterr().err and not (tmp_path / "other").exists()
