"""Folders of this package's own small networks: config.json says which network and what sizes, model.safetensors holds
the weights.

    save_model(net, "runs/vae-001/model")
    net = load_model("runs/vae-001", VAE, VAEConfig)
"""

import dataclasses
import os

from nanodiff.errors import UserError
from nanodiff.files import read_json
from nanodiff.formats.weights import load_strictly, read_safetensors, write_folder

WEIGHTS = "model.safetensors"


def save_model(net, folder):
    """Write a network, whose sizes are the dataclass `net.config`, as a folder: whole or not at all."""
    settings = {"model": type(net).__name__, **dataclasses.asdict(net.config)}
    write_folder(folder, {"config.json": settings}, {WEIGHTS: net.state_dict()})


def load_model(folder, network, config):
    """The `network` (a class that is made from an object of the dataclass `config`) in a folder, or in the model/ of a
    run's folder; in eval mode and frozen.

    UserError, with the folder's name, when it holds another network, sizes that this network does not know, a missing,
    left-over or misshapen weight, or no model at all.
    """
    inside = os.path.join(folder, "model")
    folder = inside if os.path.isfile(os.path.join(inside, "config.json")) else folder
    settings = read_json(folder, "config.json")
    held = settings.pop("model", None)
    if held != network.__name__:
        found = f"a {held}" if held else "no model of this kind"
        raise UserError(f"{folder} holds {found}; expected a {network.__name__}")
    known = {field.name for field in dataclasses.fields(config)}
    if set(settings) != known:
        raise UserError(f"{folder}: config.json differs in {', '.join(sorted(set(settings) ^ known))} from a "
                        f"{network.__name__}'s sizes, which are {', '.join(sorted(known))}")
    try:
        net = network(config(**settings))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (TypeError, ValueError, RuntimeError) as error:  # a text where a number belongs, and the like
        raise UserError(f"{folder}: config.json holds no sizes of a {network.__name__} ({error})") from None
    file = os.path.join(folder, WEIGHTS)
    load_strictly(net, read_safetensors(file), file)
    return net.eval().requires_grad_(False)
