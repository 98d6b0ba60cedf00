"""The router as one kernel for each direction: mask, scores, selection, weights, and the sums of losses and statistics.

`MaskMoERouter` computes the same in plain torch (`selection`, `router_losses`, `routing_statistics`), which is the
reference. A program of the forward kernel routes a block of tokens and writes the block's sums. The blocks' sums are
added afterwards, so results are deterministic. If the scores of two experts are equal, the lower index is selected.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskmoe.transformer.kernels import launching
from maskmoe.transformer.router_sums import BalancingSums
from maskmoe.transformer.token_ids import TokenIds

_BLOCK_SIZE = 1024
"""Logits of one program. With 64 experts, twice as many do not fit into the registers of an H100."""


@dataclass(frozen=True)
class RoutingRule:
    """The settings of a router, which are compiled into the kernels.

    Attributes:
        topk: k.
        score_function: softmax, sigmoid or sqrtsoftplus.
        pre_softmax: apply softmax before the selection, not after it.
        scaling_factor: multiplies the weights.
        num_groups: number of expert groups, for group-limited routing.
        group_topk: groups that are chosen for each token; 0: no group-limited routing.
        counts_all: load-balancing losses count all tokens, not only tokens with two or more visible experts.
        has_z_loss: sum the terms of the z-loss.
    """

    topk: int
    score_function: str
    pre_softmax: bool
    scaling_factor: float
    num_groups: int
    group_topk: int
    counts_all: bool
    has_z_loss: bool


@dataclass(frozen=True)
class KernelSums:
    """Sums over the tokens of this rank; implements `router_sums.LossSums`.

    Attributes:
        packed: float64 [sequences, columns], in the order of `_route_kernel`. Counts are exact up to 2^53.
        scores: float64 [sequences, experts], the last columns, with gradients.
        z_terms: float64 [sequences], the sums of the z-loss, with gradients.
        num_tokens: tokens of a sequence; None if padding makes sequences differ.
        counts_all: load-balancing losses count all tokens of a sequence.
    """

    packed: Tensor
    scores: Tensor
    z_terms: Tensor
    num_tokens: int | None
    counts_all: bool

    @property
    def num_real(self) -> int | Tensor:
        """The number of tokens without padding."""
        return self.packed[:, 0].sum() if self.num_tokens is None else self.num_tokens * len(self.packed)

    @property
    def statistics(self) -> Tensor:
        """The sums of `RoutingStatistics`, float64 [3 + experts]."""
        return _sum_sequences(self.packed[:, : 3 + self._num_experts])[0]

    @property
    def tokens_per_expert(self) -> Tensor:
        """The tokens without padding that each expert is selected for, float64 [experts]."""
        return self.statistics[3:]

    def squared_logsumexp(self) -> Tensor:
        """Sum the terms of the z-loss."""
        return _sum_sequences(self.z_terms)[0]

    def for_balancing(self, num_sequences: int) -> BalancingSums:
        """Sum scores and assignments: over all tokens for 1 sequence, else over each sequence of the micro-batch."""
        counts, scores = self.packed[:, 4 + self._num_experts : -self._num_experts], self.scores
        if num_sequences == 1:
            counts, scores = _sum_sequences(counts), _sum_sequences(scores)
        num_tokens: int | Tensor = counts[:, 0]
        if self.num_tokens is not None and self.counts_all:
            num_tokens = self.num_tokens * len(self.packed) // num_sequences
        return BalancingSums(scores, counts[:, 1:], num_tokens)

    @property
    def _num_experts(self) -> int:
        return self.scores.shape[1]


@dataclass(frozen=True)
class Routed:
    """The result of `route_tokens`.

    Attributes:
        probs: [tokens, experts], the weights of the selected experts, 0 elsewhere.
        routing_map: bool [tokens, experts], the selected experts.
        sums: sums over the tokens; None if they were not asked for.
    """

    probs: Tensor
    routing_map: Tensor
    sums: KernelSums | None


def route_tokens(
    logits: Tensor,
    token_ids: TokenIds,
    row_of_id: Tensor,
    visible_bits: Tensor,
    rule: RoutingRule,
    expert_bias: Tensor | None,
    num_sequences: int,
    has_sums: bool,
) -> Routed:
    """Route tokens; the result has gradients with respect to the logits.

    Args:
        logits: [sequence, batch, experts], float32, bfloat16 or float16.
        token_ids: the ids [sequence, batch].
        row_of_id: integers [vocab], a table of the routing mask, see `VisibleExperts`.
        visible_bits: uint8 [rows, bytes], the same table.
        rule: the settings of the router.
        expert_bias: float32 [experts], added to sigmoid and sqrtsoftplus scores for the selection; None: no bias.
        num_sequences: parts into which sums are divided: 1, or the batch size.
        has_sums: compute sums.
    """
    logits = logits.flatten(0, 1)
    probs, routing_map, packed, scores, z_terms = _Route.apply(
        logits, token_ids, row_of_id, visible_bits, rule, expert_bias, num_sequences, has_sums
    )
    if not has_sums:
        return Routed(probs, routing_map, None)
    num_tokens = len(logits) // num_sequences if token_ids.is_padding is None else None
    return Routed(probs, routing_map, KernelSums(packed, scores, z_terms, num_tokens, rule.counts_all))


class _Route(torch.autograd.Function):
    """Launches the kernels; see `route_tokens`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        token_ids: TokenIds,
        row_of_id: Tensor,
        visible_bits: Tensor,
        rule: RoutingRule,
        expert_bias: Tensor | None,
        num_sequences: int,
        has_sums: bool,
    ) -> tuple[Tensor | None, ...]:
        """Return probs, routing map, packed sums, and views of the sums of scores and z-loss."""
        logits = logits.contiguous()
        num_tokens, num_experts = logits.shape
        ids, is_padding = token_ids.ids, token_ids.is_padding
        block_experts = triton.next_power_of_2(num_experts)
        block_tokens = max(1, min(64, _BLOCK_SIZE // block_experts))
        sizes = {"N": num_experts, "BLOCK_TOKENS": block_tokens, "BLOCK_EXPERTS": block_experts}
        grid = (triton.cdiv(num_tokens // num_sequences, block_tokens), num_sequences)
        probs, routing_map = torch.empty_like(logits), torch.empty_like(logits, dtype=torch.bool)
        rows = torch.empty(num_tokens, dtype=torch.int32, device=logits.device)
        blocks = logits.new_empty(*grid, 5 + 3 * num_experts, dtype=torch.float32) if has_sums else None
        launching.launch(
            _route_kernel,
            grid,
            logits,
            ids,
            is_padding,
            row_of_id,
            visible_bits,
            expert_bias,
            probs,
            routing_map,
            rows,
            blocks,
            num_tokens,
            num_sequences,
            ids.shape[1],
            *ids.stride(),
            *((0, 0) if is_padding is None else is_padding.stride()),
            len(row_of_id),
            NUM_BYTES=visible_bits.shape[1],
            **_constants(rule),
            HAS_Z_LOSS=rule.has_z_loss,
            NUM_GROUPS=rule.num_groups,
            GROUP_TOPK=rule.group_topk,
            **sizes,
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, routing_map, rows, visible_bits)
        ctx.rule, ctx.num_sequences, ctx.sizes = rule, num_sequences, sizes
        if blocks is None:
            ctx.mark_non_differentiable(routing_map)
            return probs, routing_map, None, None, None
        packed = blocks.sum(dim=0, dtype=torch.float64)
        ctx.mark_non_differentiable(routing_map, packed)
        return probs, routing_map, packed, packed[:, -num_experts:], packed[:, 3 + num_experts]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """Turn the gradients of probs and sums into the gradient of the logits."""
        logits, routing_map, rows, visible_bits = ctx.saved_tensors
        probs, _, _, scores, z_terms = (None if each is None else each.contiguous() for each in gradients)
        gradient = torch.empty_like(logits)
        launching.launch(
            _route_backward_kernel,
            (triton.cdiv(len(logits), ctx.sizes["BLOCK_TOKENS"]),),
            logits,
            routing_map,
            rows,
            visible_bits,
            probs,
            scores,
            z_terms,
            gradient,
            len(logits),
            ctx.num_sequences,
            NUM_BYTES=visible_bits.shape[1],
            **_constants(ctx.rule),
            **ctx.sizes,
        )
        return gradient, *[None] * 7


def _constants(rule: RoutingRule) -> dict[str, Any]:
    """Return the compile-time constants of both kernels."""
    return {
        "K": rule.topk,
        "SCORE_FUNCTION": rule.score_function,
        "PRE_SOFTMAX": rule.pre_softmax,
        "SCALE": rule.scaling_factor,
        "COUNTS_ALL": rule.counts_all,
    }


def _sum_sequences(values: Tensor) -> Tensor:
    """Add up the first dimension, and keep it with size 1."""
    return values if len(values) == 1 else values.sum(dim=0, keepdim=True)


@triton.jit(debug=True, do_not_specialize=["num_tokens"])  # Assertions are compiled only with `debug`.
def _route_kernel(
    logits,
    ids,
    is_padding,
    row_of_id,
    visible_bits,
    expert_bias,
    probs,
    routing_map,
    rows_and_real,
    sums,
    num_tokens,
    num_sequences,
    batch_size,
    id_stride,
    id_batch_stride,
    padding_stride,
    padding_batch_stride,
    vocab_size,
    NUM_BYTES: tl.constexpr,
    K: tl.constexpr,
    SCORE_FUNCTION: tl.constexpr,
    PRE_SOFTMAX: tl.constexpr,
    SCALE: tl.constexpr,
    COUNTS_ALL: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_TOPK: tl.constexpr,
    N: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """Route a block of the tokens of one sequence, and sum over the block.

    Columns of the sums: real tokens, routable tokens, entropy, N tokens per expert, z-loss, tokens that load-balancing
    losses count, N assignments, N scores.
    """
    # Look up the visible sets. Values of tokens are columns [tokens, 1].
    positions = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    tokens = positions * num_sequences + tl.program_id(1)
    exists = tokens < num_tokens
    position, place = tokens // batch_size, tokens % batch_size
    token_ids = tl.load(ids + position * id_stride + place * id_batch_stride, mask=exists, other=0)
    tl.device_assert((token_ids >= 0) & (token_ids < vocab_size), "a token id is beyond the vocabulary of the mask")
    rows = tl.load(row_of_id + token_ids, mask=exists, other=0).to(tl.int32)
    is_real = exists
    if is_padding is not None:
        padding = tl.load(is_padding + position * padding_stride + place * padding_batch_stride, mask=exists, other=1)
        is_real = exists & (padding == 0)
    tl.store(rows_and_real + tokens, rows * 2 + is_real.to(tl.int32), mask=exists)
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    visible, values = _masked_logits(logits, visible_bits, tokens, exists, rows, experts, NUM_BYTES, N)

    # Select experts.
    raw, normalized = _scores(values, visible, SCORE_FUNCTION)
    preference = raw
    if SCORE_FUNCTION == "softmax":
        preference = normalized if PRE_SOFTMAX else values
    if expert_bias is not None:
        preference += tl.load(expert_bias + experts, mask=experts < N, other=0.0)
    candidates = visible
    if GROUP_TOPK > 0:
        # The score of a group is the sum of its best visible experts' scores. If the group has too few visible experts,
        # the token's smallest visible score takes the missing places.
        smallest = tl.min(tl.where(visible, preference, float("inf")), axis=1, keep_dims=True)
        group_of_expert = experts // (N // NUM_GROUPS)
        group_scores = tl.zeros_like(values)
        for group in range(NUM_GROUPS):
            in_group = group_of_expert == group
            best = _select(preference, experts, visible & in_group, K // GROUP_TOPK)
            num_missing = K // GROUP_TOPK - tl.sum(best.to(tl.float32), axis=1, keep_dims=True)
            score = tl.sum(tl.where(best, preference, 0.0), axis=1, keep_dims=True) + num_missing * smallest
            group_scores = tl.where(in_group, score, group_scores)
        candidates = _select(group_scores, group_of_expert, visible, GROUP_TOPK)
    selected = _select(preference, experts, candidates, K)
    weights = _weights(values, raw, normalized, selected, K, SCORE_FUNCTION, PRE_SOFTMAX)
    places = tokens * N + experts
    is_inside = exists & (experts < N)
    tl.store(probs + places, (weights * SCALE).to(probs.dtype.element_ty), mask=is_inside)
    tl.store(routing_map + places, selected, mask=is_inside)

    # Sum over the block.
    if sums is not None:
        sums += (tl.program_id(0) * num_sequences + tl.program_id(1)).to(tl.int64) * (5 + 3 * N)
        routable = is_real & (rows >= N)  # Rows below N are sets of one expert.
        counted = is_real if COUNTS_ALL else routable
        entropy = -normalized * tl.log(tl.where(normalized > 0, normalized, 1.0))
        entropy = tl.where(routable, tl.sum(tl.where(visible, entropy, 0.0), axis=1, keep_dims=True), 0.0)
        tl.store(sums, tl.sum(is_real.to(tl.float32)))
        tl.store(sums + 1, tl.sum(routable.to(tl.float32)))
        tl.store(sums + 2, tl.sum(entropy))
        _store_sums(sums + 3, selected & is_real, experts, N)
        if HAS_Z_LOSS:
            _, log_sum = _softmax(values, visible)
            tl.store(sums + 3 + N, tl.sum(tl.where(routable, log_sum * log_sum, 0.0)))
        tl.store(sums + 4 + N, tl.sum(counted.to(tl.float32)))
        # Load-balancing losses select without bias and groups.
        assigned = selected
        if expert_bias is not None or GROUP_TOPK > 0:
            assigned = _select(normalized, experts, visible, K)
        _store_sums(sums + 5 + N, assigned & counted, experts, N)
        _store_sums(sums + 5 + 2 * N, tl.where(visible & counted, normalized, 0.0), experts, N)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_backward_kernel(
    logits,
    routing_map,
    rows_and_real,
    visible_bits,
    probs_gradient,
    scores_gradient,
    z_gradient,
    logits_gradient,
    num_tokens,
    num_sequences,
    NUM_BYTES: tl.constexpr,
    K: tl.constexpr,
    SCORE_FUNCTION: tl.constexpr,
    PRE_SOFTMAX: tl.constexpr,
    SCALE: tl.constexpr,
    COUNTS_ALL: tl.constexpr,
    N: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
):
    """Compute the gradient of a block of logits from the gradients of probs, scores and z-loss, which may be None."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)[:, None]
    exists = tokens < num_tokens
    stored = tl.load(rows_and_real + tokens, mask=exists, other=0)
    rows, is_real = stored // 2, stored % 2 == 1
    routable = is_real & (rows >= N)
    experts = tl.arange(0, BLOCK_EXPERTS)[None, :]
    visible, values = _masked_logits(logits, visible_bits, tokens, exists, rows, experts, NUM_BYTES, N)
    raw, normalized = _scores(values, visible, SCORE_FUNCTION)
    places = tokens * N + experts
    is_inside = exists & (experts < N)

    gradient = tl.zeros_like(values)  # of the logits
    to_raw = tl.zeros_like(values)  # of sigmoid or sqrtsoftplus scores
    to_normalized = tl.zeros_like(values)  # of normalized scores
    if scores_gradient is not None:
        counted = is_real if COUNTS_ALL else routable
        sequences = tokens % num_sequences
        is_counted = visible & counted
        to_normalized += tl.load(scores_gradient + sequences * N + experts, mask=is_counted, other=0.0).to(tl.float32)
    if probs_gradient is not None:
        selected = visible & (tl.load(routing_map + places, mask=is_inside, other=1) != 0)
        to_weights = tl.load(probs_gradient + places, mask=selected, other=0.0).to(tl.float32) * SCALE
        weights = _weights(values, raw, normalized, selected, K, SCORE_FUNCTION, PRE_SOFTMAX)
        centred = to_weights - tl.sum(to_weights * weights, axis=1, keep_dims=True)
        if SCORE_FUNCTION == "softmax":
            if PRE_SOFTMAX:
                to_normalized += to_weights
            else:
                gradient += weights * centred
        elif K > 1:
            to_raw += tl.where(selected, tl.div_rn(centred, _sum_of(raw, selected)), 0.0)
        else:
            to_raw += to_weights
    centred = to_normalized - tl.sum(tl.where(visible, to_normalized * normalized, 0.0), axis=1, keep_dims=True)
    if SCORE_FUNCTION == "softmax":
        gradient += normalized * centred
    else:
        to_raw += tl.div_rn(centred, _sum_of(raw, visible))
        if SCORE_FUNCTION == "sigmoid":
            slope = raw * (1.0 - raw)
        else:
            slope = tl.where(raw > 0, tl.div_rn(tl.sigmoid(values), tl.where(raw > 0, 2.0 * raw, 1.0)), 0.0)
        gradient += to_raw * slope
    if z_gradient is not None:
        softmax, log_sum = _softmax(values, visible)
        factor = tl.load(z_gradient + tokens % num_sequences, mask=routable, other=0.0).to(tl.float32)
        gradient += softmax * tl.where(routable, 2.0 * factor * log_sum, 0.0)
    gradient = tl.where(visible, gradient, 0.0)
    tl.store(logits_gradient + places, gradient.to(logits_gradient.dtype.element_ty), mask=is_inside)


@triton.jit
def _masked_logits(logits, visible_bits, tokens, exists, rows, experts, NUM_BYTES: tl.constexpr, N: tl.constexpr):
    """Return the visible experts of tokens, and their logits as float32, -inf for invisible experts.

    A token that does not exist sees the expert of row 0, so that its results are finite.
    """
    places = visible_bits + rows.to(tl.int64) * NUM_BYTES + experts // 8
    bits = tl.load(places, mask=experts < N, other=0).to(tl.int32)
    visible = ((bits >> (experts % 8)) & 1) != 0
    values = tl.load(logits + tokens * N + experts, mask=visible & exists, other=0.0)
    return visible, tl.where(visible, values.to(tl.float32), float("-inf"))


@triton.jit
def _softmax(values, visible):
    """Return softmax, and the logarithm of the sum of exponentials, of each row's visible values."""
    largest = tl.max(values, axis=1, keep_dims=True)
    exponentials = tl.where(visible, tl.exp(values - largest), 0.0)
    total = tl.sum(exponentials, axis=1, keep_dims=True)
    return tl.div_rn(exponentials, total), largest + tl.log(total)


@triton.jit
def _scores(values, visible, SCORE_FUNCTION: tl.constexpr):
    """Return scores of single logits, and normalized scores; both are 0 for invisible experts.

    Softmax has no scores of single logits; normalized scores take their place.
    """
    if SCORE_FUNCTION == "softmax":
        normalized, _ = _softmax(values, visible)
        return normalized, normalized
    if SCORE_FUNCTION == "sigmoid":
        raw = tl.sigmoid(values)
    else:
        # softplus(x) = max(x, 0) + log(1 + e) with e = exp(-|x|). The quotient restores what rounding 1 + e loses.
        small = tl.exp(-tl.abs(values))
        above_one = 1.0 + small
        quotient = tl.div_rn(small, tl.where(above_one == 1.0, 1.0, above_one - 1.0))
        raw = tl.sqrt_rn(tl.maximum(values, 0.0) + tl.where(above_one == 1.0, small, tl.log(above_one) * quotient))
    raw = tl.where(visible, raw, 0.0)
    return raw, tl.div_rn(raw, _sum_of(raw, visible))


@triton.jit
def _sum_of(raw, included):
    """Return the sums of the included scores of each row as a column."""
    return tl.sum(tl.where(included, raw, 0.0), axis=1, keep_dims=True) + 1e-20  # Megatron-Core adds the same 1e-20.


@triton.jit
def _weights(
    values, raw, normalized, selected, K: tl.constexpr, SCORE_FUNCTION: tl.constexpr, PRE_SOFTMAX: tl.constexpr
):
    """Return the weights of the selected experts before scaling, 0 for other experts."""
    weights = normalized
    if SCORE_FUNCTION != "softmax":
        weights = raw
        if K > 1:
            weights = tl.div_rn(raw, _sum_of(raw, selected))
    elif not PRE_SOFTMAX:
        weights, _ = _softmax(tl.where(selected, values, float("-inf")), selected)
    return tl.where(selected, weights, 0.0)


@triton.jit
def _select(scores, order, candidates, NUMBER: tl.constexpr):
    """Return the `NUMBER` best candidates of each row, or all if there are fewer.

    Candidates with equal scores and equal `order` count as one; of equal scores, the lowest `order` is the best.
    """
    # Make integers that sort like (score, -order). Adding 0 turns -0.0 into 0.0.
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    lowest = -(2**63)
    keys = tl.where(candidates, (bits.to(tl.int64) << 32) + (0xFFFF - order), lowest)
    best = tl.max(keys, axis=1, keep_dims=True)
    for _ in range(NUMBER - 1):
        best = tl.max(tl.where(keys < best, keys, lowest), axis=1, keep_dims=True)
    return candidates & (keys >= best)


@triton.jit
def _store_sums(sums, values, experts, N: tl.constexpr):
    """Store the sums over the tokens of values [tokens, experts]."""
    tl.store(sums + experts, tl.sum(values.to(tl.float32), axis=0, keep_dims=True), mask=experts < N)
