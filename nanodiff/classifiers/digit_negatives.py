"""Pictures that are not digits: training data for the eleventh class of the digit classifier.

A kind is a function (x, labels, generator) -> pictures of x's shape. x [B,1,28,28] in [-1, 1] holds real digits on
black paper (-1). Some results could still pass for a sloppy digit: halves that happen to fit, or a digit written over
an equal one. Each kind tests for these and breaks them in another way, so that no legitimate digit lands in that class.
"""

import torch
import torch.nn.functional as F

SIDE = 28
BLOCK, PARTNERS = 500, 16  # pictures broken at a time; further pictures that a kind may mix them with


def break_digits(x, labels, generator, kinds=None):
    """Broken pictures [B,1,28,28], one for each digit of x [B,1,28,28] in [-1, 1], each of a random kind."""
    kinds = list((kinds or TRAINING_KINDS).values())
    y = []
    for start in range(0, len(x), BLOCK):
        digits, digit_labels = x[start:start + BLOCK], labels[start:start + BLOCK]
        kind_index = torch.randint(len(kinds), (len(digits),), generator=generator)
        block = torch.empty_like(digits)
        for i, kind in enumerate(kinds):
            if (kind_index == i).any():
                # Kinds that mix digits need partners: each gets a few digits more than it has to break
                pool = torch.cat([(kind_index == i).nonzero().flatten(), torch.arange(min(PARTNERS, len(digits)))])
                block[kind_index == i] = kind(digits[pool], digit_labels[pool], generator)[:(kind_index == i).sum()]
        y.append(block)
    return torch.cat(y).clamp(-1, 1)


# No digit at all

def white_noise(x, labels, generator):
    """Gaussian noise of any strength (none: a blank page) about any grey."""
    grey, strength = _uniform(x, -1, 1, generator), _uniform(x, 0, 1.5, generator) ** 2
    return grey + strength * _normal(x.shape, generator)


def specks(x, labels, generator):
    """Bright pixels scattered over black."""
    share = _uniform(x, 0.01, 0.5, generator)
    return torch.where(torch.rand(x.shape, generator=generator) < share, _uniform(x, 0, 1, generator), -1.0)


def clouds(x, labels, generator):
    """Blurred noise: grey clouds, or cut at a level so that blobs and worms of ink remain."""
    noise = blur(_normal(x.shape, generator), float(torch.empty(1).uniform_(0.8, 3.5, generator=generator)))
    noise = noise / noise.std(dim=(1, 2, 3), keepdim=True)
    steep = torch.where(_coin(x, generator), 1.0, 6.0)
    return torch.tanh(steep * (noise - _uniform(x, 0, 1.2, generator)))


def scribble(x, labels, generator):
    """Many short strokes of a pen, crossing each other (quadratic Bézier curves)."""
    strokes, points = 9, 24
    centre = torch.empty(len(x), strokes, 1, 2).uniform_(4, 24, generator=generator)
    corners = centre + 5 * _normal((len(x), strokes, 3, 2), generator)  # start, handle, end
    s = torch.linspace(0, 1, points)
    weights = torch.stack([(1 - s) ** 2, 2 * s * (1 - s), s ** 2], dim=1)  # [points, 3]
    curve = (weights @ corners).flatten(1, 2)  # [B, strokes * points, 2]
    points_used = torch.randint(5, strokes + 1, (len(x), 1, 1), generator=generator) * points
    curve = torch.where(torch.arange(strokes * points)[None, :, None] < points_used, curve, -99.0)
    axis = torch.arange(SIDE, dtype=torch.float32)
    pixels = torch.cartesian_prod(axis, axis)  # [784, 2]
    distance = torch.cdist(curve, pixels).amin(dim=1).view(x.shape)  # [B, curve, 784] -> [B,1,28,28]
    return ((1.8 - distance).clamp(0, 1) * 2 - 1)


# Digits that fell apart

def halves(x, labels, generator):
    """The upper (or left) part of one digit beside the lower (right) part of another, where the strokes do not meet."""
    other = x[torch.randperm(len(x), generator=generator)]
    upright = _coin(x, generator)
    x, other = (torch.where(upright, a, a.mT) for a in (x, other))
    push = torch.randint(4, 9, (1,), generator=generator).item()
    other = other.roll(push if torch.rand(1, generator=generator) < 0.5 else -push, dims=3)
    row = torch.arange(SIDE).view(1, 1, SIDE, 1)
    seam = torch.randint(11, 18, (len(x), 1, 1, 1), generator=generator)
    y = torch.where(row < seam, x, other)
    above, below = (_ink(y) * (row == seam - 1)).sum(2), (_ink(y) * (row == seam)).sum(2)  # [B,1,28]
    meets = torch.minimum(above, below).sum(-1) / torch.maximum(above, below).sum(-1).clamp(min=1e-3)  # [B,1]
    ink_share = (_ink(y) * (row < seam)).sum(dim=(2, 3)) / _ink(y).sum(dim=(2, 3))  # share of the ink before the seam
    apart = (meets < 0.15) & (above.sum(-1) > 1.5) & (below.sum(-1) > 1.5) & (ink_share > 0.3) & (ink_share < 0.7)
    y = torch.where(upright, y, y.mT)
    return torch.where(apart[:, :, None, None], y, tiles(y, labels, generator))


