"""Finds the training steps whose loss or gradient norm is far from those of the steps before; needs no torch."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

_DEVIATIONS_PER_MAD = 1.4826
"""The standard deviation of a normal distribution, divided by its median absolute deviation."""

_FLOOR = 0.005
"""The smallest robust deviation, as a share of the median: a flat curve must not fire."""

_ABSOLUTE_FLOOR = 1e-6
"""The smallest robust deviation of values whose median is 0."""


@dataclass(frozen=True)
class Deviation:
    """A value that is too far from the values of the steps before.

    Attributes:
        name: "loss" or "gradient norm".
        value: The value.
        median: The median of the values before; NaN without such values.
        deviations: The distance from the median in robust deviations; negative below the median. Infinite for a value
            that is NaN or infinite.
    """

    name: str
    value: float
    median: float
    deviations: float

    def __str__(self) -> str:
        if not math.isfinite(self.deviations):
            return f"{self.name} {self.value:.4g}"
        side = "above" if self.deviations > 0 else "below"
        distance = f"{abs(self.deviations):.1f} robust deviations {side} the median {self.median:.4g}"
        return f"{self.name} {self.value:.4g}, {distance}"


class RobustWindow:
    """The values of the last steps, with their median and robust deviation.

    The robust deviation is the median absolute deviation, scaled to the standard deviation of a normal distribution,
    with a floor.

    Args:
        size: The number of values that the window holds. With fewer than half of this number, nothing is judged.
        values: The values that the window begins with, in the order of their steps; the last `size` count.
    """

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self._least = max(2, size // 2)
        self._values = deque(values, maxlen=size)

    @property
    def values(self) -> list[float]:
        """The values in the order of their steps."""
        return list(self._values)

    def judge(self, value: float) -> tuple[float, float]:
        """Return the median of the values, and the distance of another value from the median in robust deviations.

        The distance is 0 as long as the window has too few values, and infinite if the value is NaN or infinite.
        """
        middle = median(self._values) if self._values else math.nan
        if not math.isfinite(value):
            return middle, math.inf
        if len(self._values) < self._least:
            return middle, 0.0
        spread = _DEVIATIONS_PER_MAD * median(abs(other - middle) for other in self._values)
        return middle, (value - middle) / max(spread, _FLOOR * abs(middle), _ABSOLUTE_FLOOR)

    def add(self, value: float) -> None:
        """Add the value of a step; a value that is NaN or infinite is left out."""
        if math.isfinite(value):
            self._values.append(value)


class SpikeDetector:
    """Judges the loss and the gradient norm of each step by the steps before.

    A step that is off enters the windows, too. So a lasting change of the level is the new normal after half a window.

    Args:
        window: The number of steps that a step is compared with.
        limit: The number of robust deviations beyond which a value is off.
        history: The `history` of an earlier detector, whose steps came right before.
    """

    NAMES = ("loss", "gradient norm")

    def __init__(self, window: int, limit: float, history: Mapping[str, Sequence[float]] | None = None) -> None:
        self._limit = limit
        self._windows = {name: RobustWindow(window, (history or {}).get(name, ())) for name in self.NAMES}

    @property
    def history(self) -> dict[str, list[float]]:
        """The values of the last steps, by name."""
        return {name: window.values for name, window in self._windows.items()}

    def judge(self, loss: float, grad_norm: float | None) -> list[Deviation]:
        """Return the values of a step that are off, and take the step into the windows.

        Args:
            loss: The loss of the step.
            grad_norm: The norm of the gradient before clipping; None if it was not computed.
        """
        found = []
        for name, value in zip(self.NAMES, (loss, grad_norm), strict=True):
            if value is None:
                continue
            middle, deviations = self._windows[name].judge(value)
            if abs(deviations) > self._limit:
                found.append(Deviation(name, value, middle, deviations))
            self._windows[name].add(value)
        return found
