"""How the classifiers judge samples: do they match the prompt, are they like real pictures, are they copies?

    agreement, prompt_agreement    how often the predicted class and colours are those of the prompt
    compare, judge, judge_digits   Fréchet and kernel distance, coverage, precision and recall, with their floors
    distribution                   the same for many samples of a text-to-image model, and the nearest training pictures
    diversity                      the distance between samples of one prompt, relative to that between real pictures
    composition                    class and colours of prompts whose pair of the two training never showed

All take pictures, not models, and return numbers ready for JSON. A Fréchet distance on these classifiers is not FID.
"""

import torch

from nanodiff.classifiers import digits
from nanodiff.classifiers import worlds as world_classifier
from nanodiff.errors import UserError, nearest
from nanodiff.metrics.frechet import frechet_distance
from nanodiff.metrics.kid import kernel_distance
from nanodiff.metrics.neighbours import coverage, nearest_training_distance, precision_recall
from nanodiff.worlds import textures

LIKENESS = ("frechet", "recall", "precision", "coverage")


def agreement(predictions, names, colours=None):
    """How often a classifier's Predictions match the prompts: a dict of shares in 0..1.

    names: the class that each picture should have. colours: None, or the (figure, ground) colours that it should have,
    None for a colour that its prompt leaves open. Returns
        class                   share with the right class
        by_class                {class: the same among pictures that should have it}, worst_class: the smallest of them
        rejected                share classified as nonsense
        colours, class_and_colours   shares (only when `colours` is given); the order of the two colours is free
    UserError when a name is none of the classifier's classes.
    """
    classes = predictions.classifier.classes
    for name in names:
        if name not in classes:
            raise UserError(f'the classifier has no class "{name}"; expected one of its {len(classes)}'
                            f"{nearest(name, classes)}")
    names_predicted = predictions.names()
    class_right = [a == b for a, b in zip(names_predicted, names)]
    by_class = {name: _share(correct for correct, expected in zip(class_right, names) if expected == name)
                for name in dict.fromkeys(names)}
    shares = {"class": _share(class_right), "by_class": by_class, "worst_class": min(by_class.values()),
              "rejected": _share(name == world_classifier.NONSENSE for name in names_predicted)}
    if colours is not None:
        colours_right = [same_colours(pair, expected) for pair, expected in zip(predictions.colours(), colours)]
        shares |= {"colours": _share(colours_right),
                   "class_and_colours": _share(a and b for a, b in zip(class_right, colours_right))}
    return shares


def same_colours(predicted, expected):
    """Whether the predicted (figure, ground) contains the expected colours, in any order: stripes have no figure."""
    expected = [colour for colour in expected if colour is not None]
    return set(expected) <= set(predicted)


def _share(flags):
    flags = list(flags)
    return sum(flags) / max(1, len(flags))


def compare(samples, real, floor):
    """Fréchet and kernel distance, coverage, precision and recall of features [m,d] against real ones [m,d]: a dict.

    floor [m,d]: features of training pictures; their numbers end in "_floor" (no model can be expected to do better).
    All three need the same m. On the project's classifiers this is not FID and not KID.
    """
    numbers = {}
    for name, x in (("", samples), ("_floor", floor)):
        precision, recall = precision_recall(real, x)
        numbers |= {"frechet" + name: frechet_distance(x, real), "coverage" + name: coverage(real, x),
                  "kernel" + name: kernel_distance(x, real, subsets=10)["kid"],
                  "precision" + name: precision, "recall" + name: recall}
    return numbers


def judge(samples, real, train, classifier, seed=0):
    """Classes, distances and copies of samples [n,C,H,W], with the floor that training pictures reach.

    real (held out) and train: pictures in the same form (uint8, or floats in [-1, 1]). m pictures of each are compared,
    m being the smallest of the three numbers; `seed` draws them. Returns numbers ready for JSON:
        n, compared (m), rejected_share (classified as nonsense), class_shares {class: share} of the classes that occur
        frechet, kernel, coverage, precision, recall and each with _floor, on the classifier's features (not FID)
        nearest_train, nearest_train_test     median feature distance to the nearest of all training pictures:
                                              of samples, of held-out pictures
        copied_share, memorised               see neighbours.nearest_training_distance
    """
    compared = min(len(samples), len(real), len(train))
    generator = torch.Generator().manual_seed(seed)
    real = real[torch.randperm(len(real), generator=generator)[:compared]]
    sample_rows = torch.randperm(len(samples), generator=generator)[:compared]  # samples may be sorted by class
    predictions, real, train = (world_classifier.classify(classifier, x) for x in (samples, real, train))
    floor_rows = torch.randperm(len(train.features), generator=generator)[:compared]
    distances = nearest_training_distance(predictions.features, train.features, real.features)
    shares = predictions.classes.argmax(1).bincount(minlength=len(classifier.classes)) / len(samples)
    return {"n": len(samples), "compared": compared,
            "rejected_share": float(shares[classifier.classes.index(world_classifier.NONSENSE)]),
            "class_shares": {name: float(share) for name, share in zip(classifier.classes, shares) if share > 0},
            **compare(predictions.features[sample_rows], real.features, train.features[floor_rows]),
            "nearest_train": distances["median"], "nearest_train_test": distances["test_median"],
            "copied_share": distances["copied_share"], "memorised": distances["memorised"]}


