"""Turn a checkpoint or a LoRA file from one layout into another; the numbers stay what they are.

    python -m nanodiff.convert sd.safetensors FOLDER --to diffusers          Stable Diffusion, one file to a folder
    python -m nanodiff.convert FOLDER sd.safetensors --to single --dtype float16
    python -m nanodiff.convert lora.safetensors kohya.safetensors --to kohya --model FOLDER
    python -m nanodiff.convert TUNED lora.safetensors --to diffusers --extract BASE --rank 8     what was taught, as a LoRA

LoRA files can name their layers as diffusers or as kohya; --model is the Stable Diffusion that the LoRA is for
(by default the small one that comes with nanodiff).
"""

import os
from dataclasses import dataclass
from pathlib import Path

from nanodiff.errors import check, nearest
from nanodiff.files import nearest_file
from nanodiff.flags import Count, entry, parse

CHECKPOINTS, LORAS, EMBEDDINGS = ("diffusers", "single"), ("kohya", "diffusers"), ("a1111", "emb_params", "diffusers")


@dataclass
class Config:
    paths: tuple = ()  # what to convert, and what to write
    to: str = ""  # diffusers or single (Stable Diffusion); diffusers or kohya (LoRA); diffusers, a1111, emb_params (words)
    dtype: str = ""  # type of a checkpoint's numbers in the new file: float32, float16 or bfloat16 (as they are)
    config: str = ""  # a diffusers folder with the settings of a single file of unusual size
    model: str = ""  # for a LoRA: the Stable Diffusion folder or file whose layers it names (none: data/nano-sd)
    merge: str = ""  # LoRA files with their scales to be worked into the checkpoint: a.safetensors:0.8,b.safetensors
    extract: str = ""  # the checkpoint that IN was made from: OUT is the LoRA that comes nearest to the difference
    rank: Count = 8  # of that LoRA
    overwrite: bool = False  # replace what stands in the second place


@entry
def main(argv=None):
    """Converts a file or folder as the command line says."""
    config, given = parse(Config, argv, __doc__)
    check(config.extract or "rank" not in given, "--rank is that of --extract; expected both")
    check(len(config.paths) == 2, f"{len(config.paths)} paths were given; expected two, IN and OUT")
    source, target = config.paths
    known = sorted({*CHECKPOINTS, *LORAS, *EMBEDDINGS})
    check(config.to in known, f'--to is "{config.to}"; expected one of {", ".join(known)}{nearest(config.to, known)}')
    check(os.path.exists(source), f"{source} does not exist; expected a file or a diffusers folder{nearest_file(source)}")
    check(config.overwrite or not os.path.exists(target), f"{target} exists; expected a new place, or --overwrite")
    check(os.path.realpath(source) != os.path.realpath(target), f"{source} is both IN and OUT; expected another place")
    kind = kind_of(source)
    if config.extract:
        check(kind == "checkpoint", f"--extract compares two checkpoints, and {source} is a{'n' * (kind[0] == 'e')} {kind}; "
              "expected one")
        check(os.path.exists(config.extract), f"--extract {config.extract} does not exist; expected a checkpoint"
              f"{nearest_file(config.extract)}")
        for name in ("model", "dtype", "merge"):
            check(not getattr(config, name), f"--{name} is not for --extract, which writes the difference of two checkpoints; "
                  "expected one of them")
        kind = "LoRA"
    allowed = {"checkpoint": CHECKPOINTS, "LoRA": LORAS, "embedding": EMBEDDINGS}[kind]
    article = "n" if kind[0] == "e" else ""
    check(config.to in allowed, f"{source} is a{article} {kind}, which --to {config.to} does not fit; "
          f"expected {' or '.join(allowed)}")
    owners = {"model": "LoRA", "dtype": "checkpoint", "config": "checkpoint", "merge": "checkpoint"}
    for name, owner in owners.items() if not config.extract else ():
        check(kind == owner or not getattr(config, name), f"--{name} belongs to a {owner}, and {source} is a{article} "
              f"{kind}; expected no such flag")
    folder = kind == "checkpoint" and config.to == "diffusers"
    check(not os.path.exists(target) or os.path.isdir(target) == folder, f"{target} is a {'file' if folder else 'folder'}, "
          f"and what is to be written a {'folder' if folder else 'file'}; expected another place")
    check(kind == "embedding" or folder or target.endswith(".safetensors"), f"{target} does not end in .safetensors; "
          "expected a name that does: pickled files are read, not written")
    convert = {"checkpoint": convert_checkpoint, "LoRA": convert_lora, "embedding": convert_embedding}[kind]
    (extract_lora if config.extract else convert)(config, source, target)
    print(f"{target}: {kind}, {config.to}")


def kind_of(path):
    """What is to be converted: "checkpoint", "LoRA" or "embedding"; UserError for anything else."""
    from nanodiff.inspect import describe

    if os.path.isdir(os.path.join(path, "unet")):
        return "checkpoint"
    kind = dict(describe(path))["kind"]
    for word, found in (("LoRA", "LoRA"), ("embedding", "embedding"), ("inversion", "embedding"),
                        ("Stable Diffusion", "checkpoint")):
        if word in kind:
            return found
    check(False, f"{path} is {kind}; expected a Stable Diffusion checkpoint, a LoRA or a textual-inversion embedding")


def convert_checkpoint(config, source, target):
    """A Stable Diffusion folder or file to the other layout, with LoRAs merged on the way if asked."""
    from nanodiff.pipelines import stable_diffusion
    from nanodiff.formats.weights import parse_dtype
    from nanodiff.sample import lora_files, print_lora

    dtype = parse_dtype(config.dtype or None)
    sd = stable_diffusion.load(source, config.config or None, dtype=None)
    for note in sd.notes:
        print(note)
    for path, scale in lora_files(config.merge):
        print_lora(path, scale, sd.load_lora(path, scale, name=path))
    sd.merge_lora()
    sd.save(target, config.to, dtype)


def convert_lora(config, source, target):
    """A LoRA file under other names."""
    from nanodiff.pipelines import stable_diffusion
    from nanodiff.formats import lora_file

    if not config.model:
        print(f"--model is not given: the layers are those of {stable_diffusion.SHIPPED}")
    sd = stable_diffusion.load(config.model or None, config.config or None)
    lora_file.write_lora(target, lora_file.read_lora(source, sd.networks), config.to)


def extract_lora(config, source, target):
    """The LoRA of --rank that turns one checkpoint most nearly into another."""
    from nanodiff.formats import lora_file
    from nanodiff.models import lora_extract
    from nanodiff.pipelines import stable_diffusion

    before, after = (stable_diffusion.load(path, config.config or None) for path in (config.extract, source))
    parts = lora_extract.extract(before.networks, after.networks, config.rank)
    lora_file.write_lora(target, parts, config.to)
    whole = lora_extract.difference(before.networks, after.networks)
    before.load_lora(target, name="lora")
    before.merge_lora()
    left = lora_extract.difference(before.networks, after.networks)
    print(f"{len(parts)} layers differ; the LoRA leaves {left / whole:.1%} of their difference (Frobenius norm)")


def convert_embedding(config, source, target):
    """The word of a textual-inversion file in another layout."""
    from nanodiff.formats import embedding_file

    word, vectors = embedding_file.read_embedding(source)
    embedding_file.write_embedding(Path(target), word, vectors, config.to)


if __name__ == "__main__":
    main()
