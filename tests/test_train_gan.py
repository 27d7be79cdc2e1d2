"""train_gan.py from the outside: exact resume, who moves whom, collapse, judging, wrong input."""

import json

import pytest
import torch

import train_gan as script
from conftest import rows, same
from nanodiff.data.images import Images
from nanodiff.metrics import gan_samples
from nanodiff.models import gan
from nanodiff.models.gan import GANConfig, Generator
from nanodiff.training import datasets
from nanodiff.training.run import Run

LOSSES = list(script.LOSSES)


def words(folder, out, **changes):
    """Flags of a training that takes a second."""
    flags = {"data": folder, "out": out, "channels": "4,8", "latent": 3, "batch": 4, "steps": 4, "n_critic": 2,
             "lr": 1e-3, "workers": 0, "log_every": 1, "preview_every": 100, "checkpoint_every": 2, "judged": 8,
             "device": "cpu", **changes}
    return [f"--{name}={value}" for name, value in flags.items()]


def log(out, key):
    return [row[key] for row in map(json.loads, open(out / "log.jsonl")) if key in row]


@pytest.fixture(scope="module")
def straight(picture_folder, tmp_path_factory):
    """Runs of four steps without a break, by loss: 32 pictures shown to the critic, so three passes over the ten."""
    root = tmp_path_factory.mktemp("runs")
    for loss in ("non-saturating", "wasserstein-gp"):
        script.main(words(picture_folder, root / loss, loss=loss))
    return root


# --- the game --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_neither_step_leaves_gradients_in_the_other_or_moves_it(picture_folder, tmp_path, monkeypatch, loss):
    parts, updates, limits = {}, [], []
    plain_update, plain_track = Run.update, Run.track

    def track(self, **tracked):
        parts.update(tracked)
        plain_track(self, **tracked)

    def update(self, net, optimiser, ema=None):
        kind, other = ("net", "disc") if net is parts["net"] else ("disc", "net")
        limits.append(max(float(p.detach().abs().max()) for p in parts["disc"].parameters()))
        assert all(p.grad is None or not p.grad.any() for p in parts[other].parameters())
        assert any(p.grad is not None and p.grad.any() for p in net.parameters())  # no step on a detached picture
        before = {name: tensor.clone() for name, tensor in parts[other].state_dict().items()}
        if kind == "net" and updates:
            assert same(dict(parts["disc"].state_dict()), at_critics_end["disc"])
        plain_update(self, net, optimiser, ema)
        assert same(dict(parts[other].state_dict()), before)
        updates.append(kind)

    at_critics_end = {}
    plain_generate = gan.Generator.forward

    def forward(self, z):
        if self is parts.get("net") and torch.is_grad_enabled():  # the generator's step begins
            at_critics_end["disc"] = {name: tensor.clone() for name, tensor in parts["disc"].state_dict().items()}
        return plain_generate(self, z)

    monkeypatch.setattr(Run, "track", track)
    monkeypatch.setattr(Run, "update", update)
    monkeypatch.setattr(gan.Generator, "forward", forward)
    script.main(words(picture_folder, tmp_path / "run", loss=loss, weight_clip=0.005, steps=2))
    assert updates == ["disc", "disc", "net"] * 2  # --n_critic 2
    if loss == "wasserstein":
        assert max(limits[1:]) <= 0.005 + 1e-9  # clipped after each update, before anyone asks the critic


@pytest.mark.parametrize("loss, kind, betas", [
    ("minimax", "Adam", (0.5, 0.999)), ("non-saturating", "Adam", (0.5, 0.999)), ("wasserstein", "RMSprop", None),
    ("wasserstein-gp", "Adam", (0.0, 0.9))])
def test_each_loss_starts_from_its_papers_optimiser(loss, kind, betas):
    config = script.filled(script.Config(loss=loss))
    optimiser = script.make_optimiser(torch.nn.Linear(2, 2), config)
    group = optimiser.param_groups[0]
    assert type(optimiser).__name__ == kind and group.get("betas") == betas
    assert group["lr"] == {"wasserstein": 5e-5, "wasserstein-gp": 1e-4}.get(loss, 2e-4)
    assert config.n_critic == (5 if "wasserstein" in loss else 1)
    assert config.weight_clip == 0.01 and config.penalty == 10
    assert config.steps * (1 + config.n_critic) == 6000


# --- judging ---------------------------------------------------------------------------------------------------------

def test_a_run_leaves_its_figures_and_a_verdict_beside_the_reports_way(straight):
    out = straight / "non-saturating"
    for name in ("figures/figure16_losses.png", "figures/figure17_collapse.png", "figures/table2_samples.png",
                 "samples.png", "previews/00000000.png", "previews/00000004.png"):
        assert (out / name).is_file(), name
    assert (straight / "wasserstein-gp/figures/figure19_losses.png").is_file()
    assert (straight / "wasserstein-gp/figures/table3_samples.png").is_file()
    verdict = json.loads((out / "judged.json").read_text())
    fresh, theirs = verdict["fresh noise, eval mode"], verdict["the report's way"]
    assert fresh["n"] == theirs["n"] == 8 and theirs["latents"] == 16 and theirs["mode"] == "train"
    assert verdict["extractor"] == gan_samples.WORLDS and "FID" not in json.dumps(verdict)
    assert {"frechet_floor", "recall_floor", "precision_floor", "nearest_train_test", "memorised"} <= fresh.keys()
    assert [row.keys() & {"frechet", "diversity", "frechet_sixteen"} for row in rows(out) if "frechet" in row][0]


