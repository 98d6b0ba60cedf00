"""The folder of a run."""

import pytest

from maskmoe.files.run_folder import run_folder


@pytest.mark.parametrize(
    ("save", "tensorboard", "variable", "expected"),
    [
        ("/run/save", None, "/other", "/other"),
        ("/r/checkpoints", None, None, "/r"),
        ("/r/checkpoints", "/t/tensorboard", None, "/r"),
        ("/r/save", "/r/tensorboard", None, "/r/save"),
        (None, "/r/tensorboard", None, "/r"),
        (None, "/r/events", None, "/r/events"),
        (None, None, None, "None"),
    ],
)
def test_run_folder(save, tensorboard, variable, expected, monkeypatch):
    monkeypatch.delenv("MASKMOE_RUN_DIR", raising=False)
    if variable is not None:
        monkeypatch.setenv("MASKMOE_RUN_DIR", variable)
    assert str(run_folder(save, tensorboard)) == expected
