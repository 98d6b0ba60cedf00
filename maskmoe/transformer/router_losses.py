"""Auxiliary losses of a masked router: `attach_losses` is the entry, one function computes each loss.

If every token sees every expert, losses and gradients are bit-equal to those of Megatron-Core's `TopKRouter`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.selection import MaskedLogits, routing_map_of, select_experts

AuxLossTokens = Literal["all", "routable"]


@dataclass(frozen=True)
class Assignments:
    """Scores and choices of a router, the input of the load-balancing losses.

    Attributes:
        scores: float32 [tokens, experts]. Each row adds up to 1; invisible experts and tokens that do not count have 0.
        routing_map: bool [tokens, experts], the `min(k, V)` best visible experts of each token that counts.
        counted: bool [tokens], the tokens that count; None if all tokens count.
    """

    scores: Tensor
    routing_map: Tensor
    counted: Tensor | None


@dataclass(frozen=True)
class ExpertLoad:
    """The load of each expert.

    Attributes:
        tokens_per_expert: float32 [sequences * experts], assignments, scaled as if every token had k assignments.
        num_tokens: tokens in a sequence; float64 if a tensor. The mean over sequences if padding makes them differ.
    """

    tokens_per_expert: Tensor
    num_tokens: int | Tensor


def attach_losses(
    router: TopKRouter, activation: Tensor, logits: MaskedLogits, aux_loss_tokens: AuxLossTokens
) -> Tensor:
    """Attach the z-loss and the load-balancing losses whose coefficients are not 0.

    Gradients of the losses flow when the gradient of the result flows. The losses are logged under Megatron's names.

    Args:
        router: provides coefficients, process groups and the accumulated load of the global loss.
        activation: [tokens, features], the tensor to attach to. Pass `logits.values`, or a tensor that is made before
            them: then gradients are added up in the same order as in `TopKRouter`, hence to the same bits.
        logits: the masked logits of this rank's tokens.
        aux_loss_tokens: tokens that load-balancing losses count: `all`, or only `routable` ones (two or more visible
            experts).

    Returns:
        the activation, unchanged in value.
    """
    # Compute the z-loss first and attach it last: autograd then adds its gradient last, as in `TopKRouter`.
    num_real = len(logits.values) if logits.is_real is None else logits.is_real.sum()
    z_loss_coeff = router.config.moe_z_loss_coeff
    z_loss = None
    if z_loss_coeff is not None:
        z_loss = masked_z_loss(logits, z_loss_coeff / router.tp_cp_group.size())

    if router.is_aux_loss_enabled():
        assignments = assign_for_balancing(logits, router.topk, aux_loss_tokens)
        activation = _attach_local_loss(router, "aux_loss", activation, assignments, num_real, 1)
        activation = _attach_local_loss(router, "seq_aux_loss", activation, assignments, num_real, logits.num_sequences)
        activation = _attach_global_loss(router, activation, assignments, num_real)

    if z_loss is not None:
        assert z_loss_coeff is not None
        activation = router.attach_and_log_load_balancing_loss(
            activation, z_loss_coeff, z_loss, "z_loss", router.tp_cp_group, valid_token_count=num_real
        )
    return activation


def masked_z_loss(logits: MaskedLogits, coeff: float) -> Tensor:
    """Return the z-loss of ST-MoE (arXiv 2202.08906, eq. 5) over the visible logits, a mean over all real tokens.

    A token with one visible expert contributes 0: its weight is 1 whatever its logit is, so the logit needs no control.
    """
    squared = torch.square(torch.logsumexp(logits.values, dim=-1))  # [tokens]
    if logits.visible.routable is not None:
        squared = squared.masked_fill(~logits.visible.routable, 0.0)
    if logits.is_real is None:
        return torch.mean(squared) * coeff
    return (squared * logits.is_real).sum() / logits.is_real.sum().clamp(min=1.0) * coeff


def assign_for_balancing(logits: MaskedLogits, topk: int, aux_loss_tokens: AuxLossTokens) -> Assignments:
    """Select experts by normalized score, without expert bias and groups, as Megatron-Core does for its losses."""
    counted = logits.is_real
    if aux_loss_tokens == "routable" and logits.visible.routable is not None:
        counted = logits.visible.routable if counted is None else logits.visible.routable & counted
    scores, visible = logits.normalized_scores, logits.visible.experts
    routing_map = routing_map_of(select_experts(scores, visible, topk), visible)
    if counted is not None:
        scores = scores * counted.unsqueeze(-1)
        routing_map = routing_map & counted.unsqueeze(-1)
    return Assignments(scores, routing_map, counted)


def measure_load(assignments: Assignments, topk: int, group: ProcessGroup, num_sequences: int = 1) -> ExpertLoad:
    """Count the assignments of each expert over a process group.

    Tokens with fewer than k visible experts have fewer than k assignments. Dividing by the true number of assignments
    makes the shares of the experts add up to 1 in every sequence.

    Args:
        assignments: the assignments of this rank's tokens, ordered by position, then by sequence.
        topk: k.
        group: the ranks that share the batch.
        num_sequences: parts into which the batch is divided; 1 treats the batch as one sequence.
    """
    num_local_tokens, num_experts = assignments.routing_map.shape
    counts = assignments.routing_map.view(-1, num_sequences * num_experts).sum(dim=0)
    num_tokens: int | Tensor
    if assignments.counted is None:
        counts = reduce_from_tensor_model_parallel_region(counts, group)
        num_tokens = tokens_of_sequence = num_local_tokens // num_sequences * group.size()
    else:
        # Counts and numbers of tokens share one reduction.
        tokens_of_sequence = assignments.counted.view(-1, num_sequences).sum(dim=0)
        counts = reduce_from_tensor_model_parallel_region(torch.cat([counts, tokens_of_sequence]), group)
        counts, tokens_of_sequence = counts[:-num_sequences], counts[-num_sequences:]
        num_tokens = tokens_of_sequence.double().mean()
    counts = counts.view(num_sequences, num_experts)
    total = counts.sum(dim=1).clamp(min=1).double()  # [sequences]
    scale = (topk * tokens_of_sequence / total).float()
    return ExpertLoad((counts * scale.unsqueeze(1)).flatten(), num_tokens)


def masked_load_balancing_loss(scores: Tensor, load: ExpertLoad, topk: int, coeff: float) -> Tensor:
    """Return the load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4-6) over masked probabilities.

    The loss is `coeff * N * Σ_i f_i P_i`, summed over the sequences of `load`, with `f_i` the share of all assignments
    that expert i received and `P_i` the mean score of expert i.

    Args:
        scores: float32 [tokens, experts] of this rank's tokens, 0 for invisible experts and tokens that do not count.
        load: the load over all ranks.
        topk: k.
        coeff: α.

    Returns:
        float32 scalar; the losses of the ranks add up to the loss of the whole batch.
    """
    num_experts = scores.shape[1]
    scores = scores.reshape(-1, load.tokens_per_expert.numel())
    denominator = topk * load.num_tokens * load.num_tokens
    # `TopKRouter` computes the factor as a Python float, so a tensor is computed in float64, too.
    if isinstance(denominator, Tensor):
        factor = (num_experts * coeff / denominator.clamp(min=1e-12)).to(scores.dtype)
    else:
        factor = num_experts * coeff / denominator
    return torch.sum(scores.sum(dim=0) * load.tokens_per_expert) * factor


def _attach_local_loss(
    router: TopKRouter,
    loss_type: str,
    activation: Tensor,
    assignments: Assignments,
    num_real: int | Tensor,
    num_sequences: int,
) -> Tensor:
    """Attach the loss that balances each micro-batch (1 sequence), or each of its sequences."""
    coeff = router.get_aux_loss_coeff(loss_type)
    if coeff == 0:
        return activation
    load = measure_load(assignments, router.topk, router.tp_cp_group, num_sequences)
    loss = masked_load_balancing_loss(assignments.scores, load, router.topk, coeff) / num_sequences
    name = loss_type.replace("aux_loss", "load_balancing_loss")
    return router.attach_and_log_load_balancing_loss(
        activation, coeff, loss, name, router.tp_cp_group, valid_token_count=num_real
    )


def _attach_global_loss(
    router: TopKRouter, activation: Tensor, assignments: Assignments, num_real: int | Tensor
) -> Tensor:
    """Attach the loss that balances all data-parallel ranks and the micro-batches of the step so far.

    The loss is multiplied by the number of data-parallel ranks, because it is a sum over these ranks while gradients
    are averaged over them. Megatron-Core 0.19.2 does not multiply, so its loss weighs less the more ranks there are
    (Megatron-LM issue 3672); and it divides the load of earlier micro-batches by the number of tokens in the newest
    micro-batch (Megatron-LM issue 7213).
    """
    coeff = router.get_aux_loss_coeff("global_aux_loss")
    if coeff == 0:
        return activation
    load = _accumulate_load(router, measure_load(assignments, router.topk, router.tp_dp_cp_group))
    loss = masked_load_balancing_loss(assignments.scores, load, router.topk, coeff)
    dp_size = router.tp_dp_cp_group.size() // router.tp_cp_group.size()
    return router.attach_and_log_load_balancing_loss(
        activation,
        coeff * dp_size,
        loss * dp_size,
        "global_load_balancing_loss",
        router.tp_dp_cp_group,
        needs_dp_avg=False,
        valid_token_count=num_real,
    )


def _accumulate_load(router: TopKRouter, load: ExpertLoad) -> ExpertLoad:
    """Return the mean load of the step's micro-batches so far, as if each had as many tokens as the newest one.

    The sums are buffers of the router that checkpoints do not hold. Megatron-Core sets them to 0 after every step.
    """
    assert router.global_tokens_per_expert is not None
    assert router.ga_steps is not None
    router.global_tokens_per_expert += load.tokens_per_expert
    router.ga_steps += 1
    total = router.global_tokens_per_expert.double().sum().clamp(min=1)
    scale = (router.topk * load.num_tokens * router.ga_steps.double() / total).float()
    return ExpertLoad(router.global_tokens_per_expert / router.ga_steps * scale, load.num_tokens)
