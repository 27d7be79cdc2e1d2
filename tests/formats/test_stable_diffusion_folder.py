"""Stable Diffusion folders in diffusers' layout: read as they are, written as they are read, refused by name."""

import copy
import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_sd
from conftest import same
from nanodiff.errors import UserError
from nanodiff.formats.diffusers_folder import WEIGHTS, plain_names
from nanodiff.formats.stable_diffusion_folder import (Checkpoint, read_folder, unet_config_from, unet_config_to,
                                                      vae_config_from, vae_config_to, write_checkpoint)
from nanodiff.formats.weights import read_weights
from nanodiff.models.cond_unet import CondUNet, CondUNetConfig
from nanodiff.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig

PARTS = {"unet": WEIGHTS, "vae": WEIGHTS, "text_encoder": "model.safetensors"}
GOLDEN = tiny_sd.golden()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for name in tiny_sd.SETTINGS:
        tiny_sd.write_model(name, root / name)
    return root


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the sd1 folder, to be damaged."""
    shutil.copytree(folders / "sd1", tmp_path / "model")
    return tmp_path / "model"


@functools.cache
def ours(name):
    """{network: {our key: tensor}} of a tiny model."""
    drawn = tiny_sd.draw_model(name)
    text = {key.removeprefix("text_model."): tensor for key, tensor in drawn["text_encoder"].items()}
    return {"unet": drawn["unet"], "autoencoder": plain_names(drawn["vae"]), "text_model": text}


def edit(path, without=(), **changes):
    """Change a JSON file."""
    held = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(held | changes))


def unet_settings(**changes):
    return {**tiny_sd.SETTINGS["sd2"]["unet"], **changes}


def vae_settings(**changes):
    return {**tiny_sd.SETTINGS["sd2"]["vae"], **changes}


# --- reading ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", tiny_sd.SETTINGS)
def test_a_folder_is_read_bit_for_bit_under_todays_names(name, folders):
    checkpoint = read_folder(str(folders / name))
    assert checkpoint.settings == tiny_sd.SETTINGS[name] and checkpoint.notes == []
    assert same(checkpoint.weights, ours(name))
    assert checkpoint.tokenizer.pad == tiny_sd.PAD[name]
    assert not [key for key in checkpoint.weights["autoencoder"] if ".query" in key or "proj_attn" in key]
    assert not [key for key in checkpoint.weights["text_model"] if "position_ids" in key or "text_model" in key]


def test_the_old_names_are_in_the_file_of_one_model_and_not_of_the_other(folders):
    # else the test above would not see whether they are understood
    held = {name: load_file(folders / name / "vae" / WEIGHTS).keys() for name in tiny_sd.NAMES}
    assert "encoder.mid_block.attentions.0.query.weight" in held["sd1"]
    assert "encoder.mid_block.attentions.0.to_q.weight" in held["sd2"]
    text = load_file(folders / "sd1" / "text_encoder" / "model.safetensors")
    assert "text_model.embeddings.position_ids" in text


@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_its_networks_hold_the_weights_themselves_and_give_the_reference(name, folders):
    checkpoint = read_folder(folders / name)
    nets = {part: checkpoint.network(part) for part in checkpoint.weights}
    for part, net in nets.items():
        assert not net.training and not any(p.requires_grad for p in net.parameters())
        for key, tensor in net.state_dict().items():
            assert tensor.data_ptr() == checkpoint.weights[part][key].data_ptr(), key  # no copy
    size = {"sd1": "7x10", "sd2": "10x13"}[name]
    with torch.no_grad():
        results = {
            f"unet/y_{size}_t999": nets["unet"](GOLDEN[f"{name}/unet/x_{size}"], 999, GOLDEN[f"{name}/unet/context"]),
            "vae/decoded_24x32": nets["autoencoder"].decode(GOLDEN[f"{name}/vae/z_24x32"]),
            "text/states": nets["text_model"](GOLDEN[f"{name}/text/ids"])[0]}
    for key, y in results.items():
        expected = GOLDEN[f"{name}/{key}"]
        assert (y - expected).abs().max() <= 2e-5 * expected.abs().max(), key


def test_a_network_may_be_asked_for_in_another_type(folders):
    checkpoint = read_folder(folders / "sd1")
    half = checkpoint.network("autoencoder", torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert same(checkpoint.weights, ours("sd1"))
    assert same(dict(half.state_dict()), {key: tensor.half() for key, tensor in ours("sd1")["autoencoder"].items()})


def test_writing_into_what_was_read_leaves_the_file_alone(folder):
    before = (folder / "unet" / WEIGHTS).read_bytes()
    weights = read_folder(folder).weights["unet"]
    for tensor in weights.values():
        tensor.zero_()
    assert (folder / "unet" / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("part, file, name", [
    ("unet", "diffusion_pytorch_model.fp16.safetensors", "unet"), ("unet", "diffusion_pytorch_model.bin", "unet"),
    ("vae", "diffusion_pytorch_model.fp16.bin", "autoencoder"), ("text_encoder", "pytorch_model.bin", "text_model"),
    ("text_encoder", "model.fp16.safetensors", "text_model"), ("text_encoder", "pytorch_model.fp16.bin", "text_model")])
def test_other_weight_files_are_taken_for_want_of_the_usual_one_and_this_is_noted(part, file, name, folder):
    usual = folder / part / PARTS[part]
    weights = load_file(usual)
    weights = {key: t.half() if "fp16" in file and t.is_floating_point() else t for key, t in weights.items()}
    others = {key: torch.zeros_like(t) for key, t in weights.items()}
    usual.unlink()
    save = save_file if file.endswith("safetensors") else torch.save
    save(weights, folder / part / file)
    torch.save(others, folder / part / "unknown_model.bin")  # not looked at
    checkpoint = read_folder(folder)
    assert checkpoint.notes == [f"{part}: {file} was taken, for want of {PARTS[part]}"]
    expected = {key: t.half() if "fp16" in file else t for key, t in ours("sd1")[name].items()}
    assert same(checkpoint.weights[name], expected)


def test_the_usual_file_is_preferred_without_a_note(folder):
    for part, file in PARTS.items():
        zeros = {key: torch.zeros_like(t) for key, t in load_file(folder / part / file).items()}
        save_file(zeros, folder / part / file.replace(".safetensors", ".fp16.safetensors"))
        stem = "pytorch_model" if part == "text_encoder" else file.removesuffix(".safetensors")
        torch.save(zeros, folder / part / f"{stem}.bin")
    checkpoint = read_folder(folder)
    assert checkpoint.notes == [] and same(checkpoint.weights, ours("sd1"))


def test_a_folder_without_an_index_and_names_of_a_compiled_network_are_read_too(folder):
    (folder / "model_index.json").unlink()
    path = folder / "unet" / WEIGHTS
    save_file({"_orig_mod." + key: tensor for key, tensor in load_file(path).items()}, path)
    assert same(read_folder(folder).weights, ours("sd1"))


# --- writing ---------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_sd.SETTINGS)
def test_what_is_written_is_read_again_bit_for_bit(name, folders, tmp_path):
    first = read_folder(folders / name)
    write_checkpoint(first, tmp_path / "new" / "copy")
    again = read_folder(tmp_path / "new" / "copy")
    assert again.settings == first.settings and again.notes == [] and again.tokenizer.pad == tiny_sd.PAD[name]
    assert same(again.weights, ours(name))
    prompts = ["a photo of dtd_braided texture!", ""]
    assert torch.equal(again.tokenizer(prompts), first.tokenizer(prompts))
    write_checkpoint(again, tmp_path / "new" / "copy")  # over itself: the mapped files are replaced, not overwritten
    assert same(read_folder(tmp_path / "new" / "copy").weights, ours(name)) and same(again.weights, ours(name))
    assert os.listdir(tmp_path / "new") == ["copy"]  # nothing unfinished is left


def test_half_precision_stays_half_precision(folders, tmp_path):
    checkpoint = read_folder(folders / "sd2")
    checkpoint.weights["unet"] = {key: tensor.bfloat16() for key, tensor in checkpoint.weights["unet"].items()}
    write_checkpoint(checkpoint, tmp_path / "half")
    assert same(read_folder(tmp_path / "half").weights, checkpoint.weights)


@pytest.mark.parametrize("name, pipeline", [("sd1", "StableDiffusionPipeline"),
                                            ("sd1_inpaint", "StableDiffusionInpaintPipeline")])
def test_written_files_are_what_diffusers_expects(name, pipeline, folders, tmp_path):
    write_checkpoint(read_folder(folders / name), tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    assert index["_class_name"] == pipeline and index["scheduler"] == ["diffusers", "PNDMScheduler"]
    assert {key: value for key, value in index.items() if key in tiny_sd.CLASSES} == tiny_sd.CLASSES
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    for part, file in PARTS.items():
        assert sorted(os.listdir(tmp_path / "copy" / part)) == sorted(["config.json", file])
    assert os.listdir(tmp_path / "copy" / "scheduler") == ["scheduler_config.json"]
    text = load_file(tmp_path / "copy" / "text_encoder" / "model.safetensors")
    assert text and all(key.startswith("text_model.") for key in text)
    vae = load_file(tmp_path / "copy" / "vae" / WEIGHTS)
    assert "decoder.mid_block.attentions.0.to_out.0.weight" in vae


def test_a_scheduler_without_a_class_gets_one(folders, tmp_path):
    checkpoint = read_folder(folders / "sd1")
    settings = copy.deepcopy(checkpoint.settings)
    del settings["scheduler"]["_class_name"]
    write_checkpoint(Checkpoint(settings, checkpoint.weights, checkpoint.tokenizer), tmp_path / "copy")
    assert read_folder(tmp_path / "copy").settings["scheduler"] == checkpoint.settings["scheduler"]


# --- what is missing or wrong ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("gone, words", [
    ("unet/config.json", "unet.config.json cannot be read"), ("vae/config.json", "vae.config.json cannot be read"),
    ("text_encoder/config.json", "text_encoder.config.json cannot be read"),
    ("scheduler/scheduler_config.json", "scheduler_config.json cannot be read"),
    ("unet/" + WEIGHTS, "unet holds no weights; expected " + WEIGHTS + ", or .*fp16.safetensors, .*bin"),
    ("text_encoder/model.safetensors", "text_encoder holds no weights; expected model.safetensors, or .*model.bin"),
    ("tokenizer/merges.txt", "merges.txt"), ("tokenizer/vocab.json", "vocab.json"),
    ("unet", "unet.config.json cannot be read"), ("tokenizer", "tokenizer")])
def test_a_missing_file_is_named(gone, words, folder):
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=words):
        read_folder(folder)


@pytest.mark.parametrize("file", ["unet/" + WEIGHTS, "vae/config.json", "model_index.json"])
def test_a_broken_file_is_named(file, folder):
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match=f"{file.split('/')[-1]} is not (a )?valid"):
        read_folder(folder)


def test_another_pipelines_folder_is_refused_with_the_nearest_that_is_known(folder):
    edit(folder / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(UserError, match="holds a StableDiffusionXLPipeline; expected one of.*nearest: StableDiffusion"):
        read_folder(folder)
    edit(folder / "model_index.json", without=["_class_name"])
    with pytest.raises(UserError, match="holds no pipeline's name; expected one of StableDiffusionPipeline"):
        read_folder(folder)
    for kind in ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"):
        edit(folder / "model_index.json", _class_name=kind)
        assert read_folder(folder).notes == []


@pytest.mark.slow
@pytest.mark.parametrize("network, key", [
    ("unet", "mid_block.attentions.0.proj_in.weight"), ("autoencoder", "quant_conv.weight"),
    ("text_model", "encoder.layers.1.mlp.fc1.bias")])
def test_a_weight_that_is_missing_left_over_or_misshapen_is_named(network, key, folders):
    checkpoint = read_folder(folders / "sd1")
    title = f"the {network.replace('_', ' ')}'s weights"

    def damage(**changes):
        weights = {**checkpoint.weights[network], **changes.get("more", {})}
        weights.pop(changes.get("gone"), None)
        return Checkpoint(checkpoint.settings, {**checkpoint.weights, network: weights}, checkpoint.tokenizer)

    tensor = checkpoint.weights[network][key]
    with pytest.raises(UserError, match=f'{title}: 1 weights are missing, for example "{key}"'):
        damage(gone=key).network(network)
    with pytest.raises(UserError, match=f'{title}: 1 weights are left over, for example "{key}x"'):
        damage(more={key + "x": tensor}).network(network)
    with pytest.raises(UserError, match=f'{title}: 1 weights are missing, for example "{key}", nearest: {key}x'):
        damage(gone=key, more={key + "x": tensor}).network(network)
    wrong = torch.cat([tensor, tensor])
    with pytest.raises(UserError) as caught:
        damage(more={key: wrong}).network(network)
    assert str(caught.value) == f'{title}: "{key}" has shape {list(wrong.shape)}, expected {list(tensor.shape)}'
    assert damage().network(network) is not None


# --- settings --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, words", [
    ({"cross_atention_dim": 768}, 'setting "cross_atention_dim" is unknown, nearest: cross_attention_dim'),
    ({"class_embed_type": "projection"}, "class_embed_type 'projection' is not supported, only None is"),
    ({"time_cond_proj_dim": 256}, "time_cond_proj_dim 256 is not supported"),
    ({"only_cross_attention": True}, "only_cross_attention True is not supported, only False is"),
    ({"_class_name": "UNet2DModel"}, "describes a UNet2DModel, expected a UNet2DConditionModel"),
    ({"down_block_types": ["CrossAttnDownBlock2D"] * 2}, "2 block types for 4 levels"),
    ({"down_block_types": ["AttnDownBlock2D"] * 4}, 'block type "AttnDownBlock2D" is not supported, only DownBlock2D'),
    ({"up_block_types": ["CrossAttnUpBlock2D"] * 4}, "expected attention at the levels of down_block_types"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type \"UNetMidBlock2DSimpleCrossAttn\" is not"),
    ({"layers_per_block": [1, 2, 2, 2]}, r"layers_per_block \[1, 2, 2, 2\] is not supported, only one number"),
    ({"transformer_layers_per_block": [1, 2, 10, 10]}, "transformer_layers_per_block .* is not supported"),
    ({"cross_attention_dim": [8, 12, 12, 12]}, "cross_attention_dim .* is not supported"),
    ({"attention_head_dim": [2, 4]}, r"heads \(2, 4\) must hold one number for each level"),
    ({"attention_head_dim": 3}, "8 channels cannot be split into 3 equal heads"),
    ({"norm_num_groups": 3}, "8 channels cannot be split into 3 groups"),
    ({"act_fn": "silly"}, "nearest: silu"),
    ({"attention_head_dim": None}, "attention_head_dim is None, expected a value such as 8"),
    ({"block_out_channels": 8}, "block_out_channels is 8, expected a value such as"),
    ({"block_out_channels": []}, r"block_out_channels is \[\], expected"),
    ({"in_channels": "4"}, "in_channels is '4', expected a value such as 4"),
    ({"in_channels": [4, 4, 4, 4]}, "in_channels is .* expected a value such as 4"),
    ({"layers_per_block": 2.5}, "layers_per_block is 2.5, expected"),
    ({"use_linear_projection": "yes"}, "use_linear_projection is 'yes', expected a value such as False"),
    ({"down_block_types": None}, "down_block_types is None, expected"), ({"norm_eps": "1e-5"}, "norm_eps is '1e-5'"),
])
def test_a_unet_that_is_not_ours_is_refused_by_the_setting(changes, words):
    unet_config_from(unet_settings())
    with pytest.raises(UserError, match=words):
        unet_config_from(unet_settings(**changes))


@pytest.mark.parametrize("changes, words", [
    ({"latent_chanels": 4}, 'setting "latent_chanels" is unknown, nearest: latent_channels'),
    ({"shift_factor": 0.1}, "shift_factor 0.1 is not supported"),
    ({"_class_name": "AutoencoderTiny"}, "describes a AutoencoderTiny, expected a AutoencoderKL"),
    ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, '"AttnDownEncoderBlock2D" is not'),
    ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "3 block types in up_block_types for 2 levels"),
    ({"use_quant_conv": False}, "use_quant_conv and use_post_quant_conv differ"),
    ({"norm_num_groups": 5}, "8 channels cannot be split into 5 groups"),
    ({"scaling_factor": None}, "scaling_factor is None, expected a value such as 0.18215"),
    ({"scaling_factor": -1}, "scaling_factor must be above 0"),
])
def test_an_autoencoder_that_is_not_ours_is_refused_by_the_setting(changes, words):
    vae_config_from(vae_settings())
    with pytest.raises(UserError, match=words):
        vae_config_from(vae_settings(**changes))


def test_a_network_from_refused_settings_is_refused_too(folder):
    edit(folder / "unet" / "config.json", encoder_hid_dim=3)
    checkpoint = read_folder(folder)  # nothing is built yet
    with pytest.raises(UserError, match="unet/config.json: encoder_hid_dim 3 is not supported"):
        checkpoint.network("unet")


def test_settings_that_are_left_out_are_diffusers_defaults():
    assert unet_config_from({}) == CondUNetConfig(context_channels=1280)
    assert vae_config_from({}) == KLAutoencoderConfig(channels=(64,), blocks=1)


def test_one_number_may_be_given_for_each_level_and_heads_may_differ():
    config = unet_config_from(unet_settings(layers_per_block=[2, 2, 2, 2], transformer_layers_per_block=[1, 1, 1, 1],
                                            cross_attention_dim=[12, 12, 12, 12]))
    assert config == unet_config_from(unet_settings())
    assert (config.blocks, config.transformer_layers, config.context_channels) == (2, 1, 12)
    assert config.heads == (2, 4, 2, 3) and config.attention == (0, 1, 2) and config.eps == 1e-3
    assert unet_config_from(unet_settings(attention_head_dim=4, block_out_channels=[8] * 4)).heads == (4, 4, 4, 4)
    idle = unet_settings(upcast_attention=True, sample_size=[3, 4], num_attention_heads=None, _name_or_path="x")
    assert unet_config_from(idle) == config


@pytest.mark.parametrize("changes", [
    {}, {"heads": (1, 2, 4, 8)}, {"attention": ()}, {"attention": (1, 3), "mid_attention": False},
    {"channels": (8, 16), "heads": (2, 4), "attention": (1,)}, {"in_channels": 9, "out_channels": 5, "blocks": 3},
    {"transformer_layers": 2, "context_channels": 7, "linear_projection": True, "groups": 8, "eps": 1e-6},
    {"activation": "gelu", "dropout": 0.1, "time_channels": 20, "freq_shift": 1.0, "flip_sin_to_cos": False,
     "downsample_padding": 0}])
def test_unet_settings_written_and_read_are_the_same_config(changes):
    config = CondUNetConfig(**{"channels": (8, 16, 16, 24), "heads": (2, 2, 2, 2), "groups": 4, **changes})
    settings = json.loads(json.dumps(unet_config_to(config)))
    assert unet_config_from(settings) == config
    assert unet_config_to(unet_config_from(settings)) == settings
    with torch.device("meta"):
        assert CondUNet(config).state_dict().keys() == CondUNet(unet_config_from(settings)).state_dict().keys()


@pytest.mark.parametrize("changes", [
    {}, {"channels": (8,)}, {"in_channels": 1, "out_channels": 2, "latent_channels": 16, "blocks": 1},
    {"mid_attention": False, "quant_conv": False}, {"groups": 8, "activation": "gelu", "scaling_factor": 0.5}])
def test_autoencoder_settings_written_and_read_are_the_same_config(changes):
    config = KLAutoencoderConfig(**{"channels": (8, 16, 16), "groups": 4, **changes})
    settings = json.loads(json.dumps(vae_config_to(config)))
    assert vae_config_from(settings) == config
    assert vae_config_to(vae_config_from(settings)) == settings
    with torch.device("meta"):
        assert KLAutoencoder(config).state_dict().keys() == KLAutoencoder(vae_config_from(settings)).state_dict().keys()


@pytest.mark.parametrize("name", [*tiny_sd.SETTINGS, *tiny_sd.FULL_SIZE])
def test_a_models_own_settings_survive_a_round_trip_as_far_as_they_say_anything(name):
    settings = {**tiny_sd.SETTINGS, **tiny_sd.FULL_SIZE}[name]
    for part, read, write in (("unet", unet_config_from, unet_config_to), ("vae", vae_config_from, vae_config_to)):
        written = write(read(settings[part]))
        assert read(written) == read(settings[part])
        told = {key: value for key, value in settings[part].items()
                if key in written and key not in ("sample_size", "_diffusers_version")}
        assert len(told) >= 10 and told == {key: written[key] for key in told}


def test_weights_spread_over_several_files_are_read_by_their_index(tmp_path):
    tiny_sd.write_model("sd1", tmp_path / "model")
    whole = read_folder(tmp_path / "model").weights["unet"]
    file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights, names = load_file(file), {}
    for number, keys in enumerate((sorted(weights)[:50], sorted(weights)[50:]), 1):
        shard = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
        save_file({key: weights[key] for key in keys}, file.with_name(shard))
        names |= dict.fromkeys(keys, shard)
    file.unlink()
    Path(f"{file}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    read = read_folder(tmp_path / "model").weights["unet"]
    assert read.keys() == whole.keys() and all(torch.equal(read[key], whole[key]) for key in whole)


def test_numpy_objects_beside_the_weights_of_a_checkpoint_are_left_out(tmp_path):
    weights = {"a": torch.ones(2)}
    torch.save({"state_dict": weights, "best": np.float64(3), "more": np.arange(3)}, tmp_path / "numpy.ckpt")
    assert read_weights(tmp_path / "numpy.ckpt").keys() == {"a"}


@pytest.mark.slow
def test_the_recommended_guidance_is_written_where_others_skip_it(folders, tmp_path):
    checkpoint = read_folder(str(folders / "sd1"))
    guidance = {"guidance": 2.5, "guidance_start": 0.2}
    checkpoint.settings |= guidance
    write_checkpoint(checkpoint, str(tmp_path / "own"))
    index = json.loads((tmp_path / "own/model_index.json").read_text())
    assert {name: index["_" + name] for name in guidance} == guidance
    assert guidance.items() <= read_folder(str(tmp_path / "own")).settings.items()
