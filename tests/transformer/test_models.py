"""A hybrid model computes the same bits as the GPT model with the same weights."""

from collections.abc import Callable

import pytest
import torch
from support.hybrid_models import NUM_EXPERTS, SEQUENCE, VOCAB_SIZE, Twins, copy_parameters
from support.small_moe import DEVICE, draw_parameters, make_mask, random_visible_sets, take_metrics
from torch import Tensor

from maskmoe.transformer.router import MaskMoERouter

BATCH = 2


def run(model: torch.nn.Module) -> Tensor:
    """Run two micro-batches, the second with padding, forward, then both backward; return the losses."""
    take_metrics()
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(0, VOCAB_SIZE, (2, BATCH, SEQUENCE), generator=generator).to(DEVICE)
    positions = torch.arange(SEQUENCE, device=DEVICE).expand(BATCH, -1)
    is_padding = (torch.rand(BATCH, SEQUENCE, generator=generator) < 0.3).to(DEVICE)
    # `process_mtp_loss` needs a loss mask to compute the loss of multi-token prediction.
    further = {"loss_mask": torch.ones(BATCH, SEQUENCE, device=DEVICE)} if model.config.mtp_num_layers else {}
    losses = [
        model(ids, positions, None, labels=ids.roll(-1, dims=1), padding_mask=padding, **further)
        for ids, padding in zip(batches, (None, is_padding), strict=True)
    ]
    for loss in losses:
        loss.mean().backward()
    return torch.stack(losses).detach()


TWINS = {
    "plain": Twins("*E*E"),
    "tied": Twins("*E*E", arguments={"share_embeddings_and_output_weights": True}),
    "norms of queries and keys": Twins("*E*E", {"qk_layernorm": True}),
    "shared experts, expert bias": Twins(
        "*E*E",
        {
            "moe_shared_expert_intermediate_size": 8,
            "moe_router_enable_expert_bias": True,
            "moe_router_score_function": "sigmoid",
        },
    ),
    "dense first": Twins("*-*E"),
    "dense only": Twins("*-*-"),
    "dense only, prediction": Twins("*-*-/*-"),
    "latent attention": Twins(
        "+E+E", {"kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8, "q_lora_rank": 8}
    ),
    "prediction": Twins("*E*E/*E"),
    "prediction in two depths, tied": Twins("*-*E/*E/*E", arguments={"share_embeddings_and_output_weights": True}),
    "interleaved rope": Twins("*E*E", {"rotary_interleaved": True}),
    "scaled rope": Twins("*E*E", arguments={"rope_scaling": True, "rope_scaling_factor": 4.0}),
}


@pytest.mark.parametrize("name", TWINS)
def test_twins_compute_the_same_bits(name: str) -> None:
    gpt, hybrid = TWINS[name].gpt(), TWINS[name].hybrid()
    draw_parameters(gpt)
    names = copy_parameters(gpt, hybrid)
    assert torch.equal(run(hybrid), run(gpt))
    theirs = dict(gpt.named_parameters())
    for name, parameter in hybrid.named_parameters():
        assert torch.equal(parameter.grad, theirs[names[name]].grad), name
    assert [r.number_in_model for r in routers_of(hybrid)] == [r.number_in_model for r in routers_of(gpt)]


@pytest.mark.parametrize("pattern", ["*-*-/*-", "*E*E/*E"], ids=["dense", "experts"])
@pytest.mark.parametrize("build", [Twins.gpt, Twins.hybrid])
def test_last_stage_with_tied_embeddings_and_prediction_can_be_saved(
    pattern: str, build: Callable[..., torch.nn.Module]
) -> None:
    stage = build(Twins(pattern, arguments={"share_embeddings_and_output_weights": True}), pre_process=False)
    saved = stage.sharded_state_dict()
    assert "embedding.word_embeddings.weight" in saved
    assert "output_layer.weight" not in saved
    assert stage.embedding.word_embeddings.weight.zero_out_wgrad  # else a part of its gradient is lost on GPUs


@pytest.mark.parametrize("pattern", ["*E*E/*-*E", "*E*E/*E*E/*E*E", "*E/E-E"])
def test_every_layer_of_a_depth_of_prediction_records_its_losses(pattern: str) -> None:
    twins = Twins(pattern)
    model = twins.hybrid()
    draw_parameters(model)
    run(model)
    recorded = {name: int(values.count_nonzero()) for name, values in take_metrics().items()}
    assert recorded == dict.fromkeys(["load_balancing_loss", "z_loss"], twins.layers.num_moe_layers)


def test_mask_can_have_tables_for_moe_layers_only() -> None:
    """A mask for the MoE layers equals a mask for all feed-forward layers with the same tables."""
    pattern = "*-*E*-*E/*E"
    visible = random_visible_sets(6, 5, VOCAB_SIZE, NUM_EXPERTS)
    whole, of_moe_layers = (Twins(pattern, mask=make_mask(tables)) for tables in (visible, visible[[1, 3, 4]]))
    for build in (Twins.gpt, Twins.hybrid):
        model, other = build(whole), build(of_moe_layers)
        draw_parameters(model)
        with torch.no_grad():
            for parameter, copied in zip(other.parameters(), model.parameters(), strict=True):
                parameter.copy_(copied)
        assert [router.table for router in routers_of(model)] == [1, 3, 4]
        assert [router.table for router in routers_of(other)] == [0, 1, 2]
        assert torch.equal(run(model), run(other))


def routers_of(model: torch.nn.Module) -> list[MaskMoERouter]:
    return [module for module in model.modules() if isinstance(module, MaskMoERouter)]
