"""Megatron's arguments and the configuration of the transformers model describe the same model."""

import math
from argparse import Namespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmoe.conversion.config_mapping import (
    args_from_config,
    config_from_args,
    further_flags,
    gpt_args,
    hybrid_args,
    is_stacked,
    updated_args,
)
from maskmoe.conversion.model_tensors import mtp_tensor_shapes, tensor_shapes
from maskmoe.conversion.tensor_mapping import EXPERT_NORMS, MegatronLayout, map_tensors
from maskmoe.errors import UserError
from maskmoe.huggingface import MaskMoEConfig

ROPE = (
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
LATENT_ROPE = (
    {"rope_type": "default"},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.5,
        "mscale_all_dim": 0.0,
        "attention_factor": 0.05 * math.log(4.0) + 1.0,
    },
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "attention_factor": 1.0,
    },
)
LATENT_SIZES = ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


@st.composite
def attentions(draw):
    """Draw the fields about attention."""
    rope_theta = {"rope_theta": draw(st.sampled_from([10000.0, 12345.5]))}
    if draw(st.booleans()):
        return dict.fromkeys(LATENT_SIZES, 4) | {
            "q_lora_rank": draw(st.sampled_from([None, 6])),
            "num_key_value_heads": 4,
            "head_dim": 4,
            "rope_parameters": draw(st.sampled_from(LATENT_ROPE)) | rope_theta,
            "attention_bias": False,
            "qk_norm": draw(st.sampled_from([None, "latent"])),
        }
    fields = dict.fromkeys(LATENT_SIZES) | {
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "head_dim": draw(st.sampled_from([2, 4])),
        "rope_parameters": draw(st.sampled_from(ROPE)) | rope_theta,
        "attention_bias": draw(st.booleans()),
        "qk_norm": draw(st.sampled_from([None, "head", "all_heads"])),
    }
    if draw(st.booleans()):
        fields["rope_parameters"]["partial_rotary_factor"] = 0.5
    return fields


@st.composite
def configs(draw):
    """Draw the fields of a model that both Megatron and transformers can express."""
    layers = draw(st.integers(1, 4))
    fields = draw(attentions()) | {
        "vocab_size": draw(st.integers(1, 300)),
        "hidden_size": draw(st.sampled_from([8, 24])),
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 6,
        "max_position_embeddings": 128,
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "tie_word_embeddings": draw(st.booleans()),
        "hidden_act": "silu",
        "initializer_range": 0.01,
        "attention_dropout": 0.0,
        "num_nextn_predict_layers": draw(st.integers(0, 2)),
        "mtp_use_repeated_layer": draw(st.booleans()),
        "mlp_layer_types": draw(st.lists(st.sampled_from(["sparse", "dense"]), min_size=layers, max_size=layers)),
        "num_experts": 0,
    }
    if "sparse" not in fields["mlp_layer_types"]:
        return fields
    scores = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]))
    topk = draw(st.sampled_from([1, 2]))
    grouped = draw(st.booleans())
    shared = draw(st.sampled_from([0, 3]))
    return fields | {
        "num_experts": 8,
        "num_experts_per_tok": topk,
        "moe_intermediate_size": 5,
        "scoring_func": scores,
        "norm_topk_prob": scores != "softmax" or (topk > 1 and draw(st.booleans())),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "use_expert_bias": scores != "softmax" and draw(st.booleans()),
        "n_group": 4 if grouped else None,
        "topk_group": 1 if grouped else None,
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": bool(shared) and draw(st.booleans()),
        "router_aux_loss_coef": 0.02,
        "aux_loss_tokens": draw(st.sampled_from(["all", "routable"])),
    }


MASK = {"num_tables": 1, "num_rows": 9, "row_dtype": "int16", "metadata_bytes": 7}


@given(configs())
def test_arguments_and_configuration_describe_the_same_model(fields):
    MaskMoEConfig(**fields)  # raises if the drawn fields are invalid
    args = args_from_config(fields)
    assert config_from_args(args, fields["vocab_size"]) == fields
    assert is_stacked(args) == (len(set(fields["mlp_layer_types"])) == 1)
    # The hybrid model of the same layers.
    hybrid = hybrid_args(args, fields)
    assert config_from_args(hybrid, fields["vocab_size"]) == fields
    assert not is_stacked(hybrid)
    attention = "*" if fields["kv_lora_rank"] is None else "+"
    symbols = [attention + {"sparse": "E", "dense": "-"}[kind] for kind in fields["mlp_layer_types"]]
    prediction = f"/{symbols[-1]}" * fields["num_nextn_predict_layers"]
    assert (hybrid.hybrid_layer_pattern, hybrid.moe_layer_freq) == ("".join(symbols) + prediction, 1)
    assert hybrid.num_layers == 2 * fields["num_hidden_layers"]
    assert hybrid.mtp_num_layers == args.mtp_num_layers
    assert vars(gpt_args(hybrid)).items() >= vars(args).items()


