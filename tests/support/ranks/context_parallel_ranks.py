"""Context-parallel attention on ranks that also compute attention over the whole sequence by themselves."""

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.models.gpt import gpt_model
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_token_prediction import roll_tensor
from megatron.core.utils import get_batch_on_this_cp_rank
from support.small_moe import make_config
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.training.model.batch import weight_of_rank
from maskmoe.transformer.torch_modules import attention as attention_module
from maskmoe.transformer.torch_modules.attention import TorchDotProductAttention

SEQUENCE, BATCH, HEADS, CHANNELS = 48, 2, 4, 8
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "grouped queries": {"num_query_groups": 2},
    "wide values": {"value_channels": 12},
    "offset": {"softmax_type": "learnable", "value_channels": 4},
    "window": {"window_size": (7, 0), "num_query_groups": 2},
    "window with offset": {"window_size": (20, 0), "softmax_type": "learnable"},
    "given mask": {"mask": True},
    "given mask with window": {"mask": True, "window_size": (7, 0)},
    "all keys": {"mask_type": AttnMaskType.no_mask},
    "window on both sides": {"mask_type": AttnMaskType.no_mask, "window_size": (7, 9)},
}


def build(settings: dict[str, Any], mask_type: AttnMaskType, cp_group: ProcessGroup, alone: ProcessGroup):
    """Build attention with offsets that differ between heads."""
    sizes = {"num_attention_heads": HEADS, "hidden_size": HEADS * CHANNELS}
    config = make_config(**sizes, **settings)
    config.context_parallel_size = cp_group.size()
    groups: Any = SimpleNamespace(tp=alone, cp=cp_group)
    attention = TorchDotProductAttention(config, 1, mask_type, "self", pg_collection=groups)
    for offset in attention.parameters():
        offset.data.copy_(torch.arange(HEADS) - 1.0)
    return attention


def part_of_rank(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Return the tokens [tokens, ...] of a sequence [sequence, ...] that Megatron gives to this rank."""
    batch = {"tokens": tensor.transpose(0, 1), "cu_seqlens": None}
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)["tokens"].transpose(0, 1)


def deviation(
    world: ProcessGroup,
    alone: ProcessGroup,
    mask_type: AttnMaskType = AttnMaskType.causal,
    mask: bool = False,
    value_channels: int = CHANNELS,
    **settings: Any,
) -> float:
    """Return the largest difference of outputs and gradients from attention over the whole sequence."""
    torch.manual_seed(0)
    groups = settings.get("num_query_groups", HEADS)
    shapes = [(HEADS, CHANNELS), (groups, CHANNELS), (groups, value_channels)]
    whole = [torch.randn(SEQUENCE, BATCH, *shape, requires_grad=True) for shape in shapes]
    parts = [part_of_rank(tensor.detach(), world).clone().requires_grad_() for tensor in whole]
    hidden = hidden_part = None
    if mask:
        hidden = (torch.rand(BATCH, 1, SEQUENCE, SEQUENCE) < 0.3) & ~torch.eye(SEQUENCE, dtype=torch.bool)
        batch = {"attention_mask": hidden, "cu_seqlens": None}
        hidden_part = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=world)["attention_mask"]
    gradient = torch.randn(SEQUENCE, BATCH, HEADS * value_channels)
    whole_attention, attention = (build(settings, mask_type, group, alone) for group in (alone, world))
    expected = whole_attention(*whole, hidden)
    expected.backward(gradient)
    output = attention(*parts, hidden_part)
    output.backward(part_of_rank(gradient, world))
    pairs = [(output, part_of_rank(expected, world))]
    pairs += [(part.grad, part_of_rank(tensor.grad, world)) for part, tensor in zip(parts, whole, strict=True)]
    for offset, expected_offset in zip(attention.parameters(), whole_attention.parameters(), strict=True):
        torch.distributed.all_reduce(offset.grad)
        pairs.append((offset.grad, expected_offset.grad))
    return max((one - other).abs().max().item() for one, other in pairs)


def normalization_deviations(world: ProcessGroup) -> tuple[float, float]:
    """Return differences from one rank: of the tokens that multi-token prediction counts, and of the mean loss."""
    torch.manual_seed(0)
    mask, losses = (torch.rand(SEQUENCE, BATCH) < 0.5).float(), torch.rand(SEQUENCE, BATCH)
    mask_part, losses_part = part_of_rank(mask, world), part_of_rank(losses, world)
    _, expected = roll_tensor(mask.t().contiguous())
    _, mean_of_ranks = roll_tensor(mask_part.t().contiguous(), cp_group=world)
    num_tokens = mask_part.sum().int()
    # As Megatron does, divide by the rank's tokens and average over the ranks.
    loss = (losses_part * mask_part).sum() * weight_of_rank(num_tokens, world) / num_tokens / world.size()
    torch.distributed.all_reduce(loss)
    return (
        abs(mean_of_ranks * world.size() - expected).item(),
        abs(loss - (losses * mask).sum() / mask.sum()).item(),
    )


def weights_of_prediction(mask: Tensor, cp_group: ProcessGroup, has_mask: bool) -> Tensor:
    """Return the weights [sequence, batch] that a loss per token of multi-token prediction gives to a rank's tokens."""
    losses = torch.zeros(*mask.shape, 1, requires_grad=True)
    settings: Any = SimpleNamespace(
        mtp_num_layers=1, mtp_detach_heads=False, mtp_loss_scaling_factor=0.3, calculate_per_token_loss=True
    )
    arguments: dict[str, Any] = {
        "hidden_states": torch.cat([torch.zeros_like(losses), losses]),
        "labels": torch.zeros(mask.t().shape, dtype=torch.long),
        "loss_mask": mask.t().contiguous() if has_mask else None,
        "output_layer": lambda hidden, **_: (hidden, None),
        "output_weight": None,
        "runtime_gather_output": None,
        "is_training": False,
        "compute_language_model_loss": lambda labels, logits: logits.squeeze(-1).t(),
        "config": settings,
        "cp_group": cp_group,
    }
    gpt_model.process_mtp_loss(**arguments).sum().backward()
    assert losses.grad is not None
    return losses.grad.squeeze(-1)


def weights_deviation(world: ProcessGroup, alone: ProcessGroup, has_mask: bool) -> float:
    """Return the largest difference of the weights from one rank's; one rank counts no token of the main loss."""
    torch.manual_seed(0)
    mask = (torch.rand(SEQUENCE, BATCH) < 0.5).float()
    chunk = SEQUENCE // world.size() // 2
    mask[:chunk] = mask[-chunk:] = 0
    mask[chunk] = 1
    expected = weights_of_prediction(mask, alone, has_mask)
    found = weights_of_prediction(part_of_rank(mask, world), world, has_mask)
    return (found - part_of_rank(expected, world)).abs().max().item()


def deviations_of_rank() -> dict[str, float]:
    """Return the deviations of attention, and of multi-token prediction's weights, by case."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    alone = [torch.distributed.new_group([other]) for other in range(num_ranks)][rank]
    attention_module.SHORTEST_BLOCK = 1
    world: Any = torch.distributed.group.WORLD
    deviations = {name: deviation(world, alone, **case) for name, case in CASES.items()}
    deviations["tokens of multi-token prediction"], deviations["loss"] = normalization_deviations(world)
    for has_mask in (True, False):
        deviations[f"weights of multi-token prediction, {has_mask}"] = weights_deviation(world, alone, has_mask)
    return deviations
