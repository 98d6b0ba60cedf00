"""The fast reader of event files finds what TensorBoard's own reader finds, also in unfinished and damaged files."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from torch.utils.tensorboard import SummaryWriter

from maskmoe.run_report.event_file import EventFile, crc32c
from maskmoe.untrusted import UnusableFile

TAGS = ["lm loss", "a", "moe/load_layer_1", "x" * 300, "é", "lm loss vs samples"]
STEPS = st.integers(0, 300) | st.integers(-5, 1 << 40)
VALUES = st.floats(width=32)
SCALARS = st.lists(st.tuples(st.sampled_from(TAGS), STEPS, VALUES), max_size=30)


def write(folder, scalars):
    """Write scalars, each after a text, and return the event file."""
    writer = SummaryWriter(folder)
    writer.add_text("train_iters", "20", 0)
    for tag, step, value in scalars:
        writer.add_scalar(tag, value, step)
    writer.add_histogram("weights", np.arange(5), 1)
    writer.close()
    (path,) = Path(folder).iterdir()
    return path


def wanted(tag):
    return not tag.endswith("vs samples")


def expected(path):
    """Return TensorBoard's steps, values and times by tag."""
    found = {}
    for event in LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            if value.HasField("simple_value") and wanted(value.tag):
                found.setdefault(value.tag, []).append((event.step, value.simple_value, event.wall_time))
    return found


def read(*blocks):
    """Return the steps, values and times in blocks by tag."""
    found = {}
    for block in blocks:
        for tag, points in block.scalars.items():
            found.setdefault(tag, []).extend(zip(*(column.tolist() for column in points), strict=True))
    return found


def same(found, true):
    """Return whether scalars are equal; NaN equals NaN."""
    return repr(sorted(found.items())) == repr(sorted(true.items()))


@settings(max_examples=40)
@given(SCALARS)
def test_values_are_those_of_tensorboard(scalars):
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, scalars)
        file = EventFile(path, wanted)
        blocks = list(file.read_new())
        assert same(read(*blocks), expected(path))
        assert [block.texts for block in blocks if block.texts] == [{"train_iters": "20"}]
        assert not file.is_damaged
        assert file.num_read == path.stat().st_size
        assert list(file.read_new()) == []


@settings(max_examples=40)
@given(SCALARS, st.lists(st.floats(0, 1), max_size=4))
def test_growing_file_is_read_in_parts(scalars, shares):
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, scalars)
        content, true = path.read_bytes(), expected(path)
        file, blocks = EventFile(path, wanted), []
        for share in [*sorted(shares), 1]:
            path.write_bytes(content[: round(share * len(content))])
            blocks += file.read_new()
            assert not file.is_damaged
        assert same(read(*blocks), true)


def test_blocks_need_not_end_with_a_record(tmp_path, monkeypatch):
    path = write(tmp_path, [(TAGS[step % 3], step, 1 / (1 + step)) for step in range(200)])
    monkeypatch.setattr("maskmoe.run_report.event_file._BLOCK_BYTES", 501)
    assert same(read(*EventFile(path, wanted).read_new()), expected(path))


@settings(max_examples=100)
@given(SCALARS.filter(len), st.data())
def test_damaged_file_is_read_up_to_the_damage(scalars, data):
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, scalars)
        true, content = expected(path), bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        file = EventFile(path, lambda tag: True)
        found = {tag: values for tag, values in read(*file.read_new()).items() if wanted(tag)}
        assert file.is_damaged
        assert file.num_read <= place
        for tag, values in found.items():
            assert repr(values) == repr(true[tag][: len(values)])
        assert same(found, {tag: values for tag, values in expected(path).items() if values})


@given(st.binary(max_size=200))
def test_any_bytes_are_read(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.out.tfevents.1"
        path.write_bytes(content)
        assert read(*EventFile(path, wanted).read_new()) == {}


def test_removed_file_and_folder_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UnusableFile):
            list(EventFile(path, wanted).read_new())


def test_checksum():
    assert crc32c(b"123456789") == 0xE3069283
