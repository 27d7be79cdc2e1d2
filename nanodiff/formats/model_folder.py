"""Folders of this package's small networks: config.json (network and sizes) and model.safetensors (weights).

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
    """Write a network as a folder, whole or not at all; its sizes are the dataclass `net.config`."""
    settings = {"model": type(net).__name__, **dataclasses.asdict(net.config)}
    write_folder(folder, {"config.json": settings}, {WEIGHTS: net.state_dict()})


def load_model(folder, network, config):
    """The network in a folder, or in the model/ of a run's folder; in eval mode and frozen.

    network   its class, constructed from an object of the dataclass `config`
    UserError, with the folder's name, for another network or none, for unknown sizes, and for a missing, left-over or
    misshapen weight.
    """
    inner = os.path.join(folder, "model")
    folder = inner if os.path.isfile(os.path.join(inner, "config.json")) else folder
    settings = read_json(folder, "config.json")
    model = settings.pop("model", None)
    if model != network.__name__:
        description = f"a {model}" if model else "no model of this kind"
        raise UserError(f"{folder} holds {description}; expected a {network.__name__}")
    fields = {field.name for field in dataclasses.fields(config)}
    if set(settings) != fields:
        raise UserError(f"{folder}: config.json differs in {', '.join(sorted(set(settings) ^ fields))} from a "
                        f"{network.__name__}'s sizes, which are {', '.join(sorted(fields))}")
    try:
        net = network(config(**settings))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (TypeError, ValueError, RuntimeError) as error:  # a text where a number belongs, and the like
        raise UserError(f"{folder}: config.json holds no sizes of a {network.__name__} ({error})") from None
    file = os.path.join(folder, WEIGHTS)
    load_strictly(net, read_safetensors(file), file)
    return net.eval().requires_grad_(False)
