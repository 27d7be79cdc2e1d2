"""Small files: reading names a broken one in its error, writing is whole or not at all."""

import json
import os
from pathlib import Path

from nanodiff.errors import UserError, nearest

DATA = Path(__file__).resolve().parents[1] / "data"  # the repository's data folder


def write_text(path, text):
    """Write a text file, whole or not at all."""
    temporary = Path(f"{path}.writing")
    temporary.write_text(text)
    os.replace(temporary, path)


def read_json(folder, name):
    """The JSON object in file `name` of a model folder; UserError when the file is missing or holds no JSON object."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
    except OSError:
        raise UserError(f"{path} cannot be read: expected a model folder with a {name}") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(settings).__name__}")
    return settings


def nearest_file(path):
    """', nearest: NAME' for the file in the folder of `path` whose name is closest to it, or '' when none is close."""
    folder, name = os.path.split(path)
    return nearest(name, os.listdir(folder or ".")) if os.path.isdir(folder or ".") else ""
