"""The settings of a configuration that a mask cannot work with, and the defaults that differ."""

import numpy as np
import pytest
import torch
from support.small_moe import make_config, make_mask

from maskmoe.errors import UserError
from maskmoe.training.settings.config_checks import check_settings

MASK = make_mask(np.ones((4, 10, 8), bool))
LAYOUT = [["embedding", "decoder"], ["decoder"] * 3, ["mtp"], ["loss"]]


def make(**settings):
    defaults = {"num_experts": 8, "num_layers": 4, "moe_aux_loss_coeff": 0.01, "pipeline_dtype": torch.float32}
    return make_config(**defaults | settings)


def test_supported_settings_are_accepted_and_no_default_differs():
    assert check_settings(make(), MASK) == []


@pytest.mark.parametrize("kind", [None, "p2p", "all_gather"])
def test_context_parallelism_without_transformer_engine_is_accepted(kind):
    config = make(context_parallel_size=2, transformer_impl="local", cp_comm_type=kind)
    assert check_settings(config, MASK) == []
    config.cp_comm_type = "a2a"
    with pytest.raises(UserError, match="--cp-comm-type"):
        check_settings(config, MASK)


def test_interleaved_pipeline_of_two_stages_needs_overlap():
    pipeline = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    with pytest.raises(UserError, match="overlap_p2p_comm=True"):
        check_settings(make(**pipeline), MASK)
    assert check_settings(make(**pipeline, overlap_p2p_comm=True, batch_p2p_comm=False), MASK) == []


@pytest.mark.parametrize("pattern", ["*E*E*E*E", "*E*E*E/*E"])
def test_hybrid_model_is_accepted(pattern):
    decoder, *predictions = pattern.split("/")
    config = make(is_hybrid_model=True, num_layers=len(decoder), mtp_num_layers=len(predictions) or None)
    assert check_settings(config, MASK, hybrid_layer_pattern=pattern) == []


def test_defaults_that_differ_are_reported():
    differences = check_settings(make(moe_router_dtype=None, moe_aux_loss_coeff=0.0), MASK)
    assert differences == [
        "moe_router_dtype is None, MaskMoE's default is 'fp32'",
        "moe_aux_loss_coeff is 0.0, MaskMoE's default is 0.01",
    ]


def test_one_error_names_everything_that_is_refused():
    mask = make_mask(np.ones((3, 10, 4), bool))
    config = make(moe_router_load_balancing_type="sinkhorn", moe_aux_loss_coeff=0.0, tensor_model_parallel_size=2)
    with pytest.raises(UserError) as error:
        check_settings(config, mask)
    for part in ("sinkhorn", "--sequence-parallel", "its number of experts is 4, the model's is 8"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "pattern", "named"),
    [
        ({"num_experts": None}, None, "--routing-mask without --num-experts"),
        ({"moe_layer_freq": 0}, None, "--moe-layer-freq must be"),
        ({"moe_layer_freq": [0] * 4}, None, "--moe-layer-freq must be"),
        ({}, "*-*-", "--hybrid-layer-pattern with E without"),
        ({"num_layers": 8}, "*E*E*E*E/*E", "or --mtp-num-layers"),
        ({"num_layers": 8, "mtp_num_layers": 2}, "*E*E*E*E/*E", "or --mtp-num-layers"),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": LAYOUT, "mtp_num_layers": 1},
            None,
            "--pipeline-model-parallel-layout with m",
        ),
    ],
    ids=["no experts", "frequency 0", "no layer with experts", "no E", "no prediction", "another prediction", "layout"],
)
def test_settings_that_arguments_have_in_another_form_are_refused(settings, pattern, named):
    with pytest.raises(UserError, match=named):
        check_settings(make(**settings), MASK, pattern)
