"""python -m nanodiff.sample and nanodiff.evaluate on a network that was hardly trained: the plumbing, not the digits."""

import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import train_ddpm
from nanodiff import evaluate, sample, worlds
from nanodiff.data import images
from nanodiff.diffusion import Schedule
from nanodiff.errors import UserError
from nanodiff.pipelines import ddpm


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A run on MNIST with everything that follows a training, figures included."""
    out = tmp_path_factory.mktemp("mnist") / "run"
    train_ddpm.main([f"--out={out}", "--channels=16,16", "--blocks=1", "--T=30", "--steps=3", "--batch=8",
                     "--conditional", "--sample_steps=4", "--samples=9", "--device=cpu", "--prediction=v",
                     "--schedule=linear"])
    return out


@pytest.fixture(scope="module")
def unconditional(picture_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain") / "run"
    train_ddpm.main([f"--out={out}", f"--data={picture_folder}", "--size=12", "--channels=8,8", "--blocks=1",
                     "--attention=none", "--heads=1", "--T=30", "--steps=1", "--batch=2", "--device=cpu", "--no-figures"])
    return out


@pytest.mark.slow
def test_a_training_leaves_every_figure_of_the_report(model_folder):
    names = ["samples.png", "curves.png", "bound.json", "judged.json", "model/unet/config.json"]
    names += [f"figures/{name}" for name in (
        "figure30_time_embedding.png", "figure34_denoising.png", "figure36_forward.png", "figure39_shared_x_t.png",
        "figure40_rate_distortion.png", "table4_training.png", "table5_frequencies.png", "table5_frequencies.json")]
    for name in names:
        assert (model_folder / name).stat().st_size > 0, name
    for png in model_folder.rglob("*.png"):
        assert len(np.unique(np.asarray(Image.open(png).convert("L")))) > 3, f"{png} is blank"


@pytest.mark.slow
def test_noise_hides_high_frequencies_first(model_folder):
    rows = json.loads((model_folder / "figures/table5_frequencies.json").read_text())
    for row in rows:
        low, middle, high = [value for name, value in row.items() if name.startswith("snr")]
        assert low > middle > high
    assert all(a["snr 0-0.08"] > b["snr 0-0.08"] for a, b in zip(rows, rows[1:]))


@pytest.mark.slow
def test_a_picture_depends_on_its_number_and_seed_and_not_on_its_batch(model_folder):
    model = ddpm.load(model_folder)
    for sampler in ("ddim", "euler_a", "ddpm"):
        whole = model.generate(5, sampler, 5, seed=3, label=torch.arange(5))
        alone = model.generate(1, sampler, 5, seed=3, label=torch.tensor([4]), first=4)
        assert torch.allclose(whole[4:], alone, atol=1e-4)
        assert not torch.allclose(whole[4:], model.generate(1, sampler, 5, seed=4, label=torch.tensor([4]), first=4))


@pytest.mark.slow
def test_heun_takes_karras_levels_where_the_schedule_ends_in_almost_pure_noise(model_folder):
    model = ddpm.load(model_folder)
    linear = [model.generate(2, "heun", 6, **options) for options in ({}, {"karras": False}, {"karras": True})]
    assert torch.equal(linear[0], linear[1]) and not torch.equal(linear[0], linear[2])
    model.schedule = Schedule.cosine()
    cosine = [model.generate(2, "heun", 6, **options) for options in ({}, {"karras": False}, {"karras": True})]
    assert torch.equal(cosine[0], cosine[2]) and not torch.equal(cosine[0], cosine[1])


@pytest.mark.slow
def test_sample_writes_a_grid_and_pictures_that_carry_their_parameters(model_folder, tmp_path):
    sample.main([f"--model={model_folder}", "--n=3", "--steps=3", "--sampler=ddim", "--eta=1", "--seed=7",
                 f"--out={tmp_path}", "--label=5", "--guidance=2"])
    image = Image.open(tmp_path / "0007-00002.png")
    assert image.size == (28, 28) and image.mode == "L"
    assert image.text["sampler"] == "ddim" and image.text["number"] == "2" and image.text["label"] == "5"
    assert (tmp_path / "grid.png").is_file()
    again = tmp_path / "again"
    sample.main([f"--model={model_folder}", "--n=3", "--steps=3", "--sampler=ddim", "--eta=1", "--seed=7",
                 f"--out={again}", "--label=5", "--guidance=2", "--batch=1"])
    a, b = (np.asarray(Image.open(f / "0007-00002.png")).astype(int) for f in (tmp_path, again))
    assert abs(a - b).max() <= 1


@pytest.mark.slow
def test_a_low_strength_keeps_the_picture_and_a_high_one_does_not(model_folder, tmp_path):
    source = tmp_path / "source.png"
    Image.fromarray(np.tile(np.arange(0, 252, 9, dtype=np.uint8), (28, 1))).save(source)
    distances = []
    for strength in ("0.1", "1.0"):
        sample.main([f"--model={model_folder}", "--n=1", "--steps=10", f"--image={source}", f"--strength={strength}",
                     f"--out={tmp_path / strength}"])
        drawn = np.asarray(Image.open(tmp_path / strength / "0000-00000.png")).astype(float)
        distances.append(np.abs(drawn - np.asarray(Image.open(source))).mean())
    assert 2 * distances[0] < distances[1]  # even an untrained network cannot take away more than was noised


@pytest.mark.slow
def test_evaluate_prints_the_bound_with_its_error_and_the_judgement_with_its_floor(model_folder, tmp_path, capsys):
    evaluate.main([f"--model={model_folder}", "--pictures=4", "--t_samples=3", "--n=70", "--steps=2",
                   f"--out={tmp_path / 'numbers.json'}"])
    output = capsys.readouterr().out
    assert "bits/dim on 4 held-out pictures" in output and "+-" in output and "floor" in output and "n = 70" in output
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["bound"]["bits_per_dim"] > 0 and numbers["dpm++2m 2"]["n"] == 70


def test_evaluate_gives_the_frechet_distance_of_given_features(tmp_path, capsys):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3))
    np.save(tmp_path / "a.npy", x)
    np.save(tmp_path / "b.npy", x + [2, 0, 0])
    evaluate.main(["--features", str(tmp_path / "a.npy"), str(tmp_path / "b.npy")])
    assert "Frechet distance 4 " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("script, flags, expected", [
    (sample, ["--model=nowhere"], "is no folder"),
    (sample, [], "--model is missing"),
    (sample, ["--sampler=dpm++2", "--model=MODEL"], "nearest: dpm++2m"),
    (sample, ["--steps=31", "--model=MODEL"], "expected 1 to the schedule's 30"),
    (sample, ["--label=eleven", "--model=MODEL"], "none of the model's classes"),
    (sample, ["--eta=1", "--model=MODEL"], "--sampler ddim"),
    (sample, ["--kind=v", "--model=MODEL"], "unknown flag --kind"),
    (sample, ["--image=none.png", "--model=MODEL"], "none.png"),
    (sample, ["--weights=best", "--model=MODEL"], "expected ema or raw"),
    (sample, ["--label=1", "--model=PLAIN"], "knows no classes"),
    (evaluate, ["--model=PLAIN", "--table"], "digit classifier"),
    (evaluate, ["--features", "a.npy"], "two .npy files"),
    (evaluate, ["--features", "a.npy", "b.npy"], "a.npy cannot be read"),
])
def test_wrong_input_gives_one_sentence(script, flags, expected, model_folder, unconditional, tmp_path, capsys,
                                        monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [flag.replace("MODEL", str(model_folder)).replace("PLAIN", str(unconditional)) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        script.main(flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.strip().count("\n") == 0
    assert not any(tmp_path.iterdir())


def test_the_largest_channel_difference_of_grey_pictures_is_zero_and_of_a_tinted_one_is_its_tint():
    from nanodiff.report.figures import channel_difference
    grey = (torch.rand(3, 1, 8, 8) * 1.5 - 1).expand(-1, 3, -1, -1)
    assert channel_difference(grey) == 0
    tinted = grey.clone()
    tinted[1, 1] += 20 / 127.5
    assert channel_difference(tinted) == pytest.approx(20, rel=1e-4)


def test_evaluate_reads_a_folder_of_pictures_and_compares_it_with_real_ones(tmp_path, capsys):
    drawn = worlds.load("test", n=40, names=("striped", "circle"))
    for i, (scene, x) in enumerate(zip(drawn.scenes, drawn.read(torch.arange(40), torch.arange(40)))):
        for folder in (("made", "real") if i < 14 else ("real",)):
            (tmp_path / folder / scene.name).mkdir(parents=True, exist_ok=True)
            images.save(x, tmp_path / folder / scene.name / f"{i}.png")
    evaluate.main([f"--folder={tmp_path / 'made'}", f"--against={tmp_path / 'real'}", f"--out={tmp_path / 'n.json'}"])
    output = capsys.readouterr().out
    assert "14 pictures are read as" in output and "read as their folder's name" in output and "floor" in output
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["agreement"]["class"] >= 0.9 and set(numbers["agreement"]["by_class"]) == {"striped", "circle"}
    assert numbers["judged"]["compared"] == 14 and numbers["judged"]["n"] == 14
    with pytest.raises(SystemExit):
        evaluate.main([f"--folder={tmp_path / 'made'}", f"--against={tmp_path / 'made' / 'striped'}"])
    assert "holds 14 pictures and --against" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Fréchet distance from n")
def test_evaluate_compares_slices_as_a_materials_engineer_would(tmp_path, capsys):
    drawn = worlds.cut("test", 64, 36, channels=1, specimens=1)
    dry = [i for i, label in enumerate(drawn.labels.tolist()) if drawn.classes[label].startswith("dry ")]
    for i, x in zip(dry, drawn.read(torch.tensor(dry), torch.tensor(dry))):
        for folder in ("one", "real") if i % 2 else ("real",):
            (tmp_path / folder).mkdir(exist_ok=True)
            images.save(x, tmp_path / folder / f"{i}.png")
    words = [f"--folder={tmp_path / 'one'}", f"--against={tmp_path / 'real'}", "--materials"]
    found = []
    for more in ([], ["--voxel=10"], ["--resin"]):
        evaluate.main([*words, *more, f"--out={tmp_path / 'n.json'}"])
        found.append(json.loads((tmp_path / "n.json").read_text())["materials"])
    output = capsys.readouterr().out
    assert "% yarn" in output and "in brackets one half of the real slices from the other" in output
    assert found[0]["distances"].keys() >= {"grey", "two_point", "spectrum", "porosity"} and "porosity" not in found[2]["distances"]
    assert found[0]["distances"].keys() == found[0]["floors"].keys()
    if "period" in found[0]["against"]:
        assert found[1]["against"]["period"] == pytest.approx(10 * found[0]["against"]["period"])
    assert 0.2 < found[0]["against"]["yarn"] < 0.9
    images.save(torch.zeros(1, 32, 32), tmp_path / "one" / "small.png")
    for flags, expected in ((words, "slices of 32x32 and 64x64 pixels cannot be compared"), (words[:2] + ["--voxel=3"], "are for --materials"),
                            ([words[0], "--materials"], "expected all three"), ([*words, "--voxel=-1"], "--voxel is -1")):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(flags)
        assert stop.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_judges_the_samples_of_a_model_of_any_pictures_by_the_classifier(unconditional, picture_folder, tmp_path):
    evaluate.main([f"--model={unconditional}", f"--data={picture_folder}", "--pictures=0", "--n=7", "--steps=2",
                   f"--out={tmp_path / 'n.json'}"])
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert numbers["judged"]["n"] == 7 and numbers["judged"]["frechet"] >= 0


@pytest.mark.slow
def test_a_run_on_volumes_keeps_their_grey_scale_and_samples_are_written_back_in_their_units(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for state, low in (("dry", 1000), ("injected", 20_000)):
        tifffile.imwrite(tmp_path / f"{state}.tif", rng.integers(low, low + 5000, (20, 20, 20), dtype=np.uint16))
    train_ddpm.main([f"--out={tmp_path / 'run'}", f"--data={tmp_path}", "--size=12", "--channels=8,8", "--blocks=1",
                     "--attention=none", "--heads=1", "--T=30", "--steps=1", "--batch=2", "--device=cpu", "--no-figures"])
    flags = [f"--model={tmp_path / 'run'}", "--n=3", "--steps=2", f"--out={tmp_path / 's'}"]
    for units, sentence in (("nothing.json", "holds no volume's grey scale"), ("", "holds several volumes"),
                            ("=dri", "nearest: dry")):
        path = units if units.endswith("json") else f"{tmp_path / 'run' / 'volumes.json'}{units}"
        with pytest.raises(SystemExit):
            sample.main([*flags, f"--units={path}"])
        assert sentence in capsys.readouterr().err and not (tmp_path / "s").exists()
    sample.main([*flags, f"--units={tmp_path / 'run' / 'volumes.json'}=injected"])
    made = tifffile.imread(tmp_path / "s" / "slices.tif")
    assert made.dtype == np.uint16 and made.shape == (3, 12, 12)
    assert len(evaluate.folder_pictures(tmp_path / "s")) == 3  # without the grid and the stack
    twice = tmp_path / "lr=1.json"  # two volumes of one state are told apart by their names
    records = json.loads((tmp_path / "run" / "volumes.json").read_text())
    twice.write_text(json.dumps([records[0], {**records[0], "name": "other", "low": 7.0}]))
    assert sample.volume_record(f"{twice}=other")["low"] == 7
    with pytest.raises(UserError, match="dry.tif, other"):
        sample.volume_record(str(twice))
    assert 19_990 <= made.min() and made.max() <= 25_010 and made.std() > 100