def judge_digits(samples, real, train, classifier, seed=0):
    """Classes, distances and copies of generated digits, with the floor that training digits reach.

    samples [n,1,28,28], real (test digits) and train: uint8, or floats in [-1, 1]. The distances compare the first
    m = min(n, len(real), len(train)) samples with m test digits. A `_floor` is the same number for m training digits:
    no model can be expected to do better. `seed` draws both, because MNIST's first 5,000 test digits come from tidier
    writers than the rest. Returns numbers ready for JSON:
        n, compared (m)
        digit_share             share classified as one of the ten digits with probability >= 0.9
        rejected_share          share classified as "not a digit"
        digit_shares [10], smallest_digit_share      of the samples that are not rejected
        frechet, kernel, coverage, precision, recall and each with _floor, on the classifier's 64 features (not FID)
        nearest_train, nearest_train_test     median pixel distance to the nearest training digit: samples, test digits
        copied_share, memorised               see neighbours.nearest_training_distance
    """
    compared = min(len(samples), len(real), len(train))
    generator = torch.Generator().manual_seed(seed)
    real = real[torch.randperm(len(real), generator=generator)[:compared]]
    floor = train[torch.randperm(len(train), generator=generator)[:compared]]
    features, probabilities = digits.classify(classifier, samples)
    real_features, _ = digits.classify(classifier, real)
    floor_features, _ = digits.classify(classifier, floor)
    distances = nearest_training_distance(*(world_classifier.as_float(x).cpu() for x in (samples, train, real)))

    as_digits = probabilities[:, :digits.NOT_A_DIGIT]
    accepted = probabilities.argmax(dim=1) != digits.NOT_A_DIGIT
    counts = as_digits[accepted].argmax(dim=1).bincount(minlength=10)
    shares = (counts / counts.sum().clamp(min=1)).tolist()
    return {"n": len(samples), "compared": compared,
            "digit_share": float((as_digits.amax(dim=1) >= 0.9).float().mean()),
            "rejected_share": float((~accepted).float().mean()),
            "digit_shares": shares, "smallest_digit_share": min(shares),
            **compare(features[:compared], real_features, floor_features),
            "nearest_train": distances["median"], "nearest_train_test": distances["test_median"],
            "copied_share": distances["copied_share"], "memorised": distances["memorised"]}


# --- text to image ----------------------------------------------------------------------------------------------------

def prompt_agreement(x, prompts, classifier):
    """How often pictures x [n,3,H,W] match their prompts: shares in 0..1. prompts: rows (caption, class, colours).

        class, by_class, rejected     as in `agreement`; worst_class (share), worst (its name)
        colours                       share with the named colours, among prompts that name any
        class_and_colours             share with both right, among all prompts
    """
    names, colours = [name for _, name, _ in prompts], [pair for _, _, pair in prompts]
    predictions = world_classifier.classify(classifier, x)
    shares = {"n": len(x), **agreement(predictions, names, colours)}
    shares["worst"] = min(shares["by_class"], key=shares["by_class"].get)
    with_colours = [i for i, pair in enumerate(colours) if pair != (None, None)]
    predicted = predictions.colours()
    colours_right = [same_colours(predicted[i], colours[i]) for i in with_colours]
    return shares | {"colours": sum(colours_right) / max(1, len(colours_right))}


