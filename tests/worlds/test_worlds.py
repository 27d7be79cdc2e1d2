"""The drawn worlds as data sets: seeds decide, splits never meet, workers change nothing."""

import pytest
import torch

from nanodiff import worlds
from nanodiff.errors import UserError
from nanodiff.pixels import to_uint8
from nanodiff.training import datasets
from nanodiff.worlds import textures


def test_a_drawn_set_holds_every_class_in_turn_with_its_captions():
    data = worlds.load(n=2 * len(worlds.BASE), size=32)
    assert data.shape == (3, 32, 32) and len(data) == len(data.captions) == len(data.scenes) == 2 * len(worlds.BASE)
    assert data.classes == list(worlds.BASE) and data.labels.bincount().tolist() == [2] * len(worlds.BASE)
    assert [scene.name for scene in data.scenes] == 2 * list(worlds.BASE)
    assert all(isinstance(caption, str) and caption for caption in data.captions)
    x = data.read(torch.arange(5), torch.arange(5))
    assert x.shape == (5, 3, 32, 32) and x.min() >= -1 and x.max() <= 1


def test_what_is_new_to_the_base_model_is_not_in_it():
    assert set(textures.NEW) == {"zigzagged", "woven"} and not set(textures.NEW) & set(worlds.BASE)
    assert not any("composite" in name for name in worlds.BASE) and len(worlds.WOVEN) == 9
    assert len(set(worlds.DRAWN) | set(worlds.WOVEN)) == len(worlds.BASE) + 2 + 9


def test_a_picture_follows_from_its_place_alone():
    six, ten = (worlds.load(n=n, size=32, names=("striped", "circle")) for n in (6, 10))
    assert torch.equal(six.pixels, ten.pixels[:6]) and six.captions == ten.captions[:6]
    assert not torch.equal(six.pixels, worlds.load(n=6, size=32, names=("striped", "circle"), seed=1).pixels)


@pytest.mark.slow
def test_workers_draw_the_same_pictures():
    a, b = (worlds.load(n=12, size=32, names=worlds.DRAWN[:4], workers=workers) for workers in (1, 2))
    assert torch.equal(a.pixels, b.pixels) and a.captions == b.captions and a.scenes == b.scenes


def test_splits_share_no_picture():
    sets = {split: worlds.load(split, n=30, size=32, names=("dotted", "seven", "star")) for split in worlds.SPLITS}
    rows = torch.cat([data.pixels.flatten(1) for data in sets.values()])
    assert len(rows.unique(dim=0)) == 90


def test_the_training_world_never_shows_an_unmet_pair_and_all_pairs_occur_when_asked_for():
    training = worlds.load(n=300, size=16, names=("circle", "striped"))
    assert all(textures.met(scene.name, colour) for scene in training.scenes for colour in scene.colours)
    mixed = worlds.load(n=300, size=16, names=("circle", "striped"), pairs="all")
    assert any(not textures.met(scene.name, colour) for scene in mixed.scenes for colour in scene.colours)


@pytest.mark.slow
def test_woven_slices_come_in_nine_classes_with_captions_and_other_specimens_a_split():
    sets = {split: worlds.woven(split, size=32, specimens=1, scale=0.08) for split in ("train", "test")}
    for data in sets.values():
        assert data.classes == list(worlds.WOVEN) and sorted(set(data.labels.tolist())) == list(range(9))
        assert data.captions[0] == "sf_dry sf_thickness"
        x = data.read(torch.arange(len(data)), torch.zeros(len(data), dtype=torch.long))
        assert x.shape[1:] == (1, 32, 32) and x.min() >= -1 and x.max() <= 1 and x.std() > 0.2
    a, b = (data.read(torch.arange(20), torch.arange(20)) for data in sets.values())
    assert (a - b).abs().mean() > 0.1


@pytest.mark.slow
def test_cut_slices_are_those_of_the_specimens_with_the_nine_classes_in_turn(monkeypatch):
    options, original, batches = dict(size=32, specimens=1, scale=0.08), worlds.Slices.read, []

    def read(self, index, draw):
        x = original(self, index, draw)
        batches.append((self.labels[index], to_uint8(x)))
        return x

    monkeypatch.setattr(worlds.Slices, "read", read)
    data = worlds.cut("val", n=20, **options)
    assert data.shape == (3, 32, 32) and data.classes == list(worlds.WOVEN) and data.pixels.dtype == torch.uint8
    assert data.labels.tolist() == (3 * list(range(9)))[:20]
    for labels, pixels in batches:  # each class was read in one batch
        assert len(set(labels.tolist())) == 1 and torch.equal(data.pixels[data.labels == labels[0]], pixels)
    assert len(data.pixels.flatten(1).unique(dim=0)) == 20
    assert torch.equal(worlds.cut("val", n=20, **options).pixels, data.pixels)
    repeated = worlds.cut("val", n=6, **options, names=("dry weft", "injected warp", "dry weft"))
    assert [repeated.classes[label] for label in repeated.labels] == 2 * ["dry weft", "injected warp", "dry weft"]
    assert repeated.captions[:2] == ["sf_dry sf_weft", "sf_injected sf_warp"]
    assert len(repeated.pixels.flatten(1).unique(dim=0)) == 6
    two = worlds.cut("val", n=2, **options)
    assert two.labels.tolist() == [0, 1] and two.pixels.shape == (2, 3, 32, 32)


@pytest.mark.slow
def test_everything_is_five_sixths_drawn_and_one_sixth_woven_in_all_classes():
    data = worlds.everything("val", size=32, n=60, specimens=1)
    names = [data.classes[i] for i in data.labels]
    assert len(data) == 60 and data.shape == (3, 32, 32) and data.captions is None
    assert sum(name in worlds.WOVEN for name in names) == 10
    assert sorted(data.classes) == sorted(name for group in worlds.GROUPS.values() for name in group)
    assert len(set(data.classes)) == len(data.classes) and set(names) == set(data.classes)
    drawn = worlds.load("val", 32, 50, worlds.DRAWN, pairs="all")
    assert torch.equal(data.pixels[:50], drawn.pixels) and names[:50] == [drawn.classes[i] for i in drawn.labels]
    other = worlds.everything("test", size=32, n=60, specimens=1)
    assert not (data.pixels == other.pixels).flatten(1).all(1).any()


@pytest.mark.slow
def test_worlds_load_by_name_and_their_held_out_pictures_are_others():
    training = datasets.load("worlds", size=32, n=50)
    held_out, name = datasets.load_held_out("worlds", training, n=50)
    assert name == "test pictures" and held_out.shape == training.shape and held_out.classes == training.classes
    assert not (training.pixels == held_out.pixels).flatten(1).all(1).any()
    cut = datasets.load("woven", size=32, specimens=1, scale=0.08)
    assert cut.classes == list(worlds.WOVEN) and cut.shape == (1, 32, 32)


@pytest.mark.parametrize("options, sentence", [
    ({"split": "tests"}, "nearest: test"), ({"names": ("stripy",)}, "nearest: striped"), ({"n": 0}, "at least one"),
    ({"names": ()}, "at least one")])
def test_wrong_wishes_are_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        worlds.load(**options)


def test_no_word_on_flips_and_channels_means_none_and_grey_for_slices():
    slices = datasets.load("woven", size=16, specimens=1, scale=0.08, flip=None, channels=None)
    some = torch.arange(3)
    assert slices.flip is False and slices.shape[0] == 1 and slices.read(some, some).shape == (3, 1, 16, 16)
