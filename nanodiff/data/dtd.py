"""The Describable Textures Dataset (Cimpoi et al. 2014, arXiv 1311.3618) from its official tree. Report: section 1."""

from pathlib import Path

from nanodiff.data.captions import texture_caption
from nanodiff.data.download import fetch, unpack
from nanodiff.data.folder import Folder
from nanodiff.errors import UserError, nearest

URL = "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz"
MD5 = "fff73e5086ae6bdbea199a49dfb8a4c1"


def load(root, split="train", size=None, fold=1, captions="dtd", without=(), **options):
    """The train, val or test pictures of an official fold 1..10, 47 classes -> folder.Folder.

    root      contains images/<class>/*.jpg and labels/train1.txt ..., or a folder dtd with them
    captions  "dtd": "dtd_<class>", as in the report; "grammar": sentences in the style of the drawn scenes, to train on
              both (`captions.texture_caption`, chosen by seed and picture)
    without   classes to leave out, such as textures.NEW (zigzagged, woven), which the drawn base world reserves
    options   download (fetch the archive when it is missing), flip (None: the training pictures), and the other
              arguments of `folder.Folder`

    Training pictures are cropped at random places of the full resolution and flipped left-right; the others are
    cropped at their centre. UserError when the tree is incomplete.
    """
    if split not in ("train", "val", "test") or fold not in range(1, 11):
        raise UserError(f"dtd has no split '{split}' of fold {fold}: give train, val or test and a fold from 1 to 10")
    if captions not in ("dtd", "grammar"):
        raise UserError(f"captions is {captions!r}; expected 'dtd' or 'grammar'{nearest(captions, ['grammar'])}")
    root = Path(root)
    folders = (root, root / "dtd")
    tree = next((path for path in folders if (path / "images").is_dir() and (path / "labels").is_dir()), None)
    if options.pop("download", False) and tree is None:
        unpack(fetch(URL, root / Path(URL).name, MD5), root, "dtd")
        tree = root / "dtd"
    if tree is None:
        raise UserError(f"{root} has no folders images and labels of the Describable Textures Dataset: get it with"
                        " --download")
    classes = [folder.name for folder in (tree / "images").iterdir() if folder.is_dir()]
    if len(classes) != 47:
        raise UserError(f"{tree / 'images'} has {len(classes)} folders where the 47 classes of dtd are expected")
    listing = tree / "labels" / f"{split}{fold}.txt"
    if not listing.is_file():
        raise UserError(f"{listing} is missing: it lists the {split} pictures of fold {fold}")
    for name in without:
        if name not in classes:
            raise UserError(f"dtd has no class '{name}' to leave out{nearest(name, classes)}")
    files = sorted(file for file in listing.read_text().split() if file.split("/")[0] not in without)
    missing = [file for file in files if not (tree / "images" / file).is_file()]
    if missing or not files:
        raise UserError(f"{len(missing)} of the {len(files)} pictures that {listing} lists are missing"
                        f" ({', '.join(missing[:1])}): unpack the archive again")
    options.setdefault("crop", "random" if split == "train" else "centre")
    options.setdefault("resize", False)
    if options.get("flip") is None:
        options["flip"] = split == "train"
    names = [file.split("/")[0] for file in files]
    if captions == "grammar":
        texts = [texture_caption(options.get("seed", 0) + i, name) for i, name in enumerate(names)]
    else:
        texts = ["dtd_" + name for name in names]
    return Folder(tree / "images", size, captions=texts, files=files, **options)
