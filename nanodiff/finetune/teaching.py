"""What all ways of teaching a model something new share: what it is shown, and how one watches what it learns and loses.

A script loads a model (`load_model`) and a lesson: pictures of the new as latents, made once, with what is said of
each. While it trains, a Watch draws the lesson's prompts and prompts of what the model knew before ("retention", the
report's two zebras and horse on a beach), always from the same noise, and measures the loss on held-out pictures at
the same steps and noise. Report: sections 4.2.1 to 4.2.5, tables 5 to 16.
"""

import json
from dataclasses import dataclass

import torch

import nanodiff
from nanodiff import fast, plots, rng, worlds
from nanodiff.classifiers import worlds as classifier
from nanodiff.data import captions, images
from nanodiff.data.images import some_of
from nanodiff.diffusion import process
from nanodiff.diffusion.samplers import by_name
from nanodiff.errors import check, nearest
from nanodiff.files import write_text
from nanodiff.formats.diffusers_folder import name_of, schedule_from
from nanodiff.formats.weights import read_safetensors, write_weights
from nanodiff.metrics import agreement
from nanodiff.pipelines.stable_diffusion import SHIPPED
from nanodiff.pixels import from_uint8, to_uint8
from nanodiff.training import datasets, latents
from nanodiff.training.run import RunConfig
from nanodiff.worlds import prompts

REPORT = ("two zebras", "a horse on a beach")  # what the report asks of a taught Stable Diffusion (tables 9, 12, 16)
WOVEN = 450  # slices of drawn specimens in a lesson, 50 of each class
HELD_OUT = 128  # pictures of the held-out loss, at most


@dataclass
class TeachConfig(RunConfig):
    model: str = ""  # what is taught: a folder or file of SD 1.x or 2.x (default: the small model that ships)
    data: str = "woven"  # woven (drawn specimens), a drawn class such as zigzagged, a folder of pictures, TIFF volumes
    names: str = ""  # of woven: their classes, with commas; one that is named twice comes twice as often (default: all)
    prompt: str = ""  # what is said of every picture (default: the pictures' own captions)
    size: int = 0  # side of the pictures in pixels (0: the model's own)
    pictures: int = 0  # pictures to learn from, at most (0: all there are; of drawn ones 450)
    variants: int = 4  # random crops and flips of each picture that are kept
    caption_dropout: float = 0.1  # share of captions that are left out, so that guidance stays as it was
    gamma: float = 0.0  # of min-SNR weighting, such as 5 (0: every step counts the same)
    offset: float = 0.0  # strength of offset noise, such as 0.1
    checkpointing: bool = False  # compute activations a second time in the backward pass: less memory, more time
    patience: int = 0  # previews in a row without a better held-out loss after which training ends (0: it never does)
    retention: str = ""  # prompts of what the model knew, with | between (default: some of the base world's)
    each: int = 6  # pictures of every prompt in the sheets before and after
    guidance: float = 0.0  # scale of classifier-free guidance in pictures (0: the model's own)
    sampler: str = "dpm++2m"  # of the pictures
    sample_steps: int = 20  # its steps
    ema: float = 0.0  # not used: what is taught in minutes has no long average
    preview_every: int = 100  # steps between pictures from fixed noise


def check_flags(config):
    """UserError for every common flag whose value alone is wrong."""
    check(config.sampler in by_name, f'--sampler "{config.sampler}" is unknown; expected {", ".join(by_name)}'
          + nearest(config.sampler, by_name))
    check(not config.retention or any(part.strip() for part in config.retention.split("|")),
          f'--retention is "{config.retention}"; expected prompts with | between')
    for name, least in dict(size=0, pictures=0, variants=1, gamma=0, offset=0, guidance=0, patience=0, each=1).items():
        check(getattr(config, name) >= least, f"--{name} is {getattr(config, name)}; expected {least} or more")
    check(1 <= config.sample_steps <= 1000, f"--sample_steps is {config.sample_steps}; expected 1 to 1000")
    check(0 <= config.caption_dropout < 1, f"--caption_dropout is {config.caption_dropout}; expected a share from 0 to "
          "below 1")
    check(not config.names or config.data == "woven", f"--names is for --data woven, not for {config.data}; expected none")
    worlds.chosen(config.names, worlds.WOVEN, worlds.WOVEN)
    check(config.ema == 0, f"--ema {config.ema} is not for this script; expected no --ema")


def load_model(config, base="fp32"):
    """The model that is taught, frozen, on the CPU, float32 but for the U-Net, which may have base "bf16"."""
    check(base in ("fp32", "bf16"), f'--base "{base}" is unknown; expected fp32 or bf16')
    sd = nanodiff.load(config.model or None)
    for net in (sd.text_model, sd.unet, sd.autoencoder):
        net.requires_grad_(False)
    if base == "bf16":
        sd.unet.to(torch.bfloat16)
    takes, gives = sd.unet.config.in_channels, sd.unet.config.out_channels
    check(takes == gives, f"--model {config.model} is an inpainting model, whose U-Net takes {takes} channels; expected "
          f"one that takes {gives}")
    return sd


