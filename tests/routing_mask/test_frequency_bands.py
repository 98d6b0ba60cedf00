import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from maskmoe.routing_mask.frequency import FrequencyBands


def test_bands_cover_the_given_shares():
    occurrences = np.array([5.0, 40.0, 0.0, 25.0, 15.0, 10.0, 5.0])

    bands = FrequencyBands(occurrences)

    assert bands.names == ("top 40 %", "next 50 %", "last 10 %")
    # Id 1 covers 40 %, and ids 3, 4 and 5 extend this to 90 %. All other ids, id 2 without occurrences included, are
    # in the last band.
    assert bands.band_of_id.tolist() == [2, 0, 2, 1, 1, 1, 2]
    # One id can fill several bands.
    assert FrequencyBands(np.array([1.0, 99.0])).band_of_id.tolist() == [2, 0]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=50).filter(any))
def test_bands_are_the_shortest_prefixes_by_frequency(counts):
    occurrences = np.array(counts, dtype=float)

    band_of_id = FrequencyBands(occurrences).band_of_id

    by_frequency = sorted(range(len(counts)), key=lambda id: (-counts[id], id))
    assert (np.diff(band_of_id[by_frequency]) >= 0).all()
    for band, share in enumerate((0.4, 0.9)):
        members = [id for id in by_frequency if band_of_id[id] <= band]
        covered = sum(counts[id] for id in members)
        assert covered >= share * sum(counts) * (1 - 1e-9)
        assert covered - counts[members[-1]] < share * sum(counts)
