"""What every training promises, asked of every script.

A run that is stopped, killed, out of disk space or diverged goes on with --resume exactly as if nothing had happened.
Wrong flags end in one sentence and exit code 2 before anything is written. A folder in use is never written over.
"""

import dataclasses
import json
import math
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from conftest import rows, same
from nanodiff import plots
from nanodiff.training import checkpoint
from nanodiff.training.checkpoint import last_checkpoint, load_checkpoint
from nanodiff.training.run import Run

SCRIPTS = list(tiny_runs.FLAGS)
QUICK = ("autoencoder", "vqvae", "gan")  # the others' troubles are in the slow tier
STOPPED = (*QUICK, "vae", "vqgan", "ddpm", "kl_autoencoder")  # in the quick tier they are stopped and resumed
STOPS = {"vqgan": [3, 5]}  # in each of its two stages
STEPS = tiny_runs.EVERY["steps"]
CLOCKS = {"seconds", "prepare_seconds", "memory", "images_per_second"}  # what a clock says, in the JSON files of a run


def tiers(quick):
    """All scripts; those that are not among the quick ones in the slow tier."""
    return [script if script in quick else pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS]


def train(script, places, out, **changes):
    return tiny_runs.module(script).main(tiny_runs.words(script, places, out, **changes))


def go_on(script, out):
    return tiny_runs.module(script).main([f"--resume={out}"])


@pytest.fixture(scope="session")
def straight(places, tmp_path_factory):
    """The folder of a script's run without a break; trained when it is first asked for."""
    made = {}

    def run(script):
        if script not in made:
            made[script] = tmp_path_factory.mktemp("straight") / script
            train(script, places, made[script])
        return made[script]
    return run


def everything(out):
    """All that a run leaves, without what a clock says: checkpoints, logs, models, numbers and pictures."""
    found = {}
    for file in sorted(out.rglob("*")):
        name = str(file.relative_to(out))
        if file.name == "log.jsonl":
            found[name] = rows(file.parent)
        elif file.suffix == ".json" and file.name != "config.json":
            found[name] = without_clocks(json.loads(file.read_text()))
        elif file.suffix == ".safetensors":
            found[name] = load_file(file)
        elif file.suffix == ".png" or file.suffix == ".pt" and "checkpoints" not in file.parts:
            found[name] = file.read_bytes()
        elif file.name == "checkpoints":
            found[name] = load_checkpoint(last_checkpoint(file.parent))
    return found


def without_clocks(value):
    if isinstance(value, dict):
        return {key: without_clocks(part) for key, part in value.items() if key not in CLOCKS}
    return value


def assert_equal(out, other):
    one, two = everything(out), everything(other)
    assert one.keys() == two.keys()
    assert [name for name in one if not same(one[name], two[name])] == []


