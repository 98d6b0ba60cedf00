"""Recording the choices of a router, and replaying recorded choices that the routing mask allows.

Megatron-Core's `RouterReplay` holds the recorded choice of one router as expert indices [tokens, k]. A token that is
sent to fewer than k experts fills its row with repetitions of one of its experts. So all entries of a recorded choice
are visible experts, and the choice can be stored, checked and scattered like a choice of k experts.
"""

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor

from maskmoe.transformer.token_ids import TokenIds

REPLAYS = (RouterReplayAction.REPLAY_FORWARD, RouterReplayAction.REPLAY_BACKWARD)
"""The actions with which a router repeats recorded choices."""


def next_choice(replay: RouterReplay) -> Tensor | None:
    """Return the choice [tokens, k] that a router with one of `REPLAYS` must repeat now; None if none was set."""
    if replay.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
        return replay.target_topk_idx
    # Recomputation repeats the choices of the micro-batches in the order in which they were set.
    return replay.replay_backward_list.pop(0) if replay.replay_backward_list else None


def record_choice(replay: RouterReplay, selected: Tensor, visible: Tensor) -> None:
    """Record a choice if the router is to record.

    The choice, int64 [tokens, k], is a result of `select_experts`: invisible experts fill up to k.
    """
    if replay.router_replay_action is not RouterReplayAction.RECORD:
        return
    is_visible = visible.gather(1, selected)
    a_visible_expert = selected.gather(1, is_visible.int().argmax(dim=1, keepdim=True))
    replay.record_indices(torch.where(is_visible, selected, a_visible_expert))


def select_replayed(
    choice: Tensor | None, visible: Tensor, topk: int, has_groups: bool, token_ids: TokenIds, layer_number: int
) -> Tensor:
    """Return a recorded choice in the form of `select_experts`.

    The choice, integers [tokens, k], has repetitions that fill up to k; `visible` is bool [tokens, experts], and the
    ids are [sequence, batch]. With groups, a token may be left fewer than `min(k, V)` experts. The result, int64
    [tokens, k], has the recorded experts in their order; invisible experts replace repetitions.

    Raises:
        ValueError: The routing mask does not allow the choice, or the choice does not fit the tokens.
    """
    num_tokens, num_experts = visible.shape
    if choice is None or list(choice.shape) != [num_tokens, topk]:
        shape = None if choice is None else list(choice.shape)
        raise ValueError(
            f"layer {layer_number} cannot replay a choice of shape {shape}: it routes {num_tokens} tokens, and k is "
            f"{topk}"
        )
    choice = choice.to(visible.device, torch.int64)
    is_expert = (choice >= 0) & (choice < num_experts)
    is_allowed = is_expert & visible.gather(1, choice.where(is_expert, 0))

    # The first repetition of a token becomes its first invisible expert, and so on.
    is_repetition = (choice.unsqueeze(2) == choice.unsqueeze(1)).tril(-1).any(dim=2)
    number = is_repetition.cumsum(dim=1)
    invisible_first = visible.int().argsort(dim=1, stable=True)
    num_visible = visible.sum(dim=1, keepdim=True)
    most_repetitions = num_experts - num_visible if has_groups else (topk - num_visible).clamp(min=0)
    is_allowed &= ~is_repetition | (number <= most_repetitions)

    if not is_allowed.all():
        token, entry = (~is_allowed).nonzero()[0].tolist()
        batch_size = token_ids.ids.shape[1]
        reason = "the expert is repeated" if is_repetition[token, entry] else "the routing mask hides the expert"
        raise ValueError(
            f"layer {layer_number} cannot replay expert {choice[token, entry].item()} for the token with id "
            f"{token_ids.ids.flatten()[token].item()} at position {token // batch_size} of sequence "
            f"{token % batch_size} of this rank: {reason}. The token sees experts "
            f"{visible[token].nonzero().flatten().tolist()}"
        )
    return torch.where(is_repetition, invisible_first.gather(1, (number - 1).clamp(min=0)), choice)
