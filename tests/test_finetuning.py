"""The five fine-tuning scripts from the outside: exact resume, what is trained, files, wrong input."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import nanodiff
from nanodiff import worlds
from nanodiff.files import DATA
from nanodiff.finetune import cost, lesson as lessons, prior as priors
from nanodiff.models import lora
import tiny_sd
import train_dreambooth
import train_finetune
import train_lora
import train_pivotal
import train_textual_inversion
from conftest import rows, state

SCRIPTS = {"finetune": train_finetune, "textual-inversion": train_textual_inversion, "dreambooth": train_dreambooth,
           "lora": train_lora, "pivotal": train_pivotal}
PRIOR = {"with_prior_preservation": True, "class_prompt": "a texture", "num_class_images": 4}
EXTRA = {"textual-inversion": {"num_vectors": 2}, "dreambooth": PRIOR,
         "pivotal": {**PRIOR, "word_steps": 2, "teacher_predictions": 1},
         "lora": {"targets": "attention,resnet,text", "placeholder_token": "<new>", "num_vectors": 2,
                  "instance_prompt": "a <new> texture", "with_prior_preservation": True, "class_data": "worlds",
                  "num_class_images": 12, "teacher_predictions": 2}}
FILES = {"finetune": ["model"], "dreambooth": ["model"],
           "lora": ["lora.safetensors", "lora.kohya.safetensors", "learned_embeds.safetensors"],
           "textual-inversion": ["learned_embeds.safetensors", "learned_embeds.pt"],
           "pivotal": ["lora.safetensors", "learned_embeds.safetensors"]}


# What a lesson asks of a Run.
ALONE = SimpleNamespace(device=torch.device("cpu"), rank=0, world=1, print=lambda text: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "sd1"
    tiny_sd.write_model("sd1", path)
    return path


def words(script, folder, out, **changes):
    """Flags of a training that takes a second."""
    flags = {"model": folder, "out": out, "data": "zigzagged", "pictures": 6, "steps": 4, "batch": 2, "warmup": 1,
             "preview_every": 2, "checkpoint_every": 2, "log_every": 1, "sample_steps": 1, "each": 1, "workers": 1,
             "device": "cpu", "retention": "two zebras", **EXTRA.get(script, {}), **changes}
    return [f"--{name}" if value is True else f"--no-{name}" if value is False else f"--{name}={value}"
            for name, value in flags.items() if value is not None]


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """{script: a run of four steps without a break}, made when it is asked for."""
    made = {}

    def run(script):
        if script not in made:
            made[script] = tmp_path_factory.mktemp("runs") / script
            assert SCRIPTS[script].main(words(script, folder, made[script])) is not None
        return made[script]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_its_files_its_sheets_and_what_it_cost(script, straight):
    out = straight(script)
    assert all((out / name).exists() for name in [*FILES[script], "lesson.png", "retention.png", "curves.png"])
    results = json.loads((out / "results.json").read_text())
    assert results["trained"] > 0 and results["file_bytes"] > 0 and results["lesson_before"] >= 0
    assert all(size > 0 for size in results["change"].values())
    assert [row["step"] for row in rows(out) if "held_out" in row] == [0, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["lora", "textual-inversion", "pivotal"])
def test_what_was_written_changes_the_base_model_as_it_changed_in_training(script, folder, tmp_path):
    trained = SCRIPTS[script].main(words(script, folder, tmp_path / "run", lr=0.05))
    sd = nanodiff.load(folder)
    prompt = "a <new> texture"
    if "learned_embeds.safetensors" in FILES[script]:
        sd.load_embedding(str(tmp_path / "run/learned_embeds.safetensors"))
    before = sd.generate(prompt, steps=2, seed=0, output="latents")
    if "lora.safetensors" in FILES[script]:
        sd.load_lora(str(tmp_path / "run/lora.safetensors"))
    after = sd.generate(prompt, steps=2, seed=0, output="latents")
    assert torch.allclose(after, trained.generate(prompt, steps=2, seed=0, output="latents"), atol=1e-4)
    assert script == "textual-inversion" or not torch.allclose(before, after, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["finetune", "dreambooth"])
def test_a_saved_model_draws_what_the_trained_one_draws(script, folder, tmp_path):
    trained = SCRIPTS[script].main(words(script, folder, tmp_path / "run", steps=2, lr=1e-2))
    again = nanodiff.load(tmp_path / "run/model")
    one, other = (sd.generate("a sks texture", steps=2, seed=0, output="latents") for sd in (trained, again))
    assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.slow
def test_the_base_model_is_untouched_by_lora_and_by_a_word(folder, straight):
    base = nanodiff.load(folder)
    for script in ("lora", "textual-inversion"):
        straight(script)
    again = nanodiff.load(folder)
    assert all(torch.equal(a, b) for a, b in zip(base.unet.parameters(), again.unet.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["lora", "finetune"])
def test_accumulated_micro_batches_give_the_gradient_of_one_batch(script, folder, tmp_path):
    for name, more in (("whole", dict(batch=4)), ("parts", dict(batch=1, gradient_accumulation=4))):
        SCRIPTS[script].main(words(script, folder, tmp_path / name, steps=1, preview_every=100, **more))
    whole, parts = (state(tmp_path / name)["optimiser"]["state"] for name in ("whole", "parts"))
    for key in whole:  # after one step Adam's mean is a share of the gradient
        one, other = whole[key]["exp_avg"], parts[key]["exp_avg"]
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()) + 1e-9)


@pytest.mark.slow
def test_activations_computed_twice_give_the_same_lora(folder, straight, tmp_path):
    train_lora.main(words("lora", folder, tmp_path / "run", gradient_checkpointing=True))
    one, other = state(straight("lora"))["net"], state(tmp_path / "run")["net"]
    assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)
    assert all(bool(tensor.any()) for tensor in one.values())  # every up has left 0


@pytest.mark.slow
def test_training_ends_when_the_held_out_loss_no_longer_falls(folder, tmp_path):
    train_lora.main(words("lora", folder, tmp_path / "run", steps=40, preview_every=1, lr=0.3, rank=8, patience=2,
                          warmup=0, placeholder_token=None, num_vectors=None, instance_prompt=None,
                          with_prior_preservation=None, class_data=None, num_class_images=None,
                          teacher_predictions=None))
    found = rows(tmp_path / "run")
    assert max(row["step"] for row in found if "loss" in row) < 40 and (tmp_path / "run/lora.safetensors").exists()


@pytest.mark.slow
def test_a_run_broken_off_while_class_pictures_are_drawn_goes_on(folder, straight, tmp_path, monkeypatch):
    plain, drawn = priors.plots.save, []

    def save(x, path, *args, **kwargs):
        drawn.append(path)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        plain(x, path, *args, **kwargs)
    monkeypatch.setattr(priors.plots, "save", save)
    with pytest.raises(KeyboardInterrupt):
        train_dreambooth.main(words("dreambooth", folder, tmp_path / "run"))
    monkeypatch.setattr(priors.plots, "save", plain)
    first = (tmp_path / "run/class/class-0000.png").stat().st_mtime_ns
    train_dreambooth.main([f"--resume={tmp_path / 'run'}"])
    assert (tmp_path / "run/class/class-0000.png").stat().st_mtime_ns == first
    assert [row["step"] for row in rows(tmp_path / "run")] == [row["step"] for row in rows(straight("dreambooth"))]


@pytest.mark.slow
def test_the_two_stages_of_pivotal_tuning_have_a_warm_up_and_a_cosine_each(straight):
    lr = [row["lr"] for row in rows(straight("pivotal")) if "loss" in row]
    assert lr == pytest.approx([5e-2, 5e-2, 1e-3, 1e-3])  # of two steps each, the first warms up


@pytest.mark.slow
def test_what_a_layer_changed_by_is_told_of_each(straight):
    for script in ("finetune", "dreambooth"):
        change = json.loads((straight(script) / "results.json").read_text())["change"]
        assert list(change)[0] == "all" and len(change) > 20 and any("attn2.to_k.weight" in name for name in change)
        each = list(change.values())[1:]
        assert each == sorted(each, reverse=True) and min(each) <= change["all"] <= max(each)


def own_pictures(root, splits, captions=True):
    """A folder of red squares with captions, in the sub-folders that are named."""
    for split, n in splits.items():
        (root / split).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (32, 32), (i, 0, 0)).save(root / split / f"{i:03d}.png")
            if captions is True or split in captions:
                (root / split / f"{i:03d}.txt").write_text("a red square")
    return root


@pytest.mark.slow
def test_a_folder_without_captions_teaches_a_word_and_no_more_pictures_are_held_out_than_are_looked_at(
        folder, tmp_path, capsys, monkeypatch):
    plain = own_pictures(tmp_path / "plain", {"": 6}, captions=())
    train_textual_inversion.main(words("textual-inversion", folder, tmp_path / "word", data=plain, pictures=None))
    assert "held-out loss: training pictures, for want of a test or val folder\n" in capsys.readouterr().out
    monkeypatch.setattr(lessons, "HELD_OUT", 5)
    many = own_pictures(tmp_path / "many", {"train": 4, "test": 12})
    config = train_finetune.Config(data=str(many), batch=2, size=32)
    training, held_out = lessons.load_pictures(config, nanodiff.load(folder))
    assert len(training) == 4 and len(held_out) == 5 and held_out.captions == ["a red square"] * 5
    index = torch.arange(5)
    assert (held_out.read(index, index)[:, 0, 0, 0] * 127.5 + 127.5).round().tolist() == [0, 3, 6, 8, 11]


def test_held_out_pictures_need_captions_and_patience_needs_held_out_pictures(folder, tmp_path, capsys):
    half = own_pictures(tmp_path / "half", {"train": 4, "test": 4}, captions=("train",))
    alone = own_pictures(tmp_path / "alone", {"": 4})
    for data, more, expected in ((half, {}, "the held-out pictures of --data"),
                                 (alone, {"patience": 2}, "holds none; expected some")):
        with pytest.raises(SystemExit) as stop:
            train_finetune.main(words("finetune", folder, tmp_path / "run", data=data, pictures=None, **more))
        assert stop.value.code == 2 and expected in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_memory_that_is_foretold_is_what_a_forward_pass_keeps(folder):
    sd = nanodiff.load(folder)
    config = train_lora.Config(data="x", variants=1)
    lesson = lessons.make_lesson(config, sd, ALONE, *[worlds.cut("train", 32, 9, specimens=1)] * 2)
    paths = lora.find_targets(sd.networks, ["attention", "resnet"])
    lora.add(sd.networks, paths, 4, 4, torch.Generator().manual_seed(0), "lora")
    one, two, five = (cost.activation_bytes(sd, lesson, n) for n in (1, 2, 5))
    assert one + 4 * (two - one) == pytest.approx(five, rel=0.02) and two > 1.3 * one
    sd.unet.checkpointing = True
    assert cost.activation_bytes(sd, lesson, 5) < 0.6 * five


def test_captions_are_left_out_as_often_as_asked_and_offset_noise_moves_whole_channels():
    config, n = train_lora.Config(caption_dropout=0.2, noise_offset=2.0), 4000
    rows = lessons.caption_rows(config, 3, torch.arange(n), torch.arange(n))
    assert abs(float((rows == -1).double().mean()) - 0.2) < 4 * (0.2 * 0.8 / n) ** 0.5
    config.noise_offset, with_offset = 0.0, lessons.step_noise(config, 3, torch.arange(n), (2, 4, 4))
    moved = with_offset - lessons.step_noise(config, 3, torch.arange(n), (2, 4, 4))
    assert torch.allclose(moved, moved[:, :, :1, :1].expand_as(moved), atol=1e-5)
    assert abs(float(moved[:, :, 0, 0].std()) - 2) < 5 * 2 / (4 * n) ** 0.5


@pytest.mark.parametrize("script, change, expected", [
    ("lora", {"rank": 0}, "--rank is 0"), ("lora", {"targets": "atention"}, "nearest: attention"),
    ("lora", {"class_data": None}, "--class_prompt"),
    ("lora", {"placeholder_token": "<other>"}, 'no caption has "<other>"'),
    ("lora", {"num_vectors": 0}, "--num_vectors is 0"),
    ("lora", {"placeholder_token": None}, "--num_vectors is for"),
    ("lora", {"placeholder_token": "texture"}, "is a word already"),
    ("lora", {"word_lr": 0}, "--word_lr is 0"),
    ("lora", {"class_data": DATA / "nano-sd", "num_class_images": 500}, "expected --num_class_images 500 or more"),
    ("lora", {"model": "nowhere"}, "nowhere does not exist"),
    ("lora", {"names": "dry warp"}, "--names is for --data woven"),
    ("lora", {"data": "woven", "names": "dry warp,dry wrap"}, "nearest: dry warp"),
    ("lora", {"data": "zigzaged"}, "zigzaged"), ("lora", {"batch": 7}, "--batch 7 is more than the 6"),
    ("lora", {"size": 30}, "such as 32"), ("lora", {"ema": 0.9}, "--ema"), ("lora", {"sampler": "dimm"}, "ddim"),
    ("lora", {"caption_dropout": 1}, "--caption_dropout is 1"), ("lora", {"each": 0}, "--each is 0"),
    ("finetune", {"zero_snr": True}, "expected a model that predicts v"),
    ("finetune", {"weight_decay": -1}, "--weight_decay is -1"),
    ("textual-inversion", {"placeholder_token": "texture"}, "is a word already"),
    ("textual-inversion", {"initializer_token": "qwxzt qwxzt"}, "--initializer_token"),
    ("textual-inversion", {"validation_prompt": "a photo"}, "does not hold the word"),
    ("textual-inversion", {"learnable_property": "stile"}, "nearest: style"),
    ("textual-inversion", {"num_vectors": 0}, "--num_vectors is 0"),
    ("dreambooth", {"class_prompt": "a sks texture"}, "are both"),
    ("dreambooth", {"class_batch": -1}, "--class_batch is -1"),
    ("dreambooth", {"num_class_images": 0}, "--num_class_images is 0"),
    ("dreambooth", {"prior_loss_weight": -1}, "--prior_loss_weight is -1"),
    ("dreambooth", {"teacher_predictions": -1}, "--teacher_predictions is -1"),
    ("lora", {"recipe": "wovn"}, "nearest: woven"),
    ("lora", {"recipe": "woven", "with_prior_preservation": False}, "--recipe plain"),
    ("dreambooth", {"class_prompt": None, "class_data": "there"}, "there is no folder"),
    ("dreambooth", {"with_prior_preservation": None},
     "--class_prompt is for prior preservation; expected --with_prior_preservation with it"),
    ("lora", {"with_prior_preservation": None, "class_data": None, "teacher_predictions": None},
     "--num_class_images is for prior preservation; expected --with_prior_preservation"),
    ("lora", {"retention": " | "}, '--retention is " | "'),
    ("textual-inversion", {"caption_dropout": 0.1}, "unknown flag --caption_dropout"),
    ("pivotal", {"word_steps": 4}, "--word_steps is 4"),
    ("pivotal", {"targets": "text"}, '--targets "text" is unknown'),
    ("pivotal", {"patience": 1}, "unknown flag --patience"),
])
def test_wrong_input_ends_with_one_sentence_before_anything_is_written(script, change, expected, folder, tmp_path,
                                                                              capsys):
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main(words(script, folder, tmp_path / "run", **change))
    output = capsys.readouterr()
    assert stop.value.code == 2 and expected in output.err and output.err.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_recipe_sets_flags_and_a_flag_given_by_hand_beats_it(monkeypatch):
    monkeypatch.setattr(train_lora, "train", lambda config: config)
    first = train_lora.main([])
    assert first.recipe == "woven" and first.placeholder_token[-1] == "sf_weft" and first.class_data == "worlds"
    assert train_lora.main(["--class_batch=3"]).class_batch == 3 and first.class_batch == 2
    plain = train_lora.main(["--data=zigzagged", "--instance_prompt=a sks texture"])
    assert plain.recipe == "plain" and not plain.placeholder_token and not plain.with_prior_preservation
    assert train_lora.main(["--model=x"]).recipe == "plain"
    assert train_lora.main(["--recipe=woven", "--data=volumes"]).num_class_images == 1500
    large = train_lora.main(["--recipe=sd15", "--rank=8"])
    assert (large.rank, large.lr, large.targets) == (8, 1e-4, ("attention",))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_give_the_gradient_of_one(script, folder, tmp_path):
    """After a step Adam's mean is a share of the gradient; of pivotal tuning the LoRA's, after a step of the word."""
    changes = {"class_batch": 2} if "num_class_images" in EXTRA.get(script, {}) else {}
    changes |= {"stop": 2, "word_steps": 1} if script == "pivotal" else {"stop": 1}
    changes |= {"train_text": True} if script in ("finetune", "dreambooth") else {"gradient_checkpointing": True}
    SCRIPTS[script].main(words(script, folder, tmp_path / "one", **changes))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                           SCRIPTS[script].__file__, *words(script, folder, tmp_path / "two", **changes)],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (state(tmp_path / name)["optimiser"]["state"] for name in ("one", "two"))
    largest = max(part["exp_avg"].norm() for part in one.values())
    for key in one:
        a, b = one[key]["exp_avg"], two[key]["exp_avg"]
        assert (a - b).norm() <= 1e-4 * a.norm() + 1e-7 * largest  # a key's bias has no gradient but rounding


def test_rare_words_are_proposed_without_a_training(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_dreambooth.main([f"--model={folder}", "--identifiers", "--instance_prompt=a dtd_zigzagged texture"])
    said = capsys.readouterr().out
    assert said.startswith("rare words: ") and "dtd_zigzagged: d | td | _ |" in said and not any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_classifier_is_asked_of_drawn_pictures_alone(folder):
    """It knows whole slices of drawn specimens: crops of an engineer's own volumes may be anything to it."""
    sd, pictures = nanodiff.load(folder), worlds.cut("train", 32, 9, specimens=1)
    config = train_lora.Config(variants=1)
    lesson = lessons.make_lesson(config, sd, ALONE, pictures, pictures)
    assert [name for _, name in lesson.prompts] == list(worlds.WOVEN)
    config.data = "volumes"
    lesson = lessons.make_lesson(config, sd, ALONE, pictures, pictures)
    assert [name for _, name in lesson.prompts] == [None] * 9 and lesson.prompts[0][0] == "sf_dry sf_thickness"
    config.data, pictures.captions = "woven", ["a sks texture"] * 9  # one prompt for nine classes
    assert lessons.make_lesson(config, sd, ALONE, pictures, pictures).prompts == [("a sks texture", None)]
