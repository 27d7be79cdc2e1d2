"""Reading and writing textual-inversion files: a new word and its rows of the token table.

    layout       file                                      holds                                      the word is
    diffusers    learned_embeds.safetensors (or .bin)      {word: [D] or [n, D]}, one or more words   the key
    a1111        NAME.pt                                   {"string_to_param": {"*": [n, D]}, ...}    under "name"
    emb_params   NAME.safetensors                          {"emb_params": [n, D]}                     in the metadata

D is the text encoder's width (768 in SD 1.x, 1024 in SD 2.x); a word has n >= 1 vectors, each a token of the prompt.
A file that does not name its word gets the word <NAME>. Nothing in a file is executed.
Source: Gal et al. 2022 (arXiv 2208.01618), section 3.
"""

import os

import torch

from nanodiff.errors import UserError, nearest
from nanodiff.formats.weights import PICKLES, read_metadata, read_pickle, read_safetensors, write_weights

LAYOUTS = {"diffusers": ".safetensors", "a1111": ".pt", "emb_params": ".safetensors"}


class ParameterDict:
    """A stand-in for torch's class of that name, which holds the vectors of early textual inversions."""

    def __setstate__(self, state):
        self.vectors = state.get("_parameters") if isinstance(state, dict) else None


def read_embeddings(path, word=None):
    """{word: vectors float32 [n, D]} of a textual-inversion file in any of the layouts above.

    word: the word to use instead of the file's. UserError when the file is missing, broken, of another kind or needs to
    run code; when vectors are not [D] or [n, D], differ in width or are not finite; when `word` is given but the file
    holds several words.
    """
    path = os.fspath(path)
    stem, ending = os.path.splitext(os.path.basename(path))
    if ending == ".safetensors":
        content, name = read_safetensors(path), read_metadata(path).get("word")
    elif ending in PICKLES:
        with torch.serialization.safe_globals([(ParameterDict, "torch.nn.modules.container.ParameterDict")]):
            content, name = read_pickle(path), None
    else:
        raise UserError(f'{path}: a textual inversion is a .safetensors, .pt or .bin file, not "{ending}"')

    if isinstance(content, dict) and "string_to_param" in content:
        content, name = content["string_to_param"], content.get("name")
        content = getattr(content, "vectors", content)
    elif torch.is_tensor(content):  # vectors without a word
        content = {"emb_params": content}
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} is not a textual inversion: expected words with their vectors")
    if "clip_g" in content:
        raise UserError(f"{path} is a textual inversion for SDXL or SD 3, expected one for SD 1.x or 2.x")
    if len(content) == 1 and (name or content.keys() <= {"*", "emb_params"}):  # the file does not name its word
        content = {name or f"<{stem.strip('<>')}>": next(iter(content.values()))}
    words = {key: check_vectors(path, key, vectors) for key, vectors in content.items()}
    widths = {vectors.shape[1] for vectors in words.values()}
    if len(widths) > 1:
        raise UserError(f"{path} is not a textual inversion: its vectors are of several widths, {sorted(widths)}")
    if word is None:
        return words
    if len(words) > 1:
        raise UserError(f'{path} holds {len(words)} words ({", ".join(words)}), expected one to call "{word}"')
    return {word: next(iter(words.values()))}


def read_embedding(path, word=None):
    """(word, vectors float32 [n, D]) of a textual-inversion file with one word; UserError as in read_embeddings."""
    words = read_embeddings(path, word)
    if len(words) > 1:
        raise UserError(f"{path} holds {len(words)} words ({', '.join(words)}), expected one")
    return next(iter(words.items()))


def check_vectors(path, word, vectors):
    """A float32 copy [n, D] of a word's vectors; UserError when they are no vectors or the word is no word."""
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
    for vectors that read_embeddings refuses.
    """
    path = os.path.abspath(path)
    if layout not in LAYOUTS:
        raise UserError(f'layout "{layout}" is unknown: expected one of {", ".join(LAYOUTS)}{nearest(layout, LAYOUTS)}')
    if not path.endswith(LAYOUTS[layout]):
        raise UserError(f"{path}: a textual inversion in the {layout} layout is a {LAYOUTS[layout]} file")
    if layout == "diffusers":
        return write_embeddings(path, {word: vectors})
    vectors = check_vectors(path, word, vectors).cpu()
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
    """Write {word: vectors [D] or [n, D]} in the diffusers layout, whole or not at all, as write_embedding does."""
    vectors_of = {word: check_vectors(path, word, vectors).cpu() for word, vectors in words.items()}
    write_weights(path, {word: vectors if len(vectors) > 1 else vectors[0] for word, vectors in vectors_of.items()})
