"""Textual-inversion files: three layouts, several vectors a word, nothing executed."""

import pytest
import torch
from conftest import same
from safetensors.torch import load_file, save_file
from torch import nn

from nanodiff.errors import UserError
from nanodiff.formats.embedding_file import read_embedding, read_embeddings, write_embedding

LAYOUTS = {"diffusers": "learned_embeds.safetensors", "a1111": "woven.pt", "emb_params": "woven.safetensors"}


def vectors(n=3, width=8):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_read_back(layout, n, tmp_path):
    path = tmp_path / LAYOUTS[layout]
    write_embedding(path, "<cloth>", vectors(n), layout)
    word, read_vectors = read_embedding(path)
    assert word == "<cloth>" and same(read_vectors, vectors(n))
    assert read_embedding(path, "<other>")[0] == "<other>"  # an explicit word always wins
    write_embedding(path, "<cloth>", vectors(1)[0].half(), layout)  # [D], and over an older file
    assert same(read_embedding(path)[1], vectors(1).half().float())
    assert [other.name for other in tmp_path.iterdir()] == [path.name]


def test_each_layout_is_what_its_tool_expects(tmp_path):
    write_embedding(tmp_path / "one.safetensors", "<cloth>", vectors(1))
    write_embedding(tmp_path / "many.safetensors", "<cloth>", vectors(2))
    assert {name: list(t.shape) for name, t in load_file(tmp_path / "one.safetensors").items()} == {"<cloth>": [8]}
    assert {name: list(t.shape) for name, t in load_file(tmp_path / "many.safetensors").items()} == {"<cloth>": [2, 8]}
    write_embedding(tmp_path / "cloth.pt", "cloth", vectors(2), "a1111")
    content = torch.load(tmp_path / "cloth.pt", weights_only=True)
    assert content["name"] == "cloth" and list(content["string_to_param"]) == ["*"]
    assert same(content["string_to_param"]["*"], vectors(2))
    write_embedding(tmp_path / "cloth.safetensors", "cloth", vectors(1), "emb_params")
    assert same(load_file(tmp_path / "cloth.safetensors"), {"emb_params": vectors(1)})


def test_a_file_that_does_not_say_its_word_is_called_by_its_name(tmp_path):
    save_file({"emb_params": vectors()}, tmp_path / "knit3.safetensors")
    assert read_embedding(tmp_path / "knit3.safetensors")[0] == "<knit3>"
    torch.save(vectors(), tmp_path / "<lace>.pt")
    assert read_embedding(tmp_path / "<lace>.pt")[0] == "<lace>"
    torch.save({"string_to_param": {"*": vectors()}}, tmp_path / "felt.pt")
    assert read_embedding(tmp_path / "felt.pt")[0] == "<felt>"


def test_files_of_real_tools_hold_parameters_and_more_than_the_vectors(tmp_path):
    info = {"string_to_token": {"*": 265}, "step": 500, "sd_checkpoint": None, "sd_checkpoint_name": None}
    torch.save({**info, "name": "sinuous", "string_to_param": {"*": nn.Parameter(vectors(2))}}, tmp_path / "a1111.pt")
    word, read_vectors = read_embedding(tmp_path / "a1111.pt")
    assert word == "sinuous" and same(read_vectors, vectors(2)) and not read_vectors.requires_grad
    first = {"string_to_token": {"*": torch.tensor(265)},
             "string_to_param": nn.ParameterDict({"*": nn.Parameter(vectors(2))})}
    torch.save(first, tmp_path / "first.pt")
    assert same(read_embeddings(tmp_path / "first.pt"), {"<first>": vectors(2)})
    torch.save({"<cloth>": vectors(1)[0]}, tmp_path / "learned_embeds.bin")
    assert same(read_embeddings(tmp_path / "learned_embeds.bin"), {"<cloth>": vectors(1)})


