"""New words (textual inversion): vectors appended to a frozen token table, and rare words that have one already.

A new word's n vectors are learned from pictures captioned with it ("a photo of a <x>"), by the loss that the model was
trained with. All other rows stay bit for bit, since they are no Parameters of the training.
Source: Gal et al. 2022 (arXiv 2208.01618), section 3; report section 4.2.2, tables 7 and 8. Rare words: Ruiz et al.
2022 (arXiv 2208.12242), section 3.1.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.errors import UserError

OBJECT = ("a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}",
          "a photo of one {}", "a close-up photo of a {}", "a bright photo of the {}", "a good photo of a {}",
          "a picture of a {}", "a {}")
STYLE = ("a texture in the style of {}", "a picture in the style of {}", "a surface in the style of {}",
         "a material in the style of {}", "a pattern in the style of {}", "a photo in the style of {}",
         "a close-up in the style of {}", "{}")
TEMPLATES = {"object": OBJECT, "style": STYLE}


class WordRows(nn.Module):
    """A frozen token table with the rows of new words appended: ids [B, N] -> [B, N, D]. Takes the table's place.

    vectors [n, D] is the only Parameter that is trained; ids from len(table) on mean its rows.
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
        is_new = ids >= first
        old = F.embedding(ids.where(~is_new, torch.zeros_like(ids)), self.table.weight)
        new = F.embedding((ids - first).clamp(min=0), self.vectors)
        return torch.where(is_new[..., None], new.to(old.dtype), old)


def add_words(sd, words, n=1, initializer="", generator=None):
    """Adds words of n vectors each to a StableDiffusion; returns their trainable WordRows [len(words) * n, D].

    initializer  a word of one token, whose vector all start from, or n of them with spaces between;
                 "": vectors drawn with the mean and the spread of the table's rows
    UserError for a word that the tokenizer has already, and for an initializer of another number of tokens.
    """
    table = sd.text_model.embeddings.token_embedding
    if isinstance(table, WordRows):
        raise UserError("other new words are being trained; expected all of them in one call")
    vectors = [initial_vectors(table.weight, sd.tokenizer, n, initializer, generator) for _ in words]
    for word in words:
        sd.tokenizer.add_word(word, n)
    sd.text_model.embeddings.token_embedding = WordRows(table, torch.cat(vectors))
    return sd.text_model.embeddings.token_embedding


def initial_vectors(table, tokenizer, n, initializer, generator=None):
    """[n, D]: what a word's vectors start from, given the token table [V, D]; see add_words."""
    table = table.detach()
    if not initializer:
        return table.mean(0) + table.std(0) * torch.randn(n, table.shape[1], generator=generator)
    tokens = tokenizer.split(initializer)
    if len(tokens) not in (1, n):
        raise UserError(f'--initializer_token "{initializer}" is {len(tokens)} tokens ({" | ".join(tokens)}); expected '
                        f"one, or one for each of the {n} vectors")
    return table[[tokenizer.vocab[token] for token in tokens]].float().expand(n, -1).clone()


def make_permanent(sd):
    """The vectors [len(words) * n, D] of the new rows, which become rows of the table: an ordinary model again."""
    rows = sd.text_model.embeddings.token_embedding
    sd.text_model.embeddings.token_embedding = rows.table
    sd.text_model.add_rows(rows.vectors.detach())
    return rows.vectors.detach().clone()


def sentences(word, learnable_property="style"):
    """The TEMPLATES of a property, "object" or "style", with the word in them."""
    return [template.format(word) for template in TEMPLATES[learnable_property]]


def rare_identifiers(tokenizer, n=20, seed=0, length=(3, 4)):
    """n rare words of a single token each, in an order drawn by seed.

    The paper looks up rare tokens: those that end a word, of three or four letters, among the last merges of the
    vocabulary, which were the rarest when it was made (Ruiz et al. 2022, section 3.1).
    """
    vocab = tokenizer.vocab
    words = [token.removesuffix("</w>") for token, i in vocab.items()
             if token.endswith("</w>") and i >= len(vocab) // 2]
    words = [word for word in words if word.isascii() and word.isalpha() and length[0] <= len(word) <= length[1]]
    if len(words) < n:
        raise UserError(f"the vocabulary holds {len(words)} rare words of {length[0]} to {length[1]} letters; expected "
                        f"{n}")
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed))
    return [words[i] for i in order[:n].tolist()]


def split_as_text(tokenizer, word):
    """A word and its tokens as text: 'dtd_zigzagged: d | td | _ | zig | zag | ged'."""
    return f"{word}: " + " | ".join(token.removesuffix("</w>") for token in tokenizer.split(word))
