"""PSNR and SSIM: how close one picture is to another, pixel by pixel. The caller states the data range."""

import torch
import torch.nn.functional as F

from nanodiff.errors import UserError


def psnr(x, y, data_range):
    """Peak signal-to-noise ratio [B] in dB of each pair of pictures [B, C, H, W]: 10 log10(data_range^2 / MSE).

    data_range   the largest possible difference: 2 for [-1, 1], 255 for uint8, 65535 for uint16
    Equal pictures give inf.
    """
    x, y = _pair(x, y, data_range)
    return 10 * torch.log10(data_range**2 / (x - y).square().flatten(1).mean(1))


def ssim(x, y, data_range, sigma=1.5):
    """Structural similarity, float64 [B], of each pair of pictures [B, C, H, W]; 1 for equal pictures.

    The mean over channels and over all places where a Gaussian window of 11 x 11 pixels (sigma 1.5) fits; K1 = 0.01,
    K2 = 0.03. Source: Wang et al. 2004, IEEE Trans. Image Processing 13(4), equation 13. UserError for sides below 11.
    """
    x, y = _pair(x, y, data_range)
    if min(x.shape[2:]) < 11:
        raise UserError(f"pictures of {x.shape[2]}x{x.shape[3]} are too small for SSIM: expected sides from 11")
    offset = torch.arange(-5, 6, dtype=torch.float64)
    weight = torch.exp(-offset**2 / (2 * sigma**2))
    weight = (weight / weight.sum()).to(x.device)

    def mean(z):
        flat = z.flatten(0, 1)[:, None]  # [B * C, 1, H, W]
        flat = F.conv2d(F.conv2d(flat, weight[None, None, :, None]), weight[None, None, None, :])
        return flat.view(*z.shape[:2], *flat.shape[2:])

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    score = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return score.flatten(1).mean(1)


def _pair(x, y, data_range):
    """Both as float64; UserError unless they have one shape [B, C, H, W] and the range is above 0."""
    if x.shape != y.shape or x.ndim != 4:
        raise UserError(f"pictures of shapes {list(x.shape)} and {list(y.shape)} cannot be compared; expected the same "
                        "[B, C, H, W]")
    if not data_range > 0:
        raise UserError(f"data_range is {data_range}; expected the largest possible difference, such as 255")
    return x.double(), y.double()
