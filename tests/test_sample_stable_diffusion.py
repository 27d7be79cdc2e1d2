"""python -m nanodiff.sample with Stable Diffusion: what it writes, how a picture is made again, what it refuses."""

import functools
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import nanodiff
from nanodiff import plots, sample
from nanodiff.diffusion import Schedule
from nanodiff.formats.single_file import write_single_file
from nanodiff.formats.stable_diffusion_folder import read_folder
from nanodiff.models.clip_text import Tokenizer
from nanodiff.models.cond_unet import CondUNet
from nanodiff.models.unet import UNet, UNetConfig
from nanodiff.pipelines import ddpm, stable_diffusion
import tiny_sd


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the commands below are given."""
    root = tmp_path_factory.mktemp("sample")
    for name in tiny_sd.SETTINGS:
        tiny_sd.write_model(name, root / name)
    for kind in tiny_sd.LORAS:
        tiny_sd.write_lora(kind, root / f"{kind}.safetensors")
    for kind, file in tiny_sd.EMBEDDING_FILES.items():
        tiny_sd.write_embedding(kind, root / file)
    write_single_file(read_folder(str(root / "sd1")), root / "single.safetensors")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(root / "photo.png")
    mask = np.zeros((24, 40), dtype=np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(root / "mask.png")
    Image.fromarray(255 - mask).save(root / "inverse.png")
    net = UNet(UNetConfig(1, 1, (8, 8), 1, (), groups=4, heads=1), torch.Generator().manual_seed(0))
    ddpm.DDPM(net, Schedule.linear(10), shape=(1, 8, 8)).save(root / "ddpm")
    return root


def run(place, out, *flags):
    """Runs the command with `flags`, in which @ stands for `place`; returns the folder it wrote."""
    sample.main([f"--out={out}", "--device=cpu", *(flag.replace("@", f"{place}/") for flag in flags)])
    return out


def levels(path):
    return np.asarray(Image.open(path)).astype(int)


def difference(a, b):
    """The largest difference of two pictures in levels of 255."""
    assert levels(a).shape == levels(b).shape
    return abs(levels(a) - levels(b)).max()


# --- what it writes -------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_it_writes_a_grid_and_the_single_pictures_with_what_made_them(place, tmp_path, capsys):
    prompt = "naïve 织物, 4k"
    run(place, tmp_path, "--model=@sd1", f"--prompt={prompt}", "--negative_prompt=grey", "--n=3", "--first=4", "--steps=3",
        "--seed=7", "--guidance=5")
    assert sorted(os.listdir(tmp_path)) == ["0007-00004.png", "0007-00005.png", "0007-00006.png", "grid.png"]
    assert "3 pictures in" in capsys.readouterr().out
    text = Image.open(tmp_path / "0007-00005.png").text
    wanted = {"model": f"{place}/sd1", "prompt": prompt, "negative_prompt": "grey", "number": "5", "steps": "3",
              "sampler": "dpm++2m", "seed": "7", "guidance": "5.0", "height": "32", "width": "32", "dtype": "float32"}
    assert wanted.items() <= text.items() and not {"out", "n", "first", "again", "label", "clip"} & text.keys()
    images = nanodiff.load(place / "sd1").generate(prompt, negative="grey", n=3, first=4, steps=3, seed=7, guidance=5)
    for i, image in enumerate(images, 4):
        assert abs(levels(tmp_path / f"0007-0000{i}.png") - np.asarray(image).astype(int)).max() <= 1
    assert Image.open(tmp_path / "grid.png").text.keys() == text.keys() - {"number"}


AGAIN = {
    "eta": ["--model=@sd2", "--prompt=cloth", "--sampler=ddim", "--eta=1", "--skip_last=1", "--height=16", "--width=24",
            "--n=2"],
    "image": ["--model=@sd1", "--image=@photo.png", "--strength=0.7", "--sampler=ddpm", "--n=2"],
    "mask": ["--model=@sd1", "--prompt=cloth", "--image=@photo.png", "--mask=@mask.png", "--n=2"],
    "nine": ["--model=@sd1_inpaint", "--prompt=cloth", "--image=@photo.png", "--mask=@mask.png", "--strength=1",
             "--n=2"],
    "lora": ["--model=@single.safetensors", "--prompt=<knit>", "--lora=@peft.safetensors:0.8,@kohya.safetensors",
             "--embedding=@knit.safetensors", "--tile=4", "--n=2"],
    "half": ["--model=@single.safetensors", "--config=@sd1", "--prompt=cloth", "--dtype=bfloat16", "--n=2"],
    "prompts": ["--model=@sd1", "--prompts=PROMPTS", "--sampler=euler_a", "--n=2"],
    "late guidance": ["--model=@sd1", "--prompt=cloth", "--guidance_start=0.6", "--n=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", AGAIN)
def test_a_picture_can_be_made_again_from_itself_alone(kind, place, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffwoven\n\n  a knit  \n", encoding="utf-8")
    flags = [flag.replace("PROMPTS", str(tmp_path / "prompts.txt")) for flag in AGAIN[kind]]
    run(place, tmp_path / "first", *flags, "--steps=4", "--seed=3")
    (tmp_path / "prompts.txt").unlink()
    name = "0003-00002.png" if kind == "prompts" else "0003-00001.png"
    first, again = tmp_path / "first" / name, run(place, tmp_path / "again", f"--again={tmp_path}/first/{name}") / name
    assert sorted(os.listdir(tmp_path / "again")) == [name, "grid.png"]
    assert difference(first, again) <= 1 and difference(first, tmp_path / "first" / "0003-00000.png") > 3
    assert Image.open(first).text == Image.open(again).text
    assert kind != "prompts" or Image.open(first).text["prompt"] == "a knit"


@pytest.mark.slow
def test_a_picture_that_says_nothing_of_where_guidance_begins_was_guided_all_the_way(place, tmp_path):
    flags = ["--model=@sd1", "--prompt=cloth", "--steps=4", "--guidance=9"]
    plain, late = (run(place, tmp_path / str(start), *flags, f"--guidance_start={start}") / "0000-00000.png"
                   for start in (0, 0.6))
    assert difference(plain, late) > 1
    text = dict(Image.open(late).text)
    assert text.pop("guidance_start") == "0.6"
    plots.save(Image.open(late), tmp_path / "old.png", text)
    assert difference(plain, run(place, tmp_path / "again", f"--again={tmp_path}/old.png") / "0000-00000.png") <= 1


@pytest.mark.slow
def test_flags_change_what_is_made_again(place, tmp_path):
    first = run(place, tmp_path / "a", "--model=@sd1", "--prompt=cloth", "--steps=3") / "0000-00000.png"
    run(place, tmp_path / "b", f"--again={first}", "--seed=9", "--n=2")
    assert sorted(os.listdir(tmp_path / "b")) == ["0009-00000.png", "0009-00001.png", "grid.png"]
    assert Image.open(tmp_path / "b/0009-00001.png").text["prompt"] == "cloth"
    assert difference(first, tmp_path / "b/0009-00000.png") > 3


@pytest.mark.slow
def test_the_text_of_a_strangers_picture_does_not_say_where_to_write(place, tmp_path, monkeypatch):
    first = run(place, tmp_path / "a", "--model=@sd1", "--prompt=cloth", "--steps=3") / "0000-00000.png"
    text = {**Image.open(first).text, "out": str(tmp_path / "elsewhere"), "n": "5", "again": "x", "device": "nonsense"}
    plots.save(Image.open(first), tmp_path / "strange.png", text)
    monkeypatch.chdir(tmp_path)
    sample.main(["--again=strange.png"])
    assert sorted(os.listdir(tmp_path / "samples")) == ["0000-00000.png", "grid.png"]
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
def test_loras_and_words_do_what_they_do_in_python_and_are_told(place, tmp_path, capsys):
    os.mkdir(tmp_path / "other")
    tiny_sd.write_lora("kohya", tmp_path / "other/peft.safetensors")  # many LoRA files have one and the same name
    run(place, tmp_path, "--model=@sd1", "--prompt=cloth of <my> sinuous", "--steps=3", "--lora=@peft.safetensors:0.8,"
        f"{tmp_path}/other/peft.safetensors", "--embedding=@sinuous.pt,@knit.safetensors=<my>")
    out = capsys.readouterr().out
    assert "peft.safetensors, scale 0.8: 56 layers of the unet and 8 layers of the text model; the change has" in out
    assert "other/peft.safetensors, scale 1: " in out
    assert 'the word "<my>" has 3 vectors' in out and '"sinuous" has 2' in out
    sd = nanodiff.load(place / "sd1")
    sd.load_lora(place / "peft.safetensors", 0.8)
    sd.load_lora(place / "kohya.safetensors")
    sd.load_embedding(place / "sinuous.pt")
    sd.load_embedding(place / "knit.safetensors", "<my>")
    image = sd.generate("cloth of <my> sinuous", steps=3, seed=0)[0]
    assert abs(levels(tmp_path / "0000-00000.png") - np.asarray(image).astype(int)).max() <= 1


@pytest.mark.slow
def test_white_in_a_mask_file_is_what_is_painted_anew(place, tmp_path):
    for mask in ("mask", "inverse"):
        run(place, tmp_path / mask, "--model=@sd1", "--prompt=cloth", "--steps=4", "--image=@photo.png",
            f"--mask=@{mask}.png")
    sd = nanodiff.load(place / "sd1")
    image = torch.from_numpy(levels(place / "photo.png")).permute(2, 0, 1)[None].float() / 127.5 - 1
    new = (torch.arange(40) >= 20).float().expand(24, 40)
    drawn = sd.generate("cloth", image=image, mask=new, steps=4, seed=0)[0]
    assert abs(levels(tmp_path / "mask/0000-00000.png") - np.asarray(drawn).astype(int)).max() <= 1
    assert difference(tmp_path / "mask/0000-00000.png", tmp_path / "inverse/0000-00000.png") > 3


@pytest.mark.slow
def test_without_a_model_a_prompt_is_drawn_by_the_one_that_comes_with_nanodiff(place, tmp_path, monkeypatch):
    monkeypatch.setattr(stable_diffusion, "SHIPPED", place / "sd2")
    monkeypatch.chdir(tmp_path)
    run(place, "named", "--model=@sd2", "--prompt=cloth", "--steps=3")
    run(place, "default", "--prompt=cloth", "--steps=3", "--n=2")
    assert difference("named/0000-00000.png", "default/0000-00000.png") <= 1
    text = Image.open("default/0000-00001.png").text
    assert text["prompt"] == "cloth" and "model" not in text  # no path of the machine that drew it
    run(place, "again", "--again=default/0000-00001.png")
    assert difference("default/0000-00001.png", "again/0000-00001.png") <= 1


def test_a_missing_model_of_nanodiffs_own_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stable_diffusion, "SHIPPED", tmp_path / "none" / "nano-sd")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        sample.main(["--prompt=cloth"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and not any(tmp_path.iterdir())
    assert error == (f"error: {tmp_path}/none/nano-sd, the small model of nanodiff, does not exist; expected a "
                     "diffusers folder, or a .safetensors or .ckpt file\n")


# --- what it refuses ------------------------------------------------------------------------------------------------

class Bomb:
    """An object whose unpickling would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.makedirs, (self.path,)


