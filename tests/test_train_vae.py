"""train_vae.py from the outside: exact resume, the loss of both equations, what it measures and draws, wrong input."""

import json
import math

import pytest
import torch

import train_vae as script
from conftest import rows, steps_begun
from nanodiff.formats.model_folder import load_model
from nanodiff.metrics import vae_elbo
from nanodiff.models.autoencoder import cross_entropy, drawn, entropy
from nanodiff.models.vae import VAE, VAEConfig, log_normal
from nanodiff.report import figures_vae
from nanodiff.training import datasets


def words(folder, out, **changes):
    """Flags of a training that takes less than a second: more than two passes over the ten pictures of 12x12 pixels."""
    flags = {"data": folder, "out": out, "widths": "16", "latent": 3, "batch": 4, "steps": 7, "workers": 0,
             "log_every": 1, "preview_every": 3, "checkpoint_every": 2, "importance": 5, "device": "cpu", **changes}
    plain = [f"--{name}={value}" for name, value in flags.items() if type(value) is not bool]
    return plain + [f"--{name}" if value else f"--no-{name}" for name, value in flags.items() if type(value) is bool]


def saved(out):
    return load_model(out, VAE, VAEConfig)


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


# --- the loss --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_without_the_kl_the_noise_in_the_latents_dies_and_with_it_it_stays(picture_folder, tmp_path):
    left = {}
    for weight in (0, 1):
        script.main(words(picture_folder, tmp_path / f"{weight}", kl_weight=weight, steps=300, lr=1e-2, batch=10,
                          preview_every=300, checkpoint_every=300, log_every=300, tsne=0, importance=0))
        left[weight] = json.loads((tmp_path / f"{weight}" / "vae.json").read_text())["deviation"]
    assert left[0] < 0.05 < 0.15 < left[1]


# --- what is measured -------------------------------------------------------------------------------------------------

def test_the_numbers_are_those_of_the_saved_model(picture_folder, straight):
    numbers, net = json.loads((straight / "vae.json").read_text()), saved(straight).double()
    held_out = datasets.load_splits(str(picture_folder))[1]
    x = held_out.read(torch.arange(10), torch.arange(10)).double()
    level, q = (x + 1) / 2, net.encode(x)
    found = numbers["held_out"]
    assert found["kl"] == pytest.approx(float(q.kl().mean()), rel=1e-5)
    assert found["floor"] == pytest.approx(float(entropy(level).mean()), rel=1e-6)
    assert found["minus_elbo"] == pytest.approx(found["reconstruction"] + found["kl"])
    z = q.mean + torch.exp(0.5 * q.logvar) * torch.randn(2000, 10, 3, generator=torch.Generator().manual_seed(0))
    assert found["reconstruction"] == pytest.approx(float(cross_entropy(net.decode(z), level).mean()), rel=0.02)
    assert sum(numbers["kl_of_each"]) == pytest.approx(found["kl"], rel=1e-4)
    assert numbers["batch_of_32"] == 32 * numbers["train"]["minus_elbo"]
    assert numbers["bound"]["draws"] == 5 and numbers["bound"]["pictures"] == 10


class Crosses:
    """One picture of 2x2 pixels, 200 times."""

    def __len__(self):
        return 200

    def read(self, index, draw):
        return torch.tensor([1.0, -1, -1, 1]).view(1, 1, 2, 2).expand(len(index), 1, 2, 2)


def test_the_weighted_bound_is_between_log_p_and_the_elbo():
    net = VAE(VAEConfig("mlp", (1, 2, 2), (5,), 1), torch.Generator().manual_seed(0))
    with torch.no_grad():
        net.decoder[0].weight.mul_(8)
    grid = torch.linspace(-9, 9, 4001)
    level = (Crosses().read([0], [0]) + 1) / 2
    log_joint = log_normal(grid[:, None], 0.0, 0.0) - cross_entropy(net.decode(grid[:, None]), level)
    minus_log_p = -torch.logsumexp(log_joint.double(), 0).item() - math.log(18 / 4000)
    few, many = (vae_elbo.measure_bound(net, Crosses(), k, 0) for k in (2, 100))
    assert minus_log_p - 0.01 < many["minus_log_p"] < few["minus_log_p"] < few["minus_elbo"]
    assert many["minus_log_p"] == pytest.approx(minus_log_p, abs=0.03)


