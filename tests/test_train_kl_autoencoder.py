"""train_kl_autoencoder.py from the outside: exact resume, what a step sees, who hears whom, latents, wrong input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import train_kl_autoencoder as script
from conftest import same, state
from nanodiff import worlds
from nanodiff.formats.stable_diffusion_folder import load_autoencoder
from nanodiff.metrics.image_quality import psnr
from nanodiff.models.kl_autoencoder import KLAutoencoder, VQAutoencoder
from nanodiff.pixels import from_uint8
from nanodiff.training.run import Run
from nanodiff.training.step import EMA


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """Ten pictures of 32x32 pixels in colour, with something in them that can be learned."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    y, x = np.mgrid[:32, :32] / 32
    for i in range(10):
        waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-2, 2, (3, 3))]
        Image.fromarray((127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)).save(root / f"{i}.png")
    return root


def words(folder, out, **changes):
    """Flags of a training that takes a second: the discriminator learns from step 2 and is heard from step 3; the last
    step sees whole pictures."""
    flags = {"data": folder, "out": out, "size": 32, "crop": 16, "channels": "8,8", "latent_channels": 2, "batch": 4,
             "steps": 6, "disc_start": 0.33, "adversarial_start": 0.5, "whole": 0.17, "disc_channels": 8, "warmup": 2,
             "workers": 0, "log_every": 1, "preview_every": 100, "checkpoint_every": 2, "codes": 8, "device": "cpu",
             **changes}
    return [f"--{name}={value}" for name, value in flags.items()]


def log(out, key):
    return [row[key] for row in map(json.loads, open(out / "log.jsonl")) if key in row]


