"""t-SNE: an embedding of points in the plane that preserves neighbourhoods (report figure 12).

    y = tsne(means)                         [n, d] -> [n, 2]
    neighbour_accuracy(y, labels)           how well labels can be told in the plane, as a number

Similar pairs of points (P) attract, all pairs repel (Q), and the plane's heavy-tailed similarity leaves room between
groups. This is the exact method, with all n^2 pairs at every step, for a few thousand points. Distances between groups
and the sizes of groups carry no meaning in such a picture.
Source: van der Maaten & Hinton 2008, "Visualizing data using t-SNE", JMLR 9; the start from the principal components is
Kobak & Berens 2019 (doi 10.1038/s41467-019-13056-x).
"""

import torch

from nanodiff.errors import UserError

BLOCK = 128  # rows of the n x n matrices at a time: they stay in the processor's cache
SMALLEST = 1e-12


def tsne(x, perplexity=30.0, steps=750, seed=0, exaggeration=12.0):
    """The embedding [n, 2] of points x [n, d], float32, centred.

    perplexity     effective number of neighbours of a point, below n / 3
    steps          of gradient descent with momentum; in the first third P is multiplied by `exaggeration`, so that
                   groups form early
    seed           of small noise in the start, which separates equal points
    UserError for a perplexity that is too large for n points, and for values that are not finite.
    """
    check_points(x, perplexity)
    x = x.flatten(1).float()
    joint = joint_probabilities(x, perplexity)
    y = principal_start(x, seed)
    step, gains = torch.zeros_like(y), torch.ones_like(y)
    rate = max(len(x) / exaggeration / 4, 50)  # Belkina et al. 2019; the 4 is the gradient's own factor
    for i in range(steps):
        early = i < steps // 3
        slope = gradient(joint, y, exaggeration if early else 1.0)
        gains = torch.where(slope.sign() == step.sign(), gains * 0.8, gains + 0.2).clamp(min=0.01)
        step = (0.5 if early else 0.8) * step - rate * gains * slope
        y = y + step
        y = y - y.mean(0)
    return y


def check_points(x, perplexity):
    """UserError unless x [n, d] is finite and large enough for `perplexity`."""
    if x.ndim < 2 or x.numel() == 0:
        raise UserError(f"t-SNE needs points [n, d], but the shape is {list(x.shape)}")
    if not perplexity >= 1 or len(x) <= 3 * perplexity:
        raise UserError(f"a perplexity of {perplexity:g} needs more than {3 * perplexity:g} points, but n = {len(x)}; "
                        f"expected 1 to {max(1, (len(x) - 1) // 3)} for so many")
    bad = ~x.flatten(1).isfinite().all(1)
    if bad.any():
        raise UserError(f"{int(bad.sum())} of {len(x)} points hold values that are not finite; the first is row "
                        f"{int(bad.nonzero()[0])}")


# --- similarities in many dimensions --------------------------------------------------------------------------------

def joint_probabilities(x, perplexity):
    """P [n, n] of points x [n, d]: symmetric, sums to 1, 0 on the diagonal (equation 1 and section 3.1)."""
    conditional = conditional_probabilities(x, perplexity)
    return (conditional + conditional.T) / (2 * len(x))


def conditional_probabilities(x, perplexity, halvings=40):
    """p(j | i) [n, n]: a Gaussian around each point whose width gives its row the entropy log2(perplexity) bits.

    Bisection of log beta, beta = 1 / (2 sigma^2), for all points at once. Where more points coincide than `perplexity`,
    no width is narrow enough, and the row is uniform over them.
    """
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()
    distance.fill_diagonal_(torch.inf)
    distance = distance - distance.amin(1, keepdim=True)  # a factor in each row: exp() is not 0 everywhere
    distance.fill_diagonal_(0)
    scale = distance.mean(1, keepdim=True)  # [n, 1]
    scale = torch.where(scale > 0, scale, 1)
    low, high = torch.full_like(scale, -10), torch.full_like(scale, 30)  # of log(beta * scale)
    target = torch.log(torch.tensor(float(perplexity), dtype=x.dtype))
    for _ in range(halvings):
        log_beta = (low + high) / 2
        entropy = _row_entropy(distance, torch.exp(log_beta) / scale)[0]
        wide = entropy > target
        low, high = torch.where(wide, log_beta, low), torch.where(wide, high, log_beta)
    return _row_entropy(distance, torch.exp((low + high) / 2) / scale)[1]


