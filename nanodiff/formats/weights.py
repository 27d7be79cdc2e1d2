"""Files of tensors and of settings, in and out: safetensors, pickled checkpoints, JSON. Nothing in a file is executed.

Tensors of a safetensors file are mapped, not read: each is a view of the file of its own, and what is never used is
never loaded. Writing is whole or not at all: a temporary file or folder in the same place, then a rename.
"""

import json
import os
import re
import shutil
import tempfile
import warnings
import zipfile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanodiff.errors import UserError, nearest

# Where the objects come from that stand beside the weights in training libraries' checkpoints.
BESIDE = ("pytorch_lightning.", "lightning.", "numpy.", "argparse.Namespace", "_codecs.encode")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # what a user can ask for


def dtype_named(dtype):
    """The torch.dtype of "float16" or torch.float16, None of None; UserError for one that is not in FLOATS."""
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in FLOATS:
        raise UserError(f'dtype "{name}" is unknown; expected one of {", ".join(FLOATS)}{nearest(name, FLOATS)}')
    return FLOATS.get(name)


# --- reading --------------------------------------------------------------------------------------------------------

def read_weights(path):
    """{name: tensor} of a .safetensors file (mapped) or of a pickled .ckpt, .pt, .pth or .bin file.

    Of a checkpoint that holds more than weights, "state_dict" is taken, and of it the tensors. UserError when the file
    is missing, broken, of another kind, or would have to run code.
    """
    path = str(path)
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    held = read_pickle(path)
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    weights = {k: v for k, v in held.items() if torch.is_tensor(v)} if isinstance(held, dict) else {}
    if not weights:
        raise UserError(f"{path} holds no weights: expected a dictionary of tensors, or one under \"state_dict\"")
    return weights


def read_safetensors(path):
    """{name: tensor} of a safetensors file, all of them parts of one private mapping; UserError when it is broken.

    A private mapping: writing into a tensor copies its page and leaves the file as it is; pages that nobody wrote to cost
    no memory that the system could not take back. (A mapping for each tensor would keep a thousand files open.)
    """
    header, start = _header(path)
    tensors = {}
    whole = np.memmap(path, np.uint8, "c")
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f'{path}: "{name}" is of type {entry["dtype"]}; expected one of {", ".join(DTYPES)}')
        first, last = entry["data_offsets"]
        if first == last:
            tensors[name] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
            continue
        raw = whole[start + first:start + last]
        tensors[name] = torch.from_numpy(raw).view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def read_metadata(path):
    """The {name: text} metadata of a safetensors file; {} when it has none. UserError when the file is broken."""
    with _opened(path) as file:
        return file.metadata() or {}


def _opened(path):
    """The file through the safetensors library, which checks header, sizes and overlaps."""
    if not os.path.isfile(path):
        raise UserError(f"{path} cannot be read: expected the weights as safetensors")
    try:
        return safe_open(path, framework="numpy")
    except OSError:
        raise UserError(f"{path} cannot be read: expected the weights as safetensors") from None
    except SafetensorError as error:
        raise UserError(f"{path} is not a valid safetensors file: {error}") from None


