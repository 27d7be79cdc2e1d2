import warnings

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from nanodiff.data import folder
from nanodiff.data.folder import Folder
from nanodiff.errors import UserError
from nanodiff.training import datasets
from nanodiff.training.batches import Batches


def write(path, shape=(8, 8, 3), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


def position_picture(path, height, width):
    """Every pixel tells where it is: level = column in red, row in green."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1)).save(path)


def test_every_spelling_of_an_extension_is_found_and_hidden_files_are_not(tmp_path):
    names = ["a.tif", "b.TIF", "c.tiff", "d.PNG", "e.jpeg", "f.JPG", "g.bmp", "h.webp", "deep/er/i.Png"]
    for name in names:
        write(tmp_path / name)
    write(tmp_path / "._a.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    assert folder.find(tmp_path) == sorted(names)
    assert len(Folder(tmp_path, captions=None)) == 9


def test_a_folder_without_pictures_names_itself_and_the_extensions(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"")
    with pytest.raises(UserError, match=f"{tmp_path} holds no pictures.*png, .jpg.*.tif"):
        datasets.load(tmp_path)


def test_broken_files_are_named_and_counted_and_left_out(tmp_path):
    for i in range(4):
        write(tmp_path / f"{'ab'[i % 2]}/{i}.png", seed=i)
    whole = (tmp_path / "a/0.png").read_bytes()
    (tmp_path / "a/cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "b/empty.jpg").write_bytes(b"")
    (tmp_path / "c").mkdir()
    (tmp_path / "c/text.tif").write_bytes(b"this is no TIFF")
    with pytest.warns(UserWarning, match="3 of 7 pictures in .* are broken .*a/cut.png.*b/empty.jpg.*c/text.tif"):
        data = Folder(tmp_path)
    assert [file for file, _ in data.broken] == ["a/cut.png", "b/empty.jpg", "c/text.tif"]
    assert data.files == ["a/0.png", "a/2.png", "b/1.png", "b/3.png"]
    assert data.classes == ["a", "b", "c"] and data.labels.tolist() == [0, 0, 1, 1] and data.captions == list("aabb")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "webp"])
def test_a_file_cut_short_is_broken_in_every_format(tmp_path, suffix):
    write(tmp_path / f"good.{suffix}", (32, 32, 3))
    whole = (tmp_path / f"good.{suffix}").read_bytes()
    (tmp_path / f"short.{suffix}").write_bytes(whole[:int(len(whole) * 0.7)])
    with pytest.warns(UserWarning, match=f"1 of 2 pictures .*short.{suffix}"):
        assert len(Folder(tmp_path)) == 1


def test_no_picture_left_is_refused_before_training(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="7 of 7 pictures .*0.png: cannot be read.*and 2 more.*none is left"):
        Folder(tmp_path)


def test_a_file_that_breaks_later_is_named(tmp_path):
    write(tmp_path / "a.png")
    write(tmp_path / "b.png")
    data = Folder(tmp_path, check=False)
    (tmp_path / "b.png").write_bytes(b"gone bad")
    with pytest.raises(UserError, match="b.png cannot be read as a picture"):
        data.read(torch.tensor([0, 1]), torch.tensor([0, 1]))


def test_sizes_must_agree_unless_one_is_given(tmp_path):
    write(tmp_path / "a.png", (8, 8))
    write(tmp_path / "b.png", (8, 9))
    with pytest.raises(UserError, match="a.png is 8 x 8, b.png is 8 x 9.*--size"):
        Folder(tmp_path)
    assert Folder(tmp_path, size=4).shape == (1, 4, 4)
    assert Folder(tmp_path, size=(4, 6), channels=3).read(torch.arange(2), torch.arange(2)).shape == (2, 3, 4, 6)


def test_grey_folders_have_one_channel_and_mixed_ones_three(tmp_path):
    write(tmp_path / "a.png", (8, 8))
    assert Folder(tmp_path).shape == (1, 8, 8)
    write(tmp_path / "b.png", (8, 8, 3))
    data = Folder(tmp_path)
    assert data.shape == (3, 8, 8)
    x = data.read(torch.tensor([0]), torch.tensor([0]))[0]
    assert torch.equal(x[0], x[1]) and torch.equal(x[0], x[2])  # grey has no tint


def test_16_bit_pictures_reach_the_batch_with_their_levels_and_fill_the_range(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    tifffile.imwrite(tmp_path / "a.TIF", ramp, byteorder=">")
    Image.fromarray(ramp).save(tmp_path / "b.png")
    x, _, _ = Batches(Folder(tmp_path), 2).get(0)
    assert all(len(picture.unique()) == 4096 for picture in x)
    assert x.min() >= -1 and x.max() <= 1 and x.min() < -0.9 and x.max() > 0.9
    assert Folder(tmp_path, value_range=(0, 4095)).read(torch.tensor([0]), torch.tensor([0])).mean() > 0.9


def test_resizing_keeps_the_aspect_ratio_and_the_centre_crop_is_central(tmp_path):
    position_picture(tmp_path / "a.png", 100, 200)
    x = Folder(tmp_path, size=50).read(torch.tensor([0]), torch.tensor([0]))[0]
    columns, rows = (x[0] + 1) * 127.5, (x[1] + 1) * 127.5
    assert abs(columns[0, 0] - 50.5) < 1.5 and abs(columns[0, -1] - 148.5) < 1.5  # 100 columns about the middle
    assert rows[0, 0] < 1.5 and rows[-1, 0] > 97.5  # and all rows: one scale for both directions


def test_random_crops_at_full_resolution_are_exact_pieces_and_reach_every_place(tmp_path):
    position_picture(tmp_path / "a.png", 12, 20)
    data = Folder(tmp_path, size=8, crop="random", resize=False)
    x = data.read(torch.zeros(500, dtype=torch.int64), torch.arange(500))
    left, top = ((x[:, channel, 0, 0] + 1) * 127.5 for channel in (0, 1))
    left, top = left.round().long(), top.round().long()
    assert set(left.tolist()) == set(range(13)) and set(top.tolist()) == set(range(5))
    picture = Folder(tmp_path).read(torch.tensor([0]), torch.tensor([0]))[0]
    for i in range(20):
        assert torch.equal(x[i], picture[:, top[i]:top[i] + 8, left[i]:left[i] + 8])


def test_a_picture_smaller_than_the_crop_is_enlarged_just_enough(tmp_path):
    position_picture(tmp_path / "a.png", 10, 20)
    x = Folder(tmp_path, size=16, resize=False).read(torch.tensor([0]), torch.tensor([0]))
    assert x.shape == (1, 3, 16, 16)
    assert (x[0, 1, -1, 0] + 1) * 127.5 > 8.5  # the full height is there


def test_crops_of_four_workers_over_two_epochs_are_all_distinct(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.png", (300, 300), seed=i)
    data = Folder(tmp_path, size=8, crop="random", resize=False, flip=True)
    batches = Batches(data, 2, workers=4)
    x = torch.cat([batches.get(step)[0] for step in range(2 * batches.epoch_steps)])
    assert len(x) == 8 and len(x.flatten(1).unique(dim=0)) == 8


def test_pictures_do_not_depend_on_workers_threads_batch_or_global_seeds(tmp_path):
    for i in range(6):
        write(tmp_path / f"{i}.jpg", (40, 30 + i, 3), seed=i)

    def stream(workers, threads, batch, seed=5):
        torch.manual_seed(workers)
        np.random.seed(workers)
        data = Folder(tmp_path, size=16, crop="random", flip="both", seed=1, threads=threads)
        batches = Batches(data, batch, seed=seed, workers=workers)
        parts = [batches.get(step) for step in range(24 // batch)]
        return torch.cat([x for x, _, _ in parts]), torch.cat([index for _, index, _ in parts])

    x, index = stream(0, 1, 4)
    for workers, threads, batch in ((1, 1, 4), (4, 3, 4), (0, 8, 2), (2, None, 6)):
        again, index_again = stream(workers, threads, batch)
        assert torch.equal(x, again) and torch.equal(index, index_again)
    assert not torch.equal(x, stream(0, 1, 4, seed=6)[0])


def test_flips_and_crops_come_anew_in_every_epoch(tmp_path):
    write(tmp_path / "a.png", (8, 8))
    batches = Batches(Folder(tmp_path, flip=True), 1)
    pictures = {tuple(batches.get(step)[0].flatten().tolist()) for step in range(30)}
    assert len(pictures) == 2  # both orientations


def test_the_sub_folder_of_the_split_is_taken_and_a_missing_one_named(tmp_path):
    for name in ("train/cat/a", "train/dog/b", "validation/cat/c"):
        write(tmp_path / f"{name}.png")
    train, val = datasets.load(tmp_path), datasets.load(str(tmp_path), split="val")
    assert train.files == ["cat/a.png", "dog/b.png"] and train.classes == ["cat", "dog"] and train.crop == "random"
    assert val.files == ["cat/c.png"] and val.crop == "centre"
    with pytest.raises(UserError, match="no sub-folder 'test'"):
        datasets.load(tmp_path, split="test")
    assert datasets.load(tmp_path / "train" / "cat").labels is None


def test_wrong_options_are_refused_before_any_file_is_read(tmp_path):
    for options, message in (({"channels": 2}, "channels is 2"), ({"crop": "middle"}, "crop is 'middle'")):
        with pytest.raises(UserError, match=message):
            Folder(tmp_path / "nowhere", **options)
    write(tmp_path / "a.png")
    with pytest.raises(UserError, match="at least 1"), warnings.catch_warnings():
        Folder(tmp_path, size=0)
