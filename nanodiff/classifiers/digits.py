"""A small classifier of 28 x 28 digits, with calibrated probabilities; it judges generated MNIST digits.

Ten outputs are the digits, the eleventh means "not a digit". Its penultimate layer gives the features for the Fréchet
distance and coverage. Its weights are in data/reader/; this command makes them again:

    python -m nanodiff.classifiers.digits            about four minutes on two cores (3.6 measured)
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

from nanodiff.classifiers import digit_negatives
from nanodiff.classifiers.worlds import as_float, calibration_error, convolution, fit_temperature, initialise
from nanodiff.data import mnist
from nanodiff.errors import UserError
from nanodiff.files import DATA, write_text
from nanodiff.formats.weights import write_weights

NOT_A_DIGIT = 10
WEIGHTS = DATA / "reader" / "mnist.safetensors"
COMMAND = "python -m nanodiff.classifiers.digits"
HELD_OUT = 5000  # the last training digits: they set the temperature and are never trained on


class DigitClassifier(nn.Module):
    """Convolutional classifier of grey digits x [B,1,28,28] in [-1, 1]; 64 features, 11 outputs, 230 k parameters."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *convolution(1, 24, kernel=5, stride=2),  # [B,24,14,14]
            *convolution(24, 48),
            *convolution(48, 64, stride=2),  # [B,64,7,7]
            *convolution(64, 64),
            *convolution(64, 96, stride=2),  # [B,96,4,4]
            nn.Flatten(),
            nn.Linear(96 * 4 * 4, 64),
        )
        self.head = nn.Linear(64, 11)
        self.temperature = 1.0

    def features(self, x):
        """Features [B,64] of the penultimate layer, before its nonlinearity."""
        return self.body(x)

    def forward(self, x):
        """Logits [B,11]: the ten digits, then "not a digit", before division by the temperature."""
        return self.head(F.relu(self.features(x)))

    def probabilities(self, x):
        """Calibrated probabilities [B,11] (Guo et al. 2017, eq. 9)."""
        return (self(x) / self.temperature).softmax(dim=1)


