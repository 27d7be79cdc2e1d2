"""LoRA: low-rank changes of a frozen network that can be trained, scaled, added to others, merged and taken away.

For a weight W [out, in] a layer computes, with rank much smaller than in and out,

    y = W x + scale * alpha / rank * up (down x)        down [rank, in], up [out, rank]

so that only rank * (in + out) numbers are trained. A fresh adapter has up = 0: it changes nothing until it is trained.
For a convolution, down is a convolution of the same kernel and stride onto `rank` channels, and up a 1x1 one.
`networks` is {"unet": module, "text_model": module} throughout; a layer is named by its path in its network.
Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1, equation 3.
"""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.errors import UserError, nearest


class Adapter(nn.Module):
    """One LoRA's share in one layer: down, up, alpha, and the scale that its user chose."""

    def __init__(self, name, down, up, alpha, scale=1.0):
        super().__init__()
        self.name, self.alpha, self.scale, self.merged = name, float(alpha), float(scale), False
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(up)

    def factor(self):
        """scale * alpha / rank."""
        return self.scale * self.alpha / len(self.down)

    def forward(self, x, base):
        """up(down(x)), before the factor; base gives a convolution's stride, padding and dilation."""
        x = x.to(self.down.dtype)
        if self.down.ndim == 2:
            return F.linear(F.linear(x, self.down), self.up)
        return F.conv2d(F.conv2d(x, self.down, None, base.stride, base.padding, base.dilation), self.up)


class LoraLayer(nn.Module):
    """A layer (nn.Linear or nn.Conv2d, here `base`) with any number of adapters around it; takes the layer's place.

    Gradients reach the adapters, and base unless whoever trains has frozen it. The output has base's dtype.
    """

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleList()
        self.original = []  # base's own weight while adapters are merged; in a list, so that it is no Parameter here
        self.train(base.training)

    def forward(self, x):
        y = self.base(x)
        for adapter in self.adapters:
            if not adapter.merged:
                y = y + adapter.factor() * adapter(x, self.base).to(y.dtype)
        return y

    @property
    def weight(self):
        """base's weight, for those who ask a network for its dtype and device; unmerged adapters are not in it."""
        return self.base.weight

    def original_weight(self):
        """base's weight without any adapter: the very Parameter that the network came with."""
        return self.original[0] if self.original else self.base.weight

    @torch.no_grad()
    def rebuild(self):
        """Give base the weight that its merged adapters ask for: always from its own weight, so that nothing drifts."""
        own = self.original_weight()
        merged = [adapter for adapter in self.adapters if adapter.merged]
        self.original = [own] if merged else []
        if merged:
            wide = torch.promote_types(own.dtype, torch.float32)
            weight = own.to(wide)
            for adapter in merged:
                weight = weight + adapter.scale * delta(adapter, wide).to(own.device)
            self.base.weight = nn.Parameter(weight.to(own.dtype), requires_grad=own.requires_grad)
        else:
            self.base.weight = own

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # .to(...), .half() and their like must reach the original weight, too
        for own in self.original:
            own.data = fn(own.data)
        return self


def delta(part, dtype=torch.float32):
    """The weight change alpha / rank * up @ down of a LoraPart or an Adapter, at scale 1, in the layer's own shape.

    Linear: [out, in]. Convolution: [out, in, kh, kw], the one kernel that up after down amounts to, at any stride.
    """
    down, up = part.down.detach().to(dtype), part.up.detach().to(dtype)
    rank = len(down)
    change = part.alpha / rank * (up.reshape(len(up), rank) @ down.reshape(rank, -1))
    return change.reshape(len(up), *down.shape[1:])


@dataclass
class LoraPart:
    """The low-rank change of one layer: alpha / rank * up @ down, rank being the rows of down.

    A linear layer has down [rank, in] and up [out, rank]; a convolution [rank, in, kh, kw] and [out, rank, 1, 1].
    """

    network: str        # "unet" or "text_model"
    layer: str          # the layer's path in that network, such as "mid_block.attentions.0.proj_in"
    down: torch.Tensor
    up: torch.Tensor
    alpha: float


