"""Models of other families compute the same as MaskMoE models, and settings that MaskMoE cannot express are refused."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.converted_models import (
    CONFIGS,
    VOCAB_SIZE,
    add_multi_token_prediction,
    in_transformers,
    logits_of,
    random_ids,
    save_model,
)
from transformers import AutoModelForCausalLM

from maskmoe.conversion.families import open_huggingface
from maskmoe.conversion.import_huggingface import open_model
from maskmoe.conversion.model_tensors import mtp_tensor_shapes
from maskmoe.conversion.tensor_sources import Block
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask

# Attention and experts add up fp32 numbers in another order. The largest difference seen is 3e-6, for logits of about
# 5 in magnitude.
ROUNDING = 1e-5


def edit_config(folder: Path, **values: Any) -> None:
    """Set fields of config.json; the value `...` removes a field."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", ["as published", "as modules are named", "in shards"])
def test_logits_equal_the_originals(name, layout, tmp_path):
    settings = {"save_original_format": layout != "as modules are named"}
    original = save_model(name, tmp_path, **settings, max_shard_size="20KB" if layout == "in shards" else "5GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (layout == "in shards")
    opened = open_huggingface(tmp_path)
    model = in_transformers(opened)
    ids = random_ids()
    expected = logits_of(original, ids)
    assert expected.abs().max() > 1
    torch.testing.assert_close(logits_of(model, ids), expected, atol=ROUNDING, rtol=0)
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 0)


def test_older_configuration_without_what_transformers_adds(tmp_path):
    """As models were published in 2023."""
    original = save_model("llama, linear", tmp_path)
    rotary = {"rope_parameters": ..., "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    newer = ("dtype", "head_dim", "attention_bias", "mlp_bias", "hidden_act", "tie_word_embeddings", "use_cache")
    edit_config(tmp_path, **rotary, **dict.fromkeys(newer, ...), torch_dtype="float32")
    opened = open_huggingface(tmp_path)
    assert opened.config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    ids = random_ids()
    torch.testing.assert_close(logits_of(in_transformers(opened), ids), logits_of(original, ids), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("llama", {"mlp_only_layers": [1], "num_experts": 6, "qk_norm": "head", "clip_qkv": 1.0}),
        ("mistral", {"attention_bias": True, "mlp_bias": True, "kv_lora_rank": 8}),
        ("mixtral", {"routed_scaling_factor": 2.5, "decoder_sparse_step": 2, "norm_topk_prob": False}),
        ("qwen2_moe", {"routed_scaling_factor": 2.0, "attention_bias": True, "first_k_dense_replace": 2}),
        ("qwen3_moe", {"scoring_func": "sigmoid", "shared_expert_intermediate_size": 8}),
        ("deepseek_v3", {"decoder_sparse_step": 2, "mlp_layer_types": ["dense"] * 3, "qk_norm": "head"}),
    ],
)
def test_settings_of_other_families_are_ignored_as_in_transformers(tmp_path, name, values):
    save_model(name, tmp_path)
    edit_config(tmp_path, **values)
    original, ids = AutoModelForCausalLM.from_pretrained(tmp_path), random_ids()
    model = in_transformers(open_huggingface(tmp_path))
    torch.testing.assert_close(logits_of(model, ids), logits_of(original, ids), atol=ROUNDING, rtol=0)


def test_computed_and_tied_tensors_are_ignored(tmp_path):
    save_model("llama, tied", tmp_path)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(tmp_path, add)
    assert "lm_head.weight" not in open_huggingface(tmp_path).source.tensors
    edit_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model.*; set tie_word_embeddings to false"):
        open_huggingface(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=False)
    assert "lm_head.weight" in open_huggingface(tmp_path).source.tensors


def test_mask_for_a_tokenizer_with_fewer_ids_than_rows(tmp_path):
    save_model("mixtral", tmp_path)
    mask = build_routing_mask(MaskRecipe.from_preset("hash", 6, 3), vocab_size=VOCAB_SIZE - 7)
    row_of_id = in_transformers(open_huggingface(tmp_path, mask)).model.routing_mask.row_of_id
    assert row_of_id.shape == (3, VOCAB_SIZE)
    assert torch.equal(row_of_id[:, :-7], torch.from_numpy(mask.row_of_id.copy()))


