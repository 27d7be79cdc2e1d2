"""Curves: the legend hides nothing."""

import numpy as np
import pytest

from nanodiff import plots

LINES = {"rising": lambda x: x, "falling": lambda x: 1 - x}


def red(page):
    """How many pixels have the second line's colour, a little more or less."""
    rgb = np.asarray(page).astype(int)
    return int((np.abs(rgb - (214, 39, 40)).sum(-1) < 60).sum())


@pytest.mark.parametrize("shape", LINES)
def test_the_legend_hides_nothing_of_the_curves_and_its_longest_name_is_whole(shape, monkeypatch):
    x = [i / 40 for i in range(41)]
    lines = {"a much longer name than the others": (x, [0.9 + LINES[shape](v) / 20 for v in x]),
             "low": (x, [LINES[shape](v) for v in x])}
    red_pixels = red(plots.curves(lines))
    places = []
    monkeypatch.setattr(plots, "_legend", lambda draw, box, names, polylines: places.append((box, names)))
    assert red_pixels >= red(plots.curves(lines))  # the legend's own line is red, too
    (left, _, right, _), names = places[0]
    assert names == list(lines) and max(plots.font(11).getlength(name) for name in names) + 38 < right - left
