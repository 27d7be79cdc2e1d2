"""What the classifiers make of samples: is it what was asked for, is it like real pictures, is it copied?

    agreement, prompt_agreement    does the classifier see the class and the colours that the prompt names
    compare, judge, judge_digits   Fréchet and kernel distance, coverage, precision and recall beside real pictures' floors
    distribution                   the same of many samples of a text-to-image model, and the nearest training pictures
    diversity                      how far apart are samples of one prompt, as a share of how far apart real pictures are
    composition                    are class and colours right where training never showed the two together

All take pictures, not models, and return numbers ready for JSON. On the project's classifiers a Fréchet distance is not FID.
"""

import torch

from nanodiff.classifiers import digits
from nanodiff.classifiers import worlds as classifier
from nanodiff.errors import UserError, nearest
from nanodiff.metrics.frechet import frechet_distance
from nanodiff.metrics.kid import kernel_distance
from nanodiff.metrics.neighbours import coverage, nearest_training_distance, precision_recall
from nanodiff.worlds import textures

LIKENESS = ("frechet", "recall", "precision", "coverage")


def agreement(reading, names, colours=None):
    """How often the reader sees what was asked for -> dict of shares in 0..1.

    names: the class asked for, one for each picture; colours: None, or the (figure, ground) colours asked for (a pair
    of words or Nones each, None where nothing was asked). Returns
        class                   share read as the class asked for
        by_class                {class: the same among its own pictures}, worst_class: the smallest of them
        rejected                share read as nonsense
        colours, class_and_colours   shares (with `colours` alone), colours of textures in either order
    UserError when a name is none of the reader's.
    """
    known = reading.reader.classes
    for name in names:
        if name not in known:
            raise UserError(f'the reader has no class "{name}"; expected one of its {len(known)}{nearest(name, known)}')
    read = reading.names()
    right = [a == b for a, b in zip(read, names)]
    by_class = {name: _share(r for r, wanted in zip(right, names) if wanted == name) for name in dict.fromkeys(names)}
    found = {"class": _share(right), "by_class": by_class, "worst_class": min(by_class.values()),
             "rejected": _share(name == classifier.NONSENSE for name in read)}
    if colours is not None:
        good = [same_colours(seen, wanted) for seen, wanted in zip(reading.colours(), colours)]
        found |= {"colours": _share(good), "class_and_colours": _share(a and b for a, b in zip(right, good))}
    return found


def same_colours(seen, wanted):
    """Do the (figure, ground) seen hold what was wanted? Order counts for nothing: striped has no figure."""
    wanted = [one for one in wanted if one is not None]
    return set(wanted) <= set(seen)


def _share(flags):
    flags = list(flags)
    return sum(flags) / max(1, len(flags))


def compare(samples, real, floor):
    """Fréchet and kernel distance, coverage, precision and recall of features [m,d] against real ones [m,d] -> dict of
    floats.

    floor [m,d]: features of training pictures; the same numbers for them stand beside, with "_floor" (no model can be
    expected to do better). All three must have one m. On the project's readers this is not FID and not KID.
    """
    found = {}
    for name, x in (("", samples), ("_floor", floor)):
        precision, recall = precision_recall(real, x)
        found |= {"frechet" + name: frechet_distance(x, real), "coverage" + name: coverage(real, x),
                  "kernel" + name: kernel_distance(x, real, subsets=10)["kid"],
                  "precision" + name: precision, "recall" + name: recall}
    return found


