"""Curves that are drawn with characters have their points at the right places."""

import numpy as np
import pytest

from maskmoe.run_report.history import Curve
from maskmoe.run_status.plot import ASCII, UNICODE, choose_layers, draw_bar, draw_curves, glyphs_for


def curve(steps, values):
    values = np.array(values, dtype=float)
    return Curve(np.array(steps, dtype=np.int64), values, values, values)


def dots(lines):
    """Return the rows and columns of the dots of a plot in Braille characters."""
    bits = {
        0x01: (0, 0),
        0x02: (1, 0),
        0x04: (2, 0),
        0x40: (3, 0),
        0x08: (0, 1),
        0x10: (1, 1),
        0x20: (2, 1),
        0x80: (3, 1),
    }
    return {
        (4 * row + bits[bit][0], 2 * column + bits[bit][1])
        for row, line in enumerate(lines)
        for column, character in enumerate(line.partition("│")[2])
        if character != " "
        for bit in bits
        if (ord(character) - 0x2800) & bit
    }


def test_line_is_drawn_from_corner_to_corner():
    *plot, axis, ends = draw_curves(curve([1, 100], [2.0, 1.0]), None, 49, 10, UNICODE)
    # 40 characters, 80 columns and 40 rows of dots
    found = dots(plot)
    assert {(0, 0), (39, 79)} <= found
    assert all(abs(row - column * 39 / 79) <= 1 for row, column in found)
    assert {column for _, column in found} == set(range(80))
    assert plot[0].startswith("      2 │")
    assert plot[-1].startswith("      1 │")
    assert axis == "        └" + "─" * 40
    assert ends.split() == ["1", "100"]
    assert len(ends) == 49


def test_jump_has_no_gap():
    *plot, _, _ = draw_curves(curve([1, 2, 3, 4], [0, 0, 1, 1]), None, 13, 5, ASCII)
    assert [line.partition("|")[2] for line in plot] == ["  **", "  *", "  *", "  *", "**"]


def test_axis_is_logarithmic_for_a_factor_above_2():
    *plot, _, _ = draw_curves(curve([1, 2, 3], [4, 2, 1]), None, 12, 5, ASCII)
    assert [line.partition("|")[2] for line in plot] == ["*", " *", " *", "  *", "  *"]


def test_second_curve_is_drawn_over_the_first():
    *plot, _, _ = draw_curves(curve([1, 2, 3], [0, 1, 2]), curve([3], [4]), 12, 5, ASCII)
    assert [line.partition("|")[2] for line in plot] == ["  x", "", "  *", " *", "*"]


@pytest.mark.parametrize("values", [[1.0], [1e308, -1e308], [0, 0, 0], list(range(5000))])
@pytest.mark.parametrize("glyphs", [UNICODE, ASCII])
def test_any_curve_fits(values, glyphs):
    lines = draw_curves(curve(range(len(values)), values), None, 80, 8, glyphs)
    assert len(lines) == 10
    assert max(map(len, lines)) <= 80


def test_characters_depend_on_the_encoding():
    assert glyphs_for("utf-8") is UNICODE
    for encoding in ("ascii", "latin-1", "unknown", None):
        assert glyphs_for(encoding) is ASCII


def test_bars():
    assert [draw_bar(share, 4, ASCII) for share in (-1, 0, 0.5, 1, 9)] == ["....", "....", "##..", "####", "####"]


def test_layers_with_the_largest_load_are_chosen():
    assert choose_layers([1.0, 5.0, None, 3.0, 4.0], 2) == [1, 4]