# --- the lesson -----------------------------------------------------------------------------------------------------

@dataclass
class Lesson:
    """Latents to learn from and held-out ones, each with .captions; prompts: every different caption (at most 12)."""
    training: latents.Latents
    held_out: latents.Latents
    prompts: list
    names: list  # the reader's class of each prompt, None where it knows none or the pictures are of several


def side_of(config, sd):
    """The pictures' side in pixels: --size, or the model's own; UserError when it does not fit the autoencoder."""
    f, own = sd.factor, sd.settings["unet"].get("sample_size") or 64
    side = config.size or (own if isinstance(own, int) else own[0]) * f
    check(side % f == 0, f"--size {side} does not fit latents {f} times smaller; expected a multiple of {f}, such as "
          f"{max(1, round(side / f)) * f}")
    return side


def is_drawn(name):
    """Whether --data names pictures that are drawn here, as many as one wants, and no folder."""
    return name == "woven" or name in worlds.DRAWN


def load_pictures(config, side, said=""):
    """(training, held out): data sets of colour pictures with captions, from what --data names.

    said: the caption of all of them (default: --prompt, else their own). At most HELD_OUT pictures are held out.
    """
    n, said = config.pictures or WOVEN, said or config.prompt
    if is_drawn(config.data):
        print("drawing the pictures: less than a minute", flush=True)
        load = worlds.cut if config.data == "woven" else worlds.load
        options = dict(seed=config.seed, workers=max(1, config.workers))
        names = worlds.chosen(config.names, worlds.WOVEN, worlds.WOVEN) if config.data == "woven" else (config.data,)
        training = load("train", side, n, names=names, **options)
        held_out = load("test", side, HELD_OUT, names=tuple(dict.fromkeys(names)), **options)
    else:
        check(not config.pictures, f"--pictures is for drawn pictures, not for --data {config.data}; expected a folder "
              "that holds as many as you want")
        training = datasets.load(config.data, "train", size=side, channels=3, seed=config.seed)
        held_out, name = datasets.held_out(config.data, training, seed=config.seed)
        print(f"held-out loss: {name.rstrip(',')}", flush=True)
        check(not config.patience or not name.startswith("training"), f"--patience waits for a loss on pictures that are "
              f"not trained on, and --data {config.data} holds none; expected some in {config.data}/test")
        held_out = some_of(held_out, images.spread(held_out, HELD_OUT))
    for one, kind in ((training, "training"), (held_out, "held-out")):
        if said:
            one.captions = [said] * len(one)
        check(one.captions is not None, f"the {kind} pictures of --data {config.data} have no captions; expected --prompt "
              "TEXT, or a folder with captions (see nanodiff/data/caption_files.py)")
    check(config.batch <= len(training), f"--batch {config.batch} is more than the {len(training)} pictures of --data "
          f"{config.data}; expected at most that")
    return training, held_out


def make_lesson(config, sd, training, held_out, say=print):
    """The Lesson of two data sets: their pictures encoded once, on the device where sd is."""
    crops = 1 if config.data in worlds.DRAWN else config.variants
    training, held_out = (latents.encode(sd.autoencoder, one, many, seed=config.seed, say=say)
                          for one, many in ((training, crops), (held_out, 1)))
    prompts, known = list(dict.fromkeys(training.captions)), classifier.load_reader().classes
    names = [None] * len(prompts)
    if training.labels is not None and is_drawn(config.data):  # the reader has never seen other pictures
        shown = {prompt: set() for prompt in prompts}
        for caption, label in zip(training.captions, training.labels.tolist()):
            shown[caption].add(training.classes[label])
        names = [shown[prompt].pop() if len(shown[prompt]) == 1 else None for prompt in prompts]
        names = [name if name in known else None for name in names]
    some = torch.linspace(0, len(prompts) - 1, min(12, len(prompts))).round().long().tolist()
    return Lesson(training, held_out, [prompts[i] for i in some], [names[i] for i in some])


