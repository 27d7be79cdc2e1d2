"""`python -m nanodiff.inspect`: what it says of every kind of file, and of those that are damaged."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_sd
from nanodiff.errors import UserError
from nanodiff.flags import parse
from nanodiff.formats.single_file import read_single_file, write_single_file
from nanodiff.inspect import change, describe, main
from small_run import go, make


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The diffusers folders of the tiny models and, beside each, a single file of it."""
    root = tmp_path_factory.mktemp("inspected")
    for name in (*tiny_sd.NAMES, "sd1_inpaint"):
        tiny_sd.write_model(name, root / name, None if name in tiny_sd.NAMES else inpainting_shapes())
    return root


def inpainting_shapes():
    shapes = {part: dict(own) for part, own in tiny_sd.info()["shapes"]["sd1"].items()}
    shapes["unet"]["conv_in.weight"] = [16, 9, 3, 3]
    return shapes


def numbers(name):
    """Parameters of each network of a tiny model, with thousands set apart."""
    return [f"{sum(t.numel() for t in own.values()):,}" for own in tiny_sd.draw_model(name).values()]


def test_a_diffusers_folder_is_described_by_its_settings_and_weights(folder):
    lines = dict(describe(folder / "sd2"))
    assert lines["kind"] == "Stable Diffusion 2.x, diffusers folder" and lines["predicts"] == "v_prediction"
    assert lines["channels"] == "8-16-16-24, heads [2, 4, 2, 3]" and lines["context"] == "12 wide"
    assert lines["text"] == "3 layers, 12 wide" and lines["latent scaling factor"] == "0.13"
    assert lines["schedule"] == "1000 steps, scaled_linear 0.001 to 0.015"
    for name, count in zip(("U-Net", "autoencoder", "text encoder"), numbers("sd2")):
        assert lines[name].startswith(f"{count} parameters in") and lines[name].endswith("float32")
    assert dict(describe(folder / "sd1_inpaint"))["kind"].startswith("Stable Diffusion 1.x for inpainting")
    assert dict(describe(folder / "sd1/vae"))["kind"] == "one network's folder, AutoencoderKL"


def test_a_single_file_is_described_with_and_without_our_metadata(folder, tmp_path):
    path = tmp_path / "model.safetensors"
    write_single_file(checkpoint_of(folder / "sd2"), path, "float16")
    lines = dict(describe(path))
    assert lines["kind"] == "Stable Diffusion 2.x, single file in CompVis' names"
    assert lines["channels"] == "8-16-16-24, heads [2, 4, 2, 3]" and lines["predicts"] == "v_prediction"
    assert lines["U-Net"].startswith(numbers("sd2")[0]) and lines["U-Net"].endswith("float16")
    assert lines["modelspec.architecture"] == "stable-diffusion-v2-768-v" and "nanodiff" not in lines
    held = load_file(path) | {"model_ema.decay": torch.tensor(0.9), "model_ema.diffusion_modelout0bias": torch.zeros(8)}
    del held["cond_stage_model.model.ln_final.weight"]
    save_file({key: tensor for key, tensor in held.items() if "first_stage" not in key}, path)
    lines = dict(describe(path))
    assert [lines[key] for key in ("channels", "text", "predicts")] == ["8-16-16-24", "3 layers, 12 wide", "not said"]
    assert lines["autoencoder"] == "missing" and lines["averaged (EMA) twins"].startswith("9 parameters in 2 tensors")
    assert lines["other keys"].startswith("12: alphas_cumprod")


def checkpoint_of(folder):
    """A Checkpoint of a folder, by way of the recorded names (see test_single_file)."""
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "formats"))
    from test_single_file import write
    path = write(folder.parent / f"{folder.name}.safetensors", folder.name)
    return read_single_file(path, folder)


