"""The two ways in which a run ends early on purpose."""


class UserError(ValueError):
    """Wrong input: one sentence naming what was wrong, what was expected and the nearest right thing.

    Scripts print it on stderr and end with exit code 2 before any work starts.
    """


class Diverged(RuntimeError):
    """A loss, a gradient or a weight is not finite; nothing of it is saved. Scripts end with exit code 1."""