def ends_with(capsys, code, call, *sentence):
    """Asserts that a call exits with a code and one line on stderr that holds each sentence."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    said = capsys.readouterr().err
    assert stop.value.code == code and said.strip().count("\n") == 0
    assert all(part in said for part in sentence), said


# --- exact resume -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", tiers(STOPPED))
def test_stopping_and_resuming_equals_running_straight_bit_for_bit(script, places, straight, tmp_path):
    for stop in STOPS.get(script, [3]):
        out = tmp_path / f"stopped-{stop}"
        train(script, places, out, stop=stop)
        ends = [load_checkpoint(last_checkpoint(root.parent))["run"]["step"] for root in out.rglob("checkpoints")]
        assert sum(ends) == stop
        go_on(script, out)
        assert_equal(out, straight(script))


OTHERS = [("autoencoder", {"net": "conv", "widths": "4,6", "ema": 0.9, "gradient_accumulation": 2}),
          ("vae", {"net": "conv", "widths": "4,6", "ema": 0.9, "gradient_accumulation": 2, "samples": 3,
                   "analytic": False}),
          ("vqvae", {"codebook": "ema", "ema": 0.9, "gradient_accumulation": 2, "preview_every": 2}),
          ("gan", {"loss": "wasserstein", "ema": 0.9, "log_every": 2}),
          ("gan", {"data": "{pictures}", "loss": "wasserstein-gp", "channels": "4,8", "latent": 3, "batch": 4}),
          ("vqgan", {"gradient_accumulation": 2, "ema": 0.9, "perceptual": 0.1, "disc_start": 0.2,
                     "adversarial_start": 0.5}),
          ("ddpm", {"gradient_accumulation": 2, "dropout": 0.1, "noise_offset": 0.1, "ema": 0, "workers": 2}),
          ("kl_autoencoder", {"regulariser": "vq", "gradient_accumulation": 2, "batch": 2, "workers": 2}),
          ("kl_autoencoder", {"disc_start": 0.4, "adversarial_start": 0.6, "whole": 0.25}),
          ("ldm", {"text": "scratch"}),
          ("ldm", {"autoencoder": "none", "optimiser": "adamw", "gradient_accumulation": 2}),
          ("finetune", {"train_text": True, "noise_offset": 0.1, "snr_gamma": 5}), ("dreambooth", {"train_text": True}),
          ("lora", {"base_dtype": "bf16"}), ("lora", {"targets": "attention,resnet,text", "teacher_predictions": 2}),
          ("pivotal", {"teacher_predictions": 1, "gradient_accumulation": 2})]


@pytest.mark.parametrize("script, changes", [pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow)
                                             for case in OTHERS])
def test_other_networks_losses_averages_and_reading_threads_resume_exactly_too(script, changes, places, tmp_path):
    train(script, places, tmp_path / "straight", **changes)
    train(script, places, tmp_path / "run", stop=3, **changes)
    tiny_runs.module(script).main([f"--resume={tmp_path / 'run'}", "--workers=1"])
    assert_equal(tmp_path / "run", tmp_path / "straight")
    if script in ("autoencoder", "vae", "vqvae"):  # what is saved is the average
        average = load_checkpoint(last_checkpoint(tmp_path / "run"))["ema"]["net"]
        assert same(dict(load_file(tmp_path / "run/model/model.safetensors")), dict(average))


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program may catch it and tidy up."""


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def at_step_2(monkeypatch, act):
    """Lets `act(loss)` replace one loss of step 2, the third of four."""
    acted = []

    def backward(self, loss, index, plain=Run.backward):
        if self.step == 2 and not acted:
            acted.append(True)
            loss = act(loss)
        return plain(self, loss, index)
    monkeypatch.setattr(Run, "backward", backward)


def at_the_second_checkpoint(monkeypatch, act):
    def save(state, file, plain=torch.save, **options):
        return act(file) if "00000004" in str(getattr(file, "name", file)) else plain(state, file, **options)
    monkeypatch.setattr(checkpoint.torch, "save", save)


def half_a_file(file):
    file.write(b"PK half")
    raise Killed


def terminate(loss):
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


def full_at_the_end(monkeypatch):
    """Nothing can be drawn any more once the last checkpoint is there."""
    def save(self, plain=Run.save):
        plain(self)
        if self.step == self.config.steps:
            monkeypatch.setattr(plots, "save", full)
    monkeypatch.setattr(Run, "save", save)


TROUBLES = {  # how a run is disturbed, how the call ends (None: it returns), its sentence, the step that is then saved
    "SIGTERM": (lambda patch: at_step_2(patch, terminate), None, "stopped at step 3 of 4; go on with --resume", 3),
    "a loss that is NaN": (lambda patch: at_step_2(patch, lambda loss: loss * math.nan), 1,
                           "the loss is nan at step 2", 2),
    "SIGKILL in a save": (lambda patch: at_the_second_checkpoint(patch, half_a_file), Killed, "", 2),
    "a full disk": (lambda patch: at_the_second_checkpoint(patch, full), 2,
                    "the one before is intact: free some space and go on with --resume", 2),
    "a disk that is full at the end": (full_at_the_end, 2, "expected a place that can be written, with space left", 4)}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("script", tiers(QUICK))
