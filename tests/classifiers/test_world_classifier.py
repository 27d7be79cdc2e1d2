"""The reader of the drawn worlds that ships: what it knows of held-out seeds, of nonsense, and what its judgements say."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nanodiff import worlds
from nanodiff.classifiers import train, worlds as classifier
from nanodiff.classifiers.negatives import TRAINING_KINDS, nonsense
from nanodiff.classifiers.worlds import NONSENSE, Reader, WEIGHTS, as_seen, calibration_error, load_reader, read_all
from nanodiff.errors import UserError
from nanodiff.metrics.agreement import agreement, compare, judge


@pytest.fixture(scope="module")
def reader():
    return load_reader()


@pytest.fixture(scope="module")
def held_out():
    """Twenty pictures of every drawn class and thirty of every woven one, of seeds that the training never saw."""
    config = train.Config(workers=1, seed=1)
    return train.draw(config, "test", 20, 2, 30)


@pytest.fixture(scope="module")
def reading(reader, held_out):
    return read_all(reader, held_out["x"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def of_group(group, held_out):
    return torch.isin(held_out["class"], torch.tensor([train.CLASSES.index(n) for n in worlds.GROUPS[group]]))


def test_the_reader_is_small_and_knows_every_class_of_the_worlds(reader):
    assert WEIGHTS.stat().st_size <= 4e6
    assert reader.classes == list(train.CLASSES) and reader.colours == list(train.COLOURS)
    assert len(set(reader.classes)) == len(reader.classes) >= 20 + 8 + 10 + 9 + 1


def test_97_of_100_textures_and_things_of_held_out_seeds_are_read_right(reading, held_out):
    seen = of_group("textures", held_out) | of_group("things", held_out)
    assert (reading.classes.argmax(1) == held_out["class"])[seen].double().mean() >= 0.97


def test_97_of_100_slices_of_unseen_specimens_are_read_right(reading, held_out):
    seen = of_group("woven", held_out)
    assert (reading.classes.argmax(1) == held_out["class"])[seen].double().mean() >= 0.97


def test_noise_and_nonsense_are_rejected_and_real_pictures_are_not(reader, reading, held_out):
    rejected = [(torch.tensor([name == NONSENSE for name in read_all(reader, nonsense(
        classifier.as_picture(held_out["x"][::3]), generator(4), {kind: make})).names()])) for kind, make in TRAINING_KINDS.items()]
    assert torch.cat(rejected).double().mean() >= 0.99
    assert sum(name == NONSENSE for name in reading.names()) <= 0.01 * len(held_out["x"])


def test_colours_and_numbers_are_read(reading, held_out):
    for role, answer, least in (("figure", reading.figure, 0.9), ("ground", reading.ground, 0.9),
                                ("count", reading.count, 0.97)):
        asked = held_out[role] != train.NO_ANSWER
        assert (answer.argmax(1)[asked] == held_out[role][asked]).double().mean() >= least, role


def test_the_reader_is_as_right_as_it_is_sure(reading, held_out):
    assert calibration_error(reading.classes, held_out["class"]) <= 0.02
    assert reading.classes.sum(1).sub(1).abs().max() < 1e-5 and reading.features.shape == (len(held_out["x"]), 128)


def test_pictures_of_any_size_and_of_one_channel_are_read(reader, held_out):
    x = held_out["x"][:40]
    large = torch.nn.functional.interpolate(x.float(), (128, 128), mode="nearest").round().to(torch.uint8)
    assert read_all(reader, large).names() == read_all(reader, x).names()
    assert as_seen(torch.zeros(2, 1, 30, 50)).shape == (2, 3, 64, 64)
    wide = torch.cat([torch.zeros(1, 1, 64, 10), torch.ones(1, 1, 64, 64), torch.zeros(1, 1, 64, 10)], 3)
    assert torch.equal(as_seen(wide), torch.ones(1, 3, 64, 64))


def test_reading_does_not_depend_on_the_batch_and_bytes_equal_floats(reader, held_out):
    x = held_out["x"][:60]
    whole = read_all(reader, x)
    for other in (read_all(reader, x, batch=7), read_all(reader, x.float() / 127.5 - 1)):
        assert torch.allclose(whole.features, other.features, atol=1e-3)


def test_other_shapes_and_values_that_are_not_finite_are_refused(reader):
    for shape in ((3, 64, 64), (2, 4, 64, 64), (0, 3, 64, 64)):
        with pytest.raises(UserError, match="expects pictures"):
            read_all(reader, torch.zeros(shape))
    x = torch.zeros(5, 3, 64, 64)
    x[2, 0, 3, 3] = float("nan")
    with pytest.raises(UserError, match="1 of 5 pictures"):
        read_all(reader, x)


def test_agreement_counts_classes_and_colours_in_either_order():
    net = Reader(["dotted", "striped", NONSENSE], ["red", "blue", "green"])

    def sure(places, n):
        return torch.nn.functional.one_hot(torch.tensor(places), n).float()
    seen = classifier.Reading(net, torch.zeros(4, 128), sure([0, 0, 1, 2], 3), sure([0, 0, 1, 2], 3), sure([1, 2, 0, 2], 3),
                              sure([0, 0, 0, 0], 2))
    found = agreement(seen, ["dotted", "dotted", "dotted", "striped"],
                      [("red", "blue"), ("red", "blue"), ("red", "blue"), (None, "green")])
    assert found["class"] == 0.5 and found["by_class"] == {"dotted": 2 / 3, "striped": 0} and found["worst_class"] == 0
    assert found["rejected"] == 0.25
    assert found["colours"] == 0.75  # the third holds both, the other way round; the second is red on green
    assert found["class_and_colours"] == 0.25
    with pytest.raises(UserError, match="nearest: dotted"):
        agreement(seen, ["doted"] * 4)


def test_equal_sets_lie_on_the_floor_and_shifted_ones_do_not():
    x, y, z = torch.randn(3, 400, 6, generator=generator()).unbind()
    same, other = compare(x, y, z), compare(x + 3, y, z)
    assert same["frechet"] == pytest.approx(same["frechet_floor"], abs=0.3) and same["recall"] > 0.8
    assert other["frechet"] == pytest.approx(54, rel=0.1) and other["recall"] < 0.1
    assert other["frechet_floor"] == same["frechet_floor"]


def test_the_judge_knows_copies_from_new_pictures_and_nonsense_from_both(reader, held_out):
    order = torch.randperm(len(held_out["x"]), generator=generator(3))
    a, b, c = held_out["x"][order].split(len(order) // 3)[:3]
    copied, new = judge(b, a, b, reader), judge(c, a, b, reader)
    json.dumps(new)
    assert copied["memorised"] and copied["nearest_train"] == 0 and not new["memorised"]
    assert new["frechet"] == pytest.approx(new["frechet_floor"], rel=0.5) and new["rejected_share"] < 0.02
    assert sum(new["class_shares"].values()) == pytest.approx(1)
    noise = judge(torch.randn(len(c), 3, 64, 64, generator=generator()), a, b, reader)
    assert noise["rejected_share"] > 0.95 and noise["frechet"] > 5 * noise["frechet_floor"] and noise["recall"] < 0.05


def test_samples_that_come_sorted_by_class_are_compared_as_shuffled_ones(reader, held_out):
    x = held_out["x"][held_out["class"] < 20]
    order = held_out["class"][held_out["class"] < 20].argsort()
    a, b = x[order][::2], x[order][1::2]
    verdict = judge(a, b[::2], b[1::2], reader)  # half as many real ones: only half of the samples are compared
    assert verdict["compared"] == len(b) // 2 < len(a) // 1.5
    assert verdict["frechet"] == pytest.approx(verdict["frechet_floor"], rel=0.5) and verdict["recall"] > 0.5


def test_missing_or_foreign_weights_name_the_command_that_makes_them(tmp_path):
    foreign, cut = tmp_path / "foreign.safetensors", tmp_path / "cut.safetensors"
    save_file({"weight": torch.zeros(3)}, foreign)
    cut.write_bytes(WEIGHTS.read_bytes()[:1000])
    for path in (tmp_path / "none.safetensors", foreign, cut):
        with pytest.raises(UserError, match="python -m nanodiff.classifiers.train"):
            load_reader(path)


def test_wrong_flags_are_refused_before_anything_is_drawn(tmp_path, capsys):
    for flags, sentence in ((["--epochs", "0"], "--epochs is 0"), (["--out", str(tmp_path)], "is a folder")):
        with pytest.raises(SystemExit) as stop:
            train.main(flags)
        assert stop.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.slow
def test_training_on_a_few_pictures_writes_weights_and_their_page(tmp_path, capsys):
    train.main(["--pictures=2", "--specimens=1", "--slices=2", "--epochs=1", "--batch=16", "--test=2", "--workers=1",
                       "--test_specimens=1", "--scale=0.1", "--seed=3", f"--out={tmp_path / 'r.safetensors'}"])
    assert load_reader(tmp_path / "r.safetensors").temperature > 0
    text = (tmp_path / "r.md").read_text()
    assert "--pictures 2 --specimens 1" in text and "| blocks | no |" in text and "| blocks | no |" in capsys.readouterr().out
