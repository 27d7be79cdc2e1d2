"""The comparison of fine-tuning methods, from the outside: every study at a tiny budget, and its claims by hand."""

import copy
import importlib
import json

import pytest
import torch

import nanodiff
from nanodiff import worlds
from nanodiff.errors import UserError
from nanodiff.report import compare, studies
from nanodiff.report.judge import Judge
from nanodiff.report.restore import restore
from nanodiff.training.checkpoint import checkpoints
from nanodiff.worlds import textures
import tiny_sd


DRAWN = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "sd1"
    tiny_sd.write_model("sd1", path)
    return path


def in_process(script, flags):
    """Stands in for run_script: the same words to the same script, without the seconds that a new process takes."""
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items() if value != ""]
    assert importlib.import_module(script.removesuffix(".py")).main(words) is not None


@pytest.fixture
def quick(monkeypatch):
    """Scripts in this process, on the CPU, and real pictures and specimens drawn once for all tests."""
    def once(plain):
        def drawn(*args, **options):
            key = plain.__name__, args, tuple(sorted(options.items()))
            if key not in DRAWN:
                DRAWN[key] = plain(*args, **options)
            return copy.copy(DRAWN[key])  # a script gives its pictures other captions
        return drawn
    for plain in (worlds.cut, worlds.load):
        monkeypatch.setattr(worlds, plain.__name__, once(plain))
    monkeypatch.setattr(compare, "run_script", lambda script, flags: in_process(script, {"device": "cpu", **flags}))


def flags(folder, out, study, **changes):
    flags = {"model": folder, "steps": 3, "n": 6, "base": 1, "pictures": 16, "seeds": "0", "sample_steps": 1,
             "study": study, "out": out, **changes}
    return [f"--{name}={value}" for name, value in flags.items()]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Fréchet distance")
@pytest.mark.parametrize("study", studies.STUDIES)
def test_every_study_runs_to_its_table_and_its_sheet(study, folder, tmp_path, quick):
    cells = studies.STUDIES[study]("woven")
    compare.main(flags(folder, tmp_path, study))
    found = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert list(found) == ["not taught", *(studies.moment(cell.name, i, cell.moments) for cell in cells
                                           for i in range(1, cell.moments + 1))]
    page = (tmp_path / "compare.md").read_text()
    assert (tmp_path / "compare.png").exists() and "| not taught |" in page
    assert page.count("**confirmed**") + page.count("**contradicted**") + page.count("**undecided**") \
        == len(studies.CLAIMS.get(study, ())) + (study == "knobs")
    assert ("between two real specimens" in page) == (study != "dtd")  # the only one without woven slices


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Fréchet distance")
def test_cells_that_are_there_are_not_made_again_and_other_flags_are_refused(folder, tmp_path, quick, monkeypatch, capsys):
    cells = studies.noun("zigzagged")
    monkeypatch.setitem(studies.STUDIES, "noun", lambda concept: cells[:1])
    monkeypatch.setitem(studies.CLAIMS, "noun", [])
    compare.main(flags(folder, tmp_path, "noun"))
    first = (tmp_path / "compare.md").read_text()
    monkeypatch.setattr(compare, "taught", None)
    compare.main(flags(folder, tmp_path, "noun"))
    assert (tmp_path / "compare.md").read_text() == first
    with pytest.raises(SystemExit) as stop:
        compare.main(flags(folder, tmp_path, "noun", n=8))
    assert stop.value.code == 2 and "holds cells of other flags" in capsys.readouterr().err


@pytest.mark.parametrize("change, expected", [
    ({"study": "method"}, "nearest: methods"), ({"concept": "zigzaged"}, "nearest: zigzagged"),
    ({"pictures": 8}, "--pictures is 8"), ({"steps": 2}, "--steps is 2"), ({"seeds": "a"}, '--seeds is "a"')])
