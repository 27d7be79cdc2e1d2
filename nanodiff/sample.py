"""Draw pictures from a trained model: Stable Diffusion (a folder or file of SD 1.x or 2.x), or a run of train_ddpm.py,
train_gan.py, train_vae.py, train_vqgan.py or train_autoencoder.py.

    python -m nanodiff.sample --prompt "a photo of red woven fabric" --attention red,woven
    python -m nanodiff.sample --model stable-diffusion-v1-5 --prompt "a photo of woven carbon fibre" --n 4
    python -m nanodiff.sample --model sd.safetensors --prompt "..." --lora weave.safetensors:0.8 --image ct.png --strength 0.5
    python -m nanodiff.sample --model runs/ddpm-001 --n 64 --sampler dpm++2m --steps 25
    python -m nanodiff.sample --model runs/gan-001 --n 1000
    python -m nanodiff.sample --again samples/0000-00003.png

Writes a grid and the single pictures; each PNG's text holds the parameters that made it, and --again makes it once more.
With a prompt and no --model the small Stable Diffusion that comes with nanodiff draws.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from nanodiff import plots
from nanodiff.data import images
from nanodiff.diffusion import samplers
from nanodiff.errors import check, nearest
from nanodiff.files import nearest_file
from nanodiff.flags import CountOrZero, NotNegative, OneOf, check_folder, check_values, entry, parse
from nanodiff.pipelines import ddpm
from nanodiff.pipelines.load import Options, class_number, kind_of, load
from nanodiff.tomography.slices import write_slices
from nanodiff.training.distributed import pick_device


@dataclass
class Config:
    model: str = ""  # a diffusers folder, .safetensors or .ckpt, or a run (for a prompt: nano-sd)
    again: str = ""  # a picture that this command wrote: make it again; flags that are given change it
    n: CountOrZero = 0  # number of pictures, of each prompt (0: 1 of Stable Diffusion, else 16)
    first: CountOrZero = 0  # number of the first picture
    sampler: Annotated[str, OneOf(samplers.by_name)] = "dpm++2m"  # of models with time steps
    steps: int = 25  # sampling steps
    eta: float = 0.0  # ddim: share of DDPM's noise that each step adds
    seed: int = 0  # picture i depends on the seed and on i alone
    guidance: float = -1.0  # scale of classifier-free guidance (1: off; -1: the model's own, 7.5 of Stable Diffusion)
    guidance_start: float = -1.0  # share of the way from noise before which it does not act (-1: the model's own)
    image: str = ""  # start from this picture instead of noise
    strength: float = -1.0  # with --image: share of the steps that are made, up to 1 (-1: 0.5 DDPM, 0.8 Stable Diffusion)
    batch: CountOrZero = 0  # pictures at once (0: by their size)
    device: str = "auto"  # cpu, cuda or cuda:1; auto takes a GPU when there is one
    units: str = ""  # a run's volumes.json (or volumes.json=STATE): also write slices.tif in that volume's own units
    out: str = "samples"  # folder for grid.png and the single pictures
    prompt: str = ""  # Stable Diffusion: what to draw
    prompts: str = ""  # a text file with a prompt a line, instead of --prompt
    negative_prompt: str = ""  # what to move away from
    mask: str = ""  # with --image: a picture, white where it is to be painted anew
    height: int = 0  # in pixels (0: the image's, or the model's own)
    width: int = 0  # in pixels
    lora: str = ""  # LoRA files with their scales: a.safetensors:0.8,b.safetensors
    embedding: str = ""  # textual-inversion files, with commas; file=WORD names its word
    config: str = ""  # a diffusers folder with the settings of a single file of unusual size
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the U-Net (and but for float16 the autoencoder)
    ema: bool = False  # of a single file with both, the U-Net's averaged weights instead of its last ones
    skip_last: int = 0  # layers of the text model left out at its end ("clip skip" less 1)
    tile: int = 0  # decode large pictures in squares of so many latent pixels (0: whole)
    attention: str = ""  # words of the prompt, with commas: attention.png shows where in the picture each of them acts
    compile: str = ""  # on a GPU: default (torch.compile) or graph (a CUDA graph of each step too)
    weights: Literal["ema", "raw"] = "ema"  # DDPM: averaged, or a run's last checkpoint as it is
    label: str = ""  # DDPM with classes, VQGAN: class name or number (default: all in turn)
    temperature: NotNegative = 1.0  # VQGAN: of its codes, below 1 the likely ones become likelier
    clip: float = 0.0  # DDPM: cut each step's predicted picture to [-clip, clip], in the network's range (0: no)


# The flags of some models alone.
BELONGS = {"Stable Diffusion": {"prompt", "prompts", "negative_prompt", "mask", "height", "width", "lora", "embedding", "config",
                                "dtype", "ema", "skip_last", "tile", "attention", "compile", "guidance_start"},
           "a DDPM": {"weights", "label", "clip"}, "a VQGAN": {"label", "temperature"},
           "models with time steps": {"sampler", "steps", "eta", "guidance", "image", "strength", "batch"}}
NOT_RECORDED = {"again", "n", "first", "out", "device", "batch", "prompts", "units", "attention"}


@entry
def main(argv=None):
    """Draws the pictures that the command line asks for."""
    config, given = parse(Config, argv, __doc__)
    if config.again:
        config = repeated(config, given)
    shipped = not config.model and bool(config.prompt or config.prompts)
    check(config.model or shipped, "--model is missing; expected a Stable Diffusion folder or file, a run folder such "
          "as runs/ddpm-001, or --prompt for the small model that comes with nanodiff")
    check(shipped or Path(config.model).exists(), f"--model {config.model} is no folder or file; expected Stable "
          f"Diffusion or a run such as runs/ddpm-001{nearest_file(config.model)}")
    check_folder("--out", config.out)
    if config.strength != -1:
        check(0 < config.strength <= 1, f"--strength is {config.strength}; expected above 0 and up to 1, such as 0.5")
    check(not config.eta or config.sampler == "ddim", f"--eta belongs to --sampler ddim, not to {config.sampler}")
    for name in sorted(given & {"strength", "mask"}):
        check(config.image, f"--{name} was given without --image; expected the picture it belongs to")
    if config.units:
        volume_record(config.units)
    kind, draw = "a DDPM", draw_ddpm
    if shipped or is_stable_diffusion(config.model):
        kind, draw = "Stable Diffusion", draw_stable_diffusion
    elif (found := kind_of(config.model)) in OTHERS:
        kind, draw = f"a {found}", draw_other
    own = BELONGS.get(kind, set()) | (BELONGS["models with time steps"] if draw is not draw_other else set())
    foreign = set().union(*BELONGS.values()) - own
    for name in sorted(given & foreign):
        owner = next(owner for owner, names in BELONGS.items() if name in names)
        check(False, f"--{name} belongs to {owner}, and {config.model or 'the model that comes with nanodiff'} is {kind}"
              f"{' (it has no text_encoder/)' if owner == 'Stable Diffusion' else ''}; expected no such flag")
    draw(config, foreign)


def is_stable_diffusion(path):
    """Whether a path is a file, or a folder with a part that a DDPM has not."""
    return Path(path).is_file() or any((Path(path) / part).is_dir() for part in ("text_encoder", "tokenizer", "vae"))


def repeated(config, given):
    """The config that made the picture `config.again`, with the flags that were given now in place of its own."""
    text = plots.read_text(config.again)
    if "negative" in text:  # as the first edition called it
        text["negative_prompt"] = text.pop("negative")
    check("number" in text and text.keys() & {"model", "prompt"}, f"{config.again} does not say how it was made; "
          "expected a picture that this command wrote")
    fields = {field.name: type(field.default) for field in dataclasses.fields(Config) if field.name not in NOT_RECORDED}
    fields |= {name: "True".__eq__ for name, kind in fields.items() if kind is bool}  # bool("False") would be True
    try:
        said = {"first": int(text["number"]), **{name: fields[name](text[name]) for name in fields.keys() & text.keys()}}
    except ValueError as error:
        check(False, f"{config.again} cannot be made again ({error}); expected the text that this command wrote")
    said = {"n": 1, "guidance_start": 0.0, **said}  # a picture of before guidance could start late was guided all the way
    config = dataclasses.replace(config, **{**said, **{name: getattr(config, name) for name in given}})
    check_values(config)
    return config


def write(x, config, captions, foreign):
    """Writes the pictures x [N, C, H, W], with config (but for the fields `foreign`) and the dicts `captions` in their
    text, and a grid of all."""
    folder = Path(config.out)
    text = {name: value for name, value in vars(config).items() if name not in NOT_RECORDED | foreign and value != ""}
    for i, (one, caption) in enumerate(zip(x, captions), config.first):
        plots.save(one, folder / f"{config.seed:04d}-{i:05d}.png", {**text, "number": i, **caption})
    plots.save(plots.grid(x, scale=max(1, 64 // x.shape[2])), folder / "grid.png", text)
    if config.units:
        write_slices(x.clamp(-1, 1).cpu(), folder / "slices.tif", volume_record(config.units))
    print(f"{len(x)} picture{'s' * (len(x) > 1)} in {folder}")


def volume_record(text):
    """The volume's record that --units FILE or FILE=STATE names (see `data.volumes.Volume.record`)."""
    path, state = (text, "") if Path(text).is_file() else text.rpartition("=")[::2]
    try:
        records = [record for record in json.loads(Path(path or text).read_text())
                   if {"name", "state", "low", "high", "dtype", "voxel"} <= set(record)]
    except (OSError, ValueError, TypeError):
        records = []
    found = {}
    for record in records:  # by state, or by name where several volumes are of one state
        alone = sum(other["state"] == record["state"] for other in records) == 1
        found[record["state"] if alone else record["name"]] = record
    path = path or text
    check(found, f"--units {path} holds no volume's grey scale; expected the volumes.json of a run on tomography slices")
    states = ", ".join(found)
    check(state or len(found) == 1, f"--units {path} holds several volumes; expected {path}= and one of {states}")
    check(not state or state in found, f'--units {path} holds no "{state}"; expected one of {states}{nearest(state, found)}')
    return found[state or next(iter(found))]