@pytest.fixture(scope="module")
def judge():
    """Judges digits beside a few hundred real ones."""
    held_out, training = datasets.load("mnist", "test"), datasets.load("mnist", "train")
    few = [Images(one.pixels[:600], one.labels[:600], one.classes) for one in (training, held_out)]
    return gan_samples.PictureJudge(script.filled(script.Config(judged=200)), *few)


def digit_generator(seed=0):
    return Generator(GANConfig((1, 28, 28), 64, (4, 8, 8)), torch.Generator().manual_seed(seed)).eval()


def test_the_reports_way_sees_sixteen_pictures_and_leaves_the_generator_as_it_is(judge, monkeypatch):
    seen, plain = [], gan_samples.frechet_distance
    monkeypatch.setattr(gan_samples, "frechet_distance", lambda x, y: seen.append(x) or plain(x, y))
    net = digit_generator()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert judge.report_way(net, 0) > 0
    assert seen[0].shape == (200, 64) and len(seen[0].unique(dim=0)) == 16
    assert same(dict(net.state_dict()), before) and not net.training


def test_the_reports_way_condemns_even_a_generator_of_real_digits(judge, monkeypatch):
    real = judge.held_out.read(torch.arange(600), torch.arange(600))
    monkeypatch.setattr(gan_samples, "generate", lambda net, n, seed=0: real[:n])
    numbers = judge.measure(digit_generator(), 0)[1]
    monkeypatch.setattr(gan.Generator, "forward", lambda self, z: real[300:300 + len(z)])
    sixteen = judge.report_way(digit_generator(), 0)
    assert numbers["frechet"] < 3 * numbers["frechet_floor"] and sixteen > 5 * numbers["frechet"]


def test_real_digits_stand_at_diversity_1_and_one_digit_alone_is_warned_of(judge, tmp_path, monkeypatch, capsys):
    real = judge.held_out.read(torch.arange(300), torch.arange(300))
    monkeypatch.setattr(gan_samples, "generate", lambda net, n, seed=0: real[:n])
    assert judge.measure(digit_generator(), 0)[1]["diversity"] == pytest.approx(1, abs=0.05)
    config = script.filled(script.Config(out=str(tmp_path / "run"), device="cpu"))
    run, net = Run(config, "gan"), digit_generator()
    run.track(net=net)
    for step, expected in ((0, False), (200, True)):  # before any step all are alike, which says nothing
        run.step = step
        monkeypatch.setattr(gan_samples, "generate", lambda net, n, seed=0: real[:1].expand(n, -1, -1, -1).contiguous())
        script.preview(run, net, judge)
        assert ("mode collapse" in capsys.readouterr().out) is expected
    run.step = 300
    monkeypatch.setattr(gan_samples, "generate", lambda net, n, seed=0: real[:n])
    script.preview(run, net, judge)
    assert "mode collapse" not in capsys.readouterr().out
    assert log(tmp_path / "run", "diversity")[:2] == [0, 0] and log(tmp_path / "run", "diversity")[2] > 0.9


@pytest.mark.slow
def test_the_study_lists_every_loss_and_seed_in_a_table_a_picture_and_json(tmp_path):
    out = tmp_path / "study"
    script.main(["--study", "--seeds=2", "--steps=2", f"--out={out}", "--channels=8", "--batch=8", "--device=cpu"])
    numbers = json.loads((out / "study.json").read_text())
    assert list(numbers) == LOSSES and all([one["seed"] for one in found] == [0, 1] for found in numbers.values())
    assert all(one["modes"] == 25 and one["n"] == 2500 for found in numbers.values() for one in found)
    table = (out / "study.md").read_text()
    assert all(f"| {loss} |" in table for loss in LOSSES) and (out / "study.png").is_file()


def test_the_widths_bring_pictures_down_to_a_side_of_four():
    for name, shape, expected in (("mnist", (1, 28, 28), (32, 64, 128)), ("cifar10", (3, 32, 32), (64, 128, 256)),
                                  ("folder", (3, 64, 64), (64, 128, 256, 512)), ("folder", (3, 4, 4), (64,))):
        found = script.widths(script.Config(data=name), shape)
        assert found == expected and max(gan.sides(GANConfig(shape, 8, found))[-1]) <= 4


# --- wrong input -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, sentence", [
    (["--loss=wgan"], '--loss "wgan" is unknown; expected minimax, non-saturating, wasserstein, wasserstein-gp'),
    (["--data=gird"], "no data set or folder is called 'gird'"), (["--gradient_accumulation=2"], "--gradient_accumulation is 2"),
    (["--mixed_precision=bf16"], "--mixed_precision is bf16"),
    (["--weight_clip=0"], "--weight_clip is 0.0; expected a number above 0"),
    (["--beta1=1"], "--beta1 is 1.0"), (["--judged=2"], "--judged is 2; expected 6 or more"),
    (["--channels=8,x"], "--channels"), (["--data=ring", "--size=32"], "--size is for pictures"),
    (["--study", "--data=mnist"], "--study is made on the grid"), (["--n_critic=-1"], "--n_critic is -1"),
    (["--batch=70000"], "a batch of 70000 cannot be drawn")])
def test_wrong_flags_end_in_one_sentence_and_code_2_before_anything_is_written(tmp_path, capsys, flags, sentence):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        script.main([*flags, f"--out={out}", "--device=cpu"])
    assert error.value.code == 2 and not out.exists()
    said = capsys.readouterr().err
    assert sentence in said and len(said.strip().splitlines()) == 1