def distribution(x, real, train, copies, classifier):
    """How like held-out real pictures [m,...] the samples x [m,3,H,W] are as a set, and how many are copies: a dict.

    train [l,...], l >= m: the pictures that the model was trained on; the first m give the floor
    copies [m,...]: the held-out pictures after the model's autoencoder, or None
    All numbers are on the classifier's features, so this is not FID:
        n (= m), training (= l)
        frechet, recall, precision, coverage    of samples; "_floor": of training pictures, "_copies": of copies
        nearest_train, nearest_test    median distance to the nearest training picture: of samples, of held-out pictures
        copied_share, memorised        see neighbours.nearest_training_distance; copied_share_test: of held-out pictures
    UserError when the numbers of pictures differ.
    """
    if not len(x) == len(real) <= len(train) or copies is not None and len(copies) != len(real):
        raise UserError(f"{len(x)} samples, {len(real)} held-out and {len(train)} training pictures cannot be "
                        "compared: as many held-out pictures as samples are needed, and no fewer for training")
    features, real, train = (world_classifier.classify(classifier, pictures).features for pictures in (x, real, train))
    numbers = {"n": len(x), "training": len(train), **compare(features, real, train[:len(x)])}
    if copies is not None:
        of_copies = compare(world_classifier.classify(classifier, copies).features, real, train[:len(x)])
        numbers |= {name + "_copies": of_copies[name] for name in LIKENESS}
    distances = nearest_training_distance(features, train, real)
    limit = 0.5 * distances["test_distance"].quantile(0.01)
    return numbers | {"nearest_train": distances["median"], "nearest_test": distances["test_median"],
                      "copied_share": distances["copied_share"], "memorised": distances["memorised"],
                      "copied_share_test": float((distances["test_distance"] <= limit).double().mean())}


def diversity(x, real, names, each, classifier):
    """The distance between samples of one prompt relative to that between real pictures: a dict of ratios.

    x and real: pictures [p x each,3,H,W], the `each` pictures of a prompt in a row; names [p]: the prompts' classes.
    Distances are means over pairs of one prompt's pictures. ratio is their mean ratio over prompts, worst_ratio the
    smallest and by_class the mean of each class, on the classifier's features; pixel_ratio is the mean on pixels.
    """
    if each < 2 or len(x) != len(real) or len(x) != each * len(names):
        raise UserError(f"{len(x)} samples and {len(real)} real pictures were given for {len(names)} prompts; expected "
                        f"{each} for each, and at least 2")
    features, real_features = (world_classifier.classify(classifier, pictures).features for pictures in (x, real))
    ratio = _spread(features, each) / _spread(real_features, each)
    pixel_ratio = _spread(world_classifier.as_float(x), each) / _spread(world_classifier.as_float(real), each)
    by_class = {name: float(ratio[[i for i, other_name in enumerate(names) if other_name == name]].mean())
                for name in dict.fromkeys(names)}
    return {"prompts": len(names), "each": each, "ratio": float(ratio.mean()), "worst_ratio": float(ratio.min()),
            "pixel_ratio": float(pixel_ratio.mean()), "by_class": by_class}


def _spread(x, each):
    """Mean distance [p] between two of the `each` rows of every prompt in x [p x each, ...]."""
    x = x.flatten(1).double().unflatten(0, (-1, each))
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2)) / (each * (each - 1))


def composition(x, scenes, classifier):
    """How often class and colours are right in pictures x [n,3,H,W] of scenes whose pairs training never shows: a dict.

    n; class, colours and class_and_colours (shares in 0..1); by_class {class: class_and_colours}; and by_pair
    {class: {colour that training never shows with it: [right, n]}}, where a scene of two such colours counts for both.
    """
    predictions = world_classifier.classify(classifier, x)
    class_right = [named == scene.name for named, scene in zip(predictions.names(), scenes)]
    colours_right = [same_colours(pair, scene.colours) for pair, scene in zip(predictions.colours(), scenes)]
    by_class, by_pair = {}, {}
    for named, coloured, scene in zip(class_right, colours_right, scenes):
        by_class.setdefault(scene.name, []).append(named and coloured)
        for colour in scene.colours:
            if not textures.met(scene.name, colour):
                pair = by_pair.setdefault(scene.name, {}).setdefault(colour, [0, 0])
                pair[0], pair[1] = pair[0] + (named and coloured), pair[1] + 1
    return {"n": len(scenes), "class": sum(class_right) / len(scenes), "colours": sum(colours_right) / len(scenes),
            "class_and_colours": sum(a and b for a, b in zip(class_right, colours_right)) / len(scenes),
            "by_class": {name: sum(correct) / len(correct) for name, correct in by_class.items()}, "by_pair": by_pair}
