"""Folders of small networks: what is written comes back, and another network's folder is refused in one sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import same
from nanodiff.errors import UserError
from nanodiff.formats.model_folder import load_model, save_model
from nanodiff.models.autoencoder import Autoencoder, AutoencoderConfig
from nanodiff.models.vae import VAE, VAEConfig

SMALL = dict(shape=(1, 4, 4), widths=(6,), latent=2)


@pytest.fixture
def folder(tmp_path):
    save_model(VAE(VAEConfig(**SMALL), torch.Generator().manual_seed(0)), tmp_path / "run" / "model")
    return tmp_path / "run" / "model"


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_a_network_comes_back_bit_for_bit_frozen_and_with_its_sizes(folder):
    net = load_model(folder, VAE, VAEConfig)
    assert same(dict(net.state_dict()), dict(VAE(VAEConfig(**SMALL), torch.Generator().manual_seed(0)).state_dict()))
    assert net.config == VAEConfig(**SMALL) and type(net.config.shape) is tuple
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_the_folder_of_a_run_leads_to_its_model(folder):
    assert same(dict(load_model(folder.parent, VAE, VAEConfig).state_dict()),
                dict(load_model(folder, VAE, VAEConfig).state_dict()))


def test_saving_again_replaces_the_model_and_leaves_nothing_else(folder):
    other = VAE(VAEConfig(**SMALL), torch.Generator().manual_seed(1))
    save_model(other, folder)
    assert same(dict(load_model(folder, VAE, VAEConfig).state_dict()), dict(other.state_dict()))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_the_folder_of_another_network_is_refused(folder):
    with pytest.raises(UserError, match="holds a VAE; expected a Autoencoder|holds a VAE; expected an Autoencoder"):
        load_model(folder, Autoencoder, AutoencoderConfig)
    change(folder, model=None)
    with pytest.raises(UserError, match="no model of this kind; expected a VAE"):
        load_model(folder, VAE, VAEConfig)


def test_weights_of_other_sizes_are_refused_with_both_shapes(folder):
    change(folder, latent=3)
    with pytest.raises(UserError, match=r"has shape \[6, 2\], expected \[6, 3\]|has shape \[4, 6\], expected \[6, 6\]"):
        load_model(folder, VAE, VAEConfig)


@pytest.mark.parametrize("settings, expected", [
    ({"colour": 1}, "colour"), ({"net": "cnn"}, 'the network "cnn" is unknown'), ({"latent": 0}, "latent 0"),
    ({"latent": "two"}, "holds no sizes of a VAE"), ({"widths": 5}, "holds no sizes of a VAE"),
    ({"latent": 1.5}, "holds no sizes of a VAE")])
def test_sizes_that_no_network_has_are_refused_with_the_folders_name(folder, settings, expected):
    change(folder, **settings)
    with pytest.raises(UserError) as error:
        load_model(folder, VAE, VAEConfig)
    assert expected in str(error.value) and str(folder) in str(error.value)


def test_a_setting_that_lacks_a_missing_weight_and_an_empty_folder_are_refused(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if name != "encoder.1.bias"},
              folder / "model.safetensors")
    with pytest.raises(UserError, match="encoder.1.bias"):
        load_model(folder, VAE, VAEConfig)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="model.safetensors"):
        load_model(folder, VAE, VAEConfig)
    with pytest.raises(UserError, match="config.json"):
        load_model(tmp_path / "nowhere", VAE, VAEConfig)
