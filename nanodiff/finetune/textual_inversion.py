"""Textual inversion: nothing of the model is trained but the vectors of a new word.

The word's n vectors are rows behind the token table. They are learned from pictures under sentences with the word in
them ("a photo of a <x>"), by the loss that the model itself was trained with; all other rows stay bit for bit, since
they are not parameters of the training at all. Source: Gal et al. 2022 (arXiv 2208.01618), section 3; report section
4.2.2, tables 7 and 8.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.errors import UserError

OBJECT = ("a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of one {}",
          "a close-up photo of a {}", "a bright photo of the {}", "a good photo of a {}", "a picture of a {}", "a {}")
STYLE = ("a texture in the style of {}", "a picture in the style of {}", "a surface in the style of {}",
         "a material in the style of {}", "a pattern in the style of {}", "a photo in the style of {}",
         "a close-up in the style of {}", "{}")
TEMPLATES = {"object": OBJECT, "style": STYLE}


class WordRows(nn.Module):
    """A frozen token table with the rows of new words behind it: ids [B, N] -> [B, N, D]. Takes the table's place.

    vectors [n, D] is the only parameter that is trained; ids from len(table) on mean its rows.
    """

    def __init__(self, table, vectors):
        super().__init__()
        self.table = table
        self.vectors = nn.Parameter(vectors.detach().clone())
        self.num_embeddings = table.num_embeddings + len(vectors)

    @property
    def weight(self):
        """The frozen rows, for those who ask for dtype and device."""
        return self.table.weight

    def forward(self, ids):
        first = len(self.table.weight)
        new = ids >= first
        old = F.embedding(ids.where(~new, torch.zeros_like(ids)), self.table.weight)
        own = F.embedding((ids - first).clamp(min=0), self.vectors)
        return torch.where(new[..., None], own.to(old.dtype), old)


def add_word(sd, word, n=1, initialiser="", generator=None):
    """`add_words` with one word."""
    return add_words(sd, [word], n, initialiser, generator)


def add_words(sd, words, n=1, initialiser="", generator=None):
    """Add words of n vectors each to a StableDiffusion, ready to be trained; returns their WordRows [len(words) * n, D].

    initialiser  a word that the tokenizer takes whole, whose vector all start from, or n of them with spaces between;
                 "": vectors drawn with the spread of the table's rows
    UserError for a word that is known already, and for an initialiser of another number of tokens.
    """
    table = sd.text_model.embeddings.token_embedding
    if isinstance(table, WordRows):
        raise UserError("a word is being taught already; expected one at a time, or all of them together")
    vectors = [initial_vectors(table.weight, sd.tokenizer, n, initialiser, generator) for _ in words]
    for word in words:
        sd.tokenizer.add_word(word, n)
    sd.text_model.embeddings.token_embedding = WordRows(table, torch.cat(vectors))
    return sd.text_model.embeddings.token_embedding


def initial_vectors(table, tokenizer, n, initialiser, generator=None):
    """[n, D]: what a word's vectors start from, given the token table [V, D]; see add_word."""
    table = table.detach()
    if not initialiser:
        return table.mean(0) + table.std(0) * torch.randn(n, table.shape[1], generator=generator)
    tokens = tokenizer.split(initialiser)
    if len(tokens) not in (1, n):
        raise UserError(f'--initialiser "{initialiser}" is {len(tokens)} tokens ({" | ".join(tokens)}); expected one, or '
                        f"one for each of the {n} vectors")
    return table[[tokenizer.vocab[token] for token in tokens]].float().expand(n, -1).clone()


def keep_word(sd):
    """The new rows become rows of the table itself: the model is an ordinary one again. Returns vectors [n, D], of all
    the words in their order."""
    rows = sd.text_model.embeddings.token_embedding
    sd.text_model.embeddings.token_embedding = rows.table
    sd.text_model.add_rows(rows.vectors.detach())
    return rows.vectors.detach().clone()


def named(text):
    """The words that a flag names, with commas between."""
    return [word.strip() for word in text.split(",") if word.strip()]


def sentences(word, kind="style"):
    """The TEMPLATES of a kind with the word in them."""
    return [template.format(word) for template in TEMPLATES[kind]]
