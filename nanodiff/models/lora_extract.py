"""How much a LoRA changes a network, and the LoRA that turns one set of networks into another.

Source: Eckart and Young 1936 for the nearest matrix of a rank; Hu et al. 2021 (arXiv 2106.09685) for LoRA.
"""

import math

import torch

from nanodiff.errors import UserError
from nanodiff.models.lora import LoraPart, layers, lora_layers, square_of_change


def extract(before, after, rank):
    """The LoRA of at most `rank` that changes networks `before` most nearly into `after`: a list of LoraPart.

    Of each linear layer and convolution that differs, the truncated singular value decomposition of the difference: the
    nearest matrix of that rank. alpha is the rank. Norms and biases are left out, as a LoRA has none. UserError when
    nothing differs, or the layers are not the same.
    """
    parts = []
    for network, path, first, second in weight_pairs(before, after):
        change = second.double() - first.double()
        if not bool(change.any()):
            continue
        u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
        r = min(rank, len(s))
        up, down = u[:, :r] * s[:r].sqrt(), s[:r, None].sqrt() * v[:r]
        up = up.view(-1, r, 1, 1) if first.ndim == 4 else up
        parts.append(LoraPart(network, path, down.view(r, *first.shape[1:]).float(), up.float(), float(r)))
    if not parts:
        raise UserError("the two models have the same weights: there is no change to extract")
    return parts


def weight_pairs(before, after):
    """(network, path, weight, weight of the other) of all linear layers and convolutions of two sets of networks."""
    for network, net in before.items():
        first, second = layers(net), layers(after[network])
        shapes = [{path: tuple(layer.weight.shape) for path, layer in each.items()} for each in (first, second)]
        if shapes[0] != shapes[1]:
            path = next(path for path in [*first, *second] if shapes[0].get(path) != shapes[1].get(path))
            one, other = (each.get(path, "missing") for each in shapes)
            raise UserError(f"the two models differ in more than their weights: {network} {path} is {one} in one and "
                            f"{other} in the other")
        for path, layer in first.items():
            yield network, path, layer.weight.detach(), second[path].weight.detach()


def difference(before, after):
    """The Frobenius norm of the difference of all weights that `weight_pairs` gives."""
    return math.sqrt(sum(float((second - first).double().square().sum())
                         for _, _, first, second in weight_pairs(before, after)))


def sizes(networks, name):
    """{"network layer": |change| / |W|} of every layer of a LoRA at its scale, Frobenius norms; the largest first."""
    by_layer = {}
    for network, path, layer in lora_layers(networks):
        for adapter in layer.adapters:
            if adapter.name == name:
                norm = float(layer.original_weight().detach().float().norm())
                by_layer[f"{network} {path}"] = math.sqrt(square_of_change(adapter)) / max(norm, 1e-30)
    return dict(sorted(by_layer.items(), key=lambda item: -item[1]))


def size_sentence(sizes):
    """A sentence with the median and the largest of `sizes`; it says so when a LoRA changes nothing."""
    changed = [size for size in sizes.values() if size > 0]
    if not changed:
        return f"the LoRA changes nothing: all {len(sizes)} of its layers are as they were"
    middle, (largest, size) = sorted(changed)[len(changed) // 2], next(iter(sizes.items()))
    return (f"{len(changed)} of {len(sizes)} layers changed, by {middle:.1%} of their weights' norm in the middle and "
            f"{size:.1%} at most ({largest})")
