"""Trained models as one thing each: how they draw, and the folder they lie in."""