def test_the_map_has_the_pictures_and_labels_and_figures_are_there(straight):
    found, numbers = (json.loads((straight / name).read_text()) for name in ("figure12_tsne.json", "vae.json"))
    assert torch.tensor(found["y"]).shape == (10, 2) and sorted(found["label"]) == [0] * 5 + [1] * 5
    assert numbers["map"]["pictures"] == 10 and numbers["map"]["perplexity"] == 3
    assert {"figure10_losses.png", "figure11_reconstructions.png", "figure12_tsne.png", "prior_samples.png",
            "traversals.png"} <= {path.name for path in straight.iterdir()}
    measured = [row for row in rows(straight) if "held_out" in row]
    assert [row["step"] for row in measured] == [3, 6, 7]
    assert all(row[part]["minus_elbo"] > row[part]["floor"] for row in measured for part in ("train", "held_out"))


def test_traversals_change_one_number_at_a_time_those_with_the_largest_kl_first(monkeypatch):
    net = VAE(VAEConfig("mlp", (1, 2, 2), (5,), 3), torch.Generator().manual_seed(0))
    seen = []
    monkeypatch.setattr(figures_vae.plots, "sheet", lambda table, *labels: seen.append((table, labels)))
    start = torch.tensor([0.1, 0.2, 0.3])
    figures_vae.traversals(net, start, torch.tensor([0.0, 5.0, 1.0]), rows=2, columns=3)
    table, labels = seen[0]
    assert labels == (["z1, KL 5.00", "z2, KL 1.00"], ["-3.0", "0.0", "3.0"])
    assert torch.allclose(table[0][2], drawn(net, torch.tensor([[0.1, 3, 0.3]]))[0], atol=1e-6)
    assert torch.allclose(table[1][0], drawn(net, torch.tensor([[0.1, 0.2, -3]]))[0], atol=1e-6)


def test_samples_of_the_prior_depend_on_seed_and_number_alone():
    net = VAE(VAEConfig("mlp", (1, 2, 2), (5,), 3), torch.Generator().manual_seed(0))
    assert torch.allclose(script.generate(net, 9, 0)[:4], script.generate(net, 4, 0), atol=1e-6)
    assert not torch.allclose(script.generate(net, 4, 1), script.generate(net, 4, 0))


def test_one_picture_is_enough(picture_folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0.png").write_bytes((picture_folder / "blobs" / "0.png").read_bytes())
    script.main(words(tmp_path / "data", tmp_path / "run", batch=1, steps=2))
    assert (tmp_path / "run" / "traversals.png").exists()


# --- wrong input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, expected", [
    ({"net": "covn"}, "nearest: conv"), ({"widths": "x"}, "--widths"), ({"latent": -2}, "--latent is -2"),
    ({"net": "conv", "widths": "4,6,8"}, "pictures of 1x12x12 do not fit 3 halvings of the side: 8 must divide both"),
    ({"samples": 0}, "--samples is 0"), ({"kl_weight": -1}, "--kl_weight is -1"), ({"kl_weight": "nan"}, "is nan"),
    ({"importance": -1}, "--importance is -1"), ({"tsne": -1}, "--tsne is -1"), ({"epochs": 0}, "--epochs is 0"),
    ({"batch": 11}, "--batch 10")])
def test_wrong_flags_end_in_one_sentence_before_anything_is_written(picture_folder, tmp_path, capsys, change, expected):
    with pytest.raises(SystemExit) as stop:
        script.main(words(picture_folder, tmp_path / "run", **change))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_defaults_are_the_reports_networks(monkeypatch):
    found = []
    monkeypatch.setattr(script, "train", found.append)
    for flags in ([], ["--net=conv"], ["--net=conv", "--data=cifar10"], ["--latent=2", "--batch=5"]):
        script.main(flags)
    assert [(one.widths, one.latent, one.batch) for one in found] == [
        ((400,), 20, 128), ((12, 24), 20, 32), ((12, 24, 48), 512, 32), ((400,), 2, 5)]
