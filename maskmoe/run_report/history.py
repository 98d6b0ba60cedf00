"""The scalars and texts that a run has logged over all its starts, in bounded memory."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

_MOST_POINTS = 1024


@dataclass(frozen=True)
class Curve:
    """A scalar over iterations. One point covers several iterations if there are many.

    Attributes:
        steps: the last iteration of each point, int64 [points], ascending.
        means, lows, highs: mean, smallest and largest value of each point, float64 [points].
    """

    steps: np.ndarray
    means: np.ndarray
    lows: np.ndarray
    highs: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)

    def value_at(self, step: int) -> float | None:
        """Return the mean of the point that covers an iteration; None beyond the last point and before the first."""
        index = int(np.searchsorted(self.steps, step))
        is_covered = index < len(self) and (index or self.steps[0] == step)
        return float(self.means[index]) if is_covered else None


class Series:
    """Collects one scalar. When there are too many points, each two neighbours become one point.

    Attributes:
        newest: the newest iteration and its value, which may be NaN; None if the value was removed.
    """

    def __init__(self) -> None:
        self.newest: tuple[int, float] | None = None
        self._width = 1  # values of a full point
        self._points: list[list[float]] = []  # last iteration, number of values, sum, smallest, largest
        self._not_finite: list[tuple[int, int, int]] = []  # first iteration, last iteration, number of values

    @property
    def num_not_finite(self) -> int:
        """Number of values that are NaN or infinite; they have no point."""
        return sum(number for _, _, number in self._not_finite)

    def append(self, step: int, value: float) -> None:
        """Add the value of an iteration. A value of the newest iteration replaces the earlier value."""
        self.remove_from(step)
        self.newest = step, value
        if not math.isfinite(value):
            if len(self._not_finite) == _MOST_POINTS:
                ranges = zip(self._not_finite[::2], self._not_finite[1::2], strict=True)
                self._not_finite = [(old[0], new[1], old[2] + new[2]) for old, new in ranges]
            self._not_finite.append((step, step, 1))
            return
        if self._points and self._points[-1][1] < self._width:
            _, number, total, low, high = self._points[-1]
            self._points[-1] = [step, number + 1, total + value, min(low, value), max(high, value)]
            return
        if len(self._points) == _MOST_POINTS:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [
                [new[0], old[1] + new[1], old[2] + new[2], min(old[3], new[3]), max(old[4], new[4])]
                for old, new in pairs
            ]
            self._width *= 2
        self._points.append([step, 1, value, value, value])

    def remove_from(self, step: int) -> None:
        """Remove the points that cover this iteration or later ones, and the non-finite values of these iterations."""
        if self.newest is not None and self.newest[0] >= step:
            self.newest = None
        while self._points and self._points[-1][0] >= step:
            self._points.pop()
        while self._not_finite and self._not_finite[-1][1] >= step:
            first, last, number = self._not_finite.pop()
            if first < step:
                # Only the first and the last iteration of the values are known, so assume equal distances.
                kept = math.ceil(number * (step - first) / (last - first + 1))
                self._not_finite.append((first, step - 1, kept))

    def curve(self) -> Curve:
        """Return all points."""
        steps, numbers, totals, lows, highs = np.array(self._points, dtype=float).reshape(-1, 5).T
        return Curve(steps.astype(np.int64), totals / np.maximum(numbers, 1), lows, highs)


@dataclass
class Start:
    """The iterations that a start of the run has logged.

    Attributes:
        first_step: the first iteration.
        last_step: the last iteration.
        seconds: time of the first record in seconds since 1970; None if unknown.
    """

    first_step: int
    last_step: int
    seconds: float | None


@dataclass
class History:
    """The records of a run. Iterations that are repeated after a resume replace the earlier ones.

    Attributes:
        series: scalars by tag.
        texts: texts by tag, the newest of each tag.
        newest: time of the newest record in seconds since 1970; None if nothing is logged.
        starts: the starts that logged anything.
    """

    series: dict[str, Series] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    newest: float | None = None
    starts: list[Start] = field(default_factory=list)

    @property
    def num_starts(self) -> int:
        """The number of starts that logged anything."""
        return len(self.starts)

    def start(self, first_step: int, seconds: float | None = None) -> None:
        """Begin the records of another start of the run, whose first record is of iteration `first_step`.

        Later iterations belong to a part of the run that the start has abandoned. So they are removed.

        Args:
            first_step: the first iteration.
            seconds: time of the first record in seconds since 1970.
        """
        self.starts.append(Start(first_step, first_step, seconds))
        for series in self.series.values():
            series.remove_from(first_step)

    def append(self, tag: str, step: int, value: float) -> None:
        """Add the value of a scalar."""
        self.series.setdefault(tag, Series()).append(step, value)
        if self.starts:
            self.starts[-1].last_step = max(self.starts[-1].last_step, step)

    def curves(self) -> Mapping[str, Curve]:
        """Return the curves of all scalars that have a finite value."""
        curves = ((tag, series.curve()) for tag, series in self.series.items())
        return {tag: curve for tag, curve in curves if len(curve)}
