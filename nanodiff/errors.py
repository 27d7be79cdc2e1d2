"""The two errors that end a run on purpose, and the nearest known word for their sentences."""

import difflib


class UserError(ValueError):
    """Wrong input: one sentence naming what was wrong, what was expected and the nearest right thing.

    Scripts print it on stderr and end with exit code 2 before work starts.
    """


class Diverged(RuntimeError):
    """A loss, a gradient or a weight is not finite; that state is never saved. Scripts end with exit code 1."""


def check(ok, sentence):
    """UserError with `sentence` unless `ok`."""
    if not ok:
        raise UserError(sentence)


def nearest(word, choices):
    """', nearest: X' for the choice closest to `word`, or '' when none is close."""
    close = difflib.get_close_matches(str(word), [str(choice) for choice in choices], 1, 0.4)
    return f", nearest: {close[0]}" if close else ""


def check_finite(finite, start=0):
    """Diverged, naming the step, at the first false entry of a list of 0-dim tensors, from index `start` on."""
    for step in range(start, len(finite)):
        if not bool(finite[step]):
            raise Diverged(f"step {step + 1}: the latents are not finite (NaN or infinity); expected dtype float32, "
                           "less guidance or an undamaged checkpoint")