# --- Stable Diffusion -----------------------------------------------------------------------------------------------

def draw_stable_diffusion(config, foreign):
    """Pictures of one or several prompts."""
    from nanodiff.pipelines import attention_maps, generation, stable_diffusion

    prompts, words = [config.prompt], [word.strip() for word in config.attention.split(",") if word.strip()]
    if config.prompts:
        check(not config.prompt, "--prompt and --prompts were given; expected one of them")
        check(Path(config.prompts).is_file(), f"--prompts {config.prompts} is no file; expected a prompt a line")
        lines = Path(config.prompts).read_text(encoding="utf-8-sig", errors="replace").splitlines()
        check("\ufffd" not in "".join(lines), f"--prompts {config.prompts} is no text in UTF-8; expected a prompt a line")
        prompts = [line.strip() for line in lines if line.strip()]
        check(prompts, f"--prompts {config.prompts} holds no prompt; expected one a line")
    check(any(prompts) or config.image, "--prompt is missing; expected what to draw, such as --prompt \"woven fabric\"")
    check(config.compile in ("", "default", "graph"), f'--compile is "{config.compile}"; expected default or graph')
    check(words or not config.attention, f'--attention is "{config.attention}"; expected words of the prompt')
    check(not (config.compile and words), "--attention and --compile were given; expected one of them")
    known = {name: getattr(config, name) for name in ("image", "mask") if getattr(config, name)}
    for path in known.values():
        images.load(path)  # before minutes of loading
    sd = stable_diffusion.load(config.model or None, config.config or None, config.dtype, pick_device(config.device),
                               config.ema)
    for note in sd.notes:
        print(note)
    generation.check_run(sd, config.sampler, config.steps)
    generation.check_output(sd, tile=config.tile)
    for path, scale in lora_files(config.lora):
        print_lora(path, scale, sd.load_lora(path, scale, name=path))
    for one in filter(None, config.embedding.split(",")):
        path, _, word = one.partition("=")
        for word, ids in sd.load_embedding(path, word or None).items():
            print(f'{path}: the word "{word}" has {len(ids)} vector{"s" * (len(ids) > 1)}')
    for prompt in prompts if words else []:  # before minutes of drawing
        attention_maps.word_places(sd.tokenizer, prompt, words)
    if config.compile:
        sd.compile(graph=config.compile == "graph")
    config.n = config.n or 1
    config.guidance = sd.guidance if config.guidance == -1 else config.guidance
    config.guidance_start = sd.guidance_start if config.guidance_start == -1 else config.guidance_start
    config.strength = 0.8 if config.strength == -1 else config.strength
    options = {"negative": config.negative_prompt, "steps": config.steps, "guidance": config.guidance, "seed": config.seed,
               "guidance_start": config.guidance_start, "sampler": config.sampler, "height": config.height or None,
               "width": config.width or None, "strength": config.strength, "skip_last": config.skip_last, "tile": config.tile, **known}
    options |= {"eta": config.eta} if config.eta else {}
    start = time.time()
    if words:  # one by one: which part of a batch is whose would have to be known
        all_prompts = [prompt for prompt in prompts for _ in range(config.n)]
        drawn = [attention_maps.attention_maps(sd, prompt, words, first=i, **options)
                 for i, prompt in enumerate(all_prompts, config.first)]
        x = torch.stack([picture for picture, _ in drawn])
    else:
        x = sd.generate(prompts, n=config.n, output="tensor", first=config.first, batch=config.batch, **options)
    print(f"{(time.time() - start) / len(x):.2f} s a picture of {x.shape[2]}x{x.shape[3]}, {config.steps} steps")
    config.height, config.width = x.shape[2:]
    write(x, config, [{"prompt": one} for one in prompts for _ in range(config.n)], foreign)
    if words:
        plots.save(attention_maps.sheet(drawn), Path(config.out) / "attention.png")