def _header(path):
    """({name: dtype, shape, data_offsets}, where the data starts); of two tensors under one name a loader keeps either."""
    with _opened(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        names = []

        def unique(pairs):
            names.append([name for name, _ in pairs])
            return dict(pairs)

        header = json.loads(file.read(length), object_pairs_hook=unique)
    if len(names[-1]) != len(set(names[-1])):
        raise UserError(f"{path} is not a valid safetensors file: a name occurs twice")
    header.pop("__metadata__", None)
    return header, 8 + length


class Ignored:
    """Stands for an object beside the weights of a checkpoint that is not wanted: takes what it is given, does nothing."""

    def __init__(self, *args, **kwargs):
        """Whatever the object was made from is dropped."""

    def __setstate__(self, state):
        """So is its state."""


def read_pickle(path):
    """What a file written by torch.save holds, by torch's restricted reader: tensors and plain containers alone.

    Objects of PyTorch Lightning, NumPy and argparse, which many checkpoints carry beside their weights, become `Ignored`.
    UserError when the file is missing or broken, or names anything else that would have to be run.
    """
    path = str(path)
    if not os.path.isfile(path):
        raise UserError(f"{path} cannot be read: expected a file of weights")
    try:
        zipped = zipfile.is_zipfile(path)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        harmless = [(Ignored, name) for name in unknown if name.startswith(BESIDE)]
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch.save did not write
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a broken pickle can raise nearly anything
        asked = re.search(r"GLOBAL ([\w.]+)|<(?:built-in )?(?:function|class) '?([\w.]+)", str(error))
        if asked:
            raise UserError(f"{path} was refused: to load it would run {asked[1] or asked[2]}; expected tensors alone, "
                            "such as a .safetensors file") from None
        raise UserError(f"{path} is broken or no file of weights; expected tensors written by torch.save, or a "
                        ".safetensors file") from None


# --- into a network -------------------------------------------------------------------------------------------------

def load_strictly(net, weights, where, assign=False):
    """Copy weights (a dict) into net; UserError naming the first missing, left-over or misshapen one.

    assign: take the tensors themselves instead of copying them, as a network made on the "meta" device must.
    """
    own = net.state_dict()
    for problem, keys, others in (("missing", own.keys() - weights.keys(), weights.keys() - own.keys()),
                                  ("left over", weights.keys() - own.keys(), own.keys() - weights.keys())):
        if keys:
            raise UserError(f'{where}: {len(keys)} weights are {problem}, for example "{min(keys)}"'
                            + nearest(min(keys), others))
    for key, tensor in weights.items():
        if tensor.shape != own[key].shape:
            raise UserError(f'{where}: "{key}" has shape {list(tensor.shape)}, expected {list(own[key].shape)}')
        if own[key].is_floating_point() and not tensor.is_floating_point():
            raise UserError(f'{where}: "{key}" holds {str(tensor.dtype).removeprefix("torch.")}, expected floating point')
    net.load_state_dict(weights, assign=assign)


# --- writing --------------------------------------------------------------------------------------------------------

def write_folder(folder, settings, weights):
    """Write {name: JSON object} and {name: state dict} into folder, all or nothing.

    A new folder appears by one rename; in an existing one each file is replaced by one, the weights last.
    """
    folder = os.path.abspath(folder)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=os.path.basename(folder) + ".", suffix=".tmp", dir=os.path.dirname(folder))
    try:
        os.chmod(temporary, 0o755)
        for name, content in settings.items():
            with open(os.path.join(temporary, name), "w", encoding="utf-8") as file:
                json.dump(content, file, indent=2, sort_keys=True)
                file.write("\n")
        for name, tensors in weights.items():
            _save(tensors, os.path.join(temporary, name), {})
        for name in settings:
            _sync(os.path.join(temporary, name))
        if not os.path.isdir(folder):
            os.replace(temporary, folder)
        else:
            for name in [*settings, *weights]:
                os.replace(os.path.join(temporary, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_weights(path, tensors, metadata=None):
    """Write {name: tensor} as one safetensors file with {name: text} metadata, whole or not at all."""
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.writing"
    try:
        _save(tensors, temporary, metadata or {})
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _save(tensors, path, metadata):
    save_file(_savable(tensors), path, metadata={"format": "pt", **metadata})
    os.chmod(path, 0o644)  # the library makes files that nobody else may read
    _sync(path)


def _savable(tensors):
    """The same tensors as safetensors wants them: plain names, each owning its memory, in the standard order."""
    savable, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        shares = tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in seen
        seen.add(tensor.data_ptr())
        savable[name.replace("_orig_mod.", "")] = tensor.clone() if shares else tensor
    return savable


def _sync(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
