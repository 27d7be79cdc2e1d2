"""Reading and writing LoRA files for Stable Diffusion 1.x and 2.x in all common namings.

A LoRA changes the weight W of a layer by alpha / rank * up @ down (Hu et al. 2021, arXiv 2106.09685, section 4.1).
A file holds `down`, `up` and perhaps `alpha` of each layer it changes; alpha defaults to the rank of the layer. Tools
differ in the names alone:

    diffusers            unet.mid_block.attentions.0.proj_in.lora_A.weight, text_encoder.text_model.[...].lora_B.weight:
                         A is down, B is up; the alphas are in the metadata
    peft                 base_model.model.[...].lora_A.weight; the alphas are in adapter_config.json beside the file
    older diffusers      unet.[...].attn1.to_q.lora.down.weight, text_encoder.[...].q_proj.lora_linear_layer.up.weight
    attention processor  unet.[...].attn1.processor.to_q_lora.down.weight, also without "unet."
    kohya                lora_unet_mid_block_attentions_0_proj_in.lora_down.weight, .alpha; lora_te_text_model_[...];
                         the U-Net's layers also by their names in the original code (input_blocks_1_1_[...])

Reading uses every key of a file, or fails and names the key.
"""

import difflib
import json
import math
import os
import re
from collections import Counter

import torch

from nanodiff.errors import UserError, nearest
from nanodiff.formats.compvis_names import UNET_RESNET
from nanodiff.files import read_json
from nanodiff.formats.weights import read_metadata, read_weights, write_weights
from nanodiff.models.lora import LoraPart, fitted, layers


# --- names ----------------------------------------------------------------------------------------------------------

# The end of a key: (naming, pattern, part of the layer).
ENDINGS = [
    ("diffusers", r"\.lora_A(\.[^.]+)?\.weight", "down"), ("diffusers", r"\.lora_B(\.[^.]+)?\.weight", "up"),
    ("kohya", r"\.lora_down\.weight", "down"), ("kohya", r"\.lora_up\.weight", "up"),
    ("kohya", r"\.lora_mid\.weight", "mid"),
    ("older diffusers", r"\.lora(_linear_layer)?\.down\.weight", "down"),
    ("older diffusers", r"\.lora(_linear_layer)?\.up\.weight", "up"),
    ("attention processor", r"_lora\.down\.weight", "down"), ("attention processor", r"_lora\.up\.weight", "up"),
]
ALPHA = r"(\.lora(_linear_layer)?|_lora)?(\.down\.weight)?\.(network_)?alpha"

# Adapters of other kinds or for other networks: (pattern, kind). Reading them as a LoRA would change their effect.
REFUSED = [
    (r"\.hada_", "a LoHa"), (r"\.lokr_", "a LoKr"), (r"\.oft_", "an OFT"),
    (r"dora_scale|lora_magnitude_vector", "a DoRA"), (r"lora_B.*\.bias$", "a LoRA with biases"),
    (r"\.diff(_b)?$", "whole differences of weights"),
    (r"^lora_te2_|^text_encoder_2\.", "a LoRA for SDXL"), (r"^transformer\.|^lora_transformer_", "a LoRA for a DiT"),
]

PREFIXES = [("lora_unet_", "unet"), ("lora_te_", "text_model"), ("lora_te1_", "text_model"), ("unet.", "unet"),
            ("text_encoder.", "text_model"), ("diffusion_model.", "unet")]
FILE_PREFIXES = {"unet": "unet.", "text_model": "text_encoder."}


def locate_layer(name):
    """(network, layer) of a layer's name in a file, which has dots or, from kohya's tools, underscores."""
    name = name.removeprefix("base_model.model.")
    network = "text_model" if re.match(r"(text_model\.)?encoder\.layers\.", name) else "unet"
    for prefix, prefix_network in PREFIXES:
        if name.startswith(prefix):
            name, network = name[len(prefix):], prefix_network
            break
    name = name.replace(".processor.", ".")
    if network == "text_model":
        name = re.sub(r"^text_model[._]", "", name)
        name = re.sub(r"(self_attn\.)to_(q|k|v|out)$", r"\1\2_proj", name)
    return network, re.sub(r"\.to_out$", ".to_out.0", name)


