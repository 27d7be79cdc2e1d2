"""python -m nanodiff.evaluate on Stable Diffusion with random weights: the plumbing, not the pictures."""

import json
import shutil

import pytest
from PIL import Image

import tiny_sd
from nanodiff import evaluate

FEW = ["--names=dotted,star", "--per_class=2", "--samples=8", "--training=20", "--each=2", "--sampler=ddim",
       "--steps=2", "--device=cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny_sd.write_model("sd1", folder)
    return folder


@pytest.mark.filterwarnings("ignore:Fréchet distance from n")
def test_stable_diffusion_is_judged_and_its_page_numbers_and_sheet_are_written(model, tmp_path, capsys):
    evaluate.main([f"--model={model}", *FEW, f"--out={tmp_path / 'new' / 'judged'}"])
    output, folder = capsys.readouterr().out, tmp_path / "new" / "judged"
    page, numbers = (folder / "judged.md").read_text(), json.loads((folder / "judged.json").read_text())
    assert page.strip() in output and "**no**" in page and sorted(path.name for path in folder.iterdir()) == [
        "judged.json", "judged.md", "samples.png"]
    assert numbers["runs"] == [{"sampler": "ddim", "steps": 2, "guidance": 7.5}]
    assert numbers["agreement"]["ddim, 2 steps, guidance 7.5"]["n"] == 4 and numbers["composition"]["n"] == 4
    assert numbers["distribution"]["n"] == 8 and numbers["distribution"]["training"] == 20
    assert numbers["diversity"] | {"prompts": 2, "each": 2} == numbers["diversity"]
    with Image.open(folder / "samples.png") as sheet:
        assert sheet.height >= 2 * 32


@pytest.mark.filterwarnings("ignore:Fréchet distance from n")
def test_several_scales_of_guidance_are_compared(model, tmp_path, capsys):
    evaluate.main([f"--model={model.parent}", *FEW, "--guidance=1,2", f"--out={tmp_path}"])  # a run folder will do
    numbers = json.loads((tmp_path / "guidance.json").read_text())
    assert list(numbers) == ["ddim, 2 steps, guidance 1", "ddim, 2 steps, guidance 2"]
    assert (tmp_path / "guidance.md").read_text().strip() in capsys.readouterr().out
    assert not (tmp_path / "samples.png").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Fréchet distance from n")
def test_guidance_all_the_way_can_be_asked_of_a_model_whose_own_starts_late(model, tmp_path):
    own = shutil.copytree(model, tmp_path / "own")
    index = json.loads((own / "model_index.json").read_text()) | {"_guidance": 2.0, "_guidance_start": 0.5}
    (own / "model_index.json").write_text(json.dumps(index))
    pages = {}
    for start in ([], ["--guidance_start=0"], ["--guidance_start=0.5"]):
        out = tmp_path / "judged"
        evaluate.main([f"--model={own}", *FEW, f"--out={out}", *start])
        pages[tuple(start)] = json.loads((out / "judged.json").read_text())
    assert list(pages[()]["agreement"]) == ["ddim, 2 steps, guidance 2 from 0.5 on"]
    assert list(pages["--guidance_start=0",]["agreement"]) == ["ddim, 2 steps, guidance 2"]
    assert pages["--guidance_start=0.5",]["distribution"] == pages[()]["distribution"]
    assert pages["--guidance_start=0",]["distribution"]["frechet"] != pages[()]["distribution"]["frechet"]


@pytest.mark.parametrize("flags, expected", [
    (["--guidance=a"], '--guidance is "a"; expected numbers with commas between, or none'),
    (["--guidance=1,,2"], '--guidance is "1,,2"'),
    (["--names=doted"], '--names holds "doted"'),
    (["--names=dotted,dotted"], "holds a class twice"),
    (["--per_class=0"], "--per_class is 0; expected 1 or more"),
    (["--each=1"], "--each is 1; expected 2"),
    (["--samples=5", "--names=dotted"], "--samples is 5; expected 0, or 6 or more"),
    (["--samples=40"], "--samples is 40; expected 0, or 45 or more"),
    (["--pictures=5"], "--pictures belongs to a DDPM"),
    (["--table"], "--table belongs to a DDPM"),
    (["--sampler=ddin"], "nearest: ddim"),
    (["--steps=1001"], "steps is 1001; expected 1 to the schedule's 1000"),
    (["--guidance=1e9"], "guidance is 1000000000.0"),
    (["--out=FILE"], "is a file"),
])
def test_wrong_flags_for_stable_diffusion_give_one_sentence_and_nothing_is_written(flags, expected, model, tmp_path,
                                                                                   capsys):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit) as stop:
        evaluate.main([f"--model={model}", *(flag.replace("FILE", str(file)) for flag in flags)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.strip().count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_flags_of_stable_diffusion_are_refused_for_anything_else(tmp_path, capsys):
    for flags in ([f"--folder={tmp_path}"], [f"--model={tmp_path}"]):
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*flags, "--guidance=2"])
        assert stop.value.code == 2 and "--guidance belongs to Stable Diffusion" in capsys.readouterr().err
