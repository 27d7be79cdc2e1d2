"""Inception of the FID: its names and shapes, parity with two peers on drawn weights, its resize, and refusals."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import drawn_inception
from nanodiff import evaluate
from nanodiff.data import images
from nanodiff.errors import UserError
from nanodiff.metrics import inception
from nanodiff.pixels import from_uint8

GOLDEN = Path(__file__).parents[1] / "golden" / "inception.safetensors"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Drawn weights as the published file holds them."""
    path = tmp_path_factory.mktemp("inception") / inception.FILES[0]
    torch.save(drawn_inception.weights(), path)
    return path


@pytest.fixture(scope="module")
def net(file):
    return inception.load(file)


# --- the network -----------------------------------------------------------------------------------------------------

def test_names_and_shapes_are_those_of_the_published_file(net):
    shapes = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
    assert len(shapes) == 94 * 5 + 2 and sum(tensor.numel() for tensor in net.state_dict().values()) == 23_885_392
    assert shapes["Conv2d_1a_3x3.conv.weight"] == [32, 3, 3, 3] and shapes["fc.weight"] == [1008, 2048]
    assert shapes["Mixed_5b.branch_pool.bn.running_var"] == [32]
    assert shapes["Mixed_5d.branch5x5_2.conv.weight"] == [64, 48, 5, 5]
    assert shapes["Mixed_6c.branch7x7dbl_2.conv.weight"] == [160, 160, 7, 1]
    assert shapes["Mixed_7c.branch3x3dbl_3a.conv.weight"] == [384, 384, 1, 3]
    assert not any("num_batches_tracked" in name for name in shapes)
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("resize", inception.RESIZES)
def test_features_are_those_of_the_peers_with_the_same_drawn_weights(net, resize):
    ours = inception.features(net, drawn_inception.pictures(2, 32), resize=resize)
    theirs = load_file(GOLDEN)[resize]
    assert ours.shape == (2, 2048) and ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (ours[0] - ours[1]).abs().max() > 1e-2 * ours.abs().max()  # they say something of the picture
    assert net.logits(ours).shape == (2, 1008)


def test_average_pooling_leaves_the_padding_out_and_the_last_block_takes_a_maximum(net):
    one = torch.ones(1, 1, 4, 5)
    assert torch.equal(inception.average_pool(one), one)  # with zeros counted, corners would be 4/9
    x = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    assert inception.average_pool(x)[0, 0, 0, 0].item() == pytest.approx(x[0, 0, :2, :2].mean().item())
    assert torch.equal(inception.max_pool(x)[0, :, 2, 2], x[0, :, 1:4, 1:4].amax((1, 2)))
    pools = {name: module.pool for name, module in net.named_modules() if isinstance(module, inception.Coarse)}
    assert pools == {"Mixed_7b": inception.average_pool, "Mixed_7c": inception.max_pool}


def test_batch_normalisation_is_by_stored_numbers_with_an_epsilon_of_a_thousandth():
    norm = inception.Norm(2)
    norm.running_mean, norm.running_var = torch.tensor([1.0, 0.0]), torch.tensor([3.999, 0.0])
    norm.weight, norm.bias = torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.0])
    y = norm.train()(torch.full((1, 2, 1, 1), 5.0))
    assert y.flatten().tolist() == pytest.approx([2 * 4 / 2 + 0.5, 5 / 0.001**0.5])


# --- what it sees ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("h, w", [(32, 32), (28, 40), (300, 299), (1, 2)])
def test_tensorflows_resize_puts_output_pixel_i_at_i_times_in_over_out(h, w):
    row, column = torch.meshgrid(torch.arange(h).float(), torch.arange(w).float(), indexing="ij")
    y = inception.resize_tensorflow(torch.stack([row, column])[None], 299)[0]
    for ramp, size, axis in ((y[0], h, 0), (y[1], w, 1)):
        place = (torch.arange(299) * size / 299).clamp(max=size - 1)  # beyond the last pixel it stays
        expected = place.view(-1, 1) if axis == 0 else place
        torch.testing.assert_close(ramp, expected.expand(299, 299), rtol=1e-6, atol=1e-4)