def judge(samples, real, train, reader, seed=0):
    """What the reader and the neighbours say of samples [n,C,H,W], beside the floor that training pictures reach.

    real (held out) and train: pictures in the same form (uint8, or floats in [-1, 1]). Of each, m = min of the three
    numbers are compared, drawn with `seed`. Returns numbers ready for JSON:
        n, compared (m), rejected_share (read as nonsense), class_shares {class: share} of those that occur
        frechet, kernel, coverage, precision, recall and each with _floor, on the reader's features (this is not FID)
        nearest_train, nearest_train_test     median distance of the features to the nearest of all training pictures:
                                              of samples, of held-out pictures
        copied_share, memorised               see neighbours.nearest_training_distance
    """
    compared = min(len(samples), len(real), len(train))
    generator = torch.Generator().manual_seed(seed)
    real = real[torch.randperm(len(real), generator=generator)[:compared]]
    some = torch.randperm(len(samples), generator=generator)[:compared]  # they may come sorted by class
    seen, real, train = (classifier.read_all(reader, x) for x in (samples, real, train))
    drawn = torch.randperm(len(train.features), generator=generator)[:compared]
    near = nearest_training_distance(seen.features, train.features, real.features)
    shares = seen.classes.argmax(1).bincount(minlength=len(reader.classes)) / len(samples)
    return {"n": len(samples), "compared": compared, "rejected_share": float(shares[reader.classes.index(classifier.NONSENSE)]),
            "class_shares": {name: float(s) for name, s in zip(reader.classes, shares) if s > 0},
            **compare(seen.features[some], real.features, train.features[drawn]),
            "nearest_train": near["median"], "nearest_train_test": near["test_median"],
            "copied_share": near["copied_share"], "memorised": near["memorised"]}


def judge_digits(samples, real, train, reader, seed=0):
    """What the reader and the neighbours say of generated digits, beside the floor that training digits reach.

    samples [n,1,28,28], real (test digits) and train: uint8, or floats in [-1, 1]. The distances compare the first
    m = min(n, len(real)) samples with m test digits drawn with `seed`; a `_floor` is the same number for m training
    digits drawn likewise, so no model can be expected to do better. (Drawn, because MNIST's first 5,000 test digits
    come from other and tidier writers than the rest.) Returns numbers ready for JSON:
        n, compared (m)
        digit_share             share read as one of the ten digits with probability >= 0.9
        rejected_share          share read as "not a digit"
        digit_shares [10], smallest_digit_share      of the samples that are not rejected
        frechet, kernel, coverage, precision, recall, and each with _floor    on the reader's 64 features (no FID, KID)
        nearest_train, nearest_train_test     median pixel distance to the nearest training digit: samples, test digits
        copied_share, memorised               see neighbours.nearest_training_distance
    """
    compared = min(len(samples), len(real), len(train))
    generator = torch.Generator().manual_seed(seed)
    real = real[torch.randperm(len(real), generator=generator)[:compared]]
    floor = train[torch.randperm(len(train), generator=generator)[:compared]]
    features, probabilities = digits.read_all(reader, samples)
    real_features, _ = digits.read_all(reader, real)
    floor_features, _ = digits.read_all(reader, floor)
    nearest = nearest_training_distance(*(classifier.as_picture(x).cpu() for x in (samples, train, real)))

    as_digits = probabilities[:, :digits.NOT_A_DIGIT]
    accepted = probabilities.argmax(dim=1) != digits.NOT_A_DIGIT
    counts = as_digits[accepted].argmax(dim=1).bincount(minlength=10)
    shares = (counts / counts.sum().clamp(min=1)).tolist()
    return {"n": len(samples), "compared": compared,
            "digit_share": float((as_digits.amax(dim=1) >= 0.9).float().mean()),
            "rejected_share": float((~accepted).float().mean()),
            "digit_shares": shares, "smallest_digit_share": min(shares),
            **compare(features[:compared], real_features, floor_features),
            "nearest_train": nearest["median"], "nearest_train_test": nearest["test_median"],
            "copied_share": nearest["copied_share"], "memorised": nearest["memorised"]}


# --- text to image ------------------------------------------------------------------------------------------------------

def prompt_agreement(x, wanted, reader):
    """Does the reader see in pictures x [n,3,H,W] what was asked for (`prompts`)? Shares in 0..1:

        class, by_class, rejected     as in agreement.agreement; worst_class (share), worst (its name)
        colours                       the named colours are there, of the prompts that name any
        class_and_colours             both are right, of all prompts
    """
    names, colours = [name for _, name, _ in wanted], [pair for _, _, pair in wanted]
    reading = classifier.read_all(reader, x)
    found = {"n": len(x), **agreement(reading, names, colours)}
    found["worst"] = min(found["by_class"], key=found["by_class"].get)
    naming = [i for i, pair in enumerate(colours) if pair != (None, None)]
    seen = reading.colours()
    right = [same_colours(seen[i], colours[i]) for i in naming]
    return found | {"colours": sum(right) / max(1, len(right))}


