"""Flags, checkpoints, learning rate, EMA: what every training stands on."""

import ctypes
import dataclasses
import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nanodiff
from nanodiff.errors import Diverged, UserError
from nanodiff.training import checkpoint
from nanodiff.training.checkpoint import checkpoints, last_checkpoint, load_checkpoint
from nanodiff.training.step import EMA, learning_rate
from conftest import same
from small_run import Small, go, make



# --- settings -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [{"steps": 0}, {"batch": 0}, {"lr": 0.0}, {"clip": -1.0}, {"mixed_precision": "fp8"},
                                    {"mixed_precision": "fp16"}, {"device": "abacus"}, {"keep": 0}])
def test_impossible_settings_are_refused_before_anything_is_written(change, tmp_path):
    with pytest.raises(UserError):
        make(tmp_path, **change)
    assert not (tmp_path / "run").exists()


def test_a_batch_that_processes_cannot_share_is_refused_before_they_meet(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--batch 64 cannot be divided among 3 processes; expected a multiple of 3, such as 63"):
        make(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_never_written_over(tmp_path):
    go(*make(tmp_path))
    before = sorted(p.name for p in (tmp_path / "run").rglob("*"))
    with pytest.raises(UserError, match="--resume"):
        make(tmp_path)
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == before


# --- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("accumulate", [1, 4])
def test_stopping_and_resuming_equals_running_straight(tmp_path, accumulate):
    go(*make(tmp_path / "straight", gradient_accumulation=accumulate))
    run, *parts = make(tmp_path / "broken", gradient_accumulation=accumulate, stop=3)
    go(run, *parts)
    assert run.step == 3 and not run.finished
    resumed, *parts = make(tmp_path / "broken", gradient_accumulation=accumulate, resume=str(tmp_path / "broken/run"))
    torch.randn(5)  # whatever happens between must not matter
    assert resumed.step == 3
    resumed._load(last_checkpoint(resumed.folder))
    go(resumed, *parts)
    a = load_checkpoint(last_checkpoint(tmp_path / "straight/run"))
    b = load_checkpoint(last_checkpoint(tmp_path / "broken/run"))
    assert a["run"]["step"] == 6 and same(a, b)
    logs = [[json.loads(line)["loss"] for line in open(tmp_path / name / "run/log.jsonl")] for name in ("straight", "broken")]
    assert logs[0] == logs[1]


def test_mkl_keeps_one_order_of_sums_wherever_a_matrix_lies_in_memory(monkeypatch):
    """MKL has read it: nothing that is collected multiplies before nanodiff is imported."""
    torch.ones(64, 64) @ torch.ones(64, 64)
    said = getattr(ctypes.CDLL(str(next(Path(torch.__file__).parent.glob("lib/*torch_cpu.*")))), "mkl_serv_cbwr_get", None)
    if said is None:
        pytest.skip("torch has no MKL here")
    strict = 0x10000  # MKL_CBWR_STRICT
    assert os.environ["MKL_CBWR"] != "AUTO,STRICT" or said(-1) & strict
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    importlib.reload(nanodiff)
    assert os.environ["MKL_CBWR"] == "COMPATIBLE"  # the user's own word stands


@pytest.mark.slow
def test_peak_memory_is_not_that_of_the_process_that_started_this_one():
    child = "import torch; from nanodiff.training.distributed import peak_memory; print(peak_memory(torch.device('cpu')))"
    parent = f"import subprocess, sys; x = b'x' * 2**30; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    found = int(subprocess.run([sys.executable, "-c", parent], check=True, capture_output=True, text=True).stdout)
    assert 2**26 < found < 0.9 * 2**30


def test_lines_logged_after_the_last_checkpoint_are_dropped_on_resume(tmp_path):
    run, *parts = make(tmp_path, stop=4)
    go(run, *parts)
    run.record(step=5, loss=9.0)  # as if killed after this line
    make(tmp_path, resume=str(run.folder))
    assert [json.loads(line)["step"] for line in open(run.folder / "log.jsonl")] == [1, 2, 3, 4]


def test_pruning_sorts_by_number_and_keeps_the_newest(tmp_path):
    run, *_ = make(tmp_path, keep=2)
    for step in (900, 9900, 10000):
        run.step = step
        run.save()
    assert [p.name for p in checkpoints(run.folder)] == ["00009900", "00010000"]
    for step in (99_999_999, 100_000_000):  # one digit more than the names are padded to
        run.step = step
        run.save()
    assert [p.name for p in checkpoints(run.folder)] == ["99999999", "100000000"]
    run.step = 500  # written last: never the one that goes
    run.save()
    assert "00000500" in [p.name for p in checkpoints(run.folder)]


@pytest.mark.parametrize("fails", ["torch.save", "os.replace"])
def test_a_full_disk_is_reported_and_leaves_the_checkpoint_before_intact(tmp_path, monkeypatch, fails):
    run, *_ = make(tmp_path)
    run.save()
    good = load_checkpoint(last_checkpoint(run.folder))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    run.step = 2
    monkeypatch.setattr(checkpoint.torch if fails == "torch.save" else checkpoint.os, fails.split(".")[1], full)
    with pytest.raises(UserError, match="No space left"):
        run.save()
    monkeypatch.undo()
    assert [p.name for p in (run.folder / "checkpoints").iterdir()] == ["00000000"]
    assert same(load_checkpoint(last_checkpoint(run.folder)), good)


def test_temporary_files_lie_in_the_run_folder_and_unfinished_ones_are_never_resumed(tmp_path):
    run, *_ = make(tmp_path)
    run.save()
    (run.folder / "checkpoints/.writing-00000900").mkdir()
    assert last_checkpoint(run.folder).name == "00000000"
    (run.folder / "checkpoints/00000000").rename(run.folder / "checkpoints/.writing-00000000")
    with pytest.raises(UserError, match="holds no checkpoint"):
        last_checkpoint(run.folder)


@pytest.mark.parametrize("name", ["optimiser", "ema", "net", "run"])
def test_resume_raises_when_any_part_is_missing(tmp_path, name):
    run, *parts = make(tmp_path, stop=2)
    go(run, *parts)
    os.remove(last_checkpoint(run.folder) / f"{name}.pt")
    with pytest.raises(UserError, match=f"lacks {name}.pt"):
        make(tmp_path, resume=str(run.folder))


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    run, *_ = make(tmp_path)
    (run.folder / "checkpoints").write_text("in the way")
    with pytest.raises(UserError, match="could not be written"):
        run.save()


def test_weights_that_overflowed_are_never_saved(tmp_path):
    run, net, *_ = make(tmp_path)
    run.save()
    net.weight.data.fill_(math.inf)
    run.step = 2
    with pytest.raises(Diverged):
        run.save()
    assert [p.name for p in checkpoints(run.folder)] == ["00000000"]


def test_the_gradient_scaler_goes_on_from_its_saved_scale(tmp_path):
    run, *_ = make(tmp_path)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run.save()
    again, *_ = make(tmp_path, resume=str(run.folder))
    again.scaler = torch.amp.GradScaler("cpu")
    again._load(last_checkpoint(run.folder))
    assert again.scaler.get_scale() == 1024.0


def test_every_load_call_refuses_code_and_torch_is_new_enough():
    root = Path(checkpoint.__file__).parents[2]
    calls = [call for path in [*root.glob("*.py"), *(root / "nanodiff").rglob("*.py")]
             for call in re.findall(r"\b(?:torch|np)\.load\(.*", path.read_text())]
    assert len(calls) >= 3
    assert all("weights_only=True" in call or "allow_pickle=False" in call for call in calls), calls
    assert "torch>=2.6" in (root / "setup.cfg").read_text()


def test_half_a_log_line_and_leftovers_of_a_killed_save_are_cleared_away(tmp_path):
    run, *parts = make(tmp_path, stop=2)
    go(run, *parts)
    run.record(step=2, validation=0.5)  # made again after the resume
    with open(run.folder / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    for name in (".writing-00000003", ".replaced"):
        (run.folder / "checkpoints" / name).mkdir()
        (run.folder / "checkpoints" / name / "net.pt").write_bytes(b"half")
    resumed, *parts = make(tmp_path, resume=str(run.folder))
    go(resumed, *parts)
    rows = [json.loads(line) for line in open(run.folder / "log.jsonl")]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and all("loss" in row for row in rows)
    assert not list((run.folder / "checkpoints").glob(".*"))


def test_a_pickle_that_runs_code_is_refused_by_name(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)
    run, *parts = make(tmp_path, stop=2)
    go(run, *parts)
    path = last_checkpoint(run.folder) / "net.pt"
    torch.save({"weight": Evil()}, path)
    with pytest.raises(UserError, match="net.pt"):
        make(tmp_path, resume=str(run.folder))
    assert not (tmp_path / "owned").exists()


def test_tied_and_sliced_tensors_save_at_step_0(tmp_path):
    run, net, *_ = make(tmp_path)
    net.tied, net.view = net.weight, torch.nn.Parameter(net.weight.detach()[:, 1:])
    run.save()
    assert same(load_checkpoint(last_checkpoint(run.folder))["net"], net.state_dict())


# --- the step -------------------------------------------------------------------------------------------------------

def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_its_samples(tmp_path):
    run, net, ema, optimiser = make(tmp_path)
    before = net.weight.detach().clone()
    with pytest.raises(Diverged, match=r"step 0, samples \[4, 7\]"):
        run.backward(net(torch.full((1, 3), math.nan)).mean(), torch.tensor([4, 7]))
    (net.weight.sum() * 1e38 * 1e38).backward()
    with pytest.raises(Diverged, match="gradient norm"):
        run.update(net, optimiser, 1e-3)
    assert torch.equal(net.weight, before) and not checkpoints(run.folder)


def test_without_clipping_an_infinite_gradient_is_caught_by_the_next_loss_and_before_anything_is_saved(tmp_path):
    run, net, ema, optimiser = make(tmp_path, clip=0.0, preview_every=5)
    for step, looked_at in enumerate([False, True, False, True, True, True]):  # saved after 2, 4, 6, drawn at 5
        run.step = step
        run._samples = [4, 7]
        (net.weight.sum() * 1e38 * 1e38).backward()
        if looked_at:
            before = net.weight.detach().clone()
            with pytest.raises(Diverged, match=rf"gradient norm is inf at step {step}, samples \[4, 7\]"):
                run.update(net, optimiser, 1e-3)
            assert torch.equal(net.weight, before)
            optimiser.zero_grad()
        else:
            run.update(net, optimiser, 1e-3)
            run.step = step + 1
            with pytest.raises(Diverged, match=rf"at step {step + 1}, samples \[1\] or, of the step before, \[4, 7\]"):
                run.backward(net(torch.ones(1, 3)).mean(), torch.tensor([1]))
            net.weight.data.zero_()
    assert not checkpoints(run.folder)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batches_average_to_the_gradient_and_the_logged_loss_of_the_whole_batch(tmp_path, accumulate):
    run, net, ema, optimiser = make(tmp_path, gradient_accumulation=accumulate, batch=8 // accumulate, clip=0.0)
    x = torch.arange(24.0).view(8, 3) / 10
    net.weight.data.copy_(torch.arange(6.0).view(2, 3) / 7)
    for part in x.chunk(accumulate):
        run.backward(net(part).square().mean(), torch.arange(len(part)))
    gradient = net.weight.grad.clone()
    loss = net(x).square().mean()
    expected, = torch.autograd.grad(loss, net.weight)
    assert torch.allclose(gradient, expected, rtol=1e-6)
    run.log(0, 1e-3)
    assert run.history("loss")[1][0] == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_learning_rate_has_the_stated_value_at_both_ends_whatever_the_accumulation(accumulate):
    config = Small(steps=100, warmup=10, lr=1e-3, lr_end=0.1, gradient_accumulation=accumulate)
    assert learning_rate(0, config) == pytest.approx(1e-4)
    assert learning_rate(9, config) == pytest.approx(1e-3)
    assert learning_rate(10, config) == pytest.approx(1e-3)
    assert learning_rate(99, config) == pytest.approx(1e-4)
    shorter = dataclasses.replace(config, steps=40)  # a stage has a schedule of its own
    assert all(learning_rate(60 + i, config, (60, 100)) == learning_rate(i, shorter) for i in range(40))
    assert learning_rate(54, config) == pytest.approx(1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * 44 / 89))))


def test_the_step_counts_optimiser_steps(tmp_path):
    run, *parts = make(tmp_path, gradient_accumulation=4, stop=3)
    go(run, *parts)
    assert load_checkpoint(last_checkpoint(run.folder))["run"]["step"] == 3
    assert load_checkpoint(last_checkpoint(run.folder))["optimiser"]["state"][0]["step"] == 3


# --- EMA ------------------------------------------------------------------------------------------------------------

def test_ema_warms_up_copies_buffers_and_never_touches_the_network():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    ema, start = EMA(net, 0.9999), net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight += 1
        net[1].running_mean += 3
    raw = {k: v.clone() for k, v in net.state_dict().items()}
    for _ in range(100):
        ema.update(net)
    assert same(net.state_dict(), raw)
    assert (ema.net[0].weight - net[0].weight).abs().max() < 0.1 * (ema.net[0].weight - start).abs().max()
    assert torch.equal(ema.net[1].running_mean, net[1].running_mean)
    assert ema.net[0].weight.dtype == torch.float32 and not ema.net.training


def test_ema_equals_the_recursion_by_hand():
    net = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(net, 0.5)
    value = net.weight.item()
    for n in range(5):
        with torch.no_grad():
            net.weight.fill_(float(n))
        ema.update(net)
        decay = min(0.5, (1 + n) / (10 + n))
        value = decay * value + (1 - decay) * n
    assert float(ema.net.weight) == pytest.approx(value, rel=1e-6)


def test_ema_counter_and_weights_survive_save_and_load():
    net = torch.nn.Linear(2, 2)
    ema = EMA(net, 0.9)
    for _ in range(7):
        ema.update(net)
    other = EMA(torch.nn.Linear(2, 2), 0.9)
    other.load_state_dict(ema.state_dict())
    assert other.updates == 7 and same(other.net.state_dict(), ema.net.state_dict())