def test_the_two_ranges_are_the_peers(net):
    levels = torch.tensor([0, 127, 128, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    fidelity, pytorch = (inception.prepare(levels, name) for name in inception.RESIZES)
    assert fidelity.shape == pytorch.shape == (4, 3, 299, 299)
    assert fidelity[:, 0, 9, 9].tolist() == [-1, -1 / 128, 0, 127 / 128]
    torch.testing.assert_close(pytorch[:, 0, 9, 9], torch.tensor([0, 127, 128, 255]) / 127.5 - 1)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(inception.prepare(2 * x - 1, "pytorch-fid"), 2 * torch.nn.functional.interpolate(
        (255 * x + 0.5).floor() / 255, (299, 299), mode="bilinear", align_corners=False) - 1)


def test_floats_bytes_and_grey_pictures_are_seen_alike():
    x = drawn_inception.pictures(2, 16)
    assert torch.equal(inception.prepare(x), inception.prepare(x.float() / 127.5 - 1))
    assert torch.equal(inception.prepare(x), inception.prepare(1.0001 * (x.float() / 127.5 - 1)))  # as a file would
    grey = x[:, :1]
    assert torch.equal(inception.prepare(grey), inception.prepare(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("n", [1, 3])
def test_a_batch_larger_than_the_set_gives_n_rows_that_do_not_depend_on_it(n):
    class Mean(torch.nn.Module):
        """Stands in for the network, which is large, where only the batches matter."""

        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(1, 1)

        def forward(self, x):
            return x.mean((2, 3))

    x = drawn_inception.pictures(3, 16)[:n]
    whole = inception.features(Mean(), x, batch=50)
    assert whole.shape == (n, 3)
    torch.testing.assert_close(inception.features(Mean(), x, batch=2), whole)


@pytest.mark.parametrize("x, resize, words", [
    (torch.zeros(2, 4, 8, 8), "pytorch-fid", r"\[2, 4, 8, 8\]"),
    (torch.zeros(0, 3, 8, 8), "pytorch-fid", r"\[0, 3, 8, 8\]"),
    (torch.full((2, 3, 8, 8), torch.nan), "pytorch-fid", "2 of 2 pictures"),
    (torch.zeros(1, 3, 8, 8), "clean-fid", 'resize "clean-fid" is unknown')])
def test_pictures_that_it_cannot_see_are_refused(x, resize, words):
    with pytest.raises(UserError, match=words):
        inception.prepare(x, resize)


# --- the file --------------------------------------------------------------------------------------------------------

def test_other_weights_are_never_called_fid(net, file, monkeypatch):
    assert "FID" not in net.score.replace("than FID's", "")
    begins = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(inception, "DIGEST", begins)  # were this the published file
    assert inception.load(file).score == "FID"


def test_the_file_is_found_by_path_variable_and_in_the_caches_of_the_peers(file, tmp_path, monkeypatch):
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=f"there are no weights of Inception: expected .*{inception.VARIABLE}"):
        inception.find()
    cached = tmp_path / "checkpoints" / inception.FILES[1]
    cached.parent.mkdir()
    cached.write_bytes(b"x")
    assert inception.find() == cached
    monkeypatch.setenv(inception.VARIABLE, str(file))
    assert inception.find() == file and inception.find(cached) == cached
    with pytest.raises(UserError, match=f"nearest: {inception.FILES[1]}"):
        inception.find(cached.with_name("weights-inception-2015-12-05.pth"))


def test_a_missing_a_left_over_and_a_misshapen_weight_are_refused_by_name(tmp_path):
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in inception.Inception().state_dict().items()}
    zero = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    for change, words in (({"fc.bias": None}, 'missing, for example "fc.bias"'),
                          ({"AuxLogits.fc.bias": torch.zeros(1)}, 'left over, for example "AuxLogits.fc.bias"'),
                          ({"fc.weight": torch.zeros(1000, 2048)}, r"has shape \[1000, 2048\], expected \[1008")):
        path = tmp_path / "broken.pth"
        torch.save({name: tensor for name, tensor in {**zero, **change}.items() if tensor is not None}, path)
        with pytest.raises(UserError, match=words):
            inception.load(path)


def test_weights_in_another_container_and_in_half_precision_make_the_same_network(tmp_path):
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in inception.Inception().state_dict().items()}
    weights = {name: torch.full(shape, 0.5, dtype=torch.float16) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "half.safetensors")
    net = inception.load(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in net.state_dict().values()} == {torch.float32} and not net.training
    assert torch.equal(net.fc.bias, torch.full((1008,), 0.5))


# --- python -m nanodiff.evaluate --folder PICTURES --against REAL --inception WEIGHTS ---------------------------------

@pytest.fixture
def folders(tmp_path):
    """The flags for eight generated pictures and sixteen real ones, of two sizes, and for the output file."""
    x = drawn_inception.pictures(24, 40)
    for name, part in (("made", x[:8]), ("real", x[8:])):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(part):
            images.save(from_uint8(picture[:, :36] if i % 2 else picture), tmp_path / name / f"{i}.png")
    return [f"--folder={tmp_path / 'made'}", f"--against={tmp_path / 'real'}", f"--out={tmp_path / 'n.json'}",
            "--device=cpu"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Fréchet distance from n")
def test_evaluate_scores_folders_on_inception_with_n_extractor_and_floor(file, net, folders, tmp_path, capsys):
    evaluate.main([*folders, f"--inception={file}"])
    output, numbers = capsys.readouterr().out, json.loads((tmp_path / "n.json").read_text())["inception"]
    line = next(line for line in output.splitlines() if "Inception's" in line)
    assert line.startswith("Frechet distance on Inception features of other weights than FID's ") and "KID" not in line
    assert f"n = 8 each on Inception's 2,048 features ({file.name}, torch-fidelity's resize)" in line
    assert line.count("(floor ") == 4 and "0.0% copies" in line and numbers["n"] == 8 and not numbers["memorised"]
    features = inception.file_features(net, sorted((tmp_path / "made").iterdir()), batch=3)  # 0.png, 1.png, ...
    assert features.shape == (8, 2048)
    expected = inception.features(net, drawn_inception.pictures(24, 40)[:8:2])
    assert (features[::2] - expected).abs().max() < 1e-4 * expected.abs().max()


def test_evaluate_refuses_wrong_weights_of_inception_in_one_sentence(file, folders, tmp_path, capsys):
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for words, expected in (([*folders, f"--inception={tmp_path / 'othr.pth'}"], "nearest: other.pth"),
                            ([*folders, f"--inception={tmp_path / 'other.pth'}"], "weights are missing, for example"),
                            ([folders[0], f"--inception={file}"], "--inception compares the pictures of --folder")):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and expected in error and error.strip().count("\n") == 0
    assert not (tmp_path / "n.json").exists()