def fitted(part, layer, where="the LoRA"):
    """(down, up) of a LoraPart, reshaped as its layer (nn.Linear or nn.Conv2d) asks; UserError if they do not fit."""
    four = [(*t.shape, 1, 1)[:4] for t in (part.down, part.up)]
    rank = four[0][0]
    if isinstance(layer, nn.Conv2d):
        if layer.groups != 1 or layer.padding_mode != "zeros":
            raise UserError(f'{where}: "{part.layer}" is a convolution in groups or with {layer.padding_mode} padding, '
                            "expected an ordinary one")
        shapes = (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
    else:
        shapes = (rank, layer.in_features), (layer.out_features, rank)
    if four != [(*shape, 1, 1)[:4] for shape in shapes]:
        raise UserError(f'{where}: "{part.layer}" has down {list(part.down.shape)} and up {list(part.up.shape)}, '
                        f"expected {list(shapes[0])} and {list(shapes[1])}; it was made for another base model")
    return part.down.reshape(shapes[0]), part.up.reshape(shapes[1])


# --- finding layers -------------------------------------------------------------------------------------------------

def slots(net):
    """{path: (parent, attribute)} of every layer that has or can take adapters; no "_orig_mod." of torch.compile."""
    places = {}
    for path, parent in net.named_modules():
        for attribute, layer in parent.named_children():
            if isinstance(layer, (nn.Linear, nn.Conv2d, LoraLayer)) and not isinstance(parent, LoraLayer):
                places[f"{path}.{attribute}".removeprefix(".").replace("_orig_mod.", "")] = parent, attribute
    return places


def layers(net):
    """{path: nn.Linear or nn.Conv2d} of every layer that a LoRA can change, itself also inside its adapters."""
    return {path: base_of(place) for path, place in slots(net).items()}


def base_of(place):
    """The nn.Linear or nn.Conv2d at a place of slots()."""
    layer = getattr(*place)
    return layer.base if isinstance(layer, LoraLayer) else layer


def lora_layers(networks):
    """[(network, path, LoraLayer)] of all layers that have adapters."""
    return [(network, path.replace("_orig_mod.", ""), layer) for network, net in networks.items()
            for path, layer in net.named_modules() if isinstance(layer, LoraLayer)]


def names(networks):
    """The names of all attached adapters, in the order in which they were attached."""
    return list(dict.fromkeys(adapter.name for _, _, layer in lora_layers(networks) for adapter in layer.adapters))


def layers_with(networks, name):
    """The layers that hold adapter `name` (None: any adapter); UserError for a name that is not attached."""
    attached = names(networks)
    if name is not None and name not in attached:
        raise UserError(f'no LoRA named "{name}" is loaded, expected one of {", ".join(attached) or "none"}'
                        + nearest(name, attached))
    return [layer for _, _, layer in lora_layers(networks)
            if name is None or any(adapter.name == name for adapter in layer.adapters)]


# {target: (network, the end of its layers' paths)}. The paper adapts attention; cloneofsimo's lora the next three.
TARGETS = {
    "attention": ("unet", r"\.attn[12]\.(to_[qkv]|to_out\.0)$"),
    "feedforward": ("unet", r"\.ff\.net\.(0\.proj|2)$"),
    "projection": ("unet", r"\.proj_(in|out)$"),
    "resnet": ("unet", r"\.(conv[12]|conv_shortcut|time_emb_proj|(down|up)samplers\.0\.conv)$"),
    "text": ("text_model", r"\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$"),
}


def find_targets(networks, targets):
    """{network: [paths]} of the layers that `targets`, some of TARGETS, name; UserError for an unknown one or none."""
    paths = {}
    for name in targets:
        if name not in TARGETS:
            raise UserError(f'a LoRA cannot be put on "{name}"; expected some of {", ".join(TARGETS)}'
                            + nearest(name, TARGETS))
        network, pattern = TARGETS[name]
        paths.setdefault(network, []).extend(path for path in slots(networks[network]) if re.search(pattern, path))
    if not any(paths.values()):
        raise UserError(f"these networks have no layers for a LoRA on {', '.join(targets) or 'nothing'}; expected some "
                        f"of {', '.join(TARGETS)}")
    return {network: own for network, own in paths.items() if own}


# --- attaching and detaching ----------------------------------------------------------------------------------------

def attach(networks, parts, name, scale=1.0, trainable=False):
    """Add a LoRA (list of LoraPart) to its layers under a name; all of it or nothing.

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
    counts = dict.fromkeys(networks, 0)
    for (network, _), (place, down, up, alpha) in ready.items():
        adapter = put_adapter(place, name, down, up, alpha, scale, trainable)
        change, weight = squares.setdefault(network, [0.0, 0.0])
        squares[network] = [change + square_of_change(adapter),
                            weight + float(getattr(*place).original_weight().detach().float().square().sum())]
        counts[network] += 1
    size = {network: math.sqrt(change / max(weight, 1e-30)) for network, (change, weight) in squares.items()}
    change, weight = (sum(column) for column in zip(*squares.values()))
    return {"layers": {network: n for network, n in counts.items() if n}, "change": size,
            "overall": math.sqrt(change / max(weight, 1e-30))}


def put_adapter(place, name, down, up, alpha, scale, trainable):
    """Add one adapter to the layer at a place of slots(); returns it."""
    layer = getattr(*place)
    if not isinstance(layer, LoraLayer):
        layer = LoraLayer(layer)
        setattr(*place, layer)
    own = layer.original_weight()
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
    adapters = [adapter for layer in layers_with(networks, name) for adapter in layer.adapters if adapter.name == name]
    return [p for adapter in adapters for p in adapter.parameters()]


def parts(networks, name):
    """The LoRA under a name as a list of LoraPart, for write_lora: its tensors, not copies; scale is no part of it."""
    layers_with(networks, name)
    return [LoraPart(network, path, adapter.down.detach(), adapter.up.detach(), adapter.alpha)
            for network, path, layer in lora_layers(networks) for adapter in layer.adapters if adapter.name == name]


def detach(networks, name=None):
    """Take a LoRA (None: all) away, merged or not; a layer without adapters is again the module that it was.

    Its weight is then the very Parameter it had, bit for bit; other LoRAs stay, merged where they were merged.
    """
    for layer in layers_with(networks, name):
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
    for layer in layers_with(networks, name):
        for adapter in layer.adapters:
            if adapter.name == name:
                adapter.scale = float(scale)
        if layer.original:
            layer.rebuild()


def merge(networks, name=None):
    """Add a LoRA (None: all) to the weights, W + sum of scale * alpha / rank * up @ down: no cost at inference.

    Computed in float32 (float64 for float64 weights) and rounded once to the weight's dtype. The original weights
    stay in memory (a second copy of the changed layers): unmerge and detach give them back bit for bit.
    """
    set_merged(networks, name, True)


def unmerge(networks, name=None):
    """The reverse of merge: a LoRA (None: all) acts beside the weights again, and they are made anew without it."""
    set_merged(networks, name, False)


def set_merged(networks, name, merged):
    """Let a LoRA (None: all) act in the weights (merged), or beside them."""
    for layer in layers_with(networks, name):
        for adapter in layer.adapters:
            if name is None or adapter.name == name:
                adapter.merged = merged
        layer.rebuild()


def bake(networks):
    """Merge all LoRAs for good: plain layers with changed weights, the original weights dropped; for saving a model."""
    merge(networks)
    for layer in layers_with(networks, None):
        layer.adapters, layer.original = nn.ModuleList(), []
    unwrap(networks)


def base_state_dict(net):
    """A network's state dict as if no LoRA was ever attached: plain names, the original weights also after a merge."""
    return plain_state_dict(net, lambda layer: layer.original_weight().detach())


def merged_state_dict(net):
    """A network's state dict under plain names, with the weights that its merged LoRAs gave; others are left out."""
    return plain_state_dict(net, lambda layer: layer.base.state_dict()["weight"])


def plain_state_dict(net, weight_of):
    """A network's state dict under the names of its layers, whose weights weight_of(LoraLayer) gives."""
    state = net.state_dict()
    for path, layer in net.named_modules():
        if isinstance(layer, LoraLayer):
            for key in [key for key in state if key.startswith(f"{path}.")]:
                tensor, inner = state.pop(key), key.removeprefix(f"{path}.")
                if inner.startswith("base."):
                    tensor = weight_of(layer) if inner == "base.weight" else tensor
                    state[f"{path}.{inner.removeprefix('base.')}"] = tensor
    return {key.replace("_orig_mod.", ""): tensor for key, tensor in state.items()}
