"""The one exception that means "the user's input is wrong"."""


class UserError(ValueError):
    """Wrong input: one sentence naming what was wrong, what was expected and the nearest right thing.

    Scripts print it on stderr and end with exit code 2 before any work starts.
    """
