"""Single files in CompVis' names: the same weights as the folder, every key accounted for, and no v-model as eps."""

import copy
import functools
import json
import math
import pathlib
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_sd
from conftest import same
from nanodiff.diffusion.schedule import Schedule
from nanodiff.errors import UserError
from nanodiff.formats.compvis_names import ema_name, names_in_file
from nanodiff.formats.diffusers_folder import plain_names
from nanodiff.formats.single_file import (SD15, SD21, read_single_file, schedule_tables, set_prediction,
                                          find_settings, take_prediction, load_tokenizer, write_single_file)
from nanodiff.formats.stable_diffusion_folder import read_settings
from nanodiff.formats.weights import read_metadata

NAMES = json.loads((pathlib.Path(__file__).parents[1] / "golden/single_file_names.json").read_text())["names"]
START = "model.diffusion_model."
FIRST = START + "input_blocks.0.0.weight"
SD2_FUSED = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for name in tiny_sd.NAMES:
        tiny_sd.write_model(name, root / name)
    return root


@functools.cache
def ours(name):
    """{network: {our key: tensor}} of a tiny model."""
    drawn = tiny_sd.draw_model(name)
    text = {key.removeprefix("text_model."): tensor for key, tensor in drawn["text_encoder"].items()}
    return {"unet": drawn["unet"], "autoencoder": plain_names(drawn["vae"]), "text_model": text}


@functools.cache
def theirs(name):
    """The same as {the file's key: tensor}, by the recorded pairs of names alone."""
    tensors = {}
    for network, pairs in NAMES[name].items():
        for key, names in pairs.items():
            names = [names] if isinstance(names, str) else names
            tensors[key] = torch.cat([ours(name)[network][our_name] for our_name in names])
            if ".attn_1." in key and tensors[key].ndim == 2:
                tensors[key] = tensors[key][:, :, None, None]
    scheduler = tiny_sd.SETTINGS[name]["scheduler"]
    schedule = Schedule.scaled_linear(1000, scheduler["beta_start"], scheduler["beta_end"])
    return tensors | {"betas": schedule.beta.float(), "alphas_cumprod": schedule.alpha_bar.float()}


def write(path, name="sd1", without=(), **more):
    """A single file of a tiny model, without some keys and with others; returns its path."""
    tensors = {key: tensor for key, tensor in theirs(name).items() if key not in without}
    save_file({key: tensor.contiguous() for key, tensor in (tensors | more).items()}, path)
    return str(path)


@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_every_name_is_what_diffusers_own_converters_make_of_it(name):
    recorded = {key: (network, [names] if isinstance(names, str) else names)
                for network, pairs in NAMES[name].items() for key, names in pairs.items()}
    table = names_in_file(tiny_sd.SETTINGS[name], name == "sd2")
    assert {key: (network, list(shapes_of_key)) for key, (network, shapes_of_key) in table.items()} == recorded


@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_every_shape_is_that_of_diffusers_networks(name):
    shapes = {"unet": {}, "autoencoder": {}, "text_model": {}}
    for network, shapes_of_key in names_in_file(tiny_sd.SETTINGS[name], name == "sd2").values():
        shapes[network].update(shapes_of_key)
    assert shapes == {network: {key: list(tensor.shape) for key, tensor in weights.items()}
                      for network, weights in ours(name).items()}


@pytest.mark.parametrize("settings, expected", [
    (SD15, {"unet": 859_520_964, "autoencoder": 83_653_863, "text_model": 123_060_480}),
    (SD21, {"unet": 865_910_724, "autoencoder": 83_653_863, "text_model": 340_387_840})])
def test_the_full_size_settings_have_the_published_numbers_of_parameters(settings, expected):
    counts = dict.fromkeys(expected, 0)
    for network, shapes_of_key in names_in_file(settings, settings is SD21).values():
        counts[network] += sum(math.prod(shape) for shape in shapes_of_key.values())
    assert counts == expected