def retained(config):
    """[(prompt, class or None, colours or None)] of what the model knew: --retention, or some of its own world's."""
    if config.retention:
        return [(prompt.strip(), None, None) for prompt in config.retention.split("|") if prompt.strip()]
    if config.model and config.model != str(SHIPPED):
        return [(prompt, None, None) for prompt in REPORT]
    some = worlds.BASE[::len(worlds.BASE) // 12][:12]
    return [one for one in prompts.prompts(1, some, split="val") if captions.is_plain(one[0])]


def states(sd, captions, live):
    """The text states of captions as a function of rows [B] -> [B, 77, D]; row -1 is the empty caption's.

    live: the text encoder learns, so that every call runs it, with gradients; else they are made once.
    """
    ids = sd.tokenizer([*captions, ""])
    if not live:
        known = latents.text_states(sd.text_model, ids)
        return lambda row: known(row % len(ids))
    ids, place = ids.unique(dim=0, return_inverse=True)

    def of(row):  # each different caption of a batch is encoded once
        some, back = place[row].unique(return_inverse=True)
        return sd.text_model(ids[some].to(sd.device))[0][back.to(sd.device)]

    return of


def said(config, step, index, position, stream=3):
    """The rows [B] of `states` that a step's pictures `index` [B] are shown: their captions, or for some the empty one."""
    dropped = rng.uniform(config.seed, stream, step, position) < config.caption_dropout
    return torch.where(dropped.cpu(), -1, index)


def noise_of(config, step, position, shape, stream=0):
    """A step's noise [B, *shape] for the pictures at `position` [B], with offset noise where --offset asks for it."""
    return rng.noise(config.seed, step, position, shape, config.offset, stream)


def end_in_noise(sd):
    """Rescales a model's schedule so that it ends in pure noise, and has it drawn from there: trailing steps."""
    sd.settings["scheduler"] |= {**name_of(sd.schedule.zero_terminal_snr()), "timestep_spacing": "trailing"}
    sd.schedule, sd.kind = schedule_from(sd.settings["scheduler"])


# --- what it learns and what it loses ---------------------------------------------------------------------------------

def draw(sd, config, prompts, each=1):
    """Pictures [len(prompts) x each, 3, H, W] in [-1, 1], `each` of every prompt together, always from the same noise."""
    side = side_of(config, sd)
    return sd.generate([prompt for prompt in prompts for _ in range(each)], steps=config.sample_steps, height=side,
                       width=side, guidance=config.guidance or None, sampler=config.sampler, seed=config.seed,
                       output="tensor", progress=False).cpu()


def held_out_loss(sd, config, lesson):
    """The mean loss of held-out pictures, at time steps spread evenly and with noise that is always the same."""
    n = len(lesson.held_out)
    index = torch.arange(n)
    x0, position = lesson.held_out.read(index, index).to(sd.device), index.to(sd.device)
    t = ((position + 0.5) / n * sd.schedule.T).long()
    noise = rng.normal(0, -1, position, x0.shape[1:])
    context = torch.cat([sd.encode_text(lesson.held_out.captions[i:i + 64]) for i in range(0, n, 64)])
    with fast.packed(sd.unet):
        return process.loss_by_time(sd.unet, x0, sd.schedule, sd.kind, t, noise, context, batch=16)[0]


def preview(run, sd, lesson, old):
    """A picture of every prompt of the lesson and of `old` (see `retained`), the held-out loss, the curves.

    At the first step the pictures for the sheets "before" are drawn, too, and kept in before.safetensors.
    """
    if run.rank != 0:
        return
    with run.aside():
        _preview(run, run.config, sd, lesson, old)


def _preview(run, config, sd, lesson, old):
    if run.step == 0:
        write_weights(run.path("before.safetensors"), {name: to_uint8(x) for name, x in both(sd, config, lesson, old).items()})
    x = draw(sd, config, [*lesson.prompts, *(prompt for prompt, _, _ in old)])
    new, kept = x.split([len(lesson.prompts), len(old)])
    plots.save(plots.stack([plots.grid(new, 12), plots.grid(kept, 12)]),
               run.path(f"previews/{run.step:08d}.png"), {"prompts": " | ".join(lesson.prompts)})
    loss = held_out_loss(sd, config, lesson)
    run.record(step=run.step, held_out=loss)
    run.print(f"step {run.step}  held-out loss {loss:.4f}")
    lines = {"training loss": run.history("loss"), "held-out loss": run.history("held_out")}
    plots.save(plots.curves(lines, run.name, "step"), run.path("curves.png"))


def both(sd, config, lesson, old):
    """{"lesson": pictures, "retention": pictures}, --each of every prompt of the lesson, two of every one of `old`."""
    return {"lesson": draw(sd, config, lesson.prompts, config.each),
            "retention": draw(sd, config, [prompt for prompt, _, _ in old], 2)}


def has_stalled(run):
    """Whether the last --patience previews brought no held-out loss below the best before them; rank 0 has them."""
    losses, patience = run.history("held_out")[1] if run.rank == 0 else [], run.config.patience
    if not patience:
        return False
    return run.any(len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience]))


