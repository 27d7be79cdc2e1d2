"""LoRA: a few low-rank changes of a frozen network that can be trained, scaled, added to others, merged and taken away.

What one layer computes is in lora_layer.py; here layers are found, and given adapters.
`networks` is {"unet": module, "text_model": module} throughout; a layer is named by its path in its network.
Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1, equation 3.
"""

import math
import re

import torch
from torch import nn

from nanodiff.errors import UserError, nearest
from nanodiff.finetune.lora_layer import Adapter, LoraLayer
from nanodiff.formats.lora_file import LoraPart, fitted


# --- finding layers -------------------------------------------------------------------------------------------------

def slots(net):
    """{path: (parent, attribute)} of every layer that has or can take adapters; no "_orig_mod." of torch.compile."""
    found = {}
    for path, parent in net.named_modules():
        for attribute, layer in parent.named_children():
            if isinstance(layer, (nn.Linear, nn.Conv2d, LoraLayer)) and not isinstance(parent, LoraLayer):
                found[f"{path}.{attribute}".removeprefix(".").replace("_orig_mod.", "")] = parent, attribute
    return found


def lora_layers(networks):
    """[(network, path, LoraLayer)] of all layers that have adapters."""
    return [(network, path.replace("_orig_mod.", ""), layer) for network, net in networks.items()
            for path, layer in net.named_modules() if isinstance(layer, LoraLayer)]


def names(networks):
    """The names of all attached adapters, in the order in which they were attached."""
    return list(dict.fromkeys(adapter.name for _, _, layer in lora_layers(networks) for adapter in layer.adapters))


def chosen(networks, name):
    """The layers that hold adapter `name` (None: any adapter); UserError for a name that is not attached."""
    known = names(networks)
    if name is not None and name not in known:
        raise UserError(f'no LoRA named "{name}" is loaded, expected one of {", ".join(known) or "none"}'
                        + nearest(name, known))
    return [layer for _, _, layer in lora_layers(networks)
            if name is None or any(adapter.name == name for adapter in layer.adapters)]


# The ends of the paths that a LoRA is put on: the paper has attention, cloneofsimo's lora feedforward and resnet, too.
PLACES = {
    "attention": ("unet", r"\.attn[12]\.(to_[qkv]|to_out\.0)$"),
    "feedforward": ("unet", r"\.ff\.net\.(0\.proj|2)$"),
    "projection": ("unet", r"\.proj_(in|out)$"),
    "resnet": ("unet", r"\.(conv[12]|conv_shortcut|time_emb_proj|(down|up)samplers\.0\.conv)$"),
    "text": ("text_model", r"\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$"),
}


def targets(networks, places):
    """{network: [paths]} of the layers that `places`, some of PLACES, name; UserError for an unknown one or none."""
    found = {}
    for name in places:
        if name not in PLACES:
            raise UserError(f'a LoRA cannot be put on "{name}"; expected some of {", ".join(PLACES)}{nearest(name, PLACES)}')
        network, pattern = PLACES[name]
        found.setdefault(network, []).extend(path for path in slots(networks[network]) if re.search(pattern, path))
    if not any(found.values()):
        raise UserError(f"these networks have no layers for a LoRA on {', '.join(places) or 'nothing'}; expected some of "
                        f"{', '.join(PLACES)}")
    return {network: paths for network, paths in found.items() if paths}


def extract(before, after, rank):
    """The LoRA of at most `rank` that changes networks `before` most nearly into `after`: a list of LoraPart.

    Of each linear layer and convolution that differs, the truncated singular value decomposition of the difference: the
    nearest matrix of that rank (Eckart and Young 1936). alpha is the rank. Norms and biases are left out, as a LoRA
    has none. UserError when nothing differs, or the layers are not the same.
    """
    found = []
    for network, path, own, other in pairs(before, after):
        change = other.double() - own.double()
        if not bool(change.any()):
            continue
        u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
        r = min(rank, len(s))
        up, down = u[:, :r] * s[:r].sqrt(), s[:r, None].sqrt() * v[:r]
        conv = own.ndim == 4
        found.append(LoraPart(network, path, down.view(r, *own.shape[1:]).float(),
                              up.view(-1, r, 1, 1).float() if conv else up.float(), float(r)))
    if not found:
        raise UserError("the two models have the same weights: there is no change to extract")
    return found


def pairs(before, after):
    """(network, path, weight, weight of the other) of all linear layers and convolutions of two sets of networks."""
    for network, net in before.items():
        own, others = slots(net), slots(after[network])
        shapes = [{path: tuple(base_of(place).weight.shape) for path, place in some.items()} for some in (own, others)]
        if shapes[0] != shapes[1]:
            path = next(path for path in [*own, *others] if shapes[0].get(path) != shapes[1].get(path))
            raise UserError(f"the two models differ in more than their weights: {network} {path} is "
                            f"{shapes[0].get(path, 'missing')} in one and {shapes[1].get(path, 'missing')} in the other")
        for path, place in own.items():
            yield network, path, base_of(place).weight.detach(), base_of(others[path]).weight.detach()


