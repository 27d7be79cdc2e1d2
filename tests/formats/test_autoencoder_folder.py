"""An autoencoder alone in a folder: written as diffusers' AutoencoderKL or VQModel, read again, refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_sd
from conftest import same
from nanodiff.errors import UserError
from nanodiff.formats.diffusers_folder import WEIGHTS
from nanodiff.formats.stable_diffusion_folder import (VAE_NAMES, VQ_NAMES, load_autoencoder, save_autoencoder,
                                                      vae_config_from)
from nanodiff.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig, VQAutoencoder

CONFIGS = {
    "kl": {}, "kl without 1x1 convolutions": {"quant_conv": False}, "kl of pixels": {"channels": (8,), "groups": 8},
    "kl of grey": {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "scaling_factor": 1.0},
    "vq": {"codes": 7}, "vq of other width": {"codes": 5, "code_channels": 3, "scaling_factor": 1.0}}


def network(name="kl"):
    config = KLAutoencoderConfig(**{"channels": (8, 16), "blocks": 1, "groups": 4, **CONFIGS[name]})
    kind = VQAutoencoder if config.codes else KLAutoencoder
    return kind(config, torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    save_autoencoder(network(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def vq_folder(tmp_path):
    save_autoencoder(network("vq"), tmp_path / "vq")
    return tmp_path / "vq"


def edit(folder, **changes):
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(held | changes))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_again_bit_for_bit_frozen_and_in_eval_mode(name, tmp_path):
    net = network(name)
    save_autoencoder(net, tmp_path / "model")
    loaded = load_autoencoder(tmp_path / "model")
    assert type(loaded) is type(net) and loaded.config == net.config
    assert same(dict(loaded.state_dict()), dict(net.state_dict()))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    x = torch.rand(1, net.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        z, expected = loaded.encode(x), net.encode(x)
        if not net.config.codes:
            z, expected = z.mode(), expected.mode()
        torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loaded.decode(expected), net.decode(expected), rtol=1e-5, atol=1e-6)


def test_a_kl_folders_settings_are_those_that_a_whole_models_vae_is_read_by(folder):
    settings = json.loads((folder / "config.json").read_text())
    assert settings["_class_name"] == "AutoencoderKL" and vae_config_from(settings) == network().config
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", WEIGHTS]


def test_a_vq_folder_says_what_diffusers_vqmodel_asks_for(vq_folder):
    settings = json.loads((vq_folder / "config.json").read_text())
    assert settings["_class_name"] == "VQModel" and settings["num_vq_embeddings"] == 7
    assert settings["block_out_channels"] == [8, 16] and settings["latent_channels"] == 4
    assert not {"use_quant_conv", "use_post_quant_conv"} & settings.keys()  # it has no such settings
    weights = load_file(vq_folder / WEIGHTS)
    assert {"quantize.embedding.weight", "quant_conv.weight", "post_quant_conv.weight"} <= weights.keys()
    with pytest.raises(UserError, match="describes a VQModel, expected a AutoencoderKL"):
        vae_config_from(settings)  # of a whole Stable Diffusion


def test_both_kinds_share_their_settings_but_for_the_codebook():
    kl, vq = ({ours for _, ours, _ in names} for names in (VAE_NAMES, VQ_NAMES))
    assert kl - vq == {"quant_conv"} and vq - kl == {"codes", "code_channels"}


@pytest.mark.parametrize("name", tiny_sd.NAMES)
def test_the_vae_of_a_whole_model_is_read_whatever_names_its_file_uses(name, tmp_path):
    tiny_sd.write_model(name, tmp_path / "model")
    net = load_autoencoder(tmp_path / "model" / "vae")
    start = f"{name}/vae/"
    golden = tiny_sd.golden()
    mean = net.encode(golden[f"{start}image_24x32"]).mean
    assert (mean - golden[f"{start}mean_24x32"]).abs().max() <= 2e-5 * golden[f"{start}mean_24x32"].abs().max()


def test_half_precision_is_read_as_single_unless_another_is_asked_for(tmp_path):
    save_autoencoder(network().half(), tmp_path / "model")
    assert {t.dtype for t in load_file(tmp_path / "model" / WEIGHTS).values()} == {torch.float16}
    assert {p.dtype for p in load_autoencoder(tmp_path / "model").parameters()} == {torch.float32}
    assert {p.dtype for p in load_autoencoder(tmp_path / "model", torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_folder_that_is_written_over_while_it_is_read_keeps_what_was_read(folder):
    loaded = load_autoencoder(folder)
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with torch.no_grad():
        loaded.quant_conv.bias.add_(1)  # a view of the file: the file stays as it is
    assert torch.equal(load_file(folder / WEIGHTS)["quant_conv.bias"], before["quant_conv.bias"])
    save_autoencoder(network("vq"), folder)
    assert isinstance(load_autoencoder(folder), VQAutoencoder)
    assert torch.equal(loaded.encoder.conv_in.weight, before["encoder.conv_in.weight"])


@pytest.mark.parametrize("changes, words", [
    ({"_class_name": "AutoencoderTiny"}, "json describes a AutoencoderTiny, expected a AutoencoderKL or a VQModel"),
    ({"_class_name": None}, "describes a None, expected a AutoencoderKL or a VQModel"),
    ({"latent_chanels": 4}, '"latent_chanels" is unknown, nearest: latent_channels'),
    ({"num_vq_embeddings": 7}, '"num_vq_embeddings" is unknown'),
    ({"norm_num_groups": 5}, "8 channels cannot be split into 5 groups"),
    ({"use_quant_conv": False}, "use_quant_conv and use_post_quant_conv differ")])
def test_settings_that_are_not_ours_are_refused_with_the_folders_name(changes, words, folder):
    edit(folder, **changes)
    with pytest.raises(UserError, match=words) as error:
        load_autoencoder(folder)
    assert str(error.value).startswith(f"{folder} is no autoencoder's folder: ")


@pytest.mark.parametrize("changes, words", [
    ({"norm_type": "spatial"}, "norm_type 'spatial' is not supported, only 'group' is"),
    ({"lookup_from_codebook": True}, "lookup_from_codebook True is not supported"),
    ({"use_quant_conv": True}, '"use_quant_conv" is unknown'),
    ({"num_vq_embeddings": "many"}, "num_vq_embeddings is 'many', expected a value such as 256")])
def test_a_vqmodel_that_is_not_ours_is_refused_too(changes, words, vq_folder):
    load_autoencoder(vq_folder)
    edit(vq_folder, **changes)
    with pytest.raises(UserError, match=words):
        load_autoencoder(vq_folder)


def test_missing_or_broken_files_and_weights_are_named(folder, tmp_path):
    weights = load_file(folder / WEIGHTS)

    def refused(words):
        with pytest.raises(UserError, match=words) as error:
            load_autoencoder(folder)
        assert str(folder) in str(error.value)

    bias = weights.pop("quant_conv.bias")
    save_file(weights, folder / WEIGHTS)
    refused('1 weights are missing, for example "quant_conv.bias"')
    save_file(weights | {"quant_conv.bias": bias, "more": torch.zeros(1)}, folder / WEIGHTS)
    refused('1 weights are left over, for example "more"')
    save_file(weights | {"quant_conv.bias": bias[1:].clone()}, folder / WEIGHTS)
    refused(r'"quant_conv.bias" has shape \[7\], expected \[8\]')
    (folder / WEIGHTS).write_bytes(b"half a file")
    refused("is not a valid safetensors file")
    (folder / WEIGHTS).unlink()
    refused("holds no weights")
    (folder / "config.json").write_text("{half")
    refused("is not valid JSON")
    (folder / "config.json").unlink()
    refused("cannot be read")
    with pytest.raises(UserError, match="nowhere is no autoencoder's folder: .*cannot be read"):
        load_autoencoder(tmp_path / "nowhere")


@pytest.mark.parametrize("inside", ["model", "vae"])
def test_the_folder_around_it_is_answered_with_the_one_inside(inside, tmp_path):
    save_autoencoder(network(), tmp_path / "run" / inside)
    with pytest.raises(UserError, match=f"nearest: {Path(tmp_path / 'run' / inside)}"):
        load_autoencoder(tmp_path / "run")