def finish(run, sd, lesson, old, **numbers):
    """The sheets before and after (tables 13, 14 and 16 of the report) and results.json, at the end of a training.

    lesson.png has two rows a prompt, before and after; retention.png the same of what the model knew. numbers: what
    the script says of itself; beside them the reader's agreement with both sets of prompts, before and after, and what
    the last call took: seconds of training, without previews and saving, and prepare_seconds before its first step.
    """
    config = run.config
    results = {"data": config.data, "steps": run.step, "seconds": run.seconds(), "prepare_seconds": run.prepared,
               "memory": run.peak_memory(), **numbers}
    after = both(sd, config, lesson, old)
    before = {name: from_uint8(x) for name, x in read_safetensors(run.path("before.safetensors")).items()}
    wanted = {"lesson": [(p, name, None) for p, name in zip(lesson.prompts, lesson.names)], "retention": old}
    for name, prompts in wanted.items():
        each = len(after[name]) // len(prompts)
        rows = [x[name][i * each:(i + 1) * each] for i in range(len(prompts)) for x in (before, after)]
        labels = [text for prompt, _, _ in prompts for text in (short(prompt), "after")]
        plots.save(plots.sheet([list(row) for row in rows], labels), run.path(f"{name}.png"))
        if all(one is not None for _, one, _ in prompts):
            classes = [one for _, one, _ in prompts for _ in range(each)]
            for moment, x in (("before", before), ("after", after)):
                found = agreement.agreement(classifier.read_all(classifier.load_reader(), x[name]), classes)
                results[f"{name}_{moment}"] = found["class"]
    write_text(run.path("results.json"), json.dumps(results, indent=1) + "\n")
    for name in wanted:
        if f"{name}_after" in results:
            run.print(f"{name}: the reader names the asked-for class in {results[name + '_before']:.1%} before, "
                      f"{results[name + '_after']:.1%} after")
    run.print(f"done: {run.folder}")
    return results


def short(text, most=36):
    """A prompt as a label: its beginning."""
    return text if len(text) <= most else text[:most - 1] + "…"


# --- what it costs ----------------------------------------------------------------------------------------------------

def announce(run, sd, trained, lesson, batch):
    """Prints what is trained and the memory that a step will about need; returns the number of trained parameters.

    Weights, then gradients and AdamW's two moments of what is trained, then activations: what the forward pass of the
    batch keeps for the backward pass, reckoned from those of one and of two pictures, which are measured here.
    """
    own = sum(p.numel() for p in trained)
    weights = sum(p.numel() * p.element_size() for net in (sd.unet, sd.text_model, sd.autoencoder) for p in net.parameters())
    one, two = (activations(sd, lesson, n) for n in (1, 2))
    kept = one + (batch - 1) * (two - one)
    less = ", less with --checkpointing" if not sd.unet.checkpointing else ", and one block's while it is computed again"
    total = weights + 12 * own + kept
    run.print(f"{own:,} trained parameters; about {total / 2**20:,.0f} MiB: weights {weights / 2**20:,.0f}, gradients and "
              f"moments {12 * own / 2**20:,.0f}, activations {kept / 2**20:,.0f}{less}")
    return own


def activations(sd, lesson, n=1):
    """Bytes that the U-Net's forward pass of n latents keeps for its backward pass, weights not counted."""
    x = lesson.training.mean[:1, 0].to(sd.device).repeat(n, 1, 1, 1)
    weights = {p.untyped_storage().data_ptr() for p in sd.unet.parameters() if p.layout == torch.strided}
    seen = {}  # a storage's address: its bytes, and a tensor in it, so that no other takes its place

    def note(tensor):
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = sd.unet(x.requires_grad_(True), torch.zeros(n, device=sd.device), sd.encode_text([""] * n))
    del out
    return sum(size for size, _ in seen.values())


@torch.no_grad()
def changes(net, before):
    """{"all": |W' - W| / |W| over all trained parameters of a network, its name: of each matrix or kernel alone}, the
    largest first; `before`: the parameters as they were. Frobenius norms."""
    moved = [(name, float((p - old).double().square().sum()), float(old.double().square().sum()), p.ndim)
             for (name, p), old in zip(net.named_parameters(), before)]
    whole = sum(part for _, part, _, _ in moved) / max(sum(own for _, _, own, _ in moved), 1e-30)
    each = {name: (part / max(own, 1e-30)) ** 0.5 for name, part, own, ndim in moved if ndim > 1}
    return {"all": whole**0.5, **dict(sorted(each.items(), key=lambda one: -one[1]))}


def change_sentence(changes):
    """What `changes` says, in a line."""
    each = list(changes.items())[1:]
    return (f"the weights changed by {changes['all']:.2%} of their norm, a layer's by {each[len(each) // 2][1]:.2%} in the "
            f"middle and {each[0][1]:.2%} at most ({each[0][0]})")


def folder_bytes(folder):
    """The size of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
