"""How good the samples of a generator are while it trains: neither of its losses says so.

PictureJudge takes a Frechet distance, precision, recall and how far samples are apart, beside real pictures; and once
more as the report did it, from sixteen latents. PointJudge counts the modes of a mixture that samples meet.
"""

import copy

import torch

from nanodiff import rng
from nanodiff.classifiers import digits, worlds
from nanodiff.data import images
from nanodiff.errors import check
from nanodiff.metrics import agreement
from nanodiff.metrics.frechet import frechet_distance
from nanodiff.metrics.modes import diversity, modes_covered
from nanodiff.models.gan import generate

POINTS = 2500  # samples of a mixture that are looked at (Srivastava et al. 2017)
DIGITS, WORLDS = "the digit classifier's 64 features", "the worlds' classifier's 128 features"


class PictureJudge:
    """What is measured of samples, beside real pictures: read once, since they are asked for at every preview."""

    def __init__(self, config, training, held_out):
        self.config, self.training, self.held_out = config, training, held_out
        self.n = min(config.judged, len(held_out), len(training))
        check(self.n >= 6, f"the pictures of {config.data} and --judged {config.judged} leave {self.n} to judge by; "
              "expected 6 or more of each")
        self.digits = config.data == "mnist" and training.shape == (1, 28, 28)
        self.classifier = digits.load_classifier() if self.digits else worlds.load_classifier()
        self.extractor = DIGITS if self.digits else WORLDS
        rows = torch.Generator().manual_seed(config.seed)
        real, train = (read_rows(part, torch.randperm(len(part), generator=rows)[:self.n])
                       for part in (held_out, training))
        self.real, self.train, self.near = self.features(real), self.features(train), real[:256]

    def features(self, x):
        """Features [n, 64 or 128] of pictures."""
        return digits.classify(self.classifier, x)[0] if self.digits else worlds.classify(self.classifier, x).features

    def measure(self, net, step):
        """(samples, numbers, one line): Frechet distance, precision and recall with their floors, and diversity."""
        x = generate(net, self.n, self.config.seed)
        numbers = agreement.compare(self.features(x), self.real, self.train)
        numbers |= {"diversity": diversity(x[:256], self.near), "frechet_sixteen": self.report_way(net, step)}
        line = ("Frechet {frechet:.2f} (floor {frechet_floor:.2f}; the report's way {frechet_sixteen:.1f}), precision "
                "{precision:.3f} (floor {precision_floor:.3f}), recall {recall:.3f} (floor {recall_floor:.3f}), {n} "
                "samples on {extractor}; {diversity:.2f} times as far apart as real ones")
        return x, numbers, line.format(n=self.n, extractor=self.extractor, **numbers)

    @torch.no_grad()
    def report_way(self, net, step):
        """The Frechet distance as the report's notebook takes it: sixteen latents, again and again, through a generator
        in train mode, against training pictures."""
        net = copy.deepcopy(net).train()  # its batch statistics must not reach the model
        latents = rng.normal(self.config.seed, step, torch.arange(16), (net.config.latent,), rng.PREVIEW)
        x = net(latents.to(next(net.parameters()).device)).cpu()
        return frechet_distance(self.features(x).repeat(-(-self.n // 16), 1)[:self.n], self.train)

    def verdict(self, net, step):
        """All numbers of the final weights: fresh noise in eval mode, and beside it the report's way."""
        x = generate(net, self.n, self.config.seed + 1)
        if self.digits:
            numbers = agreement.judge_digits(x, self.held_out.pixels, self.training.pixels, self.classifier)
        else:
            real, train = (read_rows(part, images.spread(part, most))
                           for part, most in ((self.held_out, 2000), (self.training, 10_000)))
            numbers = agreement.judge(x, real, train, self.classifier)
        return {"extractor": self.extractor, "fresh noise, eval mode": numbers, "the report's way": {
            "latents": 16, "mode": "train", "n": self.n, "against": "training pictures",
            "frechet": self.report_way(net, step), "five other draws": [
                self.report_way(net, step + draw) for draw in range(1, 6)]}}


class PointJudge:
    """What is measured of samples of a mixture, whose modes are known."""

    def __init__(self, mixture):
        self.mixture = mixture
        self.real = mixture.points(-1, 0, torch.arange(POINTS))

    def measure(self, net, step):
        """(samples, numbers, one line): modes covered, share of samples within 3 deviations of one, diversity."""
        x = generate(net, POINTS, 0, batch=POINTS)
        numbers = modes_covered(x, self.mixture.means, self.mixture.deviation)
        numbers["diversity"] = diversity(x[:256], self.real[:256])
        line = "{covered} of {modes} modes covered, {quality:.1%} of {n:,} samples within 3 deviations of one"
        return x, numbers, line.format(**numbers)

    def verdict(self, net, step):
        """The numbers for fresh noise, and for points of the mixture itself."""
        x = generate(net, POINTS, 1, batch=POINTS)
        return {name: modes_covered(points, self.mixture.means, self.mixture.deviation)
                for name, points in (("fresh noise", x), ("the mixture itself", self.real))}


def read_rows(dataset, rows):
    """The pictures at places rows int64 [n] of a data set."""
    return torch.cat([dataset.read(part, part) for part in rows.split(250)])
