"""python -m nanodiff.convert: every route there and back, and OUT left alone when anything is wrong."""

import itertools
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

import nanodiff.pipelines.stable_diffusion
import tiny_sd
from conftest import same
from nanodiff import convert
from nanodiff.formats.embedding_file import read_embedding
from nanodiff.formats.lora_file import locate_layer as layer_of, parse_lora
from nanodiff.inspect import describe

WORDS = {"diffusers": "safetensors", "a1111": "pt", "emb_params": "safetensors"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the commands below convert."""
    root = tmp_path_factory.mktemp("convert")
    for name in tiny_sd.SETTINGS:
        tiny_sd.write_model(name, root / name)
    for kind in tiny_sd.LORAS:
        tiny_sd.write_lora(kind, root / f"{kind}.safetensors")
    for kind, file in tiny_sd.EMBEDDING_FILES.items():
        tiny_sd.write_embedding(kind, root / file)
    convert.main([f"{root}/sd1", f"{root}/single.safetensors", "--to=single"])
    torch.save({"state_dict": load_file(root / "single.safetensors")}, root / "old.ckpt")
    return root


def weights(sd):
    """The state dicts of a model, or of what is in a file or folder."""
    sd = sd if isinstance(sd, nanodiff.pipelines.stable_diffusion.StableDiffusion) else nanodiff.load(sd, dtype=None)
    return {name: getattr(sd, name).state_dict() for name in ("unet", "autoencoder", "text_model")}


# --- checkpoints ----------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_folder_becomes_a_file_and_a_folder_again_with_the_same_weights_and_settings(place, tmp_path, capsys):
    name, file, folder = "sd2", tmp_path / "sub" / "one.safetensors", tmp_path / "folder"
    convert.main([str(place / name), str(file), "--to=single"])
    convert.main([str(file), str(folder), "--to", "diffusers"])
    said = capsys.readouterr().out
    assert f"{file}: checkpoint, single\n" in said and said.endswith(f"{folder}: checkpoint, diffusers\n")
    assert os.listdir(file.parent) == [file.name]
    first = nanodiff.load(place / name)
    for sd in (nanodiff.load(file), nanodiff.load(folder)):
        assert same(weights(sd), weights(first))
        assert (sd.kind, sd.tokenizer.pad) == (first.kind, first.tokenizer.pad)
        for part, settings in first.settings.items():
            assert settings.items() <= sd.settings[part].items(), part


@pytest.mark.slow
def test_a_pickled_checkpoint_becomes_safetensors_when_a_folder_explains_its_sizes(place, tmp_path):
    convert.main([f"{place}/old.ckpt", f"{tmp_path}/new.safetensors", "--to=single", f"--config={place}/sd1"])
    assert same(weights(tmp_path / "new.safetensors"), weights(place / "sd1"))


@pytest.mark.slow
def test_dtype_rounds_every_weight_once_and_the_default_leaves_them_as_they_are(place, tmp_path):
    convert.main([f"{place}/sd1", f"{tmp_path}/half", "--to=diffusers", "--dtype=float16"])
    convert.main([f"{tmp_path}/half", f"{tmp_path}/half.safetensors", "--to=single"])
    whole = weights(place / "sd1")
    wanted = {name: {key: tensor.half() for key, tensor in held.items()} for name, held in whole.items()}
    assert same(weights(tmp_path / "half"), wanted) and same(weights(tmp_path / "half.safetensors"), wanted)


@pytest.mark.slow
def test_merged_loras_are_in_the_weights_of_the_new_file(place, tmp_path, capsys):
    convert.main([f"{place}/sd1", f"{tmp_path}/merged.safetensors", "--to=single",
                  f"--merge={place}/peft.safetensors:0.5,{place}/kohya.safetensors"])
    out = capsys.readouterr().out
    assert "peft.safetensors, scale 0.5: 56 layers of the unet" in out and "kohya.safetensors, scale 1: " in out
    sd = nanodiff.load(place / "sd1")
    sd.load_lora(place / "peft.safetensors", 0.5)
    sd.load_lora(place / "kohya.safetensors")
    sd.merge_lora()
    merged, base, found = sd.unet, weights(place / "sd1")["unet"], weights(tmp_path / "merged.safetensors")["unet"]
    for key in ("conv_in.weight", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"):
        layer = merged.get_submodule(key.removesuffix(".weight"))
        assert torch.equal(found[key], layer.weight) and torch.equal(found[key], base[key]) == (key == "conv_in.weight")


# --- LoRA and words -------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_what_a_lora_changed_is_extracted_again_from_the_merged_checkpoint(place, tmp_path, capsys):
    lora = place / "peft.safetensors"
    convert.main([f"{place}/sd1", f"{tmp_path}/tuned", "--to=diffusers", f"--merge={lora}:0.8"])
    for names in ("diffusers", "kohya"):
        convert.main([f"{tmp_path}/tuned", f"{tmp_path}/{names}.safetensors", f"--to={names}", f"--extract={place}/sd1",
                      "--rank=16"])
        said = capsys.readouterr().out
        assert "layers differ; the LoRA leaves 0.0% of their difference" in said
        convert.main([f"{place}/sd1", f"{tmp_path}/{names}", "--to=diffusers", f"--merge={tmp_path}/{names}.safetensors"])
        for name, state in weights(tmp_path / names).items():
            for key, tensor in weights(tmp_path / "tuned")[name].items():
                torch.testing.assert_close(state[key], tensor, rtol=0, atol=1e-5)


def changes(path):
    """{(network, layer): alpha / rank * up @ down} of a LoRA file; kohya's names without their dots."""
    found = {}
    for name, held in parse_lora(path)[1].items():
        network, layer = layer_of(name)
        factor = 1 if held["alpha"] is None else held["alpha"] / len(held["down"])
        found[network, layer.replace(".", "_")] = factor * held["up"].flatten(1) @ held["down"].flatten(1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind, there, back", [("peft", "kohya", "diffusers"), ("kohya", "diffusers", "kohya")])
def test_a_lora_changes_its_names_and_not_what_it_does(kind, there, back, place, tmp_path):
    convert.main([f"{place}/{kind}.safetensors", f"{tmp_path}/a.safetensors", f"--to={there}", f"--model={place}/sd1"])
    convert.main([f"{tmp_path}/a.safetensors", f"{tmp_path}/b.safetensors", f"--to={back}", f"--model={place}/sd1"])
    assert dict(describe(tmp_path / "a.safetensors"))["kind"] == f"LoRA, in {there} names"
    wanted = changes(place / f"{kind}.safetensors")
    for file in ("a", "b"):
        found = changes(tmp_path / f"{file}.safetensors")
        assert found.keys() == wanted.keys() and len(found) == tiny_sd.info()["sd1"]["lora"]["files"][kind]["parts"]
        assert all(torch.allclose(found[key], wanted[key], rtol=1e-6, atol=1e-7) for key in wanted)


@pytest.mark.slow
def test_without_a_model_a_lora_is_for_the_one_that_comes_with_nanodiff(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [f"{place}/peft.safetensors", "a.safetensors", "--to=kohya"]
    for name, expected in (("none", "small model of nanodiff, does not exist"), ("sd2", "another base model")):
        monkeypatch.setattr(nanodiff.pipelines.stable_diffusion, "SHIPPED", place / name)
        with pytest.raises(SystemExit):
            convert.main(flags)
        assert expected in capsys.readouterr().err and not any(tmp_path.iterdir())
    monkeypatch.setattr(nanodiff.pipelines.stable_diffusion, "SHIPPED", place / "sd1")
    convert.main(flags)
    assert f"--model is not given: the layers are those of {place}/sd1" in capsys.readouterr().out
    convert.main([flags[0], "b.safetensors", flags[2], f"--model={place}/sd1"])
    assert same(load_file("a.safetensors"), load_file("b.safetensors"))


@pytest.mark.parametrize("first, second", list(itertools.permutations(WORDS, 2)))
def test_a_word_goes_from_any_layout_to_any_other(first, second, place, tmp_path):
    source, word, vectors = place / "sinuous.pt", *read_embedding(place / "sinuous.pt")
    for to in (first, second):
        target = tmp_path / f"{to}.{WORDS[to]}"
        convert.main([str(source), str(target), f"--to={to}", "--overwrite"])
        assert same(list(read_embedding(target)), [word, vectors])
        source = target


# --- what it refuses ------------------------------------------------------------------------------------------------

class Bomb:
    """An object whose unpickling would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.makedirs, (self.path,)


@pytest.fixture(scope="module")
def damaged(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    whole = (place / "single.safetensors").read_bytes()
    (folder / "short.safetensors").write_bytes(whole[:-1000])
    torch.save({"state_dict": {"x": Bomb(f"{folder}/executed")}}, folder / "bomb.ckpt")
    (folder / "raw.pt").write_bytes(pickle.dumps(Bomb(f"{folder}/executed")))
    save_file({"x": torch.zeros(2, 2, 2)}, folder / "x.safetensors")
    lora = load_file(place / "peft.safetensors")
    del lora["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight"]
    save_file(lora, folder / "lora.safetensors")
    tiny_sd.write_model("sd1", folder / "lacks")
    os.remove(folder / "lacks/vae/diffusion_pytorch_model.safetensors")
    return folder


REFUSED = [  # @ stands for the folder of good things, # for that of damaged ones, OUT for a place that exists
    (["@sd1"], "1 paths were given"), (["@sd1", "a", "b", "--to=single"], "3 paths were given"),
    (["@sd1", "a.safetensors"], '--to is ""'), (["@sd1", "a.safetensors", "--to=singel"], "nearest: single"),
    (["@singel.safetensors", "a", "--to=diffusers"],
     "does not exist; expected a file or a diffusers folder, nearest: single"),
    (["@sd1", "a.ckpt", "--to=single"], "does not end in .safetensors"),
    (["@sd1", "a", "--to=kohya"], "which --to kohya does not fit"),
    (["@sd1", "OUT.safetensors", "--to=single"], "OUT.safetensors exists; expected a new place, or --overwrite"),
    (["@single.safetensors", "OUT", "--to=diffusers"], "OUT exists; expected a new place, or --overwrite"),
    (["@single.safetensors", "OUT.safetensors", "--to=diffusers", "--overwrite"],
     "is a file, and what is to be written a folder"),
    (["@sd1", "OUT", "--to=single", "--overwrite"], "is a folder, and what is to be written a file"),
    (["@sd1", "@sd1/../sd1", "--to=diffusers", "--overwrite"], "is both IN and OUT"),
    (["@sd1", "a.safetensors", "--to=single", "--dtype=float8"], "nearest: float32"),
    (["@sd1", "a.safetensors", "--to=single", "--model=@sd1"], "--model belongs to a LoRA"),
    (["@sd1", "a.safetensors", "--to=single", "--merge=@pef.safetensors"], "pef.safetensors cannot be read"),
    (["@sd2", "a.safetensors", "--to=single", "--merge=@peft.safetensors"], "another base model"),
    (["@old.ckpt", "a", "--to=diffusers"], "pass config=FOLDER"),
    (["@peft.safetensors", "a.pt", "--to=kohya", "--model=@sd1"], "does not end in .safetensors"),
    (["@peft.safetensors", "a.safetensors", "--to=kohya", "--model=@sd2"], "another base model"),
    (["@peft.safetensors", "a.safetensors", "--to=single"], "is a LoRA, which --to single does not fit"),
    (["@peft.safetensors", "a.safetensors", "--to=kohya", "--dtype=float16"], "--dtype belongs to a checkpoint"),
    (["@sd1", "a.safetensors", "--to=kohya", "--extract=@sd1"], "the same weights: there is no change to extract"),
    (["@sd1", "a.safetensors", "--to=kohya", "--extract=@sd2"], "differ in more than their weights"),
    (["@sd1", "a.safetensors", "--to=kohya", "--extract=@sd3"], "does not exist; expected a checkpoint"),
    (["@sd1", "a.safetensors", "--to=single", "--extract=@sd1"], "is a LoRA, which --to single does not fit"),
    (["@sd1", "a.safetensors", "--to=kohya", "--extract=@sd1", "--rank=0"], "--rank is 0"),
    (["@sd1", "a.safetensors", "--to=kohya", "--extract=@sd1", "--dtype=float16"], "--dtype is not for --extract"),
    (["@peft.safetensors", "a.safetensors", "--to=kohya", "--extract=@sd1"], "--extract compares two checkpoints"),
    (["@sd1", "a", "--to=diffusers", "--rank=3"], "--rank is that of --extract"),
    (["@sinuous.pt", "a.pt", "--to=emb_params"], "is a .safetensors file"),
    (["@sinuous.pt", "a.pt", "--to=kohya"], "is an embedding, which --to kohya does not fit"),
    (["#short.safetensors", "OUT", "--to=diffusers", "--overwrite"], "is not a valid safetensors file"),
    (["#short.safetensors", "OUT.safetensors", "--to=single", "--overwrite"], "is not a valid safetensors file"),
    (["#lacks", "OUT.safetensors", "--to=single", "--overwrite"], "vae holds no weights"),
    (["#lacks", "OUT", "--to=diffusers", "--overwrite"], "vae holds no weights"),
    (["#bomb.ckpt", "OUT", "--to=diffusers", "--overwrite"], "to load it would run os.makedirs"),
    (["#raw.pt", "OUT.safetensors", "--to=diffusers", "--overwrite"], "broken or no file of weights"),
    (["#x.safetensors", "OUT", "--to=diffusers", "--overwrite"], "of no kind that we know"),
    (["#lora.safetensors", "OUT.safetensors", "--to=kohya", "--overwrite", "--model=@sd1"],
     "both down and up are needed"),
]


@pytest.mark.parametrize("flags, expected", REFUSED, ids=[" ".join(flags).replace("--", "") for flags, _ in REFUSED])
def test_wrong_input_ends_in_one_sentence_and_leaves_what_was_there(flags, expected, place, damaged, tmp_path, capsys,
                                                                    monkeypatch):
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT/model_index.json").write_text("{}")
    (tmp_path / "OUT.safetensors").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = sorted([*damaged.rglob("*"), *place.rglob("*")])
    with pytest.raises(SystemExit) as stop:
        convert.main([flag.replace("@", f"{place}/").replace("#", f"{damaged}/") for flag in flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["OUT", "OUT.safetensors"] and os.listdir("OUT") == ["model_index.json"]
    assert (tmp_path / "OUT.safetensors").read_text() == "mine"
    assert sorted([*damaged.rglob("*"), *place.rglob("*")]) == before  # nothing written there, nothing executed


@pytest.mark.slow
def test_overwrite_replaces_a_file_and_the_parts_of_a_folder(place, tmp_path):
    tiny_sd.write_model("sd2", tmp_path / "out")
    (tmp_path / "out.safetensors").write_text("something else")
    wanted = weights(place / "sd1")
    for target, to in (("out", "diffusers"), ("out.safetensors", "single")):
        convert.main([f"{place}/sd1", f"{tmp_path}/{target}", f"--to={to}", "--overwrite"])
        sd = nanodiff.load(tmp_path / target)
        assert same(weights(sd), wanted) and sd.tokenizer.pad == tiny_sd.PAD["sd1"] and sd.kind == "noise"