def distribution(x, real, train, copies, reader):
    """Are samples x [m,3,H,W], as a set, like held-out real pictures [m,...], and not copies of training pictures?

    train [l,...], l >= m: the pictures that the model was trained on, the first m stand in for perfect samples
    copies [m,...]: the held-out pictures through the model's autoencoder and back, or None
    On the reader's features, so this is not FID: n (= m), and each of frechet, recall, precision, coverage for samples,
    with "_floor" for the m training pictures, with "_copies" for the copies; nearest_train and nearest_test, the median
    distance of samples and of held-out pictures to the nearest of all `training` pictures; copied_share (see
    neighbours.nearest_training_distance) and copied_share_test. UserError when the numbers of pictures differ.
    """
    if not len(x) == len(real) <= len(train) or copies is not None and len(copies) != len(real):
        raise UserError(f"{len(x)} samples, {len(real)} held-out and {len(train)} training pictures cannot be "
                        "compared: as many held-out pictures as samples are needed, and no fewer for training")
    seen, real, train = (classifier.read_all(reader, part).features for part in (x, real, train))
    found = {"n": len(x), "training": len(train), **compare(seen, real, train[:len(x)])}
    if copies is not None:
        copied = compare(classifier.read_all(reader, copies).features, real, train[:len(x)])
        found |= {name + "_copies": copied[name] for name in LIKENESS}
    near = nearest_training_distance(seen, train, real)
    limit = 0.5 * near["test_distance"].quantile(0.01)
    return found | {"nearest_train": near["median"], "nearest_test": near["test_median"],
                    "copied_share": near["copied_share"], "memorised": near["memorised"],
                    "copied_share_test": float((near["test_distance"] <= limit).double().mean())}


def diversity(x, real, names, each, reader):
    """How far apart are samples of one prompt? x and real: pictures [p x each,3,H,W], `each` of every prompt together.

    names [p]: the prompts' classes. The mean distance between two pictures of a prompt, of samples over real pictures:
    ratio and worst_ratio on the reader's features, by_class, and pixel_ratio; means over prompts.
    """
    if each < 2 or len(x) != len(real) or len(x) != each * len(names):
        raise UserError(f"{len(x)} samples and {len(real)} real pictures were given for {len(names)} prompts; expected "
                        f"{each} for each, and at least 2")
    seen, known = (classifier.read_all(reader, part).features for part in (x, real))
    ratio = _spread(seen, each) / _spread(known, each)
    pixels = _spread(classifier.as_picture(x), each) / _spread(classifier.as_picture(real), each)
    by_class = {name: float(ratio[[i for i, other in enumerate(names) if other == name]].mean())
                for name in dict.fromkeys(names)}
    return {"prompts": len(names), "each": each, "ratio": float(ratio.mean()), "worst_ratio": float(ratio.min()),
            "pixel_ratio": float(pixels.mean()), "by_class": by_class}


def _spread(x, each):
    """Mean distance between two of the `each` rows of every prompt: x [p x each, ...] -> [p]."""
    x = x.flatten(1).double().unflatten(0, (-1, each))
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2)) / (each * (each - 1))


def composition(x, some, reader):
    """Are class and both colours right in x [n,3,H,W]? some: the Scenes asked for, whose colours training never shows.

    n, class, colours and class_and_colours (shares in 0..1), by_class {class: class_and_colours}, and by_pair
    {class: {colour that training never shows with it: [right, n]}}; a scene of two such colours counts for both.
    """
    reading = classifier.read_all(reader, x)
    named = [a == scene.name for a, scene in zip(reading.names(), some)]
    coloured = [same_colours(seen, scene.colours) for seen, scene in zip(reading.colours(), some)]
    by_class, by_pair = {}, {}
    for a, b, scene in zip(named, coloured, some):
        by_class.setdefault(scene.name, []).append(a and b)
        for colour in scene.colours:
            if not textures.met(scene.name, colour):
                pair = by_pair.setdefault(scene.name, {}).setdefault(colour, [0, 0])
                pair[0], pair[1] = pair[0] + (a and b), pair[1] + 1
    return {"n": len(some), "class": sum(named) / len(some), "colours": sum(coloured) / len(some),
            "class_and_colours": sum(a and b for a, b in zip(named, coloured)) / len(some),
            "by_class": {name: sum(right) / len(right) for name, right in by_class.items()}, "by_pair": by_pair}
