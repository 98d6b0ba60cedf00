"""The micro-batches of an evaluation, without a model."""

from argparse import Namespace

import pytest
import torch

from maskmoe.training.inference import token_losses


def test_micro_batches_have_the_size_for_evaluation_and_cover_each_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def schedule(data_iterator, micro_batch_size, **_):
        yield micro_batch_size, next(data_iterator)["loss_mask"].tolist()

    monkeypatch.setattr(token_losses, "get_forward_backward_func", lambda: schedule)
    monkeypatch.setattr(token_losses.mpu, "get_data_parallel_world_size", lambda: 1)
    monkeypatch.setattr(token_losses.mpu, "get_data_parallel_rank", lambda: 0)
    args = Namespace(micro_batch_size=4, eval_micro_batch_size=2, seq_length=1)
    steps = token_losses.losses_of_all(args, torch.nn.Module(), lambda _: {"loss_mask": torch.ones(())}, 3)
    assert list(steps) == [(2, [1, 1]), (2, [1, 0])]