def damage(place, tmp_path):
    """Damaged twins of the good files, in tmp_path."""
    whole = (place / "single.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes("Gewebe für".encode("latin-1"))
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "text.png").write_text("no picture")
    torch.save({"state_dict": {"x": Bomb(str(tmp_path / "executed"))}}, tmp_path / "bomb.ckpt")
    torch.save([Bomb(str(tmp_path / "executed"))], tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Bomb(str(tmp_path / "executed"))))
    held = load_file(place / "single.safetensors")
    key = "model.diffusion_model.out.2.bias"
    torch.save({"state_dict": {**held, key: torch.zeros(5)}}, tmp_path / "shape.ckpt")
    torch.save({"state_dict": {k: v for k, v in held.items() if k != key}}, tmp_path / "lacks.ckpt")
    lora = load_file(place / "peft.safetensors")
    save_file({k: v[:, :3].clone() if "attn2.to_k.lora_A" in k else v for k, v in lora.items()},
              tmp_path / "narrow.safetensors")
    save_file({k.replace("mid_block", "mid_blok"): v for k, v in lora.items()}, tmp_path / "other.safetensors")
    save_file({**lora, "stray.weight": torch.zeros(2)}, tmp_path / "stray.safetensors")
    plots.save(Image.new("RGB", (8, 8)), tmp_path / "made.png", {"model": f"{place}/sd1", "number": "two"})
    plots.save(Image.new("RGB", (8, 8)), tmp_path / "plain.png")
    os.makedirs(tmp_path / "parts/unet")
    os.makedirs(tmp_path / "parts/vae")
    (tmp_path / "parts/unet/config.json").write_text((place / "sd1/unet/config.json").read_text())


