"""Requests to load a checkpoint of local modules or of Transformer Engine's modules."""

from argparse import Namespace

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor

from maskmoe.checkpoint.saved_names import find_gpt_twin, request_saved_names

LOCAL = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
TRANSFORMER_ENGINE = "decoder.layers.0.pre_mlp_layernorm.weight"


def requested(names: list[str], saved: set[str]) -> list[str]:
    """Return the names under which tensors are requested from a checkpoint with the names `saved`."""
    tensors = [ShardedTensor.from_rank_offsets(name, torch.zeros(2)) for name in names]
    request_saved_names({"model": {"0": tensors[0]}, "optimizer": {"state": {1: tensors[1:]}}}, saved)
    return [tensor.key for tensor in tensors]


def with_optimizer(name: str) -> list[str]:
    return [name, f"optimizer.state.fp32_param.{name}", f"chained_0.optimizer.state.exp_avg.{name}"]


def test_names_of_the_other_implementation_are_requested():
    local, transformer_engine = with_optimizer(LOCAL), with_optimizer(TRANSFORMER_ENGINE)
    assert requested(local, set(transformer_engine)) == transformer_engine
    assert requested(transformer_engine, set(local)) == local


def test_own_names_are_requested_if_the_checkpoint_has_them():
    """A converted checkpoint has the names of both implementations."""
    both = {*with_optimizer(LOCAL), *with_optimizer(TRANSFORMER_ENGINE)}
    for name in (LOCAL, TRANSFORMER_ENGINE):
        assert requested(with_optimizer(name), both) == with_optimizer(name)


def test_names_of_no_implementation_are_left_for_the_error_of_megatron():
    for names in (with_optimizer(LOCAL), ["decoder.final_layernorm.weight", "output_layer.weight"]):
        assert requested(names, {"embedding.word_embeddings.weight"}) == names


def test_short_integers_are_requested_as_integers_that_ranks_can_send():
    mask = ShardedTensor.from_rank_offsets("routing_mask.row_of_id", torch.zeros(2, 3, dtype=torch.int16))
    request_saved_names({"model": {"mask": mask}}, {mask.key})
    assert mask.dtype is torch.int32
    mask.validate_metadata_integrity()


def test_missing_state_of_fp8_stays_the_models_own():
    """A missing object of another kind stays requested."""
    own = torch.empty(0)
    names = ("decoder.layers.pre_mlp_layernorm._extra_state", "decoder.layers.linear_fc1._extra_state", "rng_state")
    state = {"model": {name: ShardedObject(name, own, (4,), (3,)) for name in names}}
    request_saved_names(state, {"decoder.layers.linear_fc1._extra_state/shard_3_4"})
    missing, saved, random = state["model"].values()
    assert isinstance(missing, LocalNonpersistentObject)
    assert missing.unwrap() is own
    assert isinstance(saved, ShardedObject)
    assert isinstance(random, ShardedObject)


@pytest.mark.parametrize("name", ["hybrid_layer_pattern", "hybrid_override_pattern"])
def test_checkpoint_of_a_hybrid_model_has_no_gpt_twin(name):
    """Earlier Megatron versions have another name for the pattern."""
    assert find_gpt_twin(Namespace(hybrid_layer_pattern="*EME"), Namespace(**{name: "*EME"}), None) == (None, False)
