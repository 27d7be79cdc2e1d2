"""The classifier of the drawn worlds that ships: accuracy on held-out seeds and nonsense; judge on known sets."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nanodiff import worlds
from nanodiff.classifiers import train, worlds as world_classifier
from nanodiff.classifiers.negatives import TRAINING_KINDS, make_nonsense
from nanodiff.classifiers.worlds import (NONSENSE, WEIGHTS, WorldClassifier, calibration_error, classify,
                                         load_classifier, prepare)
from nanodiff.errors import UserError
from nanodiff.metrics.agreement import agreement, compare, judge


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


@pytest.fixture(scope="module")
def held_out():
    """Twenty pictures of every drawn class and thirty of every woven one, of seeds that the training never saw."""
    config = train.Config(workers=1, seed=1)
    return train.draw(config, "test", 20, 2, 30)


@pytest.fixture(scope="module")
def predictions(classifier, held_out):
    return classify(classifier, held_out["x"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def of_group(group, held_out):
    return torch.isin(held_out["class"], torch.tensor([train.CLASSES.index(n) for n in worlds.GROUPS[group]]))


def test_the_classifier_is_small_and_knows_every_class_of_the_worlds(classifier):
    assert WEIGHTS.stat().st_size <= 4e6
    assert classifier.classes == list(train.CLASSES) and classifier.colours == list(train.COLOURS)
    assert len(set(classifier.classes)) == len(classifier.classes) >= 20 + 8 + 10 + 9 + 1


@pytest.mark.slow
def test_97_of_100_textures_and_things_of_held_out_seeds_are_classified_right(predictions, held_out):
    in_groups = of_group("textures", held_out) | of_group("things", held_out)
    assert (predictions.classes.argmax(1) == held_out["class"])[in_groups].double().mean() >= 0.97


@pytest.mark.slow
def test_97_of_100_slices_of_unseen_specimens_are_classified_right(predictions, held_out):
    in_group = of_group("woven", held_out)
    assert (predictions.classes.argmax(1) == held_out["class"])[in_group].double().mean() >= 0.97


@pytest.mark.slow
def test_noise_and_nonsense_are_rejected_and_real_pictures_are_not(classifier, predictions, held_out):
    x, rejected = world_classifier.as_float(held_out["x"][::3]), []
    for name, kind in TRAINING_KINDS.items():
        negatives = make_nonsense(x, generator(4), {name: kind})
        rejected += [guess == NONSENSE for guess in classify(classifier, negatives).names()]
    assert sum(rejected) >= 0.99 * len(rejected)
    assert sum(name == NONSENSE for name in predictions.names()) <= 0.01 * len(held_out["x"])


@pytest.mark.slow
def test_colours_and_counts_are_predicted(predictions, held_out):
    for role, probabilities, least in (("figure", predictions.figure, 0.9), ("ground", predictions.ground, 0.9),
                                       ("count", predictions.count, 0.97)):
        labelled = held_out[role] != train.NO_ANSWER
        assert (probabilities.argmax(1)[labelled] == held_out[role][labelled]).double().mean() >= least, role


@pytest.mark.slow
def test_the_classifier_is_as_right_as_it_is_sure(predictions, held_out):
    assert calibration_error(predictions.classes, held_out["class"]) <= 0.02
    assert predictions.classes.sum(1).sub(1).abs().max() < 1e-5
    assert predictions.features.shape == (len(held_out["x"]), 128)


@pytest.mark.slow
def test_pictures_of_any_size_and_of_one_channel_are_classified(classifier, held_out):
    x = held_out["x"][:40]
    large = torch.nn.functional.interpolate(x.float(), (128, 128), mode="nearest").round().to(torch.uint8)
    assert classify(classifier, large).names() == classify(classifier, x).names()
    assert prepare(torch.zeros(2, 1, 30, 50)).shape == (2, 3, 64, 64)
    wide = torch.cat([torch.zeros(1, 1, 64, 10), torch.ones(1, 1, 64, 64), torch.zeros(1, 1, 64, 10)], 3)
    assert torch.equal(prepare(wide), torch.ones(1, 3, 64, 64))


@pytest.mark.slow
def test_predictions_do_not_depend_on_the_batch_and_bytes_equal_floats(classifier, held_out):
    x = held_out["x"][:60]
    expected = classify(classifier, x)
    for other in (classify(classifier, x, batch=7), classify(classifier, x.float() / 127.5 - 1)):
        assert torch.allclose(expected.features, other.features, atol=1e-3)


def test_other_shapes_and_values_that_are_not_finite_are_refused(classifier):
    for shape in ((3, 64, 64), (2, 4, 64, 64), (0, 3, 64, 64)):
        with pytest.raises(UserError, match="expects pictures"):
            classify(classifier, torch.zeros(shape))
    x = torch.zeros(5, 3, 64, 64)
    x[2, 0, 3, 3] = float("nan")
    with pytest.raises(UserError, match="1 of 5 pictures"):
        classify(classifier, x)


def test_agreement_counts_classes_and_colours_in_either_order():
    classifier = WorldClassifier(["dotted", "striped", NONSENSE], ["red", "blue", "green"])

    def one_hot(indices, n):
        return torch.nn.functional.one_hot(torch.tensor(indices), n).float()
    predictions = world_classifier.Predictions(
        classifier, torch.zeros(4, 128), one_hot([0, 0, 1, 2], 3), one_hot([0, 0, 1, 2], 3), one_hot([1, 2, 0, 2], 3),
        one_hot([0, 0, 0, 0], 2))
    shares = agreement(predictions, ["dotted", "dotted", "dotted", "striped"],
                      [("red", "blue"), ("red", "blue"), ("red", "blue"), (None, "green")])
    assert shares["class"] == 0.5 and shares["by_class"] == {"dotted": 2 / 3, "striped": 0}
    assert shares["worst_class"] == 0
    assert shares["rejected"] == 0.25
    assert shares["colours"] == 0.75  # the third holds both, the other way round; the second is red on green
    assert shares["class_and_colours"] == 0.25
    with pytest.raises(UserError, match="nearest: dotted"):
        agreement(predictions, ["doted"] * 4)


def test_equal_sets_lie_on_the_floor_and_shifted_ones_do_not():
    x, y, z = torch.randn(3, 400, 6, generator=generator()).unbind()
    same, other = compare(x, y, z), compare(x + 3, y, z)
    assert same["frechet"] == pytest.approx(same["frechet_floor"], abs=0.3) and same["recall"] > 0.8
    assert other["frechet"] == pytest.approx(54, rel=0.1) and other["recall"] < 0.1
    assert other["frechet_floor"] == same["frechet_floor"]


@pytest.mark.slow
def test_the_judge_knows_copies_from_new_pictures_and_nonsense_from_both(classifier, held_out):
    order = torch.randperm(len(held_out["x"]), generator=generator(3))
    a, b, c = held_out["x"][order].split(len(order) // 3)[:3]
    copied, new = judge(b, a, b, classifier), judge(c, a, b, classifier)
    json.dumps(new)
    assert copied["memorised"] and copied["nearest_train"] == 0 and not new["memorised"]
    assert new["frechet"] == pytest.approx(new["frechet_floor"], rel=0.5) and new["rejected_share"] < 0.02
    assert sum(new["class_shares"].values()) == pytest.approx(1)
    noise = judge(torch.randn(len(c), 3, 64, 64, generator=generator()), a, b, classifier)
    assert noise["rejected_share"] > 0.95 and noise["frechet"] > 5 * noise["frechet_floor"] and noise["recall"] < 0.05


@pytest.mark.slow
def test_samples_that_come_sorted_by_class_are_compared_as_shuffled_ones(classifier, held_out):
    x = held_out["x"][held_out["class"] < 20]
    order = held_out["class"][held_out["class"] < 20].argsort()
    a, b = x[order][::2], x[order][1::2]
    verdict = judge(a, b[::2], b[1::2], classifier)  # half as many real ones: only half of the samples are compared
    assert verdict["compared"] == len(b) // 2 < len(a) // 1.5
    assert verdict["frechet"] == pytest.approx(verdict["frechet_floor"], rel=0.5) and verdict["recall"] > 0.5


def test_missing_or_foreign_weights_name_the_command_that_makes_them(tmp_path):
    foreign, cut = tmp_path / "foreign.safetensors", tmp_path / "cut.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign)
    cut.write_bytes(WEIGHTS.read_bytes()[:1000])
    for path in (tmp_path / "none.safetensors", foreign, cut):
        with pytest.raises(UserError, match="python -m nanodiff.classifiers.train"):
            load_classifier(path)


def test_wrong_flags_are_refused_before_anything_is_drawn(tmp_path, capsys):
    for flags, sentence in ((["--epochs", "0"], "--epochs is 0"), (["--out", str(tmp_path)], "is a folder")):
        with pytest.raises(SystemExit) as stop:
            train.main(flags)
        assert stop.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.slow
def test_training_on_a_few_pictures_writes_weights_and_their_page(tmp_path, capsys):
    train.main(["--pictures=2", "--specimens=1", "--slices=2", "--epochs=1", "--batch=16", "--test=2", "--workers=1",
                "--test_specimens=1", "--scale=0.1", "--seed=3", f"--out={tmp_path / 'r.safetensors'}"])
    assert load_classifier(tmp_path / "r.safetensors").temperature > 0
    text, output = (tmp_path / "r.md").read_text(), capsys.readouterr().out
    assert "--pictures 2 --specimens 1" in text and "| blocks | no |" in text and "| blocks | no |" in output
