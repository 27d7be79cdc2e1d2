"""The report's figures on the variational autoencoder: 10 the loss and its terms, 11 reconstructions, 12 the map of the
latents; and what each number of a latent changes."""

import json
import time

import torch

from nanodiff import plots
from nanodiff.data.images import spread
from nanodiff.diffusion import gaussian
from nanodiff.files import write_text
from nanodiff.metrics.tsne import neighbour_accuracy, tsne
from nanodiff.metrics.vae_elbo import posteriors
from nanodiff.models.autoencoder import drawn


def draw_all(run, net, held_out):
    """The numbers of the latents of held-out pictures; writes figures 11 and 12 and traversals.png into a finished run.

    kl_of_each [latent]: mean KL of each number in nats; in_use: how many are above 0.01; deviation: mean of q's; map:
    of figure 12, which --tsne 0 leaves out.
    """
    places = spread(held_out, 96)
    x = held_out.read(places, places)
    mean, _ = posteriors(net, x)
    plots.save(plots.reconstructions(x, drawn(net, mean)), run.path("figure11_reconstructions.png"))
    places = spread(held_out, run.config.tsne or 2000)
    mean, deviation = posteriors(net, held_out.read(places, places))
    each = gaussian.kl_diagonal(mean, deviation**2, torch.zeros(()), torch.ones(())).mean(0)  # [latent]
    plots.save(traversals(net, mean[0], each), run.path("traversals.png"))
    numbers = {"kl_of_each": each.tolist(), "in_use": int((each > 0.01).sum()), "deviation": float(deviation.mean())}
    if run.config.tsne:
        label = None if held_out.labels is None else held_out.labels[places]
        numbers["map"] = latent_map(run, mean, label, held_out.classes)
    return numbers


def loss_curves(run):
    """-ELBO and its two terms on training and held-out pictures, each with an axis of its own (report figure 10)."""
    pages = []
    for term in ("minus_elbo", "reconstruction", "kl"):
        lines = {}
        for name, label in (("train", "training"), ("held_out", "held out")):
            steps, rows = run.history(name)
            lines[label] = (steps, [row[term] for row in rows])
        title = {"minus_elbo": "-ELBO", "kl": "KL"}.get(term, "Reconstruction")
        pages.append(plots.curves(lines, f"{title} in nats a picture", "step", size=(720, 300)))
    return plots.stack(pages)


def traversals(net, start, each, rows=10, columns=11):
    """A latent start [latent] changed in one number at a time, from -3 to 3: the numbers with the largest KL first."""
    values = torch.linspace(-3, 3, columns)
    chosen = each.argsort(descending=True)[:rows]
    table = []
    for number in chosen.tolist():
        z = start.repeat(columns, 1)
        z[:, number] = values
        table.append(list(drawn(net, z)))
    labels = [f"z{number}, KL {each[number]:.2f}" for number in chosen.tolist()]
    return plots.sheet(table, labels, [f"{round(value, 1) + 0:.1f}" for value in values.tolist()])  # + 0: no "-0.0"


def latent_map(run, mean, label, classes):
    """Figure 12: t-SNE of the means [n, latent]; returns its numbers, or None where there are too few pictures."""
    perplexity = min(30, (len(mean) - 1) // 3)
    if perplexity < 2:
        run.print(f"{len(mean)} held-out pictures are too few for a map of the latents; 7 are enough")
        return None
    started = time.time()
    y = tsne(mean, perplexity, seed=run.config.seed)
    numbers = {"pictures": len(y), "perplexity": perplexity, "seconds": round(time.time() - started, 1)}
    if label is not None and len(y) > 10:
        numbers |= {"neighbour_accuracy": neighbour_accuracy(y, label),
                    "neighbour_accuracy_in_latents": neighbour_accuracy(mean, label)}
        run.print("t-SNE of {pictures:,} means in {seconds} s: the 10 nearest tell the label of "
                  "{neighbour_accuracy:.1%} on the map, of {neighbour_accuracy_in_latents:.1%} in the latents".format(
                      **numbers))
    plots.save(plots.label_map(y, label, classes, "t-SNE of held-out means"), run.path("figure12_tsne.png"))
    label = label if label is None else label.tolist()
    write_text(run.path("figure12_tsne.json"), json.dumps({**numbers, "y": y.tolist(), "label": label}) + "\n")
    return numbers
