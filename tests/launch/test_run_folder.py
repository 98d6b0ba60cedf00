"""The run folder follows from the folders of a run."""

import pytest

from maskmoe.launch.run_folder import run_folder


@pytest.mark.parametrize(
    ("save", "tensorboard", "expected"),
    [
        ("/r/checkpoints", None, "/r"),
        ("/r/checkpoints", "/t/tensorboard", "/r"),
        ("/r/save", "/r/tensorboard", "/r/save"),
        (None, "/r/tensorboard", "/r"),
        (None, "/r/events", "/r/events"),
        (None, None, "None"),
    ],
)
def test_run_folder(save, tensorboard, expected):
    assert str(run_folder(save, tensorboard)) == expected
