"""Training pictures: everything arrives as float32 [B,C,H,W] in [-1, 1]. Report: section 1.

A data set is anything with `len(d)`, `d.shape` (C, H, W), `d.labels` (int64 [N] or None), `d.classes` (list of str),
`d.captions` (list of str or None), `d.in_memory` and `d.read(index, draw)`; where `d.draws` is False, read needs no
draw and is given None. Three classes have this shape:
`images.Images` (in memory), `folder.Folder` (files) and `slices.Slices` (volumes). `batches.Batches` makes the endless
stream of batches out of any of them.
"""

from pathlib import Path

import torch

from nanodiff.errors import UserError, nearest

NAMED = ("mnist", "cifar10", "dtd", "worlds", "woven")  # all else is the path of a folder or a volume
HOME = Path(__file__).resolve().parents[2] / "data"  # the repository's own data folder, wherever one stands


def load(name, split="train", root=None, size=None, channels=None, flip=None, download=False, seed=0, **options):
    """The data set called by one of NAMED, the pictures of a folder, or the slices of a TIFF volume or of a folder that
    holds volumes. "worlds" and "woven" are drawn while one waits, see `worlds.py`.

    split     "train" or "test"; dtd, folders and drawn pictures have "val" too; a folder that is not split has only
              "train", while volumes are always split
    root      where the files of a named data set lie (default: the repository's data/ folder)
    size      pixels, one number or (height, width); None keeps the pictures' own size
    channels  1 (grey) or 3 (colour); None keeps what the files hold
    flip      False, True (left-right, half of the draws) or "both" (upside down too);
              None is True for the training pictures of cifar10 and dtd, else False
    download  fetch cifar10 or dtd when it is not there
    seed      of the crops and flips (of the drawing, for drawn pictures); options: further arguments of
              `folder.Folder` (`dtd.load` adds `fold`), `slices.load`, `worlds.load` or `worlds.woven`

    UserError when the data is missing, broken or called otherwise.
    """
    if name == "mnist":
        from nanodiff.data import mnist
        return mnist.load(root or HOME / "mnist", split, size, channels, flip, seed, **options)
    if name == "cifar10":
        from nanodiff.data import cifar
        return cifar.load(root or HOME / "cifar10", split, size, channels, flip, download, seed, **options)
    if name == "dtd":
        from nanodiff.data import dtd
        return dtd.load(root or HOME / "dtd", split, size, channels, flip, download, seed, **options)
    if name in ("worlds", "woven"):
        from nanodiff.data import worlds
        draw = worlds.load if name == "worlds" else worlds.woven
        return draw(split, size or 64, channels=channels, flip=flip, seed=seed, **options)
    if is_volume(name, split) or "state" in options:  # a folder of slices is a volume when its state is told
        from nanodiff.data import slices
        return slices.load(name, split, size, channels, flip, seed, **options)
    if not Path(name).is_dir():
        parent = Path(name).parent
        beside = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        raise UserError(f"no data set or folder is called '{name}'; expected {', '.join(NAMED)} or the path"
                        f" of a folder of pictures or volumes{nearest(name, [*NAMED, *beside])}")
    from nanodiff.data import folder
    return folder.load(name, split, size, channels, flip, seed, **options)


def is_volume(name, split="train"):
    """Whether `name` is the path of a TIFF volume, or of a folder that holds volumes and not pictures."""
    from nanodiff.data import slices
    return name not in NAMED and Path(name).exists() and bool(slices.volume_files(name, split))


def held_out(name, training, root=None, **options):
    """(data set, its name) of pictures that are not trained on, in the shape of `training`, without flips.

    The test pictures, else those for validation; a folder without either gives its training pictures, and says so.
    UserError when the held-out pictures are broken, or have other classes.
    """
    options |= {"size": training.shape[1:], "channels": training.shape[0]}
    if is_volume(name, "test") or "state" in options:
        found = load(name, "test", root, flip=False, **options)
        if found.classes != training.classes:
            raise UserError(f"the test volumes of {name} have the classes {found.classes}, those for training "
                            f"{training.classes}: expected the same states in both")
        return found, "test slices"
    for split, folders in (("test", ("test",)), ("val", ("val", "valid", "validation"))):
        if name in NAMED or any((Path(name) / folder).is_dir() for folder in folders):
            found = load(name, split, root, flip=False, **options)
            if training.labels is not None and found.classes != training.classes:
                raise UserError(f"the {split} pictures of {name} have the classes {found.classes}, those for training "
                                f"{training.classes}: expected the same sub-folders in both")
            return found, f"{split} pictures"
    return load(name, "train", root, flip=False, **options), "training pictures, for want of a test or val folder,"


def both(name, root=None, size=None, download=False, seed=0):
    """(training pictures, held-out pictures, what these are called) as `load` and `held_out` find them, none flipped
    and without captions; the arguments are those of `load`."""
    options = {"root": root or None, "size": size or None}
    if name not in NAMED:
        options["captions"] = None
    training = load(name, "train", flip=False, download=download, seed=seed, **options)
    return training, *held_out(name, training, **options)


def spread(pictures, most):
    """The places int64 [n] of at most `most` pictures of a data set, evenly spread over it."""
    return torch.linspace(0, len(pictures) - 1, min(most, len(pictures))).round().long()
