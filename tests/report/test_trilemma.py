"""python -m nanodiff.report.trilemma on one untrained model of every family: the plumbing, not the pictures."""

import json
import struct

import pytest
import torch
from PIL import Image

from nanodiff import plots, sample
from nanodiff.diffusion import Schedule
from nanodiff.formats.model_folder import save_model
from nanodiff.models.autoencoder import Autoencoder, AutoencoderConfig, drawn, fit_gaussian, generate
from nanodiff.models.gan import GANConfig, Generator
from nanodiff.models.gpt import GPT, GPTConfig
from nanodiff.models.unet import UNet, UNetConfig
from nanodiff.models.vae import VAE, VAEConfig
from nanodiff.models.vqvae import VQVAE, VQVAEConfig
from nanodiff.pipelines import vqgan
from nanodiff.pipelines.ddpm import DDPM
from nanodiff.pipelines.load import Options, load
from nanodiff.pipelines.vqgan import VQGAN
from nanodiff.report import trilemma
from nanodiff.training import datasets


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders by name, each with a tiny model of random weights and the flags that its name hangs on."""
    root, generator = tmp_path_factory.mktemp("runs"), torch.Generator().manual_seed(0)
    codes = VQVAE(VQVAEConfig(1, 4, 1, 2, codes=6, code_channels=2), generator)
    gpt = GPT(GPTConfig(6, 49, 10, 8, 1, 2), generator)
    unet = UNet(UNetConfig(1, 1, (4, 8), groups=2))
    models = {"ae": Autoencoder(AutoencoderConfig("mlp", widths=(8,), latent=3), generator),
              "vae": VAE(VAEConfig("mlp", widths=(8,), latent=3), generator),
              "gan": Generator(GANConfig((1, 28, 28), 4, (4, 8)), generator),
              "small": VAE(VAEConfig("mlp", (1, 8, 8), (8,), 3), generator), "vqvae": codes}
    for name, net in models.items():
        save_model(net, root / name / "model")
    vqgan.save(VQGAN(codes, gpt, (1, 28, 28), [str(d) for d in range(10)], "mnist"), root / "vqgan" / "model")
    DDPM(unet, Schedule.linear(20), shape=(1, 28, 28), data="mnist").save(root / "ddpm" / "model")
    for name, flags in (("gan", {"loss": "wasserstein-gp"}), ("vqgan", {"adversarial": 0.0, "autoencoder": ""})):
        (root / name / "config.json").write_text(json.dumps({"script": name, **flags}))
    (root / "empty").mkdir()
    for split, n in (("train", 400), ("t10k", 100)):  # a few of mnist's digits: enough to judge thirty samples
        digits = datasets.load("mnist", {"train": "train", "t10k": "test"}[split])
        for kind, array in (("images-idx3", digits.pixels[:n, 0]), ("labels-idx1", digits.labels[:n].to(torch.uint8))):
            header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            (root / f"{split}-{kind}-ubyte").write_bytes(header + array.numpy().tobytes())
    return root


@pytest.mark.filterwarnings("ignore:Fréchet distance from n")
def test_every_family_is_recognised_judged_and_drawn(runs, tmp_path, capsys):
    names = ("ae", "vae", "gan", "vqgan", "ddpm/model")
    trilemma.main([f"--models={','.join(str(runs / name) for name in names)}", "--n=30", "--steps=3", "--sampler=ddim",
                   "--device=cpu", f"--root={runs}", f"--out={tmp_path / 'new' / 'table'}"])
    output, folder = capsys.readouterr().out, tmp_path / "new" / "table"
    rows, page = json.loads((folder / "trilemma.json").read_text()), (folder / "trilemma.md").read_text()
    assert [row["family"] for row in rows] == ["training digits", "autoencoder", "VAE", "WGAN-GP", "VQ-VAE + GPT",
                                               "DDPM"]
    assert [row["calls"] for row in rows] == [0, 1, 1, 1, 49 + 1, 3]
    assert all(row["n"] == row["compared"] == 30 and row["seconds"] > 0 for row in rows)
    assert rows[0]["digit_share"] > 0.8 and all(row["digit_share"] < 0.5 for row in rows[1:])
    assert all(row["frechet"] > rows[0]["frechet"] and row["kernel"] > row["kernel_floor"] for row in rows[1:])
    assert page.strip() in output and page.count("\n| ") == 6 and "First in quality" in page
    with Image.open(folder / "trilemma.png") as sheet:
        assert sheet.height >= 6 * 56 and sheet.width >= 20 * 56


@pytest.mark.parametrize("names, expected", [
    (["vae", "vea"], "is no folder; expected a finished run such as runs/vae-001, nearest: vae"),
    (["vae", "empty"], "holds no model; expected a finished run of train_autoencoder.py, train_vae.py"),
    (["vqvae"], "holds a VQ-VAE, which draws no new pictures without a GPT"),
    (["small"], "draws 1 x 8 x 8; expected a model of mnist's 1 x 28 x 28"),
    (["ddpm", "--steps=21"], "--steps is 21; expected 1 to the schedule's 20"),
    (["vae", "--n=5"], "--n is 5; expected 6"),
    (["vae", "--sampler=ddin"], "nearest: ddim"),
    ([], "--models is missing"),
    (["vae", "", "gan"], "(nothing) is no folder; expected a finished run"),
])
def test_wrong_input_is_one_sentence_before_any_work(names, expected, runs, tmp_path, capsys):
    folders = ",".join(str(runs / name) if name else "" for name in names if not name.startswith("--"))
    flags = [name for name in names if name.startswith("--")]
    with pytest.raises(SystemExit) as stop:
        trilemma.main([f"--models={folders}", *flags, "--device=cpu", f"--root={runs}", f"--out={tmp_path / 'table'}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.strip().count("\n") == 0
    assert not (tmp_path / "table").exists()


def test_a_gaussian_has_the_mean_and_covariance_it_was_fitted_to_and_draws_depend_on_the_number_alone():
    z = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    z = z @ torch.tensor([[2.0, 1, 0], [0, 1, 0], [0, 0, 0]])  # of rank 2
    mean, factor = fit_gaussian(z)
    assert torch.allclose(factor @ factor.T, torch.cov(z.T), atol=1e-4) and torch.equal(mean, z.mean(0))
    net = Autoencoder(AutoencoderConfig("mlp", (1, 4, 4), (5,), 3), torch.Generator().manual_seed(0))
    x = generate(net, (mean, factor), 6, seed=1)
    assert torch.allclose(x[2:5], generate(net, (mean, factor), 3, seed=1, first=2), atol=1e-6)
    still = generate(net, (mean, torch.zeros(3, 3)), 2)
    assert torch.allclose(still, drawn(net, mean.repeat(2, 1)), atol=1e-6)


# --- the same models through python -m nanodiff.sample ----------------------------------------------------------------

@pytest.mark.parametrize("name", ["ae", "vae", "gan", "vqgan"])
def test_every_family_is_sampled_into_files_and_a_picture_is_made_again(name, runs, tmp_path):
    folder = tmp_path / "own"
    if name == "ae":  # its prior is fitted to the digits that the run names
        (runs / name / "config.json").write_text(json.dumps({"script": name, "data": "mnist", "root": str(runs)}))
    sample.main([f"--model={runs / name}", "--n=3", "--first=2", "--seed=1", "--device=cpu", f"--out={folder}"])
    files = sorted(file.name for file in folder.iterdir())
    assert files == ["0001-00002.png", "0001-00003.png", "0001-00004.png", "grid.png"]
    options = Options(root=str(runs))
    x = load(runs / name, options).draw(5, 1)
    with Image.open(folder / "0001-00003.png") as picture:
        assert picture.tobytes() == plots.to_pil(x[3]).tobytes()
    sample.main([f"--again={folder / '0001-00003.png'}", "--device=cpu", f"--out={tmp_path / 'again'}"])
    with Image.open(folder / "0001-00003.png") as picture, Image.open(tmp_path / "again" / "0001-00003.png") as other:
        assert picture.tobytes() == other.tobytes() and "sampler" not in picture.text


def test_a_vqgan_draws_the_class_and_temperature_that_are_asked_for(runs, tmp_path):
    model = vqgan.load(runs / "vqgan" / "model")
    sample.main([f"--model={runs / 'vqgan'}", "--n=2", "--label=7", "--temperature=0.5", "--device=cpu",
                 f"--out={tmp_path}"])
    x = model.generate(2, 0, torch.tensor([7, 7]), temperature=0.5)
    with Image.open(tmp_path / "0000-00001.png") as picture:
        assert picture.tobytes() == plots.to_pil(x[1]).tobytes() and picture.text["label"] == "7"


@pytest.mark.parametrize("words, expected", [
    (["vae", "--steps=3"], "--steps belongs to models with time steps, and"),
    (["gan", "--label=3"], "--label belongs to a DDPM, and"),
    (["gan", "--temperature=2"], "--temperature belongs to a VQGAN, and"),
    (["vqgan", "--prompt=a"], "is a VQGAN (it has no text_encoder/); expected no such flag"),
    (["vqgan", "--label=ten"], '--label "ten" is none of the model\'s classes (0, 1, 2'),
    (["vqgan", "--temperature=-1"], "--temperature is -1.0"),
    (["vqvae"], "holds a VQ-VAE, which draws no new pictures without a GPT"),
    (["points"], "draws points [2]; expected a model of pictures"),
])
def test_wrong_words_to_sample_are_one_sentence(words, expected, runs, tmp_path, capsys):
    if words[0] == "points":
        save_model(Generator(GANConfig((2,), 2, (4, 4))), runs / "points" / "model")
    with pytest.raises(SystemExit) as stop:
        sample.main([f"--model={runs / words[0]}", *words[1:], "--device=cpu", f"--out={tmp_path / 'own'}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.strip().count("\n") == 0
    assert not (tmp_path / "own").exists()
