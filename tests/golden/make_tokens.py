"""What transformers' CLIPTokenizer and diffusers' textual inversion make of odd prompts: writes tokens.json.

    pip install diffusers==0.42.1 transformers==5.23.0 torch && python tests/golden/make_tokens.py

The tokenizer's files are written by tests/tiny_sd.py. Ids stand without start, end and padding, and untruncated; that
the padded and truncated row follows from them is asserted here.
"""

import json
import os
import pathlib
import sys
import tempfile

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")

import diffusers  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402
from diffusers.loaders import TextualInversionLoaderMixin  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import tiny_sd  # noqa: E402

START, END, LENGTH = 49406, 49407, 77
THREADS = "a very long prompt that goes on and on about woven fabric with many threads,"

PROMPTS = [
    # plain words, and those of the textures
    "", " ", "a", "a photo of a cat", "A Photo OF a CAT", "  spaces   and\ttabs\nand newlines  ",
    "a photograph of an astronaut riding a horse", "dtd_honeycombed", "dtd_braided", "dtd_spiralled", "dtd_zigzagged",
    "a photo of dtd_honeycombed texture", "a photo of dtd_braided texture", "a photo of dtd_spiralled texture",
    "sf_dry sf_compacted sf_thickness", "sks", "w17h3r", "1nj3C7", "w@rp", "a photo of sks dog", "a sinuous pattern",
    "snake_case_word camelCaseWord kebab-case-word",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "masterpiece, best quality, (highly detailed:1.2), [sketch], 8k uhd, dslr, soft lighting, film grain, Fujifilm XT3",
    # apostrophes and signs
    "don't can't it's we're I'll they've he'd I'm", "DON'T CAN'T IT'S", "'S 's's '' 'tis rock'n'roll o'clock",
    "hello!!!", "!", "!!! ... ???", "! !! !!!", "wow! so !cool!nice", "a,b;c:d.e(f)[g]{h}<i>/j\\k|l",
    "‘curly’ “quotes” — dash…", "a_b__c ___ _", "@#$%^&*()-+=~`",
    # digits
    "1234567890", "3.14159 + 2,000 = 50%", "x² + y³ = ½ Ⅷ ٤٢", "4k 8K 1080p f/2.8 35mm",
    # accents, composed or not, and what changes when it becomes lower case
    "caf\u00e9 na\u00efve", "cafe\u0301 nai\u0308ve", "İstanbul ẞ straße ǅ", "ODYSSEUS ΟΔΥΣΣΕΥΣ", "Żółć ñ Øre Þing",
    "\ufb01ligree \u212b \u00c5 A\u030a q\u0323\u0307 q\u0307\u0323",
    # other scripts and pictures
    "你好世界", "こんにちは привет مرحبا", "नमस्ते สวัสดี", "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab",
    "\U0001f600 \U0001f408\u200d\u2b1b \u2764\ufe0f", "\U0001f1e9\U0001f1ea flag",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd", "\U0001d4ea\U0001d4eb\U0001d4ec \U00020000",
    "full\u3000width \uff21\uff22\uff23 \u00a0nbsp",
    # control characters and those without width
    "zero\u200bwidth\u00adsoft", "a\x00b\x01c\x7fd", "\ufeffbom \u2028line\u2029par\x85next\x0bvt\x1cfs",
    "\ufffd \ue000", "\r\n",
    # markup, and the special tokens as a user types them
    "&amp; &lt;b&gt; caf&eacute;", "<b>bold</b> <img src='x.png'/>", "<|startoftext|> hi <|endoftext|>",
    "<|endoftext|>", "a<|endoftext|>b <|ENDOFTEXT|> <|StartOfText|>", "<|endoftext|", "<| endoftext |>",
    "cat</w> </w>",
    # about as many as fit, and more
    " ".join(["word"] * 74), " ".join(["word"] * 75), " ".join(["word"] * 76), " ".join([THREADS] * 8),
    "thread " * 200, "\U0001f9f5" * 40, "z" * 400,
]

WORDS = [("<woven>", 1), ("sinuous", 2), ("<knit3>", 3), ("1a1", 1), ("<Twéed>", 1)]
WITH_WORDS = [
    "a photo of <woven> texture", "a photo of <woven>, 4k", "a sinuous pattern", "<knit3> and <woven> and sinuous",
    "<knit3>", "a photo of plain texture", "<woven>", "word " * 70 + "<knit3>", "word " * 73 + "<knit3> cut",
    "1a1", "a photo of 1a1 and 1a2", "1a1b x1a1 1 a 1", "sinuously", "unsinuous", "sinuousness, sinu ous",
    "<woven><woven>", "a<woven>b <woven>c", "<woven >", "< woven>", "<<woven>>", "woven knit3", "<WOVEN> 1A1",
    "!<woven>! sinuous!", "<knit3>!", "<knit3>'s", "<knit3>_9", "the <woven>\n<knit3>", "<|endoftext|><woven>",
    "café<woven>\U0001f600", "<twe\u0301ed>", "a <Twéed> cloth",
]


def of_one(prompt, tokenizer, pad):
    """(ids, tokens) of a prompt without start, end and padding, untruncated."""
    ids = tokenizer(prompt).input_ids
    assert (ids[0], ids[-1]) == (START, END)
    row = [START, *ids[1:-1][:LENGTH - 2], END]
    padded = tokenizer(prompt, padding="max_length", max_length=LENGTH, truncation=True).input_ids
    assert padded == row + [pad] * (LENGTH - len(row)), prompt
    return ids[1:-1], tokenizer.convert_ids_to_tokens(ids[1:-1])


def main():
    cases, added = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("sd1", "sd2"):
            tiny_sd.write_tokenizer(pathlib.Path(folder, name), tiny_sd.PAD[name])
        sd1, sd2 = (transformers.CLIPTokenizer.from_pretrained(os.path.join(folder, name)) for name in ("sd1", "sd2"))
    assert (sd1.pad_token_id, sd2.pad_token_id) == (END, 0)
    for prompt in PROMPTS:
        ids, tokens = of_one(prompt, sd1, END)
        ids2, tokens2 = of_one(prompt, sd2, 0)
        case = {"prompt": prompt, "ids": ids}
        if ids2 != ids:
            case["sd2_ids"] = ids2
        if len(ids) < 10:
            case["tokens"] = tokens
            if ids2 != ids:
                case["sd2_tokens"] = tokens2
        cases.append(case)

    names = [name for word, n in WORDS for name in [word, *(f"{word}_{i}" for i in range(1, n))]]
    assert sd1.add_tokens(names) == len(names)
    convert = TextualInversionLoaderMixin().maybe_convert_prompt
    for prompt in WITH_WORDS:
        converted = convert(prompt, sd1)
        added.append({"prompt": prompt, "converted": converted, "ids": of_one(converted, sd1, END)[0]})

    facts = {"versions": {m.__name__: m.__version__ for m in (diffusers, transformers, tokenizers)},
             "comment": "ids without start, end and padding, untruncated; sd2_ids and sd2_tokens only where the pad "
                        "token \"!\" makes them differ; with_words: the words added in this order, as load_textual_"
                        "inversion does, and the prompt rewritten by maybe_convert_prompt",
             "words": WORDS, "added": {name: sd1.convert_tokens_to_ids(name) for name in names}}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items()]
    for key, content in (("prompts", cases), ("with_words", added)):
        lines.append(f'"{key}": [\n' + ",\n".join(json.dumps(case) for case in content) + "\n]")
    (HERE / "tokens.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