@pytest.mark.parametrize("name", tiny_sd.NAMES)
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_single_file_holds_the_weights_of_the_folder_bit_for_bit(name, ending, folder, tmp_path):
    path = tmp_path / f"model{ending}"
    if ending == ".ckpt":
        torch.save({"epoch": 3, "global_step": 10, "state_dict": theirs(name)}, path)
    else:
        write(path, name)
    checkpoint = read_single_file(path, config=folder / name)
    assert same(checkpoint.weights, ours(name))
    assert checkpoint.tokenizer.pad == tiny_sd.PAD[name]
    assert checkpoint.settings["unet"] == tiny_sd.SETTINGS[name]["unet"]
    assert checkpoint.settings["scheduler"]["trained_betas"] is None  # the file's tables agree with the folder's


def test_a_checkpoint_without_a_state_dict_is_the_weights_themselves(folder, tmp_path):
    torch.save(theirs("sd1"), tmp_path / "model.ckpt")
    assert same(read_single_file(tmp_path / "model.ckpt", folder / "sd1").weights, ours("sd1"))


def test_half_precision_stays_and_nothing_is_copied_to_take_a_fused_tensor_apart(folder, tmp_path):
    save_file({key: tensor.half().contiguous() for key, tensor in theirs("sd2").items()}, tmp_path / "half.safetensors")
    text = read_single_file(tmp_path / "half.safetensors", folder / "sd2").weights["text_model"]
    parts = [text[f"encoder.layers.1.self_attn.{x}_proj.weight"] for x in "qkv"]
    assert {part.dtype for part in parts} == {torch.float16}
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1  # three views of the one mapping


def test_other_spellings_load_as_the_usual_ones(folder, tmp_path):
    spelled = {}
    for key, tensor in theirs("sd1").items():
        key = key.replace("transformer.text_model.", "transformer.")  # as older versions of transformers
        for usual, other in (("q", "to_q"), ("k", "key"), ("v", "value"), ("proj_out", "to_out.0")):
            if f"attn_1.{usual}." in key:  # an autoencoder out of a folder
                key, tensor = key.replace(f"attn_1.{usual}.", f"attn_1.{other}."), tensor.squeeze()
        spelled[key.replace("model.diffusion_model.", "model.diffusion_model._orig_mod.")] = tensor.contiguous()
    save_file(spelled, tmp_path / "model.safetensors")
    assert same(read_single_file(tmp_path / "model.safetensors", folder / "sd1").weights, ours("sd1"))


def test_what_is_left_out_is_counted_and_named(folder, tmp_path):
    last = {key.replace("resblocks.1.", "resblocks.3."): tensor.clone() for key, tensor in theirs("sd2").items()
            if "resblocks.1." in key}
    extra = {"cond_stage_model.model.text_projection": torch.zeros(12, 6), "lvlb_weights": torch.zeros(1000),
             "cond_stage_model.model.logit_scale": torch.zeros([]), "first_stage_model.loss.logvar": torch.zeros([]),
             "cond_stage_model.model.attn_mask": torch.zeros(77, 77), "posterior_mean_coef1": torch.zeros(1000)}
    assert len(last) == 12
    path = write(tmp_path / "model.safetensors", "sd2", **last, **extra)
    checkpoint = read_single_file(path, folder / "sd2")
    assert same(checkpoint.weights, ours("sd2"))
    note = " ".join(checkpoint.notes)
    assert "12 weights of the last text layer" in note and "2 tables that follow from the schedule" in note
    assert "3 parts of CLIP" in note and "1 parts of the autoencoder's training loss" in note


def test_averaged_weights_are_taken_when_asked_for_and_only_when_all_are_there(folder, tmp_path):
    twins = {ema_name(key): tensor + 1 for key, tensor in theirs("sd1").items() if key.startswith(START)}
    assert "model_ema.diffusion_modelinput_blocks00weight" in twins
    twins |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    path = write(tmp_path / "both.safetensors", **twins)
    raw, averaged = (read_single_file(path, folder / "sd1", ema=ema) for ema in (False, True))
    assert same(raw.weights, ours("sd1"))
    assert same(averaged.weights["unet"], {key: tensor + 1 for key, tensor in ours("sd1")["unet"].items()})
    assert same(averaged.weights["autoencoder"], ours("sd1")["autoencoder"])
    assert any("not their averaged" in note for note in raw.notes)
    assert any("averaged (EMA) weights were taken" in note for note in averaged.notes)
    few = write(tmp_path / "few.safetensors", **{ema_name(FIRST): torch.zeros(1)})
    with pytest.raises(UserError, match="twins of 1 of the U-Net's"):
        read_single_file(few, folder / "sd1", ema=True)


