"""CLIP's tokenizer against transformers' (tests/golden/make_tokens.py) and against its own promises."""

import gzip
import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import tiny_sd
import torch

from nanodiff.errors import UserError
from nanodiff.models.clip_text import Tokenizer
from nanodiff.models.tokenizer import SHIPPED

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokens.json").read_text(encoding="utf-8"))
START, END, PAD = 49406, 49407, {"sd1": 49407, "sd2": 0}
ROLES = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{"sd1": folder, "sd2": folder} of the two tokenizers' files."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name in ("sd1", "sd2"):
        tiny_sd.write_tokenizer(root / name, tiny_sd.PAD[name])
    return {name: root / name for name in ("sd1", "sd2")}


@pytest.fixture(scope="module")
def sd1():
    return Tokenizer.shipped()


@pytest.fixture(scope="module")
def sd2():
    return Tokenizer.shipped("!")


@pytest.fixture()
def fresh(folders):
    """An SD 1 tokenizer that the test may add words to."""
    return Tokenizer.from_folder(folders["sd1"])


def row(ids, pad):
    kept = [START, *ids[:75], END]
    return torch.tensor(kept + [pad] * (77 - len(kept)))


def quietly(tokenizer, prompts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tokenizer(prompts)


def files_of(folder):
    """A new folder with CLIP's vocabulary and merges, and nothing else."""
    folder.mkdir()
    for name, text in zip(("vocab.json", "merges.txt"), tiny_sd.tokenizer_files()):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


# --- ids ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source", ["folder", "shipped"])
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_ids_and_rows_equal_those_of_transformers(name, source, folders):
    tokenizer = Tokenizer.from_folder(folders[name]) if source == "folder" else Tokenizer.shipped(tiny_sd.PAD[name])
    assert len(tokenizer) == 49408
    for case in GOLDEN["prompts"]:
        ids = case.get("sd2_ids", case["ids"]) if name == "sd2" else case["ids"]
        tokens = tokenizer.split(case["prompt"])
        assert [tokenizer.vocab[token] for token in tokens] == ids, case["prompt"]
        assert torch.equal(quietly(tokenizer, case["prompt"]), row(ids, PAD[name])[None]), case["prompt"]
        if "tokens" in case:
            assert tokens == (case.get("sd2_tokens", case["tokens"]) if name == "sd2" else case["tokens"])


def test_textures_of_the_report_split_as_it_says(sd1):
    assert sd1.split("dtd_honeycombed") == ["d", "td</w>", "_</w>", "honey", "com", "bed</w>"]
    assert sd1.split("dtd_braided") == ["d", "td</w>", "_</w>", "braided</w>"]
    assert sd1.split("dtd_spiralled") == ["d", "td</w>", "_</w>", "spir", "alled</w>"]


def test_shipped_merges_give_the_vocabulary_of_the_released_folders(sd1, folders):
    vocab, merges = tiny_sd.tokenizer_files()
    assert sd1.vocab == json.loads(vocab) == Tokenizer.from_folder(folders["sd1"]).vocab
    assert sd1.merges == [tuple(line.split()) for line in merges.splitlines()[1:]]
    assert (sd1.vocab["!"], sd1.vocab["<|startoftext|>"], sd1.vocab["<|endoftext|>"]) == (0, START, END)


def test_an_exclamation_mark_is_padding_in_sd2_alone(sd1, sd2):
    assert sd1("! !! !!!")[0, :5].tolist() == [START, 256, 748, 995, END]
    assert sd2("! !! !!!")[0, :9].tolist() == [START, 0, 0, 0, 0, 0, 0, END, 0]
    assert (sd1("")[0, 1:] == END).all() and sd2("")[0].tolist() == [START, END] + [0] * 75


def test_a_list_of_prompts_gives_the_rows_of_the_single_ones(sd1):
    prompts = ["a cat", "", "dtd_braided"]
    ids = sd1(prompts)
    assert ids.shape == (3, 77) and ids.dtype == torch.int64
    assert torch.equal(ids, torch.cat([sd1(p) for p in prompts])) and torch.equal(ids, sd1(tuple(prompts)))
    assert sd1([]).shape == (0, 77)


# --- prompts that are too long --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_a_long_prompt_keeps_the_end_token_and_says_what_was_cut(name, sd1, sd2):
    tokenizer = {"sd1": sd1, "sd2": sd2}[name]
    with pytest.warns(UserWarning, match='has 78 tokens and only 75 fit: "and the rest" was cut off'):
        ids = tokenizer("thread " * 75 + "and the rest")
    assert ids.shape == (1, 77) and ids[0, 0] == START and ids[0, -1] == END
    assert (ids[0, 1:-1] == tokenizer("thread")[0, 1]).all()


def test_the_cut_is_named_from_the_middle_of_a_word_and_in_the_users_own_spelling(sd1):
    with pytest.warns(UserWarning, match='has 76 tokens and only 75 fit: "BED" was cut off'):
        ids = sd1("thread " * 70 + "DTD_HONEYCOMBED")
    assert ids[0, -2] == sd1.vocab["com"]
    with pytest.warns(UserWarning, match='"\U0001f9f5 end" was cut off'):
        sd1("Caf\u00e9  " * 75 + "\U0001f9f5 end")


def test_a_prompt_that_just_fits_is_kept_whole_without_a_word(sd1):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (sd1("thread " * 75)[0] == END).sum() == 1


def test_any_prompt_gives_as_many_ids_as_the_length_says(sd1):
    short = Tokenizer(sd1.vocab, sd1.merges, pad="!", length=5)
    assert short("a cat")[0].tolist() == [START, 320, 2368, END, 0]
    with pytest.warns(UserWarning, match='only 3 fit: "mouse cat"'):
        assert short("a cat and mouse cat")[0].tolist() == [START, 320, 2368, 537, END]


# --- words of one's own ---------------------------------------------------------------------------------------------

def test_added_words_give_the_ids_that_transformers_and_diffusers_give(fresh):
    for word, n in GOLDEN["words"]:
        ids = fresh.add_word(word, n)
        assert ids == [GOLDEN["added"][name] for name in [word, *(f"{word}_{i}" for i in range(1, n))]]
        assert fresh.words[word] == ids
    assert len(fresh) == 49408 + len(GOLDEN["added"])
    for case in GOLDEN["with_words"]:
        for prompt in (case["prompt"], case["converted"]):  # as a user types it, and as diffusers rewrites it
            assert torch.equal(quietly(fresh, prompt), row(case["ids"], END)[None]), prompt


def test_a_word_stands_for_all_its_vectors_wherever_it_is(fresh):
    a, b, c = fresh.add_word("<knit3>", 3)
    assert (b, c) == (a + 1, a + 2)
    assert fresh.split("<knit3>") == ["<knit3>", "<knit3>_1", "<knit3>_2"]
    assert fresh("<knit3>, <KNIT3><knit3>")[0, :12].tolist() == [START, a, b, c, 267, a, b, c, a, b, c, END]
    assert fresh("<knit3>_1")[0, :3].tolist() == [START, b, END]
    with pytest.warns(UserWarning, match='has 77 tokens and only 75 fit: "<knit3>" was cut off'):
        assert fresh("thread " * 74 + "<knit3>")[0, -2:].tolist() == [a, END]


@pytest.mark.parametrize("word", ["1a1", "sinuous", "<x>", "caf\u00e91", "my word", "w@rp"])
def test_a_word_with_or_without_brackets_is_never_split(word, fresh):
    before = fresh("a photo of stone")
    assert len(fresh.split(word)) > 1
    ids = fresh.add_word(word, 2)
    assert fresh(f"a photo of {word}")[0, 4:7].tolist() == [*ids, END]
    assert fresh(f"{word} {word.upper()}")[0, 1:6].tolist() == [*ids, *ids, END]
    assert torch.equal(fresh("a photo of stone"), before)


@pytest.mark.parametrize("word", ["cat", "Cat", "sks", "ing", "!", "cat</w>", "<|endoftext|>", "<made>", "<MADE>",
                                  "<pair>", "<pair>_1", "<PAIR>"])
def test_a_word_that_is_known_already_is_refused(word, fresh):
    fresh.add_word("<made>")
    fresh.add_word("<pair>", 2)
    with pytest.raises(UserError, match=f'"{re.escape(word)}" is a word already: choose another, such as "<'):
        fresh.add_word(word)
    assert len(fresh) == 49411 and set(fresh.words) == {"<made>", "<pair>"}


def test_names_of_further_vectors_cannot_collide(fresh):
    fresh.add_word("<a>", 2)
    with pytest.raises(UserError, match='"<a>_2" cannot be a word: it would be one more vector of "<a>"'):
        fresh.add_word("<a>_2")
    fresh.add_word("<b>_1")
    for n in (1, 2):  # "<b>" alone would seem to have a second vector
        with pytest.raises(UserError, match='"<b>_1" is a word already'):
            fresh.add_word("<b>", n)


@pytest.mark.parametrize("word, n, said", [
    ("", 1, "cannot be a word of a prompt"), (" x", 1, "without spaces around it"), (7, 1, "7 cannot be a word"),
    ("<x>", 0, "needs at least one token, not 0"), ("<x>", 1.5, "not 1.5"),
    ("x<|endoftext|>", 1, "is a token by itself")])
def test_what_cannot_be_a_word_is_refused(word, n, said, fresh):
    with pytest.raises(UserError, match=said.replace("|", r"\|")):
        fresh.add_word(word, n)
    assert len(fresh) == 49408 and not fresh.words


def test_a_word_with_the_padding_sign_of_sd2_inside_is_refused(sd2):
    with pytest.raises(UserError, match='"wow!" cannot be a word: "!" in it is a token by itself'):
        sd2.add_word("wow!")


# --- folders --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_a_saved_tokenizer_with_words_comes_back_the_same(pad, tmp_path):
    tokenizer = Tokenizer.shipped(pad)
    for word, n in GOLDEN["words"]:
        tokenizer.add_word(word, n)
    tokenizer.save(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    again = Tokenizer.from_folder(tmp_path / "saved")
    assert (again.vocab, again.merges, again.words, again.pad, again.length) == (
        tokenizer.vocab, tokenizer.merges, tokenizer.words, pad, 77)
    for case in GOLDEN["prompts"] + GOLDEN["with_words"]:
        assert torch.equal(quietly(again, case["prompt"]), quietly(tokenizer, case["prompt"])), case["prompt"]
    assert again.add_word("<next>") == [len(tokenizer)]


def test_saving_over_an_older_tokenizer_leaves_nothing_of_it(tmp_path, sd1, sd2):
    with_words = Tokenizer.shipped("!")
    with_words.add_word("<old>")
    with_words.save(tmp_path)
    with_words._library.save(str(tmp_path / "tokenizer.json"))
    sd1.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
    again = Tokenizer.from_folder(tmp_path)
    assert (again.pad, again.words, len(again)) == ("<|endoftext|>", {}, 49408)


def test_a_save_that_fails_leaves_the_older_tokenizer_whole(tmp_path, sd1, fresh):
    sd1.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fresh.merges = [("\ud800", "cannot be written")]
    with pytest.raises(UnicodeError):
        fresh.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


PAD_SPELLINGS = {
    "a string in the config": ({"pad_token": "!"}, None),
    "a dictionary in the config": ({"pad_token": {"__type": "AddedToken", "content": "!"}}, None),
    "a string in the map": ({}, {"pad_token": "!"}),
    "a dictionary in the map": ({}, {"pad_token": {"content": "!", "lstrip": False, "normalized": False}}),
    "the map against the config": ({"pad_token": "<|endoftext|>"}, {"pad_token": "!"}),
    "null in the map's favour": ({"pad_token": None}, {"pad_token": "!"}),
    "the config with its decoder against the map": (
        {"pad_token": "!", "added_tokens_decoder": {"0": {"content": "!", "normalized": False, "special": True}}},
        {"pad_token": "<|endoftext|>"}),
}


@pytest.mark.parametrize("spelling", PAD_SPELLINGS)
def test_the_pad_token_is_read_in_all_its_spellings(spelling, tmp_path):
    config, roles = PAD_SPELLINGS[spelling]
    folder = files_of(tmp_path / "tokenizer")
    write(folder, "tokenizer_config.json", {**ROLES, **config, "model_max_length": 40})
    if roles is not None:
        write(folder, "special_tokens_map.json", roles)
    ids = Tokenizer.from_folder(folder)("stop!!")
    assert ids[0].tolist() == [START, 1691, 0, 0, END] + [0] * 35


def test_a_folder_that_names_no_pad_token_pads_with_the_end_token_to_77(tmp_path):
    folder = files_of(tmp_path / "tokenizer")
    assert Tokenizer.from_folder(folder)("!")[0].tolist() == [START, 256] + [END] * 75
    write(folder, "tokenizer_config.json", {"model_max_length": 10**30})  # how transformers writes "not known"
    assert Tokenizer.from_folder(folder)("!").shape == (1, 77)


ADDED = {"<x>": 49408, "<x>_1": 49409, "<x>_2": 49410, "1a1": 49411, "lone_1": 49412}


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_words_of_a_folder_that_transformers_saved_are_known(file, tmp_path):
    folder = files_of(tmp_path / "tokenizer")
    if file == "added_tokens.json":
        write(folder, file, ADDED)
    else:
        specials = {END: {"content": "<|endoftext|>", "normalized": True, "special": True}}
        words = {i: {"content": word, "normalized": True, "special": False} for word, i in ADDED.items()}
        write(folder, file, {**ROLES, "pad_token": "<|endoftext|>", "added_tokens_decoder": {**specials, **words}})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.words == {"<x>": [49408, 49409, 49410], "1a1": [49411], "lone_1": [49412]}
    assert tokenizer("<x> 1a1 lone_1")[0, :8].tolist() == [START, 49408, 49409, 49410, 49411, 49412, END, END]


@pytest.mark.slow
@pytest.mark.parametrize("pairs", ["as lists", "as text"])
def test_a_folder_with_nothing_but_tokenizer_json_is_read(pairs, tmp_path, sd2):
    tokenizer = Tokenizer.shipped("!")
    tokenizer.add_word("<x>", 2)
    whole = json.loads(tokenizer._library.to_str())
    if pairs == "as text":
        whole["model"]["merges"] = [" ".join(pair) for pair in whole["model"]["merges"]]
    write(tmp_path, "tokenizer.json", whole)
    again = Tokenizer.from_folder(tmp_path)
    assert (again.words, again.vocab, again.merges) == ({"<x>": [49408, 49409]}, sd2.vocab, sd2.merges)
    assert again.pad == "<|endoftext|>"  # the file does not say
    write(tmp_path, "tokenizer_config.json", {"pad_token": "!", "tokenizer_class": "CLIPTokenizer"})
    assert torch.equal(Tokenizer.from_folder(tmp_path)("<x> wow!"), tokenizer("<x> wow!"))


def test_a_small_vocabulary_with_its_own_unknown_token_works(tmp_path):
    tokens = ["l", "o", "r", "lo", "l</w>", "w</w>", "r</w>", "low</w>", "<unk>", "<|startoftext|>", "<|endoftext|>"]
    write(tmp_path, "vocab.json", {token: i for i, token in enumerate(tokens)})
    (tmp_path / "merges.txt").write_text("#version: 0.2\nl o\nlo w</w>\n", encoding="utf-8")
    write(tmp_path, "tokenizer_config.json", {"unk_token": "<unk>", "model_max_length": 8})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer("LOW lor q")[0].tolist() == [9, 7, 3, 6, 8, 10, 10, 10]
    tokenizer.save(tmp_path / "again")
    assert torch.equal(Tokenizer.from_folder(tmp_path / "again")("LOW lor q"), tokenizer("LOW lor q"))


# --- bad input ------------------------------------------------------------------------------------------------------

BAD_FOLDERS = {
    "no file at all": ({"vocab.json": None}, r"vocab\.json cannot be read"),
    "no merges": ({"merges.txt": None}, r"merges\.txt cannot be read: expected the merges beside vocab\.json"),
    "a broken vocabulary": ({"vocab.json": '{"a": 1'}, r"vocab\.json is not valid JSON"),
    "an id that occurs twice": ({"vocab.json": '{"<|startoftext|>": 1, "<|endoftext|>": 1}'}, "numbers 0 to 1, each"),
    "a list as vocabulary": ({"vocab.json": "[1, 2]"}, "must hold a JSON object, not a list"),
    "another vocabulary": ({"vocab.json": '{"a": 0, "<|startoftxt|>": 1}'}, r"no token \"<\|startoftext\|>\", nearest"),
    "a merge of three": ({"merges.txt": "i n\nt h e\n"}, "merge 2 has 3 parts, expected two"),
    "merges that do not fit": ({"merges.txt": "i n\nq\u00e4 \u00e4q\n"}, "the merges do not fit the vocabulary"),
    "an unknown pad token": ({"tokenizer_config.json": '{"pad_token": "<|endoftxt|>"}'},
                             r'no token "<\|endoftxt\|>", nearest: <\|endoftext\|>'),
    "another start token": ({"tokenizer_config.json": '{"bos_token": "!"}'}, r'begin with "!".*expected "<\|startof'),
    "another tokenizer": ({"tokenizer_config.json": '{"tokenizer_class": "T5Tokenizer"}'}, 'holds a "T5Tokenizer"'),
    "a hole in the ids": ({"added_tokens.json": '{"<x>": 49409}'}, 'added token "<x>" has id 49409, expected 49408'),
    "an id of another": ({"added_tokens.json": '{"!": 5}'}, 'added token "!" has id 5, expected 0'),
    "added tokens of no kind": ({"tokenizer_config.json": '{"added_tokens_decoder": [3]}'}, "no tokenizer that we"),
    "no length": ({"tokenizer_config.json": '{"model_max_length": 1}'}, "prompts of 1 ids are not possible"),
    "a tokenizer.json of words": ({"tokenizer.json": '{"model": {"type": "WordPiece", "vocab": {}}}'},
                                  "tokenizer.json is of another kind"),
    "a tokenizer.json of nothing": ({"tokenizer.json": '{"version": "1.0"}'}, "no tokenizer that we know"),
}


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_a_damaged_folder_is_named_in_one_sentence(what, tmp_path):
    changes, said = BAD_FOLDERS[what]
    folder = files_of(tmp_path / "tokenizer")
    for name, text in changes.items():
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said) as error:
        Tokenizer.from_folder(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_damaged_merges_of_openai_are_refused(tmp_path):
    path = tmp_path / "merges.gz"
    whole = SHIPPED.read_bytes()
    for content, said in ((whole[:20000], "merges.gz cannot be read"), (whole[:5000] + bytes(20000), "cannot be read"),
                          (b"i n", "cannot be read"), (gzip.compress(b"header\ni n\nt h\n"), "holds 2 merges,")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            Tokenizer.shipped(path=path)
    with pytest.raises(UserError, match="nowhere.gz cannot be read"):
        Tokenizer.shipped(path=tmp_path / "nowhere.gz")


@pytest.mark.parametrize("prompt, said", [(None, "text, not of type NoneType"), ([["a"]], "text, not of type list"),
                                          (["a", 3], "text, not of type int"), ("\ud800", "is not valid Unicode")])
def test_what_is_no_text_is_refused(prompt, said, sd1):
    with pytest.raises(UserError, match=said):
        sd1(prompt)


# --- the rest -------------------------------------------------------------------------------------------------------

def test_building_is_fast():
    times = []
    for _ in range(3):
        start = time.process_time()
        Tokenizer.shipped()
        times.append(time.process_time() - start)
    assert min(times) < 0.3


@pytest.mark.slow
def test_the_library_is_imported_only_when_a_tokenizer_is_built():
    code = "import sys, nanodiff, nanodiff.models.clip_text; assert 'tokenizers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