BASE = ["--model=@sd1", "--prompt=cloth"]
REFUSED = [  # @ stands for the folder of good things, # for that of damaged ones
    (["--model=@sd3", "--prompt=a"],
     "sd3 is no folder or file; expected Stable Diffusion or a run such as runs/ddpm-001, nearest: sd"),
    (["--model=#short.safetensors", "--prompt=a"], "short.safetensors is not a valid safetensors file"),
    (["--model=#empty.safetensors", "--prompt=a"], "empty.safetensors is not a valid safetensors file"),
    (["--model=#bomb.ckpt", "--prompt=a"], "bomb.ckpt was refused: to load it would run os.makedirs"),
    (["--model=#old.ckpt", "--prompt=a"], "old.ckpt was refused: to load it would run os.makedirs"),
    (["--model=#raw.ckpt", "--prompt=a"], "raw.ckpt is broken or no file of weights"),
    (["--model=#shape.ckpt", "--config=@sd1", "--prompt=a"], '"model.diffusion_model.out.2.bias" has shape [5]'),
    (["--model=#lacks.ckpt", "--config=@sd1", "--prompt=a"],
     '1 weights are missing, for example "model.diffusion_model.out.2.bias"'),
    (["--model=#lacks.ckpt", "--prompt=a"], "pass config=FOLDER"),
    (["--model=@sd1", "--config=@sd1", "--prompt=a"], "holds its own settings"),
    (["--model=@peft.safetensors", "--prompt=a"], "is no checkpoint of Stable Diffusion"),
    (["--model=@photo.png", "--prompt=a"], "photo.png is broken or no file of weights"),
    (["--model=#parts", "--prompt=a"], "parts/vae/config.json cannot be read"),
    ([*BASE, "--lora=#narrow.safetensors"], "it was made for another base model"),
    ([*BASE, "--lora=#other.safetensors"], "are not in the model, for example"),
    ([*BASE, "--lora=#stray.safetensors"], '"stray.weight" is not part of a LoRA'),
    ([*BASE, "--lora=@peft.safetensor"], "peft.safetensor"),
    ([*BASE, "--lora=@peft.safetensors:x"], "expected FILE or FILE:SCALE"),
    ([*BASE, "--lora=@peft.safetensors:nan"], "scale must be a finite number"),
    ([*BASE, "--lora=@peft.safetensors:0.3,@peft.safetensors"], "is loaded already"),
    (["--model=@sd2", "--prompt=a", "--lora=@peft.safetensors"], "another base model"),
    (["--model=@sd2", "--prompt=a", "--embedding=@sinuous.pt"], "have 24 numbers; expected 12"),
    ([*BASE, "--embedding=@peft.safetensors"], "is not a textual inversion"),
    ([*BASE, "--embedding=@knit.safetensors=cloth"], '"cloth" is a word already'),
    ([*BASE, "--sampler=dpm++2"], "nearest: dpm++2m"), ([*BASE, "--steps=0"], "steps is 0"),
    ([*BASE, "--steps=1001"], "1 to the schedule's 1000"), ([*BASE, "--height=63"], "nearest: 64"),
    ([*BASE, "--tile=1"], "tile is 1"), ([*BASE, "--skip_last=9"], "skip_last is 9"),
    ([*BASE, "--eta=1"], "--sampler ddim"),
    ([*BASE, "--dtype=float8"], "nearest: float32"), ([*BASE, "--device=tpu"], '--device "tpu"'),
    ([*BASE, "--strength=2", "--image=@photo.png"], "--strength is 2.0"), ([*BASE, "--n=-1"], "--n is -1"),
    ([*BASE, "--strength=0.5"], "--strength was given without --image"),
    ([*BASE, "--prompt=b"], "--prompt was given twice"),
    ([*BASE, "--lora=a", "--lora", "b"], "several files go into one, with commas between them"),
    ([*BASE, "--image=#text.png"], "text.png cannot be read as a picture"), ([*BASE, "--image=#no.png"], "no.png"),
    ([*BASE, "--mask=@mask.png"], "--mask was given without --image"), ([*BASE, "--compile=fast"], "default or graph"),
    (["--model=@sd1_inpaint", "--prompt=a"], "an inpainting model wants a mask"),
    (["--model=@sd1"], "--prompt is missing"), (["--image=@photo.png"], "--model is missing"),
    (["--prompt=a", "--label=3"], "--label belongs to a DDPM, and the model that comes with nanodiff is Stable"),
    ([*BASE, "--prompts=#blank.txt"], "--prompt and --prompts were given"), ([*BASE, "--promt=a"], "nearest: --prompt"),
    (["--model=@sd1", "--prompts=#blank.txt"], "holds no prompt"), (["--model=@sd1", "--prompts=#x"], "is no file"),
    (["--model=@sd1", "--prompts=#latin.txt"], "is no text in UTF-8"),
    ([*BASE, "--label=3"], "--label belongs to a DDPM"), ([*BASE, "--weights=raw"], "--weights belongs to a DDPM"),
    (["--model=@ddpm", "--prompt=a"], "--prompt belongs to Stable Diffusion, and"),
    (["--model=@ddpm", "--dtype=float16"], "--dtype belongs to Stable Diffusion, and"),
    (["--again=#plain.png"], "does not say how it was made"), (["--again=#made.png"], "made.png cannot be made again"),
    (["--again=#text.png"], "cannot be read as a picture"), (["--again=#no.png"], "no.png cannot be read"),
    ([*BASE, "--out=#blank.txt"], "blank.txt is a file; expected a folder"),
    ([*BASE, "--out=#blank.txt/deep/er"], "blank.txt is a file; expected a folder"),
]


