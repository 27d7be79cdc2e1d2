"""Data sets by name: `load("mnist")`, `load("worlds")`, `load(FOLDER)`, `load(VOLUME)`; their held-out pictures.

nanodiff/data/__init__.py defines what a data set is. Report: section 1.
"""

from pathlib import Path

from nanodiff import worlds
from nanodiff.data import cifar, dtd, folder, mnist
from nanodiff.data.images import Images, convert
from nanodiff.errors import UserError, nearest
from nanodiff.files import DATA
from nanodiff.tomography import slices

NAMED = ("mnist", "cifar10", "dtd", "worlds", "woven")  # any other name is the path of a folder or a volume


def load(name, split="train", root=None, size=None, download=False, seed=0, **options):
    """The data set of a name in NAMED, the pictures of a folder, or the slices of TIFF volumes (a file or a folder).

    "worlds" and "woven" are drawn on the spot, see nanodiff/worlds.
    split     "train" or "test"; dtd, folders and drawn pictures also have "val". A folder without split sub-folders has
              "train" alone; volumes are always split
    root      folder of a named data set's files (default: in the repository's data/)
    size      pixels, one number or (height, width); None keeps the size of the files
    download  fetch cifar10 or dtd when it is missing
    seed      of crops and flips; of the drawing, for drawn pictures
    options   channels: 1 (grey) or 3 (colour); None keeps those of the files
              flip: False, True (left-right, half of the draws) or "both" (also upside down); None is True for the
              training pictures of cifar10 and dtd, else False
              and further arguments of `dtd.load`, `folder.load`, `slices.load`, `worlds.load` or `worlds.woven`

    UserError when the data is missing or broken, or the name unknown.
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
        data = worlds.load(split, size or 64, seed=seed, **options)
        pixels = convert(data.pixels, None, channels)
        return Images(pixels, data.labels, data.classes, data.captions, flip or False, seed)
    if is_volume(name, split) or "state" in options:  # a folder of slices is a volume when its state is told
        return slices.load(name, split, size, seed=seed, **options)
    if not Path(name).is_dir():
        parent = Path(name).parent
        beside = [str(p) for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
        raise UserError(f"no data set or folder is called '{name}'; expected {', '.join(NAMED)} or the path"
                        f" of a folder of pictures or volumes{nearest(name, [*NAMED, *beside])}")
    return folder.load(name, split, size, seed=seed, **options)


def is_volume(name, split="train"):
    """Whether `name` is the path of a TIFF volume, or of a folder of volumes rather than pictures."""
    return name not in NAMED and Path(name).exists() and bool(slices.volume_files(name, split))


def load_held_out(name, training, root=None, **options):
    """(data set, its name in a sentence) of held-out pictures in the shape of `training`, without flips.

    The test pictures, else those for validation. A folder without either gives its training pictures, with a name that
    says so. UserError when the held-out pictures are broken or have other classes.
    """
    options |= {"size": training.shape[1:], "channels": training.shape[0]}
    if is_volume(name, "test") or "state" in options:
        data = load(name, "test", root, flip=False, **options)
        if data.classes != training.classes:
            raise UserError(f"the test volumes of {name} have the classes {data.classes}, those for training "
                            f"{training.classes}: expected the same states in both")
        return data, "test slices"
    for split, folders in (("test", ("test",)), ("val", ("val", "valid", "validation"))):
        if name in NAMED or any((Path(name) / folder).is_dir() for folder in folders):
            data = load(name, split, root, flip=False, **options)
            if training.labels is not None and data.classes != training.classes:
                raise UserError(f"the {split} pictures of {name} have the classes {data.classes}, those for training "
                                f"{training.classes}: expected the same sub-folders in both")
            return data, f"{split} pictures"
    return load(name, "train", root, flip=False, **options), "training pictures, for want of a test or val folder,"


def load_splits(name, root=None, size=None, download=False, seed=0):
    """(training pictures, held-out pictures, their name), without flips and captions; arguments as in `load`."""
    options = {"root": root or None, "size": size or None}
    if name not in NAMED:
        options["captions"] = None
    training = load(name, "train", flip=False, download=download, seed=seed, **options)
    return training, *load_held_out(name, training, **options)
