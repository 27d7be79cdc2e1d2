"""What the first command taught and what it cost: the classifier on 20 slices of each woven class and the base world.

    python tests/benchmarks/judge_lora.py runs/lora-001

Of a run of train_lora.py on the small model with its own words (or none): the share of the generated slices that the
classifier names as asked for (bar: 90 %), what it takes the others for, and the share of held-out prompts of the base
world that are right before and after (bar: 5 points less at most). dpm++2m, 20 steps, guidance 3, about a minute.
"""

import sys
from collections import Counter
from pathlib import Path

import nanodiff
from nanodiff.classifiers import worlds as world_classifier
from nanodiff.data import captions
from nanodiff.metrics import agreement
from nanodiff.report import text_to_image
from nanodiff.report.compare import load_taught
from nanodiff.report.studies import WOVEN, spoken
from nanodiff.worlds import prompts

EACH, RUN = 20, {"sampler": "dpm++2m", "steps": 20, "guidance": 3.0}


def main(run):
    before, after, classifier = nanodiff.load(), load_taught(None, run), world_classifier.load_classifier()
    x = text_to_image.draw(after, [spoken(name) for name in WOVEN for _ in range(EACH)], seed=5, **RUN)
    names, right = world_classifier.classify(classifier, x).names(), 0
    for i, name in enumerate(WOVEN):
        found = Counter(names[i * EACH:(i + 1) * EACH])
        right += found[name]
        print(f"{name}: {found[name] / EACH:.0%}; " + ", ".join(f"{n} {one}" for one, n in found.most_common(3)))
    print(f"woven slices read as asked for: {right / len(names):.1%} of {len(names)}")
    asked = [one for one in prompts.prompts(4) if captions.is_plain(one[0])]
    for moment, sd in (("before", before), ("after", after)):
        x = text_to_image.draw(sd, [caption for caption, _, _ in asked], seed=6, **RUN)
        found = agreement.agreement(world_classifier.classify(classifier, x), [name for _, name, _ in asked])
        print(f"base world {moment}: {found['class']:.1%} of {len(asked)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