def test_wrong_flags_end_with_one_sentence_before_anything_is_written(change, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(flags("", tmp_path / "out", change.pop("study", "methods"), **change))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


# --- what is measured -------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("script", ["finetune", "dreambooth", "textual_inversion", "lora", "pivotal"])
def test_the_last_moment_of_a_training_is_what_its_files_hold(script, folder, tmp_path):
    more = {"pivotal": ["--word_steps=1"], "lora": ["--alpha=3", "--rank=4", "--placeholder_token=<new>", "--num_vectors=2",
                                                    "--instance_prompt=a <new> texture"]}.get(script, [])
    importlib.import_module(f"train_{script}").main([
        f"--model={folder}", f"--out={tmp_path / 'run'}", "--data=zigzagged", "--pictures=16", "--batch=2", "--steps=2",
        "--sample_steps=1", "--each=1", "--workers=1", "--device=cpu", "--retention=two zebras", "--checkpoint_every=1",
        "--lr=0.01", *more])
    ours = restore(nanodiff.load(folder), tmp_path / "run", 2)
    files = compare.load_taught(str(folder), tmp_path / "run")
    base = nanodiff.load(folder)
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    one, other = (sd.unet(x, t, sd.encode_text("a <new> texture")) for sd in (ours, files))
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.allclose(one, base.unet(x, t, base.encode_text("a <new> texture")), atol=1e-5)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["00000001", "00000002"]


@pytest.mark.slow
def test_a_folder_that_is_no_fine_tuning_run_has_no_moments(folder, tmp_path):
    with pytest.raises(UserError, match="no fine-tuning run"):
        restore(nanodiff.load(folder), tmp_path, 2)


class Painter(Judge):
    """A judge before whom real pictures are laid, instead of a model's."""

    def __init__(self, n):
        super().__init__(n=n, base=1)
        self.lies = {}

    def draw(self, sd, prompts, seed):
        classes = [self.lies.get(prompt, "striped") for prompt in prompts]
        return torch.stack([self.pictures(name, 1)[i % self.n] for i, name in enumerate(classes)]).float() / 127.5 - 1


@pytest.mark.filterwarnings("ignore:Fréchet distance")
def test_real_pictures_are_judged_as_real_and_a_prompt_that_shows_another_class_as_wrong():
    judge = Painter(12)
    judge.untaught = lambda prompt: judge.real(("striped",))[:12]
    judge.lies = {"a": "zigzagged", "b": "dotted"}
    numbers, shown = judge.measure(None, {"a": ("zigzagged",), "b": ("zigzagged",)}, "a texture")
    assert numbers["by_prompt"]["a"] >= 0.8 and numbers["by_prompt"]["b"] <= 0.2 and len(shown) == 24
    assert numbers["fidelity"] == pytest.approx(sum(numbers["by_prompt"].values()) / 2)
    assert numbers["leak"] == 0 and 0.5 < numbers["variety"] < 1.5
    alike, _ = judge.measure(None, {"a": ("zigzagged",)}, "a texture")
    assert alike["frechet"] < numbers["frechet"]


@pytest.mark.slow
@pytest.mark.parametrize("sentence, first", [
    ("{prompt} in {a} and {b}", "a sks texture in red and white"),
    ("a photo of a {a} and {b} {bare}", "a photo of a red and white sks texture")])
def test_a_new_word_in_two_colours_counts_when_class_and_colours_are_right(sentence, first):
    class Colourful(Judge):
        def draw(self, sd, prompts, seed):
            self.said = prompts
            pairs = [[word for word in prompt.split() if word in textures.COLOURS] for prompt in prompts]
            if self.kind == "woven slices":
                grey = self.pictures("dry weft", 1)[:, :1].float() / 255
                one, other = (torch.tensor([textures.COLOURS[pair[i]] for pair in pairs]).view(-1, 3, 1, 1) for i in (0, 1))
                return (grey * one + (1 - grey) * other) / 127.5 - 1
            drawn = [textures.draw(i, self.kind, 64, "test", colours=pair if self.right else (pair[0], "grey"))[0]
                     for i, pair in enumerate(pairs)]
            return torch.stack([torch.as_tensor(one).permute(2, 0, 1) for one in drawn]).float() / 127.5 - 1

    judge, found = Colourful(n=20, base=1), {}
    for judge.kind, judge.right in (("striped", True), ("dotted", True), ("striped", False)):
        found[judge.kind, judge.right], drawn = judge.composition(None, sentence, {"a sks texture": ("striped",)})
    assert judge.said[0] == first and len(judge.said) == len(drawn) == 20 and len(set(judge.said)) == 10
    assert not any(" a orange" in said for said in judge.said)
    assert found["striped", True] >= 0.8 and found["dotted", True] <= 0.1 and found["striped", False] == 0
    judge.right, asks = True, {"a sks texture": studies.WOVEN}
    for judge.kind, low, high in (("dotted", 0, 0.15), ("woven slices", 0.4, 1)):  # slices tinted are half of the colours only
        assert low <= judge.composition(None, sentence, asks)[0] <= high


@pytest.mark.slow
@pytest.mark.parametrize("figure, ground", [("red", "white"), ("yellow", "blue"), ("black", "green")])
def test_woven_slices_in_two_colours_are_read_as_woven_and_the_base_world_in_grey_is_not(figure, ground):
    judge = Judge(n=4, base=1)
    grey = torch.cat([judge.pictures(name, 1) for name in studies.WOVEN])[:, :1].float() / 255
    one, other = (torch.tensor(textures.COLOURS[name]).view(1, 3, 1, 1) / 127.5 - 1 for name in (figure, ground))
    read = judge.names_in_grey(grey * one + (1 - grey) * other)
    assert sum(not names.isdisjoint(studies.WOVEN) for names in read) >= 0.9 * len(read)
    known = judge.names_in_grey(worlds.load("test", 64, 90).pixels.float() / 127.5 - 1)
    assert sum(not names.isdisjoint(studies.WOVEN) for names in known) <= 0.15 * len(known)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Fréchet distance")
def test_slices_of_another_specimen_are_as_far_as_the_floor_and_other_pictures_further():
    judge = Painter(8)
    name = "dry warp"
    x = torch.stack([one.float().mean(0) / 127.5 - 1 for one in judge.pictures(name, 1)])
    numbers = judge.material(x[None], [(name,)])
    for key in ("grey", "two_point", "spectrum"):
        assert numbers[key] == pytest.approx(numbers[key + "_floor"], abs=1e-5)
    noise = judge.material(torch.rand_like(x)[None], [(name,)])
    assert noise["spectrum"] > 2 * numbers["spectrum"] and set(numbers) <= {
        key + end for key in compare.MATERIAL for end in ("", "_floor")}


def test_a_claim_is_confirmed_beyond_the_spread_contradicted_the_other_way_and_undecided_between(monkeypatch):
    claim = studies.Claim("a keeps more than b", "drift", ("a",), ("b",))
    monkeypatch.setitem(studies.CLAIMS, "noun", [claim])

    def verdict(a, b):
        line, = studies.verdicts("noun", {name: [{"drift": x} for x in values] for name, values in (("a", a), ("b", b))})
        return line.split("**")[1]
    assert verdict([3, 3.2], [1, 1.2]) == "confirmed" and verdict([1, 1.2], [3, 3.2]) == "contradicted"
    assert verdict([1, 3], [1, 2]) == "undecided" == verdict([3], [1])  # of one seed nothing is known of a distance


@pytest.mark.parametrize("script", ["train_lora.py", "train_pivotal.py"])
def test_the_same_seconds_are_reckoned_from_both_stages_of_a_training(script, tmp_path, monkeypatch):
    def run(script, flags):
        first = int(flags.get("word_steps", 0))
        flags["out"].mkdir(parents=True)
        clock, lines = 5.0, []
        for step in range(1, flags["steps"] + 1):  # the first three of a stage are slow, the second stage's take twice as long
            warm = step <= 3 or first < step <= first + 3
            clock += 1.0 if warm else 0.02 if step > first else 0.01
            lines.append(json.dumps({"step": step, "loss": 1.0, "seconds": clock}))
        (flags["out"] / "log.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(compare, "run_script", run)
    cell = studies.Cell("x", script, {})
    expected = 0.02 if script == "train_lora.py" else 0.4 * 0.01 + 0.6 * 0.02
    assert compare.rate(cell, {}, tmp_path)["step"] == pytest.approx(expected)


def test_a_share_of_few_pictures_is_as_uncertain_as_its_counting():
    claim = studies.Claim("", "fidelity", (), (), "p")
    numbers = [{"fidelity": 0.5, "n": 50, "by_prompt": {"p": 0.5, "q": 0.5}}]
    assert studies.uncertainty([0.5], numbers, claim) == pytest.approx((0.25 / 25) ** 0.5)
    assert studies.uncertainty([2.0], numbers, studies.Claim("", "drift", (), ())) == 0


@pytest.mark.slow
def test_the_lesson_of_eight_classes_never_says_the_two_words_together(quick, tmp_path):
    eight = studies.unseen("zigzagged")[1]
    studies.write_lesson(tmp_path, [(classes, 2, caption) for classes, _, caption in eight.lesson], 32, 0)
    said = {path.read_text().strip() for path in tmp_path.rglob("*.txt")}
    assert len(said) == 8 and not any("compacted" in text and "warp" in text for text in said)
    assert any("compacted" in text for text in said) and any("warp" in text for text in said)
    assert list(eight.asks)[0] == "sf_dry sf_compacted sf_warp"
    assert len(list((tmp_path / "train").glob("*.png"))) == 16 and len(list((tmp_path / "test").glob("*.png"))) == 16
