"""A model with hash layers below other layers trains on several ranks and is exported."""

import json

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from support.training import VOCAB_SIZE
from transformers import AutoModelForCausalLM

from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.checkpoint.series import checkpoint_path
from maskmoe.conversion.convert import huggingface_to_megatron, megatron_to_huggingface
from maskmoe.conversion.settings import Settings
from maskmoe.conversion.torch_dist import TorchDistSource
from maskmoe.data.indexed_dataset import open_tokens, read_index
from maskmoe.routing_mask.assignment import HashLayers
from maskmoe.training.loop.model_builder import MaskMoEGPTModelBuilder
from maskmoe.training.settings.setup import model_config_from_args

# See test_composition.py.
FP32_ORDER_OF_SUMS = 2e-6


@pytest.mark.slow
@pytest.mark.runs("hash layers", "hash layers, expert parallel 2")
def test_two_ranks_agree_with_one(runs):
    reference, run = runs
    assert run.iterations == [5, 6, 7, 8]
    assert run.difference(reference) < FP32_ORDER_OF_SUMS


@pytest.mark.slow
@pytest.mark.usefixtures("one_rank")
@pytest.mark.runs("hash layers, expert parallel 2")
def test_exported_model_computes_the_same_logits(runs, workplace, tmp_path):
    (run,) = runs
    checkpoint = checkpoint_path(run.checkpoints, 8)
    mask = read_routing_mask(checkpoint)
    assert [set(mask.num_visible_of_layer(layer).tolist()) for layer in range(4)] == [{2}, {2}, {8}, {8}]
    # Load the checkpoint of two ranks into Megatron's model on one rank.
    args = TorchDistSource(checkpoint).common_state()["args"]
    args.load, args.ckpt_step, args.expert_model_parallel_size = str(run.checkpoints), 8, 1
    args.routing_mask = str(workplace.folder / args.routing_mask)
    megatron = MaskMoEGPTModelBuilder(model_config_from_args(args)).build_model(
        ProcessGroupCollection.use_mpu_process_groups()
    )
    # The loaded dictionary also has the training state.
    loaded = dist_checkpointing.load(megatron.sharded_state_dict(), str(checkpoint))
    assert not megatron.load_state_dict(loaded, strict=False).missing_keys
    megatron_to_huggingface(Settings(load=checkpoint, save=tmp_path / "exported"))
    transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokens = torch.randint(0, VOCAB_SIZE, (2, 32), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(32).expand_as(tokens)
    with torch.no_grad():
        expected = megatron.eval()(tokens, positions, None)[..., :VOCAB_SIZE]
        logits = transformers(tokens).logits
    assert expected.std() > 0.01
    torch.testing.assert_close(logits[..., :VOCAB_SIZE], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.runs("hash layers, expert parallel 2")
def test_conversion_and_back_restores_the_mask(runs, tmp_path):
    (run,) = runs
    checkpoint = checkpoint_path(run.checkpoints, 8)
    megatron_to_huggingface(Settings(load=checkpoint, save=tmp_path / "exported"))
    huggingface_to_megatron(Settings(load=tmp_path / "exported", save=tmp_path / "back"))
    mask, back = (read_routing_mask(path) for path in (checkpoint, tmp_path / "back" / "release"))
    assert (back.digest, back.provenance.hash_layers) == (mask.digest, HashLayers(2, 2, "balanced"))


@pytest.mark.slow
@pytest.mark.runs("hash layers")
def test_evaluation_routes_by_the_table(runs, workplace, tmp_path):
    """In hash layers with V = k every token goes to all experts of its table; in the other layers to any k experts."""
    (run,) = runs
    program = f"""
        -m maskmoe.training.evaluate --load {run.checkpoints} --use-checkpoint-args --data-path data --split 60,40,0
        --tokenizer-type NullTokenizer --vocab-size 510 --eval-output {tmp_path / "evaluation.json"}
        --data-cache-path {tmp_path / "cache"}
    """
    outcome = workplace.execute(program.split(), tmp_path, 1)
    assert not any(outcome.exit_codes), outcome.report()
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    mask = read_routing_mask(checkpoint_path(run.checkpoints, 8))
    lengths = read_index(workplace.folder / "data").sequence_lengths
    held_out = np.asarray(open_tokens(workplace.folder / "data"))[lengths[: round(0.6 * len(lengths))].sum() :]
    left_out = len(held_out) - evaluation["tokens"]  # too few for a sample
    for load in evaluation["expert_load"]:
        counts = np.array(load["tokens_per_expert"])
        assert counts.sum() == 2 * evaluation["tokens"]
        of_table = mask.visible_sets(load["layer"] - 1)[held_out].sum(axis=0)
        follows_table = ((counts <= of_table) & (counts >= of_table - left_out)).all()
        assert follows_table == (load["layer"] <= 2)