@pytest.mark.parametrize("name", ["mixtral", "llama"])
def test_refuses_a_mask_that_does_not_fit(name, tmp_path):
    save_model(name, tmp_path)
    with pytest.raises(UserError, match="vocabulary size is 68" if name == "mixtral" else "no experts to route to"):
        open_huggingface(tmp_path, build_routing_mask(MaskRecipe.from_preset("hash", 6, 3), vocab_size=VOCAB_SIZE + 1))


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
REFUSED = {
    "llama": [
        *({"model_type": "gpt2"}, {"model_type": ...}, {"hidden_size": "32"}, {"is_causal": False}),
        *({"attention_bias": True}, {"mlp_bias": True}, {"num_hidden_layers": 2}),
        {"rope_parameters": LINEAR | {"rope_type": "dynamic"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
    "mistral": [{"sliding_window": 16}],
    "mixtral": [
        *({"num_local_experts": 8}, {"hidden_act": "gelu"}),
        {"sliding_window": 16, "layer_types": ["full_attention"] * 3},
    ],
    "qwen2": [{"use_sliding_window": True, "layer_types": ..., "sliding_window": 16, "max_window_layers": 0}],
    "olmoe": [{"clip_qkv": 8.0}],
    "deepseek_v3": [
        *({"q_lora_rank": None}, {"rms_norm_eps": 1e-5}, {"rope_interleave": False}),
        *({"num_experts_per_tok": 2}, {"num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}),
        {"rope_parameters": LINEAR},
    ],
}


@pytest.mark.parametrize(("name", "values"), [(name, values) for name, each in REFUSED.items() for values in each])
def test_refuses_settings(name, values, tmp_path):
    save_model(name, tmp_path)
    edit_config(tmp_path, **values)
    with pytest.raises(UserError) as error:
        open_huggingface(tmp_path)
    assert "\n" not in str(error.value)


WRONG = st.sampled_from([None, True, 0, -1, 1.5, "x", [], [1], {}])


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """The folder of a model of each family with special settings, by the name of the family."""
    folder = tmp_path_factory.mktemp("families")
    for name in ("llama", "mixtral", "qwen3_moe", "deepseek_v3"):
        save_model(name, folder / name)
    return {path.name: (path, json.loads((path / "config.json").read_text())) for path in folder.iterdir()}


@given(data=st.data())
def test_altered_settings_are_an_error_for_users(families, data):
    folder, config = families[data.draw(st.sampled_from(sorted(families)))]
    field, value = data.draw(st.sampled_from(sorted(config))), data.draw(WRONG)
    if field == "rope_parameters":
        value = config[field] | {data.draw(st.sampled_from(sorted(config[field]))): value}
    edit_config(folder, **config | {field: value})
    with suppress(UserError):
        open_model(folder)


def test_reads_multi_token_prediction(tmp_path):
    original = save_model("deepseek_v3", tmp_path)
    assert open_huggingface(tmp_path).config["num_nextn_predict_layers"] == 0
    added = add_multi_token_prediction(tmp_path)
    opened = open_huggingface(tmp_path)
    assert opened.config["num_nextn_predict_layers"] == 1
    layer = {
        name: opened.source.read(Block.whole(name, shape)) for name, shape in mtp_tensor_shapes(opened.config).items()
    }
    prefix = "model.layers.3."
    assert {name for name in layer if ".experts." not in name} == {name for name in added if ".experts." not in name}
    for name, tensor in added.items():
        if match := re.search(r"experts\.(\d)\.(gate|up|down)_proj", name):
            stack = layer[f"{prefix}mlp.experts.{'down' if match[2] == 'down' else 'gate_up'}_proj"][int(match[1])]
            found = {"gate": stack[:16], "up": stack[16:], "down": stack}[match[2]]
            assert torch.equal(found, tensor)
        else:
            assert torch.equal(layer[name], tensor)
    ids = random_ids()
    torch.testing.assert_close(logits_of(in_transformers(opened), ids), logits_of(original, ids), atol=ROUNDING, rtol=0)
    edit_tensors(tmp_path, lambda tensors: tensors[f"{prefix}shared_head.head.weight"].add_(1))
    with pytest.raises(UserError, match=r"layers\.3\.shared_head\.head\.weight differs from lm_head\.weight$"):
        open_huggingface(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(f"{prefix}shared_head.head.weight"))
    edit_tensors(tmp_path, lambda tensors: tensors.pop(f"{prefix}enorm.weight"))
    with pytest.raises(UserError, match=r"lacks model\.layers\.3\.enorm\.weight$"):
        open_huggingface(tmp_path)
