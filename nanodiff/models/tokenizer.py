"""CLIP's tokenizer: a prompt becomes 77 token ids, the same as transformers' CLIPTokenizer gives.

Sources: Radford et al. 2021 (arXiv 2103.00020), section 2.4; Sennrich et al. 2016 (arXiv 1508.07909) for byte-pair
encoding; Gal et al. 2022 (arXiv 2208.01618) for words of one's own.
"""

import gzip
import itertools
import json
import os
import tempfile
import warnings
import zlib
from pathlib import Path

import torch

from nanodiff.errors import UserError, nearest
from nanodiff.files import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
SHIPPED = Path(__file__).resolve().parents[2] / "data" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
SHIPPED_MERGES = 48894
# What a word is, before it is broken up: OpenAI's expression.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


class Tokenizer:
    """Prompts to ids: tokenizer("a cat") is int64 [1, 77]; a list of B prompts gives [B, 77].

    vocab      {token: id}, ids 0 ... len - 1; tokens are byte-level, "</w>" ends a word
    merges     (left, right) pairs of tokens, the most frequent first
    pad        the token behind the end token: SD 1.x pads with the end token itself, SD 2.x with "!"
    length     ids a prompt, start and end token included
    unk        the token of a symbol that the vocabulary lacks (CLIP's own lacks none)
    special    tokens that are found in a prompt before anything else: names, or what an "added_tokens_decoder" holds;
               None: start, end and pad with the flags that the released folders give them
    UserError for a vocabulary or merges that do not fit together.
    """

    def __init__(self, vocab, merges, pad=END, length=77, unk=END, special=None):
        import tokenizers
        from tokenizers import normalizers, pre_tokenizers

        for token in (START, END, pad, unk):
            if token not in vocab:
                raise UserError(f'the vocabulary has no token "{token}"{nearest(token, vocab)}: expected CLIP\'s')
        if type(length) is not int or length < 2:
            raise UserError(f"prompts of {length!r} ids are not possible: expected a whole number from 2, such as 77")
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise UserError(f"the vocabulary's ids are not the numbers 0 to {len(vocab) - 1}, each once")
        try:
            model = tokenizers.models.BPE(vocab, merges, unk_token=unk, continuing_subword_prefix="",
                                          end_of_word_suffix=WORD_END)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"the merges do not fit the vocabulary: {error}") from None
        self.vocab, self.merges = vocab, merges
        self.pad, self.length, self.unk = pad, length, unk
        self.words = {}  # added words: {word: ids}
        self._library = tokenizers.Tokenizer(model)
        self._library.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()])
        self._library.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="removed", invert=True),
             pre_tokenizers.ByteLevel(add_prefix_space=False)])
        if special is None:  # normalized: also found in capitals
            flags = {START: True, END: True, pad: False}  # SD 1.x: pad is end, and the last one counts
            special = [{"content": name, "normalized": flag} for name, flag in flags.items()]
        self._special = {vocab[_name(one)] for one in special}
        self._library.add_tokens([_added_token(one, special=True) for one in special])

    # --- where tokenizers come from -------------------------------------------------------------------------------

    @classmethod
    def shipped(cls, pad=END, path=SHIPPED):
        """The tokenizer of CLIP itself, from OpenAI's gzipped merges: 49,408 tokens; pad as in the class."""
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = list(itertools.islice(file, 1 + SHIPPED_MERGES))[1:]  # the first is a header
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise UserError(f"{path} cannot be read: {error}; expected OpenAI's gzipped merges") from None
        merges = _pairs(lines, path)
        if len(merges) != SHIPPED_MERGES:
            raise UserError(f"{path} holds {len(merges)} merges, expected at least {SHIPPED_MERGES}")
        alphabet = byte_alphabet()
        tokens = alphabet + [letter + WORD_END for letter in alphabet] + [left + right for left, right in merges]
        return cls({token: i for i, token in enumerate([*tokens, START, END])}, merges, pad)

    @classmethod
    def from_folder(cls, folder):
        """The tokenizer in a folder: tokenizer.json, or else vocab.json and merges.txt; with its added words.

        As transformers reads it: a tokenizer_config.json with an "added_tokens_decoder" is the whole truth about added
        tokens and the pad token; beside one without it, special_tokens_map.json, added_tokens.json and tokenizer.json
        count. Who names no pad token pads with the end token.
        UserError for a missing or broken file, another kind of tokenizer, and added words with holes in their ids.
        """
        folder = str(folder)
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
        whole, config, roles, loose = (
            read_json(folder, name) if os.path.isfile(os.path.join(folder, name)) else {} for name in names)
        if config.get("tokenizer_class", "CLIPTokenizer") not in ("CLIPTokenizer", "CLIPTokenizerFast"):
            raise UserError(f'{folder} holds a "{config["tokenizer_class"]}", expected a CLIPTokenizer')
        try:
            vocab, merges = _read_whole(whole) if whole else _read_pair(folder)
            if "added_tokens_decoder" in config:
                added = {int(i): entry for i, entry in config["added_tokens_decoder"].items()}
                roles = config
            else:
                added = {i: name for name, i in loose.items()}
                added.update((entry["id"], entry) for entry in whole.get("added_tokens", []))
                roles = {**config, **roles}
            start, end, unk, pad = (roles.get(role) or default for role, default in (
                ("bos_token", START), ("eos_token", END), ("unk_token", END), ("pad_token", END)))
            if (_name(start), _name(end)) != (START, END):
                raise UserError(f'prompts begin with "{_name(start)}" and end with "{_name(end)}", '
                                f'expected "{START}" and "{END}"')
            special = {_name(one): one for one in (start, end, unk, pad)}
            special.update((_name(entry), entry) for entry in added.values() if _name(entry) in vocab)
            length = config.get("model_max_length") or 77
            length = 77 if length > 1e6 else length  # transformers writes 1e30 for "not known"
            tokenizer = cls(vocab, merges, _name(pad), length, _name(unk), list(special.values()))
            tokenizer._add_saved(added)
        except UserError as error:
            raise UserError(str(error) if folder in str(error) else f"{folder}: {error}") from None
        except (TypeError, KeyError, AttributeError, ValueError) as error:  # JSON of another shape
            raise UserError(f"{folder} holds no tokenizer that we know: {type(error).__name__} {error}") from None
        return tokenizer

    def _add_saved(self, added):
        """Take over a file's added tokens {id: name or dictionary}; "<x>_1" is the second vector of a word "<x>"."""
        for i, entry in sorted(added.items()):
            expected = self.vocab.get(_name(entry), len(self))
            if i != expected:
                raise UserError(f'the added token "{_name(entry)}" has id {i}, expected {expected}')
            if _name(entry) in self.vocab:
                continue
            self._library.add_tokens([_added_token(entry)])
            word, _, number = _name(entry).rpartition("_")
            if word in self.words and number == str(len(self.words[word])):
                self.words[word].append(i)
            else:
                self.words[_name(entry)] = [i]

    def save(self, folder):
        """Write the files that transformers' CLIPTokenizer.from_pretrained and `from_folder` open, into folder.

        Each file is replaced by a rename, when all are written; an older tokenizer's that would count are removed.
        """
        os.makedirs(folder, exist_ok=True)
        added = {str(i): {name: getattr(one, name) for name in ("content", "special", *FLAGS)}
                 for i, one in sorted(self._library.get_added_tokens_decoder().items())}
        roles = {"bos_token": START, "eos_token": END, "unk_token": self.unk, "pad_token": self.pad}
        whole = {role: added.get(str(self.vocab[name]), name) for role, name in roles.items()}
        config = {**roles, "added_tokens_decoder": added, "do_lower_case": True, "errors": "replace",
                  "model_max_length": self.length, "tokenizer_class": "CLIPTokenizer"}
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        texts = {"vocab.json": json.dumps(self.vocab, ensure_ascii=False), "merges.txt": "#version: 0.2\n" + merges,
                 "special_tokens_map.json": json.dumps(whole, indent=2),
                 "tokenizer_config.json": json.dumps(config, indent=2)}
        words = {one["content"]: int(i) for i, one in added.items() if int(i) >= len(self.vocab)}
        if words:
            texts["added_tokens.json"] = json.dumps(words, indent=2)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=folder) as temporary:
            for name, text in texts.items():
                with open(os.path.join(temporary, name), "w", encoding="utf-8", newline="\n") as file:
                    file.write(text)
            for name in texts:
                os.replace(os.path.join(temporary, name), os.path.join(folder, name))
        for name in {"tokenizer.json", "added_tokens.json"} - texts.keys():  # an older tokenizer's would be believed
            if os.path.exists(os.path.join(folder, name)):
                os.remove(os.path.join(folder, name))

    # --- prompts ----------------------------------------------------------------------------------------------------

    def __len__(self):
        """The number of ids: the rows that the text model's embedding table must have."""
        return self._library.get_vocab_size()

    def __call__(self, prompts):
        """int64 [B, length]: start, the prompt's ids, end, padding. What does not fit is cut off, with a warning.

        prompts: a text or a list of B texts; UserError for anything else.
        """
        prompts = prompts if isinstance(prompts, (list, tuple)) else [prompts]
        rows = torch.empty(len(prompts), self.length, dtype=torch.int64)
        for i, prompt in enumerate(prompts):
            rows[i] = torch.tensor(self._row(prompt))
        return rows

    def _row(self, prompt):
        ids, places = self._encode(prompt)
        room = self.length - 2
        if len(ids) > room:
            warnings.warn(f"the prompt has {len(ids)} tokens and only {room} fit: \"{prompt[places[room]:].strip()}\" "
                          "was cut off", stacklevel=3)
        row = [self.vocab[START], *ids[:room], self.vocab[END]]
        return row + [self.vocab[self.pad]] * (self.length - len(row))

    def split(self, prompt):
        """The tokens of a prompt as text, all of them, without start and end: ["a</w>", "cat</w>"]."""
        return [self._library.id_to_token(i) for i in self._encode(prompt)[0]]

    def _encode(self, prompt):
        """(ids, where each begins in the prompt); an added word stands for all its vectors."""
        if not isinstance(prompt, str):
            raise UserError(f"a prompt must be text, not of type {type(prompt).__name__}")
        try:
            encoded = self._library.encode(prompt, add_special_tokens=False)
        except (TypeError, UnicodeError):
            raise UserError(f"the prompt {prompt!r} is not valid Unicode") from None
        rest = {ids[0]: ids[1:] for ids in self.words.values() if len(ids) > 1}
        found, places = encoded.ids, [start for start, _ in encoded.offsets]
        ids, starts = [], []
        for k, (i, start) in enumerate(zip(found, places)):
            more = rest.get(i, [])
            if more == found[k + 1:k + 1 + len(more)]:  # the prompt spells "<x> <x>_1" out, as diffusers does
                more = []
            ids += [i, *more]
            starts += [start] * (1 + len(more))
        return ids, starts

    # --- words of one's own -----------------------------------------------------------------------------------------

    def add_word(self, word, n=1):
        """Make word stand for n new tokens; returns their ids, which follow the last one: [49408, 49409 ...].

        They are named word, word_1, word_2 ... as diffusers does, and found anywhere in a prompt, inside of other words
        too, as transformers' added tokens are. UserError for a word that is known already or cannot be found.
        Source: Gal et al. 2022, section 4 (one vector a word); several are diffusers' and A1111's extension.
        """
        if not isinstance(word, str) or not word or word != word.strip():
            raise UserError(f"{word!r} cannot be a word of a prompt: expected text without spaces around it")
        if not isinstance(n, int) or n < 1:
            raise UserError(f'"{word}" needs at least one token, not {n!r}')
        names = [word] + [f"{word}_{i}" for i in range(1, n)]
        for name in [*names, f"{word}_{n}"]:  # with the last one, the word would seem to have a vector more
            ids = self._encode(name)[0]
            if len(ids) == 1 or self._library.token_to_id(name) is not None or tuple(ids) in self._vectors():
                raise UserError(f'"{name}" is a word already: choose another, such as "<{word.strip("<>")}-1>"')
            if self._special.intersection(ids):
                inside = self._library.id_to_token(self._special.intersection(ids).pop())
                raise UserError(f'"{word}" cannot be a word: "{inside}" in it is a token by itself')
        base, _, number = word.rpartition("_")
        if base in self.words and number == str(len(self.words[base])):
            raise UserError(f'"{word}" cannot be a word: it would be one more vector of "{base}"')
        first = len(self)
        self._library.add_tokens([_added_token(name) for name in names])
        self.words[word] = list(range(first, first + n))
        return list(self.words[word])

    def _vectors(self):
        return {tuple(ids) for ids in self.words.values()}


