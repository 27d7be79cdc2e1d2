"""The study of f: what it asks of the scripts, that it picks up where it stopped, its table, wrong input."""

import copy
import functools
import importlib
import json

import pytest

from nanodiff import worlds
from nanodiff.errors import UserError
from nanodiff.formats.stable_diffusion_folder import save_text_encoder
from nanodiff.models.clip_text import ClipText, ClipTextConfig, Tokenizer
from nanodiff.report import compression
from nanodiff.worlds.prompts import prompts


def test_every_f_has_as_many_levels_as_it_needs():
    for f, (channels, latent_channels, unet, attention) in compression.SIZES.items():
        levels = len(channels.split(",")) if channels else 1
        assert f == 2 ** (levels - 1)
        assert 64 // f >= 2 ** (len(unet.split(",")) - 1)  # the U-Net's smallest level has a pixel
        assert max(int(level) for level in attention.split(",")) < len(unet.split(","))


def test_steps_follow_from_the_seconds_and_a_short_run(tmp_path, monkeypatch):
    calls, second = [], 0.5  # a step's seconds

    def run(script, flags, folder):
        calls.append((script, flags, folder))
        folder.mkdir(parents=True)
        (folder / "model").mkdir()
        part = int(flags[flags.index("--log_every") + 1]) if "--log_every" in flags else 4
        rows = [{"step": step, "loss": 1.0, "seconds": round(second * step, 1)} for step in (part, 2 * part, 3 * part)]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(compression, "run", run)
    assert compression.train_for_seconds("train_x.py", ["--a", "1"], tmp_path / "x", 100) == 200
    assert calls[1][1][-2:] == ["--steps", "200"] and calls[1][2] == tmp_path / "x"
    assert compression.train_for_seconds("train_x.py", ["--a", "1"], tmp_path / "x", 100) == 200 and len(calls) == 2
    second = 0.0123  # a fast machine: the clock's tenths of a second must not tell
    assert compression.train_for_seconds("train_x.py", [], tmp_path / "y", 100) == pytest.approx(100 / second, rel=0.02)
    (tmp_path / "y" / "steps").unlink()  # ended before it was finished
    second = 0.5
    assert compression.train_for_seconds("train_x.py", [], tmp_path / "y", 100) == 200


def test_a_folder_of_other_settings_is_refused_and_a_missing_text_encoder_found_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compression, "measure_factor", lambda config, f, names: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compression.main(["--seconds=60", "--factors=2", f"--out={tmp_path / 'study'}"])
    for flags, expected in ((["--seconds=300"], "holds a study of other settings"), (["--text=nowhere"], "nowhere")):
        with pytest.raises(SystemExit) as stop:
            compression.main([*flags, f"--out={tmp_path / 'study'}"])
        assert stop.value.code == 2 and expected in capsys.readouterr().err


def test_the_seconds_of_a_training_are_those_of_its_steps():
    log = [{"step": 0, "validation": 1.0}, {"step": 50, "seconds": 130.0}, {"step": 100, "seconds": 140.0},
           {"step": 120, "seconds": 144.0}, {"step": 120, "validation": 0.5}]
    assert compression.loop_seconds(log) == pytest.approx(120 * 0.2)  # and not the 144 since it was started


@pytest.mark.slow
def test_a_script_that_fails_ends_the_study_with_its_name(tmp_path, capfd):
    with pytest.raises(UserError, match="train_ldm.py ended with exit code 2"):
        compression.run("train_ldm.py", ["--steps", "many"], tmp_path / "run")
    assert "--steps" in capfd.readouterr().err  # from the script, not from a Python that finds none


@pytest.mark.slow
def test_one_f_from_drawing_to_the_table_and_not_again(tmp_path, capsys, monkeypatch):
    # the scripts in this process, on small specimens that are drawn once, in place of two processes each
    monkeypatch.setattr(compression, "run", lambda script, flags, folder: importlib.import_module(
        script.removesuffix(".py")).main([*flags, "--out", str(folder)]))
    monkeypatch.setattr(worlds, "cut", functools.partial(worlds.cut, scale=0.1))
    drawn = functools.cache(worlds.everything)
    monkeypatch.setattr(worlds, "everything", lambda *args, **options: copy.copy(drawn(*args, **options)))
    net = ClipText(ClipTextConfig(width=16, layers=1, heads=1, mlp=16))
    save_text_encoder(net, Tokenizer.shipped(), tmp_path / "text")
    words = ["--factors", "32", "--autoencoder_seconds", "1", "--seconds", "1", "--names", "striped,circle",
             "--pictures", "64", "--samples", "8", "--text", str(tmp_path / "text"), "--out", str(tmp_path / "study")]
    compression.main(words)
    numbers = json.loads((tmp_path / "study" / "f32" / "numbers.json").read_text())
    assert numbers["f"] == 32 and numbers["n"] == 8 and numbers["steps"] >= 12 and numbers["frechet"] > 0
    assert (tmp_path / "study" / "figure41.png").exists() and (tmp_path / "study" / "f32" / "samples.png").exists()
    assert "| 32 |" in (tmp_path / "study" / "figure41.md").read_text()
    monkeypatch.setattr(compression, "measure_factor", None)  # what is there is not done again
    compression.main(words)
    assert len(prompts(4, ["striped", "circle"])) == 8


@pytest.mark.parametrize("words, expected", [
    (["--factors", "3"], '--factors "3" is unknown; expected 1, 2, 4'), (["--factors", "two"], '--factors is "two"'),
    (["--names", "stripes"], "nearest: striped"), (["--seconds", "0"], "--seconds is 0"),
    (["--samples", "5"], "--samples is 5"), (["--pictures", "8"], "--pictures is 8")])
def test_wrong_flags_are_one_sentence(words, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        compression.main([*words, "--out", str(tmp_path / "study")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.count("\n") == 1 and not (tmp_path / "study").exists()
