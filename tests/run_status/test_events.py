"""The scalars of a run are those of TensorBoard, and what a resumed run repeats replaces the earlier values."""

import shutil

import pytest
from support.run_folders import write_events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from maskmoe.run_status.events import find_event_folder, read_events

LOSS = "lm loss"


def values_of(logged, tag):
    return [(value.step, value.value) for value in logged.scalars[tag]]


def test_values_are_those_of_tensorboard(tmp_path):
    write_events(tmp_path)
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    logged = read_events(tmp_path)
    tags = {tag for tag in accumulator.Tags()["scalars"] if not tag.endswith("vs samples")}
    assert {tag: list(values) for tag, values in logged.scalars.items()} == {
        tag: accumulator.Scalars(tag) for tag in tags
    }
    assert logged.texts == {"command": 'pretrain --lr "1e-3" <b>'}
    assert logged.newest == accumulator.Scalars(LOSS)[-1].wall_time


def test_resumed_run_replaces_what_it_abandoned(tmp_path):
    write_events(tmp_path, last=20, start=1000)
    write_events(tmp_path, first=11, last=14, start=2000)
    logged = read_events(tmp_path)
    assert [step for step, _ in values_of(logged, LOSS)] == list(range(1, 15))
    assert [value.wall_time < 2000 for value in logged.scalars[LOSS]] == [True] * 10 + [False] * 4
    assert [step for step, _ in values_of(logged, "lm loss validation")] == [5, 10]
    assert (logged.newest_start, logged.newest) == (2000, 2000.75)


def test_loss_of_the_test_set_does_not_replace_that_of_the_validation_set(tmp_path):
    """Megatron writes both by the same tag, for the same iteration. A later start may repeat the iteration."""
    tag = "lm loss validation"
    for number, losses in enumerate([[(2, 3.0), (4, 2.5), (4, 2.75)], [(4, 2.25), (4, 2.625)]]):
        with SummaryWriter(tmp_path / "new") as writer:
            for step, loss in losses:
                writer.add_scalar(tag, loss, step)
        (new,) = (tmp_path / "new").iterdir()
        new.rename(tmp_path / f"events.out.tfevents.{number}")
        assert values_of(read_events(tmp_path), tag) == [(2, 3.0), (4, losses[0][1] if number else 2.5)]


def test_long_run_is_sampled_and_keeps_its_newest_value(tmp_path):
    write_events(tmp_path, last=300)
    assert len(values_of(read_events(tmp_path), LOSS)) == 300
    values = values_of(read_events(tmp_path, most_values=100), LOSS)
    assert len(values) == 100
    assert values[-1] == (300, pytest.approx(5 / 300))


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content[:-100] + b"x" * 100])
def test_damaged_file_is_read_up_to_the_damage(tmp_path, damage):
    write_events(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert values_of(read_events(tmp_path), LOSS)[:19] == [(step, pytest.approx(5 / step)) for step in range(1, 20)]


def test_folder_of_the_event_files(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    assert find_event_folder(tmp_path, elsewhere) is None
    assert not read_events(None).scalars
    for folder in (elsewhere, tmp_path / "tensorboard"):
        write_events(folder, last=1)
        assert find_event_folder(tmp_path, elsewhere) == folder


@pytest.mark.parametrize("is_copy", [False, True])
def test_folder_of_the_newest_start(tmp_path, is_copy):
    """A run begins without `--tensorboard-dir` and resumes with it, or a run is copied and the original resumes."""
    own, elsewhere = tmp_path / "tensorboard", tmp_path / "elsewhere"
    write_events(own, start=1000)
    if is_copy:
        shutil.copytree(own, elsewhere)
    write_events(elsewhere, first=21, last=22, start=2000)
    assert find_event_folder(tmp_path, elsewhere) == (own if is_copy else elsewhere)
    write_events(own, first=21, last=22, start=3000)
    assert find_event_folder(tmp_path, elsewhere) == own