def byte_alphabet():
    """The 256 characters that stand for bytes, in the order of their ids: printable bytes first, as themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _name(entry):
    return entry["content"] if isinstance(entry, dict) else entry


def _added_token(entry, special=False):
    """The library's token of a name, or of a dictionary with "content" and flags."""
    from tokenizers import AddedToken

    flags = {"normalized": not special}
    if isinstance(entry, dict):
        flags.update((flag, bool(entry[flag])) for flag in FLAGS if flag in entry)
        special = special or entry.get("special", False)
    return AddedToken(_name(entry), special=special, **flags)


def _pairs(lines, where):
    pairs = [tuple(line.split()) for line in lines]
    for number, pair in enumerate(pairs):
        if len(pair) != 2:
            raise UserError(f"{where}: merge {number + 1} has {len(pair)} parts, expected two")
    return pairs


def _read_pair(folder):
    """(vocab, merges) of a folder's vocab.json and merges.txt."""
    vocab, path = read_json(folder, "vocab.json"), os.path.join(folder, "merges.txt")
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().rstrip("\n").split("\n")
    except (OSError, ValueError):
        raise UserError(f"{path} cannot be read: expected the merges beside vocab.json") from None
    return vocab, _pairs(lines[lines[0].startswith("#version"):], path)


def _read_whole(settings):
    """(vocab, merges) of what a tokenizer.json holds."""
    model = settings["model"]
    if model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != WORD_END:
        raise UserError(f"tokenizer.json is of another kind: expected CLIP's byte pairs, words ending in {WORD_END}")
    merges = [pair.split() if isinstance(pair, str) else pair for pair in model["merges"]]  # older files: "left right"
    return model["vocab"], [(left, right) for left, right in merges]
