"""Split a vocabulary into bands of similarly frequent ids, to report a model's quality by token frequency."""

from dataclasses import dataclass

import numpy as np

from maskmoe.routing_mask.assignment import count_frequent, ids_by_frequency

DEFAULT_EDGES = (0.4, 0.9, 1.0)


@dataclass(frozen=True)
class FrequencyBands:
    """Bands of token ids by their frequency in the training stream.

    Attributes:
        names: Name of each band, from the band of the most frequent ids on.
        band_of_id: Band of each id, int64 `[vocab]`.
    """

    names: tuple[str, ...]
    band_of_id: np.ndarray

    @classmethod
    def from_occurrences(cls, occurrences: np.ndarray, edges: tuple[float, ...] = DEFAULT_EDGES) -> "FrequencyBands":
        """Cut the ids, sorted by descending frequency, where they cover given shares of all occurrences.

        Args:
            occurrences: Occurrences of each id, float64 `[vocab]`, see `TokenFrequency.occurrences`.
            edges: Share of the occurrences that each band and all bands before it cover, ascending. The last share is
                1; its band also holds the ids that never occur.
        """
        ids = ids_by_frequency(occurrences)
        ends = [count_frequent(occurrences[ids], edge) for edge in edges[:-1]]
        # One id can cover several shares, so a band can be empty: its end is not after its start.
        band_of_id = np.empty(len(ids), np.int64)
        band_of_id[ids] = np.searchsorted(ends, np.arange(len(ids)), side="right")
        last = len(edges) - 1
        names = []
        for band, (lower, upper) in enumerate(zip((0.0, *edges), edges, strict=False)):
            position = "top" if band == 0 else "last" if band == last else "next"
            names.append(f"{position} {100 * (upper - lower):.0f} %")
        return cls(tuple(names), band_of_id)
