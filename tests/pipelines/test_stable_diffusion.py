"""Stable Diffusion as one thing: whole runs against diffusers' on the tiny models, layouts, LoRA, words, schedules."""

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import nanodiff
from nanodiff import rng
from nanodiff.diffusion import guidance, samplers
from nanodiff.errors import UserError
from nanodiff.fast import packing
from nanodiff.formats.single_file import write_single_file
from nanodiff.formats.stable_diffusion_folder import read_folder
from nanodiff.models import lora
from nanodiff.models.cond_unet import CondUNet
from nanodiff.pipelines import stable_diffusion
import tiny_sd
from conftest import same

GOLDEN = tiny_sd.golden()
RUNS = [(name, run) for name in tiny_sd.NAMES for run in tiny_sd.info()[name]["sampling"]["runs"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folders sd1, sd2 and sd1_inpaint."""
    root = tmp_path_factory.mktemp("models")
    for name in tiny_sd.SETTINGS:
        tiny_sd.write_model(name, root / name)
    return root


@pytest.fixture(scope="module")
def models(folder):
    """Models that no test changes, by name."""
    return {name: nanodiff.load(folder / name) for name in tiny_sd.SETTINGS}


def draw(sd, prompt="a photo of cloth", **more):
    """Latents [N, 4, 8, 8] of a short run."""
    return sd.generate(prompt, **{"steps": 3, "seed": 5, "output": "latents", **more})


def recorded(sd, name, **more):
    """Latents of a run with the prompts and the guidance of the recorded ones."""
    said = tiny_sd.info()[name]["sampling"]
    return sd.generate(said["prompt"], negative=said["negative"], guidance=said["guidance"], output="latents", **more)


def error(value, wanted):
    """The largest error as a share of the largest magnitude."""
    assert value.shape == wanted.shape and value.dtype == wanted.dtype
    return float((value - wanted).abs().max() / wanted.abs().max())


def with_scheduler(sd, **changes):
    """The same networks as a checkpoint with other scheduler settings would have them."""
    settings = {**sd.settings, "scheduler": {**sd.settings["scheduler"], **changes}}
    return stable_diffusion.StableDiffusion(sd.tokenizer, sd.text_model, sd.unet, sd.autoencoder, settings)


@contextlib.contextmanager
def counted(module):
    """While open, notes the batch size of every call of a module; yields the list."""
    sizes = []
    hook = module.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    yield sizes
    hook.remove()


# --- against diffusers ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, run", RUNS, ids=[f"{name}-{run}" for name, run in RUNS])
def test_every_sampler_ends_where_diffusers_pipeline_does(name, run, models):
    sampler, steps = run.rsplit(".", 1)
    side, states = tiny_sd.info()[name]["sampling"]["height"], []
    x, noises = GOLDEN[f"{name}/sampling/x"], GOLDEN[f"{name}/sampling/noises"]
    latents = recorded(models[name], name, sampler=sampler, steps=int(steps), latents=x, noises=noises, height=side,
                       width=side, on_step=lambda i, t, x: states.append(x))
    assert error(latents, GOLDEN[f"{name}/sampling/{run}"]) < 1e-4  # the goal is 1e-3
    if run == "ddim.10":
        assert error(torch.stack([x, *states]), GOLDEN[f"{name}/sampling/ddim.10.states"]) < 1e-4


@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_image_to_image_and_inpainting_end_where_diffusers_do(name, models):
    kept = {key: GOLDEN[f"{name}/editing/{key}"] for key in ("latents", "noise", "mask")}
    run = {"image": kept["latents"], "latents": kept["noise"], "steps": 10}
    before = {key: tensor.clone() for key, tensor in kept.items()}
    for sampler in ("ddim", "dpm++2m"):
        latents = recorded(models[name], name, sampler=sampler, strength=0.6, **run)
        assert error(latents, GOLDEN[f"{name}/editing/img2img/{sampler}"]) < 1e-4
    for strength, key in ((1.0, "inpaint/ddim"), (0.6, "inpaint/ddim.0.6")):
        latents = recorded(models[name], name, sampler="ddim", strength=strength, mask=kept["mask"], **run)
        assert error(latents, GOLDEN[f"{name}/editing/{key}"]) < 1e-4
    assert same(kept, before)  # what goes in stays as it is


def test_inpainting_with_nine_channels_ends_where_diffusers_does(models, monkeypatch):
    kept = {key: GOLDEN[f"sd1/editing/{key}"] for key in ("image", "noise", "mask", "posterior_noise")}
    # the noise of the posteriors is drawn by the seed: here the recorded one is put in its place
    monkeypatch.setattr(rng, "normal", lambda *address, **stream: kept["posterior_noise"])
    one, nine = models["sd1"], models["sd1_inpaint"]
    sd = stable_diffusion.StableDiffusion(one.tokenizer, one.text_model, nine.unet, one.autoencoder, nine.settings)
    with counted(sd.unet.conv_in) as shown:
        latents = recorded(sd, "sd1", sampler="ddim", steps=10, strength=1.0, image=kept["image"], mask=kept["mask"],
                           latents=kept["noise"])
    assert len(shown) == 10 and error(latents, GOLDEN["sd1/editing/inpaint9/ddim"]) < 1e-4


# --- layouts --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd2", "sd1_inpaint"])
def test_folder_single_file_and_ckpt_of_the_same_weights_are_the_same_model(name, folder, models, tmp_path):
    def weights(sd):
        return {network: getattr(sd, network).state_dict() for network in ("unet", "autoencoder", "text_model")}
    more = {"image": torch.zeros(1, 3, 32, 32), "mask": torch.ones(8, 8)} if name == "sd1_inpaint" else {}
    wanted = draw(models[name], **more)
    single, pickled = tmp_path / "model.safetensors", tmp_path / "model.ckpt"
    write_single_file(read_folder(str(folder / name)), single)
    torch.save({"epoch": 3, "state_dict": load_file(single)}, pickled)
    for sd in (nanodiff.load(single), nanodiff.load(single, config=folder / name),
               nanodiff.load(pickled, config=folder / name)):
        assert same(weights(sd), weights(models[name])) and sd.kind == models[name].kind
        assert error(draw(sd, **more), wanted) < 2e-5  # not 0: sums depend on where in memory a weight begins


@pytest.mark.slow
def test_without_a_path_the_model_beside_the_package_is_loaded_wherever_one_stands(folder, models, tmp_path,
                                                                                   monkeypatch):
    code = "from nanodiff.pipelines.stable_diffusion import SHIPPED; print(SHIPPED)"
    home = pathlib.Path(nanodiff.__file__).resolve().parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(home)},
                           capture_output=True, text=True, check=True).stdout.strip()
    assert found == str(home / "data" / "nano-sd") == str(stable_diffusion.SHIPPED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stable_diffusion, "SHIPPED", folder / "sd1")
    assert error(draw(nanodiff.load()), draw(models["sd1"])) < 2e-5
    monkeypatch.setattr(stable_diffusion, "SHIPPED", folder / "none")
    with pytest.raises(UserError, match="none, the small model of nanodiff, does not exist; expected a diff"):
        nanodiff.load()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["diffusers", "single"])
def test_what_is_saved_loads_again_with_its_words_and_merged_loras(layout, folder, tmp_path):
    sd = nanodiff.load(folder / "sd1")
    for kind in tiny_sd.LORAS:
        tiny_sd.write_lora(kind, tmp_path / f"{kind}.safetensors")
        sd.load_lora(tmp_path / f"{kind}.safetensors", 0.5)
    for kind, file in tiny_sd.EMBEDDING_FILES.items():
        tiny_sd.write_embedding(kind, tmp_path / file)
        sd.load_embedding(tmp_path / file)
    path = tmp_path / ("saved.safetensors" if layout == "single" else "saved")
    with pytest.raises(UserError, match='LoRA "kohya, peft" is loaded but not part of the weights'):
        sd.save(path, layout)
    sd.merge_lora("kohya")
    with pytest.raises(UserError, match='LoRA "peft" is loaded but not part of the weights'):
        sd.save(path, layout)
    assert not path.exists()
    sd.merge_lora()
    sd.save(path, layout)
    again, prompt = nanodiff.load(path), "a sinuous pattern of <knit> and <fibre>"
    assert again.tokenizer.words == sd.tokenizer.words and len(again.tokenizer.words) == 3
    assert not lora.names(again.networks)
    assert torch.equal(again.encode_text(prompt), sd.encode_text(prompt))
    assert error(draw(again, prompt), draw(sd, prompt)) < 2e-5
    sd.unload_lora()
    assert error(draw(again, prompt), draw(sd, prompt)) > 1e-3
    again.save(tmp_path / "half", dtype=torch.float16)
    halves = [load_file(tmp_path / "half" / part / file) for part, file in tiny_sd.WEIGHT_FILES.items()]
    assert {tensor.dtype for half in halves for tensor in half.values()} == {torch.float16}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_small_pictures_are_decoded_together_large_ones_one_by_one_to_the_same_pixels(packed, folder, monkeypatch):
    if packed:
        monkeypatch.setattr(packing, "LEAST", 1)  # so that the tiny layers, too, are packed for inference
        monkeypatch.setattr(packing, "FEW", 0)
    packs, pack = [], packing.Conv2d.pack
    monkeypatch.setattr(packing.Conv2d, "pack", lambda self, shape: packs.append(shape) or pack(self, shape))
    sd = nanodiff.load(folder / "sd1")
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(5, 4, 8, 8, generator=generator), torch.randn(3, 4, 16, 24, generator=generator)
    monkeypatch.setattr(stable_diffusion, "AT_ONCE", 4 * 2 * 8 * 8)  # two of 8 x 8 are decoded at once
    with counted(sd.autoencoder.decoder) as sizes:
        together = [sd.decode(small), sd.decode(large), sd.decode(small)]
    assert sizes == [2, 2, 1, 1, 1, 1, 2, 2, 1]
    for latents, pictures in zip((small, large, small), together):
        assert error(pictures, torch.cat([sd.decode(one) for one in latents.split(1)])) < 1e-5
    plain = nanodiff.load(folder / "sd1")
    monkeypatch.setattr(packing, "AVAILABLE", False)
    assert error(plain.decode(small), together[0]) < 1e-5 and error(plain.decode(large), together[1]) < 1e-5
    assert bool(packs) == packed
    assert same(sd.autoencoder.state_dict(), plain.autoencoder.state_dict())


# --- LoRA and words of one's own ------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("kind", tiny_sd.LORAS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
@torch.no_grad()
def test_a_lora_changes_the_networks_as_recorded_and_leaves_no_trace(kind, scale, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LEAST", 1)  # so that the tiny layers, too, are packed for inference
    monkeypatch.setattr(packing, "FEW", 0)
    sd, said = nanodiff.load(folder / "sd1"), tiny_sd.info()["sd1"]["lora"]
    x, context = GOLDEN["sd1/lora/x"], GOLDEN["sd1/lora/context"]
    base, before = {key: net.state_dict() for key, net in sd.networks.items()}, draw(sd, steps=1)
    assert error(sd.unet(x, 500, context), GOLDEN["sd1/lora/base"]) < 2e-5
    tiny_sd.write_lora(kind, tmp_path / "fibre.safetensors")
    report = sd.load_lora(tmp_path / "fibre.safetensors", scale)
    assert sum(report["layers"].values()) == said["files"][kind]["parts"]
    for network, norm in said["files"][kind]["norm_of_the_change"].items():
        network = "unet" if network == "unet" else "text_model"
        changed = [base[network][f"{part[1]}.weight"] for part in tiny_sd.lora_parts(kind)
                   if (part[0] == "unet") == (network == "unet")]
        size = sum(float(weight.double().square().sum()) for weight in changed) ** 0.5
        assert report["change"][network] == pytest.approx(scale * norm / size, rel=1e-4)
    for merged in (False, True):
        if merged:
            sd.merge_lora()
        assert error(sd.unet(x, 500, context), GOLDEN[f"sd1/lora/{kind}.{scale}"]) < 2e-5
        assert error(sd.encode_text(said["prompts"]), GOLDEN[f"sd1/lora/{kind}.{scale}.text"]) < 2e-5
        assert not same(draw(sd, steps=1), before)
    sd.unload_lora("fibre")
    assert same({key: net.state_dict() for key, net in sd.networks.items()}, base) and same(draw(sd, steps=1), before)


def test_two_loras_add_up(folder, tmp_path):
    sd = nanodiff.load(folder / "sd1")
    base = {key: value.clone() for net in sd.networks.values() for key, value in net.state_dict().items()}
    wanted = dict(base)
    for kind, scale in (("peft", 1.0), ("kohya", 0.5)):
        path = tmp_path / "pytorch_lora_weights.safetensors"
        tiny_sd.write_lora(kind, path)
        sd.load_lora(path, scale, None if kind == "peft" else "knit")
        for _, layer, down, up, alpha in tiny_sd.lora_parts(kind):
            factor = scale * (1 if alpha is None else alpha / len(down))
            change = factor * (up.flatten(1) @ down.flatten(1)).view(base[f"{layer}.weight"].shape)
            wanted[f"{layer}.weight"] = wanted[f"{layer}.weight"] + change
    beside = draw(sd)
    sd.merge_lora()
    merged = {key: value for net in sd.networks.values() for key, value in lora.merged_state_dict(net).items()}
    assert merged.keys() == wanted.keys() and max(error(merged[key], wanted[key]) for key in wanted) < 1e-6
    assert error(draw(sd), beside) < 1e-4
    with pytest.raises(UserError, match='"pytorch_lora_weights" is loaded already: give this one another name'):
        sd.load_lora(path)
    with pytest.raises(UserError, match='no LoRA named "pytorch_lora"'):
        sd.unload_lora("pytorch_lora")


def test_a_lora_that_changes_nothing_is_told(folder, tmp_path):
    sd = nanodiff.load(folder / "sd1")
    tiny_sd.write_lora("peft", tmp_path / "none.safetensors")
    with pytest.warns(UserWarning, match="changes nothing"):
        sd.load_lora(tmp_path / "none.safetensors", 0)


def test_words_of_ones_own_give_diffusers_ids_and_states(folder, tmp_path):
    sd, said = nanodiff.load(folder / "sd1"), tiny_sd.info()["sd1"]["embedding"]
    for kind, file in tiny_sd.EMBEDDING_FILES.items():
        tiny_sd.write_embedding(kind, tmp_path / file)
        word, vectors = tiny_sd.embedding(kind)
        first = len(sd.tokenizer)
        assert sd.load_embedding(tmp_path / file) == {word: list(range(first, first + len(vectors)))}
    assert torch.equal(sd.tokenizer(said["prompts"]), GOLDEN["sd1/embedding/ids"])
    assert error(sd.encode_text(said["prompts"]), GOLDEN["sd1/embedding/states"]) < 2e-5
    with pytest.raises(UserError, match="is a word already"):
        sd.load_embedding(tmp_path / "knit.safetensors")
    sd.text_model.add_rows(1)
    with pytest.raises(UserError, match="the tokenizer has 49414 tokens and the text model 49415"):
        sd.load_embedding(tmp_path / "knit.safetensors", "other")


def test_an_embedding_of_another_width_is_refused_before_anything_changes(folder, tmp_path):
    sd = nanodiff.load(folder / "sd2")
    tiny_sd.write_embedding("a1111", tmp_path / "sinuous.pt")
    with pytest.raises(UserError, match="have 24 numbers; expected 12"):
        sd.load_embedding(tmp_path / "sinuous.pt")
    assert len(sd.tokenizer) == sd.text_model.config.vocab_size == 49408 and not sd.tokenizer.words


# --- what the checkpoint says of its U-Net --------------------------------------------------------------------------

def by_hand(sd, sampler, kind, **options):
    """A run of three steps with the sampler called directly and a denoiser without anything computed beforehand."""
    context = [sd.encode_text(text) for text in ("a photo of cloth", "")]
    denoise = guidance.classifier_free(sd.unet, *context, 7.5)
    x = rng.normal(5, 0, torch.arange(1), (4, 8, 8), stream=4)
    noises = rng.StepNoises(5, torch.arange(1), (4, 8, 8))
    with torch.no_grad():
        return samplers.sample(sampler, denoise, x, sd.schedule, 3, kind=kind, noises=noises, **options)


def test_the_scheduler_settings_say_what_the_network_predicts(models):
    assert (models["sd1"].kind, models["sd2"].kind) == ("noise", "v")
    sd = with_scheduler(models["sd1"], prediction_type="v_prediction")
    assert error(draw(sd), by_hand(sd, "dpm++2m", "v")) < 1e-4
    assert error(draw(models["sd1"]), by_hand(sd, "dpm++2m", "noise")) < 1e-4
    assert error(draw(sd), draw(models["sd1"])) > 0.1
    with pytest.raises(UserError, match='prediction_type "v_predict" is unknown.*nearest: v_prediction'):
        with_scheduler(models["sd1"], prediction_type="v_predict")


@pytest.mark.parametrize("name, answer, kind", [
    ("sd2", lambda net, x, t, context: x[:, :4], "noise"),
    ("sd2", lambda net, x, t, context: 0.1 * x[:, :4].flip(3), "v"),
    ("sd1_inpaint", lambda net, x, t, context: x[:, :4] * x[:, 4:5], "noise")])
def test_a_network_of_which_nothing_is_said_is_probed(name, answer, kind, models, monkeypatch):
    monkeypatch.setattr(CondUNet, "forward", answer)
    sd = with_scheduler(models[name], prediction_type=None)
    assert sd.kind == kind and "nothing in the checkpoint says what its U-Net predicts" in sd.notes[-1]
    assert sd.settings["scheduler"]["prediction_type"] == {"noise": "epsilon", "v": "v_prediction"}[kind]


@pytest.mark.parametrize("changes, sampler, options", [
    ({}, "ddim", {"spacing": "leading", "offset": 1, "final_alpha": "first"}),
    ({"steps_offset": 0, "set_alpha_to_one": True}, "ddim", {"spacing": "leading", "offset": 0, "final_alpha": "one"}),
    ({"timestep_spacing": "trailing"}, "ddpm", {"spacing": "trailing"}),
    ({"timestep_spacing": "trailing"}, "euler_a", {"spacing": "trailing"}),
    ({"timestep_spacing": "leading"}, "dpm++2m", {"spacing": "leading", "offset": 1}),
    ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "ddim", {"final_alpha": "first"})])
def test_the_scheduler_settings_choose_the_steps(changes, sampler, options, models):
    sd = with_scheduler(models["sd1"], **changes)
    assert sd.schedule.ends_in_pure_noise == ("rescale_betas_zero_snr" in changes)
    assert error(draw(sd, sampler=sampler), by_hand(sd, sampler, sd.kind, **options)) < 1e-4
    if changes:
        assert error(draw(sd, sampler=sampler), draw(models["sd1"], sampler=sampler)) > 0.01


@pytest.mark.parametrize("changes, expected", [
    ({"rescale_betas_zero_snr": True}, "zero terminal SNR and for noise prediction"),
    ({"beta_schedule": "scaled_lineal"}, "nearest: scaled_linear"), ({"beta_end": 2}, "no noise schedule"),
    ({"trained_betas": [0.1, -1], "num_train_timesteps": 2}, "no noise schedule"),
    ({"num_train_timesteps": "x"}, "no noise schedule")])
def test_a_noise_schedule_that_cannot_be_is_refused(changes, expected, models):
    with pytest.raises(UserError, match=expected):
        with_scheduler(models["sd1"], **changes)
