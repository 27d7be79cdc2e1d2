"""Prompts for models of the drawn worlds, and real pictures that match them. Their seeds occur in no data set."""

import itertools

import torch

from nanodiff import worlds
from nanodiff.data import captions
from nanodiff.errors import UserError
from nanodiff.worlds import textures

APART = 1_000_000  # seeds between the held-out pictures of a split and the scenes of prompts


def scenes(n, names=worlds.BASE, pairs="met", seed=0, split="test", all_named=False):
    """n textures.Scenes of every class, a list of n x len(names) with the classes in turn.

    Each class has its own sequence: other names do not change it.

    pairs      "met" or "unmet": colours that occur with the class in training, or colours that do not
    all_named  only scenes whose caption names both colours

    UserError for n below 1, and for arguments that worlds or textures.scene refuse.
    """
    if n < 1 or not names:
        raise UserError(f"{n} prompts of each of {len(names)} classes cannot be made; expected at least one of each")
    first, by_class = worlds.first_seed(split, seed) + APART, []
    for name in names:
        candidates = (textures.scene(number, name, split, pairs=pairs) for number in itertools.count(first))
        if all_named:
            candidates = (scene for scene in candidates if None not in captions.named_colours(scene))
        by_class.append(list(itertools.islice(candidates, n)))
    return [scene for row in zip(*by_class) for scene in row]


def prompts(n, names=worlds.BASE, pairs="met", seed=0, split="test", all_named=False):
    """[(caption, class, colours)] of `scenes`; colours: (figure, ground), each None unless the caption names it."""
    return [prompt(scene) for scene in scenes(n, names, pairs, seed, split, all_named)]


def prompt(scene):
    """(caption, class, colours) of a Scene; colours: (figure, ground), each None unless the caption names it."""
    return captions.caption(scene), scene.name, captions.named_colours(scene)


def paint(scenes, size):
    """Real pictures uint8 [n,3,size,size] of Scenes."""
    pictures = torch.stack([torch.from_numpy(textures.paint(scene, size)) for scene in scenes])  # [n,size,size,3]
    return pictures.permute(0, 3, 1, 2).contiguous()


def alike(scene, n):
    """n Scenes of the same class, colours and number of things. Their seeds occur in no data set and in no prompt."""
    return [textures.scene(scene.seed + APART + 1000 * i, scene.name, scene.split, scene.colours, scene.count)
            for i in range(n)]
