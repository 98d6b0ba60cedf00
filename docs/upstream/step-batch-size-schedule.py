"""Exits 0 while `--step-batch-size-schedule` beside `--train-iters` is counted with one batch size, 1 once fixed."""

import sys
from types import SimpleNamespace
from unittest.mock import patch

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator
from megatron.training import training

# As after validation of --micro-batch-size 2 --train-iters 10 --step-batch-size-schedule "0:4 8:16", on one rank.
args = SimpleNamespace(
    train_samples=None, train_iters=10, global_batch_size=2, eval_interval=100, eval_iters=0, skip_train=False,
    full_validation=False, start_eval_at_iter=None, phase_transition_iterations=None,
)  # fmt: skip
calculator = StepBatchsizeNumMicroBatchesCalculator(2, 1, False, 0, "0:4 8:16")
samples = 0
for _ in range(args.train_iters):
    calculator.update(samples, consistency_check=True)
    samples += calculator.get_current_global_batch_size()
with patch.object(training, "get_args", lambda: args):
    requested, _, _ = training.get_train_valid_test_num_samples()
print(f"10 iterations read {samples} samples; the dataset and the learning rate's schedule are built for {requested}")
sys.exit(0 if requested != samples else 1)
