"""A VQGAN as one thing: its pictures follow from their numbers, it is loaded as it was saved, its parts must fit."""

import json

import pytest
import torch

from nanodiff.errors import UserError
from nanodiff.formats.model_folder import save_model
from nanodiff.models.gpt import GPT, GPTConfig
from nanodiff.models.vqvae import VQVAE, VQVAEConfig
from nanodiff.pipelines import vqgan
from nanodiff.pipelines.vqgan import VQGAN


def parts(codes=7, length=6, classes=2, written=7):
    generator = torch.Generator().manual_seed(0)
    autoencoder = VQVAE(VQVAEConfig(1, 8, 1, 4, codes, 5), generator)
    gpt = GPT(GPTConfig(written, length, classes, 8, 1, 2), generator)
    with torch.no_grad():
        autoencoder.codebook.embedding.weight.mul_(20)
        for p in gpt.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=generator))
    return autoencoder.eval(), gpt.eval()


@pytest.fixture(scope="module")
def model():
    return VQGAN(*parts(), (1, 8, 12), ["a", "b"], "toy")


def test_a_picture_depends_on_its_number_its_class_and_the_seed_alone(model):
    x = model.generate(5, seed=3)
    assert x.shape == (5, 1, 8, 12) and x.abs().max() <= 1
    torch.testing.assert_close(model.generate(5, seed=3, batch=2), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.generate(2, seed=3, first=3), x[3:], rtol=0, atol=1e-6)
    assert not torch.allclose(model.generate(5, seed=4), x)
    assert not torch.allclose(model.generate(5, seed=3, label=torch.ones(5, dtype=torch.int64))[::2], x[::2])


def test_what_is_saved_is_loaded_and_draws_the_same(model, tmp_path):
    vqgan.save(model, tmp_path / "run" / "model")
    for place in (tmp_path / "run", tmp_path / "run" / "model"):
        again = vqgan.load(place)
        assert torch.equal(again.generate(3), model.generate(3))
        assert (again.shape, again.classes, again.data) == ((1, 8, 12), ["a", "b"], "toy")


@pytest.mark.parametrize("change", [{"written": 9}, {"length": 5}, {"classes": 3}])
def test_a_gpt_over_other_codes_is_refused_with_both_named(change, tmp_path, model):
    autoencoder, gpt = parts(**change)
    found = {"length": 6, "written": 7, "classes": 2} | change
    expected = ("the GPT writes {length} codes out of {written} in {classes} classes, but the autoencoder draws its "
                "pictures from 6 codes out of 7 in 2 classes").format(**found)
    with pytest.raises(UserError, match=expected):
        VQGAN(autoencoder, gpt, (1, 8, 12), ["a", "b"])
    vqgan.save(model, tmp_path)
    save_model(gpt, tmp_path / "gpt")
    with pytest.raises(UserError, match=expected):
        vqgan.load(tmp_path)


def test_pictures_that_the_autoencoder_cannot_draw_are_refused():
    with pytest.raises(UserError, match="pictures of 3x8x12"):
        VQGAN(*parts(), (3, 8, 12), ["a", "b"])


def test_folders_of_other_models_are_refused(model, tmp_path):
    save_model(model.autoencoder, tmp_path / "vqvae")
    with pytest.raises(UserError, match="nanodiff.json cannot be read"):
        vqgan.load(tmp_path / "vqvae")
    (tmp_path / "nanodiff.json").write_text(json.dumps({"model": "DDPM", "shape": [1, 8, 12]}))
    with pytest.raises(UserError, match="holds no VQGAN; expected a run folder of train_vqgan.py"):
        vqgan.load(tmp_path)
    vqgan.save(model, tmp_path / "swapped")
    save_model(model.gpt, tmp_path / "swapped" / "autoencoder")
    with pytest.raises(UserError, match="holds a GPT; expected a VQVAE"):
        vqgan.load(tmp_path / "swapped")