def test_several_words_come_from_one_file_unless_one_is_asked_for(tmp_path):
    path = tmp_path / "learned_embeds.safetensors"
    save_file({"<warp>": vectors(1)[0], "<weft>": vectors(2)}, path)
    assert same(dict(sorted(read_embeddings(path).items())), {"<warp>": vectors(1), "<weft>": vectors(2)})
    with pytest.raises(UserError, match="holds 2 words.*expected one"):
        read_embedding(path)
    with pytest.raises(UserError, match='2 words.*expected one to call "<yarn>"'):
        read_embeddings(path, "<yarn>")


@pytest.mark.parametrize("held, words", [
    ({"<cloth>": torch.zeros(1, 2, 8)}, r"shape \[1, 2, 8\], expected \[D\] or \[n, D\]"),
    ({"<cloth>": torch.tensor(1.0)}, r"shape \[\]"),
    ({"<cloth>": torch.zeros(0, 8)}, r"shape \[0, 8\]"),
    ({"<cloth>": torch.full((8,), float("nan"))}, "not finite"),
    ({"<cloth>": torch.zeros(8, dtype=torch.int64)}, "is a torch.int64, expected vectors"),
    ({"<cloth>": torch.zeros(8), "<silk>": torch.zeros(6)}, r"several widths, \[6, 8\]"),
    ({"conv_in.weight": torch.zeros(8, 4)}, 'not a textual inversion.*found "conv_in.weight"'),
    ({"lora_unet_conv_in.alpha": torch.tensor(1.0)}, "not a textual inversion"),
    ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "for SDXL or SD 3"),
    ({}, "not a textual inversion"),
])
def test_other_files_are_refused_in_one_sentence(held, words, tmp_path):
    save_file(held, tmp_path / "a.safetensors")
    torch.save(held, tmp_path / "a.bin")
    for name in ("a.safetensors", "a.bin"):
        with pytest.raises(UserError, match=words) as error:
            read_embeddings(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("held", [
    {"state_dict": {"x": torch.zeros(8)}}, {"string_to_param": 3}, {"string_to_param": {}}, [torch.zeros(8)], 5,
    {3: torch.zeros(8)}, {"": torch.zeros(8)}, {"<cloth>": [0.0] * 8},
])
def test_pickles_of_another_kind_are_refused(held, tmp_path):
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(UserError, match="not a textual inversion"):
        read_embeddings(tmp_path / "a.pt")


class Trap:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["beside the vectors", "as the vectors", "the whole file"])
def test_a_pickle_that_would_run_code_is_refused(place, tmp_path, capsys):
    trap = Trap(print, "a pickle ran code")
    held = {"beside the vectors": {"string_to_param": {"*": vectors()}, "name": trap},
            "as the vectors": {"string_to_param": trap}, "the whole file": trap}[place]
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(UserError, match="was refused"):
        read_embeddings(tmp_path / "a.pt")
    assert capsys.readouterr().out == ""


def test_a_parameter_dict_that_hides_a_call_is_refused(tmp_path, capsys):
    hidden = nn.ParameterDict({"*": nn.Parameter(vectors())})
    hidden.extra = Trap(print, "a pickle ran code")
    torch.save({"string_to_param": hidden}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="was refused"):
        read_embeddings(tmp_path / "a.pt")
    assert capsys.readouterr().out == ""


def test_missing_and_broken_files_are_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"no pickle")
    (tmp_path / "a.safetensors").write_bytes(b"no safetensors")
    (tmp_path / "a.png").write_bytes(b"a picture")
    for name in ("a.pt", "a.safetensors", "a.png", "absent.pt", "absent.safetensors"):
        with pytest.raises(UserError, match=name):
            read_embeddings(tmp_path / name)


def test_nothing_wrong_is_written(tmp_path):
    for path, layout, tensor, words in (
        ("a.safetensors", "diffuser", vectors(), "nearest: diffusers"),
        ("a.pt", "diffusers", vectors(), "is a .safetensors file"),
        ("a.safetensors", "a1111", vectors(), "is a .pt file"),
        ("a.pt", "a1111", vectors() * float("inf"), "not finite"),
        ("a.safetensors", "emb_params", torch.zeros(2, 3, 4), "expected"),
    ):
        with pytest.raises(UserError, match=words):
            write_embedding(tmp_path / path, "<cloth>", tensor, layout)
    assert list(tmp_path.iterdir()) == []