@pytest.mark.parametrize("key", [FIRST, "first_stage_model.decoder.up.1.block.0.norm1.bias", SD2_FUSED + "bias"])
def test_a_missing_weight_is_named_as_the_file_would_name_it(key, folder, tmp_path):
    path = write(tmp_path / "model.safetensors", "sd2", without=[key])
    with pytest.raises(UserError, match="1 weights are missing, for example") as error:
        read_single_file(path, folder / "sd2")
    assert f'"{key}"' in str(error.value)


def test_a_wrong_shape_names_the_files_key_and_both_shapes(folder, tmp_path):
    path = write(tmp_path / "model.safetensors", "sd2", **{SD2_FUSED + "weight": torch.zeros(30, 12)})
    with pytest.raises(UserError) as error:
        read_single_file(path, folder / "sd2")
    assert SD2_FUSED in str(error.value) and "[30, 12]" in str(error.value) and "[36, 12]" in str(error.value)
    path = write(tmp_path / "numbers.safetensors", **{FIRST: torch.zeros(16, 4, 3, 3, dtype=torch.int8)})
    with pytest.raises(UserError, match="int8"):
        read_single_file(path, folder / "sd1")


@pytest.mark.parametrize("key, expected", [
    (START + "input_blocks.1.0.in_layer.0.weight", "nearest: " + START + "input_blocks.1.0.in_layers.0.weight"),
    ("safety_checker.vision_model.weight", "safety_checker"),
    (START + "input_blocks.17.0.in_layers.0.weight", "no network has a place for")])
def test_a_key_that_nobody_knows_is_an_error_with_the_nearest_known_one(key, expected, folder, tmp_path):
    path = write(tmp_path / "model.safetensors", **{key: torch.zeros(16)})
    with pytest.raises(UserError, match="holds 1 keys") as error:
        read_single_file(path, folder / "sd1")
    assert expected in str(error.value)


