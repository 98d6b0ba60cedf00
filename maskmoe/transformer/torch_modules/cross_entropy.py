"""Cross-entropy of logits that are divided over tensor-parallel ranks, by torch's softmax on chunks of the tokens."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp

# Logits of a chunk. On a CPU, a chunk in fp32 stays in the cache; on a GPU, kernels are long compared with launches.
_CPU_CHUNK = 2**18
_GPU_CHUNK = 2**24


class ChunkedCrossEntropyMixin(LanguageModule):
    """Mixin for a Megatron-Core model whose loss keeps its logits once, in their own dtype.

    With `cross_entropy_loss_fusion`, the model computes the loss that the setting selects.
    """

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Compute the loss of each token.

        Labels and losses (fp32) are [batch, sequence]. The backward pass overwrites the logits [sequence, batch,
        vocabulary of this rank].
        """
        if self.config.cross_entropy_loss_fusion:
            return super().compute_language_model_loss(labels, logits)
        assert self.tp_group is not None
        return vocab_parallel_cross_entropy(logits, labels.T, self.tp_group).T.contiguous()


def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, tp_group: ProcessGroup) -> Tensor:
    """Compute the cross-entropy of each token as Megatron-Core's function of this name does, with less memory.

    The stock function keeps the probabilities in fp32. This function keeps the logits, computes in fp32 on one chunk of
    the tokens at a time, and writes the gradient over the logits. The logits must not be read after the backward pass;
    autograd reports an error if another backward pass needs them.

    Args:
        logits: [..., vocabulary of this rank], contiguous. Each rank holds an equal part of the vocabulary.
        target: int64 [...], ids of the vocabulary of all ranks.
        tp_group: The tensor-parallel ranks.

    Returns:
        fp32 [...].
    """
    return _CrossEntropy.apply(logits, target, tp_group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, tp_group: ProcessGroup) -> Tensor:
        rows = logits.view(-1, logits.shape[-1])
        local_target = target.reshape(-1) - tp_group.rank() * rows.shape[-1]
        is_here = (local_target >= 0) & (local_target < rows.shape[-1])
        column = local_target.where(is_here, 0).unsqueeze(-1)
        losses = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        for chunk in _chunks(rows):
            log_probs = torch.log_softmax(rows[chunk], dim=-1, dtype=torch.float32)
            losses[chunk] = -log_probs.gather(-1, column[chunk]).squeeze(-1)
        # The softmax of all ranks is this rank's softmax times this rank's share in the sum of all exponentials.
        share = None
        if tp_group.size() > 1:
            logit = rows.gather(-1, column).squeeze(-1).float()
            losses, share = _combine(logit.where(is_here, 0), losses + logit, tp_group)
        ctx.save_for_backward(logits, column, is_here, share)
        return losses.view_as(target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore[bad-override]
        logits, column, is_here, share = ctx.saved_tensors
        rows, gradient = logits.view(-1, logits.shape[-1]), gradients[0].reshape(-1, 1)
        of_softmax = gradient if share is None else gradient * share.unsqueeze(-1)
        of_target = -gradient * is_here.unsqueeze(-1)
        for chunk in _chunks(rows):
            probs = torch.softmax(rows[chunk], dim=-1, dtype=torch.float32).mul_(of_softmax[chunk])
            rows[chunk] = probs.scatter_add_(-1, column[chunk], of_target[chunk])
        return logits, None, None


def _chunks(rows: Tensor) -> Iterator[slice]:
    """Divide rows into slices of about equal numbers of elements."""
    size = max(1, (_GPU_CHUNK if rows.is_cuda else _CPU_CHUNK) // rows.shape[-1])
    return (slice(start, start + size) for start in range(0, len(rows), size))


def _combine(target_logit: Tensor, log_sum: Tensor, tp_group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Combine the sums of all ranks: return losses, and this rank's share in the sum of the exponentials of all ranks.

    All tensors are fp32 [tokens]. `target_logit` is 0 on ranks that do not hold the target, and `log_sum` is the
    logarithm of the sum of this rank's exponentials.
    """
    largest = log_sum.clone()
    torch.distributed.all_reduce(largest, ReduceOp.MAX, tp_group)
    exponential = (log_sum - largest).exp_()
    sums = torch.stack([target_logit, exponential])
    torch.distributed.all_reduce(sums, ReduceOp.SUM, tp_group)
    target_logit, total = sums
    return largest + total.log() - target_logit, exponential / total
