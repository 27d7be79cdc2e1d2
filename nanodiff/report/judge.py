"""Judging a model that was taught something new: what it learned, how freely it uses it, and what it lost.

    judge = Judge(model, n=60, base=4)
    numbers, pictures = judge.measure(sd, {"a sks texture": ("zigzagged",)}, "a texture")

The judge is the classifier that the repository ships (classifiers/worlds.py), and for woven slices the measures of
tomography/measures.py; the training saw nothing of either. Report: sections 4.2.1 to 4.2.5, tables 5 to 16, whose only
judge was the eye.
"""

import functools
from statistics import fmean

import torch

import nanodiff
from nanodiff import worlds
from nanodiff.classifiers import worlds as world_classifier
from nanodiff.data import captions
from nanodiff.metrics import agreement
from nanodiff.metrics.frechet import frechet_distance
from nanodiff.pixels import from_uint8
from nanodiff.report import text_to_image
from nanodiff.tomography import measures
from nanodiff.worlds import prompts

PAIRS = (("red", "white"), ("blue", "yellow"), ("green", "black"), ("orange", "purple"), ("pink", "brown"),
         ("white", "blue"), ("black", "yellow"), ("purple", "white"), ("red", "black"), ("green", "pink"))
DARK = ("a black texture", "a black surface on a black background", "black on black")
BRIGHT = ("a white texture", "a white surface on a white background", "white on white")
MATERIAL = ("grey", "two_point", "spectrum", "period", "porosity")  # what measures.distances gives
VERSION = 2  # raised when one of the numbers comes to mean something else


