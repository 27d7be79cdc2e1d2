"""Muon, an optimiser for weight matrices: momentum whose singular values are all made 1 before each step.

A gradient's few strong directions drown the many weak ones, and Adam, which looks at each number alone, keeps it so.
Muon takes a step of equal length in every direction of the matrix. What is no matrix in a hidden layer (biases, norms,
embeddings, the first and the last layer) is left to AdamW. Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/
muon); Liu et al. 2025 (arXiv 2502.16982), section 2.2, for the scale that lets both share one learning rate.
"""

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial a s + b s^3 + c s^5, which lifts small s fastest


def orthogonalised(matrices, steps=5):
    """A list of matrices [m, n] with their singular values brought to about 1 (0.7 to 1.2), singular vectors kept.

    Newton-Schulz iteration: x becomes a x + b (x x') x + c (x x')^2 x = factor x, again and again, which acts on the
    singular values alone. Only the small x x' is carried along, for all matrices with the same shorter side at once,
    and x multiplied at the end: 0.57 of the time (tests/benchmarks/bench_muon.py). Zeros stay zeros.
    """
    a, b, c = COEFFICIENTS
    wide = [(x if x.shape[0] <= x.shape[1] else x.T) for x in matrices]  # [shorter side, longer side]
    wide = [x / x.norm().clamp(min=1e-7) for x in wide]  # no singular value is above 1 then
    products = [None] * len(wide)
    for side in {len(x) for x in wide}:
        places = [i for i, x in enumerate(wide) if len(x) == side]
        square = torch.stack([wide[i] @ wide[i].T for i in places])  # [k, side, side]
        one = product = torch.eye(side, dtype=square.dtype, device=square.device).expand_as(square)
        for _ in range(steps):
            factor = a * one + b * square + c * square @ square
            product = factor @ product
            square = factor @ square @ factor
        for i, whole in zip(places, product):
            products[i] = whole @ wide[i]
    return [y if y.shape == x.shape else y.T for x, y in zip(matrices, products)]


class Muon(torch.optim.Optimizer):
    """Muon for the hidden layers' matrices and convolutions of a network, AdamW for all its other parameters.

    net        parameters of two and more dimensions are Muon's, a convolution [out, in, h, w] as [out, in * h * w],
               except embeddings and those of the layers whose names are in `first_and_last`
    lr         of both; a matrix [m, n] moves by lr * 0.2 * sqrt(max(m, n)) in every direction, which is, number by
               number, as much as AdamW moves it
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
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in moving:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if group["matrices"]:
                self.muon(moving, group)
            else:
                for parameter in moving:
                    self.adamw(parameter, parameter.grad, self.state[parameter], group)

    def muon(self, parameters, group):
        """One step of all matrices; the state of each is its momentum, in the shape of the parameter."""
        ahead = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            average = state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
            ahead.append((parameter.grad + group["momentum"] * average).flatten(1))
        for parameter, update in zip(parameters, orthogonalised(ahead)):
            length = 0.2 * max(update.shape) ** 0.5
            parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * length)

    def adamw(self, parameter, grad, state, group):
        """One step of anything else (Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2)."""
        if not state:
            state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        b1, b2 = group["betas"]
        mean, square = state["mean"].lerp_(grad, 1 - b1), state["square"].mul_(b2).addcmul_(grad, grad, value=1 - b2)
        spread = (square / (1 - b2 ** state["step"])).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, spread, value=-group["lr"] / (1 - b1 ** state["step"]))
