"""3x3 convolution with a quarter of the products: Winograd's minimal filtering, F(4x4, 3x3), on tiles of 6x6 pixels.

Four neighbouring outputs of a filter of three need six products instead of twelve, in one direction; in two directions
36 instead of 144. A filter of three times a signal of four is a product of polynomials: both are evaluated at six
points, multiplied there, and the product is interpolated. In two directions  y = A' [(G w G') * (B' x B)] A,  where the
sums over channels become 36 matrix products. The points are 0, +-a, +-1/a and infinity with a^2 = 1/2: their rounding
errors are less than half of those of the usual 0, +-1, +-2, infinity, and twice those of the plain sum.
Source: Lavin & Gray 2016 (arXiv 1509.09308), section 4; Barabasz et al. 2020 (arXiv 1803.10986) for the points.
Replaces a convolution of many pixels and channels where nothing is trained.
Gain measured by: python tests/benchmarks/bench_fast.py --only winograd
"""

import torch
import torch.nn.functional as F

TILE = 4  # outputs of a tile, in one direction
BATCH = 2**16  # numbers of one of the 36 matrices that are in work at a time: what stays in the processor's cache
A = 0.5**0.5  # a; b = 1 / a, so that a * b = 1
B = 2**0.5
# Evaluates the filter's three taps at the points, each divided by the product of its distances to the other points.
G = torch.tensor([[1, 0, 0]] + [[1 / n, p / n, p * p / n] for p, n in ((A, -1.5), (-A, -1.5), (B, 6), (-B, 6))]
                 + [[0, 0, 1]], dtype=torch.float64)


def pays(shape, out_channels):
    """Whether an input of shape [B, C, H, W] is worth it: whole tiles, enough that changing the filters is a trifle."""
    batch, channels, height, width = shape
    many = batch * height * width >= 1024 and min(channels, out_channels) >= 128 and channels * out_channels <= 2**20
    return many and height % TILE == 0 and width % TILE == 0


@torch.no_grad()
def convolve(x, weight, bias):
    """The convolution of x [B, C, H, W] with weight [O, C, 3, 3], padding 1, as [B, O, H, W] in channels_last.

    float32; H and W multiples of 4; no gradients. The result differs from the plain sum by rounding: a few 1e-6 of its
    standard deviation.
    """
    out, channels = weight.shape[:2]
    batch, _, height, width = x.shape
    filters = torch.kron(G, G).to(weight.dtype) @ weight.reshape(-1, 9).T  # [36, O * C]
    filters = filters.view(36, out, channels).transpose(1, 2)  # [36, C, O]
    x = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # [B, H + 2, W + 2, C]
    y = x.new_empty(batch, height, width, out)
    columns = width // TILE
    step = max(1, BATCH // (channels * columns))  # rows of tiles at a time
    for b in range(batch):
        for row in range(0, height // TILE, step):
            n = min(step, height // TILE - row)
            pixels = x[b, TILE * row : TILE * (row + n) + 2]  # [4n + 2, W + 2, C]
            halfway = pixels.new_empty(6, n, width + 2, channels)
            _to_tiles([pixels[i : i + 4 * n - 3 : 4] for i in range(6)], halfway)
            tiles = pixels.new_empty(6, 6, n, columns, channels)
            _to_tiles([halfway[:, :, i : i + width - 3 : 4] for i in range(6)], tiles.unbind(1))
            product = torch.bmm(tiles.view(36, n * columns, channels), filters).view(6, 6, n, columns, out)
            halfway = product.new_empty(4, 6, n, columns, out)
            _from_tiles(product, halfway)
            done = y[b, TILE * row : TILE * (row + n)].view(n, 4, columns, 4, out)
            _from_tiles(halfway.unbind(1), done.permute(3, 1, 0, 2, 4))
    return (y if bias is None else y.add_(bias)).permute(0, 3, 1, 2)


def _to_tiles(d, out):
    """out[i] = row i of B' d: the six pixels of each tile, in one direction, at the six points."""
    torch.add(d[4], d[2], alpha=-2.5, out=out[0]).add_(d[0])
    torch.add(d[5], d[3], alpha=-2.5, out=out[5]).add_(d[1])
    even, odd = torch.add(d[4], d[2], alpha=-2), torch.add(d[3], d[1], alpha=-2)
    torch.add(even, odd, alpha=A, out=out[1])
    torch.sub(even, odd, alpha=A, out=out[2])
    torch.add(d[4], d[2], alpha=-0.5, out=even)
    torch.add(d[3], d[1], alpha=-0.5, out=odd)
    torch.add(even, odd, alpha=B, out=out[3])
    torch.sub(even, odd, alpha=B, out=out[4])


def _from_tiles(m, out):
    """out[i] = row i of A' m: the four outputs of each tile, in one direction, from the products at the six points."""
    sum_a, difference_a = m[1] + m[2], m[1] - m[2]
    sum_b, difference_b = m[3] + m[4], m[3] - m[4]
    torch.add(m[0], sum_a, out=out[0]).add_(sum_b)
    torch.mul(difference_a, A, out=out[1]).add_(difference_b, alpha=B)
    torch.mul(sum_a, A**2, out=out[2]).add_(sum_b, alpha=B**2)
    torch.mul(difference_a, A**3, out=out[3]).add_(difference_b, alpha=B**3).add_(m[5])