def tiles(x, labels, generator):
    """The digit cut into 7 x 7 tiles, or its middle into quarters, put back in another order."""
    cut = x.unflatten(2, (4, 7)).unflatten(4, (4, 7)).transpose(3, 4).flatten(2, 3)  # [B,1,16,7,7]
    order = torch.rand(len(x), 16, generator=generator).argsort(dim=1)
    small = torch.take_along_dim(cut, order[:, None, :, None, None], dim=2)
    small = small.unflatten(2, (4, 4)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    middle = x[:, :, 4:24, 4:24]
    turned = torch.cat([torch.cat([middle[..., 10:, 10:], middle[..., 10:, :10]], dim=3),
                        torch.cat([middle[..., :10, 10:], middle[..., :10, :10]], dim=3)], dim=2)
    quarters = F.pad(turned, (4, 4, 4, 4), value=-1.0)
    # Quarters of a 0, a 1 or an 8 can look whole again, so those are always cut small
    symmetric = torch.isin(labels, torch.tensor([0, 1, 8])).view(-1, 1, 1, 1)
    return torch.where(symmetric | _coin(x, generator), small, quarters)


def holes(x, labels, generator):
    """Square holes eaten into the strokes, until a third to two thirds of the ink is gone."""
    y, ink = x.clone(), _ink(x)
    total = ink.sum(dim=(1, 2, 3), keepdim=True)
    removed_share = _uniform(x, 0.35, 0.6, generator)
    size = torch.randint(1, 3, (len(x), 1), generator=generator)  # half width: holes of 3 or 5 pixels
    axis = torch.arange(SIDE)
    for _ in range(16):
        centre = torch.multinomial(ink.flatten(1), 1, generator=generator)  # [B,1]
        rows = (axis - centre // SIDE).abs() <= size  # [B,28]
        columns = (axis - centre % SIDE).abs() <= size
        hole = (rows[:, None, :, None] & columns[:, None, None, :])
        enough = _ink(y).sum(dim=(1, 2, 3), keepdim=True) < (1 - removed_share) * total
        y = torch.where(hole & ~enough, -1.0, y)
    # A 1 with holes is often a shorter 1
    return torch.where((labels == 1).view(-1, 1, 1, 1), tiles(x, labels, generator), y)


def overlaid(x, labels, generator):
    """Two digits on top of each other, each with much ink outside the other."""
    other = x[torch.randperm(len(x), generator=generator)]
    turn = torch.randint(-6, 7, (2,), generator=generator).tolist()
    other = other.roll(turn, dims=(2, 3))
    a, b = _ink(x), _ink(other)
    a_only = (a * (1 - F.max_pool2d(b, 3, 1, 1))).sum(dim=(1, 2, 3), keepdim=True) / a.sum(dim=(1, 2, 3), keepdim=True)
    b_only = (b * (1 - F.max_pool2d(a, 3, 1, 1))).sum(dim=(1, 2, 3), keepdim=True) / b.sum(dim=(1, 2, 3), keepdim=True)
    return torch.where((a_only > 0.45) & (b_only > 0.45), torch.maximum(x, other), holes(x, labels, generator))


def warped(x, labels, generator):
    """A displacement of many pixels that changes from place to place, so that strokes fold and tear."""
    field = _normal((len(x), 2, 5, 5), generator)
    field = F.interpolate(field, (SIDE, SIDE), mode="bicubic", align_corners=False) * 0.5  # 7 pixels
    return _resample(x, field.permute(0, 2, 3, 1))


def sideways(x, labels, generator):
    """A 2, 3, 4 or 5 lying on its side: a connected stroke, but no digit. Other digits are torn into tiles."""
    turned = torch.where(_coin(x, generator), x.rot90(1, (2, 3)), x.rot90(-1, (2, 3)))
    asymmetric = torch.isin(labels, torch.tensor([2, 3, 4, 5])).view(-1, 1, 1, 1)
    return torch.where(asymmetric, turned, tiles(x, labels, generator))


# Unfinished digits: samples half way through sampling, or after too short a training

def noisy(x, labels, generator):
    """A digit under visible noise, faded as in q(x_t | x_0) or not."""
    strength = _uniform(x, 0.3, 1.0, generator)
    keep = torch.where(_coin(x, generator), (1 - strength ** 2).sqrt(), 1.0)
    return keep * x + strength * _normal(x.shape, generator)


def averaged(x, labels, generator):
    """The mean of several digits: the best estimate of x0 when much noise is left."""
    n = int(torch.randint(3, 9, (1,), generator=generator))
    return sum(x[torch.randperm(len(x), generator=generator)] for _ in range(n)) / n


def blurred(x, labels, generator):
    """A digit too blurred for a stroke of a pen, pale or with its ink rescaled to white."""
    y = blur(x, float(torch.empty(1).uniform_(2.5, 4.0, generator=generator)))
    peak = _ink(y).amax(dim=(1, 2, 3), keepdim=True)
    return torch.where(_coin(x, generator), y, _ink(y) / peak * 2 - 1)


def wrong_paper(x, labels, generator):
    """The digit on grey or white paper instead of black: inverted, or in [0, 1]."""
    paper = _uniform(x, -0.3, 0.4, generator)
    return torch.where(_coin(x, generator), -x, paper + _ink(x) * (1 - paper))


# Kinds that training never sees: they test whether the eleventh class means "not a digit"

def mosaic(x, labels, generator):
    """Sixteen tiles from as many digits."""
    y = x.clone()
    for top in range(0, SIDE, 7):
        for left in range(0, SIDE, 7):
            other = x[torch.randperm(len(x), generator=generator)]
            y[:, :, top:top + 7, left:left + 7] = other[:, :, top:top + 7, left:left + 7]
    return y


def interlaced(x, labels, generator):
    """Bands of two rows from one digit and from the next, of another class, in turn."""
    order = labels.argsort(stable=True)
    other = torch.empty_like(x)
    other[order] = x[order.roll(len(x) // 2)]  # sorted by class, half the set away: another class
    return torch.where((torch.arange(SIDE).view(1, 1, SIDE, 1) // 2) % 2 == 0, x, other)


def jittered_rows(x, labels, generator):
    """Every row pushed sideways by up to six pixels."""
    push = torch.randint(-6, 7, (len(x), 1, SIDE, 1), generator=generator)
    return torch.take_along_dim(x, (torch.arange(SIDE).view(1, 1, 1, SIDE) + push) % SIDE, dim=3)


def rolled(x, labels, generator):
    """The lower part of the digit above its upper part."""
    push = torch.randint(11, 17, (len(x), 1, 1, 1), generator=generator)
    return torch.take_along_dim(x, (torch.arange(SIDE).view(1, 1, SIDE, 1) + push) % SIDE, dim=2)


def torn(x, labels, generator):
    """The lower half pushed sideways by seven to nine pixels."""
    push = torch.randint(7, 10, (len(x), 1, 1, 1), generator=generator)
    row, column = torch.arange(SIDE).view(1, 1, SIDE, 1), torch.arange(SIDE).view(1, 1, 1, SIDE)
    return torch.take_along_dim(x, ((column + push * (row >= 14)) % SIDE).expand(x.shape), dim=3)


TRAINING_KINDS = {kind.__name__: kind for kind in (
    white_noise, specks, clouds, scribble, halves, tiles, holes, overlaid, warped, sideways, noisy, averaged, blurred,
    wrong_paper)}
HELD_OUT_KINDS = {kind.__name__: kind for kind in (mosaic, interlaced, jittered_rows, rolled, torn)}


def blur(x, sigma):
    """Pictures [B,C,H,W] after a Gaussian blur of each channel; sigma in pixels, the border is repeated."""
    reach = int(3 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=x.dtype) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    y = F.pad(x.flatten(0, 1)[:, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(y, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1)).view_as(x)


def augment(x, generator):
    """Real digits, slightly turned, scaled, sheared and shifted; some are soft or noisy. All stay legitimate digits."""
    angle, shear = _uniform(x, -0.2, 0.2, generator).flatten(), _uniform(x, -0.15, 0.15, generator).flatten()
    wide, high = (_uniform(x, 0.88, 1.12, generator).flatten() for _ in range(2))
    shift = torch.empty(len(x), 2).uniform_(-2.5, 2.5, generator=generator) / (SIDE / 2)
    matrix = torch.stack([angle.cos() * wide, -angle.sin() + shear, shift[:, 0],
                          angle.sin(), angle.cos() * high, shift[:, 1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    y = F.grid_sample(x + 1, grid, align_corners=False) - 1  # zero padding is black
    soft = torch.rand(len(x), 1, 1, 1, generator=generator)
    y = torch.where(soft < 0.15, blur(y, 0.6), y)
    return torch.where(soft > 0.85, y + 0.08 * _normal(x.shape, generator), y).clamp(-1, 1)


def _resample(x, displacement):
    """Pictures resampled with a displacement [B,H,W,2] in half picture widths; outside is black."""
    same = F.affine_grid(torch.eye(2, 3).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, same + displacement, align_corners=False) - 1


def _ink(x):
    return (x + 1) / 2  # 0 paper, 1 ink


def _uniform(x, low, high, generator):
    return torch.empty(len(x), 1, 1, 1).uniform_(low, high, generator=generator)


def _normal(shape, generator):
    return torch.randn(shape, generator=generator)


def _coin(x, generator):
    return torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
