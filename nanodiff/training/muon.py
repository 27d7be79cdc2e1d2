"""Muon, an optimiser for weight matrices: momentum with all singular values set to about 1 before each step.

A gradient has a few strong directions and many weak ones; Adam, which treats each number alone, leaves it so. Muon
takes a step of equal length in every direction of the matrix. AdamW updates all parameters but the matrices of hidden
layers: biases, norms, embeddings, the first and the last layer.
Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Liu et al. 2025 (arXiv 2502.16982), section 2.2, for
the scale that lets both share one learning rate.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial a s + b s^3 + c s^5, which raises small s fastest


def orthogonalise(matrices, steps=5):
    """The matrices [m, n] of a list with singular values of about 1 (0.7 to 1.2) and the same singular vectors.

    Newton-Schulz iteration: x becomes a x + b (x x') x + c (x x')^2 x = factor x, repeatedly, which changes singular
    values alone. Only the small x x' is iterated, for all matrices with the same shorter side at once, and x is
    multiplied at the end: 0.57 of the time (tests/benchmarks/bench_muon.py). Zeros stay zeros.
    """
    a, b, c = COEFFICIENTS
    wide = [(x if x.shape[0] <= x.shape[1] else x.T) for x in matrices]  # [shorter side, longer side]
    wide = [x / x.norm().clamp(min=1e-7) for x in wide]  # then no singular value is above 1
    products = [None] * len(wide)
    for side in {len(x) for x in wide}:
        indices = [i for i, x in enumerate(wide) if len(x) == side]
        square = torch.stack([wide[i] @ wide[i].T for i in indices])  # [k, side, side]
        identity = product = torch.eye(side, dtype=square.dtype, device=square.device).expand_as(square)
        for _ in range(steps):
            factor = a * identity + b * square + c * square @ square
            product = factor @ product
            square = factor @ square @ factor
        for i, factors in zip(indices, product):
            products[i] = factors @ wide[i]
    return [y if y.shape == x.shape else y.T for x, y in zip(matrices, products)]


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolutions of a network's hidden layers, AdamW for all its other parameters.

    net        Muon takes parameters of two and more dimensions, a convolution [out, in, h, w] as [out, in * h * w],
               except embeddings and those of the layers whose names are in `first_and_last`
    lr         of both; a matrix [m, n] moves by lr * 0.2 * sqrt(max(m, n)) in every direction, which is as much per
               number as with AdamW
    momentum   of Muon (Nesterov's); betas: of AdamW; weight_decay: of both, decoupled
    """

    def __init__(self, net, lr=1e-3, momentum=0.95, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0,
                 first_and_last=("conv_in", "conv_out")):
        matrices, others = [], []
        for layer_name, layer in net.named_modules():
            hidden = not isinstance(layer, torch.nn.Embedding) and layer_name.split(".")[-1] not in first_and_last
            for parameter in layer.parameters(recurse=False):
                (matrices if hidden and parameter.ndim >= 2 else others).append(parameter)
        super().__init__([{"params": matrices, "matrices": True}, {"params": others, "matrices": False}],
                         dict(lr=lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if group["matrices"]:
                self.muon(parameters, group)
            else:
                for parameter in parameters:
                    self.adamw(parameter, parameter.grad, self.state[parameter], group)

    def muon(self, parameters, group):
        """One Muon step of all matrices; the state of each is its momentum, in the parameter's shape."""
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
            updates.append((parameter.grad + group["momentum"] * momentum).flatten(1))
        for parameter, update in zip(parameters, orthogonalise(updates)):
            scale = 0.2 * max(update.shape) ** 0.5
            parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * scale)

    def adamw(self, parameter, grad, state, group):
        """One AdamW step of a parameter (Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2)."""
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        b1, b2 = group["betas"]
        mean, square = state["mean"].lerp_(grad, 1 - b1), state["square"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
        denominator = (square / (1 - b2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, denominator, value=-group["lr"] / (1 - b1 ** state["step"]))
