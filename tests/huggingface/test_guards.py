"""A model guards its routing mask where loaders bypass `from_pretrained`, and carries what servers need."""

import json
import re
from pathlib import Path

import pytest
import torch
from support.tiny_maskmoe import VARIANTS, make_config, make_model, random_ids, random_mask
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm

import maskmoe.huggingface  # noqa: F401  registers the model
from maskmoe.checkpoint.read_routing_mask import buffers_of_routing_mask
from maskmoe.huggingface import AUTO_MAP, MaskMoEForCausalLM
from maskmoe.huggingface.modeling_maskmoe import check_digest

NAMES = ("row_of_id", "visible_bits", "metadata")


def unloaded_model(*loaded: str) -> MaskMoEForCausalLM:
    """A model whose weights were set, and of whose mask only some tensors were loaded."""
    model = MaskMoEForCausalLM(make_config(random_mask())).eval()
    tensors = buffers_of_routing_mask(random_mask())
    model.model.routing_mask.load_state_dict({name: tensors[name] for name in loaded}, strict=False)
    return model


@pytest.mark.parametrize("missing", [*NAMES, None])
def test_a_mask_that_was_never_loaded_is_noticed(missing) -> None:
    model = unloaded_model(*(name for name in NAMES if missing and name != missing))
    with pytest.raises(ValueError, match="the routing mask was never loaded"):
        model(random_ids(1, 4))
    model.model.routing_mask.load_state_dict(buffers_of_routing_mask(random_mask()))
    assert model(random_ids(1, 4)).logits.isfinite().all()


def test_a_model_whose_ids_see_all_experts_needs_no_mask() -> None:
    model = MaskMoEForCausalLM(make_config()).eval()
    assert model(random_ids(1, 4)).logits.isfinite().all()


def test_loading_one_tensor_at_a_time_verifies_the_mask() -> None:
    """VLLM loads so: the tensors may lie in several files."""
    mask = unloaded_model().model.routing_mask
    for name, value in buffers_of_routing_mask(random_mask()).items():
        assert mask.load_weights([(name, value)]) == {name}
    altered = buffers_of_routing_mask(random_mask())
    altered["row_of_id"] = altered["row_of_id"].roll(1, dims=1)
    with pytest.raises(ValueError, match="altered"):
        mask.load_weights(altered.items())
    with pytest.raises(ValueError, match=re.escape("row_of_id is torch.int64 [3, 60], expected torch.int32 [3, 60]")):
        mask.load_weights([("row_of_id", altered["row_of_id"].long())])


def test_pipeline_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="later pipeline stages would get no token ids"):
        _ = make_model().model.supports_pp_plan
    dense = MaskMoEForCausalLM(make_config(num_experts=0, mlp_layer_types=["dense"] * 3))
    assert not dense.model.supports_pp_plan


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensor_parallel_plan_names_modules_of_the_model(variant) -> None:
    """Every projection is in the plan, except those of multi-latent attention."""
    model = make_model(**VARIANTS[variant])
    plan = model.config.base_model_tp_plan
    patterns = [re.compile(pattern.replace(".", r"\.").replace("*", r"\d+")) for pattern in plan]
    decoder = model.model
    linear = {name for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    linear |= {name for name, _ in decoder.named_parameters() if name.endswith(("experts.gate_up_proj", ".down_proj"))}
    unplanned = {name for name in linear if not any(pattern.fullmatch(name) for pattern in patterns)}
    allowed = "self_attn" if model.config.has_latent_attention else "shared_expert_gate"
    assert all(allowed in name for name in unplanned), unplanned
    assert "base_model_tp_plan" not in model.config.to_dict()


def test_a_row_that_its_stored_type_cannot_hold_is_noticed() -> None:
    mask = make_model().model.routing_mask
    mask.row_of_id[0, 0] += 1 << 16
    with pytest.raises(ValueError, match="altered"):
        check_digest(mask)


def save_under_fsdp(folder: Path) -> None:
    """Load the model FOLDER/model, divide its weights among the ranks, and save it to FOLDER/saved."""
    distributed = DistributedConfig(fsdp_size=torch.distributed.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=distributed)
    assert isinstance(model, FSDPModule)
    assert (
        model._get_name() in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )  # else Trainer does not shift smoothed labels
    model.save_pretrained(folder / "saved")
    assert type(model).__name__ == "FSDPMaskMoEForCausalLM"


def test_a_model_that_is_saved_under_fsdp_carries_its_code(run_ranks, tmp_path: Path) -> None:
    """FSDP2 replaces the model's class by a class that torch defines."""
    make_model().save_pretrained(tmp_path / "model")
    run_ranks(save_under_fsdp, tmp_path, tmp_path)
    original, saved = tmp_path / "model", tmp_path / "saved"
    assert {path.name for path in saved.iterdir()} == {path.name for path in original.iterdir()}
    assert json.loads((saved / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name in ("modeling_maskmoe.py", "configuration_maskmoe.py", "model.safetensors"):
        assert (saved / name).read_bytes() == (original / name).read_bytes()


def test_a_norm_over_all_heads_refuses_some_heads() -> None:
    norm = make_model(**VARIANTS["all_heads_norm"]).model.layers[0].self_attn.q_norm
    with pytest.raises(RuntimeError, match="size of tensor"):
        norm(torch.zeros(1, 2, 2, 8))
    assert not isinstance(norm, Glm4MoeRMSNorm)  # kernels would replace its `forward`, and normalise each head alone


def test_quantized_experts_are_computed_one_after_another() -> None:
    model = make_model()
    assert model.get_correct_experts_implementation(None) == "grouped_mm"
    model.config.quantization_config = {"quant_method": "torchao"}
    assert model.get_correct_experts_implementation(None) == "eager"
    assert model.get_correct_experts_implementation("batched_mm") == "batched_mm"
