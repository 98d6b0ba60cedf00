"""Whatever a run folder holds, the status is read without a traceback."""

import json
import os
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.run_folders import read_status
from support.training_lines import iteration_line, validation_line

from maskmoe.run_status.page import write_status_page
from maskmoe.run_status.plot import ASCII
from maskmoe.run_status.text import WIDTH, render_text

KINDS = ["flip", "cut", "grow", "random", "remove", "folder", "pipe", "link", "loop", "huge number", "not allowed"]


@pytest.fixture
def complete_run(run):
    """A run with files of all kinds."""
    (run / "logs").mkdir()
    (run / "logs" / "rank0.log").write_text("\n".join([iteration_line(1), iteration_line(2), validation_line(2)]))
    (run / "args.yaml").write_text("lr: 1\n")
    (run / "checkpoints" / ".run.lock").write_text(json.dumps({"host": "a", "pid": 1, "started": 1.0}))
    return run


def damage(path, kind, data):
    """Change one file of a run."""
    content = path.read_bytes()
    if kind == "flip":
        place = data.draw(st.integers(0, len(content) - 1))
        path.write_bytes(
            content[:place] + bytes([content[place] ^ data.draw(st.integers(1, 255))]) + content[place + 1 :]
        )
    elif kind == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    elif kind == "grow":
        path.write_bytes(content + data.draw(st.binary(max_size=40)))
    elif kind == "huge number":
        path.write_bytes(content.replace(b"1", b"9" * 5000).replace(b"2", b"-1e999"))
    elif kind == "not allowed":
        path.chmod(0)
    else:
        path.unlink()
        make = {
            "random": lambda: path.write_bytes(data.draw(st.binary(max_size=200))),
            "folder": path.mkdir,
            "pipe": lambda: os.mkfifo(path),
            "link": lambda: path.symlink_to("/dev/zero"),
            "loop": lambda: path.symlink_to(path.name),
        }
        make.get(kind, lambda: None)()


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_folders_are_read(complete_run, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(complete_run, folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    # The event file is one of many files, but the most complicated one.
    events = [path for path in paths if "tfevents" in path.name]
    chosen = data.draw(st.lists(st.sampled_from(paths) | st.sampled_from(events), min_size=1, max_size=4, unique=True))
    for path in chosen:
        damage(path, data.draw(st.sampled_from(KINDS)), data)
    status = read_status(folder)
    shutil.rmtree(folder.parent)
    for text in (render_text(status), render_text(status, ASCII)):
        assert max(map(len, text.splitlines())) <= WIDTH + 40  # a path may be one long word
    json.dumps(status.to_json(), allow_nan=False)


TEXTS = st.text() | st.sampled_from(["\x1b[2J", "nan", "9" * 5000, "\ud800", "a" * 500, "<script>", "None", "{{ x }}"])
NUMBERS = st.floats() | st.integers() | st.sampled_from([1e308, -1e308, 1 << 70, -(1 << 70), 0])
FACT_NAMES = st.sampled_from(["exit_code", "ranks", "seconds", "first"])
FACTS = st.dictionaries(FACT_NAMES, NUMBERS | TEXTS | st.none(), max_size=3)
ENTRIES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["started", "ended", "saved", "warned", "nodes", "other"]),
        "text": TEXTS,
        "time": NUMBERS | TEXTS,
        "host": TEXTS,
        "iteration": st.none() | NUMBERS | TEXTS,
        "facts": FACTS,
    }
)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ENTRIES, max_size=8))
def test_any_journal_is_shown(run, entries):
    (path,) = (run / "journal").iterdir()
    path.write_text("\n".join(map(json.dumps, entries)))
    status = read_status(run)
    render_text(status).encode()
    json.dumps(status.to_json(), allow_nan=False).encode()


@pytest.mark.parametrize("entry", [{"text": "<script>alert(1)</script>\ud800"}, {"time": 1e300, "iteration": 1 << 60}])
def test_page_shows_any_journal(run, entry):
    base = {"kind": "warned", "text": "a", "time": 1.0, "host": "h", "iteration": 1, "facts": {}}
    (path,) = (run / "journal").iterdir()
    path.write_text(json.dumps(base | entry))
    write_status_page(read_status(run), run / "status.html")
    assert "<script>" not in (run / "status.html").read_text()
