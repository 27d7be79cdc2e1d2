"""The drawn worlds as data sets: textures, things and digits with captions, and slices of drawn woven specimens.

Every picture follows from its number and the split alone. Seeds of the three splits never meet, "test" digits are MNIST's
test digits, and the woven specimens of each split are others. They stand in for the data of the report's section 1.
"""

import multiprocessing

import numpy as np
import torch

from nanodiff.data import captions, images
from nanodiff.errors import UserError, nearest
from nanodiff.pixels import to_uint8
from nanodiff.tomography.slices import Slices
from nanodiff.tomography.volumes import CLASSES, Volume
from nanodiff.worlds import textures, weave

SPLITS = {"train": 0, "val": 4_000_000, "test": 7_000_000}  # the first seed of each
BASE = (*textures.TEXTURES, *textures.THINGS, *textures.DIGITS)  # what the base model is taught
DRAWN = (*BASE, *textures.NEW)
WOVEN = CLASSES
GROUPS = {"textures": (*textures.TEXTURES, *textures.NEW), "things": textures.THINGS, "digits": textures.DIGITS,
          "woven": WOVEN}  # every class there is


def first_seed(split, seed):
    """The first of a split's seeds; UserError for an unknown split."""
    if split not in SPLITS:
        raise UserError(f"drawn worlds have no split '{split}': expected {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    return SPLITS[split] + seed * 10_000_000


def chosen(text, known=DRAWN, usual=BASE):
    """The classes that a flag --names holds, with commas between; of no text `usual`. UserError for an unknown one."""
    names = tuple(text.split(",")) if text else usual
    for name in names:
        if name not in known:
            raise UserError(f'--names holds "{name}"; expected some of {", ".join(known)}{nearest(name, known)}')
    return names


def load(split="train", size=64, n=None, names=BASE, seed=0, workers=1, **options):
    """n drawn pictures in memory, the classes `names` in turn -> images.Images, with `.scenes` [n] beside the captions.

    n         default: 20,000 for training, about a minute; 2,000 of another split
    size      pixels of a side; names: some of worlds.DRAWN (default: what the base model is taught)
    workers   processes that draw; the pictures do not depend on them
    options   of textures.scene, such as pairs="all": those of class and colour that training never shows, too
    UserError for another split, no name or an unknown one.
    """
    first = first_seed(split, seed)
    for name in names:
        if name not in DRAWN:
            raise UserError(f'no class is called "{name}"; expected one of {", ".join(DRAWN)}{nearest(name, DRAWN)}')
    n = (20_000 if split == "train" else 2_000) if n is None else n
    if n < 1 or not names:
        raise UserError(f"{n} pictures of {len(names)} classes cannot be drawn: at least one of each is needed")
    size, width = images.pair(size)
    if size != width:
        raise UserError(f"drawn pictures are squares, but the size is {size} x {width}: give one number")
    labels = torch.arange(n) % len(names)
    drawn = _map(_draw, [(first + i, names[i % len(names)], size, split, options) for i in range(n)], workers, 64)
    pixels = torch.from_numpy(np.stack([picture for _, picture in drawn])).permute(0, 3, 1, 2).contiguous()
    scenes = [scene for scene, _ in drawn]
    found = images.Images(pixels, labels, names, [captions.caption(scene) for scene in scenes])
    found.scenes = scenes
    return found


def _draw(job):
    """A Scene of `load` and its picture uint8 [H,W,3]."""
    seed, name, size, split, options = job
    scene = textures.scene(seed, name, split, **options)
    return scene, textures.paint(scene, size)


def woven(split="train", size=64, specimens=2, scale=0.25, seed=0, workers=1, **options):
    """Slices of drawn specimens of every state, in the nine woven classes -> slices.Slices.

    specimens   how many of each state; scale: of the report's volumes (0.25 is a quarter of each side)
    options     of slices.Slices, such as channels, axes or fit (here "resize" is the default: the whole depth is seen)
    UserError for another split or no specimen.
    """
    first = first_seed(split, seed)
    if specimens < 1:
        raise UserError(f"{specimens} specimens cannot be cut into slices: at least one is needed")
    jobs = [(first + i, state, tuple(round(scale * side) for side in weave.SHAPES[state]))
            for i in range(specimens) for state in weave.STATES]
    volumes = [Volume.of(volume, state, name=f"{state}-{number}")
               for volume, (number, state, _) in zip(_map(_specimen, jobs, workers, 1), jobs)]
    options.setdefault("fit", "resize")
    return Slices(volumes, size, seed=seed, **options)


def cut(split="train", size=64, n=450, names=WOVEN, seed=0, workers=1, **options):
    """n slices of drawn specimens in memory, the classes `names` in turn, with the report's captions ("sf_dry sf_warp")
    -> images.Images; options as in `woven`, channels 3 by default. A class that is named twice comes twice as often."""
    slices = woven(split, size, seed=seed, workers=workers, **{"channels": 3, **options})
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.tensor([slices.classes.index(name) for name in names])
    labels, pixels = numbers[torch.arange(n) % len(names)], torch.empty(n, *slices.shape, dtype=torch.uint8)
    captions = [slices.captions[slices.labels.tolist().index(number)] for number in range(len(slices.classes))]
    for number in labels.unique().tolist():
        mine, places = (slices.labels == number).nonzero().flatten(), (labels == number).nonzero().flatten()
        index = mine[torch.randint(len(mine), (len(places),), generator=generator)]
        draws = torch.randint(2**40, (len(places),), generator=generator)
        pixels[places] = to_uint8(slices.read(index, draws))
    return images.Images(pixels, labels, slices.classes, [captions[number] for number in labels.tolist()])


def everything(split="train", size=64, n=20_000, specimens=4, seed=0, workers=1):
    """n pictures in memory, of textures (with those to be taught later), things and digits, a sixth of them woven slices:
    what an autoencoder is trained on -> images.Images. Without captions; the classes are those of GROUPS."""
    drawn = load(split, size, n - n // 6, DRAWN, seed=seed, workers=workers, pairs="all")
    slices = cut(split, size, n // 6, seed=seed, workers=workers, specimens=specimens)
    return images.Images(torch.cat([drawn.pixels, slices.pixels]),
                         torch.cat([drawn.labels, slices.labels + len(drawn.classes)]), drawn.classes + slices.classes)


def _specimen(job):
    """The grey volume of a job of `woven`, without its labels."""
    return weave.specimen(*job)[0]


def _map(function, jobs, workers, chunk):
    """[function(job) for job in jobs], by `workers` processes."""
    if workers == 1:
        return list(map(function, jobs))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(function, jobs, chunksize=chunk)
