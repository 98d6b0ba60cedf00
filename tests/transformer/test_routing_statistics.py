"""Statistics of routers against the same numbers counted token by token."""

import numpy as np
import pytest
import torch
from megatron.core.transformer.module import Float16Module
from support import small_moe as moe
from support.small_moe import DEVICE
from torch import Tensor

from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.routing_statistics import RoutingSums
from maskmoe.transformer.token_ids import TokenIds

NUM_EXPERTS, VOCAB_SIZE, SEQUENCE, BATCH = 5, 11, 16, 2

pytestmark = pytest.mark.usefixtures("one_rank")


def take(router: MaskMoERouter) -> RoutingSums:
    packed, _ = router.statistics.take()
    return RoutingSums.unpack(packed)


def random_ids(seed: int) -> Tensor:
    """Draw ids, int64 [sequence, batch]."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB_SIZE, (SEQUENCE, BATCH))).to(DEVICE)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("sizes", [None, (2, 3), (1,)], ids=["mixed", "all routable", "none routable"])
def test_sums_over_micro_batches(score_function: str, pads: bool, sizes: tuple[int, ...] | None) -> None:
    visible = moe.random_visible_sets(3, 1, VOCAB_SIZE, NUM_EXPERTS, sizes)
    config = moe.make_config(NUM_EXPERTS, topk=2, moe_router_score_function=score_function)
    router = moe.make_router(config, moe.make_mask(visible))
    load = torch.zeros(NUM_EXPERTS, device=DEVICE)
    entropy, num_tokens, num_routable = 0.0, 0, 0
    for micro_batch in range(3):
        ids = random_ids(micro_batch)
        logits = 3 * torch.randn(SEQUENCE, BATCH, NUM_EXPERTS, device=DEVICE)
        is_padding = torch.rand(SEQUENCE, BATCH, device=DEVICE) < 0.3 if pads else None
        router.routing(logits, TokenIds(ids, is_padding))

        seen = torch.from_numpy(visible[0]).to(DEVICE)[ids.flatten()]
        logits = logits.flatten(0, 1)
        routing_map = moe.reference_routing(logits, seen, 2, score_function=score_function).routing_map
        for token in range(len(logits)):
            if pads and is_padding.flatten()[token]:
                continue
            num_tokens += 1
            load += routing_map[token]
            if seen[token].sum() > 1:
                z = logits[token, seen[token]].double()
                softplus_root = torch.nn.functional.softplus(z).sqrt()
                scores = {"softmax": z.exp(), "sigmoid": z.sigmoid(), "sqrtsoftplus": softplus_root}[score_function]
                p = scores / scores.sum()
                entropy -= (p * p.log()).sum().item()
                num_routable += 1

    sums = take(router)
    assert sums.tokens_per_expert.tolist() == load.tolist()
    assert (sums.num_tokens, sums.num_routable) == (num_tokens, num_routable)
    assert sums.entropy.item() == pytest.approx(entropy, rel=1e-6, abs=0)
    assert router.statistics.take() == (0, 0)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_tokens_that_fill_up_an_expert_are_not_its_load(policy: str) -> None:
    """All experts get 13 of the 32 tokens; expert 4 is chosen by none."""
    visible = moe.random_visible_sets(3, 1, VOCAB_SIZE, NUM_EXPERTS)
    visible[..., 4] = False
    visible[..., 0] |= ~visible.any(axis=-1)
    padding = {"moe_pad_expert_input_to_capacity": True, "moe_token_drop_policy": policy}
    config = moe.make_config(NUM_EXPERTS, topk=2, moe_expert_capacity_factor=1.0, **padding)
    router, ids = moe.make_router(config, moe.make_mask(visible)), random_ids(0)
    logits = torch.randn(SEQUENCE, BATCH, NUM_EXPERTS, device=DEVICE)
    _, routing_map = router.routing(logits, TokenIds(ids))
    assert routing_map.sum(dim=0).tolist() == [13] * NUM_EXPERTS
    seen = torch.from_numpy(visible[0]).to(DEVICE)[ids.flatten()]
    chosen = moe.reference_routing(logits.flatten(0, 1), seen, 2).routing_map
    assert take(router).tokens_per_expert.tolist() == chosen.sum(dim=0).clamp(max=13).tolist()


def test_only_training_counts() -> None:
    """Statistics and losses."""
    config = moe.make_config(NUM_EXPERTS, moe_aux_loss_coeff=1e-2, moe_z_loss_coeff=1e-3)
    router = moe.make_router(config, moe.make_mask(moe.random_visible_sets(3, 1, VOCAB_SIZE, NUM_EXPERTS)))
    hidden = torch.randn(SEQUENCE, BATCH, 8, device=DEVICE)
    with torch.no_grad():
        router(hidden, TokenIds(random_ids(0)))
    router.eval()
    router(hidden, TokenIds(random_ids(0)))
    assert router.statistics.take() == (0, 0)
    assert not moe.take_metrics()
    router.counts_in_evaluation = True
    router(hidden, TokenIds(random_ids(0)))
    assert take(router).num_tokens == SEQUENCE * BATCH
    assert not moe.take_metrics()
    router.train()
    router(hidden, TokenIds(random_ids(0)))
    assert take(router).num_tokens == SEQUENCE * BATCH
    assert moe.take_metrics().keys() == {"load_balancing_loss", "z_loss"}


def test_not_in_checkpoints_and_exact_in_bf16() -> None:
    config = moe.make_config(NUM_EXPERTS, bf16=True)
    router = moe.make_router(config, moe.make_mask(np.ones((1, VOCAB_SIZE, NUM_EXPERTS), bool)))
    names = set(router.state_dict())
    router = Float16Module(config, router).module
    hidden = torch.zeros(SEQUENCE, BATCH, 8, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(40):  # bfloat16 cannot represent all whole numbers above 256.
        router(hidden, TokenIds(random_ids(0)))
    assert set(router.state_dict()) == names
    assert take(router).tokens_per_expert.sum() == 40 * SEQUENCE * BATCH * 2
