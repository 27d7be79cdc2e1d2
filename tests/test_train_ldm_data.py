"""train_ldm.py from the outside: data of one's own, diffusion in pixels, wrong input."""

import json

import pytest
import torch
from PIL import Image

import nanodiff
from nanodiff import worlds
from nanodiff.errors import UserError
from nanodiff.models.kl_autoencoder import Pixels
import train_ldm
from conftest import rows, state
from tiny_ldm import NAMES, make_parts, words


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Ten colour pictures of 20x16 pixels, a text beside each."""
    folder = tmp_path_factory.mktemp("captioned")
    pixels = torch.randint(256, (10, 16, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for i, one in enumerate(pixels):
        Image.fromarray(one.numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture of number {i}")
    return folder


# --- other data -----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_folder_of_captioned_pictures_is_data_and_random_crops_are_kept(parts, captioned, tmp_path):
    out = tmp_path / "run"
    train_ldm.main(words(parts, out, data=captioned, names=None, pictures=None, variants=2))
    assert [row["step"] for row in rows(out) if "validation" in row] == [0, 2, 4]
    assert not any("agreement" in row for row in rows(out))  # the classifier knows nothing of these
    assert nanodiff.load(out / "model").generate("number 3", steps=1, output="tensor").shape == (1, 3, 16, 16)


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_encoded(parts, captioned, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_ldm.main(words(parts, tmp_path / "run", data=captioned, names=None, pictures=None, batch=11))
    assert stop.value.code == 2 and "--batch 11 is more than the 10 pictures" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_batch_of_all_pictures_is_possible(parts, captioned, tmp_path):
    train_ldm.main(words(parts, tmp_path / "run", data=captioned, names=None, pictures=None, batch=10, steps=2))
    assert state(tmp_path / "run")["run"]["step"] == 2


def test_without_captions_a_folder_is_refused(parts, captioned, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    for i in range(4):
        (tmp_path / f"bare/{i}.png").write_bytes((captioned / f"{i}.png").read_bytes())
    with pytest.raises(SystemExit) as stop:
        train_ldm.main(words(parts, tmp_path / "run", data=tmp_path / "bare", names=None, pictures=None))
    assert stop.value.code == 2 and "the training pictures of --data" in capsys.readouterr().err
    for split in ("train", "val"):
        (tmp_path / "half" / split).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(tmp_path / "half" / split / f"{i}.png")
            if split == "train":
                (tmp_path / "half" / split / f"{i}.txt").write_text("a red thing")
    with pytest.raises(SystemExit) as stop:
        train_ldm.main(words(parts, tmp_path / "run", data=tmp_path / "half", names=None, pictures=None))
    assert stop.value.code == 2 and "the held-out pictures of --data" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- in pixels ------------------------------------------------------------------------------------------------------

def test_pixels_are_their_own_latents():
    net, x = Pixels(), torch.rand(2, 3, 5, 7) * 2 - 1
    assert net.config.factor == 1 and not list(net.parameters()) and torch.equal(net.decode(x), x)
    assert torch.equal(net.encode(x).mode(), x) and torch.allclose(net.encode(x).sample(), x, atol=1e-5)


@pytest.mark.slow
def test_without_an_autoencoder_pictures_are_trained_on_as_they_are_and_the_folder_draws_again(
        parts, tmp_path, monkeypatch):
    trained, get = [], train_ldm.Batches.get

    def watched(self, step, micro=0):
        found = get(self, step, micro)
        trained.append(found[:2])
        return found

    monkeypatch.setattr(train_ldm.Batches, "get", watched)
    model = train_ldm.train(train_ldm.parse(train_ldm.Config, words(
        parts, tmp_path / "run", autoencoder="none", preview_every=100))[0])
    data = worlds.load("train", 16, 24, NAMES.split(","))
    for x, index in trained:
        assert torch.equal(x, data.read(index, index))
    found = nanodiff.load(tmp_path / "run/model")
    assert isinstance(found.autoencoder, Pixels) and found.factor == 1 and found.unet.config.in_channels == 3
    drawn = found.generate("a striped texture", steps=2, seed=0, output="tensor")
    assert drawn.shape == (1, 3, 16, 16)
    assert torch.equal(drawn, model.generate("a striped texture", steps=2, seed=0, output="tensor"))
    assert json.loads((tmp_path / "run/model/model_index.json").read_text())["vae"] == ["nanodiff", "Pixels"]
    with pytest.raises(UserError, match="Pixels"):
        found.save(tmp_path / "one.safetensors", layout="single")
    assert not (tmp_path / "one.safetensors").exists()


# --- wrong input ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, expected", [
    ({"prediction": "nois"}, "nearest: noise"),
    ({"prediction": "x0"}, "expected noise or v"),
    ({"prediction": "noise", "zero_snr": True}, "--prediction v"),
    ({"schedule": "cosin"}, "nearest: cosine"),
    ({"sampler": "dpm++2"}, "nearest: dpm++2m"), ({"optimiser": "moun"}, "nearest: muon"),
    ({"shift": 0}, "--shift is 0"), ({"shift": "inf"}, "--shift is inf; expected a number from 0.01 to 100"),
    ({"sample_steps": 0}, "--sample_steps is 0"),
    ({"sample_steps": 1001}, "from 1 to 1000"),
    ({"caption_dropout": 1}, "--caption_dropout is 1"),
    ({"names": "stripped"}, "nearest: striped"),
    ({"pictures": 3}, "--pictures is 3"),
    ({"variants": 0}, "--variants is 0"),
    ({"snr_gamma": -1}, "--snr_gamma is -1"),
    ({"noise_offset": -1}, "--noise_offset is -1"),
    ({"channels": "8;8"}, "--channels"),
    ({"channels": ""}, "--channels"),
    ({"attention": "7"}, "attention at level 7"),
    ({"size": 18}, "such as 16"),
    ({"text": "scratch", "train_text": True}, "--text scratch"),
    ({"text": "scratch", "text_width": 7}, "--text_width is 7"),
    ({"text": "nowhere"}, "nowhere holds no text encoder"),
    ({"autoencoder": "nowhere"}, "nowhere"),
    ({"data": "nowhere", "names": None}, "nowhere"),
    ({"data": "mnist", "names": None}, "have no captions"),
    ({"data": "woven"}, "--names is for the drawn worlds"),
])
def test_wrong_flags_end_with_one_sentence_before_anything_is_written(parts, tmp_path, capsys, change, expected):
    with pytest.raises(SystemExit) as stop:
        train_ldm.main(words(parts, tmp_path / "run", **change))
    output = capsys.readouterr()
    assert stop.value.code == 2 and expected in output.err and output.err.strip().count("\n") == 0
    assert not (tmp_path / "run").exists() and "drawing" not in output.out


def test_an_autoencoder_with_a_codebook_is_refused(parts, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_ldm.main(words(parts, tmp_path / "run", autoencoder=parts / "codes"))
    assert stop.value.code == 2 and "--regulariser kl" in capsys.readouterr().err and not (tmp_path / "run").exists()