@pytest.mark.parametrize("kind, naming", [("peft", "diffusers"), ("kohya", "kohya")])
def test_a_lora_is_described_by_ranks_alphas_groups_and_the_norm_of_its_change(kind, naming, tmp_path):
    tiny_sd.write_lora(kind, tmp_path / "lora.safetensors")
    lines, parts = dict(describe(tmp_path / "lora.safetensors")), tiny_sd.lora_parts(kind)
    assert lines["kind"] == f"LoRA, in {naming} names" and lines["layers"] == str(len(parts))
    assert lines["base model"] == "a model with texts 24 wide"
    attention = [part for part in parts if part[0] == "unet" and ".attn" in part[1]]
    norm = sum(float((alpha / len(down) * up @ down).norm()) ** 2 for _, _, down, up, alpha in attention) ** 0.5
    assert lines["attention"] == f"{len(attention)} layers, norm of the change {norm:.4g}"
    text = sum(part[0] == "text_encoder" and "self_attn" in part[1] for part in parts)
    assert lines["text encoder, attention"].startswith(f"{text} layers")
    if kind == "peft":
        assert lines["rank"] == "4" and lines["alpha"] == "3"
        return
    assert lines["rank"].startswith("4 (") and ", 2 (" in lines["rank"]
    assert "none (= rank) (1)" in lines["alpha"]
    resnets = sum(part[0] == "unet" and ".resnets." in part[1] for part in parts)
    assert lines["ResNet convolutions"].startswith(f"{resnets} layers")
    grouped = sum(int(text.split()[0]) for text in lines.values() if "norm of the change" in text)
    assert grouped == len(parts) and "other layers" not in lines


def test_the_norm_of_a_convolutions_change_is_that_of_the_kernel_it_adds():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 3, 3, 3, generator=generator), torch.randn(5, 2, 1, 1, generator=generator)
    kernel = 1.5 / 2 * torch.einsum("or,rihw->oihw", up.flatten(1), down)
    assert change({"down": down, "up": up, "alpha": 1.5}) == pytest.approx(float(kernel.norm()), rel=1e-6)
    assert change({"down": down, "up": torch.zeros_like(up), "alpha": None}) == 0


def test_base_model_and_metadata_are_shown(tmp_path):
    pair = {"down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (768, 320),
            "mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (768, 1280)}
    tensors = {}
    for name, (inside, outside) in pair.items():
        tensors |= {f"lora_unet_{name}.lora_down.weight": torch.ones(4, inside).half(),
                    f"lora_unet_{name}.lora_up.weight": torch.zeros(outside, 4).half()}
    save_file(tensors, tmp_path / "lora.safetensors", {"ss_base_model_version": "sd_v1", "ss_network_dim": "4",
                                                       "ss_tag_frequency": "long", "modelspec.thumbnail": "data:image"})
    lines = dict(describe(tmp_path / "lora.safetensors"))
    assert lines["base model"] == "Stable Diffusion 1.x" and lines["alpha"] == "none (= rank)"
    assert lines["attention"] == "2 layers, norm of the change 0 (none at all)"
    assert lines["ss_base_model_version"] == "sd_v1" and lines["ss_network_dim"] == "4"
    assert not {"ss_tag_frequency", "modelspec.thumbnail"} & lines.keys()


@pytest.mark.parametrize("kind", tiny_sd.EMBEDDINGS)
def test_an_embedding_is_described_by_its_word_and_vectors(kind, tmp_path):
    path = tmp_path / tiny_sd.EMBEDDING_FILES[kind]
    tiny_sd.write_embedding(kind, path)
    word, vectors = tiny_sd.embedding(kind)
    lines = dict(describe(path))
    assert lines["kind"] == "textual inversion" and lines["base model"] == "a model with texts 24 wide"
    text = lines[f'word "{word}"']
    assert text.startswith(f"{len(vectors)} x 24 numbers, norm {vectors[0].norm():.3g}")


def test_a_training_run_and_its_checkpoint_are_described(tmp_path):
    run, *parts = make(tmp_path)
    go(run, *parts)
    lines = dict(describe(run.folder))
    assert lines["kind"] == "training run of train_small.py" and lines["checkpoints"].endswith("last at step 6 of 6")
    lines = dict(describe(run.folder / "checkpoints/00000006"))
    assert lines["kind"] == "training checkpoint" and lines["step"] == "6"
    assert {"part net", "part ema", "part optimiser"} <= lines.keys()


def test_a_ddpm_folder_is_described(tmp_path):
    from nanodiff.pipelines.ddpm import DDPM
    from nanodiff.diffusion import Schedule
    from nanodiff.models.unet import UNet, UNetConfig
    net = UNet(UNetConfig(in_channels=1, out_channels=1, channels=(8, 16), groups=4, heads=2, num_classes=2))
    DDPM(net, Schedule.cosine(50), "v", (1, 8, 8), classes=["woven", "felt"], data="folder").save(tmp_path / "model")
    lines = dict(describe(tmp_path / "model"))
    assert lines["kind"] == "DDPM folder" and lines["predicts"] == "v_prediction" and lines["pictures"] == "1x8x8"
    assert lines["classes"] == "woven, felt" and lines["channels"] == "8-16"
    assert lines["U-Net"].startswith(f"{sum(p.numel() for p in net.parameters()):,} parameters")


class Runs:
    """What an evil pickle would do."""

    def __reduce__(self):
        return os.mkdir, (Runs.where,)


@pytest.mark.parametrize("ending", [".ckpt", ".pt"])
def test_a_pickle_that_would_run_code_is_refused(ending, tmp_path, capsys):
    Runs.where = str(tmp_path / "executed")
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "more": Runs()}, tmp_path / f"evil{ending}")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / f"evil{ending}")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "refused" in error and error.count("\n") == 1
    assert not (tmp_path / "executed").exists()


