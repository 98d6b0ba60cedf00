"""The callbacks of a run are called at the right time, also by the patch of Megatron's training step."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from megatron.training import training

from maskmoe.training import trainer
from maskmoe.training.trainer import Trainer
from maskmoe.training.watch.callback import Callback


class Recorder(Callback):
    """Records its calls.

    Args:
        name: Name in the record.
        calls: The record, which several callbacks share.
    """

    def __init__(self, name: str, calls: list[tuple]) -> None:
        self._name, self._calls = name, calls

    def on_end(self, error: BaseException | None) -> None:
        self._calls.append((self._name, error))


@pytest.mark.parametrize("error", [None, SystemExit(0), ValueError("broken")])
def test_callbacks_end_in_the_reverse_order_however_the_run_ends(error):
    calls: list[tuple] = []
    trainer = object.__new__(Trainer)
    trainer.callbacks = [Recorder("a", calls), Recorder("b", calls)]
    with nullcontext() if error is None else pytest.raises(type(error)), trainer._accompanied():
        if error is not None:
            raise error
    assert calls == [("b", error), ("a", error)]


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_have_their_sizes_and_reach_megatrons_statistics(monkeypatch, packed):
    """The stragglers' timer sees batch and model; documents are counted once, in the first chunk, and in training."""
    detector, timed = trainer.straggler_detector, []

    def start() -> None:
        timed.append(detector.bdata)
        detector.bdata = False

    monkeypatch.setattr(detector, "start", start)
    documents = SimpleNamespace(cu_seqlens_q=torch.tensor([0, 3, 8], dtype=torch.int32)) if packed else None
    batch = SimpleNamespace(documents=documents, loss_mask=None)
    sizes = []
    monkeypatch.setattr(trainer, "get_batch", lambda iterator, samples: sizes.append(samples) or batch)
    monkeypatch.setattr(trainer, "token_losses", lambda model, batch: None)
    timer = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(trainer, "get_timers", lambda: lambda name, log_level=0: timer)
    run = object.__new__(Trainer)
    run.callbacks, run.args = [], SimpleNamespace(micro_batch_size=1, eval_micro_batch_size=2)
    for is_training, chunk in ((True, None), (True, 0), (True, 1), (False, None)):
        run.forward_step(iter(()), SimpleNamespace(training=is_training, vp_stage=chunk))
    assert sizes == [1, 1, 1, 2]
    assert timed == [True, False] * 4
    expected = (2 * 8.0, 2 * (3.0**2 + 5.0**2)) if packed else (None, None)
    assert training.consume_seqlen_stats_in_iteration() == expected
