"""Auxiliary losses of a masked router: `attach_losses` is the entry, one function computes each loss.

On a CPU, if every token sees every expert, losses and gradients are bit-equal to those of Megatron-Core's
`TopKRouter`.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.routing import BalancingSums, LossSums


@dataclass(frozen=True)
class ExpertLoad:
    """The load of each expert.

    Attributes:
        tokens_per_expert: Float [sequences, experts], assignments, scaled as if every token had k assignments.
        num_tokens: Tokens in a sequence; float64 if a tensor. The mean over sequences if padding makes them differ.
    """

    tokens_per_expert: Tensor
    num_tokens: int | Tensor


def attach_losses(router: TopKRouter, activation: Tensor, sums: LossSums) -> Tensor:
    """Attach the z-loss and the load-balancing losses to [tokens, features], which stays unchanged in value.

    Gradients of the losses flow when the gradient of the result flows. The losses are logged under Megatron's names.
    `sums` are over this rank's tokens. The router holds the accumulated load of the global loss.
    """
    coeff, num_real = router.config.moe_z_loss_coeff, sums.num_real
    if coeff or router.calculate_per_token_loss:  # the balancing losses alone do not read the number
        num_real = clamped_mean_over_ranks(num_real, router.tp_cp_group)
    for name, balancing in sums.balancing.items():
        activation = _attach_balancing_loss(router, name, activation, balancing, num_real)
    if coeff:
        assert sums.squared_logsumexp is not None
        z_loss = masked_z_loss(sums.squared_logsumexp, num_real, coeff / router.tp_cp_group.size())
        activation = router.attach_and_log_load_balancing_loss(
            activation, coeff, z_loss, "z_loss", router.tp_cp_group, valid_token_count=num_real
        )
    return activation


def clamped_mean_over_ranks(num_real: int | Tensor, group: ProcessGroup) -> int | Tensor:
    """Return the mean number of real tokens of the ranks, of at least one token in all.

    An integer is the same on all ranks.

    Padding gives the ranks of a sequence unequal numbers of real tokens. Losses that divide by the number of each rank
    would weigh the tokens of a rank with more padding more, as the z-loss of Megatron-Core 0.19.2 does.
    """
    if isinstance(num_real, int):
        return num_real
    return reduce_from_tensor_model_parallel_region(num_real.float(), group).clamp(min=1) / group.size()


def masked_z_loss(squared_logsumexp: Tensor, num_real: int | Tensor, coeff: float) -> Tensor:
    """Return the z-loss of ST-MoE (arXiv 2202.08906, eq. 5) over the visible logits of this rank's tokens.

    A token with one visible expert contributes 0: its weight is 1 whatever its logit is, so the logit needs no control.

    Args:
        squared_logsumexp: Scalar, the sum over this rank's real tokens.
        num_real: The positive mean number of real tokens of the ranks that share the micro-batch, so that the losses of
            the ranks add up to a mean over the real tokens of all of them.
        coeff: The coefficient, divided by the number of these ranks.
    """
    return squared_logsumexp / num_real * coeff


def measure_load(sums: BalancingSums, topk: int, group: ProcessGroup) -> ExpertLoad:
    """Count the assignments of each expert over a process group.

    Tokens with fewer than k visible experts have fewer than k assignments. Dividing by the true number of assignments
    makes the shares of the experts add up to 1 in every sequence.
    """
    num_tokens = tokens_of_sequence = sums.num_tokens
    if isinstance(tokens_of_sequence, int):
        # The reduction overwrites its input.
        counts = sums.assignments if group.size() == 1 else sums.assignments.clone()
        counts = reduce_from_tensor_model_parallel_region(counts, group)
        num_tokens = tokens_of_sequence = tokens_of_sequence * group.size()
    else:
        # Counts and numbers of tokens share one reduction.
        counts = torch.cat([sums.assignments, tokens_of_sequence.unsqueeze(1)], dim=1)
        counts = reduce_from_tensor_model_parallel_region(counts, group)
        counts, tokens_of_sequence = counts[:, :-1], counts[:, -1:]
        num_tokens = tokens_of_sequence.double().mean()
    total = counts.sum(dim=1, keepdim=True).clamp(min=1).double()  # [sequences, 1]
    assignments_per_token = total / (topk * tokens_of_sequence)  # as a share of k
    return ExpertLoad(counts / assignments_per_token.to(sums.scores.dtype), num_tokens)


def masked_load_balancing_loss(scores: Tensor, load: ExpertLoad, topk: int, coeff: float) -> Tensor:
    """Return the load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4-6) over masked probabilities.

    The loss is `coeff * N * Σ_i f_i P_i`, summed over the sequences of `load`, with `f_i` the share of all assignments
    that expert i received and `P_i` the mean score of expert i. `scores` [sequences, experts] are sums over this rank's
    tokens, `load` is over all ranks, and the losses of the ranks add up to the loss of the whole batch.
    """
    num_experts = scores.shape[1]
    denominator = topk * load.num_tokens * load.num_tokens
    # `TopKRouter` computes the factor as a Python float, so a tensor is computed in float64, too.
    if isinstance(denominator, Tensor):
        factor = (num_experts * coeff / denominator.clamp(min=1e-12)).to(scores.dtype)
    else:
        factor = num_experts * coeff / denominator
    return torch.sum(scores * load.tokens_per_expert) * factor


def _attach_balancing_loss(
    router: TopKRouter, name: str, activation: Tensor, sums: BalancingSums, num_real: int | Tensor
) -> Tensor:
    """Attach the loss that balances each micro-batch (1 sequence), or each of its sequences; or the global loss.

    The global loss balances all data-parallel ranks and the micro-batches of the step so far. It is multiplied by the
    number of data-parallel ranks, because it is a sum over these ranks while gradients are averaged over them.
    Megatron-Core 0.19.2 does not multiply, so its loss weighs less the more ranks there are (Megatron-LM issue 3672);
    and it divides the load of earlier micro-batches by the number of tokens in the newest micro-batch (Megatron-LM
    issue 7213).
    """
    is_global = name == "global_aux_loss"
    group = router.tp_dp_cp_group if is_global else router.tp_cp_group
    coeff, load = router.get_aux_loss_coeff(name), measure_load(sums, router.topk, group)
    if is_global:
        load = _accumulate_load(router, load)
    loss = masked_load_balancing_loss(sums.scores, load, router.topk, coeff)
    if is_global:
        dp_size = group.size() // router.tp_cp_group.size()
        coeff, loss = coeff * dp_size, loss * dp_size
    elif len(sums.scores) > 1:
        loss = loss / len(sums.scores)
    logged_name = name.replace("aux_loss", "load_balancing_loss")
    return router.attach_and_log_load_balancing_loss(
        activation, coeff, loss, logged_name, group, needs_dp_avg=not is_global, valid_token_count=num_real
    )


def _accumulate_load(router: TopKRouter, load: ExpertLoad) -> ExpertLoad:
    """Return the mean load of the step's micro-batches so far, as if each had as many tokens as the newest one.

    The sums are buffers of the router that checkpoints do not hold. Megatron-Core sets them to 0 after every step.
    """
    assert router.global_tokens_per_expert is not None
    assert router.ga_steps is not None
    router.global_tokens_per_expert += load.tokens_per_expert.flatten()
    router.ga_steps += 1
    total = router.global_tokens_per_expert.double().sum().clamp(min=1)
    scale = (router.topk * load.num_tokens * router.ga_steps.double() / total).float()
    mean = router.global_tokens_per_expert / router.ga_steps * scale
    return ExpertLoad(mean.unsqueeze(0), load.num_tokens)
