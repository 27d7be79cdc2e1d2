"""Prompts for models of the drawn worlds, and real pictures of them: made of seeds that no training and no held-out
picture has.
"""

import itertools

import torch

from nanodiff import worlds
from nanodiff.data import captions
from nanodiff.errors import UserError
from nanodiff.worlds import textures

APART = 1_000_000  # seeds between the held-out pictures of a split and the scenes of prompts


def scenes(n, names=worlds.BASE, pairs="met", seed=0, split="test", all_named=False):
    """n textures.Scenes of every class, the classes in turn -> list of n x len(names). Each class has its own sequence.

    pairs      "met" or "unmet": the colours that training shows with a class, or those that it never does
    all_named  only scenes whose caption names both colours
    UserError for n below 1 or what worlds and textures.scene refuse.
    """
    if n < 1 or not names:
        raise UserError(f"{n} prompts of each of {len(names)} classes cannot be made; expected at least one of each")
    first, found = worlds.first_seed(split, seed) + APART, []
    for name in names:
        every = (textures.scene(number, name, split, pairs=pairs) for number in itertools.count(first))
        named = (scene for scene in every if not all_named or None not in captions.named_colours(scene))
        found.append(list(itertools.islice(named, n)))
    return [scene for row in zip(*found) for scene in row]


def prompts(n, names=worlds.BASE, pairs="met", seed=0, split="test", all_named=False):
    """[(caption, class, colours)] of `scenes`; colours: the (figure, ground) that the caption names, else None."""
    return [asked(scene) for scene in scenes(n, names, pairs, seed, split, all_named)]


def asked(scene):
    """(caption, class, colours) of a Scene; colours: the (figure, ground) that the caption names, else None."""
    return captions.caption(scene), scene.name, captions.named_colours(scene)


def paint(some, size):
    """Real pictures uint8 [n,3,size,size] of Scenes."""
    x = torch.stack([torch.from_numpy(textures.paint(scene, size)) for scene in some])  # [n,size,size,3]
    return x.permute(0, 3, 1, 2).contiguous()


def alike(scene, n):
    """n Scenes of the same class, colours and number of things, of seeds that no other picture has."""
    return [textures.scene(scene.seed + APART + 1000 * i, scene.name, scene.split, scene.colours, scene.count)
            for i in range(n)]
