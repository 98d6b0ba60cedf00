"""Exits 0 while the optimizers of experts and of other parameters adapt different loss scales, 1 once fixed."""

import sys
from types import SimpleNamespace
from unittest.mock import patch

import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.optimizer import ChainedOptimizer, MixedPrecisionOptimizer

tensor = torch.tensor


class Optimizer(MixedPrecisionOptimizer):
    """An optimizer of which one step overflows, or none."""

    is_stub_optimizer = False

    def __init__(self, overflows: bool) -> None:
        self.config = SimpleNamespace(timers=None)
        self.overflows = overflows
        with patch.object(torch, "tensor", lambda *values, device, **options: tensor(*values, **options)):  # on a CPU
            self.grad_scaler = DynamicGradScaler(1024.0, 1.0, 2.0, 0.5, 1000, 1)

    def _copy_model_grads_to_main_grads(self) -> None: ...

    def _unscale_main_grads_and_check_for_nan(self) -> bool:
        return self.overflows


Optimizer.__abstractmethods__ = frozenset()  # no state is saved here
dense, experts = Optimizer(overflows=False), Optimizer(overflows=True)
chained = SimpleNamespace(chained_optimizers=[dense, experts])
ChainedOptimizer.prepare_grads(chained)
scales = [optimizer.grad_scaler.scale.item() for optimizer in (dense, experts)]
print(
    f"after an overflow in the experts: the loss is multiplied by {scales[0]}, their gradients divided by {scales[1]}"
)
sys.exit(0 if scales[0] != scales[1] else 1)
