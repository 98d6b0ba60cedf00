"""Divides the tests among the processes of pytest-xdist."""

import re

from xdist.scheduler import LoadScopeScheduling

SHARING_FOLDERS = ("training", "conversion", "analysis", "data")
"""Folders whose tests share session fixtures that take long, such as training runs."""


class FixtureScheduling(LoadScopeScheduling):
    """Gives all tests that share fixtures to one process: the tests of a file, or of one of `SHARING_FOLDERS`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        folder = re.match(rf"tests/({'|'.join(SHARING_FOLDERS)})/", file)
        return folder.group() if folder else file
