"""Divides the tests among the processes of pytest-xdist."""

import re
from functools import cache

from support.paths import ROOT
from xdist.scheduler import LoadScopeScheduling

SHARING_FOLDERS = ("conversion", "analysis", "data")
"""Folders whose tests share session fixtures that take long."""


@cache
def looks_at_runs(file: str) -> bool:
    """Return whether a file has tests of the shared training runs, which `training/conftest.py` starts."""
    return re.search(r"mark\.runs\(|run_pairs\(|start_by_name", (ROOT / file).read_text()) is not None


class FixtureScheduling(LoadScopeScheduling):
    """Gives tests that share fixtures to one process: the tests of a file, of a folder, or of the training runs."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        folder = re.match(rf"tests/({'|'.join(SHARING_FOLDERS)})/", file)
        if folder:
            return folder.group()
        return "the training runs" if looks_at_runs(file) else file