@pytest.fixture(scope="module")
def straight(colours, tmp_path_factory):
    """A run of six steps without a break: more than two passes over the ten pictures."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    script.main(words(colours, out))
    return out


# --- what a step sees ------------------------------------------------------------------------------------------------

def coordinates(n, side):
    """n pictures [n, 2, side, side] whose pixels say where they are, and their places in the batch."""
    place = torch.arange(side).float()
    x = torch.stack([place[:, None].expand(side, side), place.expand(side, side)])
    return x.expand(n, 2, side, side), torch.arange(100, 100 + n), torch.arange(n)


def corners(config, step, x, index, position):
    """The corner of each crop [n, 2]; every crop is a square cut out of its picture."""
    crops, index, kept = script.crop((x, index, position), config, step)
    assert crops.shape == (len(position), 2, config.crop, config.crop) and torch.equal(kept, position)
    square = torch.arange(config.crop).float()
    expected = torch.stack(torch.meshgrid(square, square, indexing="ij")).expand_as(crops)
    assert torch.equal(crops - crops[:, :, :1, :1], expected)
    return crops[:, :, 0, 0].long()


def test_crops_differ_from_step_to_step_and_reach_every_place_equally_often():
    config = script.Config(size=20, crop=16)
    found = torch.stack([corners(config, step, *coordinates(16, 20)) for step in range(300)])  # [steps, n, 2]
    counts = (5 * found[..., 0] + found[..., 1]).flatten().bincount(minlength=25)
    assert counts.numel() == 25  # 0 ... 4 in both directions, both ends among them
    expected = 300 * 16 / 25
    assert float(((counts - expected) ** 2 / expected).sum()) < 52.6  # chi squared with 24 degrees, 1 in 1,500
    assert abs(torch.corrcoef(found.flatten(0, 1).T.double())[0, 1]) < 0.05  # both directions by themselves
    large = script.Config(size=4000, crop=16)  # so many places that none comes twice
    many = torch.stack([corners(large, step, *coordinates(2, 4000)) for step in range(8)]).flatten(0, 1)
    assert len(many.unique(dim=0)) == 16


def test_where_a_crop_lies_follows_from_seed_step_and_position_alone():
    config, (x, index, position) = script.Config(size=32, crop=16, seed=3), coordinates(8, 32)
    found = corners(config, 5, x, index, position)
    turned = torch.arange(7, -1, -1)
    assert torch.equal(corners(config, 5, x, index + 7, position[turned])[turned], found)
    assert torch.equal(corners(config, 5, x[3:4], index[3:4], position[3:4]), found[3:4])
    for other, step in ((script.Config(size=32, crop=16, seed=4), 5), (config, 6)):
        assert not torch.equal(corners(other, step, x, index, position), found)


@pytest.mark.parametrize("batch, size, crop, left", [(16, 64, 32, 4), (8, 32, 16, 2), (4, 64, 16, 1), (6, 32, 32, 6)])
def test_whole_pictures_have_the_area_of_the_crops_before(batch, size, crop, left):
    config, (x, index, position) = script.Config(size=size, crop=crop), coordinates(batch, size)
    whole, names, places = script.crop((x, index, position), config, config.steps - 1)
    assert torch.equal(whole, x[:left]) and torch.equal(names, index[:left]) and torch.equal(places, position[:left])
    assert whole[:, 0].numel() == max(batch * crop**2, size**2)  # one at least
    config.crop = 0
    assert script.crop((x, index, position), config, config.steps - 1)[0] is x


@pytest.mark.slow
def test_the_last_steps_and_a_crop_of_0_show_the_network_whole_pictures(colours, tmp_path, monkeypatch):
    shapes, plain = [], script.crop
    monkeypatch.setattr(script, "crop", lambda *args: [shapes.append(tuple((y := plain(*args))[0].shape)), y][1])
    script.main(words(colours, tmp_path / "run", whole=0.34))
    assert shapes == [(4, 3, 16, 16)] * 4 + [(1, 3, 32, 32)] * 2
    shapes.clear()
    script.main(words(colours, tmp_path / "whole", crop=0, steps=2))
    assert shapes == [(4, 3, 32, 32)] * 2


# --- the discriminator -----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_neither_step_leaves_gradients_in_the_other_or_moves_it(colours, tmp_path, monkeypatch):
    parts, updates = {}, []
    plain_update, plain_track = Run.update, Run.track

    def track(self, **tracked):
        parts.update(tracked)
        plain_track(self, **tracked)

    def update(self, net, optimiser, lr):
        kind, other = ("net", "disc") if net is parts["net"] else ("disc", "net")
        assert all(p.grad is None or not p.grad.any() for p in parts[other].parameters())
        assert any(p.grad is not None and p.grad.any() for p in net.parameters())
        before = {name: tensor.clone() for name, tensor in parts[other].state_dict().items()}
        plain_update(self, net, optimiser, lr)
        assert same(dict(parts[other].state_dict()), before)
        updates.append((self.step, kind))

    monkeypatch.setattr(Run, "track", track)
    monkeypatch.setattr(Run, "update", update)
    script.main(words(colours, tmp_path / "run", gradient_accumulation=2, batch=2, whole=0))
    assert updates == [(step, kind) for step in range(6) for kind in ("net", "disc") if kind == "net" or step >= 2]


@pytest.mark.slow
def test_the_discriminator_may_learn_before_it_is_heard_and_then_pulls_the_autoencoder(colours, tmp_path, monkeypatch):
    pulls, plain = [], script.adaptive_weight

    def spied(reconstruction, opinion, last, average):
        pulls.append(torch.autograd.grad(opinion, last, retain_graph=True)[0].norm().item())
        return plain(reconstruction, opinion, last, average)

    monkeypatch.setattr(script, "adaptive_weight", spied)
    out = tmp_path / "run"
    script.main(words(colours, out, disc_start=0.2, adversarial_start=0.66, preview_every=100))
    assert len(log(out, "disc")) == 4 and len(log(out, "weight")) == 2  # steps 2 ... 5, and 4 and 5
    assert len(pulls) == 2 and min(pulls) > 0
    assert all(0 < weight < 1e4 for weight in log(out, "weight"))
    script.main(words(colours, tmp_path / "deaf", disc_start=0.2, adversarial_start=1, preview_every=100))
    assert log(out, "loss")[:4] == log(tmp_path / "deaf", "loss")[:4]
    assert not same(state(out)["net"], state(tmp_path / "deaf")["net"])


@pytest.mark.slow
def test_without_the_adversarial_term_the_discriminator_never_learns(colours, tmp_path):
    script.main(words(colours, tmp_path / "none", adversarial=0))
    script.main(words(colours, tmp_path / "one", adversarial=0, steps=1))
    assert log(tmp_path / "none", "disc") == [] and state(tmp_path / "none")["disc_optimiser"]["state"] == {}
    assert same(state(tmp_path / "none")["disc"], state(tmp_path / "one")["disc"])


@pytest.mark.slow
def test_the_error_is_the_mean_difference_and_the_perceptual_distance():
    config = script.Config(perceptual=0.5)
    x, y = torch.zeros(2, 3, 16, 16), torch.full((2, 3, 16, 16), 0.25)
    assert float(script.error(y, x, None, config)) == 0.25
    assert float(script.error(y, x, lambda a, b: (a - b).square().flatten(1).sum(1), config)) == 0.25 + 0.5 * 48
    assert float(script.error(x, x, None, config)) == 0


@pytest.mark.slow
def test_half_a_latent_is_asked_to_be_half_the_picture(colours, straight, tmp_path, monkeypatch):
    seen = []
    error = script.error
    monkeypatch.setattr(script, "error", lambda y, x, *rest: seen.append((y, x)) or error(y, x, *rest))
    script.main(words(colours, tmp_path / "run", steps=2))
    assert len(seen) == 4  # for each step: whole, halved
    for (y, x), (small, smaller) in zip(seen[::2], seen[1::2]):
        assert small.shape == smaller.shape and 2 * small.shape[-1] == y.shape[-1]
        assert torch.equal(smaller, torch.nn.functional.avg_pool2d(x, 2))
    seen.clear()
    script.main(words(colours, tmp_path / "none", steps=2, equivariance=0))
    assert len(seen) == 2
    assert log(tmp_path / "none", "loss") != log(straight, "loss")[:2]


@pytest.mark.slow
def test_pictures_survive_the_start_of_the_adversarial_term(colours, tmp_path):
    out = tmp_path / "run"
    script.main(words(colours, out, steps=300, disc_start=0.3, adversarial_start=0.33, whole=0, log_every=50, lr=3e-3,
                      size=16, batch=2, ema=0.9, preview_every=100, perceptual=0, checkpoint_every=400))
    before = log(out, "psnr")[1]  # at step 100, when the term comes in: 200 are left
    held = script.load_data(script.Config(data=str(colours), size=16))[1]
    x = held.read(torch.arange(10), torch.arange(10))
    after = float(psnr(script.reconstruct(load_autoencoder(out / "model"), x), x, 2).mean())
    assert before > log(out, "psnr")[0] + 3 and after > before - 6  # an error less than twice as large


# --- what is trained -------------------------------------------------------------------------------------------------

def test_latents_end_at_unit_variance_with_no_channel_dead_and_reconstructions_unchanged(straight):
    numbers = json.loads((straight / "reconstructions.json").read_text())
    assert all(0.8 < std < 1.25 for std in numbers["latents"]["std"]) and len(numbers["latents"]["std"]) == 2
    assert all(abs(mean) < 0.1 for mean in numbers["latents"]["mean"])
    assert all(std > 0 for std in numbers["latents_before"]["std"])
    net = load_autoencoder(straight / "model")
    assert type(net) is KLAutoencoder and net.config.scaling_factor == 1 and net.config.factor == 2
    held = script.load_data(script.Config(data=json.loads((straight / "config.json").read_text())["data"], size=32))[1]
    x = held.read(torch.arange(10), torch.arange(10))
    z = net.encode(x).sample(torch.Generator().manual_seed(1))
    assert all(0.8 < std < 1.25 for std in z.std((0, 2, 3)).tolist())
    average = EMA(net, 0.9)
    average.load_state_dict(state(straight)["ema"])  # as it was trained, before its latents were balanced
    y = script.reconstruct(net, x)
    torch.testing.assert_close(y, script.reconstruct(average.net, x), rtol=0, atol=1e-4)
    assert numbers["groups"]["all"]["psnr"] == pytest.approx(float(psnr(y, x, 2).mean()), abs=1e-3)
    assert {path.name for path in straight.iterdir()} >= {"model", "reconstructions.png", "curves.png", "log.jsonl"}


@pytest.mark.slow
@pytest.mark.parametrize("changes, factor", [
    ({"channels": "16"}, 1), ({"channels": "8,8,8,8,8,8", "crop": 32, "batch": 2}, 32), ({"regulariser": "vq"}, 2),
    ({"size": 20, "crop": 20, "channels": "4,4,4"}, 4), ({"size": 20, "channels": "4,4,4", "whole": 0.5}, 4),
    ({"size": 16, "channels": "4,8,8"}, 4), ({"mixed_precision": "bf16"}, 2), ({"ema": 0}, 2), ({"perceptual": 0}, 2)])
def test_every_factor_and_regulariser_trains_and_saves_what_can_be_loaded(colours, tmp_path, changes, factor):
    out = tmp_path / "run"
    script.main(words(colours, out, **{"steps": 4, **changes}))
    net = load_autoencoder(out / "model")
    side = changes.get("size", 32)
    assert type(net) is (VQAutoencoder if changes.get("regulariser") == "vq" else KLAutoencoder)
    z = net.encode(torch.zeros(1, 3, side, side))
    z = z if torch.is_tensor(z) else z.mode()
    assert z.shape == (1, 2, side // factor, side // factor) and net.decode(z).shape == (1, 3, side, side)
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    assert all(np.isfinite(loss) for loss in log(out, "loss"))


def test_a_test_folder_of_pictures_is_what_is_measured_on(colours, tmp_path):
    for split, names in (("train", range(8)), ("test", (8, 9))):
        (tmp_path / "data" / split).mkdir(parents=True)
        for i in names:
            (tmp_path / "data" / split / f"{i}.png").write_bytes((colours / f"{i}.png").read_bytes())
    script.main(words(tmp_path / "data", tmp_path / "run", steps=1))
    assert json.loads((tmp_path / "run" / "reconstructions.json").read_text())["groups"]["all"]["n"] == 2


@pytest.mark.slow
def test_the_classifier_judges_drawn_pictures_by_group_and_reads_a_flat_grey_copy_as_what_it_is():
    held = worlds.load("test", 64, 2 * len(worlds.DRAWN), worlds.DRAWN, workers=1, pairs="all")
    x = from_uint8(held.pixels)
    labels = [held.classes[i] for i in held.labels.tolist()]
    groups = script.measure(x, x, labels)["groups"]
    assert {"all", *worlds.GROUPS} == groups.keys() and groups["all"]["n"] == len(x)
    assert sum(groups[name]["n"] for name in worlds.GROUPS) == len(x) and groups["woven"]["n"] == 0
    assert groups["all"]["read_original"] == groups["all"]["read_reconstruction"] > 0.8
    assert groups["all"]["ssim"] == pytest.approx(1)
    grey = script.measure(x, torch.zeros_like(x), labels)["groups"]["all"]
    assert grey["read_reconstruction"] < 0.1 and grey["ssim"] < 0.5
    assert script.table({"groups": {"all": grey}}).count("\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"regulariser": "vq"}])
def test_a_folder_is_measured_without_training_as_it_was_after_it(colours, tmp_path, capsys, changes):
    script.main(words(colours, tmp_path / "run", steps=2, **changes))
    model, flags = tmp_path / "run" / "model", [f"--data={colours}", "--size=32", f"--out={tmp_path / 'measured'}"]
    script.main([f"--measure={model}", *flags, "--device=cpu"])
    found, before = (json.loads((tmp_path / name / "reconstructions.json").read_text()) for name in ("measured", "run"))
    assert found["groups"] == before["groups"] and (tmp_path / "measured" / "reconstructions.png").exists()
    if changes:
        assert found["codes"] == before["codes"] and found["codes"]["codes"] == 8
        assert 1 / 8 <= found["codes"]["used"] <= 1 <= found["codes"]["perplexity"] <= 8
    for size, expected in ((33, "--size 33 does not fit latents 2 times smaller"), (8, "--size is 8")):
        with pytest.raises(SystemExit) as stop:
            script.main([f"--measure={model}", f"--data={colours}", f"--size={size}", f"--out={tmp_path / 'no'}"])
        assert stop.value.code == 2 and expected in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_codes_that_nothing_chooses_start_anew(colours, tmp_path):
    script.main(words(colours, tmp_path / "run", regulariser="vq", steps=60, codes=32, preview_every=100,
                      checkpoint_every=100))
    assert log(tmp_path / "run", "used")[-1] > 0.3 and log(tmp_path / "run", "perplexity")[-1] > 6
    kept = load_autoencoder(tmp_path / "run" / "model").state_dict()
    assert {name for name in kept if name.startswith("quantize")} == {"quantize.embedding.weight"}


@pytest.mark.slow
def test_micro_batches_give_the_step_of_their_whole_and_what_is_logged_is_their_mean(colours, tmp_path):
    for name, changes in (("whole", {"batch": 8}), ("parts", {"batch": 2, "gradient_accumulation": 4})):
        script.main(words(colours, tmp_path / name, steps=1, disc_start=0, adversarial_start=1, whole=0, **changes))
    whole, parts = (state(tmp_path / name) for name in ("whole", "parts"))
    for name in whole["net"]:
        torch.testing.assert_close(parts["net"][name], whole["net"][name], rtol=1e-4, atol=1e-4)
    for key in ("loss", "disc"):
        assert log(tmp_path / "parts", key) == pytest.approx(log(tmp_path / "whole", key), rel=1e-4)
    script.main(words(colours, tmp_path / "half", steps=2, batch=2, gradient_accumulation=4, mixed_precision="bf16", disc_start=0,
                      adversarial_start=0))
    assert all(np.isfinite(log(tmp_path / "half", "loss")))


def test_small_crops_leave_the_perceptual_distance_of_the_halves_out(colours, tmp_path):
    x, calls = torch.rand(2, 3, 16, 16), []

    def distance(y, x):
        calls.append(x.shape)
        return (y - x).square().flatten(1).mean(1)
    config = script.Config(perceptual=0.5)
    assert float(script.error(x, x + 1, distance, config)) == pytest.approx(1.5)
    small = x[..., :8, :8]
    assert float(script.error(small, small + 1, distance, config)) == pytest.approx(1) and len(calls) == 1


# --- wrong input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, expected", [
    ({"regulariser": "kll"}, "nearest: kl"),
    ({"channels": "8;8"}, "--channels"),
    ({"channels": "8,0"}, "--channels"),
    ({"channels": "8,8,8,8,8,8", "size": 48, "crop": 32}, "--size 48 does not fit latents 32 times smaller"),
    ({"crop": 17}, "--crop 17 does not fit latents 2 times smaller; expected a multiple of 2, such as 16"),
    ({"crop": 8}, "--crop is 8"),
    ({"crop": 64}, "--crop 64 is larger than --size 32"),
    ({"crop": -2}, "--crop is -2"),
    ({"size": 8}, "--size is 8"),
    ({"latent_channels": 0}, "--latent_channels is 0"),
    ({"blocks": 0}, "--blocks is 0"),
    ({"codes": 1}, "--codes is 1"),
    ({"kl_weight": -1}, "--kl_weight is -1"),
    ({"kl_weight": "nan"}, "--kl_weight is nan"),
    ({"perceptual": -0.1}, "--perceptual is -0.1"),
    ({"adversarial": -1}, "--adversarial is -1"),
    ({"whole": 1.5}, "--whole is 1.5"),
    ({"disc_start": 2}, "--disc_start is 2"),
    ({"adversarial_start": 0.2}, "--adversarial_start 0.2 is before --disc_start 0.33"),
    ({"disc_channels": 12}, "a multiple of 8"),
    ({"pictures": 2}, "--pictures is 2"),
    ({"batch": 11}, "--batch 10"),
    ({"batch": 0}, "--batch is 0"),
    ({"steps": 0}, "--steps is 0"),
    ({"data": "wovn"}, "nearest: woven"),
    ({"lpips": "nowhere.safetensors"}, "nowhere.safetensors cannot be read"),
])
def test_wrong_flags_end_with_one_sentence_before_anything_is_written(colours, tmp_path, capsys, change, expected):
    with pytest.raises(SystemExit) as stop:
        script.main(words(colours, tmp_path / "run", **change))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()
