"""Norms of torch in tensor- and sequence-parallel models, and the norm of OLMoE over all heads."""

import pytest
import torch
from megatron.core.transformer.attention import SelfAttention
from support.small_moe import DEVICE, make_config, make_mask, process_groups, random_visible_sets
from support.tensors import saved_tensors
from torch import Tensor
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm

from maskmoe.transformer.layer_specs import get_maskmoe_decoder_block_spec
from maskmoe.transformer.torch_modules.norms import AllHeadsRMSNorm, TorchNorm
from maskmoe.transformer.visible_experts import VisibleExperts

NORMS = [torch.nn.LayerNorm, torch.nn.RMSNorm]
NUM_RANKS = 2


@pytest.mark.parametrize("norm_class", NORMS)
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_is_the_norm_of_torch(norm_class: type, sequence_parallel: bool) -> None:
    config = make_config(
        normalization=norm_class.__name__,
        sequence_parallel=sequence_parallel,
        tensor_model_parallel_size=1 + sequence_parallel,
    )
    norm = TorchNorm(config=config, hidden_size=8, eps=1e-3, persist_layer_norm=True)
    assert isinstance(norm, norm_class)
    assert norm.eps == 1e-3
    assert norm.state_dict().keys() == norm_class(8).state_dict().keys()
    assert all(parameter.sequence_parallel is sequence_parallel for parameter in norm.parameters())