def lora_files(text):
    """[(path, scale)] from "a.safetensors:0.8,b.safetensors"."""
    found = []
    for one in filter(None, text.split(",")):
        path, _, scale = one.rpartition(":")
        try:
            found.append((path, float(scale)) if path else (one, 1.0))
        except ValueError:
            check(Path(one).is_file(), f'--lora "{one}" does not end in a number; expected FILE or FILE:SCALE, such as '
                  "a.safetensors:0.8")
            found.append((one, 1.0))
    return found


def print_lora(path, scale, report):
    """One line on what a LoRA did, so that "it loaded and nothing happened" is seen."""
    layers = " and ".join(f"{n} layers of the {name.replace('_', ' ')}" for name, n in report["layers"].items())
    print(f"{path}, scale {scale:g}: {layers}; the change has {100 * report['overall']:.2g} % of those weights' norm")


# --- the families without time steps -----------------------------------------------------------------------------------

OTHERS = {"Autoencoder", "VAE", "Generator", "VQGAN", "VQVAE"}


def draw_other(config, foreign):
    """Pictures of a run of train_gan.py, train_vae.py, train_vqgan.py or train_autoencoder.py."""
    options = Options(temperature=config.temperature, label=config.label)
    model = load(config.model, options, pick_device(config.device))
    check(len(model.shape) == 3, f"{config.model} draws points [{model.shape[0]}]; expected a model of pictures")
    config.n = config.n or 16
    print(f"{model.name}: {model.how}")
    x = model.draw(config.n, config.seed, config.first)
    write(x, config, [{}] * len(x), foreign)


