"""Textual-inversion files in and out: a new word and the rows of the token table that stand for it.

    layout       file                                      holds                                      the word is
    diffusers    learned_embeds.safetensors (or .bin)      {word: [D] or [n, D]}, one or more words   the key
    a1111        NAME.pt                                   {"string_to_param": {"*": [n, D]}, ...}    under "name"
    emb_params   NAME.safetensors                          {"emb_params": [n, D]}                     in the metadata

D is the text encoder's width (768 in SD 1.x, 1024 in SD 2.x); a word has n >= 1 vectors, each a token of the prompt.
Where a file does not say its word, the word is <NAME>. Nothing in a file is executed.
Source: Gal et al. 2022 (arXiv 2208.01618), section 3.
"""

import os

import torch

from nanodiff.errors import UserError, nearest
from nanodiff.formats.weights import PICKLES, read_metadata, read_pickle, read_safetensors, write_weights

LAYOUTS = {"diffusers": ".safetensors", "a1111": ".pt", "emb_params": ".safetensors"}


class ParameterDict:
    """Stands for torch's class of that name, in which the first textual inversions kept their vectors."""

    def __setstate__(self, state):
        self.vectors = state.get("_parameters") if isinstance(state, dict) else None


def read_embeddings(path, word=None):
    """{word: vectors float32 [n, D]} of a textual-inversion file in any of the layouts above.

    word: the word to use instead of the file's. UserError when the file is missing, broken, of another kind or would
    have to run code; when vectors are not [D] or [n, D], of several widths or not finite; and when `word` is given but
    the file holds several.
    """
    path = os.fspath(path)
    stem, ending = os.path.splitext(os.path.basename(path))
    if ending == ".safetensors":
        held, name = read_safetensors(path), read_metadata(path).get("word")
    elif ending in PICKLES:
        with torch.serialization.safe_globals([(ParameterDict, "torch.nn.modules.container.ParameterDict")]):
            held, name = read_pickle(path), None
    else:
        raise UserError(f'{path}: a textual inversion is a .safetensors, .pt or .bin file, not "{ending}"')

    if isinstance(held, dict) and "string_to_param" in held:
        held, name = held["string_to_param"], held.get("name")
        held = getattr(held, "vectors", held)
    elif torch.is_tensor(held):  # the vectors alone
        held = {"emb_params": held}
    if not isinstance(held, dict) or not held:
        raise UserError(f"{path} is not a textual inversion: expected words with their vectors")
    if "clip_g" in held:
        raise UserError(f"{path} is a textual inversion for SDXL or SD 3, expected one for SD 1.x or 2.x")
    if len(held) == 1 and (name or held.keys() <= {"*", "emb_params"}):  # no word of its own
        held = {name or f"<{stem.strip('<>')}>": next(iter(held.values()))}
    found = {key: checked(path, key, vectors) for key, vectors in held.items()}
    widths = {vectors.shape[1] for vectors in found.values()}
    if len(widths) > 1:
        raise UserError(f"{path} is not a textual inversion: its vectors are of several widths, {sorted(widths)}")
    if word is None:
        return found
    if len(found) > 1:
        raise UserError(f'{path} holds {len(found)} words ({", ".join(found)}), expected one to call "{word}"')
    return {word: next(iter(found.values()))}


def read_embedding(path, word=None):
    """(word, vectors float32 [n, D]) of a textual-inversion file with one word; UserError as in read_embeddings."""
    found = read_embeddings(path, word)
    if len(found) > 1:
        raise UserError(f"{path} holds {len(found)} words ({', '.join(found)}), expected one")
    return next(iter(found.items()))


def checked(path, word, vectors):
    """vectors as float32 [n, D] in memory of their own; UserError when they are no vectors or the word is no word."""
    if not isinstance(word, str) or not word.strip() or word.endswith((".weight", ".bias", ".alpha")):
        raise UserError(f'{path} is not a textual inversion: expected words with their vectors, found "{word}"')
    if not torch.is_tensor(vectors) or not vectors.is_floating_point():
        kind = vectors.dtype if torch.is_tensor(vectors) else type(vectors).__name__
        raise UserError(f'{path} is not a textual inversion: "{word}" is a {kind}, expected vectors')
    if vectors.ndim not in (1, 2) or not vectors.numel():
        raise UserError(f'{path}: the vectors of "{word}" have shape {list(vectors.shape)}, expected [D] or [n, D]')
    vectors = vectors.detach().to(torch.float32, copy=True)
    if not bool(vectors.isfinite().all()):
        raise UserError(f'{path}: the vectors of "{word}" are not finite')
    return vectors.reshape(-1, vectors.shape[-1])


def write_embedding(path, word, vectors, layout="diffusers"):
    """Write one word's vectors [D] or [n, D] as a textual-inversion file, whole or not at all; they become float32.

    layout: "diffusers" or "emb_params" (.safetensors), or "a1111" (.pt). UserError for another layout or ending, and
    for vectors that read_embeddings would refuse.
    """
    path = os.path.abspath(path)
    if layout not in LAYOUTS:
        raise UserError(f'layout "{layout}" is unknown: expected one of {", ".join(LAYOUTS)}{nearest(layout, LAYOUTS)}')
    if not path.endswith(LAYOUTS[layout]):
        raise UserError(f"{path}: a textual inversion in the {layout} layout is a {LAYOUTS[layout]} file")
    if layout == "diffusers":
        return write_embeddings(path, {word: vectors})
    vectors = checked(path, word, vectors).cpu()
    if layout == "emb_params":
        write_weights(path, {"emb_params": vectors}, {"word": word})
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.writing"
        try:
            with open(temporary, "wb") as file:
                torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": word}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.remove(temporary)


def write_embeddings(path, words):
    """Write {word: vectors [D] or [n, D]} as one file in the diffusers layout, whole or not at all; UserError as in
    write_embedding."""
    found = {word: checked(path, word, vectors).cpu() for word, vectors in words.items()}
    write_weights(path, {word: vectors if len(vectors) > 1 else vectors[0] for word, vectors in found.items()})
