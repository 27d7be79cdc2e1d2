import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from nanodiff.data import cifar, dtd, mnist
from nanodiff.errors import UserError
from nanodiff.training import datasets

# --- MNIST --------------------------------------------------------------------------------------------------------


def test_mnist_ships_with_the_repository_and_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.perf_counter()
    train = datasets.load("mnist")
    assert time.perf_counter() - start < 3  # about 0.3 s alone on a laptop core
    test = datasets.load("mnist", split="test")
    assert len(train) == 60000 and len(test) == 10000 and train.shape == (1, 28, 28)
    assert train.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.classes == list("0123456789") and train.labels.dtype == torch.int64 and train.flip is False
    assert abs(train.pixels.double().mean() / 255 - 0.1307) < 1e-4
    x = train.read(torch.arange(64), torch.arange(64))
    assert x.min() == -1 and x.max() == 1  # the full range


def test_mnist_at_another_size_and_in_colour():
    data = datasets.load("mnist", split="test", size=32, channels=3)
    assert data.shape == (3, 32, 32) and torch.equal(data.pixels[:, 0], data.pixels[:, 2])
    assert abs(data.pixels[:, 0].double().mean() / 255 - 0.1325) < 5e-3


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def small_mnist(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(pixels))
    (tmp_path / "train-labels.idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(5))))
    return tmp_path, pixels


def test_idx_files_may_be_plain_or_gzipped_under_either_name(small_mnist):
    root, pixels = small_mnist
    data = datasets.load("mnist", root=root)
    assert np.array_equal(data.pixels[:, 0].numpy(), pixels) and data.labels.tolist() == [0, 1, 2, 3, 4]


def test_damaged_idx_files_are_refused_by_name(small_mnist):
    root, pixels = small_mnist
    images, labels = root / "train-images-idx3-ubyte", root / "train-labels.idx1-ubyte.gz"
    whole, zipped = images.read_bytes(), labels.read_bytes()
    for content, message in ((whole[:-100], "promises 3920 bytes .* but holds 3820"), (whole + b"x", "but holds 3921"),
                             (b"\x89PNG" + whole[4:], "begins with 89504e47"), (b"", "begins with nothing"),
                             (idx(np.arange(5)), "begins with 00000801"),
                             (idx(pixels[:4]), "4 train images but 5 labels")):
        images.write_bytes(content)
        with pytest.raises(UserError, match=message):
            mnist.load(root)
    images.write_bytes(whole)
    for content in (zipped[:-12], b"no gzip", zipped[:20] + b"\xff" * 8 + zipped[28:]):
        labels.write_bytes(content)
        with pytest.raises(UserError, match="train-labels.idx1-ubyte.gz is cut short or damaged"):
            mnist.load(root)
    labels.write_bytes(gzip.compress(idx(np.arange(5) + 6)))
    with pytest.raises(UserError, match="reach 10"):
        mnist.load(root)
    labels.unlink()
    with pytest.raises(UserError, match="has no train-labels-idx1-ubyte.gz"):
        mnist.load(root)


# --- CIFAR-10 -----------------------------------------------------------------------------------------------------


def python2_pickle(rows, labels):
    """A batch as Python 2 and its numpy wrote it: protocol 2, byte strings, numpy.core.multiarray."""
    def text(b):
        return b"U" + bytes([len(b)]) + b if len(b) < 256 else b"T" + struct.pack("<i", len(b)) + b
    array = (b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85" + text(b"b") + b"\x87R"
             + b"(K\x01" + b"".join(b"M" + struct.pack("<H", n) for n in rows.shape) + b"\x86"
             + b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
             + b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
             + b"\x89" + text(rows.tobytes()) + b"tb")
    numbers = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + text(b"batch_label") + text(b"b") + b"u."


@pytest.fixture
def rows():
    return np.random.default_rng(1).integers(0, 256, (6, 20, 3072), dtype=np.uint8)


def write_python(folder, rows, write=python2_pickle):
    folder.mkdir(parents=True)
    for i, name in enumerate(cifar.FILES["train"] + cifar.FILES["test"]):
        (folder / name).write_bytes(write(rows[i], [(i + j) % 10 for j in range(len(rows[i]))]))


def write_binary(folder, rows):
    folder.mkdir(parents=True)
    for i, name in enumerate(cifar.FILES["train"] + cifar.FILES["test"]):
        records = [bytes([(i + j) % 10]) + row.tobytes() for j, row in enumerate(rows[i])]
        (folder / f"{name}.bin").write_bytes(b"".join(records))


def test_the_written_pickle_is_one_that_numpy_itself_reads(rows):
    batch = pickle.loads(python2_pickle(rows[0], [3] * 20), encoding="bytes")
    assert np.array_equal(batch[b"data"], rows[0]) and batch[b"labels"] == [3] * 20


def test_both_official_layouts_of_cifar_give_the_same_pictures(tmp_path, rows):
    write_python(tmp_path / "p" / "cifar-10-batches-py", rows)
    write_binary(tmp_path / "b" / "cifar-10-batches-bin", rows)
    write_python(tmp_path / "p3", rows, lambda r, l: pickle.dumps({b"data": r, b"labels": l}, protocol=2))
    for split, expected in (("train", rows[:5].reshape(100, 3, 32, 32)), ("test", rows[5].reshape(20, 3, 32, 32))):
        for root in ("p", "b", "p3"):
            data = datasets.load("cifar10", split=split, root=tmp_path / root)
            assert np.array_equal(data.pixels.numpy(), expected) and data.shape == (3, 32, 32)
            assert data.labels[:3].tolist() == ([0, 1, 2] if split == "train" else [5, 6, 7])
            assert data.classes[3] == "cat" and data.flip is (split == "train")
    assert datasets.load("cifar10", root=tmp_path / "b", channels=1, size=16).shape == (1, 16, 16)


@pytest.mark.parametrize("target", ["os.system", "builtins.eval", "builtins.getattr", "numpy.load", "numpy.fromfile"])
def test_a_crafted_pickle_is_refused_by_name_and_runs_nothing(tmp_path, rows, target):
    write_python(tmp_path / "cifar-10-batches-py", rows)
    module, name = target.split(".")
    trace = tmp_path / "it-ran"
    argument = f"touch {trace}" if target == "os.system" else f"open({str(trace)!r}, 'w')"
    evil = f"c{module}\n{name}\n(V{argument}\ntR.".encode()
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(evil)
    with pytest.raises(UserError, match=f"data_batch_3 asks to run '{target}'"):
        datasets.load("cifar10", root=tmp_path)
    assert not trace.exists()


def test_a_pickle_that_reduces_an_object_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it-ran"),)
    for protocol in range(6):
        (tmp_path / "batch").write_bytes(pickle.dumps({b"data": Evil()}, protocol=protocol))
        with pytest.raises(UserError, match="asks to run '(posix|nt).mkdir'"):
            cifar.read_pickle(tmp_path / "batch")
    assert not (tmp_path / "it-ran").exists()


def test_damaged_cifar_files_are_refused_by_name(tmp_path, rows):
    good = python2_pickle(rows[0], [1] * 20)
    for content in (good[:1000], b"", b"nonsense", pickle.dumps({"a": 1}), python2_pickle(rows[0], [1] * 19),
                    python2_pickle(rows[0], [11] * 20), python2_pickle(rows[0][:, :3000].copy(), [1] * 20),
                    pickle.dumps({b"data": rows[0].astype(np.float32), b"labels": [1] * 20}, protocol=2)):
        (tmp_path / "data_batch_1").write_bytes(content)
        with pytest.raises(UserError, match="data_batch_1 (is not|holds)"):
            cifar.read_pickle(tmp_path / "data_batch_1")
    write_binary(tmp_path / "b", rows)
    (tmp_path / "b/data_batch_2.bin").write_bytes(b"x" * 5000)
    with pytest.raises(UserError, match="data_batch_2.bin has 5000 bytes"):
        cifar.load(tmp_path / "b")
    (tmp_path / "b/data_batch_2.bin").unlink()
    with pytest.raises(UserError, match="data_batch_2.bin is missing"):
        cifar.load(tmp_path / "b")
    with pytest.raises(UserError, match="neither cifar-10-batches-py nor cifar-10-batches-bin.*--download"):
        cifar.load(tmp_path / "nowhere")


def test_cifar_is_downloaded_on_request(tmp_path, rows, monkeypatch):
    write_python(tmp_path / "there" / "cifar-10-batches-py", rows)
    with tarfile.open(tmp_path / "there.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "there" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(cifar, "URL", (tmp_path / "there.tar.gz").as_uri())
    with pytest.raises(UserError, match="MD5"):
        datasets.load("cifar10", root=tmp_path / "here", download=True)
    monkeypatch.setattr(cifar, "MD5", hashlib.md5((tmp_path / "there.tar.gz").read_bytes()).hexdigest())
    assert len(datasets.load("cifar10", root=tmp_path / "here", download=True)) == 100
    assert len(datasets.load("cifar10", root=tmp_path / "here", split="test")) == 20


# --- DTD ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def dtd_tree(tmp_path):
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(picture, "JPEG")
    names = [f"class{i:02d}/class{i:02d}_{j:04d}.jpg" for i in range(47) for j in range(3)]
    for name in names:
        path = tmp_path / "dtd" / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture.getvalue())
    (tmp_path / "dtd" / "labels").mkdir()
    for fold in range(1, 11):
        for shift, split in enumerate(("train", "val", "test")):
            listed = [n for i, n in enumerate(names) if (i + fold) % 3 == shift]
            (tmp_path / "dtd" / "labels" / f"{split}{fold}.txt").write_text("\n".join(listed) + "\n")
    return tmp_path


def test_dtd_follows_its_official_splits(dtd_tree):
    parts = [datasets.load("dtd", split=s, root=dtd_tree, size=32) for s in ("train", "val", "test")]
    assert [len(p) for p in parts] == [47] * 3 and len({f for p in parts for f in p.files}) == 141
    train = parts[0]
    assert len(train.classes) == 47 and train.labels.tolist() == list(range(47)) and train.shape == (3, 32, 32)
    assert train.captions[5] == "dtd_class05" and train.crop == "random" and train.flip and not train.resize
    assert parts[2].crop == "centre" and not parts[2].flip
    assert datasets.load("dtd", root=dtd_tree / "dtd", size=32, fold=2).files != train.files
    reduced = datasets.load("dtd", root=dtd_tree, size=32, without=("class03", "class46"))
    assert len(reduced) == 45 and "class03" not in reduced.classes
    with pytest.raises(UserError, match="no class 'class3' to leave out, nearest: class"):
        datasets.load("dtd", root=dtd_tree, size=32, without=("class3",))
    x = train.read(torch.zeros(8, dtype=torch.int64), torch.arange(8))
    assert len(x.flatten(1).unique(dim=0)) > 5  # of 9 x 17 places and two orientations


def test_an_incomplete_dtd_is_refused(dtd_tree):
    with pytest.raises(UserError, match="fold 11"):
        dtd.load(dtd_tree, fold=11)
    with pytest.raises(UserError, match="no split 'all'"):
        dtd.load(dtd_tree, split="all")
    (dtd_tree / "dtd/images/class00/class00_0000.jpg").unlink()
    (dtd_tree / "dtd/labels/val3.txt").unlink()
    with pytest.raises(UserError, match="1 of the 47 pictures .*class00_0000.jpg"):
        [dtd.load(dtd_tree, split, size=32) for split in ("train", "val", "test")]
    with pytest.raises(UserError, match="val3.txt is missing"):
        dtd.load(dtd_tree, "val", fold=3)
    (dtd_tree / "dtd/images/class05").rename(dtd_tree / "class05")
    with pytest.raises(UserError, match="46 folders where the 47 classes"):
        dtd.load(dtd_tree)
    with pytest.raises(UserError, match="no folders images and labels.*--download"):
        dtd.load(dtd_tree / "nowhere")


# --- names --------------------------------------------------------------------------------------------------------

def test_an_unknown_name_is_answered_with_the_nearest(tmp_path):
    (tmp_path / "micrographs").mkdir()
    for name, nearest in (("mnsit", "mnist"), ("cifar", "cifar10"), (str(tmp_path / "micrograph"), "micrographs")):
        with pytest.raises(UserError, match=f"no data set or folder is called '{name}'.*nearest: .*{nearest}$"):
            datasets.load(name)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_an_unknown_split_is_refused(name):
    with pytest.raises(UserError, match="no split 'valid': give train or test"):
        datasets.load(name, split="valid")
