"""Splits a vocabulary into bands of ids that are about equally frequent, to see where a model is good."""

from dataclasses import dataclass

import numpy as np

from maskmoe.routing_mask.assignment import count_frequent, ids_by_frequency

DEFAULT_EDGES = (0.4, 0.9, 1.0)


@dataclass(frozen=True)
class FrequencyBands:
    """Bands of token ids by how often they occur in the training stream.

    Attributes:
        names: of the bands, from the most frequent ids on.
        band_of_id: int64 [vocab].
    """

    names: tuple[str, ...]
    band_of_id: np.ndarray

    @classmethod
    def from_occurrences(cls, occurrences: np.ndarray, edges: tuple[float, ...] = DEFAULT_EDGES) -> "FrequencyBands":
        """Cut the ids, sorted by frequency, where they cover given shares of all occurrences.

        Args:
            occurrences: float64 [vocab], see `TokenFrequency.occurrences`.
            edges: share of the occurrences that the bands up to each cover, ascending; the last, 1, takes the ids that
                never occur, too.
        """
        ids = ids_by_frequency(occurrences)
        band_of_id = np.full(len(ids), len(edges) - 1)
        names = []
        start, lower = 0, 0.0
        for band, upper in enumerate(edges):
            end = count_frequent(occurrences[ids], upper)
            band_of_id[ids[start:end]] = band
            share = f"{100 * (upper - lower):.0f} %"
            names.append(f"{'top' if band == 0 else 'last' if band == len(edges) - 1 else 'next'} {share}")
            start, lower = max(start, end), upper
        return cls(tuple(names), band_of_id)
