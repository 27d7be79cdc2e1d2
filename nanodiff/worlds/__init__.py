"""The drawn worlds as data sets: textures, things and digits with captions, and slices of drawn woven specimens.

A picture is a function of its number, the seed and the split. The seeds of the three splits do not overlap: each split
has its own scenes and its own woven specimens, and the "test" digits are MNIST's test digits. The data sets replace
those of the report's section 1.
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
BASE = (*textures.TEXTURES, *textures.THINGS, *textures.DIGITS)  # classes of the base model
DRAWN = (*BASE, *textures.NEW)
WOVEN = CLASSES
GROUPS = {"textures": (*textures.TEXTURES, *textures.NEW), "things": textures.THINGS, "digits": textures.DIGITS,
          "woven": WOVEN}  # all classes


def first_seed(split, seed):
    """The first seed of a split; UserError for an unknown split."""
    if split not in SPLITS:
        raise UserError(f"drawn worlds have no split '{split}': expected {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    return SPLITS[split] + seed * 10_000_000


def chosen(text, choices=DRAWN, default=BASE):
    """The classes in the value of --names, separated by commas; `default` for "". UserError for an unknown class."""
    names = tuple(text.split(",")) if text else default
    for name in names:
        if name not in choices:
            raise UserError(f'--names holds "{name}"; expected some of {", ".join(choices)}{nearest(name, choices)}')
    return names


def load(split="train", size=64, n=None, names=BASE, seed=0, workers=1, **options):
    """n drawn pictures in memory, the classes `names` in turn -> images.Images with captions and `.scenes` [n].

    size      pixels of a side
    n         default: 20,000 for training, about a minute; 2,000 of another split
    names     classes, some of worlds.DRAWN (default: those of the base model)
    workers   processes that draw; the pictures do not depend on their number
    options   of textures.scene, such as pairs="all", which adds pairs of class and colour that training never shows

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
    jobs = [(first + i, names[i % len(names)], size, split, options) for i in range(n)]
    scenes, pictures = zip(*_map_parallel(_draw_scene, jobs, workers, 64))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    data = images.Images(pixels, labels, names, [captions.caption(scene) for scene in scenes])
    data.scenes = list(scenes)
    return data


def _draw_scene(job):
    """(Scene, picture uint8 [H,W,3]) of a job of `load`."""
    seed, name, size, split, options = job
    scene = textures.scene(seed, name, split, **options)
    return scene, textures.paint(scene, size)


def woven(split="train", size=64, specimens=2, scale=0.25, seed=0, workers=1, **options):
    """Slices of drawn specimens of every state, in the nine woven classes -> slices.Slices.

    specimens   number of each state
    scale       sides relative to the report's volumes
    options     of slices.Slices, such as channels, axes or fit (default here: "resize", which shows the whole depth)

    UserError for another split or no specimen.
    """
    first = first_seed(split, seed)
    if specimens < 1:
        raise UserError(f"{specimens} specimens cannot be cut into slices; expected at least one")
    jobs = [(first + i, state, tuple(round(scale * side) for side in weave.SHAPES[state]))
            for i in range(specimens) for state in weave.STATES]
    volumes = [Volume.of(volume, state, name=f"{state}-{number}")
               for volume, (number, state, _) in zip(_map_parallel(_draw_specimen, jobs, workers, 1), jobs)]
    options.setdefault("fit", "resize")
    return Slices(volumes, size, seed=seed, **options)


def cut(split="train", size=64, n=450, names=WOVEN, seed=0, workers=1, **options):
    """n random slices of drawn specimens in memory, the classes `names` in turn -> images.Images.

    The captions are the report's ("sf_dry sf_warp"). A class that is named twice occurs twice as often. options are
    those of `woven`, with channels=3 by default.
    """
    slices = woven(split, size, seed=seed, workers=workers, **{"channels": 3, **options})
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.tensor([slices.classes.index(name) for name in names])
    labels, pixels = numbers[torch.arange(n) % len(names)], torch.empty(n, *slices.shape, dtype=torch.uint8)
    captions = [slices.captions[slices.labels.tolist().index(number)] for number in range(len(slices.classes))]
    for number in labels.unique().tolist():
        members = (slices.labels == number).nonzero().flatten()  # slices of the class
        rows = (labels == number).nonzero().flatten()  # its rows in the new data set
        index = members[torch.randint(len(members), (len(rows),), generator=generator)]
        draws = torch.randint(2**40, (len(rows),), generator=generator)
        pixels[rows] = to_uint8(slices.read(index, draws))
    return images.Images(pixels, labels, slices.classes, [captions[number] for number in labels.tolist()])


def everything(split="train", size=64, n=20_000, specimens=4, seed=0, workers=1):
    """n pictures of all classes of GROUPS in memory, a sixth of them woven slices, without captions -> images.Images.

    Autoencoders are trained on them.
    """
    drawn = load(split, size, n - n // 6, DRAWN, seed=seed, workers=workers, pairs="all")
    slices = cut(split, size, n // 6, seed=seed, workers=workers, specimens=specimens)
    return images.Images(torch.cat([drawn.pixels, slices.pixels]),
                         torch.cat([drawn.labels, slices.labels + len(drawn.classes)]), drawn.classes + slices.classes)


def _draw_specimen(job):
    """The grey volume of a job of `woven`, without its labels."""
    return weave.specimen(*job)[0]


def _map_parallel(function, jobs, workers, chunk):
    """[function(job) for job in jobs], computed by `workers` processes."""
    if workers == 1:
        return list(map(function, jobs))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return pool.map(function, jobs, chunksize=chunk)
