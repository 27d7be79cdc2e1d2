"""train_autoencoder.py from the outside: exact resume, what it measures and draws, the models it saves, wrong input."""

import json

import pytest
import torch

import train_autoencoder as script
from conftest import rows, state, steps_begun
from nanodiff.formats.model_folder import load_model
from nanodiff.models.autoencoder import Autoencoder, AutoencoderConfig, cross_entropy, entropy
from nanodiff.training import datasets


def words(folder, out, **changes):
    """Flags of a training that takes less than a second: more than two passes over the ten pictures of 12x12 pixels."""
    flags = {"data": folder, "out": out, "widths": "16,8", "latent": 3, "batch": 4, "steps": 7, "workers": 0,
             "log_every": 1, "preview_every": 3, "checkpoint_every": 2, "device": "cpu", **changes}
    return [f"--{name}={value}" if value is not True else f"--{name}" for name, value in flags.items()]


def saved(out):
    return load_model(out, Autoencoder, AutoencoderConfig)


@pytest.fixture(scope="module")
def straight(picture_folder, tmp_path_factory):
    """A run of seven steps without a break."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    script.main(words(picture_folder, out))
    return out


@pytest.mark.parametrize("accumulation, steps", [(1, 15), (2, 10)])
def test_an_epoch_is_every_picture_once(picture_folder, tmp_path, monkeypatch, accumulation, steps):
    """Ten pictures in batches of 4, over all processes: three steps, or two of two batches each."""
    flags = words(picture_folder, tmp_path / "run", steps=0, epochs=5, gradient_accumulation=accumulation)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert steps_begun(script, flags, monkeypatch) == steps


# --- what is trained -------------------------------------------------------------------------------------------------

def test_epochs_become_steps_and_each_ends_with_a_measurement(picture_folder, tmp_path):
    script.main(words(picture_folder, tmp_path / "run", steps=0, epochs=2, preview_every=0))
    assert state(tmp_path / "run")["run"]["step"] == 6  # ten pictures in batches of four: three steps
    measured = [row for row in rows(tmp_path / "run") if "held_out" in row]
    assert [row["step"] for row in measured] == [3, 6] and [row["epoch"] for row in measured] == [1.2, 2.4]


def test_the_numbers_are_those_of_the_saved_model_in_nats_a_picture_beside_their_floor(picture_folder, straight):
    numbers, net = json.loads((straight / "reconstructions.json").read_text()), saved(straight)
    held_out = datasets.load_splits(str(picture_folder))[1]
    x = held_out.read(torch.arange(10), torch.arange(10))
    level = (x.double() + 1) / 2
    loss = float(cross_entropy(net.double()(x.double()), level).mean())
    assert numbers["held_out"] == pytest.approx(loss, rel=1e-6)
    assert numbers["held_out_floor"] == pytest.approx(float(entropy(level).mean()), rel=1e-6)
    assert numbers["batch_of_32"] == 32 * numbers["train"] and numbers["held_out"] > numbers["held_out_floor"]
    assert {"config.json", "model.safetensors"} == {path.name for path in (straight / "model").iterdir()}


def test_a_latent_of_two_is_drawn_as_a_map_with_its_numbers(picture_folder, tmp_path):
    script.main(words(picture_folder, tmp_path / "run", latent=2, latent_relu=True))
    found = json.loads((tmp_path / "run" / "latents.json").read_text())
    assert torch.tensor(found["z"]).shape == (10, 2) and torch.tensor(found["z"]).min() >= 0
    assert sorted(found["label"]) == [0] * 5 + [1] * 5 and (tmp_path / "run" / "latents.png").exists()
    assert saved(tmp_path / "run").config.latent_relu


def test_interpolations_start_and_end_at_the_reconstructions(monkeypatch):
    net = Autoencoder(AutoencoderConfig("mlp", (1, 4, 4), (6,), 2), torch.Generator().manual_seed(0))
    x, seen = torch.rand(4, 1, 4, 4) * 2 - 1, []
    monkeypatch.setattr(script.plots, "sheet", lambda table, **labels: seen.append(table))
    script.interpolations(net, x, columns=5)
    y = script.reconstructed(net, x)
    for i, row in enumerate(seen[0]):
        assert len(row) == 7 and torch.equal(row[0], x[2 * i]) and torch.equal(row[-1], x[2 * i + 1])
        assert torch.allclose(row[1], y[2 * i], atol=1e-6) and torch.allclose(row[-2], y[2 * i + 1], atol=1e-6)


def test_one_picture_is_enough(picture_folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").write_bytes((picture_folder / "blobs" / "0.png").read_bytes())
    script.main(words(tmp_path / "data", tmp_path / "run", batch=1, steps=2))
    assert (tmp_path / "run" / "interpolations.png").exists()


# --- wrong input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, expected", [
    ({"net": "mpl"}, "nearest: mlp"),
    ({"widths": "16;8"}, "--widths"), ({"widths": "16,0"}, "--widths"),
    ({"net": "conv", "widths": "4,6,8"}, "pictures of 1x12x12 do not fit 3 halvings of the side: 8 must divide both"),
    ({"latent": -1}, "--latent is -1"), ({"epochs": 0}, "--epochs is 0"), ({"steps": -1}, "--steps is -1"),
    ({"batch": 11}, "--batch 10"),
    ({"preview_every": -1}, "--preview_every is -1"), ({"size": -1}, "--size is -1"), ({"data": "mnits"}, "nearest: mnist")])
def test_wrong_flags_end_in_one_sentence_before_anything_is_written(picture_folder, tmp_path, capsys, change, expected):
    with pytest.raises(SystemExit) as stop:
        script.main(words(picture_folder, tmp_path / "run", **change))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_defaults_are_the_reports_networks(monkeypatch):
    found = []
    monkeypatch.setattr(script, "train", found.append)
    for flags in ([], ["--net=conv"], ["--net=conv", "--data=cifar10"], ["--net=conv", "--latent=7", "--batch=5"]):
        script.main(flags)
    assert [(one.widths, one.latent, one.batch) for one in found] == [
        ((500, 120), 32, 128), ((12, 24), 32, 32), ((12, 24, 48), 512, 32), ((12, 24), 7, 5)]