def original_name(path, blocks):
    """A U-Net layer's name in the original latent diffusion code; blocks: ResNet blocks per level on the way down."""
    step = blocks + 1  # that code numbers all levels consecutively and counts the downsampler as a block
    rules = [
        (r"conv_in$", lambda i, j: "input_blocks.0.0"),
        (r"conv_out$", lambda i, j: "out.2"),
        (r"time_embedding\.linear_(\d)$", lambda i, j: f"time_embed.{2 * i - 2}"),
        (r"down_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"input_blocks.{i * step + j + 1}.0"),
        (r"down_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j: f"input_blocks.{i * step + j + 1}.1"),
        (r"down_blocks\.(\d+)\.downsamplers\.0\.conv", lambda i, j: f"input_blocks.{(i + 1) * step}.0.op"),
        (r"mid_block\.resnets\.(\d+)", lambda i, j: f"middle_block.{2 * i}"),
        (r"mid_block\.attentions\.0", lambda i, j: "middle_block.1"),
        (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda i, j: f"output_blocks.{i * step + j}.0"),
        (r"up_blocks\.(\d+)\.attentions\.(\d+)", lambda i, j: f"output_blocks.{i * step + j}.1"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda i, j: f"output_blocks.{i * step + blocks}.2"),
    ]
    for pattern, name in rules:
        match = re.match(pattern, path)
        if match:
            i, j, *_ = [int(number) for number in match.groups()] + [0, 0]
            inner = path[match.end():].removeprefix(".")
            return f"{name(i, j)}.{UNET_RESNET.get(inner, inner)}".removesuffix(".")
    return path


def layer_names(net):
    """{name: path} of all names that files use for the layers of the network."""
    paths = list(layers(net))
    blocks = len({m[0] for m in (re.match(r"down_blocks\.0\.resnets\.\d+", path) for path in paths) if m})
    names = {path: path for path in paths}
    if blocks:
        names |= {original_name(path, blocks): path for path in paths}
        # an upsampler's number is one less where its level has no attention
        names |= {re.sub(r"^(output_blocks\.\d+)\.2\.conv$", r"\1.1.conv", name): path for name, path in names.items()}
    return names | {name.replace(".", "_"): path for name, path in names.items()}


# --- reading --------------------------------------------------------------------------------------------------------

def find_lora_file(path):
    """The path of a LoRA file: `path` itself, or the file that diffusers or peft write into such a folder."""
    path = os.fspath(path)
    if not os.path.isdir(path):
        return path
    names = [f"{stem}.{ending}" for ending in ("safetensors", "bin")
             for stem in ("pytorch_lora_weights", "adapter_model")]
    for name in names:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise UserError(f"{path} holds no LoRA, expected a file, or a folder with one of {', '.join(names)}")


def parse_lora(path):
    """(naming, {layer's name in the file: {"down", "up", "alpha"}}) of a LoRA file; needs no networks.

    path: .safetensors, or a pickled .bin or .pt, of which nothing is executed. naming: one or several of those at the
    top of this file, joined by " + ". alpha: a float, or None where the file has none (the rank is then meant). A
    convolution's "mid" of LyCORIS is multiplied into down. UserError for a key that is not a LoRA's, a layer without
    down or up, ranks that do not agree, a number that is not finite, and other kinds of adapter.
    """
    path = find_lora_file(path)
    layer_tensors, naming = {}, set()
    weights = read_weights(path)
    for key, tensor in weights.items():
        key = key.replace("_orig_mod.", "")
        for pattern, kind in REFUSED:
            if re.search(pattern, key):
                raise UserError(f'{path} holds {kind} ("{key}"), which is not supported: expected down and up matrices '
                                "for SD 1.x or 2.x")
        name, kind, part = split_key(key)
        if part is None:
            hint = nearest(key, [other for other in weights if split_key(other)[2]])
            raise UserError(f'{path}: "{key}" is not part of a LoRA, expected names that end like lora_A.weight, '
                            f"lora_down.weight or alpha{hint}")
        if part in layer_tensors.setdefault(name, {}):
            raise UserError(f'{path} holds {part} of "{name}" twice, the second time as "{key}"')
        if not tensor.is_floating_point() and part != "alpha" or not bool(torch.isfinite(tensor).all()):
            raise UserError(f'{path}: "{key}" must hold finite numbers of a floating-point type')
        layer_tensors[name][part] = tensor
        naming |= {kind} if kind else set()
    if not layer_tensors:
        raise UserError(f"{path} holds no LoRA: it is empty")
    settings = adapter_settings(path, layer_tensors)
    naming = {"peft"} if all(name.startswith("base_model.model.") for name in layer_tensors) else naming
    return " + ".join(sorted(naming)), {name: check_layer(f'{path}: "{name}"', name, tensors, settings)
                                        for name, tensors in sorted(layer_tensors.items())}


def split_key(key):
    """(layer's name, naming, part) of a LoRA file's key: part "down", "up", "mid" or "alpha"; None for other keys."""
    for naming, ending, part in ENDINGS:
        match = re.search(ending + "$", key)
        if match:
            return key[:match.start()], naming, part
    match = re.search(ALPHA + "$", key)
    return (key[:match.start()], None, "alpha") if match else (key, None, None)


def check_layer(where, name, tensors, settings):
    """{"down", "up", "alpha"} of one layer in a file; UserError unless they fit together."""
    for part, other in (("down", "up"), ("up", "down")):
        if part not in tensors:
            raise UserError(f"{where} has {' and '.join(sorted(tensors))} but no {part}: both down and up are needed")
    down, up = tensors["down"], tensors["up"]
    rank = len(down) if down.ndim >= 2 else 0
    if not rank or up.ndim < 2 or up.shape[1] != rank:
        raise UserError(f"{where}: down {list(down.shape)} and up {list(up.shape)} do not share one rank, expected "
                        "[rank, in, ...] and [out, rank, ...]")
    if "mid" in tensors:  # up(mid(down(x))): a kernel after a 1x1 kernel is one kernel
        mid = tensors["mid"].float()
        if mid.shape[:2] != (rank, rank) or mid.ndim != 4 or down[0, 0].numel() != 1:
            raise UserError(f"{where}: mid {list(mid.shape)} does not fit down {list(down.shape)}, "
                            f"expected [{rank}, {rank}, kh, kw] after a 1x1")
        down = torch.einsum("orhw,ri->oihw", mid, down.reshape(rank, -1).float())
    alpha = tensors.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise UserError(f"{where}: alpha must be one number, not {list(alpha.shape)}")
    alpha = float(alpha) if alpha is not None else alpha_from(settings, *locate_layer(name), rank, where)
    return {"down": down, "up": up, "alpha": alpha}


def adapter_settings(path, layer_tensors):
    """The adapter's settings, from diffusers' metadata or peft's JSON file beside the weights; {} without either."""
    metadata = read_metadata(path).get("lora_adapter_metadata") if path.endswith(".safetensors") else None
    if metadata:
        try:
            settings = json.loads(metadata)
        except ValueError:
            settings = None
        if not isinstance(settings, dict):
            raise UserError(f"{path}: the metadata's lora_adapter_metadata is not a JSON object")
        return settings
    folder = os.path.dirname(os.path.abspath(path))
    if all(name.startswith("base_model.model.") for name in layer_tensors) and os.path.isfile(
            os.path.join(folder, "adapter_config.json")):
        return read_json(folder, "adapter_config.json")
    return {}


def alpha_from(settings, network, layer, rank, where):
    """A layer's alpha by the settings of peft's LoraConfig (under "unet." or "text_encoder.", or plain), or None.

    A key of alpha_pattern is the path of a layer, or the end of it.
    """
    if any(key.endswith("use_dora") and value for key, value in settings.items()):
        raise UserError(f"{where}: the file's settings ask for DoRA (use_dora), expected plain LoRA")
    if any(key.startswith(tuple(FILE_PREFIXES.values())) for key in settings):
        prefix = FILE_PREFIXES[network]
        settings = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
    alpha = settings.get("lora_alpha")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        end = pattern.replace("\\.", ".").removeprefix("^").removeprefix("text_model.").removesuffix("$")
        if not re.fullmatch(r"[\w.]+", end):  # peft takes any regular expression; a malicious one could hang the reader
            raise UserError(f"{where}: the alpha_pattern {pattern!r} is not supported, expected the name of a layer")
        if layer == end or not pattern.startswith("^") and layer.endswith("." + end):
            alpha = value
            break
    if alpha is None:
        return None
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise UserError(f"{where}: the file's settings give alpha {alpha!r}, expected a number")
    return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1)  # rank-stabilised: alpha / sqrt(rank)


def read_lora(path, networks):
    """The LoRA in a file as a list of LoraPart, each fitted to its layer in networks.

    networks: {"unet": module, "text_model": module}, or one of the two. down and up keep the file's numbers and type
    and take the shape that LoraPart describes (some files hold linear layers as 1x1 convolutions, or the reverse).
    UserError when the file is broken (see parse_lora), when a layer is not in the networks, with the nearest names, or
    when a shape does not fit its layer: the LoRA is then for another base model.
    """
    path = find_lora_file(path)
    _, layer_tensors = parse_lora(path)
    names = {network: layer_names(net) for network, net in networks.items()}
    modules = {network: layers(net) for network, net in networks.items()}
    parts, unknown = {}, []
    for name, tensors in layer_tensors.items():
        network, layer = locate_layer(name)
        if layer not in names.get(network, {}):
            unknown.append((name, network, layer))
            continue
        layer = names[network][layer]
        if (network, layer) in parts:
            raise UserError(f'{path} changes "{layer}" twice, the second time as "{name}"')
        alpha = len(tensors["down"]) if tensors["alpha"] is None else tensors["alpha"]
        part = LoraPart(network, layer, tensors["down"], tensors["up"], float(alpha))
        part.down, part.up = fitted(part, modules[network][layer], path)
        parts[network, layer] = part
    if unknown:
        name, network, layer = unknown[0]
        similar = difflib.get_close_matches(layer, names.get(network, {}), 3, 0.4)
        similar = sorted({names[network][other] for other in similar})
        raise UserError(f"{path}: {len(unknown)} of its {len(layer_tensors)} layers are not in the model, for example "
                        f'"{name}"'
                        + (f" (nearest: {', '.join(similar)})" if similar else f" (there is no {network} to look in)"
                           if network not in names else "") + "; was it made for another base model?")
    return list(parts.values())


# --- writing --------------------------------------------------------------------------------------------------------

def write_lora(path, parts, names="diffusers", metadata=None):
    """Write a list of LoraPart as one safetensors file, whole or not at all; dtypes stay the same.

    names: "diffusers" writes current diffusers names, with the alphas in the metadata (lora_adapter_metadata). "kohya"
    writes kohya's names, with an alpha beside each layer; diffusers reads those too, but gives all attention layers the
    most common alpha. metadata: more {name: text} for the file. UserError for other names, no parts, a layer twice, or
    a number that is not finite.
    """
    if names not in ("diffusers", "kohya"):
        raise UserError(f'LoRA names "{names}" are unknown: expected diffusers or kohya'
                        + nearest(names, ["diffusers", "kohya"]))
    if not parts:
        raise UserError(f"{path}: there is nothing to write, the LoRA changes no layer")
    tensors = {}
    for part in parts:
        if part.network not in FILE_PREFIXES:
            raise UserError(f'{path}: network "{part.network}" is unknown, expected {" or ".join(FILE_PREFIXES)}')
        if not all(bool(torch.isfinite(torch.as_tensor(x)).all()) for x in (part.down, part.up, part.alpha)):
            raise UserError(f'{path}: "{part.layer}" has numbers that are not finite, nothing was written')
        layer = ("text_model." if part.network == "text_model" else "") + part.layer.replace("_orig_mod.", "")
        if names == "kohya":
            name = ("lora_te_" if part.network == "text_model" else "lora_unet_") + layer.replace(".", "_")
            layer_tensors = {f"{name}.lora_down.weight": part.down, f"{name}.lora_up.weight": part.up,
                             f"{name}.alpha": torch.tensor(float(part.alpha))}
        else:
            name = FILE_PREFIXES[part.network] + layer
            layer_tensors = {f"{name}.lora_A.weight": part.down, f"{name}.lora_B.weight": part.up}
        if layer_tensors.keys() & tensors.keys():
            raise UserError(f'{path}: the LoRA changes "{part.layer}" twice')
        tensors |= layer_tensors
    metadata = dict(metadata or {})
    if names == "diffusers":
        metadata["lora_adapter_metadata"] = json.dumps(diffusers_settings(parts), sort_keys=True)
    write_weights(path, tensors, metadata)


def diffusers_settings(parts):
    """The metadata that diffusers writes: peft's LoraConfig of each network, keys prefixed by the network's name.

    The most common rank and alpha hold for all layers; the patterns name the layers that differ. A U-Net's pattern is
    anchored at the start of the path. A text encoder's is not: its path has "text_model." in some releases only.
    """
    settings = {}
    for network, prefix in FILE_PREFIXES.items():
        parts_by_layer = {part.layer.replace("_orig_mod.", ""): part for part in parts if part.network == network}
        if not parts_by_layer:
            continue
        settings |= {f"{prefix}peft_type": "LORA", f"{prefix}target_modules": sorted(parts_by_layer)}
        for key, pattern, values in (
            ("r", "rank_pattern", {layer: len(part.down) for layer, part in parts_by_layer.items()}),
            ("lora_alpha", "alpha_pattern", {layer: float(part.alpha) for layer, part in parts_by_layer.items()}),
        ):
            most_common = Counter(values.values()).most_common(1)[0][0]
            anchor = "^" if network == "unet" else ""
            settings[prefix + key] = most_common
            settings[prefix + pattern] = {anchor + layer: value for layer, value in values.items()
                                          if value != most_common}
    return settings
