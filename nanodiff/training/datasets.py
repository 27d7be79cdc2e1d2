"""The data set of any name: `load("mnist")`, `load("worlds")`, `load(FOLDER)`, `load(VOLUME)`; its held-out pictures.

What a data set is says nanodiff/data/__init__.py. Report: section 1.
"""

from pathlib import Path

from nanodiff import worlds
from nanodiff.data import cifar, dtd, folder, mnist
from nanodiff.data.images import Images, converted
from nanodiff.errors import UserError, nearest
from nanodiff.files import DATA
from nanodiff.tomography import slices

NAMED = ("mnist", "cifar10", "dtd", "worlds", "woven")  # all else is the path of a folder or a volume


def load(name, split="train", root=None, size=None, download=False, seed=0, **options):
    """The data set called by one of NAMED, the pictures of a folder, or the slices of a TIFF volume or of a folder that
    holds volumes. "worlds" and "woven" are drawn while one waits, see `worlds.py`.

    split     "train" or "test"; dtd, folders and drawn pictures have "val" too; a folder that is not split has only
              "train", while volumes are always split
    root      where the files of a named data set lie (default: the repository's data/ folder)
    size      pixels, one number or (height, width); None keeps the pictures' own size
    download  fetch cifar10 or dtd when it is not there
    seed      of the crops and flips (of the drawing, for drawn pictures)
    options   channels: 1 (grey) or 3 (colour); None keeps what the files hold
              flip: False, True (left-right, half of the draws) or "both" (upside down too); None is True for the training
              pictures of cifar10 and dtd, else False
              and the further arguments of `dtd.load`, `folder.load`, `slices.load`, `worlds.load` or `worlds.woven`

    UserError when the data is missing, broken or called otherwise.
    """
    if name == "mnist":
        return mnist.load(root or DATA / "mnist", split, size, seed=seed, **options)
    if name == "cifar10":
        return cifar.load(root or DATA / "cifar10", split, size, download=download, seed=seed, **options)
    if name == "dtd":
        return dtd.load(root or DATA / "dtd", split, size, download=download, seed=seed, **options)
    if name == "woven":
        return worlds.woven(split, size or 64, seed=seed, **options)
    if name == "worlds":
        channels, flip = options.pop("channels", None), options.pop("flip", None)
        drawn = worlds.load(split, size or 64, seed=seed, **options)
        return Images(converted(drawn.pixels, None, channels), drawn.labels, drawn.classes, drawn.captions, flip or False, seed)
    if is_volume(name, split) or "state" in options:  # a folder of slices is a volume when its state is told
        return slices.load(name, split, size, seed=seed, **options)
    if not Path(name).is_dir():
        parent = Path(name).parent
        beside = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        raise UserError(f"no data set or folder is called '{name}'; expected {', '.join(NAMED)} or the path"
                        f" of a folder of pictures or volumes{nearest(name, [*NAMED, *beside])}")
    return folder.load(name, split, size, seed=seed, **options)


def is_volume(name, split="train"):
    """Whether `name` is the path of a TIFF volume, or of a folder that holds volumes and not pictures."""
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