def test_after_trouble_a_run_goes_on_bit_for_bit(script, trouble, places, straight, tmp_path, capsys, monkeypatch):
    disturb, ending, sentence, step = TROUBLES[trouble]
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        disturb(patch)
        if ending is None:
            train(script, places, out)
            assert sentence in capsys.readouterr().out
        elif ending is Killed:
            with pytest.raises(Killed):
                train(script, places, out)
        else:
            ends_with(capsys, ending, lambda: train(script, places, out), sentence)
    first = sorted(out.rglob("checkpoints"))[0].parent  # of two stages it was the first
    assert load_checkpoint(last_checkpoint(first))["run"]["step"] == step
    go_on(script, out)
    assert_equal(out, straight(script))


@pytest.mark.parametrize("script", tiers(QUICK))
def test_previews_and_checkpoints_on_the_way_change_no_weight(script, places, straight, tmp_path):
    train(script, places, tmp_path / "run", preview_every=1, checkpoint_every=1)
    one, two = everything(tmp_path / "run"), everything(straight(script))
    for name in (name for name in two if name.endswith("checkpoints")):
        assert same(without_log(one[name]), without_log(two[name]))


def without_log(state):
    return {name: part for name, part in state.items() if name != "run"}


@pytest.mark.parametrize("script", tiers(QUICK))
def test_a_finished_run_that_is_resumed_leaves_the_same_again(script, places, straight, tmp_path):
    train(script, places, tmp_path / "run")
    go_on(script, tmp_path / "run")
    one, two = everything(tmp_path / "run"), everything(straight(script))
    assert [name for name in two if not name.endswith("log.jsonl") and not same(one[name], two[name])] == []


# --- wrong input ------------------------------------------------------------------------------------------------------

WRONG = [({"stepps": 3}, "nearest: --steps"), ({"steps": "many"}, '--steps is "many"; expected a whole number'),
         ({"steps": -1}, "--steps is -1"), ({"batch": -1}, "--batch is -1"), ({"lr": -1}, "--lr is -1"),
         ({"lr": "fast"}, '--lr is "fast"; expected a number'),
         ({"keep": 0}, "--keep is 0"), ({"log_every": 0}, "--log_every is 0"), ({"ema": 1}, "--ema"),
         ({"warmup": -1}, "--warmup is -1"), ({"gradient_accumulation": 0}, "--gradient_accumulation is 0"),
         ({"device": "mps"}, "expected cpu"),
         ({"device": "abacus"}, "abacus"), ({"mixed_precision": "fp8"}, "fp8"), ({"workers": -1}, "--workers is -1")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_flags_end_in_one_sentence_before_anything_is_written(script, places, tmp_path, capsys):
    for change, sentence in WRONG:
        ends_with(capsys, 2, lambda: train(script, places, tmp_path / "run", **change), sentence)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_in_use_or_under_a_file_is_refused_and_left_as_it_is(script, places, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    ends_with(capsys, 2, lambda: train(script, places, tmp_path / "full"), "exists and is not empty", "--resume")
    ends_with(capsys, 2, lambda: train(script, places, tmp_path / "full/mine.txt/run"))
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "mine.txt"]
    assert (tmp_path / "full/mine.txt").read_text() == "mine"


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_a_run_of_the_same_script_and_flags_is_resumed(script, tmp_path, capsys):
    main, settings = tiny_runs.module(script).main, dataclasses.asdict(tiny_runs.module(script).Config())
    ends_with(capsys, 2, lambda: main([f"--resume={tmp_path}"]), "is no run folder")
    for saved, flags, sentence in (({"script": "another"}, [], "was made by another script; expected"),
                                   ({}, ["--seed=4"], "--seed 4 contradicts the run"),
                                   ({}, ["--batch=3"], "--batch 3 contradicts"),
                                   ({"new_flag": 1}, [], "does not hold this version's flags (new_flag differ)")):
        (tmp_path / "config.json").write_text(json.dumps({"script": script.replace("_", "-"), **settings, **saved}))
        ends_with(capsys, 2, lambda: main([f"--resume={tmp_path}", *flags]), sentence)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_of_every_flag_what_it_is_and_what_a_plain_call_takes(script, capsys):
    with pytest.raises(SystemExit) as stop:
        tiny_runs.module(script).main(["--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    for name in tiny_runs.module(script).Config.__dataclass_fields__:
        assert f"--{name} " in said or f"--{name}," in said, name
    assert "(default: " in said