class Judge:
    """What all models are measured with, and what is made once for all: real pictures, and the untaught model's.

    model   the untaught model, as nanodiff.load takes it
    n       pictures of what was taught and of the class noun; base: prompts of every class of the base world,
            of which those are taken that hold no word which fine-tuning gives a meaning (captions.DISTRACTORS)
    run     how pictures are drawn: sampler, steps, guidance
    """

    def __init__(self, model=None, n=60, base=4, **run):
        self.model, self.n, self.run, self.classifier = model, n, run, world_classifier.load_classifier()
        self.base = [one for one in prompts.prompts(base) if captions.is_plain(one[0])]
        self.known = self.read(worlds.load("test", world_classifier.SIZE, len(self.base)).pixels).features

    def draw(self, sd, prompts, seed):
        """One picture of every prompt, float32 [n,3,H,W] in [-1, 1], from noises that the seed alone decides."""
        return text_to_image.draw(sd, prompts, seed, **self.run)

    def read(self, x):
        return world_classifier.classify(self.classifier, x)

    @functools.cache
    def real(self, classes):
        """The classifier's features [2n,128] of real, held-out pictures of some classes in turn; of woven ones the second
        half are slices of other specimens than the first."""
        return torch.cat([self.read(self.some(classes, half)).features for half in (0, 1)])

    def some(self, classes, half):
        """n real pictures uint8 [n,3,64,64] of some classes in turn; half 0 or 1: others, woven ones of other specimens."""
        every = [self.pictures(name, half) for name in classes]
        return torch.stack([every[i % len(every)][i // len(every)] for i in range(self.n)])

    @functools.cache
    def pictures(self, name, half):
        """The n real pictures of one class from which `some` takes."""
        if name in worlds.WOVEN:
            slices = self.slices(half)
            return slices.pixels[slices.labels == slices.classes.index(name)]
        return worlds.load("test", world_classifier.SIZE, 2 * self.n, (name,)).pixels[half * self.n:][:self.n]

    @functools.cache
    def slices(self, half):
        """n slices of each woven class from one specimen of each state."""
        return worlds.cut("test", world_classifier.SIZE, len(worlds.WOVEN) * self.n, specimens=1, seed=half)

    @functools.cache
    def untaught(self, prompt):
        """The classifier's features [n,128] of what the untaught model draws of a prompt."""
        return self.read(self.draw(nanodiff.load(self.model), [prompt] * self.n, 3)).features

    def measure(self, sd, asks, noun="a texture", reach=False):
        """Numbers of one model, and at most 24 of its pictures: of `asks`, of these in two colours, of the noun, of the
        base world. asks {prompt: classes that are right}: about n pictures in all; noun: the prompt without the new
        word.

        fidelity     share of pictures that are read as asked for, by_prompt {prompt: share}; frechet: their distance
                     from real ones, frechet_floor: that of other real ones
        variety      how far apart pictures of one prompt are, of the same for real pictures (0: all alike)
        composition  share of "PROMPT in COLOUR and COLOUR" with the class and both colours; of woven slices, which the
                     classifier knows in grey alone, as any of the nine classes (`names_in_grey`)
        inside       the same of the words inside a prompt of the base world, "a photo of a COLOUR and COLOUR ..."
        base         share of base prompts read as their class, of base_n; base_frechet: against as many real pictures
        drift        Frechet distance of the noun's pictures before and after; leak: share of them that show the new
        spread       how far apart pictures of the noun are, of the same before
        grey, two_point, spectrum, period, porosity (and with _floor)   of woven slices: measures.distances from a real
                     specimen, the mean over prompts, and those between two real specimens
        darkest, brightest (with reach=True)   mean grey, 0 to 1, of the darkest and brightest picture that can be had
        """
        many = max(2, self.n // len(asks))  # of every prompt
        classes = tuple(dict.fromkeys(name for right in asks.values() for name in right))
        x = self.draw(sd, [prompt for prompt in asks for _ in range(many)], 1)
        predictions, place = self.read(x), torch.arange(len(x)).view(len(asks), many) % self.n
        real, other = (torch.cat([self.real(tuple(right))[half * self.n + some]
                                  for some, right in zip(place, asks.values())]) for half in (0, 1))
        names, seen = predictions.names(), predictions.features.unflatten(0, (len(asks), many))
        by_prompt = {prompt: share(names[i * many:(i + 1) * many], asks[prompt]) for i, prompt in enumerate(asks)}
        numbers = {
            "n": len(x), "fidelity": sum(by_prompt.values()) / len(asks), "by_prompt": by_prompt,
            "frechet": frechet_distance(predictions.features, real), "frechet_floor": frechet_distance(other, real),
            "variety": fmean([apart(one) / apart(self.real(tuple(right))) for one, right in zip(seen, asks.values())])}
        shown = [x[torch.linspace(0, len(x) - 1, 6).long()]]
        woven = [i for i, names in enumerate(asks.values()) if set(names) <= set(worlds.WOVEN)]
        drawn = {prompt: right for i, (prompt, right) in enumerate(asks.items()) if i not in woven}
        if woven:
            slices = world_classifier.prepare(x).mean(1).unflatten(0, (len(asks), many))
            numbers |= self.material(slices[woven], [list(asks.values())[i] for i in woven])
        numbers["composition"], y = self.composition(sd, "{prompt} in {a} and {b}", drawn or asks)
        numbers["inside"], _ = self.composition(sd, "a photo of a {a} and {b} {bare}", drawn or asks)
        shown.append(y[:6])
        z, w = self.draw(sd, [noun] * self.n, 3), self.draw(sd, [caption for caption, _, _ in self.base], 4)
        after, known = self.read(z), self.read(w)
        numbers |= {
            "base": agreement.agreement(known, [name for _, name, _ in self.base],
                                        [pair for _, _, pair in self.base])["class"], "base_n": len(w),
            "base_frechet": frechet_distance(known.features, self.known),
            "drift": frechet_distance(after.features, self.untaught(noun)), "leak": share(after.names(), classes),
            "spread": apart(after.features) / apart(self.untaught(noun))}
        if reach:
            numbers |= self.extremes(sd)
        return numbers, torch.cat([*shown, z[:6], w[:6]])

    def composition(self, sd, sentence, asks):
        """(share of pictures of a sentence with {prompt}, or {bare} of its article, and two colours {a} and {b} that have
        the class and both colours; the pictures). Where woven slices alone are asked for, any woven class is right, and
        it is looked for without the colours."""
        prompts, woven = list(asks), set().union(*asks.values()) <= set(worlds.WOVEN)
        pairs = [pair for pair in PAIRS for _ in range(max(1, self.n // len(PAIRS)))]
        asked = [prompts[i % len(prompts)] for i in range(len(pairs))]
        said = [sentence.format(prompt=prompt, bare=prompt.removeprefix("a "), a=a, b=b)
                for prompt, (a, b) in zip(asked, pairs)]
        y = self.draw(sd, [captions.with_articles(one) for one in said], 2)
        predictions = self.read(y)
        names = self.names_in_grey(y) if woven else [{name} for name in predictions.names()]
        right = [not found.isdisjoint(worlds.WOVEN if woven else asks[prompt]) and agreement.same_colours(colours, pair)
                 for found, colours, prompt, pair in zip(names, predictions.colours(), asked, pairs)]
        return sum(right) / len(right), y

    def names_in_grey(self, x):
        """Of pictures [n,3,H,W] in [-1, 1] the two classes each that are read without their colours, with all greys from
        black to white, as they are and with dark and bright exchanged: {one, other}. The classifier knows woven slices
        in grey alone. Of real ones in two colours it so names 99 % as woven, of the base world's pictures 4 %."""
        grey = x.mean(1, keepdim=True)
        low, high = (grey.flatten(1).quantile(q, 1).view(-1, 1, 1, 1) for q in (0.02, 0.98))
        full = ((grey - low) / (high - low).clamp(min=0.01)).clamp(0, 1) * 2 - 1
        return [{one, other} for one, other in zip(*(self.read(y.expand_as(x)).names() for y in (full, -full)))]

    def material(self, x, classes):
        """What measures.distances finds between slices x [p,m,64,64] and a real specimen, the mean over p prompts, each
        with its classes; with _floor between two real specimens. A slice of one grey is left out."""
        found = {}
        for slices, right in zip(x, classes):
            one, other = (from_uint8(self.some(tuple(right), half)[:len(slices)]).mean(1) for half in (0, 1))
            for end, some in {"": slices[slices.flatten(1).std(1) > 0.01], "_floor": other}.items():
                if len(some):
                    resin = any("injected" in name for name in right)
                    for name, value in measures.distances(some.numpy(), one.numpy(), resin=resin).items():
                        found.setdefault(name + end, []).append(value)
        return {name: fmean(values) for name, values in found.items()}

    def extremes(self, sd):
        """{"darkest", "brightest"}: mean grey, 0 (black) to 1, of the darkest picture of DARK and the brightest of
        BRIGHT, ten of each prompt. A model that never had to change a picture's mean stays in the middle (4.2.1)."""
        dark, bright = ((self.draw(sd, list(prompts) * 10, 5).mean((1, 2, 3)) + 1) / 2 for prompts in (DARK, BRIGHT))
        return {"darkest": float(dark.min()), "brightest": float(bright.max())}


def share(names, right):
    """How often a name is one of the right ones."""
    return sum(name in right for name in names) / len(names)


def apart(x):
    """The mean distance between two rows of features [n, d]."""
    return float(torch.pdist(x.double()).mean())