def results(norm: torch.nn.Module, hidden: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of the input and the parameters."""
    output = norm(hidden)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator).bfloat16().to(DEVICE, output.dtype)
    return [output, *torch.autograd.grad(output, [hidden, *norm.parameters()], gradient)]


@pytest.mark.parametrize("is_zero_centred", [False, True], ids=["", "zero-centred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_equals_the_norm_of_torch_in_fp32(is_zero_centred: bool, dtype: torch.dtype) -> None:
    config = make_config(normalization="RMSNorm", layernorm_zero_centered_gamma=is_zero_centred)
    ours, exact = TorchNorm(config, 64, eps=1e-3).to(DEVICE, dtype), torch.nn.RMSNorm(64, eps=1e-3).to(DEVICE)
    assert ours.weight.eq(0 if is_zero_centred else 1).all()
    ours.weight.data.normal_(std=0.1 if is_zero_centred else 1)
    exact.weight.data.copy_(ours.weight + is_zero_centred)
    rows = 7 if is_zero_centred or dtype == torch.float32 else 4096
    hidden = (5 * torch.randn(rows, 2, 64)).bfloat16().to(DEVICE, dtype)
    found = results(ours, hidden.requires_grad_())
    expected = results(exact, hidden.detach().float().requires_grad_())
    # In bf16, results are rounded once. Sums of 8,192 fp32 numbers that cancel are added in another order.
    tolerance = {"rtol": 2**-8, "atol": 1e-3}
    if dtype == torch.float32:
        tolerance = {"rtol": 3e-6, "atol": 3e-6}
    elif is_zero_centred:
        # Normalized features are rounded before they are multiplied, and gradients add 14 rounded products. Each error
        # is at most 2**-9 of a product of up to about 4, so the sum of the errors is at most 0.11.
        tolerance = {"rtol": 2**-6, "atol": 0.11}
    torch.testing.assert_close(found, expected, check_dtype=False, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_keeps_its_input_only(dtype: torch.dtype) -> None:
    hidden = torch.randn(7, 2, 64).to(DEVICE, dtype).requires_grad_()
    norm = TorchNorm(make_config(normalization="RMSNorm"), 64).to(DEVICE, dtype)
    saved = saved_tensors(lambda: norm(hidden))
    assert {tensor.data_ptr() for tensor in saved if tensor.numel() == hidden.numel()} == {hidden.data_ptr()}


SEQUENCE, BATCH, HEAD_DIM = 5, 2, 8
# Numbers of heads of the model: three for each of two ranks, one for each rank, and one that both ranks hold.
NUM_HEADS = (6, 2, 1)
EPSILON = 1e-2


def values_of(num_heads: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw heads, a weight, and a gradient for the output of each rank.

    Returns:
        heads [sequence, batch, heads, features]; weight [heads * features]; gradients [ranks, sequence, batch, heads,
        features], 0 for heads that a rank does not hold.
    """
    generator = torch.Generator().manual_seed(num_heads)
    heads = torch.randn(SEQUENCE, BATCH, num_heads, HEAD_DIM, generator=generator)
    weight = torch.randn(num_heads * HEAD_DIM, generator=generator)
    gradients = torch.randn(num_ranks, SEQUENCE, BATCH, num_heads, HEAD_DIM, generator=generator)
    for rank in range(num_ranks):
        held = torch.zeros(num_heads, 1)
        held[heads_of(rank, num_heads, num_ranks)] = 1
        gradients[rank] *= held
    return heads, weight, gradients


def heads_of(rank: int, num_heads: int, num_ranks: int) -> slice:
    """Return the heads that a rank holds."""
    first = rank * num_heads // num_ranks
    return slice(first, first + max(1, num_heads // num_ranks))


def results_of_rank() -> dict[int, dict[str, Tensor]]:
    """Return the results of the norm over this rank's heads, by the number of heads of the model."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}
    for num_heads in NUM_HEADS:
        heads, weight, gradients = values_of(num_heads, num_ranks)
        mine = heads_of(rank, num_heads, num_ranks)
        norm = AllHeadsRMSNorm(
            make_config(), HEAD_DIM, EPSILON, num_heads=num_heads, tp_group=torch.distributed.group.WORLD
        )
        norm.weight.data.copy_(weight)
        local = heads[:, :, mine].clone().requires_grad_()
        output = norm(local)
        output.backward(gradients[rank][:, :, mine])
        found[num_heads] = {"output": output.detach(), "input_grad": local.grad, "weight_grad": norm.weight.grad}
    return found


@pytest.fixture(scope="module")
def ranks(run_ranks, tmp_path_factory) -> list[dict[int, dict[str, Tensor]]]:
    return run_ranks(results_of_rank, tmp_path_factory.mktemp("all_heads_norm"), world_size=NUM_RANKS)


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
        torch.testing.assert_close(result[num_heads]["output"], output[:, :, mine])
        input_grads[:, :, mine] += result[num_heads]["input_grad"]
    torch.testing.assert_close(input_grads, heads.grad)
    # `finalize_model_grads` adds up the weight's gradients of all ranks.
    weight_grad = sum(result[num_heads]["weight_grad"] for result in ranks)
    torch.testing.assert_close(weight_grad, norm.weight.grad)


def test_attention_normalizes_queries_and_keys_over_all_their_heads(one_rank) -> None:
    config = make_config(num_layers=1, num_query_groups=1, qk_layernorm=True)
    groups = process_groups()
    groups.tp = torch.distributed.group.WORLD  # another object than the group of `parallel_state`
    visible_experts = VisibleExperts(config, make_mask(random_visible_sets(0, 1, 9, 4)), groups)
    block = get_maskmoe_decoder_block_spec(config, visible_experts, qk_layernorm_all_heads=True)
    spec = block.layer_specs[0].submodules.self_attention
    attention = SelfAttention(config, spec.submodules, layer_number=1, pg_collection=groups)
    assert [norm.num_features for norm in (attention.q_layernorm, attention.k_layernorm)] == [8, 4]
    assert {norm.tp_group for norm in (attention.q_layernorm, attention.k_layernorm)} == {groups.tp}
    query, key, _ = attention.get_query_key_value_tensors(1e3 * torch.randn(3, 2, 8))
    for heads in (query, key):
        torch.testing.assert_close(heads.square().mean(dim=(2, 3)), torch.ones(3, 2), atol=1e-3, rtol=0)
