"""The flex dispatcher with stand-ins for its libraries."""

from pathlib import Path

from support.launchers import RANK_SCRIPTS, RunRanks


def test_equals_other_ways_to_dispatch(tmp_path: Path, run_ranks: RunRanks) -> None:
    run_ranks(RANK_SCRIPTS / "flex_ranks.py", tmp_path)