tokenizer = functools.cache(Tokenizer.from_folder)


@pytest.fixture(scope="module")
def damaged(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    damage(place, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("flags, expected", REFUSED, ids=[flags[-1].lstrip("-") for flags, _ in REFUSED])
def test_wrong_input_ends_in_one_sentence_before_anything_is_drawn_or_written(flags, expected, place, damaged, tmp_path,
                                                                              capsys, monkeypatch):
    def drawn(*_):
        raise AssertionError("the U-Net was called")

    monkeypatch.setattr(CondUNet, "forward", drawn)
    monkeypatch.setattr(Tokenizer, "from_folder", tokenizer)  # read once: no word is added to it here
    monkeypatch.chdir(tmp_path)
    before = sorted(damaged.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        sample.main([flag.replace("@", f"{place}/").replace("#", f"{damaged}/") for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.startswith("error: ") and error.count("\n") == 1
    assert not any(tmp_path.iterdir()) and sorted(damaged.rglob("*")) == before  # nothing written, nothing executed


@pytest.mark.parametrize("part, key, expected", [
    ("unet", "conv_out.bias", "step 1: the latents are not finite"),
    ("vae", "decoder.conv_out.bias", "the decoded pixels are not finite")])
def test_numbers_that_are_not_finite_are_never_saved(part, key, expected, tmp_path, capsys):
    tiny_sd.write_model("sd1", tmp_path / "model")
    file = tmp_path / "model" / part / tiny_sd.WEIGHT_FILES[part]
    save_file({k: v * float("nan") if k == key else v for k, v in load_file(file).items()}, file)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, tmp_path / "out", "--model=@model", "--prompt=cloth", "--steps=3")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and expected in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["model"]


def test_settings_that_cannot_be_are_told_before_anything_is_drawn(place, tmp_path, capsys):
    tiny_sd.write_model("sd1", tmp_path / "model")
    path = tmp_path / "model/scheduler/scheduler_config.json"
    for change, expected in (({"timestep_spacing": "trailin"}, "nearest: trailing"),
                             ({"steps_offset": -1}, "steps_offset -1"),
                             ({"beta_start": "a"}, "describes no noise schedule")):
        path.write_text(json.dumps({**tiny_sd.SETTINGS["sd1"]["scheduler"], **change}))
        with pytest.raises(SystemExit) as stop:
            run(tmp_path, tmp_path / "out", "--model=@model", "--prompt=cloth")
        assert stop.value.code == 2 and expected in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["model"]
