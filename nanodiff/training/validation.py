"""The loss on held-out pictures, the same measurement at every call: the curve shows learning, not luck."""

import torch

from nanodiff import rng
from nanodiff.diffusion import process


@torch.no_grad()
def held_out_loss(net, x0, schedule, kind, condition=None, batch=64):
    """(mean, [mean in each quarter of 0 ... T-1]): a denoiser's unweighted loss on pictures x0 [N, ...], as floats.

    Picture i is always seen at t = T (i + 1/2) / N and with the same noise; a quarter that no t falls in is nan.
    net(x, t), or net(x, t, condition) with the labels or text states condition [N, ...]; `batch` pictures at once.
    """
    index = torch.arange(len(x0), device=x0.device)
    t = ((index + 0.5) / len(x0) * schedule.T).long()
    noise = rng.normal(0, -1, index, x0.shape[1:])
    error = torch.empty(len(x0), dtype=torch.float64, device=x0.device)
    for i in index.split(batch):
        x_t = process.q_sample(schedule, x0[i], t[i], noise[i])
        prediction = net(x_t, t[i]) if condition is None else net(x_t, t[i], condition[i])
        difference = prediction - process.target(schedule, kind, x0[i], noise[i], t[i])
        error[i] = difference.square().flatten(1).mean(1).double()
    quarter = t * 4 // schedule.T
    return float(error.mean()), [float(error[quarter == q].mean()) for q in range(4)]
