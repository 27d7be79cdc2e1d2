"""The digit classifier that ships: accuracy on digits and broken digits; judge_digits on sets of known quality."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nanodiff.classifiers import digit_negatives, digits as digit_classifier, worlds as world_classifier
from nanodiff.classifiers.digits import DigitClassifier, NOT_A_DIGIT, WEIGHTS, classify, load_classifier
from nanodiff.classifiers.worlds import calibration_error, fit_temperature
from nanodiff.errors import UserError
from nanodiff.formats.weights import write_weights
from nanodiff.metrics.agreement import judge_digits
from nanodiff.training import datasets


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


@pytest.fixture(scope="module")
def digits():
    test = datasets.load("mnist", split="test")
    return test.pixels, test.labels


@pytest.fixture(scope="module")
def train():
    return datasets.load("mnist", split="train").pixels


@pytest.fixture(scope="module")
def predictions(classifier, digits):
    return classify(classifier, digits[0])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_classifier_is_small():
    assert sum(p.numel() for p in DigitClassifier().parameters()) <= 400_000
    assert WEIGHTS.stat().st_size <= 1.6e6


@pytest.mark.slow
def test_99_of_100_test_digits_are_classified_right_among_eleven_classes(predictions, digits):
    assert (predictions[1].argmax(dim=1) == digits[1]).double().mean() >= 0.99


@pytest.mark.slow
def test_97_of_100_test_digits_are_classified_as_a_digit_with_probability_0_9(predictions):
    assert (predictions[1][:, :10].amax(dim=1) >= 0.9).double().mean() >= 0.97
    assert (predictions[1].argmax(dim=1) == NOT_A_DIGIT).double().mean() <= 0.01


@pytest.mark.slow
def test_no_class_of_legitimate_digits_is_often_called_broken(predictions, digits):
    for digit in range(10):
        of_class = predictions[1][digits[1] == digit]
        assert (of_class[:, :10].amax(dim=1) >= 0.9).double().mean() >= 0.95, digit


@pytest.mark.slow
def test_the_classifier_is_as_right_as_it_is_sure(predictions, digits):
    assert calibration_error(predictions[1], digits[1]) <= 0.01
    assert predictions[1].sum(dim=1).sub(1).abs().max() < 1e-5


@pytest.mark.slow
def test_features_are_finite_and_64_wide(predictions):
    assert predictions[0].shape == (10_000, 64) and predictions[0].isfinite().all()


@pytest.mark.parametrize("noise", ["normal", "uniform", "blank", "white"])
def test_noise_and_blank_pages_are_rejected(classifier, noise):
    x = {"normal": torch.randn(500, 1, 28, 28, generator=generator()),
         "uniform": torch.rand(500, 1, 28, 28, generator=generator()) * 2 - 1,
         "blank": torch.full((1, 1, 28, 28), -1.0), "white": torch.ones(1, 1, 28, 28)}[noise]
    assert (classify(classifier, x)[1].argmax(dim=1) == NOT_A_DIGIT).double().mean() >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("kind", digit_negatives.HELD_OUT_KINDS)
def test_broken_digits_of_kinds_never_seen_are_rejected(classifier, digits, kind):
    x = digit_negatives.HELD_OUT_KINDS[kind](world_classifier.as_float(digits[0][:1000]), digits[1][:1000], generator())
    probabilities = classify(classifier, x)[1]
    assert (probabilities.argmax(dim=1) == NOT_A_DIGIT).double().mean() >= 0.95
    assert (probabilities[:, :10].amax(dim=1) >= 0.9).double().mean() <= 0.05


@pytest.mark.slow
def test_slightly_soft_or_noisy_digits_remain_digits(classifier, digits):
    x = world_classifier.as_float(digits[0][:1000])
    for y in (digit_negatives.blur(x, 0.5), x + 0.05 * torch.randn(x.shape, generator=generator()), 0.95 * x):
        assert (classify(classifier, y)[1][:, :10].amax(dim=1) >= 0.9).double().mean() >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*digit_negatives.TRAINING_KINDS, *digit_negatives.HELD_OUT_KINDS])
def test_breaking_repeats_with_its_seed_and_leaves_the_digits_alone(digits, kind):
    x, labels = world_classifier.as_float(digits[0][:40]), digits[1][:40]
    before, kinds = x.clone(), {**digit_negatives.TRAINING_KINDS, **digit_negatives.HELD_OUT_KINDS}
    y = digit_negatives.break_digits(x, labels, generator(5), {kind: kinds[kind]})
    assert torch.equal(x, before)
    assert torch.equal(y, digit_negatives.break_digits(x, labels, generator(5), {kind: kinds[kind]}))
    assert y.shape == x.shape and y.abs().max() <= 1 and (y != x).flatten(1).any(dim=1).all()


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_a_batch_larger_than_the_set_gives_n_rows(classifier, digits, n):
    assert [len(a) for a in classify(classifier, digits[0][:n], batch=50)] == [n, n]


@pytest.mark.slow
def test_predictions_do_not_depend_on_the_batch_and_bytes_equal_floats(classifier, digits):
    x = digits[0][:100]
    expected = classify(classifier, x)
    for other in (classify(classifier, x, batch=7), classify(classifier, x.float() / 127.5 - 1)):
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(expected, other))


@pytest.mark.slow
def test_probabilities_are_logits_over_the_temperature(classifier, digits):
    x = world_classifier.as_float(digits[0][:20])
    expected = (classifier(x) / classifier.temperature).softmax(dim=1)
    assert torch.allclose(classifier.probabilities(x), expected)
    assert torch.allclose(classify(classifier, x)[1], expected)
    assert classifier.temperature != 1.0


def test_pictures_of_another_shape_or_with_nan_are_refused(classifier):
    with pytest.raises(UserError, match=r"\[3, 3, 28, 28\]"):
        classify(classifier, torch.zeros(3, 3, 28, 28))
    x = torch.zeros(5, 1, 28, 28)
    x[2, 0, 3, 3] = float("nan")
    with pytest.raises(UserError, match="1 of 5 pictures"):
        classify(classifier, x)


def test_missing_or_foreign_weights_name_the_command_that_makes_them(tmp_path):
    foreign, cut = tmp_path / "foreign.safetensors", tmp_path / "cut.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign)
    cut.write_bytes(WEIGHTS.read_bytes()[:1000])
    for path in (tmp_path / "none.safetensors", foreign, cut):
        with pytest.raises(UserError, match="python -m nanodiff.classifiers.digits"):
            load_classifier(path)


@pytest.mark.slow
def test_saved_weights_classify_the_same(classifier, digits, tmp_path):
    metadata = {"temperature": str(classifier.temperature)}
    write_weights(tmp_path / "deep" / "r.safetensors", classifier.state_dict(), metadata)
    again = load_classifier(tmp_path / "deep" / "r.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(classify(again, digits[0][:9]), classify(classifier, digits[0][:9])))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["r.safetensors"]


def test_calibration_error_of_known_answers():
    # 0.8 sure and right 3 times in 4, 0.6 sure and right 1 time in 2: half of 0.05 and half of 0.1
    probabilities = torch.tensor([[0.8, 0.2]] * 4 + [[0.4, 0.6]] * 4)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0])
    assert calibration_error(probabilities, labels) == pytest.approx(0.075, abs=1e-6)


def test_the_fitted_temperature_undoes_overconfidence():
    logits = 2 * torch.randn(4000, 11, generator=generator(1))
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator(2)).flatten()
    assert fit_temperature((2 * logits).softmax(dim=1), labels) == pytest.approx(2, abs=0.1)


@pytest.mark.slow
def test_the_judge_puts_training_digits_on_the_floor_and_calls_them_copies(classifier, digits, train):
    drawn = torch.randperm(60_000, generator=generator(9))[:1000]
    verdict = judge_digits(train[drawn], digits[0], train, classifier)
    json.dumps(verdict)
    assert verdict["n"] == verdict["compared"] == 1000
    assert verdict["digit_share"] > 0.97 and verdict["smallest_digit_share"] > 0.05
    assert sum(verdict["digit_shares"]) == pytest.approx(1)
    assert verdict["frechet"] == pytest.approx(verdict["frechet_floor"], rel=0.5)
    assert verdict["coverage"] == pytest.approx(verdict["coverage_floor"], abs=0.03)
    assert verdict["memorised"] and verdict["copied_share"] == 1 and verdict["nearest_train"] == 0


@pytest.mark.slow
def test_the_judge_does_not_call_unseen_digits_copies(classifier, digits, train):
    drawn = torch.randperm(10_000, generator=generator(9))
    verdict = judge_digits(digits[0][drawn[:500]], digits[0][drawn[500:]], train, classifier)
    assert not verdict["memorised"]
    assert verdict["nearest_train"] == pytest.approx(verdict["nearest_train_test"], rel=0.1)


@pytest.mark.slow
def test_the_judge_finds_noise_a_missing_digit_and_broken_digits(classifier, digits, train):
    pixels, labels = digits
    few = train[:2000]
    noise = judge_digits(torch.randn(300, 1, 28, 28, generator=generator()), pixels, few, classifier)
    assert noise["digit_share"] < 0.02 and noise["rejected_share"] > 0.95 and noise["coverage"] < 0.05
    no_seven = judge_digits(pixels[5000:][labels[5000:] != 7][:300], pixels, few, classifier)
    assert no_seven["smallest_digit_share"] == min(no_seven["digit_shares"]) == no_seven["digit_shares"][7] < 0.02
    broken = digit_negatives.break_digits(world_classifier.as_float(pixels[-300:]), labels[-300:], generator())
    verdict = judge_digits(broken, pixels, few, classifier)
    assert verdict["digit_share"] < 0.05 and verdict["frechet"] > 10 * verdict["frechet_floor"]


def test_wrong_flags_are_refused_before_any_training(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        digit_classifier.main(["--out", str(tmp_path)])
    with pytest.raises(UserError, match="--epochs is 0"):
        digit_classifier.main(["--epochs", "0", "--out", str(tmp_path / "r.safetensors")])


@pytest.mark.slow
def test_training_on_a_few_digits_writes_weights_and_their_page(tmp_path, monkeypatch, capsys):
    small = datasets.load("mnist", split="test")
    small.pixels, small.labels = small.pixels[:1200], small.labels[:1200]
    monkeypatch.setattr(datasets, "load", lambda name, split: small)
    monkeypatch.setattr(digit_classifier, "HELD_OUT", 200)
    digit_classifier.main(["--epochs", "1", "--seed", "3", "--out", str(tmp_path / "r.safetensors")])
    assert load_classifier(tmp_path / "r.safetensors").temperature > 0
    page = (tmp_path / "r.md").read_text()
    assert "--epochs 1 --seed 3" in page and "| mosaic | no |" in page and "| mosaic | no |" in capsys.readouterr().out
