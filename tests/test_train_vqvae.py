"""train_vqvae.py from the outside: exact resume, the loss of the paper, what is logged and drawn, wrong input."""

import json

import pytest
import torch

import train_vqvae as script
from conftest import rows, state
from nanodiff.formats.model_folder import load_model
from nanodiff.metrics import codebook as measures
from nanodiff.models.vqvae import VQVAE, VQVAEConfig
from nanodiff.training import datasets


def words(folder, out, **changes):
    """Flags of a training that takes a second."""
    flags = {"data": folder, "out": out, "size": 12, "channels": 8, "residual_layers": 1, "residual_channels": 4,
             "codes": 12, "code_channels": 4, "batch": 4, "steps": 6, "workers": 0, "log_every": 1, "preview_every": 4,
             "checkpoint_every": 2, "patience": 2, "device": "cpu", **changes}
    return [f"--{name}={value}" for name, value in flags.items()]


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def straight(picture_folder, tmp_path_factory):
    """A run of six steps without a break, whose codebook follows running means and revives its dead."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    script.main(words(picture_folder, out, codebook="ema", ema=0.9))
    return out


# --- exact resume ----------------------------------------------------------------------------------------------------

def test_dead_codes_were_revived_on_the_way(straight):
    start = VQVAE(script.sizes(script.Config(**arguments(straight)), 1), torch.Generator().manual_seed(0))
    moved = (state(straight)["net"]["codebook.embedding.weight"] - start.codebook.embedding.weight).abs().amax(1)
    assert int((moved > 0).sum()) > 6  # of 12: far more than the first steps used
    assert state(straight)["net"]["codebook.idle"].max() < 2


def arguments(out):
    return {name: value for name, value in read(out / "config.json").items() if name != "script"}


# --- the loss --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("times", [1, 10])
def test_the_codebook_learns_at_its_own_rate(picture_folder, tmp_path, times):
    script.main(words(picture_folder, tmp_path / "run", steps=1, lr=1e-3, codebook_lr_scale=times))
    before = VQVAE(script.sizes(script.Config(**arguments(tmp_path / "run")), 1), torch.Generator().manual_seed(0))
    after = load_model(tmp_path / "run" / "model", VQVAE, VQVAEConfig)
    moved = {name: (after.state_dict()[name] - was).abs().max().item() for name, was in before.state_dict().items()}
    # Adam's first step is the learning rate itself, wherever there is a gradient
    assert moved["codebook.embedding.weight"] == pytest.approx(times * 1e-3, rel=1e-3)
    assert moved["into_code.weight"] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("codebook", ["gradient", "ema"])
def test_micro_batches_give_the_step_of_their_whole(picture_folder, tmp_path, codebook):
    for name, batch, accumulate in (("whole", 8, 1), ("parts", 2, 4)):
        script.main(words(picture_folder, tmp_path / name, batch=batch, gradient_accumulation=accumulate, steps=1,
                          codebook=codebook, preview_every=100))
    whole, parts = (state(tmp_path / name)["net"] for name in ("whole", "parts"))
    for name in whole:  # Adam's first step has the length of the rate, whatever the gradient's
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-4)
    one, other = (rows(tmp_path / name)[1] for name in ("whole", "parts"))
    assert one["nmse"] == pytest.approx(other["nmse"], rel=1e-5)
    assert one["perplexity"] == pytest.approx(other["perplexity"])


# --- what is left in the folder --------------------------------------------------------------------------------------

def test_a_run_leaves_its_numbers_figures_and_a_model(picture_folder, straight):
    numbers = read(straight / "numbers.json")
    net = load_model(straight, VQVAE, VQVAEConfig)
    held = datasets.load(str(picture_folder), "train", size=12, captions=None)  # the folder has no test pictures
    again, codes = measures.measure(net, held, measures.pixel_variance(held))
    assert numbers["held_out"] == pytest.approx(again) and codes.shape == (10, 3, 3)
    log = [row for row in rows(straight) if "nmse" in row]
    assert [row["step"] for row in log] == list(range(6))
    assert numbers["last_updates"]["nmse"] == pytest.approx(sum(row["nmse"] for row in log) / 6)
    assert [row["step"] for row in rows(straight) if "held_out_nmse" in row] == [0, 4, 6]
    for name in ("reconstructions.png", "codebook.png", "curves.png", "previews/00000004.png"):
        assert (straight / name).stat().st_size > 100


def test_several_betas_make_one_run_each_and_a_table(picture_folder, tmp_path, capsys):
    script.main(words(picture_folder, tmp_path / "study", steps=2, beta="0.1,2", preview_every=100))
    found = read(tmp_path / "study" / "betas.json")
    assert [one["beta"] for one in found] == [0.1, 2.0] and all(0 < one["held_out"]["nmse"] for one in found)
    assert "| 0.1 | " in capsys.readouterr().out and (tmp_path / "study" / "betas.png").exists()
    first, second = (rows(tmp_path / "study" / f"beta-{beta}") for beta in ("0.1", "2"))
    assert first[1]["nmse"] == second[1]["nmse"] and first[-1] != second[-1]  # the same start, other ends


# --- wrong input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, expected", [
    ({"codebook": "emma"}, "nearest: ema"),
    ({"beta": "0.1;2"}, '--beta is "0.1;2"'),
    ({"beta": "1,1"}, "several different ones"),
    ({"beta": "-1"}, "--beta is -1.0; expected 0 or more"),
    ({"decay": 1}, "--decay is 1.0"),
    ({"size": 10}, "--size is 10; expected a multiple of 4, such as 8"),
    ({"size": 0}, None),
    ({"codes": 0}, "codes is 0"),
    ({"channels": 7}, "an even width"),
    ({"batch": 11}, "--batch 10"),
    ({"steps": 0}, "--steps is 0"),
    ({"data": "mnits"}, "nearest: mnist"),
    ({"codebook_lr_scale": 0}, "--codebook_lr_scale is 0.0; expected a number above 0"),
])
def test_wrong_flags_end_with_one_sentence_before_anything_is_written(
        picture_folder, tmp_path, capsys, change, expected):
    folder = picture_folder
    if expected is None:  # pictures of a side that does not fit, in their own size
        folder = odd_pictures(tmp_path / "odd")
        expected = "pictures of 1x10x12 (channels, height, width) do not fit this VQ-VAE"
    with pytest.raises(SystemExit) as stop:
        script.main(words(folder, tmp_path / "run", **change))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_several_betas_are_trained_in_one_process(picture_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        script.main(words(picture_folder, tmp_path / "run", beta="0.1,1"))
    assert stop.value.code == 2 and "expected python, not torchrun" in capsys.readouterr().err


def test_pictures_of_one_grey_are_refused_before_anything_is_written(tmp_path, capsys):
    from PIL import Image
    (tmp_path / "grey").mkdir()
    for i in range(12):
        Image.new("L", (8, 8), 90).save(tmp_path / "grey" / f"{i}.png")
    with pytest.raises(SystemExit) as stop:
        script.main(words(tmp_path / "grey", tmp_path / "run"))
    assert stop.value.code == 2 and "are of one grey level" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def odd_pictures(folder):
    from PIL import Image
    folder.mkdir()
    for i in range(4):
        Image.new("L", (12, 10), 40 * i).save(folder / f"{i}.png")
    return folder


def test_cifar_starts_from_the_authors_numbers_and_flags_still_win(capsys, monkeypatch):
    found = []
    monkeypatch.setattr(script, "train", found.append)
    for flags in (["--data=cifar10"], ["--data=cifar10", "--steps=7"], []):
        script.main(flags)
    assert [(config.steps, config.batch) for config in found] == [(900, 256), (7, 256), (400, 128)]
    assert found[0].lr == 1e-3 and found[0].lr_end == 1 and script.sizes(found[0], 3) == VQVAEConfig()
