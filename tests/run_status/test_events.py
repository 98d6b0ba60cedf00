"""The scalars of a run are those of TensorBoard, and what a resumed run repeats replaces the earlier values."""

import pytest
from support.runs import write_events
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from maskmoe.run_status.events import read_scalars


def values_of(folder, tag):
    return [(value.step, value.value) for value in read_scalars(folder)[tag]]


def test_values_are_those_of_tensorboard(tmp_path):
    assert read_scalars(tmp_path / "nowhere") == {}
    write_events(tmp_path)
    accumulator = EventAccumulator(str(tmp_path)).Reload()
    tags = {tag for tag in accumulator.Tags()["scalars"] if not tag.endswith("vs samples")}
    assert read_scalars(tmp_path) == {tag: accumulator.Scalars(tag) for tag in tags}


def test_resumed_run_replaces_what_it_abandoned(tmp_path):
    write_events(tmp_path, last=20, start=1000)
    write_events(tmp_path, first=11, last=14, start=2000)
    losses = read_scalars(tmp_path)["lm loss"]
    assert [value.step for value in losses] == list(range(1, 15))
    assert [value.wall_time < 2000 for value in losses] == [True] * 10 + [False] * 4
    assert [step for step, _ in values_of(tmp_path, "lm loss validation")] == [5, 10]


def test_loss_of_the_test_set_does_not_replace_that_of_the_validation_set(tmp_path):
    """Megatron writes both by the same tag, for the same iteration. A later start may repeat the iteration."""
    tag = "lm loss validation"
    for number, losses in enumerate([[(2, 3.0), (4, 2.5), (4, 2.75)], [(4, 2.25), (4, 2.625)]]):
        with SummaryWriter(tmp_path / "new") as writer:
            for step, loss in losses:
                writer.add_scalar(tag, loss, step)
        (new,) = (tmp_path / "new").iterdir()
        new.rename(tmp_path / f"events.out.tfevents.{number}")
        assert values_of(tmp_path, tag) == [(2, 3.0), (4, losses[0][1] if number else 2.5)]


@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content[:-100] + b"x" * 100])
def test_damaged_file_is_read_up_to_the_damage(tmp_path, damage):
    write_events(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert values_of(tmp_path, "lm loss")[:19] == [(step, pytest.approx(5 / step)) for step in range(1, 20)]
