"""The norm over all heads equals the norm of OLMoE, also if heads are divided over ranks."""

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention
from safetensors.torch import load_file
from support.launchers import RANK_SCRIPTS
from support.ranks.all_heads_norm_ranks import EPSILON, HEAD_DIM, NUM_HEADS, heads_of, values_of
from support.small_moe import make_config, make_mask, make_visible_experts, process_groups, random_visible_sets
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm

from maskmoe.transformer.layer_specs import get_maskmoe_decoder_block_spec
from maskmoe.transformer.torch_modules.all_heads_norm import AllHeadsRMSNorm

SCRIPT = RANK_SCRIPTS / "all_heads_norm_ranks.py"
NUM_RANKS = 2


@pytest.fixture(scope="module")
def ranks(run_ranks, tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("all_heads_norm")
    run_ranks(SCRIPT, folder, world_size=NUM_RANKS)
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("num_heads", NUM_HEADS)
def test_divided_heads_have_the_norm_of_olmoe(num_heads, ranks) -> None:
    heads, weight, gradients = values_of(num_heads, NUM_RANKS)
    norm = OlmoeRMSNorm(num_heads * HEAD_DIM, eps=EPSILON)
    norm.weight.data.copy_(weight)
    heads.requires_grad_()
    output = norm(heads.flatten(2)).view_as(heads)
    output.backward(gradients.sum(dim=0))
    input_grads = torch.zeros_like(heads)
    for rank, result in enumerate(ranks):
        mine = heads_of(rank, num_heads, NUM_RANKS)
        torch.testing.assert_close(result[f"{num_heads}/output"], output[:, :, mine])
        input_grads[:, :, mine] += result[f"{num_heads}/input_grad"]
    torch.testing.assert_close(input_grads, heads.grad)
    # `finalize_model_grads` adds up the weight's gradients of all ranks.
    weight_grad = sum(result[f"{num_heads}/weight_grad"] for result in ranks)
    torch.testing.assert_close(weight_grad, norm.weight.grad)


def test_computes_in_fp32(one_rank) -> None:
    heads, weight, _ = values_of(6, 1)
    norm = AllHeadsRMSNorm(make_config(bf16=True, params_dtype=torch.bfloat16), HEAD_DIM, num_heads=6)
    norm.weight.data.copy_(weight)
    output = norm(heads.bfloat16())
    assert output.dtype == norm.weight.dtype == torch.bfloat16
    expected = torch.nn.functional.rms_norm(
        heads.bfloat16().float().flatten(2), (6 * HEAD_DIM,), norm.weight.float(), 1e-5
    )
    assert torch.equal(output.flatten(2), expected.bfloat16())


def test_attention_normalizes_queries_and_keys_over_all_their_heads(one_rank) -> None:
    config = make_config(num_layers=1, num_query_groups=1, qk_layernorm=True)
    visible_experts = make_visible_experts(config, make_mask(random_visible_sets(0, 1, 9, 4)))
    block = get_maskmoe_decoder_block_spec(config, visible_experts, qk_layernorm_all_heads=True)
    spec = block.layer_specs[0].submodules.self_attention
    attention = SelfAttention(config, spec.submodules, layer_number=1, pg_collection=process_groups())
    assert [norm.num_features for norm in (attention.q_layernorm, attention.k_layernorm)] == [8, 4]
    query, key, _ = attention.get_query_key_value_tensors(1e3 * torch.randn(3, 2, 8))
    for heads in (query, key):
        torch.testing.assert_close(heads.square().mean(dim=(2, 3)), torch.ones(3, 2), atol=1e-3, rtol=0)
