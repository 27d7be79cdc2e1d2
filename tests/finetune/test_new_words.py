"""A new word: its rows alone are trained, all of them are met, and what starts them is checked."""

import pytest
import torch

import nanodiff
import tiny_sd
from nanodiff.errors import UserError
from nanodiff.finetune import new_words
from nanodiff.formats.embedding_file import write_embeddings
from nanodiff.models.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd") / "sd1"
    tiny_sd.write_model("sd1", path)
    return path


@pytest.fixture
def sd(folder):
    found = nanodiff.load(folder)
    for net in (found.text_model, found.unet, found.autoencoder):
        net.requires_grad_(False)
    return found


@pytest.mark.parametrize("word", ["<x>", "1a1"])
def test_the_ids_of_a_prompt_hold_exactly_the_words_vectors(sd, word):
    first = len(sd.tokenizer)
    new_words.add_words(sd, [word], 3)
    ids = sd.tokenizer(f"a photo of {word}")[0].tolist()
    assert [i for i in ids if i >= first] == [first, first + 1, first + 2]


def test_the_states_are_those_of_a_table_that_was_grown_by_the_same_rows(sd, folder):
    rows = new_words.add_words(sd, ["<x>"], 2, generator=torch.Generator().manual_seed(0))
    grown = nanodiff.load(folder)
    grown.tokenizer.add_word("<x>", 2)
    grown.text_model.add_rows(rows.vectors.detach())
    prompts = ["a photo of <x>", "a cat"]
    assert torch.equal(sd.encode_text(prompts), grown.encode_text(prompts))


def test_words_that_are_learned_together_are_written_into_one_file_and_read_again(sd, folder, tmp_path):
    words = ["sf_dry", "sf_warp"]
    rows = new_words.add_words(sd, words, generator=torch.Generator().manual_seed(0))
    assert rows.vectors.shape[0] == 2 and not torch.equal(rows.vectors[0], rows.vectors[1])
    prompts = ["sf_dry sf_warp", "a photo of sf_warp", "a cat"]
    states = sd.encode_text(prompts)
    write_embeddings(tmp_path / "words.safetensors", dict(zip(words, new_words.make_permanent(sd))))
    again = nanodiff.load(folder)
    assert list(again.load_embedding(str(tmp_path / "words.safetensors"))) == words
    assert torch.equal(again.encode_text(prompts), states)
    assert torch.equal(states[2], nanodiff.load(folder).encode_text(["a cat"])[0])


def test_after_a_hundred_steps_every_vector_has_moved_and_every_other_row_is_bit_identical(sd):
    before = sd.text_model.embeddings.token_embedding.weight.detach().clone()
    others = {name: p.detach().clone() for name, p in sd.text_model.named_parameters()}
    rows = new_words.add_words(sd, ["<x>"], 3)
    start = rows.vectors.detach().clone()
    optimiser = torch.optim.AdamW([p for p in sd.text_model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    assert sum(len(group["params"]) for group in optimiser.param_groups) == 1
    ids = sd.tokenizer(["a photo of <x>", "<x>"])
    for _ in range(100):
        optimiser.zero_grad()
        sd.text_model(ids)[0].square().sum().backward()
        assert bool((rows.vectors.grad.abs().sum(1) > 0).all())
        optimiser.step()
    assert bool(((rows.vectors - start).abs().sum(1) > 0).all())
    new_words.make_permanent(sd)
    after = sd.text_model.embeddings.token_embedding.weight
    assert torch.equal(after[:-3], before) and torch.equal(after[-3:], rows.vectors)
    assert all(torch.equal(p, others[name]) for name, p in sd.text_model.named_parameters()
               if "token_embed" not in name)


def test_a_permanent_word_is_drawn_as_it_was_while_it_was_trained(sd):
    new_words.add_words(sd, ["<x>"], 2)
    x = sd.generate("<x> texture", steps=1, seed=0, output="latents")
    new_words.make_permanent(sd)
    assert type(sd.text_model.embeddings.token_embedding) is torch.nn.Embedding
    assert torch.equal(sd.generate("<x> texture", steps=1, seed=0, output="latents"), x)


def test_the_vectors_start_from_the_initializers_rows(sd):
    table = sd.text_model.embeddings.token_embedding.weight
    texture, cat = (table[sd.tokenizer(word)[0, 1]] for word in ("texture", "cat"))
    one = new_words.initial_vectors(table, sd.tokenizer, 2, "texture")
    assert torch.equal(one[0], texture) and torch.equal(one[1], texture)
    two = new_words.initial_vectors(table, sd.tokenizer, 2, "texture cat")
    assert torch.equal(two[0], texture) and torch.equal(two[1], cat)
    drawn = new_words.initial_vectors(table, sd.tokenizer, 2000, "", torch.Generator().manual_seed(0))
    assert torch.allclose(drawn.std(0), table.std(0), rtol=0.15) and len(drawn.unique(dim=0)) == 2000


def test_an_initializer_of_several_tokens_a_known_word_and_a_second_word_are_refused(sd):
    with pytest.raises(UserError, match="expected one, or one for each of the 3"):
        new_words.add_words(sd, ["<x>"], 3, "zigzagged texture".replace("zigzagged", "qwxzt"))
    with pytest.raises(UserError, match="is a word already"):
        new_words.add_words(sd, ["texture"])
    assert type(sd.text_model.embeddings.token_embedding) is torch.nn.Embedding  # nothing has changed
    new_words.add_words(sd, ["<x>"])
    with pytest.raises(UserError, match="all of them in one call"):
        new_words.add_words(sd, ["<y>"])


@pytest.mark.parametrize("kind", ["object", "style"])
def test_every_sentence_holds_the_word_once_and_no_two_are_alike(kind):
    found = new_words.sentences("<x>", kind)
    assert len(set(found)) == len(found) >= 8 and all(one.count("<x>") == 1 for one in found)


def test_rare_words_are_single_tokens_and_a_split_shows_the_pieces():
    tokenizer = Tokenizer.shipped()
    words = new_words.rare_identifiers(tokenizer, 20, seed=1)
    assert len(set(words)) == 20 and all(len(tokenizer.split(word)) == 1 for word in words)
    assert words == new_words.rare_identifiers(tokenizer, 20, seed=1) != new_words.rare_identifiers(tokenizer, 20, 2)
    assert new_words.split_as_text(tokenizer, "sks") == "sks: sks"
    assert new_words.split_as_text(tokenizer, "dtd_zigzagged").startswith("dtd_zigzagged: d | td | _ | zig")