@given(configs(), configs(), st.booleans())
def test_updated_arguments_describe_the_new_configuration(trained, fields, was_hybrid):
    """The configuration may even be that of another model. Arguments that no configuration describes stay."""
    record = {"hidden_dropout": 0.1, "seed": 7, "padded_vocab_size": 150, "make_vocab_size_divisible_by": 50}
    args = Namespace(**vars(args_from_config(trained)) | record)
    args = hybrid_args(args, trained) if was_hybrid else args
    updated = updated_args(args, fields)
    assert config_from_args(updated, fields["vocab_size"]) == fields
    if fields["vocab_size"] > 150:
        padded = 256 if fields["vocab_size"] <= 256 else 384
        record |= {"padded_vocab_size": padded, "make_vocab_size_divisible_by": 128}
    assert vars(updated).items() >= record.items()


@given(
    configs(),
    st.sampled_from(["GPT", "stacked", "hybrid"]),
    st.integers(0, 20),
    st.sampled_from(EXPERT_NORMS),
)
def test_every_element_has_one_place(fields, kind, padding, norm):
    """Creating a mapping checks that it uses every element once; this test creates mappings of all kinds of models."""
    is_stacked = kind == "stacked" and len(set(fields["mlp_layer_types"])) == 1
    config = fields | {"routing_mask": MASK if fields["num_experts"] else None}
    mapping = map_tensors(config, MegatronLayout(is_stacked, fields["vocab_size"] + padding, norm, kind == "hybrid"))
    shapes = tensor_shapes(config)
    mtp_shapes = mtp_tensor_shapes(config)
    num_mtp_layers = len({name.split(".")[2] for name in mtp_shapes})
    depth = fields["num_nextn_predict_layers"]
    assert num_mtp_layers == (min(depth, 1) if fields["mtp_use_repeated_layer"] else depth)
    assert len({name.split(".")[2] for name in mapping.megatron if name.startswith("mtp.layers.")}) == num_mtp_layers
    shapes |= mtp_shapes
    assert {name: shape for name, shape in mapping.huggingface.items() if name in shapes} == shapes
    assert len(mapping.huggingface) - len(shapes) == bool(padding) * (1 if fields["tie_word_embeddings"] else 2)
    assert any(name.startswith("decoder.layers.0.") for name in mapping.megatron) == (not is_stacked)


def test_flags_that_a_run_needs_besides_the_checkpoint():
    args = plain_args(tokenizer_type="NullTokenizer", vocab_size=100, bf16=True, moe_aux_loss_tokens="routable")
    assert further_flags(args) == ["--bf16", "--vocab-size 100", "--moe-aux-loss-tokens routable"]
    assert further_flags(plain_args(tokenizer_type="HuggingFaceTokenizer")) == []


def plain_args(**changes):
    fields = MaskMoEConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=8, num_experts=4).to_dict()
    return Namespace(**vars(args_from_config(fields)) | changes)


LATENT = {"multi_latent_attention": True}
REFUSED = [
    LATENT | {"rotary_percent": 0.5},
    LATENT | {"rope_type": "rope", "rotary_scaling_factor": 2.0, "mscale_all_dim": 1.0},
    *({"normalization": "LayerNorm"}, {"add_bias_linear": True}, {"swiglu": False}, {"window_size": (3, 3)}),
    *({"moe_router_load_balancing_type": kind} for kind in ("sinkhorn", ["quantile_balancing"])),
]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_settings_that_transformers_cannot_express(changes):
    with pytest.raises(UserError, match=[*changes][-1].replace("_", "[_-]")):
        config_from_args(plain_args(**changes), 100)


def latent_fields(**rope):
    """Return the fields of latent attention with further settings of the rotary embedding."""
    rope = {"rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32} | rope
    sizes = dict.fromkeys(LATENT_SIZES, 4) | {"num_key_value_heads": None, "head_dim": None}
    return sizes | {"rope_parameters": rope}


INEXPRESSIBLE = [
    *({"hidden_act": "gelu"}, {"is_causal": False}, {"norm_topk_prob": True, "num_experts_per_tok": 1}),
    {"scoring_func": "sigmoid", "norm_topk_prob": False, "num_experts_per_tok": 2},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
    latent_fields(rope_type="linear"),
    latent_fields(rope_type="yarn", attention_factor=1.5),
    latent_fields(rope_type="yarn", mscale_all_dim=1.0),  # transformers' default for `mscale` is none
    latent_fields(rope_type="yarn", truncate=False),
]


@pytest.mark.parametrize("changes", INEXPRESSIBLE, ids=str)
def test_settings_that_megatron_cannot_express(changes):
    with pytest.raises(UserError, match="rope" if "rope_parameters" in changes else next(iter(changes))):
        args_from_config(MaskMoEConfig(num_hidden_layers=2, **changes).to_dict())


def test_aux_losses_of_several_kinds():
    args = plain_args(moe_router_load_balancing_type=["seq_aux_loss", "aux_loss"], moe_aux_loss_coeff=[0.1, 0.2])
    assert config_from_args(args, 100)["router_aux_loss_coef"] == 0.2
    args = plain_args(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.1)
    assert config_from_args(args, 100)["router_aux_loss_coef"] == 0.0
