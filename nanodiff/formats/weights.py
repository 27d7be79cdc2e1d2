"""Reading and writing tensors and settings: safetensors, pickled checkpoints, JSON. Nothing in a file is executed.

Tensors of a safetensors file are memory-mapped: data that is never used is never loaded. Writing is whole or not at
all: a temporary file or folder in the same place, then a rename.
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

# Modules of the objects that training libraries store beside the weights; they are ignored.
IGNORED = ("pytorch_lightning.", "lightning.", "numpy.", "argparse.Namespace", "_codecs.encode")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # dtypes that users can name


def parse_dtype(dtype):
    """The torch.dtype of "float16" or torch.float16, None for None; UserError when it is not in FLOATS."""
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in FLOATS:
        raise UserError(f'dtype "{name}" is unknown; expected one of {", ".join(FLOATS)}{nearest(name, FLOATS)}')
    return FLOATS.get(name)


# --- reading --------------------------------------------------------------------------------------------------------

def read_weights(path):
    """{name: tensor} of a .safetensors file (mapped) or of a pickled .ckpt, .pt, .pth or .bin file.

    A checkpoint with more than weights gives the tensors of its "state_dict". UserError when the file is missing,
    broken, of another kind, or needs to run code.
    """
    path = str(path)
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    content = read_pickle(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    weights = {k: v for k, v in content.items() if torch.is_tensor(v)} if isinstance(content, dict) else {}
    if not weights:
        raise UserError(f"{path} holds no weights: expected a dictionary of tensors, or one under \"state_dict\"")
    return weights


def read_safetensors(path):
    """{name: tensor} of a safetensors file, all parts of one private mapping; UserError when the file is broken.

    Writing into a tensor copies its page and leaves the file unchanged. The system can reclaim pages without writes.
    One mapping for each tensor would keep a thousand files open.
    """
    header, start = _header(path)
    tensors = {}
    mapping = np.memmap(path, np.uint8, "c")
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f'{path}: "{name}" is of type {entry["dtype"]}; expected one of {", ".join(DTYPES)}')
        first, last = entry["data_offsets"]
        if first == last:
            tensors[name] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
            continue
        raw = mapping[start + first:start + last]
        tensors[name] = torch.from_numpy(raw).view(DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


def read_metadata(path):
    """The {name: text} metadata of a safetensors file; {} when it has none. UserError when the file is broken."""
    with _opened(path) as file:
        return file.metadata() or {}


def _opened(path):
    """The file opened by the safetensors library, which checks header, sizes and overlaps."""
    if not os.path.isfile(path):
        raise UserError(f"{path} cannot be read: expected the weights as safetensors")
    try:
        return safe_open(path, framework="numpy")
    except OSError:
        raise UserError(f"{path} cannot be read: expected the weights as safetensors") from None
    except SafetensorError as error:
        raise UserError(f"{path} is not a valid safetensors file: {error}") from None


def _header(path):
    """({name: dtype, shape, data_offsets}, offset of the data); UserError for a name that occurs twice."""
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
    """A stand-in for objects beside the weights of a checkpoint: it accepts any arguments and does nothing."""

    def __init__(self, *args, **kwargs):
        """Drop the arguments of the object."""

    def __setstate__(self, state):
        """Drop its state."""


def read_pickle(path):
    """The content of a file written by torch.save, by torch's restricted unpickler: tensors and plain containers alone.

    Objects of PyTorch Lightning, NumPy and argparse, which many checkpoints hold beside weights, become `Ignored`.
    UserError when the file is missing or broken, or needs to run anything else.
    """
    path = str(path)
    if not os.path.isfile(path):
        raise UserError(f"{path} cannot be read: expected a file of weights")
    try:
        zipped = zipfile.is_zipfile(path)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
        harmless = [(Ignored, name) for name in unknown if name.startswith(IGNORED)]
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that torch.save did not write
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a broken pickle can raise nearly anything
        needed = re.search(r"GLOBAL ([\w.]+)|<(?:built-in )?(?:function|class) '?([\w.]+)", str(error))
        if needed:
            raise UserError(f"{path} was refused: to load it would run {needed[1] or needed[2]}; expected tensors "
                            "alone, such as a .safetensors file") from None
        raise UserError(f"{path} is broken or no file of weights; expected tensors written by torch.save, or a "
                        ".safetensors file") from None


# --- into a network -------------------------------------------------------------------------------------------------

def load_strictly(net, weights, where, assign=False):
    """Copy weights (a dict) into net; UserError naming the first missing, left-over or misshapen one.

    assign: use the tensors themselves instead of copies, as a network on the "meta" device needs.
    """
    expected = net.state_dict()
    for problem, keys, candidates in (("missing", expected.keys() - weights.keys(), weights.keys() - expected.keys()),
                                  ("left over", weights.keys() - expected.keys(), expected.keys() - weights.keys())):
        if keys:
            raise UserError(f'{where}: {len(keys)} weights are {problem}, for example "{min(keys)}"'
                            + nearest(min(keys), candidates))
    for key, tensor in weights.items():
        if tensor.shape != expected[key].shape:
            raise UserError(f'{where}: "{key}" has shape {list(tensor.shape)}, expected {list(expected[key].shape)}')
        if expected[key].is_floating_point() and not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f'{where}: "{key}" holds {dtype}, expected floating point')
    net.load_state_dict(weights, assign=assign)


# --- writing --------------------------------------------------------------------------------------------------------

def write_folder(folder, settings, weights):
    """Write {name: JSON object} and {name: state dict} into folder, all or nothing.

    One rename creates a new folder. In an existing folder one rename replaces each file, the weights last.
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
    os.chmod(path, 0o644)  # the library makes files that only their owner may read
    _sync(path)


def _savable(tensors):
    """The same tensors in the form that safetensors needs: plain names, contiguous, none sharing memory."""
    savable, addresses = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        shares = tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in addresses
        addresses.add(tensor.data_ptr())
        savable[name.replace("_orig_mod.", "")] = tensor.clone() if shares else tensor
    return savable


def _sync(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