# --- DDPM -----------------------------------------------------------------------------------------------------------

def draw_ddpm(config, foreign):
    """Pictures of a run of train_ddpm.py or of a diffusers DDPM folder."""
    model = ddpm.load(config.model, config.weights, pick_device(config.device))
    config.n = config.n or 16
    label = labels(config, model)
    config.guidance = model.guidance if config.guidance == -1 else config.guidance
    config.strength = 0.5 if config.strength == -1 else config.strength
    options = {"eta": config.eta} if config.eta else {}
    if config.clip:
        options["clip"] = config.clip
    if config.image:
        one = images.load(config.image, channels=model.shape[0])[None]
        one = images.resize(one, *model.shape[1:])
        options |= {"image": model.to_network(one).to(model.device), "strength": config.strength}
    x = model.generate(config.n, config.sampler, config.steps, config.seed, label, config.guidance, first=config.first,
                       batch=config.batch, **options)
    write(x, config, [{}] * len(x) if label is None else [{"label": model.classes[i]} for i in label], foreign)


def labels(config, model):
    """int64 [n], or None for a model without classes."""
    if not model.classes:
        check(not config.label and config.guidance in (-1, 1), "--label and --guidance need a model trained with "
              "--conditional; this one knows no classes")
        return None
    if not config.label:
        return torch.arange(config.first, config.first + config.n) % len(model.classes)
    return torch.full((config.n,), class_number(config.label, model.classes))


if __name__ == "__main__":
    main()