def test_a_file_of_another_kind_is_told_by_what_it_lacks(tmp_path, folder):
    save_file({"lora_unet_down.lora_up.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="is no checkpoint of Stable Diffusion"):
        read_single_file(tmp_path / "lora.safetensors")
    path = write(tmp_path / "model.safetensors", without=[k for k in theirs("sd1") if k.startswith("first_stage")])
    with pytest.raises(UserError, match='no key begins with "first_stage_model."'):
        read_single_file(path, folder / "sd1")


def test_an_inpainting_unet_says_its_nine_channels_itself(folder, tmp_path):
    path = write(tmp_path / "model.safetensors", **{FIRST: torch.ones(16, 9, 3, 3)})
    checkpoint = read_single_file(path, folder / "sd1")
    assert checkpoint.settings["unet"]["in_channels"] == 9 and "9 channels (inpainting)" in " ".join(checkpoint.notes)


def test_unknown_sizes_need_a_folder_and_the_error_says_so(tmp_path):
    with pytest.raises(UserError) as error:
        read_single_file(write(tmp_path / "model.safetensors"))
    for word in ("[16, 32, 32]", "context 24", "2 text layers of width 24", "config=FOLDER"):
        assert word in str(error.value)


@pytest.mark.parametrize("settings, layers", [(SD15, 12), (SD21, 23), (SD21, 24)])
def test_the_full_size_models_are_known_by_their_shapes(settings, layers):
    text = {**settings["text_encoder"], "num_hidden_layers": layers}
    names = names_in_file({**settings, "text_encoder": text}, settings is SD21)
    tensors = {}
    for key, (_, shapes_of_key) in names.items():
        shapes = list(shapes_of_key.values())
        tensors[key] = torch.empty([sum(shape[0] for shape in shapes), *shapes[0][1:]], device="meta")
    recognised = find_settings("model.safetensors", tensors, {}, None, settings is SD21)
    assert recognised == settings
    recognised["unet"]["in_channels"] = 9
    assert settings["unet"]["in_channels"] == 4  # a copy
    for block in (10, 11):
        del tensors[START + f"input_blocks.{block}.0.out_layers.3.weight"]
    with pytest.raises(UserError, match="config=FOLDER"):
        find_settings("model.safetensors", tensors, {}, None, settings is SD21)


def test_a_full_size_file_has_the_padding_and_the_picture_size_of_its_version():
    assert load_tokenizer("model.safetensors", {}, None, False).pad == "<|endoftext|>"
    assert load_tokenizer("model.safetensors", {}, None, True).pad == "!"
    for settings, word, sizes in ((SD15, "epsilon", (64, 512)), (SD21, "v_prediction", (96, 768)),
                                  (SD21, None, (96, 768)), (SD21, "epsilon", (64, 512))):
        settings = copy.deepcopy(settings)
        set_prediction(settings, word)
        assert (settings["unet"]["sample_size"], settings["vae"]["sample_size"]) == sizes
        assert settings["scheduler"]["prediction_type"] == word


def test_a_folder_of_the_other_version_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="Stable Diffusion 2.x, but its settings are of the other"):
        read_single_file(write(tmp_path / "model.safetensors", "sd2"), folder / "sd1")


def predicts(path, tensors=(), metadata={}, default="epsilon", **scheduler):
    """What a file's network predicts, by a folder's scheduler settings and all that the file says; and the notes."""
    settings = {"scheduler": scheduler, "unet": {}, "vae": {}}
    notes = take_prediction(settings, path, tensors, metadata, default)
    return settings["scheduler"]["prediction_type"], " ".join(notes)


def test_what_the_network_predicts_is_taken_from_the_first_that_says_it(tmp_path):
    path, yaml = str(tmp_path / "model.safetensors"), tmp_path / "model.yaml"
    assert predicts(path) == ("epsilon", "") and predicts(path, default=None) == (
        None, "the file does not say whether its network predicts the noise or v")
    yaml.write_text("somebody: else's\n")
    assert predicts(path, default=None)[0] is None
    yaml.write_text("target: ldm.models.LatentDiffusion\n")
    assert predicts(path, default=None)[0] == "epsilon"  # CompVis' word for no word
    yaml.write_text('target: ldm.models.LatentDiffusion\nparams:\n  parameterization: "v"\n')
    assert predicts(path) == ("v_prediction", f"the network predicts v_prediction: {yaml} says so")
    yaml.write_text("target: ldm.models.LatentDiffusion\nparams:\n  parameterization: eps\n")
    assert predicts(path, ["v_pred"])[0] == "v_prediction"
    assert predicts(path, ["v_pred"], {"modelspec.architecture": "stable-diffusion-v2-512"})[0] == "epsilon"
    assert predicts(path, [], {"modelspec.architecture": "stable-diffusion-v2-768-v"})[0] == "v_prediction"
    both = {"modelspec.architecture": "stable-diffusion-v2-512", "modelspec.prediction_type": "v"}
    assert predicts(path, [], both)[0] == "v_prediction"
    assert predicts(path, [], both, prediction_type="epsilon") == (  # a folder that gives sizes cannot make v noise
        "v_prediction",
        "the network predicts v_prediction: the metadata says so, against the settings, which say epsilon")
    assert predicts(path, [], {"ss_v_parameterization": "True"})[0] == "v_prediction"
    assert predicts(path, [], both, prediction_type="v_prediction") == ("v_prediction", "")
    with pytest.raises(UserError, match="velocity"):
        predicts(path, [], {"modelspec.prediction_type": "velocity"})


def test_a_folders_word_is_that_of_diffusers_also_when_it_says_none(folder, tmp_path):
    path = write(tmp_path / "model.safetensors", "sd2")
    config = tmp_path / "sd2"
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        shutil.copytree(folder / "sd2" / part, config / part, ignore=shutil.ignore_patterns("*.safetensors"))
    assert read_single_file(path, config).settings["scheduler"]["prediction_type"] == "v_prediction"
    file = config / "scheduler/scheduler_config.json"
    file.write_text(file.read_text().replace('"prediction_type"', '"_said_nothing"'))
    checkpoint = read_single_file(path, config)
    assert checkpoint.settings["scheduler"]["prediction_type"] == "epsilon"
    assert checkpoint.tokenizer.pad == "!"  # the folder has no tokenizer: OpenCLIP's own


def test_a_version_2_file_that_says_nothing_leaves_the_question_open(tmp_path, folder):
    path = tmp_path / "model.safetensors"
    checkpoint = read_single_file(write(path, "sd2"), folder / "sd2")
    checkpoint.settings["scheduler"]["prediction_type"] = None
    write_single_file(checkpoint, path)
    again = read_single_file(path)
    assert again.settings["scheduler"]["prediction_type"] is None
    assert "modelspec.prediction_type" not in read_metadata(path)


def test_the_files_own_noise_schedule_counts(folder, tmp_path):
    beta = Schedule.linear(800, 1e-3, 1e-2)
    for name, tables in (("both", schedule_tables(beta)), ("bar", {"alphas_cumprod": beta.alpha_bar.float()})):
        without = [key for key in ("betas", "alphas_cumprod") if key not in tables]
        path = write(tmp_path / f"{name}.safetensors", without=without, **tables)
        checkpoint = read_single_file(path, folder / "sd1")
        scheduler = checkpoint.settings["scheduler"]
        assert scheduler["num_train_timesteps"] == 800
        assert torch.allclose(torch.tensor(scheduler["trained_betas"]).double(), beta.beta, rtol=2e-4)
        assert "the file's own: 800 steps" in " ".join(checkpoint.notes)
    path = write(tmp_path / "torn.safetensors", betas=beta.beta.float())
    with pytest.raises(UserError, match="not of one noise schedule"):
        read_single_file(path, folder / "sd1")
    path = write(tmp_path / "none.safetensors", without=["alphas_cumprod"], betas=torch.full((1000,), torch.nan))
    with pytest.raises(UserError, match="no noise schedule that can be"):
        read_single_file(path, folder / "sd1")


@pytest.mark.slow
def test_tables_in_half_precision_agree_with_their_schedule_and_zero_terminal_snr_is_marked(folder, tmp_path):
    tables = {key: theirs("sd1")[key].half() for key in ("betas", "alphas_cumprod")}
    scheduler = read_single_file(write(tmp_path / "half.safetensors", **tables), folder / "sd1").settings["scheduler"]
    assert scheduler["trained_betas"] is None
    marked = {**schedule_tables(Schedule.scaled_linear().zero_terminal_snr()), "ztsnr": torch.zeros(0)}
    scheduler = read_single_file(write(tmp_path / "zero.safetensors", **marked), folder / "sd1").settings["scheduler"]
    assert scheduler["rescale_betas_zero_snr"] is True and scheduler["trained_betas"] is None


def test_the_scaling_factor_of_the_file_counts(folder, tmp_path):
    path = write(tmp_path / "model.safetensors", scale_factor=torch.tensor(0.25))
    assert read_single_file(path, folder / "sd1").settings["vae"]["scaling_factor"] == 0.25


# --- writing --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_what_is_written_is_the_file_that_was_read_and_needs_no_folder_any_more(name, folder, tmp_path):
    checkpoint = read_single_file(write(tmp_path / "one.safetensors", name), folder / name)
    checkpoint.tokenizer.add_word("<fibre>", 2)
    table = checkpoint.weights["text_model"]["embeddings.token_embedding.weight"]
    checkpoint.weights["text_model"]["embeddings.token_embedding.weight"] = torch.cat([table, table[:2]])
    write_single_file(checkpoint, tmp_path / "two.safetensors")
    written, original = load_file(tmp_path / "two.safetensors"), theirs(name)
    assert all(same(written[key], tensor) for key, tensor in original.items() if "token_embedding" not in key)
    assert written.keys() - original.keys() == schedule_tables(Schedule.scaled_linear()).keys() - original.keys()
    again = read_single_file(tmp_path / "two.safetensors")
    assert same(again.weights, checkpoint.weights)
    assert again.tokenizer.words == {"<fibre>": [49408, 49409]} and again.tokenizer.pad == tiny_sd.PAD[name]
    assert torch.equal(again.tokenizer(["a <fibre>!", "!"]), checkpoint.tokenizer(["a <fibre>!", "!"]))
    assert again.settings["text_encoder"].pop("vocab_size") == 49410
    checkpoint.settings["text_encoder"].pop("vocab_size")
    assert again.settings == checkpoint.settings
    metadata = read_metadata(tmp_path / "two.safetensors")
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    said = [metadata["modelspec.prediction_type"], metadata["modelspec.architecture"]]
    assert said == {"sd1": ["epsilon", "stable-diffusion-v1"], "sd2": ["v", "stable-diffusion-v2-768-v"]}[name]


def test_weights_are_written_in_the_type_that_is_asked_for_and_the_schedule_is_not(folder, tmp_path):
    checkpoint = read_single_file(write(tmp_path / "one.safetensors"), folder / "sd1")
    write_single_file(checkpoint, tmp_path / "two.safetensors", dtype="float16")
    written = load_file(tmp_path / "two.safetensors")
    assert written[FIRST].dtype == torch.float16 and torch.equal(written[FIRST], theirs("sd1")[FIRST].half())
    assert written["betas"].dtype == torch.float32
    with pytest.raises(UserError, match="expected float32"):
        write_single_file(checkpoint, tmp_path / "three.safetensors", dtype="floaty")
    assert not (tmp_path / "three.safetensors").exists()


def test_weights_that_do_not_fit_the_settings_are_not_written(folder, tmp_path):
    checkpoint = read_single_file(write(tmp_path / "one.safetensors"), folder / "sd1")
    bias = checkpoint.weights["unet"].pop("conv_in.bias")
    for weights, expected in (({}, '"conv_in.bias" is missing'), ({"conv_in.bias": bias, "more": bias}, "has no place"),
                              ({"conv_in.bias": bias[:3]}, r"shape \[3\], expected \[16\]")):
        changed = {**checkpoint.weights, "unet": checkpoint.weights["unet"] | weights}
        with pytest.raises(UserError, match=expected):
            write_single_file(replace(checkpoint, weights=changed), tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="does not end in .safetensors"):
        write_single_file(checkpoint, tmp_path / "two.ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors"]


def test_a_vocabulary_that_is_not_clips_own_still_needs_its_folder(folder, tmp_path):
    checkpoint = read_single_file(write(tmp_path / "one.safetensors"), folder / "sd1")
    vocab = checkpoint.tokenizer.vocab
    vocab["cat</w>"], vocab["dog</w>"] = vocab["dog</w>"], vocab["cat</w>"]
    write_single_file(checkpoint, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match="vocabulary that is not CLIP's own"):
        read_single_file(tmp_path / "two.safetensors")
    assert same(read_single_file(tmp_path / "two.safetensors", folder / "sd1").weights, ours("sd1"))


def test_metadata_that_somebody_broke_is_one_sentence(tmp_path):
    write(tmp_path / "model.safetensors")
    for text in ("{", "[]", '{"settings": {}}', '{"settings": 3, "tokenizer": {"pad": "!"}}'):
        save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "broken.safetensors", {"nanodiff": text})
        with pytest.raises(UserError, match='metadata "nanodiff" cannot be read'):
            read_single_file(tmp_path / "broken.safetensors")


def test_settings_of_a_folder_bring_the_guidance_that_its_model_is_best_drawn_with(tmp_path):
    tiny_sd.write_model("sd1", tmp_path / "own")
    plain, index = read_settings(tmp_path / "own"), tmp_path / "own/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_guidance": 2.5, "_guidance_start": 0.2}))
    assert read_settings(tmp_path / "own") == plain | {"guidance": 2.5, "guidance_start": 0.2}
    index.unlink()
    assert read_settings(tmp_path / "own") == plain