def _row_entropy(distance, beta):
    """Entropy [n, 1] in nats of the rows p(j | i) ~ exp(-beta_i d_ij), j != i, and the rows [n, n] themselves."""
    p = torch.exp(-beta * distance).fill_diagonal_(0)
    total = p.sum(1, keepdim=True)
    return total.log() + beta * (p * distance).sum(1, keepdim=True) / total, p / total


def principal_start(x, seed):
    """The first two principal components [n, 2] of x [n, d], scaled to 1e-4, plus a hundredth of that in noise."""
    centred = x - x.mean(0)
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)  # [d, 2], or [d, 1] for d = 1
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # the sign is arbitrary
    y = torch.zeros(len(x), 2, dtype=x.dtype)
    y[:, :vectors.shape[1]] = centred @ vectors
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return 1e-4 * (y / y[:, 0].std().clamp(min=SMALLEST) + 0.01 * noise)


# --- similarities in the plane --------------------------------------------------------------------------------------

def divergence(joint, y):
    """KL(P || Q) in nats of the similarities joint [n, n] and places y [n, 2] (equations 2 and 4)."""
    closeness = 1 / (1 + (y[:, None] - y[None]).square().sum(2))
    closeness = closeness - torch.diag(closeness.diagonal())
    q = closeness / closeness.sum()
    return (torch.xlogy(joint, joint) - torch.xlogy(joint, q.clamp(min=SMALLEST))).sum()


def gradient(joint, y, exaggeration=1.0):
    """d KL(exaggeration P || Q) / dy [n, 2] = 4 sum_j (p_ij - q_ij) (y_i - y_j) / (1 + |y_i - y_j|^2) (equation 5).

    One sweep over blocks of rows. q_ij = closeness_ij / Z, and Z is known only at the end of the sweep: attraction and
    repulsion are therefore summed separately.
    """
    n, ones = len(y), torch.ones_like(y[:, :1])
    norm = y.square().sum(1, keepdim=True)
    left = torch.cat([-2 * y, norm, ones], 1)  # left @ right.T = 1 + |y_i - y_j|^2
    right = torch.cat([y, ones, norm + 1], 1)
    pulled = torch.cat([y, ones], 1)  # W @ pulled holds the weighted sums of y_j and of 1
    attraction, repulsion, total = torch.zeros_like(pulled), torch.zeros_like(pulled), y.new_zeros(())
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        closeness = (left[rows] @ right.T).clamp_(min=1).reciprocal_()
        closeness.diagonal(start).zero_()
        total += closeness.sum()
        attraction[rows] = (joint[rows] * closeness) @ pulled
        repulsion[rows] = closeness.square_() @ pulled
    weighted = exaggeration * attraction - repulsion / total
    return 4 * (weighted[:, 2:] * y - weighted[:, :2])


# --- evaluation ------------------------------------------------------------------------------------------------------

def neighbour_accuracy(y, labels, k=10):
    """Share of points y [n, d] whose label int64 [n] is the most common among their k nearest other points.

    At a tie the lower label wins. UserError when n <= k.
    """
    if not 1 <= k < len(y):
        raise UserError(f"k = {k} nearest neighbours need more than k points, but n = {len(y)}")
    if len(labels) != len(y):
        raise UserError(f"{len(y)} points and {len(labels)} labels do not belong together")
    votes = torch.nn.functional.one_hot(labels).to(y.dtype)  # [n, classes]
    correct = 0
    for start in range(0, len(y), 1000):
        distance = torch.cdist(y[start:start + 1000], y)
        distance.diagonal(start).fill_(torch.inf)
        nearest = distance.topk(k, largest=False).indices  # [rows, k]
        correct += int((votes[nearest].sum(1).argmax(1) == labels[start:start + 1000]).sum())
    return correct / len(y)