def difference(before, after):
    """The Frobenius norm of what `pairs` differ by, all together."""
    return math.sqrt(sum(float((other - own).double().square().sum()) for _, _, own, other in pairs(before, after)))


def sizes(networks, name):
    """{"network layer": |change| / |W|} of every layer of a LoRA at its scale, Frobenius norms; the largest first."""
    found = {}
    for network, path, layer in lora_layers(networks):
        for adapter in layer.adapters:
            if adapter.name == name:
                own = float(layer.own_weight().detach().float().norm())
                found[f"{network} {path}"] = math.sqrt(square_of_change(adapter)) / max(own, 1e-30)
    return dict(sorted(found.items(), key=lambda one: -one[1]))


def size_sentence(sizes):
    """What `sizes` says, in a line; a LoRA that changes nothing is called so."""
    changed = [size for size in sizes.values() if size > 0]
    if not changed:
        return f"the LoRA changes nothing: all {len(sizes)} of its layers are as they were"
    middle, (largest, size) = sorted(changed)[len(changed) // 2], next(iter(sizes.items()))
    return (f"{len(changed)} of {len(sizes)} layers changed, by {middle:.1%} of their weights' norm in the middle and "
            f"{size:.1%} at most ({largest})")


# --- attaching and detaching ----------------------------------------------------------------------------------------

def attach(networks, parts, name, scale=1.0, trainable=False):
    """Add a LoRA (list of LoraPart, see formats/lora_file.py) to its layers under a name; all of it or nothing.

    scale: how much of the change is used, 1 for all of it. The factors become float32, float64 in a float64 layer.
    Returns what happened: {"layers": {network: count}, "change": {network: size}, "overall": size}, where size is the
    Frobenius norm of the change at this scale, divided by that of the weights it changes. UserError when the name is in
    use, a layer is not in the networks, appears twice, does not fit, or when a number is not finite.
    """
    if name in names(networks):
        raise UserError(f'a LoRA named "{name}" is loaded already: give this one another name or unload that one')
    if not parts:
        raise UserError(f'LoRA "{name}" changes no layer')
    if not math.isfinite(scale):
        raise UserError(f'LoRA "{name}": scale must be a finite number, not {scale}')
    places = {network: slots(net) for network, net in networks.items()}
    ready = {}
    for part in parts:
        where = f'LoRA "{name}"'
        place = places.get(part.network, {}).get(part.layer)
        if place is None:
            raise UserError(f'{where}: "{part.layer}" is not a layer of the {part.network}'
                            + nearest(part.layer, places.get(part.network, {})))
        if (part.network, part.layer) in ready:
            raise UserError(f'{where} changes "{part.layer}" twice')
        down, up = fitted(part, base_of(place), where)
        if not (math.isfinite(part.alpha) and bool(down.isfinite().all()) and bool(up.isfinite().all())):
            raise UserError(f'{where}: "{part.layer}" has numbers that are not finite')
        ready[part.network, part.layer] = place, down, up, part.alpha

    squares = {}  # network: [squared norm of the change, squared norm of the weights]
    layers = dict.fromkeys(networks, 0)
    for (network, _), (place, down, up, alpha) in ready.items():
        adapter = put(place, name, down, up, alpha, scale, trainable)
        change, weight = squares.setdefault(network, [0.0, 0.0])
        squares[network] = [change + square_of_change(adapter),
                            weight + float(getattr(*place).own_weight().detach().float().square().sum())]
        layers[network] += 1
    size = {network: math.sqrt(change / max(weight, 1e-30)) for network, (change, weight) in squares.items()}
    change, weight = (sum(column) for column in zip(*squares.values()))
    return {"layers": {network: n for network, n in layers.items() if n}, "change": size,
            "overall": math.sqrt(change / max(weight, 1e-30))}


def base_of(place):
    """The nn.Linear or nn.Conv2d at a place of slots()."""
    layer = getattr(*place)
    return layer.base if isinstance(layer, LoraLayer) else layer


def put(place, name, down, up, alpha, scale, trainable):
    """Add one adapter to the layer at a place of slots(); returns it."""
    layer = getattr(*place)
    if not isinstance(layer, LoraLayer):
        layer = LoraLayer(layer)
        setattr(*place, layer)
    own = layer.own_weight()
    like = {"dtype": torch.promote_types(torch.float32, own.dtype), "device": own.device}
    adapter = Adapter(name, down.detach().to(**like, copy=True), up.detach().to(**like, copy=True), alpha, scale)
    layer.adapters.append(adapter.requires_grad_(trainable).train(layer.training))
    return adapter


def square_of_change(adapter):
    """|factor * up @ down|^2 (Frobenius) from two rank x rank matrices, without the product itself."""
    down, up = adapter.down.detach().flatten(1).double(), adapter.up.detach().flatten(1).double()
    return adapter.factor()**2 * float(((up.T @ up) * (down @ down.T)).sum())


def add(networks, paths, rank, alpha, generator=None, name="default"):
    """Put fresh trainable adapters around layers, {network: [paths]}; returns their Parameters, for the optimiser.

    down is drawn as in the paper's code (Kaiming, uniform in +-1 / sqrt(in * kh * kw)) by generator, a CPU generator;
    up is 0, so that the networks compute what they did before. The base weights stay as they are: freeze them with
    net.requires_grad_(False) before. UserError for a name in use, an unknown layer, or a rank below 1.
    """
    if not isinstance(rank, int) or rank < 1 or not math.isfinite(alpha):
        raise UserError(f"a LoRA's rank must be a whole number from 1 and alpha finite, not {rank} and {alpha}")
    fresh = []
    for network, wanted in paths.items():
        places = slots(networks[network]) if network in networks else {}
        for path in wanted:
            if path not in places:
                raise UserError(f'"{path}" is not a layer of the {network}{nearest(path, places)}')
            base = base_of(places[path])
            conv = isinstance(base, nn.Conv2d)
            down = torch.empty(rank, *([base.in_channels, *base.kernel_size] if conv else [base.in_features]))
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            up = torch.zeros([base.out_channels, rank, 1, 1] if conv else [base.out_features, rank])
            fresh.append(LoraPart(network, path, down, up, float(alpha)))
    attach(networks, fresh, name, trainable=True)
    return [p for layer in chosen(networks, name) for a in layer.adapters if a.name == name for p in a.parameters()]


def parts(networks, name):
    """The LoRA under a name as a list of LoraPart, for write_lora: its tensors, not copies; scale is no part of it."""
    chosen(networks, name)
    return [LoraPart(network, path, adapter.down.detach(), adapter.up.detach(), adapter.alpha)
            for network, path, layer in lora_layers(networks) for adapter in layer.adapters if adapter.name == name]


def detach(networks, name=None):
    """Take a LoRA (None: all) away, merged or not; a layer without adapters is again the module that it was.

    Its weight is then the very Parameter it had, bit for bit; other LoRAs stay, merged where they were merged.
    """
    for layer in chosen(networks, name):
        layer.adapters = nn.ModuleList(a for a in layer.adapters if name is not None and a.name != name)
        layer.rebuild()
    unwrap(networks)


def unwrap(networks):
    """Put the base module back where a LoraLayer has no adapters left."""
    for net in networks.values():
        for place in slots(net).values():
            layer = getattr(*place)
            if isinstance(layer, LoraLayer) and not len(layer.adapters):
                setattr(*place, layer.base)


# --- scaling and merging --------------------------------------------------------------------------------------------

def set_scale(networks, name, scale):
    """Use more or less of a LoRA: 0 none of it, 1 all; merged weights are made anew."""
    if not math.isfinite(scale):
        raise UserError(f'LoRA "{name}": scale must be a finite number, not {scale}')
    for layer in chosen(networks, name):
        for adapter in layer.adapters:
            if adapter.name == name:
                adapter.scale = float(scale)
        if layer.kept:
            layer.rebuild()


def merge(networks, name=None):
    """Work a LoRA (None: all) into the weights, W + sum of scale * alpha / rank * up @ down: no cost at inference.

    Computed in float32 (float64 for float64 weights) and rounded once to the weight's dtype. The weights from before
    are kept (a second copy of the changed layers), so that unmerge and detach give them back bit for bit.
    """
    set_merged(networks, name, True)


def unmerge(networks, name=None):
    """The reverse of merge: a LoRA (None: all) acts beside the weights again, and they are made anew without it."""
    set_merged(networks, name, False)


def set_merged(networks, name, merged):
    """Say of a LoRA (None: all) whether it acts in the weights or beside them."""
    for layer in chosen(networks, name):
        for adapter in layer.adapters:
            if name is None or adapter.name == name:
                adapter.merged = merged
        layer.rebuild()


def bake(networks):
    """Merge all LoRAs for good: plain layers with changed weights, the original weights dropped; for saving a model."""
    merge(networks)
    for layer in chosen(networks, None):
        layer.adapters, layer.kept = nn.ModuleList(), []
    unwrap(networks)


def base_state_dict(net):
    """A network's state dict as if no LoRA was ever attached: plain names, the original weights also after a merge."""
    return plain_state_dict(net, lambda layer: layer.own_weight().detach())


def merged_state_dict(net):
    """A network's state dict under plain names with the weights that its merged LoRAs gave; others have no part in it."""
    return plain_state_dict(net, lambda layer: layer.base.state_dict()["weight"])


def plain_state_dict(net, weight_of):
    """A network's state dict under the names of its layers, whose weights weight_of(LoraLayer) gives."""
    state = net.state_dict()
    for path, layer in net.named_modules():
        if isinstance(layer, LoraLayer):
            for key in [key for key in state if key.startswith(f"{path}.")]:
                tensor, inner = state.pop(key), key.removeprefix(f"{path}.")
                if inner.startswith("base."):
                    state[f"{path}.{inner.removeprefix('base.')}"] = weight_of(layer) if inner == "base.weight" else tensor
    return {key.replace("_orig_mod.", ""): tensor for key, tensor in state.items()}