def test_damaged_and_unknown_files_are_one_sentence_and_exit_code_2(folder, tmp_path, capsys):
    tiny_sd.write_lora("kohya", tmp_path / "lora.safetensors")
    whole = (tmp_path / "lora.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "noise.ckpt").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    save_file({"some.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    save_file({"x.lokr_w1": torch.zeros(2, 2)}, tmp_path / "lokr.safetensors")
    save_file({key: tensor for key, tensor in load_file(tmp_path / "lora.safetensors").items() if "up" not in key},
              tmp_path / "half.safetensors")
    expected = {"cut.safetensors": "not a valid safetensors file", "noise.ckpt": "expected tensors",
                "text.txt": "ends in .safetensors or .ckpt", "empty": "no folder that we know",
                "missing.safetensors": "does not exist", "lokr.safetensors": "LoKr", "half.safetensors": "no up",
                "other.safetensors": 'no kind that we know, for example "some.weight"'}
    for name, words in expected.items():
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path / name)])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and words in error and error.count("\n") == 1 and name in error
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "no file was named" in capsys.readouterr().err


def test_a_network_alone_and_models_of_other_families_are_told(folder, tmp_path):
    lines = dict(describe(folder / "sd1/unet/diffusion_pytorch_model.safetensors"))
    assert lines["kind"] == "weights of a U-Net alone (Stable Diffusion's), in diffusers' names"
    lines = dict(describe(folder / "sd1/vae/diffusion_pytorch_model.safetensors"))
    assert lines["kind"].startswith("weights of an autoencoder alone")
    assert dict(describe(folder / "sd1/text_encoder/model.safetensors"))["kind"].startswith("weights of a text encoder")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3),
               "conditioner.embedders.1.model.ln_final.weight": torch.zeros(4)}, tmp_path / "xl.safetensors")
    assert "XL" in dict(describe(tmp_path / "xl.safetensors"))["kind"]


# --- the command line -----------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_the_command_prints_every_file_and_leaves_pythons_own_inspect_alone(tmp_path):
    for kind in ("peft", "kohya"):
        tiny_sd.write_lora(kind, tmp_path / f"{kind}.safetensors")
    words = [sys.executable, "-m", "nanodiff.inspect", "peft.safetensors", "kohya.safetensors"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.count("kind ") == 2 and "peft.safetensors\n" in done.stdout
    import inspect

    from nanodiff import flags
    assert flags.inspect is inspect and "nanodiff" not in inspect.__file__


@dataclass
class Words:
    files: tuple = ()  # what to look at
    to: str = "single"  # a layout


def test_words_without_a_flag_go_into_a_tuple_field_wherever_they_stand(capsys):
    assert parse(Words, ["a", "b"]) == (Words(("a", "b")), {"files"})
    assert parse(Words, ["a", "--to", "diffusers", "b"]) == (Words(("a", "b"), "diffusers"), {"files", "to"})
    assert parse(Words, []) == (Words(), set())
    with pytest.raises(UserError, match="nearest: --to"):
        parse(Words, ["a", "--tu", "b"])
    with pytest.raises(SystemExit):
        parse(Words, ["--help"])
    assert "what to look at" in capsys.readouterr().out


def test_settings_in_the_metadata_that_somebody_broke_are_one_sentence(tmp_path):
    tensors = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}
    save_file(tensors, tmp_path / "model.safetensors", {"nanodiff": json.dumps({"settings": {"unet": 3}})})
    with pytest.raises(UserError, match="cannot be read"):
        describe(tmp_path / "model.safetensors")