def load_classifier(path=None):
    """The trained DigitClassifier, frozen and in eval mode, from `path` or the weights that the repository ships.

    UserError when the file is missing or of another kind; it names the command that makes the weights.
    """
    path = Path(path or WEIGHTS)
    if not path.is_file():
        raise UserError(f"there are no weights of the digit classifier at {path}; make them with: {COMMAND}")
    try:
        with safe_open(path, "pt") as file:
            weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        net = DigitClassifier()
        net.load_state_dict(weights)
        net.temperature = float(metadata["temperature"])
    except (SafetensorError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not hold a digit classifier ({reason}); make it again with: {COMMAND}") from error
    return net.eval().requires_grad_(False)


@torch.no_grad()
def classify(net, x, batch=500):
    """Features [n,64] and probabilities [n,11] of pictures x [n,1,28,28], in batches, both on the CPU.

    x is uint8 in 0..255, or floats in [-1, 1], which are clipped to that range. UserError for another shape, or when a
    value is not finite.
    """
    if x.ndim != 4 or tuple(x.shape[1:]) != (1, 28, 28) or len(x) == 0:
        raise UserError(f"the digit classifier expects pictures [n, 1, 28, 28] with n at least 1, "
                        f"but the shape is {list(x.shape)}")
    device = next(net.parameters()).device
    features, probabilities = [], []
    for pictures in x.split(batch):
        pictures = as_float(pictures.to(device))
        features.append(net.features(pictures))
        probabilities.append((net.head(F.relu(features[-1])) / net.temperature).softmax(dim=1))
    features = torch.cat(features).cpu()
    if not features.isfinite().all():
        raise UserError(f"{int((~features.isfinite()).any(1).sum())} of {len(x)} pictures hold values that are "
                        f"not finite; the model that drew them has diverged")
    return features, torch.cat(probabilities).cpu()


# Training

def train(pixels, labels, epochs, seed, log=print):
    """A DigitClassifier trained on pixels uint8 [N,1,28,28] with labels [N], and on broken digits made from them."""
    generator = torch.Generator().manual_seed(seed)
    net = DigitClassifier().to(memory_format=torch.channels_last)
    initialise(net, generator)
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    batch, n_broken = 128, len(pixels) * 3 // 10
    total = epochs * ((len(pixels) + n_broken) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=4e-3, total_steps=total, pct_start=0.15)
    for epoch in range(epochs):
        start, losses = time.time(), []
        x, y = _epoch(pixels, labels, n_broken, generator)
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            if len(rows) < batch:
                continue
            loss = F.cross_entropy(net(x[rows].contiguous(memory_format=torch.channels_last)), y[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
        log(f"epoch {epoch + 1}/{epochs}  loss {torch.stack(losses).mean():.4f}  {time.time() - start:.0f} s")
    return net.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


def _epoch(pixels, labels, n_broken, generator):
    """Pictures [N + n_broken,1,28,28] and labels of one epoch: all digits, augmented, then n_broken broken ones."""
    real = torch.cat([digit_negatives.augment(as_float(pictures), generator) for pictures in pixels.split(5000)])
    # Half of the digits stay as they are: otherwise soft edges would tell digits from broken digits
    original = torch.rand(len(real), 1, 1, 1, generator=generator) < 0.5
    real = torch.where(original, as_float(pixels), real)
    rows = torch.randperm(len(pixels), generator=generator)[:n_broken]
    broken = digit_negatives.break_digits(real[rows], labels[rows], generator)
    return torch.cat([real, broken]), torch.cat([labels, torch.full((n_broken,), NOT_A_DIGIT)])


def measure(net, pixels, labels, seed=0):
    """Accuracy and rejection on test digits, pixels uint8 [n,1,28,28] with labels [n]: shares in 0..1, by name.

    "rejected" maps every kind of broken picture to the share classified as "not a digit". "passed" maps it to the share
    classified as one of the ten digits with probability >= 0.9. "unseen" lists the kinds that training never saw.
    """
    generator = torch.Generator().manual_seed(seed)
    _, probabilities = classify(net, pixels)
    raw = probabilities.double() ** net.temperature  # back to temperature 1, up to a factor
    figures = {
        "accuracy": float((probabilities.argmax(dim=1) == labels).double().mean()),
        "read_as_digit": float((probabilities[:, :NOT_A_DIGIT].amax(dim=1) >= 0.9).double().mean()),
        "called_broken": float((probabilities.argmax(dim=1) == NOT_A_DIGIT).double().mean()),
        "calibration_error_raw": calibration_error(raw / raw.sum(dim=1, keepdim=True), labels),
        "calibration_error": calibration_error(probabilities, labels),
        "rejected": {}, "passed": {}, "unseen": ["gaussian_noise", "uniform_noise", *digit_negatives.HELD_OUT_KINDS],
    }
    x, y = as_float(pixels[:2000]), labels[:2000]
    broken = {name: digit_negatives.break_digits(x, y, generator, {name: kind})
             for name, kind in {**digit_negatives.TRAINING_KINDS, **digit_negatives.HELD_OUT_KINDS}.items()}
    broken["gaussian_noise"] = torch.randn(x.shape, generator=generator)  # where a sampler starts
    broken["uniform_noise"] = torch.rand(x.shape, generator=generator) * 2 - 1
    for name, pictures in broken.items():
        _, probabilities = classify(net, pictures)
        figures["rejected"][name] = float((probabilities.argmax(dim=1) == NOT_A_DIGIT).double().mean())
        figures["passed"][name] = float((probabilities[:, :NOT_A_DIGIT].amax(dim=1) >= 0.9).double().mean())
    return figures


def table(figures):
    """The figures of `measure` as Markdown."""
    rows = [("test accuracy, 11-way (\"not a digit\" is an error)", "accuracy", ">= 99 %"),
            ("test digits read as a digit with probability >= 0.9", "read_as_digit", ">= 97 %"),
            ("test digits called \"not a digit\"", "called_broken", ""),
            ("expected calibration error, temperature 1", "calibration_error_raw", ""),
            ("expected calibration error, calibrated", "calibration_error", "")]
    lines = ["| 10,000 MNIST test digits | measured | bar |", "|---|---|---|"]
    lines += [f"| {text} | {100 * figures[key]:.2f} % | {bar} |" for text, key, bar in rows]
    lines += ["", "| broken picture | in training | called \"not a digit\" | passes as a digit (>= 0.9) |",
              "|---|---|---|---|"]
    lines += [f"| {kind} | {'no' if kind in figures['unseen'] else 'yes'} | {100 * share:.1f} % | "
              f"{100 * figures['passed'][kind]:.1f} % |" for kind, share in figures["rejected"].items()]
    return "\n".join(lines)


def main(argv=None):
    """Train the classifier, measure it on the test digits, save it."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Train the digit classifier on MNIST.")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="safetensors file; a page is written beside it")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        raise UserError(f"--epochs is {args.epochs}, but at least 1 is needed")
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder, but the name of a safetensors file is expected")
    digits, test = (mnist.load(DATA / "mnist", split) for split in ("train", "test"))
    pixels, labels = digits.pixels, digits.labels
    started = time.time()
    net = train(pixels[:-HELD_OUT], labels[:-HELD_OUT], args.epochs, args.seed)
    net.temperature = fit_temperature(classify(net, pixels[-HELD_OUT:])[1], labels[-HELD_OUT:])
    minutes = (time.time() - started) / 60
    figures = measure(net, test.pixels, test.labels)
    markdown = table(figures)
    print(f"temperature {net.temperature:.3f}, {minutes:.1f} minutes\n{markdown}")
    write_weights(args.out, net.state_dict(), {
        "temperature": f"{net.temperature:.4f}", "accuracy": f"{figures['accuracy']:.4f}", "seed": str(args.seed),
        "epochs": str(args.epochs), "figures": json.dumps(figures)})
    write_text(args.out.with_suffix(".md"), PAGE.format(
        name=args.out.name, command=f"{COMMAND} --epochs {args.epochs} --seed {args.seed}", minutes=minutes,
        size=args.out.stat().st_size / 1e6, parameters=sum(p.numel() for p in net.parameters()) / 1e3,
        temperature=net.temperature, table=markdown, held_out=HELD_OUT))


PAGE = """# The digit classifier's weights

`{name}` ({size:.2f} MB, {parameters:.0f} k parameters): the judge of generated MNIST digits,
see `nanodiff/classifiers/digits.py`. This project trained it on MNIST (`data/mnist/`), so its weights fall under this
project's licence. Made, with this page, by

    {command}

in {minutes:.1f} minutes on two CPU cores: 55,000 training digits, augmented, and broken pictures made from them
(`nanodiff/classifiers/digit_negatives.py`). The last {held_out:,} training digits set the temperature
({temperature:.3f}). No choice was made on the test digits, which give the figures below.

{table}

Its limits: mirrored and upside-down digits were not among the broken pictures, and about half of them pass as a digit;
so do most at half contrast. What passes among halves, mosaics and interlaced digits mostly looks like a digit.
"""


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        sys.exit(2)
