"""train_ddpm.py from the outside: exact resume, signals, kills, several processes, and wrong input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_ddpm
from conftest import same
from nanodiff.pipelines import ddpm
from nanodiff.training.checkpoint import checkpoints, last_checkpoint, load_checkpoint

ROOT = Path(train_ddpm.__file__).parent
# as many threads as here: sums in another order end on other last digits
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}


def words(folder, out, **changes):
    """Flags of a training that takes a second."""
    flags = {"data": folder, "out": out, "size": 12, "channels": "8,8", "blocks": 1, "attention": "none", "heads": 1,
             "T": 20, "batch": 4, "gradient_accumulation": 2, "steps": 6, "lr": 2e-4, "warmup": 2, "workers": 0, "log_every": 1,
             "preview_every": 100, "checkpoint_every": 2, "dropout": 0.1, "device": "cpu", **changes}
    return [f"--{name}={value}" for name, value in flags.items()] + ["--no-figures"]


def state(out):
    return load_checkpoint(last_checkpoint(out))


@pytest.fixture(scope="module")
def straight(picture_folder, tmp_path_factory):
    """A run of six steps without a break: 48 pictures, so almost five passes over the ten."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    train_ddpm.main(words(picture_folder, out))
    return out


# --- exact resume ---------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_sigterm_in_the_middle_saves_exits_with_0_and_resumes_exactly(picture_folder, straight, tmp_path):
    out = tmp_path / "run"
    flags = words(picture_folder, out, checkpoint_every=1000)
    # the child sleeps in every micro-batch, so that the signal falls between two of them
    code = ("import sys, time, train_ddpm; from nanodiff.training.run import Run; plain = Run.backward\n"
            "def slow(self, loss, index):\n    plain(self, loss, index); print('micro', self.step, flush=True); time.sleep(0.3)\n"
            "Run.backward = slow; train_ddpm.main(sys.argv[1:])")
    child = subprocess.Popen([sys.executable, "-c", code, *flags], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while child.stdout.readline().strip() != "micro 2":
        assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    output = child.communicate(timeout=60)[0]
    assert child.returncode == 0 and "--resume" in output
    assert state(out)["run"]["step"] == 3  # the step under way was finished
    train_ddpm.main([f"--resume={out}"])
    assert same(state(out), state(straight))


KILLS = {  # in the second checkpoint of four parts: what is run instead, and which checkpoints are then there
    "before the first byte": ("torch.save", 5, "", ["00000002"]),
    "half a file": ("torch.save", 7, "args[1].write(b'PK half'); args[1].flush()", ["00000002"]),
    "before the rename": ("os.replace", 2, "", ["00000002"]),
    "before pruning": ("shutil.rmtree", 5, "", ["00000002", "00000004"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLS)
def test_sigkill_during_a_save_leaves_a_whole_checkpoint_and_resumes_exactly(picture_folder, straight, tmp_path, moment):
    function, count, instead, left = KILLS[moment]
    out = tmp_path / "run"
    flags = words(picture_folder, out, keep=1 if moment == "before pruning" else 2)
    code = ("import os, shutil, signal, sys, torch, train_ddpm; calls = []\n"
            f"plain = {function}\n"
            "def killed(*args, **kwargs):\n"
            "    if 'checkpoints' in str(args[-1]): calls.append(1)\n"
            f"    if len(calls) < {count}: return plain(*args, **kwargs)\n"
            f"    {instead or 'pass'}\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            f"{function} = killed; train_ddpm.main(sys.argv[1:])")
    child = subprocess.run([sys.executable, "-c", code, *flags], env=ENVIRONMENT, capture_output=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [p.name for p in checkpoints(out)] == left
    train_ddpm.main([f"--resume={out}"])
    assert same(state(out), state(straight))


# --- several processes ----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(picture_folder, tmp_path):
    flags = dict(stop=1, dropout=0.0, clip=0.0, ema=0.0)
    train_ddpm.main(words(picture_folder, tmp_path / "one", **flags))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               str(ROOT / "train_ddpm.py"), *words(picture_folder, tmp_path / "two", **flags)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    one, two = (state(tmp_path / name)["optimiser"]["state"] for name in ("one", "two"))
    for key in one:  # Adam's first moment after one step is a tenth of the gradient
        a, b = one[key]["exp_avg"], two[key]["exp_avg"]
        assert (a - b).norm() <= 1e-6 * a.norm().clamp(min=1e-12)
    assert done.stdout.count("stopped at step 1") == 1  # one process speaks
    assert [p.name for p in (tmp_path / "two").iterdir() if "log" in p.name] == ["log.jsonl"]


# --- what is trained ------------------------------------------------------------------------------------------------

def test_noise_of_a_sample_does_not_depend_on_its_batch():
    from nanodiff import rng
    whole = rng.normal(3, 7, torch.arange(16), (2, 5, 5))
    alone = rng.normal(3, 7, torch.tensor([11]), (2, 5, 5))
    assert torch.equal(whole[11:12], alone)
    assert not torch.equal(whole, rng.normal(3, 8, torch.arange(16), (2, 5, 5)))
    many = rng.normal(0, 0, torch.arange(1000), (100,))
    assert abs(float(many.mean())) < 0.02 and abs(float(many.std()) - 1) < 0.02
    assert torch.corrcoef(torch.stack([many[1:].flatten(), many[:-1].flatten()]))[0, 1].abs() < 0.02


@pytest.mark.slow
def test_the_model_folder_carries_kind_schedule_range_and_classes(picture_folder, tmp_path):
    out = tmp_path / "run"
    train_ddpm.main(words(picture_folder, out, prediction="v", schedule="cosine", range="01", steps=2) +
                    ["--conditional", "--zero_snr"])
    model = ddpm.load(out)
    assert model.kind == "v" and model.schedule.T == 20 and model.schedule.ends_in_pure_noise
    assert model.classes == ["blobs", "stripes"] and model.net.config.num_classes == 2
    x = torch.rand(2, 1, 12, 12) * 2 - 1
    assert torch.allclose(model.to_network(x), (x + 1) / 2) and torch.allclose(model.to_picture(model.to_network(x)), x)
    raw, ema = ddpm.load(out, "raw").net.state_dict(), model.net.state_dict()
    assert same(raw, state(out)["net"]) and same(ema, state(out)["ema"]["net"])


@pytest.mark.slow
def test_three_value_ranges_come_out_in_one_picture(picture_folder, tmp_path):
    train_ddpm.main(words(picture_folder, tmp_path / "all", range="all", steps=2))
    numbers = json.loads((tmp_path / "all/ranges.json").read_text())
    assert (tmp_path / "all/ranges.png").is_file() and len(numbers) == 6
    # [0, 1] data shown as (y + 1) / 2 has nothing darker than half of what it should have
    assert numbers["range 01, shown as (y + 1) / 2"]["mean"] > numbers["range 01, mapped back"]["mean"]


# --- wrong input ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, expected", [
    ({"prediction": "nois"}, "nearest: noise"),
    ({"schedule": "cosin"}, "nearest: cosine"),
    ({"range": "02"}, "expected 11, 01"),
    ({"batch": 11}, "--batch 10"),
    ({"size": 13}, "--size 12"),
    ({"channels": "8;8"}, "--channels"),
    ({"attention": "7"}, "expected some of 12, 6"),
    ({"T": 1}, "--T is 1"),
    ({"data": "minst"}, "mnist"),
    ({"sampler": "dpm++2"}, "nearest: dpm++2m"),
    ({"sample_steps": 0}, "--sample_steps is 0"),
    ({"samples": 0}, "--samples is 0"),
    ({"patch": 0}, "--patch is 0"),
    ({"heads": 0}, "--heads is 0"),
    ({"dropout": 1.5}, "--dropout is 1.5"),
    ({"weight": "minsnr"}, "nearest: min-snr"),
    ({"snr_gamma": -1}, "--snr_gamma is -1"),
    ({"class_dropout": 2}, "--class_dropout is 2"),
    ({"value_range": "4095"}, "such as 0,4095"),
    ({"activation": "gleu"}, "gelu"),
    ({"guidance": 2}, "--conditional"),
])
def test_wrong_flags_end_with_one_sentence_before_anything_is_written(picture_folder, tmp_path, capsys, change, expected):
    with pytest.raises(SystemExit) as stop:
        train_ddpm.main(words(picture_folder, tmp_path / "run", **change))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_noise_prediction_with_zero_terminal_snr_is_refused(picture_folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train_ddpm.main(words(picture_folder, tmp_path / "run") + ["--zero_snr"])
    assert "--prediction v" in capsys.readouterr().err


def test_divergence_stops_with_exit_code_1_and_saves_nothing_of_it(picture_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train_ddpm.main(words(picture_folder, tmp_path / "run", lr=1e30, steps=50, warmup=0, clip=0))
    assert stop.value.code == 1 and "at step" in capsys.readouterr().err
    for folder in checkpoints(tmp_path / "run"):
        assert all(torch.isfinite(v).all() for v in load_checkpoint(folder)["net"].values())


def test_another_number_of_processes_is_refused_on_resume(straight, tmp_path, capsys, monkeypatch):
    import shutil
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    path = last_checkpoint(out) / "run.pt"
    torch.save({**torch.load(path, weights_only=True), "world": 2}, path)
    with pytest.raises(SystemExit) as stop:
        train_ddpm.main([f"--resume={out}"])
    assert stop.value.code == 2 and "--nproc_per_node=2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"mixed_precision": "bf16"}, {"noise_offset": 0.1}, {"weight": "min-snr"}, {"weight": "elbo", "prediction": "x0"}, {"range": "standard"},
    {"schedule": "scaled_linear"}, {"ema": 0}, {"activation": "gelu"}, {"data": "four"}])
def test_every_way_of_training_learns_something_finite(picture_folder, tmp_path, change):
    if change.get("data"):  # four pictures are enough for ten steps
        four = tmp_path / "four"
        four.mkdir()
        for i, path in enumerate(sorted(picture_folder.rglob("*.png"))[:4]):
            (four / f"{i}.png").write_bytes(path.read_bytes())
        change = {"data": four, "steps": 10}
    train_ddpm.main(words(picture_folder, tmp_path / "run", **change))
    start, end = [torch.load(last_checkpoint(tmp_path / "run") / f"{name}.pt", weights_only=True) for name in ("net", "run")]
    assert all(torch.isfinite(v).all() and v.dtype == torch.float32 for v in start.values())
    assert end["step"] == change.get("steps", 6)


def test_help_shows_the_defaults_that_a_plain_call_uses(capsys):
    with pytest.raises(SystemExit) as stop:
        train_ddpm.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "optimiser steps in all (default: 3500)" in text and "sampling (1: off) (default: 1.5)" in text


@pytest.mark.parametrize("name, parameters, resolutions", [("cifar10", 35_746_307, {16}), ("dtd", None, {16, 8})])
def test_other_data_starts_from_the_networks_of_the_paper_and_the_report(name, parameters, resolutions):
    config = train_ddpm.Config(data=name, **train_ddpm.OTHER_DATA[name])
    network = train_ddpm.unet_config(config, (3, config.size, config.size), 0)
    assert {config.size // 2**level for level in network.attention} == resolutions and network.heads == 4
    with torch.device("meta"):
        net = train_ddpm.UNet(network)
    assert net(torch.empty(1, 3, config.size, config.size, device="meta"), torch.zeros(1, device="meta")).shape[1] == 3
    assert parameters is None or sum(p.numel() for p in net.parameters()) == parameters
